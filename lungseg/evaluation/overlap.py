"""Scores of a prediction against a reference, per tissue class, by the rules of METHOD 0.4.

Nothing is dropped silently: every class of every case (in slice mode: of every annotated slice) yields one
``ClassScore`` whose status says what happened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.label_counts import (
    View,
    class_counts,
    confusion_counts,
    label_bytes,
    require_known,
    require_view,
)
from lungseg.evaluation.scores import (
    ABSENT,
    FALSE_TISSUE,
    MISSED,
    MISSING_PREDICTION,
    MISSING_REFERENCE,
    SCORED,
    SLICES,
    UNUSABLE,
    VOLUME,
    ClassScore,
    ScoreSettings,
)
from lungseg.evaluation.surface import (
    bounding_box,
    lung_box_diagonal_mm,
    require_masks,
    require_spacing,
    surface_figures,
)


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice similarity coefficient of two masks.

    Parameters
    ----------
    prediction, reference : bool arrays of one shape

    Returns
    -------
    float
        2|A∩B| / (|A|+|B|), 0 to 1; 0 if one mask is empty, ``nan`` if both are.

    Raises
    ------
    InputError
        If the shapes differ or a mask is not bool.
    """
    require_masks(prediction, reference)
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return math.nan
    return 2.0 * int(np.count_nonzero(prediction & reference)) / total


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    view: View,
    lung_mask: np.ndarray | None = None,
    case_id: str,
    patient_id: str,
    settings: ScoreSettings = ScoreSettings(),
) -> list[ClassScore]:
    """Scores of one case: one row per class of the view, in the view's order; in slice mode one such set per slice.

    Parameters
    ----------
    prediction, reference : integer arrays of one shape, (Z, Y, X)
        Label maps with the ids of METHOD 0.1, on the reference's grid. 255 (unclassified) never matches anything.
    spacing_mm : sequence of float
        (z, y, x) in mm.
    view : mapping of class name to label ids
        For example ``tissue.VIEWS["tissues"]``.
    lung_mask : bool or integer array of that shape, optional
        Non-zero = lung; its box gives the penalty of a missed class. Default: where the reference is not 0.
    case_id, patient_id : str
        Copied into the scores.
    settings : ScoreSettings
        Definitions and mode.

    Returns
    -------
    list of ClassScore
        Enough reference: `scored`, or `missed` (Dice 0) if nothing was predicted. Less: not averaged; `false tissue`
        if something was predicted, else `absent`. In slice mode distances and penalty are in plane, and only
        annotated slices are looked at.

    Raises
    ------
    InputError
        If shapes differ, an array is no label map, a label id is unknown, the lung mask is empty, or slice mode finds
        no annotated slice.

    Source
    ------
    METHOD 0.4.
    """
    spacing = require_spacing(spacing_mm, reference.ndim)
    require_same_shape(prediction, reference, case_id)
    require_view(view)
    prediction = label_bytes(prediction, side="prediction", case_id=case_id)
    reference = label_bytes(reference, side="reference", case_id=case_id)
    # Everything beyond the box is 0 on both sides and has no surface.
    box = bounding_box(prediction | reference) or (slice(0),) * reference.ndim
    cropped = prediction[box], reference[box]
    whole = confusion_counts(*cropped)
    require_known(whole.sum(axis=1), view, side="prediction", case_id=case_id)
    require_known(whole.sum(axis=0), view, side="reference", case_id=case_id)
    penalty_mm = _penalty_mm(reference, lung_mask, spacing, case_id, settings)
    voxel_ml = math.prod(spacing) / 1000.0
    scores = []
    for slice_index in annotated_parts(reference, settings, case_id):
        pair = cropped if slice_index is None else (prediction[slice_index], reference[slice_index])
        counts = whole if slice_index is None else confusion_counts(*pair)
        for name, ids in view.items():
            row = _Row(case_id, patient_id, name, slice_index, settings, voxel_ml, penalty_mm)
            scores.append(_score_class(row, class_counts(counts, ids), pair, ids, spacing))
    return scores


def missing_prediction_scores(
    reference: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    view: View,
    lung_mask: np.ndarray | None = None,
    case_id: str,
    patient_id: str,
    settings: ScoreSettings = ScoreSettings(),
) -> list[ClassScore]:
    """Scores of a reference that has no prediction: every class it holds is missed.

    Parameters
    ----------
    reference : integer array, shape (Z, Y, X)
    spacing_mm, view, lung_mask, case_id, patient_id, settings
        As in ``score_case``.

    Returns
    -------
    list of ClassScore
        Rows as ``score_case`` gives them, all `missing prediction`: Dice 0 and the penalised HD95 where the class
        counts, ``nan`` elsewhere; predicted volumes are ``nan``, for they are unknown, not 0.

    Source
    ------
    METHOD 0.4; RELIABILITY row 70.
    """
    spacing = require_spacing(spacing_mm, reference.ndim)
    require_view(view)
    reference = label_bytes(reference, side="reference", case_id=case_id)
    whole = confusion_counts(reference, reference)
    require_known(whole.sum(axis=0), view, side="reference", case_id=case_id)
    penalty_mm = _penalty_mm(reference, lung_mask, spacing, case_id, settings)
    voxel_ml = math.prod(spacing) / 1000.0
    scores = []
    for slice_index in annotated_parts(reference, settings, case_id):
        counts = whole if slice_index is None else confusion_counts(reference[slice_index], reference[slice_index])
        for name, ids in view.items():
            row = _Row(case_id, patient_id, name, slice_index, settings, voxel_ml, penalty_mm)
            reference_ml = class_counts(counts, ids)[1] * voxel_ml
            scores.append(row.missed(MISSING_PREDICTION, reference_ml, math.nan))
    return scores


def missing_reference_scores(
    prediction: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    view: View,
    case_id: str,
    patient_id: str,
    settings: ScoreSettings = ScoreSettings(),
) -> list[ClassScore]:
    """Rows of a prediction that has no reference: nothing can be scored, but it is counted.

    Parameters
    ----------
    prediction : integer array, shape (Z, Y, X)
    spacing_mm, view, case_id, patient_id, settings
        As in ``score_case``.

    Returns
    -------
    list of ClassScore
        One row per class, all `missing reference` and ``nan`` but for the predicted volume. In slice mode too it is
        one row per class, for the whole volume: without a reference no slice is annotated.

    Source
    ------
    RELIABILITY row 70.
    """
    spacing = require_spacing(spacing_mm, prediction.ndim)
    require_view(view)
    prediction = label_bytes(prediction, side="prediction", case_id=case_id)
    counts = confusion_counts(prediction, prediction)
    require_known(counts.sum(axis=1), view, side="prediction", case_id=case_id)
    voxel_ml = math.prod(spacing) / 1000.0
    rows = [_Row(case_id, patient_id, name, None, settings, voxel_ml, math.nan) for name in view]
    return [
        row.uncounted(MISSING_REFERENCE, math.nan, class_counts(counts, ids)[0] * voxel_ml, math.nan)
        for row, ids in zip(rows, view.values(), strict=True)
    ]


def unusable_scores(*, view: View, case_id: str, patient_id: str) -> list[ClassScore]:
    """Rows of a case of which a side cannot be used: one per class, all `unusable` and ``nan``, so that it is counted.

    Parameters
    ----------
    view, case_id, patient_id
        As in ``score_case``.

    Source
    ------
    RELIABILITY row 71.
    """
    nan = math.nan
    return [
        ClassScore(case_id, patient_id, name, UNUSABLE, nan, nan, nan, nan, nan, nan, nan, nan, nan) for name in view
    ]


@dataclass(frozen=True)
class _Row:
    """What a class's row holds before anything is measured."""

    case_id: str
    patient_id: str
    tissue: str
    slice_index: int | None
    settings: ScoreSettings
    voxel_ml: float
    penalty_mm: float

    def uncounted(self, status: str, reference_ml: float, predicted_ml: float, overlap_ml: float) -> ClassScore:
        """Row that is counted but not averaged."""
        nan = math.nan
        return ClassScore(
            self.case_id, self.patient_id, self.tissue, status, nan, nan, nan, nan,
            reference_ml, predicted_ml, predicted_ml - reference_ml, nan, nan,
            overlap_ml=overlap_ml, slice_index=self.slice_index,
        )  # fmt: skip

    def missed(self, status: str, reference_ml: float, predicted_ml: float) -> ClassScore:
        """Row of a class of which nothing was predicted."""
        if not self.settings.counts(reference_ml):
            return self.uncounted(status, reference_ml, predicted_ml, 0.0)
        nan = math.nan
        error_ml = predicted_ml - reference_ml
        return ClassScore(
            self.case_id, self.patient_id, self.tissue, status, 0.0, 0.0, nan, 0.0,
            reference_ml, predicted_ml, error_ml, nan, self.penalty_mm,
            volume_error_percent=100.0 * error_ml / reference_ml,
            overlap_ml=0.0, surface_dice=0.0, slice_index=self.slice_index,
        )  # fmt: skip


def _score_class(
    row: _Row,
    counts: tuple[int, int, int],
    pair: tuple[np.ndarray, np.ndarray],
    ids: Sequence[int],
    spacing: tuple[float, ...],
) -> ClassScore:
    """Score of one class; ``counts`` are its voxels predicted, in the reference and in both."""
    num_predicted, num_wanted, hit = counts
    predicted_ml, reference_ml = num_predicted * row.voxel_ml, num_wanted * row.voxel_ml
    if not row.settings.counts(reference_ml):
        return row.uncounted(FALSE_TISSUE if num_predicted else ABSENT, reference_ml, predicted_ml, hit * row.voxel_ml)
    if not num_predicted:
        return row.missed(MISSED, reference_ml, predicted_ml)
    figures = surface_figures(
        _mask(pair[0], ids), _mask(pair[1], ids),
        spacing_mm=spacing[-pair[0].ndim :], hd95=row.settings.hd95, tolerance_mm=row.settings.tolerance_mm,
    )  # fmt: skip
    return ClassScore(
        case_id=row.case_id,
        patient_id=row.patient_id,
        tissue=row.tissue,
        status=SCORED,
        dice=2.0 * hit / (num_predicted + num_wanted),
        iou=hit / (num_predicted + num_wanted - hit),
        precision=hit / num_predicted,
        recall=hit / num_wanted,
        reference_ml=reference_ml,
        predicted_ml=predicted_ml,
        volume_error_ml=predicted_ml - reference_ml,
        hd95_mm=figures.hd95_mm,
        penalised_hd95_mm=figures.hd95_mm,
        volume_error_percent=100.0 * (num_predicted - num_wanted) / num_wanted,
        overlap_ml=hit * row.voxel_ml,
        assd_mm=figures.assd_mm,
        surface_dice=figures.surface_dice,
        slice_index=row.slice_index,
    )


def _mask(labels: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Voxels with one of the ids: some comparisons of bytes are far faster than one look-up."""
    mask = labels == int(ids[0])
    for other in ids[1:]:
        mask |= labels == int(other)
    return mask


def require_same_shape(prediction: np.ndarray, reference: np.ndarray, case_id: str) -> None:
    """Raise ``InputError`` naming the case unless both label maps have one shape."""
    if prediction.shape != reference.shape:
        raise InputError(
            f"case {case_id}: prediction {prediction.shape} and reference {reference.shape} lie on different grids; "
            "resample the prediction to the reference first"
        )


def annotated_parts(reference: np.ndarray, settings: ScoreSettings, case_id: str) -> Sequence[int | None]:
    """Slices to score one by one, in order; ``[None]`` for the volume as a whole."""
    if settings.mode == VOLUME:
        return [None]
    if reference.ndim != 3:
        raise InputError(f"case {case_id}: slice mode needs volumes (Z, Y, X), not shape {reference.shape}")
    if settings.slices is None:
        annotated = np.flatnonzero(reference.any(axis=(1, 2))).tolist()
    else:
        annotated = sorted(set(map(int, settings.slices)))
    if not annotated:
        raise InputError(f"case {case_id}: the reference has no annotated slice (all voxels are 0)")
    if annotated[0] < 0 or annotated[-1] >= len(reference):
        raise InputError(f"case {case_id}: annotated slices {annotated} do not lie in 0 to {len(reference) - 1}")
    return annotated


def _penalty_mm(
    reference: np.ndarray,
    lung_mask: np.ndarray | None,
    spacing: tuple[float, ...],
    case_id: str,
    settings: ScoreSettings,
) -> float:
    """What a missed class is charged, in mm; nan only if no class can be missed (empty reference, no lung mask)."""
    lung = reference if lung_mask is None else lung_mask
    if lung.shape != reference.shape:
        raise InputError(f"case {case_id}: lung mask {lung.shape} and reference {reference.shape} differ in shape")
    if settings.mode == SLICES:
        # in plane, and of the whole lung: a slice may miss the lung mask and still hold the class
        penalty = lung_box_diagonal_mm(np.any(lung, axis=0), spacing[1:])
    else:
        penalty = lung_box_diagonal_mm(lung, spacing)
    if lung_mask is not None and math.isnan(penalty):
        raise InputError(f"case {case_id}: the lung mask is empty, so a missed class cannot be penalised")
    return penalty

"""Scores of a prediction against a reference, per tissue class, by the rules of METHOD 0.4.

Nothing is dropped silently: every class of every case (in slice mode: of every annotated slice) yields one
``ClassScore`` whose status says what happened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.confusion import class_counts, confusion_counts
from lungseg.evaluation.surface import (
    ASSD_DEFINITION,
    BORDER,
    HD95_DEFINITIONS,
    lung_box_diagonal_mm,
    require_definition,
    require_masks,
    require_spacing,
    surface_dice_definition,
    surface_figures,
)
from lungseg.tissue import OUTSIDE, UNCLASSIFIED, Tissue

MIN_REFERENCE_ML = 1.0
"""In a volume a class counts from this reference volume on, inclusive (METHOD 0.4); in a slice from one voxel on."""
VOLUME_TOLERANCE_ML = 1e-9
"""Rounding allowed in the comparison with ``MIN_REFERENCE_ML``: voxels × spacing is not exact in binary."""

SCORED = "scored"
MISSED = "missed"
FALSE_TISSUE = "false tissue"
ABSENT = "absent"
MISSING_PREDICTION = "missing prediction"
MISSING_REFERENCE = "missing reference"
STATUSES = (SCORED, MISSED, FALSE_TISSUE, ABSENT, MISSING_PREDICTION, MISSING_REFERENCE)

VOLUME, SLICES = "volume", "slices"
COUNTING_RULES: Mapping[str, str] = {
    VOLUME: (
        f"3-D, per case. A class counts in a case where the reference holds at least {MIN_REFERENCE_ML:g} mL of it; "
        "one not predicted there scores Dice 0 and is counted as missed; tissue predicted where the reference holds "
        "less is false tissue (mL) and not averaged."
    ),
    SLICES: (
        "Per annotated axial slice, distances in plane. A class counts in a slice where the reference holds a voxel "
        "of it; one not predicted there scores Dice 0 and is counted as missed; tissue predicted where the reference "
        "holds none is false tissue (mL) and not averaged."
    ),
}
"""What counts in each mode: printed with every table."""
PENALTY_DEFINITION = "The penalised HD95 charges a missed class the diagonal of the lung's bounding box."

View = Mapping[str, Sequence[int]]
"""Class name -> label ids merged into it, as in ``tissue.VIEWS``."""


@dataclass(frozen=True)
class ScoreSettings:
    """How pairs are scored; part of every table's text through ``definitions``."""

    hd95: str = BORDER
    """Which HD95: a key of ``surface.HD95_DEFINITIONS``."""
    tolerance_mm: float = 2.0
    """Tolerance of the surface Dice in mm, inclusive."""
    mode: str = VOLUME
    """`volume` (3-D) or `slices` (each annotated axial slice by itself)."""
    slices: Sequence[int] | None = None
    """Annotated slices, as indices on the reference's first axis. None: those where the reference is not all 0."""

    def __post_init__(self) -> None:
        require_definition(self.hd95, self.tolerance_mm)
        if self.mode not in COUNTING_RULES:
            raise InputError(f"unknown mode {self.mode!r}: choose one of {', '.join(COUNTING_RULES)}")
        if self.slices is not None and self.mode != SLICES:
            raise InputError("annotated slices are given, but the mode is not `slices`")

    @property
    def definitions(self) -> tuple[str, ...]:
        """Sentences that say what was counted and measured, for the text of every table."""
        return (
            COUNTING_RULES[self.mode],
            HD95_DEFINITIONS[self.hd95],
            PENALTY_DEFINITION,
            ASSD_DEFINITION,
            surface_dice_definition(self.tolerance_mm),
        )


@dataclass(frozen=True)
class ClassScore:
    """One class of one case, or of one slice. Numbers that cannot be had, or must not be averaged, are ``nan``.

    "Counts" means: the reference holds enough of the class (``MIN_REFERENCE_ML``, in slice mode one voxel).
    """

    case_id: str
    """De-identified id of the scan."""
    patient_id: str
    """De-identified id of the patient; statistics resample patients."""
    tissue: str
    """Name of the class in the view."""
    status: str
    """One of ``STATUSES``."""
    dice: float
    """0 to 1; 0 when missed; nan when the class does not count."""
    iou: float
    """0 to 1, as ``dice``."""
    precision: float
    """0 to 1; nan when nothing was predicted."""
    recall: float
    """0 to 1; 0 when missed."""
    reference_ml: float
    """Reference volume in mL; nan when there is no reference file."""
    predicted_ml: float
    """Predicted volume in mL; nan when there is no prediction file. With status `false tissue` all of it is false."""
    volume_error_ml: float
    """Predicted minus reference volume in mL."""
    hd95_mm: float
    """HD95 in mm by the definition of the settings; nan when missed."""
    penalised_hd95_mm: float
    """HD95 in mm; diagonal of the lung's box when missed."""
    volume_error_percent: float = math.nan
    """Volume error in % of the reference volume; -100 when missed, nan when the class does not count."""
    overlap_ml: float = math.nan
    """Volume of A∩B in mL, for the pooled Dice: 2·Σ overlap / (Σ predicted + Σ reference) over all rows with a
    reference. 0 when there is no prediction file; nan when there is no reference file."""
    assd_mm: float = math.nan
    """Average symmetric surface distance in mm; nan when missed."""
    surface_dice: float = math.nan
    """Surface Dice at the tolerance of the settings, 0 to 1; 0 when missed, nan when the class does not count."""
    slice_index: int | None = None
    """Axial index on the reference's grid in slice mode; None for a volume."""

    @property
    def is_averaged(self) -> bool:
        """Whether this row enters the means: its reference holds enough of the class."""
        return not math.isnan(self.dice)

    @property
    def is_missed(self) -> bool:
        """Whether the class counts and no voxel of it was predicted."""
        return self.is_averaged and self.status in (MISSED, MISSING_PREDICTION)


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
    if prediction.shape != reference.shape:
        raise InputError(
            f"case {case_id}: prediction {prediction.shape} and reference {reference.shape} lie on different grids; "
            "resample the prediction to the reference first"
        )
    require_view(view)
    prediction = label_bytes(prediction, side="prediction", case_id=case_id)
    reference = label_bytes(reference, side="reference", case_id=case_id)
    whole = confusion_counts(prediction, reference)
    _require_known(whole.sum(axis=1), view, side="prediction", case_id=case_id)
    _require_known(whole.sum(axis=0), view, side="reference", case_id=case_id)
    penalty_mm = _penalty_mm(reference, lung_mask, spacing, case_id, settings)
    voxel_ml = math.prod(spacing) / 1000.0
    scores = []
    for slice_index in _parts(reference, settings, case_id):
        part = slice(None) if slice_index is None else slice_index
        pair = prediction[part], reference[part]
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
    _require_known(whole.sum(axis=0), view, side="reference", case_id=case_id)
    penalty_mm = _penalty_mm(reference, lung_mask, spacing, case_id, settings)
    voxel_ml = math.prod(spacing) / 1000.0
    scores = []
    for slice_index in _parts(reference, settings, case_id):
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
    _require_known(counts.sum(axis=1), view, side="prediction", case_id=case_id)
    voxel_ml = math.prod(spacing) / 1000.0
    rows = [_Row(case_id, patient_id, name, None, settings, voxel_ml, math.nan) for name in view]
    return [
        row.uncounted(MISSING_REFERENCE, math.nan, class_counts(counts, ids)[0] * voxel_ml, math.nan)
        for row, ids in zip(rows, view.values(), strict=True)
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

    def counts(self, reference_ml: float) -> bool:
        """Whether the reference holds enough of the class to be averaged."""
        if self.settings.mode == SLICES:
            return reference_ml > 0
        return reference_ml >= MIN_REFERENCE_ML - VOLUME_TOLERANCE_ML

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
        if not self.counts(reference_ml):
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
    if not row.counts(reference_ml):
        return row.uncounted(FALSE_TISSUE if num_predicted else ABSENT, reference_ml, predicted_ml, hit * row.voxel_ml)
    if not num_predicted:
        return row.missed(MISSED, reference_ml, predicted_ml)
    table = np.zeros(256, dtype=bool)
    table[list(map(int, ids))] = True
    figures = surface_figures(
        table[pair[0]], table[pair[1]],
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


def require_view(view: View) -> None:
    """Raise ``InputError`` unless every class of the view has ids that mean tissue."""
    for name, ids in view.items():
        if not ids or any(int(i) in (OUTSIDE, UNCLASSIFIED) or not 0 <= int(i) <= 255 for i in ids):
            raise InputError(f"class {name!r} of the view needs tissue ids 1 to 254, not {list(map(int, ids))}")


def label_bytes(labels: np.ndarray, *, side: str, case_id: str) -> np.ndarray:
    """Label map as uint8; ``InputError`` naming case and side if it is none."""
    if labels.dtype.kind not in "iu":
        raise InputError(f"case {case_id}: the {side} must be an integer label map, not {labels.dtype}")
    if labels.dtype == np.uint8:
        return labels
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise InputError(
            f"case {case_id}: the {side} has labels from {labels.min()} to {labels.max()}; known ids are 0 to 255. "
            "Map foreign labels to them first"
        )
    return labels.astype(np.uint8)


def _require_known(counts: np.ndarray, view: View, *, side: str, case_id: str) -> None:
    """Ids that neither the taxonomy nor the view knows are an error, never ignored; ``counts`` is voxels per id."""
    known = {OUTSIDE, UNCLASSIFIED, *map(int, Tissue)} | {int(i) for ids in view.values() for i in ids}
    foreign = sorted(set(np.flatnonzero(counts).tolist()) - known)
    if foreign:
        raise InputError(
            f"case {case_id}: the {side} has unknown label ids {foreign}; known ids are {sorted(known)}. "
            "Map foreign labels to them first"
        )


def _parts(reference: np.ndarray, settings: ScoreSettings, case_id: str) -> Sequence[int | None]:
    """Slices to score one by one, or None for the volume as a whole."""
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

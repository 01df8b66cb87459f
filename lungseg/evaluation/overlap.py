"""Overlap of a prediction with a reference, per tissue class, by the rules of METHOD 0.4.

Nothing is dropped silently: every class of every case yields one ``ClassScore`` whose status says what happened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.surface import hd95_mm, lung_box_diagonal_mm, require_masks, require_spacing
from lungseg.tissue import OUTSIDE, UNCLASSIFIED, Tissue

MIN_REFERENCE_ML = 1.0
"""A class counts in a case from this reference volume on, inclusive (METHOD 0.4)."""
VOLUME_TOLERANCE_ML = 1e-9
"""Rounding allowed in the comparison with ``MIN_REFERENCE_ML``: voxels × spacing is not exact in binary."""

SCORED = "scored"
MISSED = "missed"
FALSE_TISSUE = "false tissue"
ABSENT = "absent"
MISSING_PREDICTION = "missing prediction"
STATUSES = (SCORED, MISSED, FALSE_TISSUE, ABSENT, MISSING_PREDICTION)

View = Mapping[str, Sequence[int]]
"""Class name -> label ids merged into it, as in ``tissue.VIEWS``."""


@dataclass(frozen=True)
class ClassScore:
    """One class of one case. Numbers that cannot be had, or that must not be averaged, are ``nan``."""

    case_id: str
    """De-identified id of the scan."""
    patient_id: str
    """De-identified id of the patient; statistics resample patients."""
    tissue: str
    """Name of the class in the view."""
    status: str
    """scored, missed, false tissue, absent or missing prediction."""
    dice: float
    """0 to 1; 0 when missed; nan when the reference has less than ``MIN_REFERENCE_ML``."""
    iou: float
    """0 to 1, as ``dice``."""
    precision: float
    """0 to 1; nan when nothing was predicted."""
    recall: float
    """0 to 1; 0 when missed."""
    reference_ml: float
    """Reference volume in mL."""
    predicted_ml: float
    """Predicted volume in mL; nan when there is no prediction file. With status `false tissue` all of it is false."""
    volume_error_ml: float
    """Predicted minus reference volume in mL."""
    hd95_mm: float
    """HD95 in mm; nan when missed."""
    penalised_hd95_mm: float
    """HD95 in mm; diagonal of the lung's box when missed."""

    @property
    def is_averaged(self) -> bool:
        """Whether this class-case pair enters the means: its reference holds enough of the class."""
        return not math.isnan(self.dice)

    @property
    def is_missed(self) -> bool:
        """Whether the reference holds the class and no voxel of it was predicted."""
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
        return float("nan")
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
) -> list[ClassScore]:
    """Scores of one case: one row per class of the view, in the view's order.

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

    Returns
    -------
    list of ClassScore
        Reference ≥ 1 mL: `scored`, or `missed` (Dice 0) if nothing was predicted. Less: not averaged; `false tissue`
        if something was predicted, else `absent`.

    Raises
    ------
    InputError
        If shapes differ, an array is no label map, a label id is unknown, or the lung mask is empty.

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
    tables = _view_tables(view)
    prediction = _checked_labels(prediction, view, side="prediction", case_id=case_id)
    reference = _checked_labels(reference, view, side="reference", case_id=case_id)
    penalty_mm = _penalty_mm(reference, lung_mask, spacing, case_id)
    return [
        _score_class(table[prediction], table[reference], spacing, penalty_mm, names=(case_id, patient_id, name))
        for name, table in tables.items()
    ]


def missing_prediction_scores(
    reference: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    view: View,
    lung_mask: np.ndarray | None = None,
    case_id: str,
    patient_id: str,
) -> list[ClassScore]:
    """Scores of a reference that has no prediction: every class it holds is missed.

    Parameters
    ----------
    reference : integer array, shape (Z, Y, X)
    spacing_mm, view, lung_mask, case_id, patient_id
        As in ``score_case``.

    Returns
    -------
    list of ClassScore
        One row per class, all `missing prediction`: Dice 0 and the penalised HD95 where the reference has ≥ 1 mL,
        ``nan`` below; predicted volumes are ``nan``, for they are unknown, not 0.

    Source
    ------
    METHOD 0.4; RELIABILITY row 70.
    """
    spacing = require_spacing(spacing_mm, reference.ndim)
    tables = _view_tables(view)
    reference = _checked_labels(reference, view, side="reference", case_id=case_id)
    penalty_mm = _penalty_mm(reference, lung_mask, spacing, case_id)
    nan = float("nan")
    scores = []
    for name, table in tables.items():
        reference_ml = _volume_ml(table[reference], spacing)
        counts = _counts(reference_ml)
        zero = 0.0 if counts else nan
        scores.append(
            ClassScore(
                case_id, patient_id, name, MISSING_PREDICTION, zero, zero, nan, zero, reference_ml, nan, nan, nan,
                penalty_mm if counts else nan,
            )
        )  # fmt: skip
    return scores


def _score_class(
    predicted: np.ndarray,
    wanted: np.ndarray,
    spacing: tuple[float, ...],
    penalty_mm: float,
    *,
    names: tuple[str, str, str],
) -> ClassScore:
    """Score of one class; ``names`` is (case, patient, class)."""
    predicted_ml, reference_ml = _volume_ml(predicted, spacing), _volume_ml(wanted, spacing)
    volumes = (reference_ml, predicted_ml, predicted_ml - reference_ml)
    nan = float("nan")
    if not _counts(reference_ml):
        status = FALSE_TISSUE if predicted_ml > 0 else ABSENT
        return ClassScore(*names, status, nan, nan, nan, nan, *volumes, nan, nan)
    if predicted_ml == 0:
        return ClassScore(*names, MISSED, 0.0, 0.0, nan, 0.0, *volumes, nan, penalty_mm)
    hit = int(np.count_nonzero(predicted & wanted))
    num_predicted, num_wanted = int(np.count_nonzero(predicted)), int(np.count_nonzero(wanted))
    overlap = (
        2.0 * hit / (num_predicted + num_wanted),
        hit / (num_predicted + num_wanted - hit),
        hit / num_predicted,
        hit / num_wanted,
    )
    distance = hd95_mm(predicted, wanted, spacing_mm=spacing)
    return ClassScore(*names, SCORED, *overlap, *volumes, distance, distance)


def _counts(reference_ml: float) -> bool:
    """Whether the reference holds enough of a class for it to be averaged."""
    return reference_ml >= MIN_REFERENCE_ML - VOLUME_TOLERANCE_ML


def _volume_ml(mask: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Volume of the true voxels in mL."""
    return int(np.count_nonzero(mask)) * math.prod(spacing) / 1000.0


def _view_tables(view: View) -> dict[str, np.ndarray]:
    """Per class a bool lookup table over the 256 label ids; ids that mean "no tissue" are refused."""
    tables = {}
    for name, ids in view.items():
        wrong = [int(i) for i in ids if int(i) in (OUTSIDE, UNCLASSIFIED) or not 0 <= int(i) <= 255]
        if wrong or not ids:
            raise InputError(f"class {name!r} of the view needs tissue ids 1 to 254, not {list(map(int, ids))}")
        table = np.zeros(256, dtype=bool)
        table[[int(i) for i in ids]] = True
        tables[name] = table
    return tables


def _checked_labels(labels: np.ndarray, view: View, *, side: str, case_id: str) -> np.ndarray:
    """Labels as uint8; ids that neither the taxonomy nor the view knows are an error, never ignored."""
    if labels.dtype.kind not in "iu":
        raise InputError(f"case {case_id}: the {side} must be an integer label map, not {labels.dtype}")
    known = {OUTSIDE, UNCLASSIFIED, *map(int, Tissue)} | {int(i) for ids in view.values() for i in ids}
    if labels.dtype != np.uint8:
        if labels.size and (labels.min() < 0 or labels.max() > 255):
            raise InputError(
                f"case {case_id}: the {side} has labels from {labels.min()} to {labels.max()}; "
                f"known ids are {sorted(known)}"
            )
        labels = labels.astype(np.uint8)
    is_foreign = np.ones(256, dtype=bool)
    is_foreign[sorted(known)] = False
    foreign = is_foreign[labels]
    if foreign.any():
        raise InputError(
            f"case {case_id}: the {side} has unknown label ids {np.unique(labels[foreign]).tolist()}; "
            f"known ids are {sorted(known)}. Map foreign labels to them first"
        )
    return labels


def _penalty_mm(reference: np.ndarray, lung_mask: np.ndarray | None, spacing: tuple[float, ...], case_id: str) -> float:
    """What a missed class is charged, in mm; nan only if no class can be missed (empty reference, no lung mask)."""
    if lung_mask is None:
        return lung_box_diagonal_mm(reference, spacing)
    if lung_mask.shape != reference.shape:
        raise InputError(f"case {case_id}: lung mask {lung_mask.shape} and reference {reference.shape} differ in shape")
    penalty = lung_box_diagonal_mm(lung_mask, spacing)
    if math.isnan(penalty):
        raise InputError(f"case {case_id}: the lung mask is empty, so a missed class cannot be penalised")
    return penalty

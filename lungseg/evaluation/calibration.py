"""Whether confidences can be believed: of the voxels a map is 80 % sure of, 80 % should be right.

A label map's confidence is uint8, so the counts of right and wrong voxels at each of its 256 levels hold all there is
to know: they add up over cases, and every figure follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.label_counts import MAX_VOXELS_AT_ONCE, NUM_IDS, View
from lungseg.evaluation.writers import csv_text
from lungseg.tissue import OUTSIDE, UNCLASSIFIED

NUM_BINS = 15
"""Bins of equal width of the confidence: Guo et al., ICML 2017."""
LOW_CONFIDENCE = 0.5
"""Below it the class shown has less than half of the posterior."""
LEVELS = 256
"""A confidence of 0 to 1 is stored as 0 to 255."""
CALIBRATION_DEFINITION = (
    f"ECE: expected calibration error of the confidence of the class shown, {NUM_BINS} bins of equal width, over the "
    f"voxels of the label map whose tissue the reference tells, all cases pooled; low confidence: below "
    f"{LOW_CONFIDENCE:g}."
)
CURVE_COLUMNS = ("method", "confidence_low", "confidence_high", "num_voxels", "mean_confidence", "accuracy")


@dataclass(frozen=True)
class ReliabilityBin:
    """One point of the reliability curve; ``nan`` where the bin is empty."""

    low: float
    """Lower end of the confidence, exclusive but for the first bin."""
    high: float
    """Upper end, inclusive."""
    num_voxels: int
    mean_confidence: float
    """0 to 1."""
    accuracy: float
    """Share of voxels whose class is that of the reference, 0 to 1."""


@dataclass(frozen=True)
class Calibration:
    """How confidence and accuracy of a method agree."""

    num_voxels: int
    ece: float
    """Mean distance of confidence and accuracy over the bins, weighted by their voxels, 0 to 1; ``nan`` of nothing."""
    accuracy: float
    mean_confidence: float
    low_confidence_share: float
    """Share of voxels below ``LOW_CONFIDENCE``, 0 to 1."""
    curve: tuple[ReliabilityBin, ...]


def calibration_counts(confidence: np.ndarray, prediction: np.ndarray, reference: np.ndarray, view: View) -> np.ndarray:
    """Wrong and right voxels at each level of confidence.

    Parameters
    ----------
    confidence : uint8 array
        0 to 255: confidence of the class shown.
    prediction, reference : uint8 arrays of the same shape
        Tissue ids. Voxels that either has outside of the lung, and those the reference leaves unclassified, are not
        counted; those the prediction leaves unclassified are wrong.
    view : mapping of class name to ids
        Ids of one class are the same tissue; a reference of no class is not counted.

    Returns
    -------
    int64 array, shape (256, 2)
        Column 0: wrong, column 1: right. Counts of cases add up.

    Raises
    ------
    InputError
        If shapes differ or an array is not uint8.
    """
    arrays = (confidence, prediction, reference)
    if any(a.shape != confidence.shape or a.dtype != np.uint8 for a in arrays):
        raise InputError("confidence, prediction and reference must be uint8 arrays of one shape")
    classes = np.zeros(NUM_IDS, dtype=np.uint8)
    for number, ids in enumerate(view.values(), start=1):
        classes[list(map(int, ids))] = number
    classes[[OUTSIDE, UNCLASSIFIED]] = 0
    counts = np.zeros(2 * LEVELS, dtype=np.int64)
    flat = [a.reshape(-1) for a in arrays]
    for start in range(0, confidence.size, MAX_VOXELS_AT_ONCE):
        sure, shown, true = (a[start : start + MAX_VOXELS_AT_ONCE] for a in flat)
        expected = classes[true]
        known = (expected > 0) & (shown != OUTSIDE)
        right = classes[shown[known]] == expected[known]
        counts += np.bincount(2 * sure[known].astype(np.intp) + right, minlength=2 * LEVELS)
    return counts.reshape(LEVELS, 2)


def calibrate(counts: np.ndarray) -> Calibration:
    """Calibration error, reliability curve and share of low confidence.

    Parameters
    ----------
    counts : int64 array, shape (256, 2)
        Of ``calibration_counts``, added over cases.

    Source
    ------
    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, Eq. 3; bins (low, high] as there.
    """
    levels = np.arange(LEVELS) / (LEVELS - 1)
    num, right = counts.sum(axis=1), counts[:, 1]
    # level k lies in bin ceil(15 k / 255) - 1: whole numbers, so that no level changes its bin by rounding
    bins = np.maximum(-(-np.arange(LEVELS) * NUM_BINS // (LEVELS - 1)) - 1, 0)
    voxels, hits, sure = (
        np.bincount(bins, weights=x, minlength=NUM_BINS).astype(np.float64) for x in (num, right, num * levels)
    )
    curve = tuple(
        ReliabilityBin(
            low=k / NUM_BINS,
            high=(k + 1) / NUM_BINS,
            num_voxels=int(voxels[k]),
            mean_confidence=_ratio(sure[k], voxels[k]),
            accuracy=_ratio(hits[k], voxels[k]),
        )
        for k in range(NUM_BINS)
    )
    total = float(voxels.sum())
    return Calibration(
        num_voxels=int(total),
        ece=_ratio(float(np.abs(sure - hits).sum()), total),
        accuracy=_ratio(float(hits.sum()), total),
        mean_confidence=_ratio(float(sure.sum()), total),
        low_confidence_share=_ratio(float(num[levels < LOW_CONFIDENCE].sum()), total),
        curve=curve,
    )


def _ratio(top: float, below: float) -> float:
    return float(top / below) if below else float("nan")


def calibration_note(method: str, found: Calibration) -> str:
    """One sentence for the text of a table."""
    return (
        f"Calibration of {method}: ECE {found.ece:.3f}, mean confidence {found.mean_confidence:.3f} against an "
        f"accuracy of {found.accuracy:.3f} over {found.num_voxels} voxels; {100 * found.low_confidence_share:.1f} % of "
        "them have low confidence."
    )


def reliability_csv(methods: Mapping[str, Calibration]) -> str:
    """Reliability curves as CSV text, one line for each method and bin; blank where a bin is empty."""
    rows: Sequence[Mapping[str, object]] = [
        dict(
            zip(
                CURVE_COLUMNS,
                (method, point.low, point.high, point.num_voxels, point.mean_confidence, point.accuracy),
                strict=True,
            )
        )
        for method, found in methods.items()
        for point in found.curve
    ]
    return csv_text(CURVE_COLUMNS, rows)

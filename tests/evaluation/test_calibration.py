"""Calibration: against a loop over voxels, by hand, and what does not count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.evaluation.calibration import LEVELS, NUM_BINS, calibrate, calibration_counts, reliability_csv
from lungseg.tissue import VIEWS

VIEW = VIEWS["tissues"]


def maps(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, prediction and reference with every id that may occur."""
    rng = np.random.default_rng(seed)
    ids = np.array([0, 1, 2, 3, 4, 5, 255], dtype=np.uint8)
    shape = (7, 11, 13)
    prediction, reference = (rng.choice(ids, size=shape) for _ in range(2))
    reference = np.where(rng.random(shape) < 0.5, prediction, reference)
    return rng.integers(0, LEVELS, size=shape).astype(np.uint8), prediction, reference


def naive(confidence: np.ndarray, prediction: np.ndarray, reference: np.ndarray) -> tuple[int, float, float]:
    """Voxels, ECE with bins (low, high], share below one half; one voxel at a time."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    low = 0
    for level, shown, true in zip(confidence.flat, prediction.flat, reference.flat, strict=True):
        if shown == 0 or true in (0, 255):
            continue
        value = int(level) / 255
        low += value < 0.5
        place = next(k for k in range(NUM_BINS) if int(level) * NUM_BINS <= 255 * (k + 1))
        bins[place].append((value, shown == true))
    total = sum(map(len, bins))
    gaps = (abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins)
    return total, sum(gaps) / total, low / total


@pytest.mark.parametrize("seed", [1, 2])
def test_counts_and_error_are_those_of_a_loop(seed: int) -> None:
    arrays = maps(seed)
    found = calibrate(calibration_counts(*arrays, VIEW))
    total, ece, low = naive(*arrays)
    assert found.num_voxels == total
    assert found.ece == pytest.approx(ece, abs=1e-12)
    assert found.low_confidence_share == pytest.approx(low, abs=1e-12)
    assert sum(point.num_voxels for point in found.curve) == total


def test_error_against_torchmetrics() -> None:
    """Of the top class; bins meet only at confidences that the two may put on different sides, here none."""
    functional = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    rng = np.random.default_rng(3)
    level = rng.integers(129, LEVELS, size=4000)
    level = level[(level * NUM_BINS) % (LEVELS - 1) != 0].astype(np.uint8)
    right = rng.random(level.size) < 0.8
    sure = torch.from_numpy(level / 255.0)
    probabilities = torch.stack([sure, 1 - sure], dim=1)
    expected = functional.multiclass_calibration_error(
        probabilities, torch.from_numpy(~right).long(), num_classes=2, n_bins=NUM_BINS, norm="l1"
    )
    ones = np.ones_like(level)
    found = calibrate(calibration_counts(level, ones, np.where(right, 1, 2).astype(np.uint8), VIEW))
    assert found.ece == pytest.approx(float(expected), abs=1e-6)


def test_by_hand() -> None:
    """Four voxels sure by 204/255 = 0.8, three of them right; one of 102/255 = 0.4 that is right."""
    confidence = np.array([204, 204, 204, 204, 102], np.uint8)
    counts = calibration_counts(
        confidence, np.array([1, 2, 3, 4, 5], np.uint8), np.array([1, 2, 3, 1, 5], np.uint8), VIEW
    )
    found = calibrate(counts)
    assert found.ece == pytest.approx((4 * abs(0.8 - 0.75) + abs(0.4 - 1.0)) / 5)
    assert (found.accuracy, found.low_confidence_share) == (0.8, 0.2)
    assert found.mean_confidence == pytest.approx(0.72)
    filled = [point for point in found.curve if point.num_voxels]
    assert [(p.low, p.high, p.accuracy) for p in filled] == [(5 / 15, 6 / 15, 1.0), (11 / 15, 12 / 15, 0.75)]


def test_counts_of_cases_add_up() -> None:
    first, second = maps(4), maps(5)
    both = tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))
    np.testing.assert_array_equal(
        calibration_counts(*both, VIEW), calibration_counts(*first, VIEW) + calibration_counts(*second, VIEW)
    )


def test_merged_classes_are_right_for_each_other() -> None:
    sure = np.full(2, 255, np.uint8)
    shown, true = np.array([3, 3], np.uint8), np.array([4, 2], np.uint8)
    view = {"dense": (3, 4), "emphysema": (2,)}
    assert calibration_counts(sure, shown, true, view)[255].tolist() == [1, 1]


def test_nothing_to_count_is_nan_not_zero() -> None:
    nothing = np.zeros((2, 2), np.uint8)
    found = calibrate(calibration_counts(nothing, nothing, nothing, VIEW))
    assert found.num_voxels == 0
    assert math.isnan(found.ece)
    assert math.isnan(found.low_confidence_share)
    lines = reliability_csv({"a": found}).splitlines()
    assert len(lines) == 1 + NUM_BINS
    assert lines[1] == "a,0.000000,0.066667,0,,"


@pytest.mark.parametrize("bad", [np.zeros(3, np.uint8), np.zeros(2, np.int16)])
def test_arrays_that_do_not_fit_are_refused(bad: np.ndarray) -> None:
    good = np.zeros(2, np.uint8)
    with pytest.raises(InputError, match="uint8 arrays of one shape"):
        calibration_counts(good, good, bad, VIEW)

"""Conversion to int16 HU without wrapping, plausibility of HU, and size checks before allocation."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError, ResourceError
from lungseg.scan.hu import allocate, check_hu, clip_notes, to_hu


def chest(seed: int = 0) -> np.ndarray:
    """Air, lung, fat, muscle and a little bone in shares as in a chest CT."""
    rng = np.random.default_rng(seed)
    means = rng.choice([-1000.0, -850.0, -100.0, 40.0, 700.0], p=[0.3, 0.25, 0.15, 0.28, 0.02], size=(20, 40, 40))
    return np.rint(rng.normal(means, 20.0)).clip(-1024, 3071).astype(np.int16)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]
)
def test_extreme_values_never_wrap(dtype) -> None:
    info = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    values = np.array([info.min, 0, 100, info.max], dtype)
    if dtype is np.uint64:
        values[-1] = 2**63 - 1
    out = np.empty(4, np.int16)
    low, high = to_hu(values, out)
    assert out.tolist() == [max(info.min, -1024), 0, 100, min(info.max, 32767)]
    assert (low, high) == (int(info.min < -1024), int(info.max > 32767))


def test_padding_is_counted_and_fractions_are_rounded() -> None:
    out = np.empty(5, np.int16)
    assert to_hu(np.array([-3024.0, -1024.4, -850.6, 0.5, 1.5]), out) == (1, 0)
    assert out.tolist() == [-1024, -1024, -851, 0, 2]
    assert clip_notes(1, 0, 5) == ("20 % of voxels lay below -1024 HU (padding) and were set to it",)
    assert clip_notes(0, 0, 5) == ()
    assert "above 32767" in clip_notes(0, 1, 5)[0]


def test_a_chest_passes_without_notes() -> None:
    assert check_hu(chest()) == ()
    padded = chest()
    padded[:, :8] = -1024
    assert check_hu(padded) == ()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("offset", [1000, 1024])
def test_missing_intercept_is_named(offset: int, padding: bool) -> None:
    shifted = chest() + np.int16(offset)
    if padding:
        shifted[:, :8] = -1024
    with pytest.raises(InputError, match=r"shifted by \+1024"):
        check_hu(shifted)


def test_intercept_applied_twice_is_named() -> None:
    with pytest.raises(InputError, match="shifted by -1024"):
        check_hu((chest() - np.int16(1024)).clip(-1024))


@pytest.mark.parametrize(
    "array",
    [
        np.random.default_rng(0).integers(0, 256, (8, 8, 8)).astype(np.int16),
        np.zeros((4, 4, 4), np.int16),
        np.full((4, 4, 4), 7, np.int16),
        np.random.default_rng(0).gamma(2.0, 150.0, (8, 16, 16)).astype(np.int16),
    ],
    ids=["0-255", "zeros", "constant", "MR-like"],
)
def test_values_that_are_not_hu_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="not HU"):
        check_hu(array)


def test_nothing_but_padding_is_refused() -> None:
    with pytest.raises(InputError, match="no image"):
        check_hu(np.full((4, 4, 4), -1024, np.int16))


def test_clipping_at_the_source_is_noted() -> None:
    (note,) = check_hu(chest().clip(-1000))
    assert "exactly -1000 HU" in note
    assert "clipped at the source" in note


def test_absurd_sizes_are_refused_before_allocation() -> None:
    with pytest.raises(ResourceError, match="30000 x 30000 x 30000"):
        allocate((30000, 30000, 30000), np.int16, name="bomb.nii")
    assert allocate((2, 3, 4), np.uint16, name="x").shape == (2, 3, 4)

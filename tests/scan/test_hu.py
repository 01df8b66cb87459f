"""Conversion to int16 HU without wrapping, plausibility of HU, and size checks before allocation."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError, ResourceError
from lungseg.scan.hu import HuTally, allocate, check_hu, clip_notes, clip_status, to_hu
from lungseg.scan.volume import STATUS_WORDS


def tallied(values: np.ndarray) -> HuTally:
    tally, out = HuTally(), np.empty(values.shape, np.int16)
    for plane, target in zip(values, out, strict=True):
        to_hu(plane, target, tally)
    return tally


def checked(values: np.ndarray) -> tuple[str, ...]:
    return check_hu(values.clip(-1024, 32767).astype(np.int16), tallied(values))


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
    assert checked(chest()) == ()
    padded = chest()
    padded[:, :8] = -1024
    assert checked(padded) == ()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("offset", [1000, 1024])
def test_missing_intercept_is_named(offset: int, padding: bool) -> None:
    shifted = chest() + np.int16(offset)
    if padding:
        shifted[:, :8] = -1024
    with pytest.raises(InputError, match=r"shifted by \+1024"):
        checked(shifted)


def test_intercept_applied_twice_is_named() -> None:
    with pytest.raises(InputError, match="shifted by -1024"):
        checked(chest() - np.int16(1024))


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
        checked(array)


def test_nothing_but_padding_is_refused() -> None:
    with pytest.raises(InputError, match="no image"):
        checked(np.full((4, 4, 4), -1024, np.int16))


def test_clipping_at_the_source_is_noted() -> None:
    (note,) = checked(chest().clip(-1000))
    assert "exactly -1000 HU" in note
    assert "clipped at the source" in note


def test_absurd_sizes_are_refused_before_allocation() -> None:
    with pytest.raises(ResourceError, match="30000 x 30000 x 30000"):
        allocate((30000, 30000, 30000), np.int16, name="bomb.nii")
    assert allocate((2, 3, 4), np.uint16, name="x").shape == (2, 3, 4)


def test_a_tally_holds_the_values_before_they_are_clipped() -> None:
    values = np.array([[[-3024.0, -1024.4, 0.6, 40000.0]], [[np.float64(2**40), -(2.0**40), 1.0, 1.0]]])
    tally = tallied(values)
    assert (tally.minimum, tally.maximum) == (-(2.0**40), 2.0**40)
    assert {int(v) - 32768: int(tally.counts[v]) for v in np.flatnonzero(tally.counts)} == {
        -32768: 1, -3024: 1, -1024: 1, 1: 3, 32767: 2,
    }  # fmt: skip


@pytest.mark.parametrize("padding", [-3024, -2048, -2000, -1500, -1025])
def test_row_15_padding_is_not_clipped_tissue(padding: int) -> None:
    values = chest().astype(np.int32)
    values[:, :12] = padding
    assert clip_status(tallied(values)) == ((), ())


def test_row_15_two_paddings_and_noise_of_air_are_no_loss() -> None:
    values = chest().astype(np.int32)
    values[:, :6], values[:, 6:10] = -3024, -2048
    values[:, 10:20] = np.random.default_rng(0).normal(-1010, 40, (20, 10, 40))
    assert clip_status(tallied(values)) == ((), ())


@pytest.mark.parametrize(("share", "is_clipped"), [(0.02, False), (0.03, False), (0.06, True), (0.2, True)])
@pytest.mark.parametrize("where", [-2600, 60000], ids=["low", "high"])
def test_row_15_more_than_four_percent_lost_is_flagged(share: float, is_clipped: bool, where: int) -> None:
    values = chest().astype(np.int32)
    values[:, :8] = -2000  # padding does not count
    lost = np.random.default_rng(0).random(values.shape) < share
    lost[:, :8] = False
    values[lost] = where + np.random.default_rng(1).integers(-150, 150, values.shape)[lost]
    notes, status = clip_status(tallied(values))
    assert status == (("clipped",) if is_clipped else ())
    assert len(notes) == is_clipped
    assert set(status) <= set(STATUS_WORDS)

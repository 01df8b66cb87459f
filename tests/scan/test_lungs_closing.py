"""Dilation, erosion and closing by balls in mm, against scipy's exact distances."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from lungseg.scan.lungs_closing import HalfGrid, close, dilate, erode
from lungseg.scan.volume import Triple


def blobs() -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(20, 30, 26))
    return ndimage.gaussian_filter(noise, 2.0) > 0.05


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (8.0, 1.9, 2.05)])
@pytest.mark.parametrize("radius", [1.0, 2.0, 5.5, 20.0])
def test_dilation_and_erosion_are_thresholds_of_the_distance(spacing: Triple, radius: float) -> None:
    mask = blobs()
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing)
    inside = ndimage.distance_transform_edt(mask, sampling=spacing)
    np.testing.assert_array_equal(dilate(mask, radius, spacing), outside <= radius)
    np.testing.assert_array_equal(erode(mask, radius, spacing), inside > radius)


def test_empty_and_full_masks() -> None:
    empty = np.zeros((3, 4, 5), dtype=bool)
    assert not dilate(empty, 3.0, (1.0, 1.0, 1.0)).any()
    assert erode(~empty, 3.0, (1.0, 1.0, 1.0)).all()


def test_closing_fills_a_narrow_gap_and_no_wide_one() -> None:
    mask = np.zeros((30, 30, 40), dtype=bool)
    mask[5:25, 5:25, 5:35] = True
    mask[5:25, 15:25, 10:13] = False  # 3 mm wide
    mask[5:25, 10:25, 20:32] = False  # 12 mm
    closed = close(mask, 3.0, (1.0, 1.0, 1.0))
    assert closed[10:20, 15:20, 10:13].all()
    assert not closed[10:20, 15:25, 24:28].any()
    assert not (mask & ~closed).any()


def test_closing_takes_the_first_and_last_slice_as_repeated() -> None:
    mask = np.zeros((6, 20, 20), dtype=bool)
    mask[:, 4:16, 4:16] = True
    mask[:, 8:16, 9:11] = False
    closed = close(mask, 4.0, (2.0, 1.0, 1.0))
    assert (closed == closed[0]).all()
    assert closed[0, 10, 9:11].all()


def test_half_grid_keeps_a_large_ball() -> None:
    grid = np.indices((31, 40, 42)).astype(float)
    ball = ((grid - np.array([15, 20, 21]).reshape(3, 1, 1, 1)) ** 2).sum(axis=0) < 12.0**2
    half = HalfGrid(ball.shape, (2.0, 2.0, 2.0))
    back = half.up(half.down(ball))
    assert 2.0 * (back & ball).sum() / (back.sum() + ball.sum()) > 0.95  # voxels are a sixth of the radius

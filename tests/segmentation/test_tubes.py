"""Tubeness on shapes of known form: a cylinder is round, a plate is flat, noise and grid change little."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from lungseg.errors import InputError
from lungseg.segmentation.tubes import tubeness

SHAPE_MM = (40.0, 40.0, 40.0)


def _scan(shape, spacing_mm, noise_hu=0.0):
    """A tube along (1, 1, 1) or a plate across it, 2 mm wide, in aerated lung; with its voxels."""
    counts = [round(size / s) for size, s in zip(SHAPE_MM, spacing_mm, strict=True)]
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(counts, spacing_mm, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    along = points @ (np.ones(3) / np.sqrt(3.0))
    across = np.sqrt(np.maximum((points**2).sum(axis=-1) - along**2, 0.0))
    solid = across < 1.2 if shape == "tube" else np.abs(along) < 1.0
    volume = gaussian_filter(np.where(solid, 30.0, -850.0), [0.6 / s for s in spacing_mm])
    volume += np.random.default_rng(0).normal(0.0, 1.0, volume.shape) * noise_hu
    inner = (points**2).sum(axis=-1) < 12.0**2
    return volume, solid & inner


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.6, 0.6, 0.6), (1.5, 1.5, 1.5), (2.5, 0.8, 0.8)])
@pytest.mark.parametrize("noise_hu", [0.0, 50.0])
def test_a_tube_is_round_and_a_plate_is_flat(spacing_mm, noise_hu):
    means = {}
    for shape in ("tube", "plate"):
        volume, thin = _scan(shape, spacing_mm, noise_hu)
        ratio = tubeness(volume, np.ones(volume.shape, dtype=bool), thin, spacing_mm=spacing_mm)
        assert ratio.dtype == np.float32
        assert not ratio[~thin].any()
        assert np.abs(ratio).max() <= 1.0
        means[shape] = float(ratio[thin].mean())
    assert means["tube"] > 0.5
    assert abs(means["plate"]) < 0.15


def test_where_septa_are_thinner_than_voxels_form_says_nothing():
    volume, thin = _scan("plate", (2.0, 2.0, 2.0))
    assert thin.any()
    assert not tubeness(volume, np.ones(volume.shape, dtype=bool), thin, spacing_mm=(2.0, 2.0, 2.0)).any()


def test_what_lies_outside_the_lung_does_not_count():
    volume, thin = _scan("tube", (1.0, 1.0, 1.0))
    mask = np.ones(volume.shape, dtype=bool)
    mask[:, :, 26:] = False
    thin = thin & mask
    outside = np.where(mask, volume, 1000.0)
    np.testing.assert_array_equal(
        tubeness(outside, mask, thin, spacing_mm=(1.0, 1.0, 1.0)),
        tubeness(volume, mask, thin, spacing_mm=(1.0, 1.0, 1.0)),
    )


def test_nothing_thin_and_grids_that_do_not_fit():
    volume = np.full((6, 6, 6), -850, dtype=np.int16)
    mask = np.ones(volume.shape, dtype=bool)
    assert not tubeness(volume, mask, np.zeros_like(mask), spacing_mm=(1.0, 1.0, 1.0)).any()
    flat = tubeness(volume, mask, mask, spacing_mm=(1.0, 1.0, 1.0))
    assert not flat.any()
    with pytest.raises(InputError, match="grid"):
        tubeness(volume, mask[1:], mask, spacing_mm=(1.0, 1.0, 1.0))

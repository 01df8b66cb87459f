"""Fat inside the lung mask: even, and as dense as the rim of consolidation, which is thin."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from lungseg.errors import InputError
from lungseg.segmentation.density import smooth_hu
from lungseg.segmentation.fat import fat

SIZE_MM = 60.0


def _scene(spacing, *, noise_hu=20.0, blur_mm=0.8):
    """Aerated lung with a ball of fat and one of consolidation, blurred, noisy, smoothed as the evidence is.

    The masks returned last: the ball of fat but for its blurred rim, and the ball of consolidation."""
    axes = [(np.arange(round(SIZE_MM / s)) + 0.5) * s for s in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    fatty = (z - 30) ** 2 + (y - 30) ** 2 + (x - 16) ** 2 < 8**2
    dense = (z - 30) ** 2 + (y - 30) ** 2 + (x - 44) ** 2 < 8**2
    hu = np.where(fatty, -100.0, np.where(dense, 20.0, -850.0))
    hu = gaussian_filter(hu, [blur_mm / s for s in spacing])
    hu += np.random.default_rng(3).normal(0.0, noise_hu, hu.shape)
    lung = np.ones(hu.shape, dtype=bool)
    smoothed = smooth_hu(hu, lung, [0.6 / s for s in spacing])
    inside = (z - 30) ** 2 + (y - 30) ** 2 + (x - 16) ** 2 < 6.5**2
    return smoothed, lung & (smoothed > -350.0), lung, inside, dense


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (2.5, 0.8, 0.8)])
def test_fat_is_known_and_consolidation_with_its_rim_stays(spacing):
    smoothed, body, lung, fatty, dense = _scene(spacing)
    found = fat(smoothed, body, lung, spacing_mm=spacing)
    assert found.dtype == np.bool_
    assert found[fatty & body].mean() > 0.9
    assert not found[dense].any()
    assert not (found & ~body).any()


def test_noise_hides_fat_and_makes_none():
    spacing = (1.0, 1.0, 1.0)
    smoothed, body, lung, _, dense = _scene(spacing, noise_hu=120.0)
    assert not fat(smoothed, body, lung, spacing_mm=spacing)[dense].any()


def test_what_lies_outside_the_lung_has_no_say():
    spacing = (1.0, 1.0, 1.0)
    smoothed, body, lung, fatty, _ = _scene(spacing)
    lung[30:] = False
    body &= lung
    wall = np.where(lung, smoothed, 40.0)
    found = fat(wall, body, lung, spacing_mm=spacing)
    assert found[fatty & body].mean() > 0.9
    assert not found[30:].any()


def test_other_grids_are_refused():
    smoothed, body, lung, _, _ = _scene((3.0, 3.0, 3.0))
    with pytest.raises(InputError, match="grid"):
        fat(smoothed, body[1:], lung, spacing_mm=(3.0, 3.0, 3.0))

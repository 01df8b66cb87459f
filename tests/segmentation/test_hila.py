"""Vessels of the hila: thick where they enter, thin further in; consolidation is thicker than they are there."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.segmentation.hila import hilar_vessels

SHAPE = (80, 80, 160)
LEFT, RIGHT = 60, 100
"""Ends of the lungs (mm along x); the mediastinum lies between."""


def _lungs(spacing=1.0):
    shape = [round(n / spacing) for n in SHAPE]
    z, y, x = (np.arange(n)[:, None, None].swapaxes(0, axis) * spacing for axis, n in enumerate(shape))
    lung = np.broadcast_to((x < LEFT) | (x >= RIGHT), shape).copy()
    lung[0], lung[-1], lung[:, 0], lung[:, -1], lung[:, :, 0], lung[:, :, -1] = (False,) * 6
    return lung, (z, y, x)


def _ball(axes, centre, radius):
    return sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < radius**2


@pytest.mark.parametrize("spacing", [1.0, 0.7])
def test_a_tapering_vessel_is_known_and_lesions_stay(spacing):
    lung, axes = _lungs(spacing)
    z, y, x = axes
    depth = LEFT - x  # into the left lung of the picture
    radius = np.maximum(5.5 - 0.4 * depth, 2.6)
    vessel = lung & ((z - 30) ** 2 + (y - 30) ** 2 < radius**2) & (depth < 12) & (depth > 0)
    central = lung & _ball(axes, (55, 55, 112), 11.0)  # consolidation 12 mm from the mediastinum
    nodule = lung & _ball(axes, (40, 40, 20), 4.0)
    found = hilar_vessels(vessel | central | nodule, lung, spacing_mm=(spacing,) * 3)
    assert found.dtype == np.bool_
    assert found[vessel].mean() > 0.5
    assert found[central].mean() < 0.05
    assert not found[nodule].any()
    assert not found[~(vessel | central | nodule)].any()


def test_without_a_mediastinum_nothing_is_a_hilum():
    lung, axes = _lungs()
    body = lung & _ball(axes, (40, 40, 55), 3.0)
    assert hilar_vessels(body, lung, spacing_mm=(1.0, 1.0, 1.0)).any()
    single = lung & (axes[2] < LEFT)
    assert not hilar_vessels(body, single, spacing_mm=(1.0, 1.0, 1.0)).any()
    # The dome of the diaphragm under one lung, with atelectasis on it.
    dome = np.broadcast_to((axes[0] - 10) ** 2 + (axes[2] - 80) ** 2 > 25**2, lung.shape) & (axes[1] > 2)
    near = np.broadcast_to((axes[0] - 10) ** 2 + (axes[2] - 80) ** 2 < 29**2, lung.shape) & dome
    assert near.any()
    assert not hilar_vessels(near, dome, spacing_mm=(1.0, 1.0, 1.0)).any()
    assert not hilar_vessels(np.zeros_like(lung), lung, spacing_mm=(1.0, 1.0, 1.0)).any()
    with pytest.raises(InputError, match="grid"):
        hilar_vessels(body[1:], lung, spacing_mm=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 2), (2, 9, 1)])
def test_volumes_smaller_than_the_working_grid(shape):
    full = np.ones(shape, dtype=bool)
    assert not hilar_vessels(full, full, spacing_mm=(0.3, 0.3, 0.3)).any()


def test_lungs_that_touch_in_front_are_two():
    lung, axes = _lungs()
    body = lung & _ball(axes, (40, 40, 55), 3.0)
    lung[:, 1:12, LEFT:RIGHT] = True
    assert hilar_vessels(body, lung, spacing_mm=(1.0, 1.0, 1.0)).any()

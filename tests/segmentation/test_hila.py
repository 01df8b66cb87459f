"""Vessels of the hila: thick where they enter, thin further in; consolidation is thicker than they are there."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.segmentation.hila import hilar_vessels

MILLIMETRE = (1.0, 1.0, 1.0)
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


def _by_width(body, lung, spacing_mm=MILLIMETRE):
    """Vessels where nothing branches."""
    return hilar_vessels(body, np.zeros_like(body), np.zeros(body.shape, np.float32), lung, spacing_mm=spacing_mm)


@pytest.mark.parametrize("spacing", [1.0, 0.7])
def test_a_tapering_vessel_is_known_and_lesions_stay(spacing):
    lung, axes = _lungs(spacing)
    z, y, x = axes
    depth = LEFT - x  # into the left lung of the picture
    radius = np.maximum(5.5 - 0.4 * depth, 2.6)
    vessel = lung & ((z - 30) ** 2 + (y - 30) ** 2 < radius**2) & (depth < 12) & (depth > 0)
    central = lung & _ball(axes, (55, 55, 112), 11.0)  # consolidation 12 mm from the mediastinum
    nodule = lung & _ball(axes, (40, 40, 20), 4.0)
    found = _by_width(vessel | central | nodule, lung, (spacing,) * 3)
    assert found.dtype == np.bool_
    assert found[vessel].mean() > 0.5
    assert found[central].mean() < 0.05
    assert not found[nodule].any()
    assert not found[~(vessel | central | nodule)].any()


def test_without_a_mediastinum_nothing_is_a_hilum():
    lung, axes = _lungs()
    body = lung & _ball(axes, (40, 40, 55), 3.0)
    assert _by_width(body, lung).any()
    single = lung & (axes[2] < LEFT)
    assert not _by_width(body, single).any()
    # The dome of the diaphragm under one lung, with atelectasis on it.
    dome = np.broadcast_to((axes[0] - 10) ** 2 + (axes[2] - 80) ** 2 > 25**2, lung.shape) & (axes[1] > 2)
    near = np.broadcast_to((axes[0] - 10) ** 2 + (axes[2] - 80) ** 2 < 29**2, lung.shape) & dome
    assert near.any()
    assert not _by_width(near, dome).any()
    assert not _by_width(np.zeros_like(lung), lung).any()
    with pytest.raises(InputError, match="grid"):
        _by_width(body[1:], lung)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 2), (2, 9, 1)])
def test_volumes_smaller_than_the_working_grid(shape):
    full = np.ones(shape, dtype=bool)
    assert not _by_width(full, full, (0.3, 0.3, 0.3)).any()


def test_lungs_that_touch_in_front_are_two():
    lung, axes = _lungs()
    body = lung & _ball(axes, (40, 40, 55), 3.0)
    lung[:, 1:12, LEFT:RIGHT] = True
    assert _by_width(body, lung).any()


def _branching(radius, *, branches=True, flat=False):
    """A root at the mediastinum with vessels or sheets all around it; a body as wide far from it."""
    lung, (z, y, x) = _lungs()
    root = lung & _ball((z, y, x), (40, 40, LEFT - radius + 1), radius)
    lesion = lung & _ball((z, y, x), (40, 40, 12), radius)
    grid = np.zeros(lung.shape, dtype=bool)
    if branches:
        grid |= (z % 5 < 2) & ((y % 5 < 2) | flat) & (x < LEFT)
    thin = grid & lung & ~root & ~lesion
    form = np.where(thin, np.float32(0.02 if flat else 0.6), np.float32(0.0))
    return root, lesion, hilar_vessels(root | lesion, thin, form, lung, spacing_mm=MILLIMETRE)


@pytest.mark.parametrize(
    ("radius", "given", "taken"),
    [
        (8.5, {}, True),
        (8.5, {"branches": False}, False),  # a tumour of the hilum
        (8.5, {"flat": True}, False),  # septa
        (11.0, {}, False),  # too wide for an artery
    ],
)
def test_a_root_is_known_by_its_branches(radius, given, taken):
    root, lesion, found = _branching(radius, **given)
    assert found[root].all() if taken else not found[root].any()
    assert not found[lesion].any()
    assert not found[~root].any()


def test_the_diaphragm_has_no_roots():
    """The space between the lungs reaches under their domes, far from its middle: branches say nothing there."""
    shape = (80, 80, 240)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    lung = np.broadcast_to(((x < 100) | (x >= 140)) & (y > 0), shape).copy()
    lung[:20, 10:70, 30:210] = False
    lung[:, :, 0] = lung[:, :, -1] = False
    body = lung & _ball((z, y, x), (28, 40, 40), 8.5)
    thin = lung & ~body & (x % 5 < 2) & (y % 5 < 2)
    form = thin * np.float32(0.6)
    found = hilar_vessels(body, thin, form, lung, spacing_mm=MILLIMETRE)
    np.testing.assert_array_equal(found, _by_width(body, lung))
    assert not found[body].all()

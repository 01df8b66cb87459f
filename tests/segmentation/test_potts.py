"""Mean-field Potts: against a brute-force field, across edges and borders, in slabs; evidence from the scan itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.potts import PRIOR_FLOOR, hu_evidence, mean_field

SPACING = (2.0, 1.0, 1.0)


def _case(seed=0, shape=(4, 5, 3), num_classes=3):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.8
    posterior = rng.dirichlet(np.ones(num_classes), shape).transpose(3, 0, 1, 2)
    return posterior, -700.0 + 60.0 * rng.standard_normal(shape), mask


def _brute_force(posterior, hu, mask, strength, edge_hu, iterations):
    """The same field, voxel by voxel, from the formula."""
    voxels = [tuple(v) for v in np.argwhere(mask)]
    unary = {v: np.log(np.maximum(posterior[(slice(None), *v)], PRIOR_FLOOR)) for v in voxels}

    def normal(values):
        weights = np.exp(values - values.max())
        return weights / weights.sum()

    chance = {v: normal(unary[v]) for v in voxels}
    for _ in range(iterations):
        new = {}
        for v in voxels:
            total = unary[v].copy()
            for axis, step in itertools.product(range(3), (-1, 1)):
                other = tuple(c + step * (i == axis) for i, c in enumerate(v))
                if other in chance:
                    tie = np.exp(-((hu[v] - hu[other]) ** 2) / (2 * edge_hu**2)) * min(SPACING) / SPACING[axis]
                    total += strength * tie * chance[other]
            new[v] = normal(total)
        chance = new
    return chance


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_the_field_is_that_of_the_formula(iterations):
    posterior, hu, mask = _case()
    found = mean_field(posterior, hu, mask, spacing_mm=SPACING, strength=1.3, edge_hu=60.0, iterations=iterations)
    expected = _brute_force(posterior, hu, mask, 1.3, 60.0, iterations)
    for voxel, chance in expected.items():
        np.testing.assert_allclose(found[(slice(None), *voxel)], chance, atol=1e-3)  # float16
    assert not found[:, ~mask].any()


def test_slabs_equal_the_whole():
    posterior, hu, mask = _case(seed=1, shape=(23, 9, 8), num_classes=5)
    whole = mean_field(posterior, hu, mask, spacing_mm=SPACING, slab=23)
    np.testing.assert_allclose(
        mean_field(posterior, hu, mask, spacing_mm=SPACING, slab=4).astype(float), whole.astype(float), atol=1e-3
    )


def test_a_doubtful_voxel_follows_its_like_and_not_what_lies_across_an_edge():
    hu = np.full((3, 3, 10), -850.0)
    hu[..., 5:] = -300.0
    posterior = np.stack([np.where(hu < -500, 0.9, 0.1), np.where(hu < -500, 0.1, 0.9)])
    posterior[:, 1, 1, 4] = 0.45, 0.55  # healthy HU beside the edge
    mask = np.ones(hu.shape, dtype=bool)
    found = mean_field(posterior, hu, mask, spacing_mm=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(found[1] > found[0], hu > -500)


def test_evidence_moves_a_contour_from_the_cells_to_the_edge():
    rng = np.random.default_rng(3)
    shape, edge = (16, 16, 32), 19
    truth = np.broadcast_to(np.arange(32) >= edge, shape)
    hu = np.where(truth, -600.0, -850.0) + 30.0 * rng.standard_normal(shape)
    # the border of the cells is three voxels off, and upsampling makes a ramp of it
    second = np.broadcast_to(np.clip((np.arange(32) + 0.5 - 12) / 8, 0.02, 0.98), shape)
    posterior = np.stack([1 - second, second])
    assert np.mean((second > 0.5) == truth) < 0.92
    mask = np.ones(shape, dtype=bool)
    evidence = hu_evidence(posterior, hu, mask)
    found = mean_field(posterior, hu, mask, spacing_mm=(1.0, 1.0, 1.0), evidence=evidence)
    assert np.mean((found[1] > found[0]) == truth) > 0.995
    alike = hu_evidence(posterior, hu, mask, alike=((1, 0),))
    np.testing.assert_array_equal(alike.log_ratio[1], evidence.log_ratio[0])
    assert evidence(np.float32([-850.0]))[0, 0] > 0 > evidence(np.float32([-850.0]))[1, 0]


def test_a_tissue_with_hardly_a_voxel_has_neutral_evidence_and_stays_possible():
    hu = np.full((20, 20, 20), -850.0)
    posterior = np.zeros((2, 20, 20, 20))
    posterior[0], posterior[:, :3, :3, :3] = 1.0, np.array([0.0, 1.0]).reshape(2, 1, 1, 1)
    mask = np.ones(hu.shape, dtype=bool)
    evidence = hu_evidence(posterior, hu, mask)
    assert not evidence.log_ratio[1].any()
    found = mean_field(posterior, hu, mask, spacing_mm=(1.0, 1.0, 1.0), evidence=evidence)
    assert (found[1] > found[0])[:3, :3, :3].sum() >= 20  # of 27


def test_arrays_that_do_not_belong_together_are_refused():
    posterior, hu, mask = _case()
    with pytest.raises(InputError, match="bool"):
        mean_field(posterior, hu, mask.astype(np.uint8), spacing_mm=SPACING)
    with pytest.raises(MismatchError, match="one grid"):
        mean_field(posterior, hu[1:], mask, spacing_mm=SPACING)
    with pytest.raises(MismatchError, match="one grid"):
        hu_evidence(posterior[:, 1:], hu, mask)

"""Guided upsampling: edges between tokens come back to the voxel, nothing leaks, slabs change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.segmentation.contours import GUIDE_RADIUS_VOXELS
from lungseg.segmentation.density import smooth_hu
from lungseg.segmentation.guided import guided_slabs
from lungseg.segmentation.lattice import lattice_shape, upsample_posterior

SHAPE = (24, 40, 40)
WHOLE = tuple(slice(0, n) for n in SHAPE)


def _guided(posterior, guide, mask, token_size=8, **settings):
    result = np.full((len(posterior), *SHAPE), np.nan, dtype=np.float32)
    for part, values in guided_slabs(
        posterior,
        guide,
        mask,
        token_size=token_size,
        radius=min(token_size, GUIDE_RADIUS_VOXELS),
        region=WHOLE,
        **settings,
    ):
        result[:, part] = values
    return result


@pytest.mark.parametrize("edge", [13, 18, 19, 21])
@pytest.mark.parametrize("noise", [0.0, 25.0])
def test_an_edge_that_cuts_through_cells_is_found_to_a_voxel(edge, noise):
    """Cells are named by their greater part: the trilinear border is up to three voxels off, the guided one is not."""
    x = np.arange(SHAPE[2])
    scan = np.where(x < edge, -850.0, -600.0) + noise * np.random.default_rng(0).standard_normal(SHAPE)
    share = np.clip((8 * (np.arange(5) + 1) - edge) / 8, 0, 1)  # of each cell beyond the edge
    second = np.broadcast_to(share > 0.5, lattice_shape(SHAPE, 8)).astype(np.float32)
    posterior = np.stack([1 - second, second])
    mask = np.ones(SHAPE, dtype=bool)
    guide = smooth_hu(scan, mask)
    truth = np.broadcast_to(x >= edge, SHAPE)
    plain = upsample_posterior(posterior, SHAPE, 8)
    found = _guided(posterior, guide, mask)
    wrong = (found[1] > found[0]) != truth
    assert np.count_nonzero((plain[1] > plain[0]) != truth) >= 2 * SHAPE[0] * SHAPE[1]
    assert not wrong[..., np.abs(x - edge + 0.5) > 1].any()
    np.testing.assert_allclose(found.sum(axis=0), 1.0, atol=1e-5)


def test_a_constant_posterior_stays_constant():
    rng = np.random.default_rng(1)
    mask = rng.random(SHAPE) < 0.8
    posterior = np.broadcast_to(np.float32([0.2, 0.5, 0.3])[:, None, None, None], (3, *lattice_shape(SHAPE, 4)))
    found = _guided(posterior, 200.0 * rng.standard_normal(SHAPE) - 700.0, mask, token_size=4)
    for k, share in enumerate((0.2, 0.5, 0.3)):
        np.testing.assert_allclose(found[k][mask], share, atol=1e-4)
    assert not found[:, ~mask].any()


def test_slabs_equal_the_whole_and_nothing_beyond_the_mask_matters():
    rng = np.random.default_rng(2)
    posterior = rng.dirichlet(np.ones(5), lattice_shape(SHAPE, 4)).transpose(3, 0, 1, 2).astype(np.float32)
    guide = -700.0 + 150.0 * rng.standard_normal(SHAPE)
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:22, 5:37, 3:30] = True
    whole = _guided(posterior, guide, mask, token_size=4, slab=SHAPE[0])
    np.testing.assert_allclose(_guided(posterior, guide, mask, token_size=4, slab=5), whole, atol=1e-4)
    other = np.where(mask, guide, 3000.0)
    np.testing.assert_array_equal(_guided(posterior, other, mask, token_size=4, slab=SHAPE[0]), whole)
    with pytest.raises(InputError, match="does not fill"):
        _guided(posterior, guide[1:], mask, token_size=4)

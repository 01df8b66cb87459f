"""The whole room on one fixture: tokens, mixture, votes, posterior, fusion, clean-up."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from tissue_fixture import SPACING_MM, dice, make_fixture

from lungseg.segmentation.lattice import fill_uncovered, token_mask_fraction
from lungseg.segmentation.mixture import fit_mixture
from lungseg.segmentation.naming import (
    healthy_mode_hu,
    name_components,
    name_tokens,
    renumbered,
    smooth_hu,
    tissue_posterior,
    token_statistics,
)
from lungseg.segmentation.sobel_fusion import posterior_labels, remove_small_components, sobel_diffusion_fusion
from lungseg.tissue import MIXTURE_TISSUES, Tissue

TOKEN = 4


def _segment(fixture, seed=0):
    """Unrefined labels, final labels and names, with the HU statistics themselves as tokens."""
    fraction = token_mask_fraction(fixture.mask, TOKEN)
    tokens = np.argwhere(fraction >= 0.5)
    stats = token_statistics(fixture.volume_hu, fixture.mask, tokens, token_size=TOKEN, window=8, spacing_mm=SPACING_MM)
    names = name_tokens(
        stats, healthy_mode_hu=healthy_mode_hu(smooth_hu(fixture.volume_hu, fixture.mask), fixture.mask)
    )
    features = np.stack(astuple(stats)[:8], axis=1)
    fit = fit_mixture(features, pca_components=6, standardise=True, restarts=2, max_iterations=50, seed=seed)
    components = name_components(fit.posterior(features), names, stats)
    fit = fit.reorder([item.component for item in components])
    lattice = np.zeros((fit.num_components, *fraction.shape), dtype=np.float32)
    lattice[:, *tokens.T] = fit.posterior(features).T
    posterior = fill_uncovered(tissue_posterior(lattice, renumbered(components)), fraction >= 0.5)
    fused = sobel_diffusion_fusion(posterior, fixture.volume_hu, fixture.mask, token_size=TOKEN)
    cleaned = remove_small_components(fused, posterior, voxel_ml=0.001, token_size=TOKEN)
    return posterior_labels(posterior, fixture.mask, token_size=TOKEN), cleaned, components


@pytest.mark.parametrize("same_mean", [False, True])
def test_every_tissue_is_found(same_mean):
    fixture = make_fixture(same_mean=same_mean)
    plain, final, components = _segment(fixture)
    before = np.array([dice(plain, fixture.reference, tissue) for tissue in MIXTURE_TISSUES])
    after = np.array([dice(final, fixture.reference, tissue) for tissue in MIXTURE_TISSUES])
    assert after.min() > 0.7
    assert after.mean() > 0.85
    assert after.mean() > before.mean()
    assert ((final > 0) == fixture.mask).all()
    assert {item.tissue for item in components} == set(MIXTURE_TISSUES)


@pytest.mark.parametrize("noise", [20.0, 60.0])
def test_healthy_lung_stays_healthy_to_the_end(noise):
    fixture = make_fixture(noise_hu=noise, healthy_only=True)
    _, final, _ = _segment(fixture)
    assert np.count_nonzero(final > Tissue.HEALTHY) / np.count_nonzero(fixture.mask) < 0.02


def test_same_seed_gives_the_same_labels():
    fixture = make_fixture()
    np.testing.assert_array_equal(_segment(fixture, seed=7)[1], _segment(fixture, seed=7)[1])

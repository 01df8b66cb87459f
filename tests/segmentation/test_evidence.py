"""Evidence of tissues from the scan alone: rules at their cut points, and what vessels, edges and noise may not do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tissue_fixture import SPACING_MM, dice, make_fixture

from lungseg.errors import InputError
from lungseg.segmentation.evidence import (
    DenseStatistics,
    cell_evidence,
    dense_statistics,
    evidence_posterior,
    tissue_probabilities,
    without_bundles,
)
from lungseg.segmentation.lattice import fill_uncovered, lattice_shape, token_mask_fraction
from lungseg.segmentation.sobel_fusion import posterior_labels
from lungseg.tissue import MIXTURE_TISSUES, Tissue

CELL = 2


def _statistics(**given) -> DenseStatistics:
    """One cell of plain healthy lung, but for what is given."""
    plain = {
        "body_share": 0.0,
        "raised_share": 0.0,
        "laa950_share": 0.0,
        "thin_share": 0.05,
        "texture_hu": 40.0,
        "broad_mean_hu": -840.0,
        "parenchyma_share": 0.9,
        "plain_share": 0.8,
    }
    columns = {name: np.full(1, given.get(name, value), dtype=np.float32) for name, value in plain.items()}
    return DenseStatistics(
        np.zeros((1, 3), dtype=np.int32),
        **columns,
        healthy_mode_hu=-850.0,
        healthy_texture_hu=given.get("healthy_texture_hu", 70.0),
        healthy_thin_share=given.get("healthy_thin_share", 0.08),
        noise_hu=20.0,
        lattice=(1, 1, 1),
    )


FIBROSIS = {"thin_share": 0.2, "texture_hu": 140.0, "broad_mean_hu": -600.0, "raised_share": 0.8}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Tissue.HEALTHY),
        ({"laa950_share": 0.09}, Tissue.HEALTHY),
        ({"laa950_share": 0.11}, Tissue.EMPHYSEMA),
        ({"raised_share": 0.49}, Tissue.HEALTHY),
        ({"raised_share": 0.51}, Tissue.GGO),
        ({"body_share": 0.51, "laa950_share": 0.2}, Tissue.CONSOLIDATION),
        (FIBROSIS, Tissue.FIBROSIS),
        # Each of the three alone takes fibrosis back.
        ({**FIBROSIS, "thin_share": 0.14}, Tissue.GGO),
        ({**FIBROSIS, "texture_hu": 119.0}, Tissue.GGO),
        ({**FIBROSIS, "broad_mean_hu": -726.0}, Tissue.GGO),
        # A bundle of vessels in aerated lung.
        ({**FIBROSIS, "broad_mean_hu": -780.0, "raised_share": 0.1}, Tissue.HEALTHY),
        # A scan that washes septa out says so by its own healthy lung.
        ({**FIBROSIS, "thin_share": 0.06, "texture_hu": 70.0}, Tissue.GGO),
        (
            {
                **FIBROSIS,
                "thin_share": 0.06,
                "texture_hu": 70.0,
                "healthy_thin_share": 0.02,
                "healthy_texture_hu": 30.0,
            },
            Tissue.FIBROSIS,
        ),
        ({**FIBROSIS, "healthy_thin_share": np.nan, "healthy_texture_hu": np.nan}, Tissue.FIBROSIS),
    ],
)
def test_rules_at_their_cut_points(given, expected):
    probabilities = tissue_probabilities(_statistics(**given))
    assert probabilities.shape == (1, 5)
    assert probabilities.dtype == np.float32
    assert probabilities.sum() == pytest.approx(1.0)
    assert MIXTURE_TISSUES[int(probabilities[0].argmax())] == expected


def test_probability_is_a_half_at_the_cut_and_sure_far_from_it():
    def emphysema(share):
        probabilities = tissue_probabilities(_statistics(laa950_share=share))[0]
        return probabilities[1] / (1.0 - probabilities[4])  # given that it is no dense body

    assert emphysema(0.10) == pytest.approx(0.5, abs=1e-5)
    # A standard error away, a normal distribution would say 84 %; the logistic of the same variance says 86 %.
    assert emphysema(0.16) == pytest.approx(0.86, abs=0.01)
    assert emphysema(0.0) < 0.05
    assert emphysema(0.3) > 0.99


def _labels(fixture):
    stats = dense_statistics(fixture.volume_hu, fixture.mask, cell=CELL, spacing_mm=SPACING_MM)
    posterior, covered = evidence_posterior(stats, tissue_probabilities(stats))
    return posterior_labels(fill_uncovered(posterior, covered), fixture.mask, token_size=CELL), stats


@pytest.mark.parametrize("same_mean", [False, True])
def test_every_tissue_is_found_without_any_fit(same_mean):
    fixture = make_fixture(same_mean=same_mean)
    labels, _ = _labels(fixture)
    scores = {tissue: dice(labels, fixture.reference, tissue) for tissue in MIXTURE_TISSUES}
    assert min(scores.values()) > 0.6, scores
    assert np.mean(list(scores.values())) > 0.8, scores


@pytest.mark.parametrize("noise", [20.0, 60.0])
def test_vessels_noise_and_the_pleura_make_no_disease(noise):
    labels, stats = _labels(make_fixture(noise_hu=noise, healthy_only=True))
    assert stats.thin_share.max() > 0.3  # there are vessels to be fooled by
    assert np.count_nonzero(labels > Tissue.HEALTHY) / np.count_nonzero(labels) < 0.02


def test_only_the_lung_counts_and_cells_lie_on_the_lattice():
    fixture = make_fixture()
    stats = dense_statistics(fixture.volume_hu, fixture.mask, cell=CELL, spacing_mm=SPACING_MM)
    changed = np.where(
        fixture.mask, fixture.volume_hu, np.random.default_rng(1).integers(-1024, 3000, fixture.mask.shape)
    )
    again = dense_statistics(changed, fixture.mask, cell=CELL, spacing_mm=SPACING_MM)
    # Moved by whole cells, so that the lung's box begins elsewhere on the lattice.
    move = [(4 * CELL, 0), (0, 3), (2 * CELL, CELL)]
    moved = dense_statistics(
        np.pad(fixture.volume_hu, move), np.pad(fixture.mask, move), cell=CELL, spacing_mm=SPACING_MM
    )
    assert stats.lattice == lattice_shape(fixture.mask.shape, CELL)
    np.testing.assert_array_equal(stats.index, np.argwhere(token_mask_fraction(fixture.mask, CELL) > 0))
    np.testing.assert_array_equal(moved.index - [4, 0, 2], stats.index)
    for field in dataclasses.fields(DenseStatistics):
        if field.name not in ("index", "lattice"):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(stats, field.name), field.name)
            np.testing.assert_allclose(
                getattr(moved, field.name), getattr(stats, field.name), rtol=1e-3, atol=1e-3, err_msg=field.name
            )


def test_a_thick_slice_keeps_its_geometry():
    """Windows are millimetres: the same lung on a grid with slices of 2 mm gives nearly the same shares."""
    fixture = make_fixture(noise_hu=0.0)
    fine = dense_statistics(fixture.volume_hu, fixture.mask, cell=CELL, spacing_mm=SPACING_MM)
    thick_hu = fixture.volume_hu.reshape(-1, 2, *fixture.mask.shape[1:]).mean(axis=1)
    thick = dense_statistics(thick_hu, fixture.mask[::2], cell=CELL, spacing_mm=(2.0, 1.0, 1.0))
    assert thick.body_share.mean() == pytest.approx(fine.body_share.mean(), rel=0.2)
    assert thick.laa950_share.mean() == pytest.approx(fine.laa950_share.mean(), rel=0.2)
    assert thick.raised_share.mean() == pytest.approx(fine.raised_share.mean(), rel=0.2)


def test_coarse_cells_take_the_mean_of_the_fine_ones_with_lung():
    fixture = make_fixture(noise_hu=0.0)
    shares = cell_evidence(fixture.volume_hu, fixture.mask, cell=6, spacing_mm=SPACING_MM)
    stats = dense_statistics(fixture.volume_hu, fixture.mask, cell=2, spacing_mm=SPACING_MM)
    fine = without_bundles(stats, tissue_probabilities(stats))
    assert shares.shape == (5, *lattice_shape(fixture.mask.shape, 6))
    lung = token_mask_fraction(fixture.mask, 6) > 0
    np.testing.assert_allclose(shares.sum(axis=0)[lung], 1.0, atol=1e-5)
    assert not shares[:, ~lung].any()
    for site in np.argwhere(lung)[::7]:
        members = (stats.index // 3 == site).all(axis=1)
        np.testing.assert_allclose(shares[:, *site], fine[members].mean(axis=0), atol=1e-5)


def test_a_bundle_of_vessels_is_no_fibrosis_and_a_mesh_stays():
    """Two pieces of the same thin structure, healthy lung between the one's and raised lung between the other's."""
    index = np.argwhere(np.ones((9, 4, 4), dtype=bool))
    index = index[(index[:, 0] < 4) | (index[:, 0] > 4)]
    one = np.ones(len(index), dtype=np.float32)
    stats = dataclasses.replace(
        _statistics(**FIBROSIS),
        index=index.astype(np.int32),
        **{name: one * value for name, value in {"body_share": 0.0, "laa950_share": 0.0, **FIBROSIS}.items()},
        parenchyma_share=one * 0.6,
        plain_share=np.where(index[:, 0] < 4, 0.6 * 0.25, 0.6 * 0.15).astype(np.float32),
        lattice=(9, 4, 4),
    )
    before = tissue_probabilities(stats)
    after = without_bundles(stats, before)
    assert {MIXTURE_TISSUES[k] for k in before.argmax(axis=1)} == {Tissue.FIBROSIS}
    assert {MIXTURE_TISSUES[k] for k in after[index[:, 0] < 4].argmax(axis=1)} == {Tissue.HEALTHY}
    np.testing.assert_array_equal(after[index[:, 0] > 4], before[index[:, 0] > 4])
    np.testing.assert_allclose(after.sum(axis=1), 1.0, atol=1e-6)


def test_nothing_and_nonsense():
    volume = np.zeros((4, 5, 6), dtype=np.int16)
    stats = dense_statistics(volume, np.zeros(volume.shape, dtype=bool), cell=2, spacing_mm=SPACING_MM)
    posterior, covered = evidence_posterior(stats, tissue_probabilities(stats))
    assert len(stats) == 0
    assert posterior.shape == (5, 2, 3, 3)
    assert not covered.any()
    with pytest.raises(InputError, match="do not fit"):
        dense_statistics(volume, np.zeros((4, 5, 5), dtype=bool), cell=2, spacing_mm=SPACING_MM)
    with pytest.raises(InputError, match="do not fit"):
        dense_statistics(volume, np.zeros(volume.shape, dtype=np.uint8), cell=2, spacing_mm=SPACING_MM)
    tiny = np.zeros(volume.shape, dtype=bool)
    tiny[1, 2, 3] = True
    alone = tissue_probabilities(dense_statistics(volume - 850, tiny, cell=2, spacing_mm=SPACING_MM))
    assert np.isfinite(alone).all()

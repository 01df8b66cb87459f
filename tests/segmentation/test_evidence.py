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
        "low_share": 0.0,
        "thin_share": 0.05,
        "texture_hu": 40.0,
        "broad_mean_hu": -840.0,
        "parenchyma_share": 0.9,
        "plain_share": 0.8,
        "thin_here": 0.05,
        "round_here": 0.02,
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
        cell_mm=(2.0, 2.0, 2.0),
    )


FIBROSIS = {"thin_share": 0.2, "texture_hu": 140.0, "broad_mean_hu": -600.0, "raised_share": 0.8}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Tissue.HEALTHY),
        ({"low_share": 0.09}, Tissue.HEALTHY),
        ({"low_share": 0.11}, Tissue.EMPHYSEMA),
        ({"raised_share": 0.49}, Tissue.HEALTHY),
        ({"raised_share": 0.51}, Tissue.GGO),
        ({"body_share": 0.51, "low_share": 0.2}, Tissue.CONSOLIDATION),
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
        probabilities = tissue_probabilities(_statistics(low_share=share))[0]
        return probabilities[1] / (1.0 - probabilities[4])  # given that it is no dense body

    assert emphysema(0.10) == pytest.approx(0.5, abs=1e-5)
    # A standard error away, a normal distribution would say 84 %; the logistic of the same variance says 86 %.
    assert emphysema(0.16) == pytest.approx(0.86, abs=0.01)
    assert emphysema(0.0) < 0.05
    assert emphysema(0.3) > 0.99


def test_the_edge_of_severe_emphysema_is_held_against_its_core():
    """A window across the edge holds holes of its core; as few holes far from it are mild emphysema."""
    share = np.full(90, 0.02, dtype=np.float32)
    share[:10], share[10:12], share[80:84] = 0.6, 0.14, 0.14
    one = _statistics()
    columns = {f.name: np.repeat(getattr(one, f.name), 90) for f in dataclasses.fields(one)[1:11]}
    index = np.stack([np.arange(90), *np.zeros((2, 90), dtype=int)], axis=1).astype(np.int32)
    stats = dataclasses.replace(one, **{**columns, "low_share": share}, index=index, lattice=(90, 1, 1))
    found = tissue_probabilities(stats).argmax(axis=1) == MIXTURE_TISSUES.index(Tissue.EMPHYSEMA)
    assert np.flatnonzero(found).tolist() == [*range(10), *range(80, 84)]


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
    assert thick.low_share.mean() == pytest.approx(fine.low_share.mean(), rel=0.2)
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


def _two_pieces(plain_share, tubeness, gap=True):
    """Two pieces of thin structure in a row (z), with their shares of plain lung and their tubeness."""
    index = np.argwhere(np.ones((25, 6, 6), dtype=bool))
    first = index[:, 0] < 12
    if gap:
        first, index = first[index[:, 0] != 12], index[index[:, 0] != 12]
    one = np.ones(len(index), dtype=np.float32)
    columns = {"body_share": 0.0, "low_share": 0.0, **FIBROSIS, "parenchyma_share": 0.6, "thin_here": 0.3}
    stats = dataclasses.replace(
        _statistics(**FIBROSIS),
        index=index.astype(np.int32),
        **{name: one * value for name, value in columns.items()},
        plain_share=np.where(first, *(0.6 * share for share in plain_share)).astype(np.float32),
        round_here=np.where(first, *(0.3 * ratio for ratio in tubeness)).astype(np.float32),
        lattice=(25, 6, 6),
    )
    return stats, first


@pytest.mark.parametrize(
    ("plain_share", "tubeness", "taken"),
    [(0.25, 0.25, True), (0.13, 0.33, True), (0.07, 0.25, False), (0.22, 0.03, False), (0.3, -0.3, False)],
)
def test_a_bundle_of_vessels_is_no_fibrosis_and_a_mesh_stays(plain_share, tubeness, taken):
    """Vessels are round and lie in healthy lung; either alone is no sign (sharp kernels, thick slices)."""
    stats, first = _two_pieces((plain_share, 0.05), (tubeness, 0.05))
    before = tissue_probabilities(stats)
    after = without_bundles(stats, before)
    assert {MIXTURE_TISSUES[k] for k in before.argmax(axis=1)} == {Tissue.FIBROSIS}
    expected = {Tissue.HEALTHY if taken else Tissue.FIBROSIS}
    assert {MIXTURE_TISSUES[k] for k in after[first].argmax(axis=1)} == expected
    np.testing.assert_array_equal(after[~first], before[~first])
    np.testing.assert_allclose(after.sum(axis=1), 1.0, atol=1e-6)


def test_a_bundle_that_touches_fibrosis_is_taken_off_it():
    stats, _ = _two_pieces((0.3, 0.0), (0.3, 0.0), gap=False)
    # Together the piece is too flat to be a bundle.
    stats = dataclasses.replace(stats, plain_share=np.where(stats.index[:, 0] < 12, 0.17, 0.0).astype(np.float32))
    stats = dataclasses.replace(stats, round_here=np.where(stats.index[:, 0] < 12, 0.08, 0.0).astype(np.float32))
    after = without_bundles(stats, tissue_probabilities(stats)).argmax(axis=1)
    assert {MIXTURE_TISSUES[k] for k in after[stats.index[:, 0] < 8]} == {Tissue.HEALTHY}
    assert {MIXTURE_TISSUES[k] for k in after[stats.index[:, 0] > 16]} == {Tissue.FIBROSIS}


def _lung(shape, hu, noise_hu=0.0):
    """A block of lung with a border of chest wall (40 HU) of four voxels."""
    mask = np.zeros(shape, dtype=bool)
    mask[4:-4, 4:-4, 4:-4] = True
    volume = np.broadcast_to(hu, shape) + np.random.default_rng(5).normal(0.0, noise_hu, shape)
    return np.where(mask, volume, 40.0), mask


def _tissues(volume, mask):
    stats = dense_statistics(np.round(volume).astype(np.int16), mask, cell=CELL, spacing_mm=SPACING_MM)
    return without_bundles(stats, tissue_probabilities(stats)).argmax(axis=1), stats


@pytest.mark.parametrize(("breath_hu", "gravity_hu"), [(-45.0, 80.0), (-20.0, 160.0), (-20.0, -160.0)])
def test_breath_and_gravity_make_no_emphysema_and_hide_none(breath_hu, gravity_hu):
    """Lung in deep inspiration, supine or prone: the upper side lies near -950 HU."""
    height = np.linspace(-0.5, 0.5, 160)[None, :, None]
    volume, mask = _lung((40, 160, 40), -860.0 + breath_hu + gravity_hu * height, noise_hu=30.0)
    found, _ = _tissues(volume, mask)
    assert (found > 0).mean() < 0.02
    # Holes of 6 mm, 8 apart, in the upper half of it.
    holes = np.zeros(mask.shape, dtype=bool)
    upper = slice(4, 80) if gravity_hu > 0 else slice(80, 156)
    z, y, x = np.ogrid[:40, :160, :40]
    holes[:, upper] = ((z % 8 < 6) & (y % 8 < 6) & (x % 8 < 6))[:, upper]
    found, stats = _tissues(np.where(holes & mask, -990.0, volume), mask)
    inside = (stats.index[:, 1] > upper.start // 2 + 4) & (stats.index[:, 1] < upper.stop // 2 - 4)
    assert (found[inside] == 1).mean() > 0.7


def test_a_vessel_of_the_hilum_is_no_body_and_a_lesion_beside_it_is():
    volume, mask = _lung((60, 60, 140), -850.0, noise_hu=20.0)
    mask[:, :, 50:90] = False  # the mediastinum
    z, y, x = np.ogrid[:60, :60, :140]
    vessel = mask & ((z - 20) ** 2 + (y - 30) ** 2 < 4.5**2) & (x >= 42) & (x < 50)
    lesion = mask & ((z - 40) ** 2 + (y - 30) ** 2 + (x - 100) ** 2 < 9.5**2)
    volume = np.where(mask & ~vessel & ~lesion, volume, 40.0)
    found, stats = _tissues(volume, mask)
    centre = tuple((stats.index * CELL + 1).T)
    assert stats.body_share[vessel[centre]].mean() < 0.35  # of the pieces that are left, corners
    assert (found[vessel[centre]] == 4).mean() < 0.35
    assert (found[lesion[centre]] == 4).mean() > 0.9


def test_a_recess_full_of_partial_volume_is_no_ground_glass_and_a_thick_layer_is():
    for width, expected in ((3, 0), (16, 2)):
        mask = np.zeros((40, 40, 60), dtype=bool)
        mask[4:-4, 4:-4, 4:40] = True
        mask[4:-4, 4 : 4 + width, 40:-4] = True  # a sheet that runs out of the block
        volume = np.where(mask, -850.0, 40.0)
        volume[:, :, 40:][mask[:, :, 40:]] = -600.0
        found, stats = _tissues(volume, mask)
        sheet = (stats.index[:, 2] > 23) & (stats.index[:, 2] < 26)
        assert (found[sheet] == expected).mean() > 0.6


def test_structure_next_to_the_pleura_counts():
    volume, mask = _lung((60, 60, 60), -800.0)
    z = np.arange(60)[:, None, None]
    volume[mask & (z % 8 < 2) & (np.arange(60) < 6)] = 0.0  # septa in the outer 2 mm alone
    _, stats = _tissues(volume, mask)
    assert stats.thin_share[stats.index[:, 2] == 2].mean() > 0.02


def test_form_of_structure_is_known():
    volume, mask = _lung((60, 60, 60), -800.0)
    z, y, x = np.ogrid[:60, :60, :60]
    plates = mask & (z % 8 < 2) & (x < 12)
    tubes = mask & (z % 8 < 2) & (y % 8 < 2) & (x >= 30)
    volume[plates | tubes] = 0.0
    _, stats = _tissues(volume, mask)
    roundness = {
        name: stats.round_here[part].sum() / stats.thin_here[part].sum()
        for name, part in (("plates", stats.index[:, 2] < 5), ("tubes", stats.index[:, 2] > 17))
    }
    assert roundness["plates"] < 0.15 < 0.5 < roundness["tubes"]


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

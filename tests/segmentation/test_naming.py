"""Naming rules on known statistics, and on the unit-test fixture of METHOD 0.5."""

from __future__ import annotations

import numpy as np
import pytest
from tissue_fixture import SPACING_MM, make_fixture

from lungseg.errors import MismatchError
from lungseg.segmentation.lattice import token_mask_fraction
from lungseg.segmentation.naming import (
    TokenStatistics,
    healthy_mode_hu,
    name_components,
    name_tokens,
    renumbered,
    smooth_hu,
    tissue_posterior,
    token_statistics,
)
from lungseg.tissue import MIXTURE_TISSUES, UNCLASSIFIED, Tissue


def _stats(**columns) -> TokenStatistics:
    """Statistics of tokens of which only some are given; the rest is plain healthy lung."""
    n = max(len(np.atleast_1d(values)) for values in columns.values())
    plain = {
        "mean_hu": -850,
        "median_hu": -850,
        "p25_hu": -870,
        "p75_hu": -830,
        "laa950_share": 0.01,
        "local_sd_mean": 30,
        "local_sd_median": 30,
        "dense_share": 0.0,
        "num_voxels": 512,
    }
    return TokenStatistics(**{name: np.full(n, columns.get(name, value), dtype=float) for name, value in plain.items()})


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"median_hu": -850}, Tissue.HEALTHY),
        ({"laa950_share": 0.10}, Tissue.EMPHYSEMA),
        ({"laa950_share": 0.099}, Tissue.HEALTHY),
        ({"median_hu": -910}, Tissue.EMPHYSEMA),  # mode -850 less 60, inclusive
        ({"median_hu": -909}, Tissue.HEALTHY),
        ({"median_hu": -700, "p25_hu": -750}, Tissue.HEALTHY),
        ({"median_hu": -699, "p25_hu": -750}, Tissue.GGO),
        ({"median_hu": -500, "p25_hu": -600, "local_sd_median": 120}, Tissue.GGO),
        ({"median_hu": -500, "p25_hu": -600, "local_sd_median": 121}, Tissue.FIBROSIS),
        ({"median_hu": -500, "p25_hu": -760, "local_sd_median": 200}, Tissue.FIBROSIS),
        ({"median_hu": -300, "p25_hu": -400, "local_sd_median": 200}, Tissue.CONSOLIDATION),
        ({"median_hu": -301, "p25_hu": -400, "local_sd_median": 10}, Tissue.GGO),
        ({"median_hu": 20, "p25_hu": -20}, Tissue.CONSOLIDATION),
        # A vessel: dense body over an aerated floor.
        ({"median_hu": 20, "p25_hu": -800, "local_sd_median": 400}, Tissue.HEALTHY),
        # Vessels over a floor of plain healthy lung.
        ({"median_hu": -450, "p25_hu": -851, "local_sd_median": 300}, Tissue.HEALTHY),
        ({"median_hu": np.nan, "p25_hu": np.nan, "num_voxels": 0}, UNCLASSIFIED),
    ],
)
def test_rules_at_their_cut_points(columns, expected):
    names = name_tokens(_stats(**columns), healthy_mode_hu=-850.0)
    assert names.dtype == np.uint8
    assert names.tolist() == [expected]


def _named_fixture(fixture, *, token_size=8, window=8):
    """Names, statistics and true tissue of the tokens wholly inside one tissue."""
    tokens = np.argwhere(token_mask_fraction(fixture.mask, token_size) >= 0.5)
    stats = token_statistics(
        fixture.volume_hu, fixture.mask, tokens, token_size=token_size, window=window, spacing_mm=SPACING_MM
    )
    mode = healthy_mode_hu(smooth_hu(fixture.volume_hu, fixture.mask), fixture.mask)
    truth = np.zeros(len(tokens), dtype=np.uint8)
    for tissue in MIXTURE_TISSUES:
        share = token_mask_fraction(fixture.reference == tissue, token_size)
        truth[share[tuple(tokens.T)] > 0.95] = tissue
    return name_tokens(stats, healthy_mode_hu=mode), stats, truth, mode


@pytest.mark.parametrize("noise", [20.0, 60.0])
def test_healthy_lung_stays_healthy(noise):
    names, _, _, mode = _named_fixture(make_fixture(noise_hu=noise, healthy_only=True), token_size=4)
    assert mode == pytest.approx(-848, abs=8)
    assert np.mean(names != Tissue.HEALTHY) < 0.02


@pytest.mark.parametrize("noise", [20.0, 60.0])
def test_pure_tokens_get_their_tissue(noise):
    names, _, truth, _ = _named_fixture(make_fixture(noise_hu=noise))
    for tissue in MIXTURE_TISSUES:
        pure = truth == tissue
        assert pure.sum() >= 5
        assert np.mean(names[pure] == tissue) >= 0.95, tissue


def test_texture_separates_what_density_cannot():
    names, stats, truth, _ = _named_fixture(make_fixture(same_mean=True))
    ggo, fibrosis = truth == Tissue.GGO, truth == Tissue.FIBROSIS
    gap = abs(stats.mean_hu[ggo].mean() - stats.mean_hu[fibrosis].mean())
    assert gap < 15.0
    # The best HU threshold between the two classes does little better than chance ...
    values = np.concatenate([stats.mean_hu[ggo], stats.mean_hu[fibrosis]])
    is_fibrosis = np.arange(values.size) >= ggo.sum()
    balanced = [
        0.5 * (np.mean(values[is_fibrosis] > cut) + np.mean(values[~is_fibrosis] <= cut)) for cut in np.sort(values)
    ]
    density_only = max(max(balanced), 1 - min(balanced))
    # ... and the texture rule is right nearly always.
    texture = 0.5 * (np.mean(names[ggo] == Tissue.GGO) + np.mean(names[fibrosis] == Tissue.FIBROSIS))
    assert density_only < 0.9
    assert texture >= 0.95


def _two_components():
    stats = _stats(
        mean_hu=[-600, -620, -850, -860],
        median_hu=[-600, -620, -850, -860],
        p25_hu=[-650, -660, -870, -880],
        laa950_share=[0, 0, 0.02, 0.04],
    )
    names = np.array([3, 4, 1, 1], dtype=np.uint8)
    responsibilities = np.array([[1, 0], [0.5, 0.5], [0, 1], [0, 1]], dtype=np.float32)
    return responsibilities, names, stats


def test_votes_are_weighted_by_responsibility():
    named = name_components(*_two_components())
    assert [item.component for item in named] == [1, 0]  # by mean HU
    dense, airy = named[1], named[0]
    assert dense.tissue == Tissue.GGO
    assert dense.votes[Tissue.GGO] == pytest.approx(1 / 1.5)
    assert dense.votes[Tissue.FIBROSIS] == pytest.approx(0.5 / 1.5)
    assert dense.weight == pytest.approx(1.5 / 4)
    assert dense.mean_hu == pytest.approx((-600 - 310) / 1.5)
    assert dense.median_hu == -600
    assert airy.tissue == Tissue.HEALTHY
    assert airy.laa950_share == pytest.approx(0.06 / 2.5)
    assert "80 % of the members' votes" in airy.rule
    assert [item.component for item in renumbered(named)] == [0, 1]


def test_nearest_prototype_calls_dark_lung_emphysema():
    responsibilities = np.eye(5, dtype=np.float32)
    stats = _stats(mean_hu=[-930, -850, -610, -470, -40])
    named = name_components(responsibilities, np.full(5, 1, dtype=np.uint8), stats, rule="mean-hu")
    assert [item.tissue for item in named] == [2, 1, 3, 4, 5]
    assert "prototype -955" in named[0].rule


def test_adaptive_rule_of_the_authors_code():
    # Medians and 75th percentiles of eight equal members; ranks are 0, 1/8 ... 7/8.
    medians = [-850, -790, -690, -640, -600, -560, -450, -150]
    stats = _stats(mean_hu=medians, median_hu=medians, p75_hu=[-800, -700, -600, -590, -550, -480, -400, -100])
    named = name_components(np.eye(8), np.full(8, 1, dtype=np.uint8), stats, rule="mean-hu-adaptive")
    assert [item.tissue.name for item in named] == [
        "EMPHYSEMA",  # below -800
        "EMPHYSEMA",  # lowest quarter, below -700
        "GGO",  # lowest quarter
        "GGO",  # second quarter
        "GGO",
        "FIBROSIS",  # third quarter, 75th percentile above -500
        "FIBROSIS",  # third quarter
        "CONSOLIDATION",  # at or above -200
    ]
    medians = [-790, -780, -770, -760, -750, -740, -550, -450, -250]
    stats = _stats(mean_hu=medians, median_hu=medians, p75_hu=-600, num_voxels=[100] * 5 + [300, 100, 100, 100])
    named = name_components(np.eye(9), np.full(9, 1, dtype=np.uint8), stats, rule="mean-hu-adaptive")
    assert [item.tissue.name for item in named[5:]] == ["GGO", "HEALTHY", "FIBROSIS", "CONSOLIDATION"]
    stats = _stats(mean_hu=medians, median_hu=medians, p75_hu=-600)
    named = name_components(np.eye(9), np.full(9, 1, dtype=np.uint8), stats, rule="mean-hu-adaptive")
    assert named[6].tissue == Tissue.HEALTHY  # third quarter, 75th percentile not above -500


def test_unnamed_tokens_and_empty_components_do_not_count():
    responsibilities, names, stats = _two_components()
    names = np.array([UNCLASSIFIED, 4, 1, 1], dtype=np.uint8)
    named = name_components(np.column_stack([responsibilities, np.zeros(4)]), names, stats)
    assert named[1].tissue == Tissue.FIBROSIS
    assert named[2].component == 2
    assert np.isnan(named[2].mean_hu)
    assert "no members" in named[2].rule
    with pytest.raises(MismatchError, match="holds lung"):
        name_components(responsibilities, np.full(4, UNCLASSIFIED, dtype=np.uint8), stats)
    with pytest.raises(MismatchError, match="same tokens"):
        name_components(responsibilities[:3], names, stats)
    with pytest.raises(MismatchError, match="unknown naming rule"):
        name_components(responsibilities, names, stats, rule="oracle")


def test_tissue_posterior_sums_components_by_name():
    named = name_components(*_two_components())
    posterior = np.array([[0.25, 1.0], [0.75, 0.0]], dtype=np.float16)
    merged = tissue_posterior(posterior, named)
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(merged, [[0.75, 0], [0, 0], [0.25, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(tissue_posterior(posterior[::-1], renumbered(named)), merged)
    with pytest.raises(MismatchError, match="do not fit"):
        tissue_posterior(posterior[:1], named)

"""HU features and the anchors the literature gives them."""

from __future__ import annotations

import numpy as np
import pytest
from anchored_fixture import LOOKS, make_statistics

from lungseg import tissue as cut
from lungseg.errors import MismatchError
from lungseg.segmentation.hu_anchors import hu_features, literature_anchors, refer_statistics
from lungseg.tissue import MIXTURE_TISSUES, Tissue


def _nearest(features):
    """Tissue whose anchors explain each token best."""
    anchors = literature_anchors()
    scaled = (features[:, None] - anchors.centre) / anchors.spread
    density = -0.5 * (scaled**2).sum(axis=2) - np.log(anchors.spread).sum(axis=1)
    return np.asarray(anchors.tissues)[density.argmax(axis=1)]


def _of(*rows):
    return hu_features(make_statistics(*zip(*rows, strict=True)))


def test_each_tissue_of_the_literature_is_nearest_to_its_own_anchors():
    # floors as in the scan of reference, where noise takes nothing off healthy lung's
    rows = [(m, max(q - 15.0, 0.0), t, laa) for m, q, t, laa in (LOOKS[tissue] for tissue in MIXTURE_TISSUES)]
    np.testing.assert_array_equal(_nearest(_of(*rows)), MIXTURE_TISSUES)


@pytest.mark.parametrize(
    ("median", "low", "high"),
    [
        (cut.HEALTHY_MEDIAN_HU, Tissue.HEALTHY, Tissue.GGO),
        (cut.CONSOLIDATION_MEDIAN_HU, Tissue.GGO, Tissue.CONSOLIDATION),
    ],
)
def test_tissues_meet_near_the_cut_of_the_literature(median, low, high):
    below, above = _nearest(_of((median - 40, 0, 60, 0), (median + 40, 0, 60, 0)))
    assert (below, above) == (low, high)


def test_a_vessel_in_healthy_lung_is_healthy_and_the_same_texture_over_a_dense_floor_is_fibrosis():
    vessel, fibrosis = _nearest(_of((-600, 250, 240, 0), (-450, 120, 240, 0)))
    assert (vessel, fibrosis) == (Tissue.HEALTHY, Tissue.FIBROSIS)
    assert _nearest(_of((-450, 0, 60, 0)))[0] == Tissue.GGO


def test_a_scan_of_other_breath_noise_and_kernel_has_the_same_features():
    rng = np.random.default_rng(0)
    median = np.concatenate([-850 + 10 * rng.standard_normal(300), [-960, -600, -200]])
    below = np.concatenate([np.full(300, 10.0), [10, 30, 20]])
    texture = np.concatenate([np.full(300, 60.0), [60, 70, 60]])
    reference = hu_features(
        refer_statistics(make_statistics(median, below, texture, np.zeros(303)), healthy_mode_hu=-850.0)
    )
    # deeper breath: more gas; a sharp kernel: twice the texture, and noise that lowers every quartile
    factor = 890 / 850
    deeper = np.where(median > -850, median * factor, median - 40)
    floor = np.where(median - below > -860, (median - below) * factor, median - below - 40)
    scan = make_statistics(deeper, deeper - floor + 12.0, 2 * texture, np.zeros(303))
    found = hu_features(refer_statistics(scan, healthy_mode_hu=-890.0))
    np.testing.assert_allclose(found[:, :2], reference[:, :2], atol=6.0)
    np.testing.assert_allclose(found[:, 2], reference[:, 2], atol=1e-3)


def test_a_scan_without_healthy_lung_keeps_its_noise_and_texture():
    scan = make_statistics([0.0, 10.0], [20.0, 20.0], [90.0, 80.0], [0.0, 0.0])
    referred = refer_statistics(scan, healthy_mode_hu=-850.0)
    np.testing.assert_array_equal(referred.local_sd_median, scan.local_sd_median)
    np.testing.assert_array_equal(referred.p25_hu, scan.p25_hu)


def test_tokens_without_lung_are_refused():
    scan = make_statistics([-850.0, np.nan], [10.0, 10.0], [60.0, 60.0], [0.0, 0.0])
    scan.num_voxels[1] = 0
    with pytest.raises(MismatchError, match="1 of 2 tokens hold no lung"):
        hu_features(scan)

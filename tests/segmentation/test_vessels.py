"""Rims of solid bodies go to what lies beside them; what is thick, flat or no rim stays."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from tissue_fixture import dice

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.vessels import give_rims_away, posterior_argmax
from lungseg.tissue import MIXTURE_TISSUES, Tissue

SHAPE = (48, 48, 48)
SPACING = (1.0, 1.0, 1.0)
RIM_MM = 8.0


def _distance_from_centre():
    z, y, x = np.ogrid[:48, :48, :48]
    return np.sqrt((z - 24.0) ** 2 + (y - 24.0) ** 2 + (x - 24.0) ** 2)


def _mask():
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:46, 2:46, 2:46] = True
    return mask


def _posterior(labels):
    shown = np.where(labels == 0, Tissue.HEALTHY, labels)
    return np.stack([np.where(shown == tissue, 0.9, 0.025) for tissue in MIXTURE_TISSUES]).astype(np.float16)


def _scan(hu, seed=0):
    return gaussian_filter(hu, 0.8) + 25.0 * np.random.default_rng(seed).standard_normal(SHAPE)


def _relabelled(labels, hu, **settings):
    mask = _mask()
    posterior = _posterior(labels * mask)
    given = posterior.copy()
    found = give_rims_away(posterior, hu, mask, spacing_mm=SPACING, rim_mm=RIM_MM, **settings)
    np.testing.assert_array_equal(posterior, given)
    return posterior_argmax(found, mask)


def _shells(radius, core_radius, outer_radius, tissue):
    """What tokens make of a ball: a core of consolidation, and a rim of another tissue across its border."""
    distance = _distance_from_centre()
    labels = np.where(distance <= outer_radius, np.uint8(tissue), np.uint8(Tissue.HEALTHY))
    labels[distance <= core_radius] = Tissue.CONSOLIDATION
    return np.where(distance <= radius, 10.0, -850.0), labels


@pytest.mark.parametrize("tissue", [Tissue.GGO, Tissue.FIBROSIS])
def test_the_rim_of_a_blurred_consolidation_goes_to_both_sides(tissue):
    hu, labels = _shells(11, 8, 14, tissue)
    found = _relabelled(labels, _scan(hu))
    truth = np.where(_distance_from_centre() <= 11, Tissue.CONSOLIDATION, Tissue.HEALTHY) * _mask()
    assert dice(labels, truth, Tissue.CONSOLIDATION) < 0.6
    assert dice(found, truth, Tissue.CONSOLIDATION) > 0.93  # not eaten, but mended
    assert np.count_nonzero(found == tissue) < 0.03 * np.count_nonzero(labels == tissue)


def test_a_true_halo_and_a_thick_band_of_fibrosis_stay():
    distance = _distance_from_centre()
    hu, labels = _shells(8, 8, 14, Tissue.GGO)
    halo = (distance > 8) & (distance <= 14)
    hu[halo] = -600.0
    found = _relabelled(labels, _scan(hu))
    assert np.count_nonzero(found[halo] == Tissue.GGO) > 0.6 * np.count_nonzero(halo)
    hu, labels = _shells(8, 8, 19, Tissue.FIBROSIS)
    band = (distance > 8) & (distance <= 19)
    z, y, _ = np.indices(SHAPE)
    hu[band] = np.where((z % 5 < 2) | (y % 5 < 2), -250.0, -700.0)[band]  # honeycomb beside the consolidation
    found = _relabelled(labels, _scan(hu))
    assert np.count_nonzero(found[band] == Tissue.FIBROSIS) > 0.9 * np.count_nonzero(band)


def test_a_large_vessel_gets_no_shell_and_a_wall_no_rim():
    """Tokens across the wall of a vessel of 8 mm, itself named healthy, read as fibrosis."""
    z, y, _ = np.ogrid[:48, :48, :48]
    distance = np.broadcast_to(np.sqrt((z - 24.0) ** 2 + (y - 24.0) ** 2), SHAPE)
    labels = np.where((distance > 3.5) & (distance < 8), np.uint8(Tissue.FIBROSIS), np.uint8(Tissue.HEALTHY))
    found = _relabelled(labels, _scan(np.where(distance <= 4, 40.0, -850.0)))
    assert np.count_nonzero(found == Tissue.FIBROSIS) < 0.1 * np.count_nonzero(labels == Tissue.FIBROSIS)


def test_one_token_of_ground_glass_or_consolidation_alone_stays():
    for tissue, value in ((Tissue.GGO, -600.0), (Tissue.CONSOLIDATION, 10.0)):
        labels = np.full(SHAPE, Tissue.HEALTHY, dtype=np.uint8)
        labels[20:28, 20:28, 20:28] = tissue
        hu = np.where(labels == tissue, value, -850.0)
        np.testing.assert_array_equal(_relabelled(labels, _scan(hu)), labels * _mask())


def test_arrays_that_do_not_belong_together_are_refused():
    posterior = _posterior(np.ones(SHAPE, np.uint8))
    with pytest.raises(InputError, match="bool"):
        give_rims_away(posterior, np.zeros(SHAPE), np.ones(SHAPE, np.uint8), spacing_mm=SPACING, rim_mm=8.0)
    with pytest.raises(MismatchError, match="one grid"):
        give_rims_away(posterior[:4], np.zeros(SHAPE), _mask(), spacing_mm=SPACING, rim_mm=8.0)

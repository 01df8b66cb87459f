"""The one interface of the contours: every method keeps small lesions, fills the lung and depends on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from test_sobel_fusion import SHAPE, _ball, _lesion, _posterior, _scan, _subpleural_sheet, _token_cube
from tissue_fixture import dice

from lungseg.config.refine import FUSIONS
from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.contours import ContourSettings, contours
from lungseg.segmentation.sobel_fusion import posterior_labels, remove_small_components, sobel_diffusion_fusion
from lungseg.tissue import Tissue

SPACING = (1.0, 1.0, 1.0)


def _draw(posterior, scan, mask, token_size=1, **settings):
    return contours(
        posterior, scan, mask, token_size=token_size, spacing_mm=SPACING, settings=ContourSettings(**settings)
    )


@pytest.mark.parametrize("method", FUSIONS)
@pytest.mark.parametrize("lesion", [_token_cube, _subpleural_sheet])
@pytest.mark.parametrize("p", [4, 8])
def test_one_token_lesions_survive(method, lesion, p):
    where = lesion(p)
    mask, truth = _lesion(where)
    drawn = _draw(_posterior(truth), _scan(truth), mask, method=method, rim_mm=8.0)
    cleaned = remove_small_components(drawn.labels, None, voxel_ml=0.001)
    found = cleaned == Tissue.CONSOLIDATION
    assert np.count_nonzero(found & where) >= 0.8 * np.count_nonzero(where)
    assert np.count_nonzero(found & ~where) <= 0.15 * np.count_nonzero(where)
    assert ((drawn.labels > 0) == mask).all()


@pytest.mark.parametrize("method", FUSIONS[1:])
def test_contours_of_the_lattice_come_nearer_to_the_edge(method):
    mask, truth = _lesion(_ball(), Tissue.GGO)
    cells = truth.reshape(6, 8, 6, 8, 6, 8).transpose(0, 2, 4, 1, 3, 5).reshape(6, 6, 6, -1)
    named = np.where((cells == Tissue.GGO).mean(axis=-1) > 0.5, np.uint8(Tissue.GGO), np.uint8(Tissue.HEALTHY))
    posterior = _posterior(named)
    plain = dice(_draw(posterior, _scan(truth), mask, 8, method="none").labels, truth, Tissue.GGO)
    assert dice(_draw(posterior, _scan(truth), mask, 8, method=method).labels, truth, Tissue.GGO) > plain


def test_without_rims_none_and_sobel_are_what_they_were():
    mask, truth = _lesion(_ball())
    posterior, scan = _posterior(truth[::8, ::8, ::8]), _scan(truth)
    np.testing.assert_array_equal(
        _draw(posterior, scan, mask, 8, method="none").labels, posterior_labels(posterior, mask, token_size=8)
    )
    sobel = _draw(posterior, scan, mask, 8, method="sobel").labels
    direct = sobel_diffusion_fusion(posterior, scan, mask, token_size=8)
    assert np.mean(sobel == direct) > 0.9999  # the posterior is rounded to float16 in between


@pytest.mark.parametrize("method", ["none", "guided-potts-sobel"])
def test_the_field_of_view_and_what_lies_outside_the_lung_do_not_matter(method):
    mask, truth = _lesion(_ball())
    posterior, scan = _posterior(truth), _scan(truth)
    wide = [(16, 16)] * 3
    settings = {"method": method, "rim_mm": 8.0}
    first = _draw(posterior, scan, mask, **settings)
    padded = _draw(
        np.pad(posterior, [(0, 0), *wide], mode="edge"),
        np.pad(scan, wide, constant_values=-1000),
        np.pad(mask, wide),
        **settings,
    )
    np.testing.assert_array_equal(padded.labels[16:-16, 16:-16, 16:-16], first.labels)
    other = _draw(posterior, np.where(mask, scan, 3000.0), mask, **settings)
    np.testing.assert_array_equal(other.labels, first.labels)


def test_confidence_is_the_posterior_of_what_is_shown():
    mask, truth = _lesion(_ball())
    drawn = _draw(_posterior(truth, 0.8), _scan(truth), mask, method="none")
    confidence = drawn.confidence(drawn.labels)
    assert set(np.unique(confidence[mask])) == {204}
    assert not confidence[~mask].any()
    other = np.where(mask, np.uint8(255), np.uint8(0))
    assert not drawn.confidence(other).any()


def test_bad_input_is_refused():
    mask, truth = _lesion(_ball())
    posterior, scan = _posterior(truth), _scan(truth)
    assert not _draw(posterior, scan, np.zeros_like(mask)).labels.any()
    with pytest.raises(InputError, match="guess"):
        _draw(posterior, scan, mask, method="guess")
    with pytest.raises(InputError, match="one grid"):
        _draw(posterior, scan[1:], mask)
    with pytest.raises(MismatchError, match="expected"):
        _draw(posterior[:4], scan, mask)
    posterior[:, 24, 24, 20:22] = 0.0
    for method in ("none", "guided-potts"):
        with pytest.raises(MismatchError, match="2 lung voxels have no posterior"):
            _draw(posterior, scan, mask, method=method)
    assert mask.shape == SHAPE

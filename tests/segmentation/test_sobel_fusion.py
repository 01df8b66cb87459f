"""Contours move to true edges, small lesions survive, small specks go, nothing becomes 0 in the lung."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label, shift
from tissue_fixture import dice

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.sobel_fusion import posterior_labels, remove_small_components, sobel_diffusion_fusion
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, Tissue

SHAPE = (48, 48, 48)
CUBE = np.ones((3, 3, 3), dtype=bool)


def _mask():
    mask = np.zeros(SHAPE, dtype=bool)
    mask[3:45, 3:45, 3:45] = True
    return mask


def _posterior(labels, confidence=0.9):
    """Posterior of these labels at a stated confidence; healthy outside the lung."""
    shown = np.where(labels == 0, Tissue.HEALTHY, labels)
    rest = (1 - confidence) / (len(MIXTURE_TISSUES) - 1)
    return np.stack([np.where(shown == tissue, confidence, rest) for tissue in MIXTURE_TISSUES]).astype(np.float32)


def _scan(labels, noise=30.0, seed=0):
    """HU of the prototypes, with the chest wall outside."""
    hu = np.full(labels.shape, 40.0)
    for tissue in MIXTURE_TISSUES:
        hu[labels == tissue] = TISSUES[tissue].prototype_hu
    return hu + noise * np.random.default_rng(seed).standard_normal(labels.shape)


def _lesion(where, tissue=Tissue.CONSOLIDATION):
    mask = _mask()
    return mask, np.where(mask, np.where(where, np.uint8(tissue), np.uint8(Tissue.HEALTHY)), np.uint8(0))


def _ball(radius=11):
    z, y, x = np.ogrid[:48, :48, :48]
    return (z - 24) ** 2 + (y - 24) ** 2 + (x - 24) ** 2 <= radius**2


@pytest.mark.parametrize("tissue", [Tissue.GGO, Tissue.CONSOLIDATION])
@pytest.mark.parametrize("noise", [0.0, 30.0])
def test_shifted_contour_moves_to_the_true_edge(tissue, noise):
    mask, truth = _lesion(_ball(), tissue)
    moved = np.where(shift(_ball().astype(float), (3, 2, 0), order=0) > 0.5, np.uint8(tissue), np.uint8(1)) * mask
    fused = sobel_diffusion_fusion(_posterior(moved), _scan(truth, noise), mask)
    before, after = dice(moved, truth, tissue), dice(fused, truth, tissue)
    assert before < 0.85
    assert after > 0.92  # the product of both edges is drawn up to a voxel towards the label's own
    assert fused.dtype == np.uint8
    assert ((fused > 0) == mask).all()


def test_flat_scan_keeps_the_argmax():
    mask, labels = _lesion(np.indices(SHAPE)[0] >= 24, Tissue.GGO)
    posterior = _posterior(labels)
    fused = sobel_diffusion_fusion(posterior, np.full(SHAPE, -700.0), mask)
    np.testing.assert_array_equal(fused, labels)
    np.testing.assert_array_equal(fused, posterior_labels(posterior, mask))


def test_one_class_has_no_contour_to_move():
    mask, labels = _lesion(np.zeros(SHAPE, dtype=bool))
    np.testing.assert_array_equal(sobel_diffusion_fusion(_posterior(labels), _scan(labels), mask), labels)


def _token_cube(p):
    start = 24 - 24 % p
    where = np.zeros(SHAPE, dtype=bool)
    where[start : start + p, start : start + p, start : start + p] = True
    return where


def _subpleural_sheet(p):
    where = np.zeros(SHAPE, dtype=bool)
    where[:, :, 45 - p : 45] = True
    return where & _mask()


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("lesion", [_token_cube, _subpleural_sheet])
@pytest.mark.parametrize("flat", [False, True])
def test_one_token_lesions_survive(p, lesion, flat):
    where = lesion(p)
    mask, truth = _lesion(where)
    scan = np.full(SHAPE, -850.0) if flat else _scan(truth)
    posterior = _posterior(truth)
    fused = sobel_diffusion_fusion(posterior, scan, mask)
    cleaned = remove_small_components(fused, posterior, voxel_ml=0.001)
    kept = np.count_nonzero((cleaned == Tissue.CONSOLIDATION) & where) / np.count_nonzero(where)
    grown = np.count_nonzero((cleaned == Tissue.CONSOLIDATION) & ~where) / np.count_nonzero(where)
    assert kept >= (0.5 if flat else 0.8)
    assert grown <= 0.15


def test_one_token_of_the_lattice_survives_upsampling_fusion_and_cleanup():
    mask, truth = _lesion(_token_cube(8))
    posterior = _posterior(np.ones((6, 6, 6), dtype=np.uint8), 0.95)
    posterior[:, 3, 3, 3] = posterior[::-1, 3, 3, 3]
    fused = sobel_diffusion_fusion(posterior, _scan(truth), mask, token_size=8)
    cleaned = remove_small_components(fused, posterior, voxel_ml=0.001, token_size=8)
    # Trilinear posteriors round a single token off to about half its volume; the edge gives some of it back.
    plain = posterior_labels(posterior, mask, token_size=8)
    assert dice(cleaned, truth, Tissue.CONSOLIDATION) > max(0.7, dice(plain, truth, Tissue.CONSOLIDATION))


def test_pleura_is_no_edge_and_the_chest_wall_does_not_matter():
    mask, truth = _lesion(_ball())
    posterior, scan = _posterior(truth), _scan(truth)
    fused = sobel_diffusion_fusion(posterior, scan, mask)
    other = np.where(mask, scan, 3000.0)
    np.testing.assert_array_equal(sobel_diffusion_fusion(posterior, other, mask), fused)


def test_fusion_does_not_depend_on_the_field_of_view():
    mask, truth = _lesion(_ball())
    posterior, scan = _posterior(truth), _scan(truth)
    wide = [(16, 16)] * 3
    padded = sobel_diffusion_fusion(
        np.pad(posterior, [(0, 0), *wide], mode="edge"), np.pad(scan, wide, constant_values=-1000), np.pad(mask, wide)
    )
    np.testing.assert_array_equal(padded[16:-16, 16:-16, 16:-16], sobel_diffusion_fusion(posterior, scan, mask))


def test_bad_input_is_refused():
    mask, truth = _lesion(_ball())
    posterior, scan = _posterior(truth), _scan(truth)
    assert not sobel_diffusion_fusion(posterior, scan, np.zeros_like(mask)).any()
    assert not posterior_labels(posterior, np.zeros_like(mask)).any()
    with pytest.raises(MismatchError, match="expected"):
        sobel_diffusion_fusion(posterior[:4], scan, mask)
    with pytest.raises(InputError, match="bool"):
        sobel_diffusion_fusion(posterior, scan, mask.astype(np.uint8))
    with pytest.raises(InputError, match="one grid"):
        sobel_diffusion_fusion(posterior, scan[1:], mask)
    empty = posterior.copy()
    empty[:, 24, 24, 20:22] = 0.0
    with pytest.raises(MismatchError, match="2 lung voxels have no posterior"):
        sobel_diffusion_fusion(empty, scan, mask)
    empty[0, 24, 24, 24] = np.nan
    with pytest.raises(MismatchError, match="not finite"):
        sobel_diffusion_fusion(empty, scan, mask)


def test_specks_join_the_majority_and_large_pieces_stay():
    mask, labels = _lesion(_ball())
    labels[24, 24, 24:30] = Tissue.FIBROSIS  # 6 voxels inside consolidation
    labels[6:8, 6:8, 6:8] = Tissue.EMPHYSEMA  # 8 voxels inside healthy lung
    labels[36:40, 36:40, 4:8] = Tissue.GGO  # 64 voxels = 0.064 ml: stays
    labels[6, 20, 20] = 255  # unclassified speck
    cleaned = remove_small_components(labels, None, voxel_ml=0.001)
    assert (cleaned[24, 24, 24:30] == Tissue.CONSOLIDATION).all()
    assert (cleaned[6:8, 6:8, 6:8] == Tissue.HEALTHY).all()
    assert (cleaned[36:40, 36:40, 4:8] == Tissue.GGO).all()
    assert cleaned[6, 20, 20] == Tissue.HEALTHY
    assert ((cleaned > 0) == mask).all()
    assert labels[6, 20, 20] == 255  # the input is left alone


def test_ties_go_to_the_more_probable_class():
    labels = np.full((1, 1, 41), Tissue.HEALTHY, dtype=np.uint8)
    labels[..., 20] = Tissue.EMPHYSEMA
    labels[..., 21:] = Tissue.GGO
    posterior = _posterior(labels)
    posterior[:, 0, 0, 20] = [0.2, 0.5, 0.3, 0, 0]
    assert remove_small_components(labels, posterior, voxel_ml=0.01)[0, 0, 20] == Tissue.GGO
    posterior[:, 0, 0, 20] = [0.3, 0.5, 0.2, 0, 0]
    assert remove_small_components(labels, posterior, voxel_ml=0.01)[0, 0, 20] == Tissue.HEALTHY
    assert remove_small_components(labels, None, voxel_ml=0.01)[0, 0, 20] == Tissue.HEALTHY


def test_an_island_of_lung_keeps_its_label():
    labels = np.zeros((10, 10, 10), dtype=np.uint8)
    labels[1, 1, 1] = Tissue.GGO
    labels[5:, 5:, 5:] = Tissue.HEALTHY
    np.testing.assert_array_equal(remove_small_components(labels, None, voxel_ml=0.001), labels)
    assert not remove_small_components(np.zeros_like(labels), None, voxel_ml=0.001).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.floats(0.001, 0.05))
def test_cleanup_leaves_no_small_component_but_islands(seed, num_labels, minimum_ml):
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, num_labels + 1, (9, 10, 11)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.45] = 0
    cleaned = remove_small_components(labels, None, voxel_ml=0.001, minimum_ml=minimum_ml)
    assert ((cleaned > 0) == (labels > 0)).all()
    islands, count = label(labels > 0, structure=CUBE)
    for tissue in np.unique(cleaned[cleaned > 0]):
        pieces, number = label(cleaned == tissue, structure=CUBE)
        sizes = np.bincount(pieces.ravel())[1:]
        for index in np.flatnonzero(sizes * 0.001 < minimum_ml) + 1:
            island = islands[pieces == index][0]
            assert sizes[index - 1] >= max(
                np.bincount(label((cleaned == other) & (islands == island), structure=CUBE)[0].ravel())[1:].max(
                    initial=0
                )
                for other in np.unique(cleaned[islands == island])
            )
        assert number <= labels.size
    assert count >= 1

"""Local binary patterns against scikit-image, and at the borders of patch and lung."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.feature import local_binary_pattern

from lungseg.radiomics.lbp import FLAT_BIN, NAMES, NUM_BINS, lbp_features


def _noise(*shape: int, seed: int = 0, spread: float = 120.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread - 800.0


def _by_skimage(patch: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Histogram from scikit-image's labels, on voxels whose 3 x 3 pixels are all inside patch and mask."""
    histograms = []
    for axis in range(3):
        counts = np.zeros(NUM_BINS)
        for image, lung in zip(np.moveaxis(patch, axis, 0), np.moveaxis(mask, axis, 0), strict=True):
            labels = local_binary_pattern(image.astype(np.float64), P=6, R=1, method="uniform")
            for row in range(1, image.shape[0] - 1):
                for column in range(1, image.shape[1] - 1):
                    if lung[row - 1 : row + 2, column - 1 : column + 2].all():
                        counts[int(labels[row, column])] += 1
        histograms.append(counts / counts.sum())
    return np.mean(histograms, axis=0)


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 12, 9)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern`")
def test_lbp_equals_skimage(shape: tuple[int, int, int], masked: bool) -> None:
    """On the interior: at the border scikit-image reads zeros outside the image, we leave those voxels out."""
    patches = torch.stack([_noise(*shape, seed=0), _noise(*shape, seed=1).round(), _noise(*shape, seed=2, spread=15)])
    patches[2] += torch.linspace(0, 300, shape[2])  # a ramp: few patterns
    masks = torch.ones_like(patches, dtype=torch.bool)
    if masked:
        masks = torch.rand(patches.shape, generator=torch.Generator().manual_seed(3)) < 0.93
    found = lbp_features(patches, masks, dead_band_hu=0.0).numpy()
    expected = [_by_skimage(patch, mask) for patch, mask in zip(patches.numpy(), masks.numpy(), strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found > 0).sum() >= 20  # the patches do fill most bins


@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern`")
def test_lbp_equals_skimage_on_every_pattern() -> None:
    """All 64 patterns of the six points, one per 3 x 3 image: every bin, every bit position."""
    generator = np.random.default_rng(0)
    images = generator.normal(-800, 100, (3000, 3, 3)).astype(np.float32)
    expected = [local_binary_pattern(image.astype(np.float64), 6, 1, "uniform")[1, 1] for image in images]
    patches = torch.from_numpy(images)[:, None]  # (N, 1, 3, 3): only the axial plane has an interior
    found = lbp_features(patches, torch.ones_like(patches, dtype=torch.bool), dead_band_hu=0.0)
    assert found.sum(1).tolist() == [1.0] * len(images)
    assert found.argmax(1).tolist() == [int(label) for label in expected]
    assert len(set(expected)) == NUM_BINS


def test_dead_band_ignores_weak_noise() -> None:
    patches = _noise(8, 8, 8, spread=0.5)[None]
    masks = torch.ones_like(patches, dtype=torch.bool)
    assert lbp_features(patches, masks)[0, FLAT_BIN].item() == 1.0
    assert lbp_features(patches, masks, dead_band_hu=0.0)[0, FLAT_BIN].item() < 0.5


def test_bright_and_dark_spot_by_hand() -> None:
    """Centre of a 3 x 3 image: brighter than all six points is bin 0, darker is bin 6."""
    patches = torch.full((2, 1, 3, 3), -850.0)
    patches[0, 0, 1, 1], patches[1, 0, 1, 1] = -700.0, -1000.0
    found = lbp_features(patches, torch.ones_like(patches, dtype=torch.bool))
    assert found.argmax(1).tolist() == [0, 6]


def test_flat_patch_and_no_full_neighbourhood() -> None:
    patches = torch.full((4, 5, 5, 5), -850.1)
    patches[1:] += torch.randn((3, 5, 5, 5)) * 100
    masks = torch.ones_like(patches, dtype=torch.bool)
    masks[1, ::2] = masks[1, :, ::2] = masks[1, :, :, ::2] = False  # isolated voxels only
    masks[2] = False
    masks[2, 2, 2, 2] = True
    masks[3] = False
    found = lbp_features(patches, masks, dead_band_hu=0.0)
    flat = [float(index == FLAT_BIN) for index in range(NUM_BINS)]
    assert found[:3].tolist() == [flat, flat, flat]
    assert found[3].isnan().all()


def test_plane_without_full_neighbourhood_is_left_out() -> None:
    """Lung in one axial slice only: the axial histogram alone counts."""
    patches = _noise(1, 6, 9, 9)
    masks = torch.zeros_like(patches, dtype=torch.bool)
    masks[0, 2] = True
    found = lbp_features(patches, masks)
    expected = lbp_features(patches[:, 2:3], masks[:, 2:3])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.sum().item() == pytest.approx(1.0)


def test_flips_and_half_turns_change_nothing() -> None:
    patches, masks = _noise(2, 8, 9, 7, seed=5), torch.rand((2, 8, 9, 7)) < 0.95
    expected = lbp_features(patches, masks)
    for axes in ((1,), (2,), (3,), (2, 3), (1, 2, 3)):
        found = lbp_features(patches.flip(axes), masks.flip(axes))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_values_outside_the_mask_do_not_matter() -> None:
    patches, masks = _noise(2, 8, 8, 8, seed=6), torch.rand((2, 8, 8, 8)) < 0.9
    assert torch.equal(lbp_features(torch.where(masks, patches, torch.nan), masks), lbp_features(patches, masks))


def test_eight_names() -> None:
    assert len(NAMES) == NUM_BINS == 8

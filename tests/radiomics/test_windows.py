"""Layouts, masks by bits, and what a halo means: each family against a plain computation on the whole volume."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.feature import local_binary_pattern
from test_gabor import _kernel

from lungseg.errors import InputError
from lungseg.radiomics import windows
from lungseg.radiomics.first_order import first_order_features
from lungseg.radiomics.gabor import ORIENTATIONS_DEG, WAVELENGTHS_VOXELS, gabor_features, radius
from lungseg.radiomics.glcm import DIRECTIONS, NUM_LEVELS, features_of_counts, glcm_features, grey_levels
from lungseg.radiomics.lbp import lbp_features
from lungseg.radiomics.windows import HALO_VOXELS, cache_blocks, check_patches, keep, own_voxels, window_of, with_border

MEDIAN = -830.0
CORNER, SIZE = (2, 15, 14), (4, 5, 6)
"""A window in the volume of ``_volume``, its halo just inside."""


def _volume(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float64 HU and lung mask of a small volume."""
    rng = np.random.default_rng(seed)
    shape = (8, 36, 37)
    return rng.normal(-800, 90, shape), ndimage.uniform_filter(rng.normal(size=shape), 3) > -0.15


def _cut(array: np.ndarray, margins: tuple[int, int, int]) -> torch.Tensor:
    box = tuple(slice(c - m, c + n + m) for c, n, m in zip(CORNER, SIZE, margins, strict=True))
    return torch.from_numpy(array[box].copy())[None]


@pytest.fixture
def haloed() -> tuple[torch.Tensor, torch.Tensor]:
    volume, lung = _volume()
    return _cut(volume, HALO_VOXELS), _cut(lung, HALO_VOXELS)


def test_the_halo_is_as_wide_as_the_longest_kernel() -> None:
    assert HALO_VOXELS[1:] == (radius(max(WAVELENGTHS_VOXELS)),) * 2


def test_first_order_does_not_read_the_halo(haloed: tuple[torch.Tensor, torch.Tensor]) -> None:
    patch, mask = haloed
    expected = first_order_features(window_of(patch, halo=True), window_of(mask, halo=True))
    assert torch.equal(first_order_features(patch, mask, halo=True), expected)


def test_glcm_pair_belongs_to_its_first_voxel(haloed: tuple[torch.Tensor, torch.Tensor]) -> None:
    volume, lung = _volume()
    levels = grey_levels(torch.from_numpy(volume)[None], torch.from_numpy(lung)[None])[0].numpy()
    counts = np.zeros((1, 1, NUM_LEVELS, NUM_LEVELS), dtype=np.int64)
    for offset in np.ndindex(SIZE):
        voxel = np.add(CORNER, offset)
        for step in DIRECTIONS:
            other = tuple(voxel + step)
            if lung[tuple(voxel)] and lung[other]:
                counts[0, 0, levels[tuple(voxel)], levels[other]] += 1
    expected = features_of_counts(torch.from_numpy(counts), torch.zeros(1), mcc=True)
    torch.testing.assert_close(glcm_features(*haloed, halo=True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern`")
def test_lbp_neighbourhood_belongs_to_its_centre(haloed: tuple[torch.Tensor, torch.Tensor]) -> None:
    volume, lung = _volume()
    own = np.zeros_like(lung)
    own[tuple(slice(c, c + n) for c, n in zip(CORNER, SIZE, strict=True))] = True
    shares = []
    for axis in range(3):
        square = np.ones([1 if other == axis else 3 for other in range(3)])
        full = own & ndimage.binary_erosion(lung, square)
        slices = [local_binary_pattern(image, 6, 1, "uniform") for image in np.moveaxis(volume, axis, 0)]
        labels = np.moveaxis(np.stack(slices), 0, axis)[full].astype(int)
        shares.append(np.bincount(labels, minlength=8) / len(labels))
    found = lbp_features(*haloed, dead_band_hu=0.0, halo=True)[0].numpy()
    np.testing.assert_allclose(found, np.mean(shares, axis=0), atol=1e-12)


def test_gabor_reads_the_volume_around(haloed: tuple[torch.Tensor, torch.Tensor]) -> None:
    volume, lung = _volume()
    values = np.where(lung, volume - MEDIAN, 0.0)
    box = tuple(slice(c, c + n) for c, n in zip(CORNER, SIZE, strict=True))
    expected = []
    for wavelength in WAVELENGTHS_VOXELS:
        for angle in ORIENTATIONS_DEG:
            kernel = _kernel(wavelength, angle)
            parts = [ndimage.convolve(values, part[None], mode="constant") for part in (kernel.real, kernel.imag)]
            energy = parts[0] ** 2 + parts[1] ** 2
            expected.append(math.log1p(energy[box][lung[box]].mean()))
    found = gabor_features(*haloed, lung_median_hu=torch.tensor(MEDIAN), halo=True)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_is_where(dtype: torch.dtype) -> None:
    values = torch.randn((3, 4, 5, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.rand(values.shape) < 0.5
    values[0, 0], mask[0, 0] = torch.nan, False
    values[1, 0], mask[1, 0] = -torch.inf, False
    for fill in (0.0, -1024.0, math.inf):
        assert torch.equal(keep(values, mask, fill=fill), torch.where(mask, values, fill))
    turned = values.permute(0, 3, 1, 2), mask.permute(0, 3, 1, 2)
    assert torch.equal(keep(*turned), torch.where(turned[1], turned[0], 0.0))


def test_layouts() -> None:
    masks = torch.ones((2, 4, 31, 33), dtype=torch.bool)
    assert with_border(masks, halo=False, fill=False).shape == (2, 5, 32, 34)
    assert with_border(masks, halo=True, fill=False).shape == (2, 4, 5, 7)
    assert own_voxels(masks, halo=True).sum() == 2 * 2 * 3 * 5
    assert window_of(masks, halo=True).shape == (2, 2, 3, 5)
    # in one row, a step never leads from a voxel of a window into another window, or round an end into the same one
    border = with_border(masks, halo=False, fill=False).flatten()
    position = torch.full((2, 5, 32, 34), -1).masked_scatter_(
        with_border(masks, halo=False, fill=False), torch.arange(masks.numel())
    )
    for step in DIRECTIONS:
        shift = windows.flat_step((5, 32, 34), step)
        start = position[:, :4, :31, :33].flatten()
        there = torch.cat((position.flatten(), torch.full((shift,), -1)))[border.nonzero()[:, 0] + shift]
        first = torch.stack(torch.unravel_index(start[there >= 0], masks.shape), 1)
        second = torch.stack(torch.unravel_index(there[there >= 0], masks.shape), 1)
        assert (second - first == torch.tensor((0, *step))).all()


def test_blocks_cover_all_patches_once() -> None:
    for num in (0, 1, 7, 1000):
        rows = [list(range(num))[block] for block in cache_blocks(num, (16, 16, 16), torch.device("cpu"))]
        assert [row for block in rows for row in block] == list(range(num))
    assert len(list(cache_blocks(5, (400, 400, 400), torch.device("cpu")))) == 5
    assert len(list(cache_blocks(10**6, (8, 8, 8), torch.device("meta")))) == 1


def test_patches_smaller_than_their_halo_are_refused() -> None:
    patches = torch.zeros((1, 3, 28, 40))
    check_patches(patches, patches == 0)
    with pytest.raises(InputError, match="halo"):
        check_patches(patches, patches == 0, halo=True)

"""Gabor energies against scikit-image's kernel convolved by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.filters import gabor_kernel

from lungseg.errors import InputError
from lungseg.radiomics.gabor import NAMES, ORIENTATIONS_DEG, WAVELENGTHS_VOXELS, gabor_features


def _kernel(wavelength: int, angle: int) -> np.ndarray:
    """scikit-image's complex kernel, cut to a square of 3 sigma and made zero-mean by a multiple of its Gaussian."""
    sigma = 0.56 * wavelength
    radius = math.ceil(3 * sigma)
    kernel = gabor_kernel(1 / wavelength, theta=math.radians(angle), sigma_x=sigma, sigma_y=sigma, n_stds=6)
    middle_row, middle_column = kernel.shape[0] // 2, kernel.shape[1] // 2
    rows = slice(middle_row - radius, middle_row + radius + 1)
    columns = slice(middle_column - radius, middle_column + radius + 1)
    kernel = kernel[rows, columns].astype(np.complex128)
    assert kernel.shape == (2 * radius + 1, 2 * radius + 1)
    gauss = np.abs(kernel)
    return kernel - gauss * (kernel.real.sum() / gauss.sum())


def _expected(patch: np.ndarray, mask: np.ndarray, median: float) -> list[float]:
    """Direct convolution of every axial slice."""
    values = np.where(mask, patch.astype(np.float64) - median, 0.0)
    features = []
    for wavelength in WAVELENGTHS_VOXELS:
        for angle in ORIENTATIONS_DEG:
            kernel = _kernel(wavelength, angle)
            energy = np.zeros_like(values)
            for part in (kernel.real, kernel.imag):
                for index, image in enumerate(values):
                    energy[index] += ndimage.convolve(image, part, mode="constant", cval=0.0) ** 2
            features.append(math.log1p(energy[mask].mean()))
    return features


@pytest.mark.parametrize("shape", [(8, 8, 8), (3, 20, 13), (4, 1, 1)])
def test_gabor_equals_direct_convolution(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn((3, *shape), generator=generator) * torch.tensor([20.0, 100.0, 300.0]).view(-1, 1, 1, 1)
    patches -= 800.0
    masks = torch.rand(patches.shape, generator=generator) < 0.7
    masks[0] = True
    masks[:, 0, 0, 0] = True
    median = torch.tensor([-850.0, -820.0, -700.0])
    found = gabor_features(patches, masks, lung_median_hu=median).numpy()
    for row in range(3):
        expected = _expected(patches[row].numpy(), masks[row].numpy(), float(median[row]))
        np.testing.assert_allclose(found[row], expected, rtol=2e-5, atol=1e-5)


def test_kernels_have_zero_mean() -> None:
    for wavelength in WAVELENGTHS_VOXELS:
        for angle in ORIENTATIONS_DEG:
            assert abs(_kernel(wavelength, angle).sum()) < 1e-12
    # and so a constant offset leaves no response far from the border
    patches = torch.full((1, 3, 61, 61), -700.0)
    masks = torch.ones_like(patches, dtype=torch.bool)
    found = gabor_features(patches, masks, lung_median_hu=torch.tensor(-850.0), halo=True)
    assert found.abs().max().item() < 1e-6
    assert gabor_features(patches, masks, lung_median_hu=torch.tensor([-700.0])).abs().max().item() == 0.0


@pytest.mark.parametrize("wavelength", WAVELENGTHS_VOXELS)
@pytest.mark.parametrize("angle", ORIENTATIONS_DEG)
@pytest.mark.parametrize("phase", [0.0, 1.0])
def test_wave_excites_its_own_filter(wavelength: int, angle: int, phase: float) -> None:
    """A plane wave along the angle, of the wavelength, has its largest energy there; its amplitude A gives A/2."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    theta = math.radians(angle)
    wave = torch.cos(2 * math.pi / wavelength * (x * math.cos(theta) + y * math.sin(theta)) + phase)
    patches = (100.0 * wave - 850.0)[None, None]
    masks = torch.ones_like(patches, dtype=torch.bool)
    found = dict(zip(NAMES, gabor_features(patches, masks, lung_median_hu=torch.tensor(-850.0))[0], strict=True))
    best = max(found, key=lambda name: found[name].item())
    assert best == f"gabor_w{wavelength}_a{angle}"
    assert found[best].item() == pytest.approx(math.log1p(50.0**2), rel=0.05)  # less at the border


def test_orientations_follow_quarter_turns() -> None:
    patches = torch.randn((2, 5, 16, 16), generator=torch.Generator().manual_seed(1)) * 100 - 800
    masks = torch.rand(patches.shape, generator=torch.Generator().manual_seed(2)) < 0.8
    median = torch.tensor([-800.0, -840.0])
    found = gabor_features(patches, masks, lung_median_hu=median).view(2, 2, 4)
    turned = gabor_features(patches.rot90(1, (2, 3)), masks.rot90(1, (2, 3)), lung_median_hu=median).view(2, 2, 4)
    torch.testing.assert_close(turned, found[..., [2, 3, 0, 1]], rtol=1e-5, atol=1e-5)
    flipped = gabor_features(patches.flip(3), masks.flip(3), lung_median_hu=median).view(2, 2, 4)
    torch.testing.assert_close(flipped, found[..., [0, 3, 2, 1]], rtol=1e-5, atol=1e-5)


def test_values_outside_the_mask_do_not_matter_and_empty_mask_is_nan() -> None:
    patches = torch.randn((2, 4, 8, 8)) * 100 - 800
    masks = torch.rand(patches.shape) < 0.8
    masks[1] = False
    median = torch.tensor([-800.0, -800.0])
    found = gabor_features(patches, masks, lung_median_hu=median)
    other = gabor_features(torch.where(masks, patches, torch.nan), masks, lung_median_hu=median)
    assert torch.equal(found[0], other[0])
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_median_of_wrong_shape_is_refused() -> None:
    patches = torch.zeros((3, 4, 4, 4))
    with pytest.raises(InputError, match="lung_median_hu"):
        gabor_features(patches, patches == 0, lung_median_hu=torch.zeros(2))

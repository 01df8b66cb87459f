"""Gabor energies of the axial slices of a patch: 2 wavelengths x 4 orientations.

The kernels are separable (an isotropic Gaussian times a plane wave), so each response is a few products with small
banded matrices along the rows and the columns, for all slices of all patches at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lungseg.errors import InputError
from lungseg.radiomics.first_order import check_patches

WAVELENGTHS_VOXELS = (4, 8)
"""2.4 and 4.8 mm at the paper's 0.6 mm (METHOD 1.3, item 3)."""
ORIENTATIONS_DEG = (0, 45, 90, 135)
"""Direction of the wave, from +x (columns) towards +y (rows)."""
SIGMA_PER_WAVELENGTH = 0.56
"""Gaussian sigma of a bandwidth of one octave (METHOD 1.3, item 3)."""
SUPPORT_SIGMAS = 3.0
"""The kernel is cut to a square of this many sigmas, rounded up, on each side of the centre."""
NAMES = tuple(f"gabor_w{wavelength}_a{angle}" for wavelength in WAVELENGTHS_VOXELS for angle in ORIENTATIONS_DEG)
"""Columns of ``gabor_features``."""


def gabor_features(patches_hu: Tensor, masks: Tensor, *, lung_median_hu: Tensor) -> Tensor:
    """Log energy of eight zero-mean Gabor filters over the lung voxels of each patch.

    The scan's lung median is subtracted, voxels outside the lung (and outside the patch) are 0, every axial slice is
    convolved with the complex kernel, and the feature is ``log(1 + mean |response|^2)`` over lung voxels. The complex
    kernel (even and odd part) makes the energy independent of where in the patch a crest lies. Its Gaussian has unit
    integral over the plane; a multiple of that Gaussian is taken off the even part so that its sum is 0.

    Parameters
    ----------
    patches_hu : float32 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask are not read. The filters act along H and W only.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    lung_median_hu : float tensor, shape (N,) or ()
        Median HU of the whole lung of the scan each patch comes from.

    Returns
    -------
    float64 tensor, shape (N, 8)
        Natural logarithm of HU^2 plus 1, columns ``NAMES``; NaN where the mask is empty.

    Raises
    ------
    InputError
        If shapes differ, ``masks`` is not bool or ``lung_median_hu`` is neither (N,) nor a scalar.

    Source
    ------
    METHOD 1.3, item 3; kernel as scikit-image ``gabor_kernel`` (bandwidth 1 octave).
    """
    check_patches(patches_hu, masks)
    num_patches, depth, height, width = patches_hu.shape
    median = torch.as_tensor(lung_median_hu, device=patches_hu.device).to(torch.float32)
    if median.shape not in (torch.Size([num_patches]), torch.Size([])):
        raise InputError(f"lung_median_hu must have shape ({num_patches},) or (), but has {tuple(median.shape)}")
    values = patches_hu.to(torch.float32) - median.reshape(-1, 1, 1, 1)
    slices = torch.where(masks, values, 0.0).flatten(0, 1)  # (N, D, H, W) -> (N*D, H, W)
    lung = masks.flatten(0, 1).to(torch.float32)
    count = masks.flatten(1).sum(1).to(torch.float64)
    features = []
    for wavelength in WAVELENGTHS_VOXELS:
        across = _filter_matrices(width, wavelength).to(values.device)
        down = _filter_matrices(height, wavelength).to(values.device)
        for even, odd in _responses(slices, across, down, _even_sums(wavelength)):
            energy = even.square_().add_(odd.square_()).mul_(lung)
            per_slice = energy.sum((1, 2)).to(torch.float64).view(num_patches, depth)
            features.append(torch.log1p(per_slice.sum(1) / count))
    return torch.stack(features, 1)


def _responses(slices: Tensor, across: Tensor, down: Tensor, even_sums: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Even and odd response of each orientation; ``slices`` (S, H, W), filter matrices (5, W, W) and (5, H, H)."""
    num_slices, height, width = slices.shape
    # One product for all row filters: columns are [cos1 | sin1 | gauss | cos2 | sin2], each W wide.
    rows = slices.reshape(-1, width) @ across.reshape(-1, width).T
    rows = rows.view(num_slices, height, 5 * width)
    straight = torch.matmul(down[2], rows[:, :, : 3 * width])  # Gaussian down the columns
    even_0, odd_0, smooth = straight.split(width, 2)
    upright = torch.matmul(down[:2].reshape(-1, height), rows[:, :, 2 * width : 3 * width])
    even_90, odd_90 = upright.split(height, 1)
    oblique = torch.matmul(down[3:].reshape(-1, height), rows[:, :, 3 * width :])  # (S, 2H, 2W)
    cos_down, sin_down = oblique.split(height, 1)
    cos_cos, sin_cos = cos_down.split(width, 2)  # named: across, down
    cos_sin, sin_sin = sin_down.split(width, 2)
    # exp(i(a + b)) and exp(i(b - a)) with a across and b down (45 and 135 degrees), less the mean of the even part.
    return [
        (even_0 - even_sums[0] * smooth, odd_0),
        (cos_cos - sin_sin - even_sums[1] * smooth, sin_cos + cos_sin),
        (even_90 - even_sums[0] * smooth, odd_90),
        (cos_cos + sin_sin - even_sums[1] * smooth, cos_sin - sin_cos),
    ]


def _profiles(wavelength: int) -> Tensor:
    """Five 1-D filters, (5, 2r+1) float64: Gaussian times cos, sin, 1, cos oblique, sin oblique."""
    sigma = SIGMA_PER_WAVELENGTH * wavelength
    radius = math.ceil(SUPPORT_SIGMAS * sigma)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    gauss = torch.exp(-x.square() / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    phase = 2 * math.pi / wavelength * x
    oblique = phase / math.sqrt(2.0)
    waves = (phase.cos(), phase.sin(), torch.ones_like(x), oblique.cos(), oblique.sin())
    return torch.stack([gauss * wave for wave in waves])


def _even_sums(wavelength: int) -> Tensor:
    """Sum of the even kernel over the sum of its Gaussian: along an axis, oblique; (2,) float64."""
    sums = _profiles(wavelength).sum(1)
    return torch.stack((sums[0] / sums[2], (sums[3] / sums[2]).square()))


def _filter_matrices(size: int, wavelength: int) -> Tensor:
    """Convolution with each 1-D filter and zeros outside as a matrix; (5, size, size) float32, out x in."""
    profiles = _profiles(wavelength)
    radius = profiles.shape[1] // 2
    offset = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    inside = offset.abs() <= radius
    return torch.where(inside, profiles[:, offset.clamp(-radius, radius) + radius], 0.0).to(torch.float32)

"""Gabor energies of the axial slices of a patch: 2 wavelengths x 4 orientations.

The kernels are separable (an isotropic Gaussian times a plane wave), so each response is a few products with small
banded matrices along the rows and the columns, for all slices of all patches at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lungseg.errors import InputError
from lungseg.radiomics.windows import HALO_VOXELS, cache_blocks, check_patches, computing_dtype, keep, window_of

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


def radius(wavelength: int) -> int:
    """Reach of a kernel in voxels."""
    return math.ceil(SUPPORT_SIGMAS * SIGMA_PER_WAVELENGTH * wavelength)


def gabor_features(patches_hu: Tensor, masks: Tensor, *, lung_median_hu: Tensor, halo: bool = False) -> Tensor:
    """Log energy of eight zero-mean Gabor filters over the lung voxels of each patch.

    The scan's lung median is subtracted, voxels outside the lung (and outside the patch, unless it has a halo) are 0,
    every axial slice is convolved with the complex kernel, and the feature is ``log(1 + mean |response|^2)`` over lung
    voxels. The complex kernel (even and odd part) makes the energy independent of where in the patch a crest lies. Its
    Gaussian has unit integral over the plane; a multiple of that Gaussian is taken off the even part so that its sum
    is 0.

    Parameters
    ----------
    patches_hu : float32 or float64 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask are not read. The filters act along H and W only.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    lung_median_hu : float tensor, shape (N,) or ()
        Median HU of the whole lung of the scan each patch comes from.
    halo : bool
        Whether the patches come with a halo (``windows``).

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
    check_patches(patches_hu, masks, halo=halo)
    num_patches = len(masks)
    dtype = computing_dtype(patches_hu)
    median = torch.as_tensor(lung_median_hu, device=patches_hu.device).to(dtype)
    if median.shape not in (torch.Size([num_patches]), torch.Size([])):
        raise InputError(f"lung_median_hu must have shape ({num_patches},) or (), but has {tuple(median.shape)}")
    median = median.reshape(-1, 1, 1, 1).expand(num_patches, 1, 1, 1)
    margin = HALO_VOXELS[2] if halo else 0
    banks = tuple(FilterBank.make(w, masks.shape[2:], margin, dtype, masks.device) for w in WAVELENGTHS_VOXELS)
    depth = slice(HALO_VOXELS[0], -HALO_VOXELS[0]) if halo else slice(None)
    sums = torch.empty((num_patches, len(NAMES)), dtype=torch.float64, device=masks.device)
    # half as many patches as for the other families: the row filters give five responses for each voxel
    for block in cache_blocks(num_patches, (2, *masks.shape[1:]), masks.device):
        lung = masks[block, depth]
        slices = keep(patches_hu[block, depth].to(dtype) - median[block], lung)
        own = window_of(masks[block], halo=halo).contiguous().view(torch.uint8).to(dtype)
        for index, bank in enumerate(banks):
            energies = bank.energies(slices.flatten(0, 1)).mul_(own.flatten(0, 1)).flatten(2).sum(2)
            columns = slice(index * len(ORIENTATIONS_DEG), (index + 1) * len(ORIENTATIONS_DEG))
            sums[block, columns] = energies.view(len(ORIENTATIONS_DEG), len(lung), -1).sum(2, dtype=torch.float64).T
    count = window_of(masks, halo=halo).flatten(1).sum(1, dtype=torch.float64)
    return torch.log1p(sums / count[:, None])


@dataclass(frozen=True)
class FilterBank:
    """The filters of one wavelength as banded matrices for slices of one size."""

    across: Tensor
    """(W_in, 5 W_out): along the rows, [even less its mean | odd | Gaussian | oblique cos | oblique sin]."""
    down: Tensor
    """(5, H_out, H_in): along the columns, the same five."""
    oblique_mean: float
    """Multiple of the Gaussian to take off the even part of an oblique kernel."""
    margin: int
    """Voxels on each side of the slices that are not read: their halo is that of the longest wavelength."""

    @classmethod
    def make(
        cls, wavelength: int, size: Sequence[int], margin: int, dtype: torch.dtype, device: torch.device
    ) -> FilterBank:
        """Bank for slices of ``size`` (H, W), ``margin`` voxels on each side of which are halo (0: zeros outside)."""
        reach = radius(wavelength) if margin else 0
        profiles = _profiles(wavelength)
        sums = profiles.sum(1)
        profiles[0] -= sums[0] / sums[2] * profiles[2]
        down, across = (
            _filter_matrices(profiles, int(length) - 2 * (margin - reach), reach).to(device, dtype) for length in size
        )
        even_mean = float((sums[3] / sums[2]).square())
        return cls(across.flatten(0, 1).T.contiguous(), down.contiguous(), even_mean, margin - reach)

    def energies(self, slices: Tensor) -> Tensor:
        """|Response|^2 of each orientation, (4, S, H_out, W_out), of ``slices`` (S, H, W)."""
        if self.margin:
            slices = slices[:, self.margin : -self.margin, self.margin : -self.margin]
        width = self.across.shape[1] // 5
        rows = (slices.reshape(-1, slices.shape[2]) @ self.across).view(*slices.shape[:2], 5 * width)
        height = self.down.shape[1]
        even_0, odd_0, smooth = torch.matmul(self.down[2], rows[:, :, : 3 * width]).split(width, 2)
        upright = torch.matmul(self.down[:2].flatten(0, 1), rows[:, :, 2 * width : 3 * width])
        even_90, odd_90 = upright.split(height, 1)
        oblique = torch.matmul(self.down[3:].flatten(0, 1), rows[:, :, 3 * width :])  # (S, 2H, 2W)
        cos_down, sin_down = oblique.split(height, 1)
        cos_cos, sin_cos = cos_down.split(width, 2)  # named: across, down
        cos_sin, sin_sin = sin_down.split(width, 2)
        smooth = torch.sub(cos_cos, smooth, alpha=self.oblique_mean)
        # exp(i(a + b)) and exp(i(b - a)) with a across and b down (45 and 135 degrees), less the mean of the even part
        result = torch.empty((4, len(slices), height, width), dtype=slices.dtype, device=slices.device)
        for target, even, odd in (
            (result[0], even_0, odd_0),
            (result[1], smooth - sin_sin, sin_cos + cos_sin),
            (result[2], even_90, odd_90),
            (result[3], smooth + sin_sin, cos_sin - sin_cos),
        ):
            torch.mul(even, even, out=target).addcmul_(odd, odd)
        return result


def _profiles(wavelength: int) -> Tensor:
    """Five 1-D filters, (5, 2r+1) float64: Gaussian times cos, sin, 1, cos oblique, sin oblique."""
    sigma = SIGMA_PER_WAVELENGTH * wavelength
    reach = radius(wavelength)
    x = torch.arange(-reach, reach + 1, dtype=torch.float64)
    gauss = torch.exp(-x.square() / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    phase = 2 * math.pi / wavelength * x
    oblique = phase / math.sqrt(2.0)
    waves = (phase.cos(), phase.sin(), torch.ones_like(x), oblique.cos(), oblique.sin())
    return torch.stack([gauss * wave for wave in waves])


def _filter_matrices(profiles: Tensor, length: int, margin: int) -> Tensor:
    """Convolution with each 1-D filter (F, 2r+1) as a matrix, (F, length - 2 margin, length), out x in.

    With a margin only outputs whose neighbours all exist; with margin 0 zeros stand outside.
    """
    reach = profiles.shape[1] // 2
    offset = torch.arange(margin, length - margin)[:, None] - torch.arange(length)[None, :]
    inside = offset.abs() <= reach
    return torch.where(inside, profiles[:, offset.clamp(-reach, reach) + reach], 0.0)

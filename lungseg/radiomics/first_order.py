"""First-order statistics of the lung voxels of each patch: mean, standard deviation, skewness, excess kurtosis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lungseg.radiomics.windows import cache_blocks, check_patches, computing_dtype, keep, window_of

NAMES = ("hu_mean", "hu_sd", "hu_skewness", "hu_kurtosis")
"""Columns of ``first_order_features``."""


@dataclass(frozen=True)
class Moments:
    """Number, mean and sums of powers about that mean of the lung voxels of some regions, float64, any shape."""

    count: Tensor
    mean: Tensor
    """HU; 0 where the count is 0."""
    second: Tensor
    third: Tensor
    fourth: Tensor
    """Sums of (x - mean)^2, ^3, ^4."""

    def join(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint regions each, exact for flat ones (Pébay, SAND2008-6212)."""
        count = self.count + other.count
        safe = count.clamp(min=1.0)
        share, delta = other.count / safe, other.mean - self.mean
        rest = self.count / safe
        cross = self.count * share * delta.square()  # n1 n2 / n delta^2
        second = self.second + other.second + cross
        turned = rest * other.second - share * self.second
        third = self.third + other.third + cross * delta * (rest - share) + 3.0 * delta * turned
        fourth = (
            self.fourth
            + other.fourth
            + cross * delta.square() * (rest.square() - rest * share + share.square())
            + 6.0 * delta.square() * (rest.square() * other.second + share.square() * self.second)
            + 4.0 * delta * (rest * other.third - share * self.third)
        )
        return Moments(count, self.mean + delta * share, second, third, fourth)

    def stacked(self) -> Tensor:
        """Count, mean and the three sums in a new last axis."""
        return torch.stack((self.count, self.mean, self.second, self.third, self.fourth), -1)

    def features(self) -> Tensor:
        """Mean, SD, skewness, excess kurtosis in a new last axis; NaN where the count is 0."""
        count = torch.where(self.count > 0, self.count, torch.nan)
        variance = self.second / count
        flat = variance == 0
        safe = torch.where(flat, 1.0, variance)
        skewness = self.third / count / safe.pow(1.5)
        kurtosis = torch.where(flat, 0.0, self.fourth / count / safe.square() - 3.0)
        return torch.stack((self.mean + 0.0 * count, variance.sqrt(), skewness, kurtosis), -1)


def moments(values: Tensor, masks: Tensor) -> Moments:
    """Moments of the masked values of each row.

    Parameters
    ----------
    values : float32 or float64 tensor, shape (R, V)
        Values; those outside the mask are not read.
    masks : bool tensor, shape (R, V)
        Values that count.

    Returns
    -------
    Moments
        Of shape (R,).
    """
    count = masks.sum(1, dtype=torch.float64)
    safe = count.clamp(min=1.0)[:, None]
    # Relative to one of them: a flat region is then exactly 0, so that its SD is 0 and not a rounding error.
    highest = keep(values, masks, fill=-math.inf).amax(1, keepdim=True).to(torch.float64)
    reference = torch.where(count[:, None] > 0, highest, 0.0)
    inside = masks.view(torch.uint8).to(torch.float64)
    centred = keep(values, masks).to(torch.float64).sub_(reference).mul_(inside)
    mean = centred.sum(1, keepdim=True) / safe
    centred.sub_(mean).mul_(inside)
    squared = centred.square()
    rows, columns = squared[:, None, :], squared[:, :, None]
    return Moments(
        count,
        (reference + mean)[:, 0],
        squared.sum(1),
        torch.bmm(rows, centred[:, :, None])[:, 0, 0],
        torch.bmm(rows, columns)[:, 0, 0],
    )


def first_order_features(patches_hu: Tensor, masks: Tensor, *, halo: bool = False) -> Tensor:
    """Mean, SD, skewness and excess kurtosis of the lung voxels of each patch.

    Population moments (divided by n, no bias correction), as in IBSI and pyradiomics; pyradiomics' kurtosis is this
    one plus 3.

    Parameters
    ----------
    patches_hu : float32 or float64 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask are not read.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    halo : bool
        Whether the patches come with a halo, which these statistics do not read (``windows``).

    Returns
    -------
    float64 tensor, shape (N, 4)
        Columns ``NAMES``: HU, HU, 1, 1. Skewness and kurtosis are 0 where the SD is 0 (flat patch, single voxel);
        all four are NaN where the mask is empty.

    Raises
    ------
    InputError
        If shapes differ or ``masks`` is not bool.

    Source
    ------
    METHOD 1.3, item 4; IBSI Q4LE, KE2A, IPH6.
    """
    check_patches(patches_hu, masks, halo=halo)
    patches_hu, masks = window_of(patches_hu, halo=halo), window_of(masks, halo=halo)
    values = patches_hu.to(computing_dtype(patches_hu))
    result = torch.empty((len(masks), len(NAMES)), dtype=torch.float64, device=masks.device)
    for block in cache_blocks(len(masks), masks.shape[1:], masks.device):
        result[block] = moments(values[block].flatten(1), masks[block].flatten(1)).features()
    return result

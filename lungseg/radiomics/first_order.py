"""First-order statistics of the lung voxels of each patch: mean, standard deviation, skewness, excess kurtosis.

Also home of ``check_patches``, the input check that every family of the descriptor shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lungseg.errors import InputError

NAMES = ("hu_mean", "hu_sd", "hu_skewness", "hu_kurtosis")
"""Columns of ``first_order_features``."""


def check_patches(patches_hu: Tensor, masks: Tensor) -> None:
    """Raise ``InputError`` unless patches and masks are (N, D, H, W), equal in shape and device, masks bool."""
    if patches_hu.ndim != 4 or patches_hu.shape != masks.shape:
        shapes = f"{tuple(patches_hu.shape)} and {tuple(masks.shape)}"
        raise InputError(f"patches and masks must both have shape (N, D, H, W), but have {shapes}")
    if masks.dtype != torch.bool:
        raise InputError(f"patch masks must be bool, but are {masks.dtype}")
    if patches_hu.device != masks.device:
        raise InputError(f"patches are on {patches_hu.device} but masks on {masks.device}")
    if 0 in patches_hu.shape[1:]:
        raise InputError(f"patches of shape {tuple(patches_hu.shape[1:])} hold no voxel")


def first_order_features(patches_hu: Tensor, masks: Tensor) -> Tensor:
    """Mean, SD, skewness and excess kurtosis of the lung voxels of each patch.

    Population moments (divided by n, no bias correction), as in IBSI and pyradiomics; pyradiomics' kurtosis is this
    one plus 3.

    Parameters
    ----------
    patches_hu : float32 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask are not read.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.

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
    check_patches(patches_hu, masks)
    inside = masks.flatten(1)
    values = patches_hu.flatten(1).to(torch.float64)
    count = inside.sum(1).to(torch.float64)  # 0 gives 0/0 = NaN below: an empty mask has no statistics
    # Values relative to the lowest one: a flat patch is then exactly 0, so that its SD is 0 and not a rounding error.
    lowest = torch.where(inside, values, torch.inf).amin(1, keepdim=True)
    relative = torch.where(inside, values - lowest, 0.0)
    mean = relative.sum(1) / count
    centred = torch.where(inside, relative - mean[:, None], 0.0)
    squared = centred.square()
    variance = squared.sum(1) / count
    flat = variance == 0
    safe = torch.where(flat, 1.0, variance)
    skewness = (squared * centred).sum(1) / count / safe.pow(1.5)
    kurtosis = squared.square_().sum(1) / count / safe.square() - 3.0
    kurtosis = torch.where(flat, 0.0, kurtosis)
    return torch.stack((mean + lowest[:, 0], variance.sqrt(), skewness, kurtosis), 1)

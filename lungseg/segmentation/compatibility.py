"""The optional HU compatibility check: voxels whose HU their class cannot have.

Off by default: in the feasibility study it lowered the Dice score, because it punches holes in vessels, cysts and air
bronchograms. It is there to be reported as an ablation (METHOD 1.6).
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.lattice import lattice_shape, upsample_slabs
from lungseg.tissue import (
    COMPATIBILITY_TOLERANCE_HU,
    HEALTHY_MODE_RANGE_HU,
    MIXTURE_TISSUES,
    TISSUES,
    UNCLASSIFIED,
    Tissue,
)


def check_hu_compatibility(
    labels: np.ndarray,
    posterior: np.ndarray,
    smoothed_hu: np.ndarray,
    *,
    token_size: int = 1,
    tolerance_hu: float = COMPATIBILITY_TOLERANCE_HU,
) -> np.ndarray:
    """Labels in which every voxel has a class its HU allow.

    A voxel outside the HU range of its class (``TissueInfo.compatible_hu``, widened by the tolerance, ends included)
    takes the most probable class, of those with any probability, whose range holds it; without one it becomes
    healthy if its HU lie in ``HEALTHY_MODE_RANGE_HU``, otherwise 255 (unclassified lung).

    Parameters
    ----------
    labels : uint8 array, shape (Z, Y, X)
        0 outside the lung. Classes without a range (cavity, 255) are left alone.
    posterior : float array, shape (5, z, y, x)
        Per tissue, in the order of ``MIXTURE_TISSUES``, on the lattice of ``token_size``.
    smoothed_hu : array, shape (Z, Y, X)
        HU, from ``density.smooth_hu``.
    token_size : int
        Cell size of the posterior's lattice in voxels.
    tolerance_hu : float
        Added on both sides of every range.

    Returns
    -------
    uint8 array, shape (Z, Y, X)
        A new array.

    Raises
    ------
    InputError
        If labels and HU differ in shape.
    MismatchError
        If the posterior does not fit them.

    Source
    ------
    METHOD 1.6.
    """
    if labels.shape != smoothed_hu.shape:
        raise InputError(f"labels of shape {labels.shape} and HU of shape {smoothed_hu.shape} are not on one grid")
    expected = (len(MIXTURE_TISSUES), *lattice_shape(labels.shape, token_size))
    if posterior.shape != expected:
        raise MismatchError(f"posterior of shape {posterior.shape}; expected {expected}")
    result = labels.copy()
    for part, chance in upsample_slabs(posterior, labels.shape, token_size):
        hu, view = smoothed_hu[part], result[part]
        wrong = np.zeros(hu.shape, dtype=bool)
        for tissue in MIXTURE_TISSUES:
            wrong |= (view == tissue) & ~_compatible(hu, tissue, tolerance_hu)
        values = hu[wrong]
        best = np.zeros(values.shape, dtype=np.float32)
        low, high = HEALTHY_MODE_RANGE_HU
        name = np.where((values >= low) & (values <= high), np.uint8(Tissue.HEALTHY), np.uint8(UNCLASSIFIED))
        for k, tissue in enumerate(MIXTURE_TISSUES):
            better = _compatible(values, tissue, tolerance_hu) & (chance[k][wrong] > best)
            name[better] = tissue
            best[better] = chance[k][wrong][better]
        view[wrong] = name
    return result


def _compatible(hu: np.ndarray, tissue: Tissue, tolerance_hu: float) -> np.ndarray:
    """Which HU a class may have."""
    limits = TISSUES[tissue].compatible_hu
    assert limits is not None
    return (hu >= limits[0] - tolerance_hu) & (hu <= limits[1] + tolerance_hu)

"""Round or flat: what tells vessels and airways from the septa of fibrosis where both are thin and dense.

Across a vessel the HU fall off in two directions, across a septum in one. Noise and kernel change how much, not in how
many directions.
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.volume import Triple
from lungseg.segmentation.lattice import bounding_region

SIGMA_MM = 1.0
"""Scale of the second derivatives: structures of 1 to 4 mm. At 1.5 mm the meshes of a network run together."""
LEAST_SIGMA_VOXELS = 0.7
"""Sampled Gaussian derivatives are no derivatives any more below it: coarse axes are smoothed more."""
COARSEST_MM = 1.6
"""With two axes coarser than this a septum of 1 to 2 mm is no sheet of voxels, and form says nothing."""
LEAST_CURVATURE = 1e-3
"""HU per mm2 below which nothing curves: float32 rounding."""


def tubeness(volume_hu: np.ndarray, mask: np.ndarray, thin: np.ndarray, *, spacing_mm: Triple) -> np.ndarray:
    """How round thin dense structures are: the ratio of the two strongest curvatures across them.

    Parameters
    ----------
    volume_hu : array, shape (Z, Y, X)
        HU; what lies outside the mask is not looked at.
    mask : bool array, shape (Z, Y, X)
        Lung.
    thin : bool array, shape (Z, Y, X)
        Voxels to look at, all in the mask.
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    float32 array, shape (Z, Y, X)
        Middle by lowest eigenvalue of the Hessian (Gaussian derivatives), -1 to 1: near 1 for a tube, near 0 for a
        sheet, negative for a saddle; 0 where ``thin`` is not set, and everywhere if two axes are coarser than 1.6 mm.

    Raises
    ------
    InputError
        If the shapes differ.

    Source
    ------
    Eigenvalues as in Frangi et al., MICCAI 1998 (their tubes: both large); the mean ratio as a sign is ours.
    """
    from scipy.ndimage import gaussian_filter

    if not volume_hu.shape == mask.shape == thin.shape:
        raise InputError(f"volume {volume_hu.shape}, mask {mask.shape} and structures {thin.shape} are not on one grid")
    result = np.zeros(mask.shape, dtype=np.float32)
    if not thin.any() or sum(s > COARSEST_MM for s in spacing_mm) >= 2:
        return result
    sigma = [max(SIGMA_MM / s, LEAST_SIGMA_VOXELS) for s in spacing_mm]
    region = bounding_region(thin, margin=int(np.ceil(4.0 * max(sigma))))
    inside, chosen = mask[region], thin[region]
    hu = volume_hu[region].astype(np.float32)
    # The chest wall would be the strongest sheet of all. Centred: float32 would lose small curvatures to rounding.
    hu -= np.median(hu[inside])
    hu[~inside] = 0.0
    hessian = np.empty((int(chosen.sum()), 3, 3), dtype=np.float32)
    for a in range(3):
        for b in range(a, 3):
            order = [int(axis == a) + int(axis == b) for axis in range(3)]
            # Derivatives per voxel become those per millimetre, or an uneven grid would bend round into flat.
            bent = gaussian_filter(hu, sigma, order=order)[chosen] / np.float32(spacing_mm[a] * spacing_mm[b])
            hessian[:, a, b] = hessian[:, b, a] = bent
    curvature = np.linalg.eigvalsh(hessian)
    ratio = curvature[:, 1] / np.minimum(curvature[:, 0], np.float32(-LEAST_CURVATURE))
    result[region][chosen] = np.clip(ratio, -1.0, 1.0)
    return result

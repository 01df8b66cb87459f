"""Guided filter: posteriors of the lattice brought to voxels along the edges of the scan.

Trilinear upsampling ramps from one token centre to the next, wherever the edge between two tissues lies. The guided
filter replaces each posterior by the linear function of HU that fits it best around each voxel, so that the ramp
moves to the edge. Only lung voxels enter: nothing leaks through the mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.lattice import Region, upsample_slabs

EDGE_HU = 30.0
"""Contrast below which the smoothed scan is flat to the filter: half of the 60 HU that make emphysema (METHOD 1.6)."""
GUIDE_RANGE_HU = (-1000.0, 0.0)
"""The guide is cut to it: between air and soft tissue lie all contours of lung tissue."""
SLAB_VOXELS = 48
"""Voxels along z of one slab; bounds the memory and changes no value beyond rounding."""


def guided_slabs(
    posterior: np.ndarray,
    guide_hu: np.ndarray,
    mask: np.ndarray,
    *,
    token_size: int,
    radius: int,
    region: Region,
    edge_hu: float = EDGE_HU,
    slab: int = SLAB_VOXELS,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Posterior on the voxels of a box, slab by slab along z, with ramps moved to the edges of the scan.

    Parameters
    ----------
    posterior : float array, shape (K, z, y, x)
        On the lattice of the whole volume; every token filled (``lattice.fill_uncovered``), sum 1 over K.
    guide_hu : float array, shape of the region
        HU, smoothed (``density.smooth_hu``): noise is no edge.
    mask : bool array, shape (Z, Y, X)
        Lung, on the whole volume.
    token_size : int
        Cell size of the lattice in voxels.
    radius : int
        Half the edge of the filter's box in voxels, without its centre; a token is a good choice.
    region : three slices
        Box of voxels wanted, with explicit bounds, as ``lattice.bounding_region`` gives it.
    edge_hu : float
        Square root of the filter's regularisation.
    slab : int
        Voxels along z per slab.

    Yields
    ------
    z : slice
        Voxels of the slab along z, counted from the start of the region.
    values : float32 array, shape (K, slab, Y, X) of the region
        0 to 1, sum 1 over K in the lung; 0 outside.

    Raises
    ------
    InputError
        If guide and region differ in shape.
    MismatchError
        If the posterior does not fit the mask, or is missing or not finite somewhere in the lung.

    Source
    ------
    He, Sun and Tang, Guided Image Filtering, ECCV 2010, Eqs. 5, 6 and 8, with box means over lung voxels only.
    """
    shape = tuple(part.stop - part.start for part in region)
    if guide_hu.shape != shape:
        raise InputError(f"guide of shape {guide_hu.shape} does not fill a region of {shape} voxels")
    halo = 2 * radius
    for start in range(0, shape[0], slab):
        stop = min(start + slab, shape[0])
        low, high = max(start - halo, 0), min(stop + halo, shape[0])
        box = (slice(region[0].start + low, region[0].start + high), region[1], region[2])
        lung = mask[box]
        guide = np.clip(guide_hu[low:high], *GUIDE_RANGE_HU).astype(np.float32)
        values = _upsampled(posterior, mask.shape, token_size, box)
        require_known(values, lung)
        filtered = _guided(values, guide, lung, radius, edge_hu)
        yield slice(start, stop), filtered[:, start - low : stop - low]


def require_known(values: np.ndarray, lung: np.ndarray) -> None:
    """Raise ``MismatchError`` unless a posterior (K, Z, Y, X) is finite and not all 0 in each lung voxel."""
    total = values.sum(axis=0)[lung]
    if not np.isfinite(total).all():
        raise MismatchError("the posterior is not finite everywhere in the lung")
    missing = int(np.count_nonzero(total <= 0))
    if missing:
        raise MismatchError(
            f"{missing} lung voxels have no posterior: fill the tokens without one first (lattice.fill_uncovered)"
        )


def _upsampled(posterior: np.ndarray, shape: tuple[int, ...], token_size: int, box: Region) -> np.ndarray:
    """Trilinear posterior on the voxels of a box, float32 (K, Z, Y, X)."""
    depth, height, width = (part.stop - part.start for part in box)
    values = np.empty((len(posterior), depth, height, width), dtype=np.float32)
    for part, chunk in upsample_slabs(posterior, shape, token_size, region=box):
        values[:, part] = chunk
    return values


def _guided(values: np.ndarray, guide: np.ndarray, lung: np.ndarray, radius: int, edge_hu: float) -> np.ndarray:
    """Guided filter of each of ``values`` (changed), box means over the lung alone."""
    from scipy.ndimage import uniform_filter

    size = 2 * radius + 1
    weight = uniform_filter(lung.astype(np.float32), size, mode="constant")
    weight[~lung] = 1.0

    def mean(field: np.ndarray) -> np.ndarray:
        result: np.ndarray = uniform_filter(np.where(lung, field, np.float32(0.0)), size, mode="constant")
        result /= weight
        return result

    # Centred HU in units of the edge: float32 would lose the variance of values near -850 to rounding.
    guide = (guide - np.float32(guide[lung].mean(dtype=np.float64) if lung.any() else 0.0)) / np.float32(edge_hu)
    mean_guide = mean(guide)
    variance = np.maximum(mean(guide * guide) - mean_guide * mean_guide, 0.0)
    total = np.zeros(lung.shape, dtype=np.float32)
    for k in range(len(values)):
        mean_value = mean(values[k])
        slope = (mean(guide * values[k]) - mean_guide * mean_value) / (variance + np.float32(1.0))  # Eq. 5
        offset = mean_value - slope * mean_guide  # Eq. 6
        filtered = mean(slope) * guide + mean(offset)  # Eq. 8
        values[k] = np.where(lung, np.clip(filtered, 0.0, 1.0), np.float32(0.0))
        total += values[k]
    values /= np.where(total > 0, total, np.float32(1.0))
    return values

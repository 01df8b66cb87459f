"""Distances between the surfaces of two masks, in millimetres.

One definition, METHOD 0.4: border voxels (mask minus its 6-connected erosion), physical spacing, the larger of the
two directed 95th percentiles. It equals MONAI's HD95. Arrays are ``(z, y, x)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lungseg.errors import InputError

HD_PERCENTILE = 95.0
"""Percentile of each directed distance, linear interpolation (METHOD 0.4)."""


def require_masks(prediction: np.ndarray, reference: np.ndarray) -> None:
    """Raise ``InputError`` unless both are bool arrays of one shape (a label map is not a mask)."""
    for side, mask in (("prediction", prediction), ("reference", reference)):
        if mask.dtype != np.bool_:
            raise InputError(f"the {side} must be a bool mask, not {mask.dtype}; select a class with `labels == id`")
    if prediction.shape != reference.shape:
        raise InputError(
            f"prediction {prediction.shape} and reference {reference.shape} lie on different grids; "
            "resample the prediction to the reference first"
        )


def require_spacing(spacing_mm: Sequence[float], ndim: int) -> tuple[float, ...]:
    """Spacing as floats; ``InputError`` unless one strictly positive, finite value an axis is given."""
    spacing = tuple(float(value) for value in spacing_mm)
    if len(spacing) != ndim or not all(np.isfinite(value) and value > 0 for value in spacing):
        raise InputError(f"spacing must be {ndim} strictly positive values in mm (z, y, x), not {spacing}")
    return spacing


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Smallest box around the true voxels.

    Parameters
    ----------
    mask : bool array, any number of axes

    Returns
    -------
    tuple of slice, or None
        ``[start, stop)`` per axis; None for an empty mask.
    """
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if hit.size == 0:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def border_voxels(mask: np.ndarray) -> np.ndarray:
    """Mask minus its 6-connected erosion; voxels at the edge of the array are border.

    Parameters
    ----------
    mask : bool array, any number of axes (4-connected in 2-D, 6-connected in 3-D)

    Returns
    -------
    bool array of the same shape
        All false for an empty mask.

    Source
    ------
    METHOD 0.4; MONAI ``get_mask_edges`` (what lies beyond the volume is background).
    """
    inner = mask.copy()
    for axis in range(mask.ndim):
        here, there = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        here[1:] &= there[:-1]
        here[:-1] &= there[1:]
        here[:1] = False
        here[-1:] = False
    return mask & ~inner


def directed_distances_mm(border_from: np.ndarray, border_to: np.ndarray, *, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distance of each border voxel of one surface to the nearest border voxel of the other.

    Parameters
    ----------
    border_from, border_to : bool arrays of one shape
        As ``border_voxels`` gives them; ``border_to`` must not be empty.
    spacing_mm : (z, y, x) in mm

    Returns
    -------
    float64 array, shape (number of true voxels of ``border_from``,)
        Millimetres between voxel centres, exact Euclidean.
    """
    from scipy import ndimage

    # Only the nearest-voxel indices are asked for: the distances are needed at a few voxels, and SciPy's dense
    # float64 map would double the peak memory of a full lung.
    nearest = ndimage.distance_transform_edt(
        ~border_to, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    here = np.nonzero(border_from)
    squared = np.zeros(len(here[0]), dtype=np.float64)
    for axis, step in enumerate(spacing_mm):
        squared += ((nearest[axis][here].astype(np.float64) - here[axis]) * step) ** 2
    return np.sqrt(squared)


def hd95_mm(prediction: np.ndarray, reference: np.ndarray, *, spacing_mm: Sequence[float]) -> float:
    """95th percentile Hausdorff distance of two masks, in mm.

    Parameters
    ----------
    prediction, reference : bool arrays of one shape, (Z, Y, X)
    spacing_mm : sequence of float
        Distance of voxel centres along (z, y, x) in mm. Mandatory: there is no sensible default.

    Returns
    -------
    float
        Larger of the two directed 95th percentiles (linear interpolation) of the distances between border voxels.
        ``nan`` if either mask is empty: how a missed class counts is decided in ``overlap.score_case``.

    Raises
    ------
    InputError
        If the shapes differ, a mask is not bool or the spacing is not positive.

    Source
    ------
    METHOD 0.4; equal to MONAI ``compute_hausdorff_distance(percentile=95)`` within 1e-5·max(1, |x|).
    """
    require_masks(prediction, reference)
    spacing = require_spacing(spacing_mm, prediction.ndim)
    if not prediction.any() or not reference.any():
        return float("nan")
    box = bounding_box(prediction | reference)
    assert box is not None
    # Beyond the union box both masks are background, so its faces are borders exactly as in the full volume.
    borders = border_voxels(prediction[box]), border_voxels(reference[box])
    there = directed_distances_mm(borders[0], borders[1], spacing_mm=spacing)
    back = directed_distances_mm(borders[1], borders[0], spacing_mm=spacing)
    return float(max(np.percentile(there, HD_PERCENTILE), np.percentile(back, HD_PERCENTILE)))


def lung_box_diagonal_mm(lung_mask: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Diagonal of the box around the lungs, in mm: the HD95 that a missed class is charged.

    Parameters
    ----------
    lung_mask : bool or integer array, shape (Z, Y, X)
        Any non-zero voxel is lung.
    spacing_mm : sequence of float
        (z, y, x) in mm.

    Returns
    -------
    float
        Edge to edge, so no two lung voxels lie further apart. ``nan`` if the mask is empty.

    Source
    ------
    METHOD 0.4 (penalised HD95).
    """
    spacing = require_spacing(spacing_mm, lung_mask.ndim)
    box = bounding_box(lung_mask != 0)
    if box is None:
        return float("nan")
    return float(np.linalg.norm([(side.stop - side.start) * step for side, step in zip(box, spacing, strict=True)]))

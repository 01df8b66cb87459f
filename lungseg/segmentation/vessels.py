"""Dense structures that mislead tokens: solid bodies and the rims that tokens see round them.

A token across the border of a consolidation, a large vessel or an airway wall holds dense and aerated voxels at once
and reads as ground glass or fibrosis (FEASIBILITY, failure modes 2 and 3). Such rims are thin, lie beside something
solid, and their voxels are either plainly aerated or part of a steep edge: they are given to what lies on either side.
A band of ground glass or fibrosis that is thicker than a token, or flat in HU, stays. Distances are in millimetres.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.density import masked_gaussian
from lungseg.tissue import HEALTHY_MEDIAN_HU, MIXTURE_TISSUES, Tissue

SOLID_HU = -400.0
"""Above it a voxel is more soft tissue than lung: half way from soft tissue (0) to aerated lung (-850), rounded."""
CORE_MM = 3.0
"""Depth that makes a solid structure a body: vessels of segments and septa are thinner than 6 mm. Our choice."""
STEEP_HU_PER_MM = 60.0
"""Gradient of a blurred edge; a plateau of ground glass is flatter. METHOD 7.8 holds 60 HU for the scale of an edge."""
SIGMA_MM = 0.7
"""Smoothing against noise before thresholds and gradient; a wall of 2 mm survives it. Our choice."""
INTERMEDIATE = (Tissue.GGO, Tissue.FIBROSIS)
"""Tissues between air and soft tissue, which partial volume imitates."""
CONNECTED_26 = np.ones((3, 3, 3), dtype=bool)


def give_rims_away(
    posterior: np.ndarray, volume_hu: np.ndarray, mask: np.ndarray, *, spacing_mm: Sequence[float], rim_mm: float
) -> np.ndarray:
    """Posterior in which rims of ground glass or fibrosis round solid bodies belong to the tissues beside them.

    A rim's voxel inside a body takes the posterior of that body's core, if the core is consolidation; outside, that of
    the nearest voxel that is neither rim nor body.

    Parameters
    ----------
    posterior : float array, shape (5, Z, Y, X)
        On voxels, in the order of ``MIXTURE_TISSUES``.
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
        Lung.
    spacing_mm : three floats
        Voxel spacing (z, y, x).
    rim_mm : float
        Thickness of a rim and its distance from the body, at most: what one token covers.

    Returns
    -------
    array like ``posterior``
        A new array; the same values if there is no solid body.

    Raises
    ------
    InputError
        If the mask is not bool.
    MismatchError
        If posterior, volume and mask differ in shape.

    Source
    ------
    Our rule, after FEASIBILITY failure modes 2 and 3.
    """
    if mask.dtype != np.bool_:
        raise InputError(f"the lung mask must be bool, not {mask.dtype}")
    if posterior.shape != (len(MIXTURE_TISSUES), *mask.shape) or volume_hu.shape != mask.shape:
        raise MismatchError(
            f"posterior {posterior.shape}, volume {volume_hu.shape} and mask {mask.shape} do not lie on one grid of "
            "voxels"
        )
    result = posterior.copy()
    smooth = masked_gaussian(volume_hu, mask, [SIGMA_MM / s for s in spacing_mm])
    body, core = solid_bodies(smooth, mask, spacing_mm=spacing_mm)
    if not body.any():
        return result
    labels = posterior_argmax(posterior, mask)
    consolidated = _consolidated(body, core, labels)
    between = np.isin(labels, INTERMEDIATE)
    _give(result, between & consolidated, _nearest(core & (labels == Tissue.CONSOLIDATION), spacing_mm))
    between &= ~body
    rim = between & (_distance(~body, spacing_mm) <= rim_mm)
    rim &= (smooth <= HEALTHY_MEDIAN_HU) | (_gradient(smooth, mask, spacing_mm) >= STEEP_HU_PER_MM)
    rim &= ~_thick(between, rim_mm / 2.0, spacing_mm)
    known = mask & ~rim & ~body
    if rim.any() and known.any():
        _give(result, rim, _nearest(known, spacing_mm))
    return result


def solid_bodies(
    smoothed_hu: np.ndarray, mask: np.ndarray, *, spacing_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Dense lung at least 6 mm thick: consolidation, large vessels; no septa, walls of honeycombs or small vessels.

    Parameters
    ----------
    smoothed_hu : array, shape (Z, Y, X)
        HU after a light smoothing.
    mask : bool array, shape (Z, Y, X)
        Lung.
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    body, core : bool arrays, shape (Z, Y, X)
        Opening of the dense voxels by a ball of ``CORE_MM``, and the voxels that deep. The chest wall beside the lung
        counts as dense for the depth, so that a subpleural consolidation is not cut in half; it is no body itself.
    """
    dense = (smoothed_hu > SOLID_HU) & mask
    core = mask & (_distance(dense | ~mask, spacing_mm) > CORE_MM)
    if not core.any():
        return np.zeros_like(mask), core
    # Half a voxel more: distances run between centres of voxels.
    reach = CORE_MM + 0.5 * min(spacing_mm)
    return dense & (_distance(~core, spacing_mm) <= reach), core


def posterior_argmax(posterior: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tissue ids uint8 of the highest posterior on voxels; 0 outside the mask; a tie goes to the first tissue."""
    ids = np.asarray(MIXTURE_TISSUES, dtype=np.uint8)
    top = posterior[0].copy()
    labels = np.where(mask, ids[0], np.uint8(0))
    for k in range(1, len(posterior)):
        higher = mask & (posterior[k] > top)
        labels[higher] = ids[k]
        np.maximum(top, posterior[k], out=top)
    return labels


def _consolidated(body: np.ndarray, core: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Voxels of the bodies whose core is mostly consolidation."""
    from scipy.ndimage import label

    pieces, number = label(body, structure=CONNECTED_26)
    depth = np.bincount(pieces[core], minlength=number + 1)
    dense = np.bincount(pieces[core & (labels == Tissue.CONSOLIDATION)], minlength=number + 1)
    chosen = 2 * dense > depth
    chosen[0] = False
    result: np.ndarray = chosen[pieces]
    return result


def _thick(where: np.ndarray, radius_mm: float, spacing_mm: Sequence[float]) -> np.ndarray:
    """Parts of a set that hold a ball: its opening, and one voxel more."""
    deep = _distance(where, spacing_mm) > radius_mm
    if not deep.any():
        return deep
    return where & (_distance(~deep, spacing_mm) <= radius_mm + min(spacing_mm))


def _gradient(smooth: np.ndarray, mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Length of the gradient in HU per mm, by central differences; the pleura is no edge."""
    total = np.zeros(smooth.shape, dtype=np.float32)
    for axis, spacing in enumerate(spacing_mm):
        if smooth.shape[axis] > 1:
            total += np.square(np.gradient(smooth, spacing, axis=axis))
    return np.where(mask, np.sqrt(total), np.float32(0.0))


def _distance(where: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distance in mm of each voxel of a set to the nearest voxel outside it, float32; 0 outside.

    From the indices, axis by axis: scipy's own distances take 48 bytes a voxel on the way.
    """
    if where.all():
        return np.full(where.shape, np.inf, dtype=np.float32)
    total = np.zeros(where.shape, dtype=np.float32)
    for axis, (index, spacing) in enumerate(zip(_nearest(~where, spacing_mm), spacing_mm, strict=True)):
        own = np.arange(where.shape[axis], dtype=np.int32).reshape([-1 if a == axis else 1 for a in range(3)])
        total += np.square((index - own) * np.float32(spacing))
    result: np.ndarray = np.sqrt(total, out=total)
    return result


def _nearest(known: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Index (3, Z, Y, X) of the nearest voxel of a set."""
    from scipy.ndimage import distance_transform_edt

    result: np.ndarray = distance_transform_edt(
        ~known, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    return result


def _give(posterior: np.ndarray, where: np.ndarray, nearest: np.ndarray) -> None:
    """Copy the posterior of the nearest known voxels into some voxels (in place)."""
    source = tuple(axis[where] for axis in nearest)
    for values in posterior:
        values[where] = values[source]

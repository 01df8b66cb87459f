"""Vessels of the hila: as dense as consolidation, and too wide for what tells small vessels from it.

They enter the lung from the mediastinum and grow thinner on their way. So what is dense must be the thicker to count
as consolidation the nearer it lies to the space between the lungs.
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.volume import Triple

WORK_MM = 2.0
"""Everything is measured on every so many millimetres: the radii below are wider."""
GAP_MM = 15.0
"""Least distance of the lungs from each other: in narrower gaps lies no vessel that enters a lung."""
ROOT_RADIUS_MM, TAPER = 7.0, 0.4
"""Largest radius of a vessel where it enters the lung (the interlobar artery is up to 16 mm wide), and how much less it
is for each mm further in: at 10 mm it is that of a segmental artery, 3 mm. Phantom-informed."""
RADII_MM = (7.0, 6.0, 5.0, 4.0, 3.0)
"""Radii that are tried."""
CORNER_MM = 1.5
"""This near to a ball that fits into it, dense lung belongs to the body of the ball: its corners. Phantom-informed
(of what is taken most was true consolidation without it; 4 mm keep more of that, and more vessels)."""
WAIST = 0.5
"""The plane between two lungs holds less than this share of what the fullest plane of the smaller lung holds."""


def hilar_vessels(body: np.ndarray, lung: np.ndarray, *, spacing_mm: Triple) -> np.ndarray:
    """Dense voxels near the mediastinum that no ball of a vessel's size at that place fits around.

    Parameters
    ----------
    body : bool array, shape (Z, Y, X)
        Dense lung, wider than small vessels.
    lung : bool array, shape (Z, Y, X)
        Both lungs.
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    bool array, shape (Z, Y, X)
        Part of ``body``; empty if there are not two lungs with something between them.

    Raises
    ------
    InputError
        If the shapes differ.

    Source
    ------
    FEASIBILITY failure modes 2 and 3 (vessels become consolidation); the rule is ours.
    """
    from scipy.ndimage import distance_transform_edt

    if body.shape != lung.shape:
        raise InputError(f"bodies of shape {body.shape} and lung of shape {lung.shape} are not on one grid")
    step = [max(1, round(WORK_MM / s)) for s in spacing_mm]
    pick = tuple(slice(k // 2, None, k) for k in step)
    coarse_mm = [k * s for k, s in zip(step, spacing_mm, strict=True)]
    dense, result = body[pick], np.zeros_like(body)
    if not dense.any():  # also of a volume too small to pick from
        return result
    between = _between(lung[pick], coarse_mm[2])
    if not between.any():
        return result
    from_mediastinum = distance_transform_edt(~between, coarse_mm)
    depth = distance_transform_edt(dense, coarse_mm)
    vessel = np.zeros_like(dense)
    for radius in RADII_MM:
        near = dense & (from_mediastinum <= (ROOT_RADIUS_MM - radius) / TAPER + max(coarse_mm))
        core = depth >= radius
        inside = distance_transform_edt(~core, coarse_mm) <= radius + CORNER_MM if core.any() else core
        vessel |= near & ~inside
    for axis, k in enumerate(step):
        vessel = vessel.repeat(k, axis=axis)
    # The voxel in the middle of a block was looked at for all of it; the last block may be cut.
    shape = tuple(min(a, b) for a, b in zip(vessel.shape, body.shape, strict=True))
    part = tuple(slice(0, n) for n in shape)
    result[part] = vessel[part] & body[part]
    return result


def _between(lung: np.ndarray, spacing_mm: float) -> np.ndarray:
    """What lies between two lungs in the same row (along x); nothing if there is one lung."""
    from scipy.ndimage import binary_opening

    result = np.zeros_like(lung)
    plane = _midplane(lung)
    if plane is None:
        return result
    beyond_first = np.maximum.accumulate(np.where(np.arange(lung.shape[2]) < plane, lung, False), axis=2)
    second = np.where(np.arange(lung.shape[2]) >= plane, lung, False)
    before_second = np.maximum.accumulate(second[:, :, ::-1], axis=2)[:, :, ::-1]
    run = np.ones((1, 1, max(1, round(GAP_MM / spacing_mm))), dtype=bool)
    return binary_opening(beyond_first & before_second & ~lung, run)


def _midplane(lung: np.ndarray) -> int | None:
    """The sagittal plane with the least lung that has much more on both sides; None if one lung is all there is.

    Lungs that touch in front of the heart are told apart too, which connected components would not do.
    """
    area = lung.sum(axis=(0, 1))
    least = np.minimum(np.maximum.accumulate(area), np.maximum.accumulate(area[::-1])[::-1])
    depth = least - area / WAIST
    plane = int(np.argmax(depth))
    return plane if depth[plane] > 0 else None

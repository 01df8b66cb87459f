"""Vessels of the hila: as dense as consolidation, and too wide for what tells small vessels from it.

They enter the lung from the mediastinum and grow thinner on their way. So what is dense must be the thicker to count
as consolidation the nearer it lies to the space between the lungs.
"""

from __future__ import annotations

import numpy as np

from lungseg.scan.volume import Triple

WORK_MM = 2.0
"""Everything is measured on every so many millimetres: the radii below are wider."""
GAP_MM = 15.0
"""Least distance of the lungs from each other: narrower gaps in a row are vessels or walls left out of the mask."""
ROOT_RADIUS_MM, TAPER = 7.0, 0.4
"""Largest radius of a vessel where it enters the lung (the interlobar artery is up to 16 mm wide), and how much less it
is for each mm further in: at 10 mm it is that of a segmental artery, 3 mm. Phantom-informed."""
RADII_MM = (7.0, 6.0, 5.0, 4.0, 3.0)
"""Radii that are tried."""


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
        Part of ``body``; empty if there is nothing between two lungs.

    Source
    ------
    FEASIBILITY failure modes 2 and 3 (vessels become consolidation); the rule is ours.
    """
    from scipy.ndimage import distance_transform_edt

    step = [max(1, round(WORK_MM / s)) for s in spacing_mm]
    pick = tuple(slice(k // 2, None, k) for k in step)
    coarse_mm = [k * s for k, s in zip(step, spacing_mm, strict=True)]
    dense = body[pick]
    between = _between(lung[pick], coarse_mm[2])
    result = np.zeros_like(body)
    if not (dense.any() and between.any()):
        return result
    from_mediastinum = distance_transform_edt(~between, coarse_mm)
    depth = distance_transform_edt(dense, coarse_mm)
    vessel = np.zeros_like(dense)
    for radius in RADII_MM:
        near = dense & (from_mediastinum <= (ROOT_RADIUS_MM - radius) / TAPER + max(coarse_mm))
        core = depth >= radius
        inside = distance_transform_edt(~core, coarse_mm) <= radius if core.any() else core
        vessel |= near & ~inside
    for axis, k in enumerate(step):
        vessel = vessel.repeat(k, axis=axis)
    # The first picked voxel stands for the ones beside it; the last block may be cut.
    shape = tuple(min(a, b) for a, b in zip(vessel.shape, body.shape, strict=True))
    part = tuple(slice(0, n) for n in shape)
    result[part] = vessel[part] & body[part]
    return result


def _between(lung: np.ndarray, spacing_mm: float) -> np.ndarray:
    """What lies between two lungs in the same row (along x)."""
    from scipy.ndimage import binary_opening

    left = np.maximum.accumulate(lung, axis=2)
    right = np.maximum.accumulate(lung[:, :, ::-1], axis=2)[:, :, ::-1]
    run = np.ones((1, 1, max(1, round(GAP_MM / spacing_mm))), dtype=bool)
    return binary_opening(left & right & ~lung, run)

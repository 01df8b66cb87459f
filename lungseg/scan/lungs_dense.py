"""Dense lung brought back into the field: vessels, consolidation, fibrosis and tumours that the threshold cut off.

Three arguments, all on the coarse grid. Shape: a lung is closed by a ball whose radius suits the surface, large at
the convex chest wall, smaller over the diaphragm, smallest at the mediastinum; beside the spine gaps with lung above
and below are filled. Texture: parts that hold traces of air are taken back even where shape alone says nothing.
Bones: nothing is added beyond the ribs. What neither shape nor texture tells from the mediastinum (a solid mass that
broadly touches it, a wholly airless lobe) stays outside. Lengths are those of an adult and shrink with the chest.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_closing import HalfGrid, close, dilate, erode
from lungseg.scan.lungs_grid import CoarseScan
from lungseg.scan.lungs_rays import Rays, Wall
from lungseg.scan.lungs_traces import SPINE_MM, Traces, below
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

COSTAL_CLOSING_MM = 70.0
"""Radius at the chest wall, where a lung is convex: it cuts w^2 / 2R off a gap of half-width w, 1.6 mm for w = 15 mm
(more where the wall is curved)."""
DIAPHRAGM_CLOSING_MM = 30.0
"""Radius over the diaphragm and inside a lung; a dome of the diaphragm is at least twice as wide."""
DIAPHRAGM_MM = 30.0
"""It is used this far from the middle of the chest only: nearer there are heart and great vessels."""
MEDIAL_CLOSING_MM = 8.0
"""Radius everywhere: fills vessels at the hilum without cutting corners at heart and spine."""
TRACE_SIGMA_MM, TRACE_SHARE = 5.0, 0.01
"""Where the smoothed share of traces of air exceeds this there is diseased lung; in a consolidation 3-10 % are."""
TRACE_CLOSING_MM = 18.0
"""Radius that joins traces to each other and to the lung."""
TRACE_PASSES = 2
"""What the first pass has taken back lets the next one reach further."""
MAX_DEPTH_MM = 45.0
"""Between the outermost lung and ribs further apart than this lie liver, heart or neck: nothing is added."""
GUTTER_MM, GAP_MM = 12.0, 70.0
"""How far behind the front of the spine gaps beside it are filled (before it lies the aorta), and the tallest one."""
SLIVER_MM = 2.5
"""Half the thickness below which parts of a large closing are dropped."""
BONE_HU = 180.0
"""Nothing denser is added (ribs, spine)."""
MIN_HEIGHT_MM = 60.0
"""In a slab thinner than this the diaphragm cannot be told from disease."""


def fill_each(sides: np.ndarray, scan: CoarseScan) -> np.ndarray:
    """Both lungs with their dense parts.

    Parameters
    ----------
    sides : uint8 array (Z, Y, X)
        Aerated lung: 1 left, 2 right. At least one voxel.
    scan : CoarseScan
        On the same grid.

    Returns
    -------
    uint8 array (Z, Y, X)
        ``sides`` and what was added. Nothing is added in bone, in the airway, behind the spine, or where it belongs
        to the other lung.
    """
    half = HalfGrid(sides.shape, scan.adult_mm)
    rays = Rays.around(sides, scan.adult_mm)
    forbidden = scan.airway | (scan.hu > BONE_HU) | _behind_spine(rays, scan.hu)
    traces = Traces(sides, scan, half, rays)
    filled = sides.copy()
    for side in (LUNG_LEFT, LUNG_RIGHT):
        lung = sides == side
        if not lung.any():
            continue
        near = _with_traces(lung, side, traces, forbidden, scan, half, rays)
        wall = Wall.around(near, rays, scan)
        added = _within_large_balls(near, side, wall, half, rays) & ~near
        # Slivers of a large closing are steps of its own making, or the prints of ribs, not disease.
        core = erode(added & ~forbidden, SLIVER_MM, scan.spacing_mm)
        added &= dilate(core, 4.0 * SLIVER_MM, scan.spacing_mm)
        full = ndimage.binary_fill_holes(near | added | _gutter(near, wall, rays, scan))
        pieces, count = ndimage.label(full & ~forbidden & ((filled == 0) | lung))
        of_lung = np.bincount(pieces[lung], minlength=count + 1) > 0  # the others are traces of air in a table
        of_lung[0] = False
        filled[of_lung[pieces]] = side
    return filled


def _with_traces(
    lung: np.ndarray,
    side: int,
    traces: Traces,
    forbidden: np.ndarray,
    scan: CoarseScan,
    half: HalfGrid,
    rays: Rays,
) -> np.ndarray:
    """A lung closed by the smallest ball, with the parts that hold traces of air."""
    near = close(lung, MEDIAL_CLOSING_MM, scan.adult_mm)
    sigma = TRACE_SIGMA_MM / np.asarray(scan.spacing_mm)
    for _ in range(TRACE_PASSES):
        wall = Wall.around(near, rays, scan)
        mine = traces.of(near, side, wall)
        if not mine.any():
            break
        diseased = ndimage.gaussian_filter(mine.astype(np.float32), sigma, truncate=2.5) > TRACE_SHARE
        diseased &= half.close(near | mine, TRACE_CLOSING_MM) & rays.between(-1.0, wall.ribs) & ~forbidden
        near = close(near | diseased, MEDIAL_CLOSING_MM, scan.adult_mm)
    return near


def _within_large_balls(near: np.ndarray, side: int, wall: Wall, half: HalfGrid, rays: Rays) -> np.ndarray:
    """What closings by large balls hold: at the chest wall, over the diaphragm and inside the lung."""
    # Where no bone is seen at all there is no telling what lies beyond the lung but its distance.
    limit = np.where(wall.ribs < wall.reach + MAX_DEPTH_MM, wall.ribs, wall.reach)
    limit = limit if np.isfinite(wall.ribs).any() else wall.reach + MAX_DEPTH_MM
    result = half.close(near, COSTAL_CLOSING_MM) & rays.between(wall.reach, limit) & _not_medial(near, side)
    if near.shape[0] * half.spacing_mm[0] / 2.0 >= MIN_HEIGHT_MM:
        base = below(near) & ~below(near[::-1])[::-1]
        region = (base | ~_opens_medially(near, side)) & (rays.lateral_mm(side) > DIAPHRAGM_MM)
        result |= half.close(near, DIAPHRAGM_CLOSING_MM) & region
    return result


def _gutter(near: np.ndarray, wall: Wall, rays: Rays, scan: CoarseScan) -> np.ndarray:
    """Gaps beside the spine with lung above and below: spine and ribs bound the lung there, and run on along z."""
    bone = np.any((scan.hu > BONE_HU) & rays.is_behind & (np.abs(rays.across_mm) < SPINE_MM), axis=2)  # (Z, Y)
    seen = np.flatnonzero(np.any(bone, axis=1))
    if not len(seen):
        return near & False
    front = np.interp(np.arange(len(bone)), seen, bone[seen].argmax(axis=1)) + GUTTER_MM / scan.adult_mm[1]
    reach = max(1, round(0.5 * GAP_MM / scan.adult_mm[0]))
    part = np.pad(near[:, int(front.min()) :], ((reach, reach), (0, 0), (0, 0)))
    tall = 2 * reach + 1
    closed = ndimage.minimum_filter1d(ndimage.maximum_filter1d(part, tall, axis=0), tall, axis=0)
    gaps = np.zeros(near.shape, dtype=bool)
    gaps[:, int(front.min()) :] = closed[reach:-reach]
    gaps &= np.arange(near.shape[1])[None, :, None] > front[:, None, None]
    return gaps & rays.between(-1.0, wall.ribs)


def _behind_spine(rays: Rays, hu: np.ndarray) -> np.ndarray:
    """The spine and what lies behind it, near the middle of the chest."""
    bone = (hu > BONE_HU) & rays.is_behind & (np.abs(rays.across_mm) < SPINE_MM)
    behind: np.ndarray = np.logical_or.accumulate(bone, axis=1)
    return behind


def _not_medial(lung: np.ndarray, side: int) -> np.ndarray:
    """Voxels not nearer to the middle than the most medial lung of their slice."""
    columns = np.any(lung, axis=1)
    order = columns if side == LUNG_LEFT else columns[:, ::-1]
    lateral = np.logical_or.accumulate(order, axis=1)
    result: np.ndarray = (lateral if side == LUNG_LEFT else lateral[:, ::-1])[:, None, :]
    return result


def _opens_medially(lung: np.ndarray, side: int) -> np.ndarray:
    """Voxels that have lung of this side laterally but none medially on their row."""
    from_right = np.logical_or.accumulate(lung, axis=2)
    from_left = np.logical_or.accumulate(lung[:, :, ::-1], axis=2)[:, :, ::-1]
    medial: np.ndarray = from_left & ~from_right if side == LUNG_LEFT else from_right & ~from_left
    return medial

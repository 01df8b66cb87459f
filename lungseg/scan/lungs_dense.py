"""Dense lung brought back into the field: vessels, consolidation, fibrosis and tumours that the threshold cut off.

Three arguments, all on the coarse grid. Shape: a lung is closed by a ball whose radius suits the surface, large at
the convex chest wall, smaller over the diaphragm, smallest at the mediastinum. Texture: diseased lung keeps traces
of air (bronchograms, ground glass, honeycombs) that heart, liver and muscle do not have, so a cut-off part that holds
them is taken back even where shape alone says nothing. Bones: nothing is added beyond the ribs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_closing import HalfGrid, Spacing, close
from lungseg.scan.lungs_rays import Rays
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

COSTAL_CLOSING_MM = 70.0
"""Radius at the chest wall, where a lung is convex: it cuts w^2 / 2R off a gap of half-width w, 1.6 mm for w = 15 mm
(more where the wall is curved)."""
DIAPHRAGM_MM = 30.0
"""The diaphragm is looked for this far from the middle of the chest: nearer there are heart and great vessels."""
DIAPHRAGM_CLOSING_MM = 30.0
"""Radius elsewhere but at the mediastinum; a dome of the diaphragm is at least twice as wide."""
MEDIAL_CLOSING_MM = 8.0
"""Radius at the mediastinum: fills vessels at the hilum without cutting corners at heart and spine."""
TRACE_HU = -180.0
"""Denser than this is no trace of air: it may be fat (-120 to -60 HU) and noise."""
AERATED_HU = -230.0
"""Outside the hull only traces as clear as this count."""
TRACE_RIM_MM = 2.5
"""Traces nearer to aerated lung may be partial volume of its surface (along z: 3/4 of a slice)."""
TRACE_RIM_SLICES = 0.75
TRACE_AIRWAY_MM = 9.0
"""Traces nearer to the airway may be its wall."""
TRACE_HULL_MM = 50.0
"""Traces count within the lung closed by this radius; stomach and bowel bulge into it from below and stay outside."""
GAS_HU, GAS_ML = -930.0, 0.3
"""Below the lung a piece of air that reaches this HU and volume is bowel gas, no trace; near the middle of the chest
it is oesophagus or a large bronchus."""
GAS_MIDLINE_MM = 45.0
TRACE_SIGMA_MM, TRACE_SHARE = 5.0, 0.01
"""Where the smoothed share of traces exceeds this, there is diseased lung (in a consolidation 5-10 % are traces)."""
TRACE_CLOSING_MM = 18.0
"""Radius that joins traces to each other and to the lung."""
TRACE_PASSES = 2
"""What the first pass has taken back lets the next one reach further."""
MIDLINE_MM, SPINE_MM = 25.0, 15.0
"""Traces nearer to the middle of the chest are oesophagus or bronchi (at the back: spine), unless the hull holds
them."""
REACH_MM = 25.0
"""How far from aerated lung a trace outside the hull may lie."""
BASE_BAND_MM, BASE_SLACK_MM, BASE_OVER_MM = 40.0, 15.0, 60.0
"""Below the lung, traces at the back count this far from the ribs; the ribs are looked for from this much within the
outermost lung above."""
COSTAL_REACH_MM = 60.0
"""How far beyond the outermost lung on its ray a trace may lie, within the ribs."""
PIT_RAYS, PIT_MM, PIT_DEPTH_MM = 20, 60.0, 3.0
"""Widest pit of the costal surface that is bridged, over rays (of 3 degrees) and along z, and the least deep one."""
PIT_SLICES = 3
MAX_DEPTH_MM = 45.0
"""Nothing is added at the chest wall further than this beyond the outermost lung on its ray."""
SLIVER_MM = 3.0
"""Half the thickness below which parts of a large closing are dropped."""
BONE_HU = 180.0
"""Nothing denser is added (ribs, spine)."""
SKIN_MM = 8.0
"""Traces nearer to the surface of the body are folds of skin."""
MIN_HEIGHT_MM = 60.0
"""In a slab thinner than this the diaphragm cannot be told from disease: only the smallest radius is used there."""


@dataclass(frozen=True)
class CoarseScan:
    """What the filling looks at, all on the coarse grid."""

    hu: np.ndarray
    """float32 (Z, Y, X)."""
    smooth: np.ndarray
    """``hu`` lightly smoothed."""
    inside_air: np.ndarray
    """bool: air and aerated lung within the body."""
    outside: np.ndarray
    """bool: air around the body."""
    airway: np.ndarray
    """bool: trachea and main bronchi with their wall."""
    spacing_mm: Spacing
    source_mm: float
    """Slice distance of the scan itself: blurs surfaces that are not upright."""


def fill_each(sides: np.ndarray, scan: CoarseScan) -> np.ndarray:
    """Both lungs with their dense parts; uint8 side labels, same shape.

    Nothing is added in bone, in the airway, or where it belongs to the other lung.
    """
    spacing_mm = scan.spacing_mm
    half = HalfGrid(sides.shape, spacing_mm)
    rays = Rays.around(sides, spacing_mm)
    forbidden = scan.airway | (scan.hu > BONE_HU) | _behind_spine(rays, scan.hu)
    traces = _traces(sides, scan)
    skin = half.up(_distance_from(half.down(scan.outside), half.spacing_mm) <= SKIN_MM)
    traces &= ~skin
    gas = _gas(sides, scan)
    closed = sides.copy()
    for side in (LUNG_LEFT, LUNG_RIGHT):
        lung = sides == side
        if not lung.any():
            continue
        near = close(lung, MEDIAL_CLOSING_MM, spacing_mm)
        for _ in range(TRACE_PASSES):
            reach, ribs = _wall(rays, near, scan)
            mine = traces & _trace_region(near, sides, side, half, rays, (reach, ribs), scan) & ~near
            mine &= ~(gas & (_below(lung) | (np.abs(rays.across_mm) < GAS_MIDLINE_MM)))
            if not mine.any():
                break
            share = ndimage.gaussian_filter(
                mine.astype(np.float32), TRACE_SIGMA_MM / np.asarray(spacing_mm), truncate=2.5
            )
            joined = (
                half.close(near | mine, TRACE_CLOSING_MM)
                & (share > TRACE_SHARE)
                & _between(rays, -1.0, ribs)
                & ~forbidden
            )
            near = close(near | joined, MEDIAL_CLOSING_MM, spacing_mm)
        reach, ribs = _wall(rays, near, scan)
        added = near.copy()
        if sides.shape[0] * spacing_mm[0] >= MIN_HEIGHT_MM:
            over = half.close(near, DIAPHRAGM_CLOSING_MM)
            lateral = rays.across_mm * (1.0 if side == LUNG_LEFT else -1.0)
            base = _below(near) & ~_below(near[::-1])[::-1]
            added |= over & (base | ~_is_medial(near, side)) & (lateral > DIAPHRAGM_MM)
        wall = np.where(ribs < reach + MAX_DEPTH_MM, ribs, reach)  # else liver, heart or neck lie between
        beside = _between(rays, reach, wall if np.isfinite(ribs).any() else reach + MAX_DEPTH_MM) & _lateral(near, side)
        added |= half.close(near, COSTAL_CLOSING_MM) & beside
        costal = rays.bridged(reach, PIT_RAYS, PIT_MM, spacing_mm)
        is_pit = (costal > reach + PIT_DEPTH_MM) & (costal < reach + MAX_DEPTH_MM)
        pits = _between(rays, reach, np.where(is_pit, np.minimum(costal, ribs), 0.0)) & _lateral(near, side)
        if sides.shape[0] > PIT_SLICES:  # a pit is no step between two slices
            pits = ndimage.binary_opening(pits, np.ones((PIT_SLICES, 1, 1), dtype=bool))
        added &= ~near
        # Slivers of a large closing are steps of its own making, or the prints of ribs, not disease.
        core = ndimage.distance_transform_edt(added & ~forbidden, sampling=spacing_mm) > SLIVER_MM
        added &= ndimage.distance_transform_edt(~core, sampling=spacing_mm) <= 4.0 * SLIVER_MM
        full = ndimage.binary_fill_holes(near | added | pits)
        closed[full & ~forbidden & (closed == 0)] = side
    return closed


def _traces(sides: np.ndarray, scan: CoarseScan) -> np.ndarray:
    """Voxels that hold air but are not (yet) lung, nor its surface, the airway, or folds of skin."""
    z_mm, y_mm, x_mm = scan.spacing_mm
    flat = TRACE_RIM_MM / max(TRACE_RIM_MM, TRACE_RIM_SLICES * scan.source_mm)
    traces = (scan.smooth < TRACE_HU) & (_distance_from(sides > 0, (z_mm * flat, y_mm, x_mm)) > TRACE_RIM_MM)
    if scan.airway.any():
        traces &= _distance_from(scan.airway, scan.spacing_mm) > TRACE_AIRWAY_MM
    return traces


def _gas(sides: np.ndarray, scan: CoarseScan) -> np.ndarray:
    """Pieces of air that are (or hold) pure gas: bowel, stomach, oesophagus, large bronchi."""
    pieces, count = ndimage.label(scan.inside_air & (sides == 0))
    if not count:
        return scan.inside_air & False
    lowest = np.asarray(ndimage.minimum(scan.smooth, pieces, range(count + 1)))
    is_gas = (lowest < GAS_HU) & (np.bincount(pieces.ravel()) * float(np.prod(scan.spacing_mm)) / 1000.0 > GAS_ML)
    is_gas[0] = False
    gas: np.ndarray = ndimage.binary_dilation(is_gas[pieces], iterations=2)  # with its partial volume
    return gas


def _below(lung: np.ndarray) -> np.ndarray:
    """Voxels with lung somewhere above them."""
    below: np.ndarray = np.logical_or.accumulate(lung[::-1], axis=0)[::-1]
    return below


def _trace_region(
    lung: np.ndarray,
    sides: np.ndarray,
    side: int,
    half: HalfGrid,
    rays: Rays,
    wall: tuple[np.ndarray, np.ndarray],
    scan: CoarseScan,
) -> np.ndarray:
    """Where traces of air mean lung of this side.

    Within the hull of the lung; between the lung and the ribs; and beside the lung, neither below it (stomach and
    bowel) nor near the middle of the chest (oesophagus, bronchi).
    """
    reach, ribs = wall
    beside = _between(rays, reach, np.where(np.isfinite(ribs), np.minimum(reach + COSTAL_REACH_MM, ribs), 0.0))
    band = _between(rays, ribs - BASE_BAND_MM, np.where(np.isfinite(ribs), ribs, 0.0))
    lateral = rays.across_mm * (1.0 if side == LUNG_LEFT else -1.0)
    beside |= band & rays.is_behind & (lateral > SPINE_MM)
    if (sides == LUNG_LEFT).any() and (sides == LUNG_RIGHT).any():
        close_by = half.up(_distance_from(half.down(lung), half.spacing_mm) < REACH_MM)
        beside |= close_by & (lateral > MIDLINE_MM) & ~_below(lung)
    return (half.close(lung, TRACE_HULL_MM) | (beside & (scan.smooth < AERATED_HU))) & (sides == 0)


def _distance_from(mask: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
    """Distance of each voxel from the nearest true one in mm."""
    distance: np.ndarray = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    return distance


def _wall(rays: Rays, lung: np.ndarray, scan: CoarseScan) -> tuple[np.ndarray, np.ndarray]:
    """Outermost lung and inner side of the ribs on each ray, (Z, NUM_RAYS) both; inf where there is none.

    The ribs are looked for from the outermost lung of the slice or near that of the slices above.
    """
    reach = rays.outermost(lung)
    above = rays.carried_down(reach, BASE_OVER_MM, scan.spacing_mm) - BASE_SLACK_MM
    begin = np.where(np.isfinite(reach), np.maximum(reach, above), above)
    return reach, rays.ribs(scan.hu, begin, scan.spacing_mm)


def _behind_spine(rays: Rays, hu: np.ndarray) -> np.ndarray:
    """The spine and what lies behind it, near the middle of the chest."""
    bone = (hu > BONE_HU) & rays.is_behind & (np.abs(rays.across_mm) < SPINE_MM)
    behind: np.ndarray = np.logical_or.accumulate(bone, axis=1)
    return behind


def _between(rays: Rays, low: np.ndarray | float, high: np.ndarray) -> np.ndarray:
    """Voxels between two radii (Z, NUM_RAYS) of their ray, bool (Z, Y, X)."""
    low = np.broadcast_to(low, high.shape)
    result = np.empty((len(high), *rays.index.shape), dtype=bool)
    for z in range(len(high)):
        result[z] = (rays.radius_mm > low[z][rays.index]) & (rays.radius_mm < high[z][rays.index])
    return result


def _lateral(lung: np.ndarray, side: int) -> np.ndarray:
    """Voxels not nearer to the middle than the most medial lung of their slice."""
    columns = np.any(lung, axis=1)
    order = columns if side == LUNG_LEFT else columns[:, ::-1]
    lateral = np.logical_or.accumulate(order, axis=1)
    result: np.ndarray = (lateral if side == LUNG_LEFT else lateral[:, ::-1])[:, None, :]
    return result


def _is_medial(lung: np.ndarray, side: int) -> np.ndarray:
    """Voxels that have lung of this side laterally but none medially on their row."""
    from_right = np.logical_or.accumulate(lung, axis=2)
    from_left = np.logical_or.accumulate(lung[:, :, ::-1], axis=2)[:, :, ::-1]
    medial: np.ndarray = from_left & ~from_right if side == LUNG_LEFT else from_right & ~from_left
    return medial

"""Left and right lung out of the aerated pieces, and the closing that brings dense lung back into each."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_grid import axis_weights, spread
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

EROSIONS_MM = (2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
"""Depths tried to cut a bridge (anterior junction, trachea remnant) between two lungs."""
PARTNER_SHARE = 0.2
"""Smaller pieces are no second lung when a joined pair is looked for."""
COSTAL_CLOSING_MM = 70.0
"""Radius at the chest wall, where a lung is convex: it cuts w^2 / 2R off a gap of half-width w, 1.6 mm for w = 15 mm
(more where the wall is curved)."""
CLOSING_MM = 15.0
"""Radius at the diaphragm, which is hollowed by nature."""
MEDIAL_CLOSING_MM = 6.0
"""Radius at the mediastinum: fills vessels at the hilum without cutting corners at heart and spine."""
NUM_RAYS = 120
MAX_DEPTH_MM = 35.0
"""Nothing is added at the chest wall further than this beyond the outermost lung on its ray."""
SLIVER_MM = 3.0
"""Half the thickness below which parts of the large closing are dropped."""
BONE_HU = 180.0
"""Nothing denser is added by the closing (ribs, spine)."""


def split_sides(
    lung: np.ndarray, hu: np.ndarray, airway: np.ndarray, spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """Aerated lung as 1 (left, larger x) and 2 (right), uint8, same shape.

    Two lungs are told apart by their position to each other, so a patient off centre does no harm. A single lung
    is named after its position to the trachea, else after the side on which it is hollowed by heart and hilum.
    """
    pieces, count = ndimage.label(lung)
    sizes = np.bincount(pieces.ravel())[1:]
    centres = np.asarray(ndimage.center_of_mass(lung, pieces, range(1, count + 1))) * np.asarray(spacing_mm)
    main = int(sizes.argmax())
    side_by_side = [
        _is_beside(centres[k] - centres[main]) and sizes[k] > PARTNER_SHARE * sizes[main] for k in range(count)
    ]
    sides = np.zeros(lung.shape, dtype=np.uint8)
    if not any(side_by_side):
        halves = _split_pair(pieces == main + 1, spacing_mm)
        if halves is None:
            sides[lung] = _single_side(lung, hu, airway)
            return sides
        right_mm, left_mm = _centre_x(halves[0], spacing_mm), _centre_x(halves[1], spacing_mm)
        sides[halves[0]], sides[halves[1]] = LUNG_RIGHT, LUNG_LEFT
        rest = [k for k in range(count) if k != main]
    else:
        partner = max((k for k in range(count) if side_by_side[k]), key=lambda k: sizes[k])
        left_mm = max(centres[main][2], centres[partner][2])
        right_mm = min(centres[main][2], centres[partner][2])
        rest = list(range(count))
    for k in rest:
        nearer_left = abs(centres[k][2] - left_mm) < abs(centres[k][2] - right_mm)
        sides[pieces == k + 1] = LUNG_LEFT if nearer_left else LUNG_RIGHT
    return sides


def fill_each(
    sides: np.ndarray, hu: np.ndarray, airway: np.ndarray, spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """Both lungs closed: vessels, holes and dense disease at the pleura added; uint8 side labels.

    Nothing is added in bone, in the airway, or where it belongs to the other lung.
    """
    closed = sides.copy()
    forbidden = airway | (hu > BONE_HU)
    for side in (LUNG_LEFT, LUNG_RIGHT):
        lung = sides == side
        if not lung.any():
            continue
        near = _close(lung, MEDIAL_CLOSING_MM, spacing_mm)
        far = _close(lung, CLOSING_MM, spacing_mm)
        added = far & ~_is_medial(lung, side) & ~near
        added |= (
            _close_coarsely(lung, COSTAL_CLOSING_MM, spacing_mm) & _is_costal(lung, sides, side, spacing_mm) & ~near
        )
        # Slivers of a large closing are steps of its own making, or the prints of ribs, not disease.
        core = ndimage.distance_transform_edt(added & ~forbidden, sampling=spacing_mm) > SLIVER_MM
        added &= ndimage.distance_transform_edt(~core, sampling=spacing_mm) <= 4.0 * SLIVER_MM
        full = ndimage.binary_fill_holes(near | added)
        closed[full & ~forbidden & (closed == 0)] = side
    return closed


def _is_beside(shift_mm: np.ndarray) -> bool:
    """Whether two centres lie beside each other rather than above or before."""
    return bool(abs(shift_mm[2]) > max(abs(shift_mm[0]), abs(shift_mm[1])))


def _centre_x(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    counts = np.count_nonzero(mask, axis=(0, 1))
    return float((counts * np.arange(len(counts))).sum() / counts.sum()) * spacing_mm[2]


def _split_pair(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray] | None:
    """Right and left half of two lungs that touch; ``None`` if there is only one lung."""
    depth = ndimage.distance_transform_edt(mask, sampling=spacing_mm)
    for cut_mm in EROSIONS_MM:
        pieces, count = ndimage.label(depth > cut_mm)
        if count < 2:
            continue
        sizes = np.bincount(pieces.ravel())[1:]
        first, second = np.argsort(-sizes)[:2] + 1
        if sizes[second - 1] < PARTNER_SHARE * sizes[first - 1]:
            continue
        centres = np.asarray(ndimage.center_of_mass(mask, pieces, [first, second])) * np.asarray(spacing_mm)
        if not _is_beside(centres[1] - centres[0]):
            continue
        right, left = (first, second) if centres[0][2] < centres[1][2] else (second, first)
        to_right = ndimage.distance_transform_edt(pieces != right, sampling=spacing_mm)
        to_left = ndimage.distance_transform_edt(pieces != left, sampling=spacing_mm)
        is_right = mask & (to_right <= to_left)
        return is_right, mask & ~is_right
    return None


def _single_side(lung: np.ndarray, hu: np.ndarray, airway: np.ndarray) -> int:
    """Which lung a single one is."""
    columns = np.arange(lung.shape[2])
    lung_x = float((np.count_nonzero(lung, axis=(0, 1)) * columns).sum() / lung.sum())
    if airway.any():
        middle = float((np.count_nonzero(airway, axis=(0, 1)) * columns).sum() / airway.sum())
        return LUNG_LEFT if lung_x > middle else LUNG_RIGHT
    # No trachea in view: the costal side is convex in every slice, the medial side is hollowed.
    hollow = {1: 0, -1: 0}
    for step in hollow:
        row = lung[:, :, ::step]
        depth = np.where(row.any(axis=2), row.argmax(axis=2), -1)
        for line in depth:
            rows = np.flatnonzero(line >= 0)
            if len(rows) > 4:
                chord = np.interp(rows, [rows[0], rows[-1]], [line[rows[0]], line[rows[-1]]])
                hollow[step] += int(np.maximum(line[rows] - chord, 0.0).sum())
    # Seen from small x the right lung shows its costal side, the left lung its hollow one.
    return LUNG_LEFT if hollow[1] > hollow[-1] else LUNG_RIGHT


def _is_medial(lung: np.ndarray, side: int) -> np.ndarray:
    """Voxels that have lung of this side laterally but none medially on their row."""
    from_right = np.logical_or.accumulate(lung, axis=2)
    from_left = np.logical_or.accumulate(lung[:, :, ::-1], axis=2)[:, :, ::-1]
    medial: np.ndarray = from_left & ~from_right if side == LUNG_LEFT else from_right & ~from_left
    return medial


def _is_costal(lung: np.ndarray, sides: np.ndarray, side: int, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Voxels beyond the outermost lung on their ray from the middle of the chest, slice by slice.

    A gap in a lung that reaches the chest wall has lung only on the inner side of its ray; heart, spine and the
    dome of the diaphragm have none there.
    """
    _, y, x = np.nonzero(lung)
    other = np.nonzero((sides > 0) & (sides != side))[2]
    edge_x = float(x.min() if side == LUNG_LEFT else x.max())
    middle_x = (x.mean() + other.mean()) / 2.0 if len(other) else edge_x
    rows = (np.arange(lung.shape[1]) - y.mean())[:, None] * spacing_mm[1]
    columns = (np.arange(lung.shape[2]) - middle_x)[None, :] * spacing_mm[2]
    radius = np.hypot(rows, columns)
    ray = ((np.arctan2(rows, columns) + np.pi) / (2.0 * np.pi) * NUM_RAYS).astype(np.int64) % NUM_RAYS
    costal = np.zeros_like(lung)
    for z in np.flatnonzero(lung.any(axis=(1, 2))):
        reach = np.full(NUM_RAYS, np.inf)
        inside = lung[z]
        furthest = np.full(NUM_RAYS, -1.0)
        np.maximum.at(furthest, ray[inside], radius[inside])
        reach[furthest > 0] = furthest[furthest > 0]
        costal[z] = (radius > reach[ray]) & (radius < reach[ray] + MAX_DEPTH_MM)
    return costal


def _close_coarsely(mask: np.ndarray, radius_mm: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Closing by a large ball on voxels twice as large, brought back by linear interpolation."""
    shape = [(n + 1) // 2 for n in mask.shape]
    coarse_mm = tuple(n * s / m for n, s, m in zip(mask.shape, spacing_mm, shape, strict=True))
    grids = list(zip(mask.shape, spacing_mm, shape, coarse_mm, strict=True))
    down = [axis_weights(m, c, n, s) for n, s, m, c in grids]
    up = [axis_weights(n, s, m, c) for n, s, m, c in grids]
    coarse = np.stack(list(spread(mask, down))) > 0.5
    if not coarse.any():
        return mask
    closed = _close(coarse, radius_mm, coarse_mm)
    return np.stack([plane > 0.5 for plane in spread(closed, up)])


def _close(mask: np.ndarray, radius_mm: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Closing by a ball; the first and last slice count as repeated beyond the scan."""
    margins = [int(np.ceil(radius_mm / s)) + 1 for s in spacing_mm]
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    part = np.pad(mask[box], [(m, m) for m in margins])
    for end, slot in ((0, np.s_[: margins[0]]), (-1, np.s_[-margins[0] :])):
        is_cut = box[0].start == 0 if end == 0 else box[0].stop == mask.shape[0]
        if is_cut:
            part[slot] = part[margins[0] if end == 0 else -margins[0] - 1]
    grown = ndimage.distance_transform_edt(~part, sampling=spacing_mm) <= radius_mm
    # Beyond the padding everything is grown if the slice is cut there, so pad before shrinking back.
    shrunk = ndimage.distance_transform_edt(grown, sampling=spacing_mm) > radius_mm
    inner = tuple(slice(m, -m) for m in margins)
    closed = mask.copy()
    closed[box] |= shrunk[inner]
    return closed

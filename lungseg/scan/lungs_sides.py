"""Left and right lung out of the aerated pieces of a chest."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

EROSIONS_MM = (2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
"""Depths tried to cut a bridge (anterior junction, trachea remnant) between two lungs."""
PARTNER_SHARE = 0.2
"""Smaller pieces are no second lung when a joined pair is looked for."""
MIN_ROWS = 8
"""Rows with both lungs from which the plane between them is fitted."""


def split_sides(
    lung: np.ndarray, hu: np.ndarray, airway: np.ndarray, spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """Aerated lung as 1 (left, larger x) and 2 (right), uint8, same shape.

    Two lungs are told apart by their position to each other, so a patient off centre does no harm: the two largest
    pieces that lie beside each other give a plane between the lungs, and every other piece belongs to its side of it.
    Lungs that touch are eroded until they part, and each voxel follows the nearest remaining piece. A single lung is
    named after its position to the trachea, else after the side on which it is hollowed by heart and hilum.
    """
    sides = np.zeros(lung.shape, dtype=np.uint8)
    if not lung.any():
        return sides
    depth: np.ndarray | None = None
    for cut_mm in (0.0, *EROSIONS_MM):
        if cut_mm and depth is None:
            depth = ndimage.distance_transform_edt(lung, sampling=spacing_mm)
        seeds = lung if depth is None else depth > cut_mm
        pieces, count = ndimage.label(seeds)
        pair = _side_by_side(pieces, count, spacing_mm)
        if pair is None:
            continue
        of_piece = _sides_of_pieces(pieces, count, pair, spacing_mm)
        if depth is None:
            return of_piece[pieces]
        _, nearest = ndimage.distance_transform_edt(~seeds, sampling=spacing_mm, return_indices=True)
        named = of_piece[pieces]
        sides[lung] = named[tuple(nearest[:, lung])]
        return sides
    sides[lung] = _single_side(lung, hu, airway)
    return sides


def _side_by_side(pieces: np.ndarray, count: int, spacing_mm: tuple[float, float, float]) -> tuple[int, int] | None:
    """Labels of the right and the left lung: the largest piece and the largest one beside it; None if none is."""
    if count < 2:
        return None
    sizes = np.bincount(pieces.ravel())[1:]
    main = int(sizes.argmax())
    large = [int(k) for k in np.flatnonzero(sizes > PARTNER_SHARE * sizes[main])]
    centres = np.asarray(ndimage.center_of_mass(pieces > 0, pieces, [k + 1 for k in large])) * np.asarray(spacing_mm)
    centre = centres[large.index(main)]
    beside = [(int(sizes[k]), k, c) for k, c in zip(large, centres, strict=True) if _is_beside(c - centre)]
    if not beside:
        return None
    _, partner, its_centre = max(beside, key=lambda item: item[0])
    right, left = (partner, main) if its_centre[2] < centre[2] else (main, partner)
    return right + 1, left + 1


def _sides_of_pieces(
    pieces: np.ndarray, count: int, pair: tuple[int, int], spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """Side label of each piece (index 0: none), uint8, by the plane halfway between the pair, row by row."""
    right, left = (pieces == label for label in pair)
    columns = np.arange(pieces.shape[2])
    last_right = np.where(right, columns, -1).max(axis=2)
    first_left = np.where(left, columns, pieces.shape[2]).min(axis=2)
    both = (last_right >= 0) & (first_left < pieces.shape[2])
    z, y = np.nonzero(both)
    if len(z) >= MIN_ROWS:
        terms = np.stack([np.ones(len(z)), z - z.mean(), y - y.mean()], axis=1)
        fitted, *_ = np.linalg.lstsq(terms, (last_right[both] + first_left[both]) / 2.0, rcond=None)
        rows = np.indices(both.shape)
        middle = fitted[0] + fitted[1] * (rows[0] - z.mean()) + fitted[2] * (rows[1] - y.mean())
    else:
        centres = [_centre_x(half, spacing_mm) / spacing_mm[2] for half in (right, left)]
        middle = np.full(both.shape, np.mean(centres))
    to_left = np.bincount(pieces.ravel(), weights=(columns > middle[:, :, None]).ravel(), minlength=count + 1)
    of_piece = np.where(to_left > 0.5 * np.bincount(pieces.ravel(), minlength=count + 1), LUNG_LEFT, LUNG_RIGHT)
    of_piece[0] = 0
    of_piece[list(pair)] = LUNG_RIGHT, LUNG_LEFT
    return of_piece.astype(np.uint8)


def _is_beside(shift_mm: np.ndarray) -> bool:
    """Whether two centres lie beside each other rather than above or before."""
    return bool(abs(shift_mm[2]) > max(abs(shift_mm[0]), abs(shift_mm[1])))


def _centre_x(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    counts = np.count_nonzero(mask, axis=(0, 1))
    return float((counts * np.arange(len(counts))).sum() / counts.sum()) * spacing_mm[2]


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

"""Exact distances from the voxels of one border to the nearest voxel of another one, without a distance map.

Only the border's own voxels need a distance, and most lie close to the other border. So each looks along the rows near
it, nearest row first, in a map of one byte a voxel that tells how far the next border voxel of that row is; the few
that find nothing near ask a k-d tree. Arrays are ``(z, y, x)`` or ``(y, x)``; rows run along the last axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

ROW_STEPS = (1, 2, 4, 8, 16)
"""Doubling steps that spread a row's gaps: together they reach every distance up to their sum."""
NO_GAP = 255 - ROW_STEPS[-1]
"""Gap where the row has no border voxel within reach: above the reach, and no step added to it leaves a byte."""
MAX_ROWS = 400
"""Rows looked at around a voxel before the tree is asked: a radius of about 11 voxels."""
MAX_ROW_OFFSET = 50
"""No row further off than this many voxels along an axis is looked at, however few there are."""
ROWS_A_TURN = 6
"""Rows looked at between two checks of which voxels are done."""
POINTS_AT_ONCE = 2**15
"""Voxels searched together: their arrays stay in the processor's cache."""
SLAB_BYTES = 2**20
"""Size of the slabs in which whole volumes are worked on, for the same reason."""


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Cut a volume of bytes along its first axis into slabs that fit in the cache."""
    thickness = max(1, SLAB_BYTES // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], thickness):
        yield slice(start, min(start + thickness, shape[0]))


def nonzero(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """``numpy.nonzero`` of a contiguous mask, several times as fast for a sparse one."""
    return np.unravel_index(np.flatnonzero(mask), mask.shape)


def directed_distances_mm(border_from: np.ndarray, border_to: np.ndarray, *, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distance of each voxel of one border to the nearest voxel of the other.

    Parameters
    ----------
    border_from, border_to : bool arrays of one shape, (Z, Y, X) or (Y, X)
        ``border_to`` must not be empty.
    spacing_mm : sequence of float
        Distance of voxel centres along each axis in mm.

    Returns
    -------
    float64 array, shape (number of true voxels of ``border_from``,)
        Millimetres between voxel centres, exact Euclidean, in the order of ``numpy.nonzero(border_from)``.
    """
    if border_from.ndim == 2:
        border_from, border_to, spacing_mm = border_from[None], border_to[None], (1.0, *spacing_mm)
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    rows, reach_mm = _rows_around(border_to.shape, spacing)
    margin = np.abs(rows).max(axis=0)
    along_steps = _row_steps(reach_mm, spacing[2])
    gaps = _row_gaps(border_to, margin, along_steps)
    along = (np.arange(NO_GAP + 1) * spacing[2]) ** 2
    beyond = sum(along_steps) + 1
    along[beyond:] = np.inf
    across = ((rows * spacing[:2]) ** 2).sum(axis=1)
    steps = (rows[:, 0] * gaps.shape[1] + rows[:, 1]) * gaps.shape[2]
    here = nonzero(border_from)
    keys = np.ravel_multi_index((here[0] + margin[0], here[1] + margin[1], here[2]), gaps.shape)
    squared = np.empty(keys.size)
    for start in range(0, keys.size, POINTS_AT_ONCE):
        part = slice(start, start + POINTS_AT_ONCE)
        squared[part] = _search_rows(keys[part], gaps.ravel(), along, across, steps)
    # Whatever was not looked at lies in a row further off than the reach, or further along its row.
    far = np.flatnonzero(squared > min(reach_mm, beyond * spacing[2]) ** 2)
    distances = np.sqrt(squared)
    if far.size:
        distances[far] = _tree_distances(np.stack(here, axis=1)[far], border_to, spacing)
    return distances


def _rows_around(shape: Sequence[int], spacing: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows to look at as (dz, dy), nearest first, and the distance in mm within which none is left out."""
    reach = [min(n - 1, MAX_ROW_OFFSET) for n in shape[:2]]
    rows = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), axis=-1).reshape(-1, 2)
    across = ((rows * spacing[:2]) ** 2).sum(axis=1)
    order = np.argsort(across, kind="stable")
    left_out = [((n + 1) * step) ** 2 for n, size, step in zip(reach, shape, spacing, strict=False) if n < size - 1]
    limit = min([*across[order[MAX_ROWS : MAX_ROWS + 1]], *left_out], default=np.inf)
    nearest = order[:MAX_ROWS]
    return rows[nearest[across[nearest] <= limit]], float(np.sqrt(limit))


def _row_steps(reach_mm: float, spacing_mm: float) -> tuple[int, ...]:
    """As many of the steps as it takes to see as far along a row as across the rows."""
    for num in range(1, len(ROW_STEPS)):
        if (sum(ROW_STEPS[:num]) + 1) * spacing_mm >= reach_mm:
            return ROW_STEPS[:num]
    return ROW_STEPS


def _row_gaps(border: np.ndarray, margin: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Voxels to the nearest border voxel of the same row, as bytes; with a margin of rows that hold none."""
    size_z, size_y, size_x = border.shape
    gaps = np.full((size_z + 2 * margin[0], size_y + 2 * margin[1], size_x), NO_GAP, dtype=np.uint8)
    inner = gaps[margin[0] : margin[0] + size_z, margin[1] : margin[1] + size_y]
    for slab in slabs(border.shape):
        part = ~border[slab] * np.uint8(NO_GAP)
        for step in steps:
            before, after = part[..., :-step], part[..., step:]
            np.minimum(after, before + np.uint8(step), out=after)
            np.minimum(before, after + np.uint8(step), out=before)
        inner[slab] = part
    return gaps


def _search_rows(
    keys: np.ndarray,
    gaps: np.ndarray,
    along: np.ndarray,
    across: np.ndarray,
    steps: np.ndarray,
) -> np.ndarray:
    """Smallest squared distance in mm² found in the rows around each voxel, given as flat index into ``gaps``."""
    found = np.empty(keys.size)
    active, best = np.arange(keys.size), np.full(keys.size, np.inf)
    for row, (step, apart) in enumerate(zip(steps, across, strict=True)):
        if row % ROWS_A_TURN == 1:
            is_open = best > apart
            found[active] = best
            active, keys, best = active[is_open], keys[is_open], best[is_open]
            if not active.size:
                return found
        candidate = along.take(gaps.take(keys + step))
        candidate += apart
        np.minimum(best, candidate, out=best)
    found[active] = best
    return found


def _tree_distances(points: np.ndarray, border: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm of voxels (N, 3) to the nearest border voxel."""
    from scipy.spatial import cKDTree

    # Built for one batch of questions: an unbalanced tree is built in half the time and answers as fast.
    tree = cKDTree(np.stack(nonzero(border), axis=1) * spacing, balanced_tree=False, compact_nodes=False)
    distances, _ = tree.query(points * spacing)
    return np.asarray(distances, dtype=np.float64)

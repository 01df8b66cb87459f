"""Whether each slice of a stack fits its neighbours: damaged pixels and damaged rescale tags stand out.

Anatomy may jump from slice to slice (the end of the lungs, a breath between two rotations, metal, air beyond a
phantom), so nothing is damaged for being different alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lungseg.scan.volume import AIR_HU

THUMBNAIL = 64
"""Pixels along each side that are compared."""
WINDOW_HU = (AIR_HU, 400)
"""Values beyond count as these in correlations: a little metal would outweigh all the rest."""
UNLIKE, ALIKE_SLICES = 0.5, 0.8
"""Correlation with its neighbours below which a slice is unlike them, if they correlate with each other above the
second. In five public chest CT series every slice correlates with one of its neighbours by 0.90 or more."""
ORDINARY_HU = ((AIR_HU, -850), (-200, 200))
"""Air and soft tissue: a slice may be full of either while the others are not, even where a scan begins or ends."""
RARE_EDGES_HU = (*range(-850, -200, 50), -200, *range(200, 1000, 100), 1000, 1500, 2000, 3000, 2**15)
"""Bins of the other values."""
MAX_RARE_EXCESS = 0.2
"""Share of a slice that is more than any other slice has of its values, from which on they are no anatomy: at most 0.10
in those series, along any axis, thinned out or not. Of 47 slices of one of them that still decoded after bytes of their
JPEG Lossless stream were damaged, 38 are found."""
MOST_RARE = 0.5
"""The same whatever it resembles: most of it is of values that no other slice has."""
JUMP_HU, JUMP_FACTOR = 10.0, 4.0
"""Median difference of neighbouring slices that is ordinary: at most so much, or so many times what is usual in the
scan. In five public chest CT series with 2 to 8 mm between slices no slice jumps by more than 7 HU."""


def unlike_slices(array: np.ndarray, present: Sequence[int]) -> tuple[list[int], list[int]]:
    """Slices that resemble none of their neighbours, though those resemble each other, or nothing in the scan.

    Parameters
    ----------
    array : int16 array, shape (N, rows, columns)
        HU.
    present : ints
        Which of the N slices there are: at least three.

    Returns
    -------
    (list of int, list of int)
        Which of ``present`` are damaged, because their values are no anatomy either, and which of the others inside
        the stack are odd.
    """
    rows, columns = (max(1, n // THUMBNAIL) for n in array.shape[1:])
    small = array[:, ::rows, ::columns][list(present)].reshape(len(present), -1)
    shades = small.clip(*WINDOW_HU).astype(np.float32)
    shades -= shades.mean(axis=1, keepdims=True)
    length = np.sqrt((shades**2).sum(axis=1))
    length[length == 0] = np.nan  # a blank slice says nothing
    shades /= length[:, None]
    near = np.einsum("ij,ij->i", shades[:-1], shades[1:])
    across = np.einsum("ij,ij->i", shades[:-2], shades[2:])
    own = np.fmax(np.append(near[0], near), np.append(near, near[-1]))
    others = np.concatenate([near[1:2], across, near[-2:-1]])
    unlike = [int(k) for k in np.flatnonzero((own < UNLIKE) & (others > ALIKE_SLICES))]
    excess = _rare_excess(small)
    damaged = [k for k, rare in enumerate(excess) if rare > MOST_RARE or (k in unlike and rare > MAX_RARE_EXCESS)]
    return damaged, [k for k in unlike if k not in damaged and 0 < k < len(present) - 1]


def _rare_excess(values: np.ndarray) -> np.ndarray:
    """Share of each slice in values of which it has more than any other slice; shapes (N, pixels) and (N,)."""
    edges = np.asarray(RARE_EDGES_HU)
    shares = np.stack([np.histogram(v, edges)[0] / v.size for v in values])
    shares[:, [i for i, low in enumerate(edges[:-1]) if (low, edges[i + 1]) in ORDINARY_HU]] = 0.0
    order = np.sort(shares, axis=0)
    most_of_others = np.where(shares == order[-1], order[-2], order[-1])
    return np.maximum(shares - most_of_others, 0.0).sum(axis=1)


def jump_hu(below: np.ndarray, above: np.ndarray) -> float:
    """How much brighter or darker one slice is than another as a whole.

    Parameters
    ----------
    below, above : int16 arrays of one shape
        HU, padding at -1024.

    Returns
    -------
    float
        Absolute median HU difference outside padding; NaN if they have nothing in common to compare.
    """
    both = (below > AIR_HU) & (above > AIR_HU)
    return abs(float(np.median(above[both].astype(np.int32) - below[both]))) if both.any() else float("nan")


def ordinary_jump(jumps: Sequence[float]) -> float:
    """Largest ordinary jump of a scan, from the jumps between its neighbouring slices."""
    known = [jump for jump in jumps if not np.isnan(jump)]
    return max(JUMP_HU, JUMP_FACTOR * float(np.median(known))) if known else JUMP_HU

"""Segments of one attention window by merging its self-attention maps, as DiffSeg does.

A token's attention map is a distribution over the tokens of its window. Maps of an anchor grid take in those like
them, alike maps are merged until none is left to merge, and each token goes to the merged map that is largest there.
Pure functions of one attention matrix. METHOD 1.8, flaw 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lungseg.errors import MismatchError

PROBABILITY_FLOOR = 1e-12
"""Smallest probability whose logarithm is taken."""


def symmetric_kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean of both Kullback-Leibler divergences between distributions, in nats.

    Parameters
    ----------
    first, second : float arrays, shape (N, L) and (M, L)
        Rows that sum to 1.

    Returns
    -------
    float64 array, shape (N, M)
        Not negative.

    Source
    ------
    Tian et al., "Diffuse, Attend, and Segment" (DiffSeg): (KL(p|q) + KL(q|p)) / 2.
    """
    p, q = (np.maximum(rows.astype(np.float64), PROBABILITY_FLOOR) for rows in (first, second))
    log_p, log_q = np.log(p), np.log(q)
    own_p, own_q = np.einsum("nl,nl->n", p, log_p), np.einsum("ml,ml->m", q, log_q)
    distance = own_p[:, None] + own_q[None, :] - p @ log_q.T - (q @ log_p.T).T
    return np.maximum(0.5 * distance, 0.0)


def merge_attention(
    weights: np.ndarray,
    shape: Sequence[int],
    inside: np.ndarray,
    *,
    anchor_stride: int = 2,
    threshold: float = 0.5,
    max_rounds: int = 20,
) -> np.ndarray:
    """Segment of each token of one attention window.

    Parameters
    ----------
    weights : float array, shape (L, L)
        Row i: how much token i attends to each token; not negative, each row with a positive sum over ``inside``.
    shape : ints
        Tokens along each axis of the window; their product is L.
    inside : bool array, shape (L,)
        Tokens to segment: attention to others is left out, rows are brought back to sum 1.
    anchor_stride : int
        Distance of the anchors in tokens.
    threshold : float
        Maps closer than this (symmetric KL, nats) are one segment.
    max_rounds : int
        Rounds of merging at most; it ends by itself when nothing merges.

    Returns
    -------
    int32 array, shape (L,)
        Segments 0, 1, ... in the order of their first token; -1 for tokens not inside.

    Raises
    ------
    MismatchError
        If the shapes do not fit.

    Source
    ------
    Tian et al. (DiffSeg): iterative attention merging and non-maximum suppression; METHOD 1.8, flaw 7.
    """
    count = int(np.prod(shape))
    if weights.shape != (count, count) or inside.shape != (count,):
        raise MismatchError(f"attention of shape {weights.shape} is not that of a window of {tuple(shape)} tokens")
    segments = np.full(count, -1, dtype=np.int32)
    if not inside.any():
        return segments
    maps = weights[np.ix_(inside, inside)].astype(np.float64)
    maps /= np.maximum(maps.sum(axis=1, keepdims=True), PROBABILITY_FLOOR)
    anchors = maps[_anchors(shape, inside, anchor_stride)]
    near = symmetric_kl(anchors, maps) < threshold  # an anchor is near itself
    proposals = (near @ maps) / near.sum(axis=1, keepdims=True)
    for _ in range(max_rounds):
        merged = _merge_once(proposals, threshold)
        if len(merged) == len(proposals):
            break
        proposals = merged
    found = proposals.argmax(axis=0)  # non-maximum suppression
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    segments[inside] = np.argsort(np.argsort(first))[inverse]
    return segments


def _anchors(shape: Sequence[int], inside: np.ndarray, stride: int) -> np.ndarray:
    """Places, among the tokens inside, of those on the anchor grid; of all if none of them is on it."""
    on_grid = np.ones(tuple(shape), dtype=bool)
    for axis, length in enumerate(shape):
        start = min(stride // 2, length - 1)
        chosen = np.zeros(length, dtype=bool)
        chosen[start::stride] = True
        on_grid &= chosen.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    places = np.flatnonzero(on_grid.reshape(-1)[inside])
    return places if places.size else np.arange(int(inside.sum()))


def _merge_once(proposals: np.ndarray, threshold: float) -> np.ndarray:
    """Each proposal in turn takes in those like it that are left; the mean of a group stands for it."""
    near = symmetric_kl(proposals, proposals) < threshold
    left = np.ones(len(proposals), dtype=bool)
    merged = []
    for i in range(len(proposals)):
        if left[i]:
            group = near[i] & left
            group[i] = True
            merged.append(proposals[group].mean(axis=0))
            left &= ~group
    return np.stack(merged)

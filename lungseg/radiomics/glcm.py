"""Haralick's fourteen statistics of the 3-D grey-level co-occurrence matrix (GLCM) of each patch.

Pairs are counted with integers, one ``bincount`` per direction for a block of patches. Patches are grouped by the span
of their grey levels, rounded up to a few fixed sizes, so that a patch of quiet lung costs a 12 x 12 matrix and not
57 x 57; the size depends on the patch alone, never on its neighbours in the batch. Statistics are in ``haralick``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lungseg.errors import InputError
from lungseg.radiomics.haralick import NAMES, SUM_AVERAGE, haralick
from lungseg.radiomics.windows import (
    cache_blocks,
    check_patches,
    computing_dtype,
    flat_step,
    keep,
    own_voxels,
    with_border,
)

Aggregation = Literal["merged", "mean"]
"""``merged``: statistics of the sum of the 13 matrices (IBSI "3D merged"); ``mean``: their mean over directions."""

BIN_WIDTH_HU = 25
"""METHOD 1.3, item 1; also the default of pyradiomics."""
LOWEST_HU, HIGHEST_HU = -1024, 400
"""Range of the bins, METHOD 1.3; HU outside it fall into the first or last bin."""
NUM_LEVELS = 57
"""Bins of 25 HU from -1024; the last one holds 376..400 HU and everything denser."""
DIRECTIONS: tuple[tuple[int, int, int], ...] = tuple(
    (z, y, x) for z, y, x in itertools.product((-1, 0, 1), repeat=3) if (z, y, x) > (0, 0, 0)
)
"""The 13 (z, y, x) steps of distance 1; their opposites are covered by the symmetric matrix."""

MATRIX_SIZES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
"""Matrix sizes patches are grouped into, by span of grey levels; larger spans take all levels."""
_CACHE_CELLS = 2**16
"""Cells of float64 matrices whose statistics are taken at once on a CPU."""


def glcm_features(
    patches_hu: Tensor, masks: Tensor, *, aggregation: Aggregation = "merged", mcc: bool = True, halo: bool = False
) -> Tensor:
    """Haralick's 14 texture statistics of the lung voxels of each patch.

    Fixed bins of 25 HU from -1024 HU, grey levels 1..57; 13 directions, distance 1, symmetric; a pair counts only if
    both voxels are lung and inside the patch (with a halo, the first of them). Entropies are in bits. Sum variance is
    about the sum average (pyradiomics' ClusterTendency).

    Parameters
    ----------
    patches_hu : float32 or float64 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask are not read.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    aggregation : "merged" or "mean"
        Statistics of the 13 matrices summed, or their mean over the directions that have a pair.
    mcc : bool
        False puts the dissimilarity, mean |i - j|, in place of the costly maximal correlation coefficient.
    halo : bool
        Whether the patches come with a halo (``windows``).

    Returns
    -------
    float64 tensor, shape (N, 14)
        Columns ``NAMES``. A matrix of a single grey level has correlation 1, MCC 1, IMC 0 and entropies 0; a patch
        without any pair counts as flat at its mean level. NaN where the mask is empty.

    Raises
    ------
    InputError
        If shapes differ, ``masks`` is not bool or ``aggregation`` is unknown.

    Source
    ------
    METHOD 1.3, item 1; Haralick et al., IEEE SMC 1973; IBSI chapter 3.6 (codes in ``descriptor.IBSI_CODES``).
    """
    check_patches(patches_hu, masks, halo=halo)

    def levels_of(block: slice) -> Tensor:
        return grey_levels(patches_hu[block], masks[block])

    return _features(levels_of, masks, num_levels=NUM_LEVELS, aggregation=aggregation, mcc=mcc, halo=halo)


def grey_levels(patches_hu: Tensor, masks: Tensor) -> Tensor:
    """Bin index 0..56 of each lung voxel (int16, same shape); 0 outside the mask. Exact for any float HU."""
    # The bin edges are whole HU, so floor loses nothing. The middle of a whole HU is at least 1/50 of a bin from any
    # edge: multiplied by the rounded inverse of the width it stays in its bin, on every device.
    values = keep(patches_hu.to(computing_dtype(patches_hu)), masks, fill=float(LOWEST_HU)).floor_()
    return values.clamp_(LOWEST_HU, HIGHEST_HU).add_(0.5 - LOWEST_HU).mul_(1.0 / BIN_WIDTH_HU).to(torch.int16)


def glcm_features_of_levels(
    levels: Tensor,
    masks: Tensor,
    *,
    num_levels: int,
    aggregation: Aggregation = "merged",
    mcc: bool = True,
    halo: bool = False,
) -> Tensor:
    """``glcm_features`` of integer grey levels.

    Parameters
    ----------
    levels : integer tensor, shape (N, D, H, W)
        0 to ``num_levels`` - 1 inside the mask; level k is counted as k + 1 in the sum average.
    masks : bool tensor, shape (N, D, H, W)
        Voxels that count.

    Returns
    -------
    float64 tensor, shape (N, 14)
        As ``glcm_features``.

    Raises
    ------
    InputError
        If shapes differ, ``masks`` is not bool or ``aggregation`` is unknown.
    """
    check_patches(levels, masks, halo=halo)
    wide = levels.to(torch.int16)
    return _features(
        lambda block: wide[block], masks, num_levels=num_levels, aggregation=aggregation, mcc=mcc, halo=halo
    )


def _features(
    levels_of: Callable[[slice], Tensor],
    masks: Tensor,
    *,
    num_levels: int,
    aggregation: Aggregation,
    mcc: bool,
    halo: bool,
) -> Tensor:
    """``glcm_features`` of the grey levels (int16, with their halo if any) that ``levels_of`` gives for some rows."""
    if aggregation not in ("merged", "mean"):
        raise InputError(f"unknown GLCM aggregation {aggregation!r}: use 'merged' or 'mean'")
    result = torch.full((len(masks), len(NAMES)), torch.nan, dtype=torch.float64, device=masks.device)
    sizes = (*(size for size in MATRIX_SIZES if size < num_levels), num_levels)
    pending: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for block in cache_blocks(len(masks), masks.shape[1:], masks.device):
        levels = with_border(levels_of(block), halo=halo, fill=0)
        inside = with_border(masks[block], halo=halo, fill=False).view(torch.uint8).to(torch.int16)
        own = inside if not halo else own_voxels(masks[block], halo=True).view(torch.uint8).to(torch.int16)
        highest = ((levels + 1) * inside).flatten(1).amax(1).to(torch.int32) - 1
        lowest = num_levels - ((num_levels - levels) * inside).flatten(1).amax(1).to(torch.int32)
        span = highest - lowest + 1
        size = next(size for size in sizes if size >= int(span.max()))
        # levels relative to the lowest of the patch; ``size`` marks voxels that do not count
        relative = levels - (lowest + size).to(torch.int16)[:, None, None, None]
        second = (relative * inside).add_(size)
        first = second if not halo else relative.mul_(own).add_(size)
        owners = torch.arange(len(levels), device=levels.device, dtype=torch.int32)[:, None, None, None]
        counts = count_pairs(first, second, owners, len(levels), size=size, per_direction=aggregation == "mean")
        for kept, rows in groups(span, sizes):
            part = (rows + block.start, lowest[rows], counts[rows, :, :kept, :kept])
            pending.setdefault(kept, []).append(part)
        lonely = ((counts.sum((1, 2, 3)) == 0) & (own.flatten(1).amax(1) > 0)).nonzero()[:, 0]
        if lonely.numel():
            weights = own[lonely].flatten(1).to(torch.float64)
            mean = (levels[lonely].flatten(1) * weights).sum(1) / weights.sum(1)
            result[lonely + block.start] = lonely_features(mean, mcc=mcc)
    for parts in pending.values():
        rows, base, counts = (torch.cat(column) for column in zip(*parts, strict=True))
        values = features_of_counts(counts, base, mcc=mcc)
        result[rows] = torch.where(values.isnan(), result[rows], values)
    return result


def groups(span: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(size, row indices) of the rows whose span fits each size and no smaller one; rows of span <= 0 are left out."""
    below = 0
    for size in sizes:
        rows = ((span > below) & (span <= size)).nonzero()[:, 0]
        if rows.numel():
            yield size, rows
        below = max(below, size)


def count_pairs(
    first: Tensor, second: Tensor, owners: Tensor, num_owners: int, *, size: int, per_direction: bool
) -> Tensor:
    """How many pairs of each two grey levels each owner has; a pair belongs to the owner of its first voxel.

    Parameters
    ----------
    first, second : int16 tensors, shape (..., D, H, W), contiguous
        Grey level 0 to ``size`` - 1 of the voxels that may be the first and the second of a pair, ``size`` elsewhere,
        in a layout in which no step leads from one that may be first to one that is not its neighbour
        (``windows.with_border``).
    owners : integer tensor that broadcasts to their shape
        Number of the window or block each voxel belongs to, 0 to ``num_owners`` - 1.

    Returns
    -------
    int32 tensor, shape (num_owners, A, size, size)
        Level of the first by level of the second voxel; A = 13 directions, or 1 for their sum. Added to its transpose
        it is the symmetric matrix.
    """
    edge = size + 1  # the extra row and column collect the pairs with an excluded voxel and are cut off at the end
    cells, slots = num_owners * edge * edge, len(DIRECTIONS) if per_direction else 1
    dtype = torch.int16 if cells * slots < 2**15 else torch.int32 if cells * slots < 2**31 else torch.int64
    base = (first.to(dtype) + owners.to(dtype) * edge).mul_(edge).view(-1)
    level = second.to(dtype).view(-1)
    # Of small windows the table is larger than the list of their pairs: all directions go into it at once.
    together = first.is_cuda or cells > first.numel()
    counts = torch.zeros((slots, cells), dtype=torch.int64, device=first.device)
    codes = torch.empty((len(DIRECTIONS) if together else 1, len(level)), dtype=dtype, device=first.device)
    for index, steps in enumerate(DIRECTIONS):
        step, slot = min(flat_step(first.shape, steps), len(level)), index if per_direction else 0
        row = codes[index if together else 0]
        torch.add(base[: len(level) - step], level[step:], out=row[: len(level) - step])
        row[len(level) - step :] = cells - 1  # behind the last voxel: excluded, as that corner is cut off
        if not together:
            counts[slot] += torch.bincount(row, minlength=cells)
        elif per_direction:
            row += index * cells
    if together:
        counts += torch.bincount(codes.view(-1), minlength=slots * cells).view(slots, cells)
    table = counts.view(slots, num_owners, edge, edge)[:, :, :size, :size]
    return table.to(torch.int32).transpose(0, 1)


def features_of_counts(counts: Tensor, lowest: Tensor, *, mcc: bool) -> Tensor:
    """Haralick's statistics of the symmetric matrices of pair counts, the mean over the directions that have a pair.

    Parameters
    ----------
    counts : integer tensor, shape (M, A, L, L)
        From ``count_pairs``, or sums of those; levels relative to ``lowest``.
    lowest : integer tensor, shape (M,)
        Grey level, counted from 0, of the first row.

    Returns
    -------
    float64 tensor, shape (M, 14)
        NaN where there is no pair.
    """
    num, slots, size, _ = counts.shape
    step = num if counts.is_cuda else max(1, _CACHE_CELLS // (slots * size * size))
    result = torch.empty((num, len(NAMES)), dtype=torch.float64, device=counts.device)
    for start in range(0, num, max(1, step)):
        part = counts[start : start + step]
        part = part + part.mT
        found = part.sum((2, 3)) > 0  # (m, A): directions with at least one pair
        values = haralick(part.flatten(0, 1).to(torch.float64), mcc=mcc).unflatten(0, found.shape)
        values[..., SUM_AVERAGE] += 2.0 * (lowest[start : start + step, None] + 1.0)  # back to levels that start at 1
        weights = found.to(torch.float64)[..., None]
        mean = (values * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        result[start : start + step] = torch.where(found.any(1)[:, None], mean, torch.nan)
    return result


def lonely_features(mean_level: Tensor, *, mcc: bool) -> Tensor:
    """What a window without any pair counts as: a flat one at its mean level (counted from 0); (M, 14) of (M,)."""
    row = torch.zeros(len(NAMES), dtype=torch.float64, device=mean_level.device)
    ones = [NAMES.index(name) for name in ("glcm_asm", "glcm_correlation", "glcm_idm")]
    row[[*ones, NAMES.index("glcm_mcc")] if mcc else ones] = 1.0
    values = row.repeat(len(mean_level), 1)
    values[:, SUM_AVERAGE] = 2.0 * (mean_level.to(torch.float64) + 1.0)
    return values

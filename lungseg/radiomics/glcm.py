"""Haralick's fourteen statistics of the 3-D grey-level co-occurrence matrix (GLCM) of each patch.

Pairs are counted with integers in one ``bincount`` for the whole batch. Patches are grouped by the span of their grey
levels, rounded up to a few fixed sizes, so that a patch of quiet lung costs a 12 x 12 matrix and not 57 x 57; the size
depends on the patch alone, never on its neighbours in the batch. Statistics are float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lungseg.errors import InputError
from lungseg.radiomics.first_order import check_patches

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

NAMES = (
    "glcm_asm",
    "glcm_contrast",
    "glcm_correlation",
    "glcm_variance",
    "glcm_idm",
    "glcm_sum_average",
    "glcm_sum_variance",
    "glcm_sum_entropy",
    "glcm_entropy",
    "glcm_difference_variance",
    "glcm_difference_entropy",
    "glcm_imc1",
    "glcm_imc2",
    "glcm_mcc",
)
"""Columns of ``glcm_features`` in Haralick's order: f1 (angular second moment) to f14 (maximal correlation)."""
DISSIMILARITY = "glcm_dissimilarity"
"""Name of the last column with ``mcc=False``."""

_MATRIX_SIZES = (4, 8, 12, 16, 20, 24, 32, 40, 48)
"""Matrix sizes patches are grouped into, by span of grey levels; larger spans take all levels."""


def glcm_features(
    patches_hu: Tensor, masks: Tensor, *, aggregation: Aggregation = "merged", mcc: bool = True
) -> Tensor:
    """Haralick's 14 texture statistics of the lung voxels of each patch.

    Fixed bins of 25 HU from -1024 HU, grey levels 1..57; 13 directions, distance 1, symmetric; a pair counts only if
    both voxels are lung and inside the patch. Entropies are in bits. Sum variance is about the sum average
    (pyradiomics' ClusterTendency).

    Parameters
    ----------
    patches_hu : float32 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask are not read.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    aggregation : "merged" or "mean"
        Statistics of the 13 matrices summed, or their mean over the directions that have a pair.
    mcc : bool
        False puts the dissimilarity, mean |i - j|, in place of the costly maximal correlation coefficient.

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
    check_patches(patches_hu, masks)
    levels = grey_levels(patches_hu, masks)
    return glcm_features_of_levels(levels, masks, num_levels=NUM_LEVELS, aggregation=aggregation, mcc=mcc)


def grey_levels(patches_hu: Tensor, masks: Tensor) -> Tensor:
    """Bin index 0..56 of each lung voxel (int32, same shape); 0 outside the mask. Exact for any float HU."""
    # The bin edges are whole HU, so floor loses nothing; then integers, because CUDA divides floats by a constant
    # through its rounded inverse, which puts some edges into the bin below.
    whole = torch.where(masks, patches_hu.to(torch.float32), float(LOWEST_HU)).floor_()
    steps = whole.clamp_(LOWEST_HU, HIGHEST_HU).sub_(LOWEST_HU).to(torch.int32)
    return steps.div_(BIN_WIDTH_HU, rounding_mode="floor")


def glcm_features_of_levels(
    levels: Tensor, masks: Tensor, *, num_levels: int, aggregation: Aggregation = "merged", mcc: bool = True
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
    check_patches(levels, masks)
    if aggregation not in ("merged", "mean"):
        raise InputError(f"unknown GLCM aggregation {aggregation!r}: use 'merged' or 'mean'")
    levels = levels.to(torch.int32)
    result = torch.full((levels.shape[0], len(NAMES)), torch.nan, dtype=torch.float64, device=levels.device)
    lowest = torch.where(masks, levels, num_levels).flatten(1).amin(1)
    highest = torch.where(masks, levels, -1).flatten(1).amax(1)
    for size, rows in _groups(highest - lowest + 1, (*_MATRIX_SIZES, num_levels)):
        whole = rows.numel() == levels.shape[0]
        group, inside, base = (levels, masks, lowest) if whole else (levels[rows], masks[rows], lowest[rows])
        relative = torch.where(inside, group - base[:, None, None, None], size)
        counts = _count_pairs(relative, size, per_direction=aggregation == "mean")
        found = counts.sum((2, 3)) > 0  # (N, A): directions with at least one pair
        values = _statistics(counts.flatten(0, 1), mcc=mcc).unflatten(0, found.shape)
        values[..., 5] += 2.0 * (base[:, None] + 1.0)  # sum average: back to levels that start at 1
        weights = found.to(torch.float64)[..., None]
        mean = (values * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        result[rows] = torch.where(found.any(1)[:, None], mean, _flat_values(group, inside, mcc=mcc))
    return result


def _groups(span: Tensor, sizes: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """(size, row indices) of the rows whose span fits each size and no smaller one; rows of span <= 0 are left out."""
    below = 0
    for size in sizes:
        rows = ((span > below) & (span <= size)).nonzero()[:, 0]
        if rows.numel():
            yield size, rows
        below = max(below, size)


def _count_pairs(levels: Tensor, size: int, *, per_direction: bool) -> Tensor:
    """Symmetric pair counts (N, A, size, size), float64, A = 13 or 1; level ``size`` marks voxels that do not count."""
    num_patches, *shape = levels.shape
    edge = size + 1  # the extra row and column collect the pairs with an excluded voxel and are cut off at the end
    slots = len(DIRECTIONS) if per_direction else 1
    total = num_patches * slots * edge * edge
    dtype = torch.int32 if total < 2**31 else torch.int64
    second = levels.to(dtype)
    patch = torch.arange(num_patches, device=levels.device, dtype=dtype)[:, None, None, None]
    first = (patch * (slots * edge) + second) * edge
    pairs_of = [math.prod(n - abs(step) for n, step in zip(shape, steps, strict=True)) for steps in DIRECTIONS]
    codes = torch.empty(num_patches * sum(pairs_of), dtype=dtype, device=levels.device)
    start = 0
    for index, (steps, pairs) in enumerate(zip(DIRECTIONS, pairs_of, strict=True)):
        here, there = _pair_views(first, second, steps)
        chunk = codes[start : start + num_patches * pairs].view(here.shape)
        torch.add(here, there, out=chunk)
        if per_direction:
            chunk += index * edge * edge
        start += num_patches * pairs
    counts = torch.bincount(codes, minlength=total).view(num_patches, slots, edge, edge)
    counts = counts[..., :size, :size].to(torch.float64)
    return counts + counts.mT


def _pair_views(first: Tensor, second: Tensor, steps: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Views of ``first`` and ``second`` whose equal positions are the two voxels of each pair."""
    for axis, step in enumerate(steps, start=1):
        length = first.shape[axis] - abs(step)
        first = first.narrow(axis, max(-step, 0), length)
        second = second.narrow(axis, max(step, 0), length)
    return first, second


def _statistics(counts: Tensor, *, mcc: bool) -> Tensor:
    """The 14 statistics of (M, L, L) symmetric counts, levels numbered from 0 here; (M, 14). Empty matrix: finite."""
    size = counts.shape[-1]
    p = counts / counts.sum((1, 2), keepdim=True).clamp(min=1.0)
    marginal = p.sum(2)
    level = torch.arange(size, dtype=p.dtype, device=p.device)
    mean = marginal @ level
    variance = (marginal * (level - mean[:, None]).square()).sum(1)
    p_sum = _antidiagonal_sums(p)  # index k = i + j
    differences = _antidiagonal_sums(p.flip(2))[:, size - 1 :]  # index k = i - j >= 0
    p_diff = torch.cat((differences[:, :1], 2.0 * differences[:, 1:]), 1)  # symmetric: |i - j|
    contrast = p_diff @ level.square()
    mean_difference = p_diff @ level
    sums = torch.arange(2 * size - 1, dtype=p.dtype, device=p.device)
    flat = variance == 0
    # var(i - j) = contrast = 2 var - 2 cov for a symmetric matrix, hence correlation = cov / var = 1 - contrast / 2 var
    correlation = 1.0 - contrast / (2.0 * torch.where(flat, 1.0, variance))
    joint_entropy = _entropy_bits(p.flatten(1))
    marginal_entropy = _entropy_bits(marginal)
    # For a symmetric matrix HXY1 = HXY2 = 2 HX; >= 0 up to rounding
    mutual_information = (2.0 * marginal_entropy - joint_entropy).clamp(min=0.0)
    return torch.stack(
        (
            p.square().sum((1, 2)),
            contrast,
            torch.where(flat, 1.0, correlation),
            variance,
            p_diff @ (1.0 / (1.0 + level.square())),
            2.0 * mean,
            (p_sum * (sums - 2.0 * mean[:, None]).square()).sum(1),
            _entropy_bits(p_sum),
            joint_entropy,
            (p_diff * (level - mean_difference[:, None]).square()).sum(1),
            _entropy_bits(p_diff),
            torch.where(flat, 0.0, -mutual_information / torch.where(flat, 1.0, marginal_entropy)),
            (-torch.expm1(-2.0 * mutual_information)).sqrt(),
            _maximal_correlation(p, marginal) if mcc else mean_difference,
        ),
        1,
    )


def _antidiagonal_sums(p: Tensor) -> Tensor:
    """Sum of (M, L, L) over i + j = k for k = 0..2L-2; (M, 2L-1)."""
    num, size, _ = p.shape
    # Padded to width 2L and read back with width 2L-1, each row starts one column further right than the one above.
    skewed = torch.nn.functional.pad(p, (0, size)).flatten(1)[:, : size * (2 * size - 1)]
    return skewed.reshape(num, size, 2 * size - 1).sum(1)


def _entropy_bits(p: Tensor) -> Tensor:
    """Entropy in bits over the last axis; 0 log 0 = 0."""
    return torch.special.entr(p).sum(-1) / math.log(2.0)


def _maximal_correlation(p: Tensor, marginal: Tensor) -> Tensor:
    """Maximal correlation coefficient of (M, L, L) symmetric matrices; 1 for a single level.

    Q = D^-1 P D^-1 P is similar to S^2 with the symmetric S = D^-1/2 P D^-1/2, whose eigenvalue 1 has the known
    eigenvector sqrt(marginal). Taken off, the root of Q's second eigenvalue is the largest |eigenvalue| that is left.
    """
    present = marginal > 0
    num_present = present.sum(1)
    root = marginal.sqrt()
    scale = torch.where(present, 1.0 / torch.where(present, root, 1.0), 0.0)
    deflated = scale[:, :, None] * p * scale[:, None, :] - root[:, :, None] * root[:, None, :]
    result = torch.ones_like(num_present, dtype=p.dtype)
    # Levels that occur are moved to the front: the eigenvalues of the empty rows and columns are 0 and cost time.
    order = torch.argsort(present.to(torch.int8), dim=1, descending=True, stable=True)
    size = p.shape[-1]
    for kept, rows in _groups(num_present, (1, *range(2, size, 2), size)):
        if kept == 1:
            continue
        index = order[rows, :kept]
        small = deflated[rows[:, None, None], index[:, :, None], index[:, None, :]]
        result[rows] = torch.linalg.eigvalsh(small).abs().amax(1).clamp(max=1.0)
    return result


def _flat_values(levels: Tensor, masks: Tensor, *, mcc: bool) -> Tensor:
    """What a patch without any pair counts as: a flat one at its mean level; (N, 14)."""
    inside = masks.flatten(1)
    mean = torch.where(inside, levels.flatten(1), 0).sum(1).to(torch.float64) / inside.sum(1)
    row = torch.zeros(len(NAMES), dtype=torch.float64, device=levels.device)
    ones = [NAMES.index(name) for name in ("glcm_asm", "glcm_correlation", "glcm_idm")]
    row[[*ones, NAMES.index("glcm_mcc")] if mcc else ones] = 1.0
    values = row.repeat(levels.shape[0], 1)
    values[:, NAMES.index("glcm_sum_average")] = 2.0 * (mean + 1.0)
    return values

"""Descriptors for every site of a lattice over a volume, from block sums that overlapping windows share.

Site ``(i, j, k)`` stands for the cell of ``stride`` voxels that begins at ``stride * (i, j, k)``, as a token does; its
window lies around the cell's centre and may reach out of the volume, where there is no lung. The volume is cut into
blocks of ``stride`` voxels (``blocks``), so that each voxel is looked at once however many windows hold it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lungseg.errors import InputError
from lungseg.radiomics import gabor, glcm, lbp
from lungseg.radiomics.blocks import (
    Lattice,
    Sites,
    box_of,
    by_block,
    join_windows,
    own_of,
    slide,
    strips,
    tile_of,
    without_margin,
)
from lungseg.radiomics.descriptor import BYTES_PER_CELL, DEFAULT_CHUNK_BYTES, FAMILIES, FEATURE_NAMES, MIN_LUNG_VOXELS
from lungseg.radiomics.first_order import Moments, moments
from lungseg.radiomics.glcm import DIRECTIONS, NUM_LEVELS, Aggregation
from lungseg.radiomics.windows import computing_dtype, items_at_once, keep, keep_freed_memory

TILE_VOXELS = 32
"""Edge of the tiles of axial slices that are filtered by one banded matrix: larger ones multiply more zeros, smaller
ones more of their neighbours."""
_MOMENTS = slice(0, 5)
"""Where the moments stand in the sums of a block."""
_SITES_AT_ONCE = 2**16
"""Sites, in whole planes, whose moments, patterns and energies are joined at once: that takes some 1.5 KiB a site."""


def site_corners(shape: Sequence[int], *, window: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """First voxel (z, y, x) of the windows along each axis of a volume of ``shape``; negative where they begin outside.

    Raises
    ------
    InputError
        If the window is no multiple of the stride, or cannot lie around the centre of a cell.
    """
    if stride < 1 or window < stride or window % stride or (window - stride) % 2:
        raise InputError(
            f"windows of {window} voxels cannot be made of blocks of {stride} around the centre of one: "
            "give a window that is a multiple of the stride, and an even stride or an odd multiple"
        )
    z, y, x = (torch.arange(-(-int(n) // stride)) * stride - (window - stride) // 2 for n in shape)
    return z, y, x


@torch.no_grad()
def dense_descriptors(
    volume_hu: Tensor,
    mask: Tensor,
    *,
    lung_median_hu: float,
    window: int,
    stride: int,
    aggregation: Aggregation = "merged",
    mcc: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """The 34 radiomic features of the window around every site of a lattice.

    Equal, up to rounding, to ``compute_descriptors(..., halo=True)`` of the windows at ``site_corners`` cut out of the
    volume.

    Parameters
    ----------
    volume_hu : float32, float64 or int16 tensor, shape (Z, Y, X)
        CT in Hounsfield units; values outside the mask do not matter.
    mask : bool tensor, shape (Z, Y, X)
        Lung voxels.
    lung_median_hu : float
        Median HU of the lung.
    window, stride : int
        Edge of the windows and distance of the sites in voxels; the window is a multiple of the stride.
    aggregation, mcc
        As ``compute_descriptors``.
    chunk_bytes : int
        Working memory allowed for the co-occurrence matrices; at least those of the blocks of one window are held.
        Besides them: 300 bytes a block of the box around the lung, ``stride`` slices as float, and 100 MiB.

    Returns
    -------
    float32 tensor (float64 if the volume is), shape (ceil(Z / stride), ceil(Y / stride), ceil(X / stride), 34)
        A site is all NaN if its window has fewer than ``MIN_LUNG_VOXELS`` lung voxels, else finite.

    Raises
    ------
    InputError
        If shapes differ, ``mask`` is not bool, a lung voxel is not finite, or window and stride do not fit.
    """
    if volume_hu.ndim != 3 or volume_hu.shape != mask.shape or mask.dtype != torch.bool:
        shapes = f"{tuple(volume_hu.shape)} and {tuple(mask.shape)} ({mask.dtype})"
        raise InputError(f"volume and bool mask must both have shape (Z, Y, X), but are {shapes}")
    if aggregation not in ("merged", "mean"):
        raise InputError(f"unknown GLCM aggregation {aggregation!r}: use 'merged' or 'mean'")
    num_sites = tuple(len(corners) for corners in site_corners(volume_hu.shape, window=window, stride=stride))
    result = torch.full(
        (*num_sites, len(FEATURE_NAMES)), torch.nan, dtype=computing_dtype(volume_hu), device=volume_hu.device
    )
    if not bool(mask.any()):
        return result
    keep_freed_memory(volume_hu.device)
    lattice = Lattice.around(mask, window=window, stride=stride)
    sums, level_range = _block_sums(volume_hu, mask, lattice, lung_median_hu)
    inner, outer = lattice.overlap(num_sites)
    found = result[outer]  # a view: the sites whose windows hold lung
    width = lattice.blocks_a_window
    valid = join_windows(sums[..., :1], width, (width - 1, width - 1))[inner][..., 0] >= MIN_LUNG_VOXELS
    texture = found[..., FAMILIES["glcm"]]
    for sites, values in _texture(volume_hu, mask, lattice, inner, level_range, valid, aggregation, mcc, chunk_bytes):
        texture[sites] = values.to(result.dtype)
    step = max(1, _SITES_AT_ONCE // max(1, valid[0].numel()))
    for first in range(0, len(valid), step):
        planes = slice(first, min(first + step, len(valid)))
        features = _plane_features(sums, lattice, inner, planes, mcc).to(result.dtype)
        paired = texture[planes].isfinite()
        features[..., FAMILIES["glcm"]] = torch.where(paired, texture[planes], features[..., FAMILIES["glcm"]])
        found[planes] = torch.where(valid[planes, ..., None], features, torch.nan)
    return result


def _block_sums(
    volume_hu: Tensor, mask: Tensor, lattice: Lattice, lung_median_hu: float
) -> tuple[Tensor, tuple[int, int]]:
    """What all features but the co-occurrence ones are made of, and the lowest and highest grey level of the lung.

    The sums are (bz, by, bx, 38): the moments, counts of 3 x 8 patterns, 8 energies, the sum of the grey levels.
    """
    dtype, device, stride = computing_dtype(volume_hu), volume_hu.device, lattice.stride
    sums = torch.zeros((*lattice.num_blocks, _MOMENTS.stop + 24 + 8 + 1), dtype=torch.float64, device=device)
    lowest, highest = NUM_LEVELS, 0
    for layer, rows, regions, owners in strips(lattice, device):
        lung = box_of(mask, regions, False)
        inside = by_block(without_margin(lung).contiguous(), stride)
        if not bool(inside.any()):
            continue
        values = box_of(volume_hu, regions, 0).to(dtype)
        hu = by_block(without_margin(values).contiguous(), stride)
        found = moments(hu, inside)
        if not bool(found.second.isfinite().all()):
            raise InputError("a lung voxel of the volume is NaN or infinite: check the scan for missing HU values")
        levels = glcm.grey_levels(hu, inside)
        flags = inside.view(torch.uint8).to(torch.int16)
        lowest = min(lowest, NUM_LEVELS - int(((NUM_LEVELS - levels) * flags).max()))
        highest = max(highest, int(levels.max()))
        patterns = lbp.pattern_counts(values, lung, own_of(lung), owners, len(inside))
        total = levels.sum(1, dtype=torch.float64)[:, None]
        numbers = torch.cat((found.stacked(), patterns.flatten(1), total.expand(-1, 9)), 1)
        sums[layer, rows] = numbers.view(rows.stop - rows.start, -1, sums.shape[-1])
    for layer in range(lattice.num_blocks[0]):
        sums[layer, ..., -9:-1] = _energy_sums(volume_hu, mask, lattice, layer, lung_median_hu)
    return sums, (lowest, highest)


def _energy_sums(volume_hu: Tensor, mask: Tensor, lattice: Lattice, layer: int, lung_median_hu: float) -> Tensor:
    """Sums (by, bx, 8) of the Gabor energies over the lung voxels of a layer of blocks, tile by tile."""
    dtype, device, stride = computing_dtype(volume_hu), volume_hu.device, lattice.stride
    margin = gabor.radius(max(gabor.WAVELENGTHS_VOXELS))
    _, rows, columns = lattice.num_blocks
    edge = max(1, TILE_VOXELS // stride)  # blocks
    tiles = [-(-count // edge) for count in (rows, columns)]
    regions = [lattice.region(layer, 0), lattice.region(0, 1, tiles[0] * edge), lattice.region(0, 2, tiles[1] * edge)]
    regions[1:] = [(start - margin, stop + margin) for start, stop in regions[1:]]
    lung = box_of(mask, regions, False)
    slices = keep(box_of(volume_hu, regions, 0).to(dtype) - lung_median_hu, lung)
    size = edge * stride + 2 * margin

    def tiled(box: Tensor) -> Tensor:  # (s, H, W) -> (tiles, s, size, size), a view
        box = box.unfold(1, size, edge * stride).unfold(2, size, edge * stride)
        return box.permute(1, 2, 0, 3, 4).reshape(-1, stride, size, size)

    own = tiled(lung)[:, :, margin:-margin, margin:-margin]
    used = own.flatten(1).any(1).nonzero()[:, 0]
    patches, own = tiled(slices)[used], own[used].contiguous().view(torch.uint8).to(dtype)
    sums = torch.zeros((tiles[0] * tiles[1], len(gabor.NAMES), edge, edge), dtype=torch.float64, device=device)
    across = torch.eye(edge, dtype=dtype, device=device).repeat_interleave(stride, 0)
    step = items_at_once(2 * stride * size * size, device)
    for index, wavelength in enumerate(gabor.WAVELENGTHS_VOXELS):
        bank = gabor.FilterBank.make(wavelength, (size, size), margin, dtype, device)
        for start in range(0, len(used), step):
            part = slice(start, min(start + step, len(used)))
            energies = bank.energies(patches[part].flatten(0, 1)).mul_(own[part].flatten(0, 1))  # (4, S, H, W)
            runs = energies @ across  # a product with 0 and 1 sums every ``stride`` columns
            blocks = runs.view(4, -1, stride, edge, stride, edge).sum((2, 4), dtype=torch.float64)
            sums[used[part], 4 * index : 4 * index + 4] = blocks.transpose(0, 1)
    grid = sums.view(*tiles, len(gabor.NAMES), edge, edge).permute(0, 3, 1, 4, 2)
    return grid.reshape(tiles[0] * edge, tiles[1] * edge, -1)[:rows, :columns]


def _texture(
    volume_hu: Tensor,
    mask: Tensor,
    lattice: Lattice,
    inner: Sites,
    level_range: tuple[int, int],
    valid: Tensor,
    aggregation: Aggregation,
    mcc: bool,
    chunk_bytes: int,
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Index of some valid sites and their 14 co-occurrence features, NaN where a window holds no pair.

    Block counts are whole numbers, so the sum over the layers of a window is kept by adding the layer that comes in
    and taking off the one that goes out. Half of the byte budget is for these sums, which limits the sites of a plane
    that are done together, half for the statistics. ``valid`` is of the windows ``inner``.
    """
    lowest, size = level_range[0], level_range[1] - level_range[0] + 1
    slots, width = len(DIRECTIONS) if aggregation == "mean" else 1, lattice.blocks_a_window
    # int32 of the layers of a window, of their sum and of three steps of its sums along two axes, int64 and int32 of
    # the layer that is counted; its pairs as they are counted
    per_block = slots * (size + 1) ** 2 * 4 * (width + 7) + 60 * lattice.stride**3
    edge = max(1, math.isqrt(chunk_bytes // 2 // per_block) - (width - 1))  # sites
    at_once = max(1, chunk_bytes // 2 // (slots * size**2 * BYTES_PER_CELL))
    for tile in itertools.product(range(0, valid.shape[1], edge), range(0, valid.shape[2], edge)):
        stops = [min(first + edge, length) for first, length in zip(tile, valid.shape[1:], strict=True)]
        sites = (slice(None), slice(tile[0], stops[0]), slice(tile[1], stops[1]))
        if not bool(valid[sites].any()):
            continue
        part, running, middle = tile_of(lattice, inner, sites, slots * size * size, mask.device)
        held: list[Tensor] = []
        counted = _count_layers(volume_hu, mask, part, lowest, size, aggregation == "mean")
        for plane in range(inner[0].stop):
            if plane < part.num_blocks[0]:
                held.append(next(counted))
                middle += held[-1]
            if plane >= width:
                middle -= held.pop(0)
            if plane < inner[0].start:
                continue
            chosen = valid[plane - inner[0].start][sites[1:]].nonzero()
            if len(chosen) == 0:
                continue
            windows = slide(slide(running, width, 0, torch.add), width, 1, torch.add)
            for some in chosen.split(at_once):
                counts = windows[some[:, 0], some[:, 1]].view(-1, slots, size, size)
                where = (
                    torch.full_like(some[:, 0], plane - inner[0].start),
                    some[:, 0] + tile[0],
                    some[:, 1] + tile[1],
                )
                yield where, _grouped_features(counts, lowest, mcc)


def _plane_features(sums: Tensor, lattice: Lattice, inner: Sites, planes: slice, mcc: bool) -> Tensor:
    """The 34 features, float64, of the windows ``inner`` of some planes; co-occurrence as if no window had a pair."""
    width, layers = lattice.blocks_a_window, lattice.num_blocks[0]
    start, stop = inner[0].start + planes.start - (width - 1), inner[0].start + planes.stop  # layers of blocks
    ends = (max(0, -start), max(0, stop - layers))  # layers without lung
    blocks = sums[max(0, start) : min(stop, layers)]
    place = (slice(None), *inner[1:])
    moments_of = Moments(*join_windows(blocks[..., _MOMENTS], width, ends, _join_moments)[place].unbind(-1))
    added = join_windows(blocks[..., _MOMENTS.stop :], width, ends)[place]
    patterns, energies, levels = added.split((3 * lbp.NUM_BINS, len(gabor.NAMES), 1), -1)
    lbp_of = lbp.pattern_shares(patterns.unflatten(-1, (3, lbp.NUM_BINS)), moments_of.count > 0)
    gabor_of = torch.log1p(energies / moments_of.count[..., None])
    mean_level = levels[..., 0] / moments_of.count
    texture = glcm.lonely_features(mean_level.flatten(), mcc=mcc).view(*mean_level.shape, -1)
    return torch.cat((moments_of.features(), texture, lbp_of, gabor_of), -1)


def _count_layers(
    volume_hu: Tensor, mask: Tensor, lattice: Lattice, lowest: int, size: int, per_direction: bool
) -> Iterator[Tensor]:
    """Pair counts (by, bx, A size^2) of one layer of blocks after the other, int32."""
    _, rows, columns = lattice.num_blocks
    slots = len(DIRECTIONS) if per_direction else 1
    layer_counts: Tensor | None = None
    for _, part, regions, owners in strips(lattice, mask.device):
        if layer_counts is None:
            layer_counts = torch.zeros((rows, columns, slots * size * size), dtype=torch.int32, device=mask.device)
        lung = box_of(mask, regions, False)
        if bool(lung.any()):
            levels = glcm.grey_levels(box_of(volume_hu, regions, 0), lung)
            relative = levels - (lowest + size)
            second = (relative * lung.view(torch.uint8).to(torch.int16)).add_(size)
            first = relative.mul_(own_of(lung).view(torch.uint8).to(torch.int16)).add_(size)
            num_blocks = (part.stop - part.start) * columns
            counts = glcm.count_pairs(first, second, owners, num_blocks, size=size, per_direction=per_direction)
            layer_counts[part] = counts.reshape(-1, columns, slots * size * size)
        if part.stop == rows:
            yield layer_counts
            layer_counts = None


def _grouped_features(counts: Tensor, lowest: int, mcc: bool) -> Tensor:
    """Statistics (M, 14) of pair counts (M, A, L, L), each matrix cut to the levels that occur."""
    size = counts.shape[-1]
    present = (counts.sum((1, 2)) + counts.sum((1, 3))) > 0
    level = torch.arange(size, device=counts.device)
    low = torch.where(present, level, size).amin(1)
    high = torch.where(present, level, -1).amax(1)
    result = torch.full((len(counts), len(glcm.NAMES)), torch.nan, dtype=torch.float64, device=counts.device)
    sizes = (*(kept for kept in glcm.MATRIX_SIZES if kept < size), size)
    for kept, rows in glcm.groups(high - low + 1, sizes):
        base = low[rows].clamp(max=size - kept)
        index = base[:, None] + torch.arange(kept, device=counts.device)
        cut = counts[rows].gather(2, index[:, None, :, None].expand(-1, counts.shape[1], -1, size))
        cut = cut.gather(3, index[:, None, None, :].expand(-1, counts.shape[1], kept, -1))
        result[rows] = glcm.features_of_counts(cut, base + lowest, mcc=mcc)
    return result


def _join_moments(one: Tensor, other: Tensor) -> Tensor:
    """``Moments.join`` of moments stacked in the last axis."""
    return Moments(*one.unbind(-1)).join(Moments(*other.unbind(-1))).stacked()

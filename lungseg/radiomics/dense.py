"""Descriptors for every site of a lattice over a volume, from block sums that overlapping windows share.

Site ``(i, j, k)`` stands for the cell of ``stride`` voxels that begins at ``stride * (i, j, k)``, as a token does; its
window lies around the cell's centre and may reach out of the volume, where there is no lung. The volume is cut into
blocks of ``stride`` voxels. With the neighbourhoods of ``halo=True`` the counts and sums of blocks add up to those of
windows, so that each voxel is looked at once however many windows hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lungseg.errors import InputError
from lungseg.radiomics import gabor, glcm, lbp
from lungseg.radiomics.descriptor import DEFAULT_CHUNK_BYTES, FEATURE_NAMES, MIN_LUNG_VOXELS
from lungseg.radiomics.first_order import Moments, moments
from lungseg.radiomics.glcm import DIRECTIONS, NUM_LEVELS, Aggregation
from lungseg.radiomics.windows import CACHE_VOXELS, computing_dtype, keep, keep_freed_memory

TILE_VOXELS = 32
"""Edge of the tiles of axial slices that are filtered by one banded matrix: larger ones multiply more zeros, smaller
ones more of their neighbours."""
_MOMENTS = slice(0, 5)
"""Where the moments stand in the sums of a block."""


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
        Working memory allowed for the co-occurrence matrices. Besides them, a slab of ``stride`` slices and 200 bytes
        a block are held.

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
    lattice = _Lattice.around(mask, window=window, stride=stride)
    sums, level_range = _block_sums(volume_hu, mask, lattice, lung_median_hu)
    width = lattice.blocks_a_window
    moments_of = Moments(*_windows(sums[..., _MOMENTS], width, _join_moments).unbind(-1))
    added = _windows(sums[..., _MOMENTS.stop :], width)
    patterns, energies, levels = added.split((3 * lbp.NUM_BINS, len(gabor.NAMES), 1), -1)
    lbp_of = lbp.pattern_shares(patterns.unflatten(-1, (3, lbp.NUM_BINS)), moments_of.count > 0)
    gabor_of = torch.log1p(energies / moments_of.count[..., None])
    valid = moments_of.count >= MIN_LUNG_VOXELS
    mean_level = levels[..., 0] / moments_of.count
    texture = glcm.lonely_features(mean_level.flatten(), mcc=mcc).view(*valid.shape, -1)
    for sites, values in _texture(volume_hu, mask, lattice, level_range, valid, aggregation, mcc, chunk_bytes):
        texture[sites] = torch.where(values.isnan(), texture[sites], values)
    features = torch.cat((moments_of.features(), texture, lbp_of, gabor_of), -1)
    features = torch.where(valid[..., None], features, torch.nan).to(result.dtype)
    inner, outer = lattice.overlap(num_sites)
    result[outer] = features[inner]
    return result


@dataclass(frozen=True)
class _Lattice:
    """The blocks that hold lung, and the sites whose windows reach one."""

    stride: int
    blocks_a_window: int
    first_block: tuple[int, int, int]
    """Number of the first block (z, y, x); block 0 begins with the window of site 0."""
    num_blocks: tuple[int, int, int]
    reach: int
    """Voxels by which block 0 begins before the volume."""

    @classmethod
    def around(cls, mask: Tensor, *, window: int, stride: int) -> _Lattice:
        """Lattice over the bounding box of a mask that is not empty."""
        reach = (window - stride) // 2
        first, count = [], []
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            used = mask.view(torch.uint8).amax(others).nonzero()[:, 0]
            low, high = ((int(end) + reach) // stride for end in (used[0], used[-1]))
            first.append(low)
            count.append(high - low + 1)
        return cls(stride, window // stride, (first[0], first[1], first[2]), (count[0], count[1], count[2]), reach)

    def region(self, block: int, axis: int, count: int = 1) -> tuple[int, int]:
        """First and last+1 voxel along an axis of ``count`` blocks from number ``block`` of this lattice on."""
        start = (self.first_block[axis] + block) * self.stride - self.reach
        return start, start + count * self.stride

    def overlap(self, num_sites: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the windows of this lattice and the sites 0 to ``num_sites`` agree, in both."""
        inner, outer = [], []
        for first, blocks, sites in zip(self.first_block, self.num_blocks, num_sites, strict=True):
            start = first - (self.blocks_a_window - 1)  # site of the first window: its last block is the first one
            stop = first + blocks
            inner.append(slice(max(0, -start), min(stop, sites) - start))
            outer.append(slice(max(0, start), min(stop, sites)))
        return tuple(inner), tuple(outer)


def _box(volume: Tensor, regions: Sequence[tuple[int, int]], fill: float | bool) -> Tensor:
    """The voxels of a region, ``fill`` where it reaches out of the volume; contiguous."""
    pads: list[int] = []
    for axis, (start, stop) in enumerate(regions):
        length = volume.shape[axis]
        low, high = min(max(start, 0), length), min(max(stop, 0), length)
        volume = volume.narrow(axis, low, max(high - low, 0))
        missing = min(max(-start, 0), stop - start)
        pads = [missing, (stop - start) - missing - max(high - low, 0), *pads]
    return torch.nn.functional.pad(volume, pads, value=fill).contiguous()


def _strips(lattice: _Lattice, device: torch.device) -> Iterator[tuple[int, slice, list[tuple[int, int]], Tensor]]:
    """Runs of rows of blocks of one layer whose voxels fit the cache of a CPU; whole layers on other devices.

    Layer, rows, the region of their voxels with one more on each side, and for each (row, column) of that region the
    number of its block within the run.
    """
    layers, rows, columns = lattice.num_blocks
    stride = lattice.stride
    step = max(1, CACHE_VOXELS // (stride**3 * columns)) if device.type == "cpu" else rows
    across = (torch.arange(-1, columns * stride + 1, device=device) // stride).clamp(0, columns - 1)
    for layer in range(layers):
        for row in range(0, rows, step):
            count = min(step, rows - row)
            regions = [lattice.region(layer, 0), lattice.region(row, 1, count), lattice.region(0, 2, columns)]
            down = (torch.arange(-1, count * stride + 1, device=device) // stride).clamp(0, count - 1)
            owners = (down[:, None] * columns + across).to(torch.int32)
            yield layer, slice(row, row + count), [(start - 1, stop + 1) for start, stop in regions], owners


def _inner(box: Tensor) -> Tensor:
    """A box without its margin of one voxel."""
    return box[1:-1, 1:-1, 1:-1]


def _own(lung: Tensor) -> Tensor:
    """The lung voxels of a box that are not in its margin of one voxel."""
    return torch.nn.functional.pad(_inner(lung), (1, 1, 1, 1, 1, 1), value=False)


def _by_block(box: Tensor, stride: int) -> Tensor:
    """Voxels of a layer of blocks (s, rows s, columns s) as (blocks, s^3)."""
    rows, columns = box.shape[1] // stride, box.shape[2] // stride
    return box.view(stride, rows, stride, columns, stride).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)


def _block_sums(
    volume_hu: Tensor, mask: Tensor, lattice: _Lattice, lung_median_hu: float
) -> tuple[Tensor, tuple[int, int]]:
    """What all features but the co-occurrence ones are made of, and the lowest and highest grey level of the lung.

    The sums are (bz, by, bx, 38): the moments, counts of 3 x 8 patterns, 8 energies, the sum of the grey levels.
    """
    dtype, device, stride = computing_dtype(volume_hu), volume_hu.device, lattice.stride
    sums = torch.zeros((*lattice.num_blocks, _MOMENTS.stop + 24 + 8 + 1), dtype=torch.float64, device=device)
    lowest, highest = NUM_LEVELS, 0
    for layer, rows, regions, owners in _strips(lattice, device):
        lung = _box(mask, regions, False)
        inside = _by_block(_inner(lung).contiguous(), stride)
        if not bool(inside.any()):
            continue
        values = _box(volume_hu, regions, 0).to(dtype)
        hu = _by_block(_inner(values).contiguous(), stride)
        found = moments(hu, inside)
        if not bool(found.second.isfinite().all()):
            raise InputError("a lung voxel of the volume is NaN or infinite: check the scan for missing HU values")
        levels = glcm.grey_levels(hu, inside)
        flags = inside.view(torch.uint8).to(torch.int16)
        lowest = min(lowest, NUM_LEVELS - int(((NUM_LEVELS - levels) * flags).max()))
        highest = max(highest, int(levels.max()))
        patterns = lbp.pattern_counts(values, lung, _own(lung), owners, len(inside))
        total = levels.sum(1, dtype=torch.float64)[:, None]
        numbers = torch.cat((found.stacked(), patterns.flatten(1), total.expand(-1, 9)), 1)
        sums[layer, rows] = numbers.view(rows.stop - rows.start, -1, sums.shape[-1])
    for layer in range(lattice.num_blocks[0]):
        sums[layer, ..., -9:-1] = _energy_sums(volume_hu, mask, lattice, layer, lung_median_hu)
    return sums, (lowest, highest)


def _energy_sums(volume_hu: Tensor, mask: Tensor, lattice: _Lattice, layer: int, lung_median_hu: float) -> Tensor:
    """Sums (by, bx, 8) of the Gabor energies over the lung voxels of a layer of blocks, tile by tile."""
    dtype, device, stride = computing_dtype(volume_hu), volume_hu.device, lattice.stride
    margin = gabor.radius(max(gabor.WAVELENGTHS_VOXELS))
    _, rows, columns = lattice.num_blocks
    edge = max(1, TILE_VOXELS // stride)  # blocks
    tiles = [-(-count // edge) for count in (rows, columns)]
    regions = [lattice.region(layer, 0), lattice.region(0, 1, tiles[0] * edge), lattice.region(0, 2, tiles[1] * edge)]
    regions[1:] = [(start - margin, stop + margin) for start, stop in regions[1:]]
    lung = _box(mask, regions, False)
    slices = keep(_box(volume_hu, regions, 0).to(dtype) - lung_median_hu, lung)
    size = edge * stride + 2 * margin

    def tiled(box: Tensor) -> Tensor:  # (s, H, W) -> (tiles, s, size, size), a view
        box = box.unfold(1, size, edge * stride).unfold(2, size, edge * stride)
        return box.permute(1, 2, 0, 3, 4).reshape(-1, stride, size, size)

    own = tiled(lung)[:, :, margin:-margin, margin:-margin]
    used = own.flatten(1).any(1).nonzero()[:, 0]
    patches, own = tiled(slices)[used], own[used].contiguous().view(torch.uint8).to(dtype)
    sums = torch.zeros((tiles[0] * tiles[1], len(gabor.NAMES), edge, edge), dtype=torch.float64, device=device)
    across = torch.eye(edge, dtype=dtype, device=device).repeat_interleave(stride, 0)
    step = len(used) if device.type != "cpu" else max(1, CACHE_VOXELS // (2 * stride * size * size))
    for index, wavelength in enumerate(gabor.WAVELENGTHS_VOXELS):
        bank = gabor.FilterBank.make(wavelength, (size, size), margin, dtype, device)
        for start in range(0, len(used), step):
            part = slice(start, start + step)
            energies = bank.energies(patches[part].flatten(0, 1)).mul_(own[part].flatten(0, 1))  # (4, S, H, W)
            runs = energies @ across  # a product with 0 and 1 sums every ``stride`` columns
            blocks = runs.view(4, -1, stride, edge, stride, edge).sum((2, 4), dtype=torch.float64)
            sums[used[part], 4 * index : 4 * index + 4] = blocks.transpose(0, 1)
    grid = sums.view(*tiles, len(gabor.NAMES), edge, edge).permute(0, 3, 1, 4, 2)
    return grid.reshape(tiles[0] * edge, tiles[1] * edge, -1)[:rows, :columns]


def _texture(
    volume_hu: Tensor,
    mask: Tensor,
    lattice: _Lattice,
    level_range: tuple[int, int],
    valid: Tensor,
    aggregation: Aggregation,
    mcc: bool,
    chunk_bytes: int,
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Index of some valid sites and their 14 co-occurrence features, NaN where a window holds no pair.

    Block counts are whole numbers, so the sum over the layers of a window is kept by adding the layer that comes in
    and taking off the one that goes out. Columns of sites are done one after the other under the byte budget.
    """
    lowest, size = level_range[0], level_range[1] - level_range[0] + 1
    slots, width = len(DIRECTIONS) if aggregation == "mean" else 1, lattice.blocks_a_window
    layers, rows, columns = lattice.num_blocks
    # int32 of all layers of a window, their sum and its sums along two axes; int64 of a strip while it is counted
    per_row = (columns + width) * slots * ((size + 1) ** 2) * 4 * (width + 5)
    step = max(1, chunk_bytes // per_row - (width - 1))
    for first in range(0, valid.shape[1], step):
        sites = slice(first, min(first + step, valid.shape[1]))
        begin, end = max(0, first - (width - 1)), min(rows, sites.stop)  # rows of blocks
        tile = _Lattice(
            lattice.stride,
            width,
            (lattice.first_block[0], lattice.first_block[1] + begin, lattice.first_block[2]),
            (layers, end - begin, columns),
            lattice.reach,
        )
        held: list[Tensor] = []
        counted = _count_layers(volume_hu, mask, tile, lowest, size, aggregation == "mean")
        shape = (sites.stop - sites.start + width - 1, columns + 2 * (width - 1), slots * size * size)
        running = torch.zeros(shape, dtype=torch.int32, device=mask.device)
        above = begin - (first - (width - 1))
        middle = running[above : above + end - begin, width - 1 : width - 1 + columns]
        for plane in range(layers + width - 1):
            if plane < layers:
                held.append(next(counted))
                middle += held[-1]
            if plane >= width:
                middle -= held.pop(0)
            chosen = valid[plane, sites].nonzero()
            if len(chosen) == 0:
                continue
            windows = _slide(_slide(running, width, 0, torch.add), width, 1, torch.add)
            counts = windows[chosen[:, 0], chosen[:, 1]].view(-1, slots, size, size)
            where = (torch.full_like(chosen[:, 0], plane), chosen[:, 0] + first, chosen[:, 1])
            yield where, _grouped_features(counts, lowest, mcc)


def _count_layers(
    volume_hu: Tensor, mask: Tensor, lattice: _Lattice, lowest: int, size: int, per_direction: bool
) -> Iterator[Tensor]:
    """Pair counts (by, bx, A size^2) of one layer of blocks after the other, int32."""
    _, rows, columns = lattice.num_blocks
    slots = len(DIRECTIONS) if per_direction else 1
    layer_counts: Tensor | None = None
    for _, part, regions, owners in _strips(lattice, mask.device):
        if layer_counts is None:
            layer_counts = torch.zeros((rows, columns, slots * size * size), dtype=torch.int32, device=mask.device)
        lung = _box(mask, regions, False)
        if bool(lung.any()):
            levels = glcm.grey_levels(_box(volume_hu, regions, 0), lung)
            relative = levels - (lowest + size)
            second = (relative * lung.view(torch.uint8).to(torch.int16)).add_(size)
            first = relative.mul_(_own(lung).view(torch.uint8).to(torch.int16)).add_(size)
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


def _slide(regions: Tensor, width: int, axis: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Join of every ``width`` neighbours along an axis, by doubling."""
    length = regions.shape[axis] - width + 1
    result: Tensor | None = None
    span, done = 1, 0
    while True:
        if width & span:
            piece = regions.narrow(axis, done, length)
            result = piece if result is None else join(result, piece)
            done += span
        if 2 * span > width:
            break
        rest = regions.shape[axis] - span
        regions = join(regions.narrow(axis, 0, rest), regions.narrow(axis, span, rest))
        span *= 2
    assert result is not None
    return result


def _windows(blocks: Tensor, width: int, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """Join of the blocks (bz, by, bx, C) of every window that holds one of them, (bz + w - 1, ..., C)."""
    margin = (width - 1, width - 1)
    regions = torch.nn.functional.pad(blocks, (0, 0, *margin, *margin, *margin))
    for axis in range(3):
        regions = _slide(regions, width, axis, join)
    return regions


def _join_moments(one: Tensor, other: Tensor) -> Tensor:
    """``Moments.join`` of moments stacked in the last axis."""
    return Moments(*one.unbind(-1)).join(Moments(*other.unbind(-1))).stacked()

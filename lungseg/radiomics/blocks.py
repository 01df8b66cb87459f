"""A volume cut into blocks that overlapping windows share: where the blocks lie, and how they are joined to windows.

A block is a cube of ``stride`` voxels, a window one of ``blocks_a_window`` blocks. Blocks lie in layers (z), rows (y)
and columns (x). With the neighbourhoods of ``halo=True`` the counts and sums of blocks add up to those of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lungseg.radiomics.windows import items_at_once

Sites = tuple[slice, slice, slice]
"""A box of sites, or of their windows, along z, y and x."""


@dataclass(frozen=True)
class Lattice:
    """The blocks that hold lung, and the sites whose windows reach one."""

    stride: int
    blocks_a_window: int
    first_block: tuple[int, int, int]
    """Number of the first block (z, y, x); block 0 begins with the window of site 0."""
    num_blocks: tuple[int, int, int]
    reach: int
    """Voxels by which block 0 begins before the volume."""

    @classmethod
    def around(cls, mask: Tensor, *, window: int, stride: int) -> Lattice:
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

    def overlap(self, num_sites: Sequence[int]) -> tuple[Sites, tuple[slice, ...]]:
        """Where the windows that hold a block of this lattice and the sites 0 to ``num_sites`` agree, in both.

        Window 0 of the first ends with block 0.
        """
        inner, outer = [], []
        for first, blocks, sites in zip(self.first_block, self.num_blocks, num_sites, strict=True):
            start = first - (self.blocks_a_window - 1)  # site of the first window: its last block is the first one
            stop = first + blocks
            inner.append(slice(max(0, -start), min(stop, sites) - start))
            outer.append(slice(max(0, start), min(stop, sites)))
        return (inner[0], inner[1], inner[2]), tuple(outer)


def box_of(volume: Tensor, regions: Sequence[tuple[int, int]], fill: float | bool) -> Tensor:
    """The voxels of a region, ``fill`` where it reaches out of the volume; contiguous."""
    pads: list[int] = []
    for axis, (start, stop) in enumerate(regions):
        length = volume.shape[axis]
        low, high = min(max(start, 0), length), min(max(stop, 0), length)
        volume = volume.narrow(axis, low, max(high - low, 0))
        missing = min(max(-start, 0), stop - start)
        pads = [missing, (stop - start) - missing - max(high - low, 0), *pads]
    return torch.nn.functional.pad(volume, pads, value=fill).contiguous()


def strips(lattice: Lattice, device: torch.device) -> Iterator[tuple[int, slice, list[tuple[int, int]], Tensor]]:
    """Runs of rows of blocks of one layer whose voxels fit the cache of a CPU; whole layers on other devices.

    Layer, rows, the region of their voxels with one more on each side, and for each (row, column) of that region the
    number of its block within the run.
    """
    layers, rows, columns = lattice.num_blocks
    stride = lattice.stride
    step = items_at_once(stride**3 * columns, device)
    across = (torch.arange(-1, columns * stride + 1, device=device) // stride).clamp(0, columns - 1)
    for layer in range(layers):
        for row in range(0, rows, step):
            count = min(step, rows - row)
            regions = [lattice.region(layer, 0), lattice.region(row, 1, count), lattice.region(0, 2, columns)]
            down = (torch.arange(-1, count * stride + 1, device=device) // stride).clamp(0, count - 1)
            owners = (down[:, None] * columns + across).to(torch.int32)
            yield layer, slice(row, row + count), [(start - 1, stop + 1) for start, stop in regions], owners


def without_margin(box: Tensor) -> Tensor:
    """A box without its margin of one voxel."""
    return box[1:-1, 1:-1, 1:-1]


def own_of(lung: Tensor) -> Tensor:
    """The lung voxels of a box that are not in its margin of one voxel."""
    return torch.nn.functional.pad(without_margin(lung), (1, 1, 1, 1, 1, 1), value=False)


def by_block(box: Tensor, stride: int) -> Tensor:
    """Voxels of a layer of blocks (s, rows s, columns s) as (blocks, s^3)."""
    rows, columns = box.shape[1] // stride, box.shape[2] // stride
    return box.view(stride, rows, stride, columns, stride).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)


def tile_of(
    lattice: Lattice, inner: Sites, sites: Sites, cells: int, device: torch.device
) -> tuple[Lattice, Tensor, Tensor]:
    """The blocks in the windows of some rows and columns of sites, and zeros to add their counts of pairs up in.

    Parameters
    ----------
    inner : Sites
        Windows that are wanted at all; ``sites`` is counted from the first of them.
    cells : int
        Counts of a block.

    Returns
    -------
    Lattice
        Those blocks, in all layers.
    int32 tensor, shape (rows + w - 1, columns + w - 1, cells)
        Zeros for each block of each window, also for those outside ``lattice``.
    int32 tensor, shape (rows, columns, cells) of blocks of the lattice returned
        The part of it that stands for them, a view.
    """
    margin = lattice.blocks_a_window - 1
    first, count = list(lattice.first_block), list(lattice.num_blocks)
    shape, place = [], []
    for axis in (1, 2):
        start = inner[axis].start + sites[axis].start - margin  # the first block of their windows, and the last + 1
        stop = inner[axis].start + sites[axis].stop
        begin, end = max(0, start), min(lattice.num_blocks[axis], stop)
        first[axis], count[axis] = first[axis] + begin, end - begin
        shape.append(stop - start)
        place.append(slice(begin - start, end - start))
    part = replace(lattice, first_block=(first[0], first[1], first[2]), num_blocks=(count[0], count[1], count[2]))
    running = torch.zeros((*shape, cells), dtype=torch.int32, device=device)
    return part, running, running[tuple(place)]


def slide(regions: Tensor, width: int, axis: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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


def join_windows(
    blocks: Tensor, width: int, ends: tuple[int, int], join: Callable[[Tensor, Tensor], Tensor] = torch.add
) -> Tensor:
    """Join of the blocks (bz, by, bx, C) of every window that holds one of each row and column.

    Parameters
    ----------
    ends : 2 ints
        Layers without lung to put before and behind; windows lie within these bz + sum(ends) layers.

    Returns
    -------
    tensor, shape (bz + sum(ends) - w + 1, by + w - 1, bx + w - 1, C)
    """
    margin = (width - 1, width - 1)
    regions = torch.nn.functional.pad(blocks, (0, 0, *margin, *margin, *ends))
    for axis in range(3):
        regions = slide(regions, width, axis, join)
    return regions

"""Blocks, and the windows they are joined to, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lungseg.radiomics.blocks import Lattice, box_of, by_block, join_windows, slide, strips, tile_of


@pytest.mark.parametrize("width", range(1, 10))
def test_slide_joins_every_run_of_neighbours_once(width: int) -> None:
    """Sums, and a join that is no sum: the highest."""
    values = torch.from_numpy(np.random.default_rng(width).integers(0, 10**6, (3, 13, 2)))
    runs = values.unfold(1, width, 1)
    assert torch.equal(slide(values, width, 1, torch.add), runs.sum(-1))
    assert torch.equal(slide(values, width, 1, torch.maximum), runs.amax(-1))


@pytest.mark.parametrize("ends", [(0, 0), (2, 2), (1, 0)])
def test_windows_are_joined_from_their_blocks(ends: tuple[int, int]) -> None:
    blocks = torch.arange(4 * 3 * 5 * 2).view(4, 3, 5, 2)
    found = join_windows(blocks, 3, ends)
    assert found.shape == (4 + sum(ends) - 2, 5, 7, 2)
    for z, y, x in np.ndindex(*found.shape[:3]):
        first = (z - ends[0], y - 2, x - 2)
        box = tuple(slice(max(0, start), max(0, start + 3)) for start in first)
        assert torch.equal(found[z, y, x], blocks[box].sum((0, 1, 2)))


def test_box_reaches_out_of_the_volume() -> None:
    volume = torch.arange(1, 25).view(2, 3, 4)
    assert box_of(volume, [(-1, 3), (1, 2), (3, 6)], 0).tolist() == [
        [[0, 0, 0]], [[8, 0, 0]], [[20, 0, 0]], [[0, 0, 0]],
    ]  # fmt: skip
    assert box_of(volume, [(5, 7), (-4, -1), (0, 1)], 9).tolist() == [[[9]] * 3] * 2


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (16, 8), (12, 4), (15, 5)])
def test_every_lung_voxel_is_in_one_block(window: int, stride: int) -> None:
    mask = torch.zeros((23, 31, 40), dtype=torch.bool)
    mask[5, 2:20, 3:37] = mask[17, 30, 11] = True
    lattice = Lattice.around(mask, window=window, stride=stride)
    assert sum(
        int(box_of(mask, [lattice.region(block[axis], axis) for axis in range(3)], False).sum())
        for block in np.ndindex(*lattice.num_blocks)
    ) == int(mask.sum())
    seen = 0
    for _, rows, regions, owners in strips(lattice, torch.device("cpu")):
        inner = box_of(mask, [(start + 1, stop - 1) for start, stop in regions], False)
        inside = by_block(inner, stride)
        assert len(inside) == (rows.stop - rows.start) * lattice.num_blocks[2]
        # owners number the blocks as by_block does
        counted = torch.bincount(owners[1:-1, 1:-1].expand_as(inner)[inner], minlength=len(inside))
        assert torch.equal(counted, inside.sum(1))
        seen += int(inner.sum())
    assert seen == int(mask.sum())


def test_tiles_hold_the_blocks_of_their_windows() -> None:
    """The sums over tiles of sites equal those over the whole plane."""
    lattice = Lattice(stride=8, blocks_a_window=3, first_block=(0, 4, 1), num_blocks=(1, 5, 6), reach=8)
    values = torch.arange(30, dtype=torch.int32).view(5, 6, 1)
    whole = join_windows(values[None], 3, (2, 2))[0]
    inner = (slice(0, 1), slice(1, 7), slice(0, 8))
    for rows, columns in itertools.product((slice(0, 2), slice(2, 6)), (slice(0, 8), slice(5, 6))):
        part, running, middle = tile_of(lattice, inner, (slice(None), rows, columns), 1, torch.device("cpu"))
        begin = [part.first_block[axis] - lattice.first_block[axis] for axis in (1, 2)]
        own = tuple(slice(b, b + n) for b, n in zip(begin, part.num_blocks[1:], strict=True))
        middle += values[own]
        found = slide(slide(running, 3, 0, torch.add), 3, 1, torch.add)
        assert torch.equal(found, whole[inner[1], inner[2]][rows, columns])

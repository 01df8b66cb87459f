"""Masks and label maps that come with a scan: on its grid, and with labels that mean something."""

from __future__ import annotations

from collections.abc import Collection
from itertools import permutations, product

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.orientation import move_axes
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry, Volume

GRID_TOLERANCE_VOXELS = 0.1
"""Largest distance of corresponding corners on what counts as one grid. RELIABILITY row 33."""
MAX_LISTED = 10


def onto_grid(mask: Volume, grid: Geometry, *, allow_resample: bool, name: str) -> np.ndarray:
    """The labels of a mask at the voxels of a scan.

    Parameters
    ----------
    mask : Volume
        bool or integer labels.
    grid : Geometry
        Of the scan.
    allow_resample : bool
        Accept a mask on any other grid: nearest neighbour, 0 outside of it.
    name : str
        What is being read, for the message.

    Returns
    -------
    array, shape of ``grid``, dtype of the mask
        Exact, without interpolation, if both are one physical grid: corners within 0.1 voxel of each other, axes
        permuted or flipped or not. An empty mask stays empty.

    Raises
    ------
    InputError
        If the grids differ and ``allow_resample`` is off (both are printed), or no labelled voxel lies in the scan.

    Notes
    -----
    A mask cropped to a part of the scan's grid counts as another grid: whether its surroundings are outside the lung
    or were not looked at cannot be told. With ``allow_resample`` its voxels are taken over exactly.

    Source
    ------
    RELIABILITY rows 33, 35.
    """
    moved = _same_grid(mask, grid)
    if moved is not None:
        return moved
    if not allow_resample:
        raise InputError(
            f"{name}: the mask lies on another grid than its scan.\n  mask: {describe(mask.geometry)}\n"
            f"  scan: {describe(grid)}\nGive the mask of this scan, or accept the nearest voxels with --resample-masks"
        )
    out = resample_onto(mask.array, mask.geometry, grid, kind="mask", fill=0)
    if mask.array.any() and not out.any():
        raise InputError(
            f"{name}: no labelled voxel of the mask lies in its scan: it belongs to another scan, or its origin is "
            f"wrong.\n  mask: {describe(mask.geometry)}\n  scan: {describe(grid)}"
        )
    return out


def check_labels(mask: np.ndarray, allowed: Collection[int], name: str) -> dict[int, int]:
    """Make sure that a label map holds nothing but labels that mean something.

    Parameters
    ----------
    mask : bool, integer or float array
        Label map; floats must be whole numbers.
    allowed : collection of int
        Labels that may occur; 0 (outside) always may.
    name : str
        What is being read, for the message.

    Returns
    -------
    dict
        Voxels of each label that occurs, 0 left out, ascending; empty for an empty mask.

    Raises
    ------
    InputError
        If other values occur; lists them with their voxels, and what is allowed.

    Source
    ------
    RELIABILITY rows 34, 35.
    """
    values, counts = np.unique(mask, return_counts=True)
    allowed = {0, *allowed}
    wrong = [(v, n) for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v not in allowed]
    if wrong:
        listed = ", ".join(f"{v:g} ({n} voxels)" for v, n in wrong[:MAX_LISTED])
        more = f" and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        raise InputError(
            f"{name}: unexpected labels {listed}{more}; allowed are {', '.join(str(v) for v in sorted(allowed))}. "
            "Map or remove the others, or check that this is the right file"
        )
    return {int(v): int(n) for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v}


def describe(geometry: Geometry) -> str:
    """A grid in one line: shape, spacing, origin and direction, in the order of our axes."""
    shape = " x ".join(str(n) for n in geometry.shape)
    spacing = " x ".join(f"{s:.5g}" for s in geometry.spacing_mm)
    origin = ", ".join(f"{v:.3f}" for v in geometry.origin_mm)
    direction = "; ".join(", ".join(f"{v:.4f}" for v in row) for row in geometry.direction)
    return f"{shape} voxels (z, y, x), spacing {spacing} mm, origin (S, P, L) {origin} mm, direction [{direction}]"


def _same_grid(mask: Volume, grid: Geometry) -> np.ndarray | None:
    """The mask with its axes in the order of ``grid``, or None if no order and direction makes both one grid."""
    for axes in permutations(range(3)):
        if tuple(mask.geometry.shape[a] for a in axes) != grid.shape:
            continue
        for flips in product((False, True), repeat=3):
            if move_axes(mask.geometry, axes, flips).is_close(grid, tolerance_voxels=GRID_TOLERANCE_VOXELS):
                moved = np.flip(mask.array.transpose(axes), tuple(i for i in range(3) if flips[i]))
                return np.ascontiguousarray(moved)
    return None

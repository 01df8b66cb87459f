"""Repairs of a stack of HU slices: shearing back a gantry tilt, filling missing slices, evening out the spacing.

All interpolation is linear. Where one of the two values is padding, the nearer one is taken instead, so that
padding never mixes into tissue (dcm2niix does so after issue 262).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lungseg.scan.volume import AIR_HU

WHOLE_PIXEL = 1e-3
"""A shift this near to whole pixels moves values without interpolating them."""


def blend(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """``(1 - weight) * first + weight * second``, rounded; next to padding the nearer of the two.

    Parameters
    ----------
    first, second : int16 arrays of one shape
        HU, padding at -1024.
    weight : float
        From 0 to 1.

    Returns
    -------
    int16 array of that shape
    """
    mixed = first.astype(np.float32)
    mixed += np.float32(weight) * (second.astype(np.float32) - mixed)
    nearer = first if weight < 0.5 else second
    padded = (first <= AIR_HU) | (second <= AIR_HU)
    return np.where(padded, nearer, np.rint(mixed).astype(np.int16))


def shear_slice(values: np.ndarray, shift: tuple[float, float], out: np.ndarray) -> None:
    """Write a slice into a larger one, moved by a fraction of pixels; the rest of it becomes -1024.

    Parameters
    ----------
    values : int16 array, shape (rows, columns)
        HU.
    shift : (float, float)
        By how many rows and columns to move it, zero or more.
    out : int16 array, shape (rows + ceil(shift), columns + ceil(shift)) or larger
        Receives it.
    """
    for axis in (0, 1):
        whole = round(shift[axis])
        if abs(shift[axis] - whole) < WHOLE_PIXEL:
            fraction = 0.0
        else:
            whole = int(np.floor(shift[axis]))
            fraction = shift[axis] - whole
        room = out.shape[axis] - whole - values.shape[axis]
        before = [(0, 0), (0, 0)]
        before[axis] = (whole, room)
        moved = np.pad(values, before, constant_values=AIR_HU)
        if fraction:
            neighbour = np.roll(moved, 1, axis)  # what rolls round is padding: there is room for the fraction
            moved = blend(moved, neighbour, fraction)
        values = moved
    out[...] = values


def fill_gaps(array: np.ndarray, present: Sequence[int]) -> None:
    """Interpolate the missing slices of a stack in place.

    Parameters
    ----------
    array : int16 array, shape (N, rows, columns)
        HU; only the slices of ``present`` hold anything.
    present : ints
        Indices of the slices that are there, ascending, from 0 to N - 1: nothing is extrapolated.
    """
    for before, after in pairwise(present):
        for k in range(before + 1, after):
            array[k] = blend(array[before], array[after], (k - before) / (after - before))


def respace(array: np.ndarray, positions_mm: Sequence[float]) -> np.ndarray:
    """Slices at uneven positions interpolated to as many even ones between the first and the last.

    Parameters
    ----------
    array : int16 array, shape (N, rows, columns)
        HU.
    positions_mm : floats
        Of the N slices along their normal, ascending.

    Returns
    -------
    int16 array, shape (N, rows, columns)
    """
    even = np.linspace(positions_mm[0], positions_mm[-1], len(positions_mm))
    index = np.interp(even, positions_mm, np.arange(len(positions_mm)))
    out = np.empty_like(array)
    for k, at in enumerate(index):
        below = min(int(at), len(array) - 2)
        out[k] = blend(array[below], array[below + 1], float(at - below))
    return out

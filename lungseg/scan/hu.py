"""What every reader does with voxel values: size check, conversion to int16 HU, and a look whether they are HU."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from lungseg.errors import InputError, ResourceError
from lungseg.scan.volume import AIR_HU

MAX_HU = int(np.iinfo(np.int16).max)
"""Largest value kept; only metal comes near it."""
LOW_HU = -500
"""Every chest CT has voxels below this (lung, airways, air around the patient)."""
TISSUE_HU = -200
"""Nearly every chest CT has voxels above this (vessels, muscle), even one cropped tightly to the lungs."""
MIN_TISSUE_SHARE = 0.01
"""Least share of such voxels among those that are not padding; a scan shifted by -1024 keeps only dense bone."""
SHIFT_HU = 1024
"""Intercept of most CT: what a scan is off by if it is forgotten or applied twice."""
AIR_MODE_TOLERANCE_HU = 150
"""How far from 0 or +24 the lowest mode of a shifted scan may lie (air is -1000, but noisy and often clipped)."""
WATER_HU = 150
SHIFTED_TISSUE_SHARE = 0.15
"""Least share of voxels within 150 HU of water once the shift is undone: 0.42-0.57 in three chest CTs, 0-0.06 in
three MR images."""
CLIPPED_SHARE = 0.005
"""Share of voxels at exactly the lowest value from which on the scan counts as clipped at its source, if they also
outnumber those up to ``MODE_BIN_HU`` above it: a pile, not a tail."""
MODE_BIN_HU = 10
MODE_SHARE = 0.002
MODE_SAMPLES = 2_000_000
"""Width of the histogram bins, least share of a mode, and about how many voxels are looked at for it."""
COPIES = 2
"""Arrays of the full size alive at once while reading (before and after the axes are moved)."""


def require_memory(shape: Sequence[int], dtype: type[np.generic], *, name: str) -> None:
    """Refuse a volume that this machine could not hold, before anything is allocated.

    Parameters
    ----------
    shape : ints
        Declared by a header, so not to be trusted.
    dtype : numpy scalar type
        Type of one voxel.
    name : str
        What is being read, for the message.

    Raises
    ------
    ResourceError
        If twice the array exceeds the physical memory.
    """
    needed = COPIES * math.prod(int(n) for n in shape) * np.dtype(dtype).itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**36
    if needed > memory:
        raise ResourceError(
            f"{name}: its header declares {' x '.join(str(n) for n in shape)} voxels, which need "
            f"{needed / 2**30:.1f} GiB; this machine has {memory / 2**30:.1f} GiB. Check the header, or crop the scan"
        )


def allocate(shape: Sequence[int], dtype: type[np.generic], *, name: str) -> np.ndarray:
    """An uninitialised array for a volume, after ``require_memory``."""
    require_memory(shape, dtype, name=name)
    return np.empty(tuple(shape), dtype)


def to_hu(values: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    """Write values into an int16 array as HU, clipped to [-1024, 32767] without ever wrapping round.

    Parameters
    ----------
    values : integer or finite float array
        Rescaled values; fractions are rounded to the nearest.
    out : int16 array of the same shape
        Receives them.

    Returns
    -------
    (int, int)
        How many voxels lay below -1024 HU (padding) and above 32767 HU.

    Source
    ------
    METHOD 0.2; RELIABILITY rows 14, 15.
    """
    if values.dtype.kind == "f":
        wide = np.rint(values)
    else:
        wide = values.astype(np.int64 if values.dtype.itemsize >= 4 else np.int32, copy=False)
    low, high = int(np.count_nonzero(wide < AIR_HU)), int(np.count_nonzero(wide > MAX_HU))
    out[...] = np.clip(wide, AIR_HU, MAX_HU)
    return low, high


def clip_notes(low: int, high: int, total: int) -> tuple[str, ...]:
    """Words for the counts of ``to_hu``; empty if nothing was clipped."""
    notes = []
    if low:
        notes.append(f"{100 * low / total:.2g} % of voxels lay below {AIR_HU} HU (padding) and were set to it")
    if high:
        notes.append(f"{100 * high / total:.2g} % of voxels lay above {MAX_HU} HU and were set to it")
    return tuple(notes)


def _lowest_mode(values: np.ndarray) -> float:
    """Centre of the lowest histogram peak that holds a fair share of the voxels (the air of a CT)."""
    low = int(values.min())
    counts = np.bincount((values.astype(np.int32) - low) // MODE_BIN_HU)
    padded = np.concatenate([[0], counts, [0]])
    peak = (counts >= padded[:-2]) & (counts >= padded[2:]) & (counts >= MODE_SHARE * values.size)
    return low + MODE_BIN_HU * (float(np.flatnonzero(peak)[0]) + 0.5) if peak.any() else float(low)


def check_hu(array: np.ndarray) -> tuple[str, ...]:
    """Make sure that the values of a chest CT can be Hounsfield units.

    Parameters
    ----------
    array : int16 array, shape (Z, Y, X)
        HU, padding at -1024; that value is left out of the judgement.

    Returns
    -------
    tuple of str
        Notes for the user, for instance that the scan was clipped at its source. Empty if nothing is odd.

    Raises
    ------
    InputError
        If no voxel lies below -500 HU, or hardly any above -200 HU; names the offset if one explains it.

    Source
    ------
    RELIABILITY row 31; METHOD 0.2 (truncation biases low-attenuation measures).
    """
    step = max(1, math.ceil((array.size / MODE_SAMPLES) ** (1 / 3)))
    sample = array[::step, ::step, ::step]
    sample = sample[sample > AIR_HU]
    lowest = int(array.min(initial=MAX_HU, where=array > AIR_HU))
    if sample.size == 0:
        raise InputError(f"no image: every voxel is {AIR_HU} HU or less")
    if lowest >= LOW_HU:
        mode = _lowest_mode(sample)
        tissue = np.count_nonzero(np.abs(sample.astype(np.int32) - SHIFT_HU) < WATER_HU) / sample.size
        if abs(mode) <= AIR_MODE_TOLERANCE_HU and tissue >= SHIFTED_TISSUE_SHARE:
            raise InputError(
                f"the values look shifted by +{SHIFT_HU}: air lies near {mode:+.0f} instead of -1000 HU. "
                f"Subtract {SHIFT_HU} (the rescale intercept was not applied)"
            )
        raise InputError(
            f"the values are not HU: they run from {lowest} to {int(array.max())} and none lies below {LOW_HU}, "
            "as air and lung do in CT. Convert the scan to Hounsfield units first"
        )
    if np.count_nonzero(sample > TISSUE_HU) < MIN_TISSUE_SHARE * sample.size:
        raise InputError(
            f"the values look shifted by -{SHIFT_HU}: hardly any lies above {TISSUE_HU} HU, as soft tissue does. "
            f"Add {SHIFT_HU} (the rescale intercept was applied twice?), or leave more than the lung in the scan"
        )
    share = np.count_nonzero(sample == lowest) / sample.size
    tail = np.count_nonzero((sample > lowest) & (sample <= lowest + MODE_BIN_HU)) / sample.size
    if lowest > AIR_HU + 1 and share > max(CLIPPED_SHARE, tail):
        return (f"{100 * share:.2g} % of voxels hold exactly {lowest} HU, the lowest value: clipped at the source",)
    return ()

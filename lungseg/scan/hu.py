"""What every reader does with voxel values: size check, conversion to int16 HU, and a look whether they are HU."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lungseg.errors import InputError, ResourceError
from lungseg.scan.hu_model import NEAR_HU, Explanation, explain, find_piles
from lungseg.scan.volume import AIR_HU

MAX_HU = int(np.iinfo(np.int16).max)
"""Largest value kept; only metal comes near it."""
MIN_HU = int(np.iinfo(np.int16).min)
LOW_HU = -500
"""Every chest CT has voxels below this (lung, airways, air around the patient)."""
SHIFT_HU, SHIFT_TOLERANCE_HU = 1024, 40
"""Intercept of most CT: what a scan is off by if it is forgotten or applied twice. Offsets this near are named so."""
REFUSE_GAIN, REFUSE_GAIN_UNUSUAL = 25.0, 40.0
"""Evidence from which another reading of the values refuses a scan: 5 is the most that any offset beyond 150 HU, factor
or inversion has for a chest CT in HU (22 with noise of 250 HU), 29 the least it has where it is true
(``hu_model.explain``). The second for readings that nobody arrives at by a forgotten rescale, and that streaks or dense
lungs come near to (38); where true they have 48, a factor of 2 or 0.5 38."""
USUAL_OFFSET_HU, USUAL_FACTOR, LEAST_FACTOR = 400, 2.5, 1.9
"""Offsets up to the first, factors up to the second (and down to its inverse) are such readings. Factors below the
third refuse nothing: a scan in deep expiration can look like 0.67."""
NOTE_GAIN = 15.0
"""Evidence from which it is mentioned."""
CLIPPED_SHARE = 0.005
"""Share of voxels at exactly the lowest value from which on the scan counts as clipped at its source, if they also
outnumber those up to ``MODE_BIN_HU`` above it: a pile, not a tail."""
MODE_BIN_HU = 10
SLICE_SAMPLES = 65_536
"""About how many voxels of a slice enter a ``HuTally``."""
AIR_NOISE_HU = -1200
"""Air (-1000) and its noise reach down to about this: values between are set to -1024 without loss of tissue."""
LOST_SHARE = 0.04
"""Share of voxels outside padding and outside the range that is kept from which a scan gets the status ``clipped``.
RELIABILITY row 15."""
OUTLIER_HU, MIN_INSIDE_SHARE = 4096, 0.6
"""Values above the first, or below air and its noise, are no chest (12-bit CT ends at 3071): interpolated padding, or
values that wrapped round. If at least this share of the voxels is within, they may be a chest in HU all the same; if
less, they are none."""
COPIES = 2
"""Arrays of the full size alive at once while reading (before and after the axes are moved)."""


@dataclass
class HuTally:
    """What is known of the values of a scan before they are clipped; filled by ``to_hu``, slice by slice."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(MAX_HU - MIN_HU + 1, np.int64))
    """Histogram of a regular sample: voxels of each whole value from -32768 to 32767."""
    minimum: float = math.inf
    maximum: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        """Count a slice (finite values, before rounding and clipping)."""
        if not values.size:
            return
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        step = math.ceil(math.sqrt(values.size / SLICE_SAMPLES))
        sample = values[(slice(None, None, step),) * values.ndim]
        whole = np.clip(np.rint(sample) if sample.dtype.kind == "f" else sample, MIN_HU, MAX_HU).astype(np.int64)
        self.counts += np.bincount((whole - MIN_HU).ravel(), minlength=len(self.counts))


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


def to_hu(values: np.ndarray, out: np.ndarray, tally: HuTally | None = None) -> tuple[int, int]:
    """Write values into an int16 array as HU, clipped to [-1024, 32767] without ever wrapping round.

    Parameters
    ----------
    values : integer or finite float array
        Rescaled values; fractions are rounded to the nearest.
    out : int16 array of the same shape
        Receives them.
    tally : HuTally, optional
        Counts the values as they are: ``check_hu`` and ``clip_status`` know more with it.

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
    if tally is not None:
        tally.add(values)
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


def clip_status(tally: HuTally) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whether more than padding and noise was clipped.

    Parameters
    ----------
    tally : HuTally
        Of the whole scan.

    Returns
    -------
    (tuple of str, tuple of str)
        Notes and words of ``STATUS_WORDS``; both empty if at most 4 % of the voxels outside padding were clipped.

    Notes
    -----
    Padding is a pile: one value below -1024 that holds far more voxels than its neighbours (-2000, -2048, -3024).
    Values from -1200 to -1024 are noise of air. What lies below that and is spread, or at 32767 and above, was clipped.

    Source
    ------
    RELIABILITY rows 14, 15.
    """
    below = tally.counts[: AIR_HU - MIN_HU]
    padding = below * _padding(tally.counts)[: len(below)]
    lost = int((below - padding)[: AIR_NOISE_HU - MIN_HU].sum()) + int(tally.counts[-1])
    kept = int(tally.counts.sum() - padding.sum())
    if lost <= LOST_SHARE * kept:
        return (), ()
    note = (
        f"{100 * lost / kept:.2g} % of the voxels outside padding lay outside {AIR_NOISE_HU} to {MAX_HU} HU and were "
        "clipped: the values may have wrapped round, or have a wrong slope or intercept"
    )
    return (note,), ("clipped",)


def _padding(counts: np.ndarray) -> np.ndarray:
    """Which values of a histogram from -32768 to 32767 are piles of padding or of a clipping bound."""
    return find_piles(counts) | (np.arange(len(counts)) + MIN_HU == AIR_HU)


def check_hu(array: np.ndarray, tally: HuTally) -> tuple[str, ...]:
    """Make sure that the values of a chest CT can be Hounsfield units.

    Parameters
    ----------
    array : int16 array, shape (Z, Y, X)
        HU, padding at -1024; that value is left out of the judgement.
    tally : HuTally
        The same values before they were clipped.

    Returns
    -------
    tuple of str
        Notes for the user, for instance that the scan was clipped at its source, or that the values may be shifted.
        Empty if nothing is odd.

    Raises
    ------
    InputError
        If an offset beyond 150 HU, a factor or inverted contrast explains the values clearly better (it is named), if
        most voxels are out of all range, or if none lies below -500 HU.

    Source
    ------
    RELIABILITY row 31; METHOD 0.2 (truncation biases low-attenuation measures).
    """
    note = _judge(tally.counts)
    _refuse_out_of_range(tally.counts)
    # plane by plane: a mask of the whole scan would cost half as much memory as the scan
    lowest = min((int(p.min(initial=MAX_HU, where=p > AIR_HU)) for p in array), default=MAX_HU)
    kept = tally.counts[AIR_HU + 1 - MIN_HU :]
    if not kept.any():
        raise InputError(f"no image: every voxel is {AIR_HU} HU or less")
    if lowest >= LOW_HU:
        low, high = tally.minimum, tally.maximum
        raise InputError(
            f"the values are not HU: they run from {low:g} to {high:g} and none{_but_padding(low)} lies below "
            f"{LOW_HU}, as air and lung do in CT. {_window(low, high)}If it is a CT, convert it to Hounsfield units"
        )
    at = max(0, lowest - AIR_HU - 1)
    share, tail = kept[at] / kept.sum(), kept[at + 1 : at + 1 + MODE_BIN_HU].sum() / kept.sum()
    if lowest > AIR_HU + 1 and share > max(CLIPPED_SHARE, tail):
        note += (f"{100 * share:.2g} % of voxels hold exactly {lowest} HU, the lowest value: clipped at the source",)
    return note


def _judge(counts: np.ndarray) -> tuple[str, ...]:
    """Refuse a histogram that another offset, factor or sign explains; a note if that is only likely."""
    counts = np.where(_padding(counts), 0, counts)
    values = np.flatnonzero(counts)
    found = explain(values + MIN_HU, counts[values])
    if found is None or found.gain < NOTE_GAIN or (found.scale == 1.0 and abs(found.offset_hu) <= NEAR_HU):
        return ()
    what, fix = _words(found)
    has_outliers = _is_chest_with_outliers(values + MIN_HU, counts[values])
    # lungs of a scan multiplied by 2 lie where outliers do; a shifted or inverted one leaves nothing like a chest
    is_sure = found.gain >= _refuse_gain(found) and not (has_outliers and abs(found.scale) == 1.0)
    if is_sure and found.is_chest:
        raise InputError(f"the values look {what}. {fix}")
    if has_outliers:
        return ()
    if not found.is_chest:
        return ("the histogram does not look like that of a chest CT in HU",)
    return (f"the values may be {what}: look at fat (-100 HU) and muscle (50 HU)",)


def _refuse_out_of_range(counts: np.ndarray) -> None:
    """Refuse values of which most are no HU of anything, though no single offset or factor explains them."""
    counts = np.where(_padding(counts), 0, counts)
    inside = counts[AIR_NOISE_HU - MIN_HU : OUTLIER_HU - MIN_HU + 1].sum()
    if inside < MIN_INSIDE_SHARE * counts.sum():
        raise InputError(
            f"the values are not HU: only {100 * inside / counts.sum():.2g} % of them lie between {AIR_NOISE_HU} and "
            f"{OUTLIER_HU}. The order of their bytes, or their type, may be wrong; convert the scan again"
        )


def _refuse_gain(found: Explanation) -> float:
    """Evidence needed to refuse a scan for this reading of its values."""
    factor = max(abs(found.scale), 1 / abs(found.scale))
    if 1 < factor < LEAST_FACTOR:
        return math.inf
    is_usual = abs(found.offset_hu) > USUAL_OFFSET_HU if factor == 1 else factor > USUAL_FACTOR
    return REFUSE_GAIN if is_usual or found.scale < 0 else REFUSE_GAIN_UNUSUAL


def _is_chest_with_outliers(values: np.ndarray, counts: np.ndarray) -> bool:
    """Whether most voxels are a chest in HU and only the rest, which ``clip_status`` reports, is out of all range."""
    inside = (values >= AIR_NOISE_HU) & (values <= OUTLIER_HU)
    if counts[inside].sum() < MIN_INSIDE_SHARE * counts.sum():
        return False
    found = explain(values[inside], counts[inside])
    return found is not None and found.gain < NOTE_GAIN and found.is_chest


def _words(found: Explanation) -> tuple[str, str]:
    """What is wrong with the values, and what to do about it."""
    if found.scale < 0:
        return "inverted (air is bright)", "Invert them back to Hounsfield units"
    if found.scale != 1.0 and abs(found.offset_hu) > USUAL_OFFSET_HU:
        what = f"multiplied by about {found.scale:g} before the rescale intercept was added"
        return what, f"Divide the rescale slope by {found.scale:g}"
    if found.scale != 1.0:
        return f"multiplied by about {found.scale:g}", f"Divide by {found.scale:g} (the rescale slope is wrong?)"
    offset, about = found.offset_hu, "about "
    if abs(abs(offset) - SHIFT_HU) <= SHIFT_TOLERANCE_HU:
        offset, about = int(math.copysign(SHIFT_HU, offset)), ""
    if offset > 0:
        why = "was the rescale intercept not applied?"
        return (
            f"shifted by {about}+{offset} HU: air lies near {offset - 1000:+d} instead of -1000",
            f"Subtract {offset} ({why})",
        )
    why = "was the rescale intercept applied twice?"
    return (
        f"shifted by {about}{offset} HU: soft tissue lies near {offset + 40:+d} instead of +40",
        f"Add {-offset} ({why})",
    )


def _but_padding(low: float) -> str:
    return f" (but padding at {low:g})" if low < LOW_HU else ""


def _window(low: float, high: float) -> str:
    """Words for ranges that pictures have."""
    if low >= -1 and high <= 1:
        return "They look normalised to 0-1 or -1-1. "
    if low >= 0 and high <= 255:
        return "They look like a picture, windowed to 0-255. "
    return ""

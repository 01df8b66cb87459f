"""Is the volume that a reader made of a mutant a fair one? The rules of the fuzz, written once.

A refusal (any ``LungsegError``) is always fair: a mutant is a damaged scan. A volume is judged against the healthy
scan it was made from:

* **right**: the same grid (within the readers' own tolerances) and the same voxels.
* **shorter**: slices at an end of the stack are missing whose files were changed so that nothing tells that they
  belonged to it (removed, or said to be of another series). Never inside the stack, never an untouched slice.
* **unnoticeable**: it differs, but nothing redundant gives it away: bytes within the pixels of a DICOM slice (no
  transfer syntax has a checksum) or of an image file without compression; a slope or intercept of one slice that is
  possible by itself; in an image file, orientation, origin or scale where the header says them only once and they are
  plausible. A slice inside the stack that stands ``JUMP_HU`` above or below where it belongs is always noticeable.
* **said so**: it differs and the reader says so: a word in ``status`` or ``notes``.
* everything else is **wrong**: another shape, order, spacing, place or scale accepted without a word although other
  slices, sizes, a second field or the range of HU give it away.

Per-slice rescale is legal (RELIABILITY row 13), so a slope or intercept in one slice is refused only where it is
impossible or the slice then stands ``JUMP_HU`` above or below both neighbours. CT slices next to each other have air,
fat and tissue at the same HU, so that the median difference of neighbours is small whatever the anatomy.
"""

from __future__ import annotations

import numpy as np
from fuzz_bases import chest
from fuzz_mutant import Expectation

from lungseg.scan.volume import Volume

RIGHT, SHORTER, UNNOTICEABLE, SAID_SO = "right", "shorter", "unnoticeable", "said so"
PLACE_VOXELS = 0.26
"""Largest shift of the grid: a reader may accept one slice shifted sideways by a quarter of a pixel."""
SPACING_SHARE = 0.011
"""Largest relative deviation of a spacing: readers accept gaps that differ by 1 % (RELIABILITY row 7)."""
ANGLE = 2e-3
JUMP_HU = 300.0
"""A slice whose voxels lie this far (in the median) from where they belong is given away by its neighbours."""
END_JUMP_HU = 2000.0
"""The same for the first and last slice, which have one neighbour: a sagittal stack may end just outside the body, so
that a jump from tissue to air is no sign of damage."""


def judge(volume: Volume, expect: Expectation, others: tuple[str, ...] = ()) -> tuple[str, str]:
    """Verdict and reason; the verdict 'wrong' is a defect of the reader. ``others`` is what was said to be left out."""
    if volume.array.dtype != np.int16:
        return "wrong", f"dtype {volume.array.dtype}"
    if expect.must_refuse:
        return ("wrong", "accepted although impossible")
    words = " / ".join((*volume.status, *volume.notes))
    place = _first_slice(volume, expect)
    if isinstance(place, str):
        if volume.status or (expect.forms == "qs" and volume.notes):
            return SAID_SO, words
        if expect.header and expect.forms != "qs" and volume.array.shape == expect.geometry.shape and _same(volume):
            return UNNOTICEABLE, "given once: " + place
        return "wrong", place
    axis = expect.slice_axis
    got = np.moveaxis(volume.array, axis, 0)
    truth = np.moveaxis(chest(), axis, 0)
    missing = set(range(len(truth))) - set(range(place, place + len(got)))
    if missing and not ((expect.may_vanish or others) and missing <= expect.touched):
        return "wrong", f"slices {sorted(missing)} of {len(truth)} are missing without a word"
    truth = truth[place : place + len(got)]
    differing = [k for k in range(len(got)) if not np.array_equal(got[k], truth[k])]
    untouched = [k + place for k in differing if k + place not in expect.touched]
    if untouched:
        return "wrong", f"voxels of untouched slices {untouched} differ"
    if not differing:
        return (SHORTER, f"without {sorted(missing)}") if missing else (RIGHT, words)
    if volume.status:
        return SAID_SO, words
    for k in differing:
        jump = float(np.median(got[k].astype(float) - truth[k]))
        limit = JUMP_HU if 0 < k < len(got) - 1 else END_JUMP_HU
        if abs(jump) > limit and len(differing) < len(got):
            return "wrong", f"slice {k + place} stands {jump:+.0f} HU off its neighbours"
        if k + place not in expect.free and not _is_rescaled(got[k], truth[k]):
            return "wrong", f"voxels of slice {k + place} are not those of the file (median {jump:+.0f} HU)"
    return UNNOTICEABLE, f"{'voxels' if expect.free else 'rescale'} of {len(differing)} slices"


def _same(volume: Volume) -> bool:
    """Whether the voxels are those of the chest, in any order of axes: only the geometry was changed."""
    return bool(np.array_equal(np.sort(volume.array, axis=None), np.sort(chest(), axis=None)))


def _first_slice(volume: Volume, expect: Expectation) -> int | str:
    """Number of the true slice that came first, or in what the grid differs."""
    grid, truth = volume.geometry, expect.geometry
    axis = expect.slice_axis
    for a in range(3):
        if a != axis and grid.shape[a] != truth.shape[a]:
            return f"shape {grid.shape} for {truth.shape}"
        if abs(grid.spacing_mm[a] / truth.spacing_mm[a] - 1) > (SPACING_SHARE if a == axis else 1e-3):
            return f"spacing {grid.spacing_mm} for {truth.spacing_mm}"
    if grid.shape[axis] > truth.shape[axis]:
        return f"shape {grid.shape} for {truth.shape}"
    if np.abs(np.asarray(grid.direction) - np.asarray(truth.direction)).max() > ANGLE:
        return f"direction {grid.direction} for {truth.direction}"
    first = truth.to_index(grid.to_world((0, 0, 0)))
    start = round(float(first[axis]))
    offset = first - np.eye(3)[axis] * start
    if not 0 <= start <= truth.shape[axis] - grid.shape[axis] or np.abs(offset).max() > PLACE_VOXELS:
        return f"first voxel at {np.round(first, 2)} of the true grid"
    return start


def _is_rescaled(got: np.ndarray, truth: np.ndarray) -> bool:
    """Whether one slice is the other under a slope and intercept (clipped values aside)."""
    inside = (got > -1024) & (got < 32767)
    if inside.sum() < 20 or np.ptp(truth[inside]) == 0:
        return bool((~inside).mean() > 0.99)
    slope, intercept = np.polyfit(truth[inside].astype(float), got[inside].astype(float), 1)
    return bool(np.abs(truth[inside] * slope + intercept - got[inside]).max() <= 1.01 + abs(slope))

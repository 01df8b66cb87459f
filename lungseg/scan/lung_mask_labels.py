"""Which labels of a lung mask are which lung: as a named convention says, or the only one that fits the patient.

Nothing is guessed. Labels 1 and 2 are left and right for some programs and right and left for others: where they lie in
the patient decides, and what cannot be decided is refused with all readings named.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.lung_mask_sides import Doubt, doubt_about, sides_by_position
from lungseg.tissue import LUNG_EITHER, LUNG_MASK_CONVENTIONS

AUTO, BINARY = "auto", "binary"
LOBE_WISE = ("lungmask-lobes", "totalsegmentator")
"""Conventions in which a complete mask has all labels of a lung."""
MAX_LISTED = 10
NUM_LABELS = 2**16
"""Of a uint16 label map."""


@dataclass(frozen=True)
class Reading:
    """A mask as one convention reads it."""

    convention: str
    labels: np.ndarray
    """uint8 (Z, Y, X): 1 left, 2 right."""
    warnings: tuple[str, ...] = ()


def read_sides(
    mask: np.ndarray, volume_hu: np.ndarray, spacing_mm: tuple[float, float, float], *, labels: str = AUTO
) -> Reading:
    """Left and right lung of a label map.

    Parameters
    ----------
    mask : bool, uint8 or uint16 array, shape (Z, Y, X)
        On the grid of the scan, axes as in ``volume.py``.
    volume_hu : int16 array, same shape
        The scan; looked at for a single lung only.
    spacing_mm : (z, y, x)
    labels : str
        A name of ``LUNG_MASK_CONVENTIONS``, or `auto`.

    Returns
    -------
    Reading
        With a warning if lobes are missing, or a single lung seems to lie on the other side.

    Raises
    ------
    InputError
        If no voxel is lung, a label is unknown, no or several readings agree with labels and anatomy, or the named one
        does not. Messages hold no names.

    Source
    ------
    RELIABILITY rows 34, 35; ``LUNG_MASK_CONVENTIONS`` for each convention.
    """
    counts = np.bincount(mask.astype(np.uint16, copy=False).ravel(), minlength=2)
    present = {int(label): int(counts[label]) for label in np.flatnonzero(counts) if label}
    if not present:
        raise InputError("the lung mask is empty: no voxel is labelled")
    chest = _Chest(mask, volume_hu, spacing_mm)
    if labels != AUTO:
        return _as_named(labels, present, chest)
    if len(present) == 1:
        return Reading(BINARY, chest.by_position())
    return _as_fits(present, chest)


@dataclass(frozen=True)
class _Chest:
    """A mask and its scan."""

    mask: np.ndarray
    volume_hu: np.ndarray
    spacing_mm: tuple[float, float, float]

    def by_position(self) -> np.ndarray:
        return sides_by_position(self.mask > 0, self.volume_hu, self.spacing_mm)

    def read(self, convention: str) -> np.ndarray:
        """Labels 1 and 2 as a convention with sides says; position decides where it leaves them open."""
        table = np.zeros(NUM_LABELS, dtype=np.uint8)
        for label, side in LUNG_MASK_CONVENTIONS[convention].sides.items():
            table[label] = side
        sides: np.ndarray = table[self.mask.astype(np.uint16, copy=False)]
        is_open = sides == LUNG_EITHER
        if is_open.any():
            sides[is_open] = sides_by_position(sides > 0, self.volume_hu, self.spacing_mm)[is_open]
        return sides

    def doubt(self, sides: np.ndarray) -> Doubt | None:
        return doubt_about(sides, self.volume_hu, self.spacing_mm)


def _as_named(name: str, present: Mapping[int, int], chest: _Chest) -> Reading:
    """The reading that was asked for, unless labels or anatomy contradict it."""
    strangers = LUNG_MASK_CONVENTIONS[name].strangers(present)
    if strangers:
        raise InputError(
            f"the lung mask holds labels that --lung-mask-labels {name} ({LUNG_MASK_CONVENTIONS[name].title}) does not "
            f"know: {_listed(strangers, present)}. {_hint(present)}"
        )
    if name == BINARY:
        return Reading(BINARY, chest.by_position())
    sides = chest.read(name)
    if not sides.any():
        raise InputError(
            f"the lung mask holds no lung as {name} reads it ({LUNG_MASK_CONVENTIONS[name].title}): its labels are "
            f"{_listed(present, present)}. {_hint(present)}"
        )
    doubt = chest.doubt(sides)
    if doubt and doubt.is_sure:
        raise InputError(
            f"the sides of the lung mask are not those of this scan: as {name} reads it "
            f"({LUNG_MASK_CONVENTIONS[name].title}) {doubt.text}. Mask or scan is mirrored, or the labels mean "
            f"something else. {_hint(present)}"
        )
    warnings = [f"side of the lung: {doubt.text}"] if doubt else []
    return Reading(name, sides, (*warnings, *_missing_lobes(name, present)))


def _as_fits(present: Mapping[int, int], chest: _Chest) -> Reading:
    """The one reading that labels and anatomy allow."""
    fitting = _fitting(present)
    if not fitting:
        raise InputError(
            f"no known program labels lungs so: the labels of the lung mask are {_listed(present, present)}. Known are "
            f"{_conventions(LUNG_MASK_CONVENTIONS)}. Map the labels to one of these"
        )
    doubts: dict[str, str] = {}
    for group in _by_evidence(fitting, present):
        good: dict[str, np.ndarray] = {}
        for name in group:
            sides = chest.read(name)
            doubt = chest.doubt(sides)
            if doubt:
                doubts[name] = doubt.text
            else:
                good[name] = sides
        if not good:
            continue
        first = next(iter(good))
        if any(not np.array_equal(sides, good[first]) for sides in good.values()):
            raise InputError(
                f"the labels of the lung mask ({_listed(present, present)}) can be read in several ways: "
                f"{_conventions(good)}. Say which with --lung-mask-labels"
            )
        return Reading(first, good[first], _missing_lobes(first, present))
    told = "; ".join(
        f"as {name} ({LUNG_MASK_CONVENTIONS[name].title}) {doubts.get(name, 'labels with and without side are mixed')}"
        for name in fitting
    )
    raise InputError(
        f"the labels of the lung mask ({_listed(present, present)}) are not those of a patient's lungs: {told}. Mask "
        "or scan is mirrored, or the labels mean something else; if you know what, say it with --lung-mask-labels"
    )


def _fitting(present: Collection[int]) -> list[str]:
    """Conventions with sides that know all labels and call at least one of them lung."""
    return [
        name
        for name, convention in LUNG_MASK_CONVENTIONS.items()
        if convention.sides and not convention.strangers(present) and any(n in convention.sides for n in present)
    ]


def _by_evidence(names: Sequence[str], present: Collection[int]) -> list[list[str]]:
    """Readings of two lungs, then of one lung, then those that leave all sides open: each says less than the last.

    Where two lungs lie as a patient's do, that they are two parts of one lung is not looked into. A reading that mixes
    labels with and without side is left out: position would make sense of labels that mean something else, such as 1
    and 2 for the lungs and 3 for the disease in both.
    """
    groups: tuple[list[str], ...] = ([], [], [])
    for name in names:
        sides = {LUNG_MASK_CONVENTIONS[name].sides.get(label) for label in present} - {None}
        if LUNG_EITHER not in sides or len(sides) == 1:
            groups[2 if LUNG_EITHER in sides else 0 if len(sides) == 2 else 1].append(name)
    return list(groups)


def _missing_lobes(name: str, present: Collection[int]) -> tuple[str, ...]:
    wanted = LUNG_MASK_CONVENTIONS[name].sides
    missing = [label for label in wanted if label not in present]
    if name not in LOBE_WISE or not missing:
        return ()
    return (f"lobes missing: the mask holds {len(wanted) - len(missing)} of {len(wanted)} lobes",)


def _listed(labels: Collection[int], counts: Mapping[int, int]) -> str:
    shown = ", ".join(f"{label} ({counts[label]} voxels)" for label in sorted(labels)[:MAX_LISTED])
    return shown + (f" and {len(labels) - MAX_LISTED} more" if len(labels) > MAX_LISTED else "")


def _conventions(names: Collection[str]) -> str:
    return "; ".join(f"{name} ({LUNG_MASK_CONVENTIONS[name].title})" for name in names)


def _hint(present: Collection[int]) -> str:
    """Which conventions know these labels."""
    fitting = _fitting(present) if len(present) > 1 else [BINARY, *_fitting(present)]
    return f"Its labels fit {_conventions(fitting)}" if fitting else "Its labels fit no known program"

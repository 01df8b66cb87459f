"""Whether a stack of parallel slices is a regular volume: spacing, missing slices, gantry tilt, sideways shifts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungseg.config.preprocess import ReadOptions

SPACING_TOLERANCE = 0.01
"""Largest deviation of a gap from the median gap that counts as even. highdicom, RELIABILITY row 7."""
RESPACE_TOLERANCE = 0.10
"""Up to this deviation the slices are interpolated to an even grid. RELIABILITY row 7."""
COARSE_MM, FINE_MM = 0.1, 0.01
"""Last digit of positions: tenths if all of them are, else hundredths at most; a gap may be off by one of it."""
DIGIT_TOLERANCE_MM = 2e-4
"""Positions that passed through 32-bit numbers are off by 1e-4 mm at most."""
ROUNDING_SHARE = 0.25
"""Rounding by more than this share of a slice distance is no excuse: tenths are too coarse below 0.4 mm."""
SAME_POSITION_MM = 0.05
"""Slices nearer than this lie at one position, written with different rounding; no scanner steps so finely."""
MISSING_TOLERANCE = 0.05
"""A gap this near (in slices) to a whole number of slices means missing slices rather than uneven spacing."""
SLICE_SPACING_RANGE_MM = (0.1, 20.0)
PIXEL_SPACING_RANGE_MM = (0.1, 10.0)
"""Outside of these a header is wrong: CT is reconstructed at 0.1 mm (bone) to 2 mm, thinned-out copies to 5 mm."""
TILT_TOLERANCE = 1e-3
"""Tangent of the largest accepted angle between slice normal and stacking direction (highdicom, perpendicular)."""
MAX_TILT_DEGREES = 35.0
"""Gantries tilt up to 30 degrees; more is a damaged header."""
ROUNDING_PIXELS = 0.1
"""A sideways drift over the whole stack below this is rounding, whatever its angle."""
SHIFT_PIXELS = 0.25
"""Largest accepted sideways shift of a single slice against the others."""
LOCATION_RATIO = (0.95, 1.3)
"""Change of SliceLocation per mm along the normal: 1, or 1/cos of a gantry tilt of up to 35 degrees."""
LOCATION_SHARE = 0.25
"""Part of a slice distance by which SliceLocation may be off: it is rounded more coarsely than positions."""
MAX_EXCHANGED = 0.2
MAX_LISTED = 5
"""Positions or files listed in a message before it says how many more there are."""


@dataclass(frozen=True)
class Defect:
    """One thing that keeps a series from being read as it stands."""

    text: str
    """What it is, where, and what to do."""
    repair: str = ""
    """Field of ReadOptions that allows a repair; empty if nothing does."""
    count: int = 1
    """How much of it there is, where the option is a number."""

    @property
    def option(self) -> str:
        """The option of the command line that allows the repair; empty if there is none."""
        number = f" {self.count}" if self.repair == "allow_gaps" else ""
        return f"--{self.repair.replace('_', '-')}{number}" if self.repair else ""

    def repaired(self, options: ReadOptions) -> bool:
        """Whether the options allow to repair it."""
        return bool(self.repair) and int(getattr(options, self.repair)) >= self.count


@dataclass(frozen=True)
class Spacing:
    """How slices at distinct, ascending positions along their normal are spaced."""

    positions_mm: tuple[float, ...]
    step_mm: float
    """Slice distance: of the even grid if there is one, else the median gap."""
    steps: tuple[int, ...]
    """How many slice distances each gap is wide: more than 1 where slices are missing."""
    deviation: float
    """Largest deviation of a gap from its whole number of steps, in steps; 0 within the rounding of positions."""

    @property
    def missing(self) -> int:
        """Number of missing slices."""
        return sum(self.steps) - len(self.steps)

    @property
    def missing_words(self) -> str:
        """How many slices are missing where."""
        gaps = [i for i, n in enumerate(self.steps) if n > 1]
        where = ", ".join(
            f"{self.steps[i] - 1} between {self.positions_mm[i]:.2f} and {self.positions_mm[i + 1]:.2f} mm"
            for i in gaps[:MAX_LISTED]
        )
        return f"missing slices: {where}{_more(gaps)}"

    @property
    def grid(self) -> tuple[int, ...]:
        """Index of each slice on the complete grid."""
        return (0, *(int(i) for i in np.cumsum(self.steps)))

    @property
    def is_even(self) -> bool:
        """Whether all gaps are whole numbers of steps, within 1 %."""
        return self.deviation <= SPACING_TOLERANCE

    @property
    def grid_step_mm(self) -> float:
        """Slice distance of the complete, even grid from the first to the last position."""
        return (self.positions_mm[-1] - self.positions_mm[0]) / sum(self.steps)


def rounding_mm(origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """How far rounding of ImagePositionPatient can move two slices against each other along some directions.

    Parameters
    ----------
    origins : float array, shape (N, 3)
        ImagePositionPatient in mm.
    directions : float array, shape (M, 3)
        Unit vectors.

    Returns
    -------
    float array, shape (M,)
        In mm: one last digit in each coordinate.
    """
    tenths = (origins - origins[0]) / COARSE_MM
    is_coarse = bool((np.abs(tenths - np.rint(tenths)) * COARSE_MM < DIGIT_TOLERANCE_MM).all())
    total: np.ndarray = np.abs(directions).sum(axis=1) * (COARSE_MM if is_coarse else FINE_MM)
    return total


def measure_spacing(positions_mm: tuple[float, ...], rounding: float = FINE_MM) -> Spacing:
    """Spacing of slices along their normal.

    Parameters
    ----------
    positions_mm : floats
        At least two, distinct and ascending.
    rounding : float
        From ``rounding_mm``: 0.625 mm apart and rounded to tenths, gaps are 0.6 and 0.7 mm, and yet the slices lie on
        an even grid as far as anybody can tell.
    """
    positions = np.asarray(positions_mm)
    gaps = np.diff(positions)
    step = float(np.median(gaps))
    even = step
    for _ in range(2):  # the median of rounded gaps is rounded too: their mean is better
        steps = np.maximum(np.rint(gaps / even), 1.0)
        even = float((positions[-1] - positions[0]) / steps.sum())
    off = np.abs(positions - positions[0] - even * np.concatenate([[0.0], np.cumsum(steps)]))
    if rounding <= ROUNDING_SHARE * even + 1e-9 and off.max() <= rounding + DIGIT_TOLERANCE_MM:
        return Spacing(positions_mm, even, tuple(int(n) for n in steps), 0.0)
    ratio = gaps / step
    whole = np.rint(ratio)
    steps = np.where((whole >= 2) & (np.abs(ratio - whole) < MISSING_TOLERANCE), whole, 1.0)
    off = np.abs(gaps - steps * step)
    off[off <= FINE_MM + 1e-9] = 0.0
    return Spacing(positions_mm, step, tuple(int(n) for n in steps), float((off / (steps * step)).max()))


def exchanged(positions_mm: np.ndarray, locations_mm: np.ndarray, step_mm: float) -> list[int]:
    """Slices whose positions are those of each other, if SliceLocation is to be believed.

    Vendors count SliceLocation from anywhere and in either direction, copies keep it from the scan they were made of,
    and some write nonsense. So it contradicts the positions only if it follows them in at least four of five slices,
    and the others are the very same places in another order.

    Parameters
    ----------
    positions_mm : float array, shape (N,)
        Along the slice normal, ascending.
    locations_mm : float array, shape (N,)
        SliceLocation.
    step_mm : float
        Slice distance.

    Returns
    -------
    list of int
        Indices; empty if nothing contradicts.
    """
    half = len(positions_mm) // 2
    apart = positions_mm[half:] - positions_mm[: len(positions_mm) - half]
    moved = locations_mm[half:] - locations_mm[: len(positions_mm) - half]
    far = apart >= step_mm / 2
    if not far.any():
        return []
    ratio = float(np.median(moved[far] / apart[far]))
    if not LOCATION_RATIO[0] <= abs(ratio) <= LOCATION_RATIO[1]:
        return []
    told = locations_mm / ratio
    told -= np.median(told - positions_mm)
    odd = np.flatnonzero(np.abs(told - positions_mm) > LOCATION_SHARE * step_mm)
    if not 2 <= len(odd) <= MAX_EXCHANGED * len(positions_mm):
        return []
    off = np.abs(np.sort(told[odd]) - positions_mm[odd])
    return [int(i) for i in odd] if off.max() <= LOCATION_SHARE * step_mm else []


def spacing_defects(spacing: Spacing) -> list[Defect]:
    """Missing slices, and gaps that are too uneven."""
    positions, step = spacing.positions_mm, spacing.step_mm
    low, high = SLICE_SPACING_RANGE_MM
    if not low <= step <= high:
        return [
            Defect(f"slices {step:.3g} mm apart, outside {low:g} to {high:g} mm: a damaged header; export it again")
        ]
    defects = []
    if spacing.missing:
        text = f"{spacing.missing_words} (spacing {step:.3g} mm). Copy the complete series"
        if spacing.is_even:
            text += f", or fill the gaps by interpolation with --allow-gaps {spacing.missing}"
        defects.append(Defect(text, "allow_gaps" if spacing.is_even else "", spacing.missing))
    if spacing.deviation > (SPACING_TOLERANCE if spacing.missing else RESPACE_TOLERANCE):
        gap = np.diff(positions)
        off = np.abs(gap - np.asarray(spacing.steps) * step)
        odd = np.flatnonzero(off > max(SPACING_TOLERANCE * step, FINE_MM))
        where = ", ".join(f"{gap[i]:.3g} mm at {positions[i]:.2f} mm" for i in odd[:MAX_LISTED])
        defects.append(
            Defect(
                f"uneven slice spacing: mostly {step:.3g} mm, but {where}{_more(odd)}. Choose an evenly reconstructed "
                "series, or resample it first (dcm2niix)"
            )
        )
    return defects


def _more(listed: list[int] | np.ndarray) -> str:
    return f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""


def tilt_degrees(positions: np.ndarray, in_plane: np.ndarray, pixel_mm: float, rounding: float = FINE_MM) -> float:
    """Angle between slice normal and stacking direction; 0 if it is no more than rounding.

    Parameters
    ----------
    positions : float array, shape (N,)
        Along the slice normal, ascending, in mm.
    in_plane : float array, shape (N, 2)
        Origin of each slice along its row and column direction, in mm.
    pixel_mm : float
        Smaller one of the pixel spacings.
    rounding : float
        How far rounding can move slices sideways, see ``rounding_mm``.
    """
    length = float(positions[-1] - positions[0])
    tangent = float(np.linalg.norm((in_plane[-1] - in_plane[0]) / length))
    if tangent <= TILT_TOLERANCE or tangent * length <= max(ROUNDING_PIXELS * pixel_mm, rounding):
        return 0.0
    return float(np.degrees(np.arctan(tangent)))


def sideways_defects(
    positions: np.ndarray, in_plane: np.ndarray, pixel_mm: float, rounding: float = FINE_MM
) -> list[Defect]:
    """Gantry tilt, or slices shifted in their plane; parameters as for ``tilt_degrees``."""
    along = positions - positions[0]
    drift = (in_plane[-1] - in_plane[0]) / along[-1]
    if np.abs(in_plane - in_plane[0] - along[:, None] * drift).max() > max(SHIFT_PIXELS * pixel_mm, rounding):
        return [
            Defect("slices are shifted sideways against each other: several scans or a moved table; export it again")
        ]
    angle = tilt_degrees(positions, in_plane, pixel_mm, rounding)
    if not angle:
        return []
    text = f"gantry tilt of {angle:.1f} degrees (the slices are not stacked along their normal)"
    if angle > MAX_TILT_DEGREES:
        return [Defect(f"{text}, more than any gantry does: a damaged header; export it again")]
    return [Defect(f"{text}: shear them back with --correct-tilt", "correct_tilt")]

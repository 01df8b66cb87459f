"""Which DICOM slices form a volume: grouping by headers, and every reason why a group is not one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.scan.dicom_headers import ENHANCED_CT, SECONDARY_CAPTURE, Cosines, Damaged, SliceHeader
from lungseg.scan.orientation import LPS_TO_SPL, ORTHONORMAL_TOLERANCE, orthonormal_direction
from lungseg.scan.volume import Geometry, Triple

MIN_SLICES = 6
MIN_COVERAGE_MM = 20.0
"""Fewer slices or less coverage are no chest scan. RELIABILITY row 21."""
SPACING_TOLERANCE = 0.01
"""Largest deviation of a gap from the median gap. highdicom, RELIABILITY row 7."""
POSITION_ROUNDING_MM = 0.01
"""Positions are often rounded to two decimals; closer ones count as the same slice."""
MISSING_TOLERANCE = 0.05
"""A gap this near (in slices) to a whole number of slices means missing slices rather than uneven spacing."""
TILT_TOLERANCE = 1e-3
"""Tangent of the largest accepted angle between slice normal and stacking direction (highdicom, perpendicular)."""
ROUNDING_PIXELS = 0.1
"""A sideways drift over the whole stack below this is rounding, whatever its angle."""
SHIFT_PIXELS = 0.25
"""Largest accepted sideways shift of a single slice against the others."""
ALIKE = 1e-3
"""Direction cosines and pixel spacings (mm) this close belong together."""
MAX_LISTED = 5
"""Positions or files listed in a message before it says how many more there are."""


@dataclass(frozen=True)
class Series:
    """Slices that belong to one volume by patient, study, series, orientation and in-plane grid."""

    patient_id: str
    """As stored: only for grouping, never to be written anywhere."""
    study_uid: str
    series_uid: str
    acquisition: dict[str, Any]
    """Allow-listed covariates: kernel, kvp, slice_thickness_mm, manufacturer, modality (None where absent) and
    spacing_mm (between slices, rows, columns; None if the position tags are missing)."""
    files: tuple[Path, ...]
    """Ordered by position along the slice normal (row x column)."""
    positions_mm: tuple[float, ...]
    """Of each file, along the slice normal; empty if the position tags are missing."""
    origins: tuple[Triple, ...]
    """ImagePositionPatient (L, P, S) of each file; empty if missing."""
    orientation: Cosines | None
    """Direction of a row, then of a column, in (L, P, S)."""
    pixel_spacing_mm: tuple[float, float] | None
    """Between rows, between columns."""
    shape: tuple[int, int]
    """Rows, columns."""
    acquisition_numbers: tuple[str, ...]
    has_rescale: bool
    """Whether every slice has RescaleSlope and RescaleIntercept."""
    problem: str | None = None
    """Why this cannot be read as a volume, and what to do; None if it can."""

    @property
    def distinct_positions_mm(self) -> tuple[float, ...]:
        """Positions along the normal, repeated ones once."""
        kept: list[float] = []
        for position in self.positions_mm:
            if not kept or position - kept[-1] >= POSITION_ROUNDING_MM:
                kept.append(position)
        return tuple(kept)

    @property
    def slice_spacing_mm(self) -> float:
        """Median distance of neighbouring slices; 0 if there is only one."""
        gaps = np.diff(self.distinct_positions_mm)
        return float(np.median(gaps)) if len(gaps) else 0.0

    @property
    def coverage_mm(self) -> float:
        """Edge-to-edge extent along the slice normal."""
        return len(self.distinct_positions_mm) * self.slice_spacing_mm

    @property
    def label(self) -> str:
        """How messages name this series."""
        return f"series {self.series_uid or 'without UID'} ({len(self.files)} files)"

    @property
    def identity(self) -> tuple[Any, ...]:
        """Sort key that does not depend on where the files lie."""
        return self.patient_id, self.study_uid, self.series_uid, self.orientation or (), self.shape, self.origins


def build_series(slices: Sequence[SliceHeader], damaged: Sequence[Damaged]) -> tuple[Series, ...]:
    """Slices sorted into series, each with its problem if it has one; the order of ``slices`` does not matter.

    Parameters
    ----------
    slices : sequence of SliceHeader
        Of any number of patients and series.
    damaged : sequence of Damaged
        Unreadable files; every series with a file in the same folder is refused because of them.
    """
    groups = _group(slices)
    stray = _stray_slices(groups)
    folders: dict[Path, list[Damaged]] = {}
    for bad in damaged:
        folders.setdefault(bad.path.parent, []).append(bad)
    series = []
    for group, extra in zip(groups, stray, strict=True):
        beside = [bad for folder in sorted({s.path.parent for s in group}) for bad in folders.get(folder, [])]
        broken = [f"{bad.path.name} in the same folder is {bad.reason}" for bad in beside[:MAX_LISTED]]
        series.append(_make_series(group, [*broken, *extra]))
    return tuple(sorted(series, key=lambda s: s.identity))


def series_geometry(series: Series) -> Geometry:
    """Grid in the file's own order (slice, row, column), slices ascending along row x column.

    The slice spacing is the mean over the stack; the position of the first slice is the origin.

    Raises
    ------
    InputError
        If row and column direction are not at right angles.
    """
    assert series.orientation is not None
    assert series.pixel_spacing_mm is not None
    row, column = np.asarray(series.orientation[:3]), np.asarray(series.orientation[3:])
    positions = series.distinct_positions_mm
    spacing = (positions[-1] - positions[0]) / (len(positions) - 1)
    normal = np.cross(row, column)
    matrix = LPS_TO_SPL @ np.stack([normal / np.linalg.norm(normal), column, row], axis=1)
    direction = orthonormal_direction(matrix, name=series.label)
    origin = LPS_TO_SPL @ np.asarray(series.origins[0])
    return Geometry(
        (len(positions), *series.shape),
        (float(spacing), *series.pixel_spacing_mm),
        tuple(float(v) for v in origin),  # type: ignore[arg-type]
        direction,
    )


def _alike(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> bool:
    """Whether two optional tuples agree within the tolerance."""
    if a is None or b is None:
        return a is b
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= ALIKE


def _group(slices: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """Slices by patient, study, series, kind, orientation and in-plane grid; each group in order of position."""

    def order(s: SliceHeader) -> tuple[Any, ...]:
        kind = (s.patient_id, s.study_uid, s.series_uid, s.modality, s.sop_class, s.shape, s.frames)
        return *kind, s.orientation or (), s.pixel_spacing_mm or (), s.position or (), str(s.path)

    groups: list[list[SliceHeader]] = []
    for s in sorted(slices, key=order):
        for group in reversed(groups):
            first = group[0]
            if order(first)[:7] != order(s)[:7]:
                groups.append([s])  # sorted: no earlier group can match
                break
            if _alike(first.orientation, s.orientation) and _alike(first.pixel_spacing_mm, s.pixel_spacing_mm):
                group.append(s)
                break
        else:
            groups.append([s])
    return groups


def _stray_slices(groups: Sequence[Sequence[SliceHeader]]) -> list[list[str]]:
    """Problems of series in which a few slices of the same orientation have another in-plane grid.

    Dropping such slices silently would shorten the volume, so the whole series is refused.
    """
    problems: list[list[str]] = [[] for _ in groups]
    for i, few in enumerate(groups):
        for j, many in enumerate(groups):
            same = few[0].series_uid == many[0].series_uid and few[0].patient_id == many[0].patient_id
            same &= few[0].study_uid == many[0].study_uid and few[0].orientation is not None
            if i == j or not same or not _alike(few[0].orientation, many[0].orientation):
                continue
            if len(few) < MIN_SLICES <= len(many):
                text = (
                    f"{len(few)} of {len(few) + len(many)} slices differ in matrix or pixel spacing from the others "
                    f"({_names(few)}): remove or repair them"
                )
                problems[i].append(text)
                problems[j].append(text)
    return problems


def _names(slices: Sequence[SliceHeader]) -> str:
    """File names for a message, the first few."""
    more = f" and {len(slices) - MAX_LISTED} more" if len(slices) > MAX_LISTED else ""
    return ", ".join(s.path.name for s in slices[:MAX_LISTED]) + more


def _make_series(group: Sequence[SliceHeader], problems: list[str]) -> Series:
    """One series of slices that belong together; ``problems`` come first in its text."""
    first = group[0]
    known = first.orientation is not None and first.pixel_spacing_mm is not None
    known = known and all(s.position is not None for s in group)
    positions: np.ndarray = np.zeros(0)
    if known:
        cosines = np.asarray(first.orientation)
        positions = np.asarray([s.position for s in group]) @ np.cross(cosines[:3], cosines[3:])
        order = sorted(range(len(group)), key=lambda i: (positions[i], str(group[i].path)))
        group, positions = [group[i] for i in order], positions[order]
    series = Series(
        patient_id=first.patient_id,
        study_uid=first.study_uid,
        series_uid=first.series_uid,
        acquisition={},
        files=tuple(s.path for s in group),
        positions_mm=tuple(positions.tolist()),
        origins=tuple(s.position for s in group if s.position is not None) if known else (),
        orientation=first.orientation if known else None,
        pixel_spacing_mm=first.pixel_spacing_mm if known else None,
        shape=first.shape,
        acquisition_numbers=tuple(s.acquisition_number or "none" for s in group),
        has_rescale=all(s.has_rescale for s in group),
    )
    own = _image_problems(first)
    if not own and not known:
        own = ["ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing: export it again"]
    elif not own:
        own = _stack_problems(series, first)
    distinct = series.distinct_positions_mm
    step = (distinct[-1] - distinct[0]) / (len(distinct) - 1) if len(distinct) > 1 else None
    spacing = [step, *(first.pixel_spacing_mm or ())] if known else None
    changes: dict[str, Any] = {
        "acquisition": group[0].acquisition | {"spacing_mm": spacing},
        "problem": "; ".join([*problems, *own]) or None,
    }
    return replace(series, **changes)


def _image_problems(first: SliceHeader) -> list[str]:
    """Why these images are no CT slices, from the tags of one of them."""
    if first.sop_class.startswith(SECONDARY_CAPTURE):
        return ["a secondary capture (screen picture), not a scan: leave it out"]
    if first.frames > 1 or first.sop_class in ENHANCED_CT:
        return ["multi-frame DICOM is not supported: convert it with dcm2niix, or export single-frame CT"]
    if first.modality != "CT":
        return [f"modality is {first.modality or 'not stated'}, not CT: leave it out"]
    if first.components != 1:
        return ["a colour image, not a scan: leave it out"]
    return []


def _stack_problems(series: Series, first: SliceHeader) -> list[str]:
    """Why slices of one orientation do not form a regular volume."""
    cosines = np.asarray(series.orientation)
    if abs(float(cosines[:3] @ cosines[3:])) > ORTHONORMAL_TOLERANCE:
        return ["row and column direction are not at right angles: a damaged header"]
    positions = np.asarray(series.distinct_positions_mm)
    axial = abs(np.cross(cosines[:3], cosines[3:])[2]) > np.sqrt(0.5)
    if "LOCALIZER" in first.image_type.upper() or (len(positions) < 3 and not axial):
        return ["a localizer (scout) or a single reformatted image, not a scan: leave it out"]
    problems = []
    if len(positions) < MIN_SLICES or series.coverage_mm < MIN_COVERAGE_MM:
        problems.append(
            f"only {len(positions)} slices covering {series.coverage_mm:.1f} mm; at least {MIN_SLICES} slices and "
            f"{MIN_COVERAGE_MM:g} mm are needed"
        )
    if len(positions) > 1:
        problems += [text for text in (_sideways(series), _uneven(positions)) if text]
    return problems


def _sideways(series: Series) -> str | None:
    """Gantry tilt or slices shifted in their plane, if there are any."""
    assert series.orientation is not None
    assert series.pixel_spacing_mm is not None
    cosines = np.asarray(series.orientation)
    pixel = min(series.pixel_spacing_mm)
    positions = np.asarray(series.positions_mm)
    in_plane = np.asarray(series.origins) @ cosines.reshape(2, 3).T  # (slices, 2) along row and column direction
    in_plane = in_plane - in_plane[0]
    along = positions - positions[0]
    drift = in_plane[-1] / along[-1]
    if np.abs(in_plane - along[:, None] * drift).max() > SHIFT_PIXELS * pixel:
        return "slices are shifted sideways against each other: several scans or a moved table; export it again"
    tangent = float(np.linalg.norm(drift))
    if tangent > TILT_TOLERANCE and tangent * along[-1] > ROUNDING_PIXELS * pixel:
        return (
            f"gantry tilt of {np.degrees(np.arctan(tangent)):.1f} degrees (the slices are not stacked along their "
            "normal): correct it first, for instance with dcm2niix (file *_Tilt*)"
        )
    return None


def _uneven(positions: np.ndarray) -> str | None:
    """Missing slices or uneven spacing, if there are any; positions are distinct and ascending."""
    gaps = np.diff(positions)
    step = float(np.median(gaps))
    odd = np.flatnonzero(np.abs(gaps - step) > max(SPACING_TOLERANCE * step, POSITION_ROUNDING_MM))
    if not len(odd):
        return None
    more = f" and {len(odd) - MAX_LISTED} more" if len(odd) > MAX_LISTED else ""
    ratio = gaps[odd] / step
    if (np.abs(ratio - np.rint(ratio)) < MISSING_TOLERANCE).all() and (np.rint(ratio) >= 2).all():
        where = ", ".join(
            f"{round(r) - 1} between {positions[i]:.2f} and {positions[i + 1]:.2f} mm"
            for i, r in list(zip(odd, ratio, strict=True))[:MAX_LISTED]
        )
        return f"missing slices: {where}{more} (spacing {step:.3g} mm). Copy the complete series"
    where = ", ".join(f"{gaps[i]:.3g} mm at {positions[i]:.2f} mm" for i in odd[:MAX_LISTED])
    return (
        f"uneven slice spacing: mostly {step:.3g} mm, but {where}{more}. Choose an evenly reconstructed series, or "
        "resample it first (dcm2niix)"
    )

"""Which DICOM slices form a volume: grouping by headers, and every reason why a group is not one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config.preprocess import ReadOptions
from lungseg.scan.dicom_checks import file_names, image_defects, missing_tags
from lungseg.scan.dicom_headers import ENHANCED_CT, Damaged, SliceHeader
from lungseg.scan.dicom_layout import syntax_name
from lungseg.scan.dicom_members import dropped_images, group_slices, lost_slices, series_of, single_frames, stray_slices
from lungseg.scan.dicom_stack import (
    MAX_LISTED,
    SAME_POSITION_MM,
    Defect,
    Spacing,
    exchanged,
    measure_spacing,
    rounding_mm,
    sideways_defects,
    spacing_defects,
    tilt_degrees,
)
from lungseg.scan.dicom_values import Cosines
from lungseg.scan.orientation import LPS_TO_SPL, ORTHONORMAL_TOLERANCE, orthonormal_direction
from lungseg.scan.volume import MIN_SLICES, Geometry, Triple, extent_problem

KEY_DIGITS = 10
AXIS_COSINE = 0.9
"""A normal this near to an axis of the body (26 degrees: no gantry tilts more than 30) is called after it."""


@dataclass(frozen=True)
class SeriesFacts:
    """What a listing says of a series; plain values without patient data, names or paths."""

    key: str
    modality: str
    kernel: str | None
    manufacturer: str | None
    slices: int
    """At distinct positions."""
    rows: int
    columns: int
    spacing_mm: tuple[float, float, float] | None
    """Between slices, rows, columns; None if the position tags are missing."""
    coverage_mm: float
    orientation: str
    """axial, coronal, sagittal, oblique or unknown."""
    missing_slices: int
    tilt_degrees: float
    syntax: str
    """UID and name of the transfer syntaxes."""
    multi_frame: bool
    repairs: tuple[str, ...]
    """Options that would make it readable, one for each repairable defect."""


@dataclass(frozen=True)
class Series:
    """Slices that belong to one volume by patient, study, series, orientation and in-plane grid."""

    slices: tuple[SliceHeader, ...]
    """At least one, ordered by position along the slice normal (row x column)."""
    files: tuple[Path, ...]
    """Where each slice lies: the same file several times for frames of one."""
    positions_mm: tuple[float, ...]
    """Of each slice, along the slice normal; empty if the position tags are missing."""
    defects: tuple[Defect, ...] = ()
    """What keeps it from being read as it stands."""
    dropped: tuple[str, ...] = ()
    """Images of the same series UID that were left out, in words."""

    @property
    def patient_id(self) -> str:
        """As stored: only for grouping, never to be written anywhere."""
        return self.slices[0].patient_id

    @property
    def study_uid(self) -> str:
        """StudyInstanceUID."""
        return self.slices[0].study_uid

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID."""
        return self.slices[0].series_uid

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.slices[0].shape

    @property
    def orientation(self) -> Cosines | None:
        """Direction of a row, then of a column, in (L, P, S); None if the position tags are missing."""
        return self.slices[0].orientation if self.positions_mm else None

    @property
    def pixel_spacing_mm(self) -> tuple[float, float] | None:
        """Between rows, between columns; None if the position tags are missing."""
        return self.slices[0].pixel_spacing_mm if self.positions_mm else None

    @property
    def origins(self) -> tuple[Triple, ...]:
        """ImagePositionPatient (L, P, S) of each slice; empty if missing."""
        return tuple(s.position for s in self.slices if s.position is not None) if self.positions_mm else ()

    @property
    def acquisition_numbers(self) -> tuple[str, ...]:
        """Of each slice, 'none' where absent."""
        return tuple(s.acquisition_number or "none" for s in self.slices)

    @property
    def has_rescale(self) -> bool:
        """Whether every slice has RescaleSlope and RescaleIntercept."""
        return all(s.has_rescale for s in self.slices)

    @property
    def acquisition(self) -> dict[str, Any]:
        """Allow-listed covariates: kernel, kvp, slice_thickness_mm, manufacturer, modality (None where absent) and
        spacing_mm (between slices, rows, columns; None if the position tags are missing)."""
        return self.slices[0].acquisition | {"spacing_mm": None if self._grid is None else list(self._grid)}

    @property
    def _grid(self) -> tuple[float, float, float] | None:
        """Spacing of the complete grid between slices, rows, columns."""
        spacing, pixel = self.spacing, self.pixel_spacing_mm
        return (spacing.grid_step_mm, *pixel) if spacing and pixel else None

    def refusal(self, options: ReadOptions = ReadOptions()) -> str | None:
        """Why this cannot be read as a volume under these options, and what to do; None if it can."""
        return "; ".join(defect.text for defect in self.defects if not defect.repaired(options)) or None

    @property
    def problem(self) -> str | None:
        """Why this cannot be read as a volume without any repair, and what to do; None if it can."""
        return self.refusal()

    @property
    def distinct(self) -> tuple[int, ...]:
        """Indices of the first slice at each position."""
        kept: list[int] = []
        for i, position in enumerate(self.positions_mm):
            if not kept or position - self.positions_mm[kept[-1]] >= SAME_POSITION_MM:
                kept.append(i)
        return tuple(kept)

    @property
    def distinct_positions_mm(self) -> tuple[float, ...]:
        """Positions along the normal, repeated ones once."""
        return tuple(self.positions_mm[i] for i in self.distinct)

    @property
    def spacing(self) -> Spacing | None:
        """How the slices are spaced; None with less than two positions."""
        positions = self.distinct_positions_mm
        return measure_spacing(positions, self.rounding_mm[2]) if len(positions) > 1 else None

    @property
    def rounding_mm(self) -> tuple[float, float, float]:
        """How far rounding of the position tags can move slices against each other along row, column and normal."""
        assert self.orientation is not None
        row, column = np.asarray(self.orientation[:3]), np.asarray(self.orientation[3:])
        directions = np.stack([row, column, np.cross(row, column)])
        return tuple(float(v) for v in rounding_mm(np.asarray(self.origins), directions))  # type: ignore[return-value]

    @property
    def slice_spacing_mm(self) -> float:
        """Distance of neighbouring slices; 0 if there is only one."""
        return self.spacing.step_mm if self.spacing else 0.0

    @property
    def coverage_mm(self) -> float:
        """Edge-to-edge extent along the slice normal, gaps included; 0 if there is only one position."""
        return self.positions_mm[-1] - self.positions_mm[0] + self.slice_spacing_mm if self.spacing else 0.0

    @property
    def in_plane_mm(self) -> np.ndarray:
        """Origin of each slice along its row and column direction; float array, shape (slices, 2)."""
        assert self.orientation is not None
        return np.asarray(self.origins) @ np.asarray(self.orientation).reshape(2, 3).T

    @property
    def tilt_degrees(self) -> float:
        """Gantry tilt; 0 if there is none or the position tags are missing."""
        if self.spacing is None or self.pixel_spacing_mm is None:
            return 0.0
        pixel, rounding = min(self.pixel_spacing_mm), max(self.rounding_mm[:2])
        return tilt_degrees(np.asarray(self.positions_mm), self.in_plane_mm, pixel, rounding)

    @property
    def kind(self) -> str:
        """Modality and SOP class."""
        return f"{self.slices[0].modality} {self.slices[0].sop_class}".strip()

    @property
    def key(self) -> str:
        """Ten hex digits that name this series in listings and options: from its series UID and geometry.

        The same for any order and names of the files; no patient data goes in.
        """
        spacing = [f"{s:.4f}" for s in (*(self.pixel_spacing_mm or ()), self.slice_spacing_mm)]
        positions = [f"{p + 0.0:.2f}" for p in self.positions_mm] or [str(len(self.slices))]
        cosines = [f"{round(c, 4) + 0.0:.4f}" for c in self.orientation or ()]
        parts = (self.series_uid, self.kind, cosines, self.shape, spacing, positions)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:KEY_DIGITS]

    @property
    def label(self) -> str:
        """How messages name this series: no patient data."""
        return f"series {self.key} ({len(self.slices)} slices)"

    @property
    def identity(self) -> tuple[Any, ...]:
        """Sort key that does not depend on where the files lie."""
        return self.patient_id, self.study_uid, self.series_uid, self.orientation or (), self.shape, self.origins

    def facts(self) -> SeriesFacts:
        """What a listing says of this series."""
        first = self.slices[0]
        return SeriesFacts(
            key=self.key,
            modality=first.acquisition["modality"] or "",
            kernel=first.acquisition["kernel"],
            manufacturer=first.acquisition["manufacturer"],
            slices=len(self.distinct) or len(self.slices),
            rows=self.shape[0],
            columns=self.shape[1],
            spacing_mm=self._grid,
            coverage_mm=self.coverage_mm,
            orientation=_orientation_word(self.orientation),
            missing_slices=self.spacing.missing if self.spacing else 0,
            tilt_degrees=self.tilt_degrees,
            syntax=", ".join(sorted({syntax_name(s.layout.syntax) for s in self.slices})),
            multi_frame=first.sop_class in ENHANCED_CT,
            repairs=tuple(defect.option for defect in self.defects if defect.repair),
        )


def _orientation_word(orientation: Cosines | None) -> str:
    """Plane of slices by their normal."""
    if orientation is None:
        return "unknown"
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    return ("sagittal", "coronal", "axial")[int(normal.argmax())] if normal.max() > AXIS_COSINE else "oblique"


def build_series(slices: Sequence[SliceHeader], damaged: Sequence[Damaged]) -> tuple[Series, ...]:
    """Slices sorted into series, each with its defects; the order of ``slices`` does not matter.

    Parameters
    ----------
    slices : sequence of SliceHeader
        Of any number of patients and series; multi-frame files are taken apart here.
    damaged : sequence of Damaged
        Unreadable files; every series with a file in the same folder is refused because of them.
    """
    groups = group_slices([frame for s in slices for frame in single_frames(s)])
    folders: dict[Path, list[Damaged]] = {}
    for bad in damaged:
        folders.setdefault(bad.path.parent, []).append(bad)
    few: dict[Path, list[SliceHeader]] = {}
    for s in (s for group in groups if len(group) < MIN_SLICES for s in group):
        few.setdefault(s.path.parent, []).append(s)
    by_uid: dict[tuple[str, ...], list[list[SliceHeader]]] = {}
    for group in groups:
        by_uid.setdefault(series_of(group[0]), []).append(group)
    series = []
    for related in by_uid.values():
        for group in related:
            around = sorted({s.path.parent for s in group})
            beside = [bad for folder in around for bad in folders.get(folder, [])]
            broken = [f"{bad.path.name} in the same folder is {bad.reason}" for bad in beside[:MAX_LISTED]]
            made = _make_series(group, [*broken, *stray_slices(group, related)])
            lost = _lost_slices(made, [s for folder in around for s in few.get(folder, [])])
            made = replace(made, defects=(*(Defect(text) for text in lost), *made.defects))
            series.append(replace(made, dropped=dropped_images(group, related)))
    return tuple(sorted(series, key=lambda s: s.identity))


def series_geometry(series: Series, in_plane_mm: tuple[float, float] | None = None) -> Geometry:
    """Complete, even grid in the file's own order (slice, row, column), slices ascending along row x column.

    Parameters
    ----------
    series : Series
        With geometry and at least two slices; missing ones count as if they were there.
    in_plane_mm : (float, float), optional
        Where the first pixel lies along the row and column direction, if not where the first slice has it.

    Raises
    ------
    InputError
        If row and column direction are not at right angles.
    """
    assert series.orientation is not None
    assert series.pixel_spacing_mm is not None
    assert series.spacing is not None
    row, column = np.asarray(series.orientation[:3]), np.asarray(series.orientation[3:])
    normal = np.cross(row, column)
    matrix = LPS_TO_SPL @ np.stack([normal / np.linalg.norm(normal), column, row], axis=1)
    direction = orthonormal_direction(matrix, name=series.label)
    origin = np.asarray(series.origins[0])
    if in_plane_mm is not None:
        moved = np.asarray(in_plane_mm) - series.in_plane_mm[0]
        origin = origin + moved[0] * row + moved[1] * column
    return Geometry(
        (sum(series.spacing.steps) + 1, *series.shape),
        (series.spacing.grid_step_mm, *series.pixel_spacing_mm),
        tuple(float(v) for v in LPS_TO_SPL @ origin),  # type: ignore[arg-type]
        direction,
    )


def _lost_slices(series: Series, few: Sequence[SliceHeader]) -> list[str]:
    """Problems of a series because of single images next to it, or in its gaps."""
    if len(series.slices) < MIN_SLICES or series.spacing is None:
        return []
    first, last = np.asarray(series.origins[0]), np.asarray(series.origins[-1])
    count = sum(series.spacing.steps)
    places = [-1, *sorted(set(range(count + 1)) - set(series.spacing.grid)), count + 1]
    expected = first + np.asarray(places)[:, None] * ((last - first) / count)
    return lost_slices(series.slices, expected, series.slice_spacing_mm, few)


def conflict_words(series: Series, i: int) -> str:
    """Words for an image, slice ``i``, that is not the one before it, although they lie at one position."""
    numbers = ", ".join(sorted(set(series.acquisition_numbers), key=lambda n: (len(n), n)))
    first, second = series.slices[i - 1], series.slices[i]
    names = f"{series.files[i - 1].name} and {series.files[i].name}"
    if series.files[i - 1] == series.files[i]:
        names = f"frames {first.frame + 1} and {second.frame + 1} of {series.files[i].name}"
    pair = f"acquisition numbers {series.acquisition_numbers[i - 1]} and {series.acquisition_numbers[i]}"
    return (
        f"two different images at {series.positions_mm[i]:.2f} mm, {names} ({pair}; the series has {numbers}): several "
        "scans in one series. Keep the files of one of them"
    )


def _time_defects(series: Series) -> list[Defect]:
    """Images of one position that say themselves that they are of different acquisitions or phases."""
    kept = set(series.distinct)
    moments = [(s.acquisition_number, *s.phase) for s in series.slices]
    again = [i for i in range(len(moments)) if i not in kept and moments[i] != moments[i - 1]]
    return [Defect(conflict_words(series, again[0]))] if again else []


def _location_defects(series: Series) -> list[Defect]:
    """Slices whose positions are exchanged, if SliceLocation tells."""
    locations = [s.slice_location for s in series.slices]
    known = [v for v in locations if v is not None]
    if len(known) < len(locations) or series.spacing is None:
        return []
    odd = exchanged(np.asarray(series.positions_mm), np.asarray(known), series.slice_spacing_mm)
    if not odd:
        return []
    names = file_names([series.slices[i] for i in odd])
    return [
        Defect(
            f"{names} have each other's ImagePositionPatient or SliceLocation, in all other slices the two agree: "
            "damaged headers, it is not known which comes first. Export the series again"
        )
    ]


def _make_series(group: Sequence[SliceHeader], problems: list[str]) -> Series:
    """One series of slices that belong together; ``problems`` come first in its defects."""
    missing = missing_tags(group)
    positions: tuple[float, ...] = ()
    if not missing:
        cosines = np.asarray(group[0].orientation)
        along = np.asarray([s.position for s in group]) @ np.cross(cosines[:3], cosines[3:])
        order = sorted(range(len(group)), key=lambda i: (along[i], str(group[i].path), group[i].frame))
        group, positions = [group[i] for i in order], tuple(float(along[i]) for i in order)
    series = Series(tuple(group), tuple(s.path for s in group), positions)
    own = image_defects(group)
    if not own and missing:
        own = [Defect(f"{missing} is missing or damaged: export the series again")]
    elif not own:
        own = _stack_defects(series)
    return replace(series, defects=(*(Defect(text) for text in problems), *own))


def _stack_defects(series: Series) -> list[Defect]:
    """Why slices of one orientation do not form a regular volume."""
    assert series.orientation is not None
    assert series.pixel_spacing_mm is not None
    cosines = np.asarray(series.orientation)
    if abs(float(cosines[:3] @ cosines[3:])) > ORTHONORMAL_TOLERANCE:
        return [Defect("row and column direction are not at right angles: a damaged header")]
    count = len(series.distinct)
    axial = abs(np.cross(cosines[:3], cosines[3:])[2]) > np.sqrt(0.5)
    if all("LOCALIZER" in s.image_type.upper() for s in series.slices) or (count < 3 and not axial):
        return [Defect("a localizer (scout) or a single reformatted image, not a scan: leave it out")]
    problem = extent_problem(count, series.coverage_mm)
    defects = [Defect(problem)] if problem else []
    if series.spacing is not None:
        pixel = min(series.pixel_spacing_mm)
        rounding = max(series.rounding_mm[:2])
        defects += sideways_defects(np.asarray(series.positions_mm), series.in_plane_mm, pixel, rounding)
        defects += spacing_defects(series.spacing)
        defects += _time_defects(series)
        defects += _location_defects(series)
    if not series.has_rescale:
        defects.append(
            Defect(
                "RescaleSlope or RescaleIntercept is missing, so the values cannot be turned into HU. If the stored "
                "values are HU already, say so with --assume-hu",
                "assume_hu",
            )
        )
    return defects

"""DICOM: find the series of a folder, choose one per study, read it as a ``Volume``, and write digital phantoms.

One clean series of parallel, evenly spaced slices in any orientation is read; anything else is refused with the
reason. SimpleITK decodes all transfer syntaxes; geometry comes from the position tags alone, never from ITK's
guess over a series (which averages the spacing over a missing slice).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom_headers import Damaged, SliceHeader, read_header, walk_files
from lungseg.scan.dicom_series import MAX_LISTED, POSITION_ROUNDING_MM, Series, build_series, series_geometry
from lungseg.scan.dicom_write import write_dicom_series
from lungseg.scan.hu import allocate, check_hu, clip_notes, to_hu
from lungseg.scan.orientation import to_canonical
from lungseg.scan.volume import Volume

__all__ = ["Series", "SeriesChoice", "SeriesScan", "choose_series", "find_series", "read_series", "write_dicom_series"]

SHORT_SHARE = 0.5
"""A series covering less than this share of the longest usable one is chosen last: a slab, not the chest."""

UNKNOWN_SHARPNESS = 50.0
GE_SHARPNESS = {"SOFT": 20.0, "STANDARD": 35.0, "STND": 35.0, "STD": 35.0, "CHEST": 40.0, "DETAIL": 55.0, "LUNG": 70.0,
                "BONE": 75.0, "BONEPLUS": 80.0, "EDGE": 90.0}  # fmt: skip
PHILIPS_SHARPNESS = {"A": 25.0, "B": 35.0, "C": 45.0, "D": 60.0, "E": 70.0, "L": 65.0, "YA": 65.0, "YB": 70.0,
                     "YC": 75.0, "YD": 80.0}  # fmt: skip
"""Order of the vendors' names from soft to sharp, on the scale of Siemens' numbers (B30f = 30): our choice."""
TOSHIBA_SHARP_FROM = 30
"""Toshiba FC01-FC29 are body and head kernels, FC30 and above bone and lung."""


@dataclass(frozen=True)
class SeriesScan:
    """What lies in a folder."""

    series: tuple[Series, ...]
    """Ordered by patient, study and series."""
    non_dicom: tuple[Path, ...]
    """Files that are no DICOM images: skipped."""
    damaged: tuple[Damaged, ...] = ()
    """DICOM files that cannot be read; the series beside them in the same folder are refused."""


@dataclass(frozen=True)
class SeriesChoice:
    """The series to use for one study, and why not the others."""

    chosen: Series
    others: tuple[tuple[Series, str], ...]


def find_series(path: Path) -> SeriesScan:
    """Series below a folder (or of a single file), from headers alone.

    Parameters
    ----------
    path : Path
        Searched recursively; names and extensions do not matter, each linked folder is entered once, DICOMDIR
        is ignored.

    Returns
    -------
    SeriesScan
        At least one series. The same for any order and names of the files.

    Raises
    ------
    InputError
        If nothing is found (with the number of files looked at), or a file or folder cannot be opened.

    Source
    ------
    RELIABILITY rows 1-4, 17-19, 23, 24.
    """
    slices: list[SliceHeader] = []
    non_dicom: list[Path] = []
    damaged: list[Damaged] = []
    for file in walk_files(path):
        found = read_header(file)
        if found is None:
            non_dicom.append(file)
        elif isinstance(found, Damaged):
            damaged.append(found)
        else:
            slices.append(found)
    if not slices:
        looked_at = len(non_dicom) + len(damaged)
        broken = "".join(f"; {bad.path}: {bad.reason}" for bad in damaged[:MAX_LISTED])
        raise InputError(
            f"{path}: no readable DICOM image among the {looked_at} files looked at{broken}. Give the folder of a CT "
            "series, or a .nii.gz, .nrrd or .mha file"
        )
    return SeriesScan(build_series(slices, damaged), tuple(non_dicom), tuple(damaged))


def choose_series(series: Sequence[Series], options: ReadOptions = ReadOptions()) -> SeriesChoice:
    """The best series of one study, by a stated order.

    Usable CT volumes only; those that cover at least half of the longest one first; then thinner slice spacing,
    softer kernel, more slices, and at last the series UID, so that the answer does not depend on file order.

    Parameters
    ----------
    series : sequence of Series
        Of one patient and one study.
    options : ReadOptions
        What may be repaired: decides which series are usable.

    Raises
    ------
    InputError
        If there is no usable series (with the reason for each), or they are of several studies.

    Source
    ------
    RELIABILITY row 3.
    """
    if len({(s.patient_id, s.study_uid) for s in series}) > 1:
        raise InputError("series of several patients or studies were given; choose within one study at a time")
    usable = [s for s in series if s.problem is None]
    refused = sorted((s for s in series if s.problem is not None), key=lambda s: s.identity)
    if not usable:
        reasons = "; ".join(f"{s.label}: {s.problem}" for s in refused) or "there is none"
        raise InputError(f"no series of this study can be read as a CT volume: {reasons}")
    longest = max(s.coverage_mm for s in usable)

    def rank(s: Series) -> tuple[Any, ...]:
        short = s.coverage_mm < SHORT_SHARE * longest
        return short, round(s.slice_spacing_mm, 2), kernel_sharpness(s.acquisition["kernel"]), -len(s.files), s.identity

    ranked = sorted(usable, key=rank)
    chosen = ranked[0]
    others = [(s, _why_not(s, chosen, rank(s), rank(chosen))) for s in ranked[1:]]
    return SeriesChoice(chosen, (*others, *((s, s.problem or "") for s in refused)))


def kernel_sharpness(kernel: str | None) -> float:
    """How sharp a reconstruction kernel is, about 10 (soft) to 90 (sharp); 50 for unknown or missing names.

    Siemens by its number (B30f, I70f, Br40d), Toshiba/Canon FC by number, GE and Philips by name. Only the order
    is used; across vendors it is rough.
    """
    name = (kernel or "").split("\\")[0].strip().upper()
    toshiba = re.fullmatch(r"FC(\d+)", name)
    if toshiba:
        number = int(toshiba[1])
        return 35.0 if number < TOSHIBA_SHARP_FROM else min(90.0, 65.0 + number / 10.0)
    siemens = re.match(r"[A-Z]{1,2}(\d{2})(?!\d)", name)
    if siemens:
        return float(siemens[1])
    name = name.rstrip("+")
    return GE_SHARPNESS.get(name, PHILIPS_SHARPNESS.get(name, UNKNOWN_SHARPNESS))


def _why_not(s: Series, chosen: Series, rank: tuple[Any, ...], best: tuple[Any, ...]) -> str:
    """First criterion by which a usable series came after the chosen one."""
    if rank[0] != best[0]:
        return f"covers only {s.coverage_mm:.0f} mm against {chosen.coverage_mm:.0f} mm"
    if rank[1] != best[1]:
        return f"thicker slices ({rank[1]:g} mm apart against {best[1]:g} mm)"
    if rank[2] != best[2]:
        return f"sharper kernel ({s.acquisition['kernel']} against {chosen.acquisition['kernel']})"
    if rank[3] != best[3]:
        return f"fewer slices ({len(s.files)} against {len(chosen.files)})"
    return "equal in spacing, kernel and slices; the first series UID was taken"


def read_series(series: Series, options: ReadOptions = ReadOptions()) -> Volume:
    """The volume of one series, in the canonical orientation; slices are decoded one at a time.

    Parameters
    ----------
    series : Series
        From ``find_series``.
    options : ReadOptions
        What may be done to a series that is not right as it stands.

    Returns
    -------
    Volume
        int16 HU, the rescale of each slice applied; values below -1024 (padding) set to -1024. An oblique
        orientation keeps its rotation in ``direction``. ``stored_axes`` refer to (slice, row, column) with
        slices ascending along row x column.

    Raises
    ------
    InputError
        If the series has a ``problem``, lacks its rescale, holds different images at one position, a file
        cannot be decoded, or the values are not HU.
    ResourceError
        If the machine could not hold the volume.

    Source
    ------
    RELIABILITY rows 5-17, 31.
    """
    name = series.label
    if series.problem is not None or series.orientation is None:
        raise InputError(f"{name}: {series.problem}")
    if not (series.has_rescale or options.assume_hu):
        raise InputError(
            f"{name}: RescaleSlope or RescaleIntercept is missing, so the values cannot be turned into HU. "
            "If the stored values are HU already, say so with --assume-hu"
        )
    distinct = series.distinct_positions_mm
    array = allocate((len(distinct), *series.shape), np.int16, name=name)
    k, low, high, dropped = -1, 0, 0, 0
    for i, file in enumerate(series.files):
        values = _decode(file, series.shape)
        if k >= 0 and series.positions_mm[i] - distinct[k] < POSITION_ROUNDING_MM:
            again = np.empty(series.shape, np.int16)
            to_hu(values, again)
            if not np.array_equal(again, array[k]):
                numbers = f"acquisition numbers {series.acquisition_numbers[i - 1]} and {series.acquisition_numbers[i]}"
                raise InputError(
                    f"{name}: two different images at {distinct[k]:.2f} mm, {series.files[i - 1].name} and {file.name} "
                    f"({numbers}): several scans in one series. Keep the files of one of them"
                )
            dropped += 1
            continue
        k += 1
        below, above = to_hu(values, array[k])
        low, high = low + below, high + above
    notes = clip_notes(low, high, array.size)
    if dropped:
        notes += (f"{dropped} slices were stored twice with the same pixels: one of each was used",)
    if not series.has_rescale:
        notes += ("rescale tags are missing: the stored values were taken as HU, as asked",)
    try:
        notes += check_hu(array)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    volume = to_canonical(array, series_geometry(series))
    return replace(volume, acquisition=dict(series.acquisition), notes=notes)


def _decode(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """Pixels of one slice with its own rescale applied (SimpleITK returns HU), shape (rows, columns)."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    reader.LoadPrivateTagsOff()
    try:
        values: np.ndarray = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise InputError(
            f"{file}: truncated, damaged, or compressed in a way that cannot be decoded; copy the file again, or "
            "decompress the series (`gdcmconv --raw IN OUT`)"
        ) from error
    if values.size != shape[0] * shape[1]:
        raise InputError(f"{file}: holds {values.shape} pixels where its header declared {shape}; it has changed")
    return values.reshape(shape)

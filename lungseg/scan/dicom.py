"""DICOM: find the series of a folder, choose one per study, read it as a ``Volume``, and write digital phantoms.

One clean series of parallel, evenly spaced slices in any orientation is read; missing slices, a gantry tilt and
missing rescale tags are repaired if the user asks for it; anything else is refused with the reason. Geometry comes
from the position tags alone, never from ITK's guess over a series (which averages the spacing over a missing slice).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom_choice import SeriesChoice, choose_series, kernel_sharpness
from lungseg.scan.dicom_headers import Damaged, SliceHeader, read_header, walk_files
from lungseg.scan.dicom_neighbours import jump_hu, ordinary_jump, unlike_slices
from lungseg.scan.dicom_pixels import SliceDecoder
from lungseg.scan.dicom_repair import fill_gaps, respace, shear_slice
from lungseg.scan.dicom_series import Series, SeriesFacts, build_series, conflict_words, series_geometry
from lungseg.scan.dicom_slice import rescaled
from lungseg.scan.dicom_stack import MAX_LISTED
from lungseg.scan.dicom_write import write_dicom_series
from lungseg.scan.hu import HuTally, allocate, check_hu, clip_notes, clip_status, to_hu
from lungseg.scan.orientation import to_canonical
from lungseg.scan.volume import Volume

__all__ = ["Series", "SeriesChoice", "SeriesFacts", "SeriesScan", "choose_series", "find_series", "kernel_sharpness",
           "read_series", "write_dicom_series"]  # fmt: skip


@dataclass(frozen=True)
class SeriesScan:
    """What lies in a folder."""

    series: tuple[Series, ...]
    """Ordered by patient, study and series."""
    non_dicom: tuple[Path, ...]
    """Files that are no DICOM images: skipped."""
    damaged: tuple[Damaged, ...] = ()
    """DICOM files that cannot be read; the series beside them in the same folder are refused."""


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
        slices ascending along row x column. What was repaired is in ``notes`` and ``status``.

    Raises
    ------
    InputError
        If the series is refused under these options, holds different images at one position, a file cannot be
        decoded, or the values are not HU.
    ResourceError
        If the machine could not hold the volume.

    Source
    ------
    RELIABILITY rows 5-18, 31.
    """
    name, refusal = series.label, series.refusal(options)
    if refusal is not None or series.spacing is None:
        raise InputError(f"{name}: {refusal}")
    spacing = series.spacing
    notes, status = list(series.dropped), []
    shear = _Shear.of(series) if series.tilt_degrees else None
    geometry = series_geometry(series, shear.start_mm if shear else None)
    shape = shear.shape if shear else series.shape
    geometry = replace(geometry, shape=(geometry.shape[0], *shape))
    array = allocate(geometry.shape, np.int16, name=name)
    tally = HuTally()
    notes += _fill(array, series, shear, tally)
    if not series.has_rescale:
        notes.append("rescale tags are missing: the stored values were taken as HU, as asked")
        status.append("hu-assumed")
    if shear:
        notes.append(f"gantry tilt of {series.tilt_degrees:.1f} degrees: slices were sheared back, as asked")
        status.append("tilt-corrected")
    if spacing.missing:
        fill_gaps(array, spacing.grid)
        notes.append(f"{spacing.missing_words}: filled by interpolation, as asked")
        status.append("gaps-filled")
    elif not spacing.is_even:
        array = respace(array, spacing.positions_mm)
        notes.append(
            f"uneven slice spacing, up to {100 * spacing.deviation:.1f} % off {spacing.step_mm:.3g} mm: slices were "
            f"interpolated to an even spacing of {spacing.grid_step_mm:.4g} mm"
        )
        status.append("respaced")
    clipped_notes, clipped_status = clip_status(tally)
    try:
        notes += (*clipped_notes, *check_hu(array, tally))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    volume = to_canonical(array, geometry)
    acquisition = dict(series.acquisition)
    return replace(volume, acquisition=acquisition, notes=tuple(notes), status=(*status, *clipped_status))


@dataclass(frozen=True)
class _Shear:
    """How tilted slices lie on a rectangular grid that holds them all."""

    start_mm: tuple[float, float]
    """Of the grid, along the row and column direction."""
    shape: tuple[int, int]
    """Rows and columns of the grid."""
    shifts: np.ndarray
    """Rows and columns from the start of the grid to that of each slice; float array, shape (slices, 2)."""

    @classmethod
    def of(cls, series: Series) -> _Shear:
        assert series.pixel_spacing_mm is not None
        in_plane = series.in_plane_mm
        start = in_plane.min(axis=0)
        shifts = (in_plane - start)[:, ::-1] / np.asarray(series.pixel_spacing_mm)
        rows, columns = (n + int(np.ceil(m)) for n, m in zip(series.shape, shifts.max(axis=0), strict=True))
        return cls((float(start[0]), float(start[1])), (rows, columns), shifts)

    def moved(self, hu: np.ndarray, i: int) -> np.ndarray:
        """Slice ``i`` on the grid; int16 array of its shape."""
        out = np.empty(self.shape, np.int16)
        shear_slice(hu, self.shifts[i], out)
        return out


def _fill(array: np.ndarray, series: Series, shear: _Shear | None, tally: HuTally) -> list[str]:
    """Decode all slices into their places on the complete grid; returns notes.

    Raises
    ------
    InputError
        If a slice cannot be decoded, two different images lie at one position, or a slice whose rescale is its own
        does not fit its neighbours, while that of the others does.
    """
    assert series.spacing is not None
    places = dict(zip(series.distinct, series.spacing.grid, strict=True))
    hu = np.empty(series.shape, np.int16)
    low, high, repeated = 0, 0, 0
    previous = np.empty_like(hu)
    with SliceDecoder() as decoder:
        for i, (header, file) in enumerate(zip(series.slices, series.files, strict=True)):
            values = rescaled(decoder.stored_values(replace(header, path=file)), header)
            if i not in places:
                to_hu(values, hu)
                if not np.array_equal(hu, previous):
                    raise InputError(f"{series.label}: {conflict_words(series, i)}")
                repeated += 1
                continue
            below, above = to_hu(values, previous, tally)
            low, high = low + below, high + above
            array[places[i]] = previous if shear is None else shear.moved(previous, i)
        _check_rescale(array, series, shear, places, decoder)
    notes = list(clip_notes(low, high, len(places) * hu.size))
    notes += _check_pixels(array, series, places)
    if repeated:
        notes.append(f"{repeated} slices were stored twice with the same pixels: one of each was used")
    return notes


def _check_pixels(array: np.ndarray, series: Series, places: dict[int, int]) -> list[str]:
    """Refuse slices whose pixels are damaged; notes on slices that only look odd."""
    order = list(places)
    damaged, odd = unlike_slices(array, list(places.values()))
    if damaged:
        raise InputError(
            f"{series.label}: the image in {_names(series, [order[k] for k in damaged])} is unlike the slices next to "
            "it, and its values are no anatomy: damaged pixels. Copy or export the file again"
        )
    where = [f"{series.positions_mm[order[k]]:.2f}" for k in odd]
    more = f" and {len(odd) - MAX_LISTED} more" if len(odd) > MAX_LISTED else ""
    return [
        f"slices unlike both of their neighbours, at {', '.join(where[:MAX_LISTED])}{more} mm: look at them"
    ] * bool(odd)


def _check_rescale(
    array: np.ndarray, series: Series, shear: _Shear | None, places: dict[int, int], decoder: SliceDecoder
) -> None:
    """Refuse a slice that does not fit its neighbours with its own rescale, and does with that of most slices."""

    def encoding(i: int) -> tuple[float | None, float | None, bool]:
        s = series.slices[i]
        return s.slope, s.intercept, s.layout.signed

    counts = Counter(encoding(i) for i in places)
    (usual, count), *others = counts.most_common()
    if not others or count <= len(places) / 2:
        return
    stack = [array[k] for k in places.values()]
    jumps = [jump_hu(below, above) for below, above in pairwise(stack)]
    limit = ordinary_jump(jumps)
    for n, i in enumerate(places):
        own = min((jump for jump in jumps[max(n - 1, 0) : n + 1] if not np.isnan(jump)), default=np.inf)
        if encoding(i) == usual or own <= limit:
            continue
        header = replace(series.slices[i], path=series.files[i], slope=usual[0], intercept=usual[1])
        header = replace(header, layout=replace(header.layout, signed=usual[2]))
        hu = np.empty(series.shape, np.int16)
        try:
            to_hu(rescaled(decoder.stored_values(header), header), hu)
        except InputError:
            continue  # its bits cannot be read like those of the others: then it is right to differ
        if shear is not None:
            hu = shear.moved(hu, i)
        around = [jump_hu(hu, stack[m]) for m in (n - 1, n + 1) if 0 <= m < len(stack)]
        if min(around) <= limit < own - min(around):
            slope, intercept, signed = encoding(i)
            kinds = ("unsigned", "signed")
            raise InputError(
                f"{series.label}: {_names(series, [i])} has RescaleSlope {slope}, RescaleIntercept {intercept} and "
                f"{kinds[signed]} pixels, most slices {usual[0]}, {usual[1]} and {kinds[usual[2]]}; only with those "
                "does it fit its neighbours: a damaged header. Copy or export the file again"
            )


def _names(series: Series, indices: Sequence[int]) -> str:
    """Names of files for a message, with the frames of multi-frame ones."""
    names = [
        f"frame {series.slices[i].frame + 1} of {series.files[i].name}"
        if series.slices[i].layout.frames > 1
        else series.files[i].name
        for i in indices
    ]
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")

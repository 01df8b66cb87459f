"""DICOM Segmentation objects: which segment each voxel belongs to, on the grid of their own frames.

Frames without any voxel of a segment are usually left out of a file, so a segmentation covers the slices from its
first to its last frame; everywhere else it says: not this segment.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.dicom_frames import (
    FRAME_GROUPS,
    PIXEL_MEASURES,
    SHARED_GROUPS,
    Frame,
    read_frames,
    sequence_items,
)
from lungseg.scan.dicom_stack import SAME_POSITION_MM
from lungseg.scan.dicom_values import Cosines
from lungseg.scan.hu import require_memory
from lungseg.scan.image_header import MAX_AXIS, MAX_MM, grid_of
from lungseg.scan.orientation import LPS_TO_SPL, to_canonical
from lungseg.scan.volume import Volume

SEGMENTATION_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage and Label Map Segmentation Storage (PS3.4 B.5)."""
SEGMENT_IDENTIFICATION = 0x0062000A
STEP_TOLERANCE = 0.05
"""Largest deviation of a frame from the even grid of slices, in slices."""
SHIFT_PIXELS = 0.1
"""Largest sideways shift of frames against each other."""
COSINE_ROUNDING = 1e-4
MAX_NUMBER = int(np.iinfo(np.uint16).max)
DAMAGE = (
    OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, struct.error,
)  # fmt: skip
"""What pydicom raises on damaged files beside its own errors, and converting their values (seen on 3,000 mutants)."""
MAX_LISTED = 5


@dataclass(frozen=True)
class Segmentation:
    """Segments of a DICOM file."""

    volume: Volume
    """Segment numbers, uint8 or uint16, canonical; 0 where there is no segment."""
    codes: Mapping[int, tuple[str, str] | None]
    """Segment number -> coding scheme and value of its SegmentedPropertyTypeCode; None without one."""


@dataclass(frozen=True)
class _Header:
    """Plain values of a file: nothing after this looks into elements that may be damaged."""

    kind: str
    """SegmentationType."""
    codes: Mapping[int, tuple[str, str] | None]
    rows: int
    columns: int
    declared: int
    """NumberOfFrames."""
    frames: tuple[Frame, ...]
    segments: tuple[int, ...]
    """Segment of each frame; -1 if it names none."""
    stated_mm: tuple[float | None, float | None]
    """SpacingBetweenSlices and SliceThickness."""
    bits: int
    samples: int
    background: int
    """PixelPaddingValue, or 0."""
    is_encapsulated: bool
    syntax: str
    byte_order: str
    data: bytes
    """Pixels as stored."""


def read_segmentation(path: Path) -> Segmentation:
    """Segments of a DICOM Segmentation (BINARY or LABELMAP).

    Parameters
    ----------
    path : Path

    Returns
    -------
    Segmentation
        On the grid of the file's own frames.

    Raises
    ------
    InputError
        If the file is damaged, no segmentation, or FRACTIONAL; if frames lie in different planes or at uneven
        distances, a frame names no segment, or segments overlap (a label map cannot hold both).
    ResourceError
        If the machine could not hold the volume.

    Source
    ------
    DICOM PS3.3 A.51, C.8.20.2 (Segmentation Image), C.7.6.16 (Multi-frame Functional Groups); highdicom's writer.
    """
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote values of patients, and what matters is judged here
            dataset = pydicom.dcmread(path)
            sop_class = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
            header = _header(dataset) if sop_class in SEGMENTATION_CLASSES else None
    except (InvalidDicomError, BytesLengthException, *DAMAGE) as error:  # elements are decoded when they are looked at
        raise InputError(f"{path}: not a readable DICOM file, or a damaged one ({type(error).__name__})") from error
    if header is None:
        raise InputError(
            f"{path}: no DICOM Segmentation, but SOP class {sop_class[:64]}. Give DICOM-SEG, NIfTI, NRRD or MHA "
            "(RTSTRUCT contours must be converted first)"
        )
    if header.kind == "FRACTIONAL":
        raise InputError(
            f"{path}: a FRACTIONAL segmentation holds probabilities or occupied shares of voxels, not labels: where "
            "to cut is yours to decide. Threshold it and save it as BINARY or LABELMAP"
        )
    if header.kind not in ("BINARY", "LABELMAP"):
        raise InputError(f"{path}: SegmentationType is '{header.kind[:20]}', not BINARY or LABELMAP")
    if not header.codes:
        raise InputError(f"{path}: describes no segment")
    if not 0 <= min(header.codes) <= max(header.codes) <= MAX_NUMBER or (header.kind == "BINARY" and 0 in header.codes):
        raise InputError(f"{path}: segment numbers {min(header.codes)} to {max(header.codes)}, not 1 to {MAX_NUMBER}")
    return Segmentation(_volume(header, dataset, path), header.codes)


def _header(dataset: Any) -> _Header:
    """What the elements say; raises anything of ``DAMAGE``."""
    frames = read_frames(dataset)  # before anything else: it needs the elements as raw bytes
    codes: dict[int, tuple[str, str] | None] = {}
    for item in dataset.get("SegmentSequence", ()):
        kinds = item.get("SegmentedPropertyTypeCodeSequence", ())
        code = (str(kinds[0].get("CodingSchemeDesignator", "")), str(kinds[0].get("CodeValue", ""))) if kinds else None
        number = int(item["SegmentNumber"].value)
        if number in codes:
            raise ValueError("segment numbers are not unique")
        codes[number] = code
    shared = sequence_items(dataset, SHARED_GROUPS)
    common = sequence_items(shared[0], SEGMENT_IDENTIFICATION) if shared else []
    segments = []
    for own in sequence_items(dataset, FRAME_GROUPS):
        named = sequence_items(own, SEGMENT_IDENTIFICATION) or common
        segments.append(int(named[0].get("ReferencedSegmentNumber", -1)) if named else -1)
    syntax = dataset.file_meta.TransferSyntaxUID
    return _Header(
        kind=str(dataset.get("SegmentationType", "")),
        codes=codes,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        declared=int(dataset.get("NumberOfFrames", 1)),
        frames=frames,
        segments=tuple(segments),
        stated_mm=(_stated_mm(dataset, "SpacingBetweenSlices"), _stated_mm(dataset, "SliceThickness")),
        bits=int(dataset.BitsAllocated),
        samples=int(dataset.get("SamplesPerPixel", 1)),
        background=int(dataset.get("PixelPaddingValue", 0)),
        is_encapsulated=bool(syntax.is_encapsulated),
        syntax=str(syntax.name),
        byte_order="<" if syntax.is_little_endian else ">",
        data=bytes(dataset.PixelData),
    )


def _stated_mm(dataset: Any, keyword: str) -> float | None:
    """A length of the pixel measures in mm, None if the file does not state it."""
    for tag in (SHARED_GROUPS, FRAME_GROUPS):
        groups = sequence_items(dataset, tag)
        measures = sequence_items(groups[0], PIXEL_MEASURES) if groups else []
        value = measures[0].get(keyword) if measures else None
        if value is not None and 0 < float(value) < MAX_MM:
            return float(value)
    return None


def _volume(header: _Header, dataset: Any, path: Path) -> Volume:
    """Segment numbers on the even grid of the frames."""
    if not header.frames or header.declared != len(header.frames):
        raise InputError(f"{path}: declares {header.declared} frames and describes {len(header.frames)}")
    if not (0 < header.rows <= MAX_AXIS and 0 < header.columns <= MAX_AXIS):
        raise InputError(f"{path}: frames of {header.rows} x {header.columns} pixels")
    orientation, spacing = _common_plane(header.frames, path)
    along_row, down_column = np.array(orientation).reshape(2, 3)
    normal = np.cross(along_row, down_column)
    positions = np.array([frame.position for frame in header.frames])
    slices, step = _slices(positions @ normal, header.stated_mm, path)
    _check_sideways(positions, np.stack([along_row, down_column]), spacing, path)
    shape = (int(slices.max()) + 1, header.rows, header.columns)
    dtype = np.uint8 if max(header.codes) <= np.iinfo(np.uint8).max else np.uint16
    require_memory(shape, dtype, name=str(path))
    axes = np.stack([along_row * spacing[1], down_column * spacing[0], normal * step], axis=1)
    geometry = grid_of(axes, positions[int(slices.argmin())], shape, LPS_TO_SPL, str(path))
    array = np.zeros(shape, dtype)
    filled: set[int] = set()
    for at, number, pixels in zip(slices.tolist(), header.segments, _pixels(header, dataset, path), strict=True):
        if header.kind == "BINARY":
            if number not in header.codes:
                raise InputError(f"{path}: a frame belongs to segment {number}, which is not described")
            _put(array[at], pixels, number, path)
        else:
            if at in filled:
                raise InputError(f"{path}: two label map frames lie at one position; keep one of them")
            filled.add(at)
            array[at] = _numbers(header, pixels, path)
    return to_canonical(array, geometry)


def _common_plane(frames: tuple[Frame, ...], path: Path) -> tuple[Cosines, tuple[float, float]]:
    """Orientation and pixel spacing of all frames (row distance, column distance)."""
    first = frames[0]
    if any(f.position is None or f.orientation is None or f.pixel_spacing_mm is None for f in frames):
        raise InputError(f"{path}: a frame lacks its position, orientation or pixel spacing")
    assert first.orientation is not None
    assert first.pixel_spacing_mm is not None
    turned = [np.abs(np.subtract(f.orientation, first.orientation)).max() for f in frames]  # type: ignore[arg-type]
    if max(turned) > COSINE_ROUNDING or any(f.pixel_spacing_mm != first.pixel_spacing_mm for f in frames):
        raise InputError(f"{path}: frames differ in orientation or pixel spacing; split the file by plane")
    return first.orientation, first.pixel_spacing_mm


def _slices(
    distances: np.ndarray, stated_mm: tuple[float | None, float | None], path: Path
) -> tuple[np.ndarray, float]:
    """Slice index of each frame, and the distance of slices in mm.

    Empty frames are left out, so gaps are whole numbers of slices: of SpacingBetweenSlices, else of the smallest gap,
    else of SliceThickness (which may exceed the distance of overlapping slices, hence last).
    """
    levels = np.unique(distances)
    levels = levels[np.concatenate(([True], np.diff(levels) > SAME_POSITION_MM))]
    gaps = np.diff(levels)
    smallest = float(gaps.min()) if len(gaps) else None
    for step in (stated_mm[0], smallest, stated_mm[1]):
        if step is None:
            continue
        if not len(gaps):
            return np.zeros(len(distances), dtype=int), step
        steps = np.rint(gaps / step)
        # each gap is judged on its own: over many slices a rounded step drifts
        if steps.min() >= 1 and np.abs(gaps / step - steps).max() <= STEP_TOLERANCE:
            index = np.concatenate(([0], np.cumsum(steps))).astype(int)
            nearest = np.abs(distances[:, None] - levels).argmin(axis=1)
            return index[nearest], float((levels[-1] - levels[0]) / index[-1])
    if not len(gaps):
        raise InputError(f"{path}: one slice without SpacingBetweenSlices or SliceThickness: its thickness is unknown")
    listed = ", ".join(f"{gap:.3f}" for gap in np.unique(gaps.round(3))[:MAX_LISTED])
    raise InputError(f"{path}: slices lie at uneven distances ({listed} mm); resample the segmentation to an even grid")


def _check_sideways(positions: np.ndarray, plane: np.ndarray, spacing: tuple[float, float], path: Path) -> None:
    shift = np.ptp(positions @ plane.T, axis=0) / np.array(spacing[::-1])
    if shift.max() > SHIFT_PIXELS:
        raise InputError(
            f"{path}: frames are shifted sideways by up to {shift.max():.2f} pixels, as by a tilted gantry"
        )


def _pixels(header: _Header, dataset: Any, path: Path) -> Iterator[np.ndarray]:
    """Frames in stored order: bool for BINARY, unsigned for LABELMAP."""
    bits, size, count = header.bits, header.rows * header.columns, header.declared
    if header.samples != 1 or bits not in ((1, 8) if header.kind == "BINARY" else (8, 16)):
        raise InputError(f"{path}: {bits} bits a pixel do not fit a {header.kind} segmentation")
    if header.is_encapsulated:
        yield from _decoded(header, dataset, path)
        return
    if len(header.data) < (size * count * bits + 7) // 8:
        held, shape = len(header.data), f"{header.rows} x {header.columns}"
        raise InputError(f"{path}: truncated: {held} bytes of pixels for {count} frames of {shape}")
    stored = np.frombuffer(header.data, np.uint8)
    for k in range(count):
        if bits == 1:  # frames follow each other without filling bits
            start, stop = k * size, (k + 1) * size
            unpacked = np.unpackbits(stored[start // 8 : (stop + 7) // 8], bitorder="little")
            yield unpacked[start % 8 :][:size].reshape(header.rows, header.columns).astype(bool)
        else:
            dtype = np.dtype(f"{header.byte_order}u{bits // 8}")
            frame = np.frombuffer(header.data, dtype, size, k * size * dtype.itemsize)
            yield frame.reshape(header.rows, header.columns)


def _decoded(header: _Header, dataset: Any, path: Path) -> Iterator[np.ndarray]:
    """Frames of an encapsulated transfer syntax, by pydicom's decoders."""
    from pydicom.pixels import iter_pixels

    try:
        for frame in iter_pixels(dataset, raw=True):
            if frame.shape != (header.rows, header.columns):
                raise ValueError("a frame of another size")
            yield frame
    except (RuntimeError, *DAMAGE) as error:
        raise InputError(
            f"{path}: pixels in {header.syntax} cannot be decoded ({type(error).__name__}): install a decoder "
            "(`pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg`), or save the file uncompressed"
        ) from error


def _put(plane: np.ndarray, mask: np.ndarray, number: int, path: Path) -> None:
    """Write one segment's frame into its slice; another segment there is an error."""
    inside = mask.astype(bool)
    other = plane[inside]
    other = other[(other != 0) & (other != number)]
    if other.size:
        raise InputError(
            f"{path}: segments {int(other[0])} and {number} overlap ({other.size} voxels in one slice): one label a "
            "voxel is needed. Save one file for each, or decide which of them wins"
        )
    plane[inside] = number


def _numbers(header: _Header, pixels: np.ndarray, path: Path) -> np.ndarray:
    """Segment numbers of a label map frame, background as 0."""
    values = np.unique(pixels).tolist()
    unknown = [value for value in values if value not in header.codes and value != header.background]
    if unknown:
        raise InputError(f"{path}: pixels belong to segments {unknown[:MAX_LISTED]}, which are not described")
    if header.background and 0 in values:
        raise InputError(f"{path}: segment number 0 means a segment here; number segments from 1")
    out: np.ndarray = np.where(pixels == header.background, 0, pixels)
    return out

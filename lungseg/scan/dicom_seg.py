"""DICOM Segmentation objects: which segment each voxel belongs to, on the grid of their own frames.

Frames without any voxel of a segment are usually left out of a file, so a segmentation covers the slices from its
first to its last frame; everywhere else it says: not this segment.
"""

from __future__ import annotations

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
from lungseg.scan.image_header import MAX_AXIS, grid_of
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
MAX_LISTED = 5


@dataclass(frozen=True)
class Segmentation:
    """Segments of a DICOM file."""

    volume: Volume
    """Segment numbers, uint8 or uint16, canonical; 0 where there is no segment."""
    codes: Mapping[int, tuple[str, str] | None]
    """Segment number -> coding scheme and value of its SegmentedPropertyTypeCode; None without one."""


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
    dataset = _read_file(path)
    frames = read_frames(dataset)  # before anything else: it needs the elements as raw bytes
    kind = str(dataset.get("SegmentationType", ""))
    if kind == "FRACTIONAL":
        raise InputError(
            f"{path}: a FRACTIONAL segmentation holds probabilities or occupied shares of voxels, not labels: where "
            "to cut is yours to decide. Threshold it and save it as BINARY or LABELMAP"
        )
    if kind not in ("BINARY", "LABELMAP"):
        raise InputError(f"{path}: SegmentationType is '{kind[:20]}', not BINARY or LABELMAP")
    codes = _segment_codes(dataset, path)
    if kind == "BINARY" and 0 in codes:
        raise InputError(f"{path}: segment number 0, but numbers start at 1")
    volume = _volume(dataset, frames, kind, codes, path)
    return Segmentation(volume, codes)


def _read_file(path: Path) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        dataset = pydicom.dcmread(path)
        meta = dataset.file_meta.get("MediaStorageSOPClassUID", "")
    except (InvalidDicomError, OSError, EOFError, ValueError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{path}: not a readable DICOM file ({type(error).__name__})") from error
    if meta not in SEGMENTATION_CLASSES:
        raise InputError(
            f"{path}: no DICOM Segmentation, but SOP class {str(meta)[:64]}. Give DICOM-SEG, NIfTI, NRRD or MHA "
            "(RTSTRUCT contours must be converted first)"
        )
    return dataset


def _segment_codes(dataset: Any, path: Path) -> dict[int, tuple[str, str] | None]:
    """Numbers and type codes of the segments."""
    codes: dict[int, tuple[str, str] | None] = {}
    for item in dataset.get("SegmentSequence", ()):
        number = int(item.get("SegmentNumber", -1))
        if number < 0 or number in codes:
            raise InputError(f"{path}: segment numbers are missing or not unique")
        kinds = item.get("SegmentedPropertyTypeCodeSequence", ())
        code = (str(kinds[0].get("CodingSchemeDesignator", "")), str(kinds[0].get("CodeValue", ""))) if kinds else None
        codes[number] = code
    if not codes:
        raise InputError(f"{path}: describes no segment")
    return codes


def _volume(
    dataset: Any, frames: tuple[Frame, ...], kind: str, codes: Mapping[int, tuple[str, str] | None], path: Path
) -> Volume:
    """Segment numbers on the even grid of the frames."""
    rows, columns = int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0))
    declared = int(dataset.get("NumberOfFrames", 0))
    if not frames or declared != len(frames):
        raise InputError(f"{path}: declares {declared} frames and describes {len(frames)}")
    if not (0 < rows <= MAX_AXIS and 0 < columns <= MAX_AXIS):
        raise InputError(f"{path}: frames of {rows} x {columns} pixels")
    orientation, spacing = _common_plane(frames, path)
    positions = np.array([frame.position for frame in frames])
    along_row, down_column = np.array(orientation).reshape(2, 3)
    normal = np.cross(along_row, down_column)
    slices, step = _slices(positions @ normal, dataset, path)
    _check_sideways(positions, np.stack([along_row, down_column]), spacing, path)
    shape = (int(slices.max()) + 1, rows, columns)
    dtype = np.uint8 if max(codes) <= np.iinfo(np.uint8).max else np.uint16
    require_memory(shape, dtype, name=str(path))
    axes = np.stack([along_row * spacing[1], down_column * spacing[0], normal * step], axis=1)
    geometry = grid_of(axes, positions[int(slices.argmin())], shape, LPS_TO_SPL, str(path))
    array = np.zeros(shape, dtype)
    segments = _referenced_segments(dataset) if kind == "BINARY" else [0] * len(frames)
    filled: set[int] = set()
    for at, number, pixels in zip(slices.tolist(), segments, _pixels(dataset, kind, path), strict=True):
        if kind == "BINARY":
            if number not in codes:
                raise InputError(f"{path}: a frame belongs to segment {number}, which is not described")
            _put(array[at], pixels, number, path)
        else:
            if at in filled:
                raise InputError(f"{path}: two label map frames lie at one position; keep one of them")
            filled.add(at)
            array[at] = _numbers(dataset, pixels, codes, path)
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


def _stated_mm(dataset: Any, keyword: str) -> float | None:
    """A length of the pixel measures in mm, None if the file does not state it."""
    for tag in (SHARED_GROUPS, FRAME_GROUPS):
        groups = sequence_items(dataset, tag)
        measures = sequence_items(groups[0], PIXEL_MEASURES) if groups else []
        value = measures[0].get(keyword) if measures else None
        if value is not None and float(value) > 0:
            return float(value)
    return None


def _slices(distances: np.ndarray, dataset: Any, path: Path) -> tuple[np.ndarray, float]:
    """Slice index of each frame, and the distance of slices in mm.

    Empty frames are left out, so gaps are whole numbers of slices: of SpacingBetweenSlices, else of the smallest gap,
    else of SliceThickness (which may exceed the distance of overlapping slices, hence last).
    """
    levels = np.unique(distances)
    levels = levels[np.concatenate(([True], np.diff(levels) > SAME_POSITION_MM))]
    gaps = np.diff(levels)
    smallest = float(gaps.min()) if len(gaps) else None
    for step in (_stated_mm(dataset, "SpacingBetweenSlices"), smallest, _stated_mm(dataset, "SliceThickness")):
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


def _referenced_segments(dataset: Any) -> list[int]:
    """Segment number of each frame; -1 if a frame names none."""
    shared = sequence_items(dataset, SHARED_GROUPS)
    numbers = []
    for own in sequence_items(dataset, FRAME_GROUPS):
        named = sequence_items(own, SEGMENT_IDENTIFICATION) or (
            sequence_items(shared[0], SEGMENT_IDENTIFICATION) if shared else []
        )
        numbers.append(int(named[0].get("ReferencedSegmentNumber", -1)) if named else -1)
    return numbers


def _pixels(dataset: Any, kind: str, path: Path) -> Iterator[np.ndarray]:
    """Frames in stored order: bool for BINARY, unsigned for LABELMAP."""
    rows, columns, count = int(dataset.Rows), int(dataset.Columns), int(dataset.NumberOfFrames)
    bits = int(dataset.get("BitsAllocated", 0))
    if int(dataset.get("SamplesPerPixel", 1)) != 1 or bits not in ((1, 8) if kind == "BINARY" else (8, 16)):
        raise InputError(f"{path}: {bits} bits a pixel do not fit a {kind} segmentation")
    if dataset.file_meta.TransferSyntaxUID.is_compressed and dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        yield from _decoded(dataset, path)
        return
    data = dataset.get("PixelData", b"")
    size = rows * columns
    if len(data) < (size * count * bits + 7) // 8:
        raise InputError(f"{path}: truncated: {len(data)} bytes of pixels for {count} frames of {rows} x {columns}")
    stored = np.frombuffer(data, np.uint8)
    for k in range(count):
        if bits == 1:  # frames follow each other without filling bits
            start, stop = k * size, (k + 1) * size
            unpacked = np.unpackbits(stored[start // 8 : (stop + 7) // 8], bitorder="little")
            yield unpacked[start % 8 :][:size].reshape(rows, columns).astype(bool)
        else:
            dtype = np.dtype(np.uint8) if bits == 8 else np.dtype("<u2" if dataset.is_little_endian else ">u2")
            yield np.frombuffer(data, dtype, size, k * size * dtype.itemsize).reshape(rows, columns)


def _decoded(dataset: Any, path: Path) -> Iterator[np.ndarray]:
    """Frames of an encapsulated transfer syntax, by pydicom's decoders."""
    from pydicom.pixels import iter_pixels

    try:
        yield from iter_pixels(dataset, raw=True)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise InputError(
            f"{path}: pixels in {syntax} cannot be decoded ({type(error).__name__}): install a decoder "
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


def _numbers(dataset: Any, pixels: np.ndarray, codes: Mapping[int, tuple[str, str] | None], path: Path) -> np.ndarray:
    """Segment numbers of a label map frame, background as 0."""
    background = int(dataset.get("PixelPaddingValue", 0))
    values = np.unique(pixels).tolist()
    unknown = [value for value in values if value not in codes and value != background]
    if unknown:
        raise InputError(f"{path}: pixels belong to segments {unknown[:MAX_LISTED]}, which are not described")
    if background and 0 in values and 0 in codes:
        raise InputError(f"{path}: segment number 0 means a segment here; number segments from 1")
    out: np.ndarray = np.where(pixels == background, 0, pixels)
    return out

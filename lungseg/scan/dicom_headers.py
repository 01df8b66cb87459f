"""DICOM headers: which files of a folder are images, and what each of them says about itself.

Only headers are read. Nothing here keys on SOPInstanceUID, which anonymisers empty, nor on file names.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.volume import Triple

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
"""SOP class CT Image Storage (PS3.4 B.5)."""
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced and Legacy Converted Enhanced CT: multi-frame."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture and, as a prefix, its multi-frame variants."""
MAX_TEXT = 64
"""Longest LO/SH value of the standard; longer ones are cut."""
MAX_FILES = 200_000
"""Files looked at below one folder before the search is given up as a mistake."""

Cosines = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class SliceHeader:
    """Header of one DICOM image file; text fields are empty and numbers None if absent or unreadable."""

    path: Path
    patient_id: str
    study_uid: str
    series_uid: str
    modality: str
    sop_class: str
    image_type: str
    acquisition_number: str
    frames: int
    components: int
    shape: tuple[int, int]
    """Rows, columns."""
    pixel_spacing_mm: tuple[float, float] | None
    """Between rows, between columns."""
    position: Triple | None
    """ImagePositionPatient (L, P, S) in mm."""
    orientation: Cosines | None
    """ImageOrientationPatient: direction of a row, then of a column, in (L, P, S)."""
    has_rescale: bool
    acquisition: dict[str, Any]
    """Allow-listed covariates: kernel, kvp, slice_thickness_mm, manufacturer, modality."""


@dataclass(frozen=True)
class Damaged:
    """A file that is DICOM by its first bytes, or empty, and cannot be read."""

    path: Path
    reason: str


def walk_files(path: Path) -> Iterator[Path]:
    """Regular files below a folder in sorted order, or the file itself; each folder is entered once.

    Raises
    ------
    InputError
        If the path does not exist, a folder cannot be listed, or there are more than 200,000 files.
    """
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    entered: set[tuple[int, int]] = set()
    count = 0
    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in entered:  # a symbolic link back to where we were
            folders.clear()
            continue
        entered.add((info.st_dev, info.st_ino))
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            try:
                is_regular = stat.S_ISREG(file.stat().st_mode)
            except OSError:
                continue  # a dangling link: no file
            if not is_regular:
                continue  # opening a pipe or device could wait for ever
            count += 1
            if count > MAX_FILES:
                raise InputError(f"{path}: more than {MAX_FILES} files; give the folder of one study or cohort")
            yield file


def read_header(path: Path) -> SliceHeader | Damaged | None:
    """Header of one file; ``Damaged`` if it should be an image but cannot be read, None if it is no image.

    Raises
    ------
    InputError
        If the file cannot be opened.
    """
    if path.name.upper() == "DICOMDIR":
        return None  # a list of file names; nothing that a file names is ever opened
    try:
        with path.open("rb") as stream:
            start = stream.read(4096)
    except OSError as error:
        raise InputError(f"{path}: cannot be read (errno {error.errno}: {error.strerror})") from error
    if not start:
        looks_dicom = path.suffix.lower() in ("", ".dcm", ".dicom", ".ima") and not path.name.startswith(".")
        return Damaged(path, "empty (0 bytes)") if looks_dicom else None
    has_magic = start[128:132] == b"DICM"
    if not has_magic and start[:2] not in (b"\x08\x00", b"\x02\x00"):
        return None  # neither a preamble nor a first element of group 0002 or 0008
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.LoadPrivateTagsOff()
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        sop_class, syntax = _meta_information(start)
        if not has_magic or sop_class not in ("", CT_IMAGE, *ENHANCED_CT):
            return None  # a report, structure set, presentation state ...: no image
        return Damaged(
            path,
            f"truncated or damaged, or compressed in a way that cannot be decoded (transfer syntax {syntax}): copy "
            "the file again, or decompress the series (`gdcmconv --raw IN OUT`)",
        )
    return _slice_header(path, reader)


def _slice_header(path: Path, reader: Any) -> SliceHeader:
    """Header from a SimpleITK reader that has read the image information."""

    def text(tag: str) -> str:
        if not reader.HasMetaDataKey(tag):
            return ""
        raw: str = reader.GetMetaData(tag)
        if any("\ud800" <= c <= "\udfff" for c in raw):  # not UTF-8: bytes came as lone surrogates
            raw = raw.encode("utf-8", "surrogateescape").decode("latin-1")
        return raw.strip(" \0")

    position, orientation = _floats(text("0020|0032"), 3), _floats(text("0020|0037"), 6)
    spacing = _floats(text("0028|0030"), 2)
    kvp, thickness = _floats(text("0018|0060"), 1), _floats(text("0018|0050"), 1)
    size = reader.GetSize()
    modality, sop_class = text("0008|0060"), text("0008|0016")
    if not modality and sop_class == CT_IMAGE:
        modality = "CT"
    return SliceHeader(
        path=path,
        patient_id=text("0010|0020"),
        study_uid=text("0020|000d"),
        series_uid=text("0020|000e"),
        modality=modality,
        sop_class=sop_class,
        image_type=text("0008|0008"),
        acquisition_number=text("0020|0012"),
        frames=size[2] if len(size) > 2 else 1,
        components=reader.GetNumberOfComponents(),
        shape=(size[1], size[0]),
        pixel_spacing_mm=spacing if spacing and min(spacing) > 0 else None,  # type: ignore[arg-type]
        position=position,  # type: ignore[arg-type]
        orientation=_unit_cosines(orientation),
        has_rescale=all(_floats(text(tag), 1) is not None for tag in ("0028|1052", "0028|1053")),
        acquisition={
            "kernel": _plain(text("0018|1210")),
            "kvp": kvp[0] if kvp else None,
            "slice_thickness_mm": thickness[0] if thickness else None,
            "manufacturer": _plain(text("0008|0070")),
            "modality": _plain(modality),
        },
    )


def _floats(text: str, count: int) -> tuple[float, ...] | None:
    """Numbers of a decimal string value, or None if they are not exactly ``count`` finite ones."""
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def _unit_cosines(values: tuple[float, ...] | None) -> Cosines | None:
    """Row and column directions scaled to length 1; None if either has no length."""
    if values is None:
        return None
    row, column = np.asarray(values[:3]), np.asarray(values[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 0.01 or abs(lengths[1] - 1) > 0.01:  # rounded cosines stay well within 1 %
        return None
    return tuple(float(v) for v in (*(row / lengths[0]), *(column / lengths[1])))  # type: ignore[return-value]


def _plain(text: str) -> str | None:
    """Printable ASCII of a free-text value, at most 64 characters; None if nothing is left."""
    return "".join(c for c in text if " " <= c <= "~")[:MAX_TEXT].strip() or None


def _meta_information(start: bytes) -> tuple[str, str]:
    """SOP class and transfer syntax from the file meta information (PS3.10, always explicit little endian)."""
    found = {0x0002: "", 0x0010: ""}
    offset = 132
    while offset + 8 <= len(start):
        group, element, vr, length = struct.unpack_from("<HH2sH", start, offset)
        offset += 8
        if group != 2:
            break
        if vr in (b"OB", b"UN"):
            if offset + 4 > len(start):
                break
            length = struct.unpack_from("<I", start, offset)[0]
            offset += 4
        if element in found:
            found[element] = start[offset : offset + length].decode("ascii", "replace").strip(" \0")
        offset += length
    return found[0x0002], found[0x0010] or "unknown"

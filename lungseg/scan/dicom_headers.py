"""DICOM headers: which files of a folder are images, and what each of them says about itself.

Only headers are read, by pydicom, and no value larger than a header's. Nothing here keys on SOPInstanceUID, which
anonymisers empty, nor on file names.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lungseg.errors import InputError
from lungseg.scan.dicom_frames import FRAME_GROUPS, SHARED_GROUPS, Frame, read_frames
from lungseg.scan.dicom_layout import DEFLATED, PixelLayout, layout_faults, syntax_name
from lungseg.scan.dicom_values import Cosines, first_float, floats, plain, text, unit_cosines, unsigned
from lungseg.scan.volume import Triple

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
"""SOP class CT Image Storage (PS3.4 B.5)."""
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced and Legacy Converted Enhanced CT: multi-frame."""
DIRECTORY = "1.2.840.10008.1.3.10"
"""Media Storage Directory: a DICOMDIR, whatever its name."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture and, as a prefix, its multi-frame variants."""
CT_MARKS = tuple(
    b"\x08\x00\x16\x00" + head + uid.encode()
    for uid in (CT_IMAGE, *ENHANCED_CT)
    for head in (b"UI" + struct.pack("<H", len(uid) + len(uid) % 2), struct.pack("<I", len(uid) + len(uid) % 2))
)
"""SOPClassUID of CT as explicit and implicit little endian bytes: tells an image even where its start is damaged."""
MAX_FILES = 200_000
"""Files looked at below one folder before the search is given up as a mistake."""
MAX_VALUE_BYTES = 65_534
"""Longest value read of a header: all that explicit VR can say with 16 bits."""
MAX_GROUPS_BYTES = 2**28
"""Longest header of a multi-frame file; 3000 frames need about 6 MiB."""
MAX_INFLATED_BYTES = 2**30
"""Most bytes a deflated file may hold."""
START_BYTES = 4096
PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA = 0x7FE00010, 0x7FE00008, 0x7FE00009
OVERLAY_GROUPS = tuple(0x60000102 + (i << 17) for i in range(16))
"""OverlayBitPosition of the 16 overlay groups: above 0 if an overlay lies in unused bits of the pixels."""
TAGS = (
    0x00080008, 0x00080016, 0x00080060, 0x00080070, 0x00100020, 0x00180050, 0x00180060, 0x00181060, 0x00181210,
    0x0020000D, 0x0020000E, 0x00200012, 0x00200032, 0x00200037, 0x00200100, 0x00201041, 0x00280002, 0x00280004,
    0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00280120,
    0x00280121, 0x00281052, 0x00281053, 0x00281054, *OVERLAY_GROUPS,
)  # fmt: skip
"""The only elements read of a header."""


@dataclass(frozen=True)
class SliceHeader:
    """Header of one DICOM image file, or of one frame; text is empty and numbers None if absent or unreadable."""

    path: Path
    patient_id: str
    study_uid: str
    series_uid: str
    modality: str
    sop_class: str
    image_type: str
    acquisition_number: str
    pixel_spacing_mm: tuple[float, float] | None
    """Between rows, between columns."""
    position: Triple | None
    """ImagePositionPatient (L, P, S) in mm."""
    orientation: Cosines | None
    """ImageOrientationPatient: direction of a row, then of a column, in (L, P, S)."""
    slope: float | None
    intercept: float | None
    """From stored values to HU."""
    rescale_type: str
    acquisition: dict[str, Any]
    """Allow-listed covariates: kernel, kvp, slice_thickness_mm, manufacturer, modality."""
    layout: PixelLayout
    faults: tuple[str, ...] = ()
    """What contradicts itself in this file, in words."""
    frame: int = 0
    """Index of the frame in the file."""
    slice_location: float | None = None
    """SliceLocation: repeats the position along the table, with an offset and a sign of the vendor's own."""
    phase: tuple[str, str] = ("", "")
    """TemporalPositionIdentifier and TriggerTime: tell images of one position apart."""
    frames: tuple[Frame, ...] = ()
    """What a multi-frame file says of each of its frames; empty for a single image, and for a frame."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return self.layout.rows, self.layout.columns

    @property
    def has_rescale(self) -> bool:
        """Whether both RescaleSlope and RescaleIntercept are there."""
        return self.slope is not None and self.intercept is not None


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
            return _read_stream(path, stream)
    except OSError as error:
        raise InputError(f"{path}: cannot be read (errno {error.errno}: {error.strerror})") from error


def _read_stream(path: Path, stream: BinaryIO) -> SliceHeader | Damaged | None:
    """As ``read_header``, of an open file."""
    start = stream.read(START_BYTES)
    if not start.strip(b"\0"):
        what = "nothing but zeros, damaged: copy it again" if start else "empty (0 bytes)"
        return Damaged(path, what) if _named_like_a_slice(path) else None
    has_magic = start[128:132] == b"DICM"
    says_ct = any(mark in start for mark in CT_MARKS)
    if not has_magic and start[:2] not in (b"\x08\x00", b"\x02\x00"):
        if says_ct:
            return Damaged(path, "damaged: it holds a CT image, but does not begin like a DICOM file. Copy it again")
        return None  # neither a preamble nor a first element of group 0002 or 0008
    meta_class, syntax, data_start = _meta_information(start)
    if meta_class == DIRECTORY:
        return None
    # a SOP class that is no UID at all is damaged, and then the file may be anything
    class_fits = meta_class in ("", CT_IMAGE, *ENHANCED_CT) or not re.fullmatch(r"[0-9.]+", meta_class)
    should_be_image = says_ct or (has_magic and class_fits)
    advice = f"(transfer syntax {syntax_name(syntax)}): copy the file again, or leave it out"
    try:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(0)
        if syntax == DEFLATED:
            stream, size = _inflated(stream, data_start)
        dataset = _dataset(stream)
        layout = _layout(dataset, stream, syntax, size)
        frames = _frames(stream, layout) if layout and text(dataset, 0x00080016) in ENHANCED_CT else ()
    except Exception as error:  # a parser on untrusted bytes: whatever it stumbles over is the file's fault
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to nowhere
            raise
        what = " ".join(str(error).split())[:80] if isinstance(error, InputError) else type(error).__name__
        return Damaged(path, f"truncated or damaged, {what} {advice}") if should_be_image else None
    if layout is None:
        # a report, structure set, presentation state ... has no pixels; a CT image without them was cut off
        should_be_image |= text(dataset, 0x00080060) == "CT" and unsigned(dataset, 0x00280010) is not None
        return Damaged(path, f"truncated or damaged, it ends before its pixels {advice}") if should_be_image else None
    if should_be_image and layout.rows < 1 and layout.columns < 1:
        return Damaged(path, f"damaged, it has pixels, but no Rows and Columns {advice}")
    return _slice_header(path, dataset, layout, frames)


def _named_like_a_slice(path: Path) -> bool:
    """Whether a name could be that of a slice: IM0001, 1.2.840.99, x.dcm, but not LOCKFILE, .hidden or notes.txt."""
    suffix = path.suffix.lower()
    if suffix in (".dcm", ".dicom", ".ima"):
        return not path.name.startswith(".")
    has_none = not suffix or suffix[1:].isdigit()
    return has_none and not path.name.startswith(".") and any(c.isdigit() for c in path.name)


def _frames(stream: BinaryIO, layout: PixelLayout) -> tuple[Frame, ...]:
    """Frames of a multi-frame file, from a second look at its header: most files have none."""
    if layout.offset > MAX_GROUPS_BYTES:
        raise InputError(f"its header is longer than {MAX_GROUPS_BYTES >> 20} MiB")
    stream.seek(0)
    return read_frames(_dataset(stream, (SHARED_GROUPS, FRAME_GROUPS), None))


def _dataset(stream: BinaryIO, tags: tuple[int, ...] = TAGS, limit: int | None = MAX_VALUE_BYTES) -> Any:
    """The wanted elements of a file's header, undecoded; the stream is left at the pixel data, if it gets there."""
    from pydicom import dcmread

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values of patients, and what matters is judged here
        return dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(tags), defer_size=limit)


def _inflated(stream: BinaryIO, data_start: int) -> tuple[BinaryIO, int]:
    """A deflated file as explicit little endian in memory, and its size.

    Raises
    ------
    InputError
        If it holds more than 1 GiB.
    """
    stream.seek(data_start)
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    data = engine.decompress(stream.read(), MAX_INFLATED_BYTES)
    if engine.unconsumed_tail:
        raise InputError(f"it inflates to more than {MAX_INFLATED_BYTES >> 30} GiB")
    plain_syntax = b"1.2.840.10008.1.2.1\0"
    meta = b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(plain_syntax)) + plain_syntax
    whole = bytes(128) + meta + data
    return io.BytesIO(whole), len(whole)


def open_pixels(path: Path, layout: PixelLayout) -> BinaryIO:
    """A stream in which the offsets of ``layout`` count; ``OSError``, ``zlib.error`` or ``InputError`` if it fails."""
    stream = path.open("rb")
    if layout.syntax != DEFLATED:
        return stream
    with stream:
        start = stream.read(START_BYTES)
        return _inflated(stream, _meta_information(start)[2])[0]


def _layout(dataset: Any, stream: BinaryIO, syntax: str, size: int) -> PixelLayout | None:
    """How the pixels lie in the file; None if there are none. The stream stands at the pixel data element."""
    offset = stream.tell()
    element = stream.read(12)
    is_implicit, is_little = dataset.original_encoding
    order = "<" if is_little else ">"
    if len(element) < 12:
        return None
    group, number = struct.unpack_from(f"{order}HH", element)
    tag = group << 16 | number
    if tag not in (PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA):
        return None
    if element[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN") and not is_implicit:
        length, header = struct.unpack_from(f"{order}I", element, 8)[0], 12
    else:
        length, header = struct.unpack_from(f"{order}I", element, 4)[0], 8

    def number_of(tag: int) -> int | None:
        return unsigned(dataset, tag)

    value = offset + header
    signed = number_of(0x00280103) == 1
    frames = first_float(text(dataset, 0x00280008))
    low, high = number_of(0x00280120), number_of(0x00280121)
    return PixelLayout(
        syntax=syntax,
        offset=value,
        length=None if length == 0xFFFFFFFF else length,
        file_size=size,
        big_endian=not is_little,
        is_float=tag != PIXEL_DATA,
        rows=number_of(0x00280010) or 0,
        columns=number_of(0x00280011) or 0,
        frames=1 if frames is None else int(frames),
        samples=number_of(0x00280002) or 1,
        photometric=text(dataset, 0x00280004),
        bits_allocated=number_of(0x00280100) or 0,
        bits_stored=number_of(0x00280101) or 0,
        high_bit=number_of(0x00280102),
        signed=signed,
        padding=None if low is None else (low, low if high is None else high),
        overlay_in_pixels=any((number_of(tag) or 0) > 0 for tag in OVERLAY_GROUPS),
        stray_tail=length != 0xFFFFFFFF and _has_stray_tail(stream, value + length, size, is_implicit, order),
    )


def _has_stray_tail(stream: BinaryIO, start: int, size: int, is_implicit: bool, order: str) -> bool:
    """Whether what follows the pixels is neither filling (one byte repeated) nor an element of a higher tag."""
    stream.seek(start)
    tail = stream.read(START_BYTES)
    if len(set(tail)) < 2:
        return False
    if len(tail) < 8:
        return True
    group, number = struct.unpack_from(f"{order}HH", tail)
    if (group, number) <= (PIXEL_DATA >> 16, PIXEL_DATA & 0xFFFF):
        return True
    if not is_implicit:
        return not tail[4:6].isalpha() or not tail[4:6].isupper()
    length = struct.unpack_from(f"{order}I", tail, 4)[0]
    return length != 0xFFFFFFFF and start + 8 + length > size


def _slice_header(path: Path, dataset: Any, layout: PixelLayout, frames: tuple[Frame, ...]) -> SliceHeader:
    """Header of a file whose elements have been read."""
    modality, sop_class = text(dataset, 0x00080060), text(dataset, 0x00080016)
    if not modality and sop_class in (CT_IMAGE, *ENHANCED_CT):
        modality = "CT"
    slope, intercept = first_float(text(dataset, 0x00281053)), first_float(text(dataset, 0x00281052))
    faults = layout_faults(layout)
    if sop_class in ENHANCED_CT and len(frames) != layout.frames:
        faults += (f"declares {layout.frames} frames, but describes {len(frames)} (functional groups)",)
    return SliceHeader(
        path=path,
        patient_id=text(dataset, 0x00100020),
        study_uid=text(dataset, 0x0020000D),
        series_uid=text(dataset, 0x0020000E),
        modality=modality,
        sop_class=sop_class,
        image_type=text(dataset, 0x00080008),
        acquisition_number=text(dataset, 0x00200012),
        pixel_spacing_mm=floats(text(dataset, 0x00280030), 2),  # type: ignore[arg-type]
        position=floats(text(dataset, 0x00200032), 3),  # type: ignore[arg-type]
        orientation=unit_cosines(floats(text(dataset, 0x00200037), 6)),
        slope=slope,
        intercept=intercept,
        rescale_type=text(dataset, 0x00281054),
        acquisition={
            "kernel": plain(text(dataset, 0x00181210)),
            "kvp": first_float(text(dataset, 0x00180060)),
            "slice_thickness_mm": first_float(text(dataset, 0x00180050)),
            "manufacturer": plain(text(dataset, 0x00080070)),
            "modality": plain(modality),
        },
        layout=layout,
        faults=faults,
        slice_location=first_float(text(dataset, 0x00201041)),
        phase=(text(dataset, 0x00200100), text(dataset, 0x00181060)),
        frames=frames,
    )


def _meta_information(start: bytes) -> tuple[str, str, int]:
    """SOP class, transfer syntax, and where the data set starts (PS3.10: always explicit little endian)."""
    found = {0x0002: "", 0x0010: ""}
    offset = 132 if start[128:132] == b"DICM" else 0
    while offset + 8 <= len(start):
        group, element, vr, length = struct.unpack_from("<HH2sH", start, offset)
        if group != 2:
            break
        offset += 8
        if vr in (b"OB", b"UN"):
            if offset + 4 > len(start):
                break
            length = struct.unpack_from("<I", start, offset)[0]
            offset += 4
        if element in found:
            found[element] = start[offset : offset + length].decode("ascii", "replace").strip(" \0")
        offset += length
    return found[0x0002], found[0x0010] or "unknown", offset

"""Pixels of DICOM slices, one slice in memory at a time: uncompressed and RLE are read here, the rest by GDCM.

GDCM never sees a file of the user's: each compressed frame, once its own size and depth agree with the header, is
given to it in a minimal file written here. So its parser meets no hostile header, each frame of a multi-frame file
is decoded alone, and what comes back are stored values, to which the rescale of the frame is applied here.
"""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom_headers import CT_IMAGE, SliceHeader, open_pixels
from lungseg.scan.dicom_layout import ITEM_BYTES, NATIVE_SYNTAXES, RLE, PixelLayout
from lungseg.scan.private_folder import private_folder

ITEM, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
"""Tags of a fragment of compressed pixels and of their end (PS3.5 A.4)."""
MAX_FRAGMENTS = 1_000_000
JPEG_FRAMES = (*(0xC0 + i for i in range(16) if i not in (4, 8, 12)), 0xF7)
"""Markers of a JPEG frame header: SOF0-SOF15 without DHT, JPG and DAC (ITU T.81 B.1.1.3), and SOF55 of JPEG-LS."""
RLE_HEADER_BYTES = 64
CODESTREAM_SEARCH_BYTES = 65_536
"""Where the frame header of a compressed image must begin."""
SCRATCH_NAME = "000000.dcm"
"""A name of the kind that ``private_folder`` removes after a process that was killed."""


@dataclass
class SliceDecoder:
    """Decodes slices of any files; a context manager, because compressed ones pass through a private folder."""

    _exits: ExitStack = field(default_factory=ExitStack)
    _folder: Path | None = None
    _open: tuple[Path, BinaryIO] | None = None
    """The last file: frames of one file come one after the other, and a deflated one is inflated only once."""
    _fragments: dict[Path, list[list[tuple[int, int]]]] = field(default_factory=dict)
    """Of the last multi-frame file: for each frame the position and length of its fragments."""

    def __enter__(self) -> SliceDecoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close()
        self._exits.close()

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _stream(self, header: SliceHeader) -> BinaryIO:
        """The open file of a slice."""
        if self._open is None or self._open[0] != header.path:
            self._close()
            self._open = (header.path, open_pixels(header.path, header.layout))
        return self._open[1]

    def stored_values(self, header: SliceHeader) -> np.ndarray:
        """Stored values of one slice, without rescale.

        Parameters
        ----------
        header : SliceHeader
            Of a file without faults, or of one of its frames.

        Returns
        -------
        integer array, shape (rows, columns)

        Raises
        ------
        InputError
            If the file cannot be decoded, or what it holds contradicts its header.
        ResourceError
            If no temporary file can be written.
        """
        layout = header.layout
        try:
            stream = self._stream(header)
            if stream.seek(0, io.SEEK_END) != layout.file_size:
                raise InputError("it has changed since its header was read: leave a scan alone while it is read")
            if layout.syntax in NATIVE_SYNTAXES or layout.length is not None:
                values = _native(stream, layout, header.frame)
            else:
                values = self._compressed(stream, header)
        except (OSError, EOFError, zlib.error) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else "too short"
            raise InputError(f"{header.path}: truncated or damaged ({what}); copy the file again") from error
        except InputError as error:
            raise InputError(f"{header.path}: {error}") from error
        return _without_unused_bits(values, header)

    def _compressed(self, stream: BinaryIO, header: SliceHeader) -> np.ndarray:
        """One frame of encapsulated pixels."""
        layout = header.layout
        if header.path not in self._fragments:
            self._fragments = {header.path: _frame_fragments(stream, layout)}
        parts = []
        for position, length in self._fragments[header.path][header.frame]:
            stream.seek(position)
            parts.append(stream.read(length))
        data = b"".join(parts)
        if layout.syntax == RLE:
            return _decode_rle(data, layout)
        bits = max(_checked_bits(data, layout), layout.bits_stored)
        if self._folder is None:
            self._folder = self._exits.enter_context(private_folder())
        # GDCM drops the bits above BitsStored: it is told of none, and _without_unused_bits looks at what they hold
        whole = replace(layout, bits_stored=bits)
        return _decode_gdcm(data, whole, self._folder / SCRATCH_NAME)


def _native(stream: BinaryIO, layout: PixelLayout, frame: int) -> np.ndarray:
    """One uncompressed frame."""
    stream.seek(layout.offset + frame * layout.frame_bytes)
    data = stream.read(layout.frame_bytes)
    if len(data) != layout.frame_bytes:
        raise EOFError
    kind = f"{'>' if layout.big_endian else '<'}{'i' if layout.signed else 'u'}{layout.bits_allocated // 8}"
    return np.frombuffer(data, kind).reshape(layout.rows, layout.columns)


def _frame_fragments(stream: BinaryIO, layout: PixelLayout) -> list[list[tuple[int, int]]]:
    """Position and length of the fragments of each frame.

    Raises
    ------
    InputError
        If the items do not fit into the file, or it is unclear which of them belong to which frame.
    """
    items: list[tuple[int, int]] = []
    position = layout.offset
    while True:
        stream.seek(position)
        head = stream.read(ITEM_BYTES)
        if len(head) < ITEM_BYTES:
            raise InputError("truncated: its compressed pixels have no end; copy the file again")
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == SEQUENCE_END:
            break
        if (group, element) != ITEM or position + ITEM_BYTES + length > layout.file_size:
            raise InputError("truncated or damaged: its compressed pixels do not fit; copy the file again")
        items.append((position + ITEM_BYTES, length))
        position += ITEM_BYTES + length
        if len(items) > MAX_FRAGMENTS:
            raise InputError(f"damaged: more than {MAX_FRAGMENTS} fragments of pixels")
    if len(items) < 1 + layout.frames:
        raise InputError(f"truncated: {max(len(items) - 1, 0)} fragments for {layout.frames} frames of pixels")
    (table, table_length), *fragments = items
    if layout.frames == 1:
        return [fragments]
    if len(fragments) == layout.frames:
        return [[fragment] for fragment in fragments]
    stream.seek(table)
    offsets = np.frombuffer(stream.read(table_length), "<u4").tolist() if table_length == 4 * layout.frames else []
    index = {fragment[0] - fragments[0][0]: i for i, fragment in enumerate(fragments)}
    starts = [index.get(offset, -1) for offset in offsets]
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise InputError(
            f"{len(fragments)} fragments for {layout.frames} frames, and no table that says which is whose"
        )
    return [fragments[a:b] for a, b in zip(starts, [*starts[1:], len(fragments)], strict=True)]


def _decode_rle(data: bytes, layout: PixelLayout) -> np.ndarray:
    """A frame of RLE Lossless (PS3.5 annex G): a segment of run lengths for each byte of the values, highest first.

    pydicom's decoder would take the start of a longer image for the whole.
    """
    width, pixels = layout.bits_allocated // 8, layout.rows * layout.columns
    starts = np.frombuffer(data[:RLE_HEADER_BYTES], "<u4").tolist() if len(data) >= RLE_HEADER_BYTES else [0]
    bounds = [*starts[1 : 1 + width], len(data)]
    if starts[0] != width or bounds[0] < RLE_HEADER_BYTES or any(a >= b for a, b in pairwise(bounds)):
        raise InputError("truncated or damaged: its RLE pixels cannot be decoded; copy the file again")
    segments = []
    for start, stop in pairwise(bounds):
        values = _unpacked(data[start:stop], pixels + layout.columns)
        if not pixels <= len(values) < pixels + layout.columns:  # a row more means that Rows is wrong; less is padding
            raise InputError(
                f"truncated or damaged: its RLE pixels are {len(values)} values, not {layout.rows} x {layout.columns}"
            )
        segments.append(np.frombuffer(values, np.uint8, pixels))
    kind = f">{'i' if layout.signed else 'u'}{width}"
    return np.stack(segments, axis=-1).view(kind).reshape(layout.rows, layout.columns)


def _unpacked(data: bytes, limit: int) -> bytearray:
    """Runs and literals of a segment (PackBits) up to a number of bytes."""
    values = bytearray()
    position = 0
    while position < len(data) and len(values) < limit:
        head = data[position]
        if head < 128:
            values += data[position + 1 : position + 2 + head]
            position += 2 + head
        else:
            values += data[position + 1 : position + 2] * (257 - head if head > 128 else 0)
            position += 2 if head > 128 else 1
    return values[:limit]


def _checked_bits(data: bytes, layout: PixelLayout) -> int:
    """Bits of compressed pixels; refuses those whose own size or depth is not that of the header.

    A decoder could overrun.
    """
    found = _codestream_size(data)
    if found is None:
        raise InputError("damaged: its compressed pixels have no image header; copy the file again")
    rows, columns, components, bits = found
    if (rows, columns, components) != (layout.rows, layout.columns, 1) or bits > layout.bits_allocated:
        raise InputError(
            f"the header declares {layout.rows} x {layout.columns} pixels of {layout.bits_allocated} bits, the "
            f"compressed image {rows} x {columns} of {bits} bits and {components} components: a damaged file"
        )
    return bits


def _codestream_size(data: bytes) -> tuple[int, int, int, int] | None:
    """Rows, columns, components and bits of a JPEG, JPEG-LS or JPEG 2000 image from its own header."""
    start = data.find(b"\xff\x4f\xff\x51", 0, CODESTREAM_SEARCH_BYTES)  # SOC, SIZ (ITU T.800 A.5.1)
    if start >= 0 and len(data) >= start + 43:
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        components, depth = struct.unpack_from(">HB", data, start + 40)
        return bottom - top, right - left, components, (depth & 0x7F) + 1
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 10 <= min(len(data), CODESTREAM_SEARCH_BYTES):
        if data[position] != 0xFF:
            return None
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in JPEG_FRAMES:
            bits, rows, columns, components = struct.unpack_from(">BHHB", data, position + 4)
            return rows, columns, components, bits
        position += 2 + length
    return None


def _decode_gdcm(data: bytes, layout: PixelLayout, scratch: Path) -> np.ndarray:
    """A frame decoded by GDCM from a minimal file at ``scratch``."""
    import SimpleITK as sitk

    try:
        scratch.write_bytes(_minimal_file(data, layout))
    except OSError as error:
        raise ResourceError(f"a temporary file of {len(data)} bytes could not be written: {error.strerror}") from error
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(scratch))
    try:
        values: np.ndarray = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise InputError("truncated or damaged: its pixels cannot be decompressed; copy the file again") from error
    if values.size != layout.rows * layout.columns or values.dtype.kind not in "iu":
        raise InputError(f"damaged: decoded to {values.shape} values of type {values.dtype}")
    return values.reshape(layout.rows, layout.columns)


def _minimal_file(data: bytes, layout: PixelLayout) -> bytes:
    """An explicit little endian DICOM file of one compressed frame and what is needed to decode it."""

    def element(tag: int, vr: bytes, value: bytes) -> bytes:
        value += b"\0" if len(value) % 2 else b""
        return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value

    def number(tag: int, value: int) -> bytes:
        return element(tag, b"US", struct.pack("<H", value))

    uid = b"1.2.3"
    meta = element(0x00020002, b"UI", CT_IMAGE.encode()) + element(0x00020003, b"UI", uid)
    meta += element(0x00020010, b"UI", layout.syntax.encode())
    image = element(0x00080016, b"UI", CT_IMAGE.encode()) + element(0x00080018, b"UI", uid)
    image += number(0x00280002, 1) + element(0x00280004, b"CS", b"MONOCHROME2 ")
    image += number(0x00280010, layout.rows) + number(0x00280011, layout.columns)
    image += number(0x00280100, layout.bits_allocated) + number(0x00280101, layout.bits_stored)
    image += number(0x00280102, layout.bits_stored - 1) + number(0x00280103, int(layout.signed))
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + _encapsulated(data)
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    return bytes(128) + b"DICM" + length + meta + image + pixels


def _encapsulated(data: bytes) -> bytes:
    """One frame as a fragment, after an empty offset table."""
    data += b"\0" if len(data) % 2 else b""
    items = struct.pack("<HHI", *ITEM, 0) + struct.pack("<HHI", *ITEM, len(data)) + data
    return items + struct.pack("<HHI", *SEQUENCE_END, 0)


def _without_unused_bits(values: np.ndarray, header: SliceHeader) -> np.ndarray:
    """Values with whatever the bits above BitsStored hold replaced by the sign, as PS3.5 8.1.1 wants it.

    Raises
    ------
    InputError
        If those bits hold neither the sign nor zeros, and no overlay is declared there: BitsStored is wrong.
    """
    layout = header.layout
    if layout.bits_stored == layout.bits_allocated:
        return values
    span = 1 << layout.bits_stored
    smallest = -(span >> 1) if layout.signed else 0
    low, high = int(values.min()), int(values.max())
    if smallest <= low and high < smallest + span:
        return values
    if not layout.overlay_in_pixels and not (low >= 0 and high < span):
        raise InputError(
            f"{header.path}: BitsStored is {layout.bits_stored}, but the values run from {low} to {high}: a damaged "
            "header, or an overlay in the pixels that is not declared"
        )
    clean = values.astype(np.int64) & (span - 1)
    return np.where(clean >= smallest + span, clean - span, clean)

"""How the pixels of a DICOM file are stored, and every way in which a header contradicts itself about it."""

from __future__ import annotations

from dataclasses import dataclass

DEFLATED = "1.2.840.10008.1.2.1.99"
"""Deflated Explicit VR Little Endian: everything after the file meta information is one zlib stream."""
RLE = "1.2.840.10008.1.2.5"
NATIVE_SYNTAXES = {
    "1.2.840.10008.1.2": "Implicit VR Little Endian",
    "1.2.840.10008.1.2.1": "Explicit VR Little Endian",
    DEFLATED: "Deflated Explicit VR Little Endian",
    "1.2.840.10008.1.2.2": "Explicit VR Big Endian",
}
"""Uncompressed transfer syntaxes (PS3.5 annex A): read here."""
COMPRESSED_SYNTAXES = {
    RLE: "RLE Lossless",
    "1.2.840.10008.1.2.4.50": "JPEG Baseline (Process 1)",
    "1.2.840.10008.1.2.4.51": "JPEG Extended (Process 2 and 4)",
    "1.2.840.10008.1.2.4.57": "JPEG Lossless (Process 14)",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless (Process 14, Selection Value 1)",
    "1.2.840.10008.1.2.4.80": "JPEG-LS Lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS Near-lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 Lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
}
"""Compressed ones that can be decoded: RLE here, the others by GDCM in SimpleITK."""
OTHER_SYNTAXES = {
    "1.2.840.10008.1.2.1.98": "Encapsulated Uncompressed Explicit VR Little Endian",
    "1.2.840.10008.1.2.4.92": "JPEG 2000 Part 2 Multi-component Lossless",
    "1.2.840.10008.1.2.4.93": "JPEG 2000 Part 2 Multi-component",
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.4.201": "High-Throughput JPEG 2000 Lossless",
    "1.2.840.10008.1.2.4.202": "High-Throughput JPEG 2000 RPCL Lossless",
    "1.2.840.10008.1.2.4.203": "High-Throughput JPEG 2000",
    "1.2.840.113619.5.2": "GE private, big endian pixels",
}
"""Known by name, to tell the user what it is."""
IMPLICIT_DEFAULT = ("", "unknown")
"""Files without meta information are implicit little endian (PS3.10 7.1, old ACR-NEMA files)."""
ITEM_BYTES = 8
"""Head of a fragment of compressed pixels: no frame is smaller."""


@dataclass(frozen=True)
class PixelLayout:
    """Where the pixels of one file lie and what their bytes mean, as declared: not to be trusted before a check."""

    syntax: str
    """Transfer syntax UID, or 'unknown'."""
    offset: int
    """First byte of the pixel data value."""
    length: int | None
    """Declared bytes of the value; None if encapsulated (undefined length)."""
    file_size: int
    big_endian: bool
    is_float: bool
    """FloatPixelData or DoubleFloatPixelData."""
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int | None
    signed: bool
    padding: tuple[int, int] | None
    """Lowest and highest 16 bits of PixelPaddingValue and PixelPaddingRangeLimit, as unsigned."""
    overlay_in_pixels: bool
    """Whether an overlay lies in unused bits of the pixels."""
    stray_tail: bool = False
    """Whether the file goes on after uncompressed pixels with bytes that are neither filling nor an element."""

    @property
    def is_colour(self) -> bool:
        """Whether these are colour or palette images."""
        return self.samples != 1 or self.photometric not in ("MONOCHROME1", "MONOCHROME2", "")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame."""
        return self.rows * self.columns * self.samples * self.bits_allocated // 8


def syntax_name(uid: str) -> str:
    """UID and name of a transfer syntax."""
    name = (NATIVE_SYNTAXES | COMPRESSED_SYNTAXES | OTHER_SYNTAXES).get(uid)
    return f"{uid} {name}" if name else uid


def layout_faults(layout: PixelLayout) -> tuple[str, ...]:
    """What is wrong with the description of the pixels, in words for the user; empty if it is consistent.

    Source
    ------
    RELIABILITY rows 16, 17; PS3.3 C.7.6.3, PS3.5 8.1.1.
    """
    if layout.is_float:
        return ("holds floating point pixels, not CT",)
    if layout.is_colour:
        return ("a colour image, not a scan",)
    if layout.rows < 1 or layout.columns < 1 or layout.frames < 1:
        return (f"declares {layout.frames} frames of {layout.rows} x {layout.columns} pixels",)
    if layout.bits_allocated not in (8, 16, 32):
        return (f"BitsAllocated is {layout.bits_allocated}, not 8, 16 or 32",)
    if not 1 <= layout.bits_stored <= layout.bits_allocated:
        return (f"BitsStored {layout.bits_stored} does not fit into BitsAllocated {layout.bits_allocated}",)
    if layout.high_bit not in (None, layout.bits_stored - 1):
        return (f"HighBit {layout.high_bit} contradicts BitsStored {layout.bits_stored}",)
    return _size_faults(layout)


def _size_faults(layout: PixelLayout) -> tuple[str, ...]:
    """Declared sizes against the bytes that are there."""
    there = layout.file_size - layout.offset
    if layout.syntax in NATIVE_SYNTAXES or layout.syntax in IMPLICIT_DEFAULT:
        needed = layout.frame_bytes * layout.frames
        if layout.length is None:
            return ("its pixels are encapsulated, but its transfer syntax is an uncompressed one",)
        if there < min(needed, layout.length):
            return (f"truncated: {there} of {layout.length} bytes of pixels are there. Copy the file again",)
        # a row more than needed means that Rows or another size is wrong; less is padding
        if not 0 <= layout.length - needed < max(2, layout.columns * layout.bits_allocated // 8):
            size = f"{layout.frames} x {layout.rows} x {layout.columns} pixels of {layout.bits_allocated} bits"
            return (f"declares {size}, {needed} bytes, but holds {layout.length} bytes of pixels",)
        if layout.stray_tail:
            extra = there - layout.length
            return (f"damaged: {extra} bytes more than it should have, perhaps within the pixels. Copy it again",)
        return ()
    if layout.syntax not in COMPRESSED_SYNTAXES:
        return (
            f"transfer syntax {syntax_name(layout.syntax)} cannot be decoded: export the series uncompressed, or "
            "decompress it first (`gdcmconv --raw IN OUT`; for high-throughput JPEG 2000 `pip install pylibjpeg "
            "pylibjpeg-openjpeg`, then pydicom's `Dataset.decompress()`)",
        )
    if layout.length is not None:
        return (f"its pixels are not encapsulated, as transfer syntax {syntax_name(layout.syntax)} demands",)
    if layout.frames * ITEM_BYTES > there:
        return (f"truncated: declares {layout.frames} frames, but {there} bytes of pixels are there",)
    return ()

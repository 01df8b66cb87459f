"""DICOM files as flat data elements, so that any value, VR or declared length can be spoiled (PS3.5 7.1)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Tag = tuple[int, int]
UNDEFINED = 0xFFFFFFFF
LONG_VR = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV")
"""VRs whose length takes four bytes (PS3.5 7.1.2)."""


@dataclass(frozen=True)
class Element:
    """One data element as bytes; ``length`` overrides the declared length."""

    tag: Tag
    vr: bytes
    value: bytes
    length: int | None = None


@dataclass(frozen=True)
class Parsed:
    """A DICOM file as flat elements; sequences stay bytes."""

    preamble: bytes
    meta: tuple[Element, ...]
    body: tuple[Element, ...]
    syntax: str

    def find(self, tag: Tag) -> Element | None:
        """The first element with this tag."""
        return next((e for e in (*self.meta, *self.body) if e.tag == tag), None)

    def change(self, tag: Tag, edit: Callable[[Element], Element | None]) -> Parsed:
        """Every element with this tag edited, or left out for None; one is added if there is none."""

        def run(elements: tuple[Element, ...]) -> tuple[Element, ...]:
            return tuple(new for e in elements for new in ([edit(e)] if e.tag == tag else [e]) if new is not None)

        if self.find(tag) is None and tag[0] != 2:
            added = edit(Element(tag, b"UN", b""))
            body = (*self.body, *([added] if added else []))
            return replace(self, body=tuple(sorted(body, key=lambda e: e.tag)))
        return replace(self, meta=run(self.meta), body=run(self.body))

    def set(self, tag: Tag, value: bytes | int) -> Parsed:
        """The file with another value of one tag; numbers are US."""
        if isinstance(value, int):
            raw, vr = struct.pack((">" if self.syntax == "big" else "<") + "H", value), b"US"
        else:
            raw, vr = value + (b" " if len(value) % 2 else b""), b"DS"
        return self.change(tag, lambda e: replace(e, value=raw, vr=vr if e.vr == b"UN" else e.vr))

    def build(self) -> bytes:
        """The bytes of the file."""
        body = _write(self.body, self.syntax != "implicit", ">" if self.syntax == "big" else "<")
        if self.syntax == "deflated":
            packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
            body = packer.compress(body) + packer.flush()
            body += b"\0" * (len(body) % 2)
        return self.preamble + _write(self.meta, True, "<") + body


def parse(data: bytes, syntax: str) -> Parsed:
    """Elements of a healthy file."""
    meta, end = _read(data, 132, True, "<", only_meta=True)
    body = data[end:]
    if syntax == "deflated":
        body = zlib.decompress(body, -zlib.MAX_WBITS)
    elements, _ = _read(body, 0, syntax != "implicit", ">" if syntax == "big" else "<")
    return Parsed(data[:132], meta, elements, syntax)


def _read(
    data: bytes, at: int, explicit: bool, order: str, *, only_meta: bool = False
) -> tuple[tuple[Element, ...], int]:
    found = []
    while at < len(data):
        tag = struct.unpack_from(order + "HH", data, at)
        if only_meta and tag[0] != 2:
            break
        if not explicit:
            vr, length, start = b"UN", struct.unpack_from(order + "I", data, at + 4)[0], at + 8
        else:
            vr = data[at + 4 : at + 6]
            is_long = vr in LONG_VR
            length = struct.unpack_from(order + ("I" if is_long else "H"), data, at + (8 if is_long else 6))[0]
            start = at + (12 if is_long else 8)
        stop = len(data) if length == UNDEFINED else start + length  # only the pixels, which come last, have none
        found.append(Element(tag, vr, data[start:stop], UNDEFINED if length == UNDEFINED else None))
        at = stop
    return tuple(found), at


def _write(elements: Sequence[Element], explicit: bool, order: str) -> bytes:
    parts = []
    for e in elements:
        length = len(e.value) if e.length is None else e.length
        if not explicit:
            head = struct.pack(order + "HHI", *e.tag, length & UNDEFINED)
        elif e.vr in LONG_VR:
            head = struct.pack(order + "HH", *e.tag) + e.vr + struct.pack(order + "HI", 0, length & UNDEFINED)
        else:
            head = struct.pack(order + "HH", *e.tag) + e.vr + struct.pack(order + "H", length & 0xFFFF)
        parts.append(head + e.value)
    return b"".join(parts)

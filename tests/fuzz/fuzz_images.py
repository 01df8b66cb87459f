"""Mutants of NIfTI, NRRD and MetaImage files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fuzz_bases import GRID, IMAGE_BASES, ImageBase, image_base
from fuzz_mutant import Expectation, Mutant, flip_bytes

NIFTI_FIELDS: tuple[tuple[str, int, str], ...] = (
    ("sizeof_hdr", 0, "i"), ("dim0", 40, "h"), ("dim1", 42, "h"), ("dim2", 44, "h"), ("dim3", 46, "h"),
    ("dim4", 48, "h"), ("dim5", 50, "h"), ("datatype", 70, "h"), ("bitpix", 72, "h"), ("pixdim0", 76, "f"),
    ("pixdim1", 80, "f"), ("pixdim2", 84, "f"), ("pixdim3", 88, "f"), ("vox_offset", 108, "f"),
    ("scl_slope", 112, "f"), ("scl_inter", 116, "f"), ("units", 123, "b"), ("qform_code", 252, "h"),
    ("sform_code", 254, "h"), ("quatern_b", 256, "f"), ("quatern_c", 260, "f"), ("quatern_d", 264, "f"),
    ("qoffset_x", 268, "f"), ("srow_x0", 280, "f"), ("srow_y1", 300, "f"), ("srow_z2", 320, "f"), ("srow_x3", 292, "f"),
    ("magic", 344, "i"),
)  # fmt: skip
"""Name, offset and type of the fields of nifti1.h that matter."""
INTEGERS = (0, 1, -1, 2, 3, 4, 7, 8, 16, 19, 21, 22, 40, 44, 48, 128, 256, 512, 1024, 32767, -32768)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1.05, 2.0, 7.0, 352.0, 348.0, 354.0, 8800.0, 1e9, -1e9, 1e-9, 1e38, float("nan"),
          float("inf"), -float("inf"))  # fmt: skip
WORDS = (
    b"", b"0", b"-1", b"1", b"2", b"3", b"4", b"nan", b"inf", b"1e30", b"99999999999999999999", b"short",
    b"ushort", b"double", b"block", b"MET_USHORT", b"MET_DOUBLE", b"MET_STRING", b"True", b"False", b"raw",
    b"gzip", b"bzip2", b"ascii", b"hex", b"big", b"left-anterior-superior", b"right-anterior-superior-time",
    b"scanner-xyz", b"LOCAL", b"LIST", b"../../../etc/passwd", b"%s%s%n", b"44 48", b"44 48 20 1", b"48 44 20",
    b"44 48 40", b"44 48 19", b"0 0 0", b"100000 100000 100000", b"1 1 1", b"0.0065 0.00625 0.005",
    b"(1,0,0) (0,1,0)", b"none none none", b"(1,0,0) (1,0,0) (0,0,1)", b"(0,0,0) (0,0,0) (0,0,0)",
    b"1 0 0 0 1 0 0 0 0", b"list complex domain",
)  # fmt: skip
"""Values put into text headers."""


ALL_SLICES = frozenset(range(GRID.shape[0]))


@dataclass
class ImageDraft:
    """An image file while it is being spoiled."""

    base: ImageBase
    rng: np.random.Generator
    data: bytes = b""
    changes: dict[str, Any] = field(default_factory=dict)
    words: str = ""

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def build(self, header: bytes | None = None, voxels: bytes | None = None) -> None:
        """Set the file from a changed header or changed voxels."""
        self.data = self.base.build(
            self.base.header if header is None else header, self.base.voxels if voxels is None else voxels
        )

    @property
    def is_nifti(self) -> bool:
        return self.base.suffix.startswith(".nii")


def header_bytes(d: ImageDraft) -> None:
    """Bytes or bits of the header."""
    d.build(header=flip_bytes(d.base.header, d.rng, 0, len(d.base.header), int(d.rng.integers(1, 9))))
    d.changes["header"] = True


def header_field(d: ImageDraft) -> None:
    """One field of the header set to a value it cannot have, or should not."""
    d.changes["header"] = True
    if d.is_nifti:
        name, at, kind = d.pick(NIFTI_FIELDS)
        value = d.pick(FLOATS) if kind == "f" else d.pick(INTEGERS)
        if kind == "b":
            value = int(np.clip(value, -128, 127))
        raw = bytearray(d.base.header)
        struct.pack_into(d.base.order + kind, raw, at, value)
        d.words = f"{name} = {value}"
        return d.build(header=bytes(raw))
    lines = d.base.header.split(b"\n")
    keys = [i for i, line in enumerate(lines) if b":" in line or b"=" in line]
    at = int(d.pick(keys))
    mark = b"=" if b"=" in lines[at] else b":"
    key, _, old = lines[at].partition(mark)
    how = d.pick(("value", "value", "value", "number", "gone", "doubled", "long"))
    value = d.pick(WORDS)
    if how == "number":
        parts = old.strip().replace(b"(", b"").replace(b")", b"").replace(b",", b" ").split()
        place = int(d.rng.integers(len(parts))) if parts else 0
        text = old.replace(parts[place], d.pick((b"0", b"-1", b"7", b"nan", b"1e9", b"0.001")), 1) if parts else old
        lines[at] = key + mark + text
    elif how == "gone":
        del lines[at]
    elif how == "doubled":
        lines.insert(at, key + mark + b" " + value)
    elif how == "long":
        lines[at] = key + mark + b" " + old * 20000
    else:
        lines[at] = key + mark + b" " + value
    d.words = f"{how} {key.decode()} {value!r}"
    d.build(header=b"\n".join(lines))


def voxel_bytes(d: ImageDraft) -> None:
    """Bytes of the voxels: behind a checksum they are given away, else not."""
    count = int(d.rng.integers(1, 65))
    if d.base.compression:
        whole = d.base.build(d.base.header, d.base.voxels)
        start = 10 if d.base.compression == "file" else len(d.base.header)
        d.data = flip_bytes(whole, d.rng, start, len(whole), count)
        return
    d.build(voxels=flip_bytes(d.base.voxels, d.rng, 0, len(d.base.voxels), count))
    d.changes["free"] = ALL_SLICES


def cut(d: ImageDraft) -> None:
    """The file cut short, mostly within its voxels."""
    d.build()
    end = len(d.data)
    at = d.pick((0, int(d.rng.integers(400)), int(d.rng.integers(end)), int(d.rng.integers(end)), end - 1, end - 8))
    d.data = d.data[:at]
    d.words = f"at {at} of {end}"


def longer(d: ImageDraft) -> None:
    """Bytes too many: a slice, a second copy, a few zeros, another gzip member."""
    d.build()
    how = d.pick(("slice", "twice", "zeros", "garbage", "member"))
    more = {
        "slice": b"\0" * 4224, "twice": d.data, "zeros": b"\0" * 16, "garbage": d.rng.bytes(1000),
        "member": zlib.compress(d.base.voxels),
    }[how]  # fmt: skip
    d.data += more
    d.words = how


def block(d: ImageDraft) -> None:
    """A block of the file zeroed, doubled or dropped."""
    d.build()
    size = int(2 ** d.rng.integers(2, 13))
    a = int(d.rng.integers(0, max(len(d.data) - size, 1)))
    how = d.pick(("zeroed", "doubled", "dropped"))
    part = d.data[a : a + size]
    middle = {"zeroed": b"\0" * len(part), "doubled": part + part, "dropped": b""}[how]
    d.data = d.data[:a] + middle + d.data[a + size :]
    d.words = f"{how} {size} at {a}"
    d.changes["header"] = a < len(d.base.header) and d.base.compression != "file"
    if how == "zeroed" and a + size > len(d.base.header) and not d.base.compression:
        d.changes["free"] = ALL_SLICES


def voxel_values(d: ImageDraft) -> None:
    """Voxels that are no HU: NaN, infinity, shifted, scaled, bytes in the wrong order."""
    kind = d.base.order + ("f4" if d.base.name == "nii-float" else "i2")
    if d.base.name == "nrrd-ascii":
        return header_field(d)
    values = np.frombuffer(d.base.voxels, kind).copy()
    how = d.pick(("nan", "inf", "+1024", "-1024", "0..255", "swapped", "huge"))
    if how in ("nan", "inf", "huge") and kind.endswith("f4"):
        values[d.rng.integers(values.size, size=5)] = {"nan": np.nan, "inf": np.inf, "huge": 1e38}[how]
        d.changes["must_refuse"] = how != "huge"
        d.changes["free"] = ALL_SLICES
    elif how in ("+1024", "-1024"):
        values += values.dtype.type(int(how))
        d.changes["must_refuse"] = True
    elif how == "0..255":
        values = ((values.astype(float) + 1024) / 12).clip(0, 255).astype(kind)
        d.changes["must_refuse"] = True
    else:
        how = "bytes swapped"
        values = values.byteswap()
        d.changes["must_refuse"] = True
    d.words = how
    d.build(voxels=values.tobytes())


def foreign(d: ImageDraft) -> None:
    """A file of another kind behind the name."""
    others = [image_base(name) for name in ("mha", "nrrd", "nii", "nii.gz") if name != d.base.name]
    junk = (b"", b"\0" * 5000, d.rng.bytes(5000), b"\x1f\x8b" + d.rng.bytes(900), b"NRRD0005\n", b"NDims = 3\n")
    d.data = d.pick((*junk, b"<html>" * 100, *(base.build(base.header, base.voxels) for base in others)))


KINDS: dict[str, tuple[int, Callable[[ImageDraft], None]]] = {
    "image: header bytes flipped": (20, header_bytes),
    "image: header field": (30, header_field),
    "image: voxel bytes flipped": (8, voxel_bytes),
    "image: truncated": (12, cut),
    "image: too long": (6, longer),
    "image: block zeroed, doubled, dropped": (8, block),
    "image: voxels no HU": (8, voxel_values),
    "image: another format": (4, foreign),
}
"""Name, weight and mutator."""


def make_mutant(seed: int, number: int) -> Mutant:
    """Image mutant ``number`` of a seed; its only file is ``scan.<suffix>``."""
    rng = np.random.default_rng([seed, 2, number])
    names = list(KINDS)
    weights = np.array([KINDS[name][0] for name in names], dtype=float)
    kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    base = image_base(IMAGE_BASES[int(rng.integers(len(IMAGE_BASES)))])
    draft = ImageDraft(base, rng)
    KINDS[kind][1](draft)
    changes = {"forms": base.forms} | draft.changes
    expect = Expectation(base.geometry, 0, ALL_SLICES, **changes)
    return Mutant(kind, base.name, draft.words, {"scan" + base.suffix: draft.data}, expect)

"""Mutants of a DICOM series: what a disk, a network, an anonymiser or an enemy may do to it.

A mutant says which slices it touched and what a fair judge may expect of a reader: see ``Expectation``. All draws
come from one generator, so that (seed, number) is the mutant.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fuzz_bases import DICOM_BASES, SYNTAXES, DicomBase, dicom_base
from fuzz_elements import UNDEFINED, Element, Parsed, Tag, parse
from fuzz_mutant import Expectation, Mutant, flip_bytes

PIXELS: Tag = (0x7FE0, 0x0010)
NEEDED: tuple[Tag, ...] = (
    (0x0008, 0x0016), (0x0008, 0x0018), (0x0008, 0x0060), (0x0020, 0x000D), (0x0020, 0x000E), (0x0020, 0x0032),
    (0x0020, 0x0037), (0x0028, 0x0002), (0x0028, 0x0004), (0x0028, 0x0010), (0x0028, 0x0011), (0x0028, 0x0030),
    (0x0028, 0x0100), (0x0028, 0x0101), (0x0028, 0x0102), (0x0028, 0x0103), (0x0028, 0x1052), (0x0028, 0x1053), PIXELS,
)  # fmt: skip
"""Tags that decide what a volume is."""
MEMBERSHIP: tuple[Tag, ...] = (
    (0x0008, 0x0008), (0x0008, 0x0016), (0x0008, 0x0060), (0x0010, 0x0020), (0x0020, 0x000D), (0x0020, 0x000E),
)  # fmt: skip
"""Image type, SOP class, modality, patient, study, series: what a slice belongs to. A slice at an end of the stack
that is said to belong elsewhere cannot be told from one that does."""
ABSURD: dict[Tag, tuple[bytes | int, ...]] = {
    (0x0028, 0x0010): (0, 1, 65535, 47, 96),
    (0x0028, 0x0011): (0, 1, 65535, 43, 88),
    (0x0028, 0x0002): (0, 3, 65535),
    (0x0028, 0x0100): (0, 1, 8, 12, 32, 64, 65535),
    (0x0028, 0x0101): (0, 1, 8, 17, 65535),
    (0x0028, 0x0102): (0, 3, 7, 31, 65535),
    (0x0028, 0x0103): (2, 65535),
    (0x0028, 0x0004): (b"RGB", b"PALETTE COLOR", b"YBR_FULL_422", b"MONOCHROME1", b"X" * 70),
    (0x0028, 0x0030): (b"0\\0", b"-6.25\\6.5", b"nan\\nan", b"1e9\\1e9", b"6.25", b"6.25\\6.5\\1", b"a\\b",
                       b"inf\\6.5", b"0.00625\\0.0065", b"6.25,6.5", b"1e400\\1"),
    (0x0020, 0x0032): (b"0\\0\\nan", b"1e300\\0\\0", b"0\\0", b"inf\\0\\0", b"a\\b\\c", b"0\\0\\0\\0",
                       b"1e38\\1e38\\1e38"),
    (0x0020, 0x0037): (b"0\\0\\0\\0\\0\\0", b"1\\0\\0\\1\\0\\0", b"nan\\0\\0\\0\\1\\0", b"1\\0\\0\\0\\1",
                       b"2\\0\\0\\0\\2\\0", b"1\\0.2\\0\\0\\1\\0", b"1e30\\0\\0\\0\\1e30\\0"),
    (0x0028, 0x1052): (b"nan", b"inf", b"1e30", b"-1e308", b"zero", b"-1024\\-1000"),
    (0x0028, 0x1053): (b"0", b"nan", b"1e30", b"-1", b"1000", b"one", b"1e-30", b"1\\1"),
    (0x0028, 0x0008): (b"0", b"-1", b"2", b"99999999", b"2147483647", b"x", b"1e3"),
    (0x0002, 0x0010): (*(uid.encode() for uid in SYNTAXES.values()), b"1.2.3.4", b"",
                       b"1.2.840.10008.1.2.4.100", b"A" * 200),
    (0x0008, 0x0005): (b"ISO_IR 999", b"\\\\\\", b"GB18030\\ISO 2022 IR 87"),
}  # fmt: skip
"""Values that no CT slice of 48 x 44 pixels has; ints are written as US."""


@dataclass
class Draft:
    """A series while it is being spoiled."""

    base: DicomBase
    rng: np.random.Generator
    files: list[bytes | None] = field(init=False)
    extra: dict[str, bytes] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    free: set[int] = field(default_factory=set)
    changes: dict[str, Any] = field(default_factory=dict)
    words: str = ""

    def __post_init__(self) -> None:
        self.files = list(self.base.files)

    @property
    def is_raw(self) -> bool:
        """Whether pixels are neither compressed nor deflated: then nothing about them is redundant."""
        return self.base.syntax in ("explicit", "implicit", "big")

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def slices(self) -> list[int]:
        """One slice (mostly), two or three, or an end of the stack."""
        count = len(self.base.files)
        some = int(self.pick((1, 1, 1, 2, 3)))
        return sorted({int(k) for k in self.rng.integers(count, size=some)})

    def parsed(self, k: int) -> Parsed:
        data = self.files[k]
        assert data is not None
        return parse(data, self.base.syntax)

    def put(self, k: int, parsed: Parsed | bytes | None) -> None:
        self.files[k] = parsed.build() if isinstance(parsed, Parsed) else parsed
        self.touched.add(k)

    def say(self, text: str) -> None:
        self.words += text + "; "


def _pixel_start(data: bytes, syntax: str) -> int:
    """Offset of the pixel value in a file (at least of what encodes it)."""
    if syntax == "deflated":
        return 400
    return data.rfind(b"\x7f\xe0\x00\x10" if syntax == "big" else b"\xe0\x7f\x10\x00") + 12


def flip_header(d: Draft) -> None:
    """Bytes or bits of the header of a few slices."""
    for k in d.slices():
        data = d.base.files[k]
        stop = _pixel_start(data, d.base.syntax)
        d.put(k, flip_bytes(data, d.rng, 0, stop, int(d.rng.integers(1, 9))))
    d.changes["may_vanish"] = True


def flip_values(d: Draft) -> None:
    """One digit or letter inside the value of a tag that decides, so that the structure stays sound."""
    for k in d.slices():
        parsed = d.parsed(k)
        tag = d.pick([e.tag for e in parsed.body if e.tag in NEEDED and e.tag != PIXELS and e.value])
        d.put(k, parsed.change(tag, lambda e: replace(e, value=flip_bytes(e.value, d.rng, 0, len(e.value), 1))))
        d.say(f"{tag} of {k}")
        d.changes["may_vanish"] = d.changes.get("may_vanish", False) or tag in MEMBERSHIP


def flip_pixels(d: Draft) -> None:
    """Bytes of the pixels of a few slices."""
    for k in d.slices():
        data = d.base.files[k]
        d.put(k, flip_bytes(data, d.rng, _pixel_start(data, d.base.syntax), len(data), int(d.rng.integers(1, 65))))
        d.free.add(k)


def truncate(d: Draft) -> None:
    """A file cut short anywhere: at nothing, in the header, in the pixels, by one byte."""
    for k in d.slices():
        data = d.base.files[k]
        end = _pixel_start(data, d.base.syntax)
        inside, behind = int(d.rng.integers(end)), int(d.rng.integers(end, len(data)))
        at = d.pick((0, inside, behind, len(data) - 1, len(data) - 2, 132))
        d.put(k, data[:at])
        d.say(f"{k} at {at} of {len(data)}")
    d.changes["may_vanish"] = True  # cut before its magic it is no DICOM file any more


def blocks(d: Draft) -> None:
    """A block zeroed, doubled, dropped or moved, as bad disks and broken copies do."""
    for k in d.slices():
        data = d.base.files[k]
        size = int(2 ** d.rng.integers(2, 11))
        a, b = (int(v) for v in d.rng.integers(0, max(len(data) - size, 1), size=2))
        how = str(d.pick(("zeroed", "doubled", "dropped", "moved")))
        part = data[a : a + size]
        d.put(k, {
            "zeroed": data[:a] + b"\0" * len(part) + data[a + size :],
            "doubled": data[:a] + part + data[a:],
            "dropped": data[:a] + data[a + size :],
            "moved": data[:b] + part + data[b + size :],
        }[how])  # fmt: skip
        d.say(f"{how} {size} bytes of {k} at {a}")
        written_at = b if how == "moved" else a
        if how in ("zeroed", "moved") and written_at + len(part) > _pixel_start(data, d.base.syntax):
            d.free.add(k)
    d.changes["may_vanish"] = True


def tag_gone(d: Draft) -> None:
    """A tag that decides deleted or emptied, in some slices or in all."""
    tag = d.pick(NEEDED)
    everywhere = d.rng.random() < 0.3
    empty = d.rng.random() < 0.5
    for k in range(len(d.base.files)) if everywhere else d.slices():
        d.put(k, d.parsed(k).change(tag, lambda e: replace(e, value=b"", length=None) if empty else None))
    d.say(f"{tag} {'emptied' if empty else 'deleted'} {'everywhere' if everywhere else ''}")
    d.changes["may_vanish"] = tag in MEMBERSHIP


def tag_absurd(d: Draft) -> None:
    """An impossible value, in some slices or in all."""
    tag = d.pick(tuple(ABSURD))
    value = d.pick(ABSURD[tag])
    everywhere = d.rng.random() < 0.4
    for k in range(len(d.base.files)) if everywhere else d.slices():
        d.put(k, d.parsed(k).set(tag, value))
    d.say(f"{tag} = {value!r} {'everywhere' if everywhere else 'in ' + str(sorted(d.touched))}")


def tag_swap(d: Draft) -> None:
    """The values of one tag exchanged between two slices: positions, pixels, rescale."""
    if len(d.base.files) == 1:
        return flip_values(d)
    a, b = (int(v) for v in d.rng.choice(len(d.base.files), 2, replace=False))
    tag = d.pick(((0x0020, 0x0032), (0x0020, 0x0032), PIXELS, (0x0028, 0x1052), (0x0020, 0x000E), (0x0020, 0x0013)))
    first, second = d.parsed(a), d.parsed(b)
    one, two = first.find(tag), second.find(tag)
    if one is not None and two is not None:
        d.put(a, first.change(tag, lambda e: two))
        d.put(b, second.change(tag, lambda e: one))
    d.say(f"{tag} between {a} and {b}")
    # SliceLocation tells a swapped position; nothing tells swapped pixels
    if tag == PIXELS or (tag == (0x0020, 0x0032) and not d.base.has_location):
        d.free |= {a, b}


def move_slice(d: Draft) -> None:
    """ImagePositionPatient of one slice off by a little or a lot, in any direction."""
    k = int(d.rng.integers(len(d.base.files)))
    parsed = d.parsed(k)
    found = parsed.find((0x0020, 0x0032))
    if found is None:
        return flip_values(d)
    values = [float(v) for v in found.value.decode().split("\\")]
    axis, by = int(d.rng.integers(3)), float(d.pick((0.3, 0.6, 2.0, 2.5, 5.0, 40.0, -5.0, -0.6)))
    values[axis] += by
    d.put(k, parsed.set((0x0020, 0x0032), "\\".join(f"{v:.6f}" for v in values).encode()))
    d.say(f"slice {k} by {by} mm along {'LPS'[axis]}")


def one_rescale(d: Draft) -> None:
    """Slope or intercept of one slice changed to a value that another scanner could have."""
    k = int(d.rng.integers(len(d.base.files)))
    tag, value = d.pick((((0x0028, 0x1052), b"0"), ((0x0028, 0x1052), b"-1000"), ((0x0028, 0x1052), b"-24"),
                         ((0x0028, 0x1052), b"-2048"), ((0x0028, 0x1052), b"-1124"), ((0x0028, 0x1053), b"2"),
                         ((0x0028, 0x1053), b"0.5"), ((0x0028, 0x1053), b"1.05")))  # fmt: skip
    d.put(k, d.parsed(k).set(tag, value))
    d.say(f"{tag} of {k} = {value!r}")


def all_rescale(d: Draft) -> None:
    """Slope or intercept of all slices: the plausibility of HU alone can tell."""
    tag, value = d.pick((((0x0028, 0x1052), b"1000"), ((0x0028, 0x1052), b"-2048"), ((0x0028, 0x1052), b"-3000"),
                         ((0x0028, 0x1053), b"2"), ((0x0028, 0x1053), b"0.25"), ((0x0028, 0x1053), b"10")))  # fmt: skip
    for k in range(len(d.base.files)):
        d.put(k, d.parsed(k).set(tag, value))
    d.say(f"{tag} = {value!r} everywhere")
    d.changes["must_refuse"] = d.base.name != "enhanced"  # there the functional groups decide


def all_spacing(d: Draft) -> None:
    """PixelSpacing of all slices: to be believed if plausible, refused if not."""
    if d.base.name == "enhanced":
        return flip_values(d)
    rows, columns = (float(v) for v in d.pick(((5.0, 5.5), (0.7, 0.7), (9.5, 9.0), (0.0007, 0.0007), (25.0, 25.0),
                                               (650.0, 650.0))))  # fmt: skip
    for k in range(len(d.base.files)):
        d.put(k, d.parsed(k).set((0x0028, 0x0030), f"{rows:g}\\{columns:g}".encode()))
    spacing = list(d.base.geometry.spacing_mm)
    axes = [a for a in (0, 1, 2) if a != d.base.slice_axis]
    spacing[axes[0]], spacing[axes[1]] = rows, columns
    d.changes["geometry"] = replace(d.base.geometry, spacing_mm=tuple(spacing))
    d.changes["must_refuse"] = not 0.1 <= min(rows, columns) <= max(rows, columns) <= 10
    d.say(f"PixelSpacing {rows:g} {columns:g} everywhere")


def structure(d: Draft) -> None:
    """Wrong VR, absurd declared lengths, deep nesting, elements doubled or out of order."""
    for k in d.slices():
        parsed = d.parsed(k)
        how = str(d.pick(("vr", "length", "length", "nested", "doubled", "shuffled", "group length", "private")))
        tag = d.pick([e.tag for e in parsed.body])
        length = int(d.pick((1, 3, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, UNDEFINED, 0)))
        vr = d.pick((b"SQ", b"UN", b"OB", b"FD", b"US", b"UT", b"ZZ", b"\0\0", b"AT", b"DS"))
        if how == "vr":
            parsed = parsed.change(tag, lambda e, vr=vr: replace(e, vr=vr))
        elif how == "length":
            parsed = parsed.change(tag, lambda e, n=length: replace(e, length=n))
        elif how == "nested":
            deep = int(d.pick((10, 500, 5000)))
            item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
            head = struct.pack("<HH", 0x0008, 0x1140) + (b"SQ\0\0" if parsed.syntax != "implicit" else b"")
            value = (item + head + b"\xff\xff\xff\xff") * deep
            at = sum(e.tag < (0x0008, 0x1140) for e in parsed.body)
            added = Element((0x0008, 0x1140), b"SQ", value, UNDEFINED)
            parsed = replace(parsed, body=(*parsed.body[:at], added, *parsed.body[at:]))
        elif how == "doubled":
            body = tuple(x for e in parsed.body for x in ([e, e] if e.tag == tag else [e]))
            parsed = replace(parsed, body=body)
        elif how == "shuffled":
            parsed = replace(parsed, body=tuple(parsed.body[i] for i in d.rng.permutation(len(parsed.body))))
        elif how == "group length":
            parsed = parsed.change((0x0002, 0x0000), lambda e, n=length: replace(e, value=struct.pack("<I", n)))
        else:
            added = Element((0x0029, 0x1010), b"UN", d.rng.bytes(40), length)
            at = sum(e.tag < added.tag for e in parsed.body)
            parsed = replace(parsed, body=(*parsed.body[:at], added, *parsed.body[at:]))
        d.put(k, parsed)
        d.say(f"{how} {tag} {vr!r} {length:#x} in {k}")
    d.changes["may_vanish"] = True  # what follows the break is lost to any reader, membership too


def pixel_length(d: Draft) -> None:
    """Pixel data longer or shorter than rows x columns x bytes, declared and real."""
    everywhere = d.rng.random() < 0.3
    count = int(d.pick((-2, -88, 2, 88, 4224, -4000)))
    for k in range(len(d.base.files)) if everywhere else d.slices():

        def edit(e: Element) -> Element:
            return replace(e, value=e.value[:count] if count < 0 else e.value + b"\0" * count)

        d.put(k, d.parsed(k).change(PIXELS, edit))
    d.say(f"pixel data {count:+d} bytes {'everywhere' if everywhere else ''}")


def bystanders(d: Draft) -> None:
    """Slices removed, doubled, replaced or joined by foreign and broken files."""
    count = len(d.base.files)
    k = int(d.rng.integers(count))
    data = d.base.files[k]
    how = str(d.pick(("removed", "end removed", "same twice", "other twice", "text", "magic", "empty", "other series",
                      "DICOMDIR", "other slice thickness", "far slice")))  # fmt: skip
    if how == "removed" and count > 1:
        d.put(k, None)
        d.changes["may_vanish"] = True
    elif how == "end removed" and count > 1:
        d.put(int(d.pick((0, count - 1))), None)
        d.changes["may_vanish"] = True
    elif how == "same twice":
        d.extra["copy"] = data
    elif how == "other twice" and count > 1:
        noisy = d.parsed(k).change(PIXELS, lambda e: replace(e, value=flip_bytes(e.value, d.rng, 0, len(e.value), 9)))
        d.extra["copy"] = noisy.build()
        d.changes["must_refuse"] = d.is_raw
    elif how == "text":
        d.extra["notes.txt"] = b"a report of this patient\n" * 40
    elif how == "magic":
        d.extra["broken"] = data[:132] + d.rng.bytes(3000)
    elif how == "empty":
        d.extra["IM9999"] = b""
    elif how == "other series" and count > 1:
        other = dicom_base("coronal" if d.base.name != "coronal" else "explicit")
        d.extra |= {f"other-{i}": f for i, f in enumerate(other.files[:3])}
    elif how == "DICOMDIR":
        d.extra["DICOMDIR"] = data[:132] + b"../../../etc/passwd" * 20
    elif how == "other slice thickness" and count > 1:
        d.put(k, d.parsed(k).set((0x0018, 0x0050), b"nonsense"))
    elif how == "far slice" and count > 1:
        d.extra["far"] = d.parsed(k).set((0x0020, 0x0032), b"0\\0\\2000").build()
        d.changes["must_refuse"] = d.base.slice_axis == 0
    d.say(how)


def nested(d: Draft) -> None:
    """Multi-frame: what the functional groups say, changed for some frames; the number of frames; groups cut off."""
    data = d.base.files[0]
    if d.base.name != "enhanced":
        return tag_absurd(d)
    how = str(d.pick(("position", "position", "orientation", "spacing", "rescale", "frames", "frames", "flip groups")))
    if how == "frames":
        d.put(0, d.parsed(0).set((0x0028, 0x0008), str(d.pick((0, 1, 10, 19, 21, 40, 10**9))).encode()))
    elif how == "flip groups":
        start, stop = data.find(b"\x00\x52\x29\x92"), data.rfind(b"\xe0\x7f\x10\x00")
        d.put(0, flip_bytes(data, d.rng, start, stop, int(d.rng.integers(1, 9))))
        d.changes["may_vanish"] = True
    else:
        tag = {"position": b"\x20\x00\x32\x00", "orientation": b"\x20\x00\x37\x00", "spacing": b"\x28\x00\x30\x00",
               "rescale": b"\x28\x00\x52\x10"}[how]  # fmt: skip
        places = [i for i in range(len(data)) if data.startswith(tag, i)]
        at = int(d.pick(places))
        length = struct.unpack_from("<H", data, at + 6)[0]
        new = {"position": b"0\\0\\nan", "orientation": b"0\\0\\0\\0\\0\\0", "spacing": b"0\\0", "rescale": b"9e9"}[how]
        if how == "position" and d.rng.random() < 0.5:
            new = flip_bytes(data[at + 8 : at + 8 + length], d.rng, 0, length, 1)
        d.put(0, data[: at + 8] + new[:length].ljust(length) + data[at + 8 + length :])
    d.touched |= set(range(d.base.geometry.shape[0]))
    d.say(how)


KINDS: dict[str, tuple[int, Callable[[Draft], None]]] = {
    "header bytes flipped": (14, flip_header),
    "values flipped": (10, flip_values),
    "pixel bytes flipped": (6, flip_pixels),
    "truncated": (8, truncate),
    "blocks zeroed, doubled, dropped, moved": (8, blocks),
    "tag deleted or emptied": (9, tag_gone),
    "absurd value": (14, tag_absurd),
    "tags swapped between slices": (6, tag_swap),
    "slice moved": (6, move_slice),
    "rescale of one slice": (4, one_rescale),
    "rescale of all slices": (2, all_rescale),
    "pixel spacing of all slices": (2, all_spacing),
    "VR, length, nesting": (8, structure),
    "pixel data length": (4, pixel_length),
    "slices and bystanders": (7, bystanders),
    "functional groups": (4, nested),
}
"""Name, weight and mutator."""


def make_mutant(seed: int, number: int) -> Mutant:
    """DICOM mutant ``number`` of a seed."""
    rng = np.random.default_rng([seed, 1, number])
    names = list(KINDS)
    weights = np.array([KINDS[name][0] for name in names], dtype=float)
    kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    choices = ("enhanced",) if kind == "functional groups" else DICOM_BASES
    base = dicom_base(choices[int(rng.integers(len(choices)))])
    draft = Draft(base, rng)
    KINDS[kind][1](draft)
    touched, free = frozenset(draft.touched), frozenset(draft.free)
    if len(base.files) == 1:
        every = frozenset(range(base.geometry.shape[0]))
        touched, free = every if touched else touched, every if free else free
    told: dict[str, Any] = {
        "geometry": base.geometry, "slice_axis": base.slice_axis, "touched": touched, "free": free
    }  # fmt: skip
    expect = Expectation(**told | draft.changes)
    order = rng.permutation(len(draft.files))
    files = {f"IM{order[k]:04d}": data for k, data in enumerate(draft.files) if data is not None}
    return Mutant(kind, base.name, draft.words.strip("; "), files | draft.extra, expect)

"""Headers of NRRD files (teem, NRRD0001 to NRRD0005), read without guessing what they leave out."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.image_header import ImageHeader, check_sizes, grid_of
from lungseg.scan.orientation import LAS_TO_SPL, LPS_TO_SPL, RAS_TO_SPL
from lungseg.scan.volume import Geometry

MAX_HEADER_BYTES = 1 << 20
"""Headers of CT are below 1 kB, with copied DICOM tags some 10 kB."""
_SPACES = {
    "left-posterior-superior": LPS_TO_SPL, "lps": LPS_TO_SPL,
    "right-anterior-superior": RAS_TO_SPL, "ras": RAS_TO_SPL,
    "left-anterior-superior": LAS_TO_SPL, "las": LAS_TO_SPL,
}  # fmt: skip
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {word: code for code, words in _TYPES.items() for word in words}
_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_NAMES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}


def read_nrrd_header(path: Path) -> ImageHeader:
    """Header of a .nrrd file.

    Parameters
    ----------
    path : Path
        The file; its voxels must be in it.

    Raises
    ------
    InputError
        If this is no NRRD file, the voxels are elsewhere, or anything that a volume needs is missing, contradictory
        or not supported: the anatomical space, directions, byte order, units other than millimetres.

    Source
    ------
    "Definition of NRRD File Format", teem.sourceforge.net/nrrd/format.html; RELIABILITY rows 25-30.
    """
    name = str(path)
    fields, offset = _fields(path)
    if "data file" in fields:
        raise InputError(
            f"{name}: its voxels lie in another file ({fields['data file']!r}); convert it to one file (.nrrd, .nii.gz)"
        )
    for word in ("line skip", "byte skip"):
        if fields.get(word, "0") != "0":
            raise InputError(f"{name}: `{word}: {fields[word]}` is not supported; convert it (`unu save -e gzip`)")
    encoding = _ENCODINGS.get(_need(fields, "encoding", name).lower())
    if encoding is None:
        raise InputError(
            f"{name}: the encoding {fields['encoding']!r} is not supported; convert it (`unu save -f nrrd -e gzip`)"
        )
    kind = _need(fields, "type", name).lower()
    if kind not in _DTYPES:
        raise InputError(f"{name}: voxels of type {kind!r} are no CT; convert it")
    dtype = np.dtype(_DTYPES[kind])
    if dtype.itemsize > 1:
        endian = fields.get("endian", "").lower()
        if endian not in ("little", "big"):
            raise InputError(f"{name}: the header does not say its byte order (`endian: little`); convert it again")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    sizes = tuple(_whole(fields, "sizes", name))
    if _whole(fields, "dimension", name) != [len(sizes)]:
        raise InputError(f"{name}: damaged header: dimension {fields['dimension']}, sizes {fields['sizes']}")
    shape, volumes = check_sizes(sizes, name)
    geometry, notes = _geometry(fields, sizes, shape, name)
    return ImageHeader(geometry, dtype, path, encoding, file_offset=offset, volumes=volumes, notes=notes)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Fields of the header by their names, and the offset of the data behind the blank line."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not re.match(rb"NRRD000[1-5]\r?\n", raw):
        raise InputError(f"{path}: no NRRD file; was it renamed, or is it damaged?")
    end = re.search(rb"\r?\n\r?\n", raw)
    if end is None:
        raise InputError(f"{path}: truncated or damaged: its header does not end")
    fields: dict[str, str] = {}
    for line in raw[: end.start()].decode("utf-8", "replace").splitlines()[1:]:
        if line.startswith("#") or ":=" in line:
            continue
        key, separator, value = line.partition(":")
        key = key.strip().lower()
        key = _NAMES.get(key, key)
        if not separator or key in fields:
            raise InputError(f"{path}: damaged header: {'repeated' if separator else 'unreadable'} line {line[:60]!r}")
        fields[key] = value.strip()
    return fields, end.end()


def _need(fields: dict[str, str], key: str, name: str) -> str:
    if not fields.get(key):
        raise InputError(f"{name}: the header has no `{key}`; it is damaged, convert the scan again")
    return fields[key]


def _whole(fields: dict[str, str], key: str, name: str) -> list[int]:
    """Whole numbers of a field."""
    text = _need(fields, key, name)
    if not re.fullmatch(r"\d{1,9}(\s+\d{1,9}){0,15}", text):
        raise InputError(f"{name}: damaged header: `{key}: {text[:60]}`")
    return [int(word) for word in text.split()]


def _geometry(
    fields: dict[str, str], sizes: tuple[int, ...], shape: tuple[int, int, int], name: str
) -> tuple[Geometry, tuple[str, ...]]:
    """Grid in an anatomical space; refused where left and right, or millimetres, would be a guess."""
    space = fields.get("space", "").lower()
    if space not in _SPACES:
        said = f"space {space!r}" if space else "no anatomical space"
        raise InputError(
            f"{name}: {said}, so left and right are unknown; convert the scan again from DICOM, or set "
            "`space: left-posterior-superior` once you know that its directions are that"
        )
    if "space directions" not in fields:
        raise InputError(f"{name}: no `space directions`, so spacing and orientation are unknown; convert it again")
    units = re.findall(r'"([^"]*)"', fields.get("space units", ""))
    if any(unit.strip().lower() not in ("mm", "millimeter", "millimeters", "millimetre", "") for unit in units):
        raise InputError(f"{name}: its units are {', '.join(units)}; convert it to millimetres")
    words = re.findall(r"none|\([^)]*\)", fields["space directions"].lower())
    if len(words) != len(sizes):
        raise InputError(f"{name}: damaged header: {len(words)} space directions for {len(sizes)} axes")
    extra = [i for i, word in enumerate(words) if word == "none"]
    if any(sizes[i] > 1 for i in extra if i < 3):
        raise InputError(
            f"{name}: one three-dimensional volume is needed, not several values a voxel (sizes {sizes}, axis "
            f"{extra[0]} has no direction); extract one volume"
        )
    if extra != list(range(3, len(sizes))):
        raise InputError(f"{name}: its space directions do not belong to the first three axes; extract one volume")
    axes = np.array([_vector(word, name) for word in words[:3]]).T
    notes: tuple[str, ...] = ()
    origin = np.zeros(3)
    if "space origin" in fields:
        origin = np.array(_vector(fields["space origin"], name))
    else:
        notes = ("the header gives no origin: 0, 0, 0 was taken",)
    return grid_of(axes, origin, shape, _SPACES[space], name), notes


def _vector(text: str, name: str) -> list[float]:
    """Three numbers of "(1,0,0)"."""
    try:
        vector = [float(word) for word in text.strip().removeprefix("(").removesuffix(")").split(",")]
    except ValueError:
        vector = []
    if len(vector) != 3 or not all(math.isfinite(v) for v in vector):
        raise InputError(f"{name}: damaged header: {text[:60]!r} is no vector of three numbers")
    return vector

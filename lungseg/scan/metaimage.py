"""Headers of MetaImage files (.mha, .mhd), read without guessing what they leave out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.image_header import ImageHeader, check_sizes, grid_of
from lungseg.scan.orientation import LPS_TO_SPL

MAX_HEADER_BYTES = 65536
_DTYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_SYNONYMS = {
    "position": "offset", "origin": "offset", "rotation": "transformmatrix", "orientation": "transformmatrix",
    "elementbyteordermsb": "binarydatabyteordermsb",
}  # fmt: skip
"""MetaIO takes each of these for the same thing."""
_LETTERS = np.array([["R", "L"], ["A", "P"], ["I", "S"]])
"""AnatomicalOrientation names the side each axis comes from: [world axis L, P, S][against it?]."""


def read_metaimage_header(path: Path) -> ImageHeader:
    """Header of a .mha or .mhd file.

    Parameters
    ----------
    path : Path
        .mha with its voxels inside, or .mhd beside a file that holds all of them.

    Raises
    ------
    InputError
        If this is no MetaImage, the voxels are elsewhere, or anything that a volume needs is missing, contradictory
        or not supported: spacing, orientation, byte order, units other than millimetres.

    Source
    ------
    MetaIO's documentation of its tags; RELIABILITY rows 25-30.
    """
    name = str(path)
    fields, offset = _fields(path)
    data_path = _data_path(path, fields.get("elementdatafile", ""))
    if "dimsize" not in fields or "ndims" not in fields:
        raise InputError(f"{name}: no MetaImage (no NDims and DimSize); was it renamed, or is it damaged?")
    numbers = {key: _numbers(fields[key], key, name) for key in _NUMERIC if key in fields}
    dimensions = _whole(numbers["ndims"], "NDims", name)[0]
    sizes = tuple(_whole(numbers["dimsize"], "DimSize", name))
    if len(sizes) != dimensions:
        raise InputError(f"{name}: damaged header: {dimensions} dimensions, {len(sizes)} sizes")
    channels = numbers.get("elementnumberofchannels", [1.0])
    if channels != [1.0]:
        raise InputError(f"{name}: one three-dimensional volume is needed, not {channels[0]:g} channels")
    shape, volumes = check_sizes(sizes, name)
    _check_unsupported(fields, numbers, name)
    dtype = np.dtype(_DTYPES.get(fields.get("elementtype", ""), "V1"))
    if dtype.kind == "V":
        raise InputError(f"{name}: voxels of type {fields.get('elementtype', '(none)')!r} are no CT; convert it")
    if dtype.itemsize > 1:
        dtype = dtype.newbyteorder(">" if _flag(fields, "binarydatabyteordermsb", name) else "<")
    for key, count in (("elementspacing", dimensions), ("transformmatrix", dimensions**2)):
        if len(numbers.get(key, ())) != count:
            raise InputError(
                f"{name}: {_NUMERIC[key]} has {len(numbers.get(key, ()))} numbers where {count} are needed, so spacing "
                "or left and right are unknown; convert the scan again"
            )
    spacing = np.array(numbers["elementspacing"][:3])
    if (spacing <= 0).any():
        raise InputError(f"{name}: spacing must be strictly positive, not {spacing.tolist()} mm; repair the header")
    rows = np.array(numbers["transformmatrix"]).reshape(dimensions, dimensions)  # row i: direction of the i-th axis
    if np.any(rows[:3, 3:]) or np.any(rows[3:, :3]):
        raise InputError(f"{name}: its orientation mixes space and time; extract one volume")
    notes: tuple[str, ...] = ()
    origin = np.zeros(3)
    if "offset" not in numbers:
        notes = ("the header gives no origin: 0, 0, 0 was taken",)
    elif len(numbers["offset"]) != dimensions:
        raise InputError(f"{name}: damaged header: an origin of {len(numbers['offset'])} numbers")
    else:
        origin = np.array(numbers["offset"][:3])
    geometry = grid_of(rows[:3, :3].T * spacing, origin, shape, LPS_TO_SPL, name)
    notes += _orientation_note(fields.get("anatomicalorientation", ""), rows[:3, :3])
    encoding = "zlib" if _flag(fields, "compresseddata", name, default=False) else "raw"
    return ImageHeader(
        geometry, dtype, data_path, encoding, offset if data_path == path else 0, volumes=volumes, notes=notes
    )


_NUMERIC = {
    "ndims": "NDims", "dimsize": "DimSize", "elementspacing": "ElementSpacing", "transformmatrix": "TransformMatrix",
    "offset": "Offset", "elementnumberofchannels": "ElementNumberOfChannels", "headersize": "HeaderSize",
    "elementtointensityfunctionslope": "ElementToIntensityFunctionSlope",
    "elementtointensityfunctionoffset": "ElementToIntensityFunctionOffset",
}  # fmt: skip


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Fields of the header by lower-case names, up to ElementDataFile, and the offset behind that line."""
    fields: dict[str, str] = {}
    offset = 0
    try:
        with path.open("rb") as stream:
            while "elementdatafile" not in fields:
                line = stream.readline(MAX_HEADER_BYTES)
                offset += len(line)
                if not line or offset > MAX_HEADER_BYTES:
                    raise InputError(f"{path}: no MetaImage, or truncated or damaged: its header does not end")
                if not line.strip():
                    continue
                key, separator, value = line.decode("utf-8", "replace").partition("=")
                key = key.strip().lower()
                key = _SYNONYMS.get(key, key)
                if not separator:
                    raise InputError(f"{path}: no MetaImage, or a damaged header: line {key[:60]!r}")
                if fields.get(key, value.strip()) != value.strip() and key != "comment":
                    raise InputError(f"{path}: damaged header: {key} is there twice, with different values")
                fields[key] = value.strip()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return fields, offset


def _data_path(path: Path, value: str) -> Path:
    """File of the voxels: the header's own, or for .mhd a plain name in the same folder."""
    if value.upper() == "LOCAL":
        return path
    plain = value not in ("", ".", "..") and Path(value).name == value and "\\" not in value and "\0" not in value
    if path.suffix.lower() != ".mhd" or not plain or value.upper() == "LIST":
        raise InputError(f"{path}: its voxels lie in another file ({value!r}); convert it to one file (.mha, .nii.gz)")
    return path.parent / value


def _numbers(text: str, key: str, name: str) -> list[float]:
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) > 100 or not all(math.isfinite(v) for v in numbers):
        raise InputError(f"{name}: damaged header: {_NUMERIC[key]} = {text[:60]!r}")
    return numbers


def _whole(numbers: list[float], key: str, name: str) -> list[int]:
    if any(v != int(v) for v in numbers):
        raise InputError(f"{name}: damaged header: {key} = {numbers}")
    return [int(v) for v in numbers]


def _flag(fields: dict[str, str], key: str, name: str, *, default: bool | None = None) -> bool:
    """True or False of a field; refused if it is neither, or missing where it must not be guessed."""
    value = fields.get(key, "").lower()
    if value in ("true", "1", "false", "0"):
        return value in ("true", "1")
    if value or default is None:
        raise InputError(f"{name}: the header does not say {key} (True or False); convert the scan again")
    return default


def _check_unsupported(fields: dict[str, str], numbers: dict[str, list[float]], name: str) -> None:
    """Refuse what would change values or bytes in ways that writers of CT never need."""
    if not _flag(fields, "binarydata", name, default=True):
        raise InputError(f"{name}: voxels written as text are not supported; convert it to binary (.mha, .nii.gz)")
    if numbers.get("headersize", [0.0]) != [0.0]:
        raise InputError(f"{name}: HeaderSize is not supported; convert it to one file (.mha, .nii.gz)")
    slope = numbers.get("elementtointensityfunctionslope", [1.0])
    shift = numbers.get("elementtointensityfunctionoffset", [0.0])
    if slope != [1.0] or shift != [0.0]:
        raise InputError(f"{name}: it holds values to be rescaled ({slope[0]:g}, {shift[0]:g}); convert it to HU")
    if fields.get("distanceunits", "mm").lower() not in ("mm", "?", "millimeters"):
        raise InputError(f"{name}: its units are {fields['distanceunits']}; convert it to millimetres")


def _orientation_note(said: str, rows: np.ndarray) -> tuple[str, ...]:
    """A note where AnatomicalOrientation, which repeats the matrix, says something else."""
    if len(said) != 3 or set(said) - set("RLAPIS"):
        return ()
    axis = np.abs(rows).argmax(axis=1)
    oblique = np.sort(np.abs(rows), axis=1)[:, -1].min() < math.cos(math.radians(40))
    true = "".join(_LETTERS[a, int(rows[i, a] < 0)] for i, a in enumerate(axis))
    if oblique or said == true:
        return ()
    return (f"the header calls its orientation {said}, its matrix says {true}: the matrix was used",)

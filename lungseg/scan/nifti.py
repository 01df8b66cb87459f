"""Image files: NIfTI (.nii, .nii.gz), NRRD and MetaImage (.mha, .mhd), to and from ``Volume``.

NIfTI is decoded here and not by SimpleITK, which (2.5.7, measured) fills a truncated file with zeros, turns NaN
into 0, a missing spacing into 1 mm and falls back from a sheared sform to the qform, each without an error.
NRRD and MetaImage go through SimpleITK, which refuses all of these. RAS <-> LPS happens here and nowhere else.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError, ResourceError
from lungseg.scan.hu import allocate, check_hu, clip_notes, require_memory, to_hu
from lungseg.scan.orientation import LPS_TO_SPL, RAS_TO_SPL, orthonormal_direction, to_canonical, to_stored
from lungseg.scan.volume import Geometry, Volume

__all__ = ["check_hu", "read_image", "write_image"]

SPACING_RANGE_MM = (0.3, 10.0)
"""Spacings outside are taken for wrong units or a default of a converter. RELIABILITY row 30."""
MAX_LABEL = int(np.iinfo(np.uint16).max)
MAX_HEADER_BYTES = 65536
"""Text headers of NRRD and MetaImage are looked at this far."""
MAX_TRAILING_BYTES = 1 << 20
"""Bytes accepted after the voxels of a NIfTI file (padding of some writers)."""
GRID_TOLERANCE_VOXELS = 0.1
"""qform and sform further apart than this are mentioned. RELIABILITY rows 28, 33."""

_NIFTI_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_NIFTI_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown (mm by custom), metre, millimetre, micrometre
_ITK_SUFFIXES = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}


@dataclass(frozen=True)
class _Header:
    """What is needed of a NIfTI-1 header, geometry in our world and axis order."""

    geometry: Geometry
    dtype: np.dtype[Any]
    data_offset: int
    slope: float
    intercept: float
    notes: tuple[str, ...]


def read_image(path: Path, options: ReadOptions = ReadOptions(), *, integer: bool = False) -> Volume:
    """Volume of one image file, in the canonical orientation.

    Parameters
    ----------
    path : Path
        .nii, .nii.gz, .nrrd, .mha or .mhd.
    options : ReadOptions
        What may be done to a file that is not right as it stands.
    integer : bool
        False: CT. True: a label map or mask, whose values must be whole numbers from 0 to 65535.

    Returns
    -------
    Volume
        CT: int16 HU, values below -1024 (padding) set to -1024. Labels: uint8, or uint16 if a value exceeds 255.
        ``stored_axes`` and ``stored_flips`` lead back to the file's own grid. Geometry of NIfTI: sform if its
        code is above 0, else qform.

    Raises
    ------
    InputError
        If the file is missing, truncated, damaged or of another format; has more than three dimensions;
        holds NaN, infinity, values that are not HU or (``integer``) not labels; or if its grid is sheared,
        unset, or has a spacing outside 0.3-10 mm.
    ResourceError
        If the machine could not hold the volume its header declares.

    Source
    ------
    RELIABILITY rows 25-34.
    """
    lower = path.name.lower()
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    if lower.endswith((".nii", ".nii.gz")):
        with _open(path) as stream:
            header = _nifti_header(stream, str(path))
            blocks = _nifti_blocks(stream, header, str(path))
            array, notes = _collect(blocks, header.geometry.shape, integer=integer, name=str(path))
        geometry, notes = header.geometry, header.notes + notes
    elif suffix in _ITK_SUFFIXES:
        image, geometry = _read_itk(path, _ITK_SUFFIXES[suffix])
        array, notes = _collect(iter(image), geometry.shape, integer=integer, name=str(path))
        del image
    else:
        raise InputError(f"{path}: unknown image format; give .nii, .nii.gz, .nrrd, .mha, .mhd or a DICOM folder")
    if not integer:
        try:
            notes += check_hu(array)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return replace(to_canonical(array, geometry), notes=notes)


def write_image(
    path: Path,
    array: np.ndarray,
    geometry: Geometry,
    *,
    stored_axes: Sequence[int] = (0, 1, 2),
    stored_flips: Sequence[bool] = (False, False, False),
) -> None:
    """Write a volume as .nii.gz, with its axes in the order of the file it came from.

    Parameters
    ----------
    path : Path
        Ends in .nii.gz; replaced only when the new file is complete.
    array : array, shape (Z, Y, X)
        Canonical; bool (written as uint8), uint8, uint16, int16 or float32.
    geometry : Geometry
        Canonical grid of ``array``.
    stored_axes, stored_flips : three ints, three bools
        From the ``Volume`` that was read; the defaults write the canonical orientation.

    Raises
    ------
    InputError
        If the name, dtype or shape is not one of these, or the folder does not exist.
    ResourceError
        If the file cannot be written (disk full, no permission).

    Notes
    -----
    qform and sform are both set; text fields of the header stay blank; equal input gives equal bytes.
    """
    import SimpleITK as sitk

    if not path.name.endswith(".nii.gz"):
        raise InputError(f"{path}: images are written as .nii.gz")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    values = array.astype(np.uint8) if array.dtype == bool else array
    if values.dtype not in (np.uint8, np.uint16, np.int16, np.float32):
        raise InputError(f"voxels of type {array.dtype} cannot be written; use bool, uint8, uint16, int16 or float32")
    if tuple(array.shape) != geometry.shape:
        raise InputError(f"array of shape {array.shape} on a grid of shape {geometry.shape}")
    stored, grid = to_stored(values, geometry, stored_axes=stored_axes, stored_flips=stored_flips)
    image = sitk.GetImageFromArray(stored)
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin((LPS_TO_SPL.T @ np.asarray(grid.origin_mm)).tolist())
    image.SetDirection((LPS_TO_SPL.T @ np.asarray(grid.direction))[:, ::-1].ravel().tolist())
    # The temporary name keeps the ending, by which ITK chooses format and compression.
    partial = path.with_name(f".{path.name[:-7]}.{os.getpid()}.partial.nii.gz")
    try:
        sitk.WriteImage(image, str(partial), imageIO="NiftiImageIO", useCompression=True)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except (RuntimeError, OSError) as error:
        raise ResourceError(f"{path}: could not be written ({_reason(error)}); is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, gzip or not by its content; damage becomes an InputError."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            with stream:
                yield cast(IO[bytes], stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); copy or convert it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)})") from error


def _nifti_header(stream: IO[bytes], name: str) -> _Header:
    """Parse and check a NIfTI-1 header (nifti1.h; 348 bytes)."""
    raw = stream.read(348)
    order = next((o for o in "<>" if len(raw) == 348 and struct.unpack_from(o + "i", raw)[0] == 348), None)
    if order is None or raw[344:348] != b"n+1\0":
        kind = "a NIfTI-2 file" if raw[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else "no single-file NIfTI-1 image"
        raise InputError(f"{name}: {kind}; convert it, for instance with `dcm2niix` or SimpleITK")

    def field(fmt: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(order + fmt, raw, offset)

    dim = field("8h", 40)
    sizes = dim[1 : 1 + dim[0]] if 1 <= dim[0] <= 7 else ()
    if len(sizes) < 3 or min(sizes) < 1 or math.prod(sizes[3:]) != 1:
        raise InputError(f"{name}: one three-dimensional volume is needed, not shape {sizes}; extract one volume")
    code = field("h", 70)[0]
    if code not in _NIFTI_DTYPES:
        raise InputError(f"{name}: voxels of NIfTI datatype {code} (colour or complex?) are no CT; convert it")
    geometry, notes = _nifti_geometry(field, sizes[2::-1], name)
    slope, intercept = field("2f", 112)
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        # nifti1.h: a slope of 0 means that the values are not scaled.
        if not math.isfinite(slope) or not math.isfinite(intercept) or intercept != 0:
            notes += ("the header's scaling is 0 or not a number: values were taken as they are",)
        slope, intercept = 1.0, 0.0
    offset = field("f", 108)[0]
    if not (math.isfinite(offset) and 348 <= offset < 2**31):
        raise InputError(f"{name}: damaged header (data offset {offset})")
    return _Header(geometry, np.dtype(order + _NIFTI_DTYPES[code]), int(offset), slope, intercept, notes)


def _nifti_geometry(field: Any, shape: tuple[int, int, int], name: str) -> tuple[Geometry, tuple[str, ...]]:
    """Grid by the rule "sform if its code is above 0, else qform", refused if neither is set."""
    unit = _NIFTI_UNIT_MM.get(field("b", 123)[0] & 7, math.nan)
    pixdim = field("8f", 76)
    spacing = np.array(pixdim[1:4]) * unit
    _check_spacing(spacing[::-1], name)
    qform_code, sform_code = field("2h", 252)
    if qform_code <= 0 and sform_code <= 0:
        raise InputError(
            f"{name}: neither qform nor sform is set, so left and right are unknown; convert the scan again from "
            "DICOM, or set them (`fslorient -setsformcode 1 FILE` once you know that its sform is right)"
        )
    grids = []
    if sform_code > 0:
        affine = np.array(field("12f", 280), dtype=float).reshape(3, 4) * unit
        grids.append(_geometry(affine[:, :3], affine[:, 3], shape, RAS_TO_SPL, name))
    if qform_code > 0:
        axes = _quaternion_axes(field("3f", 256), -1.0 if pixdim[0] < 0 else 1.0)
        try:
            grids.append(_geometry(axes * spacing, np.array(field("3f", 268)) * unit, shape, RAS_TO_SPL, name))
        except InputError:
            if not grids:
                raise
            return grids[0], ("the header's qform is not valid: its sform was used",)
    if len(grids) == 2 and not grids[0].is_close(grids[1], tolerance_voxels=GRID_TOLERANCE_VOXELS):
        return grids[0], ("qform and sform of the header disagree: the sform was used",)
    return grids[0], ()


def _quaternion_axes(bcd: tuple[float, float, float], qfac: float) -> np.ndarray:
    """Rotation matrix of a NIfTI quaternion (nifti1.h, METHOD 2); qfac -1 turns the third axis round."""
    b, c, d = bcd
    a = math.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d)))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    return rotation * np.array([1.0, 1.0, qfac])


def _geometry(axes: np.ndarray, origin: np.ndarray, shape: tuple[int, ...], to_spl: np.ndarray, name: str) -> Geometry:
    """Grid from the (x, y, z) step vectors and origin of a file, in our world and axis order."""
    if not (np.isfinite(axes).all() and np.isfinite(origin).all()):
        raise InputError(f"{name}: damaged header (orientation or origin is not a number)")
    steps = (to_spl @ axes)[:, ::-1]
    spacing = np.linalg.norm(steps, axis=0)
    _check_spacing(spacing, name)
    direction = orthonormal_direction(steps / spacing, name=name)
    position = tuple(float(v) for v in to_spl @ origin)
    return Geometry(shape, tuple(float(s) for s in spacing), position, direction)  # type: ignore[arg-type]


def _check_spacing(spacing: np.ndarray, name: str) -> None:
    """Refuse spacings that are not positive or not plausible for a CT."""
    text = " x ".join(f"{s:.4g}" for s in spacing)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(
            f"{name}: spacing must be strictly positive, not {text} mm; repair the header or convert again"
        )
    low, high = SPACING_RANGE_MM
    # Headers hold float32: 0.3 mm may read as 0.29999998.
    if spacing.min() < low * (1 - 1e-6) or spacing.max() > high * (1 + 1e-6):
        raise InputError(
            f"{name}: a spacing of {text} mm is not plausible for CT ({low:g}-{high:g} mm); are its units millimetres?"
        )


def _nifti_blocks(stream: IO[bytes], header: _Header, name: str) -> Iterator[np.ndarray]:
    """Slices of the file in its own order, scaled; reads to the end so that the checksum is verified."""
    if len(stream.read(header.data_offset - 348)) != header.data_offset - 348:
        raise InputError(f"{name}: truncated within its header; copy or convert it again")
    count, rows, columns = header.geometry.shape
    size = rows * columns * header.dtype.itemsize
    for k in range(count):
        raw = stream.read(size)
        if len(raw) != size:
            raise InputError(f"{name}: truncated in slice {k + 1} of {count}; copy or convert it again")
        block = np.frombuffer(raw, header.dtype).reshape(rows, columns)
        scaled = header.slope != 1.0 or header.intercept != 0.0
        yield block * np.float64(header.slope) + header.intercept if scaled else block
    if len(stream.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
        raise InputError(f"{name}: holds more voxels than its header declares; convert it again")


def _read_itk(path: Path, image_io: str) -> tuple[np.ndarray, Geometry]:
    """Voxels (a read-only view) and grid of a NRRD or MetaImage file."""
    import SimpleITK as sitk

    _check_data_file(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        sizes, dimension = reader.GetSize(), reader.GetDimension()
        if dimension < 3 or math.prod(sizes[3:]) != 1 or reader.GetNumberOfComponents() != 1:
            channels = f" with {reader.GetNumberOfComponents()} channels" if reader.GetNumberOfComponents() > 1 else ""
            raise InputError(f"{path}: one three-dimensional volume is needed, not shape {sizes}{channels}")
        require_memory(sizes[:3], np.float64, name=str(path))
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{path}: truncated or damaged ({_reason(error)}); copy or convert it again") from error
    spacing = np.asarray(image.GetSpacing()[:3])
    _check_spacing(spacing[::-1], str(path))
    direction = np.asarray(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    geometry = _geometry(direction * spacing, np.asarray(image.GetOrigin()[:3]), sizes[2::-1], LPS_TO_SPL, str(path))
    return sitk.GetArrayFromImage(image).reshape(geometry.shape), geometry


def _check_data_file(path: Path) -> None:
    """A text header may name the file of its voxels: accept a plain name in the same folder only."""
    with _open(path) as stream:
        text = stream.read(MAX_HEADER_BYTES).split(b"\n\n")[0].decode("latin-1")
    for line in text.splitlines():
        key, separator, value = line.replace("=", ":", 1).partition(":")
        key, value = key.strip().lower(), value.strip()
        if not separator or key not in ("elementdatafile", "data file", "datafile"):
            continue
        if key == "elementdatafile" and value == "LOCAL":
            return  # voxels follow: what comes now is no text
        plain = Path(value).name == value and " " not in value and "%" not in value and value != "LIST"
        if path.suffix.lower() != ".mhd" or not plain:
            raise InputError(
                f"{path}: its voxels lie in another file ({value!r}); convert it to one file (.mha, .nii.gz)"
            )


def _collect(
    blocks: Iterator[np.ndarray], shape: tuple[int, int, int], *, integer: bool, name: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Slices put together as int16 HU or as labels; every value is checked before anything is judged."""
    array = allocate(shape, np.uint16 if integer else np.int16, name=name)
    nonfinite = low = high = 0
    wrong: set[float] = set()
    for k, block in enumerate(blocks):
        if block.dtype.kind == "f":
            bad = ~np.isfinite(block)
            nonfinite += int(np.count_nonzero(bad))
            block = np.where(bad, 0, block)
        if not integer:
            below, above = to_hu(block, array[k])
            low, high = low + below, high + above
            continue
        odd = (block < 0) | (block > MAX_LABEL)
        if block.dtype.kind == "f":
            odd |= block != np.rint(block)
        if odd.any() and len(wrong) < 5:
            wrong.update(np.unique(block[odd])[:5].tolist())
        array[k] = np.where(odd, 0, block).astype(np.uint16)
    if nonfinite:
        raise InputError(
            f"{name}: {nonfinite} voxels are NaN or infinite; replace them (by air, -1024, outside the scan)"
        )
    if wrong:
        values = ", ".join(f"{v:g}" for v in sorted(wrong)[:5])
        raise InputError(f"{name}: a label map holds whole numbers from 0 to {MAX_LABEL}, but this has {values}")
    if integer:
        return (array.astype(np.uint8) if array.max() <= 255 else array), ()
    return array, clip_notes(low, high, array.size)


def _reason(error: Exception) -> str:
    """Last line of an error's text, or the words of its errno: short enough for a message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

"""Headers of single-file NIfTI-1 images, read and made byte by byte (nifti1.h; 348 bytes and 4 of extension flags)."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.image_header import ImageHeader, check_sizes, check_spacing, grid_of
from lungseg.scan.image_voxels import open_decoded
from lungseg.scan.orientation import RAS_TO_SPL
from lungseg.scan.volume import Geometry

GRID_TOLERANCE_VOXELS = 0.1
"""qform and sform further apart than this are mentioned. RELIABILITY rows 28, 33."""
SPACING_TOLERANCE = 0.01
"""pixdim repeats the voxel size of the sform; further apart (relative), one of them is wrong."""
HEADER_BYTES, DATA_OFFSET = 348, 352
_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown (mm by custom), metre, millimetre, micrometre
_UNIT_MM_CODE, _SCANNER_CODE = 2, 1


def read_nifti_header(path: Path) -> ImageHeader:
    """Header of a .nii or .nii.gz file.

    Parameters
    ----------
    path : Path
        The file; compressed or not is told by its content.

    Returns
    -------
    ImageHeader
        Geometry: sform if its code is above 0, else qform.

    Raises
    ------
    InputError
        If this is no single-file NIfTI-1 image, is damaged, colour or complex, or its grid is unset, sheared,
        contradictory or not plausible.

    Source
    ------
    nifti1.h (NIfTI-1.1); RELIABILITY rows 25-32.
    """
    name = str(path)
    with open_decoded(path, "raw") as plain:
        encoding = "gzip" if plain.read(2) == b"\x1f\x8b" else "raw"
    with open_decoded(path, encoding) as stream:
        raw = stream.read(HEADER_BYTES)
    order = next((o for o in "<>" if len(raw) == HEADER_BYTES and struct.unpack_from(o + "i", raw)[0] == 348), None)
    if order is None or raw[344:348] != b"n+1\0":
        kind = "a NIfTI-2 file" if raw[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else "no single-file NIfTI-1 image"
        raise InputError(f"{name}: {kind}; convert it, for instance with `dcm2niix` or SimpleITK")

    def field(fmt: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(order + fmt, raw, offset)

    dim = field("8h", 40)
    shape, volumes = check_sizes(dim[1 : 1 + dim[0]] if 1 <= dim[0] <= 7 else (), name)
    code, bits = field("2h", 70)
    if code not in _DTYPES:
        raise InputError(f"{name}: voxels of NIfTI datatype {code} (colour or complex?) are no CT; convert it")
    dtype = np.dtype(order + _DTYPES[code])
    if bits not in (0, 8 * dtype.itemsize):  # some writers leave it out
        raise InputError(f"{name}: damaged header (datatype {code} has {8 * dtype.itemsize} bits, not {bits})")
    geometry, notes = _geometry(field, shape, name)
    slope, intercept = field("2f", 112)
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        # nifti1.h: a slope of 0 means that the values are not scaled.
        if not math.isfinite(slope) or not math.isfinite(intercept) or intercept != 0:
            notes += ("the header's scaling is 0 or not a number: values were taken as they are",)
        slope, intercept = 1.0, 0.0
    offset = field("f", 108)[0]
    if not (math.isfinite(offset) and HEADER_BYTES <= offset < 2**31):
        raise InputError(f"{name}: damaged header (data offset {offset})")
    return ImageHeader(
        geometry,
        dtype,
        path,
        encoding,
        skip=int(offset),
        volumes=volumes,
        slope=slope,
        intercept=intercept,
        notes=notes,
    )


def _geometry(field: Any, shape: tuple[int, int, int], name: str) -> tuple[Geometry, tuple[str, ...]]:
    """Grid by the rule "sform if its code is above 0, else qform", refused if neither is set. RELIABILITY row 28."""
    unit = _UNIT_MM.get(field("b", 123)[0] & 7, math.nan)
    pixdim = field("8f", 76)
    spacing = np.array(pixdim[1:4]) * unit
    check_spacing(spacing[::-1], name)
    qform_code, sform_code = field("2h", 252)
    if qform_code <= 0 and sform_code <= 0:
        raise InputError(
            f"{name}: neither qform nor sform is set, so left and right are unknown; convert the scan again from "
            "DICOM, or set them (`fslorient -setsformcode 1 FILE` once you know that its sform is right)"
        )
    grids = []
    if sform_code > 0:
        affine = np.array(field("12f", 280), dtype=float).reshape(3, 4) * unit
        grids.append(grid_of(affine[:, :3], affine[:, 3], shape, RAS_TO_SPL, name))
        steps = grids[0].spacing_mm[::-1]
        if np.abs(np.array(steps) / spacing - 1).max() > SPACING_TOLERANCE:
            raise InputError(
                f"{name}: pixdim says a spacing of {_text(spacing)} mm, the sform {_text(steps)} mm; "
                "repair the one that is wrong (`fslorient -copyqform2sform FILE` if pixdim and qform are right)"
            )
    if qform_code > 0:
        axes = _quaternion_axes(field("3f", 256), -1.0 if pixdim[0] < 0 else 1.0)
        try:
            grids.append(grid_of(axes * spacing, np.array(field("3f", 268)) * unit, shape, RAS_TO_SPL, name))
        except InputError:
            if not grids:
                raise
            return grids[0], ("the header's qform is not valid: its sform was used",)
    if len(grids) == 2 and not grids[0].is_close(grids[1], tolerance_voxels=GRID_TOLERANCE_VOXELS):
        return grids[0], ("qform and sform of the header disagree: the sform was used",)
    return grids[0], ()


def _text(spacing: Any) -> str:
    return " x ".join(f"{s:.4g}" for s in spacing)


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


def make_nifti_header(geometry: Geometry, dtype: np.dtype[Any]) -> bytes:
    """Header of a volume in the file's own axis order: 352 bytes, little-endian, all text fields blank.

    Parameters
    ----------
    geometry : Geometry
        Slowest axis first; any handedness.
    dtype : numpy dtype
        One of the types of NIfTI-1.

    Notes
    -----
    qform and sform are both set (code 1, scanner), so that readers of either see the same grid.
    """
    code = next(c for c, name in _DTYPES.items() if np.dtype(name) == dtype)
    direction = (RAS_TO_SPL.T @ np.asarray(geometry.direction))[:, ::-1]  # columns: RAS unit vectors of x, y, z
    spacing, origin = np.array(geometry.spacing_mm[::-1]), RAS_TO_SPL.T @ np.asarray(geometry.origin_mm)
    qfac = -1.0 if np.linalg.det(direction) < 0 else 1.0
    header = bytearray(DATA_OFFSET)
    struct.pack_into("<i", header, 0, HEADER_BYTES)
    header[38:39] = b"r"  # "regular", as Analyze 7.5 wrote it
    struct.pack_into("<8h", header, 40, 3, *geometry.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, code, 8 * dtype.itemsize)
    struct.pack_into("<8f", header, 76, qfac, *spacing, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, DATA_OFFSET, 1.0, 0.0)
    header[123] = _UNIT_MM_CODE
    struct.pack_into("<2h", header, 252, _SCANNER_CODE, _SCANNER_CODE)
    struct.pack_into("<6f", header, 256, *_quaternion(direction * [1.0, 1.0, qfac]), *origin)
    struct.pack_into("<12f", header, 280, *np.column_stack([direction * spacing, origin]).ravel())
    header[344:348] = b"n+1\0"
    return bytes(header)


def _quaternion(rotation: np.ndarray) -> tuple[float, float, float]:
    """(b, c, d) of a proper rotation matrix, with a >= 0: the largest of the four is found first (nifti1.h)."""
    m = rotation
    trace = np.array([m[0, 0] + m[1, 1] + m[2, 2], m[0, 0], m[1, 1], m[2, 2]])
    largest = int(trace.argmax())
    if largest == 0:
        q = np.array([1 + trace[0], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]])
    else:
        i, j, k = [(0, 1, 2), (1, 2, 0), (2, 0, 1)][largest - 1]
        q = np.empty(4)
        q[0] = m[k, j] - m[j, k]
        q[1 + i] = 1 + m[i, i] - m[j, j] - m[k, k]
        q[1 + j] = m[j, i] + m[i, j]
        q[1 + k] = m[k, i] + m[i, k]
    q /= np.linalg.norm(q)
    if q[0] < 0:
        q = -q
    return float(q[1]), float(q[2]), float(q[3])

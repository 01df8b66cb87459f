"""Image files made byte by byte for the tests of readers: independent of every library."""

from __future__ import annotations

import gzip
import struct
from itertools import permutations, product
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from lungseg.scan.volume import Geometry

ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]
AXIAL = np.diag((-0.75, -0.75, 2.5, 1.0))[:3]
"""RAS affine of an axial supine grid."""
GRID = Geometry((8, 9, 10), (2.5, 0.75, 0.5), (-310.0, 12.5, -40.25))


def ct(shape: tuple[int, int, int] = GRID.shape, seed: int = 0) -> np.ndarray:
    """Half lung, the rest muscle and fat, every voxel different in its neighbourhood."""
    values = np.random.default_rng(seed).normal(-850, 60, shape)
    values[:, : shape[1] // 2] += 890
    values[:, : shape[1] // 4] -= 140
    return np.rint(values).clip(-1024, 3071).astype(np.int16)


def raw_header(path: Path) -> dict[str, object]:
    """Fields of a NIfTI-1 header read with struct alone."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return {
        "dim": struct.unpack_from("<8h", data, 40),
        "datatype": struct.unpack_from("<h", data, 70)[0],
        "pixdim": np.array(struct.unpack_from("<8f", data, 76)),
        "text": data[4:38] + data[148:252] + data[328:344],  # data_type, db_name, descrip, aux_file, intent_name
        "codes": struct.unpack_from("<2h", data, 252),
        "qform": np.array(struct.unpack_from("<6f", data, 256)),
        "sform": np.array(struct.unpack_from("<12f", data, 280)),
        "units": data[123],
        "voxels": data[int(struct.unpack_from("<f", data, 108)[0]) :],
    }


def write_nifti(path: Path, array: np.ndarray, sform: np.ndarray) -> None:
    """A NIfTI-1 file with only an sform, made byte by byte: independent of every library."""
    codes = {"int16": 4, "uint8": 2, "float32": 16, "float64": 64, "uint16": 512, "int32": 8, "int8": 256}
    header = bytearray(352)
    spacing = np.linalg.norm(sform[:, :3], axis=0)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *array.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, codes[array.dtype.name], 8 * array.dtype.itemsize)
    struct.pack_into("<8f", header, 76, 1.0, *spacing, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352.0, 1.0, 0.0)
    header[123] = 2
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, *sform.ravel())
    header[344:348] = b"n+1\0"
    data = bytes(header) + array.astype(array.dtype.newbyteorder("<")).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def patched(path: Path, *edits: tuple[int, str, tuple]) -> Path:
    """The valid uncompressed file `path` with header fields overwritten."""
    data = bytearray(path.read_bytes())
    for offset, fmt, values in edits:
        struct.pack_into("<" + fmt, data, offset, *values)
    out = path.with_name("patched.nii")
    out.write_bytes(data)
    return out


def stored_affine(axes, flips, tilt) -> tuple[np.ndarray, tuple[int, int, int]]:
    """RAS affine (columns x, y, z of the file) and array shape of one of 48 orientations of GRID."""
    direction = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()  # (S, P, L) by canonical axis
    shape, steps = [0, 0, 0], np.zeros((3, 3))
    origin = np.array([-310.0, 12.5, -40.25])
    for i in range(3):
        sign = -1.0 if flips[i] else 1.0
        shape[axes[i]] = GRID.shape[i]
        steps[:, axes[i]] = direction[:, i] * GRID.spacing_mm[i] * sign
        if flips[i]:
            origin = origin + direction[:, i] * GRID.spacing_mm[i] * (GRID.shape[i] - 1)
    to_ras = np.array([[0, 0, -1.0], [0, -1.0, 0], [1.0, 0, 0]])  # (S, P, L) -> (R, A, S)
    return np.column_stack([to_ras @ steps[:, ::-1], to_ras @ origin]), tuple(shape)


def write_nrrd(path: Path, array: np.ndarray, data: bytes | None = None, **changes: str | None) -> Path:
    """A NRRD of ``array`` on an axial grid of 2.5 x 0.75 x 0.5 mm; fields are replaced, added or (None) left out."""
    types = {"int16": "short", "uint8": "uchar", "float32": "float", "int32": "int", "uint16": "ushort"}
    fields: dict[str, str | None] = {
        "type": types[array.dtype.name],
        "dimension": str(array.ndim),
        "space": "left-posterior-superior",
        "sizes": " ".join(str(n) for n in array.shape[::-1]),
        "space directions": "(0.5,0,0) (0,0.75,0) (0,0,2.5)" + " none" * (array.ndim - 3),
        "kinds": "domain domain domain" + " list" * (array.ndim - 3),
        "endian": "little",
        "encoding": "raw",
        "space origin": "(-40.25,12.5,-310)",
    }
    fields.update({key.replace("_", " "): value for key, value in changes.items()})
    lines = ["NRRD0004", "# made by a test", *(f"{k}: {v}" for k, v in fields.items() if v is not None)]
    voxels = array.astype(array.dtype.newbyteorder("<")).tobytes() if data is None else data
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + voxels)
    return path


def write_mha(path: Path, array: np.ndarray, data: bytes | None = None, **changes: str | None) -> Path:
    """A MetaImage of ``array`` on an axial grid of 2.5 x 0.75 x 0.5 mm; fields are replaced or (None) left out."""
    types = {"int16": "MET_SHORT", "uint8": "MET_UCHAR", "float32": "MET_FLOAT", "int32": "MET_INT"}
    n = array.ndim
    fields: dict[str, str | None] = {
        "ObjectType": "Image",
        "NDims": str(n),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(str(int(v)) for v in np.eye(n).ravel()),
        "Offset": " ".join(["-40.25", "12.5", "-310", "0"][:n]),
        "ElementSpacing": " ".join(["0.5", "0.75", "2.5", "1"][:n]),
        "DimSize": " ".join(str(k) for k in array.shape[::-1]),
        "ElementType": types[array.dtype.name],
    }
    fields.update(changes)
    fields.setdefault("ElementDataFile", "LOCAL")
    header = "".join(f"{k} = {v}\n" for k, v in fields.items() if v is not None)
    voxels = array.astype(array.dtype.newbyteorder("<")).tobytes() if data is None else data
    path.write_bytes(header.encode() + voxels)
    return path

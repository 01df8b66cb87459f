"""Image files: NIfTI (.nii, .nii.gz), NRRD and MetaImage (.mha, .mhd), to and from ``Volume``.

All are decoded here and not by SimpleITK, which (2.5.7, measured) fills a truncated NIfTI with zeros, turns NaN into
0, takes a missing spacing, space or matrix for 1 mm and LPS, falls back from a sheared sform to the qform, and returns
uninitialised memory for compressed MetaImage data that it cannot inflate, each without an error; and whose C++
libraries would have to be trusted with hostile headers. Voxels are streamed.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError, ResourceError
from lungseg.scan.hu import check_hu
from lungseg.scan.image_header import ImageHeader, spacing_note
from lungseg.scan.image_voxels import read_volume
from lungseg.scan.metaimage import read_metaimage_header
from lungseg.scan.nifti_header import make_nifti_header, read_nifti_header
from lungseg.scan.nrrd import read_nrrd_header
from lungseg.scan.orientation import to_stored
from lungseg.scan.volume import Geometry, Volume

__all__ = ["read_image", "write_image"]

COMPRESSION_LEVEL = 4
"""Of .nii.gz: a CT as small as at zlib's default of 6 in two fifths of the time, labels a third larger than that."""


def read_image(path: Path, options: ReadOptions = ReadOptions(), *, integer: bool = False) -> Volume:
    """Volume of one image file, in the canonical orientation.

    Parameters
    ----------
    path : Path
        .nii, .nii.gz, .nrrd, .mha or .mhd; any name.
    options : ReadOptions
        What may be done to a file that is not right as it stands: ``volume`` chooses one of several, ``nan_to_air``
        replaces NaN and infinity in a CT (never in a mask).
    integer : bool
        False: CT. True: a label map or mask, whose values must be whole numbers from 0 to 65535.

    Returns
    -------
    Volume
        CT: int16 HU, values below -1024 (padding) set to -1024. Labels: uint8, or uint16 if a value exceeds 255; an
        empty mask is an array of zeros. ``stored_axes`` and ``stored_flips`` lead back to the file's own grid.
        Geometry of NIfTI: sform if its code is above 0, else qform. What was repaired is in ``notes`` and ``status``.

    Raises
    ------
    InputError
        If the file is missing, truncated, damaged or of another format; has several volumes and none was chosen;
        holds NaN, infinity, values that are not HU or (``integer``) not labels; or if its grid is sheared, unset,
        or has a spacing outside 0.1-20 mm.
    ResourceError
        If the machine could not hold the volume its header declares.

    Source
    ------
    RELIABILITY rows 14, 15, 25-36.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    volume, tally = read_volume(_header(path), options, integer=integer, name=str(path))
    if integer:
        return volume
    try:
        notes = check_hu(volume.array, tally)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return replace(volume, notes=volume.notes + spacing_note(volume.geometry) + notes)


def _header(path: Path) -> ImageHeader:
    """Header by the ending of the name."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return read_nifti_header(path)
    if name.endswith(".nrrd"):
        return read_nrrd_header(path)
    if name.endswith((".mha", ".mhd")):
        return read_metaimage_header(path)
    raise InputError(f"{path}: unknown image format; give .nii, .nii.gz, .nrrd, .mha, .mhd or a DICOM folder")


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
    # Not the name itself with an ending: long names leave no room for one.
    key = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
    _remove_orphans(path.parent, f".{key}.{host}.")
    partial = path.with_name(f".{key}.{host}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as raw:
            # No name and no time in the gzip header: equal input gives equal bytes.
            with gzip.GzipFile("", "wb", COMPRESSION_LEVEL, raw, mtime=0) as stream:
                stream.write(make_nifti_header(grid, stored.dtype))
                for block in stored:
                    stream.write(np.ascontiguousarray(block, dtype=stored.dtype.newbyteorder("<")).data)
            raw.flush()
            os.fsync(raw.fileno())
        partial.replace(path)
    except OSError as error:
        raise ResourceError(f"{path}: could not be written ({error.strerror or error}); is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def _remove_orphans(folder: Path, prefix: str) -> None:
    """Remove what processes of this machine that were killed left half written."""
    for old in folder.glob(f"{prefix}*.partial"):
        pid = old.name.removeprefix(prefix).removesuffix(".partial")
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            old.unlink(missing_ok=True)
        except (ValueError, PermissionError):  # not one of ours, or alive under another user
            continue

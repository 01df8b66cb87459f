"""Write a digital phantom as a DICOM series; the bytes follow from the arguments alone: no clock, no chance."""

from __future__ import annotations

import hashlib
import locale
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom_headers import CT_IMAGE
from lungseg.scan.orientation import LPS_TO_SPL
from lungseg.scan.volume import AIR_HU, Volume

FIXED_DATE, FIXED_TIME = "20000101", "000000"
"""Written into every date and time, so that no file depends on the day it was made."""
MAX_HU = int(np.iinfo(np.int16).max) + AIR_HU
"""Largest value that fits 16 signed bits after the intercept of -1024 is taken off."""


def write_dicom_series(
    folder: Path,
    volume: Volume,
    *,
    patient_id: str,
    series_seed: str,
    study_seed: str | None = None,
    kernel: str = "B40f",
    kvp: float = 120.0,
    slice_thickness_mm: float | None = None,
    compress: bool = True,
) -> list[Path]:
    """Write a volume as a DICOM CT series, one file per slice: for digital phantoms, never for patients.

    Parameters
    ----------
    folder : Path
        Made if absent; files are named 000.dcm, 001.dcm ... from inferior to superior.
    volume : Volume
        int16 HU from -1024 to 31743 in the canonical orientation.
    patient_id : str
        PatientID, an invented one.
    series_seed, study_seed : str
        All UIDs are hashes of these under the root 2.25; series of equal ``study_seed`` (default: the series
        seed) form one study in one frame of reference.
    kernel, kvp : str, float
        ConvolutionKernel and KVP.
    slice_thickness_mm : float, optional
        SliceThickness; by default the distance of slices.
    compress : bool
        JPEG 2000 lossless instead of no compression.

    Returns
    -------
    list of Path
        The files, in order. The same arguments give the same bytes with the same SimpleITK.

    Raises
    ------
    InputError
        If the values do not fit.
    ResourceError
        If a file cannot be written.
    """
    import SimpleITK as sitk

    array, geometry = volume.array, volume.geometry
    if array.dtype != np.int16 or int(array.min()) < AIR_HU or int(array.max()) > MAX_HU:
        raise InputError(f"DICOM phantoms hold int16 HU from {AIR_HU} to {MAX_HU}")
    study = study_seed if study_seed is not None else series_seed
    directions = LPS_TO_SPL.T @ np.asarray(geometry.direction)  # columns: slice, column, row direction in (L, P, S)
    fixed = {
        "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        "0008|0016": CT_IMAGE,
        **dict.fromkeys(("0008|0020", "0008|0021", "0008|0022", "0008|0023"), FIXED_DATE),
        **dict.fromkeys(("0008|0030", "0008|0031", "0008|0032", "0008|0033"), FIXED_TIME),
        "0008|0060": "CT",
        "0008|0070": "lungseg phantom",
        "0010|0010": patient_id,
        "0010|0020": patient_id,
        "0018|0050": _decimal(geometry.spacing_mm[0] if slice_thickness_mm is None else slice_thickness_mm),
        "0018|0060": _decimal(kvp),
        # GDCM adds this tag of its own accord once a file has been read in the process: say it always
        "0018|0088": _decimal(geometry.spacing_mm[0]),
        "0018|1210": kernel,
        "0018|5100": "HFS",
        "0020|000d": _uid("study", study),
        "0020|000e": _uid("series", series_seed),
        "0020|0011": "1",
        "0020|0012": "1",
        "0020|0037": "\\".join(_decimal(v) for v in (*directions[:, 2], *directions[:, 1])),
        "0020|0052": _uid("frame", study),
        "0028|1052": str(AIR_HU),
        "0028|1053": "1",
        "0028|1054": "HU",
    }
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    if compress:
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG2000")
    else:
        writer.UseCompressionOff()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(geometry.shape[0]):
        image = sitk.GetImageFromArray(array[k : k + 1])
        image.SetSpacing(geometry.spacing_mm[::-1])
        origin = LPS_TO_SPL.T @ geometry.to_world((k, 0, 0))
        own = {
            "0008|0018": _uid("image", f"{series_seed}/{k}"),
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(_decimal(v) for v in origin),
        }
        for tag, value in (fixed | own).items():
            image.SetMetaData(tag, value)
        files.append(folder / f"{k:03d}.dcm")
        writer.SetFileName(str(files[-1]))
        try:
            with _kept_locale():
                writer.Execute(image)
        except RuntimeError as error:
            raise ResourceError(f"{files[-1]}: could not be written; is the disk full?") from error
    return files


@contextmanager
def _kept_locale() -> Iterator[None]:
    """Undo what the writer does to the process: it leaves the locale `C`, and text files would be read as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _uid(role: str, seed: str) -> str:
    """UID from a hash, under the root for UUIDs (PS3.5 B.2)."""
    return f"2.25.{int.from_bytes(hashlib.sha256(f'lungseg/{role}/{seed}'.encode()).digest()[:16], 'big')}"


def _decimal(value: float) -> str:
    """Decimal string of at most 16 characters (PS3.5, VR DS)."""
    value = float(value) + 0.0
    return next(text for digits in range(12, 0, -1) if len(text := f"{value:.{digits}g}") <= 16)

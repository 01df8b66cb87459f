"""DICOM series made with pydicom for tests: written slice by slice from a canonical array, with faults by choice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom import choose_series, find_series, read_series
from lungseg.scan.volume import Geometry, Volume

ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]
GRID = Geometry((9, 10, 11), (2.5, 2.2, 2.0), (-310.0, 12.5, -40.25))
CT, SECONDARY, ENHANCED, REPORT = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "7", "2.1", "88.22"))
CANARY = "Doe^Canary"


def chest(shape: tuple[int, int, int] = GRID.shape, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(-850, 60, shape)
    values[:, : shape[1] // 2] += 890
    return np.rint(values).clip(-1024, 3071).astype(np.int16)


def slice_dataset(pixels: np.ndarray, position: np.ndarray, cosines: np.ndarray, pixel: tuple[float, float]) -> Dataset:
    """A CT slice with stored values `pixels` (HU + 1024) and every patient tag set to a canary."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CT, pydicom.uid.generate_uid(), "CT"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    for tag in ("PatientName", "PatientID", "InstitutionName", "ReferringPhysicianName", "SeriesDescription"):
        setattr(ds, tag, CANARY)
    ds.ImageType, ds.Manufacturer, ds.ConvolutionKernel = ["ORIGINAL", "PRIMARY", "AXIAL"], "SIEMENS", "B30f"
    ds.KVP, ds.SliceThickness, ds.AcquisitionNumber = "120", "", "1"
    ds.ImagePositionPatient = [f"{v:.6g}" for v in position]
    ds.ImageOrientationPatient = [f"{v:.8f}" for v in cosines]
    ds.PixelSpacing = list(pixel)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.RescaleIntercept, ds.RescaleSlope = "-1024", "1"
    ds.PixelData = pixels.tobytes()
    return ds


def save(ds: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID or "1.2.3.6"
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


Edit = Callable[[Dataset, int], None]


def write_folder(
    folder: Path,
    array: np.ndarray | None = None,
    *,
    axes: tuple[int, ...] = (0, 1, 2),
    flips: tuple[bool, ...] = (False, False, False),
    geometry: Geometry = GRID,
    edit: Edit | None = None,
    skip: tuple[int, ...] = (),
    order: np.ndarray | None = None,
    syntax: str = ExplicitVRLittleEndian,
) -> list[Path]:
    """The canonical volume as slices along canonical axis axes[0], rows along axes[1], columns along axes[2]."""
    array = chest() if array is None else array
    stored = np.flip(array.transpose(axes), tuple(i for i in range(3) if flips[i]))
    unit = np.asarray(geometry.direction)[:, list(axes)] * np.where(flips, -1.0, 1.0)  # (S, P, L) by file axis
    first = np.zeros(3)
    first[list(axes)] = [array.shape[a] - 1 if flip else 0 for a, flip in zip(axes, flips, strict=True)]
    spacing = [geometry.spacing_mm[a] for a in axes]
    paths = []
    for k in range(stored.shape[0]):
        if k in skip:
            continue
        position = geometry.to_world(first) + unit[:, 0] * spacing[0] * k
        cosines = np.concatenate([unit[::-1, 2], unit[::-1, 1]])  # direction along a row, then along a column
        ds = slice_dataset((stored[k].astype(np.int32) + 1024).astype(np.int16), position[::-1], cosines, spacing[1:])
        ds.InstanceNumber = k + 1
        if edit:
            edit(ds, k)
        name = k if order is None else int(order[k])
        paths.append(save(ds, folder / f"IM{name:04d}", syntax))
    return paths


def read_only_series(folder: Path, **options: ReadOptions) -> Volume:
    (series,) = find_series(folder).series
    return read_series(series, **options)


def refusal(folder: Path) -> str:
    (series,) = find_series(folder).series
    with pytest.raises(InputError) as caught:
        read_series(series)
    assert "series " in str(caught.value)
    with pytest.raises(InputError, match="can be read as a CT volume"):
        choose_series([series])
    return str(caught.value)


def edit_all(**tags: object) -> Edit:
    def edit(ds: Dataset, k: int) -> None:
        for tag, value in tags.items():
            if value is None:
                delattr(ds, tag)
            else:
                setattr(ds, tag, value)

    return edit

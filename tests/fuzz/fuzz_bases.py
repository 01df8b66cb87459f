"""Healthy files for the fuzz: one small chest, written in every form that the readers accept.

The chest is asymmetric in all axes (heart to the left, spine behind, one lung smaller), so that any flip, swap or
shift of it changes voxels. Everything is built from fixed seeds, so that a mutant is known by (seed, number) alone.
"""

from __future__ import annotations

import gzip
import io
import struct
import tempfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fuzz_jpegls
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence as Items
from scipy.spatial.transform import Rotation

from lungseg.scan.volume import Geometry

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "big": "1.2.840.10008.1.2.2",
    "jpeg": "1.2.840.10008.1.2.4.70",
    "jpegls": "1.2.840.10008.1.2.4.80",
    "jpeg2000": "1.2.840.10008.1.2.4.90",
    "rle": "1.2.840.10008.1.2.5",
}
"""PS3.6 A.1: what the base series are written in."""
ITK_COMPRESSORS = {"jpeg": "JPEG", "jpeg2000": "JPEG2000"}
TILT = Rotation.from_euler("xyz", (6.0, -4.0, 9.0), degrees=True).as_matrix()
GRID = Geometry((20, 48, 44), (5.0, 6.25, 6.5), (-310.0, -150.5, -140.25))
OBLIQUE = Geometry(GRID.shape, GRID.spacing_mm, GRID.origin_mm, tuple(map(tuple, TILT.tolist())))  # type: ignore[arg-type]


@dataclass(frozen=True)
class DicomBase:
    """A series as files, in the order of the canonical axis its slices are cut along."""

    name: str
    syntax: str
    files: tuple[bytes, ...]
    """One per slice, along ``slice_axis``; a single one for multi-frame."""
    geometry: Geometry
    slice_axis: int = 0
    """Canonical axis (z, y, x) from slice to slice."""
    has_location: bool = True
    """Whether SliceLocation repeats the position of each slice."""


@dataclass(frozen=True)
class ImageBase:
    """One image file as its header and voxel bytes, both uncompressed."""

    name: str
    suffix: str
    header: bytes
    voxels: bytes
    geometry: Geometry
    compression: str = ""
    """'' for none, 'file' for a gzip file as a whole, 'voxels' for zlib or gzip of the voxels alone."""
    forms: str = ""
    """NIfTI: 'qs' where the orientation is given twice, 'q' or 's' where it is given once."""
    order: str = "<"

    def build(self, header: bytes, voxels: bytes) -> bytes:
        """The file of a header and voxels."""
        if self.compression == "voxels":
            packed = _gzip(voxels) if self.suffix == ".nrrd" else zlib.compress(voxels, 6)
            return header.replace(b"@SIZE@", str(len(packed)).encode()) + packed
        return _gzip(header + voxels) if self.compression == "file" else header + voxels


@cache
def chest() -> np.ndarray:
    """int16 HU, shape of ``GRID``: body with fat, two unequal lungs, heart, spine, noise."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID.shape], indexing="ij")
    hu = np.full(GRID.shape, -1000.0)
    body = (y / 0.85) ** 2 + (x / 0.95) ** 2
    hu[body < 1] = -105
    hu[body < 0.8] = 40
    for side, depth, level in ((-0.42, 0.55, -0.05), (0.44, 0.48, 0.1)):
        hu[((z - level) / 0.9) ** 2 + (y / depth) ** 2 + ((x - side) / 0.3) ** 2 < 1] = -850
    hu[((z + 0.4) / 0.5) ** 2 + ((y + 0.25) / 0.3) ** 2 + ((x - 0.18) / 0.3) ** 2 < 1] = 50
    hu[(y - 0.6) ** 2 + x**2 < 0.02] = 450
    hu += np.random.default_rng(5).normal(0, 12, hu.shape) + 8 * z
    return np.rint(hu).clip(-1020, 2000).astype(np.int16)


def _slice_dataset(
    stored: np.ndarray, position: np.ndarray, cosines: np.ndarray, pixel: tuple[float, float]
) -> Dataset:
    """The header of one CT slice, in (L, P, S) millimetres."""
    ds = Dataset()
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID, ds.Modality, ds.Manufacturer = CT_IMAGE, "CT", "SIEMENS"
    ds.StudyDate, ds.StudyTime = "20200101", "120000"
    ds.PatientName, ds.PatientID = "Fuzz^Phantom", "fuzz"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    ds.KVP, ds.ConvolutionKernel, ds.SliceThickness = "120", "B30f", f"{GRID.spacing_mm[0]:g}"
    ds.AcquisitionNumber, ds.SeriesNumber, ds.PatientPosition = 1, 2, "HFS"
    ds.ImagePositionPatient = [f"{v:.6f}" for v in position]
    ds.ImageOrientationPatient = [f"{v:.9f}" for v in cosines]
    ds.PixelSpacing = [f"{v:g}" for v in pixel]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    signed = stored.dtype.kind == "i"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16 if signed else 12, 15 if signed else 11
    ds.PixelRepresentation = int(signed)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0" if signed else "-1024", "1", "HU"
    ds.WindowCenter, ds.WindowWidth = "-600", "1500"
    return ds


def to_bytes(ds: Dataset, syntax: str) -> bytes:
    """A DICOM file; ``syntax`` names one of ``SYNTAXES``."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    return stream.getvalue()


def _set_pixels(ds: Dataset, stored: np.ndarray, syntax: str) -> None:
    """Pixel data of one slice in a transfer syntax; GDCM encodes what pydicom cannot."""
    if syntax in ITK_COMPRESSORS or syntax == "jpegls":
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        jpegls = syntax == "jpegls"
        frame = fuzz_jpegls.encode(stored) if jpegls else _encode(stored, ITK_COMPRESSORS[syntax])
        ds.PixelData = encapsulate([frame])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        return
    order = ">" if syntax == "big" else "<"
    ds.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    ds["PixelData"].VR = "OW"
    if syntax == "rle":
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = SYNTAXES["explicit"]
        ds.compress(SYNTAXES["rle"], generate_instance_uid=False, encoding_plugin="pydicom")


def _encode(stored: np.ndarray, compressor: str) -> bytes:
    """One losslessly compressed frame."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(path))
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.Execute(sitk.GetImageFromArray(stored[None]))
        written = pydicom.dcmread(path)
    assert written.BitsStored == 16
    return next(generate_frames(written.PixelData, number_of_frames=1))


def _slices(name: str, syntax: str, geometry: Geometry, axis: int, *, signed: bool, lean: bool = False) -> DicomBase:
    """The chest cut along one canonical axis."""
    order = {0: (0, 1, 2), 1: (1, 0, 2), 2: (2, 0, 1)}[axis]  # slice, row, column axis
    hu = chest().transpose(order).astype(np.int32)
    values = hu.astype(np.int16) if signed else (hu + 1024).astype(np.uint16)
    unit = np.asarray(geometry.direction)[:, list(order)]
    spacing = [geometry.spacing_mm[a] for a in order]
    cosines = np.concatenate([unit[::-1, 2], unit[::-1, 1]])
    files = []
    for k in range(len(values)):
        position = np.asarray(geometry.origin_mm) + unit[:, 0] * spacing[0] * k
        ds = _slice_dataset(values[k], position[::-1], cosines, (spacing[1], spacing[2]))
        ds.SOPInstanceUID, ds.InstanceNumber = f"1.2.3.4.{k + 1}", k + 1
        if lean:
            for tag in ("SliceThickness", "KVP", "ConvolutionKernel", "PatientID", "AcquisitionNumber", "RescaleType"):
                delattr(ds, tag)
        else:
            normal = np.cross(cosines[:3], cosines[3:])
            ds.SliceLocation, ds.SpacingBetweenSlices = f"{position[::-1] @ normal:.6f}", f"{spacing[0]:g}"
        _set_pixels(ds, np.ascontiguousarray(values[k]), syntax)
        files.append(to_bytes(ds, syntax))
    return DicomBase(name, syntax, tuple(files), geometry, axis, has_location=not lean)


def _enhanced() -> DicomBase:
    """The chest as one Enhanced CT file, geometry and rescale in functional groups (PS3.3 C.7.6.16)."""
    values = (chest().astype(np.int32) + 1024).astype(np.uint16)
    ds = _slice_dataset(values[0], np.zeros(3), np.zeros(6), (1.0, 1.0))
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleIntercept", "RescaleSlope",
                "RescaleType", "SliceThickness"):  # fmt: skip
        delattr(ds, tag)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.InstanceNumber = ENHANCED_CT, "1.2.3.4.1", 1
    ds.NumberOfFrames = len(values)

    def item(**tags: object) -> Items:
        inner = Dataset()
        for tag, value in tags.items():
            setattr(inner, tag, value)
        return Items([inner])

    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=["1", "0", "0", "0", "1", "0"])
    shared.PixelMeasuresSequence = item(PixelSpacing=["6.25", "6.5"], SliceThickness="5", SpacingBetweenSlices="5")
    shared.PixelValueTransformationSequence = item(RescaleIntercept="-1024", RescaleSlope="1", RescaleType="HU")
    ds.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for k in range(len(values)):
        position = (np.asarray(GRID.origin_mm) + np.array([GRID.spacing_mm[0] * k, 0, 0]))[::-1]
        frame = Dataset()
        frame.FrameContentSequence = item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])
        frame.PlanePositionSequence = item(ImagePositionPatient=[f"{v:.6f}" for v in position])
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = Items(frames)
    ds.PixelData = values.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    return DicomBase("enhanced", "explicit", (to_bytes(ds, "explicit"),), GRID, has_location=False)


DICOM_BASES = ("explicit", "implicit", "big", "deflated", "rle", "jpeg", "jpegls", "jpeg2000", "coronal", "oblique",
               "enhanced")  # fmt: skip


@cache
def dicom_base(name: str) -> DicomBase:
    """One of ``DICOM_BASES``."""
    if name == "enhanced":
        return _enhanced()
    if name == "coronal":
        return _slices(name, "explicit", GRID, 1, signed=False)
    if name == "oblique":
        return _slices(name, "explicit", OBLIQUE, 0, signed=True)
    lean = name == "implicit"
    return _slices(name, name, GRID, 0, signed=lean, lean=lean)


def nifti_header(geometry: Geometry, order: str, code: int, forms: str) -> bytes:
    """352 bytes of NIfTI-1 (nifti1.h) for an axial grid stored x, y, z fastest first, scaled by nothing."""
    raw = bytearray(352)
    affine = np.eye(4)
    to_ras = np.array([[0.0, 0, -1], [0, -1, 0], [1, 0, 0]])  # (S, P, L) -> (R, A, S)
    steps = to_ras @ np.asarray(geometry.direction) * np.asarray(geometry.spacing_mm)
    affine[:3, :3], affine[:3, 3] = steps[:, ::-1], to_ras @ np.asarray(geometry.origin_mm)
    bits = {2: 8, 4: 16, 8: 32, 16: 32, 64: 64, 512: 16}[code]
    struct.pack_into(order + "i", raw, 0, 348)
    struct.pack_into(order + "8h", raw, 40, 3, *geometry.shape[::-1], 1, 1, 1, 1)
    struct.pack_into(order + "2h", raw, 70, code, bits)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    qfac = -1.0 if np.linalg.det(axes) < 0 else 1.0
    struct.pack_into(order + "8f", raw, 76, qfac, *geometry.spacing_mm[::-1], 0, 0, 0, 0)
    struct.pack_into(order + "3f", raw, 108, 352.0, 1.0, 0.0)
    raw[123] = 2
    raw[148:155] = b"phantom"
    struct.pack_into(order + "2h", raw, 252, int("q" in forms), int("s" in forms))
    x, y, z, w = Rotation.from_matrix(axes * np.array([1, 1, qfac])).as_quat()
    sign = -1.0 if w < 0 else 1.0
    if "q" in forms:
        struct.pack_into(order + "6f", raw, 256, sign * x, sign * y, sign * z, *affine[:3, 3])
    if "s" in forms:
        struct.pack_into(order + "12f", raw, 280, *affine[:3].ravel())
    raw[344:348] = b"n+1\0"
    return bytes(raw)


def _nrrd_header(encoding: str) -> bytes:
    columns = np.asarray(OBLIQUE.direction)[::-1, ::-1] * np.asarray(OBLIQUE.spacing_mm)[::-1]  # (L, P, S) of x, y, z
    vectors = " ".join("(" + ",".join(f"{v:.10g}" for v in columns[:, i]) + ")" for i in range(3))
    origin = ",".join(f"{v:.10g}" for v in OBLIQUE.origin_mm[::-1])
    return (
        "NRRD0004\n# a comment\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {' '.join(str(n) for n in OBLIQUE.shape[::-1])}\nspace directions: {vectors}\n"
        f"kinds: domain domain domain\nendian: little\nencoding: {encoding}\nspace origin: ({origin})\n\n"
    ).encode()


def _mha_header(*, compressed: bool) -> bytes:
    matrix = np.asarray(OBLIQUE.direction)[::-1, ::-1].T  # one row per axis x, y, z, in (L, P, S)
    size = "CompressedDataSize = @SIZE@\n" if compressed else ""
    return (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = {compressed}\n{size}TransformMatrix = {' '.join(f'{v:.10g}' for v in matrix.ravel())}\n"
        f"Offset = {' '.join(f'{v:.10g}' for v in OBLIQUE.origin_mm[::-1])}\nCenterOfRotation = 0 0 0\n"
        "AnatomicalOrientation = RAI\n"
        f"ElementSpacing = {' '.join(f'{v:g}' for v in OBLIQUE.spacing_mm[::-1])}\n"
        f"DimSize = {' '.join(str(n) for n in OBLIQUE.shape[::-1])}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    ).encode()


IMAGE_BASES = ("nii", "nii-big", "nii-q", "nii-s", "nii-float", "nii.gz", "nii.gz-big", "nrrd", "nrrd-gzip",
               "nrrd-ascii", "mha", "mha-zlib")  # fmt: skip


@cache
def image_base(name: str) -> ImageBase:
    """One of ``IMAGE_BASES``."""
    hu = chest()
    if name.startswith("nii"):
        order = ">" if name.endswith("-big") else "<"
        forms = {"nii-q": "q", "nii-s": "s"}.get(name, "qs")
        code, kind = (16, "f4") if name == "nii-float" else (4, "i2")
        header, voxels = nifti_header(OBLIQUE, order, code, forms), hu.astype(order + kind).tobytes()
        packed = ".gz" in name
        return ImageBase(
            name, ".nii.gz" if packed else ".nii", header, voxels, OBLIQUE, "file" if packed else "", forms, order
        )
    if name == "nrrd-ascii":
        text = b"\n".join(b" ".join(str(v).encode() for v in row) for row in hu.reshape(-1, hu.shape[2])) + b"\n"
        return ImageBase(name, ".nrrd", _nrrd_header("ascii"), text, OBLIQUE)
    if name.startswith("nrrd"):
        packed = name == "nrrd-gzip"
        header = _nrrd_header("gzip" if packed else "raw")
        return ImageBase(name, ".nrrd", header, hu.astype("<i2").tobytes(), OBLIQUE, "voxels" if packed else "")
    packed = name == "mha-zlib"
    header = _mha_header(compressed=packed)
    return ImageBase(name, ".mha", header, hu.astype("<i2").tobytes(), OBLIQUE, "voxels" if packed else "")


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)

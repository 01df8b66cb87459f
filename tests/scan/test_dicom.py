"""DICOM folders: one clean series is read right in any orientation; every other folder is refused with its reason."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scipy.spatial.transform import Rotation

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom import choose_series, find_series, kernel_sharpness, read_series, write_dicom_series
from lungseg.scan.nifti import read_image
from lungseg.scan.volume import IDENTITY, Geometry, Volume

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
    assert "series 1.2.3.4" in str(caught.value)
    with pytest.raises(InputError, match="can be read as a CT volume"):
        choose_series([series])
    return str(caught.value)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (9.0, -6.0, 14.0)], ids=["straight", "oblique"])
@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_all_48_orientations_give_one_volume(tmp_path: Path, axes, flips, tilt) -> None:
    matrix = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()
    grid = Geometry(GRID.shape, GRID.spacing_mm, GRID.origin_mm, tuple(map(tuple, matrix.tolist())))
    write_folder(tmp_path, axes=axes, flips=flips, geometry=grid)
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, chest())
    assert volume.array.dtype == np.int16
    assert volume.geometry.is_close(grid, tolerance_voxels=1e-3)
    assert volume.stored_axes == tuple(axes.index(i) for i in range(3))


@pytest.mark.parametrize("seed", range(4))
def test_names_and_order_of_files_do_not_matter(tmp_path: Path, seed: int) -> None:
    def renumber(ds: Dataset, k: int) -> None:
        ds.InstanceNumber = (7 * k + seed) % 9  # disagrees with the position
        ds.SOPInstanceUID = ""  # as anonymisers leave it
        if seed == 3:
            del ds.InstanceNumber, ds.KVP, ds.ConvolutionKernel, ds.PatientID, ds.Modality

    write_folder(tmp_path / "a", order=np.random.default_rng(seed).permutation(9), edit=renumber)
    (tmp_path / "a" / "deeper").mkdir()
    (tmp_path / "a" / "IM0003").rename(tmp_path / "a" / "deeper" / "no extension.txt")
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, chest())
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-3)
    assert volume.notes == ()


def test_acquisition_is_an_allow_list_without_patient_data(tmp_path: Path) -> None:
    write_folder(tmp_path)
    volume = read_only_series(tmp_path)
    assert volume.acquisition == {
        "kernel": "B30f",
        "kvp": 120.0,
        "slice_thickness_mm": None,
        "manufacturer": "SIEMENS",
        "modality": "CT",
        "spacing_mm": [2.5, 2.2, 2.0],
    }
    assert CANARY not in repr(volume)
    assert str(tmp_path) not in repr(volume)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_rescale_is_applied_per_slice(tmp_path: Path, syntax: str) -> None:
    def scale(ds: Dataset, k: int) -> None:
        stored = np.frombuffer(ds.PixelData, np.int16).astype(np.int32)
        slope, intercept = (2, -1024) if k % 2 else (1, -1000 - k)
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
        ds.PixelData = np.rint((stored - 1024 - intercept) / slope).astype(np.int16).tobytes()

    write_folder(tmp_path, edit=scale, syntax=syntax)
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array[::2], chest()[::2])
    assert np.abs(volume.array[1::2] - chest()[1::2]).max() <= 1


def test_fractional_slope_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    def scale(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = "0.5", "-1024.25"
        stored = np.frombuffer(ds.PixelData, np.int16)
        ds.PixelData = (stored * 2).astype(np.int16).tobytes()

    write_folder(tmp_path, edit=scale)
    # HU = stored - 1024.25, so the nearest integer is that of the phantom; air at -1024 stays there
    assert np.array_equal(read_only_series(tmp_path).array, chest())


@pytest.mark.parametrize("signed", [True, False])
def test_padding_and_full_range_never_wrap(tmp_path: Path, signed: bool) -> None:
    array = chest().astype(np.int32)
    array[:, 0, 0] = -3024 if signed else -1024
    array[:, 0, 1] = 31743 if signed else 64511

    def encode(ds: Dataset, k: int) -> None:
        stored = array[k] + 1024
        ds.PixelRepresentation = int(signed)
        ds.PixelData = stored.astype(np.int16 if signed else np.uint16).tobytes()
        ds.add_new("PixelPaddingValue", "US", 63536)

    write_folder(tmp_path, edit=encode)
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, array.clip(-1024, 32767))
    assert len(volume.notes) == 1
    assert ("below -1024" if signed else "above 32767") in volume.notes[0]


def test_identical_duplicates_are_dropped_and_noted(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", skip=(0, 1, 2, 4, 6, 7, 8))
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, chest())
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-3)
    assert volume.notes == ("2 slices were stored twice with the same pixels: one of each was used",)


def test_localizer_in_the_same_series_is_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", axes=(2, 0, 1), skip=tuple(range(1, 11)))
    choice = choose_series(find_series(tmp_path).series)
    assert np.array_equal(read_series(choice.chosen).array, chest())
    ((localizer, reason),) = choice.others
    assert len(localizer.files) == 1
    assert "localizer" in reason


def test_other_files_are_skipped_and_listed(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").touch()
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(64))
    report = slice_dataset(np.zeros((2, 2), np.int16), np.zeros(3), np.array([1, 0, 0, 0, 1, 0]), (1.0, 1.0))
    report.SOPClassUID, report.Modality = REPORT, "SR"
    del report.PixelData, report.Rows, report.Columns
    save(report, tmp_path / "report")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    scan = find_series(tmp_path)
    assert [p.name for p in scan.non_dicom] == [".hidden", "DICOMDIR", "notes.txt", "report"]
    assert scan.damaged == ()
    (series,) = scan.series
    assert len(series.files) == 9
    assert np.array_equal(read_series(series).array, chest())


def test_single_file(tmp_path: Path) -> None:
    paths = write_folder(tmp_path)
    (series,) = find_series(paths[4]).series
    assert series.files == (paths[4],)
    assert "only 1 slices" in str(series.problem)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(CANARY.encode(), b"M\xfcller^Anna"[:10]))
    (series,) = find_series(tmp_path).series
    assert series.patient_id == "Müller^Ann"
    series.patient_id.encode()


def test_assume_hu_takes_stored_values(tmp_path: Path) -> None:
    def strip(ds: Dataset, k: int) -> None:
        ds.PixelData = (np.frombuffer(ds.PixelData, np.int16) - 1024).astype(np.int16).tobytes()
        del ds.RescaleSlope
        if k > 4:
            del ds.RescaleIntercept
        else:
            ds.RescaleIntercept = ""

    write_folder(tmp_path, edit=strip)
    with pytest.raises(InputError, match=r"RescaleSlope or RescaleIntercept is missing.*--assume-hu"):
        read_only_series(tmp_path)
    volume = read_only_series(tmp_path, options=ReadOptions(assume_hu=True))
    assert np.array_equal(volume.array, chest())
    assert "taken as HU" in volume.notes[0]


def test_assume_hu_names_a_forgotten_intercept(tmp_path: Path) -> None:
    def strip(ds: Dataset, k: int) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept

    write_folder(tmp_path, edit=strip)
    with pytest.raises(InputError, match=r"series 1\.2\.3\.4.*shifted by \+1024"):
        read_only_series(tmp_path, options=ReadOptions(assume_hu=True))


# ---------------------------------------------------------------- what is refused


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no readable DICOM image among the 0 files looked at"):
        find_series(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG" + bytes(200))
    with pytest.raises(InputError, match=rf"{tmp_path}.*among the 3 files looked at"):
        find_series(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        find_series(tmp_path / "none")


def test_missing_slices_are_named_with_their_position(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", skip=(3, 6, 7))
    text = refusal(tmp_path)
    assert "missing slices: 1 between -305.00 and -300.00 mm, 2 between -297.50 and -290.00 mm" in text


def test_uneven_spacing(tmp_path: Path) -> None:
    def move(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, -310 + 2.5 * k + (0.6 if k > 5 else 0.0)]

    write_folder(tmp_path, edit=move)
    text = refusal(tmp_path)
    assert "uneven slice spacing: mostly 2.5 mm, but 3.1 mm at -297.50 mm" in text


def test_jitter_below_one_percent_is_accepted(tmp_path: Path) -> None:
    def move(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, round(-310 + 2.5 * k + 0.01 * (k % 2), 2)]

    write_folder(tmp_path, edit=move)
    assert read_only_series(tmp_path).geometry.spacing_mm[0] == pytest.approx(2.5, abs=1e-9)


def test_different_images_at_one_position(tmp_path: Path) -> None:
    def other(ds: Dataset, k: int) -> None:
        ds.AcquisitionNumber = "2"

    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", chest(seed=1), edit=other, skip=(0, 1, 2, 3, 4, 6, 7, 8))
    with pytest.raises(InputError, match=r"two different images at -297\.50 mm.*acquisition numbers 1 and 2"):
        read_only_series(tmp_path)


@pytest.mark.parametrize("degrees", [18.5, -4.0, 1.0])
def test_gantry_tilt(tmp_path: Path, degrees: float) -> None:
    a = np.radians(degrees)

    def tilt(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(np.cos(a), 8), round(np.sin(a), 8)]

    write_folder(tmp_path, edit=tilt)
    assert f"gantry tilt of {abs(degrees):.1f} degrees" in refusal(tmp_path)


def test_slice_shifted_sideways(tmp_path: Path) -> None:
    def shift(ds: Dataset, k: int) -> None:
        if k == 4:
            ds.ImagePositionPatient = [-40.25 + 3.0, 12.5, -310 + 2.5 * k]

    write_folder(tmp_path, edit=shift)
    assert "shifted sideways" in refusal(tmp_path)


def edit_all(**tags: object) -> Edit:
    def edit(ds: Dataset, k: int) -> None:
        for tag, value in tags.items():
            if value is None:
                delattr(ds, tag)
            else:
                setattr(ds, tag, value)

    return edit


@pytest.mark.parametrize(
    ("tags", "phrase"),
    [
        ({"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "modality is MR, not CT"),
        ({"Modality": "PT"}, "modality is PT, not CT"),
        ({"SOPClassUID": SECONDARY}, "secondary capture"),
        ({"SOPClassUID": ENHANCED}, "multi-frame"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient.*missing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, 0]}, "ImageOrientationPatient.*missing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.1, 0.99498744, 0]}, "not at right angles"),
        ({"PixelSpacing": None}, "PixelSpacing is missing"),
        ({"PixelSpacing": [0, 0]}, "PixelSpacing is missing"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    ],
)
def test_tags_that_make_a_series_unusable(tmp_path: Path, tags: dict, phrase: str) -> None:
    import re

    write_folder(tmp_path, edit=edit_all(**tags))
    assert re.search(phrase, refusal(tmp_path))


def test_colour_images(tmp_path: Path) -> None:
    def colour(ds: Dataset, k: int) -> None:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = bytes(ds.Rows * ds.Columns * 3)

    write_folder(tmp_path, edit=colour)
    assert "colour image" in refusal(tmp_path)


def test_too_few_slices_or_too_little_coverage(tmp_path: Path) -> None:
    write_folder(tmp_path / "few", skip=(5, 6, 7, 8))
    assert "only 5 slices covering 12.5 mm" in refusal(tmp_path / "few")
    thin = Geometry(GRID.shape, (1.0, 2.2, 2.0), GRID.origin_mm)
    write_folder(tmp_path / "thin", geometry=thin)
    assert "only 9 slices covering 9.0 mm" in refusal(tmp_path / "thin")


@pytest.mark.parametrize("kept", [0, 900, -50])
def test_truncated_and_empty_files_are_named(tmp_path: Path, kept: int) -> None:
    paths = write_folder(tmp_path / "a")
    other = write_folder(tmp_path / "b", edit=edit_all(SeriesInstanceUID="1.2.3.9"))
    paths[8].write_bytes(paths[8].read_bytes()[:kept])  # the last slice: no gap would betray it
    scan = find_series(tmp_path)
    assert [bad.path for bad in scan.damaged] == [paths[8]]
    broken, whole = scan.series
    assert "IM0008 in the same folder is " in str(broken.problem)
    assert ("empty (0 bytes)" if kept == 0 else "truncated or damaged") in str(broken.problem)
    with pytest.raises(InputError, match="IM0008"):
        read_series(broken)
    assert whole.files == tuple(other)
    assert np.array_equal(read_series(whole).array, chest())
    for path in paths[:8] + other:
        path.unlink()
    with pytest.raises(InputError, match="IM0008"):
        find_series(tmp_path)


def test_file_damaged_after_the_search(tmp_path: Path) -> None:
    paths = write_folder(tmp_path)
    (series,) = find_series(tmp_path).series
    paths[2].write_bytes(paths[2].read_bytes()[:-50])
    with pytest.raises(InputError, match="IM0002: truncated, damaged"):
        read_series(series)
    small = pydicom.dcmread(paths[3])
    small.Rows, small.PixelData = 2, small.PixelData[: 2 * 11 * 2]
    save(small, paths[2])
    with pytest.raises(InputError, match=r"IM0002: holds .* it has changed"):
        read_series(series)


def test_syntax_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    for path in write_folder(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    with pytest.raises(InputError, match=r"transfer syntax 1\.2\.840\.10008\.1\.2\.9.*gdcmconv --raw"):
        find_series(tmp_path)


def test_one_slice_with_another_pixel_spacing(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        if k == 8:
            ds.PixelSpacing = [2.3, 2.0]

    write_folder(tmp_path, edit=change)
    with pytest.raises(InputError, match=r"1 of 9 slices differ in matrix or pixel spacing.*IM0008"):
        choose_series(find_series(tmp_path).series)


def test_two_patients_are_never_mixed(tmp_path: Path) -> None:
    def second(ds: Dataset, k: int) -> None:
        ds.PatientID = "another"
        ds.ImagePositionPatient = [-40.25, 12.5, -310 + 2.5 * k + 1.25]  # would interleave

    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", chest(seed=1), edit=second)
    scan = find_series(tmp_path)
    assert [s.patient_id for s in scan.series] == [CANARY, "another"]
    assert [len(s.files) for s in scan.series] == [9, 9]
    assert np.array_equal(read_series(scan.series[1]).array, chest(seed=1))
    with pytest.raises(InputError, match="several patients"):
        choose_series(scan.series)
    with pytest.raises(InputError, match="there is none"):
        choose_series([])


def test_file_and_folder_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_folder(tmp_path)
    real_open = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self == paths[3]:
            raise PermissionError(13, "Permission denied")
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"IM0003: cannot be read .errno 13: Permission denied"):
        find_series(tmp_path)
    monkeypatch.undo()

    def refuse_folder(top: Path, *, onerror, followlinks):
        error = PermissionError(13, "Permission denied")
        error.filename = str(top)
        onerror(error)

    monkeypatch.setattr(os, "walk", refuse_folder)
    with pytest.raises(InputError, match=r"cannot be listed .Permission denied"):
        find_series(tmp_path)


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr("lungseg.scan.dicom_headers.MAX_FILES", 5)
    with pytest.raises(InputError, match="more than 5 files"):
        find_series(tmp_path)


# ---------------------------------------------------------------- which series is chosen


def study(folder: Path, **series: dict) -> None:
    """Series of one study: spacing along z, kernel, and how many slices to leave out at the end."""
    for name, wanted in series.items():
        z = wanted.get("z", 2.5)
        grid = Geometry((wanted.get("n", 20), 10, 11), (z, 2.2, 2.0), GRID.origin_mm)
        edit = edit_all(SeriesInstanceUID=f"1.2.3.{name[1:]}", ConvolutionKernel=wanted.get("kernel", "B30f"))
        write_folder(folder / name, chest(grid.shape), geometry=grid, edit=edit)


@pytest.mark.parametrize(
    ("series", "best", "reasons"),
    [
        ({"s1": {"z": 5.0, "n": 10}, "s2": {"z": 2.5}}, "1.2.3.2", ["thicker slices (5 mm apart against 2.5 mm)"]),
        ({"s1": {"kernel": "B70f"}, "s2": {"kernel": "B30f"}}, "1.2.3.2", ["sharper kernel (B70f against B30f)"]),
        ({"s1": {"z": 2.5, "kernel": "B30f"}, "s2": {"z": 2.0, "n": 25, "kernel": "B70f"}}, "1.2.3.2", ["thicker"]),
        ({"s1": {"n": 18}, "s2": {"n": 20}}, "1.2.3.2", ["fewer slices (18 against 20)"]),
        ({"s2": {}, "s1": {}}, "1.2.3.1", ["the first series UID"]),
        ({"s1": {"z": 1.0, "n": 24}, "s2": {"z": 5.0, "n": 20}}, "1.2.3.2", ["covers only 24 mm against 100 mm"]),
        ({"s1": {"n": 5, "z": 1.0}, "s2": {"z": 5.0}}, "1.2.3.2", ["only 5 slices"]),
    ],
)
def test_stated_order(tmp_path: Path, series: dict, best: str, reasons: list[str]) -> None:
    study(tmp_path, **series)
    choice = choose_series(find_series(tmp_path).series)
    assert choice.chosen.series_uid == best
    assert len(choice.others) == len(reasons)
    for (_, said), expected in zip(choice.others, reasons, strict=True):
        assert expected in said
    reverse = choose_series(find_series(tmp_path).series[::-1])
    assert reverse.chosen == choice.chosen


@pytest.mark.parametrize(
    ("softer", "sharper"),
    [
        ("B30f", "B70f"), ("B40f", "B41f"), ("I26f\\3", "I70f\\3"), ("Br40d\\2", "Bl57d\\2"), ("D40s", "B60s"),
        ("SOFT", "STANDARD"), ("STANDARD", "LUNG"), ("LUNG", "BONEPLUS"), ("STD+", "EDGE"), ("A", "B"), ("B", "L"),
        ("YA", "YD"), ("FC07", "FC52"), ("FC17", "FC30"), ("FC51", "FC86"), ("B30f", None), ("unheard of", "B70f"),
        ("STANDARD", "UB"),
    ],
)  # fmt: skip
def test_kernels_from_soft_to_sharp(softer: str | None, sharper: str | None) -> None:
    assert kernel_sharpness(softer) < kernel_sharpness(sharper)


# ---------------------------------------------------------------- phantoms are written


def phantom(shape: tuple[int, int, int] = (8, 40, 36)) -> Volume:
    array = chest(shape)
    array[0, 0, 0], array[0, 0, 1] = -1024, 3071
    return Volume(array, Geometry(shape, (3.0, 0.7, 0.65), (-200.123456, -130.5, -120.0)))


@pytest.mark.parametrize("compress", [True, False])
def test_phantom_round_trip_is_exact_and_deterministic(tmp_path: Path, compress: bool) -> None:
    volume = phantom()
    options = {"patient_id": "P1", "series_seed": "seed 7", "compress": compress}
    first = write_dicom_series(tmp_path / "one", volume, **options)
    second = write_dicom_series(tmp_path / "two", volume, **options)
    assert [p.name for p in first] == [f"{k:03d}.dcm" for k in range(8)]
    digests = [[hashlib.sha256(p.read_bytes()).hexdigest() for p in paths] for paths in (first, second)]
    assert digests[0] == digests[1]
    read = read_only_series(tmp_path / "one")
    assert np.array_equal(read.array, volume.array)
    assert read.geometry.is_close(volume.geometry, tolerance_voxels=1e-6)
    assert read.notes == ()
    assert read.acquisition == {
        "kernel": "B40f",
        "kvp": 120.0,
        "slice_thickness_mm": 3.0,
        "manufacturer": "lungseg phantom",
        "modality": "CT",
        "spacing_mm": pytest.approx([3.0, 0.7, 0.65]),
    }


def test_phantom_tags_for_other_viewers(tmp_path: Path) -> None:
    volume = phantom()
    paths = write_dicom_series(
        tmp_path, volume, patient_id="P1", series_seed="a", study_seed="s", kernel="B70f", compress=False
    )
    slices = [pydicom.dcmread(p) for p in paths]
    assert len({ds.SOPInstanceUID for ds in slices}) == 8
    for tag in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        (uid,) = {getattr(ds, tag) for ds in slices}
        assert uid.is_valid
        assert uid.startswith("2.25.")
    for k, ds in enumerate(slices):
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert (ds.SOPClassUID, ds.Modality, ds.PatientPosition, ds.PatientID) == (CT, "CT", "HFS", "P1")
        assert (ds.ConvolutionKernel, ds.KVP, ds.SliceThickness) == ("B70f", 120, 3)
        assert ds.Manufacturer == "lungseg phantom"
        assert (ds.RescaleIntercept, ds.RescaleSlope) == (-1024, 1)
        assert ds.InstanceNumber == k + 1
        assert list(ds.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
        assert [float(v) for v in ds.ImagePositionPatient] == pytest.approx([-120.0, -130.5, -200.123456 + 3.0 * k])
        assert [float(v) for v in ds.PixelSpacing] == [0.7, 0.65]
        assert ds.StudyDate == ds.SeriesDate == ds.ContentDate == "20000101"
        assert np.array_equal(ds.pixel_array.astype(int) - 1024, volume.array[k])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)
    assert image.GetSpacing() == pytest.approx((0.65, 0.7, 3.0))


def test_two_kernels_of_one_phantom_form_one_study(tmp_path: Path) -> None:
    for kernel in ("B70f", "B40f"):
        write_dicom_series(
            tmp_path / kernel, phantom(), patient_id="P1", series_seed=f"x/{kernel}", study_seed="x", kernel=kernel
        )
    choice = choose_series(find_series(tmp_path).series)
    assert choice.chosen.acquisition["kernel"] == "B40f"
    assert len(choice.others) == 1


def test_phantoms_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    volume = phantom()
    too_dense = Volume(np.full(volume.array.shape, 32000, np.int16), volume.geometry)
    with pytest.raises(InputError, match="-1024 to 31743"):
        write_dicom_series(tmp_path, too_dense, patient_id="P1", series_seed="a")
    (tmp_path / "x" / "000.dcm").mkdir(parents=True)
    with pytest.raises(ResourceError, match=r"000\.dcm: could not be written"):
        write_dicom_series(tmp_path / "x", volume, patient_id="P1", series_seed="a")


# ---------------------------------------------------------------- real scans


def test_real_covid_series_with_empty_uids(shared_data: Path) -> None:
    (series,) = find_series(shared_data / "covid-p002").series
    volume = read_series(series)
    assert volume.array.shape == (133, 512, 512)
    assert volume.geometry.spacing_mm == pytest.approx((2.0, 0.603515625, 0.603515625))
    assert volume.geometry.direction == IDENTITY
    # index 0 of z is inferior: the file at the lowest table position
    low = sitk.GetArrayFromImage(sitk.ReadImage(str(series.files[0])))[0]
    assert np.array_equal(volume.array[0], low)
    assert series.positions_mm[0] == pytest.approx(-437.7)
    assert volume.acquisition["kernel"] == "D40s"


def test_real_folder_with_two_kernels(shared_data: Path) -> None:
    scan = find_series(shared_data / "lungdx-a0002")
    choice = choose_series(scan.series)
    assert choice.chosen.acquisition["kernel"] == "B40f"
    ((other, reason),) = choice.others
    assert other.acquisition["kernel"] == "B70f"
    assert "sharper kernel" in reason
    assert read_series(choice.chosen).array.shape == (30, 512, 512)


def test_real_slab_with_padding_of_the_wrong_sign(shared_data: Path) -> None:
    volume = read_only_series(shared_data / "lidc0001-slab")
    assert volume.array.shape == (10, 512, 512)
    assert volume.array.min() == -1024
    assert volume.array.max() == 3071
    assert "padding" in volume.notes[0]
    (nodule,) = json.loads((shared_data / "lidc0001-slab" / "nodules.json").read_text())["nodules"]
    centre = np.rint(volume.geometry.to_index((nodule["z"], nodule["y"], nodule["x"]))).astype(int)
    core = volume.array[tuple(slice(c - 1, c + 2) for c in centre)]
    assert core.mean() == pytest.approx(94, abs=40)  # data README: 94 HU in its centre


def test_real_encodings_are_pixel_equal(shared_data: Path) -> None:
    scan = find_series(shared_data / "encodings")
    lossless = [p for s in scan.series for p in s.files if "lossy" not in p.name]
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(shared_data / "lidc0001-slab" / "dicom" / "005.dcm")))
    assert len(lossless) == 4
    for path in lossless:
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), reference)


def test_real_dicom_equals_its_nrrd(shared_data: Path) -> None:
    dicom = read_only_series(shared_data / "cip-small" / "ct-64Dicom")
    nrrd = read_image(shared_data / "cip-small" / "ct-64.nrrd")
    assert np.array_equal(dicom.array, nrrd.array)
    assert dicom.geometry.is_close(nrrd.geometry, tolerance_voxels=0.01)


@pytest.mark.parametrize(
    ("folder", "phrases"),
    [
        ("philips_mixed", ["localizer", "secondary capture", "tilt of 16.5", "tilt of 18.5"]),
        ("ge_tilt_irregular", ["tilt of 18.5", "uneven slice spacing: mostly 4 mm", "1.08 mm", "7 mm"]),
        ("multiframe", ["multi-frame DICOM is not supported"]),
        ("minimal_tags", ["only 1 slices"]),
    ],
)
def test_real_bad_input_is_refused(shared_data: Path, folder: str, phrases: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        choose_series(find_series(shared_data / "badinput" / folder).series)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_written_bytes_do_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    """GDCM keeps global state between reading and writing; the phantoms' bytes must not show it."""
    rng = np.random.default_rng(0)
    volume = Volume(rng.integers(-1000, 100, (8, 20, 24)).astype(np.int16), Geometry((8, 20, 24), (3.0, 2.0, 2.0)))
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from lungseg.scan.dicom import find_series, read_series, write_dicom_series\n"
        "from lungseg.scan.volume import Geometry, Volume\n"
        "rng = np.random.default_rng(0)\n"
        "array = rng.integers(-1000, 100, (8, 20, 24)).astype(np.int16)\n"
        "volume = Volume(array, Geometry((8, 20, 24), (3.0, 2.0, 2.0)))\n"
        "for name in ('first', 'second'):\n"
        "    folder = Path(sys.argv[1]) / name\n"
        "    write_dicom_series(folder, volume, patient_id='p', series_seed='s')\n"
        "    read_series(find_series(folder).series[0])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    write_dicom_series(tmp_path / "third", volume, patient_id="p", series_seed="s")
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "third" / path.name).read_bytes()

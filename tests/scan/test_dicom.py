"""DICOM folders: one clean series is read right in any orientation, synthetic and real."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_fixture import (
    CANARY,
    GRID,
    ORIENTATIONS,
    REPORT,
    chest,
    read_only_series,
    save,
    slice_dataset,
    write_folder,
)
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scipy.spatial.transform import Rotation

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom import choose_series, find_series, read_series
from lungseg.scan.nifti import read_image
from lungseg.scan.volume import IDENTITY, Geometry


@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (9.0, -6.0, 14.0)], ids=["straight", "oblique"])
@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_row_11_all_48_orientations_give_one_volume(tmp_path: Path, axes, flips, tilt) -> None:
    matrix = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()
    grid = Geometry(GRID.shape, GRID.spacing_mm, GRID.origin_mm, tuple(map(tuple, matrix.tolist())))
    write_folder(tmp_path, axes=axes, flips=flips, geometry=grid)
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, chest())
    assert volume.array.dtype == np.int16
    assert volume.geometry.is_close(grid, tolerance_voxels=1e-3)
    assert volume.stored_axes == tuple(axes.index(i) for i in range(3))


@pytest.mark.parametrize("seed", range(4))
def test_row_09_names_and_order_of_files_do_not_matter(tmp_path: Path, seed: int) -> None:
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
def test_row_13_rescale_is_applied_per_slice(tmp_path: Path, syntax: str) -> None:
    def scale(ds: Dataset, k: int) -> None:
        stored = np.frombuffer(ds.PixelData, np.int16).astype(np.int32)
        slope, intercept = (2, -1024) if k % 2 else (1, -1000 - k)
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
        ds.PixelData = np.rint((stored - 1024 - intercept) / slope).astype(np.int16).tobytes()

    write_folder(tmp_path, edit=scale, syntax=syntax)
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array[::2], chest()[::2])
    assert np.abs(volume.array[1::2] - chest()[1::2]).max() <= 1


def test_row_13_fractional_slope_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    def scale(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = "0.5", "-1024.25"
        stored = np.frombuffer(ds.PixelData, np.int16)
        ds.PixelData = (stored * 2).astype(np.int16).tobytes()

    write_folder(tmp_path, edit=scale)
    # HU = stored - 1024.25, so the nearest integer is that of the phantom; air at -1024 stays there
    assert np.array_equal(read_only_series(tmp_path).array, chest())


@pytest.mark.parametrize("signed", [True, False])
def test_row_14_padding_and_full_range_never_wrap(tmp_path: Path, signed: bool) -> None:
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


def test_row_05_identical_duplicates_are_dropped_and_noted(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", skip=(0, 1, 2, 4, 6, 7, 8))
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, chest())
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-3)
    assert volume.notes == ("2 slices were stored twice with the same pixels: one of each was used",)


def test_row_04_localizer_in_the_same_series_is_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", axes=(2, 0, 1), skip=tuple(range(1, 11)))
    choice = choose_series(find_series(tmp_path).series)
    assert np.array_equal(read_series(choice.chosen).array, chest())
    ((localizer, reason),) = choice.others
    assert len(localizer.files) == 1
    assert "localizer" in reason
    assert choice.chosen.dropped == ("1 image of another orientation (localizer) in the same series left out",)
    assert read_series(choice.chosen).notes == choice.chosen.dropped


def test_row_02_other_files_are_skipped_and_listed(tmp_path: Path) -> None:
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
    assert "only 1 slice " in str(series.problem)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(CANARY.encode(), b"M\xfcller^Anna"[:10]))
    (series,) = find_series(tmp_path).series
    assert series.patient_id == "Müller^Ann"
    series.patient_id.encode()


def test_row_12_assume_hu_takes_stored_values(tmp_path: Path) -> None:
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


def test_row_12_assume_hu_names_a_forgotten_intercept(tmp_path: Path) -> None:
    def strip(ds: Dataset, k: int) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept

    write_folder(tmp_path, edit=strip)
    with pytest.raises(InputError, match=r"series [0-9a-f]{10}.*shifted by about \+10"):
        read_only_series(tmp_path, options=ReadOptions(assume_hu=True))


def test_row_19_real_series_with_empty_uids(shared_data: Path) -> None:
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


def test_row_14_real_slab_with_padding_of_the_wrong_sign(shared_data: Path) -> None:
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
        ("multiframe", ["only 2 slices covering 20.0 mm"]),
        ("minimal_tags", ["only 1 slice "]),
    ],
)
def test_real_bad_input_is_refused(shared_data: Path, folder: str, phrases: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        choose_series(find_series(shared_data / "badinput" / folder).series)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_row_24_a_directory_of_another_name_is_no_image(shared_data: Path) -> None:
    scan = find_series(shared_data / "badinput" / "philips_mixed")
    assert [path.name for path in scan.non_dicom] == ["DIRFILE"]
    assert scan.damaged == ()

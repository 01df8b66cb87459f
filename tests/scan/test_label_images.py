"""Label maps of any tool as classes on the reference's grid."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_seg_fixture import make_seg, write_seg

from lungseg.errors import InputError
from lungseg.scan.label_images import LabelImage, label_files, onto_reference, read_labels
from lungseg.scan.label_maps import label_map
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry, Volume
from lungseg.tissue import LungLabel, Tissue

SHAPE = (10, 12, 14)
GRID = Geometry(SHAPE, (2.5, 0.7, 0.9), (-100.0, -20.0, 30.0))
CODES = {1: ("SCT", "87433001"), 3: ("DCM", "112120"), 5: ("SCT", "95436008")}


def labels() -> np.ndarray:
    out = np.zeros(SHAPE, np.uint8)
    out[2:5, 3:9, 2:7], out[7, 1:4, 9:12] = 1, 3
    return out


def read(path: Path, name: str | None = None) -> LabelImage:
    return read_labels(path, label_map(name) if name else None, name="it", option="--label-map")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".mhd"])
def test_image_formats_agree(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(labels())
    image.SetSpacing(GRID.spacing_mm[::-1])
    image.SetOrigin(GRID.origin_mm[::-1])
    path = tmp_path / f"case{suffix}"
    sitk.WriteImage(image, str(path))
    found = read(path)
    assert found.volume.geometry.is_close(GRID, tolerance_voxels=1e-3)
    np.testing.assert_array_equal(found.volume.array, labels())
    assert found.annotated == (2, 3, 4, 7)
    assert list(label_files(tmp_path)) == ["case"]


def test_segments_are_taken_by_code_or_by_number(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "case.dcm", make_seg(labels(), GRID, codes=CODES))
    placed = onto_reference(read(path), GRID, resample=False, name="it")[0]
    np.testing.assert_array_equal(placed, np.where(labels() == 1, Tissue.EMPHYSEMA, labels()))
    by_number = onto_reference(read(path, "lungseg"), GRID, resample=False, name="it")[0]
    np.testing.assert_array_equal(by_number, labels())
    unknown = write_seg(tmp_path / "other.dcm", make_seg(labels(), GRID, codes={1: ("SCT", "10200004")}))
    with pytest.raises(InputError, match=r"1 \(SCT 10200004\), 3 \(no code\).*--label-map FILE"):
        read(unknown)


def test_a_folder_of_class_masks_is_one_label_map(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    left, right = labels() == 1, labels() == 3
    write_image(folder / "lung_upper_lobe_left.nii.gz", left, GRID)
    write_image(folder / "lung_middle_lobe_right.nii.gz", right, GRID)
    write_image(folder / "liver.nii.gz", left, GRID)
    found = read(folder, "totalsegmentator").volume.array
    np.testing.assert_array_equal(found, LungLabel.LEFT * left + LungLabel.RIGHT * right)
    with pytest.raises(InputError, match="files of its folder are not named like a class"):
        read(folder)
    write_image(folder / "lung_middle_lobe_right.nii.gz", left | right, GRID)
    with pytest.raises(InputError, match="overlap"):
        read(folder, "totalsegmentator")


def test_two_files_of_one_case_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", labels(), GRID)
    sitk.WriteImage(sitk.GetImageFromArray(labels()), str(tmp_path / "a.nrrd"))
    with pytest.raises(InputError, match=re.escape("both a.nii.gz and a.nrrd")):
        label_files(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        label_files(tmp_path / "none")


def shifted(mm: float) -> LabelImage:
    return LabelImage(Volume(labels(), replace(GRID, origin_mm=(-100.0, -20.0 + mm, 30.0))), ())


def test_row_71_grids_are_compared_in_millimetres() -> None:
    placed, is_resampled = onto_reference(shifted(0.069), GRID, resample=True, name="it")
    np.testing.assert_array_equal(placed, labels())
    assert not is_resampled
    with pytest.raises(InputError) as error:
        onto_reference(shifted(0.071), GRID, resample=False, name="it")
    text = str(error.value)
    assert "corners may differ by 0.07 mm" in text
    assert "origin (S, P, L) -100.000, -19.929, 30.000 mm" in text
    assert "origin (S, P, L) -100.000, -20.000, 30.000 mm" in text
    assert "--resample-to reference" in text


def test_row_71_resampling_takes_the_nearest_voxel() -> None:
    moved, is_resampled = onto_reference(shifted(1.4), GRID, resample=True, name="it")
    assert is_resampled
    np.testing.assert_array_equal(moved[:, 2:], labels()[:, :-2])
    with pytest.raises(InputError, match="none of its labelled voxels lies in the reference"):
        onto_reference(shifted(500.0), GRID, resample=True, name="it")


def test_a_cropped_image_is_another_grid_a_cropped_segmentation_is_not(tmp_path: Path) -> None:
    part = Volume(np.ascontiguousarray(labels()[2:8]), GRID.crop((2, 0, 0), (8, 12, 14)))
    with pytest.raises(InputError, match="different grids"):
        onto_reference(LabelImage(part, ()), GRID, resample=False, name="it")
    placed = onto_reference(LabelImage(part, (), may_be_cropped=True), GRID, resample=False, name="it")[0]
    np.testing.assert_array_equal(placed, labels())
    beyond = Volume(part.array, replace(part.geometry, origin_mm=(-110.0, -20.0, 30.0)))
    with pytest.raises(InputError, match="different grids"):
        onto_reference(LabelImage(beyond, (), may_be_cropped=True), GRID, resample=False, name="it")


def test_lungs_of_a_real_cip_map_are_those_of_its_mask(shared_data: Path) -> None:
    """Regions with airways and vessels inside make up CIP's own whole-lung mask, voxel by voxel."""
    regions = read(shared_data / "cip-small" / "lm-64.nrrd", "cip-lungs").volume.array
    mask = read(shared_data / "cip-small" / "wholeLung-64.nrrd", "binary-lung").volume.array
    np.testing.assert_array_equal(regions > 0, mask == LungLabel.LUNG)
    middle = regions.shape[2] // 2  # x runs to the patient's left
    assert (regions[:, :, middle + 4 :] == LungLabel.LEFT).sum() > 20_000
    assert (regions[:, :, : middle - 4] == LungLabel.RIGHT).sum() > 20_000

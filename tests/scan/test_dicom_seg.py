"""DICOM Segmentations: every voxel in its place, whatever was left out; what cannot be a label map is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_seg_fixture import make_seg, write_seg

from lungseg.errors import InputError, LungsegError
from lungseg.scan.dicom_seg import read_segmentation
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry

SHAPE = (12, 15, 13)
TURNED = tuple(map(tuple, np.array([[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])))
GRIDS = {
    "axial": Geometry(SHAPE, (2.5, 0.7, 0.9), (-100.0, -20.0, 30.0)),
    "turned": Geometry(SHAPE, (2.5, 0.7, 0.9), (-100.0, -20.0, 30.0), TURNED),  # type: ignore[arg-type]
}


def label_map() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5, 3:9, 2:7] = 1
    labels[4, 4:6, 3:5] = 3
    labels[8:10, 1:4, 9:12] = 5  # slices 5 to 7 are empty
    return labels


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("omit_empty", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_voxels_return_to_their_places(tmp_path: Path, grid: str, kind: str, omit_empty: bool, reverse: bool) -> None:
    seg = make_seg(label_map(), GRIDS[grid], kind=kind, omit_empty=omit_empty, reverse=reverse)
    found = read_segmentation(write_seg(tmp_path / "a.dcm", seg)).volume
    assert found.array.dtype == np.uint8
    assert found.array.shape[0] == (8 if omit_empty else 12)
    assert np.allclose(found.geometry.spacing_mm, GRIDS[grid].spacing_mm, atol=1e-5)
    back = resample_onto(found.array, found.geometry, GRIDS[grid], kind="mask", fill=0)
    np.testing.assert_array_equal(back, label_map())


def test_slice_distance_follows_from_the_frames_where_the_file_is_silent(tmp_path: Path) -> None:
    seg = make_seg(label_map(), GRIDS["axial"], spacing_between=False)
    found = read_segmentation(write_seg(tmp_path / "a.dcm", seg)).volume
    assert found.geometry.spacing_mm[0] == pytest.approx(2.5)
    assert found.array.shape[0] == 8


def test_codes_of_segments_are_told(tmp_path: Path) -> None:
    codes = {1: ("SCT", "87433001"), 3: ("DCM", "112120")}
    seg = make_seg(label_map(), GRIDS["axial"], codes=codes)
    assert read_segmentation(write_seg(tmp_path / "a.dcm", seg)).codes == {**codes, 5: None}


def test_background_of_a_label_map_is_its_padding_value(tmp_path: Path) -> None:
    labels = label_map()
    seg = make_seg(labels, GRIDS["axial"], kind="LABELMAP", omit_empty=False)
    pixels = np.where(labels == 0, 200, labels).astype(np.uint8)
    seg.PixelData, seg.PixelPaddingValue = pixels.tobytes(), 200
    found = read_segmentation(write_seg(tmp_path / "a.dcm", seg)).volume
    np.testing.assert_array_equal(found.array, labels)


def refused(tmp_path: Path, seg: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read_segmentation(write_seg(tmp_path / "bad.dcm", seg))  # type: ignore[arg-type]


def test_overlapping_segments_are_refused(tmp_path: Path) -> None:
    extra = np.zeros(SHAPE, bool)
    extra[3, 3:5, 2:4] = True
    refused(tmp_path, make_seg(label_map(), GRIDS["axial"], overlap=[(7, extra)]), "segments 1 and 7 overlap")


def test_two_label_map_frames_at_one_place_are_refused(tmp_path: Path) -> None:
    seg = make_seg(label_map(), GRIDS["axial"], kind="LABELMAP")
    groups = seg.PerFrameFunctionalGroupsSequence
    groups[1].PlanePositionSequence = groups[0].PlanePositionSequence
    refused(tmp_path, seg, "two label map frames lie at one position")


def test_fractional_segmentations_are_refused_with_the_reason(tmp_path: Path) -> None:
    seg = make_seg(label_map(), GRIDS["axial"])
    seg.SegmentationType = "FRACTIONAL"
    refused(tmp_path, seg, "probabilities or occupied shares.*Threshold it")


def test_a_ct_slice_is_no_segmentation(tmp_path: Path) -> None:
    seg = make_seg(label_map(), GRIDS["axial"])
    seg.file_meta.MediaStorageSOPClassUID = seg.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    refused(tmp_path, seg, "no DICOM Segmentation, but SOP class 1.2.840.10008.5.1.4.1.1.2")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    seg = make_seg(label_map(), GRIDS["axial"])
    seg.PixelData = seg.PixelData[:-40]
    refused(tmp_path, seg, "truncated: ")
    seg = make_seg(label_map(), GRIDS["axial"])
    seg.NumberOfFrames = 3
    refused(tmp_path, seg, "declares 3 frames and describes")
    seg = make_seg(label_map(), GRIDS["axial"])
    seg.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9
    refused(tmp_path, seg, "segment 9, which is not described")
    seg = make_seg(label_map(), GRIDS["axial"])
    seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient[0] += 0.5
    refused(tmp_path, seg, "shifted sideways")
    seg = make_seg(label_map(), GRIDS["axial"])
    seg.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0].ImagePositionPatient[2] += 1.0
    refused(tmp_path, seg, "uneven distances")
    seg = make_seg(label_map(), GRIDS["axial"])
    del seg.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    refused(tmp_path, seg, "lacks its position")
    (tmp_path / "text.dcm").write_text("no image")
    with pytest.raises(InputError, match="not a readable DICOM file"):
        read_segmentation(tmp_path / "text.dcm")


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_a_damaged_file_is_read_or_refused_never_a_crash(tmp_path: Path, kind: str) -> None:
    """Cut, changed, missing and foreign bytes anywhere behind the preamble."""
    raw = write_seg(tmp_path / "whole.dcm", make_seg(label_map(), GRIDS["axial"], kind=kind)).read_bytes()
    rng = np.random.default_rng(5)
    path, refusals = tmp_path / "mutant.dcm", []
    for number in range(100):
        data, at = bytearray(raw), int(rng.integers(132, len(raw)))
        if number % 4 == 0:
            data = data[:at]
        elif number % 4 == 1:
            data[at] ^= int(rng.integers(1, 256))
        elif number % 4 == 2:
            del data[at : at + int(rng.integers(1, 30))]
        else:
            data[at:at] = rng.bytes(3)
        path.write_bytes(data)
        try:
            read_segmentation(path)
        except LungsegError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(text.startswith(str(path)) for text in refusals)

"""A label map as DICOM-SEG: the same voxels in world mm for other readers, valid for another checker, or refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom import find_series, read_series, write_dicom_series
from lungseg.scan.dicom_seg_write import require_highdicom, write_segmentation
from lungseg.scan.dicom_series import Series
from lungseg.scan.orientation import LPS_TO_SPL
from lungseg.scan.volume import Geometry, Volume
from lungseg.tissue import TISSUES, Tissue

REAL_SERIES = ("cip-small/ct-64Dicom", "lungdx-a0002", "lidc0001-slab/dicom")


@pytest.fixture
def highdicom():
    return pytest.importorskip("highdicom", reason="extra 'dicomseg' is not installed")


def phantom(folder: Path) -> tuple[Series, Volume]:
    """A small asymmetric chest as a DICOM series."""
    grid = Geometry((12, 40, 56), (5.0, 2.0, 2.5), origin_mm=(-30.0, 12.0, 7.0))
    hu = np.random.default_rng(0).normal(40, 15, grid.shape)
    hu[1:-1, 8:32, 6:24] += -890
    hu[1:-1, 8:32, 32:50] += -890
    write_dicom_series(folder, Volume(np.rint(hu).astype(np.int16), grid), patient_id="none^", series_seed="s")
    (series,) = find_series(folder).series
    return series, read_series(series)


def labels_of(volume: Volume) -> np.ndarray:
    """Several tissues without any symmetry; empty slices at both ends."""
    labels = np.select([volume.array > -300, volume.array > -850, volume.array > -900], [0, 3, 1], 2).astype(np.uint8)
    labels[:, : labels.shape[1] // 3] = 0
    labels[:1] = labels[-2:] = 0
    labels[3, -6:, -9:] = 255
    labels[2, -4:, :5] = Tissue.CAVITY
    return labels


def write(path: Path, series: Series, volume: Volume, labels: np.ndarray, **changes: object) -> None:
    settings = {"stored_axes": volume.stored_axes, "stored_flips": volume.stored_flips, "status": volume.status}
    write_segmentation(path, labels, volume.geometry, series, series.files, **{**settings, **changes})


def title(label: int) -> str:
    return "Unclassified lung" if label == 255 else TISSUES[Tissue(label)].title


def same_voxels(path: Path, labels: np.ndarray, grid: Geometry, highdicom) -> None:
    """Every segment's voxels lie where the map has its label, by highdicom's volume and by SimpleITK's frames."""
    segmentation = highdicom.seg.segread(path)
    by_frame = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    header = pydicom.dcmread(path, stop_before_pixels=True)
    pixel = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    cosines = np.array(
        header.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, float
    )
    seen = set()
    for segment in header.SegmentSequence:
        (label,) = [label for label in (*map(int, Tissue), 255) if title(label) == segment.SegmentLabel]
        seen.add(label)
        wanted = np.argwhere(labels == label)
        volume = segmentation.get_volume(segment_numbers=[segment.SegmentNumber], combine_segments=True)
        voxels = np.argwhere(np.asarray(volume.array) > 0)
        world_lps = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        for found in (world_lps, frames_world(header, by_frame, segment.SegmentNumber, pixel, cosines)):
            index = grid.to_index(found @ LPS_TO_SPL.T)
            assert np.abs(index - np.rint(index)).max() < 0.02
            assert np.array_equal(np.unique(np.rint(index).astype(int), axis=0), wanted)
    assert seen == set(np.unique(labels).tolist()) - {0}


def frames_world(header, frames: np.ndarray, number: int, pixel, cosines: np.ndarray) -> np.ndarray:
    """World points (L, P, S) of a segment's voxels, from SimpleITK's frames and the positions in the header."""
    points = []
    for frame, groups in zip(frames, header.PerFrameFunctionalGroupsSequence, strict=True):
        if groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
            row, column = np.nonzero(frame)
            across = np.outer(column * float(pixel[1]), cosines[:3]) + np.outer(row * float(pixel[0]), cosines[3:])
            points.append(origin + across)
    return np.concatenate(points)


def check_with_dciodvfy(path: Path) -> None:
    """Without errors under an independent checker."""
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
    assert errors == []


def test_a_phantom_reads_back_and_refers_to_its_images(tmp_path: Path, highdicom) -> None:
    series, volume = phantom(tmp_path / "dicom")
    labels = labels_of(volume)
    path = tmp_path / "case.seg.dcm"
    write(path, series, volume, labels)
    same_voxels(path, labels, volume.geometry, highdicom)
    header = pydicom.dcmread(path)
    sources = {pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID: f for f in series.files}
    referred = {item.ReferencedSOPInstanceUID for item in header.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred <= set(sources)
    assert len(referred) == 9  # the slices between the lowest and the highest with tissue
    first = pydicom.dcmread(series.files[0], stop_before_pixels=True)
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert header[keyword].value == first[keyword].value
    assert header.SeriesInstanceUID != first.SeriesInstanceUID
    codes = {s.SegmentLabel: s.SegmentedPropertyTypeCodeSequence[0].CodeValue for s in header.SegmentSequence}
    lung = dict.fromkeys(("Healthy lung", "Cavity", "Unclassified lung"), "39607008")
    assert codes == {**lung, "Emphysema": "87433001", "Ground glass": "112120"}
    check_with_dciodvfy(path)
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("name", REAL_SERIES)
def test_real_series_read_back(name: str, shared_data: Path, tmp_path: Path, highdicom) -> None:
    for number, series in enumerate(find_series(shared_data / name).series):
        volume = read_series(series)
        labels = labels_of(volume)
        path = tmp_path / f"{number}.seg.dcm"
        write(path, series, volume, labels)
        same_voxels(path, labels, volume.geometry, highdicom)
        check_with_dciodvfy(path)


def test_a_real_series_without_uids_is_refused(shared_data: Path, tmp_path: Path, highdicom) -> None:
    (series,) = find_series(shared_data / "covid-p002" / "dicom").series
    volume = read_series(series)
    with pytest.raises(InputError, match="SOPInstanceUID is missing in 130 of 130 slices"):
        write(tmp_path / "x.seg.dcm", series, volume, labels_of(volume))
    assert not (tmp_path / "x.seg.dcm").exists()


@pytest.mark.parametrize(
    ("tag", "value", "phrase"),
    [
        ("SOPInstanceUID", "", "SOPInstanceUID is missing in 9 of 9"),
        ("SOPInstanceUID", "1.2.3", "SOPInstanceUID has 1 values in 9 slices, not 9"),
        ("StudyInstanceUID", "1b4e-28ba", "StudyInstanceUID is not a valid DICOM UID in 9 of 9"),
        ("StudyInstanceUID", "1.02.3", "StudyInstanceUID is not a valid DICOM UID"),
        ("FrameOfReferenceUID", None, "FrameOfReferenceUID is missing"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_images_that_cannot_be_referred_to_are_refused(
    tmp_path: Path, highdicom, tag: str, value: str | None, phrase: str
) -> None:
    series, volume = phantom(tmp_path / "dicom")
    for file in set(series.files):
        dataset = pydicom.dcmread(file)
        if value is None:
            del dataset[tag]
        else:
            dataset[tag].value = value
        dataset.save_as(file)
    with pytest.raises(InputError, match=phrase):
        write(tmp_path / "x.seg.dcm", series, volume, labels_of(volume))
    assert not (tmp_path / "x.seg.dcm").exists()


def test_maps_that_lie_on_no_slice_are_refused(tmp_path: Path, highdicom) -> None:
    series, volume = phantom(tmp_path / "dicom")
    labels = labels_of(volume)
    with pytest.raises(InputError, match="uneven slices were interpolated"):
        write(tmp_path / "x.seg.dcm", series, volume, labels, status=("respaced",))
    with pytest.raises(InputError, match="the map is empty"):
        write(tmp_path / "x.seg.dcm", series, volume, np.zeros_like(labels))
    moved = Volume(volume.array, Geometry(volume.geometry.shape, volume.geometry.spacing_mm, (-30.0, 12.0, 8.0)))
    with pytest.raises(InputError, match="does not lie on the slices"):
        write(tmp_path / "x.seg.dcm", series, moved, labels)


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ResourceError, match=r"pip install 'lungseg\[dicomseg\]'"):
        require_highdicom()

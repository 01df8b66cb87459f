"""Measurements as a structured report: the numbers come back with their segments, valid for another checker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from test_dicom_seg_write import REAL_SERIES, check_with_dciodvfy, labels_of, phantom, write

from lungseg.errors import InputError
from lungseg.report.dicom_measurements import measured_regions
from lungseg.report.quantify import quantify
from lungseg.report.quantity_tables import CaseQuantities
from lungseg.scan.dicom import find_series, read_series
from lungseg.scan.dicom_series import Series
from lungseg.scan.dicom_sr_write import MeasuredRegion, write_measurements
from lungseg.scan.volume import Volume


@pytest.fixture
def highdicom():
    return pytest.importorskip("highdicom", reason="extra 'dicomseg' is not installed")


def written(
    folder: Path, series: Series, volume: Volume, labels: np.ndarray | None = None
) -> tuple[Path, CaseQuantities]:
    """A segmentation and its report, and the numbers in it."""
    labels = labels_of(volume) if labels is None else labels
    write(folder / "case.seg.dcm", series, volume, labels)
    lungs = (labels > 0).astype("uint8")
    lungs[:, :, : lungs.shape[2] // 2] *= 2
    spacing = volume.geometry.spacing_mm
    quantities = CaseQuantities(tuple(quantify(labels, lungs, volume.array, spacing_mm=spacing)))
    write_measurements(folder / "case.sr.dcm", measured_regions(quantities), folder / "case.seg.dcm")
    return folder / "case.sr.dcm", quantities


def numbers_of(path: Path, highdicom) -> dict[str, dict[tuple[str, str], float]]:
    """Values by region, quantity and derivation."""
    content = highdicom.sr.srread(path).content
    found = {}
    for group in (*content.get_volumetric_roi_measurement_groups(), *content.get_image_measurement_groups()):
        numbers = {}
        for item in group.get_measurements():
            derivation = item.derivation.meaning if item.derivation is not None else ""
            numbers[item.name.value, derivation] = item.value
        found[group.tracking_identifier] = numbers
    return found


def test_the_numbers_come_back_with_their_segments(tmp_path: Path, highdicom) -> None:
    series, volume = phantom(tmp_path / "dicom")
    path, quantities = written(tmp_path, series, volume)
    found = numbers_of(path, highdicom)
    known = {(row.region, row.metric): row.value for row in quantities.rows}
    for region, label in (("whole", "Both lungs"), ("left", "Left lung"), ("right", "Right lung")):
        assert found[label]["118565006", ""] == pytest.approx(known[region, "volume_ml"], rel=1e-5)
        assert found[label]["LAA950", ""] == pytest.approx(known[region, "laa950_pct"], rel=1e-5)
        assert found[label]["112031", "Mean"] == pytest.approx(known[region, "mld_hu"], rel=1e-5)
    assert found["Ground glass"]["118565006", ""] == pytest.approx(known["whole", "ggo_ml"], rel=1e-5)
    assert found["Ground glass"]["LUNG_SHARE", ""] == pytest.approx(known["whole", "ggo_pct"], rel=1e-5)
    assert found["Ground glass"]["112031", "Standard Deviation"] == pytest.approx(known["whole", "ggo_sd_hu"], rel=1e-5)
    assert "Consolidation" not in found  # the map has none, so that it is no segment
    segmentation = pydicom.dcmread(tmp_path / "case.seg.dcm", stop_before_pixels=True)
    labels = {s.SegmentNumber: s.SegmentLabel for s in segmentation.SegmentSequence}
    for group in highdicom.sr.srread(path).content.get_volumetric_roi_measurement_groups():
        segment = group.referenced_segment
        assert segment.referenced_sop_instance_uid == segmentation.SOPInstanceUID
        assert labels[segment[0].ReferencedSOPSequence[0].ReferencedSegmentNumber] == group.tracking_identifier
    assert not list(tmp_path.glob(".*partial"))


def test_a_map_of_one_tissue_has_a_report(tmp_path: Path, highdicom) -> None:
    series, volume = phantom(tmp_path / "dicom")
    path, quantities = written(tmp_path, series, volume, np.minimum(labels_of(volume), 1))
    (healthy,) = [row.value for row in quantities.rows if (row.region, row.metric) == ("whole", "healthy_ml")]
    assert numbers_of(path, highdicom)["Healthy lung"]["118565006", ""] == pytest.approx(healthy, rel=1e-5)
    check_with_dciodvfy(path)


def test_it_is_valid_unverified_and_carries_what_the_segmentation_carries(tmp_path: Path, highdicom) -> None:
    series, volume = phantom(tmp_path / "dicom")
    for file in series.files:
        dataset = pydicom.dcmread(file)
        dataset.InstitutionName = dataset.OperatorsName = dataset.StudyDescription = "Kanarienvogel"
        dataset.save_as(file)
    path, _ = written(tmp_path, series, volume)
    check_with_dciodvfy(path)
    report, segmentation = pydicom.dcmread(path), pydicom.dcmread(tmp_path / "case.seg.dcm")
    assert (report.CompletionFlag, report.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName"):
        assert report[keyword].value == segmentation[keyword].value
    assert report.SeriesInstanceUID != segmentation.SeriesInstanceUID
    assert b"Kanarienvogel" not in path.read_bytes()


def test_blank_numbers_are_left_out_and_nothing_but_blanks_is_refused(tmp_path: Path, highdicom) -> None:
    series, volume = phantom(tmp_path / "dicom")
    labels = labels_of(volume)
    write(tmp_path / "case.seg.dcm", series, volume, labels)
    cut = quantify(labels, labels > 0, volume.array, spacing_mm=volume.geometry.spacing_mm, truncated=("whole",))
    regions = measured_regions(CaseQuantities(tuple(cut)))
    assert not any(region.numbers for region in regions)
    with pytest.raises(InputError, match="all are blank"):
        write_measurements(tmp_path / "case.sr.dcm", [*regions, MeasuredRegion("x", ())], tmp_path / "case.seg.dcm")
    assert not (tmp_path / "case.sr.dcm").exists()


@pytest.mark.parametrize("name", REAL_SERIES)
def test_reports_of_real_series_are_valid(name: str, shared_data: Path, tmp_path: Path, highdicom) -> None:
    series = find_series(shared_data / name).series[0]
    path, quantities = written(tmp_path, series, read_series(series))
    known = {(row.region, row.metric): row.value for row in quantities.rows}
    volume_ml = numbers_of(path, highdicom)["Both lungs"]["118565006", ""]
    assert volume_ml == pytest.approx(known["whole", "volume_ml"], rel=1e-5)
    check_with_dciodvfy(path)

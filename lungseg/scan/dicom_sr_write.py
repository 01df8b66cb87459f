"""Measurements as a DICOM Structured Report (TID 1500) that refers to the segments of a DICOM Segmentation.

Written through highdicom (extra `dicomseg`). All that it knows of patient and study it takes from the segmentation,
which carries only what the standard requires.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungseg import __version__
from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom_seg_write import require_highdicom
from lungseg.tissue import LUNG_CODE, Code

if TYPE_CHECKING:
    from pydicom import Dataset

SERIES_NUMBER = 901
"""Of the new series: that of the segmentation and one."""
CT_PROCEDURE = Code("25045-6", "LN", "CT unspecified body region")
"""Of the standard's list for such reports (CID 100), which has no CT of the chest; the finding sites say lung."""
LUNG_FINDING = Code("91723000", "SCT", "Anatomical Structure")
DEVICE, PRIVATE_SCHEME = "lungseg", "99LUNGSEG"
SIGNIFICANT_DIGITS = 6
"""Of a number in the report; a decimal string holds 16 characters."""


@dataclass(frozen=True)
class MeasuredNumber:
    """One number with what it is and in which unit."""

    name: Code
    value: float
    unit: Code
    derivation: Code | None = None
    """Such as mean, of a quantity that varies."""


@dataclass(frozen=True)
class MeasuredRegion:
    """Numbers of a part of the lung, or of the voxels of one segment."""

    label: str
    """For people; also the tracking identifier."""
    numbers: tuple[MeasuredNumber, ...]
    site: Code = LUNG_CODE
    segment: str = ""
    """Label of the segment of the segmentation that was measured; '' for a region that is no segment."""


def write_measurements(path: Path, regions: Sequence[MeasuredRegion], segmentation: Path) -> None:
    """Write numbers of one scan as a structured report, not verified and not final.

    Parameters
    ----------
    path : Path
        Written as it is complete; replaced if it exists.
    regions : sequence of MeasuredRegion
        Those without a number are left out, those of a segment that the segmentation lacks too.
    segmentation : Path
        DICOM-SEG of the same map: the report refers to its segments and to the images that it refers to.

    Raises
    ------
    InputError
        If there is no number to write.
    ResourceError
        If highdicom is missing or the file cannot be written.
    """
    hd = require_highdicom()
    seg = hd.seg.segread(segmentation)
    numbers = {description.SegmentLabel: description.SegmentNumber for description in seg.SegmentSequence}
    shown = [r for r in regions if r.numbers and (not r.segment or r.segment in numbers)]
    if not shown:
        raise InputError("no number to write: all are blank")
    groups = [_group(hd, seg, region, numbers) for region in shown]
    with warnings.catch_warnings():
        # highdicom warns of odd patient names by printing them
        warnings.filterwarnings("ignore", message="The string", category=UserWarning)
        document = _document(hd, seg, groups)
    partial = path.with_name(f".{path.name}.partial")
    try:
        document.save_as(partial)
        partial.replace(path)
    except OSError as error:
        raise ResourceError(f"{path}: could not be written ({error.strerror or error}); is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def _document(hd: Any, seg: Any, groups: Sequence[Any]) -> Any:
    """The object in memory."""
    report = hd.sr.MeasurementReport(
        observation_context=_context(hd),
        procedure_reported=_coded(CT_PROCEDURE),
        imaging_measurements=groups,
        title=_coded(Code("126000", "DCM", "Imaging Measurement Report")),
    )
    return hd.sr.Comprehensive3DSR(
        evidence=[seg, *_images(seg)],
        content=report,
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=DEVICE,
        is_complete=False,
        is_final=False,
        is_verified=False,
        manufacturer_model_name=DEVICE,
        software_versions=__version__,
        device_serial_number="0",
        series_description="lungseg measurements. Research use only.",
    )


def private_code(value: str, meaning: str) -> Code:
    """A code of lungseg's own scheme, for a quantity that the standard has no code for."""
    return Code(value, PRIVATE_SCHEME, meaning)


def _coded(code: Code) -> Any:
    from pydicom.sr.coding import Code as DicomCode

    return DicomCode(code.value, code.scheme, code.meaning)


def _context(hd: Any) -> Any:
    """Who measured: this program."""
    from pydicom.uid import generate_uid

    device = hd.sr.DeviceObserverIdentifyingAttributes(
        # one UID a version, the same on every machine
        uid=generate_uid(entropy_srcs=[DEVICE, __version__]),
        name=DEVICE,
        manufacturer_name=DEVICE,
        model_name=f"{DEVICE} {__version__}",
    )
    observer = hd.sr.ObserverContext(
        observer_type=_coded(Code("121007", "DCM", "Device")), observer_identifying_attributes=device
    )
    return hd.sr.ObservationContext(observer_device_context=observer)


def _group(hd: Any, seg: Any, region: MeasuredRegion, numbers: dict[str, int]) -> Any:
    """One measurement group: of a segment (TID 1411), or of a region without voxels in the segmentation (TID 1501)."""
    shared: dict[str, Any] = {
        "tracking_identifier": hd.sr.TrackingIdentifier(uid=hd.UID(), identifier=region.label),
        "algorithm_id": hd.sr.AlgorithmIdentification(name="lungseg tissue map", version=__version__),
        "finding_sites": [hd.sr.FindingSite(_coded(region.site))],
        "measurements": [_measurement(hd, number) for number in region.numbers],
    }
    if not region.segment:
        return hd.sr.MeasurementsAndQualitativeEvaluations(finding_type=_coded(LUNG_FINDING), **shared)
    number = numbers[region.segment]
    (kind,) = seg.get_segment_description(number).SegmentedPropertyTypeCodeSequence
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=_segment(hd, seg, number),
        finding_type=_coded(Code(kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning)),
        **shared,
    )


def _segment(hd: Any, seg: Any, number: int) -> Any:
    """A segment, and the series that was segmented.

    Not by highdicom's ``from_segmentation``: it fails on the file of a single segment, whose number stands in the
    groups that all frames share.
    """
    (series,) = seg.ReferencedSeriesSequence
    return hd.sr.ReferencedSegment(
        sop_class_uid=seg.SOPClassUID,
        sop_instance_uid=seg.SOPInstanceUID,
        segment_number=number,
        source_series=hd.sr.SourceSeriesForSegmentation(series.SeriesInstanceUID),
    )


def _measurement(hd: Any, number: MeasuredNumber) -> Any:
    if not math.isfinite(number.value):
        raise InputError(f"{number.name.meaning} is not a finite number")
    return hd.sr.Measurement(
        name=_coded(number.name),
        value=float(f"{number.value:.{SIGNIFICANT_DIGITS}g}"),
        unit=_coded(number.unit),
        derivation=_coded(number.derivation) if number.derivation else None,
    )


def _images(seg: Any) -> list[Dataset]:
    """What a report must know of the images that the segmentation refers to: their UIDs."""
    from pydicom import Dataset

    found = []
    for series in seg.ReferencedSeriesSequence:
        for instance in series.ReferencedInstanceSequence:
            image = Dataset()
            image.StudyInstanceUID = seg.StudyInstanceUID
            image.SeriesInstanceUID = series.SeriesInstanceUID
            image.SOPClassUID = instance.ReferencedSOPClassUID
            image.SOPInstanceUID = instance.ReferencedSOPInstanceUID
            for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                            "StudyDate", "StudyTime", "ReferringPhysicianName"):  # fmt: skip
                setattr(image, keyword, seg.get(keyword))
            found.append(image)
    return found

"""A tissue map as DICOM Segmentation of its CT series: coded segments, references to the instances, for a PACS.

Written through highdicom (extra `dicomseg`). Of the source only what the standard asks of every object of a study is
taken over (type 1 and 2 of the patient, study and frame of reference modules); all else is left out before highdicom
sees it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg import __version__
from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom_headers import CT_IMAGE
from lungseg.scan.dicom_series import Series
from lungseg.scan.orientation import LPS_TO_SPL, to_stored
from lungseg.scan.volume import Geometry
from lungseg.tissue import (
    ABNORMAL_STRUCTURE,
    ANATOMICAL_STRUCTURE,
    LUNG_CODE,
    MIXTURE_TISSUES,
    OUTSIDE,
    TISSUE_CODES,
    TISSUES,
    UNCLASSIFIED,
    UNCLASSIFIED_COLOUR,
    Code,
    Tissue,
)

if TYPE_CHECKING:
    from pydicom import Dataset

INSTALL_HINT = "DICOM-SEG needs highdicom: pip install 'lungseg[dicomseg]'"
TAKEN_OVER = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "PositionReferenceIndicator", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate",
    "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""Type 1 and 2 of the patient, general study and frame of reference modules, and what names the instance."""
GEOMETRY = (
    "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "Modality", "InstanceNumber",
)  # fmt: skip
NEEDED_UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
MAX_SHIFT_VOXELS = 0.1
"""Largest distance of a slice from its place in the map. RELIABILITY row 33."""
SERIES_NUMBER = 900
"""Of the new series: high, so that it does not collide with those of the scanner."""
REPAIRED = {"tilt-corrected": "a tilted gantry was corrected", "respaced": "uneven slices were interpolated"}
_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")


def require_highdicom() -> Any:
    """The highdicom module.

    Raises
    ------
    ResourceError
        If it is not installed, saying how to install it.
    """
    try:
        import highdicom
    except ImportError as error:
        raise ResourceError(INSTALL_HINT) from error
    return highdicom


def write_segmentation(
    path: Path,
    labels: np.ndarray,
    geometry: Geometry,
    series: Series,
    files: Sequence[Path],
    *,
    stored_axes: Sequence[int],
    stored_flips: Sequence[bool],
    status: Sequence[str] = (),
) -> None:
    """Write a label map as one DICOM Segmentation (binary, one segment per tissue that occurs).

    Parameters
    ----------
    path : Path
        Written as it is complete; replaced if it exists.
    labels : uint8 array, shape (Z, Y, X)
        Tissue ids on the whole scan, canonical; 255 becomes the segment "Unclassified lung".
    geometry : Geometry
        Grid of ``labels``.
    series : Series
        The CT series the map was made from.
    files : sequence of Path
        Where each slice of it can be read.
    stored_axes, stored_flips
        From the volume that was read.
    status : sequence of str
        Words of ``STATUS_WORDS``: a map on a grid that no slice has cannot be referenced.

    Raises
    ------
    InputError
        If the series cannot be referenced (UIDs missing, not valid or repeated; multi-frame; resampled slices), the
        map is empty or does not lie on it.
    ResourceError
        If highdicom is missing or the file cannot be written.

    Notes
    -----
    Every segment has a frame for each slice between the lowest and the highest one with any tissue, empty or not, so
    that readers that stack frames get the geometry right. UIDs and the time of creation are new ones at each call.
    """
    hd = require_highdicom()
    refuse_unreferenceable(series, status)
    frames, grid = to_stored(labels, geometry, stored_axes=stored_axes, stored_flips=stored_flips)
    assert series.spacing is not None
    numbered = segment_numbers(labels)
    if not numbered:
        raise InputError("the map is empty: a DICOM-SEG needs a segment")
    used = np.flatnonzero((frames != OUTSIDE).any(axis=(1, 2)))
    sources, places = [], []
    for index, place in zip(series.distinct, series.spacing.grid, strict=True):
        if used[0] <= place <= used[-1]:
            sources.append(_header(files[index]))
            places.append(place)
    _check_uids(sources)
    _check_places(sources, places, grid)
    table = np.zeros(256, dtype=np.uint8)
    for number, label in enumerate(numbered, start=1):
        table[label] = number
    with warnings.catch_warnings():
        # highdicom warns of odd patient names by printing them
        warnings.filterwarnings("ignore", message="The string", category=UserWarning)
        segmentation = _segmentation(hd, sources, table[np.stack([frames[place] for place in places])], numbered)
    partial = path.with_name(f".{path.name}.partial")
    try:
        segmentation.save_as(partial)
        partial.replace(path)
    except OSError as error:
        raise ResourceError(f"{path}: could not be written ({error.strerror or error}); is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def _segmentation(hd: Any, sources: Sequence[Dataset], segments: np.ndarray, numbered: Sequence[int]) -> Any:
    """The object in memory; ``segments`` are numbers of segments, uint8 (frames, rows, columns)."""
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=segments,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(hd, number, label) for number, label in enumerate(numbered, start=1)],
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="lungseg",
        manufacturer_model_name="lungseg",
        software_versions=__version__,
        device_serial_number="0",
        content_label="LUNG_TISSUE",
        content_description="Tissue map. Research use only.",
        series_description="lungseg tissue map",
        omit_empty_frames=False,
    )


def segment_numbers(labels: np.ndarray) -> list[int]:
    """Label ids of the segments in order: the tissues that occur, then 255."""
    found = set(np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist())
    return [label for label in (*map(int, Tissue), UNCLASSIFIED) if label in found]


def refuse_unreferenceable(series: Series, status: Sequence[str] = ()) -> None:
    """Make sure that slices of a series are what the voxels of its volume are.

    Raises
    ------
    InputError
        Saying why not.
    """
    for word, why in REPAIRED.items():
        if word in status:
            raise InputError(
                f"the map lies on no slice of the series ({why}), so that a DICOM-SEG cannot refer to them"
            )
    if any(header.layout.frames > 1 for header in series.slices):
        raise InputError("a multi-frame file: writing a DICOM-SEG of it is not supported")
    if any(header.sop_class != CT_IMAGE for header in series.slices):
        raise InputError("the files are not of the class CT Image Storage")


def _header(path: Path) -> Dataset:
    """What a source image hands on: no pixels, and nothing personal beyond what the standard asks for."""
    import pydicom

    wanted = [*TAKEN_OVER, *GEOMETRY]
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*wanted, "SpecificCharacterSet"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: its header cannot be read again ({error})") from error
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                    "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"):  # fmt: skip
        if keyword not in dataset:
            setattr(dataset, keyword, None)  # type 2: there, but empty
    return dataset


def _check_uids(sources: Sequence[Dataset]) -> None:
    """Every UID that the segmentation refers to is there, valid, and of one image only."""
    for keyword in NEEDED_UIDS:
        values = [str(dataset.get(keyword, "") or "") for dataset in sources]
        empty = sum(not value for value in values)
        if empty:
            raise InputError(
                f"{keyword} is missing in {empty} of {len(values)} slices, so that they cannot be referred to"
            )
        invalid = sum(len(value) > 64 or not _UID.fullmatch(value) for value in values)
        if invalid:
            raise InputError(f"{keyword} is not a valid DICOM UID in {invalid} of {len(values)} slices")
        expected = len(values) if keyword == "SOPInstanceUID" else 1
        if len(set(values)) != expected:
            raise InputError(f"{keyword} has {len(set(values))} values in {len(values)} slices, not {expected}")


def _check_places(sources: Sequence[Dataset], places: Sequence[int], grid: Geometry) -> None:
    """Each slice lies where the map has it."""
    for dataset, place in zip(sources, places, strict=True):
        world = LPS_TO_SPL @ np.asarray([float(v) for v in dataset.ImagePositionPatient])
        if np.abs(grid.to_index(world) - np.array([place, 0, 0])).max() > MAX_SHIFT_VOXELS:
            raise InputError("the map does not lie on the slices of the series: was the store made of another copy?")


def _description(hd: Any, number: int, label: int) -> Any:
    """Name, codes and colour of a segment."""
    from pydicom.sr.coding import Code as DicomCode
    from skimage.color import rgb2lab

    def coded(code: Code) -> Any:
        return DicomCode(code.value, code.scheme, code.meaning)

    tissue = Tissue(label) if label != UNCLASSIFIED else None
    info = TISSUES[tissue] if tissue is not None else None
    code = TISSUE_CODES.get(tissue) if tissue is not None else None
    colour = info.colour if info is not None else UNCLASSIFIED_COLOUR
    automatic = tissue in MIXTURE_TISSUES
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=info.title if info is not None else "Unclassified lung",
        segmented_property_category=coded(ABNORMAL_STRUCTURE if code is not None else ANATOMICAL_STRUCTURE),
        segmented_property_type=coded(code or LUNG_CODE),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="lungseg tissue map" if automatic else "lungseg rules",
            family=DicomCode("123110", "DCM", "Artificial Intelligence"),
            version=__version__,
        ),
        anatomic_regions=[coded(LUNG_CODE)] if code is not None else None,
        display_color=hd.color.CIELabColor(*(float(value) for value in rgb2lab(np.array(colour) / 255.0))),
    )

"""What single DICOM slices say of themselves that keeps them from being voxels in HU and millimetres."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lungseg.scan.dicom_headers import ENHANCED_CT, SECONDARY_CAPTURE, SliceHeader
from lungseg.scan.dicom_stack import MAX_LISTED, PIXEL_SPACING_RANGE_MM, Defect

MAX_SLOPE = 100.0
"""Largest believable RescaleSlope; CT uses 1, some vendors fractions of it."""
MAX_INTERCEPT = 100_000.0
NOT_HU = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")
"""RescaleType of optical densities and of spectral CT maps (PS3.3 C.11.1.1.2); free text is common and ignored."""
PROJECTIONS = frozenset(("MIP", "MINIP", "MAX_IP", "MIN_IP", "MAXIMUM", "MINIMUM", "VRT", "VOLREN", "VOLUME_RENDER"))
"""Words of ImageType for projections and renderings (PS3.3 C.8.16.1, value 4, and what vendors write): their values are
not the attenuation at a place, so no density can be measured."""


def missing_tags(group: Sequence[SliceHeader]) -> str:
    """Names of the geometry tags that at least one slice lacks."""
    lacking = {
        "ImagePositionPatient": any(s.position is None for s in group),
        "ImageOrientationPatient": any(s.orientation is None for s in group),
        "PixelSpacing": any(s.pixel_spacing_mm is None for s in group),
    }
    return ", ".join(name for name, is_lacking in lacking.items() if is_lacking)


def image_defects(group: Sequence[SliceHeader]) -> list[Defect]:
    """Why these images are no CT slices or cannot be read, from their own tags."""
    first = group[0]
    if first.sop_class.startswith(SECONDARY_CAPTURE):
        return [Defect("a secondary capture (screen picture), not a scan: leave it out")]
    if first.modality != "CT":
        return [Defect(f"modality is {first.acquisition['modality'] or 'not stated'}, not CT: leave it out")]
    if all(s.layout.is_colour for s in group):
        return [Defect("a colour image, not a scan: leave it out")]
    if all(_words(s.image_type) & PROJECTIONS for s in group):
        return [
            Defect("a projection (MIP, MinIP) or rendering of a scan: leave it out, and use the slices it was made of")
        ]
    faults: dict[str, list[SliceHeader]] = {}
    for s in group:
        for fault in (*s.faults, *_value_faults(s)):
            faults.setdefault(fault, []).append(s)
    return [Defect(f"{file_names(bad)}: {fault}") for fault, bad in list(faults.items())[:MAX_LISTED]]


def _words(image_type: str) -> set[str]:
    """The words of an ImageType."""
    return set(re.split(r"[\\\\\s/-]+", image_type.upper()))


def _value_faults(s: SliceHeader) -> list[str]:
    """What is wrong with the numbers that make voxels HU and millimetres."""
    faults = []
    if s.sop_class not in ENHANCED_CT and s.layout.frames > 1:
        faults.append(f"{s.layout.frames} frames without a geometry of their own: export single-frame or Enhanced CT")
    if s.slope is not None and (s.slope == 0 or abs(s.slope) > MAX_SLOPE):
        faults.append(f"RescaleSlope is {s.slope:g}: a damaged header")
    if s.intercept is not None and abs(s.intercept) > MAX_INTERCEPT:
        faults.append(f"RescaleIntercept is {s.intercept:g}: a damaged header")
    if s.rescale_type in NOT_HU:
        faults.append(f"its values are {s.rescale_type}, not HU: leave it out")
    low, high = PIXEL_SPACING_RANGE_MM
    if s.pixel_spacing_mm and not all(low <= v <= high for v in s.pixel_spacing_mm):
        faults.append(
            f"PixelSpacing is {s.pixel_spacing_mm[0]:g} x {s.pixel_spacing_mm[1]:g} mm, outside {low:g} to {high:g} "
            "mm: a damaged header"
        )
    return faults


def file_names(slices: Sequence[SliceHeader]) -> str:
    """File names for a message, the first few, each once."""
    names = list(dict.fromkeys(s.path.name for s in slices))
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more

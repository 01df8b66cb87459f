"""Functional groups of Enhanced CT: where each frame of a multi-frame file lies and how its values become HU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lungseg.scan.dicom_values import Cosines, first_float, floats, plain, text, unit_cosines, unsigned
from lungseg.scan.volume import Triple

SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230
"""Shared and Per-frame Functional Groups Sequence (PS3.3 C.7.6.16)."""
FRAME_CONTENT, PLANE_POSITION, PLANE_ORIENTATION = 0x00209111, 0x00209113, 0x00209116
PIXEL_MEASURES, VALUE_TRANSFORMATION, RECONSTRUCTION = 0x00289110, 0x00289145, 0x00189314
X_RAY_DETAILS, FRAME_TYPE = 0x00189325, 0x00189329
"""Macros of a frame: each is a sequence of one item, in the frame's own groups or in the shared ones."""


@dataclass(frozen=True)
class Frame:
    """What a multi-frame file says of one frame; numbers are None and text empty where it says nothing."""

    position: Triple | None
    orientation: Cosines | None
    pixel_spacing_mm: tuple[float, float] | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    image_type: str
    acquisition_number: str
    """FrameAcquisitionNumber."""
    kernel: str | None
    kvp: float | None
    slice_thickness_mm: float | None


def read_frames(dataset: Any) -> tuple[Frame, ...]:
    """The frames of a file, in stored order; empty if it has no per-frame functional groups.

    Parameters
    ----------
    dataset : pydicom Dataset
        With the shared and per-frame functional groups.
    """
    shared = _items(dataset, SHARED_GROUPS)
    return tuple(_frame(own, shared[0] if shared else None) for own in _items(dataset, FRAME_GROUPS))


def _items(dataset: Any, tag: int) -> list[Any]:
    """Items of a sequence; empty if it is absent or no sequence."""
    if dataset is None or tag not in dataset or dataset[tag].VR != "SQ":
        return []
    return list(dataset[tag].value)


def _frame(own: Any, shared: Any) -> Frame:
    """One frame from its own groups, and the shared ones where it has none."""

    def macro(tag: int, value: int) -> str:
        for groups in (own, shared):
            items = _items(groups, tag)
            if items:
                return text(items[0], value)
        return ""

    content = _items(own, FRAME_CONTENT)  # never shared
    number = unsigned(content[0], 0x00209156) if content else None
    return Frame(
        position=floats(macro(PLANE_POSITION, 0x00200032), 3),  # type: ignore[arg-type]
        orientation=unit_cosines(floats(macro(PLANE_ORIENTATION, 0x00200037), 6)),
        pixel_spacing_mm=floats(macro(PIXEL_MEASURES, 0x00280030), 2),  # type: ignore[arg-type]
        slope=first_float(macro(VALUE_TRANSFORMATION, 0x00281053)),
        intercept=first_float(macro(VALUE_TRANSFORMATION, 0x00281052)),
        rescale_type=macro(VALUE_TRANSFORMATION, 0x00281054),
        image_type=macro(FRAME_TYPE, 0x00089007),
        acquisition_number="" if number is None else str(number),
        kernel=plain(macro(RECONSTRUCTION, 0x00181210)),
        kvp=first_float(macro(X_RAY_DETAILS, 0x00180060)),
        slice_thickness_mm=first_float(macro(PIXEL_MEASURES, 0x00180050)),
    )

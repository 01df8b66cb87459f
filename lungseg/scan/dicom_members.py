"""Which DICOM images belong together by their headers, and which few of a series do not fit the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lungseg.scan.dicom_checks import file_names, missing_tags
from lungseg.scan.dicom_headers import SECONDARY_CAPTURE, SliceHeader
from lungseg.scan.volume import MIN_SLICES

ALIKE = 1e-3
"""Direction cosines and pixel spacings (mm) this close belong together."""
CONTINUES = 0.05
"""An image this near, in slices and pixels, to where the next slice belongs may be one of the series."""
OTHER_TAGS = 1
"""So many tags may say that it is none (absent and unreadable ones say nothing): damage rarely makes two new, readable
values, while images of another scan (bolus tracking) differ in series, acquisition, kernel or thickness at once."""

Group = Sequence[SliceHeader]


def single_frames(s: SliceHeader) -> list[SliceHeader]:
    """A header for each frame of a multi-frame file; the header itself for a single image."""
    if s.faults or not s.frames:
        return [s]
    result = []
    for i, frame in enumerate(s.frames):
        covariates = {"kernel": frame.kernel, "kvp": frame.kvp, "slice_thickness_mm": frame.slice_thickness_mm}
        known = {name: value for name, value in covariates.items() if value is not None}
        result.append(
            replace(
                s,
                frame=i,
                frames=(),
                position=frame.position,
                orientation=frame.orientation,
                pixel_spacing_mm=frame.pixel_spacing_mm,
                slope=frame.slope,
                intercept=frame.intercept,
                rescale_type=frame.rescale_type,
                image_type=frame.image_type or s.image_type,
                acquisition_number=frame.acquisition_number or s.acquisition_number,
                acquisition=s.acquisition | known,
                slice_location=None,
            )
        )
    return result


def alike(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> bool:
    """Whether two optional tuples agree within the tolerance."""
    if a is None or b is None:
        return a is b
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= ALIKE


def series_of(s: SliceHeader) -> tuple[str, ...]:
    """Patient, study and series of a slice; its folder where there is no series UID: nothing else tells them apart."""
    return s.patient_id, s.study_uid, s.series_uid or str(s.path.parent)


def group_slices(slices: Group) -> list[list[SliceHeader]]:
    """Slices by patient, study, series, kind, orientation and in-plane grid; each group in order of position."""

    def kind(s: SliceHeader) -> tuple[Any, ...]:
        return *series_of(s), s.modality, s.sop_class, s.shape

    def order(s: SliceHeader) -> tuple[Any, ...]:
        return *kind(s), s.orientation or (), s.pixel_spacing_mm or (), s.position or (), str(s.path), s.frame

    groups: list[list[SliceHeader]] = []
    for s in sorted(slices, key=order):
        for group in reversed(groups):
            first = group[0]
            if kind(first) != kind(s):
                groups.append([s])  # sorted: no earlier group can match
                break
            if alike(first.orientation, s.orientation) and alike(first.pixel_spacing_mm, s.pixel_spacing_mm):
                group.append(s)
                break
        else:
            groups.append([s])
    return groups


def stray_slices(group: Group, related: Sequence[Group]) -> list[str]:
    """Problems of a series of which a few images cannot be placed, or have another in-plane grid.

    Dropping such slices silently would shorten the volume, so the whole series is refused.
    """
    bare = [s for other in related if other is not group for s in other if s.shape == group[0].shape]
    bare = [s for s in bare if s.modality == group[0].modality and missing_tags([s])]
    bare = [s for s in bare if not s.sop_class.startswith(SECONDARY_CAPTURE)]
    problems = []
    if bare and len(group) >= MIN_SLICES and not missing_tags(group):
        problems.append(f"{file_names(bare)} of the same series lacks {missing_tags(bare)}: remove or repair it")
    for other in related:
        few, many = sorted((group, other), key=len)
        same = group[0].orientation is not None and alike(group[0].orientation, other[0].orientation)
        if other is not group and same and len(few) < MIN_SLICES <= len(many):
            problems.append(
                f"{len(few)} of {len(few) + len(many)} slices differ in matrix or pixel spacing from the others "
                f"({file_names(few)}): remove or repair them"
            )
    return problems


def lost_slices(group: Group, expected: np.ndarray, step_mm: float, few: Group) -> list[str]:
    """Problems of a series that single images in its folders belong to, although one of their tags denies it.

    Such an image lies exactly where the next slice or a missing one would, or has no position and the same series UID.
    A damaged tag has put it elsewhere.

    Parameters
    ----------
    group : sequence of SliceHeader
        A series of at least six slices with geometry.
    expected : float array, shape (N, 3)
        ImagePositionPatient of the slices before the first, after the last, and in the gaps, in mm.
    step_mm : float
        Slice distance.
    few : sequence of SliceHeader
        Images in the same folders that belong to no series of their own.
    """
    assert group[0].orientation is not None
    cosines = np.asarray(group[0].orientation)
    pixel = min(group[0].pixel_spacing_mm or (1.0,))
    identities = [_identity(s) for s in group]
    known = [set(values) for values in zip(*identities, strict=True)]
    first = group[0]
    uids = first.patient_id, first.study_uid, first.series_uid
    lost = []
    for s in few:
        others = sum(bool(value) and value not in values for value, values in zip(_identity(s), known, strict=True))
        others += s.orientation is not None and not alike(first.orientation, s.orientation)
        others += s.pixel_spacing_mm is not None and not alike(first.pixel_spacing_mm, s.pixel_spacing_mm)
        is_whole = not s.faults  # what else a file says is worth nothing if it contradicts itself
        if s.sop_class.startswith(SECONDARY_CAPTURE) or (is_whole and (s.shape != first.shape or others > OTHER_TAGS)):
            continue
        if s.position is None:
            # with all three UIDs alike, stray_slices has named it
            is_lost = bool(s.series_uid) and s.series_uid == uids[2] and uids != (s.patient_id, s.study_uid, uids[2])
        else:
            off = np.asarray(s.position) - expected
            along = np.abs(off @ np.cross(cosines[:3], cosines[3:]))
            across = np.linalg.norm(off @ cosines.reshape(2, 3).T, axis=1)
            is_lost = bool(((along < CONTINUES * step_mm) & (across < CONTINUES * pixel)).any())
        if is_lost:
            lost.append(s)
    if not lost:
        return []
    return [
        f"{file_names(lost)} lies where the next slice of this series would, or has its series UID, but another of its "
        "tags says that it is none of it: a damaged header, or files of two series; copy or export them again, or take "
        "it away"
    ]


def _identity(s: SliceHeader) -> tuple[Any, ...]:
    """What slices of one series have in common, or share with some of the others."""
    covariates = s.acquisition
    return (s.patient_id, s.study_uid, s.series_uid, s.modality, s.sop_class, s.image_type, s.acquisition_number,
            covariates["kernel"], covariates["kvp"], covariates["slice_thickness_mm"])  # fmt: skip


def dropped_images(group: Group, related: Sequence[Group]) -> tuple[str, ...]:
    """Words for the localizers of a series: a few images of the same UID in another orientation, or in none."""
    few = [
        other
        for other in related
        if other is not group
        and len(other) < MIN_SLICES <= len(group)
        and not (other[0].orientation is not None and alike(group[0].orientation, other[0].orientation))
    ]
    count = sum(len(other) for other in few)
    if not count:
        return ()
    known = all(other[0].orientation is not None for other in few)
    what = "of another orientation (localizer)" if known else "of another or no orientation"
    return (f"{count} image{'s' if count > 1 else ''} {what} in the same series left out",)

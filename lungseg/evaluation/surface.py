"""Distances between the surfaces of two masks, in millimetres: HD95, ASSD and surface Dice.

Three published definitions share the name HD95; each has its sentence in ``HD95_DEFINITIONS``, which every table
prints. The default is METHOD 0.4. Arrays are ``(z, y, x)``, or ``(y, x)`` for one slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.distances import directed_distances_mm, slabs
from lungseg.evaluation.surface_elements import element_areas, surface_elements

HD_PERCENTILE = 95.0
"""Percentile of the distances, linear interpolation (METHOD 0.4)."""
BORDER, SURFACE, MEDPY = "border", "surface", "medpy"
HD95_DEFINITIONS: Mapping[str, str] = {
    BORDER: (
        "HD95 in mm: border voxels (mask minus its 6-connected erosion; 4-connected in a slice), physical spacing, "
        "larger of the two directed 95th percentiles (MONAI's definition)."
    ),
    SURFACE: (
        "HD95 in mm: surface elements weighted by their area (marching cubes between voxel centres; in a slice by "
        "their length), physical spacing, larger of the two directed 95th percentiles of area (the definition of the "
        "package surface-distance)."
    ),
    MEDPY: (
        "HD95 in mm: border voxels (mask minus its 6-connected erosion; 4-connected in a slice), physical spacing, "
        "95th percentile of both directions pooled (medpy's definition)."
    ),
}
"""What each choice of HD95 means: printed with every table (METHOD 0.4)."""
ASSD_DEFINITION = "ASSD in mm: mean distance of border voxels to the other border, both directions pooled."
"""Printed with every table that shows it. Equal to MONAI's symmetric average surface distance."""


def surface_dice_definition(tolerance_mm: float) -> str:
    """Sentence that says what the surface Dice of a table is."""
    return (
        "Surface Dice (NSD): share of both surfaces, by area (in a slice: of both contours, by length), that lies "
        f"within {tolerance_mm:g} mm of the other one (surface-distance's definition)."
    )


@dataclass(frozen=True)
class SurfaceFigures:
    """Surface figures of one pair of masks."""

    hd95_mm: float
    """95th percentile Hausdorff distance in mm; nan if a mask is empty."""
    assd_mm: float
    """Average symmetric surface distance in mm; nan if a mask is empty."""
    surface_dice: float
    """0 to 1 at the tolerance; 0 if one mask is empty, nan if both are."""


def require_masks(prediction: np.ndarray, reference: np.ndarray) -> None:
    """Raise ``InputError`` unless both are bool arrays of one shape (a label map is not a mask)."""
    for side, mask in (("prediction", prediction), ("reference", reference)):
        if mask.dtype != np.bool_:
            raise InputError(f"the {side} must be a bool mask, not {mask.dtype}; select a class with `labels == id`")
    if prediction.shape != reference.shape:
        raise InputError(
            f"prediction {prediction.shape} and reference {reference.shape} lie on different grids; "
            "resample the prediction to the reference first"
        )


def require_spacing(spacing_mm: Sequence[float], ndim: int) -> tuple[float, ...]:
    """Spacing as floats; ``InputError`` unless one strictly positive, finite value an axis is given."""
    spacing = tuple(float(value) for value in spacing_mm)
    if len(spacing) != ndim or not all(np.isfinite(value) and value > 0 for value in spacing):
        raise InputError(f"spacing must be {ndim} strictly positive values in mm (z, y, x), not {spacing}")
    return spacing


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Smallest box around the true voxels.

    Parameters
    ----------
    mask : bool array, any number of axes

    Returns
    -------
    tuple of slice, or None
        ``[start, stop)`` per axis; None for an empty mask.
    """
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if hit.size == 0:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def border_voxels(mask: np.ndarray) -> np.ndarray:
    """Mask minus its 6-connected erosion; voxels at the edge of the array are border.

    Parameters
    ----------
    mask : bool array, any number of axes (4-connected in 2-D, 6-connected in 3-D)

    Returns
    -------
    bool array of the same shape
        All false for an empty mask.

    Source
    ------
    METHOD 0.4; MONAI ``get_mask_edges`` (what lies beyond the volume is background).
    """
    border = np.empty(mask.shape, dtype=bool)
    for slab in slabs(mask.shape):
        here = mask[slab]
        inner = here.copy()
        for axis in range(mask.ndim):
            eroded, whole = np.moveaxis(inner, axis, 0), np.moveaxis(here, axis, 0)
            eroded[1:] &= whole[:-1]
            eroded[:-1] &= whole[1:]
            if axis > 0:
                eroded[:1] = False
                eroded[-1:] = False
        inner[0] &= mask[slab.start - 1] if slab.start > 0 else False
        inner[-1] &= mask[slab.stop] if slab.stop < len(mask) else False
        np.greater(here, inner, out=border[slab])
    return border


def surface_figures(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    hd95: str = BORDER,
    tolerance_mm: float = 2.0,
) -> SurfaceFigures:
    """HD95, ASSD and surface Dice of two masks.

    Parameters
    ----------
    prediction, reference : bool arrays of one shape, (Z, Y, X) or (Y, X)
    spacing_mm : sequence of float
        Distance of voxel centres along each axis in mm. Mandatory: there is no sensible default.
    hd95 : str
        Key of ``HD95_DEFINITIONS``. ASSD is always over border voxels and surface Dice always over areas.
    tolerance_mm : float
        Two surfaces agree within it, inclusive (surface Dice).

    Returns
    -------
    SurfaceFigures
        How an empty side counts is decided in ``overlap.score_case``; here it gives no distance.

    Raises
    ------
    InputError
        If the shapes differ, a mask is not bool, or the spacing, tolerance or definition is not valid.

    Source
    ------
    METHOD 0.4. Nikolov et al., arXiv 1809.04430 (area-weighted percentile and surface Dice).
    """
    require_definition(hd95, tolerance_mm)
    cropped = _cropped(prediction, reference, spacing_mm)
    if cropped is None:
        return SurfaceFigures(np.nan, np.nan, 0.0 if prediction.any() or reference.any() else np.nan)
    there, back = _border_distances(*cropped)
    first, second = _element_distances(*cropped)
    near = sum(float(areas[distances <= tolerance_mm].sum()) for distances, areas in (first, second))
    total = sum(float(areas.sum()) for _, areas in (first, second))
    return SurfaceFigures(
        hd95_mm=_area_hd95(first, second) if hd95 == SURFACE else _border_hd95(there, back, hd95),
        assd_mm=float((there.sum() + back.sum()) / (there.size + back.size)),
        surface_dice=near / total,
    )


def hd95_mm(
    prediction: np.ndarray, reference: np.ndarray, *, spacing_mm: Sequence[float], definition: str = BORDER
) -> float:
    """95th percentile Hausdorff distance of two masks, in mm; as in ``surface_figures``, but nothing else is measured.

    Parameters
    ----------
    prediction, reference, spacing_mm
        As in ``surface_figures``.
    definition : str
        Key of ``HD95_DEFINITIONS``.

    Returns
    -------
    float
        ``nan`` if either mask is empty: how a missed class counts is decided in ``overlap.score_case``.

    Source
    ------
    METHOD 0.4; the default is equal to MONAI ``compute_hausdorff_distance(percentile=95)`` within 1e-5·max(1, |x|).
    """
    require_definition(definition, 0.0)
    cropped = _cropped(prediction, reference, spacing_mm)
    if cropped is None:
        return float("nan")
    if definition == SURFACE:
        return _area_hd95(*_element_distances(*cropped))
    return _border_hd95(*_border_distances(*cropped), definition)


def require_definition(hd95: str, tolerance_mm: float) -> None:
    """Raise ``InputError`` unless the HD95 is a known one and the tolerance a distance."""
    if hd95 not in HD95_DEFINITIONS:
        raise InputError(f"unknown HD95 definition {hd95!r}: choose one of {', '.join(HD95_DEFINITIONS)}")
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError(f"the tolerance of the surface Dice must be 0 mm or more, not {tolerance_mm}")


Pair = tuple[np.ndarray, np.ndarray, tuple[float, ...]]
"""Two masks cropped to the box of both, and their spacing in mm."""
Elements = tuple[np.ndarray, np.ndarray]
"""Distance in mm and area of each surface element of one mask."""


def _cropped(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]) -> Pair | None:
    """Checked masks in the box of both; None if one of them is empty."""
    require_masks(prediction, reference)
    spacing = require_spacing(spacing_mm, prediction.ndim)
    boxes = bounding_box(prediction), bounding_box(reference)
    if boxes[0] is None or boxes[1] is None:
        return None
    # Beyond this box both masks are background, so its faces are borders exactly as in the full volume.
    box = tuple(
        slice(min(first.start, second.start), max(first.stop, second.stop))
        for first, second in zip(boxes[0], boxes[1], strict=True)
    )
    return prediction[box], reference[box], spacing


def _border_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each border voxel to the other border, for both directions."""
    first, second = border_voxels(prediction), border_voxels(reference)
    return (
        directed_distances_mm(first, second, spacing_mm=spacing),
        directed_distances_mm(second, first, spacing_mm=spacing),
    )


def _element_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]
) -> tuple[Elements, Elements]:
    """Distance of each surface element to the other surface, and its area, for both directions."""
    areas = element_areas(spacing)
    (first, first_codes), (second, second_codes) = surface_elements(prediction), surface_elements(reference)
    there = directed_distances_mm(first, second, spacing_mm=spacing)
    back = directed_distances_mm(second, first, spacing_mm=spacing)
    return (there, areas[first_codes]), (back, areas[second_codes])


def _border_hd95(there: np.ndarray, back: np.ndarray, definition: str) -> float:
    """Percentile of the distances of border voxels."""
    if definition == MEDPY:
        return float(np.percentile(np.concatenate([there, back]), HD_PERCENTILE))
    return float(max(np.percentile(there, HD_PERCENTILE), np.percentile(back, HD_PERCENTILE)))


def _area_hd95(first: Elements, second: Elements) -> float:
    """Larger of the smallest distances within which 95 % of a surface's area lies."""
    found = []
    for distances, areas in (first, second):
        order = np.argsort(distances, kind="stable")
        share = np.cumsum(areas[order]) / areas.sum()
        index = int(np.searchsorted(share, HD_PERCENTILE / 100.0))
        found.append(float(distances[order[min(index, len(order) - 1)]]))
    return max(found)


def lung_box_diagonal_mm(lung_mask: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Diagonal of the box around the lungs, in mm: the HD95 that a missed class is charged.

    Parameters
    ----------
    lung_mask : bool or integer array, shape (Z, Y, X)
        Any non-zero voxel is lung.
    spacing_mm : sequence of float
        (z, y, x) in mm.

    Returns
    -------
    float
        Edge to edge, so no two lung voxels lie further apart. ``nan`` if the mask is empty.

    Source
    ------
    METHOD 0.4 (penalised HD95).
    """
    spacing = require_spacing(spacing_mm, lung_mask.ndim)
    box = bounding_box(lung_mask != 0)
    if box is None:
        return float("nan")
    return float(np.linalg.norm([(side.stop - side.start) * step for side, step in zip(box, spacing, strict=True)]))

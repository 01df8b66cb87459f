"""The lung field: which voxels of a CT are left and right lung.

Thresholds find the air inside the body, the airway tree is taken out (``lungs_airway``), the rest is told apart into
left and right (``lungs_sides``), and dense disease is brought back by its shape, its traces of air and the rib cage
(``lungs_dense``). All of it runs on a coarse copy (about 2 mm, ``lungs_grid``) and is then brought to the grid of the
scan as a smooth surface (``lungs_surface``), so time and memory hardly depend on the resolution of the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.errors import InputError
from lungseg.scan.lungs_airway import find_airway
from lungseg.scan.lungs_closing import dilate, erode
from lungseg.scan.lungs_dense import fill_each
from lungseg.scan.lungs_grid import IN_PLANE, CoarseScan, coarsen, padding, without_rim
from lungseg.scan.lungs_sides import split_sides
from lungseg.scan.lungs_surface import SIDES, paint
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

COARSE_MM = (1.4, 2.0)
"""Voxel size of the working copy: at most half the thinnest wall (chest wall, diaphragm + stomach) that must hold."""
COARSE_COLUMNS = 160
"""A narrow field of view, that of a child, is worked on with smaller voxels, so many across."""
AIR_HU = -320.0
"""Below is air or aerated lung: halfway between lung and soft tissue, as in most threshold lungs (-300 to -400)."""
BODY_HU = -250.0
OUTSIDE_HU = -930.0
"""Air at the sides of the scan that is as empty as this lies outside the body; a lung cut by the field is denser."""
FOAM_HU = -885.0
"""Likewise where it reaches a corner of the slice: foam of a table."""
GAS_HU = -930.0
GAS_SHARE = 0.90
"""Bowel and stomach hold gas only: nearly all of their inside is below ``GAS_HU``. Lungs hold vessels."""
GAS_RIM_MM = 6.0
"""Outer layer of a piece of air that does not count: partial volume, wider in thick slices."""
MARGIN_MM = 40.0
"""Tissue kept around the aerated lungs while dense disease is looked for: ribs, and disease beyond all aerated lung."""
MIN_AREA_MM2 = 700.0
"""A lung reaches this area in at least one slice."""
MIN_SHARE = 0.06
"""A second lung smaller than this share of the first is no lung."""
MIN_SUPPORT = 0.3
"""Share of the surroundings of a lung that is thick soft tissue; the hollow of a table has none."""
ENCLOSED_SHARE = 0.4
"""Share of the columns (along y) of a lung with body on both sides; gaps between patient and table have few."""
ADULT_WIDTH_MM, MIN_SIZE = 240.0, 0.4
"""Width of both lungs from which on a chest counts as an adult's, and the smallest size, a share of it."""
SMALL_LITRES, LARGE_LITRES = 1.0, 9.0
TRUNCATED_SHARE = 0.25
"""Lung area on the first or last slice, against the largest of all slices, from which the lung counts as cut."""
TRUNCATED_MM2 = 1500.0
"""Contact of the lungs with the border of the field of view within slices from which they count as cut."""
CONTACT_VOXELS = 2
"""Coarse voxels next to padding that count as its border."""


@dataclass(frozen=True)
class LungField:
    """Both lungs without trachea and main bronchi, on the grid of the scan."""

    labels: np.ndarray
    """uint8 (Z, Y, X): 1 left, 2 right, 0 else."""
    volume_ml: float
    """Of both lungs; 0 if there are none."""
    mean_hu: float
    """Of both lungs; ``nan`` if there are none."""
    warnings: tuple[str, ...]
    """What the user should know; the first words are stable: "no lung", "small", "large", "one lung", "truncated"."""


def find_lungs(volume_hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> LungField:
    """Left and right lung of a CT scan by thresholds and closing.

    Parameters
    ----------
    volume_hu : real array, shape (Z, Y, X)
        CT in HU, axes as in ``volume.py`` (z to superior, y to posterior, x to the patient's left). Padding below
        -1024 HU and NaN count as air outside the body. Not changed.
    spacing_mm : (z, y, x)
        Distance of voxel centres, 0.3 to 10 mm.

    Returns
    -------
    LungField
        If no lung is found ``labels`` is all 0 and the only warning starts with "no lung".

    Raises
    ------
    InputError
        If the array does not have three axes of at least one voxel, or a spacing is not positive.

    Notes
    -----
    Dense disease is kept inside where the shape of the lung, traces of air in it, or lung above and below it beside
    the spine tell it from other tissue. A solid mass that broadly touches mediastinum or diaphragm, and a wholly
    airless lobe, may be cut off; pleural fluid between aerated lung and ribs may be taken in.
    Memory: less than one float32 copy of the input besides the labels.
    """
    if volume_hu.ndim != 3 or 0 in volume_hu.shape:
        raise InputError(f"a lung field needs a volume of three axes, not shape {volume_hu.shape}")
    if len(spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        raise InputError(f"spacing must be strictly positive and finite, not {spacing_mm} mm")
    target_mm = float(np.clip(volume_hu.shape[2] * spacing_mm[2] / COARSE_COLUMNS, *COARSE_MM))
    coarse_hu, coarse_mm = coarsen(volume_hu, spacing_mm, target_mm)
    beyond = padding(coarse_hu)
    if beyond.any():
        coarse_hu = without_rim(coarse_hu, beyond)
    sides, filled = _coarse_lungs(coarse_hu, beyond, coarse_mm, spacing_mm)
    if not sides.any():
        empty = np.zeros(volume_hu.shape, dtype=np.uint8)
        return LungField(empty, 0.0, float("nan"), ("no lung found: is this a CT of the chest in HU?",))
    labels = paint(volume_hu, spacing_mm, coarse_hu, coarse_mm, sides, filled)
    inside = labels > 0
    count = np.count_nonzero(inside)
    volume_ml = count * float(np.prod(spacing_mm)) / 1000.0
    mean_hu = float(volume_hu[inside].mean(dtype=np.float64)) if count else float("nan")
    warnings = _warnings(labels, volume_ml, _contact_mm2(sides, beyond, coarse_mm))
    return LungField(labels, volume_ml, mean_hu, warnings)


def _coarse_lungs(
    hu: np.ndarray, beyond: np.ndarray, spacing_mm: tuple[float, float, float], source_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Side labels (1 left, 2 right) on the coarse grid, and the voxels that the closing added.

    ``beyond`` is the padding beyond the field of view.
    """
    smooth = ndimage.gaussian_filter(hu, 0.8 / np.asarray(spacing_mm), truncate=3.0)
    body = _thick(smooth > BODY_HU, spacing_mm)
    air = _inside_air(smooth, body, beyond)
    airway = find_airway(hu, air, spacing_mm, pixel_mm=max(source_mm[1:]))
    candidates = _lung_components(smooth, air & ~airway, body, beyond, spacing_mm)
    closed = np.zeros(hu.shape, dtype=np.uint8)
    filled = np.zeros(hu.shape, dtype=bool)
    if not candidates.any():
        return closed, filled
    outside = ((smooth < AIR_HU) & ~air) | beyond
    # The rest needs the lungs and the chest wall only.
    margins = [round(MARGIN_MM / s) for s in spacing_mm]
    box = _padded(ndimage.find_objects(candidates.astype(np.uint8))[0], hu.shape, by=margins)
    sides = split_sides(candidates[box], hu[box], airway[box], spacing_mm)
    size = _chest_size(sides, spacing_mm[2])
    scan = CoarseScan(hu[box], smooth[box], air[box], outside[box], airway[box], spacing_mm, source_mm[0], size)
    closed[box] = fill_each(sides, scan)
    closed[beyond] = 0
    if beyond.any():  # a lung cut by the field of view ends where the padding begins, not half a coarse voxel before
        for side in SIDES:
            closed[ndimage.binary_dilation(closed == side, iterations=2) & beyond & (closed == 0)] = side
    filled[box] = (closed[box] > 0) & (sides == 0)
    return closed, filled


def _thick(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Largest piece of ``mask`` after removing sheets thinner than about 6 mm (table, clothes)."""
    inner = erode(mask, 3.0, spacing_mm)
    if not inner.any():
        return mask
    pieces, _ = ndimage.label(inner)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return dilate(pieces == sizes.argmax(), 3.0, spacing_mm)


def _chest_size(sides: np.ndarray, pixel_mm: float) -> float:
    """Width of both lungs (twice that of a single one) against an adult's, never more than 1."""
    columns = np.flatnonzero(sides.any(axis=(0, 1)))
    width_mm = (columns[-1] + 1 - columns[0]) * pixel_mm
    pair = 1.0 if (sides == LUNG_LEFT).any() and (sides == LUNG_RIGHT).any() else 2.0
    return float(np.clip(pair * width_mm / ADULT_WIDTH_MM, MIN_SIZE, 1.0))


def _inside_air(smooth: np.ndarray, body: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Air and aerated lung without the air around the body.

    Pieces that touch a lateral face, or the padding, lie outside where they are as empty as air, or nearly so and
    reach a corner of the slice (foam of a table). A lung cut by the field of view touches it with lung density.
    """
    air = (smooth < AIR_HU) & ~body & ~beyond
    pieces, count = ndimage.label(air)
    if count == 0:
        return air
    border = ndimage.binary_dilation(beyond, IN_PLANE)
    border[:, [0, -1]] = border[:, :, [0, -1]] = True
    border &= air
    ids, hu = pieces[border], smooth[border]
    touching = np.bincount(ids, minlength=count + 1)
    empty = np.bincount(ids, weights=hu < OUTSIDE_HU, minlength=count + 1)
    outside = (touching > 0) & (empty >= 0.5 * touching)
    loose = np.bincount(ids, weights=hu < FOAM_HU, minlength=count + 1) >= 0.5 * touching
    corners = np.zeros(count + 1, dtype=bool)
    corners[pieces[:, [0, 0, -1, -1], [0, -1, 0, -1]]] = True
    outside |= corners & loose
    outside[0] = True
    inside: np.ndarray = ~outside[pieces]
    return inside


def _lung_components(
    smooth: np.ndarray, air: np.ndarray, body: np.ndarray, beyond: np.ndarray, spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """The pieces of inside air that are lung: large, textured, within thick tissue."""
    pieces, count = ndimage.label(air)
    keep = np.zeros(count + 1, dtype=bool)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    boxes = ndimage.find_objects(pieces)
    pixel = spacing_mm[1] * spacing_mm[2]
    largest = 0
    for piece in np.argsort(-sizes[1:]) + 1:
        if sizes[piece] * pixel < MIN_AREA_MM2 or sizes[piece] < MIN_SHARE * largest:
            break
        box = _padded(boxes[piece - 1], pieces.shape)
        mask = pieces[box] == piece
        if mask.sum(axis=(1, 2)).max() * pixel < MIN_AREA_MM2:
            continue
        if _is_gas(mask, smooth[box], spacing_mm):
            continue
        shell = ndimage.binary_dilation(mask, iterations=2) & ~mask
        if np.count_nonzero(body[box][shell]) <= MIN_SUPPORT * np.count_nonzero(shell) or not _is_enclosed(
            mask, body[box[0], :, box[2]], beyond[box[0], :, box[2]], box[1].start
        ):
            continue
        keep[piece] = True
        largest = max(largest, int(sizes[piece]))
    kept: np.ndarray = keep[pieces]
    return kept


def _is_gas(mask: np.ndarray, smooth: np.ndarray, spacing_mm: tuple[float, float, float]) -> bool:
    """Whether the inside of a piece of air is empty: bowel, stomach. Its outer layer is partial volume."""
    depth = ndimage.distance_transform_edt(np.pad(mask, ((1, 1), (0, 0), (0, 0)), mode="edge"), sampling=spacing_mm)
    depth = depth[1:-1]
    core = depth > min(GAS_RIM_MM, 0.5 * float(depth.max()))
    return float((smooth[core] < GAS_HU).mean()) > GAS_SHARE


def _is_enclosed(mask: np.ndarray, body: np.ndarray, beyond: np.ndarray, start_y: int) -> bool:
    """Whether body lies in front of and behind a piece on most of its columns along y (not so below a patient).

    ``body`` and ``beyond`` span all rows; ``mask`` begins at row ``start_y``. A lung cut by the front of the field of
    view needs no body there; behind it the same would let in the air between patient and table.
    """
    columns: np.ndarray = np.any(mask, axis=1)
    first = start_y + mask.argmax(axis=1)[columns]
    last = start_y + mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)[columns]
    wall = body | beyond
    in_front = (np.any(wall, axis=1)[columns] & (wall.argmax(axis=1)[columns] < first)) | (first == 0)
    back = body.shape[1] - 1 - body[:, ::-1].argmax(axis=1)[columns]
    behind = np.any(body, axis=1)[columns] & (back > last)
    return float((in_front & behind).mean()) > ENCLOSED_SHARE


def _padded(box: tuple[slice, ...], shape: tuple[int, ...], *, by: Sequence[int] = (3, 3, 3)) -> tuple[slice, ...]:
    """A bounding box grown by some voxels along each axis, within the array."""
    return tuple(slice(max(s.start - m, 0), min(s.stop + m, n)) for s, n, m in zip(box, shape, by, strict=True))


def _contact_mm2(sides: np.ndarray, beyond: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    """Area over which the lungs touch the border of the field of view within slices: its faces and the padding."""
    border = ndimage.binary_dilation(beyond, iterations=CONTACT_VOXELS)
    border[:, [0, -1]] = border[:, :, [0, -1]] = True
    # Voxels of a layer, each the face of one voxel; the layer next to padding is several voxels deep.
    deep = np.count_nonzero((sides > 0) & border & ndimage.binary_dilation(beyond, iterations=CONTACT_VOXELS))
    faces = np.count_nonzero((sides > 0) & border) - deep
    return (faces + deep / CONTACT_VOXELS) * spacing_mm[0] * float(np.mean(spacing_mm[1:]))


def usual_warnings(labels: np.ndarray, volume_ml: float, *, one_lung: str) -> list[str]:
    """Reasons to doubt any lung field, in words for the user: volume, one lung only, cut at an end.

    Parameters
    ----------
    labels : uint8 array (Z, Y, X)
        1 left, 2 right, at least one of them.
    volume_ml
        Volume of both.
    one_lung
        What is said if there is only one; ``{}`` is its side.
    """
    found = []
    if volume_ml < SMALL_LITRES * 1000.0:
        found.append(f"small lung volume: {volume_ml:.0f} ml (below {SMALL_LITRES:g} L)")
    if volume_ml > LARGE_LITRES * 1000.0:
        found.append(f"large lung volume: {volume_ml:.0f} ml (above {LARGE_LITRES:g} L)")
    names = {LUNG_LEFT: "left", LUNG_RIGHT: "right"}
    present = [name for side, name in names.items() if (labels == side).any()]
    if len(present) == 1:
        found.append(f"one lung only: {one_lung.format(present[0])}")
    area = np.count_nonzero(labels, axis=(1, 2))
    ends = [name for name, z in (("lowest", 0), ("highest", -1)) if area[z] > TRUNCATED_SHARE * area.max()]
    if ends:
        found.append(f"truncated: the lung is cut at the {' and the '.join(ends)} slice")
    return found


def _warnings(labels: np.ndarray, volume_ml: float, contact_mm2: float) -> tuple[str, ...]:
    """Reasons to doubt the lungs found."""
    found = usual_warnings(labels, volume_ml, one_lung="nothing but the {} lung was found")
    if contact_mm2 > TRUNCATED_MM2:
        found.append(f"truncated: the lung is cut at the side of the field of view, over {contact_mm2 / 100:.0f} cm2")
    return tuple(found)

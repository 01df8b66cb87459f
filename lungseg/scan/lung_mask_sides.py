"""Left and right lung of a mask by position: to name sides that labels leave open, and to check those they name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs import AIR_HU, BODY_HU
from lungseg.scan.lungs_airway import find_airway
from lungseg.scan.lungs_grid import coarsen
from lungseg.scan.lungs_sides import split_sides
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

JUDGED_MM = 2.0
"""Voxel size of the copy on which masks are judged: fine enough for a main bronchus, coarse enough to be quick."""
AGREEING_SHARE = 0.9
"""Share of the rows with both lungs in which the left one lies to the left; it is 1 in every chest of the test data."""
BEYOND_SHARE = 0.15
"""Share of a lung that may reach over the plane between both, at the anterior junction: 0.01-0.03 in the test data."""
SPECK_SHARE = 0.02
"""A lung smaller than this against the other one is a speck of its label: where it lies says nothing about sides."""
NECK_SHARE = 0.5
"""Area of a sagittal cut through a mask, against the larger cuts on both sides, below which two lungs are joined."""
MAX_ROWS = 64
"""Rows looked at along z and along y."""
MIN_ROWS = 8
"""Fewer rows with both lungs say nothing: their centres are compared."""


@dataclass(frozen=True)
class Doubt:
    """Why sides cannot be those of a patient."""

    text: str
    is_sure: bool
    """False: a single lung, whose side may be misjudged where no trachea is seen."""


def sides_by_position(lung: np.ndarray, volume_hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Side labels of a mask that has none.

    Parameters
    ----------
    lung : bool array, shape (Z, Y, X)
        At least one voxel; axes as in ``volume.py``.
    volume_hu : real array, same shape
        The scan: a single lung is named by its position to the trachea, if that is seen.
    spacing_mm : (z, y, x)

    Returns
    -------
    uint8 array, same shape
        1 left, 2 right, 0 outside of ``lung``. Decided on voxels of about 2 mm, by :func:`split_sides`.
    """
    share, coarse_mm = coarsen(lung, spacing_mm, JUDGED_MM)
    coarse = share >= 0.5
    if not coarse.any():
        coarse = share > 0.0  # thinner than a coarse voxel
    hu, _ = coarsen(volume_hu, spacing_mm, JUDGED_MM)
    sides = split_sides(coarse, hu, np.zeros_like(coarse), coarse_mm)
    if len(np.unique(sides)) < 3:  # one lung, or two that the mask joins widely
        neck = _neck(coarse)
        if neck is None:  # only the trachea tells which
            sides = split_sides(coarse, hu, airway_of(hu, coarse_mm), coarse_mm)
        else:
            sides = np.where(coarse, np.where(np.arange(coarse.shape[2]) > neck, LUNG_LEFT, LUNG_RIGHT), 0)
    return np.where(lung, _refined(sides, coarse_mm, lung.shape, spacing_mm), 0).astype(np.uint8)


def airway_of(coarse_hu: np.ndarray, coarse_mm: tuple[float, float, float]) -> np.ndarray:
    """Trachea and main bronchi of a coarse scan, bool; empty if none is seen."""
    solid = coarse_hu > BODY_HU
    pieces, count = ndimage.label(solid)
    if not count:
        return solid
    body = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    inside = np.stack([ndimage.binary_fill_holes(plane) for plane in body])
    return find_airway(coarse_hu, inside & (coarse_hu < AIR_HU), coarse_mm)


def doubt_about(labels: np.ndarray, volume_hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> Doubt | None:
    """Why a mask of left (1) and right (2) lung contradicts the anatomy; None if it does not.

    The patient's left is at larger x. A mask of one side only, but for specks, is compared with what its position says.
    """
    counts = np.bincount(labels.ravel(), minlength=LUNG_RIGHT + 1)
    sides = [side for side in (LUNG_LEFT, LUNG_RIGHT) if counts[side] > SPECK_SHARE * counts[1:].max()]
    if sides == [LUNG_LEFT, LUNG_RIGHT]:
        share, beyond = _beside(labels, spacing_mm)
        if share >= AGREEING_SHARE and beyond <= BEYOND_SHARE:
            return None
        if share <= 1.0 - AGREEING_SHARE:
            return Doubt("the left lung would lie on the patient's right", is_sure=True)
        return Doubt("left and right lung would not lie beside each other", is_sure=True)
    found = np.unique(sides_by_position(labels > 0, volume_hu, spacing_mm)).tolist()[1:]
    if found == sides:
        return None
    names = {LUNG_LEFT: "left", LUNG_RIGHT: "right"}
    only = names[sides[0]]
    if len(found) == 2:
        return Doubt(f"the {only} lung would lie on both sides", is_sure=True)
    return Doubt(f"its only lung would be the {only} one, but lies where the {names[found[0]]} one is", is_sure=False)


def _neck(lung: np.ndarray) -> int | None:
    """Column along x at which a mask is narrow between two thick parts; None if it is one lung."""
    area = np.count_nonzero(lung, axis=(0, 1))
    columns = np.flatnonzero(area)
    quarter = (columns[-1] - columns[0]) // 4
    inner = np.arange(columns[0] + quarter, columns[-1] - quarter + 1)
    neck = int(inner[area[inner].argmin()])
    beside = min(area[:neck].max(initial=0), area[neck + 1 :].max(initial=0))
    return neck if area[neck] < NECK_SHARE * beside else None


def _beside(labels: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[float, float]:
    """How two lungs lie to each other, on up to ``MAX_ROWS`` rows each way.

    Share of the rows along x with both lungs in which the middle of the left one has the larger x, and the larger share
    of a lung that lies beyond the plane halfway between them.
    """
    steps = [max(1, n // MAX_ROWS) for n in labels.shape[:2]]
    rows = labels[:: steps[0], :: steps[1]]
    left, right = ((rows == side) for side in (LUNG_LEFT, LUNG_RIGHT))
    both = left.any(axis=2) & right.any(axis=2)
    columns = np.arange(labels.shape[2])
    if np.count_nonzero(both) >= MIN_ROWS:
        middles = [(part[both] @ columns) / part[both].sum(axis=1) for part in (left, right)]
        share = float((middles[0] > middles[1]).mean())
    else:
        centres = [np.asarray(ndimage.center_of_mass(labels == side)) for side in (LUNG_LEFT, LUNG_RIGHT)]
        shift = (centres[0] - centres[1]) * np.asarray(spacing_mm)
        share = float(shift[2] > 0) if abs(shift[2]) >= max(abs(shift[0]), abs(shift[1])) else 0.5
        middles = [np.asarray(centre[2:]) for centre in centres]
    plane = float((middles[0] + middles[1]).mean()) / 2.0
    over_left = np.count_nonzero(left[..., columns < plane]) / max(int(np.count_nonzero(left)), 1)
    over_right = np.count_nonzero(right[..., columns > plane]) / max(int(np.count_nonzero(right)), 1)
    return share, float(max(over_left, over_right))


def _refined(
    sides: np.ndarray,
    coarse_mm: tuple[float, float, float],
    shape: tuple[int, ...],
    spacing_mm: tuple[float, float, float],
) -> np.ndarray:
    """Side of the nearest coarse lung voxel at every voxel of the scan."""
    nearest = ndimage.distance_transform_edt(
        sides == 0, sampling=coarse_mm, return_distances=False, return_indices=True
    )
    everywhere = sides[tuple(nearest)]
    index = [
        np.minimum(((np.arange(n) + 0.5) * s / c).astype(np.intp), m - 1)
        for n, s, c, m in zip(shape, spacing_mm, coarse_mm, sides.shape, strict=True)
    ]
    refined: np.ndarray = everywhere[np.ix_(*index)]
    return refined

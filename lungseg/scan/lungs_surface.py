"""The surface of the lungs: from voxels of the coarse grid to labels on the grid of the scan.

Each coarse voxel at the surface holds a share of lung, from its HU between that of the lung near by and of soft
tissue; the surface is where the interpolated share is one half. Beside dense lung the voxels of the scan decide as
well: walls of honeycombs at the pleura are thinner than a coarse voxel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_closing import erode
from lungseg.scan.lungs_grid import PADDING_HU, Spacing, axis_weights, padding, spread
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

SIDES = (LUNG_LEFT, LUNG_RIGHT)
LEAST_SHARE = 0.02
SOFT_HU = 180.0
"""Half-width of the ramp by which the border is placed between coarse voxels."""
TISSUE_HU = 40.0
NEAR_BY_MM = 5.0
"""Standard deviation of the neighbourhood whose lung sets the HU of the border."""
SURFACE_WEIGHT = 0.05
"""Weight of surface voxels, which are partial volume, in that neighbourhood: they count where there are no others."""
HALFWAY_RANGE_HU = (-460.0, -150.0)
"""The border lies halfway between soft tissue and the lung near by, within this range; fat is denser."""
DISEASED_HU = -700.0
"""Lung whose denser voxels (mean and one standard deviation) exceed this: one at the surface is as likely disease as
pleura."""
WALL_SD_HU = 120.0
"""Standard deviation of lung on the coarse grid above which it holds walls (honeycombs, reticulation, bands)."""
WALL_HU = -150.0
"""Walls at the pleura count as lung below this, mixed as they are with it; fat is denser."""
NO_LEVEL_HU = -3000.0
"""Below every voxel of a scan."""
NOTCH_VOXELS = 3
"""Notches of the surface narrower than this are filled where there are walls."""
BONE_HU = 150.0
EVERY_NEIGHBOUR = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class Texture:
    """What the lung near each voxel is like; arrays (Z, Y, X) on the coarse grid."""

    dense_hu: np.ndarray
    """float32: mean HU and one standard deviation of the lung near by."""
    has_walls: np.ndarray
    """bool: that lung is a mixture of air and walls."""

    @classmethod
    def of(cls, lung: np.ndarray, hu: np.ndarray, spacing_mm: Spacing, source_mm: Spacing) -> Texture:
        """Texture of a lung (bool); voxels nearer to its surface than one of the scan hardly count."""
        z_mm, y_mm, x_mm = (s / max(s, source) for s, source in zip(spacing_mm, source_mm, strict=True))
        inner = erode(lung, 1.0, (z_mm, y_mm, x_mm))
        weight = np.where(inner, 1.0, np.where(lung, SURFACE_WEIGHT, 0.0)).astype(np.float32)
        sigma = NEAR_BY_MM / np.asarray(spacing_mm)
        amount, mean, square = (
            ndimage.gaussian_filter(a, sigma, truncate=2.0) for a in (weight, hu * weight, hu**2 * weight)
        )
        has_inner = amount > 2.0 * SURFACE_WEIGHT
        amount = np.maximum(amount, 1e-3 * SURFACE_WEIGHT)
        mean /= amount
        deviation = np.sqrt(np.maximum(square / amount - mean**2, 0.0))
        return cls(mean + deviation, has_inner & (ndimage.maximum_filter(deviation, 3) > WALL_SD_HU))


def paint(
    volume_hu: np.ndarray,
    spacing_mm: Spacing,
    coarse_hu: np.ndarray,
    coarse_mm: Spacing,
    sides: np.ndarray,
    filled: np.ndarray,
) -> np.ndarray:
    """Labels of both lungs on the grid of the scan, uint8 (Z, Y, X): 1 left, 2 right.

    Parameters
    ----------
    volume_hu, spacing_mm
        The scan. Its padding is no lung.
    coarse_hu, coarse_mm
        Its coarse copy, float32.
    sides : uint8 array, coarse
        1 left, 2 right; at least one voxel.
    filled : bool array, coarse
        Lung that the threshold did not find.
    """
    box = tuple(
        slice(max(s.start - 2, 0), min(s.stop + 2, n))
        for s, n in zip(ndimage.find_objects((sides > 0).astype(np.uint8))[0], sides.shape, strict=True)
    )
    hu, sides = coarse_hu[box], sides[box]
    share, level = _share(hu, sides, filled[box], coarse_mm, spacing_mm)
    fine, weights = [], []
    for part, n, mm, m, c in zip(box, volume_hu.shape, spacing_mm, coarse_hu.shape, coarse_mm, strict=True):
        low, high = int(part.start * c / mm), min(int(np.ceil(part.stop * c / mm)), n)
        fine.append(slice(low, high))
        # The box holds two voxels around the lungs, so that nothing is cut off with the columns left out.
        weights.append(axis_weights(n, mm, m, c)[low:high, part])
    labels = np.zeros(volume_hu.shape, dtype=np.uint8)
    view, scan = labels[tuple(fine)], volume_hu[tuple(fine)]
    fields = [*(np.where(_nearest(sides, side), share, 0.0) for side in SIDES), level]
    for z, (left, right, wall_hu) in enumerate(zip(*(spread(field, weights) for field in fields), strict=True)):
        amount = left + right
        inside = (amount >= 0.5) | ((amount > 0.0) & (scan[z] < wall_hu))
        if np.any(inside & (scan[z] <= PADDING_HU)):
            inside &= ~padding(volume_hu[fine[0].start + z][None])[0][fine[1], fine[2]]
        view[z] = np.where(inside, np.where(left >= right, LUNG_LEFT, LUNG_RIGHT), 0)
    return labels


def _share(
    hu: np.ndarray, sides: np.ndarray, filled: np.ndarray, spacing_mm: Spacing, source_mm: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    """Lung share of coarse voxels, and the HU below which voxels of the scan are lung beside them (or too low for any).

    At a surface that the threshold found, the share follows the HU (partial volume); at one that was filled it is 0 or
    1. Voxels beside the lung take part only if they are next to threshold lung.
    """
    lung = sides > 0
    near = Texture.of(lung, hu, spacing_mm, source_mm)
    aerated = lung & ~filled
    diseased = near.dense_hu > DISEASED_HU
    halfway = np.clip((near.dense_hu + TISSUE_HU) / 2.0, *HALFWAY_RANGE_HU)
    share = np.clip(0.5 + (halfway - hu) / (2.0 * SOFT_HU), 0.0, 1.0)
    share[aerated & diseased] = np.maximum(share[aerated & diseased], 0.5)
    beside = ndimage.binary_dilation(aerated) & ~lung
    share[beside & ~diseased] = np.minimum(share[beside & ~diseased], 0.49)
    inner = ndimage.binary_erosion(lung, border_value=1)
    full = inner | filled | (aerated & ndimage.binary_dilation(filled))
    share = np.where(full, 1.0, np.where(aerated | beside, share, 0.0))
    closed = ndimage.grey_closing(share, NOTCH_VOXELS)
    share = np.where(near.has_walls & (hu < BONE_HU), closed, share)
    around = ndimage.binary_dilation(lung, EVERY_NEIGHBOUR)
    level = np.where(near.has_walls, WALL_HU, np.where(diseased, halfway, NO_LEVEL_HU))
    level = np.where(around, level, NO_LEVEL_HU)
    share[level > NO_LEVEL_HU] = np.maximum(share[level > NO_LEVEL_HU], LEAST_SHARE)  # tells the side of walls
    return share.astype(np.float32), level.astype(np.float32)


def _nearest(sides: np.ndarray, side: int) -> np.ndarray:
    """Voxels of one lung and the one-voxel border that belongs to no other lung."""
    grown = ndimage.binary_dilation(sides == side, EVERY_NEIGHBOUR)
    mine: np.ndarray = grown & ((sides == 0) | (sides == side))
    return mine

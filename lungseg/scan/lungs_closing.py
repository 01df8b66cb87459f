"""Closing of a lung by a ball, at full and at half resolution of the coarse grid."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_grid import Spacing, axis_weights, spread


def close(mask: np.ndarray, radius_mm: float, spacing_mm: Spacing) -> np.ndarray:
    """Closing by a ball, bool, same shape; the first and last slice count as repeated beyond the scan."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    margins = [int(np.ceil(radius_mm / s)) + 1 for s in spacing_mm]
    part = np.pad(mask[box], [(m, m) for m in margins])
    if box[0].start == 0:
        part[: margins[0]] = part[margins[0]]
    if box[0].stop == mask.shape[0]:
        part[-margins[0] :] = part[-margins[0] - 1]
    grown = ndimage.distance_transform_edt(~part, sampling=spacing_mm) <= radius_mm
    # Beyond the padding everything is grown if the slice is cut there, so pad before shrinking back.
    shrunk = ndimage.distance_transform_edt(grown, sampling=spacing_mm) > radius_mm
    inner = tuple(slice(m, -m) for m in margins)
    closed = mask.copy()
    closed[box] |= shrunk[inner]
    return closed


def distance_from(mask: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
    """Distance of each voxel from the nearest true one in mm; far away if there is none."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    distance: np.ndarray = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    return distance


class HalfGrid:
    """The coarse grid with voxels twice as large, on which large balls are eight times cheaper."""

    def __init__(self, shape: tuple[int, ...], spacing_mm: Spacing) -> None:
        self.shape = [(n + 1) // 2 for n in shape]
        z_mm, y_mm, x_mm = (n * s / m for n, s, m in zip(shape, spacing_mm, self.shape, strict=True))
        self.spacing_mm: Spacing = (z_mm, y_mm, x_mm)
        grids = list(zip(shape, spacing_mm, self.shape, self.spacing_mm, strict=True))
        self._down = [axis_weights(m, c, n, s) for n, s, m, c in grids]
        self._up = [axis_weights(n, s, m, c) for n, s, m, c in grids]

    def down(self, mask: np.ndarray) -> np.ndarray:
        """Voxels at least half of which lie in the mask, bool."""
        return np.stack([plane >= 0.5 for plane in spread(mask, self._down)])

    def up(self, mask: np.ndarray) -> np.ndarray:
        """The mask on the finer grid by linear interpolation, bool."""
        return np.stack([plane > 0.5 for plane in spread(mask, self._up)])

    def close(self, mask: np.ndarray, radius_mm: float) -> np.ndarray:
        """Closing of a mask of the finer grid by a large ball, bool, on the finer grid."""
        half = self.down(mask)
        return self.up(close(half, radius_mm, self.spacing_mm)) if half.any() else mask

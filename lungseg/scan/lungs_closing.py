"""Dilation, erosion and closing of masks by balls given in mm, at full and at half resolution of the coarse grid.

A dilation is a bounded distance transform: squared distances axis by axis, no further than the radius. For the radii of
the lung field that is several times faster than ``scipy.ndimage.distance_transform_edt``, with the same result.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_grid import Spacing, axis_weights


def dilate(mask: np.ndarray, radius_mm: float, spacing_mm: Spacing) -> np.ndarray:
    """Voxels at most ``radius_mm`` from a true one (centre to centre), bool, same shape."""
    result = np.zeros(mask.shape, dtype=bool)
    if not mask.any():
        return result
    reach = [int(radius_mm / s + 1e-6) for s in spacing_mm]
    boxes = (_extent(mask, axis) for axis in range(3))
    box = tuple(
        slice(max(low - r, 0), min(high + r, n)) for (low, high), r, n in zip(boxes, reach, mask.shape, strict=True)
    )
    limit = np.float32((radius_mm * (1.0 + 1e-6)) ** 2)
    z_steps, y_steps = (
        ((np.arange(r + 1) * s) ** 2).astype(np.float32) for r, s in zip(reach[:2], spacing_mm[:2], strict=True)
    )
    near = result[box]
    for z, plane in enumerate(mask[box]):
        if not plane.any():
            continue
        in_plane = _squared_distance(plane, spacing_mm[2], y_steps)
        for step, squared in enumerate(z_steps):
            disc = in_plane <= limit - squared
            for other in {z - step, z + step}:
                if 0 <= other < len(near):
                    near[other] |= disc
    return result


def erode(mask: np.ndarray, radius_mm: float, spacing_mm: Spacing) -> np.ndarray:
    """Voxels further than ``radius_mm`` from every false one, bool; the scan's edge counts as inside."""
    return ~dilate(~mask, radius_mm, spacing_mm)


def close(mask: np.ndarray, radius_mm: float, spacing_mm: Spacing) -> np.ndarray:
    """Closing by a ball, bool, same shape; the first and last slice count as repeated beyond the scan."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    margins = [int(np.ceil(radius_mm / s)) + 1 for s in spacing_mm]
    part = np.pad(mask[box], [(m, m) for m in margins])
    if box[0].start == 0:
        part[: margins[0]] = part[margins[0]]
    if box[0].stop == mask.shape[0]:
        part[-margins[0] :] = part[-margins[0] - 1]
    # Beyond the padding everything is grown if the slice is cut there, so pad before shrinking back.
    shrunk = erode(dilate(part, radius_mm, spacing_mm), radius_mm, spacing_mm)
    inner = tuple(slice(m, -m) for m in margins)
    closed = mask.copy()
    closed[box] |= shrunk[inner]
    return closed


class HalfGrid:
    """The coarse grid with voxels twice as large, on which large balls are many times cheaper."""

    def __init__(self, shape: tuple[int, ...], spacing_mm: Spacing) -> None:
        self.shape = [(n + 1) // 2 for n in shape]
        z_mm, y_mm, x_mm = (n * s / m for n, s, m in zip(shape, spacing_mm, self.shape, strict=True))
        self.spacing_mm: Spacing = (z_mm, y_mm, x_mm)
        grids = list(zip(shape, spacing_mm, self.shape, self.spacing_mm, strict=True))
        self._down = [axis_weights(m, c, n, s).toarray() for n, s, m, c in grids]
        self._up = [axis_weights(n, s, m, c).toarray() for n, s, m, c in grids]

    def down(self, mask: np.ndarray) -> np.ndarray:
        """Voxels at least half of which lie in the mask, bool."""
        result: np.ndarray = _interpolate(mask, self._down) >= 0.5
        return result

    def up(self, mask: np.ndarray) -> np.ndarray:
        """The mask on the finer grid by linear interpolation, bool."""
        result: np.ndarray = _interpolate(mask, self._up) > 0.5
        return result

    def close(self, mask: np.ndarray, radius_mm: float) -> np.ndarray:
        """Closing of a mask of the finer grid by a large ball, bool, on the finer grid."""
        half = self.down(mask)
        return self.up(close(half, radius_mm, self.spacing_mm)) if half.any() else mask

    def dilate(self, mask: np.ndarray, radius_mm: float) -> np.ndarray:
        """Dilation of a mask of the finer grid by a large ball, bool, on the finer grid."""
        return self.up(dilate(self.down(mask), radius_mm, self.spacing_mm))


def _interpolate(mask: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """A mask taken along its three axes by matrices, float32."""
    along_z, along_y, along_x = weights
    values = np.tensordot(along_z, mask.astype(np.float32), axes=1)
    result: np.ndarray = np.matmul(np.matmul(along_y, values), along_x.T)
    return result


def _extent(mask: np.ndarray, axis: int) -> tuple[int, int]:
    """First true index and the one after the last along an axis of a mask that is not empty."""
    others = tuple(a for a in range(mask.ndim) if a != axis)
    found = np.flatnonzero(np.any(mask, axis=others))
    return int(found[0]), int(found[-1]) + 1


def _squared_distance(plane: np.ndarray, x_mm: float, y_steps: np.ndarray) -> np.ndarray:
    """Squared distance in mm2 from the true pixels of a slice, float32 (Y, X).

    ``y_steps`` are the squared distances of 0, 1, ... rows that are looked at.
    """
    columns = np.arange(plane.shape[1], dtype=np.float32)
    left = np.maximum.accumulate(np.where(plane, columns, np.float32(-1e4)), axis=1)
    right = np.minimum.accumulate(np.where(plane, columns, np.float32(2e4))[:, ::-1], axis=1)[:, ::-1]
    row = (np.minimum(columns - left, right - columns) * np.float32(x_mm)) ** 2
    squared = row.copy()
    rows = np.flatnonzero(plane.any(axis=1))
    first, last = int(rows[0]), int(rows[-1]) + 1  # rows with true pixels reach the others
    row = row[first:last]
    shifted = np.empty_like(row)
    for step, more in enumerate(y_steps[1:], start=1):
        np.add(row, more, out=shifted)
        for low in (first - step, first + step):
            begin, end = max(low, 0), min(low + len(row), len(squared))
            if begin < end:
                np.minimum(squared[begin:end], shifted[begin - low : end - low], out=squared[begin:end])
    return squared

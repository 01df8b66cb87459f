"""Between the grid of a scan and the coarse grid on which the lung field is found, one slice at a time.

Both grids share their outer edge. Each axis is a small matrix: area averaging where the new voxels are larger,
linear interpolation where they are smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse

from lungseg.scan.volume import AIR_HU

Spacing = tuple[float, float, float]

MAX_HU = 400.0
"""HU above are cut off: metal must not spread in the averaging."""

PADDING_HU = float(AIR_HU) + 0.5
"""Nothing above counts as padding; averages of padding and anything else lie above."""

IN_PLANE = ndimage.generate_binary_structure(3, 1)
"""The neighbours of a voxel within its slice."""
IN_PLANE[[0, 2]] = False
RIM_VOXELS = 2
"""Coarse voxels of padding along its edge that take the HU of the tissue next to it."""


@dataclass(frozen=True)
class CoarseScan:
    """A scan on the coarse grid, and what was found in it before the lungs are filled. Arrays (Z, Y, X)."""

    hu: np.ndarray
    """float32."""
    smooth: np.ndarray
    """float32: ``hu`` lightly smoothed."""
    inside_air: np.ndarray
    """bool: air and aerated lung within the body."""
    outside: np.ndarray
    """bool: air around the body, and padding."""
    airway: np.ndarray
    """bool: trachea and main bronchi with their wall."""
    spacing_mm: Spacing
    slice_mm: float
    """Slice distance of the scan itself: blurs surfaces that are not upright."""
    size: float = 1.0
    """Of the chest, 1 for an adult."""

    @property
    def adult_mm(self) -> Spacing:
        """Voxel size were the chest that of an adult, for whom anatomical lengths are stated."""
        z_mm, y_mm, x_mm = self.spacing_mm
        return z_mm / self.size, y_mm / self.size, x_mm / self.size


def axis_weights(new: int, new_mm: float, old: int, old_mm: float) -> sparse.csr_matrix:
    """Matrix (new, old) that takes values on one axis to another voxel size; every row sums to 1.

    Voxels beyond the old axis repeat its end.
    """
    rows, columns, values = [], [], []
    for i in range(new):
        if new_mm <= old_mm:
            position = float(np.clip((i + 0.5) * new_mm / old_mm - 0.5, 0.0, old - 1.0))
            first = min(int(position), max(old - 2, 0))
            parts = [(first, 1.0 - (position - first)), (first + 1, position - first)] if old > 1 else [(0, 1.0)]
        else:
            low, high = i * new_mm / old_mm, (i + 1) * new_mm / old_mm
            first = min(int(low), old - 1)
            last = min(int(np.ceil(high - 1e-9)), old)
            overlap = [max(min(high, j + 1.0) - max(low, float(j)), 1e-9) for j in range(first, max(last, first + 1))]
            parts = [(first + k, share / sum(overlap)) for k, share in enumerate(overlap)]
        for column, value in parts:
            rows.append(i)
            columns.append(column)
            values.append(value)
    return sparse.csr_matrix((np.asarray(values, dtype=np.float32), (rows, columns)), shape=(new, old))


def coarsen(
    volume_hu: np.ndarray, spacing_mm: tuple[float, float, float], target_mm: float
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Copy of a scan with voxels of about ``target_mm``, HU cut to -1024...400, float32.

    Thick slices are interpolated to about ``target_mm`` as well. Returns the array and its exact voxel size, by
    which it covers the same extent.
    """
    shape = [max(1, round(n * s / target_mm)) for n, s in zip(volume_hu.shape, spacing_mm, strict=True)]
    coarse_mm = tuple(n * s / m for n, s, m in zip(volume_hu.shape, spacing_mm, shape, strict=True))
    along_z, along_y, along_x = (
        axis_weights(m, c, n, s) for m, c, n, s in zip(shape, coarse_mm, volume_hu.shape, spacing_mm, strict=True)
    )
    planes = np.empty((volume_hu.shape[0], shape[1] * shape[2]), dtype=np.float32)
    for z, plane in enumerate(volume_hu):
        clean = np.nan_to_num(plane.astype(np.float32), nan=float(AIR_HU))
        clean = np.clip(clean, float(AIR_HU), MAX_HU)
        planes[z] = ((along_y @ clean) @ along_x.T).ravel()
    coarse = (along_z @ planes).reshape(shape)
    return coarse, coarse_mm


def spread(coarse: np.ndarray, weights: Sequence[sparse.csr_matrix]) -> Iterator[np.ndarray]:
    """Slices (Y, X), float32, of a coarse field on the grid of the scan, lowest first."""
    along_z, along_y, along_x = weights
    flat = coarse.reshape(coarse.shape[0], -1).astype(np.float32, copy=False)
    for z in range(along_z.shape[0]):
        plane = np.asarray(along_z[[z]] @ flat).reshape(coarse.shape[1:])
        yield (along_y @ plane) @ along_x.T


def padding(volume_hu: np.ndarray) -> np.ndarray:
    """Voxels outside the field of view, bool, same shape: as low as a scan goes and connected to the slice's border.

    For padding that a reader has set to -1024 HU. Air that a scanner clips to that value cannot be told from it; holes
    of -1024 HU within the body are none.
    """
    low = volume_hu <= PADDING_HU
    pieces, _ = ndimage.label(low, IN_PLANE)
    ids = np.unique(np.concatenate([pieces[:, [0, -1]].ravel(), pieces[:, :, [0, -1]].ravel()]))
    if not ids[ids > 0].size:
        return low & False
    is_padding = np.zeros(int(pieces.max()) + 1, dtype=bool)
    is_padding[ids[ids > 0]] = True
    result: np.ndarray = is_padding[pieces]
    return result


def without_rim(hu: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Copy of a coarse scan in which voxels on both sides of the edge of the padding take the HU of the tissue near by.

    Their own are a mixture of tissue and padding, which looks like lung. ``beyond``: padding of the coarse scan.
    """
    mixed = ndimage.binary_dilation(beyond, IN_PLANE)
    rim = mixed & ~ndimage.binary_erosion(beyond, IN_PLANE, iterations=RIM_VOXELS, border_value=1)
    sigma = (0.0, float(RIM_VOXELS), float(RIM_VOXELS))
    amount = ndimage.gaussian_filter((~mixed).astype(np.float32), sigma, truncate=2.0)
    tissue = ndimage.gaussian_filter(np.where(mixed, 0.0, hu).astype(np.float32), sigma, truncate=2.0)
    filled: np.ndarray = np.where(rim & (amount > 1e-3), tissue / np.maximum(amount, 1e-3), hu)
    return filled

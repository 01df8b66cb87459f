"""Smooth random fields of the digital phantom, for shapes and textures, on (z, y, x) grids."""

from __future__ import annotations

import numpy as np
from scipy import sparse

_CUBIC_SPLINE_VARIANCE = 0.4794
"""Mean over positions of the sum of squared cubic B-spline weights: the variance left per axis by the smoothing."""


def smooth_noise(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], *, knot_mm: float, rng: np.random.Generator
) -> np.ndarray:
    """Smooth Gaussian noise: white noise on a lattice of knots, joined by cubic B-splines.

    Parameters
    ----------
    shape, spacing_mm
        Grid (z, y, x) in voxels and mm.
    knot_mm
        Distance of the knots; blobs of the field are about 1.5 knots wide.
    rng
        Source of the knots; the number of draws depends on the extent and ``knot_mm`` only.

    Returns
    -------
    float32 array of ``shape``, mean 0, standard deviation 1 (up to sampling).
    """
    num_knots = tuple(knot_count(n, s, knot_mm) for n, s in zip(shape, spacing_mm, strict=True))
    field = spread_knots(rng.standard_normal(num_knots, dtype=np.float32), shape, spacing_mm, knot_mm=knot_mm)
    field /= np.float32(_CUBIC_SPLINE_VARIANCE**1.5)
    return field


def knot_count(num_voxels: int, spacing_mm: float, knot_mm: float) -> int:
    """Knots along one axis that cover a grid; knot ``k`` lies ``(k - 1) * knot_mm`` from the outer edge of voxel 0."""
    return int(np.ceil(num_voxels * spacing_mm / knot_mm)) + 3


def spread_knots(
    knots: np.ndarray, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], *, knot_mm: float
) -> np.ndarray:
    """Cubic B-spline field of a lattice of knots (see :func:`knot_count`) on a grid; float32 array of ``shape``."""
    along_z, along_y, along_x = (_spline_basis(n, s, knot_mm) for n, s in zip(shape, spacing_mm, strict=True))
    num_z, num_y, num_x = knots.shape
    # Sparse products use no BLAS: the same bits for any number of threads, and no slow-down on shared cores.
    field = along_x @ knots.reshape(-1, num_x).T  # (X, kz ky)
    field = field.reshape(-1, num_z, num_y).transpose(2, 1, 0).reshape(num_y, -1)
    field = along_y @ field  # (Y, kz X)
    field = field.reshape(shape[1], num_z, shape[2]).transpose(1, 0, 2).reshape(num_z, -1)
    smooth: np.ndarray = (along_z @ field).reshape(shape)
    return smooth


def _spline_basis(num_voxels: int, spacing_mm: float, knot_mm: float) -> sparse.csr_matrix:
    """Cubic B-spline weights of every voxel centre, sparse (num_voxels, num_knots), float32."""
    position = (np.arange(num_voxels) + 0.5) * spacing_mm / knot_mm
    num_knots = knot_count(num_voxels, spacing_mm, knot_mm)
    distance = np.abs(position[:, None] + 1.0 - np.arange(num_knots)[None, :])
    inner = 2.0 / 3.0 - distance**2 + distance**3 / 2.0
    outer = (2.0 - distance) ** 3 / 6.0
    weights = np.where(distance < 1.0, inner, np.where(distance < 2.0, outer, 0.0))
    return sparse.csr_matrix(weights.astype(np.float32))

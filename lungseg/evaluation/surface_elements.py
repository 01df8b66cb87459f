"""Elements of a mask's surface and their areas: what area-weighted surface figures are made of.

The surface runs between voxel centres: every corner where 2x2x2 voxels meet (2x2 in a slice) that sees both inside and
outside holds one element, whose area is that of the marching-cubes triangles there. Arrays are ``(z, y, x)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np

from lungseg.evaluation.distances import nonzero, slabs

CORNERS_OF_CUBE = 8
"""Voxels that meet in a corner of a volume; bit i of an element's code is the voxel at the i-th of ``_offsets(3)``."""
HALF_OF_CORNERS = 4
"""Above it the element of the complement is taken: inside and outside are told apart by area alone."""


def surface_elements(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a mask has surface elements, and of which kind they are.

    Parameters
    ----------
    mask : bool array with 2 or 3 axes
        What lies beyond the array is background.

    Returns
    -------
    corners : bool array, one longer than the mask along each axis
        Corner ``i`` lies between voxels ``i - 1`` and ``i``: half a voxel before voxel ``i``.
    codes : uint8 array, shape (number of true corners,)
        Kind of each element, in the order of ``numpy.nonzero(corners)``: index into ``element_areas``.
    """
    padded = np.pad(mask, 1)
    corners = np.empty([n + 1 for n in mask.shape], dtype=bool)
    for slab in slabs(corners.shape):
        some = every = padded[slab.start : slab.stop + 1]
        for axis in range(mask.ndim):
            lower = (slice(None),) * axis + (slice(None, -1),)
            upper = (slice(None),) * axis + (slice(1, None),)
            some, every = some[lower] | some[upper], every[lower] & every[upper]
        np.greater(some, every, out=corners[slab])
    here = np.ravel_multi_index(nonzero(corners), padded.shape)
    voxels = padded.reshape(-1).view(np.uint8)
    codes = np.zeros(here.size, dtype=np.uint8)
    for bit, offset in enumerate(_offsets(mask.ndim)):
        step = int(np.ravel_multi_index(offset, padded.shape))
        codes |= voxels.take(here + step) << np.uint8(bit)
    return corners, codes


def element_areas(spacing_mm: Sequence[float]) -> np.ndarray:
    """Area of every kind of surface element, or its length in a slice.

    Parameters
    ----------
    spacing_mm : sequence of 2 or 3 floats
        Distance of voxel centres in mm, in the order of the mask's axes.

    Returns
    -------
    float64 array, shape (256,) in mm² or (16,) in mm
        0 for the codes without a surface: all voxels outside, or all inside.

    Source
    ------
    Lorensen and Cline, SIGGRAPH 1987: marching cubes at half height, complements share their triangles. Area weights:
    Nikolov et al., arXiv 1809.04430; equal to the package surface-distance for every code.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.size == 2:
        return _contour_lengths(spacing)
    # An area vector has the spacings of the other two axes in each component.
    scale = spacing.prod() / spacing
    return np.array([np.linalg.norm(vectors * scale, axis=1).sum() for vectors in _area_vectors()])


def _offsets(ndim: int) -> list[tuple[int, ...]]:
    """Position of the voxels around a corner, in the order of the bits of a code."""
    return list(product((0, 1), repeat=ndim))


@lru_cache(maxsize=1)
def _area_vectors() -> tuple[np.ndarray, ...]:
    """Area vectors of the triangles of each of the 256 kinds of element, for voxels of edge 1: (triangles, 3) each."""
    from skimage.measure import marching_cubes

    vectors = [np.zeros((0, 3))]
    for code in range(1, 255):
        inside = np.array([code >> bit & 1 for bit in range(CORNERS_OF_CUBE)])
        if inside.sum() > HALF_OF_CORNERS:
            inside = 1 - inside
        cube = inside.reshape(2, 2, 2).astype(np.float32)
        vertices, faces, _, _ = marching_cubes(cube, 0.5, method="lorensen")
        first, second, third = np.moveaxis(vertices.astype(np.float64)[faces], 1, 0)
        vectors.append(0.5 * np.cross(second - first, third - first))
    return (*vectors, np.zeros((0, 3)))


def _contour_lengths(spacing: np.ndarray) -> np.ndarray:
    """Length in mm of the contour through each of the 16 kinds of 2x2 pixels."""
    diagonal = float(np.hypot(*spacing))
    lengths = np.zeros(16)
    for code in range(1, 15):
        inside = np.array([code >> bit & 1 for bit in range(4)]).reshape(2, 2)
        if inside.sum() != 2:
            lengths[code] = diagonal / 2  # one corner is cut off
        elif inside[0, 0] == inside[1, 1]:
            lengths[code] = diagonal  # two opposite corners are cut off
        else:
            lengths[code] = spacing[1] if inside[0, 0] == inside[0, 1] else spacing[0]
    return lengths

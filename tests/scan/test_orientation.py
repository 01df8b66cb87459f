"""Canonical reorientation: all 48 orientations, oblique grids, rounding and shear."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from lungseg.errors import InputError
from lungseg.scan.orientation import orthonormal_direction, to_canonical, to_stored
from lungseg.scan.volume import IDENTITY, Geometry

ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]
SPACING, ORIGIN = (2.5, 0.8, 0.7), (-310.0, 12.5, -40.25)


def rows(matrix: np.ndarray) -> tuple:
    return tuple(map(tuple, matrix.tolist()))


@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (9.0, -14.0, 21.0)])
@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_every_orientation_becomes_the_same_volume(axes, flips, tilt) -> None:
    truth = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    base = Geometry(truth.shape, SPACING, ORIGIN, rows(Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()))
    # the file's array: canonical axes flipped, then stored in the order `axes` takes back
    stored, grid = to_stored(truth, base, stored_axes=axes, stored_flips=flips)
    volume = to_canonical(stored, grid)
    assert volume.stored_axes == axes
    assert volume.stored_flips == flips
    assert np.array_equal(volume.array, truth)
    assert volume.array.flags.c_contiguous
    assert volume.geometry.is_close(base, tolerance_voxels=1e-9)
    again, grid_again = to_stored(
        volume.array, volume.geometry, stored_axes=volume.stored_axes, stored_flips=volume.stored_flips
    )
    assert np.array_equal(again, stored)
    assert grid_again.is_close(grid, tolerance_voxels=1e-9)


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_each_voxel_keeps_its_world_position(axes, flips) -> None:
    """Independent of to_stored: the position of one marked voxel before and after."""
    shape = (3, 4, 5)
    direction = np.zeros((3, 3))
    direction[list(axes), range(3)] = np.where(flips, -1.0, 1.0)
    grid = Geometry(shape, SPACING, ORIGIN, rows(direction))
    array = np.zeros(shape, np.uint8)
    array[0, 3, 1] = 1
    volume = to_canonical(array, grid)
    where = np.argwhere(volume.array)[0]
    assert np.allclose(volume.geometry.to_world(where), grid.to_world((0, 3, 1)))
    assert volume.geometry.direction == IDENTITY


def test_axial_input_is_not_copied() -> None:
    array = np.zeros((3, 4, 5), np.int16)
    assert np.shares_memory(to_canonical(array, Geometry(array.shape, SPACING)).array, array)


def test_rounded_cosines_are_repaired_and_exact_ones_kept() -> None:
    assert orthonormal_direction(np.eye(3), name="x") == IDENTITY
    rounded = np.round(Rotation.from_euler("xyz", (10, 20, 30), degrees=True).as_matrix(), 4)
    matrix = np.asarray(orthonormal_direction(rounded, name="x"))
    assert np.abs(matrix.T @ matrix - np.eye(3)).max() < 1e-12
    assert np.abs(matrix - rounded).max() < 1e-4


@pytest.mark.parametrize("bad", [0.002, 0.3, np.nan])
def test_shear_is_refused(bad: float) -> None:
    matrix = np.eye(3)
    matrix[0, 1] = bad
    with pytest.raises(InputError, match=r"scan\.nii.*right angles.*fslorient"):
        orthonormal_direction(matrix, name="scan.nii")


def test_wrong_axes_are_refused() -> None:
    with pytest.raises(InputError, match="no permutation"):
        to_stored(np.zeros((2, 2, 2)), Geometry((2, 2, 2), SPACING), stored_axes=(0, 0, 1), stored_flips=(False,) * 3)

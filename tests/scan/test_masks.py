"""Masks on the grid of their scan, in any axis order, and label maps that hold only what is allowed."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from lungseg.errors import InputError
from lungseg.scan.masks import check_labels, describe, onto_grid
from lungseg.scan.orientation import to_stored
from lungseg.scan.volume import Geometry, Volume

ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]
TILT = Rotation.from_euler("xyz", (4.0, -3.0, 10.0), degrees=True).as_matrix()
GRID = Geometry((6, 7, 8), (2.5, 0.8, 0.7), (-310.0, 12.5, -40.25), tuple(map(tuple, TILT.tolist())))


def labels(shape: tuple[int, ...] = GRID.shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)


def moved(origin_voxels: tuple[float, float, float], spacing: float = 1.0) -> Geometry:
    origin = tuple(float(v) for v in GRID.to_world(origin_voxels))
    return Geometry(GRID.shape, tuple(spacing * s for s in GRID.spacing_mm), origin, GRID.direction)


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_row_33_axes_in_any_order_are_the_same_grid(axes, flips) -> None:
    truth = labels()
    stored, grid = to_stored(truth, GRID, stored_axes=axes, stored_flips=flips)
    out = onto_grid(Volume(stored, grid), GRID, allow_resample=False, name="m.nii")
    assert np.array_equal(out, truth)
    assert out.dtype == np.uint8


@pytest.mark.parametrize("origin", [(0.0, 0.0, 0.02), (0.02, 0.03, 0.0)])
def test_row_33_within_a_tenth_of_a_voxel_it_is_the_same_grid(origin) -> None:
    out = onto_grid(Volume(labels(), moved(origin)), GRID, allow_resample=False, name="m.nii")
    assert np.array_equal(out, labels())


@pytest.mark.parametrize(
    "grid",
    [
        moved((0.0, 0.0, 0.2)),
        moved((0.0, 0.0, 0.0), spacing=1.1),
        GRID.crop((1, 0, 0), (6, 7, 8)),
        Geometry(GRID.shape, GRID.spacing_mm, GRID.origin_mm),
    ],
    ids=["shifted", "other spacing", "cropped", "other direction"],
)
def test_row_33_another_grid_is_refused_with_both_geometries(grid: Geometry) -> None:
    mask = Volume(labels(grid.shape), grid)
    with pytest.raises(InputError, match="--resample-masks") as caught:
        onto_grid(mask, GRID, allow_resample=False, name="m.nii")
    message = str(caught.value)
    assert message.startswith("m.nii: the mask lies on another grid")
    assert f"mask: {describe(grid)}" in message
    assert f"scan: {describe(GRID)}" in message
    for word in (
        "6 x 7 x 8 voxels",
        "spacing 2.5 x 0.8 x 0.7 mm",
        "origin (S, P, L) -310.000, 12.500, -40.250 mm",
        "direction [",
    ):
        assert word in message
    out = onto_grid(mask, GRID, allow_resample=True, name="m.nii")
    assert out.shape == GRID.shape
    assert set(np.unique(out)) <= {0, 1, 2, 3}


def test_row_33_a_cropped_mask_is_placed_exactly_with_the_flag() -> None:
    part = GRID.crop((1, 2, 3), (5, 6, 8))
    out = onto_grid(Volume(labels(part.shape), part), GRID, allow_resample=True, name="m.nii")
    assert np.array_equal(out[1:5, 2:6, 3:8], labels(part.shape))
    out[1:5, 2:6, 3:8] = 0
    assert not out.any()


def test_row_33_a_mask_of_another_place_is_refused_even_with_the_flag() -> None:
    with pytest.raises(InputError, match="no labelled voxel of the mask lies in its scan"):
        onto_grid(Volume(labels(), moved((500.0, 0.0, 0.0))), GRID, allow_resample=True, name="m.nii")


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
def test_row_35_empty_and_one_voxel_masks(allow: bool, dtype) -> None:
    mask = np.zeros(GRID.shape, dtype)
    far = moved((500.0, 0.0, 0.0))
    assert not onto_grid(Volume(mask, GRID), GRID, allow_resample=allow, name="m.nii").any()
    if allow:
        assert not onto_grid(Volume(mask, far), GRID, allow_resample=True, name="m.nii").any()
    assert check_labels(mask, (1, 2), "m.nii") == {}
    mask[1, 2, 3] = 1
    out = onto_grid(Volume(mask, GRID), GRID, allow_resample=allow, name="m.nii")
    assert np.argwhere(out).tolist() == [[1, 2, 3]]
    assert check_labels(out, (1, 2), "m.nii") == {1: 1}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_row_34_unexpected_labels_are_listed(dtype) -> None:
    mask = labels().astype(dtype)
    counts = check_labels(mask, (1, 2, 3), "m.nii")
    assert list(counts) == [1, 2, 3]
    assert sum(counts.values()) == np.count_nonzero(mask)
    mask[0, 0, :3] = 77
    mask[0, 1, 0] = 90
    with pytest.raises(
        InputError, match=r"m\.nii: unexpected labels 77 \(3 voxels\), 90 \(1 voxels\); allowed are 0, 1, 2, 3"
    ):
        check_labels(mask, (1, 2, 3), "m.nii")
    with pytest.raises(InputError, match="and 190 more"):
        check_labels(np.arange(204).astype(dtype), (1, 2, 3), "m.nii")


def test_row_34_fractions_are_refused() -> None:
    with pytest.raises(InputError, match=r"unexpected labels 0\.5 \(1 voxels\)"):
        check_labels(np.array([0.0, 1.0, 0.5]), (1,), "m.nii")

"""HD95 by hand, against MONAI and against surface-distance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from lungseg.errors import InputError
from lungseg.evaluation.surface import (
    border_voxels,
    bounding_box,
    directed_distances_mm,
    hd95_mm,
    lung_box_diagonal_mm,
)


def blob(rng: np.random.Generator, shape: tuple[int, int, int], share: float) -> np.ndarray:
    """Smooth random shape that fills about ``share`` of the volume; may touch its edges and have several parts."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(0.5, 3.0))
    return field > np.quantile(field, 1.0 - share)


@pytest.fixture(scope="module")
def monai_hd95():
    """MONAI's HD95 of two masks; it wants all elements of the spacing to be of one type."""
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")

    def hd95(prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
        tensors = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (prediction, reference)]
        value = metrics.compute_hausdorff_distance(
            *tensors, include_background=True, percentile=95, spacing=[float(step) for step in spacing_mm]
        )
        return float(value)

    return hd95


def sphere(shape: tuple[int, int, int], centre: tuple[float, ...], radius: float, spacing: tuple[float, ...]):
    axes = np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) <= radius**2


@pytest.mark.parametrize(("offset", "wanted"), [((0, 0, 2), 2 * 0.7), ((3, 0, 0), 3 * 2.5), ((2, 3, 0), None)])
def test_two_single_voxels_lie_their_physical_distance_apart(offset, wanted):
    spacing = (2.5, 0.8, 0.7)
    masks = np.zeros((2, 6, 6, 6), dtype=bool)
    masks[0, 1, 1, 1] = True
    masks[1, 1 + offset[0], 1 + offset[1], 1 + offset[2]] = True
    expected = wanted if wanted is not None else math.hypot(2 * 2.5, 3 * 0.8)
    assert hd95_mm(masks[0], masks[1], spacing_mm=spacing) == pytest.approx(expected, abs=1e-12)


def test_a_cube_shifted_by_two_voxels():
    reference = np.zeros((20, 20, 20), dtype=bool)
    reference[5:15, 5:15, 5:15] = True
    prediction = np.roll(reference, 2, axis=2)
    # Of the 488 border voxels the leading face (100 voxels, 20 %) lies 2 voxels off: the 95th percentile is there.
    assert hd95_mm(prediction, reference, spacing_mm=(1, 1, 0.75)) == pytest.approx(1.5)
    assert hd95_mm(reference, reference, spacing_mm=(1, 1, 0.75)) == 0.0


def test_the_percentile_interpolates_between_the_sorted_distances():
    # 10 voxels in a row against the first of them: distances 0..9 mm, 95th percentile 8.55; the other way 0.
    prediction = np.zeros((1, 1, 10), dtype=bool)
    prediction[:] = True
    reference = np.zeros_like(prediction)
    reference[0, 0, 0] = True
    assert hd95_mm(prediction, reference, spacing_mm=(1, 1, 1)) == pytest.approx(8.55)
    assert hd95_mm(reference, prediction, spacing_mm=(1, 1, 1)) == pytest.approx(8.55)


@pytest.mark.parametrize("filled", [(False, False), (True, False), (False, True)])
def test_empty_masks_give_nan(filled):
    masks = [np.full((3, 4, 5), value) for value in filled]
    assert math.isnan(hd95_mm(*masks, spacing_mm=(1, 1, 1)))


def test_equals_monai_on_random_pairs(monai_hd95):
    rng = np.random.default_rng(7)
    checked = 0
    for _ in range(60):
        shape = tuple(int(n) for n in rng.integers(1, 26, size=3))
        spacing = tuple(float(s) for s in rng.uniform(0.4, 5.0, size=3))
        pair = [blob(rng, shape, rng.uniform(0.02, 0.6)) for _ in range(2)]
        ours = hd95_mm(*pair, spacing_mm=spacing)
        if not (pair[0].any() and pair[1].any()):
            assert math.isnan(ours)
            continue
        theirs = monai_hd95(*pair, spacing)
        assert abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs)), (shape, spacing, ours, theirs)
        checked += 1
    assert checked > 50


def test_equals_monai_for_far_apart_and_touching_the_volume_edge(monai_hd95):
    masks = np.zeros((2, 12, 30, 30), dtype=bool)
    masks[0, :3, :4, :5] = True
    masks[1, 9:, 22:, 27:] = True
    ours = hd95_mm(masks[0], masks[1], spacing_mm=(3.0, 0.7, 0.7))
    assert ours == pytest.approx(monai_hd95(masks[0], masks[1], (3.0, 0.7, 0.7)), rel=1e-5)


@pytest.mark.parametrize(
    ("spacing", "shift_mm"),
    [((1.0, 1.0, 1.0), (0, 0, 4.0)), ((1.25, 0.7, 0.7), (5.0, 0, 0)), ((2.5, 0.7, 0.7), (0, 3.5, 0))],
)
def test_near_surface_distance_and_the_analytic_value(spacing, shift_mm):
    """The area-weighted definition reads up to about one voxel lower (DEPENDENCIES 8)."""
    oracle = pytest.importorskip("surface_distance")
    shape = tuple(round(44 / step) for step in spacing)
    centre = (18.0, 18.0, 18.0)
    reference = sphere(shape, centre, 12.0, spacing)
    prediction = sphere(shape, tuple(c + s for c, s in zip(centre, shift_mm, strict=True)), 12.0, spacing)
    surfaces = oracle.compute_surface_distances(reference, prediction, spacing)
    theirs = float(oracle.compute_robust_hausdorff(surfaces, 95))
    ours = hd95_mm(prediction, reference, spacing_mm=spacing)
    assert abs(ours - theirs) <= max(spacing)
    # The distance of a small shift d is about d·|cos θ|, and 5 % of a sphere's surface has |cos θ| > 0.95.
    assert abs(ours - 0.95 * math.hypot(*shift_mm)) <= max(spacing)


def test_symmetric_and_independent_of_the_surrounding_volume():
    rng = np.random.default_rng(3)
    first, second = blob(rng, (14, 18, 16), 0.2), blob(rng, (14, 18, 16), 0.3)
    value = hd95_mm(first, second, spacing_mm=(2.0, 0.9, 0.8))
    assert hd95_mm(second, first, spacing_mm=(2.0, 0.9, 0.8)) == value
    padded = [np.pad(mask, ((2, 5), (7, 1), (3, 3))) for mask in (first, second)]
    assert hd95_mm(*padded, spacing_mm=(2.0, 0.9, 0.8)) == value
    turned = [mask.transpose(2, 0, 1)[:, ::-1] for mask in (first, second)]
    assert hd95_mm(*turned, spacing_mm=(0.8, 2.0, 0.9)) == pytest.approx(value, abs=1e-12)
    scaled = hd95_mm(first, second, spacing_mm=(4.0, 1.8, 1.6))
    assert scaled == pytest.approx(2 * value, abs=1e-9)


def test_border_is_the_mask_minus_its_erosion():
    rng = np.random.default_rng(5)
    for shape in ((7, 8, 9), (1, 6, 6), (2, 2, 12)):
        mask = blob(rng, shape, 0.7)
        assert np.array_equal(border_voxels(mask), mask & ~ndimage.binary_erosion(mask))
    solid = np.ones((4, 5, 6), dtype=bool)
    assert np.count_nonzero(border_voxels(solid)) == 4 * 5 * 6 - 2 * 3 * 4
    assert solid.all(), "the mask itself must stay as it is"


def test_directed_distances_equal_brute_force():
    rng = np.random.default_rng(11)
    first, second = (border_voxels(blob(rng, (8, 9, 10), 0.2)) for _ in range(2))
    spacing = np.array([2.0, 0.5, 0.9])
    here, there = np.argwhere(first) * spacing, np.argwhere(second) * spacing
    brute = np.sqrt(((here[:, None] - there[None]) ** 2).sum(axis=2)).min(axis=1)
    np.testing.assert_allclose(directed_distances_mm(first, second, spacing_mm=spacing), brute, atol=1e-12)


def test_lung_box_diagonal():
    lungs = np.zeros((10, 10, 10), dtype=np.uint8)
    lungs[2, 3, 4], lungs[4, 6, 4] = 1, 2
    assert lung_box_diagonal_mm(lungs, (2.0, 1.0, 12.0)) == pytest.approx(math.sqrt(6**2 + 4**2 + 12**2))
    assert math.isnan(lung_box_diagonal_mm(np.zeros_like(lungs), (1, 1, 1)))


def test_bounding_box():
    mask = np.zeros((5, 6, 7), dtype=bool)
    assert bounding_box(mask) is None
    mask[1:3, 5, 0] = True
    assert bounding_box(mask) == (slice(1, 3), slice(5, 6), slice(0, 1))


@pytest.mark.parametrize(
    ("prediction", "reference", "spacing", "phrase"),
    [
        (np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), (1, 1, 1), "different grids"),
        (np.ones((2, 2, 2), np.uint8), np.ones((2, 2, 2), bool), (1, 1, 1), "bool mask, not uint8"),
        (np.ones((2, 2, 2), bool), np.ones((2, 2, 2), bool), (1, 0, 1), "strictly positive"),
        (np.ones((2, 2, 2), bool), np.ones((2, 2, 2), bool), (1, float("nan"), 1), "strictly positive"),
        (np.ones((2, 2, 2), bool), np.ones((2, 2, 2), bool), (1, 1), "3 strictly positive"),
    ],
)
def test_bad_input_is_named(prediction, reference, spacing, phrase):
    with pytest.raises(InputError, match=phrase):
        hd95_mm(prediction, reference, spacing_mm=spacing)

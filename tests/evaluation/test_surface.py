"""Surface figures by hand, and against MONAI, surface-distance and medpy's published definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from lungseg.errors import InputError
from lungseg.evaluation import distances
from lungseg.evaluation.surface import (
    HD95_DEFINITIONS,
    border_voxels,
    bounding_box,
    hd95_mm,
    lung_box_diagonal_mm,
    surface_dice_definition,
    surface_figures,
)

NUM_RANDOM_PAIRS = 100


def blob(rng: np.random.Generator, shape: tuple[int, int, int], share: float) -> np.ndarray:
    """Smooth random shape that fills about ``share`` of the volume; may touch its edges and have several parts."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(0.5, 3.0))
    return field > np.quantile(field, 1.0 - share)


Pair = tuple[np.ndarray, np.ndarray, tuple[float, ...]]


@pytest.fixture(scope="module")
def random_pairs() -> list[Pair]:
    """Pairs of masks, neither empty, with their spacing: volumes from one voxel on, flat ones, isotropic or not."""
    rng = np.random.default_rng(7)
    pairs: list[Pair] = []
    while len(pairs) < NUM_RANDOM_PAIRS:
        shape = tuple(int(n) for n in rng.integers(1, 26, size=3))
        spacing = tuple(float(s) for s in rng.uniform(0.4, 5.0, size=3))
        first, second = (blob(rng, shape, rng.uniform(0.02, 0.6)) for _ in range(2))
        if first.any() and second.any():
            pairs.append((first, second, spacing))
    return pairs


def assert_close(ours: float, theirs: float, pair: Pair) -> None:
    """The bar of the issue."""
    assert abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs)), (pair[0].shape, pair[2], ours, theirs)


@pytest.fixture(scope="module")
def monai():
    """MONAI's HD95 and ASSD of two masks; it wants all elements of the spacing to be of one type."""
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")

    def figures(prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, ...]) -> tuple[float, float]:
        tensors = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (prediction, reference)]
        options = {"include_background": True, "spacing": [float(step) for step in spacing_mm]}
        hd95 = metrics.compute_hausdorff_distance(*tensors, percentile=95, **options)
        return float(hd95), float(metrics.compute_average_surface_distance(*tensors, symmetric=True, **options))

    return figures


@pytest.fixture(scope="module")
def surface_distance():
    """surface-distance's HD95 and surface Dice; its release fails on empty masks, which are not given to it."""
    package = pytest.importorskip("surface_distance")

    def figures(prediction: np.ndarray, reference: np.ndarray, spacing_mm, tolerance_mm: float) -> tuple[float, float]:
        found = package.compute_surface_distances(reference, prediction, spacing_mm)
        return (
            float(package.compute_robust_hausdorff(found, 95)),
            float(package.compute_surface_dice_at_tolerance(found, tolerance_mm)),
        )

    return figures


def medpy_hd95(prediction: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    """Published definition of medpy's hd95: both directions' distances between the borders in one percentile."""
    borders = [mask & ~ndimage.binary_erosion(mask) for mask in (prediction, reference)]
    distances = [ndimage.distance_transform_edt(~border, sampling=spacing_mm) for border in borders]
    return float(np.percentile(np.concatenate([distances[1][borders[0]], distances[0][borders[1]]]), 95))


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


@pytest.mark.parametrize("definition", list(HD95_DEFINITIONS))
@pytest.mark.parametrize("filled", [(False, False), (True, False), (False, True)])
def test_row_69_empty_masks_have_no_distance(filled, definition):
    masks = [np.full((3, 4, 5), value) for value in filled]
    figures = surface_figures(*masks, spacing_mm=(1, 1, 1), hd95=definition)
    assert math.isnan(figures.hd95_mm)
    assert math.isnan(figures.assd_mm)
    assert math.isnan(hd95_mm(*masks, spacing_mm=(1, 1, 1), definition=definition))
    if any(filled):
        assert figures.surface_dice == 0.0
    else:
        assert math.isnan(figures.surface_dice)


def test_a_mask_against_itself_is_perfect():
    mask = np.random.default_rng(0).random((5, 6, 7)) < 0.4
    figures = surface_figures(mask, mask, spacing_mm=(2.0, 0.5, 1.0), tolerance_mm=0.0)
    assert (figures.hd95_mm, figures.assd_mm, figures.surface_dice) == (0.0, 0.0, 1.0)


def test_row_72_equals_monai_on_random_pairs(random_pairs, monai):
    for prediction, reference, spacing in random_pairs:
        hd95, assd = monai(prediction, reference, spacing)
        ours = surface_figures(prediction, reference, spacing_mm=spacing)
        assert_close(ours.hd95_mm, hd95, (prediction, reference, spacing))
        assert_close(ours.assd_mm, assd, (prediction, reference, spacing))


def test_row_72_equals_surface_distance_on_random_pairs(random_pairs, surface_distance):
    for index, (prediction, reference, spacing) in enumerate(random_pairs):
        tolerance = 0.5 + index % 7
        hd95, surface_dice = surface_distance(prediction, reference, spacing, tolerance)
        ours = surface_figures(prediction, reference, spacing_mm=spacing, hd95="surface", tolerance_mm=tolerance)
        assert_close(ours.hd95_mm, hd95, (prediction, reference, spacing))
        assert_close(ours.surface_dice, surface_dice, (prediction, reference, spacing))


def test_row_72_equals_the_definition_of_medpy_on_random_pairs(random_pairs):
    for prediction, reference, spacing in random_pairs:
        wanted = medpy_hd95(prediction, reference, spacing)
        ours = surface_figures(prediction, reference, spacing_mm=spacing, hd95="medpy")
        assert_close(ours.hd95_mm, wanted, (prediction, reference, spacing))


def test_slices_equal_monai_and_surface_distance(monai, surface_distance):
    rng = np.random.default_rng(17)
    for _ in range(20):
        shape = tuple(int(n) for n in rng.integers(2, 60, size=2))
        spacing = tuple(float(s) for s in rng.uniform(0.4, 3.0, size=2))
        pair = [blob(rng, shape, rng.uniform(0.1, 0.6)) for _ in range(2)]
        ours = surface_figures(*pair, spacing_mm=spacing)
        by_area = surface_figures(*pair, spacing_mm=spacing, hd95="surface")
        hd95, assd = monai(*pair, spacing)
        assert_close(ours.hd95_mm, hd95, (*pair, spacing))
        assert_close(ours.assd_mm, assd, (*pair, spacing))
        hd95, surface_dice = surface_distance(*pair, spacing, 2.0)
        assert_close(by_area.hd95_mm, hd95, (*pair, spacing))
        assert_close(by_area.surface_dice, surface_dice, (*pair, spacing))


def test_the_three_definitions_differ_and_one_figure_alone_is_the_same(random_pairs):
    num_all_different = 0
    for prediction, reference, spacing in random_pairs[:20]:
        found = {name: hd95_mm(prediction, reference, spacing_mm=spacing, definition=name) for name in HD95_DEFINITIONS}
        num_all_different += len(set(found.values())) == 3
        for name, value in found.items():
            assert surface_figures(prediction, reference, spacing_mm=spacing, hd95=name).hd95_mm == value
    assert num_all_different > 5


def test_equals_monai_for_far_apart_and_touching_the_volume_edge(monai):
    masks = np.zeros((2, 12, 30, 30), dtype=bool)
    masks[0, :3, :4, :5] = True
    masks[1, 9:, 22:, 27:] = True
    ours = surface_figures(*masks, spacing_mm=(3.0, 0.7, 0.7))
    hd95, assd = monai(masks[0], masks[1], (3.0, 0.7, 0.7))
    assert ours.hd95_mm == pytest.approx(hd95, rel=1e-5)
    assert ours.assd_mm == pytest.approx(assd, rel=1e-5)


def test_row_72_anisotropic_spacing_by_hand():
    """Two voxels side by side against one: the same voxels, three different distances."""
    one, two = np.zeros((2, 3, 3, 3), dtype=bool)
    one[1, 1, 1] = two[1, 1, 1] = True
    for axis, step in enumerate((5.0, 2.0, 0.5)):
        longer = two.copy()
        longer[tuple(2 if k == axis else 1 for k in range(3))] = True
        figures = surface_figures(longer, one, spacing_mm=(5.0, 2.0, 0.5))
        assert figures.hd95_mm == pytest.approx(0.95 * step)  # 95th percentile of {0, step}; the other way 0
        assert figures.assd_mm == pytest.approx(step / 3)  # {0, step} and {0} pooled
        pooled = surface_figures(longer, one, spacing_mm=(5.0, 2.0, 0.5), hd95="medpy")
        assert pooled.hd95_mm == pytest.approx(0.9 * step)  # 95th percentile of {0, 0, step}


def test_the_surface_dice_of_a_shifted_square_by_hand():
    """A square of 4x4 pixels, shifted by one pixel of 2 mm along x."""
    reference = np.zeros((8, 10), dtype=bool)
    reference[2:6, 3:7] = True
    prediction = np.roll(reference, 1, axis=1)
    # A contour: 4 corners cut along half a diagonal, 3 elements of 2 mm on two sides, 3 of 1 mm on the other two.
    diagonal = math.hypot(1.0, 2.0)
    length = 4 * diagonal / 2 + 2 * 3 * 2.0 + 2 * 3 * 1.0
    # Further off than 1 mm: the trailing side with its 2 corners, and the middle of the leading side.
    off = 2 * diagonal / 2 + 3 * 1.0 + 1.0
    options = {"spacing_mm": (1.0, 2.0)}
    assert surface_figures(prediction, reference, **options, tolerance_mm=1.0).surface_dice == pytest.approx(
        1 - off / length
    )
    assert surface_figures(prediction, reference, **options, tolerance_mm=2.0).surface_dice == 1.0


@pytest.mark.parametrize(
    ("spacing", "shift_mm"),
    [((1.0, 1.0, 1.0), (0, 0, 4.0)), ((1.25, 0.7, 0.7), (5.0, 0, 0)), ((2.5, 0.7, 0.7), (0, 3.5, 0))],
)
def test_near_the_analytic_value(spacing, shift_mm):
    """All definitions lie within about a voxel of it; the area-weighted one reads lower (DEPENDENCIES 8)."""
    shape = tuple(round(44 / step) for step in spacing)
    centre = (18.0, 18.0, 18.0)
    reference = sphere(shape, centre, 12.0, spacing)
    prediction = sphere(shape, tuple(c + s for c, s in zip(centre, shift_mm, strict=True)), 12.0, spacing)
    # The distance of a small shift d is about d·|cos θ|, and 5 % of a sphere's surface has |cos θ| > 0.95.
    for definition in HD95_DEFINITIONS:
        ours = hd95_mm(prediction, reference, spacing_mm=spacing, definition=definition)
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


@pytest.mark.parametrize("slab_bytes", [1, 150, 2**20])
def test_border_is_the_mask_minus_its_erosion(slab_bytes, monkeypatch):
    """However the volume is cut into slabs."""
    monkeypatch.setattr(distances, "SLAB_BYTES", slab_bytes)
    rng = np.random.default_rng(5)
    for shape in ((7, 8, 9), (1, 6, 6), (2, 2, 12)):
        mask = blob(rng, shape, 0.7)
        assert np.array_equal(border_voxels(mask), mask & ~ndimage.binary_erosion(mask))
    solid = np.ones((4, 5, 6), dtype=bool)
    assert np.count_nonzero(border_voxels(solid)) == 4 * 5 * 6 - 2 * 3 * 4
    assert solid.all(), "the mask itself must stay as it is"


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


def test_unknown_definitions_and_tolerances_are_named():
    mask = np.ones((2, 2, 2), dtype=bool)
    with pytest.raises(InputError, match="unknown HD95 definition 'mean': choose one of border, surface, medpy"):
        surface_figures(mask, mask, spacing_mm=(1, 1, 1), hd95="mean")
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(InputError, match="tolerance of the surface Dice must be 0 mm or more"):
            surface_figures(mask, mask, spacing_mm=(1, 1, 1), tolerance_mm=tolerance)


def test_every_definition_says_what_it_is():
    assert "larger of the two directed" in HD95_DEFINITIONS["border"]
    assert "area" in HD95_DEFINITIONS["surface"]
    assert "pooled" in HD95_DEFINITIONS["medpy"]
    assert "within 1.5 mm" in surface_dice_definition(1.5)

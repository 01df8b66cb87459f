"""Resampling against SimpleITK, scikit-image, analytic blobs and exact identities."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.transform import resize

from lungseg.errors import InputError
from lungseg.scan.resample import resample_onto, resample_to_spacing
from lungseg.scan.volume import AIR_HU, Geometry

ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]
GRID = Geometry((20, 24, 28), (2.5, 0.8, 0.7), (-310.0, 12.5, -40.25))


def rotated(geometry: Geometry, degrees: tuple[float, float, float]) -> Geometry:
    matrix = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return Geometry(geometry.shape, geometry.spacing_mm, geometry.origin_mm, tuple(map(tuple, matrix.tolist())))


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def blob(geometry: Geometry, centre_mm: np.ndarray, sigma_mm: float) -> np.ndarray:
    points = geometry.to_world(np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), axis=-1))
    distance = ((points - centre_mm) ** 2).sum(axis=-1)
    return np.rint(8000 * np.exp(-distance / (2 * sigma_mm**2))).astype(np.int16)


def centroid(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    index = np.stack(np.nonzero(array), axis=-1)
    return geometry.to_world(np.average(index, axis=0, weights=array[array != 0].astype(float)))


def to_itk(array: np.ndarray, geometry: Geometry) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_mm[::-1])  # (S, P, L) -> (L, P, S)
    image.SetDirection(np.asarray(geometry.direction)[::-1, ::-1].ravel().tolist())
    return image


def itk_resample(array: np.ndarray, source: Geometry, target: Geometry, method: int, fill: float) -> np.ndarray:
    image = sitk.Cast(to_itk(array, source), sitk.sitkFloat32)
    reference = to_itk(np.zeros(target.shape, np.float32), target)
    return sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform(), method, fill))


def test_finer_spacing_equals_simpleitk_linear() -> None:
    array = noise(GRID.shape)
    out, target = resample_to_spacing(array, GRID, (1.0, 0.8, 0.5), kind="ct")
    expected = itk_resample(array, GRID, target, sitk.sitkLinear, -3000.0)
    assert out.dtype == np.int16
    inside = expected > -2999  # at the border ITK may call the outer face outside
    assert inside.mean() > 0.95
    assert np.abs(out - expected)[inside].max() <= 0.51


def test_coarser_spacing_equals_skimage_with_antialiasing() -> None:
    array = noise((24, 30, 32))
    out, target = resample_to_spacing(array, Geometry(array.shape, (1.0, 1.0, 1.0)), (3.0, 2.0, 1.0), kind="ct")
    expected = resize(
        array.astype(np.float64), target.shape, order=1, mode="edge", anti_aliasing=True, preserve_range=True
    )
    assert target.shape == (8, 15, 32)
    assert np.abs(out - expected).max() <= 0.51


@pytest.mark.parametrize(
    "spacing", [(0.5, 0.5, 0.5), (1.5, 1.5, 1.5), (3.0, 2.0, 2.2)], ids=["finer", "near", "coarser"]
)
@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (12.0, -7.0, 31.0)], ids=["axial", "oblique"])
def test_centroid_in_mm_is_kept(spacing: tuple[float, float, float], degrees: tuple[float, float, float]) -> None:
    source = rotated(Geometry((30, 40, 44), (1.25, 1.0, 0.9), (100.0, -50.0, 7.0)), degrees)
    centre = source.to_world((14.3, 19.6, 21.2))
    array = blob(source, centre, 4.0)
    out, target = resample_to_spacing(array, source, spacing, kind="ct")
    assert np.abs(centroid(array, source) - centre).max() < 0.05
    assert np.linalg.norm(centroid(out, target) - centre) < 0.1 * min(spacing)
    mass = out.sum(dtype=float) * target.voxel_ml / (array.sum(dtype=float) * source.voxel_ml)
    assert mass == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("spacing", [(3.2, 1.1, 1.9), (5.0, 2.4, 0.7), (2.5, 0.8, 2.1)])
@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (25.0, -12.0, 80.0)], ids=["axial", "oblique"])
def test_coarser_spacing_equals_simpleitk_after_the_same_gaussian(spacing, degrees) -> None:
    """sigma = (factor - 1) / 2 old voxels on each axis that gets coarser, none on the others; then ITK's linear."""
    source = rotated(GRID, degrees)
    array = noise(GRID.shape)
    out, target = resample_to_spacing(array, source, spacing, kind="ct")
    smooth = array.astype(np.float64)
    for axis, (new, old) in enumerate(zip(spacing, GRID.spacing_mm, strict=True)):
        if new > old:
            smooth = ndimage.gaussian_filter1d(smooth, (new / old - 1) / 2, axis=axis, mode="nearest", truncate=4.0)
    reference = to_itk(np.zeros(target.shape, np.float32), target)
    image = to_itk(smooth, source)
    expected = sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform(), sitk.sitkLinear, -3000.0))
    inside = expected > -2999
    assert inside.mean() > 0.8
    assert np.abs(out - expected)[inside].max() <= 0.51


SPHERES_MM = (((18.0, 21.0, 17.0), 9.0), ((40.0, 44.0, 20.0), 7.0), ((31.0, 20.0, 45.0), 8.0))
"""Centre along the axes of the grid, and radius."""


def spheres(geometry: Geometry, base: Geometry) -> tuple[np.ndarray, list[np.ndarray]]:
    """int16 spheres of 50 HU in -850 HU, edges averaged over a voxel's width; centres in world mm."""
    points = geometry.to_world(np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), axis=-1))
    hu, centres = np.full(geometry.shape, -850.0), []
    for centre_mm, radius in SPHERES_MM:
        centres.append(base.to_world(np.asarray(centre_mm) / base.spacing_mm))
        depth = radius - np.linalg.norm(points - centres[-1], axis=-1)
        hu += 900.0 * np.clip(depth / np.mean(geometry.spacing_mm) + 0.5, 0, 1)
    return np.rint(hu).astype(np.int16), centres


def sphere_centroids(hu: np.ndarray, geometry: Geometry, centres: list[np.ndarray]) -> list[np.ndarray]:
    """Centroid in world mm of what is above -850 HU around each centre."""
    points = geometry.to_world(np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), axis=-1))
    found = []
    for centre, (_, radius) in zip(centres, SPHERES_MM, strict=True):
        near = np.linalg.norm(points - centre, axis=-1) < radius + 4.0
        found.append(np.average(points[near], axis=0, weights=np.clip(hu[near] + 850.0, 0, None)))
    return found


@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (8.0, -5.0, 12.0), (-30.0, 25.0, 100.0)])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((0.9, 0.8, 0.8), (0.6, 0.6, 0.6)),
        ((0.9, 0.8, 0.8), (1.3, 1.3, 1.3)),
        ((2.5, 0.9, 0.9), (1.0, 1.0, 1.0)),
        ((1.0, 0.8, 0.8), (2.9, 2.1, 1.7)),
    ],
)
def test_analytic_spheres_keep_their_place_to_a_tenth_of_a_voxel(old, new, degrees) -> None:
    shape = tuple(round(60.0 / s) for s in old)
    source = rotated(Geometry(shape, old, (-310.0, 12.5, -40.25)), degrees)
    hu, centres = spheres(source, source)
    out, target = resample_to_spacing(hu, source, new, kind="ct")
    for centre, found in zip(centres, sphere_centroids(out, target, centres), strict=True):
        assert np.linalg.norm(found - centre) < 0.1 * min(new)
    mask, _ = resample_to_spacing(hu > -400, source, new, kind="mask")
    for centre, found in zip(centres, sphere_centroids(np.where(mask, 50, -850), target, centres), strict=True):
        assert np.linalg.norm(found - centre) < 0.2 * max(*old, *new)  # whole voxels: cannot do better


@pytest.mark.parametrize("degrees", [(8.0, -5.0, 12.0), (-30.0, 25.0, 100.0)])
def test_analytic_spheres_on_an_oblique_grid(degrees) -> None:
    source = Geometry((67, 75, 75), (0.9, 0.8, 0.8), (-310.0, 12.5, -40.25))
    hu, centres = spheres(source, source)
    wide = rotated(Geometry((110, 110, 110), (1.0, 1.0, 1.0)), degrees)
    middle = source.to_world((33.0, 37.0, 37.0)) - wide.to_world((54.5, 54.5, 54.5))
    target = Geometry(wide.shape, wide.spacing_mm, tuple(middle.tolist()), wide.direction)
    out = resample_onto(hu, source, target, kind="ct", fill=-850)
    for centre, found in zip(centres, sphere_centroids(out, target, centres), strict=True):
        assert np.linalg.norm(found - centre) < 0.1
    mask = resample_onto(hu > -400, source, target, kind="mask", fill=False)
    for centre, found in zip(centres, sphere_centroids(np.where(mask, 50, -850), target, centres), strict=True):
        assert np.linalg.norm(found - centre) < 0.1


def test_antialiasing_removes_a_checkerboard() -> None:
    index = np.indices((16, 16, 16)).sum(axis=0)
    board = np.where(index % 2, -900, 100).astype(np.int16)
    geometry = Geometry(board.shape, (1.0, 1.0, 1.0))
    coarse, _ = resample_to_spacing(board, geometry, (3.0, 3.0, 3.0), kind="ct")
    naive = board[1::3, 1::3, 1::3]
    assert np.ptp(naive) == 1000
    # sigma is 1 voxel per axis: amplitude exp(-pi^2 / 2) = 0.0072 of 500 HU is left on each axis
    assert np.abs(coarse[1:-1, 1:-1, 1:-1] + 400).max() <= 2


@pytest.mark.parametrize("spacing", [(0.7, 0.45, 0.31), (5.1, 1.9, 2.3)])
def test_constant_volume_stays_constant_to_the_border(spacing: tuple[float, float, float]) -> None:
    array = np.full(GRID.shape, -873, np.int16)
    out, target = resample_to_spacing(array, GRID, spacing, kind="ct")
    assert out.shape == target.shape
    assert (out == -873).all()


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 5.0)] * 3),
    new=st.tuples(*[st.floats(0.4, 5.0)] * 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_resampled_values_stay_in_range(shape, spacing, new, seed) -> None:
    array = noise(shape, seed)
    geometry = Geometry(shape, spacing)
    out, target = resample_to_spacing(array, geometry, new, kind="ct")
    labels, _ = resample_to_spacing(array % 7, geometry, new, kind="mask")
    assert out.shape == labels.shape == target.shape
    assert array.min() <= out.min() <= out.max() <= array.max()
    assert set(np.unique(labels)) <= set(np.unique(array % 7))


@pytest.mark.parametrize("kind", ["ct", "mask"])
def test_same_spacing_is_exact(kind) -> None:
    array = noise(GRID.shape)
    out, target = resample_to_spacing(array, GRID, GRID.spacing_mm, kind=kind)
    assert target == GRID
    assert np.array_equal(out, array)


def test_mask_keeps_dtype_and_is_nearest() -> None:
    labels = np.random.default_rng(0).integers(0, 7, GRID.shape).astype(np.uint8)
    out, target = resample_to_spacing(labels, GRID, (1.0, 1.1, 0.5), kind="mask")
    assert out.dtype == np.uint8
    expected = itk_resample(labels, GRID, target, sitk.sitkNearestNeighbor, 0.0)
    assert (out == expected).mean() > 0.999
    flags, _ = resample_to_spacing(labels > 3, GRID, (1.0, 1.1, 0.5), kind="mask")
    assert flags.dtype == bool
    assert np.array_equal(flags, out > 3)


def test_going_finer_and_back_restores_labels() -> None:
    labels = np.random.default_rng(1).integers(0, 7, (9, 10, 11)).astype(np.uint8)
    source = Geometry(labels.shape, (3.0, 2.0, 2.0), (5.0, 6.0, 7.0))
    fine, grid = resample_to_spacing(labels, source, (1.0, 1.0, 0.5), kind="mask")
    assert np.array_equal(resample_onto(fine, grid, source, kind="mask", fill=0), labels)


@pytest.mark.parametrize("kind", ["ct", "mask"])
@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_48_orientations_of_one_grid_are_exact(axes, flips, kind) -> None:
    array = noise((5, 6, 7))
    source = rotated(Geometry(array.shape, (2.5, 0.8, 0.7), (-310.0, 12.5, -40.25)), (3.0, -4.0, 5.0))
    moved = np.flip(array.transpose(axes), [i for i in range(3) if flips[i]])
    direction = np.asarray(source.direction)[:, list(axes)] * np.where(flips, -1.0, 1.0)
    first = np.zeros(3)
    first[list(axes)] = [array.shape[a] - 1 if flip else 0 for a, flip in zip(axes, flips, strict=True)]
    target = Geometry(
        moved.shape,
        tuple(source.spacing_mm[a] for a in axes),
        tuple(source.to_world(first).tolist()),
        tuple(map(tuple, direction.tolist())),
    )
    out = resample_onto(array, source, target, kind=kind, fill=0)
    assert out.dtype == array.dtype
    assert np.array_equal(out, moved)


def test_sub_grid_and_larger_grid_are_exact() -> None:
    array = noise(GRID.shape)
    part = GRID.crop((3, 4, 5), (13, 20, 21))
    cut = resample_onto(array, GRID, part, kind="ct", fill=AIR_HU)
    assert np.array_equal(cut, array[3:13, 4:20, 5:21])
    back = resample_onto(cut, part, GRID, kind="ct", fill=AIR_HU)
    assert np.array_equal(back[3:13, 4:20, 5:21], cut)
    assert np.count_nonzero(back != AIR_HU) <= cut.size
    far = Geometry((4, 4, 4), GRID.spacing_mm, (9000.0, 0.0, 0.0))
    assert (resample_onto(array, GRID, far, kind="mask", fill=9) == 9).all()


@pytest.mark.parametrize("kind", ["ct", "mask"])
def test_rotated_grid_equals_simpleitk(kind) -> None:
    source = rotated(GRID, (10.0, 5.0, -20.0))
    target = Geometry((18, 30, 26), (2.0, 0.9, 0.9), tuple(source.to_world((1.0, -2.0, 1.0)).tolist()))
    if kind == "ct":
        array = blob(source, source.to_world((10.0, 12.0, 14.0)), 4.0)
    else:
        array = np.random.default_rng(2).integers(1, 7, source.shape).astype(np.uint8)
    method = sitk.sitkLinear if kind == "ct" else sitk.sitkNearestNeighbor
    expected = itk_resample(array, source, target, method, 0.0)
    out = resample_onto(array, source, target, kind=kind, fill=0)
    assert out.dtype == (np.int16 if kind == "ct" else np.uint8)
    assert 0.2 < (expected > 0).mean() < 1.0
    if kind == "ct":
        assert (np.abs(out - expected) <= 0.51).mean() > 0.995  # the rest lies on the outer faces
    else:
        assert (out == expected).mean() > 0.995


def test_oblique_mask_restores_its_centroid() -> None:
    source = Geometry((40, 40, 40), (1.0, 1.0, 1.0))
    mask = blob(source, np.array([20.0, 18.0, 22.0]), 4.0) > 4000
    target = rotated(Geometry((60, 60, 60), (1.0, 1.0, 1.0), (-12.0, -8.0, -10.0)), (5.0, 10.0, -15.0))
    moved = resample_onto(mask, source, target, kind="mask", fill=False)
    assert moved.dtype == bool
    assert np.linalg.norm(centroid(moved, target) - centroid(mask, source)) < 0.1
    assert moved.sum() == pytest.approx(mask.sum(), rel=0.03)


def test_impossible_requests_are_refused() -> None:
    array = noise(GRID.shape)
    with pytest.raises(InputError, match="kind must be"):
        resample_to_spacing(array, GRID, (1.0, 1.0, 1.0), kind="label")
    with pytest.raises(InputError, match="on a grid of shape"):
        resample_onto(array[1:], GRID, GRID, kind="ct", fill=0)
    with pytest.raises(InputError, match="fill value -1024"):
        resample_onto(array > 0, GRID, GRID, kind="mask", fill=AIR_HU)
    with pytest.raises(InputError, match="strictly positive"):
        resample_to_spacing(array, GRID, (1.0, 0.0, 1.0), kind="ct")


def test_with_no_simpleitk_imported() -> None:
    import subprocess
    import sys

    code = "import sys, lungseg.scan.resample; sys.exit(any(m in sys.modules for m in ('SimpleITK', 'pydicom')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Exact distances without a distance map: against SciPy's, for every way a search can end."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from lungseg.evaluation import distances
from lungseg.evaluation.distances import directed_distances_mm, nonzero, slabs


def reference_distances(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    return np.asarray(ndimage.distance_transform_edt(~second, sampling=spacing)[first])


@pytest.mark.parametrize("share", [0.001, 0.02, 0.4])
@pytest.mark.parametrize("ndim", [2, 3])
def test_equals_the_distance_transform(ndim, share):
    rng = np.random.default_rng(int(1000 * share) + ndim)
    for _ in range(15):
        shape = tuple(int(n) for n in rng.integers(1, 220 if ndim == 2 else 50, size=ndim))
        spacing = tuple(float(step) for step in rng.uniform(0.3, 6.0, size=ndim))
        first, second = (rng.random(shape) < share for _ in range(2))
        second.flat[rng.integers(second.size)] = True
        np.testing.assert_allclose(
            directed_distances_mm(first, second, spacing_mm=spacing),
            reference_distances(first, second, spacing),
            rtol=0,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((3, 4, 150), (1.0, 1.0, 1.0)),  # further along a row than its gaps reach
        ((90, 3, 4), (1.0, 1.0, 1.0)),  # further off than any row looked at
        ((4, 130, 3), (0.1, 2.0, 9.0)),
        ((40, 40, 40), (1.0, 1.0, 1.0)),  # both
        ((2, 300), (1.0, 0.2)),
        ((300, 2), (0.2, 1.0)),
    ],
)
def test_far_voxels_ask_the_tree_and_are_exact(shape, spacing, monkeypatch):
    asked = []
    tree = distances._tree_distances
    monkeypatch.setattr(distances, "_tree_distances", lambda p, *rest: asked.append(len(p)) or tree(p, *rest))
    second = np.zeros(shape, dtype=bool)
    second[(0,) * len(shape)] = True
    first = np.ones(shape, dtype=bool)
    found = directed_distances_mm(first, second, spacing_mm=spacing)
    np.testing.assert_allclose(found, reference_distances(first, second, spacing), rtol=0, atol=1e-9)
    assert asked
    assert 0 < asked[0] < first.size


def test_more_voxels_than_are_searched_together(monkeypatch):
    monkeypatch.setattr(distances, "POINTS_AT_ONCE", 7)
    rng = np.random.default_rng(5)
    first, second = (rng.random((6, 7, 8)) < 0.3 for _ in range(2))
    found = directed_distances_mm(first, second, spacing_mm=(2.0, 1.0, 0.7))
    np.testing.assert_allclose(found, reference_distances(first, second, (2.0, 1.0, 0.7)), atol=1e-12)


def test_nothing_to_measure_is_no_distance():
    second = np.ones((2, 3, 4), dtype=bool)
    assert directed_distances_mm(~second, second, spacing_mm=(1, 1, 1)).shape == (0,)


def test_slabs_cover_a_volume_once(monkeypatch):
    monkeypatch.setattr(distances, "SLAB_BYTES", 20)
    found = list(slabs((7, 2, 5)))
    assert [(slab.start, slab.stop) for slab in found] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [(slab.start, slab.stop) for slab in slabs((2, 100, 100))] == [(0, 1), (1, 2)]


def test_nonzero_is_that_of_numpy():
    mask = np.random.default_rng(1).random((5, 6, 7)) < 0.2
    for ours, theirs in zip(nonzero(mask), np.nonzero(mask), strict=True):
        assert np.array_equal(ours, theirs)

"""Surface elements: areas by hand, of shapes known, and of the package that introduced them."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from lungseg.evaluation import distances
from lungseg.evaluation.surface_elements import element_areas, surface_elements

ANISOTROPIC = (2.5, 0.7, 0.9)


def area(mask: np.ndarray, spacing: tuple[float, ...]) -> float:
    corners, codes = surface_elements(mask)
    assert codes.size == np.count_nonzero(corners)
    return float(element_areas(spacing)[codes].sum())


def test_one_voxel_is_an_octahedron():
    """Its surface cuts the axes half a voxel from the centre: 8 triangles."""
    a, b, c = (step / 2 for step in ANISOTROPIC)
    triangle = 0.5 * math.sqrt((a * b) ** 2 + (b * c) ** 2 + (a * c) ** 2)
    mask = np.zeros((3, 3, 3), dtype=bool)
    mask[1, 1, 1] = True
    assert area(mask, ANISOTROPIC) == pytest.approx(8 * triangle)


def test_one_pixel_is_a_rhombus():
    assert area(np.ones((1, 1), dtype=bool), (3.0, 4.0)) == pytest.approx(4 * 2.5)


def test_the_faces_of_a_box_have_their_area():
    """Corners and edges of the box are cut, and cost less than what the whole face would."""
    small, large = (area(np.ones((n, n, n), dtype=bool), (1.0, 1.0, 1.0)) for n in (10, 11))
    # 6 (n-1)² for the faces, 12 (n-1) √2/2 for the cut edges, 8 triangles at the corners
    assert small == pytest.approx(6 * 81 + 12 * 9 * math.sqrt(2) / 2 + 8 * math.sqrt(3) / 8)
    assert large - small == pytest.approx(6 * (100 - 81) + 12 * math.sqrt(2) / 2)


def test_a_mask_at_the_edge_of_the_array_has_a_closed_surface():
    inside = np.zeros((6, 7, 8), dtype=bool)
    inside[1:4, 2:5, 3:6] = True
    assert area(inside[1:4, 2:5, 3:6], ANISOTROPIC) == pytest.approx(area(inside, ANISOTROPIC))


@pytest.mark.parametrize("slab_bytes", [1, 2**20])
def test_corners_and_codes_by_definition(slab_bytes, monkeypatch):
    monkeypatch.setattr(distances, "SLAB_BYTES", slab_bytes)
    rng = np.random.default_rng(3)
    for shape in ((4, 5, 6), (1, 2, 1), (5, 4)):
        mask = rng.random(shape) < 0.5
        corners, codes = surface_elements(mask)
        padded, wanted = np.pad(mask, 1), []
        for corner in product(*[range(n + 1) for n in shape]):
            around = padded[tuple(slice(i, i + 2) for i in corner)].ravel()
            assert corners[corner] == (around.any() and not around.all())
            if corners[corner]:
                wanted.append(sum(int(bit) << k for k, bit in enumerate(around)))
        assert codes.tolist() == wanted


def test_no_surface_no_elements():
    corners, codes = surface_elements(np.zeros((2, 3, 4), dtype=bool))
    assert not corners.any()
    assert codes.size == 0
    for spacing in (ANISOTROPIC, ANISOTROPIC[:2]):
        areas = element_areas(spacing)
        assert areas[0] == areas[-1] == 0.0
        assert (areas[1:-1] > 0).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), ANISOTROPIC, (0.3, 4.0, 1.0), (0.7, 1.9), (1.0, 1.0)])
def test_every_area_is_that_of_surface_distance(spacing):
    tables = pytest.importorskip("surface_distance.lookup_tables")
    if len(spacing) == 3:
        kernel = tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
        theirs = tables.create_table_neighbour_code_to_surface_area(spacing)
    else:
        kernel = tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL
        theirs = tables.create_table_neighbour_code_to_contour_length(spacing)
    # bit i of our code is the i-th voxel around the corner, that of theirs is in the kernel
    ours_of = [sum(1 << i for i, bit in enumerate(kernel.ravel()) if code & bit) for code in range(len(theirs))]
    np.testing.assert_allclose(element_areas(spacing)[ours_of], theirs, rtol=0, atol=1e-12)

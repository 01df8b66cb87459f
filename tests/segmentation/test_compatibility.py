"""The optional HU check: ends of the ranges, order of the alternatives, and what is left unclassified."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.compatibility import check_hu_compatibility
from lungseg.tissue import Tissue


def _check(label, hu, posterior, **options):
    labels = np.full((1, 1, 1), label, dtype=np.uint8)
    chance = np.asarray(posterior, dtype=np.float32).reshape(5, 1, 1, 1)
    return int(check_hu_compatibility(labels, chance, np.full((1, 1, 1), hu), **options)[0, 0, 0])


@pytest.mark.parametrize(
    ("label", "hu", "posterior", "expected"),
    [
        (Tissue.GGO, -600, [0.1, 0, 0.9, 0, 0], Tissue.GGO),
        (Tissue.GGO, -850, [0.1, 0, 0.9, 0, 0], Tissue.GGO),  # -800 less 50, inclusive
        (Tissue.GGO, -851, [0.1, 0, 0.9, 0, 0], Tissue.HEALTHY),
        (Tissue.GGO, 0, [0.3, 0, 0.4, 0.1, 0.2], Tissue.CONSOLIDATION),  # healthy is likelier but impossible
        (Tissue.GGO, 0, [0.3, 0, 0.4, 0.2, 0.1], Tissue.FIBROSIS),
        (Tissue.CONSOLIDATION, -900, [0, 0, 0, 0, 1], Tissue.HEALTHY),  # no other class has a chance
        (Tissue.CONSOLIDATION, -1000, [0, 0, 0, 0, 1], 255),
        (Tissue.CONSOLIDATION, 500, [0.2, 0.2, 0.2, 0.2, 0.2], 255),
        (Tissue.EMPHYSEMA, -2000, [0, 1, 0, 0, 0], Tissue.EMPHYSEMA),
        (Tissue.CAVITY, -1000, [0, 0, 0, 0, 1], Tissue.CAVITY),
        (0, -600, [0, 0, 1, 0, 0], 0),
        (255, -600, [0, 0, 1, 0, 0], 255),
    ],
)
def test_each_case(label, hu, posterior, expected):
    assert _check(label, hu, posterior) == expected


def test_tolerance_widens_the_ranges():
    assert _check(Tissue.GGO, -851, [0.1, 0, 0.9, 0, 0], tolerance_hu=60.0) == Tissue.GGO


def test_lattice_posterior_and_shapes():
    labels = np.full((8, 8, 8), Tissue.GGO, dtype=np.uint8)
    hu = np.full(labels.shape, -600.0)
    hu[:, :, 4:] = 20.0
    posterior = np.zeros((5, 2, 2, 2), dtype=np.float16)
    posterior[2], posterior[4] = 0.7, 0.3
    checked = check_hu_compatibility(labels, posterior, hu, token_size=4)
    assert (checked[:, :, :4] == Tissue.GGO).all()
    assert (checked[:, :, 4:] == Tissue.CONSOLIDATION).all()
    assert (labels == Tissue.GGO).all()
    with pytest.raises(MismatchError, match="expected"):
        check_hu_compatibility(labels, posterior, hu)
    with pytest.raises(InputError, match="one grid"):
        check_hu_compatibility(labels, posterior, hu[1:], token_size=4)

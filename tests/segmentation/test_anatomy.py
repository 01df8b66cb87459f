"""What the voxels of a lung are: bodies, thin structures, and how much the others say."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.segmentation.anatomy import SPARE_WEIGHT, lung_anatomy

SPACING_MM = (1.0, 1.0, 1.0)


def _lung():
    lung = np.zeros((40, 40, 40), dtype=bool)
    lung[4:-4, 4:-4, 4:-4] = True
    return np.where(lung, np.float32(-860.0), np.float32(40.0)), lung


def test_a_ball_is_a_body_with_a_shell_and_a_rod_is_thin():
    hu, lung = _lung()
    z, y, x = np.ogrid[:40, :40, :40]
    ball = (z - 14) ** 2 + (y - 14) ** 2 + (x - 14) ** 2 < 6**2
    rod = np.broadcast_to((y - 28) ** 2 + (x - 28) ** 2 < 1.5**2, lung.shape) & lung
    hu[ball], hu[rod] = 20.0, -300.0
    found = lung_anatomy(hu, lung, spacing_mm=SPACING_MM)
    # The opening is a cube: it rounds a ball off, and the growing back stops at aerated lung.
    assert found.body[ball].mean() > 0.95
    assert not (found.body & ~ball).any()
    assert found.thin[rod].all()
    assert not (found.thin & ~rod).any()
    assert found.weight[14, 14, 21] == np.float32(SPARE_WEIGHT)  # shell
    assert found.weight[25, 14, 30] == 1.0
    for weight in (found.weight, found.rind_weight):
        assert not weight[~lung | found.body].any()


def test_the_rim_says_little_about_density_and_its_outermost_voxel_little_about_structure():
    hu, lung = _lung()
    found = lung_anatomy(hu, lung, spacing_mm=SPACING_MM)
    spare = np.float32(SPARE_WEIGHT)
    assert found.weight[20, 20, 4:8].tolist() == [spare, spare, 1.0, 1.0]
    assert found.rind_weight[20, 20, 4:8].tolist() == [spare, 1.0, 1.0, 1.0]


def test_other_grids_are_refused():
    hu, lung = _lung()
    with pytest.raises(InputError, match="grid"):
        lung_anatomy(hu[1:], lung, spacing_mm=SPACING_MM)

"""Changes of scanner: bounded, reproducible, noise smoothed by the kernel, nothing where nothing is asked."""

from __future__ import annotations

import numpy as np
import pytest
from diffusion_fixture import tiny_config

from lungseg.config import PRESETS, TrainConfig, make_config
from lungseg.diffusion.augmentation import ScannerChange, changes_hu

FLAT = np.full((24, 40, 40), -850, dtype=np.int16)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[1, seed]))


def test_draws_stay_within_their_bounds_and_reach_them() -> None:
    config = tiny_config(hu_offset=15.0, hu_noise=30.0, hu_blur=0.8)
    drawn = [ScannerChange.draw(config, _rng(i)) for i in range(300)]
    offsets = [c.offset_hu for c in drawn]
    assert -15 <= min(offsets) < -13
    assert 13 < max(offsets) <= 15
    for values, bound in (([c.noise_hu for c in drawn], 30.0), ([c.blur_voxels for c in drawn], 0.8)):
        assert 0 <= min(values) < 0.05 * bound
        assert 0.95 * bound < max(values) <= bound
    assert ScannerChange.draw(config, _rng(3)) == drawn[3]


def test_offset_and_noise_are_in_hu() -> None:
    changed = ScannerChange(12.0, 25.0, 0.0).apply(FLAT, _rng())
    assert changed.dtype == np.int16
    assert changed.mean() == pytest.approx(-838, abs=0.5)
    assert changed.std() == pytest.approx(25, rel=0.02)


def test_a_smooth_kernel_smooths_the_noise_too() -> None:
    sharp, smooth = (ScannerChange(0.0, 30.0, blur).apply(FLAT, _rng()).astype(float) for blur in (0.0, 0.8))
    assert smooth.std() < 0.4 * sharp.std()
    neighbours = [np.corrcoef(v[:, :, 1:].ravel(), v[:, :, :-1].ravel())[0, 1] for v in (sharp, smooth)]
    assert neighbours[0] == pytest.approx(0, abs=0.02)
    assert neighbours[1] > 0.5


def test_extreme_values_do_not_wrap_around() -> None:
    edge = np.full((8, 8, 8), 32760, dtype=np.int16)
    assert ScannerChange(100.0, 0.0, 0.0).apply(edge, _rng()).max() == 32767


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_changes_hu(preset: str) -> None:
    assert not changes_hu(make_config(TrainConfig, preset=preset))

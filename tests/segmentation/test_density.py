"""Smoothing, texture, healthy mode and token statistics against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from tissue_fixture import SPACING_MM, make_fixture

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.density import (
    STEEPEST_HU_PER_MM,
    healthy_mode_hu,
    healthy_profile_hu,
    local_sd,
    smooth_hu,
    texture_hu,
    token_statistics,
)
from lungseg.segmentation.lattice import token_mask_fraction
from lungseg.tissue import TISSUES, Tissue

PROTOTYPE = TISSUES[Tissue.HEALTHY].prototype_hu


def test_smoothing_knows_nothing_of_what_is_outside():
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[5:15, 5:15, 5:] = True  # touches the array's end
    volume = np.where(mask, -850, 1000).astype(np.int16)
    smoothed = smooth_hu(volume, mask)
    assert smoothed.dtype == np.float32
    np.testing.assert_allclose(smoothed[mask], -850.0, atol=1e-2)
    assert (smoothed[~mask] == 1000).all()
    np.testing.assert_array_equal(smooth_hu(volume, np.zeros_like(mask)), volume)


def test_smoothing_inside_a_full_mask_is_the_plain_gaussian():
    volume = np.random.default_rng(0).normal(-800, 50, (24, 24, 24))
    inner = (slice(8, 16),) * 3
    ours = smooth_hu(volume, np.ones(volume.shape, dtype=bool), (1.0, 0.5, 0.0))
    np.testing.assert_allclose(ours[inner], gaussian_filter(volume, (1.0, 0.5, 0.0))[inner], rtol=1e-5)


def test_healthy_mode_is_the_peak_of_the_healthy_band():
    rng = np.random.default_rng(0)
    mask = np.ones((30, 30, 30), dtype=bool)
    values = rng.normal(-870, 30, mask.size)
    values[:12_000] = rng.normal(-600, 40, 12_000)  # more ground glass than healthy lung changes nothing
    assert healthy_mode_hu(values.reshape(mask.shape), mask) == pytest.approx(-870, abs=6)


@pytest.mark.parametrize("mean", [-600.0, -1000.0, 0.0])
def test_lung_without_a_healthy_peak_falls_back_to_the_prototype(mean):
    mask = np.ones((30, 30, 30), dtype=bool)
    volume = np.random.default_rng(0).normal(mean, 45, mask.shape)
    assert healthy_mode_hu(volume, mask) == PROTOTYPE
    assert healthy_mode_hu(volume, ~mask) == PROTOTYPE


def test_local_sd_equals_numpy_over_the_lung_voxels_of_the_cube():
    rng = np.random.default_rng(0)
    volume = rng.normal(-850, 60, (12, 13, 14)).astype(np.float32)
    mask = rng.random(volume.shape) < 0.7
    sd = local_sd(volume, mask, (1.0, 1.0, 2.5))  # 5 mm: 5, 5 and 3 voxels (never fewer)
    for z, y, x in np.argwhere(mask)[::97]:
        box = tuple(slice(max(c - r, 0), c + r + 1) for c, r in zip((z, y, x), (2, 2, 1), strict=True))
        assert sd[z, y, x] == pytest.approx(volume[box][mask[box]].std(), rel=1e-3)
    assert (sd[~mask] == 0).all()
    assert not local_sd(volume, np.zeros_like(mask), (1.0, 1.0, 1.0)).any()


def test_texture_is_free_of_noise_and_keeps_structure():
    rng = np.random.default_rng(0)
    mask = np.ones((40, 40, 40), dtype=bool)
    clean = np.full(mask.shape, -850.0)
    clean[20:] = np.where(np.indices((20, 40, 40)).sum(axis=0) % 2 == 0, -700.0, -300.0)  # SD 200
    for noise in (20.0, 60.0):
        volume = clean + noise * rng.standard_normal(mask.shape)
        texture = texture_hu(volume, smooth_hu(volume, mask), mask, (1.0, 1.0, 1.0))
        assert np.median(texture[24:]) == pytest.approx(200.0, abs=10.0)
        assert np.median(texture[:16]) < 0.5 * noise
    assert not texture_hu(volume, volume, np.zeros_like(mask), (1.0, 1.0, 1.0)).any()


def _brute_force(volume, mask, token, p, window):
    start = [t * p + (p - window) // 2 for t in token]
    box = tuple(slice(max(s, 0), max(s + window, 0)) for s in start)
    return volume[box][mask[box]]


@pytest.mark.parametrize(("token_size", "window"), [(4, 8), (8, 8), (4, 7), (8, 2), (4, 24)])
def test_token_statistics_equal_brute_force(token_size, window):
    fixture = make_fixture(seed=3)
    volume, mask = fixture.volume_hu[10:57, 5:60, :51], fixture.mask[10:57, 5:60, :51]
    lattice = token_mask_fraction(mask, token_size).shape
    tokens = np.random.default_rng(0).integers(0, lattice, size=(60, 3))
    tokens = np.vstack([tokens, np.zeros(3, dtype=int), np.asarray(lattice) - 1])
    stats = token_statistics(volume, mask, tokens, token_size=token_size, window=window, spacing_mm=SPACING_MM)
    smoothed = smooth_hu(volume, mask)
    texture = texture_hu(volume, smoothed, mask, SPACING_MM)
    checked = 0
    for i, token in enumerate(tokens):
        hu = _brute_force(smoothed, mask, token, token_size, window)
        sd = _brute_force(texture, mask, token, token_size, window)
        assert stats.num_voxels[i] == hu.size
        if not hu.size:
            assert np.isnan(stats.median_hu[i])
            continue
        checked += 1
        expected = [*np.percentile(hu, [25, 50, 75]), hu.mean(), sd.mean(), np.median(sd)]
        got = [stats.p25_hu, stats.median_hu, stats.p75_hu, stats.mean_hu, stats.local_sd_mean, stats.local_sd_median]
        np.testing.assert_allclose([value[i] for value in got], expected, rtol=1e-4, atol=0.02)
        assert stats.laa950_share[i] == pytest.approx(np.mean(hu <= -950), abs=2e-3)
        assert stats.dense_share[i] == pytest.approx(np.mean(hu > -200), abs=2e-3)
    assert checked > 10


def test_chunks_do_not_change_token_statistics():
    fixture = make_fixture()
    tokens = np.argwhere(token_mask_fraction(fixture.mask, 8) > 0)
    options = {"token_size": 8, "window": 8, "spacing_mm": SPACING_MM}
    whole = token_statistics(fixture.volume_hu, fixture.mask, tokens, **options)
    for chunk in (1, 5 * 8**3):
        parts = token_statistics(fixture.volume_hu, fixture.mask, tokens, chunk_values=chunk, **options)
        for name in vars(whole):
            np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert len(whole) == len(tokens)


def test_token_statistics_of_nothing_and_of_nonsense():
    volume = np.zeros((8, 8, 8), dtype=np.int16)
    empty = np.zeros(volume.shape, dtype=bool)
    options = {"token_size": 4, "window": 4, "spacing_mm": SPACING_MM}
    stats = token_statistics(volume, empty, np.array([[0, 0, 0]]), **options)
    assert stats.num_voxels.tolist() == [0]
    assert len(token_statistics(volume, ~empty, np.empty((0, 3), dtype=int), **options)) == 0
    with pytest.raises(MismatchError, match="outside the lattice"):
        token_statistics(volume, ~empty, np.array([[2, 0, 0]]), **options)
    with pytest.raises(InputError, match="bool"):
        token_statistics(volume, np.ones(volume.shape, dtype=np.uint8), np.array([[0, 0, 0]]), **options)


def _sloped(slope_hu_per_mm, row_mm=2.0):
    rng = np.random.default_rng(3)
    y_mm = (np.arange(80) - 39.5) * row_mm
    return -860.0 + slope_hu_per_mm * y_mm[None, :, None] + rng.normal(0, 20, (30, 80, 30)), y_mm


@pytest.mark.parametrize("slope", [0.5, 0.0, -0.5])
def test_healthy_profile_follows_gravity_past_disease(slope):
    volume, y_mm = _sloped(slope)
    volume[:12, 40:] = -600.0  # dependent ground glass
    volume[18:, :30, :10] = -980.0  # holes in front
    profile = healthy_profile_hu(volume, np.ones(volume.shape, dtype=bool), -860.0, (1.0, 2.0, 1.0))
    assert profile.shape == (80,)
    assert profile.dtype == np.float32
    np.testing.assert_allclose(profile, -860.0 + slope * y_mm, atol=12.0)


def test_healthy_profile_is_not_bent_by_emphysema_in_front():
    volume, y_mm = _sloped(0.4)
    dark = np.clip((30.0 - np.arange(80)) / 15.0, 0.0, 1.0)[None, :, None]
    volume = volume + dark * (-955.0 - volume)  # fades into healthy lung over 30 mm
    profile = healthy_profile_hu(volume, np.ones(volume.shape, dtype=bool), -860.0, (1.0, 2.0, 1.0))
    assert profile[0] > -900.0  # healthy lung would be -892 there
    np.testing.assert_allclose(profile[35:], -860.0 + 0.4 * y_mm[35:], atol=20.0)


def test_healthy_profile_is_the_mode_where_nothing_can_be_fitted_and_never_steeper_than_lungs_are():
    volume, _ = _sloped(0.5)
    nothing = healthy_profile_hu(volume, np.zeros(volume.shape, dtype=bool), -870.0, (1.0, 2.0, 1.0))
    np.testing.assert_array_equal(nothing, np.full(80, -870.0, dtype=np.float32))
    steep, _ = _sloped(3.0, row_mm=0.5)  # 3 HU/mm over 40 mm
    profile = healthy_profile_hu(steep, np.ones(steep.shape, dtype=bool), -860.0, (1.0, 0.5, 1.0))
    assert np.diff(profile).max() == pytest.approx(STEEPEST_HU_PER_MM * 0.5, rel=1e-3)
    with pytest.raises(InputError, match="grid"):
        healthy_profile_hu(steep, np.ones((2, 2, 2), dtype=bool), -860.0, (1.0, 0.5, 1.0))

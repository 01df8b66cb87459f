"""Token lattice: coverage of windows, fusion, and interpolation back to voxels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.errors import InputError, MismatchError
from lungseg.segmentation.lattice import (
    TokenFusion,
    bounding_region,
    fill_uncovered,
    gaussian_window,
    lattice_shape,
    pad_volume,
    padded_shape,
    token_mask_fraction,
    upsample_posterior,
    upsample_slabs,
    window_corners,
)


def test_shapes_of_lattice_and_padding():
    assert lattice_shape((17, 8, 9), 8) == (3, 1, 2)
    assert padded_shape((17, 8, 9), (16, 16, 16), 8) == (24, 16, 16)
    with pytest.raises(MismatchError, match="multiple"):
        padded_shape((17, 8, 9), (12, 16, 16), 8)
    with pytest.raises(MismatchError, match="at least one voxel"):
        lattice_shape((4, 4, 4), 0)


def test_padding_reflects_and_falls_back_to_edge():
    volume = np.arange(5)[:, None, None] * np.ones((1, 2, 6), dtype=int)
    padded = pad_volume(volume, (8, 4, 6))
    assert padded.shape == (8, 4, 6)
    assert padded[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    np.testing.assert_array_equal(padded[:, 2], padded[:, 1])  # two voxels cannot be reflected by two: edge
    assert pad_volume(volume, volume.shape) is volume
    with pytest.raises(MismatchError, match="smaller"):
        pad_volume(volume, (4, 2, 6))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_cover_every_voxel_on_the_lattice(data):
    p = data.draw(st.sampled_from([1, 4, 8]))
    patch = [p * data.draw(st.integers(1, 4)) for _ in range(3)]
    stride = [p * data.draw(st.integers(1, n // p)) for n in patch]
    shape = padded_shape([data.draw(st.integers(1, 40)) for _ in range(3)], patch, p)
    corners = window_corners(shape, patch, stride, token_size=p)
    assert corners.dtype == np.int32
    assert len(np.unique(corners, axis=0)) == len(corners)
    assert (corners % p == 0).all()
    assert (corners >= 0).all()
    assert (corners + patch <= shape).all()
    covered = np.zeros(shape, dtype=bool)
    for z, y, x in corners:
        covered[z : z + patch[0], y : y + patch[1], x : x + patch[2]] = True
    assert covered.all()


def test_last_window_is_shifted_inside():
    corners = window_corners((40, 16, 16), (16, 16, 16), (16, 16, 16), token_size=8)
    assert corners[:, 0].tolist() == [0, 16, 24]


@pytest.mark.parametrize(
    ("shape", "patch", "stride"),
    [
        ((32, 32, 32), (16, 16, 16), (12, 16, 16)),
        ((32, 32, 32), (20, 16, 16), (16, 16, 16)),
        ((30, 32, 32), (16, 16, 16), (16, 16, 16)),
        ((8, 32, 32), (16, 16, 16), (16, 16, 16)),
        ((64, 64, 64), (16, 16, 16), (24, 16, 16)),
    ],
)
def test_windows_off_the_lattice_or_with_gaps_are_refused(shape, patch, stride):
    with pytest.raises(MismatchError):
        window_corners(shape, patch, stride, token_size=8)


def test_gaussian_window_is_positive_symmetric_and_peaks_in_the_middle():
    window = gaussian_window((4, 12, 31))
    assert window.dtype == np.float32
    assert (window > 0).all()
    np.testing.assert_allclose(window, window[::-1, ::-1, ::-1], rtol=1e-6)
    assert window.max() <= 1.0
    assert window[:, :, 15].max() == window.max()
    # exp(-0.5 (0.5 / (4 / 8))^2) per middle token of an even axis of 4
    np.testing.assert_allclose(gaussian_window((4, 1, 1))[:, 0, 0], np.exp([-4.5, -0.5, -0.5, -4.5]), rtol=1e-6)
    assert (gaussian_window((200, 1, 1), 1 / 200) > 0).all()


def test_fusion_of_constant_windows_is_constant_without_a_seam():
    lattice = lattice_shape((40, 24, 24), 4)
    fusion = TokenFusion(lattice, 3)
    features = np.broadcast_to(np.array([1.5, -2.0, 0.25], dtype=np.float32)[:, None, None, None], (3, 4, 4, 4))
    for corner in window_corners(padded_shape((40, 24, 24), (16, 16, 16), 4), (16,) * 3, (8,) * 3, token_size=4):
        fusion.add(corner // 4, features, gaussian_window((4, 4, 4)))
    fused, coverage = fusion.result(unit_blocks=0)
    assert coverage.all()
    np.testing.assert_allclose(fused, np.broadcast_to(features[:, :1, :1, :1], fused.shape), rtol=1e-5)


def test_fusion_is_the_weighted_average_and_crops_at_the_lattice():
    fusion = TokenFusion((3, 1, 1), 1)
    one = np.ones((1, 2, 1, 1), dtype=np.float32)
    weights = np.array([1.0, 3.0], dtype=np.float32).reshape(2, 1, 1)
    fusion.add((0, 0, 0), one * 2.0, weights)
    fusion.add((1, 0, 0), one * 6.0, weights)
    fusion.add((2, 0, 0), one * 7.0, np.zeros((2, 1, 1), dtype=np.float32))
    fused, coverage = fusion.result(unit_blocks=0)
    np.testing.assert_allclose(fused[0, :, 0, 0], [2.0, (3 * 2 + 1 * 6) / 4, 6.0])
    assert coverage.all()
    lonely, covered = TokenFusion((2, 1, 1), 1).result(unit_blocks=1)
    assert not covered.any()
    assert not lonely.any()


def test_fusion_brings_each_block_to_unit_length():
    rng = np.random.default_rng(0)
    fusion = TokenFusion((2, 2, 2), 6)
    fusion.add((0, 0, 0), rng.normal(size=(6, 2, 2, 2)).astype(np.float32), np.ones((2, 2, 2), dtype=np.float32))
    fused, _ = fusion.result(unit_blocks=3)
    np.testing.assert_allclose(np.linalg.norm(fused[:3], axis=0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(fused[3:], axis=0), 1.0, rtol=1e-5)
    with pytest.raises(MismatchError, match="blocks of 4"):
        fusion.result(unit_blocks=4)
    with pytest.raises(MismatchError, match="outside the lattice"):
        fusion.add((2, 0, 0), fused, np.ones((2, 2, 2), dtype=np.float32))
    with pytest.raises(MismatchError, match="6 channels"):
        fusion.add((0, 0, 0), fused[:5], np.ones((2, 2, 2), dtype=np.float32))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3, 4, 8]), st.integers(0, 99))
def test_mask_fraction_counts_every_lung_voxel_once(z, y, x, p, seed):
    mask = np.random.default_rng(seed).random((z, y, x)) < 0.5
    fraction = token_mask_fraction(mask, p)
    assert fraction.shape == lattice_shape(mask.shape, p)
    assert fraction.dtype == np.float32
    assert round(float(fraction.sum(dtype=np.float64)) * p**3) == int(mask.sum())
    assert fraction[0, 0, 0] == pytest.approx(mask[:p, :p, :p].sum() / p**3)


def test_upsampling_reproduces_a_linear_field_and_continues_the_edge():
    p, shape = 4, (10, 9, 8)
    lattice = lattice_shape(shape, p)
    centres = [(np.arange(n) + 0.5) * p - 0.5 for n in lattice]
    field = 2 * centres[0][:, None, None] - centres[1][None, :, None] + 0.5 * centres[2][None, None, :]
    values = upsample_posterior(field[None].astype(np.float32), shape, p)
    assert values.shape == (1, *shape)
    assert values.dtype == np.float32
    clipped = [np.clip(np.arange(n), c[0], c[-1]) for n, c in zip(shape, centres, strict=True)]
    expected = 2 * clipped[0][:, None, None] - clipped[1][None, :, None] + 0.5 * clipped[2][None, None, :]
    np.testing.assert_allclose(values[0], expected, atol=1e-4)


def test_upsampling_in_slabs_and_regions_equals_the_whole():
    rng = np.random.default_rng(1)
    posterior = rng.random((3, 4, 3, 5)).astype(np.float16)
    whole = upsample_posterior(posterior, (30, 20, 37), 8)
    for slab in (1, 7, 64):
        parts = [values for _, values in upsample_slabs(posterior, (30, 20, 37), 8, slab=slab)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    region = (slice(3, 29), slice(0, 11), slice(20, 37))
    np.testing.assert_array_equal(
        upsample_posterior(posterior, (30, 20, 37), 8, region=region), whole[(slice(None), *region)]
    )
    fine = rng.random((2, 5, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(upsample_posterior(fine, (5, 6, 7), 1), fine)
    with pytest.raises(MismatchError, match="not on the lattice"):
        upsample_posterior(posterior, (40, 20, 37), 8)


def test_fill_uncovered_takes_the_nearest_token():
    posterior = np.zeros((2, 4, 1, 1), dtype=np.float32)
    posterior[0, 0], posterior[1, 3] = 1.0, 1.0
    coverage = np.array([True, False, False, True]).reshape(4, 1, 1)
    filled = fill_uncovered(posterior, coverage)
    assert filled[:, :, 0, 0].T.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert not fill_uncovered(posterior, np.zeros((4, 1, 1), dtype=bool)).any()
    with pytest.raises(MismatchError, match="one lattice"):
        fill_uncovered(posterior, coverage[:2])


def test_bounding_region_is_tight_and_explicit():
    mask = np.zeros((10, 10, 10), dtype=bool)
    mask[3:5, 0:2, 9] = True
    assert bounding_region(mask) == (slice(3, 5), slice(0, 2), slice(9, 10))
    assert bounding_region(mask, margin=2) == (slice(1, 7), slice(0, 4), slice(7, 10))
    with pytest.raises(InputError, match="empty"):
        bounding_region(np.zeros((2, 2, 2), dtype=bool))

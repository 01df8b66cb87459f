"""Noise tied to voxels, and what a batch of windows becomes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusion_fixture import tiny_student

import lungseg.diffusion.tokens as tokens_module
from lungseg.diffusion.tokens import NoiseField, encode_windows

PLANE = (40, 48)


def _windows(count=3, shape=(8, 16, 16), seed=0):
    rng = np.random.default_rng(seed)
    volume_hu = rng.integers(-1024, 200, (count, *shape)).astype(np.int16)
    masks = rng.random((count, *shape)) < 0.8
    corners = np.array([[0, 0, 0], [4, 8, 12], [12, 24, 32]])[:count]
    return volume_hu, masks, corners


def _encode(student, windows, timesteps, seed=5, **options):
    return encode_windows(student, *windows, NoiseField(seed, PLANE), timesteps=timesteps, **options)


def test_a_voxel_has_the_same_noise_in_every_window():
    field = NoiseField(7, PLANE)
    whole = field.box(10, (0, 0, 0), (20, *PLANE))
    for corner, size in (((3, 5, 9), (8, 16, 16)), ((12, 0, 31), (8, 40, 17)), ((19, 39, 47), (1, 1, 1))):
        z, y, x = corner
        d, h, w = size
        assert np.array_equal(field.box(10, corner, size), whole[z : z + d, y : y + h, x : x + w])
    assert whole.dtype == np.float32


@pytest.mark.parametrize("kept", [1, 3, 512])
def test_noise_does_not_depend_on_order_or_eviction(monkeypatch, kept):
    requests = [(t, z) for t in (10, 25) for z in (0, 4, 8, 12)]
    fresh = {key: NoiseField(7, PLANE).box(key[0], (key[1], 3, 2), (8, 16, 16)) for key in requests}
    monkeypatch.setattr(tokens_module, "PLANES_KEPT", kept)
    field = NoiseField(7, PLANE)
    for t, z in [*requests, *reversed(requests), *requests[::3]]:
        assert np.array_equal(field.box(t, (z, 3, 2), (8, 16, 16)), fresh[t, z])
    assert len(field._planes) <= kept


def test_planes_are_drawn_once_for_overlapping_windows(monkeypatch):
    drawn = []
    philox = np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda key: drawn.append(key[1]) or philox(key=key))
    field = NoiseField(7, PLANE)
    for z in (0, 4, 8, 4, 0):
        field.box(10, (z, 0, 0), (8, 16, 16))
    assert len(drawn) == len(set(drawn)) == 16


def test_noise_is_standard_normal_and_independent():
    field = NoiseField(7, (100, 100))
    noise = field.box(10, (0, 0, 0), (50, 100, 100)).astype(np.float64)
    n = noise.size
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / n)
    others = {
        "next plane": np.roll(noise, 1, axis=0),
        "next row": np.roll(noise, 1, axis=1),
        "next column": np.roll(noise, 1, axis=2),
        "next t": field.box(11, (0, 0, 0), (50, 100, 100)),
        "other seed": NoiseField(8, (100, 100)).box(10, (0, 0, 0), (50, 100, 100)),
    }
    for name, other in others.items():
        assert abs((noise * other).mean()) < 4 / math.sqrt(n), name


@pytest.mark.parametrize("timesteps", [(0,), (0, 5, 20)])
def test_blocks_are_unit_vectors(timesteps):
    student = tiny_student()
    result = _encode(student, _windows(), timesteps)
    assert result.dtype == np.float32
    assert result.shape == (3, 16 * len(timesteps), 2, 4, 4)
    blocks = result.reshape(3, len(timesteps), 16, 2, 4, 4)
    np.testing.assert_allclose(np.linalg.norm(blocks, axis=2), 1, atol=1e-5)


def test_time_zero_is_the_clean_scan_with_time_input_zero():
    student = tiny_student()
    volume_hu, masks, corners = _windows()
    x_0 = student.window.normalise(torch.from_numpy(volume_hu))
    inputs = torch.stack([x_0, torch.from_numpy(masks).float()], dim=1)
    bottleneck = student.unet.encode(inputs, torch.zeros(3))
    z = student.head(bottleneck.movedim(1, -1).flatten(0, -2))[0].view(3, 2, 4, 4, 16).movedim(-1, 1)
    np.testing.assert_allclose(_encode(student, (volume_hu, masks, corners), (0,)), z.numpy(), atol=1e-6)
    other_seed = _encode(student, (volume_hu, masks, corners), (0,), seed=99)
    assert np.array_equal(other_seed, _encode(student, (volume_hu, masks, corners), (0,)))


def test_noisy_level_is_q_sample_with_the_noise_of_the_place():
    student = tiny_student()
    volume_hu, masks, corners = _windows()
    field = NoiseField(5, PLANE)
    rows = []
    for image, mask, corner in zip(volume_hu, masks, corners, strict=True):
        a = student.schedule.alpha_bar[20].item()
        eps = torch.from_numpy(field.box(20, corner, image.shape))
        x_t = math.sqrt(a) * student.window.normalise(torch.from_numpy(image)) + math.sqrt(1 - a) * eps
        inputs = torch.stack([x_t, torch.from_numpy(mask).float()])[None]
        tokens = student.unet.encode(inputs, torch.tensor([20]))[0].movedim(0, -1)
        rows.append(student.head(tokens.flatten(0, -2))[0].view(2, 4, 4, 16).movedim(-1, 0))
    result = _encode(student, (volume_hu, masks, corners), (20,))
    np.testing.assert_allclose(result, torch.stack(rows).numpy(), atol=1e-5)


def test_result_does_not_depend_on_the_batch():
    student = tiny_student()
    windows = _windows()
    together = _encode(student, windows, (0, 20))
    for i in range(3):
        alone = _encode(student, tuple(part[i : i + 1] for part in windows), (0, 20))
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_concat_holds_the_levels_in_order_and_average_is_their_normalised_mean():
    student = tiny_student()
    windows = _windows()
    single = [_encode(student, windows, (t,)) for t in (20, 0, 5)]
    np.testing.assert_allclose(_encode(student, windows, (20, 0, 5)), np.concatenate(single, axis=1), atol=1e-6)
    mean = np.mean(single, axis=0)
    average = _encode(student, windows, (20, 0, 5), combine="average")
    np.testing.assert_allclose(average, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)


def test_mask_and_noise_level_matter():
    student = tiny_student()
    volume_hu, masks, corners = _windows()
    base = _encode(student, (volume_hu, masks, corners), (20,))
    assert np.abs(base - _encode(student, (volume_hu, np.ones_like(masks), corners), (20,))).max() > 1e-3
    assert np.abs(base - _encode(student, (volume_hu, masks, corners), (21,))).max() > 1e-3
    assert np.abs(base - _encode(student, (volume_hu, masks, corners), (20,), seed=6)).max() > 1e-3


@pytest.mark.parametrize(
    ("values", "width"),
    [({}, 16), ({"distill": "none"}, 32), ({"distill_weight": 0.0, "regression_weight": 0.0}, 32),
     ({"distill_weight": 0.0, "regression_weight": 1.0}, 32)],
)  # fmt: skip
def test_descriptors_never_come_from_weights_that_were_not_trained(values, width):
    """METHOD 1.7: without distillation the clustering is of the bottleneck itself."""
    student = tiny_student(base_width=16, **values)
    tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = student.embed(tokens)
    assert found.shape == (5, width)
    assert student.embedding == width
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    if values.get("regression_weight") == 1.0:
        expected = torch.nn.functional.normalize(student.head.hidden(tokens), dim=1)
    elif values:
        expected = torch.nn.functional.normalize(tokens, dim=1)
    else:
        expected = student.head(tokens)[0]
    torch.testing.assert_close(found, expected)

"""Merging self-attention maps: divergences by hand, segments of block-structured attention, the real middle block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lungseg.diffusion.attention import Attention
from lungseg.errors import MismatchError
from lungseg.segmentation.attention_merging import merge_attention, symmetric_kl

SHAPE = (2, 4, 4)


def block_attention(labels: np.ndarray, *, strength: float = 40.0, noise: float = 0.0) -> np.ndarray:
    """Rows that attend ``strength`` times more to tokens of their own label."""
    same = labels.reshape(-1)[:, None] == labels.reshape(-1)[None, :]
    weights = np.where(same, strength, 1.0) * (1 + noise * np.random.default_rng(0).random(same.shape))
    return weights / weights.sum(axis=1, keepdims=True)


def test_symmetric_kl_by_hand() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75], [0.5, 0.5]])
    by_hand = 0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3) + 0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    np.testing.assert_allclose(symmetric_kl(p, q), [[by_hand, 0.0]], atol=1e-12)
    np.testing.assert_allclose(symmetric_kl(p, q), symmetric_kl(q, p).T, atol=1e-12)
    assert np.isfinite(symmetric_kl(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))).all()


def test_blocks_come_out_as_segments() -> None:
    labels = np.zeros(SHAPE, dtype=int)
    labels[:, :2, 2:], labels[:, 2:, :] = 1, 2
    segments = merge_attention(block_attention(labels, noise=0.2), SHAPE, np.ones(32, dtype=bool))
    np.testing.assert_array_equal(segments.reshape(SHAPE), labels)


def test_the_threshold_decides_what_is_one_segment() -> None:
    labels = np.zeros(SHAPE, dtype=int)
    labels[..., 2:] = 1
    weights = block_attention(labels)
    inside = np.ones(32, dtype=bool)
    apart = float(symmetric_kl(weights[:1], weights[2:3])[0, 0])
    assert merge_attention(weights, SHAPE, inside, threshold=0.9 * apart).max() == 1
    assert merge_attention(weights, SHAPE, inside, threshold=1.1 * apart).max() == 0


def test_tokens_outside_the_lung_have_no_say() -> None:
    labels = np.zeros(SHAPE, dtype=int)
    labels[..., 2:] = 1
    inside = np.ones(SHAPE, dtype=bool)
    inside[:, 3] = False
    weights = block_attention(labels)
    drowned = weights.copy()
    drowned[:, ~inside.reshape(-1)] = 1e3  # all attend to what is outside
    drowned[~inside.reshape(-1)] = 0.0
    segments = merge_attention(drowned, SHAPE, inside.reshape(-1))
    np.testing.assert_array_equal(segments, merge_attention(weights, SHAPE, inside.reshape(-1)))
    np.testing.assert_array_equal(segments.reshape(SHAPE), np.where(inside, labels, -1))
    assert (merge_attention(weights, SHAPE, np.zeros(32, dtype=bool)) == -1).all()


def test_a_lung_off_the_anchor_grid_is_segmented_all_the_same() -> None:
    inside = np.zeros(SHAPE, dtype=bool)
    inside[0, 0, 0], inside[0, 0, 2] = True, True
    labels = np.arange(32).reshape(SHAPE)
    segments = merge_attention(block_attention(labels), SHAPE, inside.reshape(-1), anchor_stride=2)
    assert sorted(segments[inside.reshape(-1)]) == [0, 1]


def test_attention_of_another_window_is_refused() -> None:
    with pytest.raises(MismatchError, match="is not that of a window"):
        merge_attention(np.ones((31, 31)), SHAPE, np.ones(32, dtype=bool))


def test_the_weights_are_those_the_block_uses() -> None:
    """Weights times values, projected, is what the attention layer adds to its input."""
    torch.manual_seed(0)
    layer = Attention(16, "channel", (2, 4, 4)).eval()
    torch.nn.init.normal_(layer.project.weight)
    x = torch.randn(3, 16, 2, 4, 4)
    with torch.no_grad():
        weights = layer.weights(x)
        tokens = layer.norm(x).flatten(2).movedim(1, -1)
        values = torch.nn.functional.linear(tokens, layer.qkv.weight.flatten(1), layer.qkv.bias).chunk(3, -1)[2]
        added = torch.nn.functional.linear(weights @ values, layer.project.weight.flatten(1), layer.project.bias)
        expected = x + added.movedim(-1, 1).view(x.shape)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 32))
    with pytest.raises(MismatchError, match="larger than attention windows"):
        layer.weights(torch.randn(1, 16, 2, 4, 8))

"""Tokens of ``--method attention``: each token's tissue by the votes of the attention segment it belongs to."""

from __future__ import annotations

import numpy as np

from lungseg.config.cluster import ClusterConfig
from lungseg.diffusion.attention_maps import middle_attention
from lungseg.diffusion.checkpoint import Student
from lungseg.diffusion.tokens import NoiseField
from lungseg.segmentation.attention_merging import merge_attention
from lungseg.segmentation.lattice import (
    TokenFusion,
    gaussian_window,
    pad_volume,
    padded_shape,
    token_mask_fraction,
    window_corners,
)
from lungseg.store.patches import mask_fractions


def attention_shares(
    image_hu: np.ndarray, mask: np.ndarray, votes: np.ndarray, student: Student, config: ClusterConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the tissues of each token: the votes of the segment it belongs to, in each window by itself.

    Parameters
    ----------
    image_hu, mask : arrays, shape (Z, Y, X)
        int16 HU and bool lung on the student's grid.
    votes : float32 array, shape (5, z, y, x)
        Shares of the tissues of each token by its own HU, in the order of ``MIXTURE_TISSUES``.
    student : Student
        Windows are its patches, which are its attention windows too.
    config : ClusterConfig

    Returns
    -------
    shares : float32 array, shape (5, z, y, x)
        In the order of ``MIXTURE_TISSUES``; windows that overlap are averaged with Gaussian weights.
    usable : bool array, shape (z, y, x)
        Tokens with lung that a window covered.

    Source
    ------
    METHOD 1.8, flaw 7.
    """
    student = student.for_volume(image_hu)
    patch, p = student.config.patch_size, student.config.token_size
    grid = [n // p for n in patch]
    usable = token_mask_fraction(mask, p) > 0
    fusion = TokenFusion(usable.shape, len(votes))
    weights = gaussian_window(grid, config.window_sigma).reshape(grid)
    target = padded_shape(image_hu.shape, patch, p)
    image, lung = (
        pad_volume(image_hu, target),
        np.pad(mask, [(0, t - n) for t, n in zip(target, mask.shape, strict=True)]),
    )
    beyond = [(0, t // p - n) for t, n in zip(target, usable.shape, strict=True)]
    votes, inside = np.pad(votes, [(0, 0), *beyond]), np.pad(usable, beyond)
    stride = [max(p, round(n * (1 - config.overlap) / p) * p) for n in patch]
    corners = window_corners(target, patch, stride, token_size=p)
    corners = corners[mask_fractions(lung, corners, patch) >= max(config.min_window_lung, 1e-9)]
    noise = NoiseField(config.seed, (target[1], target[2]))
    for start in range(0, len(corners), config.batch_size):
        part = corners[start : start + config.batch_size]
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, patch, strict=True)) for corner in part]
        hu, lungs = np.stack([image[box] for box in boxes]), np.stack([lung[box] for box in boxes])
        maps = middle_attention(student, hu, lungs, part, noise, timesteps=config.timesteps)
        for corner, attention in zip(part // p, maps, strict=True):
            cells = tuple(slice(c, c + n) for c, n in zip(corner, grid, strict=True))
            shares = _segment_votes(attention, votes[:, *cells], inside[cells], config)
            fusion.add(corner, shares, weights * inside[cells])
    fused, covered = fusion.result(unit_blocks=0)
    return fused, covered & usable


def _segment_votes(attention: np.ndarray, votes: np.ndarray, inside: np.ndarray, config: ClusterConfig) -> np.ndarray:
    """Mean votes float32 (5, d, h, w) of the segment of each token of a window; zero outside the lung."""
    segments = merge_attention(
        attention, inside.shape, inside.reshape(-1),
        anchor_stride=config.attention_anchors, threshold=config.attention_threshold,
    )  # fmt: skip
    flat = votes.reshape(len(votes), -1)
    result = np.zeros_like(flat)
    for segment in range(segments.max() + 1):
        members = segments == segment
        result[:, members] = flat[:, members].mean(axis=1, keepdims=True)
    return result.reshape(votes.shape)

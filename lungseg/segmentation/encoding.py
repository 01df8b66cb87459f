"""Tokens of one lung, by the way its student allows: slabs of the whole lung, or overlapping windows fused."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from lungseg.config.cluster import ClusterConfig
from lungseg.diffusion.checkpoint import Student
from lungseg.diffusion.tokens import NoiseField, encode_windows
from lungseg.errors import UsageError
from lungseg.segmentation.lattice import (
    TokenFusion,
    gaussian_window,
    lattice_shape,
    pad_volume,
    padded_shape,
    token_mask_fraction,
    window_corners,
)
from lungseg.segmentation.slabs import encode_slabs, max_slab_voxels
from lungseg.store.patches import mask_fractions

log = logging.getLogger(__name__)


def resolve_encoding(student: Student, encoding: str) -> str:
    """`slabs` or `windows`: what was asked for, or for `auto` slabs wherever the student allows them.

    Raises
    ------
    UsageError
        If slabs are asked for and the student's features depend on how much it is given.
    """
    local = student.unet.spec.is_local
    if encoding == "slabs" and not local:
        raise UsageError(
            "--encoding slabs needs a model with --norm channel and --attention window: the features of this one "
            "depend on the patch around them; use --encoding windows"
        )
    return ("slabs" if local else "windows") if encoding == "auto" else encoding


def encode_lung(
    image_hu: np.ndarray, mask: np.ndarray, student: Student, config: ClusterConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one volume.

    Parameters
    ----------
    image_hu : int16 array, shape (Z, Y, X)
        HU on the student's grid.
    mask : bool array, same shape
        Lung.
    student : Student
    config : ClusterConfig
        Its ``encoding`` may be `auto`.

    Returns
    -------
    features : float32 array, shape (C, z, y, x)
        On the token lattice; zero where no window reached.
    usable : bool array, shape (z, y, x)
        Tokens that were encoded and that hold any lung.

    Raises
    ------
    UsageError
        From :func:`resolve_encoding`.
    """
    student = student.for_volume(image_hu)
    if resolve_encoding(student, config.encoding) == "slabs":
        return encode_slabs(
            student, image_hu, mask, timesteps=config.timesteps, combine=config.combine, seed=config.seed,
            max_voxels=max_slab_voxels(student.unet.spec, config.slab_gib),
        )  # fmt: skip
    embedding, p = student.embedding, student.config.token_size
    channels = embedding * (len(config.timesteps) if config.combine == "concat" else 1)
    fusion = TokenFusion(lattice_shape(image_hu.shape, p), channels)
    weights = gaussian_window([n // p for n in student.config.patch_size], config.window_sigma)
    for corners, features in _windows(image_hu, mask, student, config):
        for corner, feature in zip(corners, features, strict=True):
            fusion.add(corner // p, feature, weights)
    fused, covered = fusion.result(unit_blocks=embedding)
    return fused, covered & (token_mask_fraction(mask, p) > 0)


def _windows(
    image: np.ndarray, mask: np.ndarray, student: Student, config: ClusterConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Corners (n, 3) and token descriptors (n, C, d, h, w) of all windows with lung, batch by batch."""
    patch, p = student.config.patch_size, student.config.token_size
    target = padded_shape(image.shape, patch, p)
    image, mask = pad_volume(image, target), np.pad(mask, [(0, t - n) for t, n in zip(target, mask.shape, strict=True)])
    stride = [max(p, round(n * (1 - config.overlap) / p) * p) for n in patch]
    corners = window_corners(target, patch, stride, token_size=p)
    corners = corners[mask_fractions(mask, corners, patch) >= max(config.min_window_lung, 1e-9)]
    noise = NoiseField(config.seed, (target[1], target[2]))
    size, start = config.batch_size, 0
    while start < len(corners):
        part = corners[start : start + size]
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, patch, strict=True)) for corner in part]
        hu, lung = np.stack([image[box] for box in boxes]), np.stack([mask[box] > 0 for box in boxes])
        try:
            tokens = encode_windows(student, hu, lung, part, noise, timesteps=config.timesteps, combine=config.combine)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            torch.cuda.empty_cache()
            log.warning("the device has no memory for the windows; going on with %d at a time", size)
            continue
        yield part, tokens
        start += size

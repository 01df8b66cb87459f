"""Self-attention of the middle block of a student, for windows of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from lungseg.diffusion.attention import Attention
from lungseg.diffusion.checkpoint import Student
from lungseg.diffusion.tokens import NoiseField, network_input
from lungseg.diffusion.unet import MIDDLE


@torch.no_grad()
def middle_attention(
    student: Student,
    windows_hu: np.ndarray,
    masks: np.ndarray,
    corners: np.ndarray,
    noise: NoiseField,
    *,
    timesteps: Sequence[int],
) -> np.ndarray:
    """How much each token of a window attends to each in the middle block, averaged over noise levels.

    Parameters
    ----------
    windows_hu, masks, corners, noise, timesteps
        As for :func:`lungseg.diffusion.tokens.encode_windows`; windows of at most the student's patch.

    Returns
    -------
    float32 array, shape (N, L, L)
        L tokens of a window, z slowest; rows sum to 1.
    """
    unet = student.unet
    names = unet.spec.block_names
    before = names[names.index(MIDDLE) - 1]
    entry, attention = unet.middle[0], cast(Attention, unet.middle[1])
    total: torch.Tensor | None = None
    for t in timesteps:
        x_t, times = network_input(student, windows_hu, masks, corners, noise, t)
        h = unet.activations(x_t, times, (before,))[before]
        weights = attention.weights(entry(h, unet.embed_time(times)))
        total = weights if total is None else total + weights
    assert total is not None, "at least one noise level"
    return (total / len(timesteps)).cpu().numpy()

"""What image i of a run looks like: its patch, changes of scanner, noise, noise level and the tokens to teach.

Everything random follows from (seed, index of the training image): neither the step, nor the rank, nor resuming
changes it.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.augmentation import ScannerChange, changes_hu
from lungseg.store.patches import PatchSource, mask_fractions

MIN_TOKEN_LUNG = 0.5
"""Share of lung in the teacher's (smallest) window below which a token is not taught (METHOD 1.5 step 3)."""
HELD_OUT_FIRST = 2**61
"""Index of the first held-out image: no run is as long."""
_NOISE_STREAM = 2**62
"""Separates the noise of image i from its place and flips, which use the same seed.

Less than 2**63: numpy turns a key of signed and unsigned integers into float64, the same for 2048 images in a row.
"""


def teacher_halo(config: TrainConfig) -> int:
    """Voxels around a patch that the teacher's windows of its border tokens reach into."""
    return (max(config.teacher_windows) - config.token_size) // 2 if config.distill == "tokens" else 0


def taught_levels(config: TrainConfig) -> int:
    """Highest noise level at which the teacher is contrasted: above it the texture it speaks of is drowned in noise."""
    return max(1, round(config.distill_levels * config.timesteps))


class TrainingImages(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Image number i of the run.

    Flips and turns move what network and teacher see alike. A change of HU enters the teacher too where
    ``teacher_view`` is `shown` (METHOD 7.3: radiomics of the very patch shown): the student then learns to say what is
    there, noise and all. With `clean` it learns what would be there on the original scan: features that do not
    follow dose and kernel, but must guess what noise hides.
    """

    def __init__(self, source: PatchSource, config: TrainConfig, *, augment: bool = True) -> None:
        """``augment=False`` leaves HU as they are (held-out images)."""
        self._source = source
        self._config = config
        self._changes_hu = augment and changes_hu(config)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        config = self._config
        patch = self._source.read(index)
        rng = np.random.Generator(np.random.Philox(key=[config.seed, _NOISE_STREAM + index]))
        # t = 0 is taught but has no noise to predict; tokens are read at t = 0 and little noise
        low = rng.random() < config.low_noise_share
        t = int(rng.integers(0, taught_levels(config) + 1) if low else rng.integers(1, config.timesteps + 1))
        eps = rng.standard_normal(config.patch_size, dtype=np.float32)
        token, valid = self._choose_tokens(patch.mask, rng)
        volume, median = patch.volume_hu, patch.lung_median_hu
        image = {}
        if self._changes_hu:
            change = ScannerChange.draw(config, rng)
            volume = change.apply(volume, rng)
            if config.teacher_view == "clean":
                image["teacher_hu"] = torch.from_numpy(patch.volume_hu)
            else:
                median += change.offset_hu  # what the scan's median would have been
        if patch.limits_hu is not None:
            image["limits_hu"] = torch.tensor(patch.limits_hu, dtype=torch.float32)
        return {
            **image,
            "volume_hu": torch.from_numpy(volume),
            "mask": torch.from_numpy(patch.mask),
            "lung_median_hu": torch.tensor(median, dtype=torch.float32),
            "t": torch.tensor(t),
            "eps": torch.from_numpy(eps),
            "token": torch.from_numpy(token),
            "token_valid": torch.from_numpy(valid & (t <= taught_levels(config))),
        }

    def _choose_tokens(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Lattice indices (M, 3) of tokens whose window is mostly lung, and which of the M slots are filled."""
        config = self._config
        count, p = config.tokens_per_patch, config.token_size
        lattice = tuple(n // p for n in config.patch_size)
        if config.distill != "tokens":
            return np.zeros((count, 3), dtype=np.int64), np.zeros(count, dtype=bool)
        index = np.stack(np.unravel_index(np.arange(math.prod(lattice)), lattice), axis=1)
        small = min(config.teacher_windows)
        # in the patch with its halo, the largest window of token i starts at i p, a smaller one further in
        corner = (index * p + window_offset(config, small)).astype(np.int32)
        share = mask_fractions(mask, corner, (small, small, small))
        candidates = np.flatnonzero(share >= MIN_TOKEN_LUNG)
        chosen = rng.permutation(candidates)[:count]
        token = np.zeros((count, 3), dtype=np.int64)
        token[: len(chosen)] = index[chosen]
        return token, np.arange(count) < len(chosen)


def window_offset(config: TrainConfig, window: int) -> int:
    """First voxel of the window around token 0 in a patch with its halo."""
    return (max(config.teacher_windows) - window) // 2

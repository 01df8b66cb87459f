"""Other scanners for a training patch: a shift of all HU, noise, and blur, as functions of a generator.

The domains of CT differ by kernel and dose (METHOD 4.5 (6), FEASIBILITY failure 8). All is off in every preset: HU
mean something, a diffusion model reproduces what it is shown (it would draw noisier patches), the phantoms vary in
kernel and dose already, and no measurement says yet that more of it helps. Flips and turns, which change no HU, are
drawn where the patch is read (``store/patches.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from lungseg.config.train_ddpm import TrainConfig


@dataclass(frozen=True)
class ScannerChange:
    """What one image is changed by."""

    offset_hu: float
    noise_hu: float
    """Standard deviation."""
    blur_voxels: float
    """Standard deviation."""

    @classmethod
    def draw(cls, config: TrainConfig, rng: np.random.Generator) -> ScannerChange:
        """Uniform up to the bounds of ``config``."""
        return cls(
            config.hu_offset * (2 * rng.random() - 1), config.hu_noise * rng.random(), config.hu_blur * rng.random()
        )

    def apply(self, volume_hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int16 HU of any shape (D, H, W), changed: noise first, so that a smooth kernel smooths it too."""
        hu = volume_hu.astype(np.float32)
        if self.noise_hu > 0:
            hu += self.noise_hu * rng.standard_normal(hu.shape, dtype=np.float32)
        if self.blur_voxels > 0:
            hu = gaussian_filter(hu, self.blur_voxels, mode="nearest")
        info = np.iinfo(np.int16)
        return np.clip(np.rint(hu + self.offset_hu), info.min, info.max).astype(np.int16)


def changes_hu(config: TrainConfig) -> bool:
    """Whether any HU augmentation is on."""
    return max(config.hu_offset, config.hu_noise, config.hu_blur) > 0

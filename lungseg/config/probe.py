"""Configuration of ``lungseg probe``: which features of a model to look at, and how closely."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option


@dataclass(frozen=True)
class ProbeConfig:
    """Noise levels and blocks to score without labels. Sources: METHOD 5 (ddpm-segmentation #25), 7.2."""

    timesteps: tuple[int, ...] = option((0, 5, 10, 25, 50, 100), "Noise levels t to score (0: clean scan).", minimum=0)
    blocks: tuple[str, ...] = option(
        (), "Blocks to score, e.g. encoder.2.0, middle, embedding; none: the encoder's, the middle and the embedding."
    )
    windows_per_case: int = option(8, "Training patches encoded a case.", minimum=1, maximum=10_000)
    tokens_per_case: int = option(500, "Tokens kept a case.", minimum=10, maximum=100_000)
    min_token_lung: float = option(0.5, "Tokens with a smaller share of lung are left out.", minimum=0, maximum=1)
    clusters: int = option(8, "Clusters (K-means) the scores are of.", minimum=2, maximum=256)
    pca: int = option(16, "Principal components, whitened, that are clustered.", minimum=2, maximum=512)
    max_silhouette: int = option(3_000, "Tokens the silhouette is computed on.", minimum=100, maximum=50_000)
    statistics_window: int = option(
        8, "Edge of the window whose HU and texture belong to a token.", unit="voxels", minimum=2, maximum=64
    )
    batch_size: int = option(4, "Windows per forward pass.", minimum=1)
    seed: int = option(42, "Seed of the noise, the sampling and the clusters.", minimum=0, maximum=MAX_SEED)

    def check(self) -> list[str]:
        """Conflicts between fields, in words."""
        return [] if self.timesteps else ["--timesteps is empty"]

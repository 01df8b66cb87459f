"""Configuration of ``lungseg cluster``: from a trained model to named posteriors."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option


@dataclass(frozen=True)
class ClusterConfig:
    """Tokens, mixture and naming. Sources: METHOD 1.1 (6), 1.5, 1.6; FEASIBILITY."""

    name: str = option("diffseglung", "Name of this clustering in the store; methods live side by side.")
    timesteps: tuple[int, ...] = option((0, 10, 25), "Noise levels t of the tokens (0: the clean scan).", minimum=0)
    combine: str = option("concat", "Tokens of several t: side by side, or averaged.", choices=("concat", "average"))
    encoding: str = option(
        "auto",
        "slabs: tokens of one pass over the lung; windows: overlapping, fused; auto: slabs if the model allows.",
        choices=("auto", "slabs", "windows"),
    )
    overlap: float = option(0.5, "Overlap of neighbouring windows (encoding windows).", minimum=0.0, maximum=0.9)
    window_sigma: float = option(0.125, "Width of the Gaussian window weights, in patches.", above=0.0)
    min_window_lung: float = option(0.01, "Windows with a smaller share of lung are skipped.", minimum=0, maximum=1)
    min_token_lung: float = option(0.5, "Tokens with a smaller share of lung are not fitted.", minimum=0, maximum=1)
    components: int = option(24, "Gaussians of the mixture.", minimum=1, maximum=512)
    pca: int | None = option(16, "Principal components kept; none: no reduction.", minimum=1)
    whiten: bool = option(True, "Scale the principal components to unit variance.")
    standardise: bool = option(False, "Scale each token dimension to unit variance before.")
    regularisation: float = option(1e-3, "Added to the diagonal of each covariance.", above=0.0)
    restarts: int = option(5, "Starts of the mixture; the most likely is kept.", minimum=1, maximum=100)
    iterations: int = option(100, "EM iterations at most.", minimum=1, maximum=10_000)
    naming: str = option("votes", "How components are named.", choices=("votes", "mean-hu", "mean-hu-adaptive"))
    naming_window: int = option(8, "Edge of the window whose HU name a token.", unit="voxels", minimum=2, maximum=64)
    naming_sigma_mm: float = option(
        0.6, "Smoothing before voxels are counted for naming (1 voxel of 0.6 mm).", unit="mm", above=0.0
    )
    tokens_per_case: int = option(20_000, "Tokens sampled a case for the fit.", minimum=10)
    max_tokens: int = option(500_000, "Tokens in the fit, over all cases.", minimum=100)
    batch_size: int = option(16, "Windows per forward pass.", minimum=1)
    slab_gib: float = option(
        2.0, "Memory of the largest slab (encoding slabs); the tokens do not depend on it.", unit="GiB", above=0.0
    )
    seed: int = option(42, "Seed of the noise, the sampling and the fit.", minimum=0, maximum=MAX_SEED)

    def check(self) -> list[str]:
        """Conflicts between fields, in words."""
        problems = []
        if not self.timesteps:
            problems.append("--timesteps is empty")
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            problems.append(f"--name '{self.name}': use letters, digits, - and _")
        return problems

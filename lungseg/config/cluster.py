"""Configuration of ``lungseg cluster``: from scans, and a trained model where the method has one, to posteriors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lungseg.config.fields import MAX_SEED, option

STUDENT_METHODS = ("diffseglung", "diffusion-only", "attention", "diffseglung+radiomics", "diffusion-only+radiomics")
"""Methods that need a trained model."""
RADIOMICS_METHODS = ("radiomics", "radiomics-kmeans", "diffseglung+radiomics", "diffusion-only+radiomics")
"""Methods whose tokens hold the radiomic descriptor."""
UNFITTED_METHODS = ("rules", "attention", "hu-thresholds")
"""Methods that say each token's tissue at once: there is nothing to fit."""
VOXEL_METHODS = ("hu-thresholds", "hu-gmm")
"""Methods that look at one voxel after the other: their lattice is the scan's grid."""
METHODS = (
    "diffseglung", "diffusion-only", "radiomics", "radiomics-kmeans", "rules", "attention", "hu-thresholds", "hu-gmm",
    "diffseglung+radiomics", "diffusion-only+radiomics",
)  # fmt: skip

METHOD_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # FEASIBILITY: windows of 8 voxels at stride 4 in place of 8 gave 5 to 8 points of DSC, and cost no passes here
    "radiomics": {"token_stride": 4},
    # the cells that evidence is counted in
    "rules": {"token_stride": 2},
    # METHOD 1.7, the paper's baseline; every window with any lung is labelled, those half full are fitted
    "radiomics-kmeans": {
        "mixture": "kmeans",
        "components": 5,
        "pca": 15,
        "whiten": False,
        "standardise": True,
        "restarts": 20,
        "iterations": 300,
        "naming": "mean-hu",
        "radiomics_window": 32,
        "token_stride": 16,
    },
    # METHOD 0.4, a 1-D mixture of smoothed HU: one component a tissue, and no reduction to think of
    "hu-gmm": {"components": 5, "pca": None, "whiten": False, "regularisation": 1.0, "naming": "mean-hu"},
    # maps of neighbouring windows need not overlap: each window is segmented by itself
    "attention": {"overlap": 0.0},
}
"""What a method changes against the preset, where neither the command line nor a file says otherwise."""


@dataclass(frozen=True)
class ClusterConfig:
    """Tokens, mixture and naming. Sources: METHOD 1.1 (6), 1.5-1.8; FEASIBILITY."""

    method: str = option("diffseglung", "What the tokens are, and how they become tissue.", choices=METHODS)
    name: str | None = option(None, "Name of this clustering in the store; none: the method's name.")
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
    token_stride: int | None = option(
        None, "Distance of the tokens; none: one for each token of the model, or each window.", unit="voxels", minimum=1
    )
    radiomics_window: int = option(
        8, "Edge of the windows of radiomic tokens; a multiple of their stride.", unit="voxels", minimum=2, maximum=64
    )
    attention_anchors: int = option(
        2, "Distance of the anchors of method attention.", unit="tokens", minimum=1, maximum=64
    )
    attention_threshold: float = option(
        0.5, "Attention maps closer than this are one segment (0.5 to 1 published).", unit="nats", above=0.0
    )
    mixture: str = option(
        "gmm",
        "Gaussian mixture, k-means, HU-anchored mixture, or von Mises-Fisher mixture.",
        choices=("gmm", "kmeans", "anchored", "vmf"),
    )
    components: int = option(24, "Components of the mixture.", minimum=1, maximum=512)
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
        if self.name is not None and (not self.name or not all(c.isalnum() or c in "-_" for c in self.name)):
            problems.append(f"--name '{self.name}': use letters, digits, - and _")
        wanted = METHOD_SETTINGS.get(self.method, {}).get("mixture")
        if wanted and self.mixture != wanted:
            problems.append(f"--method {self.method} means --mixture {wanted}, not {self.mixture}")
        if self.method == "hu-gmm" and self.mixture != "gmm":
            problems.append(f"--method hu-gmm means --mixture gmm, not {self.mixture}")
        if self.method in VOXEL_METHODS and self.token_stride not in (None, 1):
            problems.append(f"--method {self.method} looks at every voxel: leave --token-stride out")
        if self.mixture == "vmf" and (self.method in RADIOMICS_METHODS or self.method in UNFITTED_METHODS):
            problems.append("--mixture vmf is for unit vectors: use it with --method diffseglung or diffusion-only")
        return problems

    @property
    def run_name(self) -> str:
        """Name of this clustering in the store."""
        return self.name if self.name is not None else self.method.replace("+", "-")

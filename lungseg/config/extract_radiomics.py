"""Configuration of ``lungseg extract-radiomics``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option


@dataclass(frozen=True)
class RadiomicsConfig:
    """The 34 descriptors of windows of the lung, and their standardisation over the training patients."""

    window: int = option(32, "Edge of the cubic window.", unit="voxels", minimum=4, maximum=128)
    stride: int = option(16, "Distance between windows.", unit="voxels", minimum=1, maximum=128)
    min_lung_fraction: float = option(0.5, "Smallest share of lung in a window.", minimum=0.0, maximum=1.0)
    backend: str = option("torch", "Who computes GLCM and first-order features.", choices=("torch", "pyradiomics"))
    aggregation: str = option("merged", "How the 13 GLCM directions are combined.", choices=("merged", "mean"))
    mcc: bool = option(True, "Maximal correlation coefficient; without it, dissimilarity takes its place.")
    standardisation_windows: tuple[int, ...] = option(
        (8, 16, 32), "Windows whose median and IQR are kept for training.", unit="voxels", minimum=4, maximum=128
    )
    samples_per_case: int = option(
        2000, "Windows of each size sampled a case for the standardisation.", minimum=10, maximum=1_000_000
    )
    csv: bool = option(False, "Also write radiomics.csv into the store: all windows of all cases as one table.")
    picture: bool = option(
        False, "Also write radiomics.png: correlations, and distributions per tissue of cases that have a reference."
    )
    seed: int = option(0, "Seed of the sampling.", minimum=0, maximum=MAX_SEED)

"""Configuration of ``lungseg evaluate``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option


@dataclass(frozen=True)
class EvaluateConfig:
    """How label maps are scored. Source: METHOD 0.4."""

    name: str = option("diffseglung", "Clustering of the store to score.")
    view: str = option("tissues", "Classes of the table.", choices=("tissues", "paper", "ild", "abnormal"))
    bootstrap: int = option(2000, "Resamples of patients for the 95 % interval.", minimum=100, maximum=1_000_000)
    resample: bool = option(False, "Resample predictions of a folder onto the reference's grid if they differ.")
    seed: int = option(0, "Seed of the bootstrap.", minimum=0, maximum=MAX_SEED)

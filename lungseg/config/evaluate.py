"""Configuration of ``lungseg evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option
from lungseg.tissue import EVALUATION_VIEWS

MAX_BOOTSTRAP = 1_000_000
MAX_WORST = 100
"""Pictures of a page that still opens on a telephone."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How label maps are scored. Source: METHOD 0.4."""

    names: tuple[str, ...] = option(
        (), "Clusterings of a store to score (none: diffseglung), or what to call folders of label maps."
    )
    view: str = option("tissues", "Classes of the table.", choices=tuple(EVALUATION_VIEWS))
    hd95: str = option(
        "border",
        "HD95 of border voxels (MONAI's), of surfaces by area (surface-distance's) or pooled (medpy's).",
        choices=("border", "surface", "medpy"),
    )
    tolerance_mm: float = option(2.0, "Tolerance of the surface Dice.", unit="mm", above=0.0, maximum=100.0)
    mode: str = option(
        "volume", "Whole volumes, or each axial slice that the reference annotates.", choices=("volume", "slices")
    )
    label_map: tuple[str, ...] = option(
        (), "Meaning of the predictions' ids: FILE or a built-in name; one for all, or one for each folder."
    )
    reference_label_map: str = option("", "Meaning of the references' ids, as --label-map. Empty: lungseg's own.")
    resample_to: str = option(
        "none", "Bring predictions of another grid onto the reference's.", choices=("none", "reference")
    )
    oracle: bool = option(True, "Also score the best naming that the reference allows: a bound, not a result.")
    bootstrap: int = option(2000, "Resamples of patients for the 95 % interval.", minimum=100, maximum=MAX_BOOTSTRAP)
    worst: int = option(5, "Worst class-case pairs of each method to show.", minimum=0, maximum=MAX_WORST)
    seed: int = option(0, "Seed of the bootstrap.", minimum=0, maximum=MAX_SEED)

    def check(self) -> Iterator[str]:
        """Conflicts between fields, in words."""
        if len(set(self.names)) < len(self.names):
            yield f"--names: each name once, not {', '.join(self.names)}"

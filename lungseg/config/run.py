"""Configuration of ``lungseg run``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option
from lungseg.config.preprocess import LUNG_MASK_LABELS
from lungseg.config.presets import PRESETS

AUTO_PRESET = "auto"


@dataclass(frozen=True)
class RunConfig:
    """Everything for new scans. Spacing and network come from the model; stages can be set in a TOML file."""

    preset: str = option(
        AUTO_PRESET,
        "Named settings of the stages; auto: the model's, `lungseg` with --train, `small` (1 mm) with neither.",
        choices=(AUTO_PRESET, *PRESETS),
    )
    config: str = option("", "TOML file; its tables, named like the commands, set options of the stages.")
    salt: str = option("", "Secret that makes case ids reproducible; empty: a new random one.")
    lung_mask_labels: str = option(
        "auto", "What the labels of --lung-mask mean; auto: as the TOML file says.", choices=LUNG_MASK_LABELS
    )
    seed: int | None = option(None, "Seed of all stages; none: each stage's own.", minimum=0, maximum=MAX_SEED)

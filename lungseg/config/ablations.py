"""The published ablation (METHOD 1.7) and our own: one row, one set of changes to a preset, never an edit.

``ABLATIONS`` is what ``make tables`` and experiments loop over; README lists the same rows as options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lungseg.config.cluster import ClusterConfig
from lungseg.config.presets import DEFAULT_PRESET, make_config
from lungseg.config.refine import RefineConfig
from lungseg.config.train_ddpm import TrainConfig
from lungseg.errors import UsageError

ConfigT = TypeVar("ConfigT")
Changes = Mapping[type, Mapping[str, Any]]


@dataclass(frozen=True)
class Ablation:
    """One row of a table."""

    doc: str
    """What it shows, in a few words."""
    changes: Changes
    """Settings against the preset, per command."""


_NO_FUSION: Changes = {RefineConfig: {"fusion": "none"}}
_ONE_LEVEL: Changes = {ClusterConfig: {"timesteps": (10,)}, **_NO_FUSION}
_NO_WARM_UP = {"distill_start": 0.0, "distill_full": 0.0}

ABLATIONS: Mapping[str, Ablation] = {
    # the paper's table 3, each row with one switch more than the one above
    "1-8-bit": Ablation(
        "8-bit input, no distillation, one noise level, no fusion",
        {TrainConfig: {"hu_window": "8-bit", "distill": "none"}, **_ONE_LEVEL},
    ),
    "2-hu": Ablation("HU kept", {TrainConfig: {"distill": "none"}, **_ONE_LEVEL}),
    "3-distillation": Ablation("distillation from the first step on", {TrainConfig: _NO_WARM_UP, **_ONE_LEVEL}),
    "4-warm-up": Ablation("distillation with warm-up", _ONE_LEVEL),
    "5-timesteps": Ablation("several noise levels side by side", _NO_FUSION),
    "6-sobel": Ablation("contours by Sobel-Diffusion Fusion: the whole method", {}),
    # our own: each row against the whole method
    "no-distillation": Ablation("diffusion alone", {TrainConfig: {"distill": "none"}}),
    "patch-level": Ablation("one vector a patch is taught, as published", {TrainConfig: {"distill": "patches"}}),
    "no-warm-up": Ablation("distillation from the first step on", {TrainConfig: _NO_WARM_UP}),
    # without contrast the projection that the floor speaks of is not used
    "regression-only": Ablation("no contrast", {TrainConfig: {"distill_weight": 0.0, "collapse_weight": 0.0}}),
    "infonce-only": Ablation("no regression head", {TrainConfig: {"regression_weight": 0.0}}),
    "no-rank-floor": Ablation("no term against collapse", {TrainConfig: {"collapse_weight": 0.0}}),
    "diagonal": Ablation("only the own pair positive, as the authors' code", {TrainConfig: {"contrast": "diagonal"}}),
    "threshold": Ablation("no grey zone, as the paper's text", {TrainConfig: {"contrast": "threshold"}}),
    "soft-queue": Ablation("soft positives and a queue", {TrainConfig: {"contrast": "soft", "queue_size": 4096}}),
    "teacher-8": Ablation("teacher of 8^3 voxels alone", {TrainConfig: {"teacher_windows": (8,)}}),
    "teacher-16": Ablation("teacher of 16^3 voxels alone", {TrainConfig: {"teacher_windows": (16,)}}),
    "detached": Ablation("heads alone learn from the teacher", {TrainConfig: {"detach_bottleneck": True}}),
    "linear-hu": Ablation("linear HU window", {TrainConfig: {"hu_window": "linear"}}),
    "8-bit": Ablation("8-bit input", {TrainConfig: {"hu_window": "8-bit"}}),
    "v-prediction": Ablation(
        "v-prediction to pure noise, min-SNR weights",
        {TrainConfig: {"prediction": "v", "zero_terminal": True, "snr_gamma": 5.0}},
    ),
    "scanners": Ablation(
        "HU shifted, noisy and blurred, the teacher seeing the same",
        {TrainConfig: {"hu_offset": 15.0, "hu_noise": 30.0, "hu_blur": 0.8}},
    ),
    "scanners-clean": Ablation(
        "the same, the teacher seeing the clean patch",
        {TrainConfig: {"hu_offset": 15.0, "hu_noise": 30.0, "hu_blur": 0.8, "teacher_view": "clean"}},
    ),
    "no-turns": Ablation("no turns in the axial plane", {TrainConfig: {"axial_turns": False}}),
    "one-timestep": Ablation("one noise level", {ClusterConfig: {"timesteps": (10,)}}),
}


def ablation_config(cls: type[ConfigT], name: str, *, preset: str = DEFAULT_PRESET, **values: Any) -> ConfigT:
    """Configuration of one command for one row, on top of a preset; ``values`` (such as the seed) come last.

    Raises
    ------
    UsageError
        For an unknown row.
    """
    if name not in ABLATIONS:
        raise UsageError(f"ablation '{name}' is not one of {', '.join(ABLATIONS)}")
    return make_config(cls, preset=preset, file_values=ABLATIONS[name].changes.get(cls), **values)

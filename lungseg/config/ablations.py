"""The published ablation (METHOD 1.7), our own, and the methods of table 2: one row, one set of changes to a preset.

``ABLATIONS`` and ``METHODS`` are what ``lungseg benchmark`` and experiments loop over, never an edit; README lists the
ablations as options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Published:
    """What the paper prints for a row; four classes, 190 annotated axial slices, the unit of HD95 not given."""

    hd95: float
    mean_dice: float
    """Percent. Table 2 prints no mean: the mean of its four classes."""
    dice: Mapping[str, float] = field(default_factory=dict)
    """Percent, by tissue."""


_NO_FUSION: Changes = {RefineConfig: {"fusion": "none", "rim_mm": 0.0, "min_component_ml": 0.05}}
_ONE_LEVEL: Changes = {ClusterConfig: {"timesteps": (10,)}, **_NO_FUSION}
_NO_WARM_UP = {"distill_start": 0.0, "distill_full": 0.0}
_UNTAUGHT = {"distill": "none"}
# without distillation nothing has trained the head: the tokens are those of the bottleneck
_BOTTLENECK = {"method": "diffusion-only"}
_UNTAUGHT_ONE_LEVEL: Changes = {ClusterConfig: {"timesteps": (10,), **_BOTTLENECK}, **_NO_FUSION}

ABLATIONS: Mapping[str, Ablation] = {
    # the paper's table 3, each row with one switch more than the one above
    "1-8-bit": Ablation(
        "8-bit input, no distillation, one noise level, no fusion",
        {TrainConfig: {"hu_window": "8-bit", **_UNTAUGHT}, **_UNTAUGHT_ONE_LEVEL},
    ),
    "2-hu": Ablation("HU kept", {TrainConfig: _UNTAUGHT, **_UNTAUGHT_ONE_LEVEL}),
    "3-distillation": Ablation("distillation from the first step on", {TrainConfig: _NO_WARM_UP, **_ONE_LEVEL}),
    "4-warm-up": Ablation("distillation with warm-up", _ONE_LEVEL),
    "5-timesteps": Ablation("several noise levels side by side", _NO_FUSION),
    "6-sobel": Ablation(
        "contours by Sobel-Diffusion Fusion: the whole method",
        {RefineConfig: {"fusion": "sobel", "rim_mm": 0.0, "min_component_ml": 0.05}},
    ),
    # our own: each row against the whole method
    "no-distillation": Ablation("diffusion alone", {TrainConfig: _UNTAUGHT, ClusterConfig: _BOTTLENECK}),
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

TABLE_3 = ("1-8-bit", "2-hu", "3-distillation", "4-warm-up", "5-timesteps", "6-sobel")
"""Rows of the cumulative ablation, in order."""


def _method(
    doc: str, method: str, train: Mapping[str, Any] | None = None, *, plain: bool = False, **clustering: Any
) -> Ablation:
    """``plain``: label maps of the plain posterior, as a baseline has them."""
    taught: Changes = {TrainConfig: train} if train else {}
    return Ablation(doc, {**taught, ClusterConfig: {"method": method, **clustering}, **(_NO_FUSION if plain else {})})


METHODS: Mapping[str, Ablation] = {
    "hu-thresholds": _method("literature cuts of the HU, median filter 3^3", "hu-thresholds", plain=True),
    "hu-gmm": _method("one-dimensional mixture of smoothed HU", "hu-gmm", plain=True),
    "radiomics-kmeans": _method("the paper's baseline: K-means, K = 5, mean-HU names", "radiomics-kmeans", plain=True),
    "rules": _method("naming rules on HU and texture of tokens, nothing learned", "rules"),
    "radiomics": _method("the same mixture and names on the teacher's descriptor", "radiomics"),
    "radiomics-anchored": _method("the teacher's descriptor, mixture anchored at HU", "radiomics", mixture="anchored"),
    # what the paper compares with has not been taught either
    "attention": _method("merged self-attention of an untaught network (DiffSeg)", "attention", _UNTAUGHT),
    "diffusion-only": _method("bottleneck of an untaught network", "diffusion-only", _UNTAUGHT),
    "diffusion-only-radiomics": _method("that, beside radiomics", "diffusion-only+radiomics", _UNTAUGHT),
    "diffseglung": _method("distilled tokens: the method, as it is by default", "diffseglung"),
    "diffseglung-anchored": _method("distilled tokens, mixture anchored at HU", "diffseglung", mixture="anchored"),
    "diffseglung-radiomics": _method("that, beside radiomics", "diffseglung+radiomics"),
}
"""Rows of table 2, the cheapest first."""
WHOLE_METHOD = "diffseglung"

ROWS: Mapping[str, Ablation] = {**METHODS, **{name: ABLATIONS[name] for name in TABLE_3}}
"""Rows of both tables."""

PUBLISHED: Mapping[str, Published] = {
    # METHOD 1.7, segmentation
    "radiomics-kmeans": Published(
        18.7, 66.2, {"healthy": 71.2, "ggo": 66.8, "fibrosis": 68.4, "emphysema": 58.3}
    ),
    "diffusion-only": Published(15.4, 71.4, {"healthy": 78.4, "ggo": 71.3, "fibrosis": 73.1, "emphysema": 62.7}),
    "attention": Published(13.2, 75.3, {"healthy": 81.6, "ggo": 75.2, "fibrosis": 77.8, "emphysema": 66.4}),
    "diffseglung": Published(8.6, 84.0, {"healthy": 89.3, "ggo": 84.1, "fibrosis": 86.4, "emphysema": 76.2}),
    # METHOD 1.7, ablation
    "1-8-bit": Published(18.4, 71.3),
    "2-hu": Published(16.1, 74.8),
    "3-distillation": Published(14.3, 77.6),
    "4-warm-up": Published(12.7, 79.9),
    "5-timesteps": Published(10.5, 82.1),
    "6-sobel": Published(8.6, 84.0),
}  # fmt: skip


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

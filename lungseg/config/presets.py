"""Named settings: what each preset changes against the defaults (= preset `lungseg`), per configuration class.

A preset fills only what neither the command line nor a TOML file says. Sources: METHOD 0.5, 1.1-1.5; FEASIBILITY.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lungseg.config.cluster import METHOD_SETTINGS, ClusterConfig
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.fields import from_dict
from lungseg.config.phantom import PhantomConfig
from lungseg.config.preprocess import PreprocessConfig
from lungseg.config.refine import RefineConfig
from lungseg.config.synthesize import SynthesizeConfig
from lungseg.config.train_ddpm import TrainConfig
from lungseg.errors import UsageError

ConfigT = TypeVar("ConfigT")

DEFAULT_PRESET = "lungseg"

_PAPER_TRAIN: dict[str, Any] = {
    "norm": "group",
    "attention": "patch",
    "hu_window": "paper",
    "distill": "patches",
    "distill_levels": 1.0,
    "low_noise_share": 0.0,
    "regression_weight": 0.0,
    "collapse_weight": 0.0,
    "axial_turns": False,
    "clip_norm": 0.3,
    "ema_decay": 0.995,
}

_TINY_PATCHES: dict[str, Any] = {"patch_size": (16, 32, 32), "patch_stride": (8, 16, 16)}
_SMALL_PATCHES: dict[str, Any] = {"patch_size": (32, 64, 64), "patch_stride": (16, 32, 32)}

PRESETS: Mapping[str, Mapping[type, Mapping[str, Any]]] = {
    # CPU, demo, tests: a model in two minutes on two cores
    "tiny": {
        PreprocessConfig: {"spacing_mm": 1.5, **_TINY_PATCHES},
        PhantomConfig: {"store_spacing_mm": 1.5, **_TINY_PATCHES},
        RadiomicsConfig: {"window": 16, "stride": 8, "standardisation_windows": (8, 16), "samples_per_case": 500},
        TrainConfig: {
            "base_width": 16,
            "multipliers": (1, 2),
            "stem": 2,
            "patch_size": (16, 32, 32),
            "total_images": 4_800,
            "batch_size": 12,
            "learning_rate": 1e-3,
            "warmup_share": 0.05,
            "ema_decay": 0.99,
            # four hundred steps are too few to wait a sixth of them, and too few for a weak teacher
            "distill_start": 0.0,
            "distill_full": 0.1,
            "regression_weight": 3.0,
            "tokens_per_patch": 32,
            "teacher_windows": (8,),
            "collapse_weight": 0.0,
            "axial_turns": False,
            # every patient of a demo is needed, and a picture would cost a twentieth of its time
            "held_out": 0.0,
            "preview_images": 0,
            "checkpoint_images": 1_200,
            "log_images": 240,
        },
        ClusterConfig: {"encoding": "windows", "pca": 12, "iterations": 200, "tokens_per_case": 4_000},
        SynthesizeConfig: {"steps": 20},
    },
    # one consumer GPU
    "small": {
        PreprocessConfig: {"spacing_mm": 1.0, **_SMALL_PATCHES},
        PhantomConfig: {"store_spacing_mm": 1.0, **_SMALL_PATCHES},
        TrainConfig: {"base_width": 32, "patch_size": (32, 64, 64), "total_images": 160_000, "learning_rate": 2e-4},
    },
    "lungseg": {},
    # the authors' published code, as far as it runs: METHOD 1.0
    "paper-code": {
        TrainConfig: {**_PAPER_TRAIN, "contrast": "diagonal", "head_norm": "batch", "unet_rate_scale": 0.05},
        ClusterConfig: {
            "timesteps": (100,),
            "combine": "average",
            "components": 5,
            "pca": 30,
            "whiten": False,
            "standardise": True,
            "regularisation": 1e-4,
            "naming": "mean-hu-adaptive",
        },
        RefineConfig: {"fusion": "none", "rim_mm": 0.0, "min_component_ml": 0.05},
    },
    # the paper's text
    "paper-text": {
        TrainConfig: {**_PAPER_TRAIN, "contrast": "threshold", "negative_similarity": 0.7},
        ClusterConfig: {
            "timesteps": (25, 75, 120),
            "components": 5,
            "pca": None,
            "whiten": False,
            "regularisation": 1e-4,
            "naming": "mean-hu",
        },
        RefineConfig: {"fusion": "sobel", "rim_mm": 0.0, "min_component_ml": 0.05},
    },
}


def make_config(
    cls: type[ConfigT],
    *,
    preset: str = DEFAULT_PRESET,
    file_values: Mapping[str, Any] | None = None,
    **values: Any,
) -> ConfigT:
    """Configuration from a preset, overlaid by a file's values, overlaid by explicit ones (``None``: not given).

    A method of clustering brings settings of its own, which go over those of the preset.

    Raises
    ------
    UsageError
        For an unknown preset, an unknown name, or a value of the wrong type or range.
    """
    if preset not in PRESETS:
        raise UsageError(f"--preset: '{preset}' is not one of {', '.join(PRESETS)}")
    given = {key.replace("-", "_"): value for key, value in (file_values or {}).items()}
    given.update({key: value for key, value in values.items() if value is not None})
    merged: dict[str, Any] = dict(PRESETS[preset].get(cls, {}))
    if cls is ClusterConfig:
        merged.update(METHOD_SETTINGS.get({**merged, **given}.get("method", ""), {}))
    merged.update(given)
    return from_dict(cls, merged)

"""lungseg: maps and numbers of lung pathology from unlabelled CT scans.

Each command is a function of the same name: ``from lungseg import preprocess, train_ddpm, cluster``. They are
imported on first use, so that ``import lungseg`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_STAGES = (
    "preprocess", "extract_radiomics", "train_ddpm", "synthesize", "cluster", "refine", "evaluate", "run", "demo",
    "phantom", "doctor", "info", "probe", "export_model", "benchmark",
)  # fmt: skip

__all__ = ["__version__", *_STAGES]


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return getattr(importlib.import_module(f"lungseg.stages.{name}"), name)
    raise AttributeError(f"module 'lungseg' has no attribute '{name}'")

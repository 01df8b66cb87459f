"""A cohort of six tiny patients and a network that trains on it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_store import PATCH, make_store

from lungseg.config import Execution, RadiomicsConfig, TrainConfig, make_config
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.store.cases import Store

QUIET = Execution(quiet=True, device="cpu")


def make_cohort(folder: Path, *, cases: int = 6) -> Store:
    """A store with the standardisations of both of the teacher's windows."""
    store = make_store(folder, cases=cases)
    radiomics = make_config(
        RadiomicsConfig, preset="tiny", window=8, stride=8, samples_per_case=60, standardisation_windows=(8, 16)
    )
    extract_radiomics(store, radiomics, execution=QUIET).require_complete()
    return store


def quick(**values: Any) -> TrainConfig:
    """Six steps of four patches."""
    settings = {
        "base_width": 8,
        "patch_size": PATCH,
        "timesteps": 20,
        "total_images": 24,
        "batch_size": 4,
        "checkpoint_images": 8,
        "log_images": 8,
        "tokens_per_patch": 4,
        "embedding": 16,
    }
    return make_config(TrainConfig, preset="tiny", **{**settings, **values})

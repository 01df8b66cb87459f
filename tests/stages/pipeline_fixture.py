"""A cohort of two very small phantoms and settings that take the whole pipeline through in seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lungseg.config import (
    ClusterConfig,
    EvaluateConfig,
    Execution,
    PhantomConfig,
    PreprocessConfig,
    RadiomicsConfig,
    RefineConfig,
    SynthesizeConfig,
    TrainConfig,
    make_config,
)
from lungseg.stages.cluster import cluster
from lungseg.stages.evaluate import evaluate
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.stages.phantom import phantom
from lungseg.stages.preprocess import preprocess
from lungseg.stages.refine import refine
from lungseg.stages.synthesize import synthesize
from lungseg.stages.train_ddpm import train_ddpm

QUIET = Execution(quiet=True)
PHANTOM = PhantomConfig(num=2, seed=11, extent_mm=(100.0, 110.0, 130.0), spacing_mm=(2.5, 2.0, 2.0))
PREPROCESS = make_config(
    PreprocessConfig, preset="tiny", spacing_mm=2.0, patch_size=(16, 16, 16), patch_stride=(8, 8, 8), salt="test"
)
RADIOMICS = make_config(RadiomicsConfig, preset="tiny", samples_per_case=60, standardisation_windows=(8,))
TRAIN = make_config(
    TrainConfig, preset="tiny", base_width=8, patch_size=(16, 16, 16), total_images=24, batch_size=4,
    checkpoint_images=8, log_images=8, tokens_per_patch=4,
)  # fmt: skip
CLUSTER = make_config(ClusterConfig, preset="tiny", components=8, pca=4, restarts=1, tokens_per_case=400)
REFINE = RefineConfig()
SYNTHESIZE = make_config(SynthesizeConfig, preset="tiny", num=3, steps=3, batch_size=2)
EVALUATE = EvaluateConfig(bootstrap=100)

TOML = """
[preprocess]
spacing-mm = 2.0
patch-size = [16, 16, 16]
patch-stride = [8, 8, 8]

[extract-radiomics]
samples-per-case = 60
standardisation-windows = [8]

[train-ddpm]
base-width = 8
patch-size = [16, 16, 16]
total-images = 24
batch-size = 4
checkpoint-images = 8
log-images = 8
tokens-per-patch = 4

[cluster]
components = 8
pca = 4
restarts = 1
tokens-per-case = 400
"""
"""The same settings as a file for ``lungseg run --config``."""


def make_phantoms(folder: Path) -> Path:
    """Two phantoms with manifest; returns the manifest."""
    phantom(folder, PHANTOM, execution=QUIET)
    return folder / "manifest.csv"


def run_stages(manifest: Path, root: Path, *, execution: Execution = QUIET) -> Path:
    """Every stage in order, below ``root``."""
    store = root / "store"
    preprocess(None, store, PREPROCESS, manifest=manifest, execution=execution).require_complete()
    extract_radiomics(store, RADIOMICS, execution=execution).require_complete()
    train_ddpm(store, root / "run", TRAIN, execution=execution)
    cluster(store, root / "run", CLUSTER, bundle=root / "bundle.safetensors", execution=execution).require_complete()
    refine(store, REFINE, export=root / "results", execution=execution).require_complete()
    evaluate(store, root / "scores", EVALUATE, execution=execution)
    synthesize(root / "run", root / "synthetic", SYNTHESIZE, execution=execution)
    return root


def tree_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below ``root``, by relative path."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }

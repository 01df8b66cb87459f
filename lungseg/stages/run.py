"""``lungseg run``: everything for new scans, with a model or by training one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lungseg.config.cluster import ClusterConfig
from lungseg.config.evaluate import EvaluateConfig
from lungseg.config.execution import Execution
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.fields import read_toml
from lungseg.config.preprocess import PreprocessConfig
from lungseg.config.presets import DEFAULT_PRESET, PRESETS, make_config
from lungseg.config.refine import RefineConfig
from lungseg.config.run import RunConfig
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import load_student, read_model_file
from lungseg.errors import UsageError
from lungseg.stages.cluster import cluster, find_model
from lungseg.stages.cohort import FAILED, StageResult
from lungseg.stages.evaluate import evaluate
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.stages.preprocess import preprocess
from lungseg.stages.refine import refine
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.cases import Store

log = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT")

HOW_TO_GET_A_MODEL = (
    "no model given. Either name one with --model FILE (a bundle from a colleague, or RUN of lungseg train-ddpm), "
    "or train one on these scans with --train (about two minutes with --preset tiny; hours on a GPU with the others)"
)


def run(
    scans: Sequence[Path] | Path | str | None,
    output: Path,
    config: RunConfig = RunConfig(),
    *,
    model: Path | None = None,
    manifest: Path | None = None,
    id_map: Path | None = None,
    train: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """From scans to label maps, numbers and pictures in ``output``.

    ``output/store`` is the patch store, ``output/results`` holds what ``refine --export`` writes, ``output/scores``
    the evaluation if the manifest names references, and with ``train`` ``output/model`` the training run and
    ``output/bundle.safetensors`` the model with its fit.

    Raises
    ------
    UsageError
        If neither a model nor ``train`` is given (saying what to do), or both.
    """
    if (model is None) == (not train):
        raise UsageError(HOW_TO_GET_A_MODEL if model is None else "--model and --train exclude each other")
    output = Path(output)
    stages = _Settings(config, Path(model) if model else None)
    store_path, bundle = output / "store", output / "bundle.safetensors"
    prepared = preprocess(
        scans,
        store_path,
        stages.make(PreprocessConfig, "preprocess", salt=config.salt or None),
        manifest=manifest,
        id_map=id_map,
        execution=execution,
    )
    if all(outcome.status == FAILED for outcome in prepared.outcomes):
        return prepared
    store = Store(store_path)
    clustering = stages.make(ClusterConfig, "cluster")
    if train:
        make_bundle(store, output / "model", bundle, stages, execution=execution)
        model = bundle
    fitted = _has_fit(find_model(Path(str(model))))
    if not fitted:
        log.info("run: the model brings no fit; fitting the mixture on these scans")
    clustered = cluster(
        store, Path(str(model)), clustering, fit=Path(str(model)) if fitted else None, execution=execution
    )
    refined = refine(
        store,
        stages.make(RefineConfig, "refine", name=clustering.name),
        export=output / "results",
        execution=execution,
    )
    tables, values = (), {}
    if any(store.case_file(case_id, "reference").exists() for case_id in store.case_ids()):
        scored = evaluate(
            store, output / "scores", stages.make(EvaluateConfig, "evaluate", name=clustering.name), execution=execution
        )
        tables, values = scored.tables, scored.values
    outcomes = {outcome.case_id: outcome for outcome in prepared.outcomes}
    for result in (clustered, refined):
        outcomes.update({o.case_id: _worse(outcomes.get(o.case_id), o) for o in result.outcomes})
    return StageResult("run", output, tuple(outcomes.values()), tables=tables, notes=refined.notes, values=values)


def _worse(old: Any, new: Any) -> Any:
    """The outcome to tell of one case: a failure if there was one, and the warnings of both."""
    if old is None or new.status == FAILED:
        return new
    if old.status == FAILED:
        return old
    return dataclasses.replace(old, message="; ".join(text for text in (old.message, new.message) if text))


class _Settings:
    """Configurations of the stages: preset, TOML file, and what the model dictates."""

    def __init__(self, config: RunConfig, model: Path | None) -> None:
        self._config = config
        self._dictated: dict[type, dict[str, Any]] = {}
        self._preset = config.preset
        if model is not None:
            student = load_student(find_model(model))
            self._preset = _preset_of(student.config) if config.preset == DEFAULT_PRESET else config.preset
            self._dictated[PreprocessConfig] = {
                "spacing_mm": student.card["spacing_mm"],
                "patch_size": student.config.patch_size,
                "patch_stride": tuple(max(1, n // 2) for n in student.config.patch_size),
            }
            metadata, _ = read_model_file(find_model(model))
            if metadata["extra"]:  # tokens must be made as those the mixture was fitted on
                fit = metadata["extra"]["provenance"]["config"]
                names = {field.name for field in dataclasses.fields(ClusterConfig)}
                self._dictated[ClusterConfig] = {key: value for key, value in fit.items() if key in names}

    def make(self, cls: type[ConfigT], command: str, **values: Any) -> ConfigT:
        """Configuration of one stage."""
        file = Path(self._config.config) if self._config.config else None
        file_values = read_toml(file, command) if file else {}
        merged = {**self._dictated.get(cls, {}), **{k: v for k, v in values.items() if v is not None}}
        return make_config(cls, preset=self._preset, file_values=file_values, **merged)


def _preset_of(config: TrainConfig) -> str:
    """The preset whose network the model has, else the default one."""
    keys = ("base_width", "multipliers", "stem", "norm", "patch_size", "hu_window", "contrast")
    for preset in PRESETS:
        if all(getattr(make_config(TrainConfig, preset=preset), key) == getattr(config, key) for key in keys):
            return preset
    return DEFAULT_PRESET


def make_bundle(store: Store, run_dir: Path, bundle: Path, stages: _Settings, *, execution: Execution) -> StageResult:
    """Radiomics, training and fit on the training cases of a store; model and fit go into one file."""
    extract_radiomics(store, stages.make(RadiomicsConfig, "extract-radiomics"), execution=execution).require_complete()
    train_ddpm(store, run_dir, stages.make(TrainConfig, "train-ddpm"), execution=execution)
    return cluster(
        store, run_dir, stages.make(ClusterConfig, "cluster"), bundle=bundle, fit_only=True, execution=execution
    )


def stage_settings(preset: str) -> _Settings:
    """Settings of all stages for one preset."""
    return _Settings(RunConfig(preset=preset), None)


def _has_fit(model: Path) -> bool:
    metadata, _ = read_model_file(model)
    return bool(metadata["extra"])

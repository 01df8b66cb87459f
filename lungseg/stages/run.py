"""``lungseg run``: everything for new scans, with a model or by training one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lungseg.config.cluster import RADIOMICS_METHODS, STUDENT_METHODS, UNFITTED_METHODS, ClusterConfig
from lungseg.config.evaluate import EvaluateConfig
from lungseg.config.execution import Execution
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.fields import read_toml, to_dict
from lungseg.config.preprocess import PreprocessConfig
from lungseg.config.presets import DEFAULT_PRESET, PRESETS, make_config
from lungseg.config.refine import RefineConfig
from lungseg.config.report import ReportConfig
from lungseg.config.run import AUTO_PRESET, RunConfig
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import load_student, read_model_file
from lungseg.errors import UsageError
from lungseg.models import starter_path
from lungseg.scan.lung_mask_labels import AUTO
from lungseg.stages.cluster import cluster
from lungseg.stages.cohort import CaseOutcome, StageResult, output_folder
from lungseg.stages.evaluate import evaluate
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.stages.fits import find_model, fitted_settings
from lungseg.stages.preprocess import preprocess
from lungseg.stages.refine import refine
from lungseg.stages.report import Beside, report_pages
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.cases import Store

log = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT")

METHOD_WITHOUT_MODEL, PRESET_WITHOUT_MODEL = "rules", "small"
"""What maps best of all that needs no training, and the grid it was measured on (tests/benchmarks/EXPERIMENTS.md)."""
HOW_TO_GET_A_MODEL = (
    "no model given, and this installation ships no starter model. Either name one with --model FILE (a bundle from a "
    "colleague, or RUN of lungseg train-ddpm), or train one on these scans with --train (about two minutes with "
    "--preset tiny; hours on a GPU with the others)"
)


def run(
    scans: Sequence[Path] | Path | str | None,
    output: Path,
    config: RunConfig = RunConfig(),
    *,
    model: Path | None = None,
    manifest: Path | None = None,
    id_map: Path | None = None,
    series: Sequence[str] = (),
    lung_mask: Path | str | None = None,
    train: bool = False,
    pictures: Sequence[Path] = (),
    execution: Execution = Execution(),
) -> StageResult:
    """From scans to label maps, numbers and pictures in ``output``.

    ``output/store`` is the patch store, ``output/results`` holds what ``refine --export`` writes, ``output/report`` the
    pages of ``report``, ``output/scores`` the evaluation if the manifest names references, and with ``train``
    ``output/model`` the training run and ``output/bundle.safetensors`` the model with its fit. The page shows the
    pictures of all of them, of the run that ``model`` lies in, and of the folders ``pictures``.

    Without a model and without ``train`` the method is ``METHOD_WITHOUT_MODEL`` on the grid of
    ``PRESET_WITHOUT_MODEL``, unless the configuration says otherwise; a method that needs a model then takes the
    shipped starter model, which brings its limits along.

    Raises
    ------
    UsageError
        If both a model and ``train`` are given; if neither, the method needs a model, and none is shipped (saying what
        to do); or if ``train`` is asked for a method that uses no model.
    """
    if model is not None and train:
        raise UsageError("--model and --train exclude each other")
    plan = plan_run(config, model=Path(model) if model else None, train=train)
    if model is None and not train and _needs_model(plan):
        model = shipped_model()
        limits = read_model_file(model)[0]["card"].get("limits", "not stated")
        log.info("run: no --model given, so the starter model shipped with lungseg is used. Its limits: %s", limits)
        plan = plan_run(config, model=model)
    elif model is None and not train:
        log.info(
            "run: no --model given: method %s, which needs none, on a grid of %g mm; --model starter takes the shipped "
            "network",
            plan.cluster.method,
            plan.preprocess.spacing_mm,
        )
    if train and not _needs_model(plan):
        raise UsageError(f"--train trains a model, which method {plan.cluster.method} of [cluster] does not use")
    output = output_folder(Path(output))
    store_path, bundle = output / "store", output / "bundle.safetensors"
    prepared = preprocess(
        scans, store_path, plan.preprocess, manifest=manifest, id_map=id_map, series=series, lung_mask=lung_mask,
        execution=execution,
    )  # fmt: skip
    if not prepared.complete():
        return prepared
    store = Store(store_path)
    if train:
        make_bundle(store, output / "model", bundle, plan, execution=execution)
    source = bundle if train else find_model(Path(model)) if model else None
    fitted = source is not None and _has_fit(source)
    if not fitted and plan.cluster.method not in UNFITTED_METHODS:
        log.info("run: no fit is given; fitting the mixture on these scans")
    if source is None and plan.cluster.method in RADIOMICS_METHODS:
        described = extract_radiomics(store, plan.radiomics, execution=execution)
        if not described.complete():
            return _merged(output, (prepared, described))
    clustered = cluster(store, source, plan.cluster, fit=source if fitted else None, execution=execution)
    if not clustered.complete():
        return _merged(output, (prepared, clustered))
    refined = refine(store, plan.refine, export=output / "results", execution=execution)
    scored = None
    if any(store.case_file(case_id, "reference").exists() for case_id in store.case_ids()):
        scored = evaluate(store, output / "scores", plan.evaluate, execution=execution)
    results = [prepared, clustered, refined]
    if refined.complete():
        beside = Beside.found(output, [*_training_of(source), *(pictures or ())])
        pages = report_pages(
            store, output / "report", plan.report, beside=beside, quantities=refined.values["quantities"],
            execution=execution,
        )  # fmt: skip
        results.append(dataclasses.replace(pages, notes=(*refined.notes, *pages.notes)))
    return _merged(output, results, scored)


def _training_of(model: Path | None) -> list[Path]:
    """The training run that a model lies in, if it does."""
    return [model.parent] if model is not None and (model.parent / "stats.jsonl").is_file() else []


def _merged(output: Path, results: Sequence[StageResult], scored: StageResult | None = None) -> StageResult:
    """One result of all stages: the worst of each case, and the table of the evaluation."""
    outcomes: dict[str, CaseOutcome] = {}
    for result in results:
        outcomes.update({o.case_id: _worse(outcomes.get(o.case_id), o) for o in result.outcomes})
    return StageResult(
        "run",
        output,
        tuple(outcomes.values()),
        tables=(*results[-1].tables, *(scored.tables if scored else ())),
        notes=results[-1].notes,
        values=scored.values if scored else {},
    )


def _worse(old: CaseOutcome | None, new: CaseOutcome) -> CaseOutcome:
    """The outcome to tell of one case: a failure if there was one, and the warnings of both."""
    if old is None or new.exit_code:
        return new if old is None or not old.exit_code else old
    if old.exit_code:
        return old
    return dataclasses.replace(old, message="; ".join(text for text in (old.message, new.message) if text))


@dataclass(frozen=True)
class Plan:
    """Configurations of all stages, made and checked before any work."""

    preprocess: PreprocessConfig
    radiomics: RadiomicsConfig
    train: TrainConfig
    cluster: ClusterConfig
    refine: RefineConfig
    evaluate: EvaluateConfig
    report: ReportConfig


def plan_run(config: RunConfig, *, model: Path | None = None, train: bool = False) -> Plan:
    """Settings of every stage: preset, overlaid by the TOML file; what a model dictates cannot be changed.

    Raises
    ------
    UsageError
        For an unknown or impossible setting of any stage, or one that contradicts the model.
    """
    preset, dictated = config.preset, _dictated(find_model(model)) if model else {}
    free = model is None and not train
    if preset == AUTO_PRESET:
        preset = PRESET_WITHOUT_MODEL if free else DEFAULT_PRESET
        if model:
            preset = _preset_of(load_student(find_model(model)).config)

    def make(cls: type[ConfigT], command: str, **values: Any) -> ConfigT:
        file_values = read_toml(Path(config.config), command) if config.config else {}
        if free and cls is ClusterConfig:
            file_values = {"method": METHOD_WITHOUT_MODEL, **file_values}
        fixed = dictated.get(cls, {})
        made = make_config(cls, preset=preset, file_values=file_values, **values)
        for key in {key.replace("-", "_") for key in file_values} & set(fixed):
            if getattr(made, key) != getattr(make_config(cls, **{key: fixed[key]}), key):
                raise UsageError(f"[{command}] {key}: the model was made with {fixed[key]} and needs it")
        return make_config(cls, preset=preset, file_values=file_values, **{**values, **fixed})

    clustering = make(ClusterConfig, "cluster", seed=config.seed)
    labels = None if config.lung_mask_labels == AUTO else config.lung_mask_labels
    refining = make(RefineConfig, "refine", name=clustering.run_name)
    # the page says what the export says
    same = {name: getattr(refining, name) for name in ("lower_bounds", "inspiration")}
    return Plan(
        make(PreprocessConfig, "preprocess", salt=config.salt or None, lung_mask_labels=labels),
        make(RadiomicsConfig, "extract-radiomics", seed=config.seed),
        make(TrainConfig, "train-ddpm", seed=config.seed),
        clustering,
        refining,
        make(EvaluateConfig, "evaluate", names=(clustering.run_name,), seed=config.seed),
        make(ReportConfig, "report", name=clustering.run_name, **same),
    )


def shipped_model() -> Path:
    """The starter model of this installation.

    Raises
    ------
    UsageError
        If it has none, saying how to get a model.
    """
    path = starter_path()
    if not path.is_file():
        raise UsageError(HOW_TO_GET_A_MODEL)
    return path


def _needs_model(plan: Plan) -> bool:
    return plan.cluster.method in STUDENT_METHODS


def plan_dict(config: RunConfig, *, model: Path | None = None, train: bool = False) -> dict[str, Any]:
    """The plan as JSON types, by command: what ``lungseg run --dry-run`` prints."""
    plan = plan_run(config, model=model, train=train)
    if model is None and not train and _needs_model(plan) and starter_path().is_file():
        plan = plan_run(config, model=starter_path())
    names = {"radiomics": "extract-radiomics", "train": "train-ddpm"}
    return {names.get(f.name, f.name): to_dict(getattr(plan, f.name)) for f in dataclasses.fields(plan)}


def _dictated(model: Path) -> dict[type, dict[str, Any]]:
    """Settings that follow from a model: its grid, and the tokens its mixture was fitted on."""
    student = load_student(model)
    patch = student.config.patch_size
    result: dict[type, dict[str, Any]] = {
        PreprocessConfig: {
            "spacing_mm": student.card["spacing_mm"],
            "patch_size": patch,
            "patch_stride": tuple(max(1, n // 2) for n in patch),
        }
    }
    metadata, _ = read_model_file(model)
    if metadata["extra"]:
        fitted = fitted_settings(metadata["extra"]["provenance"])
        names = {field.name for field in dataclasses.fields(ClusterConfig)} - {"name", "batch_size", "slab_gib"}
        result[ClusterConfig] = {key: value for key, value in fitted.items() if key in names}
    return result


def _preset_of(config: TrainConfig) -> str:
    """The preset whose network the model has, else the default one."""
    keys = ("base_width", "multipliers", "stem", "norm", "patch_size", "hu_window", "contrast")
    for preset in PRESETS:
        if all(getattr(make_config(TrainConfig, preset=preset), key) == getattr(config, key) for key in keys):
            return preset
    return DEFAULT_PRESET


def make_bundle(store: Store, run_dir: Path, bundle: Path, plan: Plan, *, execution: Execution) -> StageResult:
    """Radiomics, training and fit on the complete training cases of a store; model and fit go into one file."""
    described = extract_radiomics(store, plan.radiomics, execution=execution)
    if not described.complete():
        described.require_complete()
    train_ddpm(store, run_dir, plan.train, execution=execution)
    return cluster(store, run_dir, plan.cluster, bundle=bundle, fit_only=True, execution=execution)


def _has_fit(model: Path) -> bool:
    metadata, _ = read_model_file(model)
    return bool(metadata["extra"])

"""The rows of a benchmark: their settings, which of them share a network or a fit, and the work of one row.

A row is made of stages that are there anyway; what it adds is a record of what they found, so that the same command
again does not score a second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lungseg.config.ablations import PUBLISHED, ROWS, TABLE_3, WHOLE_METHOD, Ablation
from lungseg.config.benchmark import BenchmarkConfig
from lungseg.config.cluster import RADIOMICS_METHODS, STUDENT_METHODS, ClusterConfig
from lungseg.config.evaluate import EvaluateConfig
from lungseg.config.execution import Execution
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.fields import read_toml, to_dict
from lungseg.config.presets import make_config
from lungseg.config.refine import RefineConfig
from lungseg.config.train_ddpm import TrainConfig
from lungseg.evaluation.benchmark_tables import RowResult
from lungseg.stages.benchmark_costs import CPU, WALL, Costs
from lungseg.stages.cluster import cluster
from lungseg.stages.evaluate import evaluate
from lungseg.stages.refine import EXPORT_SETTINGS, refine
from lungseg.store.atomic import read_json, write_json
from lungseg.store.cases import Store
from lungseg.tissue import OUTSIDE, Tissue

ConfigT = TypeVar("ConfigT")

UNCHANGED = "preset"
"""Name of the network that no row changes."""


@dataclass(frozen=True)
class Row:
    """Settings of one row."""

    name: str
    ablation: Ablation
    train: TrainConfig | None
    """None: the method needs no network."""
    network: str
    """Folder of its training run; rows with the same settings share it. Empty without one."""
    cluster: ClusterConfig
    refine: RefineConfig
    fit: str
    """Name of its clustering on the training phantoms: that of the first row with the same tokens and mixture."""
    same_as: str
    """The first row with the same settings in everything, whose result this one shows; usually itself."""


def stage_config(
    config: BenchmarkConfig,
    cls: type[ConfigT],
    command: str,
    changes: Mapping[str, Any] | None = None,
    **values: Any,
) -> ConfigT:
    """Settings of one stage: preset, overlaid by the TOML file, by the changes of a row, by values."""
    given = read_toml(Path(config.config), command) if config.config else {}
    file_values = {key.replace("-", "_"): value for key, value in given.items()}
    return make_config(cls, preset=config.preset, file_values={**file_values, **(changes or {})}, **values)


def plan_rows(config: BenchmarkConfig) -> tuple[Row, ...]:
    """All rows asked for, in the order of the tables, their settings made and checked.

    Raises
    ------
    UsageError
        For an impossible setting.
    """
    rows: list[Row] = []
    for name, ablation in ROWS.items():
        if config.rows and name not in config.rows:
            continue
        changes = ablation.changes
        clustering = stage_config(config, ClusterConfig, "cluster", changes.get(ClusterConfig), name=name)
        refining = stage_config(config, RefineConfig, "refine", changes.get(RefineConfig), name=name)
        train = None
        if clustering.method in STUDENT_METHODS:
            train = stage_config(
                config, TrainConfig, "train-ddpm", changes.get(TrainConfig), total_images=config.images
            )
        network = _network_name(changes.get(TrainConfig, {})) if train is not None else ""
        key = (network, dataclasses.replace(clustering, name=None))
        alike = [row for row in rows if (row.network, dataclasses.replace(row.cluster, name=None)) == key]
        fit = alike[0].fit if alike else name
        same = [row.name for row in alike if _map_settings(row.refine) == _map_settings(refining)]
        rows.append(
            Row(name, ablation, train, network, clustering, refining, fit, same_as=same[0] if same else name)
        )  # fmt: skip
    return tuple(rows)


def _map_settings(config: RefineConfig) -> dict[str, Any]:
    """What a label map depends on."""
    return {key: value for key, value in to_dict(config).items() if key not in (*EXPORT_SETTINGS, "name")}


def _network_name(changes: Mapping[str, Any]) -> str:
    """Folder of a network: what it changes against the preset, such as ``distill-none``."""
    parts = [f"{key}-{value:g}" if isinstance(value, float) else f"{key}-{value}" for key, value in changes.items()]
    return "_".join(sorted(parts)) or UNCHANGED


def table_rows(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of one table; the ablation ends with the default method where that is more than its last row."""
    chosen = [row for name in names for row in rows if row.name == name]
    if tuple(names) == TABLE_3 and chosen:
        default = next((row for row in rows if row.name == WHOLE_METHOD), None)
        if default is not None and all(row.same_as != default.same_as for row in chosen):
            chosen.append(default)
    return chosen


def radiomics_config(config: BenchmarkConfig, rows: Sequence[Row]) -> RadiomicsConfig:
    """Radiomics of the training phantoms, standardised for every window that a row will ask for."""
    made = stage_config(config, RadiomicsConfig, "extract-radiomics")
    windows = {*made.standardisation_windows}
    windows |= {row.cluster.radiomics_window for row in rows if row.cluster.method in RADIOMICS_METHODS}
    windows |= {window for row in rows if row.train is not None for window in row.train.teacher_windows}
    return dataclasses.replace(made, standardisation_windows=tuple(sorted(windows)))


def fit_row(row: Row, train: Store, model: Path | None, costs: Costs, *, execution: Execution) -> Path:
    """Fit the clustering of a row on the training phantoms; where it is. What learns nothing is described there."""
    folder = train.fit_dir(row.fit)
    with costs.measure(f"fit {row.fit}", count=0 if folder.exists() else 1):
        settings = dataclasses.replace(row.cluster, name=row.fit)
        cluster(train, model, settings, fit_only=True, execution=execution).require_complete()
    return folder


def map_row(
    row: Row, store: Store, model: Path | None, fit: Path | None, costs: Costs, *, execution: Execution
) -> None:
    """Label maps of one row for every case of a store: clustered with the fit given, and refined."""
    with costs.measure(f"cluster {row.name}") as measured:
        measured.of(cluster(store, model, row.cluster, fit=fit, execution=execution))
    with costs.measure(f"refine {row.name}") as measured:
        measured.of(refine(store, row.refine, execution=execution))


def score_row(
    row: Row, config: BenchmarkConfig, test: Store, healthy: Store | None, output: Path, *, execution: Execution
) -> dict[str, Any]:
    """Figures of one row: ``evaluate`` on the test phantoms, the only reader of labels; false disease on healthy ones.

    They are kept in ``rows/<name>.json`` and taken from there if label maps and settings are still the same.
    """
    scoring = stage_config(
        config,
        EvaluateConfig,
        "evaluate",
        names=(row.name,),
        oracle=config.oracle,
        bootstrap=config.bootstrap,
        worst=0,
    )
    wanted = {
        "labels": {case_id: _fingerprint(test, case_id, row.name) for case_id in test.case_ids()},
        "healthy": {case_id: _fingerprint(healthy, case_id, row.name) for case_id in healthy.case_ids()}
        if healthy
        else {},
        "evaluate": to_dict(scoring),
    }
    path = output / "rows" / f"{row.name}.json"
    if path.exists():
        kept: dict[str, Any] = read_json(path)
        if kept.get("made_from") == wanted:
            return kept
    result = evaluate(test, output / "scores" / row.name, scoring, execution=execution).require_complete()
    summary = result.values["summary"]
    own = next(method for method in summary["methods"] if not method["is_oracle"])
    oracle = next((method for method in summary["methods"] if method["is_oracle"]), None)
    record = {
        "made_from": wanted,
        "figures": own,
        # nothing to rename: the bound is what the method reached
        "oracle": (oracle or own) if config.oracle else None,
        "calibration": next(iter(summary["calibration"].values()), None),
        "false_disease_percent": false_disease_percent(healthy, row.name) if healthy else None,
    }
    write_json(path, record)
    return record


def _fingerprint(store: Store, case_id: str, name: str) -> str:
    with store.open(case_id, "labels", name) as labels:
        return labels.fingerprint


def false_disease_percent(healthy: Store, name: str) -> float:
    """Share of the lung that maps of healthy phantoms show as anything but healthy, in percent; mean over phantoms."""
    shares = []
    for case_id in healthy.case_ids():
        with healthy.open(case_id, "labels", name) as labels:
            counts = np.bincount(labels.read("labels").reshape(-1), minlength=256)
        lung = counts.sum() - counts[OUTSIDE]
        shares.append(100.0 * float(lung - counts[Tissue.HEALTHY]) / float(lung) if lung else float("nan"))
    return float(np.mean(shares))


def row_result(row: Row, record: Mapping[str, Any], costs: Costs) -> RowResult:
    """One line of the tables."""
    false_disease = record["false_disease_percent"]
    return RowResult(
        name=row.name,
        doc=row.ablation.doc,
        figures=record["figures"],
        oracle=record["oracle"] or {},
        calibration=record["calibration"] or {},
        false_disease_percent=float("nan") if false_disease is None else false_disease,
        cpu_seconds=sum(costs.mean(f"{task} {row.same_as}", CPU) for task in ("cluster", "refine")),
        wall_seconds=sum(costs.mean(f"{task} {row.same_as}", WALL) for task in ("cluster", "refine")),
        published=PUBLISHED.get(row.name),
    )

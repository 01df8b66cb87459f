"""Methods ready to map new scans: rows of a finished ``lungseg benchmark``, a bundle, or methods that learn nothing."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lungseg.config.ablations import Ablation
from lungseg.config.benchmark import BenchmarkConfig
from lungseg.config.cluster import STUDENT_METHODS, UNFITTED_METHODS
from lungseg.config.execution import Execution
from lungseg.config.fields import from_dict
from lungseg.config.run import RunConfig
from lungseg.errors import UsageError
from lungseg.stages.benchmark_costs import Costs
from lungseg.stages.benchmark_rows import Row, map_row, plan_rows
from lungseg.stages.run import plan_run
from lungseg.store.atomic import read_json
from lungseg.store.cases import Store

BUNDLE_ROW = "bundle"
MODEL_FREE = set(UNFITTED_METHODS) - set(STUDENT_METHODS)
"""Methods that learn nothing."""


@dataclass(frozen=True)
class FittedRow:
    """One method with what it has learned."""

    row: Row
    model: Path | None
    fit: Path | None

    def map(self, store: Store, costs: Costs, *, execution: Execution) -> None:
        """Label maps for every case of a store."""
        map_row(self.row, store, self.model, self.fit, costs, execution=execution)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which methods."""
    parser.add_argument("--benchmark", type=Path, help="output folder of a finished `lungseg benchmark segmentation`")
    parser.add_argument("--rows", default="hu-thresholds,rules", help="rows of it; without it those that learn nothing")
    parser.add_argument("--bundle", type=Path, help="also this model with its fit, as row `bundle`")
    parser.add_argument("--preset", default="small", help="grid of the phantoms without --benchmark and --bundle")


def chosen_rows(options: argparse.Namespace) -> tuple[BenchmarkConfig, list[FittedRow]]:
    """The methods asked for, and the benchmark settings they go with.

    Raises
    ------
    UsageError
        If a method has to learn and there is no benchmark that it has learned in.
    """
    rows = tuple(name for name in options.rows.split(",") if name)
    if options.benchmark:
        config = from_dict(BenchmarkConfig, read_json(options.benchmark / "benchmark.json")["config"])
    else:
        config = BenchmarkConfig(preset=options.preset)
    found = [_fitted(row, options.benchmark) for row in plan_rows(config)]
    by_name = {fitted.row.name: fitted for fitted in found}
    unknown = [name for name in rows if name not in by_name]
    if unknown:
        raise UsageError(f"--rows: {', '.join(unknown)} is none of {', '.join(by_name)}")
    chosen = [by_name[name] for name in rows]
    for fitted in chosen:
        missing = [path for path in (fitted.model, fitted.fit) if path is not None and not path.exists()]
        if missing or (options.benchmark is None and fitted.row.cluster.method not in MODEL_FREE):
            raise UsageError(f"row {fitted.row.name} has to learn: give --benchmark, a finished one with this row")
    return config, [*chosen, *([_from_bundle(options.bundle)] if options.bundle else [])]


def _fitted(row: Row, benchmark: Path | None) -> FittedRow:
    if benchmark is None or row.cluster.method in MODEL_FREE:  # nothing learned: any grid will do
        return FittedRow(row, None, None)
    model = benchmark / "models" / row.network / "model.safetensors" if row.network else None
    return FittedRow(row, model, benchmark / "train" / "fits" / row.fit)


def _from_bundle(bundle: Path) -> FittedRow:
    """The model of a bundle with its own fit, and contours as by default."""
    plan = plan_run(RunConfig(), model=bundle)
    clustering = dataclasses.replace(plan.cluster, name=BUNDLE_ROW)
    refining = dataclasses.replace(plan.refine, name=BUNDLE_ROW)
    row = Row(BUNDLE_ROW, Ablation("the bundle", {}), None, "", clustering, refining, "", same_as=BUNDLE_ROW)
    return FittedRow(row, bundle, bundle)

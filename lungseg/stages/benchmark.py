"""``lungseg benchmark``: the tables of the paper on digital phantoms, made by the stages a user has.

``train``, ``test`` and ``healthy`` in its folder are patch stores of phantoms, ``models`` holds the networks,
``train/fits`` the clusterings, ``scores`` the evaluation of each row. Every part is kept, so that the same command
again goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lungseg.config.ablations import METHODS, PUBLISHED, TABLE_3
from lungseg.config.benchmark import SEGMENTATION, BenchmarkConfig
from lungseg.config.cluster import RADIOMICS_METHODS
from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.phantom import PhantomConfig
from lungseg.errors import Interrupted, LockedError, LungsegError, MismatchError, PartialError, UsageError
from lungseg.evaluation.benchmark_tables import (
    RowResult,
    ablation_table,
    benchmark_csv,
    benchmark_rich_table,
    method_tables,
)
from lungseg.evaluation.bootstrap import FEW_PATIENTS, INTERVAL_DEFINITION, few_patients_note
from lungseg.evaluation.calibration import CALIBRATION_DEFINITION
from lungseg.evaluation.tables import MEAN_RULE
from lungseg.evaluation.writers import listed
from lungseg.stages.benchmark_costs import CPU, Costs
from lungseg.stages.benchmark_rows import (
    Row,
    fit_row,
    map_row,
    plan_rows,
    radiomics_config,
    row_result,
    score_row,
    stage_config,
    table_rows,
)
from lungseg.stages.cohort import StageResult, output_folder
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.stages.phantom import case_name, phantom
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.atomic import write_json, write_text
from lungseg.store.cases import Store
from lungseg.store.locks import lock

log = logging.getLogger(__name__)

HEALTHY = "healthy"
NUM_DEFINITIONS = 3
"""Of the evaluation's: what counts, HD95, and the penalty; the others speak of columns that are not shown."""


def benchmark(
    what: Path | str,
    output: Path,
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    execution: Execution = Execution(),
) -> StageResult:
    """Make phantoms, train the networks, and cluster, refine and score every row; write the tables into ``output``.

    Parameters
    ----------
    what : str
        `segmentation`.
    output : path
        Folder of everything made. The same call again goes on where an earlier one was stopped.
    config : BenchmarkConfig

    Returns
    -------
    StageResult
        ``values["rows"]`` holds a ``RowResult`` for each row. A row that fails does not stop the others; the exit code
        is then 8.

    Raises
    ------
    UsageError
        For another benchmark, or an impossible setting of any stage.
    MismatchError
        If ``output`` holds results of other settings and ``execution.overwrite`` is off.
    """
    if str(what) != SEGMENTATION:
        raise UsageError(f"there is no benchmark '{what}'; there is {SEGMENTATION}: lungseg benchmark {SEGMENTATION}")
    rows = plan_rows(config)
    output = output_folder(Path(output))
    with lock(output / "benchmark.lock"):
        train, test, healthy = _cohorts(output, config, execution)
        write_json(output / "benchmark.json", {"config": to_dict(config), "rows": plan_dict(config)})
        costs = Costs(output / "seconds.json")
        needed = [row for row in rows if row.same_as == row.name]
        if any(row.train is not None or row.cluster.method in RADIOMICS_METHODS for row in needed):
            extract_radiomics(train, radiomics_config(config, needed), execution=execution).require_complete()
        records, errors = {}, {}
        for number, row in enumerate(needed, start=1):
            log.info("benchmark: row %s (%d/%d)", row.name, number, len(needed))
            try:
                model = _network(row, train, output, costs, execution)
                fit = fit_row(row, train, model, costs, execution=execution)
                for store in (test, healthy):
                    if store is not None:
                        map_row(row, store, model, fit, costs, execution=execution)
                records[row.name] = score_row(row, config, test, healthy, output, execution=execution)
            except (Interrupted, LockedError):
                raise
            except LungsegError as error:
                log.error("benchmark: row %s failed: %s", row.name, error)
                errors[row.name] = error
            if records:  # what is known so far can be read while the rest runs
                result = _write(output, config, rows, _results(rows, records, errors, costs), costs, execution)
        if not records:
            raise next(iter(errors.values()))
        return result


def _results(
    rows: Sequence[Row],
    records: Mapping[str, Mapping[str, Any]],
    errors: Mapping[str, LungsegError],
    costs: Costs,
) -> dict[str, RowResult]:
    """Rows that are done or have failed, by name."""
    found = {}
    for row in rows:
        if row.same_as in records:
            found[row.name] = row_result(row, records[row.same_as], costs)
        elif row.same_as in errors:
            found[row.name] = RowResult(
                row.name, row.ablation.doc, {}, published=PUBLISHED.get(row.name), error=str(errors[row.same_as])
            )
    return found


def plan_dict(config: BenchmarkConfig, *, model: Path | None = None) -> dict[str, Any]:
    """Settings of every row as JSON types: what ``lungseg benchmark --dry-run`` prints."""
    return {row.name: _settings(row) for row in plan_rows(config)}


def _settings(row: Row) -> dict[str, object]:
    """JSON types of a row's settings: one config a row."""
    train = None if row.train is None else to_dict(row.train)
    return {"train-ddpm": train, "cluster": to_dict(row.cluster), "refine": to_dict(row.refine), "same_as": row.same_as}


def _cohorts(output: Path, config: BenchmarkConfig, execution: Execution) -> tuple[Store, Store, Store | None]:
    """Patch stores of training, test and healthy phantoms, made or completed."""
    made = {
        "train": config.blocks(config.train_seed, config.train),
        "test": config.blocks(config.test_seed, config.test),
        "healthy": [(HEALTHY, config.test_seed + config.test, config.healthy)] if config.healthy else [],
    }
    for name, blocks in made.items():
        for severity, seed, num in blocks:
            settings = stage_config(
                config, PhantomConfig, "phantom",
                num=num, seed=seed, severity=severity, format="store", extent_mm=config.extent_mm,
            )  # fmt: skip
            phantom(output / name, settings, execution=execution).require_complete()
        if blocks:
            _check_cases(Store(output / name), blocks)
    healthy = Store(output / "healthy") if made["healthy"] else None
    return Store(output / "train"), Store(output / "test"), healthy


def _check_cases(store: Store, blocks: Sequence[tuple[str, int, int]]) -> None:
    """Refuse a store with phantoms of an earlier, larger cohort: they would be counted."""
    wanted = {case_name(seed + i) for _, seed, num in blocks for i in range(num)}
    strangers = sorted(set(store.case_ids()) - wanted)
    if strangers:
        raise MismatchError(f"{store.path} holds other phantoms too ({listed(strangers)}): use another output folder")


def _network(row: Row, train: Store, output: Path, costs: Costs, execution: Execution) -> Path | None:
    """Training run of a row, done; None if it needs none."""
    if row.train is None:
        return None
    folder = output / "models" / row.network
    with costs.measure(f"train {row.network}") as measured:
        result = train_ddpm(train, folder, row.train, execution=execution)
        measured.count = int("images" in result.values)  # it was not complete before
    return folder


def _write(
    output: Path,
    config: BenchmarkConfig,
    rows: Sequence[Row],
    results: dict[str, RowResult],
    costs: Costs,
    execution: Execution,
) -> StageResult:
    """The tables as files and for the terminal; a table without a row is left as it is."""
    notes = _notes(config, rows, results, costs, execution)
    to_come = [row.name for row in rows if row.name not in results]
    if to_come:
        notes.append(f"Not done yet: {', '.join(to_come)}.")
    shown = []
    for number, names, text in ((2, tuple(METHODS), method_tables), (3, TABLE_3, ablation_table)):
        chosen = [results[row.name] for row in table_rows(rows, names) if row.name in results]
        if chosen:
            write_text(output / f"table-{number}.md", text(chosen, notes))
            write_text(output / f"table-{number}.csv", benchmark_csv(chosen))
            shown.append(benchmark_rich_table(f"Table {number}", chosen, ()))
    failed = [result for result in results.values() if result.error]
    return StageResult(
        "benchmark",
        output,
        tables=tuple(shown),
        notes=(*(f"row {r.name} failed: {r.error}" for r in failed), *notes[:1], f"tables: {output}"),
        values={"rows": list(results.values())},
        verdict=PartialError.exit_code if failed else 0,
    )


def _notes(
    config: BenchmarkConfig,
    rows: Sequence[Row],
    results: dict[str, RowResult],
    costs: Costs,
    execution: Execution,
) -> list[str]:
    """What stands below both tables."""

    def told(seed: int, num: int) -> str:
        return ", ".join(f"{count} {severity}" for severity, _, count in config.blocks(seed, num))

    networks = list(dict.fromkeys(row.network for row in rows if row.network))
    images = {row.train.total_images for row in rows if row.train is not None}
    notes = [
        f"Preset {config.preset}; {config.train} training phantoms ({told(config.train_seed, config.train)}; seeds "
        f"from {config.train_seed}), n = {config.test} test phantoms ({told(config.test_seed, config.test)}; seeds "
        f"from {config.test_seed}), {config.healthy} healthy. One phantom is one patient.",
        "Nothing but the evaluation reads a label; clusterings are fitted on the training phantoms and applied as they "
        "are. Table 2: the baselines hu-thresholds, hu-gmm and radiomics-kmeans keep their plain posteriors, all other "
        "methods have the contours of `refine` by default.",
    ]
    if networks:
        notes.append(
            f"Networks ({len(networks)}) are trained on {', '.join(map(str, sorted(images)))} images each, "
            f"{costs.total('train ', CPU) / 60:.0f} CPU minutes in all; the published ones saw far more."
        )
    notes += [
        f"Row {row.name} has the settings of row {row.same_as} and shows its figures."
        for row in rows
        if row.same_as != row.name and row.name in results
    ]
    notes.append(
        f"Seconds: CPU time of a scan from volume.h5 to labels.h5, {execution.jobs} at a time (workers are started for "
        "more than one), without preprocessing, training and fitting."
    )
    first = next(result.figures for result in results.values() if result.figures)
    notes += [MEAN_RULE, *first["definitions"][:NUM_DEFINITIONS], CALIBRATION_DEFINITION]
    notes.append(f"95 % CI of the mean: {INTERVAL_DEFINITION}, {config.bootstrap} samples.")
    if config.test < FEW_PATIENTS:
        notes.append(few_patients_note("every class"))
    return notes

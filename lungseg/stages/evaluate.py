"""``lungseg evaluate``: label maps against references, as METHOD 0.4 defines it; nothing is dropped silently."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lungseg.config.evaluate import EvaluateConfig
from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.errors import InputError, PartialError
from lungseg.evaluation.comparison import compare_methods
from lungseg.evaluation.comparison_tables import (
    comparison_csv,
    comparison_latex,
    comparison_markdown,
    comparison_rich_table,
)
from lungseg.evaluation.oracle import OracleNaming, oracle_naming
from lungseg.evaluation.overlap import unusable_scores
from lungseg.evaluation.scores import MISSING_PREDICTION, NOT_COMPARED, ClassScore, ScoreSettings
from lungseg.evaluation.summary import ORACLE_SUFFIX, summarise_methods
from lungseg.evaluation.tables import cases_csv, latex_table, markdown_table, results_dict, rich_table
from lungseg.evaluation.writers import listed
from lungseg.report.score_pictures import score_boxplot_png
from lungseg.report.worst_cases import worst_cases_html
from lungseg.scan.discovery import DICOM_SUFFIXES
from lungseg.scan.label_images import DEFAULT_MAP
from lungseg.scan.label_maps import LabelMap
from lungseg.stages.cohort import DONE, FAILED, CaseOutcome, StageResult, output_folder, run_cases
from lungseg.stages.evaluate_calibration import calibration_dict, calibration_notes, pooled, write_curves
from lungseg.stages.evaluate_case import NO_PREDICTION, NO_REFERENCE, CaseScores, Scoring, oracle_scores, score_pair
from lungseg.stages.evaluate_pairs import Pair, ScoringPlan, make_plan
from lungseg.stages.evaluate_worst import worst_of_methods
from lungseg.store.atomic import write_bytes, write_json, write_text
from lungseg.store.cases import Store
from lungseg.tissue import LABEL_CONVENTIONS, class_name

MAX_PROBLEMS = 20
"""Cases whose problem is told above the table; the rest is counted, and all stand in summary.json."""
MAX_PROBLEM_TEXT = 200
"""Characters of a problem told above the table: its first sentence, as a rule."""

COMPARISON_FILES = ("comparison.csv", "comparison.md", "comparison.tex")

Scores = dict[str, list[ClassScore]]


def evaluate(
    predictions: Store | Path | str | Sequence[Store | Path | str],
    output: Path,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    reference: Path | None = None,
    id_map: Path | None = None,
    patients: Path | None = None,
    images: Path | None = None,
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Score predictions of one or several methods and write tables, pictures and figures into ``output``.

    Parameters
    ----------
    predictions : store, folder, or several of them
        A patch store (each clustering of ``config.names`` is a method; its labels are put on each reference's grid),
        or folders of label maps named like the references (each folder is a method).
    reference : folder, optional
        Label maps named ``<case_id>.nii.gz``, or like the sources of the store (``id_map``). Without it the store's
        own references are used.
    id_map : file, optional
        Of the store.
    patients : file, optional
        CSV with columns case and patient, for folders.
    images : folder, optional
        CT scans named like the cases, for the pictures of the worst pairs; a store has its own.
    as_json : bool
        The result's document holds what became of each case and the figures of ``summary.json``.

    Returns
    -------
    StageResult
        ``values["summary"]`` holds the figures of ``summary.json``. The exit code is 8 if a side of any case is
        missing or cannot be used; the rest is scored.

    Raises
    ------
    InputError
        If there is no reference at all, or none that fits a prediction.
    UsageError
        If options do not go together.
    """
    given = [predictions] if isinstance(predictions, (Store, Path, str)) else list(predictions)
    places = [place if isinstance(place, Store) else Path(place) for place in given]
    plan = make_plan(
        places,
        config,
        reference=Path(reference) if reference else None,
        id_map=Path(id_map) if id_map else None,
        patients=Path(patients) if patients else None,
        images=Path(images) if images else None,
    )
    output = output_folder(Path(output))
    settings = ScoreSettings(hd95=config.hd95, tolerance_mm=config.tolerance_mm, mode=config.mode)
    scoring = Scoring(
        plan.methods, plan.view, plan.reference_map, settings, config.resample_to == "reference", config.oracle
    )
    outcomes = run_cases(
        score_pair, plan.pairs, scoring,
        names=[pair.case_id for pair in plan.pairs], title="evaluate", execution=execution, isolate=_has_dicom(plan),
    )  # fmt: skip
    scores = _by_method(plan, outcomes)
    if not any(row.status not in NOT_COMPARED for rows in scores.values() for row in rows):
        raise InputError(f"nothing could be scored: {outcomes[0].message}")
    problems = _problems(outcomes)
    oracle, namings, oracle_notes = _oracle(plan, scoring, outcomes, scores, execution)
    summaries = summarise_methods(scores, oracle, settings=settings, num_bootstrap=config.bootstrap, seed=config.seed)
    calibrations = pooled(plan.methods, [_value(outcome).calibrations for outcome in outcomes])
    notes = (
        *_problem_notes(problems),
        *plan.notes,
        *_reading_notes(plan, outcomes),
        *oracle_notes,
        *calibration_notes(calibrations),
    )
    summaries = (dataclasses.replace(summaries[0], notes=notes), *summaries[1:])
    comparison = compare_methods(scores, num_bootstrap=config.bootstrap, seed=config.seed) if len(scores) > 1 else None
    figures = {
        **results_dict(summaries, comparison),
        "config": _public_config(config),
        "notes": list(notes),
        "label_maps": _label_maps(plan),
        "map_fingerprints": _fingerprints(outcomes),
        "oracle_namings": {name: _naming_dict(naming) for name, naming in namings.items()},
        "problems": problems,
        "calibration": calibration_dict(calibrations),
    }
    write_curves(output, calibrations)
    write_text(output / "cases.csv", cases_csv({**scores, **{f"{m}{ORACLE_SUFFIX}": r for m, r in oracle.items()}}))
    write_json(output / "summary.json", figures)
    write_text(output / "table.md", markdown_table(*summaries))
    write_text(output / "table.tex", latex_table(*summaries))
    write_bytes(output / "boxplot.png", score_boxplot_png(scores, hd95_name=config.hd95))
    worst = worst_of_methods(plan, scoring, scores, count=config.worst, execution=execution, isolate=_has_dicom(plan))
    write_text(output / "worst.html", worst_cases_html(worst, summaries))
    tables: list[Any] = [rich_table(*summaries)]
    for name in COMPARISON_FILES:  # of an earlier evaluation into this folder, with other methods
        (output / name).unlink(missing_ok=True)
    if comparison is not None:
        write_text(output / "comparison.csv", comparison_csv(comparison))
        write_text(output / "comparison.md", comparison_markdown(comparison))
        write_text(output / "comparison.tex", comparison_latex(comparison))
        tables.append(comparison_rich_table(comparison))
    result = StageResult(
        "evaluate",
        output,
        outcomes,
        tables=tuple(tables),
        notes=(f"tables: {output}",),
        values={"summary": figures},
        verdict=PartialError.exit_code if any(o.status == FAILED for o in outcomes) else None,
    )
    return result.as_document(summary=figures) if as_json else result


def _fingerprints(outcomes: Sequence[CaseOutcome]) -> dict[str, dict[str, str]]:
    """Which label map of a store was scored, by method and case: a report sees by it whether the map has changed."""
    found: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        for method, fingerprint in _value(outcome).fingerprints.items():
            found.setdefault(method, {})[outcome.case_id] = fingerprint
    return found


def _has_dicom(plan: ScoringPlan) -> bool:
    """Whether a file needs a decoder, which may crash on it."""
    paths = [path for pair in plan.pairs for path in (pair.reference, *pair.predictions) if path is not None]
    return any(path.name.lower().endswith(DICOM_SUFFIXES) for path in paths)


def _by_method(plan: ScoringPlan, outcomes: Sequence[CaseOutcome]) -> Scores:
    """Rows of each method over all cases."""
    return {
        method.name: [
            row
            for pair, outcome in zip(plan.pairs, outcomes, strict=True)
            for row in _rows(plan, pair, _value(outcome), method.name)
        ]
        for method in plan.methods
    }


def _rows(plan: ScoringPlan, pair: Pair, found: CaseScores, method: str) -> list[ClassScore]:
    """Rows of one method and case; those of an unusable side if something kept them from being made."""
    if method in found.scores:
        return found.scores[method]
    if method in found.problems or pair.has_reference:
        return unusable_scores(view=plan.view, case_id=pair.case_id, patient_id=pair.patient_id)
    return []


def _value(outcome: CaseOutcome) -> CaseScores:
    """What a case gave; nothing but its message if it ended in an error."""
    if isinstance(outcome.value, CaseScores):
        return outcome.value
    return CaseScores(problems={"": outcome.message} if outcome.status != DONE else {})


# ---------------------------------------------------------------- problems


def _problems(outcomes: Sequence[CaseOutcome]) -> list[dict[str, str]]:
    """Everything that is wrong, one entry for each case and method (empty: the reference, or both sides)."""
    return [
        {"case": outcome.case_id, "method": method, "problem": text}
        for outcome in outcomes
        for method, text in _value(outcome).problems.items()
    ]


def _problem_notes(problems: Sequence[Mapping[str, str]]) -> list[str]:
    """Sentences for the header of the tables; missing sides have sentences of their own there."""
    untold = [p for p in problems if p["problem"] not in (NO_PREDICTION, NO_REFERENCE)]
    notes = []
    for problem in untold[:MAX_PROBLEMS]:
        text = re.split(r"(?<=[.)])\s", problem["problem"], maxsplit=1)[0].rstrip(".")
        text = text if len(text) <= MAX_PROBLEM_TEXT else text[:MAX_PROBLEM_TEXT].rsplit(" ", 1)[0] + " ..."
        who = f"case {problem['case']}" + (f", {problem['method']}" if problem["method"] else "")
        notes.append(f"Not scored: {who}: {text}.")
    if len(untold) > MAX_PROBLEMS:
        notes.append(f"Not scored: {len(untold) - MAX_PROBLEMS} more, see summary.json.")
    return notes


def _reading_notes(plan: ScoringPlan, outcomes: Sequence[CaseOutcome]) -> list[str]:
    """Which predictions were not scored on their own grid, or hold what the view has no place for."""
    notes = []
    for method in plan.methods:
        moved = [outcome.case_id for outcome in outcomes if method.name in _value(outcome).resampled]
        if moved:
            notes.append(
                f"{method.name}: brought from another grid onto the reference's by nearest voxel, tissue outside of it "
                f"left out: {listed(moved)}."
            )
        ignored = [_value(outcome).left_out.get(method.name, ()) for outcome in outcomes]
        if any(ignored):
            classes = ", ".join(sorted({name for names in ignored for name in names}))
            notes.append(
                f"{method.name}: {classes} is none of these classes and was left out in "
                f"{sum(map(bool, ignored))} cases."
            )
    return notes


# ---------------------------------------------------------------- oracle naming


def _oracle(
    plan: ScoringPlan,
    scoring: Scoring,
    outcomes: Sequence[CaseOutcome],
    scores: Scores,
    execution: Execution,
) -> tuple[Scores, dict[str, OracleNaming], list[str]]:
    """Rows under the best naming that the reference allows, by method; the namings; what went wrong.

    The naming needs all cases, so cases whose method gets other names are read and scored a second time.
    """
    if not scoring.oracle:
        return {}, {}, []
    namings = {}
    for method in plan.methods:
        confusions = [c for outcome in outcomes for c in _value(outcome).confusions.get(method.name, ())]
        if confusions:
            namings[method.name] = oracle_naming(confusions, plan.view)
    renamed = {name: naming for name, naming in namings.items() if not naming.is_own_naming}
    notes = [f"Oracle naming of {name}: its own naming cannot be improved." for name in namings if name not in renamed]
    counted = {o.case_id for o in outcomes if not renamed.keys().isdisjoint(_value(o).confusions)}
    pairs = [pair for pair in plan.pairs if pair.case_id in counted]
    again = run_cases(
        oracle_scores, pairs, scoring, renamed,
        names=[pair.case_id for pair in pairs], title="evaluate, oracle naming", execution=execution,
        isolate=_has_dicom(plan),
    )  # fmt: skip
    failed = [outcome for outcome in again if outcome.status != DONE]
    if failed:
        notes.append(f"No oracle naming of {', '.join(renamed)}: {failed[0].case_id}: {failed[0].message}")
        return {}, namings, notes
    found: Scores = {}
    for name in renamed:
        unchanged = [row for row in scores[name] if row.status in (MISSING_PREDICTION, *NOT_COMPARED)]
        found[name] = [*(row for outcome in again for row in _value(outcome).scores.get(name, ())), *unchanged]
    return found, namings, notes


def _naming_dict(naming: OracleNaming) -> dict[str, Any]:
    """Plain JSON types of an oracle naming."""
    return {
        "classes": {class_name(old): class_name(new) for old, new in sorted(naming.classes.items())},
        "is_own_naming": naming.is_own_naming,
        "mean_dice": None if math.isnan(naming.mean_dice) else naming.mean_dice,
    }


# ---------------------------------------------------------------- record


def _public_config(config: EvaluateConfig) -> dict[str, Any]:
    """The settings, without names of files: those may hold patients'."""
    public = to_dict(config)
    public["label_map"] = [_public_name(text) for text in config.label_map]
    public["reference_label_map"] = _public_name(config.reference_label_map)
    return public


def _public_name(text: str) -> str:
    return text if not text or text in LABEL_CONVENTIONS else "own file"


def _label_maps(plan: ScoringPlan) -> dict[str, Any]:
    """What the ids of each side mean."""

    def described(mapping: LabelMap | None) -> dict[str, Any]:
        return (mapping or DEFAULT_MAP).to_dict()

    return {
        "reference": described(plan.reference_map),
        "predictions": {method.name: described(method.mapping) for method in plan.methods},
    }

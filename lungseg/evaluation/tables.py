"""The tables of an evaluation: what they say, with the counts, rules and definitions that must stand with them.

All functions are pure: they return strings, rows or rich objects; the stage prints and saves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from lungseg.evaluation.bootstrap import FEW_PATIENTS, INTERVAL_DEFINITION, few_patients_note
from lungseg.evaluation.comparison import MethodComparison
from lungseg.evaluation.comparison_tables import comparison_notes
from lungseg.evaluation.oracle import ORACLE_DEFINITION
from lungseg.evaluation.scores import SLICES, ClassScore
from lungseg.evaluation.summary import ClassSummary, Summary
from lungseg.evaluation.writers import (
    TableRow,
    TextTable,
    csv_text,
    interval,
    json_safe,
    latex_text_table,
    listed,
    markdown_text_table,
    number,
    rich_text_table,
)

if TYPE_CHECKING:
    from rich.table import Table

MEAN_RULE = (
    "Means over pairs: DSC and NSD with a missed one as 0, HD95 and ASSD over the detected ones. The column missed "
    "includes missing predictions. Pooled DSC: 2·Σ|A∩B| / Σ(|A|+|B|) in mL over all pairs, missed and false tissue "
    "included."
)
"""Printed with every table."""
TERMINAL_COLUMNS = ("class", "pairs", "DSC", "95 % CI", "HD95", "95 % CI", "penal.", "NSD", "missed", "false mL")
"""Of volumes; in slice mode the pooled DSC stands in the place of the NSD (METHOD 0.4)."""
COLUMNS = (
    "class", "pairs", "DSC mean", "95 % CI", "DSC median", "DSC pooled", "HD95 mean", "95 % CI", "HD95 median",
    "HD95 penalised", "ASSD", "NSD", "volume error (mL)", "volume error (%)", "missed", "false (mL)",
)  # fmt: skip
LATEX_COLUMNS = ("class", "n", "DSC", "95 % CI", "HD95", "95 % CI", "penalised", "ASSD", "NSD", "missed", "false (mL)")


def header_lines(summaries: Sequence[Summary]) -> list[str]:
    """What stands with every table: counts of cases and of each status, the rules, every definition.

    Parameters
    ----------
    summaries : sequence of Summary
        Of one evaluation: one reference, one setting.

    Returns
    -------
    list of str
        Sentences; nothing for no summaries.
    """
    if not summaries:
        return []
    own = [summary for summary in summaries if not summary.is_oracle]
    lines = [line for summary in own or summaries for line in _count_lines(summary)]
    lines += [note for summary in summaries for note in summary.notes]
    first = summaries[0]
    if any(summary.is_oracle for summary in summaries):
        lines.append(ORACLE_DEFINITION)
    lines.append(f"95 % CI of the mean: {INTERVAL_DEFINITION}, {first.num_bootstrap} samples, seed {first.seed}.")
    rows = [row for summary in summaries for row in (*summary.classes, summary.overall)]
    few = list(dict.fromkeys(row.tissue for row in rows if row.num_patients < FEW_PATIENTS))
    if few:
        every = all(row.num_patients < FEW_PATIENTS for row in rows)
        lines.append(few_patients_note("every class" if every else ", ".join(few)))
    return [*lines, MEAN_RULE, *first.settings.definitions]


def _count_lines(summary: Summary) -> list[str]:
    """Cases and statuses of one method, and which cases lack a side."""
    name = f"{summary.method}: " if summary.method else ""
    statuses = ", ".join(f"{status} {count}" for status, count in summary.status_counts)
    slices = f", {summary.num_slices} annotated slices" if summary.num_slices else ""
    unit = "Class-slice" if summary.num_slices else "Class-case"
    lines = [
        f"{name}{summary.num_cases} cases of {summary.num_patients} patients{slices}. {unit} pairs: {statuses}; "
        f"false tissue in all {summary.overall.false_tissue_ml:.1f} mL."
    ]
    if summary.missing_predictions:
        lines.append(f"{name}Without a prediction, scored as missed: {listed(summary.missing_predictions)}.")
    if summary.missing_references:
        lines.append(f"{name}Without a reference, not scored: {listed(summary.missing_references)}.")
    if summary.unusable:
        lines.append(f"{name}With an unusable side, not scored: {listed(summary.unusable)}.")
    return lines


def rich_table(*summaries: Summary) -> Table:
    """The summaries as one rich table for a terminal of 100 columns, the definitions as its caption."""
    in_slices = any(summary.settings.mode == SLICES for summary in summaries)
    columns = tuple("pooled" if in_slices and name == "NSD" else name for name in TERMINAL_COLUMNS)
    rows: list[TableRow] = []
    for summary in summaries:
        if summary.title:
            rows.append(TableRow((summary.title, *[""] * (len(columns) - 1)), starts_group=True))
        rows += [TableRow(_terminal_cells(row, in_slices)) for row in summary.classes]
        total = _terminal_cells(summary.overall, in_slices)
        rows.append(TableRow(total, is_total=True, starts_group=not summary.title))
    last = "pooled DSC" if in_slices else "surface Dice (NSD)"
    title = f"DSC, HD95 (mm) and {last} against the reference"
    return rich_text_table(TextTable(title, columns, tuple(rows), tuple(header_lines(summaries))))


def _terminal_cells(row: ClassSummary, in_slices: bool = False) -> tuple[str, ...]:
    """Cells of one row, in the order of ``TERMINAL_COLUMNS``."""
    dice, hd95 = row.figures["dice"], row.figures["hd95_mm"]
    return (
        row.tissue,
        str(row.num_pairs),
        number(dice.mean, 3),
        interval(dice.ci_low, dice.ci_high, 3),
        number(hd95.mean, 1),
        interval(hd95.ci_low, hd95.ci_high, 1),
        number(row.figures["penalised_hd95_mm"].mean, 1),
        number(row.pooled_dice if in_slices else row.figures["surface_dice"].mean, 3),
        str(row.num_missed),
        number(row.false_tissue_ml, 1),
    )


def markdown_table(*summaries: Summary) -> str:
    """The summaries as one Markdown table with their definitions below; ends with a newline."""
    return markdown_text_table(_table(summaries, COLUMNS, _markdown_cells))


def latex_table(*summaries: Summary) -> str:
    """The summaries as one LaTeX table (booktabs) with their definitions below; ends with a newline."""
    return latex_text_table(_table(summaries, LATEX_COLUMNS, _latex_cells), label="tab:lungseg-evaluation")


def _table(summaries: Sequence[Summary], columns: tuple[str, ...], cells: Any) -> TextTable:
    """One table of all methods; the column of their names only if there is a name."""
    named = any(summary.title for summary in summaries)
    rows: list[TableRow] = []
    for summary in summaries:
        name = (summary.title,) if named else ()
        for index, row in enumerate(summary.classes):
            rows.append(TableRow((*name, *cells(row)), starts_group=index == 0))
        rows.append(TableRow((*name, *cells(summary.overall)), is_total=True))
    return TextTable(
        title="Agreement with the reference",
        columns=(*(("method",) if named else ()), *columns),
        rows=tuple(rows),
        notes=tuple(header_lines(summaries)),
        num_names=2 if named else 1,
    )


def _markdown_cells(row: ClassSummary) -> tuple[str, ...]:
    """Cells of one row, in the order of ``COLUMNS``."""
    dice, hd95 = row.figures["dice"], row.figures["hd95_mm"]
    return (
        row.tissue,
        str(row.num_pairs),
        number(dice.mean, 3),
        interval(dice.ci_low, dice.ci_high, 3),
        number(dice.median, 3),
        number(row.pooled_dice, 3),
        number(hd95.mean, 1),
        interval(hd95.ci_low, hd95.ci_high, 1),
        number(hd95.median, 1),
        number(row.figures["penalised_hd95_mm"].mean, 1),
        number(row.figures["assd_mm"].mean, 2),
        number(row.figures["surface_dice"].mean, 3),
        number(row.figures["volume_error_ml"].mean, 1),
        number(row.figures["volume_error_percent"].mean, 1),
        str(row.num_missed),
        number(row.false_tissue_ml, 1),
    )


def _latex_cells(row: ClassSummary) -> tuple[str, ...]:
    """Cells of one row, in the order of ``LATEX_COLUMNS``."""
    cells = _terminal_cells(row)
    return (*cells[:7], number(row.figures["assd_mm"].mean, 2), *cells[7:])


def cases_rows(scores: Mapping[str, Sequence[ClassScore]]) -> list[dict[str, Any]]:
    """One dictionary per method, class and case, in the given order; ``nan`` becomes None."""
    return [json_safe({"method": method, **asdict(score)}) for method, rows in scores.items() for score in rows]


def cases_csv(scores: Mapping[str, Sequence[ClassScore]]) -> str:
    """All class scores as CSV text: one header row, then ``cases_rows``; blank where there is no number.

    Parameters
    ----------
    scores : mapping of method name to its scores
        An oracle naming goes under its title (``summary.ORACLE_SUFFIX``), so that nobody averages it in.
    """
    return csv_text(["method", *(field.name for field in fields(ClassScore))], cases_rows(scores))


def summary_dict(summary: Summary) -> dict[str, Any]:
    """One method's summary as plain JSON types; ``nan`` becomes None (null), for JSON has no nan."""
    return dict(
        json_safe(
            {
                "method": summary.method,
                "is_oracle": summary.is_oracle,
                "num_cases": summary.num_cases,
                "num_patients": summary.num_patients,
                "num_slices": summary.num_slices,
                "status_counts": dict(summary.status_counts),
                "missing_predictions": summary.missing_predictions,
                "missing_references": summary.missing_references,
                "unusable": summary.unusable,
                "classes": [_row_dict(row) for row in summary.classes],
                "overall": _row_dict(summary.overall),
                "num_bootstrap": summary.num_bootstrap,
                "seed": summary.seed,
                "definitions": summary.settings.definitions,
            }
        )
    )


def _row_dict(row: ClassSummary) -> dict[str, Any]:
    """One row, flat: ``dice_mean``, ``hd95_ci_low_mm`` and so on, the unit last."""
    flat: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if field.name != "figures":
            flat[field.name] = value
            continue
        for name, figure in value.items():
            stem, unit = _unit_split(name)
            for part in fields(figure):
                key = f"num_{stem}" if part.name == "num" else f"{stem}_{part.name}{unit}"
                flat[key] = getattr(figure, part.name)
    return flat


def _unit_split(name: str) -> tuple[str, str]:
    """``hd95_mm`` -> (``hd95``, ``_mm``)."""
    for unit in ("_mm", "_ml", "_percent"):
        if name.endswith(unit):
            return name.removesuffix(unit), unit
    return name, ""


def results_dict(summaries: Sequence[Summary], comparison: MethodComparison | None = None) -> dict[str, Any]:
    """Everything that ``summary.json`` holds, as plain JSON types.

    Parameters
    ----------
    summaries : sequence of Summary
        As ``summary.summarise_methods`` gives them; at least one.
    comparison : MethodComparison, optional

    Returns
    -------
    dict
        The keys of ``summary_dict`` of the first method at the top, for the many evaluations that have one method
        only; every method and its oracle naming under `methods`; the rows of the comparison under `comparison`.
    """
    data = {**summary_dict(summaries[0]), "methods": [summary_dict(summary) for summary in summaries]}
    if comparison is not None and comparison.rows:
        data["comparison"] = json_safe(
            {
                "rows": [asdict(row) for row in comparison.rows],
                "unpaired": [asdict(left) for left in comparison.unpaired],
                "rules": comparison_notes(comparison),
            }
        )
    return data

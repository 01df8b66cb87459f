"""The tables of an evaluation: what they say, with the counts, rules and definitions that must stand with them.

All functions are pure: they return strings, rows or rich objects; the stage prints and saves them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from lungseg.evaluation.bootstrap import FEW_PATIENTS, FEW_PATIENTS_NOTE, INTERVAL_DEFINITION
from lungseg.evaluation.comparison import (
    COMPARISON_RULES,
    Comparison,
    MethodComparison,
    PairDifference,
    smallest_p,
)
from lungseg.evaluation.scores import ClassScore
from lungseg.evaluation.summary import ORACLE_SUFFIX, ClassSummary, Summary
from lungseg.evaluation.writers import (
    TableRow,
    TextTable,
    csv_text,
    interval,
    json_safe,
    latex_text_table,
    markdown_text_table,
    number,
    p_text,
    rich_text_table,
)

if TYPE_CHECKING:
    from rich.table import Table

ORACLE_NOTE = (
    f"Rows{ORACLE_SUFFIX}: the classes were named with the reference (Hungarian matching over the cohort). They are "
    "a bound that uses the reference, not a result of the method."
)
"""Printed with every table that holds such rows."""
MEAN_RULE = "Means over pairs: DSC and NSD with a missed one as 0, HD95 and ASSD over the detected ones."
"""Printed with every table."""
SIGNIFICANCE = 0.05
"""Usual level of a test: only for the note that few patients cannot reach it."""
MAX_LISTED = 20
"""Case ids spelled out in a note; the rest is counted (cases.csv has all)."""
TERMINAL_COLUMNS = ("class", "pairs", "DSC", "95 % CI", "HD95", "95 % CI", "penal.", "NSD", "missed", "false mL")
COLUMNS = (
    "class", "pairs", "DSC mean", "95 % CI", "DSC median", "DSC pooled", "HD95 mean", "95 % CI", "HD95 median",
    "HD95 penalised", "ASSD", "NSD", "volume error (mL)", "volume error (%)", "missed", "false (mL)",
)  # fmt: skip
LATEX_COLUMNS = ("class", "n", "DSC", "95 % CI", "HD95", "95 % CI", "penalised", "ASSD", "NSD", "missed", "false (mL)")
COMPARISON_COLUMNS = (
    "figure", "first", "second", "class", "pairs", "patients", "median difference", "95 % CI", "mean difference",
    "p", "p Holm", "effect",
)  # fmt: skip
TERMINAL_COMPARISON_COLUMNS = ("methods", "figure", "class", "patients", "median", "95 % CI", "p Holm", "effect")
FIGURE_TITLES: Mapping[str, tuple[str, int]] = {
    "dice": ("DSC", 3),
    "surface_dice": ("NSD", 3),
    "hd95_mm": ("HD95 (mm)", 1),
    "penalised_hd95_mm": ("HD95 penalised (mm)", 1),
    "assd_mm": ("ASSD (mm)", 2),
}
"""Name in tables and pictures, and decimals, per figure of a ``ClassScore``."""


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
        lines.append(ORACLE_NOTE)
    lines.append(f"95 % CI of the mean: {INTERVAL_DEFINITION}, {first.num_bootstrap} samples, seed {first.seed}.")
    if min(summary.num_patients for summary in summaries) < FEW_PATIENTS:
        lines.append(FEW_PATIENTS_NOTE)
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
        lines.append(f"{name}Without a prediction, scored as missed: {_listed(summary.missing_predictions)}.")
    if summary.missing_references:
        lines.append(f"{name}Without a reference, not scored: {_listed(summary.missing_references)}.")
    return lines


def _listed(case_ids: Sequence[str]) -> str:
    """Ids separated by commas; the number of those left out."""
    left = len(case_ids) - MAX_LISTED
    return ", ".join(case_ids[:MAX_LISTED]) + (f" and {left} more" if left > 0 else "")


def rich_table(*summaries: Summary) -> Table:
    """The summaries as one rich table for a terminal of 100 columns, the definitions as its caption."""
    rows: list[TableRow] = []
    for summary in summaries:
        if summary.title:
            rows.append(TableRow((summary.title, *[""] * (len(TERMINAL_COLUMNS) - 1)), starts_group=True))
        rows += [TableRow(_terminal_cells(row)) for row in summary.classes]
        rows.append(TableRow(_terminal_cells(summary.overall), is_total=True, starts_group=not summary.title))
    title = "DSC, HD95 (mm) and surface Dice (NSD) against the reference"
    return rich_text_table(TextTable(title, TERMINAL_COLUMNS, tuple(rows), tuple(header_lines(summaries))))


def _terminal_cells(row: ClassSummary) -> tuple[str, ...]:
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
        number(row.figures["surface_dice"].mean, 3),
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


def comparison_rich_table(comparison: MethodComparison) -> Table:
    """The paired comparisons for a terminal of 100 columns."""
    rows: list[TableRow] = []
    last = ("", "", "")
    for row in comparison.rows:
        digits = FIGURE_TITLES[row.figure][1]
        group = (row.figure, row.method_a, row.method_b)
        cells = (
            f"{row.method_a} − {row.method_b}" if group != last else "",
            FIGURE_TITLES[row.figure][0].removesuffix(" (mm)"),
            row.tissue,
            str(row.num_patients),
            number(row.median_difference, digits),
            interval(row.ci_low, row.ci_high, digits),
            p_text(row.p_holm),
            number(row.effect, 2),
        )
        rows.append(TableRow(cells, starts_group=group != last))
        last = group
    notes = tuple(comparison_notes(comparison))
    table = TextTable("Paired comparison by patient", TERMINAL_COMPARISON_COLUMNS, tuple(rows), notes, num_names=3)
    return rich_text_table(table)


def comparison_markdown(comparison: MethodComparison) -> str:
    """The paired comparisons as a Markdown table with their rules below; ends with a newline."""
    return markdown_text_table(_comparison_table(comparison))


def comparison_latex(comparison: MethodComparison) -> str:
    """The paired comparisons as a LaTeX table (booktabs); ends with a newline."""
    return latex_text_table(_comparison_table(comparison), label="tab:lungseg-comparison")


def _comparison_table(comparison: MethodComparison) -> TextTable:
    """All columns of the paired comparisons."""
    rows = []
    last = ("", "", "")
    for row in comparison.rows:
        group = (row.figure, row.method_a, row.method_b)
        rows.append(TableRow(_comparison_cells(row), starts_group=group != last))
        last = group
    return TextTable(
        title="Paired comparison of methods, by patient",
        columns=COMPARISON_COLUMNS,
        rows=tuple(rows),
        notes=tuple(comparison_notes(comparison)),
        num_names=4,
    )


def _comparison_cells(row: Comparison) -> tuple[str, ...]:
    """Cells of one row, in the order of ``COMPARISON_COLUMNS``."""
    title, digits = FIGURE_TITLES[row.figure]
    return (
        title,
        row.method_a,
        row.method_b,
        row.tissue,
        str(row.num_pairs),
        str(row.num_patients),
        number(row.median_difference, digits),
        interval(row.ci_low, row.ci_high, digits),
        number(row.mean_difference, digits),
        p_text(row.p_value),
        p_text(row.p_holm),
        number(row.effect, 2),
    )


def comparison_notes(comparison: MethodComparison) -> list[str]:
    """Rules of the comparison, the cases left out, and whether so few patients can show anything."""
    lines = [COMPARISON_RULES]
    lines.append(
        f"95 % CI of the median: {INTERVAL_DEFINITION}, {comparison.num_bootstrap} samples, seed {comparison.seed}."
    )
    lines += _power_notes(comparison.rows)
    missing = {
        (row.method_a, row.method_b): row.num_missing_predictions
        for row in comparison.rows
        if row.num_missing_predictions
    }
    for (a, b), count in missing.items():
        lines.append(f"{a} and {b}: {count} pairs lack a prediction of one of them and count as missed.")
    for left in comparison.unpaired:
        lines.append(
            f"Left out of the comparison, scored for {left.having} but not for {left.lacking}: {left.num_pairs} pairs "
            f"of {_listed(left.case_ids)}."
        )
    return lines


def _power_notes(rows: Sequence[Comparison]) -> list[str]:
    """Where so few patients cannot reach significance, whatever the difference."""
    few = list(dict.fromkeys(row.tissue for row in rows if smallest_p(row.num_patients) > SIGNIFICANCE))
    if few:
        return [
            f"Too few patients in {', '.join(few)}: there p cannot fall below {SIGNIFICANCE:g} whatever the difference "
            f"(n patients allow 2/2^n at best: 5 give {smallest_p(5):.4f}, 6 give {smallest_p(6):.4f})."
        ]
    sizes = Counter(row.figure for row in rows)
    if rows and all(smallest_p(row.num_patients) * sizes[row.figure] > SIGNIFICANCE for row in rows):
        return [
            f"So few patients cannot reach {SIGNIFICANCE:g} after Holm's correction over {max(sizes.values())} rows, "
            "whatever the difference: read the intervals."
        ]
    return []


def comparison_csv(comparison: MethodComparison) -> str:
    """Difference of every class-case pair, per figure and pair of methods, as CSV text."""
    columns = [field.name for field in fields(PairDifference)]
    return csv_text(columns, [asdict(difference) for difference in comparison.differences])


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

"""The tables of a paired comparison: what they say, with the rules that must stand with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from lungseg.evaluation.bootstrap import INTERVAL_DEFINITION
from lungseg.evaluation.comparison import (
    COMPARISON_RULES,
    Comparison,
    MethodComparison,
    PairDifference,
    smallest_p,
)
from lungseg.evaluation.writers import (
    TableRow,
    TextTable,
    csv_text,
    interval,
    latex_text_table,
    listed,
    markdown_text_table,
    number,
    p_text,
    rich_text_table,
)

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "figure", "first", "second", "class", "pairs", "patients", "median difference", "95 % CI", "mean difference",
    "p", "p Holm", "effect",
)  # fmt: skip
TERMINAL_COLUMNS = ("methods", "figure", "class", "patients", "median", "95 % CI", "p Holm", "effect")
FIGURE_TITLES: Mapping[str, tuple[str, int]] = {
    "dice": ("DSC", 3),
    "surface_dice": ("NSD", 3),
    "penalised_hd95_mm": ("HD95 penalised (mm)", 1),
}
"""Name in the table, and decimals, per figure compared."""
SIGNIFICANCE = 0.05
"""Usual level of a test: only for the note that few patients cannot reach it."""


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
    table = TextTable("Paired comparison by patient", TERMINAL_COLUMNS, tuple(rows), notes, num_names=3)
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
        columns=COLUMNS,
        rows=tuple(rows),
        notes=tuple(comparison_notes(comparison)),
        num_names=4,
    )


def _comparison_cells(row: Comparison) -> tuple[str, ...]:
    """Cells of one row, in the order of ``COLUMNS``."""
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
            f"of {listed(left.case_ids)}."
        )
    return lines


def _power_notes(rows: Sequence[Comparison]) -> list[str]:
    """Where so few patients cannot reach significance, whatever the difference."""
    few = list(dict.fromkeys(row.tissue for row in rows if smallest_p(row.num_patients) > SIGNIFICANCE))
    if few:
        where = "every class" if all(row.tissue in few for row in rows) else ", ".join(few)
        return [
            f"Too few patients in {where}: there p cannot fall below {SIGNIFICANCE:g} whatever the difference "
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

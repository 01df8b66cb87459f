"""Writers of one table of text: terminal, Markdown, LaTeX; and CSV and JSON values. All are pure."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

MAX_NAME_WIDTH = 16
"""Characters of the first column on a terminal; longer names wrap, so that the table stays 100 columns wide."""
MINUS_SIGN = re.compile(r"(?<!\S)-(?=\d)")
"""Hyphen in front of a number, not inside a name."""
MAX_LISTED = 20
"""Case ids spelled out in a note; the rest is counted (cases.csv has all)."""
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "–": "--", "−": r"\ensuremath{-}", "≥": r"\ensuremath{\geq}", "≤": r"\ensuremath{\leq}",
    "×": r"\ensuremath{\times}", "·": r"\ensuremath{\cdot}", "∩": r"\ensuremath{\cap}", "∪": r"\ensuremath{\cup}",
    "Σ": r"\ensuremath{\Sigma}", "±": r"\ensuremath{\pm}", "²": r"\textsuperscript{2}", "³": r"\textsuperscript{3}",
    "\n": " ", "\r": " ",
}  # fmt: skip
"""Characters that LaTeX reads as commands, and symbols that pdfLaTeX lacks without further packages."""


@dataclass(frozen=True)
class TableRow:
    """One line of a table."""

    cells: tuple[str, ...]
    """As many as the table has columns."""
    is_total: bool = False
    """Printed bold."""
    starts_group: bool = False
    """A rule or a gap is drawn above it."""


@dataclass(frozen=True)
class TextTable:
    """A table ready to be written: every cell is text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]
    """Sentences that must stand with the table: counts, rules, definitions."""
    num_names: int = 1
    """Leading columns that hold names: left-aligned; the others hold numbers."""


def rich_text_table(table: TextTable) -> Table:
    """The table for the terminal, its notes as the caption; names are never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(
        title=Text(table.title),
        caption=Text("\n".join(table.notes)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(table.columns):
        if index < table.num_names:
            out.add_column(column, overflow="fold", max_width=MAX_NAME_WIDTH)
        else:
            out.add_column(column, justify="right", no_wrap=True)
    for row in table.rows:
        if row.starts_group:
            out.add_section()
        out.add_row(*map(Text, row.cells), style="bold" if row.is_total else None)
    return out


def markdown_text_table(table: TextTable) -> str:
    """The table as Markdown (pipes and angle brackets escaped) with its notes below; ends with a newline."""
    rules = [" --- "] * table.num_names + [" ---: "] * (len(table.columns) - table.num_names)
    lines = [_markdown_line(table.columns), "|" + "|".join(rules) + "|"]
    lines += [_markdown_line(row.cells) for row in table.rows]
    lines += ["", *(f"- {_markdown_escaped(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(_markdown_escaped, cells)) + " |"


def _markdown_escaped(text: str) -> str:
    """Text that neither ends a cell or a line nor opens an HTML element."""
    flat = " ".join(text.split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def latex_text_table(table: TextTable, *, label: str) -> str:
    r"""The table as a LaTeX float in booktabs style, its notes below it; ends with a newline.

    Parameters
    ----------
    table : TextTable
    label : str
        For ``\ref``: letters, digits, ``:`` and ``-``.

    Returns
    -------
    str
        Needs ``\usepackage{booktabs}`` and ``\usepackage{graphicx}``; wide tables are scaled down to the line.
    """
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        "\\begin{table}[htbp]",
        "\\centering",
        f"\\caption{{{latex_escaped(table.title)}}}",
        f"\\label{{{label}}}",
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{@{{}}{'l' * table.num_names}{'r' * (len(table.columns) - table.num_names)}@{{}}}}",
        "\\toprule",
        _latex_line(table.columns),
        "\\midrule",
    ]
    for index, row in enumerate(table.rows):
        if row.starts_group and index:
            lines.append("\\midrule")
        lines.append(_latex_line(row.cells, bold=row.is_total))
    lines += ["\\bottomrule", "\\end{tabular}}", "", "\\smallskip", "\\begin{minipage}{\\linewidth}\\footnotesize"]
    lines += [f"{latex_escaped(note)}\\par" for note in table.notes]
    lines += ["\\end{minipage}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_line(cells: Sequence[str], *, bold: bool = False) -> str:
    """One line of a tabular."""
    texts = [MINUS_SIGN.sub(r"\\ensuremath{-}", latex_escaped(cell)) for cell in cells]
    return " & ".join(f"\\textbf{{{text}}}" if bold else text for text in texts) + r" \\"


def latex_escaped(text: str) -> str:
    """Text in which LaTeX finds no command; see ``LATEX_SPECIAL``."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def listed(case_ids: Sequence[str]) -> str:
    """Ids separated by commas; the number of those left out."""
    left = len(case_ids) - MAX_LISTED
    return ", ".join(case_ids[:MAX_LISTED]) + (f" and {left} more" if left > 0 else "")


def number(value: float, digits: int) -> str:
    """Fixed decimals; a dash for nan and infinities."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def interval(low: float, high: float, digits: int) -> str:
    """Both ends with fixed decimals; a dash if there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    dash = "–" if low >= 0 else " to "
    return f"{low:.{digits}f}{dash}{high:.{digits}f}"


def p_text(value: float) -> str:
    """A p-value with three decimals; a dash for nan."""
    return "<0.001" if value < 0.001 else number(value, 3)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV text: floats with six decimals, None and ``nan`` blank, lines end with a newline.

    Parameters
    ----------
    columns : sequence of str
        Header and order of the columns.
    rows : iterable of mapping
        Each with exactly these keys; ``ValueError`` on a foreign key.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_cell(value) for key, value in row.items()})
    return out.getvalue()


def _csv_cell(value: Any) -> str:
    """Text of one cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def json_safe(value: Any) -> Any:
    """Copy with lists for tuples and None for nan and infinities: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""The tables of ``lungseg benchmark``: methods side by side, the cumulative ablation, and the published figures.

All functions are pure: they return strings, rows or rich objects; the stage prints and saves them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lungseg.config.ablations import Published
from lungseg.evaluation.summary import ALL_CLASSES
from lungseg.evaluation.writers import (
    TableRow,
    TextTable,
    csv_text,
    interval,
    json_safe,
    markdown_text_table,
    number,
    rich_text_table,
)

if TYPE_CHECKING:
    from rich.table import Table

NAN = float("nan")
CSV_COLUMNS = (
    "row", "tissue", "pairs", "patients", "dice_mean", "dice_ci_low", "dice_ci_high", "hd95_mean_mm",
    "hd95_ci_low_mm", "hd95_ci_high_mm", "hd95_median_mm", "penalised_hd95_mean_mm", "missed", "false_tissue_ml",
    "false_disease_percent", "ece", "low_confidence_percent", "cpu_seconds_a_scan", "wall_seconds_a_scan",
    "oracle_dice_mean", "published_dice_percent", "published_hd95",
)  # fmt: skip
PUBLISHED_NOTE = (
    "Published: DiffSegLung, 190 annotated axial slices of CT, four classes (no consolidation), distances without a "
    "unit, no intervals, no missed classes told. Ours: digital phantoms, whole volumes, five classes, HD95 in mm. "
    "Levels cannot be compared, only the order of the rows and the size of their steps."
)
FALSE_DISEASE_NOTE = (
    "False disease: share of the lung of healthy phantoms that the map shows as anything but healthy, mean over them."
)


@dataclass(frozen=True)
class RowResult:
    """One row of a table."""

    name: str
    doc: str
    """What it is, in a few words."""
    figures: Mapping[str, Any]
    """Of one method, as ``tables.summary_dict`` gives them; empty if the row failed."""
    oracle: Mapping[str, Any] = field(default_factory=dict)
    """The same of its oracle naming; empty without."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """As ``calibration.Calibration``; empty without confidences."""
    false_disease_percent: float = NAN
    """Of the lung of healthy phantoms."""
    cpu_seconds: float = NAN
    """From ``volume.h5`` to ``labels.h5``, for one scan."""
    wall_seconds: float = NAN
    """The same, elapsed; says little on a machine that is shared."""
    published: Published | None = None
    error: str = ""
    """Why there are no figures."""


def tissues_of(results: Sequence[RowResult]) -> list[str]:
    """Classes of the first row that has any, in the order of the view."""
    return next(([c["tissue"] for c in r.figures["classes"]] for r in results if r.figures), [])


def _classes(result: RowResult) -> list[Mapping[str, Any]]:
    return [*result.figures["classes"], result.figures["overall"]] if result.figures else []


def _value(row: Mapping[str, Any], key: str, scale: float = 1.0) -> float:
    value = row.get(key)
    return NAN if value is None else scale * float(value)


def _with_interval(row: Mapping[str, Any], stem: str, unit: str, *, scale: float = 1.0) -> str:
    """Mean with its interval, such as ``84.1 (80.2–87.0)``."""
    mean = number(_value(row, f"{stem}_mean{unit}", scale), 1)
    low, high = (_value(row, f"{stem}_ci_{end}{unit}", scale) for end in ("low", "high"))
    ends = interval(low, high, 1)
    return mean if ends == "–" else f"{mean} ({ends})"


def _dice(row: Mapping[str, Any]) -> str:
    return _with_interval(row, "dice", "", scale=100.0)


def _hd95(row: Mapping[str, Any]) -> str:
    return _with_interval(row, "hd95", "_mm")


def _facts(result: RowResult) -> tuple[str, ...]:
    """Missed, false disease, calibration and time: what a mean DSC does not tell."""
    overall = result.figures.get("overall", {})
    pairs, missed = overall.get("num_pairs"), overall.get("num_missed")
    return (
        "–" if pairs is None else f"{missed} of {pairs}",
        number(result.false_disease_percent, 1),
        number(_value(result.calibration, "ece"), 3),
        number(_value(result.calibration, "low_confidence_share", 100.0), 1),
        number(result.cpu_seconds, 1),
    )


FACTS = ("missed", "false disease %", "ECE", "low confidence %", "CPU s a scan")


def method_tables(results: Sequence[RowResult], notes: Sequence[str]) -> str:
    """Table 2 as Markdown: DSC per class, HD95 per class, what else counts, and the published figures; notes below."""
    tissues = tissues_of(results)
    parts = [
        _markdown("DSC in percent, mean with 95 % interval", ("method", "what", "all", *tissues), [
            (r.name, r.doc, *_by_class(r, tissues, _dice)) for r in results
        ], num_names=2),
        _markdown("HD95 in mm over detected pairs, mean with 95 % interval", ("method", "all", "median", *tissues), [
            _hd95_row(r, tissues) for r in results
        ]),
        _markdown("What a mean does not tell", ("method", *FACTS, "oracle DSC"), [
            (r.name, *_facts(r), number(_value(r.oracle.get("overall", {}), "dice_mean", 100.0), 1)) for r in results
        ]),
    ]  # fmt: skip
    known = [r for r in results if r.published is not None]
    if known:
        classes = [t for t in tissues if any(r.published and t in r.published.dice for r in known)]
        heads = ("method", "mean of these classes", *classes, "HD95")
        rows = [_beside_published(r, classes) for r in known]
        parts.append(_markdown("Ours / published: DSC in percent, HD95", heads, rows))
    return "\n".join(["# Table 2: methods", "", *parts, *_bullets(results, notes, has_published=bool(known))]) + "\n"


def _by_class(result: RowResult, tissues: Sequence[str], cell: Any) -> list[str]:
    """The cell over all pairs, then that of each class; dashes for a row without figures."""
    found = {row["tissue"]: row for row in _classes(result)}
    return [cell(found[name]) if name in found else "–" for name in (ALL_CLASSES, *tissues)]


def _hd95_row(result: RowResult, tissues: Sequence[str]) -> tuple[str, ...]:
    overall, *classes = _by_class(result, tissues, _hd95)
    median = number(_value(result.figures.get("overall", {}), "hd95_median_mm"), 1)
    return (result.name, overall, median, *classes)


def class_mean(result: RowResult, tissues: Sequence[str]) -> float:
    """Mean of the classes' mean DSC in percent; ``nan`` if one of them has none."""
    found = {row["tissue"]: _value(row, "dice_mean", 100.0) for row in _classes(result)}
    values = [found.get(name, NAN) for name in tissues]
    return math.fsum(values) / len(values) if values else NAN


def _beside_published(result: RowResult, classes: Sequence[str]) -> tuple[str, ...]:
    published = result.published
    if published is None:
        raise ValueError(f"row {result.name} has no published figures")
    found = {row["tissue"]: row for row in _classes(result)}
    pairs = [
        (class_mean(result, classes), published.mean_dice),
        *((_value(found.get(c, {}), "dice_mean", 100.0), published.dice.get(c, NAN)) for c in classes),
        (_value(found.get(ALL_CLASSES, {}), "hd95_mean_mm"), published.hd95),
    ]
    return (result.name, *(f"{number(ours, 1)} / {number(theirs, 1)}" for ours, theirs in pairs))


def ablation_table(results: Sequence[RowResult], notes: Sequence[str]) -> str:
    """Table 3 as Markdown: each row with its step from the one above, ours and published; notes below."""
    heads = ("row", "what", "DSC %", "step", "published", "step", "HD95 mm", "published", *FACTS)
    rows: list[tuple[str, ...]] = []
    before: RowResult | None = None
    for result in results:
        published = result.published
        rows.append(
            (
                result.name,
                result.doc,
                _by_class(result, (), _dice)[0],
                _step(_mean_dice(result), _mean_dice(before)),
                number(published.mean_dice if published else NAN, 1),
                _step(
                    published.mean_dice if published else NAN,
                    before.published.mean_dice if before and before.published else NAN,
                ),
                _by_class(result, (), _hd95)[0],
                number(published.hd95 if published else NAN, 1),
                *_facts(result),
            )
        )
        before = result
    tissues = tissues_of(results)
    classes = [(r.name, *_by_class(r, tissues, _dice)[1:]) for r in results]
    parts = [
        _markdown("Cumulative: each row has one switch more than the one above", heads, rows, num_names=2),
        _markdown("DSC in percent per class", ("row", *tissues), classes),
    ]
    return "\n".join(["# Table 3: ablation", "", *parts, *_bullets(results, notes, has_published=True)]) + "\n"


def _mean_dice(result: RowResult | None) -> float:
    return NAN if result is None else _value(result.figures.get("overall", {}), "dice_mean", 100.0)


def _step(value: float, before: float) -> str:
    difference = value - before
    return f"{difference:+.1f}" if math.isfinite(difference) else "–"


def _markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1) -> str:
    """One table below its title, without notes."""
    lines = tuple(TableRow(tuple(row)) for row in rows)
    text = markdown_text_table(TextTable(title, tuple(columns), lines, (), num_names))
    return f"## {title}\n\n{text.rstrip()}\n"


def _bullets(results: Sequence[RowResult], notes: Sequence[str], *, has_published: bool) -> list[str]:
    failed = [f"Row {r.name} failed, so that it has no figures: {r.error}" for r in results if r.error]
    said = [*failed, *notes, FALSE_DISEASE_NOTE, *([PUBLISHED_NOTE] if has_published else [])]
    return [f"- {' '.join(note.split())}" for note in said]


def benchmark_csv(results: Sequence[RowResult]) -> str:
    """All figures as CSV text: one line for each row and class, and one over all pairs; failed rows have none."""
    return csv_text(CSV_COLUMNS, [line for result in results for line in _csv_lines(result)])


def _csv_lines(result: RowResult) -> list[dict[str, Any]]:
    oracle = {row["tissue"]: row for row in [*result.oracle.get("classes", ()), result.oracle.get("overall")] if row}
    lines = []
    for row in _classes(result):
        tissue, published = row["tissue"], result.published
        is_all = tissue == ALL_CLASSES
        theirs = (published.mean_dice if is_all else published.dice.get(tissue)) if published else None
        line = {
            "row": result.name,
            "tissue": tissue,
            "pairs": row["num_pairs"],
            "patients": row["num_patients"],
            **{key: row[key] for key in CSV_COLUMNS[4:11]},
            "penalised_hd95_mean_mm": row["penalised_hd95_mean_mm"],
            "missed": row["num_missed"],
            "false_tissue_ml": row["false_tissue_ml"],
            "false_disease_percent": result.false_disease_percent if is_all else None,
            "ece": result.calibration.get("ece") if is_all else None,
            "low_confidence_percent": _value(result.calibration, "low_confidence_share", 100.0) if is_all else None,
            "cpu_seconds_a_scan": result.cpu_seconds if is_all else None,
            "wall_seconds_a_scan": result.wall_seconds if is_all else None,
            "oracle_dice_mean": oracle.get(tissue, {}).get("dice_mean"),
            "published_dice_percent": theirs,
            "published_hd95": published.hd95 if published and is_all else None,
        }
        lines.append(json_safe(line))
    return lines


def benchmark_rich_table(title: str, results: Sequence[RowResult], notes: Sequence[str]) -> Table:
    """The rows for a terminal: mean DSC of each class without intervals, and what else counts."""
    tissues = tissues_of(results)
    rows = []
    for result in results:
        found = {row["tissue"]: row for row in _classes(result)}
        dice = [number(_value(found.get(t, {}), "dice_mean", 100.0), 1) for t in (ALL_CLASSES, *tissues)]
        hd95 = number(_value(found.get(ALL_CLASSES, {}), "hd95_mean_mm"), 1)
        rows.append(TableRow((result.name, *dice, hd95, *_facts(result))))
    columns = ("row", "DSC %", *(t[:6] for t in tissues), "HD95", "missed", "false %", "ECE", "low %", "CPU s")
    failed = [f"{r.name} failed: {r.error}" for r in results if r.error]
    return rich_text_table(TextTable(title, columns, tuple(rows), (*failed, *notes)))

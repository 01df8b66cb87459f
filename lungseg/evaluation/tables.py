"""Summary of class scores with confidence intervals by patient, and its tables.

All writers are pure: they return strings, rows or rich objects; the stage prints and saves them.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg.evaluation.overlap import (
    ABSENT,
    FALSE_TISSUE,
    MIN_REFERENCE_ML,
    MISSING_PREDICTION,
    STATUSES,
    ClassScore,
)

if TYPE_CHECKING:
    from rich.table import Table

HD95_DEFINITION = (
    "HD95 in mm: border voxels (mask minus its 6-connected erosion), physical spacing, larger of the two directed "
    "95th percentiles (MONAI's definition), mean and median over detected pairs; the penalised HD95 charges a missed "
    "class the diagonal of the lung's bounding box."
)
"""Printed with every table: three published definitions share the name (METHOD 0.4)."""
COUNTING_RULES = (
    f"3-D, per case. A class counts in a case where the reference holds at least {MIN_REFERENCE_ML:g} mL of it; one "
    "not predicted there scores Dice 0 and is counted as missed; tissue predicted where the reference holds less is "
    "false tissue (mL) and not averaged."
)
"""Printed with every table."""
ALL_CLASSES = "all"
"""Name of the summary row over all class-case pairs."""
CI_PERCENTILES = (2.5, 97.5)
"""Percentile bootstrap, 95 %."""
MIN_BOOTSTRAP_PATIENTS = 2
"""With fewer patients there is nothing to resample and no interval is given."""


@dataclass(frozen=True)
class ClassSummary:
    """One row of the table: a class, or all class-case pairs. ``nan`` where nothing can be averaged."""

    tissue: str
    """Name of the class, or `all`."""
    num_pairs: int
    """Class-case pairs averaged."""
    num_cases: int
    """Cases among them."""
    num_patients: int
    """Patients among them: the units of the bootstrap."""
    dice_mean: float
    """Mean Dice over the pairs, missed ones as 0."""
    dice_median: float
    """Median Dice over the pairs, missed ones as 0."""
    dice_ci_low: float
    """Lower end of the 95 % bootstrap interval of the mean, by patient; nan with fewer than two patients."""
    dice_ci_high: float
    """Upper end."""
    num_detected: int
    """Pairs with an HD95: the class was predicted at all."""
    hd95_mean_mm: float
    """Mean HD95 over the detected pairs."""
    hd95_median_mm: float
    """Median HD95 over the detected pairs."""
    penalised_hd95_mean_mm: float
    """Mean over all pairs, a missed one charged the diagonal of the lung's box."""
    num_missed: int
    """Pairs with no voxel predicted, missing predictions included."""
    num_false_tissue: int
    """Cases where the class was predicted and the reference holds less than the limit."""
    false_tissue_ml: float
    """Volume predicted there, in mL, summed over the cases."""
    num_absent: int
    """Pairs without the class on either side: excluded from the means."""


@dataclass(frozen=True)
class Summary:
    """Result of an evaluation: one row per class and one over all pairs."""

    classes: tuple[ClassSummary, ...]
    """In the order of the view."""
    overall: ClassSummary
    """Over all class-case pairs."""
    num_cases: int
    """Distinct cases with a reference."""
    num_patients: int
    """Distinct patients."""
    status_counts: tuple[tuple[str, int], ...]
    """Class-case pairs per status, zero included."""
    missing_predictions: tuple[str, ...]
    """Ids of the cases without a prediction, sorted."""
    num_bootstrap: int
    """Bootstrap samples."""
    seed: int
    """Seed of the bootstrap."""
    hd95_definition: str = HD95_DEFINITION
    """Which HD95 this is."""


def summarise(scores: Sequence[ClassScore], *, num_bootstrap: int = 2000, seed: int = 0) -> Summary:
    """Means, medians and 95 % intervals by patient, per class and over all class-case pairs.

    Parameters
    ----------
    scores : sequence of ClassScore
        In any order; classes keep the order of their first appearance.
    num_bootstrap : int
        Resamples of the patients (all cases of a patient go together). 0 gives no interval.
    seed : int
        The same scores and seed give the same interval, whatever the order of the scores.

    Returns
    -------
    Summary
        No scores: no class rows and ``nan`` in the row over all pairs.

    Source
    ------
    METHOD 0.4.
    """
    names = list(dict.fromkeys(score.tissue for score in scores))
    # Sums of floats depend on their order: sort, so that cases scored in parallel give the same bits.
    ordered = sorted(scores, key=lambda score: (score.patient_id, score.case_id, names.index(score.tissue)))
    counts = Counter(score.status for score in ordered)
    rows = [
        _summary_row([score for score in ordered if score.tissue == name], name, num_bootstrap, seed) for name in names
    ]
    return Summary(
        classes=tuple(rows),
        overall=_summary_row(ordered, ALL_CLASSES, num_bootstrap, seed),
        num_cases=len({score.case_id for score in ordered}),
        num_patients=len({score.patient_id for score in ordered}),
        status_counts=tuple((status, counts[status]) for status in STATUSES),
        missing_predictions=tuple(sorted({s.case_id for s in ordered if s.status == MISSING_PREDICTION})),
        num_bootstrap=num_bootstrap,
        seed=seed,
    )


def bootstrap_ci(
    values: Sequence[float], patients: Sequence[str], *, num_bootstrap: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling patients with replacement.

    Parameters
    ----------
    values : sequence of float
        One per pair.
    patients : sequence of str
        Patient of each value; all values of a drawn patient enter together.
    num_bootstrap : int
    rng : numpy.random.Generator

    Returns
    -------
    (low, high)
        ``nan`` both with fewer than two patients or no resamples.
    """
    unique, index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if len(unique) < MIN_BOOTSTRAP_PATIENTS or num_bootstrap < 1:
        return float("nan"), float("nan")
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(index)
    drawn = rng.integers(len(unique), size=(num_bootstrap, len(unique)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, CI_PERCENTILES)
    return float(low), float(high)


def _summary_row(scores: Sequence[ClassScore], name: str, num_bootstrap: int, seed: int) -> ClassSummary:
    """Summary of the given scores under a name."""
    pairs = [score for score in scores if score.is_averaged]
    values = [score.dice for score in pairs]
    distances = [score.hd95_mm for score in pairs if not math.isnan(score.hd95_mm)]
    false_ml = [score.predicted_ml for score in scores if score.status == FALSE_TISSUE]
    # Seeded by the name, so that a row does not change when the view gains or loses another class.
    rng = np.random.default_rng([seed, *name.encode()])
    low, high = bootstrap_ci(values, [s.patient_id for s in pairs], num_bootstrap=num_bootstrap, rng=rng)
    return ClassSummary(
        tissue=name,
        num_pairs=len(pairs),
        num_cases=len({score.case_id for score in pairs}),
        num_patients=len({score.patient_id for score in pairs}),
        dice_mean=_mean(values),
        dice_median=_median(values),
        dice_ci_low=low,
        dice_ci_high=high,
        num_detected=len(distances),
        hd95_mean_mm=_mean(distances),
        hd95_median_mm=_median(distances),
        penalised_hd95_mean_mm=_mean([score.penalised_hd95_mm for score in pairs]),
        num_missed=sum(score.is_missed for score in pairs),
        num_false_tissue=len(false_ml),
        false_tissue_ml=float(math.fsum(false_ml)),
        num_absent=sum(score.status == ABSENT for score in scores),
    )


def _mean(values: Sequence[float]) -> float:
    """Mean; nan of nothing, without NumPy's warning."""
    return math.fsum(values) / len(values) if values else float("nan")


def _median(values: Sequence[float]) -> float:
    """Median; nan of nothing, without NumPy's warning."""
    return float(np.median(values)) if values else float("nan")


COLUMNS = (
    "class",
    "pairs",
    "DSC mean",
    "95 % CI",
    "DSC median",
    "HD95 mean",
    "HD95 median",
    "HD95 penalised",
    "missed",
    "false (mL)",
)


def header_lines(summary: Summary) -> list[str]:
    """What stands with every table: counts of cases and of each status, the rules, the HD95 definition."""
    statuses = ", ".join(f"{name} {count}" for name, count in summary.status_counts)
    lines = [
        f"{summary.num_cases} cases of {summary.num_patients} patients. Class-case pairs: {statuses}.",
        f"95 % CI: bootstrap of the mean by patient, {summary.num_bootstrap} samples, seed {summary.seed}.",
        COUNTING_RULES,
        summary.hd95_definition,
    ]
    if summary.missing_predictions:
        lines.insert(1, f"Without a prediction, scored as missed: {', '.join(summary.missing_predictions)}.")
    return lines


def rich_table(summary: Summary) -> Table:
    """The summary as a rich table for the terminal, its definitions as the caption."""
    from rich import box
    from rich.table import Table

    table = Table(
        title="DSC and HD95 (mm) against the reference",
        caption="\n".join(header_lines(summary)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in summary.classes:
        table.add_row(*_cells(row))
    table.add_section()
    table.add_row(*_cells(summary.overall), style="bold")
    return table


def markdown_table(summary: Summary) -> str:
    """The summary as a Markdown table with its definitions below; ends with a newline."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(COLUMNS) - 1)) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in (*summary.classes, summary.overall)]
    lines += ["", *(f"- {line}" for line in header_lines(summary))]
    return "\n".join(lines) + "\n"


def _cells(row: ClassSummary) -> list[str]:
    """Formatted cells of one row, in the order of ``COLUMNS``."""
    interval = f"{row.dice_ci_low:.3f} – {row.dice_ci_high:.3f}" if not math.isnan(row.dice_ci_low) else "–"
    return [
        row.tissue,
        str(row.num_pairs),
        _number(row.dice_mean, 3),
        interval,
        _number(row.dice_median, 3),
        _number(row.hd95_mean_mm, 1),
        _number(row.hd95_median_mm, 1),
        _number(row.penalised_hd95_mean_mm, 1),
        str(row.num_missed),
        _number(row.false_tissue_ml, 1),
    ]


def _number(value: float, digits: int) -> str:
    """Fixed decimals; a dash for nan."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def cases_rows(scores: Sequence[ClassScore]) -> list[dict[str, Any]]:
    """One dictionary per class and case, in the given order; ``nan`` becomes None."""
    return [_json_safe(asdict(score)) for score in scores]


def cases_csv(scores: Sequence[ClassScore]) -> str:
    """All class scores as CSV text: one header row, then ``cases_rows``; blank where there is no number."""
    return csv_text([field.name for field in fields(ClassScore)], cases_rows(scores))


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


def summary_dict(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON types; ``nan`` becomes None (null), for JSON has no nan."""
    data = asdict(summary)
    data["status_counts"] = dict(summary.status_counts)
    return dict(_json_safe(data))


def _json_safe(value: Any) -> Any:
    """Copy with lists for tuples and None for nan and infinities."""
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

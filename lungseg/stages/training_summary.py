"""What a finished training run reached: its first and last figures, from the record it left."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lungseg.evaluation.writers import json_safe
from lungseg.report.training_curves import COSINES, LOSSES
from lungseg.stages.cohort import StageResult

FIGURES = (
    *((key, f"loss, {name}") for key, name, _, _ in LOSSES),
    ("effective_rank", "effective rank of the student"),
    *((key, f"mean cosine, {name}") for key, name, _ in COSINES),
)
"""Key of a line of ``stats.jsonl`` and its name."""


def summarised(result: StageResult, *, as_json: bool) -> StageResult:
    """The result of a run with its figures as a table, or as a document."""
    path = result.output / "stats.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    figures = first_and_last(lines)
    if as_json:
        images = lines[-1]["images"] if lines else 0
        return result.as_document(images=images, figures=figures, **json_safe(dict(result.values)))
    curves = result.output / "curves.png"
    notes = (*result.notes, f"curves: {curves}") if curves.is_file() else result.notes
    return dataclasses.replace(
        result, tables=(*result.tables, _table(figures)) if figures else result.tables, notes=notes
    )


def first_and_last(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each figure the first and the last value, and the images seen there; figures that a run lacks are left out."""
    found = {}
    for key, _ in FIGURES:
        known = [(line["images"], line[key]) for line in lines if line.get(key) is not None]
        if known:
            (first_images, first), (last_images, last) = known[0], known[-1]
            found[key] = {
                "first": first, "first_images": first_images, "last": last, "last_images": last_images,
            }  # fmt: skip
    return found


def _table(figures: Mapping[str, Mapping[str, float]]) -> Any:
    from rich.table import Table

    last = max(row["last_images"] for row in figures.values())
    table = Table(title=f"Training, {last:.0f} images")
    table.add_column("figure")
    for name in ("first", "at images", "last", "at images"):
        table.add_column(name, justify="right")
    for key, name in FIGURES:
        if key in figures:
            cells = [
                text
                for end in ("first", "last")
                for text in (f"{figures[key][end]:.3g}", f"{figures[key][f'{end}_images']:.0f}")
            ]
            table.add_row(name, *cells)
    return table

"""The tables of the benchmark from made-up figures: cells, steps, what failed, what is published."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lungseg.config.ablations import Published
from lungseg.evaluation.benchmark_tables import (
    RowResult,
    ablation_table,
    benchmark_csv,
    benchmark_rich_table,
    class_mean,
    method_tables,
)
from lungseg.evaluation.overlap import score_case
from lungseg.evaluation.summary import summarise
from lungseg.evaluation.tables import summary_dict
from lungseg.tissue import VIEWS

NOTES = ["one | note"]


def figures(share: float) -> Mapping[str, Any]:
    """Of two patients whose five tissues, 1000 mL each, are found up to a share of their voxels."""
    scores = []
    for patient in range(2):
        reference = np.repeat(np.arange(1, 6, dtype=np.uint8), 10 * 100).reshape(50, 10, 10)
        prediction = reference.copy()
        prediction[:, : round(10 * (1 - share)) + patient] = 1
        scores += score_case(
            prediction, reference, spacing_mm=(10.0, 10.0, 10.0), view=VIEWS["tissues"], case_id=f"c{patient}",
            patient_id=f"p{patient}",
        )  # fmt: skip
    return summary_dict(summarise(scores, method="m", num_bootstrap=100))


PUBLISHED = Published(8.6, 84.0, {"healthy": 89.3, "ggo": 84.1, "fibrosis": 86.4, "emphysema": 76.2})
GOOD = RowResult(
    "good", "what is good", figures(0.9), calibration={"ece": 0.0712, "low_confidence_share": 0.25},
    false_disease_percent=1.25, cpu_seconds=12.34, published=PUBLISHED,
)  # fmt: skip
POOR = RowResult("poor", "what is not", figures(0.5), published=Published(18.4, 71.3))
FAILED = RowResult("failed", "what fails", {}, error="no tokens | here", published=Published(1.0, 2.0, {"ggo": 3.0}))


def table(text: str, title: str) -> dict[str, list[str]]:
    """Rows of one Markdown table, by their first cell."""
    block = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block]
    return {row[0].strip(): row[1:] for row in rows}


def test_methods_side_by_side() -> None:
    text = method_tables([GOOD, POOR, FAILED], NOTES)
    dice = table(text, "DSC in percent, mean with 95 % interval")
    classes = {row["tissue"]: row for row in [*GOOD.figures["classes"], GOOD.figures["overall"]]}
    assert dice["method"] == ["what", "all", "healthy", "emphysema", "ggo", "fibrosis", "consolidation"]
    for cell, tissue in zip(dice["good"][1:], ("all", *dice["method"][2:]), strict=True):
        row = classes[tissue]
        expected = [row["dice_mean"], row["dice_ci_low"], row["dice_ci_high"]]
        assert cell == "{:.1f} ({:.1f}–{:.1f})".format(*(100 * value for value in expected))
    assert dice["failed"][1:] == ["–"] * 6
    distance = table(text, "HD95 in mm over detected pairs, mean with 95 % interval")
    assert distance["good"][0].startswith(f"{classes['all']['hd95_mean_mm']:.1f} (")
    facts = table(text, "What a mean does not tell")
    assert facts["good"] == ["0 of 10", "1.2", "0.071", "25.0", "12.3", "–"]
    beside = table(text, "Ours / published: DSC in percent, HD95")
    assert beside["good"][0] == f"{class_mean(GOOD, ('healthy', 'emphysema', 'ggo', 'fibrosis')):.1f} / 84.0"
    assert beside["good"][-1] == f"{classes['all']['hd95_mean_mm']:.1f} / 8.6"
    assert "- Row failed failed, so that it has no figures: no tokens | here" in text
    assert "- one | note" in text


def test_each_row_of_the_ablation_shows_its_step() -> None:
    rows = table(ablation_table([POOR, FAILED, GOOD, POOR], NOTES), "Cumulative: each row has one switch more than the "
                 "one above")  # fmt: skip
    head = rows["row"]
    assert rows["good"][head.index("step")] == "–"  # nothing to compare with
    direct = ablation_table([POOR, GOOD], NOTES)
    cells = table(direct, "Cumulative: each row has one switch more than the one above")["good"]
    step = 100 * (GOOD.figures["overall"]["dice_mean"] - POOR.figures["overall"]["dice_mean"])
    assert step > 10
    assert cells[1].startswith(f"{100 * GOOD.figures['overall']['dice_mean']:.1f} (")
    assert cells[2:5] == [f"{step:+.1f}", "84.0", "+12.7"]


def test_csv_has_every_class_and_its_published_figure() -> None:
    lines = list(csv.DictReader(io.StringIO(benchmark_csv([GOOD, FAILED]))))
    assert [(line["row"], line["tissue"]) for line in lines] == [
        ("good", name) for name in ("healthy", "emphysema", "ggo", "fibrosis", "consolidation", "all")
    ]
    assert [line["published_dice_percent"] for line in lines] == [
        "89.300000", "76.200000", "84.100000", "86.400000", "", "84.000000",
    ]  # fmt: skip
    assert [bool(line["ece"]) for line in lines] == [False] * 5 + [True]
    assert float(lines[2]["dice_mean"]) == pytest.approx(GOOD.figures["classes"][2]["dice_mean"], abs=1e-6)


def test_terminal_table_fits_and_tells_failures() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(benchmark_rich_table("Table 2", [GOOD, FAILED], NOTES))
    text = console.export_text()
    assert "good" in text
    assert "failed failed: no tokens" in text

"""Means, intervals by patient, and what every table must carry."""

from __future__ import annotations

import csv
import io
import json
import math
import random

import numpy as np
import pytest

from lungseg.evaluation.overlap import ClassScore
from lungseg.evaluation.tables import (
    COLUMNS,
    HD95_DEFINITION,
    bootstrap_ci,
    cases_csv,
    cases_rows,
    csv_text,
    markdown_table,
    rich_table,
    summarise,
    summary_dict,
)

NAN = float("nan")


def scored(case: str, patient: str, value: float, *, tissue: str = "ggo", hd95: float = 2.0) -> ClassScore:
    return ClassScore(
        case, patient, tissue, "scored", value, value / (2 - value), value, value, 10.0, 9.0, -1.0, hd95, hd95
    )


def missed(case: str, patient: str, *, tissue: str = "ggo", status: str = "missed") -> ClassScore:
    return ClassScore(case, patient, tissue, status, 0.0, 0.0, NAN, 0.0, 10.0, 0.0, -10.0, NAN, 300.0)


def uncounted(case: str, patient: str, *, tissue: str = "ggo", false_ml: float = 0.0) -> ClassScore:
    status = "false tissue" if false_ml else "absent"
    return ClassScore(case, patient, tissue, status, NAN, NAN, NAN, NAN, 0.0, false_ml, false_ml, NAN, NAN)


SCORES = [
    scored("a", "p1", 0.8, hd95=2.0),
    scored("b", "p1", 0.6, hd95=6.0),
    missed("c", "p2"),
    uncounted("d", "p3", false_ml=4.5),
    uncounted("e", "p4"),
    scored("a", "p1", 0.9, tissue="healthy", hd95=1.0),
    missed("f", "p5", tissue="healthy", status="missing prediction"),
]


def test_means_and_counts_by_hand():
    summary = summarise(SCORES, num_bootstrap=200)
    ggo = next(row for row in summary.classes if row.tissue == "ggo")
    assert (ggo.num_pairs, ggo.num_cases, ggo.num_patients) == (3, 3, 2)
    assert ggo.dice_mean == pytest.approx(1.4 / 3)
    assert ggo.dice_median == pytest.approx(0.6)
    assert ggo.num_detected == 2
    assert ggo.hd95_mean_mm == ggo.hd95_median_mm == pytest.approx(4.0)
    assert ggo.penalised_hd95_mean_mm == pytest.approx(308.0 / 3)
    assert (ggo.num_missed, ggo.num_false_tissue, ggo.num_absent) == (1, 1, 1)
    assert ggo.false_tissue_ml == pytest.approx(4.5)
    overall = summary.overall
    assert (overall.tissue, overall.num_pairs, overall.num_cases, overall.num_patients) == ("all", 5, 4, 3)
    assert overall.dice_mean == pytest.approx(2.3 / 5)
    assert overall.num_missed == 2
    assert (summary.num_cases, summary.num_patients) == (6, 5)
    assert dict(summary.status_counts) == {
        "scored": 3,
        "missed": 1,
        "false tissue": 1,
        "absent": 1,
        "missing prediction": 1,
        "missing reference": 0,
    }
    assert summary.missing_predictions == ("f",)
    assert [row.tissue for row in summary.classes] == ["ggo", "healthy"]


def test_the_order_of_the_cases_does_not_matter():
    # The classes keep the order of their first appearance, so shuffle cases within each class.
    rng = random.Random(4)
    many = [scored(f"c{i}", f"p{i % 7}", rng.random(), hd95=10 * rng.random()) for i in range(40)]
    shuffled = rng.sample(many, len(many))
    assert summarise(many, num_bootstrap=300) == summarise(shuffled, num_bootstrap=300)


def test_the_bootstrap_is_set_by_the_seed():
    rng = random.Random(1)
    many = [scored(f"c{i}", f"p{i}", rng.random()) for i in range(30)]
    first, again, other = (summarise(many, num_bootstrap=300, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first.overall.dice_ci_low != other.overall.dice_ci_low
    assert first.overall.dice_ci_low < first.overall.dice_mean < first.overall.dice_ci_high


def test_a_class_keeps_its_interval_when_another_class_joins():
    ggo = [scored(f"c{i}", f"p{i}", i / 10) for i in range(10)]
    more = [*ggo, *(scored(f"c{i}", f"p{i}", 0.5, tissue="healthy") for i in range(10))]
    assert summarise(ggo, num_bootstrap=200).classes[0] == summarise(more, num_bootstrap=200).classes[0]


def test_patients_are_the_unit_of_the_bootstrap():
    """100 equal cases of one patient carry no more certainty about patients than one case does."""
    values, patients = [0.9] * 100 + [0.1], ["p1"] * 100 + ["p2"]
    low, high = bootstrap_ci(values, patients, num_bootstrap=2000, rng=np.random.default_rng(0))
    # Both patients: (90 + 0.1)/101; one of them twice (a quarter each): 0.9 or 0.1.
    assert (low, high) == pytest.approx((0.1, 0.9))
    as_cases = bootstrap_ci(values, [str(i) for i in range(101)], num_bootstrap=2000, rng=np.random.default_rng(0))
    assert as_cases[0] > 0.8


def test_repeating_every_patients_cases_leaves_the_interval():
    rng = np.random.default_rng(9)
    values, patients = rng.random(20), [f"p{i}" for i in range(20)]
    once = bootstrap_ci(values, patients, num_bootstrap=500, rng=np.random.default_rng(1))
    thrice = bootstrap_ci(np.repeat(values, 3), np.repeat(patients, 3), num_bootstrap=500, rng=np.random.default_rng(1))
    assert thrice == pytest.approx(once, abs=1e-12)


def test_coverage_of_the_interval():
    """Clustered data with a known mean: about 95 % of the intervals hold it (the percentile bootstrap a bit less)."""
    rng = np.random.default_rng(12)
    inside = 0
    for _ in range(200):
        effect = rng.normal(0.6, 0.1, size=30)
        values = (effect[:, None] + rng.normal(0, 0.02, size=(30, 4))).ravel()
        low, high = bootstrap_ci(values, np.repeat(np.arange(30), 4).astype(str), num_bootstrap=400, rng=rng)
        inside += low <= 0.6 <= high
    assert 0.88 <= inside / 200 <= 0.99


@pytest.mark.parametrize("scores", [[scored("a", "p1", 0.5), scored("b", "p1", 0.7)], [missed("a", "p1")]])
def test_one_patient_has_no_interval(scores):
    overall = summarise(scores).overall
    assert math.isnan(overall.dice_ci_low)
    assert math.isnan(overall.dice_ci_high)


def test_nothing_to_average_is_nan_not_zero():
    only_false = summarise([uncounted("a", "p1", false_ml=2.0)]).classes[0]
    assert math.isnan(only_false.dice_mean)
    assert only_false.num_pairs == 0
    assert only_false.false_tissue_ml == 2.0
    all_missed = summarise([missed("a", "p1"), missed("b", "p2")]).overall
    assert all_missed.dice_mean == 0.0
    assert math.isnan(all_missed.hd95_mean_mm)
    assert all_missed.penalised_hd95_mean_mm == 300.0
    empty = summarise([])
    assert empty.classes == ()
    assert math.isnan(empty.overall.dice_mean)


def rendered(summary) -> str:
    console = pytest.importorskip("rich.console").Console(width=200, record=True, file=io.StringIO())
    console.print(rich_table(summary))
    return console.export_text()


def test_every_table_says_what_was_counted_and_which_hd95_it_is():
    summary = summarise(SCORES, num_bootstrap=100)
    for text in (markdown_table(summary), rendered(summary)):
        flat = " ".join(text.split())
        for phrase in (
            HD95_DEFINITION,
            "6 cases of 5 patients",
            "missed 1",
            "false tissue 1",
            "missing prediction 1",
            "Without a prediction, scored as missed: f.",
            "bootstrap of the mean by patient, 100 samples, seed 0",
            "at least 1 mL",
        ):
            assert phrase in flat
        assert "0.467" in flat
        assert "nan" not in flat


def test_markdown_has_one_line_a_class_and_equal_columns():
    lines = markdown_table(summarise(SCORES, num_bootstrap=10)).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 + 1
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert table[-1].startswith("| all |")


def test_rows_csv_and_json_are_safe():
    rows = cases_rows(SCORES)
    assert rows[2]["hd95_mm"] is None
    assert rows[2]["dice"] == 0.0
    assert rows[3]["status"] == "false tissue"
    text = cases_csv(SCORES)
    parsed = list(csv.DictReader(io.StringIO(text)))
    assert text == cases_csv(SCORES)
    assert parsed[0]["dice"] == "0.800000"
    assert parsed[2]["hd95_mm"] == ""
    assert list(parsed[0]) == list(rows[0])
    assert "\r" not in text
    data = summary_dict(summarise(SCORES, num_bootstrap=10))
    back = json.loads(json.dumps(data, allow_nan=False))
    assert back == data
    assert back["status_counts"]["missed"] == 1
    assert back["classes"][1]["dice_ci_low"] is not None
    assert summary_dict(summarise([missed("a", "p1")]))["overall"]["hd95_mean_mm"] is None
    assert back["hd95_definition"] == HD95_DEFINITION


def test_csv_quotes_and_refuses_foreign_columns():
    assert csv_text(["a", "b"], [{"a": "x,y", "b": 1}]) == 'a,b\n"x,y",1\n'
    with pytest.raises(ValueError, match="c"):
        csv_text(["a"], [{"c": 1}])

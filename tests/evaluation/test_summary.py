"""Means, medians and counts, by hand."""

from __future__ import annotations

import math
import random

import pytest
from score_fixture import SCORES, cohort, missed, scored, uncounted, unusable, without_reference

from lungseg.evaluation.summary import ORACLE_SUFFIX, summarise, summarise_methods


def test_means_and_counts_by_hand():
    summary = summarise(SCORES, num_bootstrap=200)
    ggo = next(row for row in summary.classes if row.tissue == "ggo")
    assert (ggo.num_pairs, ggo.num_cases, ggo.num_patients) == (3, 3, 2)
    dice, hd95 = ggo.figures["dice"], ggo.figures["hd95_mm"]
    assert (dice.num, dice.mean, dice.median) == (3, pytest.approx(1.4 / 3), pytest.approx(0.6))
    assert ggo.num_detected == hd95.num == 2
    assert hd95.mean == hd95.median == pytest.approx(4.0)
    assert ggo.figures["penalised_hd95_mm"].mean == pytest.approx(308.0 / 3)
    assert ggo.figures["assd_mm"].mean == pytest.approx((0.5 + 1.5) / 2)
    assert ggo.figures["surface_dice"].mean == pytest.approx(1.4 / 3)
    assert ggo.figures["volume_error_ml"].mean == pytest.approx(-12.0 / 3)
    assert ggo.figures["volume_error_percent"].mean == pytest.approx(-120.0 / 3)
    assert ggo.figures["precision"].num == 2, "nothing predicted: no precision"
    # 2·(0.8 + 0.6)·19/2 over 19 + 19 + 10 (missed) + 4.5 (false): what is predicted in vain counts
    assert ggo.pooled_dice == pytest.approx(1.4 * 19 / 52.5)
    assert (ggo.num_missed, ggo.num_missing_prediction, ggo.num_false_tissue, ggo.num_absent) == (1, 0, 1, 1)
    assert ggo.num_missing_reference == 1
    assert ggo.false_tissue_ml == pytest.approx(4.5)
    overall = summary.overall
    assert (overall.tissue, overall.num_pairs, overall.num_cases, overall.num_patients) == ("all", 5, 4, 3)
    assert overall.figures["dice"].mean == pytest.approx(2.3 / 5)
    assert (overall.num_missed, overall.num_missing_prediction) == (2, 1)
    # pooled over the classes, the missing prediction as an empty one: 2·overlap 43.7 over 52.5 + 19 + 10
    assert overall.pooled_dice == pytest.approx(2.3 * 19 / 81.5)


def test_row_70_every_status_is_counted_and_cases_without_a_side_are_named():
    summary = summarise(SCORES, num_bootstrap=0)
    assert dict(summary.status_counts) == {
        "scored": 3,
        "missed": 1,
        "false tissue": 1,
        "absent": 1,
        "missing prediction": 1,
        "missing reference": 1,
        "unusable": 0,
    }
    assert (summary.missing_predictions, summary.missing_references) == (("f",), ("g",))
    assert (summary.num_cases, summary.num_patients) == (6, 5), "nothing is known of a case without a reference"
    assert [row.tissue for row in summary.classes] == ["ggo", "healthy"]


def test_row_71_an_unusable_side_is_counted_and_changes_no_figure():
    plain = summarise(SCORES, num_bootstrap=50)
    summary = summarise([*SCORES, unusable("x", "p9"), unusable("x", "p9", tissue="healthy")], num_bootstrap=50)
    assert summary.unusable == ("x",)
    assert dict(summary.status_counts)["unusable"] == 2
    assert repr((summary.classes, summary.overall)) == repr((plain.classes, plain.overall))  # nan is not nan
    assert (summary.num_cases, summary.num_patients) == (plain.num_cases, plain.num_patients)


def test_the_order_of_the_cases_does_not_matter():
    # The classes keep the order of their first appearance, so shuffle cases within one class.
    rng = random.Random(4)
    many = [scored(f"c{i}", f"p{i % 7}", rng.random(), hd95=10 * rng.random()) for i in range(40)]
    assert summarise(many, num_bootstrap=300) == summarise(rng.sample(many, len(many)), num_bootstrap=300)


def test_the_bootstrap_is_set_by_the_seed():
    rng = random.Random(1)
    many = [scored(f"c{i}", f"p{i}", rng.random()) for i in range(30)]
    first, again, other = (summarise(many, num_bootstrap=300, seed=s).overall.figures["dice"] for s in (5, 5, 6))
    assert first == again
    assert first.ci_low != other.ci_low
    assert first.ci_low < first.mean < first.ci_high


def test_a_class_keeps_its_interval_when_another_class_joins():
    ggo = [scored(f"c{i}", f"p{i}", i / 10) for i in range(10)]
    more = [*ggo, *(scored(f"c{i}", f"p{i}", 0.5, tissue="healthy") for i in range(10))]
    assert summarise(ggo, num_bootstrap=200).classes[0] == summarise(more, num_bootstrap=200).classes[0]


def test_every_mean_has_an_interval_around_it():
    row = summarise(cohort(1), num_bootstrap=500).classes[1]
    for name in ("dice", "hd95_mm", "penalised_hd95_mm", "assd_mm", "surface_dice"):
        figure = row.figures[name]
        assert figure.ci_low < figure.mean < figure.ci_high, name
    assert row.pooled_dice_ci_low < row.pooled_dice < row.pooled_dice_ci_high


def test_slices_are_pairs_but_patients_stay_the_unit():
    rng = random.Random(8)
    slices = [scored(f"c{i}", f"p{i}", rng.random(), slice_index=z) for i in range(6) for z in range(20)]
    summary = summarise(slices, num_bootstrap=500)
    assert (summary.num_slices, summary.overall.num_pairs, summary.overall.num_cases) == (120, 120, 6)
    few = summarise([s for s in slices if s.slice_index == 0], num_bootstrap=500).overall.figures["dice"]
    assert summary.overall.figures["dice"].ci_high - summary.overall.figures["dice"].ci_low < few.ci_high - few.ci_low
    one = summarise([s for s in slices if s.patient_id == "p0"], num_bootstrap=500).overall.figures["dice"]
    assert math.isnan(one.ci_low), "20 slices of one patient say nothing about patients"


def test_nothing_to_average_is_nan_not_zero():
    only_false = summarise([uncounted("a", "p1", false_ml=2.0)]).classes[0]
    assert math.isnan(only_false.figures["dice"].mean)
    assert (only_false.num_pairs, only_false.false_tissue_ml, only_false.pooled_dice) == (0, 2.0, 0.0)
    all_missed = summarise([missed("a", "p1"), missed("b", "p2")]).overall
    assert all_missed.figures["dice"].mean == 0.0
    assert math.isnan(all_missed.figures["hd95_mm"].mean)
    assert all_missed.figures["penalised_hd95_mm"].mean == 300.0
    unscored = summarise([without_reference("a", "p1")])
    assert (unscored.num_cases, unscored.overall.num_missing_reference) == (0, 1)
    assert math.isnan(unscored.overall.pooled_dice)
    empty = summarise([])
    assert empty.classes == ()
    assert math.isnan(empty.overall.figures["dice"].mean)


def test_the_oracle_naming_follows_its_method_and_says_so():
    summaries = summarise_methods(
        {"a": cohort(1), "b": cohort(2)}, {"b": cohort(3), "stranger": cohort(4)}, num_bootstrap=50
    )
    assert [(s.method, s.is_oracle) for s in summaries] == [("a", False), ("b", False), ("b", True)]
    assert summaries[2].title == f"b{ORACLE_SUFFIX}"
    assert "oracle" not in summaries[1].title

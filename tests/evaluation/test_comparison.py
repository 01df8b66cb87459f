"""Paired comparison: which pairs, one difference a patient, exact p, Holm."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from score_fixture import cohort, missed, scored, uncounted

from lungseg.evaluation.comparison import compare_methods, holm, signed_rank, smallest_p


def row(comparison, figure: str = "dice", tissue: str = "all"):
    (found,) = [r for r in comparison.rows if (r.figure, r.tissue) == (figure, tissue)]
    return found


def test_signed_rank_by_hand():
    # ranks 1, 2, 3, 4 of |d|; W+ = 1 + 3 + 4 = 8, W- = 2: effect 6/10. Of 16 sign flips 6 have W+ <= 2 or >= 8.
    result = signed_rank([0.1, -0.2, 0.3, 0.4])
    assert (result.num_nonzero, result.is_exact) == (4, True)
    assert result.effect == pytest.approx(0.6)
    assert result.p_value == pytest.approx(6 / 16)
    assert signed_rank([-0.1, 0.2, -0.3, -0.4]).effect == pytest.approx(-0.6)
    assert signed_rank([0.1] * 5).p_value == pytest.approx(0.0625) == smallest_p(5)
    assert smallest_p(6) < 0.05 < smallest_p(5)


def test_zeros_are_dropped_and_rounding_errors_are_ties():
    assert signed_rank([0.0, 0.1, -0.2, 0.3, 0.4]) == signed_rank([0.1, -0.2, 0.3, 0.4])
    assert 0.3 - 0.1 != 0.9 - 0.7, "what rounding is for"
    assert signed_rank([0.3 - 0.1, -(0.9 - 0.7)]).effect == 0.0
    assert signed_rank([0.3 - 0.1, 0.9 - 0.7, 0.1 + 0.2 - 0.3]).num_nonzero == 2
    assert signed_rank([0.0, 0.0]).p_value == 1.0
    assert signed_rank([0.0, 0.0]).effect == 0.0
    assert math.isnan(signed_rank([]).p_value)


@pytest.mark.parametrize("size", [5, 12, 50])
def test_exact_p_is_scipys_without_ties(size):
    values = np.random.default_rng(size).normal(0.3, 1, size=size)
    wanted = stats.wilcoxon(values, method="exact").pvalue
    assert signed_rank(values.tolist()).p_value == pytest.approx(wanted, rel=1e-9)


def test_exact_p_holds_with_ties():
    """Against all sign flips one by one: SciPy's exact p ignores ties."""
    values = np.array([0.1, 0.1, 0.1, -0.1, 0.2, 0.2, -0.3, 0.4, 0.4, 0.5])

    def statistic(sample, axis):
        ranks = stats.rankdata(np.abs(sample), axis=axis)
        return np.where(sample > 0, ranks, 0).sum(axis=axis)

    wanted = stats.permutation_test(
        (values,), statistic, permutation_type="samples", n_resamples=np.inf, vectorized=True
    ).pvalue
    assert signed_rank(values.tolist()).p_value == pytest.approx(wanted, rel=1e-9)


def test_many_patients_use_the_normal_approximation():
    values = np.random.default_rng(3).normal(0.2, 1, size=80)
    result = signed_rank(values.tolist())
    assert not result.is_exact
    assert result.p_value == pytest.approx(stats.wilcoxon(values, correction=True, method="asymptotic").pvalue)
    assert result.p_value == pytest.approx(stats.wilcoxon(values, method="exact").pvalue, rel=0.05)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    with_hole = holm([float("nan"), 0.02])
    assert math.isnan(with_hole[0])
    assert with_hole[1] == 0.02
    assert holm([]) == []


def test_one_difference_a_patient():
    """Patient p1 has three cases and p2 one: their means weigh the same."""
    a = [scored(c, "p1", 0.9) for c in "abc"] + [scored("d", "p2", 0.5)]
    b = [scored(c, "p1", 0.6) for c in "abc"] + [scored("d", "p2", 0.6)]
    found = row(compare_methods({"a": a, "b": b}, num_bootstrap=100))
    assert (found.num_pairs, found.num_patients) == (4, 2)
    assert found.mean_difference == found.median_difference == pytest.approx((0.3 - 0.1) / 2)
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.1, 0.3))
    assert found.effect == pytest.approx((2 - 1) / 3)
    penalised = row(compare_methods({"a": a, "b": b}, num_bootstrap=100), "penalised_hd95_mm")
    assert (penalised.median_difference, penalised.p_value) == (0.0, 1.0)


def test_only_pairs_of_both_methods_count_and_the_others_are_named():
    a = [scored("a", "p1", 0.9), scored("b", "p2", 0.8), scored("only-a", "p3", 0.1), uncounted("e", "p4")]
    b = [scored("a", "p1", 0.7), missed("b", "p2", status="missing prediction"), scored("only-b", "p5", 1.0)]
    comparison = compare_methods({"first": a, "second": b}, num_bootstrap=50)
    found = row(comparison)
    assert found.num_pairs == 2
    assert found.mean_difference == pytest.approx((0.2 + 0.8) / 2), "a missing prediction is a missed class"
    assert found.num_missing_predictions == 1
    assert [(u.lacking, u.having, u.num_pairs, u.case_ids) for u in comparison.unpaired] == [
        ("first", "second", 1, ("only-b",)),
        ("second", "first", 1, ("only-a",)),
    ]
    assert row(comparison, "penalised_hd95_mm").mean_difference == pytest.approx((0.0 + (2.0 - 300.0)) / 2)
    (pair,) = [d for d in comparison.differences if d.figure == "dice" and d.case_id == "a"]
    assert (pair.value_a, pair.value_b, pair.difference) == pytest.approx((0.9, 0.7, 0.2))


def test_slices_are_paired_by_their_index():
    a = [scored("a", "p", 0.9, slice_index=3), scored("a", "p", 0.5, slice_index=4)]
    b = [scored("a", "p", 0.5, slice_index=4), scored("a", "p", 0.7, slice_index=3)]
    comparison = compare_methods({"a": a, "b": b}, num_bootstrap=50)
    assert [d.difference for d in comparison.differences if d.figure == "dice"] == pytest.approx([0.2, 0.0])


def test_three_methods_a_known_difference_and_nothing_between_equals():
    base = cohort(1)
    better = [replace(s, dice=min(1.0, s.dice + 0.05 + 0.001 * i)) for i, s in enumerate(base)]
    comparison = compare_methods({"better": better, "base": base, "same": list(base)}, num_bootstrap=300)
    assert [(r.method_a, r.method_b) for r in comparison.rows if r.figure == "dice" and r.tissue == "all"] == [
        ("better", "base"),
        ("better", "same"),
        ("base", "same"),
    ]
    found = row_of(comparison, "better", "base")
    assert found.p_value == pytest.approx(smallest_p(8))
    assert found.effect == 1.0
    # Holm over the nine rows of this figure: six of them have that p, three have 1
    assert found.p_holm == pytest.approx(9 * smallest_p(8))
    assert found.ci_low > 0
    same = row_of(comparison, "base", "same")
    assert (same.p_value, same.p_holm, same.effect, same.median_difference) == (1.0, 1.0, 0.0, 0.0)


def row_of(comparison, a: str, b: str):
    (found,) = [r for r in comparison.rows if (r.figure, r.tissue, r.method_a, r.method_b) == ("dice", "all", a, b)]
    return found


def test_false_alarms_come_as_often_as_the_level_says():
    """Two methods without a difference, cases of a patient alike: p < 0.05 in about 5 % of the cohorts, not more."""
    rng, alarms = np.random.default_rng(6), 0
    for _ in range(200):
        shift = np.repeat(rng.normal(0, 0.1, size=15), 4)
        a = [scored(f"c{i}", f"p{i // 4}", 0.6 + shift[i]) for i in range(60)]
        b = [scored(f"c{i}", f"p{i // 4}", 0.6) for i in range(60)]
        alarms += row(compare_methods({"a": a, "b": b}, num_bootstrap=0)).p_value < 0.05
    assert alarms <= 20, "by case instead of by patient it would be about 60"


def test_one_method_is_not_compared():
    assert compare_methods({"a": cohort(1)}).rows == ()
    assert compare_methods({}).rows == ()

"""Intervals by patient: what is resampled, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lungseg.evaluation import bootstrap as module
from lungseg.evaluation.bootstrap import PatientBootstrap, bootstrap_ci, expanded_level, statistic_ci


def test_patients_are_the_unit():
    """100 equal cases of one patient carry no more certainty about patients than one case does."""
    values, patients = [0.9] * 100 + [0.1], ["p1"] * 100 + ["p2"]
    # Both patients: (90 + 0.1)/101; one of them twice (a quarter each): 0.9 or 0.1.
    assert bootstrap_ci(values, patients, num_bootstrap=2000, seed=0) == pytest.approx((0.1, 0.9))
    as_cases = bootstrap_ci(values, [str(i) for i in range(101)], num_bootstrap=2000, seed=0)
    assert as_cases[0] > 0.8


def test_repeating_every_patients_cases_leaves_the_interval():
    values, patients = np.random.default_rng(9).random(20).tolist(), [f"p{i}" for i in range(20)]
    once = bootstrap_ci(values, patients, num_bootstrap=500, seed=1)
    thrice = bootstrap_ci(values * 3, patients * 3, num_bootstrap=500, seed=1)
    assert thrice == pytest.approx(once, abs=1e-12)


def test_the_level_widens_for_few_patients_and_tends_to_the_nominal_one():
    # Five patients: t(0.975, 4) = 2.776445, times sqrt(5/4) = 3.104160; the normal tail beyond it is 0.0954 %.
    assert expanded_level(5) == pytest.approx(0.0954, abs=1e-4)
    levels = [expanded_level(n) for n in (2, 5, 10, 30, 1000)]
    assert levels == sorted(levels)
    assert expanded_level(100_000) == pytest.approx(2.5, abs=1e-3)


def test_a_pooled_ratio_by_hand():
    """Two patients, Σ2|A∩B| / Σ(|A|+|B|): 1/10 and 9/10 alone, 10/20 together."""
    resampling = PatientBootstrap.of(["b", "a", "a"], num_bootstrap=500, seed=3)
    assert resampling.patients == ("a", "b")
    low, high = resampling.ratio_intervals(np.array([[1.0], [9.0]]), np.array([[10.0], [10.0]]))[0]
    assert (low, high) == pytest.approx((0.1, 0.9))


def test_figures_share_one_resampling_and_patients_without_a_figure_do_not_dilute_it():
    values = np.random.default_rng(2).random(12)
    ones = np.ones(12)
    resampling = PatientBootstrap.of([f"p{i:02d}" for i in range(12)], num_bootstrap=800, seed=0)
    both = resampling.ratio_intervals(np.stack([values, 1 - values], axis=1), np.stack([ones, ones], axis=1))
    assert both[1] == pytest.approx(1 - both[0][::-1]), "the same cohorts, mirrored"
    some = np.where(np.arange(12) < 2, 1.0, 0.0)
    low, high = resampling.ratio_intervals((values * some)[:, None], some[:, None])[0]
    assert [low, high] == pytest.approx(sorted(values[:2])), "two patients: nothing beyond them, and never 0"


def test_nothing_to_resample_gives_no_interval():
    assert all(map(math.isnan, bootstrap_ci([0.5, 0.7], ["p", "p"], num_bootstrap=100, seed=0)))
    assert all(map(math.isnan, bootstrap_ci([0.5, 0.7], ["p", "q"], num_bootstrap=0, seed=0)))
    assert all(map(math.isnan, bootstrap_ci([], [], num_bootstrap=100, seed=0)))
    assert all(map(math.isnan, statistic_ci([0.5], np.median, num_bootstrap=100, seed=0)))


def test_bounded_memory_gives_the_same_interval(monkeypatch):
    values, patients = np.random.default_rng(5).random(8).tolist(), list("abcdefgh")
    whole = (
        bootstrap_ci(values, patients, num_bootstrap=400, seed=2),
        statistic_ci(values, np.median, num_bootstrap=400, seed=2),
    )
    monkeypatch.setattr(module, "MAX_DRAWS", 64)
    parts = (
        bootstrap_ci(values, patients, num_bootstrap=400, seed=2),
        statistic_ci(values, np.median, num_bootstrap=400, seed=2),
    )
    assert whole == parts


def coverage(draw, truth: float, num_patients: int, *, cohorts: int = 400) -> float:
    """Share of cohorts with correlated cases whose interval of the mean holds the truth."""
    rng = np.random.default_rng([num_patients, 7])
    inside = 0
    for seed in range(cohorts):
        sizes = rng.integers(1, 7, size=num_patients)
        owners = np.repeat(np.arange(num_patients), sizes)
        values = draw(rng, num_patients)[owners] + rng.normal(0, 0.03, size=owners.size)
        low, high = bootstrap_ci(values.tolist(), [f"{o:03d}" for o in owners], num_bootstrap=1000, seed=seed)
        inside += low <= truth <= high
    return inside / cohorts


def normal(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(0.6, 0.1, size=size)


def left_skewed(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.beta(6, 2, size=size)


@pytest.mark.parametrize(
    ("draw", "truth", "num_patients", "expected"),
    [
        # 30 patients: the nominal 95 %; few: the shares that the docstring of expanded_level states
        (normal, 0.6, 30, 0.95),
        (left_skewed, 0.75, 30, 0.94),
        (normal, 0.6, 10, 0.95),
        (normal, 0.6, 5, 0.90),
    ],
)
def test_coverage_is_what_the_tables_say(draw, truth, num_patients, expected):
    """Within the 99.9 % binomial band of 400 cohorts around the stated share."""
    band = 3.29 * math.sqrt(expected * (1 - expected) / 400)
    assert coverage(draw, truth, num_patients) == pytest.approx(expected, abs=band)


def test_cases_taken_for_patients_would_cover_far_too_little():
    """What the unit is for: with six correlated cases a patient, an interval by case misses the truth often."""
    rng, by_patient, by_case = np.random.default_rng(11), 0, 0
    for seed in range(100):
        values = np.repeat(rng.normal(0.6, 0.1, size=15), 6).tolist()
        low, high = bootstrap_ci(values, [str(i // 6) for i in range(90)], num_bootstrap=300, seed=seed)
        by_patient += low <= 0.6 <= high
        low, high = bootstrap_ci(values, [str(i) for i in range(90)], num_bootstrap=300, seed=seed)
        by_case += low <= 0.6 <= high
    assert by_patient >= 88
    assert by_case <= 75

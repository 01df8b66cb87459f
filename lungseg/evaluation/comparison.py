"""Paired comparison of methods: the same class-case pairs in both, one difference a patient.

Pairs of one patient are not independent, so they are averaged to one difference before any test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from lungseg.evaluation.bootstrap import statistic_ci
from lungseg.evaluation.scores import MISSING_PREDICTION, ClassScore
from lungseg.evaluation.summary import ALL_CLASSES

COMPARED = ("dice", "surface_dice", "penalised_hd95_mm")
"""Figures compared: those that exist for a missed class too, so that missing a class cannot help a method."""
ROUNDING = 1e-9
"""Differences are rounded to it before ranking: 0.8 - 0.6 and 0.9 - 0.7 are one difference, not two ranks."""
MAX_EXACT = 50
"""Non-zero differences up to which p is exact, as in SciPy and R; above, the normal approximation."""
COMPARISON_RULES = (
    "Paired comparison: only class-case pairs scored in both methods (a missing prediction counts as Dice 0); their "
    "differences, first minus second method, are averaged to one per patient. p: two-sided Wilcoxon signed-rank test "
    "over patients, zero differences dropped, exact up to 50 patients. Holm: p corrected over all rows of the same "
    "figure. Effect: matched-pairs rank-biserial correlation, -1 to 1, positive where the first method is higher."
)
"""Printed with every comparison table."""

_Key = tuple[str, str, int]
"""Class, case and slice (-1: whole volume) of a score."""


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon signed-rank test and its effect size."""

    num_nonzero: int
    """Differences that are not zero: only they are ranked."""
    p_value: float
    """Two-sided; 1 if all differences are zero, nan if there are none."""
    effect: float
    """Matched-pairs rank-biserial correlation, -1 to 1; 0 if all differences are zero, nan if there are none."""
    is_exact: bool
    """Whether p comes from all sign flips, not from the normal approximation."""


@dataclass(frozen=True)
class PairDifference:
    """One class-case pair in two methods."""

    figure: str
    """Which figure, of ``COMPARED``."""
    method_a: str
    """First method."""
    method_b: str
    """Second method."""
    tissue: str
    """Class."""
    patient_id: str
    """De-identified id of the patient."""
    case_id: str
    """De-identified id of the case."""
    slice_index: int | None
    """Axial slice in slice mode."""
    value_a: float
    """Figure of the first method."""
    value_b: float
    """Figure of the second method."""
    difference: float
    """First minus second."""


@dataclass(frozen=True)
class Comparison:
    """Two methods on one figure in one class, or over all classes."""

    figure: str
    """Which figure, of ``COMPARED``."""
    method_a: str
    """First method."""
    method_b: str
    """Second method."""
    tissue: str
    """Class, or `all`."""
    num_pairs: int
    """Class-case pairs scored in both methods."""
    num_patients: int
    """Patients among them: the units of the test."""
    mean_difference: float
    """Mean over the patients, first minus second."""
    median_difference: float
    """Median over the patients, first minus second."""
    ci_low: float
    """Lower end of the 95 % bootstrap interval of the median, by patient; nan with fewer than two patients."""
    ci_high: float
    """Upper end."""
    p_value: float
    """Two-sided Wilcoxon signed-rank test over the patients."""
    p_holm: float
    """The same corrected by Holm over all comparisons of this figure."""
    effect: float
    """Matched-pairs rank-biserial correlation, positive where the first method is higher."""
    is_exact: bool
    """Whether p is exact."""
    num_nonzero: int
    """Patients with a difference: only they are ranked."""
    num_missing_predictions: int
    """Pairs among them in which one of the methods has no prediction."""


@dataclass(frozen=True)
class Unpaired:
    """Class-case pairs that were scored in one method only, and are left out of the comparison."""

    lacking: str
    """Method without them."""
    having: str
    """Method with them."""
    num_pairs: int
    """How many."""
    case_ids: tuple[str, ...]
    """Their cases, sorted."""


@dataclass(frozen=True)
class MethodComparison:
    """All paired comparisons of an evaluation."""

    rows: tuple[Comparison, ...]
    """Per figure, pair of methods and class; `all` last of each pair of methods."""
    differences: tuple[PairDifference, ...]
    """What the rows were made from."""
    unpaired: tuple[Unpaired, ...]
    """What one method was scored on and another was not: left out."""
    num_bootstrap: int
    """Bootstrap samples of the intervals."""
    seed: int
    """Seed of the bootstrap."""


def compare_methods(
    scores: Mapping[str, Sequence[ClassScore]], *, num_bootstrap: int = 2000, seed: int = 0
) -> MethodComparison:
    """Compare every two methods, per class and over all classes, patient by patient.

    Parameters
    ----------
    scores : mapping of method name to its scores
        All against one reference, with the same settings. Oracle namings do not belong here: they use the reference.
    num_bootstrap, seed : int
        Of the intervals of the median difference.

    Returns
    -------
    MethodComparison
        Without rows for fewer than two methods.

    Notes
    -----
    Figures in which less is better (HD95) have negative differences where the first method is better.

    Source
    ------
    Wilcoxon, Biometrics Bulletin 1 (1945) 80-83; rank-biserial correlation: Kerby, Comprehensive Psychology 3 (2014);
    Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    tissues = list(dict.fromkeys(score.tissue for rows in scores.values() for score in rows))
    differences: list[PairDifference] = []
    rows: list[Comparison] = []
    averaged = {method: {_key(s): s for s in some if s.is_averaged} for method, some in scores.items()}
    for figure in COMPARED:
        family: list[Comparison] = []
        for a, b in combinations(scores, 2):
            pairs = list(_differences(averaged[a], averaged[b], figure, (a, b), tissues))
            differences += pairs
            missing = {key for some in (averaged[a], averaged[b]) for key, s in some.items()
                       if s.status == MISSING_PREDICTION}  # fmt: skip
            for tissue in (*tissues, ALL_CLASSES):
                some = [pair for pair in pairs if tissue in (pair.tissue, ALL_CLASSES)]
                num_missing = sum(_pair_key(pair) in missing for pair in some)
                family.append(_compare(some, (figure, a, b, tissue), num_missing, num_bootstrap, seed))
        corrected = holm([row.p_value for row in family])
        rows += [replace(row, p_holm=p) for row, p in zip(family, corrected, strict=True)]
    return MethodComparison(tuple(rows), tuple(differences), tuple(_unpaired(averaged)), num_bootstrap, seed)


def signed_rank(differences: Sequence[float]) -> SignedRank:
    """Two-sided Wilcoxon signed-rank test of differences about zero, with its effect size.

    Parameters
    ----------
    differences : sequence of float
        One per patient, finite. Rounded to ``ROUNDING``; zeros are dropped (Wilcoxon's own rule).

    Returns
    -------
    SignedRank
        p is exact up to ``MAX_EXACT`` non-zero differences, ties included (all sign flips are counted); above that
        the normal approximation with tie and continuity correction.

    Source
    ------
    Wilcoxon 1945; effect = (W+ - W-) / (W+ + W-), Kerby 2014.
    """
    from scipy import stats

    values = np.round(np.asarray(differences, dtype=np.float64) / ROUNDING) * ROUNDING
    if values.size == 0:
        return SignedRank(0, float("nan"), float("nan"), True)
    values = values[values != 0]
    if values.size == 0:
        return SignedRank(0, 1.0, 0.0, True)
    ranks = stats.rankdata(np.abs(values))
    positive = float(ranks[values > 0].sum())
    total = float(ranks.sum())
    effect = (2.0 * positive - total) / total
    if values.size <= MAX_EXACT:
        return SignedRank(values.size, _exact_p(ranks, positive), effect, True)
    test = stats.wilcoxon(values, zero_method="wilcox", correction=True, method="asymptotic")
    return SignedRank(values.size, float(test.pvalue), effect, False)


def _exact_p(ranks: np.ndarray, positive: float) -> float:
    """Two-sided p of a sum of positive ranks over all sign flips; SciPy's own exact p does not hold with ties."""
    doubled = np.rint(2 * ranks).astype(int)  # tied ranks are halves
    ways = np.zeros(int(doubled.sum()) + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] += ways[:-rank].copy()
    ways /= ways.sum()
    observed = round(2 * positive)
    return float(min(1.0, 2 * min(ways[: observed + 1].sum(), ways[observed:].sum())))


def smallest_p(num_patients: int) -> float:
    """Smallest two-sided p that the signed-rank test can give with so many non-zero differences: 2/2^n, at most 1."""
    return min(1.0, 2.0 ** (1 - num_patients))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; keeps the order, and nan where there is no p (it counts in no family).

    Source
    ------
    Holm 1979. Valid under any dependence of the tests.
    """
    corrected = [float("nan")] * len(p_values)
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    worst = 0.0
    for step, (p, index) in enumerate(order):
        worst = max(worst, min(1.0, p * (len(order) - step)))
        corrected[index] = worst
    return corrected


def _compare(
    pairs: Sequence[PairDifference], names: tuple[str, str, str, str], num_missing: int, num_bootstrap: int, seed: int
) -> Comparison:
    """One row; ``names`` is (figure, first method, second method, class). Holm's p is filled in later."""
    by_patient: dict[str, list[float]] = {}
    for pair in pairs:
        by_patient.setdefault(pair.patient_id, []).append(pair.difference)
    means = [math.fsum(by_patient[patient]) / len(by_patient[patient]) for patient in sorted(by_patient)]
    test = signed_rank(means)
    low, high = statistic_ci(means, np.median, num_bootstrap=num_bootstrap, seed=seed)
    return Comparison(
        *names,
        num_pairs=len(pairs),
        num_patients=len(means),
        mean_difference=math.fsum(means) / len(means) if means else float("nan"),
        median_difference=float(np.median(means)) if means else float("nan"),
        ci_low=low,
        ci_high=high,
        p_value=test.p_value,
        p_holm=float("nan"),
        effect=test.effect,
        is_exact=test.is_exact,
        num_nonzero=test.num_nonzero,
        num_missing_predictions=num_missing,
    )


def _differences(
    a: Mapping[_Key, ClassScore],
    b: Mapping[_Key, ClassScore],
    figure: str,
    methods: tuple[str, str],
    tissues: Sequence[str],
) -> Iterator[PairDifference]:
    """Differences of the pairs that both methods have, sorted by class, patient, case and slice."""
    both = [key for key in a if key in b]
    for key in sorted(both, key=lambda k: (tissues.index(k[0]), a[k].patient_id, k[1], k[2])):
        first, second = float(getattr(a[key], figure)), float(getattr(b[key], figure))
        if math.isfinite(first) and math.isfinite(second):
            score = a[key]
            yield PairDifference(
                figure, *methods, score.tissue, score.patient_id, score.case_id, score.slice_index,
                first, second, first - second,
            )  # fmt: skip


def _unpaired(averaged: Mapping[str, Mapping[_Key, ClassScore]]) -> Iterator[Unpaired]:
    """Pairs that one method has a score of and another has not."""
    for a, b in combinations(averaged, 2):
        for lacking, having in ((a, b), (b, a)):
            keys = averaged[having].keys() - averaged[lacking].keys()
            if keys:
                yield Unpaired(lacking, having, len(keys), tuple(sorted({case_id for _, case_id, _ in keys})))


def _key(score: ClassScore) -> _Key:
    """What makes two scores the same pair."""
    return score.tissue, score.case_id, -1 if score.slice_index is None else score.slice_index


def _pair_key(pair: PairDifference) -> _Key:
    """The same of a difference."""
    return pair.tissue, pair.case_id, -1 if pair.slice_index is None else pair.slice_index

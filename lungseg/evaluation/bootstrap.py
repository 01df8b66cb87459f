"""Confidence intervals by patient: one resampling of the patients serves every figure of an evaluation.

The unit is the patient, never the case, the class or the slice: all rows of a drawn patient enter together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
"""Level of every interval."""
MIN_BOOTSTRAP_PATIENTS = 2
"""With fewer patients there is nothing to resample and no interval is given."""
FEW_PATIENTS = 15
"""Below it the tables say ``few_patients_note``."""
MAX_DRAWS = 4_000_000
"""Patients drawn at a time: bounds the memory of a resampling (8 bytes each)."""
INTERVAL_DEFINITION = "bootstrap by patient (percentiles widened for few patients)"
"""Printed with every table that holds an interval."""


def few_patients_note(where: str) -> str:
    """Sentence that warns of the intervals of the classes named; measured, see ``expanded_level``."""
    return (
        f"Fewer than {FEW_PATIENTS} patients in {where}: intervals there are too short. In simulated "
        "cohorts they held the mean in 82 to 95 % (10 patients), 76 to 90 % (5) and 61 to 75 % (3), least where whole "
        "patients are missed."
    )


def expanded_level(num_patients: int) -> float:
    """Lower percentile of the bootstrap distribution that bounds a 95 % interval, 0 to 100.

    Parameters
    ----------
    num_patients : int
        At least 2.

    Returns
    -------
    float
        100·Φ(−t·√(n/(n−1))), t the upper 2.5 % point of Student's t with n − 1 degrees of freedom. 2.5 for very many
        patients; 0.1 for five of them, which is nearly the whole range that resampling can reach.

    Notes
    -----
    The plain percentile interval is too short for few patients. Share of intervals that held the true mean, nominal
    95 %, plain / this (``tests/benchmarks/interval_coverage.py``: 1,500 simulated cohorts each, 1 to 6 correlated cases
    a patient, 2,000 resamples):

    =============================  ===========  ===========  ===========  ===========
    score of a patient             3 patients   5            10           30
    =============================  ===========  ===========  ===========  ===========
    normal                         0.75 / 0.75  0.82 / 0.90  0.90 / 0.95  0.93 / 0.95
    skewed to the left, like Dice  0.74 / 0.74  0.80 / 0.90  0.88 / 0.93  0.93 / 0.94
    15 % of patients missed (0)    0.61 / 0.61  0.66 / 0.76  0.78 / 0.82  0.90 / 0.92
    lognormal, like HD95           0.67 / 0.67  0.76 / 0.86  0.85 / 0.89  0.90 / 0.91
    =============================  ===========  ===========  ===========  ===========

    With two patients both intervals are the two values themselves: half of them hold the median of the population.

    BCa was no better than the plain interval (normal: 0.71, 0.80, 0.88, 0.93). The t-bootstrap covered best (0.85,
    0.93, 0.95, 0.95), but it leaves the range 0 to 1 and is unbounded with three patients. Other figures with this
    interval: a class that 5 of 30 patients have 0.95, a median difference 0.94 to 0.97 from 5 patients on, a pooled
    Dice with lesions of very unequal size 0.86 (10 patients) and 0.88 (30): a few large lesions decide it.

    Source
    ------
    Hesterberg, The American Statistician 69 (2015) 371-386 (expanded percentile interval).
    """
    from scipy import stats

    n = num_patients
    t = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    return 100.0 * float(stats.norm.cdf(-t * math.sqrt(n / (n - 1))))


@dataclass(frozen=True)
class PatientBootstrap:
    """One resampling of a cohort's patients, with replacement; equal for equal fields.

    All classes, figures and methods of an evaluation share it, so that their intervals describe the same cohorts.
    """

    patients: tuple[str, ...]
    """The cohort, sorted and without repeats (``of`` sees to it)."""
    num_bootstrap: int
    """Resamples; 0 gives no interval."""
    seed: int
    """The draws depend on it, the number of patients and the number of resamples only."""

    @classmethod
    def of(cls, patients: Sequence[str], *, num_bootstrap: int, seed: int) -> PatientBootstrap:
        """Resampling of the distinct patients among these."""
        return cls(tuple(sorted(set(patients))), num_bootstrap, seed)

    def totals(self, values: Sequence[float], patients: Sequence[str]) -> np.ndarray:
        """Sum of the values of each patient, float64, in the order of ``self.patients``; 0 without values."""
        place = {patient: index for index, patient in enumerate(self.patients)}
        index = np.array([place[patient] for patient in patients], dtype=np.intp)
        return np.bincount(index, weights=np.asarray(values, dtype=np.float64), minlength=len(self.patients))

    def ratio_intervals(self, numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
        """95 % intervals of Σ numerator / Σ denominator over the patients, for many figures at once.

        Parameters
        ----------
        numerators, denominators : float arrays, shape (patients, figures)
            Totals per patient: a mean has its sum of values over its number of values, a pooled Dice 2·|A∩B| over
            |A| + |B|. A denominator of 0 says that the patient has nothing to say on that figure.

        Returns
        -------
        float64 array, shape (figures, 2)
            Low and high end; ``nan`` where fewer than two patients contribute or nothing is resampled. Resamples in
            which no contributing patient was drawn are left out.

        Source
        ------
        METHOD 0.4; level of the percentiles: ``expanded_level``.
        """
        num_figures = numerators.shape[1]
        intervals = np.full((num_figures, 2), np.nan)
        if self.num_bootstrap < 1 or not num_figures:
            return intervals
        contributing = np.count_nonzero(denominators, axis=0)
        ratios = []
        for weights in self._weights():
            below = weights @ denominators
            with np.errstate(invalid="ignore"):
                ratios.append(np.where(below > 0, (weights @ numerators) / below, np.nan))
        resampled = np.concatenate(ratios)
        for figure in np.flatnonzero(contributing >= MIN_BOOTSTRAP_PATIENTS):
            column = resampled[:, figure]
            level = expanded_level(int(contributing[figure]))
            intervals[figure] = np.percentile(column[~np.isnan(column)], (level, 100.0 - level))
        return intervals

    def _weights(self) -> Iterator[np.ndarray]:
        """How often each patient is drawn, float64 (resamples, patients), in chunks of bounded size."""
        rng, size = np.random.default_rng(self.seed), len(self.patients)
        left = self.num_bootstrap
        while left > 0:
            rows = min(left, max(1, MAX_DRAWS // max(size, 1)))
            drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
            yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)
            left -= rows


def bootstrap_ci(
    values: Sequence[float], patients: Sequence[str], *, num_bootstrap: int, seed: int
) -> tuple[float, float]:
    """95 % interval of the mean of values, by patient.

    Parameters
    ----------
    values : sequence of float
        One per pair.
    patients : sequence of str
        Patient of each value; all values of a drawn patient enter together.
    num_bootstrap, seed : int
        As in ``PatientBootstrap``.

    Returns
    -------
    (low, high)
        ``nan`` both with fewer than two patients or no resamples.
    """
    bootstrap = PatientBootstrap.of(patients, num_bootstrap=num_bootstrap, seed=seed)
    sums, counts = bootstrap.totals(values, patients), bootstrap.totals([1.0] * len(values), patients)
    low, high = bootstrap.ratio_intervals(sums[:, None], counts[:, None])[0]
    return float(low), float(high)


def statistic_ci(
    values: Sequence[float],
    statistic: Callable[..., np.ndarray],
    *,
    num_bootstrap: int,
    seed: int,
) -> tuple[float, float]:
    """95 % interval of any statistic of one value per patient, for example ``numpy.median``.

    Parameters
    ----------
    values : sequence of float
        One per patient.
    statistic : callable
        Takes an array and ``axis``, as NumPy's reductions do.
    num_bootstrap, seed : int

    Returns
    -------
    (low, high)
        ``nan`` both with fewer than two values or no resamples.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size < MIN_BOOTSTRAP_PATIENTS or num_bootstrap < 1:
        return float("nan"), float("nan")
    rng, rows = np.random.default_rng(seed), max(1, MAX_DRAWS // array.size)
    parts = []
    for start in range(0, num_bootstrap, rows):
        drawn = rng.integers(array.size, size=(min(rows, num_bootstrap - start), array.size))
        parts.append(np.asarray(statistic(array[drawn], axis=1)))
    level = expanded_level(array.size)
    low, high = np.percentile(np.concatenate(parts), (level, 100.0 - level))
    return float(low), float(high)

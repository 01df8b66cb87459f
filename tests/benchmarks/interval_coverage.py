"""How often the 95 % intervals of the tables hold the truth, on simulated cohorts with correlated cases.

Run: ``python tests/benchmarks/interval_coverage.py [COHORTS]``. A patient has 1 to 6 cases that share the patient's
score up to a little noise. Of each cohort the interval of the mean over cases is computed by resampling patients: the
plain percentile interval, BCa (jackknife over patients), the t-bootstrap, and the one that lungseg prints. Then the
printed interval of a class that only some patients have, of a median difference, and of a pooled Dice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from scipy import stats

from lungseg.evaluation.bootstrap import PatientBootstrap, statistic_ci

COHORTS = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
NUM_BOOTSTRAP = 2000
SIZES = (3, 5, 10, 30)
MOST_CASES = 6
Interval = tuple[float, float]

SHAPES: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float, float]] = {
    # name: (scores of the patients, their true mean, noise between cases of a patient)
    "normal": (lambda rng, n: rng.normal(0.6, 0.1, n), 0.6, 0.03),
    "skewed to the left, like Dice": (lambda rng, n: rng.beta(6, 2, n), 0.75, 0.04),
    "15 % of patients missed (0)": (
        lambda rng, n: np.where(rng.random(n) < 0.15, 0.0, rng.beta(12, 4, n)),
        0.85 * 0.75,
        0.02,
    ),
    "lognormal, like HD95": (lambda rng, n: rng.lognormal(1.5, 0.8, n), float(np.exp(1.5 + 0.8**2 / 2)), 1.5),
}


def cohort_of(rng: np.random.Generator, shape: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the cases of each patient."""
    draw, _, noise = SHAPES[shape]
    counts = rng.integers(1, MOST_CASES + 1, size=size).astype(float)
    return draw(rng, size) * counts + rng.normal(0, noise, size) * np.sqrt(counts), counts


def resampling(size: int, seed: int) -> PatientBootstrap:
    """The resampling of so many patients."""
    return PatientBootstrap.of([f"{i:04d}" for i in range(size)], num_bootstrap=NUM_BOOTSTRAP, seed=seed)


def printed(sums: np.ndarray, counts: np.ndarray, seed: int) -> Interval:
    """The interval of the tables."""
    low, high = resampling(len(sums), seed).ratio_intervals(sums[:, None], counts[:, None])[0]
    return float(low), float(high)


def standard_error(sums: np.ndarray, counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Linearised standard error of a ratio of sums over patients (last axis)."""
    rest = sums - mean[..., None] * counts
    n = sums.shape[-1]
    return np.sqrt(n / (n - 1) * (rest**2).sum(axis=-1)) / counts.sum(axis=-1)


def others(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> dict[str, Interval]:
    """Percentile, BCa and t-bootstrap intervals."""
    n = len(sums)
    drawn = rng.integers(n, size=(NUM_BOOTSTRAP, n))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    mean = np.asarray(sums.sum() / counts.sum())
    jackknife = (sums.sum() - sums) / (counts.sum() - counts)
    away = jackknife.mean() - jackknife
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    share = (np.mean(means < mean) + np.mean(means <= mean)) / 2
    bias = stats.norm.ppf(np.clip(share, 1 / NUM_BOOTSTRAP, 1 - 1 / NUM_BOOTSTRAP))
    z = bias + stats.norm.ppf([0.025, 0.975])
    levels = 100 * stats.norm.cdf(bias + z / (1 - acceleration * z))
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of one patient only has no standard error
        t = (means - mean) / standard_error(sums[drawn], counts[drawn], means)
    low, high = np.percentile(t[np.isfinite(t)], (2.5, 97.5))
    error = standard_error(sums, counts, mean)
    return {
        "percentile": tuple(np.percentile(means, (2.5, 97.5))),
        "BCa": tuple(np.percentile(means, levels)),
        "t-bootstrap": (float(mean - high * error), float(mean - low * error)),
    }


def share_that_holds(intervals: list[Interval], truth: float) -> float:
    """Coverage."""
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def means_table() -> None:
    """Coverage and median width of four intervals of the mean."""
    print(f"{COHORTS} cohorts, {NUM_BOOTSTRAP} resamples; coverage (median width), nominal 0.95")
    for shape, (_, truth, _) in SHAPES.items():
        for size in SIZES:
            rng = np.random.default_rng([size, len(shape)])
            found: dict[str, list[Interval]] = {}
            for seed in range(COHORTS):
                sums, counts = cohort_of(rng, shape, size)
                for name, interval in {"lungseg": printed(sums, counts, seed), **others(sums, counts, rng)}.items():
                    found.setdefault(name, []).append(interval)
            cells = (
                f"{name} {share_that_holds(some, truth):.3f} ({np.median([h - lo for lo, h in some]):.3g})"
                for name, some in found.items()
            )
            print(f"{shape:32s} {size:3d} patients: {'  '.join(cells)}", flush=True)


def other_figures() -> None:
    """Coverage of the printed interval where it is not that of a plain mean."""
    rng = np.random.default_rng(3)
    for holders, size in ((5, 30), (10, 30)):
        found = []
        for seed in range(COHORTS):
            sums, counts = cohort_of(rng, "normal", size)
            has = np.arange(size) < holders
            found.append(printed(sums * has, counts * has, seed))
        print(f"class that {holders} of {size} patients have: {share_that_holds(found, 0.6):.3f}")
    for size in (5, 6, 10, 30):
        found = [
            statistic_ci(rng.lognormal(0, 0.8, size), np.median, num_bootstrap=NUM_BOOTSTRAP, seed=seed)
            for seed in range(COHORTS)
        ]
        print(f"median difference, lognormal, {size} patients: {share_that_holds(found, 1.0):.3f}")
    for size in (10, 30):
        overlap, volume = pooled_of(np.random.default_rng(1), 2_000_000)
        found = [printed(*pooled_of(rng, size), seed) for seed in range(COHORTS)]
        print(f"pooled Dice, {size} patients: {share_that_holds(found, overlap.sum() / volume.sum()):.3f}")


def pooled_of(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """2|A∩B| and |A|+|B| of patients whose lesions differ much in size; larger ones have a higher Dice."""
    volume = rng.lognormal(4, 1, size)
    dice = np.clip(rng.normal(0.6 + 0.05 * np.log(volume / 55), 0.1), 0, 1)
    return dice * 2 * volume, 2 * volume


if __name__ == "__main__":
    means_table()
    other_figures()

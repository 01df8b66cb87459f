"""Numbers of a set of Hounsfield units, all from its histogram: ChestImagingPlatform's densities and aeration bands.

Source of every definition: CIP, ``cip_python/phenotypes/parenchyma_phenotypes.py``, unless a constant of ``tissue``
says otherwise. Bounds are inclusive as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lungseg.tissue import (
    AERATION_HU,
    AFFECTED_BANDS,
    DENSE_LUNG_HU,
    FUNCTIONAL_BANDS,
    HAA_BAND_HU,
    HAA_HU,
    LAA_HU,
)

NO_VOXEL = "no voxel"
TOO_FEW = "too few voxels"
CONSTANT = "all voxels are alike"
EXPIRATORY = "of inspiratory scans only"
NOT_EXPIRATORY = "of expiratory scans only"
PERCENTILES = (10, 15)
INSPIRATORY_METRICS = ("laa950_pct", "laa910_pct", "perc10_hu", "perc15_hu", "haa600_250_pct")
"""Blank for a scan that is known to be expiratory: their thresholds mean nothing there."""
EXPIRATORY_METRICS = ("laa856_pct",)
"""Gas trapping: blank unless the scan is known to be expiratory. RELIABILITY 1."""

Number = tuple[float | None, str]
"""A value and '', or None and why there is none."""


@dataclass(frozen=True)
class Histogram:
    """Voxels of each HU."""

    values: np.ndarray
    """float64 (K,), HU, ascending."""
    counts: np.ndarray
    """int64 (K,), positive."""

    @classmethod
    def of_counts(cls, counts: np.ndarray, lowest_hu: int) -> Histogram:
        """From ``counts`` (R,) of the HU ``lowest_hu``, ``lowest_hu + 1`` ..."""
        found = np.flatnonzero(counts)
        return cls((found + lowest_hu).astype(np.float64), counts[found].astype(np.int64))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return int(self.counts.sum())

    def between(self, low: float, high: float, *, include_high: bool = True) -> Histogram:
        """The part from ``low`` (inclusive) to ``high``."""
        kept = (self.values >= low) & ((self.values <= high) if include_high else (self.values < high))
        return Histogram(self.values[kept], self.counts[kept])

    def mean(self) -> Number:
        """Mean HU."""
        return (float(self.values @ self.counts) / self.size, "") if self.size else (None, NO_VOXEL)

    def _moment(self, order: int) -> float:
        """Central moment."""
        mean, _ = self.mean()
        return float(((self.values - (mean or 0.0)) ** order) @ self.counts) / self.size

    def sd(self) -> Number:
        """Population standard deviation, as CIP `HUStd`."""
        return (self._moment(2) ** 0.5, "") if self.size else (None, NO_VOXEL)

    def percentile(self, share: float) -> Number:
        """Percentile of HU, 0 to 100, linear interpolation (numpy's default, as CIP)."""
        if not self.size:
            return None, NO_VOXEL
        place = (self.size - 1) * share / 100.0
        low = int(np.floor(place))
        last = np.cumsum(self.counts)
        below, above = (
            float(self.values[np.searchsorted(last, min(index, self.size - 1), side="right")])
            for index in (low, low + 1)
        )
        return below + (above - below) * (place - low), ""

    def mode(self) -> Number:
        """Most frequent HU, the lowest of several (as CIP)."""
        return (float(self.values[np.argmax(self.counts)]), "") if self.size else (None, NO_VOXEL)

    def skewness(self) -> Number:
        """Skewness corrected for bias (scipy, ``bias=False``)."""
        n = self.size
        if n < 3:
            return None, TOO_FEW if n else NO_VOXEL
        spread = self._moment(2)
        if spread == 0:
            return None, CONSTANT
        return self._moment(3) / spread**1.5 * (n * (n - 1.0)) ** 0.5 / (n - 2.0), ""

    def kurtosis(self) -> Number:
        """Excess kurtosis corrected for bias (scipy, Fisher's, ``bias=False``)."""
        n = self.size
        if n < 4:
            return None, TOO_FEW if n else NO_VOXEL
        spread = self._moment(2)
        if spread == 0:
            return None, CONSTANT
        raw = self._moment(4) / spread**2
        return (n - 1.0) / ((n - 2.0) * (n - 3.0)) * ((n + 1.0) * raw - 3.0 * (n - 1.0)), ""

    def share(self, low: float = -np.inf, high: float = np.inf) -> Number:
        """Percent of the voxels from ``low`` to ``high``, both inclusive."""
        return (100.0 * self.between(low, high).size / self.size, "") if self.size else (None, NO_VOXEL)

    def mass_g(self, voxel_ml: float) -> Number:
        """Mass in grams: HU to density by pieces, after Schneider et al., as CIP `Mass`."""
        if not self.size:
            return None, NO_VOXEL
        hu = self.values
        # CIP's line through (-1000 HU, 1.21e-3 g/mL) and (-98 HU, 0.93 g/mL)
        slope = (1.21e-3 - 0.93) / (-1000.0 + 98.0)
        density = np.select(
            [hu < -98, hu <= 18, hu <= 100],
            [
                slope * np.maximum(hu, -1000.0) + 1.21e-3 + 1000.0 * slope,
                1.018 + 0.893 * hu / 1000.0,
                1.003 + 1.169 * hu / 1000.0,
            ],
            1.017 + 0.592 * hu / 1000.0,
        )
        return float(density @ self.counts) * voxel_ml, ""


def density_units() -> Iterator[tuple[str, str]]:
    """Metric and unit of every number of :func:`density_numbers`, in order."""
    yield "mass_g", "g"
    for part in ("", "500"):
        yield from ((f"mld{part}_hu", "HU"), (f"std{part}_hu", "HU"), (f"median{part}_hu", "HU"))
        yield from ((f"mode{part}_hu", "HU"), (f"skew{part}", ""), (f"kurtosis{part}", ""))
    yield from ((f"perc{share}_hu", "HU") for share in PERCENTILES)
    yield from ((f"{name}_pct", "%") for name in (*LAA_HU, *HAA_HU))
    yield "haa600_250_pct", "%"
    for name in (*AERATION_HU, "functional", "affected"):
        yield from ((f"{name}_ml", "ml"), (f"{name}_pct", "%"))


def density_numbers(histogram: Histogram, *, voxel_ml: float, inspiration: str = "") -> dict[str, Number]:
    """Every density number of one region.

    Parameters
    ----------
    histogram : Histogram
        HU of the region's voxels.
    voxel_ml : float
        Volume of a voxel in mL.
    inspiration : str
        `inspiration`, `expiration` or '' (not known): an expiratory scan has no LAA-950, LAA-910, Perc10, Perc15 and
        no share from -600 to -250 HU, any other no LAA-856 (gas trapping).

    Returns
    -------
    dict
        Metric -> (value, '') or (None, reason), in the order of :func:`density_units`.
    """
    numbers: dict[str, Number] = {"mass_g": histogram.mass_g(voxel_ml)}
    for part, shown in (("", histogram), ("500", histogram.between(-np.inf, DENSE_LUNG_HU))):
        numbers |= {
            f"mld{part}_hu": shown.mean(),
            f"std{part}_hu": shown.sd(),
            f"median{part}_hu": shown.percentile(50),
            f"mode{part}_hu": shown.mode(),
            f"skew{part}": shown.skewness(),
            f"kurtosis{part}": shown.kurtosis(),
        }
    numbers |= {f"perc{share}_hu": histogram.percentile(share) for share in PERCENTILES}
    numbers |= {f"{name}_pct": histogram.share(high=hu) for name, hu in LAA_HU.items()}
    numbers |= {f"{name}_pct": histogram.share(low=hu) for name, hu in HAA_HU.items()}
    numbers["haa600_250_pct"] = histogram.share(*HAA_BAND_HU)
    for name, voxels in _bands(histogram).items():
        numbers[f"{name}_ml"] = voxels * voxel_ml, ""
        numbers[f"{name}_pct"] = (100.0 * voxels / histogram.size, "") if histogram.size else (None, NO_VOXEL)
    blank = {metric: EXPIRATORY for metric in INSPIRATORY_METRICS if inspiration == "expiration"}
    blank |= {metric: NOT_EXPIRATORY for metric in EXPIRATORY_METRICS if inspiration != "expiration"}
    return numbers | {metric: (None, reason) for metric, reason in blank.items()}


def _bands(histogram: Histogram) -> Mapping[str, int]:
    """Voxels of each aeration band, and of their sums."""
    last = list(AERATION_HU)[-1]
    counts = {
        name: histogram.between(low, high, include_high=name == last).size for name, (low, high) in AERATION_HU.items()
    }
    counts["functional"] = sum(counts[name] for name in FUNCTIONAL_BANDS)
    counts["affected"] = sum(counts[name] for name in AFFECTED_BANDS)
    return counts

"""How much of which tissue a scan holds, per region: mL, % and HU.

Numbers belong to the scan's own grid: resampling shifts LAA-950 and the percentiles (ARCHITECTURE, patch store).
A number that cannot be had is None with the reason beside it, never 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.tables import csv_text
from lungseg.tissue import LAA950_HU, LUNG_LEFT, LUNG_RIGHT, OUTSIDE, TISSUES, UNCLASSIFIED, Tissue

OK = "ok"
TRUNCATED = "truncated"
LOWER_BOUND = "lower bound"
REGIONS = ("whole", "left", "right")
UNCLASSIFIED_NAME = "unclassified"
LOW_PERCENTILE = 15.0
"""Perc15, CIP `Perc15`: 15th percentile of HU, linear interpolation."""
CSV_COLUMNS = ("case", "region", "metric", "value", "unit", "status")


@dataclass(frozen=True)
class QuantityRow:
    """One number of one scan, in long form."""

    region: str
    """whole, left or right."""
    metric: str
    """For example `emphysema_ml`, `laa950_pct`; the unit is the last part of the name."""
    value: float | None
    """None where the number cannot be had."""
    unit: str
    """ml, % or HU."""
    status: str
    """`ok`, `lower bound`, or why there is no number."""


def quantify(
    labels: np.ndarray,
    lungs: np.ndarray,
    volume_hu: np.ndarray | None,
    *,
    voxel_ml: float,
    truncated: Collection[str] = (),
    lower_bounds: bool = False,
) -> list[QuantityRow]:
    """Volume, share and density of each tissue in the whole, left and right lung.

    Parameters
    ----------
    labels : uint8 array, shape (Z, Y, X)
        Label map (METHOD 0.1). Lung voxels with label 0 or 255 are `unclassified`.
    lungs : uint8 or bool array of that shape
        Lung field: 1 left, 2 right, 0 outside; a bool mask has no sides, so left and right have no numbers.
    volume_hu : int16 or float array of that shape, or None
        CT in Hounsfield units, not windowed, on its own grid. None: the HU numbers are left blank.
    voxel_ml : float
        Volume of a voxel in mL.
    truncated : collection of region names
        Regions cut by the field of view (`left`, `right`, `whole`): blank, and so is the whole lung.
    lower_bounds : bool
        Volumes (mL) of such regions are given, with status `lower bound`; shares and densities stay blank, for the part
        that was not scanned may differ.

    Returns
    -------
    list of QuantityRow
        Per region: `volume_ml`, `mld_hu` (mean lung density), `laa950_pct` (≤ −950 HU, inclusive), `perc15_hu`; per
        tissue `<name>_ml`, `_pct` (of the region), `_mean_hu`, `_sd_hu` (population SD), `_p15_hu`. Tissue mL sum to
        `volume_ml`. For the whole also `labelled_outside_lung_ml`.

    Raises
    ------
    InputError
        If shapes differ, a label or lung id is unknown, HU are not finite or ``voxel_ml`` is not positive.

    Source
    ------
    RELIABILITY 1; CIP `LAA950` (inclusive) and `Perc15`.
    """
    _check(labels, lungs, volume_hu, voxel_ml, truncated)
    voxel_ml = float(voxel_ml)  # a NumPy scalar would leak into JSON and repr
    is_lung = lungs != OUTSIDE
    rows: list[QuantityRow] = []
    for region in REGIONS:
        inside, reason = _region(region, lungs, is_lung)
        cut = bool(truncated) and (region in truncated or region == "whole")
        if cut and (not lower_bounds or reason):
            reason = TRUNCATED
        if reason:
            rows += [QuantityRow(region, metric, None, unit, reason) for metric, unit in _metrics()]
        else:
            hu = None if volume_hu is None else volume_hu[inside]
            found = _region_rows(region, labels[inside], hu, voxel_ml)
            rows += [_bounded(row) for row in found] if cut else found
    outside = int(np.count_nonzero((labels != OUTSIDE) & ~is_lung))
    return [*rows, QuantityRow("whole", "labelled_outside_lung_ml", outside * voxel_ml, "ml", OK)]


def _bounded(row: QuantityRow) -> QuantityRow:
    """A row of a region of which only a part was scanned."""
    if row.unit == "ml":
        return replace(row, status=LOWER_BOUND)
    return replace(row, value=None, status=TRUNCATED)


def quantification_csv(rows_by_case: Mapping[str, Sequence[QuantityRow]]) -> str:
    """Long CSV text: case, region, metric, value, unit, status; cases sorted, blank where there is no number."""
    return csv_text(
        CSV_COLUMNS,
        (
            {
                "case": case,
                "region": row.region,
                "metric": row.metric,
                "value": row.value,
                "unit": row.unit,
                "status": row.status,
            }
            for case in sorted(rows_by_case)
            for row in rows_by_case[case]
        ),
    )


def _check(
    labels: np.ndarray, lungs: np.ndarray, volume_hu: np.ndarray | None, voxel_ml: float, truncated: Collection[str]
) -> None:
    """Raise ``InputError`` on arrays that do not belong together."""
    shapes = {labels.shape, lungs.shape} | ({volume_hu.shape} if volume_hu is not None else set())
    if len(shapes) != 1:
        raise InputError(f"labels, lungs and image must have one shape, not {sorted(shapes)}")
    if not np.isfinite(voxel_ml) or voxel_ml <= 0:
        raise InputError(f"the volume of a voxel must be positive, not {voxel_ml} mL")
    if unknown := set(truncated) - set(REGIONS):
        raise InputError(f"unknown regions {sorted(unknown)}; regions are {list(REGIONS)}")
    if labels.dtype != np.uint8:
        raise InputError(f"the label map must be uint8, not {labels.dtype}")
    is_known = np.zeros(256, dtype=bool)
    is_known[[OUTSIDE, UNCLASSIFIED, *map(int, Tissue)]] = True
    foreign = ~is_known[labels]
    if foreign.any():
        raise InputError(f"the label map has unknown ids {np.unique(labels[foreign]).tolist()}")
    if lungs.dtype != np.bool_ and lungs.size and (lungs.min() < 0 or lungs.max() > LUNG_RIGHT):
        raise InputError(f"the lung mask holds ids from {lungs.min()} to {lungs.max()}; known: 0, 1 left, 2 right")
    if volume_hu is not None and volume_hu.dtype.kind == "f" and not np.isfinite(volume_hu[lungs != OUTSIDE]).all():
        raise InputError("the image holds nan or infinite HU inside the lungs")


def _region(region: str, lungs: np.ndarray, is_lung: np.ndarray) -> tuple[np.ndarray, str]:
    """Voxels of a region, and why it has no numbers ('' if it has)."""
    if region == "whole":
        return is_lung, "" if is_lung.any() else "lung mask is empty"
    if lungs.dtype == np.bool_:
        return is_lung, "lung mask has no sides"
    inside = lungs == (LUNG_LEFT if region == "left" else LUNG_RIGHT)
    return inside, "" if inside.any() else f"no {region} lung in the lung mask"


def _tissue_ids() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and label ids of the rows: the tissues, then what is left of the lung."""
    for tissue, info in TISSUES.items():
        yield info.name, (int(tissue),)
    yield UNCLASSIFIED_NAME, (UNCLASSIFIED, OUTSIDE)


def _metrics() -> Iterator[tuple[str, str]]:
    """Metric and unit of every row of a region, in order."""
    yield from (("volume_ml", "ml"), ("mld_hu", "HU"), ("laa950_pct", "%"), ("perc15_hu", "HU"))
    for name, _ in _tissue_ids():
        yield from ((f"{name}_ml", "ml"), (f"{name}_pct", "%"))
        yield from ((f"{name}_mean_hu", "HU"), (f"{name}_sd_hu", "HU"), (f"{name}_p15_hu", "HU"))


def _region_rows(region: str, labels: np.ndarray, hu: np.ndarray | None, voxel_ml: float) -> list[QuantityRow]:
    """Rows of a non-empty region from its voxels, shape (N,)."""
    mean, _, low = _density(hu)
    share = None if hu is None else 100.0 * int(np.count_nonzero(hu <= LAA950_HU)) / hu.size
    values: list[float | None] = [labels.size * voxel_ml, mean, share, low]
    reasons = [OK, *["no source image"] * 3]
    for _, ids in _tissue_ids():
        inside = np.isin(labels, ids)
        num = int(np.count_nonzero(inside))
        values += [num * voxel_ml, 100.0 * num / labels.size]
        values += [*_density(None if hu is None else hu[inside])]
        reasons += [OK, OK, *["no source image" if hu is None else "no voxel of this tissue"] * 3]
    return [
        QuantityRow(region, metric, value, unit, OK if value is not None else reason)
        for (metric, unit), value, reason in zip(_metrics(), values, reasons, strict=True)
    ]


def _density(hu: np.ndarray | None) -> tuple[float | None, float | None, float | None]:
    """Mean, population SD and 15th percentile of HU, shape (N,); None each if there are none."""
    if hu is None or hu.size == 0:
        return None, None, None
    return (
        float(hu.mean(dtype=np.float64)),
        float(hu.std(dtype=np.float64)),
        float(np.percentile(hu, LOW_PERCENTILE)),
    )

"""How much of which tissue a scan holds, and how dense it is, per region: mL, %, HU, g.

Numbers belong to the scan's own grid: resampling shifts LAA-950 and the percentiles (ARCHITECTURE, patch store).
A number that cannot be had is None with the reason beside it, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.surface import require_spacing
from lungseg.report.density import Histogram, Number, density_numbers, density_units
from lungseg.report.regions import LOBE_REGIONS, REGIONS, RegionVoxels, region_voxels
from lungseg.tissue import (
    LOBES,
    LUNG_RIGHT,
    OUTSIDE,
    SEVERITY_CUTS_PCT,
    SEVERITY_TISSUES,
    TISSUES,
    UNCLASSIFIED,
    VIEWS,
    Tissue,
)

OK = "ok"
TRUNCATED = "truncated"
LOWER_BOUND = "lower bound"
NO_IMAGE = "no source image"
NO_TISSUE_VOXEL = "no voxel of this tissue"
UNCLASSIFIED_NAME = "unclassified"
TISSUE_SUMS: Mapping[str, tuple[int, ...]] = {
    "ild": tuple(map(int, VIEWS["ild"]["ild"])),
    "abnormal": tuple(map(int, VIEWS["abnormal"]["abnormal"])),
}
"""Sums of tissues that tables give beside them."""
LOW_PERCENTILE = 15
CHUNK_VOXELS = 2**22
"""Voxels put into the joint histogram at a time: it needs 8 bytes for each."""


@dataclass(frozen=True)
class QuantityRow:
    """One number of one scan, in long form."""

    region: str
    """One of ``REGIONS``, or of ``LOBE_REGIONS``."""
    metric: str
    """For example `emphysema_ml`, `laa950_pct`; the unit is the last part of the name."""
    value: float | None
    """None where the number cannot be had."""
    unit: str
    """ml, %, HU, g, or '' for a number without unit."""
    status: str
    """`ok`, `lower bound`, or why there is no number."""


def quantify(
    labels: np.ndarray,
    lungs: np.ndarray,
    volume_hu: np.ndarray | None,
    *,
    spacing_mm: Sequence[float],
    lobes: np.ndarray | None = None,
    inspiration: str = "",
    truncated: Collection[str] = (),
    lower_bounds: bool = False,
) -> list[QuantityRow]:
    """Volume, share and density of each tissue in each region of the lungs.

    Parameters
    ----------
    labels : uint8 array, shape (Z, Y, X)
        Label map (METHOD 0.1). Lung voxels with label 0 or 255 are `unclassified`.
    lungs : uint8 or bool array of that shape
        Lung field: 1 left, 2 right, 0 outside; a bool mask has no sides, so left and right have no numbers.
    volume_hu : int16 array of that shape, or None
        CT in Hounsfield units, not windowed, on its own grid. None: the HU numbers are left blank.
    spacing_mm : sequence of float
        (z, y, x) in mm.
    lobes : uint8 array of that shape, optional
        Ids of ``tissue.LOBES``; adds a region for each lobe, and the severity score.
    inspiration : str
        `inspiration`, `expiration` or '' (not known): decides which densities may be reported.
    truncated : collection of region names
        Regions cut by the field of view: blank, and so is every region that may hold a part of them.
    lower_bounds : bool
        Volumes (mL) and masses of such regions are given, with status `lower bound`; shares and densities stay blank,
        for the part that was not scanned may differ.

    Returns
    -------
    list of QuantityRow
        Per region: `n_voxels`, `volume_ml`; the numbers of :func:`lungseg.report.density.density_units`; per tissue
        `<name>_ml`, `_pct` (of the region), `_mean_hu`, `_sd_hu` (population SD), `_p15_hu`; `ild_ml`, `abnormal_ml`
        and their `_pct`. Tissue mL sum to `volume_ml`. For the whole also `labelled_outside_lung_ml`. With lobes each
        lobe has a `severity_score` (0 to 5) and the whole their sum (0 to 25), if all five are there.

    Raises
    ------
    InputError
        If shapes differ, a label or lung id is unknown, the image is not int16 or the spacing is not positive.

    Source
    ------
    RELIABILITY 1; densities: CIP, see :mod:`lungseg.report.density`.
    """
    spacing = require_spacing(spacing_mm, 3)
    _check(labels, lungs, volume_hu, lobes, truncated, inspiration)
    voxel_ml = math.prod(spacing) / 1000.0
    is_lung = lungs != OUTSIDE
    found, hu = labels[is_lung], None if volume_hu is None else volume_hu[is_lung]
    rows: list[QuantityRow] = []
    for region in region_voxels(lungs, spacing_mm=spacing, lobes=lobes):
        # thirds, core and rim hold parts of both lungs
        cut = bool(truncated) and (region.name in truncated or region.name not in ("left", "right"))
        reason = TRUNCATED if cut and (not lower_bounds or region.reason) else region.reason
        units = _units(region.name, has_lobes=lobes is not None)
        if reason:
            rows += [QuantityRow(region.name, metric, None, unit, reason) for metric, unit in units]
            continue
        numbers = _numbers(region, found, hu, voxel_ml, inspiration)
        mine = [_row(region.name, metric, unit, numbers.get(metric)) for metric, unit in units]
        rows += [_bounded(row) for row in mine] if cut else mine
    if lobes is not None:
        rows = _with_total_severity(rows)
    outside = int(np.count_nonzero((labels != OUTSIDE) & ~is_lung))
    return [*rows, QuantityRow("whole", "labelled_outside_lung_ml", outside * voxel_ml, "ml", OK)]


def _row(region: str, metric: str, unit: str, number: Number | None) -> QuantityRow:
    value, reason = number if number is not None else (None, NO_IMAGE)
    return QuantityRow(region, metric, value, unit, OK if value is not None else reason)


def _bounded(row: QuantityRow) -> QuantityRow:
    """A row of a region of which only a part was scanned."""
    if row.value is not None and row.unit in ("ml", "g"):
        return replace(row, status=LOWER_BOUND)
    return replace(row, value=None, status=TRUNCATED)


def _check(
    labels: np.ndarray,
    lungs: np.ndarray,
    volume_hu: np.ndarray | None,
    lobes: np.ndarray | None,
    truncated: Collection[str],
    inspiration: str,
) -> None:
    """Raise ``InputError`` on arrays that do not belong together."""
    shapes = {array.shape for array in (labels, lungs, volume_hu, lobes) if array is not None}
    if len(shapes) != 1:
        raise InputError(f"labels, lungs, lobes and image must have one shape, not {sorted(shapes)}")
    if unknown := set(truncated) - {*REGIONS, *LOBE_REGIONS}:
        raise InputError(f"unknown regions {sorted(unknown)}; regions are {[*REGIONS, *LOBE_REGIONS]}")
    if inspiration not in ("", "inspiration", "expiration"):
        raise InputError(f"inspiration is 'inspiration', 'expiration' or '', not {inspiration!r}")
    if labels.dtype != np.uint8:
        raise InputError(f"the label map must be uint8, not {labels.dtype}")
    foreign = ~_known_ids((OUTSIDE, UNCLASSIFIED, *map(int, Tissue)))[labels]
    if foreign.any():
        raise InputError(f"the label map has unknown ids {np.unique(labels[foreign]).tolist()}")
    if lungs.dtype != np.bool_ and lungs.size and (lungs.min() < 0 or lungs.max() > LUNG_RIGHT):
        raise InputError(f"the lung mask holds ids from {lungs.min()} to {lungs.max()}; known: 0, 1 left, 2 right")
    if lobes is not None and (lobes.dtype != np.uint8 or lobes.max(initial=0) > max(LOBES)):
        raise InputError(f"the lobe map must be uint8 with ids from 0 to {max(LOBES)}")
    if volume_hu is not None and volume_hu.dtype != np.int16:
        raise InputError(f"the image must be int16 HU, not {volume_hu.dtype}")


def _known_ids(ids: Collection[int]) -> np.ndarray:
    """bool (256,): which label ids are known."""
    table = np.zeros(256, dtype=bool)
    table[list(ids)] = True
    return table


def _tissue_ids() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and label ids of the rows: the tissues, then what is left of the lung."""
    for tissue, info in TISSUES.items():
        yield info.name, (int(tissue),)
    yield UNCLASSIFIED_NAME, (UNCLASSIFIED, OUTSIDE)


def _units(region: str, *, has_lobes: bool) -> list[tuple[str, str]]:
    """Metric and unit of every row of a region, in order."""
    units = [("n_voxels", ""), ("volume_ml", "ml"), *density_units()]
    for name, _ in _tissue_ids():
        units += [(f"{name}_ml", "ml"), (f"{name}_pct", "%")]
        units += [(f"{name}_mean_hu", "HU"), (f"{name}_sd_hu", "HU"), (f"{name}_p15_hu", "HU")]
    for name in TISSUE_SUMS:
        units += [(f"{name}_ml", "ml"), (f"{name}_pct", "%")]
    if has_lobes and (region in LOBE_REGIONS or region == "whole"):
        units.append(("severity_score", ""))
    return units


def _numbers(
    region: RegionVoxels, labels: np.ndarray, hu: np.ndarray | None, voxel_ml: float, inspiration: str
) -> dict[str, Number]:
    """Numbers of a non-empty region; metrics that need an image are left out without one."""
    counts, lowest = _joint_histogram(labels, hu, region.inside)
    size = int(counts.sum())
    numbers: dict[str, Number] = {"n_voxels": (float(size), ""), "volume_ml": (size * voxel_ml, "")}
    if hu is not None:
        whole = Histogram.of_counts(counts.sum(axis=0), lowest)
        numbers |= density_numbers(whole, voxel_ml=voxel_ml, inspiration=inspiration)
    for name, ids in _tissue_ids():
        mine = counts[list(ids)].sum(axis=0)
        numbers |= _volume(name, int(mine.sum()), size, voxel_ml)
        if hu is not None:
            tissue = Histogram.of_counts(mine, lowest)
            found = {"mean": tissue.mean(), "sd": tissue.sd(), f"p{LOW_PERCENTILE}": tissue.percentile(LOW_PERCENTILE)}
            for key, (value, _) in found.items():
                numbers[f"{name}_{key}_hu"] = value, "" if value is not None else NO_TISSUE_VOXEL
    for name, ids in TISSUE_SUMS.items():
        numbers |= _volume(name, int(counts[list(ids)].sum()), size, voxel_ml)
    if region.name in LOBE_REGIONS:
        involved = 100.0 * int(counts[list(map(int, SEVERITY_TISSUES))].sum()) / size
        numbers["severity_score"] = float(sum(involved > cut for cut in SEVERITY_CUTS_PCT)), ""
    return numbers


def _volume(name: str, voxels: int, size: int, voxel_ml: float) -> dict[str, Number]:
    return {f"{name}_ml": (voxels * voxel_ml, ""), f"{name}_pct": (100.0 * voxels / size, "")}


def _joint_histogram(labels: np.ndarray, hu: np.ndarray | None, inside: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Voxels of each label and HU, int64 (256, R), and the HU of column 0; one column without an image."""
    lowest = 0 if hu is None else int(hu.min())
    width = 1 if hu is None else int(hu.max()) - lowest + 1
    counts = np.zeros(256 * width, dtype=np.int64)
    for start in range(0, labels.size, CHUNK_VOXELS):
        part = slice(start, start + CHUNK_VOXELS)
        code = labels[part].astype(np.int64) * width
        if hu is not None:
            code += hu[part].astype(np.int64) - lowest
        counts += np.bincount(code if inside is None else code[inside[part]], minlength=counts.size)
    return counts.reshape(256, width), lowest


def _with_total_severity(rows: list[QuantityRow]) -> list[QuantityRow]:
    """The whole lung's severity score is the sum over the lobes."""
    scores = [row for row in rows if row.metric == "severity_score" and row.region in LOBE_REGIONS]
    missing = next((row.status for row in scores if row.value is None), "")
    total = None if missing else sum(row.value or 0.0 for row in scores)
    return [
        replace(row, value=total, status=missing or OK)
        if (row.region, row.metric) == ("whole", "severity_score") and row.status != TRUNCATED
        else row
        for row in rows
    ]

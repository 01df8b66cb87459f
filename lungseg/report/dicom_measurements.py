"""The numbers of one scan as regions and codes for a DICOM structured report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lungseg.report.quantify import OK, UNCLASSIFIED_NAME, QuantityRow
from lungseg.report.quantity_tables import CaseQuantities
from lungseg.scan.dicom_sr_write import MeasuredNumber, MeasuredRegion, private_code
from lungseg.tissue import LUNG_CODE, TISSUES, Code

ML, PERCENT = Code("mL", "UCUM", "milliliter"), Code("%", "UCUM", "percent")
HU, GRAM = Code("[hnsf'U]", "UCUM", "Hounsfield unit"), Code("g", "UCUM", "gram")
VOLUME = Code("118565006", "SCT", "Volume")
ATTENUATION = Code("112031", "DCM", "Attenuation Coefficient")
MEAN, DEVIATION = Code("373098007", "SCT", "Mean"), Code("386136009", "SCT", "Standard Deviation")
SHARE = private_code("LUNG_SHARE", "Share of the volume of both lungs")
SIDES: Mapping[str, tuple[str, Code]] = {
    "whole": ("Both lungs", LUNG_CODE),
    "left": ("Left lung", Code("44029006", "SCT", "Left lung")),
    "right": ("Right lung", Code("3341006", "SCT", "Right lung")),
}
"""Regions that have codes, and their names."""
LUNG_NUMBERS: Mapping[str, tuple[Code, Code, Code | None]] = {
    "volume_ml": (VOLUME, ML, None),
    "mass_g": (private_code("LUNG_MASS", "Mass of the lung by its density"), GRAM, None),
    "mld_hu": (ATTENUATION, HU, MEAN),
    "std_hu": (ATTENUATION, HU, DEVIATION),
    "laa950_pct": (private_code("LAA950", "Share of lung at or below -950 HU"), PERCENT, None),
    "laa910_pct": (private_code("LAA910", "Share of lung at or below -910 HU"), PERCENT, None),
    "laa856_pct": (private_code("LAA856", "Share of lung at or below -856 HU, expiratory"), PERCENT, None),
    "perc15_hu": (private_code("PERC15", "15th percentile of lung attenuation"), HU, None),
    "abnormal_pct": (private_code("ABNORMAL_SHARE", "Share of lung mapped as abnormal"), PERCENT, None),
}
"""Metrics of a region: name, unit and derivation."""
TISSUE_NUMBERS: Mapping[str, tuple[Code, Code, Code | None]] = {
    "ml": (VOLUME, ML, None),
    "pct": (SHARE, PERCENT, None),
    "mean_hu": (ATTENUATION, HU, MEAN),
    "sd_hu": (ATTENUATION, HU, DEVIATION),
}
"""The same of a tissue; its name stands before the metric."""


def measured_regions(quantities: CaseQuantities) -> list[MeasuredRegion]:
    """Lungs and tissues of one scan with every number that is there; blanks and lower bounds are left out.

    Parameters
    ----------
    quantities : CaseQuantities
        As :func:`lungseg.report.quantify.quantify` counts them.

    Returns
    -------
    list of MeasuredRegion
        Both lungs, each lung, then each tissue over both lungs, by the title of its segment.
    """
    known = {(row.region, row.metric): row for row in quantities.rows}
    regions = []
    for region, (label, site) in SIDES.items():
        named = {metric: _row(known, region, metric) for metric in LUNG_NUMBERS}
        numbers = [
            MeasuredNumber(LUNG_NUMBERS[m][0], v, *LUNG_NUMBERS[m][1:]) for m, v in named.items() if v is not None
        ]
        regions.append(MeasuredRegion(label, tuple(numbers), site))
    titles = {info.name: info.title for info in TISSUES.values()} | {UNCLASSIFIED_NAME: "Unclassified lung"}
    for name, title in titles.items():
        parts = [(_row(known, "whole", f"{name}_{metric}"), *how) for metric, how in TISSUE_NUMBERS.items()]
        regions.append(MeasuredRegion(title, _numbers(parts), LUNG_CODE, segment=title))
    return regions


def _numbers(parts: Sequence[tuple[float | None, Code, Code, Code | None]]) -> tuple[MeasuredNumber, ...]:
    return tuple(MeasuredNumber(name, value, unit, how) for value, name, unit, how in parts if value is not None)


def _row(known: Mapping[tuple[str, str], QuantityRow], region: str, metric: str) -> float | None:
    row = known.get((region, metric))
    return row.value if row is not None and row.status == OK else None

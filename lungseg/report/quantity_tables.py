"""Numbers of a cohort as files: long and wide CSV, and JSON, each with what the scan was made with beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lungseg.evaluation.writers import csv_text
from lungseg.report.quantify import QuantityRow

LONG_COLUMNS = ("case", "region", "metric", "value", "unit", "status")
FORMAT = "lungseg-quantification"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Covariates:
    """What the numbers of one scan depend on. Blank where the scan does not say."""

    kernel: str | None = None
    """ConvolutionKernel: LAA-950 differs by several points between kernels (METHOD 6)."""
    slice_thickness_mm: float | None = None
    kvp: float | None = None
    manufacturer: str | None = None
    spacing_z_mm: float | None = None
    spacing_y_mm: float | None = None
    spacing_x_mm: float | None = None
    """Of the grid that the numbers were counted on."""
    inspiration: str = ""
    """`inspiration`, `expiration`; blank: not known."""
    scan_status: str = ""
    """Words of ``scan.volume.STATUS_WORDS``, separated by spaces: what was repaired, whether the lung is cut."""


@dataclass(frozen=True)
class CaseQuantities:
    """Numbers of one scan, and what they depend on."""

    rows: tuple[QuantityRow, ...]
    covariates: Covariates = Covariates()
    warnings: tuple[str, ...] = ()


def long_csv(cases: Mapping[str, CaseQuantities]) -> str:
    """One line per number: case, region, metric, value, unit, status, covariates; blank where there is no number."""
    return csv_text((*LONG_COLUMNS, *_covariate_names()), _long_rows(cases))


def wide_csv(cases: Mapping[str, CaseQuantities]) -> str:
    """One line per case and region, one column per metric; why a number is blank stands in the long table only."""
    metrics = {row.metric: None for case_id in sorted(cases) for row in cases[case_id].rows}
    return csv_text(("case", "region", *metrics, *_covariate_names()), _wide_rows(cases))


def quantities_dict(cases: Mapping[str, CaseQuantities]) -> dict[str, Any]:
    """JSON types: cases -> regions -> metrics -> value, unit and status."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "cases": {case_id: _case_dict(cases[case_id]) for case_id in sorted(cases)},
    }


def _case_dict(case: CaseQuantities) -> dict[str, Any]:
    regions: dict[str, dict[str, Any]] = {}
    for row in case.rows:
        number = {"value": row.value, "unit": row.unit, "status": row.status}
        regions.setdefault(row.region, {})[row.metric] = number
    return {"covariates": asdict(case.covariates), "warnings": list(case.warnings), "regions": regions}


def _covariate_names() -> Sequence[str]:
    return tuple(asdict(Covariates()))


def _long_rows(cases: Mapping[str, CaseQuantities]) -> Iterator[dict[str, Any]]:
    for case_id in sorted(cases):
        covariates = asdict(cases[case_id].covariates)
        for row in cases[case_id].rows:
            yield {"case": case_id, **asdict(row), **covariates}


def _wide_rows(cases: Mapping[str, CaseQuantities]) -> Iterator[dict[str, Any]]:
    for case_id in sorted(cases):
        case = cases[case_id]
        for region in dict.fromkeys(row.region for row in case.rows):
            values = {row.metric: row.value for row in case.rows if row.region == region}
            yield {"case": case_id, "region": region, **values, **asdict(case.covariates)}

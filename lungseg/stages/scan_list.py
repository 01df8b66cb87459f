"""``lungseg preprocess --list``: the series found, which of them would be taken and why; from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lungseg.config.execution import Execution
from lungseg.config.preprocess import PreprocessConfig
from lungseg.scan.dicom import Series
from lungseg.scan.sources import Source, locations
from lungseg.stages.cohort import StageResult
from lungseg.stages.scan_case import find_scans

TAKEN = "taken"
NOTHING_KNOWN: dict[str, Any] = {
    "series": "", "kernel": "", "slices": None, "spacing_mm": None, "coverage_mm": None, "orientation": "",
    "missing_slices": 0, "syntax": "", "repairs": (),
}  # fmt: skip
"""Of what was not opened, or is no DICOM series."""
FORMATS = {".nii": "NIfTI", ".gz": "NIfTI", ".nrrd": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage"}


@dataclass(frozen=True)
class SeriesRow:
    """One series of one study, or one image file. Free of paths and patient data but for ``place``."""

    study: int
    """Number of the study or file in this search, from 1."""
    case_id: str
    """If a manifest names it."""
    series: str
    """Key for ``--series``; '' for image files and what could not be read."""
    kind: str
    """Modality, or the format of an image file."""
    kernel: str
    slices: int | None
    spacing_mm: tuple[float, float, float] | None
    """Between slices, rows and columns."""
    coverage_mm: float | None
    orientation: str
    missing_slices: int
    syntax: str
    """How the pixels are stored."""
    repairs: tuple[str, ...]
    """Options that would make it readable."""
    taken: bool
    reason: str
    """Why it was taken, or why not, and what to do."""
    place: str = ""
    """Where it lies: with ``--verbose`` only."""


def list_scans(
    scans: Sequence[Path],
    config: PreprocessConfig = PreprocessConfig(),
    *,
    manifest: Path | None = None,
    series: Sequence[str] = (),
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Show what :func:`lungseg.preprocess` would read; only headers are opened and nothing is written.

    Parameters
    ----------
    scans, manifest, series
        As for ``preprocess``.
    config : PreprocessConfig
        What may be repaired decides which series are usable.
    as_json : bool
        Put a document of JSON types into the result instead of a table.
    execution : Execution
        ``verbose`` adds where each series lies; ``shard`` limits the studies.

    Returns
    -------
    StageResult
        ``values["rows"]``: tuple of :class:`SeriesRow`. Exit code 0 if a series of every study is usable, 8 if of
        some, 3 if of none.

    Raises
    ------
    InputError
        If there is nothing to read.
    """
    found = find_scans(scans, config, manifest=manifest, series=series)
    numbered = execution.take_shard(list(enumerate(found.sources, start=1)))
    rows = tuple(row for number, source in numbered for row in _rows(number, source, places=execution.verbose))
    usable = sum(not source.problem for _, source in numbered)
    verdict = 0 if usable == len(numbered) else 8 if usable else 3
    counts = {
        "studies": len(numbered),
        "usable": usable,
        "files_looked_at": found.looked_at,
        "not_images": found.skipped,
        "damaged": found.damaged,
        "archives": found.archives,
    }
    result = StageResult("preprocess --list", Path(), values={"rows": rows, **counts}, verdict=verdict)
    if as_json:
        document = {"command": "preprocess --list", **counts, "notes": list(found.notes), "series": _plain_rows(rows)}
        return replace(result, document=document)
    summary = f"{len(rows)} series of {len(numbered)} studies and files; {usable} usable"
    return replace(result, tables=(_table(rows, execution.verbose),), notes=(summary, *found.notes))


def describe(series: Series) -> dict[str, Any]:
    """What the headers of a series say, as fields of :class:`SeriesRow`."""
    facts = series.facts()
    return {
        "series": facts.key,
        "kind": facts.modality,
        "kernel": facts.kernel or "",
        "slices": facts.slices,
        "spacing_mm": facts.spacing_mm and tuple(round(value, 4) for value in facts.spacing_mm),
        "coverage_mm": round(facts.coverage_mm, 2) if facts.spacing_mm else None,
        "orientation": facts.orientation,
        "missing_slices": facts.missing_slices,
        "syntax": facts.syntax,
        "repairs": facts.repairs,
    }


def image_format(path: Path) -> str:
    """Name of the format of an image file; '' for anything else."""
    return FORMATS.get(path.suffix.lower(), "")


def spacing_text(spacing_mm: Sequence[float] | None) -> str:
    """For example ``1.25x0.7x0.7``; '-' if unknown."""
    return "x".join(f"{value:.3g}" for value in spacing_mm) if spacing_mm else "-"


def _rows(number: int, source: Source, *, places: bool) -> list[SeriesRow]:
    """All series of a study, the taken one first; one row for an image file or a study that cannot be read."""
    rows = []
    for candidate in source.candidates:
        place = str(locations([replace(source, series=candidate.series)])[0]) if places else ""
        reason = source.hide(candidate.reason)
        known = describe(candidate.series)
        rows.append(SeriesRow(number, source.case_id, **known, taken=candidate.chosen, reason=reason, place=place))
    if rows and not (source.problem and all(row.reason == "" for row in rows)):
        return rows
    is_image = not source.problem and source.series is None
    reason = source.hide(source.problem) if source.problem else "an image file: --check reads it" if is_image else ""
    known = describe(source.series) if source.series else {**NOTHING_KNOWN, "kind": image_format(source.path)}
    place = str(locations([source])[0]) if places else ""
    row = SeriesRow(number, source.case_id, **known, taken=not source.problem, reason=reason, place=place)
    return [row]


def _plain_rows(rows: Sequence[SeriesRow]) -> list[dict[str, Any]]:
    """JSON types; the place only where it was asked for."""
    plain = [asdict(row) for row in rows]
    return [{key: value for key, value in row.items() if key != "place" or value} for row in plain]


def _table(rows: Sequence[SeriesRow], places: bool) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title="series found", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("study", "series", "kind", "kernel", "slices", "spacing (mm)", "covers", "orientation", ""):
        table.add_column(name, no_wrap=name in ("series", "spacing (mm)"), overflow="fold")
    table.add_column("reason", overflow="fold", min_width=24)
    if places:
        table.add_column("where", overflow="fold", min_width=16)
    for row in rows:
        gaps = f" (-{row.missing_slices})" if row.missing_slices else ""
        cells = [
            row.case_id or str(row.study),
            row.series or "-",
            row.kind or "-",
            row.kernel or "-",
            f"{row.slices}{gaps}" if row.slices else "-",
            spacing_text(row.spacing_mm),
            f"{row.coverage_mm:.0f} mm" if row.coverage_mm else "-",
            row.orientation or "-",
            TAKEN if row.taken else "not taken",
            row.reason,
        ]
        table.add_row(*cells, *([row.place] if places else []))
    return table

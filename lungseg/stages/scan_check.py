"""``lungseg preprocess --check``: the verdict on every scan of a cohort, and what a real run will take.

Scans are read and lungs found as in a real run, so that the verdict is that of the real run; nothing is written.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config.execution import Execution
from lungseg.config.preprocess import PreprocessConfig
from lungseg.errors import MismatchError
from lungseg.scan.sources import Source, locations
from lungseg.scan.volume import Volume
from lungseg.stages.cohort import DONE, FAILED, CaseOutcome, CaseReturn, StageResult, run_cases
from lungseg.stages.references import is_kept, labels_on, read_reference
from lungseg.stages.scan_case import (
    LungCrop,
    case_datasets,
    case_names,
    crop_to_lungs,
    find_scans,
    for_worker,
    identify,
    require_distinct,
    with_ids,
    without_names,
)
from lungseg.stages.scan_list import describe, image_format, spacing_text
from lungseg.store.cases import Store, check_store_place
from lungseg.store.schema import artefact_bytes, check_current

USABLE, WARNED, REFUSED = "ok", "ok with warnings", "refused"
AIR_RANGE_HU = (-1023, -700)
BODY_RANGE_HU = (-200, 200)
"""Where the modes of air and of soft tissue or fat are looked for; -1024 is padding."""
PLANES = ("axial", "coronal", "sagittal")
"""Planes of slices stacked along z, y and x."""
ON_AXIS = 0.9
"""Cosine above which an image file counts as axial, coronal or sagittal, as for DICOM."""
MODE_STEP = 2
"""Every how many voxels along each axis the modes are taken from."""


@dataclass(frozen=True)
class CheckRow:
    """The verdict on one scan. Free of paths and patient data but for ``place``; None where it could not be found."""

    case_id: str
    verdict: str
    """`ok`, `ok with warnings` or `refused`."""
    status: tuple[str, ...] = ()
    """Words of ``STATUS_WORDS``."""
    message: str = ""
    """What was found, and for a refused scan what to do."""
    series: str = ""
    """Key for ``--series``; '' for image files."""
    kind: str = ""
    """Modality, or the format of an image file."""
    spacing_mm: tuple[float, float, float] | None = None
    """Between slices, rows and columns of the scan (z, y, x once it was read)."""
    orientation: str = ""
    """Of the stored slices."""
    missing_slices: int = 0
    coverage_mm: float | None = None
    """Along the body once it was read, else along the slices."""
    hu_range: tuple[int, int] | None = None
    air_hu: int | None = None
    body_hu: int | None = None
    """Most frequent values in the ranges of air and of soft tissue."""
    lung_ml: float | None = None
    num_patches: int | None = None
    complete: bool = False
    """In the store already."""
    seconds: float = 0.0
    """What reading it and finding the lungs took."""
    num_voxels: int = 0
    """To be stored: of the working grid, and of the scan's own with ``--source``."""
    place: str = ""
    """Where it lies: with ``--verbose`` only."""


@dataclass(frozen=True)
class Estimate:
    """What a real run will take, from one case made in memory and the number of voxels of the others."""

    num_cases: int
    bytes: int
    seconds: float
    """With ``--jobs`` as given."""
    free_bytes: int | None
    """On the file system of the output; None without one."""

    @property
    def fits(self) -> bool:
        """Whether the output has room for it, as far as is known."""
        return self.free_bytes is None or self.bytes <= self.free_bytes

    def text(self) -> str:
        """For people."""
        text = (
            f"estimate for {self.num_cases} scans still to be done: {self.bytes / 2**30:.2f} GiB on disk and "
            f"{_duration(self.seconds)} at this --jobs"
        )
        if self.free_bytes is not None:
            text += f"; {self.free_bytes / 2**30:.1f} GiB are free"
        return text


def check_scans(
    scans: Sequence[Path],
    output: Path | None = None,
    config: PreprocessConfig = PreprocessConfig(),
    *,
    manifest: Path | None = None,
    series: Sequence[str] = (),
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Judge every scan as :func:`lungseg.preprocess` would, without writing anything.

    Parameters
    ----------
    scans, config, manifest, series
        As for ``preprocess``.
    output : Path, optional
        Where the store is or will be: its salt, its cases and its free disk are taken into account.
    as_json : bool
        Put a document of JSON types into the result instead of tables.
    execution : Execution
        ``jobs`` and ``shard`` as usual; ``verbose`` adds where each scan lies.

    Returns
    -------
    StageResult
        ``values``: ``rows`` (:class:`CheckRow`, in the order of the scans) and ``estimate`` (:class:`Estimate` or
        None). Exit code 0 if all scans are usable, 8 if some, 3 if none.

    Raises
    ------
    InputError
        If there is nothing to read, or no store can be at ``output``.
    MismatchError
        If the store at ``output`` has other settings and ``execution.overwrite`` is off.
    """
    store = _present_store(output, config, overwrite=execution.overwrite) if output else None
    found = find_scans(scans, config, manifest=manifest, series=series)
    salt = config.salt or (store.salt if store else secrets.token_hex(16))
    sources = with_ids(found.sources, salt)
    require_distinct(sources, locations(sources))
    names = case_names(sources)
    outcomes = run_cases(
        _check_one,
        [for_worker(source) for source in sources],
        salt,
        store,
        config,
        execution.overwrite,
        names=names,
        title="preprocess --check",
        execution=execution,
        isolate=True,
    )
    known = dict(zip(names, sources, strict=True))
    rows = tuple(_row(o, known[o.case_id], store, places=execution.verbose) for o in outcomes)
    by_row = {row: known[outcome.case_id] for row, outcome in zip(rows, outcomes, strict=True)}
    estimate = _estimate(by_row, config, output, execution)
    usable = sum(row.verdict != REFUSED for row in rows)
    result = StageResult(
        "preprocess --check",
        output or Path(),
        values={"rows": rows, "estimate": estimate},
        verdict=0 if usable == len(rows) else 8 if usable else 3,
    )
    notes = [f"{len(rows)} scans: " + ", ".join(_counts(rows)), *found.notes]
    if estimate is None and any(row.num_voxels and not row.complete for row in rows):
        notes.append("no estimate: making one case in memory failed (see the log)")
    if estimate:
        notes.append(estimate.text())
        if not estimate.fits:
            notes.append(
                "warning: the store does not fit there; choose a coarser --spacing, --no-source or another disk"
            )
    if not config.salt and store is None and not all(source.case_id for source in found.sources):
        notes.append("case ids are made anew in every run; with --salt the real run gives these")
    if as_json:
        return replace(result, document=_document(rows, estimate, notes))
    return replace(result, tables=_tables(rows, execution.verbose), notes=tuple(notes))


def _present_store(output: Path, config: PreprocessConfig, *, overwrite: bool) -> Store | None:
    """The store that a real run would add to, refused for the same reasons; None if it would make one."""
    output = Path(output)
    check_store_place(output)
    if not (output / "store.json").exists():
        return None
    store = Store(output)
    if config.salt and config.salt != store.salt:
        raise MismatchError(f"{output} was made with another --salt; use that one or another folder")
    if not overwrite:
        known = {key: value for key, value in store.header["config"].items() if key != "salt"}
        check_current({"config": known}, {"config": config.settings()}, what=f"store {output}")
    return store


def _check_one(source: Source, salt: str, store: Store | None, config: PreprocessConfig, overwrite: bool) -> CaseReturn:
    """Read one scan and judge it; gives back its row."""
    start = time.perf_counter()
    case = identify(source, salt, config)
    case_id = case.source.case_id
    complete = store is not None and store.is_done(
        store.case_file(case_id, "volume"), "volume", case.provenance, overwrite=overwrite
    )
    volume = case.volume or source.read(config.read_options())
    notes: list[str] = []
    if source.reference:
        reference = read_reference(source.reference, salt)
        if store is None or not is_kept(store, case_id, reference, overwrite=overwrite):
            labels_on(reference, volume.geometry, resample=config.resample_masks)
            notes = reference.notes
    crop = crop_to_lungs(volume, config)
    row = CheckRow(
        case_id,
        WARNED if crop.warnings or crop.status else USABLE,
        status=crop.status,
        message="; ".join([*crop.messages, *notes]),
        spacing_mm=volume.geometry.spacing_mm,
        orientation=_stored_plane(volume),
        coverage_mm=round(volume.geometry.extent_mm[0], 2),
        **_values(volume.array),
        lung_ml=round(crop.lung_ml, 1),
        num_patches=len(crop.corners),
        complete=complete,
        seconds=time.perf_counter() - start,
        num_voxels=_stored_voxels(crop, config),
    )
    return DONE, row.message, row


def _stored_voxels(crop: LungCrop, config: PreprocessConfig) -> int:
    return crop.mask.size + (crop.source_mask.size if config.source else 0)


def _stored_plane(volume: Volume) -> str:
    """Plane of the slices as the file stores them: the name of the axis along which they are stacked."""
    stacked = volume.stored_axes.index(0)  # in (z, y, x): S, P, L
    along = np.abs(np.asarray(volume.geometry.direction)[:, stacked])
    return PLANES[stacked] if along.max() > ON_AXIS else "oblique"


def _values(array: np.ndarray) -> dict[str, Any]:
    """Range and modes of the HU of a scan, as fields of :class:`CheckRow`."""
    sample = array[::MODE_STEP, ::MODE_STEP, ::MODE_STEP]
    return {
        "hu_range": (int(array.min()), int(array.max())),
        "air_hu": _mode(sample, AIR_RANGE_HU),
        "body_hu": _mode(sample, BODY_RANGE_HU),
    }


def _mode(sample: np.ndarray, bounds: tuple[int, int]) -> int | None:
    """Most frequent value between two bounds, inclusive; None if there is none."""
    low, high = bounds
    inside = sample[(sample >= low) & (sample <= high)]
    return low + int(np.bincount(inside - low).argmax()) if inside.size else None


def _row(outcome: CaseOutcome, source: Source, store: Store | None, *, places: bool) -> CheckRow:
    """What is shown of one outcome: a refused scan has what its headers say."""
    row = outcome.value
    if row is None:
        row = CheckRow(outcome.case_id, REFUSED)
    known: dict[str, Any] = {"kind": image_format(source.path)}
    candidates = [candidate.series for candidate in source.candidates]
    series = source.series or (candidates[0] if len(candidates) == 1 else None)
    if series is not None:
        said = describe(series)
        known = {key: said[key] for key in ("series", "kind", "orientation", "missing_slices")}
        if outcome.status == FAILED:
            known.update({key: said[key] for key in ("spacing_mm", "coverage_mm")})
    place = str(locations([replace(source, series=series)])[0]) if places else ""
    return replace(row, message=without_names(outcome.message, source, store), place=place, **known)


def _estimate(
    sources: dict[CheckRow, Source], config: PreprocessConfig, output: Path | None, execution: Execution
) -> Estimate | None:
    """From one accepted case of middle size, made in memory; None if there is nothing to do."""
    ahead = sorted((row for row in sources if row.verdict != REFUSED and not row.complete), key=lambda r: r.num_voxels)
    if not ahead:
        return None
    middle = ahead[len(ahead) // 2]
    (measured,) = run_cases(
        _measure_one,
        [for_worker(sources[middle])],
        config,
        names=[middle.case_id],
        title="preprocess --check: estimate",
        execution=replace(execution, shard="", jobs=1),
        isolate=True,
    )
    if measured.value is None:
        return None
    num_bytes, seconds = measured.value
    voxels = sum(row.num_voxels for row in ahead)
    together = min(execution.jobs, len(ahead))
    return Estimate(
        num_cases=len(ahead),
        bytes=round(num_bytes * voxels / middle.num_voxels),
        seconds=(sum(row.seconds for row in ahead) + seconds * voxels / middle.num_voxels) / together,
        free_bytes=_free_bytes(output) if output else None,
    )


def _measure_one(source: Source, config: PreprocessConfig) -> CaseReturn:
    """Make the file of one case in memory; gives back its bytes, and the seconds that checking does not take."""
    volume = source.read(config.read_options())
    crop = crop_to_lungs(volume, config)
    start = time.perf_counter()
    datasets, facts, attributes = case_datasets(volume, crop, config)
    image, _ = artefact_bytes("volume", datasets, provenance=facts, attributes=attributes)
    return DONE, "", (len(image), time.perf_counter() - start)


def _free_bytes(output: Path) -> int:
    """Free space where the output is or will be."""
    present = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    return shutil.disk_usage(present).free


def _counts(rows: Sequence[CheckRow]) -> list[str]:
    counted = [(name, sum(row.verdict == name for row in rows)) for name in (USABLE, WARNED, REFUSED)]
    done = sum(row.complete for row in rows)
    return [f"{count} {name}" for name, count in counted if count] + ([f"{done} in the store already"] if done else [])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _document(rows: Sequence[CheckRow], estimate: Estimate | None, notes: Sequence[str]) -> dict[str, Any]:
    """JSON types of everything shown."""
    cases = []
    for row in rows:
        plain = {**asdict(row), "seconds": round(row.seconds, 3)}
        cases.append({key: value for key, value in plain.items() if key != "place" or value})
    told = {**asdict(estimate), "seconds": round(estimate.seconds, 1), "fits": estimate.fits} if estimate else None
    return {"command": "preprocess --check", "cases": cases, "estimate": told, "notes": list(notes)}


def _tables(rows: Sequence[CheckRow], places: bool) -> tuple[Any, ...]:
    """Verdicts, and what is to be said of the cases that have more than a verdict."""
    from rich import box
    from rich.table import Table

    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
    verdicts = Table(title="verdict on each scan", **style)  # type: ignore[arg-type]
    columns = ("case", "series", "spacing (mm)", "plane", "HU", "air/body", "gaps", "covers", "lung", "verdict")
    for name in columns:
        verdicts.add_column(name, overflow="fold", no_wrap=name not in ("lung", "verdict"))
    for row in rows:
        verdicts.add_row(
            row.case_id,
            row.series or row.kind or "-",
            spacing_text(row.spacing_mm),
            row.orientation or "-",
            "..".join(map(str, row.hu_range)) if row.hu_range else "-",
            f"{_number(row.air_hu)}/{_number(row.body_hu)}" if row.hu_range else "-",
            str(row.missing_slices or "-"),
            f"{row.coverage_mm:.0f} mm" if row.coverage_mm else "-",
            _lung_text(row),
            row.verdict,
        )
    told = [row for row in rows if row.message or row.status or row.place]
    if not told:
        return (verdicts,)
    reasons = Table(title="what was found, and what to do", **style)  # type: ignore[arg-type]
    for name in ("case", "status", "message", *(["where"] if places else [])):
        reasons.add_column(name, overflow="fold", no_wrap=name == "case")
    for row in told:
        status = ", ".join(row.status) or ("-" if row.verdict != REFUSED else REFUSED)
        reasons.add_row(row.case_id, status, row.message, *([row.place] if places else []))
    return verdicts, reasons


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _lung_text(row: CheckRow) -> str:
    if row.lung_ml is None:
        return "-"
    if "no-lung" in row.status:
        return "none"
    return f"{row.lung_ml:.0f} mL" + (" truncated" if "truncated" in row.status else "")

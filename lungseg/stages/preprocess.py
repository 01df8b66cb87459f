"""``lungseg preprocess``: scans in, a patch store out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lungseg.config.execution import Execution
from lungseg.config.preprocess import PreprocessConfig
from lungseg.errors import InputError
from lungseg.scan.sources import Source, locations
from lungseg.scan.volume import Geometry, Volume
from lungseg.stages.cohort import DONE, SKIPPED, CaseOutcome, CaseReturn, StageResult, run_cases
from lungseg.stages.references import Reference, is_kept, labels_on, read_reference, write_reference
from lungseg.stages.scan_case import (
    case_datasets,
    case_names,
    crop_to_lungs,
    find_scans,
    for_worker,
    identify,
    of_studies_present,
    require_distinct,
    with_ids,
    without_names,
)
from lungseg.stages.scan_check import check_scans
from lungseg.stages.scan_list import list_scans as show_scans
from lungseg.store.cases import Store, check_id_map_place, check_store_place, read_id_map, write_id_map
from lungseg.store.locks import lock
from lungseg.store.schema import write_artefact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """What a case gives back besides its files."""

    case_id: str
    patient_id: str
    status: tuple[str, ...] = ()


def preprocess_command(
    scans: Sequence[Path] | None,
    output: Path | None,
    config: PreprocessConfig = PreprocessConfig(),
    *,
    list_scans: bool = False,
    check: bool = False,
    as_json: bool = False,
    series: Sequence[str] = (),
    manifest: Path | None = None,
    id_map: Path | None = None,
    execution: Execution = Execution(),
) -> StageResult:
    """What the command does: :func:`list_scans` and :func:`check_scans` look, :func:`preprocess` works."""
    given = list(scans or ())
    if list_scans:
        return show_scans(given, config, manifest=manifest, series=series, as_json=as_json, execution=execution)
    if check:
        return check_scans(
            given, output, config, manifest=manifest, series=series, as_json=as_json, execution=execution
        )
    assert output is not None  # the command line has seen to it
    return preprocess(given, output, config, manifest=manifest, id_map=id_map, series=series, execution=execution)


def preprocess(
    scans: Sequence[Path] | Path | str | None,
    output: Path,
    config: PreprocessConfig = PreprocessConfig(),
    *,
    manifest: Path | None = None,
    id_map: Path | None = None,
    series: Sequence[str] = (),
    execution: Execution = Execution(),
) -> StageResult:
    """Make a patch store of CT scans, or add to one.

    Parameters
    ----------
    scans : paths
        DICOM folders, zip archives, image files, or folders of them. With a manifest they may be absent, or restrict
        it.
    output : Path
        The store. Complete cases are kept; run the same call again after an interruption.
    config : PreprocessConfig
    manifest : Path, optional
        CSV, see :func:`lungseg.scan.sources.read_manifest`. Its split, patient id, inspiration and reference belong
        to a case like the scan does: other values are refused, and replaced with ``execution.overwrite``. A reference
        named later is added; one that is no longer named is kept.
    id_map : Path, optional
        CSV of case id, patient id and where the scan lies (see :func:`lungseg.scan.sources.locations`), mode 0600,
        outside the store.
    series : sequence of str
        Keys or UIDs of series to take in place of the usual choice.

    Returns
    -------
    StageResult
        One outcome per scan; a bad scan does not stop the others. Messages are free of paths and patient data; the
        log (standard error) may name a file that cannot be used.

    Raises
    ------
    InputError
        If there is nothing to read, or ``output`` or ``id_map`` is unusable: before anything is written.
    MismatchError
        If the store was made with other settings.
    """
    output = Path(output)
    given = [Path(scans)] if isinstance(scans, (str, Path)) else [Path(path) for path in scans or ()]
    _refuse_output_inside(output, given)
    check_store_place(output)
    if id_map:
        check_id_map_place(Path(id_map), output)
        read_id_map(Path(id_map))  # refuses another kind of file before hours of work
    found = find_scans(given, config, manifest=Path(manifest) if manifest else None, series=series)
    _refuse_output_inside(output, [source.path for source in found.sources])
    store = Store.create(
        output,
        config={**config.settings(), "salt": config.salt},
        salt=config.salt,
        provenance="CT scans",
        overwrite=execution.overwrite,
    )
    sources = with_ids(found.sources, store.salt)
    log.info("preprocess: %d scans found", len(sources))
    for note in found.notes:
        log.info("preprocess: %s", note)
    for source in sources:
        for other in source.others:
            log.info("preprocess: %s: %s", source.case_id, source.hide(other))
    names = case_names(sources)
    places = locations(sources)
    require_distinct(sources, places)
    for case_id, others in of_studies_present(sources, store).items():
        log.warning(
            "preprocess: %s: the store holds another series of the same study (case %s): one scan would count twice. "
            "Delete the folder of one of the two cases, or name both in a manifest if that is meant",
            case_id,
            ", ".join(others),
        )
    outcomes = run_cases(
        _preprocess_one,
        [for_worker(source) for source in sources],
        store,
        config,
        execution,
        names=names,
        title="preprocess",
        execution=execution,
        isolate=True,
    )
    if id_map:
        place_of = dict(zip(names, places, strict=True))
        rows = [(o.value.case_id, o.value.patient_id, str(place_of[o.case_id])) for o in outcomes if o.value]
        write_id_map(Path(id_map), output, rows)
    source_of = dict(zip(names, sources, strict=True))
    outcomes = tuple(_final(outcome, source_of[outcome.case_id], store) for outcome in outcomes)
    return StageResult("preprocess", output, outcomes, notes=(f"patch store: {output}",))


def _final(outcome: CaseOutcome, source: Source, store: Store) -> CaseOutcome:
    """With the id of the case, which is known of an image file only once it was read, and without names of files."""
    outcome = replace(outcome, message=without_names(outcome.message, source, store))
    if outcome.value is None:
        return outcome
    return replace(outcome, case_id=outcome.value.case_id, flags=outcome.value.status, value=None)


def _refuse_output_inside(output: Path, scans: Sequence[Path]) -> None:
    for path in scans:
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise InputError(f"output {output} lies inside the input folder {path}; put it elsewhere")


def _preprocess_one(source: Source, store: Store, config: PreprocessConfig, execution: Execution) -> CaseReturn:
    """Write one case; gives back its final ids and status."""
    case = identify(source, store.salt, config)
    case_id, volume = case.source.case_id, case.volume
    written = _Written(case_id, case.source.patient_id)
    path = store.case_file(case_id, "volume")
    with lock(store.lock_file(case_id, "preprocess")):
        done = store.is_done(path, "volume", case.provenance, overwrite=execution.overwrite)
        reference = read_reference(source.reference, store.salt) if source.reference else None
        if reference and is_kept(store, case_id, reference, overwrite=execution.overwrite):
            reference = None
        if volume is None and not done:
            volume = source.read(config.read_options())
        notes = _add_reference(store, case_id, reference, volume, config) if reference else []
        if done or volume is None:
            text = "; ".join(["only the reference was written", *notes]) if reference else ""
            return DONE if reference else SKIPPED, text, written
        crop = crop_to_lungs(volume, config)
        datasets, facts, attributes = case_datasets(volume, crop, config)
        write_artefact(path, "volume", datasets, provenance={**case.provenance, **facts}, attributes=attributes)
    return DONE, "; ".join([*crop.messages, *notes]), replace(written, status=crop.status)


def _add_reference(
    store: Store, case_id: str, reference: Reference, volume: Volume | None, config: PreprocessConfig
) -> list[str]:
    """Write a reference on the grid of its scan, which may be in the store already; returns what to say about it."""
    if volume is None:
        with store.open(case_id, "volume") as artefact:
            scan: dict[str, Any] = artefact.provenance["source"]
    else:
        scan = {
            "full_grid": volume.geometry.to_dict(),
            "stored_axes": list(volume.stored_axes),
            "stored_flips": list(volume.stored_flips),
        }
    labels = labels_on(reference, Geometry.from_dict(scan["full_grid"]), resample=config.resample_masks)
    write_reference(store, case_id, reference, labels, scan)
    return reference.notes

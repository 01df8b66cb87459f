"""What ``lungseg refine --export`` writes: label maps on each scan's own grid, numbers and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungseg.config.execution import Execution
from lungseg.config.refine import RefineConfig
from lungseg.errors import InputError
from lungseg.report.colour_tables import itksnap_labels, slicer_colour_table
from lungseg.report.dicom_measurements import measured_regions
from lungseg.report.overlays import preview_figure_png
from lungseg.report.quantity_tables import CaseQuantities, long_csv, quantities_dict, wide_csv
from lungseg.scan.archives import local_files
from lungseg.scan.dicom_seg_write import require_highdicom, write_segmentation
from lungseg.scan.dicom_sr_write import write_measurements
from lungseg.scan.resample import resample_onto
from lungseg.scan.sources import Source, search
from lungseg.scan.volume import Geometry
from lungseg.stages.case_maps import (
    case_contours,
    case_quantities,
    find_lobe_mask,
    on_full_grid,
    read_lobes,
    source_labels,
)
from lungseg.stages.cohort import DONE, FAILED, CaseOutcome, CaseReturn, output_folder, run_cases
from lungseg.store.atomic import write_bytes, write_json, write_text
from lungseg.store.cases import Store, hashed_id
from lungseg.store.reader import Artefact
from lungseg.tissue import MIXTURE_TISSUES, TISSUES


@dataclass(frozen=True)
class ExportOptions:
    """What is exported beside label maps, numbers and pictures."""

    lobe_mask: Path | None = None
    """Lobe mask of the one case, or a folder of masks named ``<case_id>``."""
    dicom: Mapping[str, Source] | None = None
    """Series by the hash of their identity (see :func:`dicom_series_by_identity`): a DICOM-SEG of each case."""
    posteriors: bool = False
    """Posterior of each tissue too."""
    measurements: bool = False
    """The numbers as a DICOM structured report beside each DICOM-SEG."""


def dicom_series_by_identity(place: Path, store: Store) -> dict[str, Source]:
    """Every DICOM series below a folder, by the hash under which a store made of it knows it.

    Raises
    ------
    ResourceError
        If highdicom is missing: before any work.
    InputError
        If there is no DICOM series.
    """
    require_highdicom()
    found = {}
    for source in search([place]).sources:
        for candidate in source.candidates:
            one = dataclasses.replace(source, series=candidate.series, candidates=(candidate,))
            if key := one.key():
                found[hashed_id(store.salt, key)] = one
    if not found:
        raise InputError(f"--source {place} holds no DICOM series with a SeriesInstanceUID; NIfTI needs no --source")
    return found


def export_cases(
    store: Store,
    case_ids: list[str],
    config: RefineConfig,
    folder: Path,
    options: ExportOptions,
    *,
    execution: Execution,
) -> tuple[CaseOutcome, ...]:
    """Write the files of each case, and the tables of all; the outcomes hold the numbers of each case."""
    whole = dataclasses.replace(execution, shard="")  # these are this shard's cases already
    # each case takes its own series along, not those of all
    items = [(case_id, _source_of(store, case_id, options.dicom)) for case_id in case_ids]
    options = dataclasses.replace(options, dicom={} if options.dicom is not None else None)
    exported = run_cases(
        _export_one, items, store, config, folder, options, names=case_ids, title="export", execution=whole
    )
    quantities = {outcome.case_id: outcome.value for outcome in exported if outcome.value is not None}
    number = execution.shard.partition("/")[0]
    write_tables(folder, quantities, suffix=f"-{number}" if number else "")
    write_text(folder / "tissues.ctbl", slicer_colour_table())
    write_text(folder / "tissues-itksnap.txt", itksnap_labels())
    return exported


def _source_of(store: Store, case_id: str, known: Mapping[str, Source] | None) -> Source | None:
    """The series that a case was made of, if it is known."""
    if not known:
        return None
    with store.open(case_id, "volume") as volume:
        return known.get(volume.provenance["inputs"]["scan"])


def write_tables(folder: Path, quantities: Mapping[str, CaseQuantities], *, suffix: str = "") -> None:
    """Numbers of a cohort: ``quantification.csv`` (long), ``quantification-wide.csv``, ``quantification.json``."""
    write_text(folder / f"quantification{suffix}.csv", long_csv(quantities))
    write_text(folder / f"quantification-wide{suffix}.csv", wide_csv(quantities))
    write_json(folder / f"quantification{suffix}.json", quantities_dict(quantities))


def _export_one(
    item: tuple[str, Source | None], store: Store, config: RefineConfig, folder: Path, options: ExportOptions
) -> CaseReturn:
    """Write one case's label map and picture; gives back its numbers."""
    from lungseg.scan.nifti import write_image

    case_id, source = item
    with store.open(case_id, "volume") as volume, store.open(case_id, "labels", config.name) as artefact:
        artefact.require_input("volume.h5", volume.fingerprint)
        labels = artefact.read("labels")
        facts = volume.provenance
        moved, lungs, image = source_labels(volume, labels)
        lobes = None
        if options.lobe_mask is not None:
            lobes = read_lobes(find_lobe_mask(options.lobe_mask, case_id), volume, lungs, config)
        whole, full = on_full_grid(volume, moved)
        stored = {key: facts["source"][key] for key in ("stored_axes", "stored_flips")}
        write_image(folder / f"{case_id}.nii.gz", whole, full, **stored)
        picture = preview_figure_png(
            volume.read("image"),
            labels,
            volume.read("mask"),
            spacing_mm=tuple(facts["grid"]["spacing_mm"]),
            title=case_id,
        )
        write_bytes(folder / f"{case_id}.png", picture)
        if options.posteriors:
            _write_posteriors(case_id, store, config, folder, volume)
        numbers = case_quantities(volume, config, labels, moved, lungs, image, lobes=lobes)
        if options.dicom is not None and (refusal := _write_dicom_seg(volume, whole, full, folder, source)):
            offer = f"no DICOM-SEG: {refusal}. Its label map is there as NIfTI ({case_id}.nii.gz)"
            return FAILED, offer, numbers
        if options.measurements and (refusal := _write_dicom_sr(case_id, numbers, folder)):
            return FAILED, f"no DICOM-SR: {refusal}. Its numbers are in quantification.csv", numbers
        return DONE, "", numbers


def _write_posteriors(case_id: str, store: Store, config: RefineConfig, folder: Path, volume: Artefact) -> None:
    """Percent of each tissue as ``posteriors/<case_id>-<tissue>.nii.gz``: they are no label maps.

    They are those that the contours were drawn from. ``-entropy`` is that of the five, in percent of the greatest one.
    """
    from scipy.special import entr

    from lungseg.scan.nifti import write_image

    facts = volume.provenance
    with store.open(case_id, "clusters", config.name) as clusters:
        clusters.require_input("volume.h5", volume.fingerprint)
        drawn = case_contours(volume, clusters, config)
    names = [TISSUES[tissue].name for tissue in MIXTURE_TISSUES]
    maps = [*drawn.posterior, sum(entr(own.astype(np.float32)) for own in drawn.posterior) / np.log(len(names))]
    grid, source = Geometry.from_dict(facts["grid"]), Geometry.from_dict(facts["source"]["grid"])
    stored = {key: facts["source"][key] for key in ("stored_axes", "stored_flips")}
    place = output_folder(folder / "posteriors")
    for name, own in zip((*names, "entropy"), maps, strict=True):
        percent = np.zeros(drawn.labels.shape, dtype=np.uint8)
        percent[drawn.region] = np.round(100 * np.clip(own.astype(np.float32), 0, 1))
        whole, full = on_full_grid(volume, resample_onto(percent, grid, source, kind="mask", fill=0))
        write_image(place / f"{case_id}-{name}.nii.gz", whole, full, **stored)


def _write_dicom_seg(volume: Artefact, labels: np.ndarray, grid: Geometry, folder: Path, source: Source | None) -> str:
    """Write ``<case_id>.seg.dcm``; returns why it cannot be written, without names, or ''."""
    facts = volume.provenance
    path = folder / f"{facts['case_id']}.seg.dcm"
    for file in (path, folder / f"{facts['case_id']}.sr.dcm"):
        file.unlink(missing_ok=True)  # of another run: its UIDs are not those of this map
    if source is None or source.series is None:
        return (
            "no series below --source is the scan that this case was made of (give what preprocess was given: more or "
            "fewer files of a series make it another one)"
        )
    series = source.series
    stored = {key: facts["source"][key] for key in ("stored_axes", "stored_flips")}
    try:
        with local_files(series.files, source.archives) as real:
            files = [real[file] for file in series.files]
            write_segmentation(path, labels, grid, series, files, status=facts.get("status", ()), **stored)
    except InputError as error:
        return source.hide(str(error)).rstrip(".")
    return ""


def _write_dicom_sr(case_id: str, numbers: CaseQuantities, folder: Path) -> str:
    """Write ``<case_id>.sr.dcm`` about ``<case_id>.seg.dcm``; returns why it cannot be written, or ''."""
    try:
        write_measurements(folder / f"{case_id}.sr.dcm", measured_regions(numbers), folder / f"{case_id}.seg.dcm")
    except InputError as error:
        return str(error).rstrip(".")
    return ""

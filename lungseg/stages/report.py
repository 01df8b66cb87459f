"""``lungseg report``: pages of a cohort and of each scan, that open from disk and fetch nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg import __version__
from lungseg.config.execution import Execution
from lungseg.config.report import ReportConfig
from lungseg.errors import InputError, UsageError
from lungseg.report.agreement import Agreement
from lungseg.report.case_page import case_page
from lungseg.report.density import Histogram
from lungseg.report.overlays import preview_figure_png
from lungseg.report.page import Picture, cohort_page
from lungseg.report.quantity_tables import CaseQuantities, quantities_dict
from lungseg.report.slices import encode_slices
from lungseg.report.summary import CaseSummary, ranked, shares_table
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry
from lungseg.stages.case_maps import case_quantities, find_lobe_mask, read_lobes, source_labels
from lungseg.stages.cohort import DONE, FAILED, CaseReturn, StageResult, output_folder, run_cases
from lungseg.stages.export import write_tables
from lungseg.stages.pictures import MAX_PAGE_BYTES, WORST_PAIRS, stage_pictures
from lungseg.stages.report_scores import read_agreement, scores_of_other_maps
from lungseg.store.atomic import write_bytes, write_text
from lungseg.store.cases import Store
from lungseg.store.reader import Artefact
from lungseg.tissue import OUTSIDE

log = logging.getLogger(__name__)

FOLDERS = {"scores": "Evaluation", "model": "Training", "synthetic": "Synthesis"}
"""Folders beside the store, as `lungseg run` makes them, whose pictures the page shows."""
SURE = 128
"""Confidence (0 to 255) from which a label has a posterior of at least one half."""


@dataclass(frozen=True)
class Beside:
    """What other stages left beside a store."""

    scores: Path | None = None
    """Output folder of `evaluate`."""
    asked: bool = False
    """The user named ``scores``."""
    pictures: tuple[tuple[str, Path], ...] = ()
    """Titles and folders of pictures."""

    @classmethod
    def found(cls, place: Path, pictures: Sequence[Path] = (), *, scores: Path | None = None) -> Beside:
        """In the folder that `run` makes, and what was named besides."""
        own = [(title, place / name) for name, title in FOLDERS.items() if name != "scores"]
        return cls(
            scores or place / "scores", scores is not None, (*own, *(("More", Path(folder)) for folder in pictures))
        )


def report(
    results: Store | Path | str,
    output: Path,
    config: ReportConfig = ReportConfig(),
    *,
    lobe_mask: Path | None = None,
    scores: Path | None = None,
    pictures: Sequence[Path] = (),
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Write ``index.html``, a page and a preview for each scan, and the tables of all numbers.

    Parameters
    ----------
    results : store or path
        A patch store with label maps, or a folder that `lungseg run` has made: its scores, and the pictures of its
        training and evaluation, are shown too.
    output : Path
        Folder: ``index.html``, ``cases/<case_id>.html``, ``previews/<case_id>.png``, ``pictures/``, the evaluation's
        ``worst.html``, and the tables of `refine`.
    config : ReportConfig
    lobe_mask : path, optional
        As for :func:`lungseg.stages.refine.refine`.
    scores : path, optional
        Output folder of `evaluate`: scores beside the numbers of each scan.
    pictures : sequence of paths
        Folders whose pictures are shown: a training run, ``fits/<name>``, a store of `synthesize`.
    as_json : bool
        The result's document holds the ranking and all numbers.

    Raises
    ------
    InputError
        If no case has a label map under this name, a folder is not there, or ``scores`` holds none of this map.
    """
    store = results if isinstance(results, Store) else _find_store(Path(results))
    place = store.path.parent if isinstance(results, Store) else Path(results)
    shown = [Path(folder) for folder in pictures or ()]
    for folder in shown:
        if not folder.is_dir():
            raise InputError(f"--pictures {folder}: no such folder")
    beside = Beside.found(place, shown, scores=Path(scores) if scores else None)
    lobes = Path(lobe_mask) if lobe_mask else None
    result = report_pages(store, Path(output), config, lobe_mask=lobes, beside=beside, execution=execution)
    return result if as_json else dataclasses.replace(result, document=None)


def report_pages(
    store: Store,
    output: Path,
    config: ReportConfig,
    *,
    lobe_mask: Path | None = None,
    beside: Beside | None = None,
    quantities: Mapping[str, CaseQuantities] | None = None,
    execution: Execution = Execution(),
) -> StageResult:
    """What :func:`report` writes, with a document of all numbers.

    Parameters
    ----------
    store, output, config, lobe_mask, execution
        As for :func:`report`.
    beside : Beside, optional
        What other stages left, to be shown too.
    quantities : mapping of case id to CaseQuantities, optional
        Numbers counted already by `refine` with the same settings, so that they are not counted again.
    """
    case_ids = store.require_cases()
    if not any(store.case_file(case_id, "labels", config.name).exists() for case_id in case_ids):
        raise InputError(f"store {store.path} has no label map '{config.name}': run lungseg refine {store.path} first")
    if lobe_mask and lobe_mask.is_file() and len(case_ids) > 1:
        raise UsageError(f"--lobe-mask: one file for {len(case_ids)} cases; give a folder of <case_id>.nii.gz")
    beside = beside or Beside()
    agreement = read_agreement(beside.scores, config.name, asked=beside.asked) if beside.scores else {}
    folder = output_folder(output)
    for part in ("cases", "previews"):
        output_folder(folder / part)
    others: frozenset[str] = frozenset()
    if agreement and beside.scores:
        others = scores_of_other_maps(beside.scores, config.name, store, agreement)
    if others:
        log.warning("report: %d scans were scored with another map than theirs is now: %s is not shown for them, nor "
                    "its pictures; run lungseg evaluate again", len(others), beside.scores)  # fmt: skip
        beside = dataclasses.replace(beside, scores=None)
    items = [
        (case_id, (quantities or {}).get(case_id), None if case_id in others else agreement.get(case_id),
         case_id in others)
        for case_id in case_ids
    ]  # fmt: skip
    outcomes = run_cases(
        _report_one, items, store, config, folder, lobe_mask,
        names=case_ids, title="report", execution=execution,
    )  # fmt: skip
    summaries = [outcome.value for outcome in outcomes if outcome.value is not None]
    left_out = {o.case_id: o.message for o in outcomes if o.value is None}
    page = cohort_page(
        summaries,
        title=config.title,
        left_out=left_out,
        pictures=_pictures(store, config.name, beside, folder),
        worst_pairs=_worst_pairs(beside, folder),
        provenance=[("lungseg", __version__), ("label maps", config.name), ("store", store.header["provenance"])],
    )
    write_text(folder / "index.html", page)
    write_tables(folder, {summary.case_id: summary.quantities for summary in summaries})
    return StageResult(
        "report", folder, outcomes, tables=(shares_table(summaries),), notes=(f"open {folder / 'index.html'}",),
        document=_document(summaries, left_out),
    )  # fmt: skip


def _find_store(path: Path) -> Store:
    """The store at a path, or in a folder that `run` made."""
    for place in (path, path / "store"):
        if (place / "store.json").is_file():
            return Store(place)
    return Store(path)  # says what is wrong


def _pictures(store: Store, name: str, beside: Beside, output: Path) -> list[Picture]:
    """Pictures that other stages left, written below ``output`` too, where they can be looked at in full size."""
    folders = [("Evaluation", beside.scores)] if beside.scores else []
    shown = stage_pictures([*folders, ("Clustering", store.fit_dir(name)), *beside.pictures])
    for picture in shown:
        output_folder((output / picture.address).parent)
        write_bytes(output / picture.address, picture.png)
    return shown


def _worst_pairs(beside: Beside, output: Path) -> str:
    """Copy the page of the worst class-case pairs; its address, or '' if there is none."""
    path = beside.scores / WORST_PAIRS if beside.scores else None
    if path is None or not path.is_file() or path.stat().st_size > MAX_PAGE_BYTES:
        return ""
    write_bytes(output / WORST_PAIRS, path.read_bytes())
    return WORST_PAIRS


def _report_one(
    item: tuple[str, CaseQuantities | None, Agreement | None, bool],
    store: Store,
    config: ReportConfig,
    folder: Path,
    lobe_mask: Path | None,
) -> CaseReturn:
    """Write one scan's page and preview; gives back its summary."""
    case_id, quantities, agreement, scored_another_map = item
    if not store.case_file(case_id, "labels", config.name).exists():
        return FAILED, f"no label map '{config.name}' yet: run lungseg refine {store.path}"
    with store.open(case_id, "volume") as volume, store.open(case_id, "labels", config.name) as artefact:
        artefact.require_input("volume.h5", volume.fingerprint)
        labels, confidence = artefact.read("labels"), artefact.read("confidence")
        if quantities is None:
            quantities = _quantities(volume, labels, config, case_id, lobe_mask)
        mask, image = volume.read("mask"), volume.read("image")
        histogram = _histogram(volume)
        facts = volume.provenance
        made = _provenance(volume, artefact)
        reference = _reference(store, case_id, Geometry.from_dict(facts["grid"]))
    spacing = tuple(facts["grid"]["spacing_mm"])
    stack = encode_slices(
        image, labels, mask, spacing_mm=spacing, confidence=confidence, reference=reference,
        num_slices=config.num_slices, width_px=config.width_px,
    )  # fmt: skip
    preview = preview_figure_png(
        image, labels, mask, spacing_mm=spacing, title=case_id, reference=reference, confidence=confidence,
        histogram=histogram,
    )  # fmt: skip
    num_lung = int(np.count_nonzero(mask))
    doubtful = int(np.count_nonzero((confidence < SURE) & (mask != OUTSIDE)))
    summary = CaseSummary(
        case_id,
        quantities,
        stack.thumbnail,
        100.0 * doubtful / num_lung if num_lung else None,
        f"cases/{case_id}.html",
        agreement,
        scored_another_map,
    )
    page = case_page(
        summary, stack, histogram=histogram, preview=preview, spacing_z_mm=spacing[0], provenance=made,
        back="../index.html",
    )  # fmt: skip
    write_bytes(folder / "previews" / f"{case_id}.png", preview)
    write_text(folder / "cases" / f"{case_id}.html", page)
    return DONE, "", summary


def _quantities(
    volume: Artefact, labels: np.ndarray, config: ReportConfig, case_id: str, lobe_mask: Path | None
) -> CaseQuantities:
    moved, lungs, image = source_labels(volume, labels)
    lobes = read_lobes(find_lobe_mask(lobe_mask, case_id), volume, lungs, config) if lobe_mask else None
    return case_quantities(volume, config, labels, moved, lungs, image, lobes=lobes)


def _histogram(volume: Artefact) -> Histogram | None:
    """HU of both lungs on the scan's own grid; None if the store leaves that out."""
    if "source/image" not in volume:
        return None
    hu = volume.read("source/image")[volume.read("source/mask") != OUTSIDE]
    if not hu.size:
        return None
    lowest = int(hu.min())
    return Histogram.of_counts(np.bincount(hu.astype(np.int32) - lowest), lowest)


def _reference(store: Store, case_id: str, grid: Geometry) -> np.ndarray | None:
    """Expert annotation on the working grid, if there is any."""
    if not store.case_file(case_id, "reference").exists():
        return None
    with store.open(case_id, "reference") as artefact:
        own = Geometry.from_dict(artefact.provenance["grid"])
        return resample_onto(artefact.read("labels"), own, grid, kind="mask", fill=OUTSIDE)


def _provenance(volume: Artefact, labels: Artefact) -> list[tuple[str, str]]:
    """What was scanned and how its map was made, for people; nothing that names the patient."""
    facts = volume.provenance
    acquisition = facts.get("acquisition", {})
    source = facts["source"]["full_grid"]
    pairs = [
        ("Scan", " x ".join(str(n) for n in source["shape"]) + " voxels (z, y, x)"),
        ("Voxel", " x ".join(f"{step:.4g}" for step in source["spacing_mm"]) + " mm"),
    ]
    for key, title, unit in (
        ("manufacturer", "Manufacturer", ""), ("kernel", "Kernel", ""), ("kvp", "Tube voltage", " kVp"),
        ("slice_thickness_mm", "Slice thickness", " mm"),
    ):  # fmt: skip
        value = acquisition.get(key)
        pairs.append((title, f"{value}{unit}" if value not in (None, "") else "not stated"))
    pairs.append(("Breath", facts.get("inspiration") or "not stated"))
    pairs.append(("Working grid", f"{facts['grid']['spacing_mm'][0]:.4g} mm"))
    pairs.append(("Made by", f"lungseg {labels.provenance['lungseg_version']}"))
    pairs.append(("Settings of the map", json.dumps(labels.provenance["config"], sort_keys=True)))
    pairs += [(f"Fingerprint of {name}", mark) for name, mark in sorted(labels.provenance["inputs"].items())]
    return pairs


def _document(summaries: list[CaseSummary], left_out: Mapping[str, str]) -> dict[str, Any]:
    """JSON types: the ranking, what to look out for, and all numbers."""
    ranking = [
        {
            "case": summary.case_id,
            "why": summary.why,
            "finding": summary.finding,
            "cautions": summary.cautions,
            "uncertain_pct": summary.uncertain_pct,
            "page": summary.page,
            "mean_dice": summary.agreement.dice if summary.agreement else None,
            "mean_hd95_mm": summary.agreement.hd95_mm if summary.agreement else None,
        }
        for summary in ranked(summaries)
    ]
    numbers = quantities_dict({summary.case_id: summary.quantities for summary in summaries})
    return {"stage": "report", "ranking": ranking, "left_out": dict(left_out), "quantification": numbers}

"""``lungseg extract-radiomics``: the 34 descriptors of windows of every lung, and their standardisation."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lungseg.config.execution import Execution, resolve_device
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.fields import to_dict
from lungseg.errors import InputError, MismatchError, StoreError
from lungseg.radiomics.descriptor import (
    DESCRIPTOR_VERSION,
    IBSI_CODES,
    Standardisation,
    compute_descriptors,
    feature_names,
)
from lungseg.radiomics.glcm import Aggregation
from lungseg.radiomics.picture import descriptor_figure_png
from lungseg.radiomics.pyradiomics import compute_descriptors_pyradiomics
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import AIR_HU, Geometry
from lungseg.stages.cohort import DONE, FAILED, SKIPPED, StageResult, limited_threads, run_cases
from lungseg.store.atomic import atomic_path, read_json, write_bytes, write_json
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.patches import grid_corners, mask_fractions, read_box
from lungseg.store.schema import check_current, make_provenance, write_artefact
from lungseg.tissue import OUTSIDE, Tissue

log = logging.getLogger(__name__)

BATCH_BYTES = 64 * 2**20
"""int16 windows gathered at once."""
SAMPLED_VOXELS = 20_000_000
"""Voxels a case looked at for the standardisation of one window size, at most."""
PICTURED_WINDOWS = 2000
"""Windows of a case in the picture, at most."""


def extract_radiomics(
    store: Store | Path | str, config: RadiomicsConfig = RadiomicsConfig(), *, execution: Execution = Execution()
) -> StageResult:
    """Write ``radiomics.h5`` for each case and ``standardisation.json`` for the store.

    The standardisation (median and interquartile range of each feature, per window size) is taken over the cases
    whose split is ``train`` or not stated, equally many windows a case, and is what ``train-ddpm`` needs. Cases that
    failed are left out of it and named in a note; when the same command completes them later, it is made again.

    With ``config.csv`` the descriptors of the complete cases are also written as ``radiomics.csv``, with
    ``config.picture`` as ``radiomics.png``, both in the store. The picture is the only thing here that reads the
    references; nothing else reads the picture.

    Raises
    ------
    InputError
        If the store holds no case.
    MismatchError
        If results of other settings exist and ``execution.overwrite`` is off.
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    case_ids = store.require_cases()
    device = resolve_device(execution.device)
    outcomes = run_cases(
        _extract_one, case_ids, store, config, device, execution.overwrite,
        names=case_ids, title="extract-radiomics", execution=execution,
    )  # fmt: skip
    result = StageResult("extract-radiomics", store.path, outcomes)
    if execution.shard:
        others = [f"radiomics.{end}" for end, asked in (("csv", config.csv), ("png", config.picture)) if asked]
        files = " and ".join(["standardisation.json", *others])
        note = f"{files} {'are' if others else 'is'} written by a run without --shard, when all shards are done"
        return StageResult("extract-radiomics", store.path, outcomes, notes=(note,))
    failed = [outcome.case_id for outcome in outcomes if outcome.status == FAILED]
    if len(failed) == len(case_ids):
        return result
    notes = _standardise(store, case_ids, failed, config, device, execution)
    complete = [outcome.case_id for outcome in outcomes if outcome.status in (DONE, SKIPPED)]
    if config.csv:
        notes += (_export_csv(store, complete, config),)
    if config.picture:
        notes += (_draw(store, complete, config),)
    return StageResult("extract-radiomics", store.path, outcomes, notes=notes)


def _extract_one(case_id: str, store: Store, config: RadiomicsConfig, device: str, overwrite: bool) -> tuple[str, str]:
    path = store.case_file(case_id, "radiomics")
    with lock(store.lock_file(case_id, "radiomics")), store.open(case_id, "volume") as volume:
        settings = {k: v for k, v in to_dict(config).items() if k in _FEATURE_SETTINGS}
        settings["descriptor_version"] = DESCRIPTOR_VERSION  # compared with what is there, unlike the extras below
        wanted = make_provenance(
            "extract-radiomics",
            settings,
            inputs={"volume.h5": volume.fingerprint},
            descriptor_version=DESCRIPTOR_VERSION,
            feature_names=list(feature_names(mcc=config.mcc)),
            ibsi_codes={name: IBSI_CODES[name] for name in feature_names(mcc=config.mcc) if name in IBSI_CODES},
        )
        if store.is_done(path, "radiomics", wanted, overwrite=overwrite):
            return SKIPPED, ""
        image, mask = volume.read("image"), volume.read("mask")
        size = (config.window,) * 3
        corners = grid_corners(mask.shape, size, (config.stride,) * 3)
        corners = corners[mask_fractions(mask, corners, size) >= max(config.min_lung_fraction, 1e-9)]
        features = _describe(image, mask, corners, size, config, volume.provenance["lung_median_hu"], device)
        write_artefact(path, "radiomics", {"corner": corners, "features": features}, provenance=wanted)
    return DONE, "" if len(corners) else "no window with enough lung"


_FEATURE_SETTINGS = ("window", "stride", "min_lung_fraction", "backend", "aggregation", "mcc")
"""Settings that a case's features depend on; the others belong to the standardisation."""


def _describe(
    image: np.ndarray,
    mask: np.ndarray,
    corners: np.ndarray,
    size: Sequence[int],
    config: RadiomicsConfig,
    lung_median_hu: float,
    device: str,
) -> np.ndarray:
    """Descriptors float32 (N, 34) of the windows at ``corners``."""
    step = max(1, BATCH_BYTES // (2 * int(np.prod(size))))
    aggregation = cast(Aggregation, config.aggregation)
    rows = [np.zeros((0, len(feature_names())), dtype=np.float32)]
    for start in range(0, len(corners), step):
        part = corners[start : start + step]
        hu = np.stack([read_box(image, corner, size, AIR_HU) for corner in part])
        lung = np.stack([read_box(mask, corner, size, 0) > 0 for corner in part])
        patches = torch.from_numpy(hu).to(device, torch.float32)
        masks = torch.from_numpy(lung).to(device)
        median = torch.full((len(part),), float(lung_median_hu), device=device)
        compute = compute_descriptors_pyradiomics if config.backend == "pyradiomics" else compute_descriptors
        values = compute(patches, masks, lung_median_hu=median, aggregation=aggregation, mcc=config.mcc)
        rows.append(values.cpu().numpy())
    return np.concatenate(rows)


def _export_csv(store: Store, case_ids: Sequence[str], config: RadiomicsConfig) -> str:
    """Write ``radiomics.csv``: case, corner of the window, features; returns a note for the user."""
    path, rows = store.path / "radiomics.csv", 0
    with (
        lock(path.with_name("radiomics.csv.lock")),
        atomic_path(path) as partial,
        partial.open("w", encoding="utf-8", newline="") as stream,
    ):
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["case_id", "corner_z", "corner_y", "corner_x", *feature_names(mcc=config.mcc)])
        for case_id in case_ids:
            with store.open(case_id, "radiomics") as radiomics:
                corners, features = radiomics.read("corner"), radiomics.read("features")
            for corner, row in zip(corners.tolist(), features, strict=True):
                table.writerow([case_id, *corner, *(f"{value:.9g}" for value in row)])
            rows += len(corners)
    return f"{rows} windows of {len(case_ids)} cases are in {path.name}"


def _draw(store: Store, case_ids: Sequence[str], config: RadiomicsConfig) -> str:
    """Write ``radiomics.png`` from windows taken evenly from the cases; returns a note for the user."""
    size = (config.window,) * 3
    parts, tissues, with_reference = [], [], 0
    for case_id in case_ids:
        with store.open(case_id, "radiomics") as radiomics:
            corners, features = radiomics.read("corner"), radiomics.read("features")
        step = max(1, -(-len(corners) // PICTURED_WINDOWS))
        corners, features = corners[::step], features[::step]
        found = np.zeros(len(corners), dtype=np.uint8)
        if store.case_file(case_id, "reference").exists():
            with_reference += 1
            with store.open(case_id, "reference") as reference, store.open(case_id, "volume") as volume:
                # references are kept on the whole scan's grid, descriptors on that of the resampled lungs
                grids = [Geometry.from_dict(artefact.provenance["grid"]) for artefact in (reference, volume)]
                labels = resample_onto(reference.read("labels"), *grids, kind="mask", fill=OUTSIDE)
                found = _window_tissues(labels, volume.read("mask"), corners, size)
        parts.append(features)
        tissues.append(found)
    described = np.concatenate(parts)
    if np.count_nonzero(np.isfinite(described).all(1)) < 3:
        return "radiomics.png is not written: fewer than three windows have a descriptor"
    picture = descriptor_figure_png(
        described,
        feature_names(mcc=config.mcc),
        title=f"Radiomic descriptor, windows of {config.window} voxels, {len(case_ids)} cases ({config.backend})",
        tissues=np.concatenate(tissues) if with_reference else None,
    )
    with lock(store.path / "radiomics.png.lock"):
        write_bytes(store.path / "radiomics.png", picture)
    return f"radiomics.png shows {len(described)} windows; {with_reference} of {len(case_ids)} cases have a reference"


def _window_tissues(labels: np.ndarray, mask: np.ndarray, corners: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Tissue that fills more than half of the lung of each window, 0 where none does; uint8 (N,)."""
    lung = mask_fractions(mask, corners, size)
    result = np.zeros(len(corners), dtype=np.uint8)
    for tissue in Tissue:
        result[mask_fractions((labels == tissue) & (mask > 0), corners, size) > 0.5 * lung] = tissue
    return result


def _standardise(
    store: Store, case_ids: list[str], failed: Sequence[str], config: RadiomicsConfig, device: str, execution: Execution
) -> tuple[str, ...]:
    """Write the store's standardisation from windows sampled in the training cases; returns notes for the user."""
    path = store.path / "standardisation.json"
    with lock(store.path / "standardisation.json.lock"), limited_threads(execution.threads):
        try:
            found = find_training_cases(store, [case_id for case_id in case_ids if case_id not in failed])
        except InputError:
            if not failed:
                raise
            return ("standardisation.json is not written: no training case is complete",)
        training = list(found.fingerprints)
        left_out = sorted({*failed, *found.unreadable})
        notes = (f"standardisation.json leaves out {', '.join(left_out)}",) if left_out else ()
        settings = {k: v for k, v in to_dict(config).items() if k not in ("window", "stride", "csv", "picture")}
        settings["descriptor_version"] = DESCRIPTOR_VERSION
        wanted = make_provenance("extract-radiomics", settings, inputs=found.fingerprints, left_out=left_out)
        if path.exists() and not execution.overwrite:
            there = _sections(path)["provenance"]
            if not _completes(there, wanted):
                # a case that fails now may well have been complete when the statistics were taken
                kept = {case_id: there["inputs"][case_id] for case_id in left_out if case_id in there["inputs"]}
                check_current(there, {**wanted, "inputs": {**wanted["inputs"], **kept}}, what=str(path))
                missing = [case_id for case_id in left_out if case_id not in kept]
                return (f"standardisation.json leaves out {', '.join(missing)}",) if missing else ()
            log.warning("extract-radiomics: %s left out cases that are complete now; making it again", path)
        windows = {}
        sizes = [(window,) * 3 for window in config.standardisation_windows]
        for size in [*sizes, tuple(store.header["config"]["patch_size"])]:
            samples = [_sample(store, case_id, size, config, device) for case_id in training]
            features = torch.from_numpy(np.concatenate(samples))
            fitted = Standardisation.fit(features, window=size, feature_names=feature_names(mcc=config.mcc))
            windows[_key(size)] = fitted.to_dict()
        write_json(path, {"provenance": wanted, "windows": windows})
        return notes


def _completes(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a standardisation differs from the wanted one only by cases it says it had to leave out."""
    added = set(wanted["inputs"]) - set(there["inputs"])
    shared = {case_id: mark for case_id, mark in wanted["inputs"].items() if case_id not in added}
    same = shared == there["inputs"] and wanted["config"] == there["config"]
    return same and bool(added) and added <= set(there.get("left_out", []))


def _key(size: Sequence[int]) -> str:
    """Name of a window size in standardisation.json: ``8x8x8``."""
    return "x".join(str(int(n)) for n in size)


@dataclass(frozen=True)
class TrainingCases:
    """Cases a model may learn from."""

    fingerprints: dict[str, str]
    """Fingerprint of the volume of each, by case id in the order asked for."""
    unreadable: tuple[str, ...]
    """Cases whose volume cannot be opened, of whatever split."""


def find_training_cases(store: Store, case_ids: Sequence[str]) -> TrainingCases:
    """Cases a model may learn from: split `train` or not stated, with at least one patch.

    A case whose ``volume.h5`` cannot be opened is left out with a warning.

    Raises
    ------
    InputError
        If there is none.
    """
    fingerprints, unreadable = {}, []
    for case_id in case_ids:
        try:
            with store.open(case_id, "volume") as volume:
                if volume.provenance.get("split", "") in ("", "train") and volume.shape("patches/corner")[0]:
                    fingerprints[case_id] = volume.fingerprint
        except (StoreError, MismatchError) as error:
            unreadable.append(case_id)
            log.warning("%s is left out of training: %s (see: lungseg doctor %s)", case_id, error, store.path)
    if not fingerprints:
        broken = f", or unreadable ({', '.join(unreadable)}; see: lungseg doctor {store.path})" if unreadable else ""
        raise InputError(f"store {store.path} has no training case: all are of another split, or without lung{broken}")
    return TrainingCases(fingerprints, tuple(unreadable))


def training_cases(store: Store, case_ids: list[str]) -> list[str]:
    """Ids of :func:`find_training_cases`."""
    return list(find_training_cases(store, case_ids).fingerprints)


def _sample(store: Store, case_id: str, size: Sequence[int], config: RadiomicsConfig, device: str) -> np.ndarray:
    """Descriptors of windows centred on lung voxels drawn at random: a function of (seed, case, size) only."""
    with store.open(case_id, "volume") as volume:
        image, mask = volume.read("image"), volume.read("mask")
        median = volume.provenance["lung_median_hu"]
    digest = hashlib.sha256(f"{config.seed}/{case_id}/{_key(size)}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))
    voxels = np.flatnonzero(mask)
    # a large window costs much more than it adds: keep the voxels looked at in bounds
    count = min(config.samples_per_case, len(voxels), max(10, SAMPLED_VOXELS // int(np.prod(size))))
    chosen = np.sort(rng.choice(voxels, size=count, replace=False))
    corners = np.stack(np.unravel_index(chosen, mask.shape), axis=1) - np.asarray(size) // 2
    pad = max(size)
    fractions = mask_fractions(np.pad(mask > 0, pad), corners + pad, size)  # windows may begin outside the volume
    return _describe(image, mask, corners[fractions >= config.min_lung_fraction], size, config, median, device)


def load_standardisation(store: Store, size: Sequence[int]) -> Standardisation:
    """The store's standardisation of windows of ``size`` voxels (z, y, x).

    Raises
    ------
    InputError
        If it has not been made, or not for this size.
    """
    path = store.path / "standardisation.json"
    command = f"lungseg extract-radiomics {store.path} --standardisation-windows {size[0]}"
    if not path.exists():
        raise InputError(f"{path} is missing: run {command}")
    windows = _sections(path)["windows"]
    if _key(size) not in windows:
        known = ", ".join(sorted(windows))
        raise InputError(f"{path} has windows {known} but not {_key(size)}: run {command} --overwrite")
    return Standardisation.from_dict(windows[_key(size)])


def check_standardisation(store: Store, standardisation: Standardisation, *, cases: TrainingCases, mcc: bool) -> None:
    """Refuse a standardisation that is not of the present training volumes or not of the teacher's features.

    Parameters
    ----------
    standardisation : Standardisation
        As ``load_standardisation`` gave it from ``store``.
    cases : TrainingCases
        What is to be trained on. Cases the standardisation left out because their extraction failed may be among
        them; it may be of cases that have become unreadable since.
    mcc : bool
        Whether the teacher computes the maximal correlation coefficient.

    Raises
    ------
    MismatchError
        Naming what the standardisation says, what training has, and the command that makes it again.
    """
    path = store.path / "standardisation.json"
    provenance = _sections(path)["provenance"]
    inputs, config = provenance.get("inputs", {}), provenance.get("config", {})
    differences = []
    for case_id in sorted({*inputs, *cases.fingerprints}):
        there, now = inputs.get(case_id), cases.fingerprints.get(case_id)
        excused = now is None and case_id in cases.unreadable
        excused = excused or (there is None and case_id in provenance.get("left_out", []))
        if there != now and not excused:
            words = [f"volume {mark[:12]}…" if mark else "not a training case" for mark in (there, now)]
            differences.append(f"{case_id}: there {words[0]}, now {words[1]}")
    # what compute_descriptors gives the teacher (diffusion/training.py)
    teacher: dict[str, Any] = {"aggregation": "merged", "backend": "torch", "mcc": mcc}
    for key, computed in teacher.items():
        if config.get(key) != computed:
            differences.append(f"{key}: there {config.get(key)}, the teacher's {computed}")
    names = feature_names(mcc=mcc)
    if standardisation.feature_names != names and config.get("mcc") == mcc:
        theirs = sorted(set(standardisation.feature_names) ^ set(names))
        differences.append(f"feature_names: they differ in {', '.join(theirs) or 'their order'}")
    if differences:
        windows = ",".join(str(n) for n in config.get("standardisation_windows", [standardisation.window[0]]))
        flags = f"--standardisation-windows {windows} --backend torch --aggregation merged --{'' if mcc else 'no-'}mcc"
        raise MismatchError(
            f"{path} does not fit the training ({'; '.join(differences)}): run "
            f"lungseg extract-radiomics {store.path} --overwrite {flags}"
        )


def _sections(path: Path) -> dict[str, Any]:
    """Content of standardisation.json."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("windows", "provenance")):
        raise StoreError(f"{path} is damaged: make it again with lungseg extract-radiomics --overwrite")
    return content

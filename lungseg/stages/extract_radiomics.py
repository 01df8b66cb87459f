"""``lungseg extract-radiomics``: the 34 descriptors of windows of every lung, and their standardisation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from lungseg.config.execution import Execution, resolve_device
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.fields import to_dict
from lungseg.errors import InputError
from lungseg.radiomics.descriptor import DESCRIPTOR_VERSION, Standardisation, compute_descriptors, feature_names
from lungseg.radiomics.glcm import Aggregation
from lungseg.radiomics.pyradiomics import compute_descriptors_pyradiomics
from lungseg.scan.volume import AIR_HU
from lungseg.stages.cohort import DONE, SKIPPED, StageResult, limited_threads, run_cases
from lungseg.store.atomic import read_json, write_json
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.patches import grid_corners, mask_fractions, read_box
from lungseg.store.schema import check_current, make_provenance, write_artefact

BATCH_BYTES = 64 * 2**20
"""int16 windows gathered at once."""
SAMPLED_VOXELS = 20_000_000
"""Voxels a case looked at for the standardisation of one window size, at most."""


def extract_radiomics(
    store: Store | Path | str, config: RadiomicsConfig = RadiomicsConfig(), *, execution: Execution = Execution()
) -> StageResult:
    """Write ``radiomics.h5`` for each case and ``standardisation.json`` for the store.

    The standardisation (median and interquartile range of each feature, per window size) is taken over the cases
    whose split is ``train`` or not stated, equally many windows a case, and is what ``train-ddpm`` needs.

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
        note = "standardisation.json is written by a run without --shard, when all shards are done"
        return StageResult("extract-radiomics", store.path, outcomes, notes=(note,))
    if result.exit_code == 0:
        _standardise(store, case_ids, config, device, execution)
    return result


def _extract_one(case_id: str, store: Store, config: RadiomicsConfig, device: str, overwrite: bool) -> tuple[str, str]:
    path = store.case_file(case_id, "radiomics")
    with lock(store.lock_file(case_id, "radiomics")), store.open(case_id, "volume") as volume:
        settings = {k: v for k, v in to_dict(config).items() if k in _FEATURE_SETTINGS}
        wanted = make_provenance(
            "extract-radiomics",
            settings,
            inputs={"volume.h5": volume.fingerprint},
            descriptor_version=DESCRIPTOR_VERSION,
            feature_names=list(feature_names(mcc=config.mcc)),
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
        if config.backend == "pyradiomics":
            values = compute_descriptors_pyradiomics(patches, masks, lung_median_hu=median, aggregation=aggregation)
        else:
            values = compute_descriptors(patches, masks, lung_median_hu=median, aggregation=aggregation, mcc=config.mcc)
        rows.append(values.cpu().numpy())
    return np.concatenate(rows)


def _standardise(store: Store, case_ids: list[str], config: RadiomicsConfig, device: str, execution: Execution) -> None:
    """Write the store's standardisation from windows sampled in the training cases."""
    path = store.path / "standardisation.json"
    with lock(store.path / "standardisation.json.lock"), limited_threads(execution.threads):
        training = training_cases(store, case_ids)
        inputs = {}
        for case_id in training:
            with store.open(case_id, "volume") as volume:
                inputs[case_id] = volume.fingerprint
        settings = {k: v for k, v in to_dict(config).items() if k not in ("window", "stride")}
        wanted = make_provenance("extract-radiomics", settings, inputs=inputs)
        if path.exists() and not execution.overwrite:
            check_current(read_json(path)["provenance"], wanted, what=str(path))
            return
        windows = {}
        sizes = [(window,) * 3 for window in config.standardisation_windows]
        for size in [*sizes, tuple(store.header["config"]["patch_size"])]:
            samples = [_sample(store, case_id, size, config, device) for case_id in training]
            features = torch.from_numpy(np.concatenate(samples))
            fitted = Standardisation.fit(features, window=size, feature_names=feature_names(mcc=config.mcc))
            windows[_key(size)] = fitted.to_dict()
        write_json(path, {"provenance": wanted, "windows": windows})


def _key(size: Sequence[int]) -> str:
    """Name of a window size in standardisation.json: ``8x8x8``."""
    return "x".join(str(int(n)) for n in size)


def training_cases(store: Store, case_ids: list[str]) -> list[str]:
    """Cases a model may learn from: split `train` or not stated, with at least one patch.

    Raises
    ------
    InputError
        If there is none.
    """
    chosen = []
    for case_id in case_ids:
        with store.open(case_id, "volume") as volume:
            if volume.provenance.get("split", "") in ("", "train") and volume.shape("patches/corner")[0]:
                chosen.append(case_id)
    if not chosen:
        raise InputError(f"store {store.path} has no training case: all are of another split, or without lung")
    return chosen


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
    windows = read_json(path)["windows"]
    if _key(size) not in windows:
        known = ", ".join(sorted(windows))
        raise InputError(f"{path} has windows {known} but not {_key(size)}: run {command} --overwrite")
    return Standardisation.from_dict(windows[_key(size)])

"""``lungseg refine``: posteriors to contours; on request label maps, numbers and pictures for each scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt

from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.refine import RefineConfig
from lungseg.errors import InputError
from lungseg.report.overlays import preview_figure_png
from lungseg.report.quantify import REGIONS, TRUNCATED, QuantityRow, quantification_csv, quantify
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry
from lungseg.segmentation.compatibility import check_hu_compatibility
from lungseg.segmentation.density import smooth_hu
from lungseg.segmentation.lattice import bounding_region, fill_uncovered, upsample_slabs
from lungseg.segmentation.sobel_fusion import posterior_labels, remove_small_components, sobel_diffusion_fusion
from lungseg.stages.cohort import DONE, FAILED, SKIPPED, CaseReturn, StageResult, output_folder, run_cases
from lungseg.store.atomic import write_bytes, write_text
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.reader import Artefact
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.tissue import MIXTURE_TISSUES, OUTSIDE, tissue_by_name

EXPORT_SETTINGS = ("lower_bounds",)
"""Settings that change what is exported, not the label maps."""


def refine(
    store: Store | Path | str,
    config: RefineConfig = RefineConfig(),
    *,
    export: Path | None = None,
    execution: Execution = Execution(),
) -> StageResult:
    """Write ``labels.<name>.h5`` for each clustered case.

    With ``export``: ``<case_id>.nii.gz`` (tissue ids on the source scan's grid), ``<case_id>.png`` (three planes) and
    ``quantification.csv`` (mL and % per tissue, left and right, density) in that folder.

    Raises
    ------
    InputError
        If no case has been clustered under this name.
    MismatchError
        If results of other settings exist and ``execution.overwrite`` is off.
    """
    store = store if isinstance(store, Store) else Store(Path(store))
    case_ids = store.require_cases()
    if not any(store.case_file(case_id, "clusters", config.name).exists() for case_id in case_ids):
        raise InputError(
            f"store {store.path} has no clustering '{config.name}': run lungseg cluster {store.path} first"
        )
    folder = output_folder(Path(export)) if export else None
    outcomes = run_cases(
        _refine_one, case_ids, store, config, execution.overwrite,
        names=case_ids, title="refine", execution=execution,
    )  # fmt: skip
    result = StageResult("refine", store.path, outcomes)
    if folder is None:
        return result
    done = result.complete()
    whole = dataclasses.replace(execution, shard="")  # these are this shard's cases already
    exported = run_cases(_export_one, done, store, config, folder, names=done, title="export", execution=whole)
    rows = {outcome.case_id: outcome.value for outcome in exported if outcome.value is not None}
    number = execution.shard.partition("/")[0]
    table = folder / (f"quantification-{number}.csv" if number else "quantification.csv")
    write_text(table, quantification_csv(rows))
    failed = {o.case_id: o for o in exported if o.status == FAILED}
    outcomes = tuple(failed.get(o.case_id, o) for o in outcomes)
    return StageResult("refine", folder, outcomes, notes=(f"label maps, pictures and {table.name}: {folder}",))


def _refine_one(case_id: str, store: Store, config: RefineConfig, overwrite: bool) -> tuple[str, str]:
    path = store.case_file(case_id, "labels", config.name)
    if not store.case_file(case_id, "clusters", config.name).exists():
        raise InputError(f"not clustered yet under the name '{config.name}': run lungseg cluster {store.path}")
    with (
        lock(store.lock_file(case_id, f"labels.{config.name}")),
        store.open(case_id, "volume") as volume,
        store.open(case_id, "clusters", config.name) as clusters,
    ):
        clusters.require_input("volume.h5", volume.fingerprint)
        inputs = {"volume.h5": volume.fingerprint, f"clusters.{config.name}.h5": clusters.fingerprint}
        settings = {name: value for name, value in to_dict(config).items() if name not in EXPORT_SETTINGS}
        wanted = make_provenance("refine", settings, inputs=inputs)
        if store.is_done(path, "labels", wanted, overwrite=overwrite):
            return SKIPPED, ""
        labels, confidence = _labels(volume, clusters, config)
        write_artefact(path, "labels", {"labels": labels, "confidence": confidence}, provenance=wanted)
    return DONE, "" if labels.any() else "no lung: the map is empty"


def _labels(volume: Artefact, clusters: Artefact, config: RefineConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tissue ids uint8 and confidence uint8 (0-255: posterior of the class shown) on the working grid."""
    image, mask = volume.read("image"), volume.read("mask") > 0
    token_size = int(clusters.provenance["token_size"])
    posterior = _by_tissue(clusters.read("posterior"), clusters.provenance["tissues"])
    coverage = clusters.read("coverage") > 0
    if not mask.any() or not coverage.any():
        return np.zeros(mask.shape, np.uint8), np.zeros(mask.shape, np.uint8)
    posterior = fill_uncovered(posterior, coverage)
    spacing = tuple(volume.provenance["grid"]["spacing_mm"])
    if config.fusion == "sobel":
        labels = sobel_diffusion_fusion(
            posterior,
            image,
            mask,
            token_size=token_size,
            label_sigma=config.label_sigma,
            image_sigma=config.image_sigma,
            band=config.band,
            edge_floor=config.edge_floor,
        )
    else:
        labels = posterior_labels(posterior, mask, token_size=token_size)
    voxel_ml = float(np.prod(spacing)) / 1000.0
    labels = remove_small_components(
        labels, posterior, voxel_ml=voxel_ml, minimum_ml=config.min_component_ml, token_size=token_size
    )
    if config.compatibility:
        labels = check_hu_compatibility(labels, posterior, smooth_hu(image, mask), token_size=token_size)
    return labels, _confidence(labels, posterior, token_size)


def _by_tissue(posterior: np.ndarray, tissues: Sequence[str]) -> np.ndarray:
    """Posterior per tissue, float32 (5, z, y, x) in the order of MIXTURE_TISSUES: the sum over components of a name."""
    result = np.zeros((len(MIXTURE_TISSUES), *posterior.shape[1:]), dtype=np.float32)
    for component, name in zip(posterior, tissues, strict=True):
        result[MIXTURE_TISSUES.index(tissue_by_name(name))] += component
    return result


def _confidence(labels: np.ndarray, posterior: np.ndarray, token_size: int) -> np.ndarray:
    """Posterior of each voxel's label, 0 to 255; 0 outside the lung and where unclassified."""
    result = np.zeros(labels.shape, dtype=np.uint8)
    region = bounding_region(labels != OUTSIDE)
    view, inside = result[region], labels[region]
    for part, values in upsample_slabs(posterior, labels.shape, token_size, region=region):
        for k in range(len(posterior)):
            mine = inside[part] == k + 1  # ids of MIXTURE_TISSUES are 1 to 5, in order
            view[part][mine] = np.round(255 * np.clip(values[k][mine], 0, 1)).astype(np.uint8)
    return result


def source_labels(volume: Artefact, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Labels on the source scan's grid (cropped to the lungs), with its lungs and HU where the store has them.

    On a finer source grid the rim of the lung can lie up to one working voxel beyond the labels: it takes the
    nearest label, so that every lung voxel has one.
    """
    facts = volume.provenance
    source = Geometry.from_dict(facts["source"]["grid"])
    moved = resample_onto(labels, Geometry.from_dict(facts["grid"]), source, kind="mask", fill=OUTSIDE)
    if "source/mask" not in volume:
        return moved, None, None
    lungs = volume.read("source/mask")
    bare = (lungs > 0) & (moved == OUTSIDE)
    if bare.any() and moved.any():
        nearest = distance_transform_edt(moved == OUTSIDE, return_distances=False, return_indices=True)
        moved[bare] = moved[tuple(axis[bare] for axis in nearest)]
    moved[lungs == 0] = OUTSIDE
    return moved, lungs, volume.read("source/image")


def _export_one(case_id: str, store: Store, config: RefineConfig, folder: Path) -> CaseReturn:
    """Write one case's label map and picture; gives back its rows of the table."""
    from lungseg.scan.nifti import write_image

    with store.open(case_id, "volume") as volume, store.open(case_id, "labels", config.name) as artefact:
        artefact.require_input("volume.h5", volume.fingerprint)
        labels = artefact.read("labels")
        facts = volume.provenance
        moved, lungs, image = source_labels(volume, labels)
        full = Geometry.from_dict(facts["source"]["full_grid"])
        whole = np.zeros(full.shape, dtype=np.uint8)
        start = facts["source"]["crop_start"]
        whole[tuple(slice(a, a + n) for a, n in zip(start, moved.shape, strict=True))] = moved
        write_image(
            folder / f"{case_id}.nii.gz",
            whole,
            full,
            stored_axes=facts["source"]["stored_axes"],
            stored_flips=facts["source"]["stored_flips"],
        )
        picture = preview_figure_png(
            volume.read("image"),
            labels,
            volume.read("mask"),
            spacing_mm=tuple(facts["grid"]["spacing_mm"]),
            title=case_id,
        )
        write_bytes(folder / f"{case_id}.png", picture)
        return DONE, "", _quantify_case(volume, config, labels, moved, lungs, image)


def _quantify_case(
    volume: Artefact,
    config: RefineConfig,
    labels: np.ndarray,
    moved: np.ndarray,
    lungs: np.ndarray | None,
    image: np.ndarray | None,
) -> list[QuantityRow]:
    """Numbers on the source grid; without it densities stay blank and volumes come from the working grid."""
    facts: dict[str, Any] = volume.provenance
    # which lung is cut is not known
    cut: dict[str, Any] = {
        "truncated": REGIONS if TRUNCATED in facts.get("status", ()) else (),
        "lower_bounds": config.lower_bounds,
    }
    if lungs is None:
        grid = Geometry.from_dict(facts["grid"])
        return quantify(labels, volume.read("mask"), None, voxel_ml=grid.voxel_ml, **cut)
    source = Geometry.from_dict(facts["source"]["grid"])
    return quantify(moved, lungs, image, voxel_ml=source.voxel_ml, **cut)

"""``lungseg preprocess``: scans in, a patch store out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.preprocess import PreprocessConfig
from lungseg.errors import InputError
from lungseg.scan.lungs import find_lungs
from lungseg.scan.nifti import read_image
from lungseg.scan.resample import resample_to_spacing
from lungseg.scan.sources import Source, find_sources, locations, read_manifest, voxel_digest
from lungseg.scan.volume import Geometry, Volume
from lungseg.stages.cohort import DONE, SKIPPED, CaseReturn, StageResult, run_cases
from lungseg.store.cases import (
    Store,
    check_id_map_place,
    check_name,
    check_store_place,
    hashed_id,
    read_id_map,
    write_id_map,
)
from lungseg.store.locks import lock
from lungseg.store.patches import patch_table
from lungseg.store.schema import make_provenance, write_artefact

log = logging.getLogger(__name__)


def preprocess(
    scans: Sequence[Path] | Path | str | None,
    output: Path,
    config: PreprocessConfig = PreprocessConfig(),
    *,
    manifest: Path | None = None,
    id_map: Path | None = None,
    execution: Execution = Execution(),
) -> StageResult:
    """Make a patch store of CT scans, or add to one.

    Parameters
    ----------
    scans : paths
        DICOM folders, image files, or folders of them. With a manifest they may be absent, or restrict it.
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

    Returns
    -------
    StageResult
        One outcome per scan; a bad scan does not stop the others.

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
    sources = read_manifest(Path(manifest), given) if manifest else find_sources(given)
    _refuse_output_inside(output, [source.path for source in sources])
    store = Store.create(
        output, config=to_dict(config), salt=config.salt, provenance="CT scans", overwrite=execution.overwrite
    )
    sources = [_with_ids(source, store.salt, sources) for source in sources]
    log.info("preprocess: %d scans found", len(sources))
    for source in sources:
        for other in source.others:
            log.info("preprocess: %s: %s", source.case_id, other)
    names = [source.case_id or f"scan-{i:04d}" for i, source in enumerate(sources)]
    places = locations(sources)
    _refuse_repeated(sources, places)
    outcomes = run_cases(
        _preprocess_one, sources, store, config, execution, names=names, title="preprocess", execution=execution
    )
    if id_map:
        place_of = dict(zip(names, places, strict=True))
        rows = [(o.value.case_id, o.value.patient_id, str(place_of[o.case_id])) for o in outcomes if o.value]
        write_id_map(Path(id_map), output, rows)
    # the id of an image file is known only once it has been read
    outcomes = tuple(replace(o, case_id=o.value.case_id, value=None) if o.value else o for o in outcomes)
    return StageResult("preprocess", output, outcomes, notes=(f"patch store: {output}",))


def _refuse_output_inside(output: Path, scans: Sequence[Path]) -> None:
    for path in scans:
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise InputError(f"output {output} lies inside the input folder {path}; put it elsewhere")


def _with_ids(source: Source, salt: str, sources: Sequence[Source]) -> Source:
    """Case and patient ids that are safe to write: the manifest's own, else hashes (ARCHITECTURE, Cases)."""
    if source.case_id:
        check_name(source.case_id)
    case_id = source.case_id or (hashed_id(salt, source.series.series_uid) if source.series else "")
    if source.given_patient_id:
        return replace(source, case_id=case_id, patient_id=check_name(source.given_patient_id))
    studies = {(s.patient_id, s.series.study_uid) for s in sources if s.series is not None}
    alike = len(studies) > 1 and len({patient_id for patient_id, _ in studies}) == 1
    if source.series is None or not source.patient_id or alike:
        if source.series is not None:
            log.warning("preprocess: %s: no PatientID that tells patients apart; it counts as its own patient", case_id)
        return replace(source, case_id=case_id, patient_id="")  # an image file's id is not known before it is read
    return replace(source, case_id=case_id, patient_id=hashed_id(salt, "patient " + source.patient_id))


def _refuse_repeated(sources: Sequence[Source], places: Sequence[Path]) -> None:
    names = [source.case_id for source in sources if source.case_id]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        paths = "; ".join(str(place) for s, place in zip(sources, places, strict=True) if s.case_id in repeated)
        raise InputError(f"the same series was given more than once: {paths}")


def _preprocess_one(source: Source, store: Store, config: PreprocessConfig, execution: Execution) -> CaseReturn:
    """Write one case; gives back the source with its final ids."""
    volume = None
    case_id, key = source.case_id, source.key()
    if not key or source.problem:
        volume = source.read(config.read_options())
        digest = voxel_digest(volume)
        key = digest.hex()
        case_id = case_id or hashed_id(store.salt, digest)
    source = replace(source, case_id=case_id, patient_id=source.patient_id or case_id)
    settings = {name: value for name, value in to_dict(config).items() if name != "salt"}
    facts = {"split": source.split, "patient_id": source.patient_id, "inspiration": source.inspiration}
    # among the settings they are compared with what is there; other stages read them at the top
    inputs = {"scan": hashed_id(store.salt, key)}
    wanted = make_provenance("preprocess", {**settings, **facts}, inputs=inputs, case_id=case_id, **facts)
    path = store.case_file(case_id, "volume")
    with lock(store.lock_file(case_id, "preprocess")):
        done = store.is_done(path, "volume", wanted, overwrite=execution.overwrite)
        reference = _new_reference(store, case_id, source.reference, overwrite=execution.overwrite)
        if not done and volume is None:
            volume = source.read(config.read_options())
        if reference is not None:
            _write_reference(store, case_id, *reference)
        if done or volume is None:
            return (SKIPPED, "", source) if reference is None else (DONE, "only the reference was written", source)
        warnings = _write_volume(path, volume, config, wanted)
    return DONE, "; ".join(warnings), source


def _write_volume(path: Path, volume: Volume, config: PreprocessConfig, provenance: dict[str, Any]) -> list[str]:
    """Lungs, crop, resampling, patch table; returns the warnings."""
    field = find_lungs(volume.array, volume.geometry.spacing_mm)
    start, stop = _lung_box(field.labels, volume.geometry, config.margin_mm)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    source_grid = volume.geometry.crop(start, stop)
    source_image, source_mask = np.ascontiguousarray(volume.array[box]), np.ascontiguousarray(field.labels[box])
    spacing = (config.spacing_mm,) * 3
    image, grid = resample_to_spacing(source_image, source_grid, spacing, kind="ct")
    mask, _ = resample_to_spacing(source_mask, source_grid, spacing, kind="mask")
    corners, fractions = patch_table(
        mask, size=config.patch_size, stride=config.patch_stride, min_fraction=config.min_lung_fraction
    )
    warnings = [*volume.notes, *field.warnings]
    if not len(corners):
        warnings.append("no patch with lung: the case is left out of training and of the maps")
    same_grid = grid.is_close(source_grid, tolerance_voxels=1e-6)
    datasets = {"image": image, "mask": mask, "patches/corner": corners, "patches/mask_fraction": fractions}
    if config.source:
        datasets["source/image"] = image if same_grid else source_image
        datasets["source/mask"] = mask if same_grid else source_mask
    provenance = {
        **provenance,
        "acquisition": volume.acquisition,
        "warnings": warnings,
        "grid": grid.to_dict(),
        "source": {
            "grid": source_grid.to_dict(),
            "full_grid": volume.geometry.to_dict(),
            "crop_start": list(start),
            "stored_axes": list(volume.stored_axes),
            "stored_flips": list(volume.stored_flips),
        },
        "lung_volume_ml": round(field.volume_ml, 3),
        "lung_median_hu": float(np.median(image[mask > 0])) if (mask > 0).any() else 0.0,
    }
    write_artefact(path, "volume", datasets, provenance=provenance, attributes=_attributes(datasets, grid, source_grid))
    return warnings


def _attributes(datasets: dict[str, np.ndarray], grid: Geometry, source: Geometry) -> dict[str, dict[str, Any]]:
    """For people who read the file with plain h5py."""
    result = {}
    for name in datasets:
        if name.startswith("patches"):
            continue
        if datasets[name] is datasets.get(name.removeprefix("source/")) and name.startswith("source/"):
            continue  # a hard link to the same dataset
        geometry = source if name.startswith("source/") else grid
        meaning = {"unit": "HU"} if name.endswith("image") else {"region": "lung: 1 left, 2 right"}
        result[name] = {
            **meaning,
            "spacing_mm": list(geometry.spacing_mm),
            "origin_mm": list(geometry.origin_mm),
            "direction": [list(row) for row in geometry.direction],
            "axes": "z (to superior), y (to posterior), x (to left)",
        }
    return result


def _lung_box(labels: np.ndarray, geometry: Geometry, margin_mm: float) -> tuple[list[int], list[int]]:
    """Voxel box around the lungs with a margin; the whole scan if there is no lung."""
    start, stop = [0, 0, 0], list(labels.shape)
    if not labels.any():
        return start, stop
    for axis in range(3):
        hit = np.flatnonzero(labels.any(axis=tuple(other for other in range(3) if other != axis)))
        margin = int(np.ceil(margin_mm / geometry.spacing_mm[axis]))
        start[axis] = max(int(hit[0]) - margin, 0)
        stop[axis] = min(int(hit[-1]) + 1 + margin, labels.shape[axis])
    return start, stop


def _new_reference(
    store: Store, case_id: str, reference: Path | None, *, overwrite: bool
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Labels and provenance of a reference that has to be written; None if there is none, or the same is there.

    Raises
    ------
    MismatchError
        If the case has another reference and ``overwrite`` is off.
    """
    if reference is None:
        return None
    volume = read_image(reference, integer=True)
    if volume.array.max(initial=0) > 255:
        raise InputError(f"{reference}: labels above 255")
    volume = replace(volume, array=np.ascontiguousarray(volume.array, dtype=np.uint8))
    provenance = make_provenance(
        "preprocess",
        {},
        inputs={"labels": hashed_id(store.salt, voxel_digest(volume))},
        grid=volume.geometry.to_dict(),
        stored_axes=list(volume.stored_axes),
        stored_flips=list(volume.stored_flips),
    )
    path = store.case_file(case_id, "reference")
    done = store.is_done(path, "reference", provenance, overwrite=overwrite)
    return None if done else (volume.array, provenance)


def _write_reference(store: Store, case_id: str, labels: np.ndarray, provenance: dict[str, Any]) -> None:
    """Keep the expert annotation beside the case, on its own grid; unsupervised stages never open it."""
    write_artefact(store.case_file(case_id, "reference"), "reference", {"labels": labels}, provenance=provenance)

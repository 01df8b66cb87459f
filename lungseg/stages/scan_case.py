"""One scan on its way into a store: lungs, crop, patch table and what is said about them.

``preprocess`` writes what is made here; its ``--check`` makes the same and tells the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config.preprocess import PreprocessConfig
from lungseg.errors import InputError, UsageError
from lungseg.scan.lungs import find_lungs
from lungseg.scan.privacy import replace_path
from lungseg.scan.resample import resample_to_spacing
from lungseg.scan.sources import Search, Source, read_manifest, search, voxel_digest
from lungseg.scan.volume import STATUS_WORDS, Geometry, Volume
from lungseg.stages.lung_source import CaseLungs, LungSource
from lungseg.store.cases import Store, check_name, hashed_id
from lungseg.store.patches import patch_table
from lungseg.store.schema import make_provenance

log = logging.getLogger(__name__)

WARNED_STATUS = {"truncated": "truncated", "no lung": "no-lung"}
"""First words of a warning of :func:`find_lungs` -> the status it means."""


def find_scans(
    scans: Sequence[Path], config: PreprocessConfig, *, manifest: Path | None = None, series: Sequence[str] = ()
) -> Search:
    """What a manifest lists, or else what lies below the given paths.

    Parameters
    ----------
    scans : sequence of Path
    config : PreprocessConfig
        What may be repaired decides which series of a study are usable.
    manifest : Path, optional
        CSV, see :func:`lungseg.scan.sources.read_manifest`.
    series : sequence of str
        Keys or UIDs of series to take in place of the usual choice; each may hold several, with commas.

    Raises
    ------
    InputError
        If there is nothing to read, or a series is found nowhere.
    UsageError
        If both a manifest and series are given.
    """
    options = config.read_options()
    wanted = [name.strip() for text in series for name in text.split(",") if name.strip()]
    if manifest is None:
        return search(scans, options=options, series=wanted)
    if wanted:
        raise UsageError("--series and --manifest exclude each other: name the series in the manifest, column 'series'")
    listed = read_manifest(manifest, scans, options=options)
    return Search(tuple(listed), looked_at=0, skipped=0, examples=(), damaged=0, archives=0)


def with_ids(sources: Sequence[Source], salt: str) -> list[Source]:
    """Case and patient ids that are safe to write: the manifest's own, else hashes (ARCHITECTURE, Cases).

    Those of an image file, and of a series without UID, stay empty where the manifest names none: they are known once
    it has been read.
    """
    studies = {(s.patient_id, s.series.study_uid) for s in sources if s.series is not None}
    alike = len(studies) > 1 and len({patient_id for patient_id, _ in studies}) == 1
    return [_with_ids(source, salt, alike) for source in sources]


def _with_ids(source: Source, salt: str, alike: bool) -> Source:
    if source.case_id:
        check_name(source.case_id)
    series_uid = source.series.series_uid if source.series else ""
    case_id = source.case_id or (hashed_id(salt, series_uid) if series_uid else "")
    if source.given_patient_id:
        return replace(source, case_id=case_id, patient_id=check_name(source.given_patient_id))
    if source.series is None or not source.patient_id or alike:
        if source.series is not None:
            log.warning("preprocess: %s: no PatientID that tells patients apart; it counts as its own patient", case_id)
        return replace(source, case_id=case_id, patient_id="")
    return replace(source, case_id=case_id, patient_id=hashed_id(salt, "patient " + source.patient_id))


def case_names(sources: Sequence[Source]) -> list[str]:
    """What to call each scan before it has been read: its id, or its number, from 1 as in ``--list``."""
    return [source.case_id or f"scan-{i:04d}" for i, source in enumerate(sources, start=1)]


def require_distinct(sources: Sequence[Source], places: Sequence[Path]) -> None:
    """Refuse sources of one case id; ``places`` are for the message.

    Raises
    ------
    InputError
        Naming the places.
    """
    names = [source.case_id for source in sources if source.case_id]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        paths = "; ".join(str(place) for s, place in zip(sources, places, strict=True) if s.case_id in repeated)
        raise InputError(
            f"the same series was given more than once: {paths}. Give it once; if these are different scans of equal "
            "SeriesInstanceUID (some anonymisers do that), name each in a --manifest with a case_id of its own"
        )


def study_id(source: Source, salt: str) -> str:
    """Hash of the study a series belongs to; '' for image files and studies without UID."""
    return hashed_id(salt, "study " + source.series.study_uid) if source.series and source.series.study_uid else ""


def of_studies_present(sources: Sequence[Source], store: Store) -> dict[str, list[str]]:
    """Case ids that are new -> the cases that the store holds of another series of the same study."""
    new = {source.case_id for source in sources}
    present: dict[str, list[str]] = {}
    for case_id in store.case_ids():
        if case_id not in new and store.case_file(case_id, "volume").exists():
            with store.open(case_id, "volume") as volume:
                present.setdefault(volume.provenance.get("study", ""), []).append(case_id)
    present.pop("", None)
    found = {source.case_id: present.get(study_id(source, store.salt), []) for source in sources}
    return {case_id: others for case_id, others in found.items() if others}


def for_worker(source: Source) -> Source:
    """What reading a source needs: without the headers of the series that are not read."""
    return replace(source, candidates=())


def without_names(text: str, source: Source, store: Store | None) -> str:
    """A message about a scan without names of its files, folders and patient; files of the store are told below it."""
    return source.hide(replace_path(text, store.path, "store") if store else text)


@dataclass(frozen=True)
class Identified:
    """A source with its final ids, and the provenance its volume file has to have."""

    source: Source
    volume: Volume | None
    """Read already, where the ids needed it."""
    provenance: dict[str, Any]
    lungs: CaseLungs = CaseLungs()
    """Where its lungs come from."""


def identify(source: Source, salt: str, config: PreprocessConfig, lungs: LungSource = LungSource()) -> Identified:
    """Final ids of a source; an image file, and a source with a problem, is read for them, and so is a lung mask.

    Raises
    ------
    InputError
        If it has to be read and cannot be, or has no lung mask where it should.
    """
    volume = None
    case_id, key = source.case_id, source.key()
    if not key or source.problem:
        volume = source.read(config.read_options())
        digest = voxel_digest(volume)
        key = digest.hex()
        case_id = case_id or hashed_id(salt, digest)
    source = replace(source, case_id=case_id, patient_id=source.patient_id or case_id)
    facts = {"split": source.split, "patient_id": source.patient_id, "inspiration": source.inspiration}
    # among the settings they are compared with what is there; other stages read them at the top
    case_lungs = lungs.of_case(source, salt)
    inputs = {"scan": hashed_id(salt, key), **case_lungs.inputs}
    provenance = make_provenance(
        "preprocess",
        {**config.settings(), **facts, **case_lungs.settings},
        inputs=inputs,
        case_id=case_id,
        permitted=config.permitted(),
        study=study_id(source, salt),
        **facts,
    )
    return Identified(source, volume, provenance, case_lungs)


@dataclass(frozen=True)
class LungCrop:
    """A scan cut to its lungs, before its image is resampled."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    """Box of the crop in voxels of the scan, (z, y, x), end excluded."""
    source_mask: np.ndarray
    """uint8, the box: 1 left lung, 2 right."""
    source_grid: Geometry
    grid: Geometry
    """Working grid."""
    mask: np.ndarray
    """uint8 on the working grid."""
    corners: np.ndarray
    fractions: np.ndarray
    """Patch table, see :func:`lungseg.store.patches.patch_table`."""
    lung_ml: float
    lungs: dict[str, Any]
    """Where the lungs come from, for the provenance; `method` is always there."""
    notes: tuple[str, ...]
    """What reading found and did, in words."""
    warnings: tuple[str, ...]
    """What to know before the numbers are used, in words."""
    status: tuple[str, ...]
    """Words of ``STATUS_WORDS``, in its order."""

    @property
    def messages(self) -> list[str]:
        """Notes and warnings."""
        return [*self.notes, *self.warnings]


def crop_to_lungs(volume: Volume, config: PreprocessConfig, lungs: CaseLungs = CaseLungs()) -> LungCrop:
    """Lungs, crop and patch table of a scan: all that decides how it is judged.

    Parameters
    ----------
    volume : Volume
        CT in HU.
    config : PreprocessConfig
    lungs : CaseLungs
        Where the lungs come from.

    Returns
    -------
    LungCrop
        The whole scan if it has no lung.

    Raises
    ------
    InputError
        If a lung mask does not fit the scan.
    """
    given = lungs.find(volume)
    field = given.field if given else find_lungs(volume.array, volume.geometry.spacing_mm)
    start, stop = _lung_box(field.labels, volume.geometry, config.margin_mm)
    source_grid = volume.geometry.crop(start, stop)
    source_mask = np.ascontiguousarray(field.labels[_box(start, stop)])
    mask, grid = resample_to_spacing(source_mask, source_grid, (config.spacing_mm,) * 3, kind="mask")
    corners, fractions = patch_table(
        mask, size=config.patch_size, stride=config.patch_stride, min_fraction=config.min_lung_fraction
    )
    warnings = list(field.warnings)
    if not len(corners):
        warnings.append("no patch with lung: the case is left out of training and of the maps")
    found = {word for text in field.warnings for words, word in WARNED_STATUS.items() if text.startswith(words)}
    return LungCrop(
        start=start,
        stop=stop,
        source_mask=source_mask,
        source_grid=source_grid,
        grid=grid,
        mask=mask,
        corners=corners,
        fractions=fractions,
        lung_ml=field.volume_ml,
        lungs=lungs.facts(field, given.convention if given else ""),
        notes=volume.notes,
        warnings=tuple(warnings),
        status=tuple(word for word in STATUS_WORDS if word in {*volume.status, *found}),
    )


def case_datasets(
    volume: Volume, crop: LungCrop, config: PreprocessConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, dict[str, Any]]]:
    """Arrays of ``volume.h5``, what its provenance says of the scan, and attributes for people."""
    source_image = np.ascontiguousarray(volume.array[_box(crop.start, crop.stop)])
    image, _ = resample_to_spacing(source_image, crop.source_grid, crop.grid.spacing_mm, kind="ct")
    same_grid = crop.grid.is_close(crop.source_grid, tolerance_voxels=1e-6)
    datasets = {
        "image": image,
        "mask": crop.mask,
        "patches/corner": crop.corners,
        "patches/mask_fraction": crop.fractions,
    }
    if config.source:
        datasets["source/image"] = image if same_grid else source_image
        datasets["source/mask"] = crop.mask if same_grid else crop.source_mask
    lung = image[crop.mask > 0]
    facts = {
        "acquisition": volume.acquisition,
        "warnings": crop.messages,
        "status": list(crop.status),
        "grid": crop.grid.to_dict(),
        "source": {
            "grid": crop.source_grid.to_dict(),
            "full_grid": volume.geometry.to_dict(),
            "crop_start": list(crop.start),
            "stored_axes": list(volume.stored_axes),
            "stored_flips": list(volume.stored_flips),
        },
        "lungs": crop.lungs,
        "lung_volume_ml": round(crop.lung_ml, 3),
        "lung_median_hu": float(np.median(lung)) if lung.size else 0.0,
    }
    return datasets, facts, _attributes(datasets, crop.grid, crop.source_grid)


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


def _box(start: Sequence[int], stop: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


def _lung_box(
    labels: np.ndarray, geometry: Geometry, margin_mm: float
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Voxel box around the lungs with a margin; the whole scan if there is no lung."""
    start, stop = [0, 0, 0], list(labels.shape)
    if labels.any():
        for axis in range(3):
            hit = np.flatnonzero(labels.any(axis=tuple(other for other in range(3) if other != axis)))
            margin = int(np.ceil(margin_mm / geometry.spacing_mm[axis]))
            start[axis] = max(int(hit[0]) - margin, 0)
            stop[axis] = min(int(hit[-1]) + 1 + margin, labels.shape[axis])
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])

"""Maps of one case on the grid of its scan, and the numbers counted there: what exports and reports are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt

from lungseg.config.refine import RefineConfig
from lungseg.config.report import ReportConfig
from lungseg.errors import InputError
from lungseg.report.quantify import REGIONS, TRUNCATED, quantify
from lungseg.report.quantity_tables import CaseQuantities, Covariates
from lungseg.report.regions import LOBE_REGIONS, check_lobes
from lungseg.scan.masks import check_labels, onto_grid
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry
from lungseg.segmentation.contours import Contours, ContourSettings, contours
from lungseg.segmentation.lattice import fill_uncovered
from lungseg.store.reader import Artefact
from lungseg.tissue import LOBE_CONVENTIONS, LUNG_MASK_CONVENTIONS, MIXTURE_TISSUES, OUTSIDE, tissue_by_name

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
LOBE_MASK = "the lobe mask"
"""How messages name it: its folder may hold a patient's name."""


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


def posterior_by_tissue(posterior: np.ndarray, tissues: Sequence[str]) -> np.ndarray:
    """Posterior per tissue, float32 (5, z, y, x) in the order of MIXTURE_TISSUES: the sum over components of a name."""
    result = np.zeros((len(MIXTURE_TISSUES), *posterior.shape[1:]), dtype=np.float32)
    for component, name in zip(posterior, tissues, strict=True):
        result[MIXTURE_TISSUES.index(tissue_by_name(name))] += component
    return result


def lattice_posterior(clusters: Artefact) -> np.ndarray:
    """Posterior per tissue on the lattice, every token filled; all 0 if no token was covered."""
    posterior = posterior_by_tissue(clusters.read("posterior"), clusters.provenance["tissues"])
    return fill_uncovered(posterior, clusters.read("coverage") > 0)


def case_contours(volume: Artefact, clusters: Artefact, config: RefineConfig) -> Contours:
    """Tissue and posterior of each voxel of the working grid, before the clean-up; empty without lung or tokens."""
    mask = volume.read("mask") > 0
    posterior = lattice_posterior(clusters)
    if not posterior.any():
        mask[:] = False
    settings = ContourSettings(
        method=config.fusion,
        rim_mm=config.rim_mm,
        strength=config.potts_strength,
        evidence_weight=config.hu_evidence,
        iterations=config.potts_iterations,
        label_sigma=config.label_sigma,
        image_sigma=config.image_sigma,
        band=config.band,
        edge_floor=config.edge_floor,
    )
    return contours(
        posterior,
        volume.read("image"),
        mask,
        token_size=int(clusters.provenance["token_size"]),
        spacing_mm=volume.provenance["grid"]["spacing_mm"],
        settings=settings,
    )


def on_full_grid(volume: Artefact, array: np.ndarray) -> tuple[np.ndarray, Geometry]:
    """A map of the lungs' box put back into the whole scan, and the grid of that."""
    source = volume.provenance["source"]
    full = Geometry.from_dict(source["full_grid"])
    whole = np.zeros(full.shape, dtype=array.dtype)
    start = source["crop_start"]
    whole[tuple(slice(a, a + n) for a, n in zip(start, array.shape, strict=True))] = array
    return whole, full


def case_quantities(
    volume: Artefact,
    config: RefineConfig | ReportConfig,
    labels: np.ndarray,
    moved: np.ndarray,
    lungs: np.ndarray | None,
    image: np.ndarray | None,
    *,
    lobes: np.ndarray | None = None,
) -> CaseQuantities:
    """Numbers on the source grid; without it densities stay blank and volumes come from the working grid.

    Parameters
    ----------
    volume : Artefact
        ``volume.h5`` of the case.
    labels : uint8 array
        Label map on the working grid.
    moved, lungs, image
        As :func:`source_labels` gives them.
    lobes : uint8 array on the source grid, optional
    """
    facts = volume.provenance
    status = facts.get("status", ())
    inspiration = facts.get("inspiration", "") or config.inspiration
    settings: dict[str, Any] = {
        # which lung is cut is not known
        "truncated": (*REGIONS, *LOBE_REGIONS) if TRUNCATED in status else (),
        "lower_bounds": config.lower_bounds,
        "inspiration": inspiration,
    }
    grid = Geometry.from_dict(facts["grid"] if lungs is None else facts["source"]["grid"])
    if lungs is None:
        rows = quantify(labels, volume.read("mask"), None, spacing_mm=grid.spacing_mm, **settings)
    else:
        rows = quantify(moved, lungs, image, spacing_mm=grid.spacing_mm, lobes=lobes, **settings)
    acquisition = facts.get("acquisition", {})
    z, y, x = grid.spacing_mm
    covariates = Covariates(
        **{name: acquisition.get(name) for name in ("kernel", "slice_thickness_mm", "kvp", "manufacturer")},
        spacing_z_mm=z,
        spacing_y_mm=y,
        spacing_x_mm=x,
        inspiration=inspiration,
        scan_status=" ".join(status),
    )
    return CaseQuantities(tuple(rows), covariates, tuple(facts.get("warnings", ())))


def find_lobe_mask(place: Path, case_id: str) -> Path:
    """The lobe mask of a case: ``place`` itself if it is a file, else ``<case_id>`` with an image's ending in it.

    Raises
    ------
    InputError
        If there is none: a case without is never counted as one without lobes.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise InputError(f"--lobe-mask {place}: no such file or folder")
    for ending in IMAGE_ENDINGS:
        if (path := place / (case_id + ending)).is_file():
            return path
    raise InputError(f"no lobe mask named {case_id}.nii.gz (or another image) in the folder given with --lobe-mask")


def read_lobes(
    path: Path, volume: Artefact, lungs: np.ndarray | None, config: RefineConfig | ReportConfig
) -> np.ndarray:
    """Lobes of a file on the source grid, cropped as the store's: ids of ``tissue.LOBES``.

    Raises
    ------
    InputError
        If the store has no source grid, the file is no label map of lobes, lies on another grid or on the other side.
    """
    from lungseg.scan.nifti import read_image

    if lungs is None:
        raise InputError("lobes need the scan's own grid, which this store leaves out (--no-source)")
    try:
        mask = read_image(path, integer=True)
    except InputError as error:
        raise InputError(str(error).replace(str(path), LOBE_MASK)) from error
    source = volume.provenance["source"]
    full = onto_grid(
        mask, Geometry.from_dict(source["full_grid"]), allow_resample=config.resample_masks, name=LOBE_MASK
    )
    ids = _lobe_ids(full, config.lobe_mask_labels)
    box = tuple(slice(a, a + n) for a, n in zip(source["crop_start"], lungs.shape, strict=True))
    lobes = np.ascontiguousarray(ids[box])
    check_lobes(lobes, lungs, name=LOBE_MASK)
    return lobes


def _lobe_ids(mask: np.ndarray, labels: str) -> np.ndarray:
    """Ids of ``tissue.LOBES`` of a label map of another program."""
    present = set(np.unique(mask).tolist()) - {0}
    if labels == "auto":
        fitting = [name for name, table in LOBE_CONVENTIONS.items() if present and present <= set(table)]
        if len(fitting) != 1:
            known = "; ".join(f"{name}: {sorted(table)}" for name, table in LOBE_CONVENTIONS.items())
            raise InputError(
                f"{LOBE_MASK}: labels {sorted(present)[:20]} fit {' and '.join(fitting) or 'no known program'} "
                f"({known}): say which it is with --lobe-mask-labels"
            )
        labels = fitting[0]
    table, convention = LOBE_CONVENTIONS[labels], LUNG_MASK_CONVENTIONS[labels]
    check_labels(mask, {*convention.sides, *convention.others}, LOBE_MASK)
    result = np.zeros(mask.shape, dtype=np.uint8)
    # CIP keeps the region in the low byte; other labels of TotalSegmentator and CIP are other organs and regions
    region = mask & 0xFF if labels == "cip" else mask
    for theirs, ours in table.items():
        result[region == theirs] = ours
    return result

"""``lungseg refine``: posteriors to contours; on request label maps, numbers and pictures for each scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.refine import RefineConfig
from lungseg.errors import InputError, UsageError
from lungseg.report.quantity_tables import quantities_dict
from lungseg.report.summary import CaseSummary, shares_table
from lungseg.segmentation.compatibility import check_hu_compatibility
from lungseg.segmentation.density import smooth_hu
from lungseg.segmentation.sobel_fusion import remove_small_components
from lungseg.stages.case_maps import case_contours, lattice_posterior, source_labels
from lungseg.stages.cohort import DONE, FAILED, SKIPPED, StageResult, output_folder, run_cases
from lungseg.stages.export import ExportOptions, dicom_series_by_identity, export_cases
from lungseg.store.cases import Store
from lungseg.store.locks import lock
from lungseg.store.reader import Artefact
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.tissue import OUTSIDE

__all__ = ["refine", "source_labels"]

EXPORT_SETTINGS = ("lower_bounds", "inspiration", "lobe_mask_labels", "resample_masks")
"""Settings that change what is exported, not the label maps."""


def refine(
    store: Store | Path | str,
    config: RefineConfig = RefineConfig(),
    *,
    export: Path | None = None,
    lobe_mask: Path | None = None,
    dicom_seg: bool = False,
    dicom_sr: bool = False,
    source: Path | None = None,
    posteriors: bool = False,
    as_json: bool = False,
    execution: Execution = Execution(),
) -> StageResult:
    """Write ``labels.<name>.h5`` for each clustered case.

    Parameters
    ----------
    store : Store or path
    config : RefineConfig
    export : path, optional
        Folder for ``<case_id>.nii.gz`` (tissue ids on the source scan's grid), ``<case_id>.png`` (three planes), the
        numbers: ``quantification.csv`` (one line each), ``quantification-wide.csv`` (one line per region), ``.json``,
        and names and colours of the labels: ``tissues.ctbl`` for 3D Slicer, ``tissues-itksnap.txt`` for ITK-SNAP.
    lobe_mask : path, optional
        Lobe mask of the one case, or a folder of masks named ``<case_id>``: numbers per lobe too.
    dicom_seg : bool
        Write ``<case_id>.seg.dcm`` too. Needs the DICOM series of the cases, and highdicom.
    source : path, optional
        Folder with those series. A case whose series is not there, or cannot be referred to, has failed; its other
        files are written all the same.
    dicom_sr : bool
        With ``dicom_seg``: the numbers as a DICOM structured report too, ``<case_id>.sr.dcm``, of those segments.
    posteriors : bool
        Write ``posteriors/<case_id>-<tissue>.nii.gz`` too, and ``-entropy``: percent, on the source scan's grid.
    as_json : bool
        The result's document holds what became of each case, and its numbers if they were exported.

    Returns
    -------
    StageResult
        With ``export`` ``values["quantities"]`` holds the numbers of each case.

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
    if (lobe_mask or dicom_seg or posteriors) and not export:
        raise UsageError("--lobe-mask, --dicom-seg and --posteriors belong to what --export DIR writes")
    if dicom_seg != (source is not None):
        raise UsageError("--dicom-seg and --source DICOM_DIR go together: a DICOM-SEG refers to the images of a series")
    if dicom_sr and not dicom_seg:
        raise UsageError("--dicom-sr needs --dicom-seg: its measurements refer to the segments of that file")
    if lobe_mask and Path(lobe_mask).is_file() and len(case_ids) > 1:
        raise UsageError(f"--lobe-mask: one file for {len(case_ids)} cases; give a folder of <case_id>.nii.gz")
    options = ExportOptions(
        lobe_mask=Path(lobe_mask) if lobe_mask else None,
        dicom=dicom_series_by_identity(Path(source), store) if source else None,
        posteriors=posteriors,
        measurements=dicom_sr,
    )
    folder = output_folder(Path(export)) if export else None
    outcomes = run_cases(
        _refine_one, case_ids, store, config, execution.overwrite,
        names=case_ids, title="refine", execution=execution,
    )  # fmt: skip
    result = StageResult("refine", store.path, outcomes)
    if folder is None:
        return result.as_document() if as_json else result
    exported = export_cases(store, result.complete(), config, folder, options, execution=execution)
    failed = {o.case_id: o for o in exported if o.status == FAILED}
    outcomes = tuple(failed.get(o.case_id, o) for o in outcomes)
    quantities = {o.case_id: o.value for o in exported if o.value is not None}
    result = StageResult(
        "refine",
        folder,
        outcomes,
        tables=(shares_table([CaseSummary(case_id, found) for case_id, found in quantities.items()]),),
        notes=(f"label maps, pictures and numbers: {folder}",),
        values={"quantities": quantities},
    )
    return result.as_document(quantification=quantities_dict(quantities)) if as_json else result


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
    drawn = case_contours(volume, clusters, config)
    labels = drawn.labels
    if not labels.any():
        return labels, drawn.confidence(labels)
    posterior = lattice_posterior(clusters)
    token_size = int(clusters.provenance["token_size"])
    voxel_ml = float(np.prod(volume.provenance["grid"]["spacing_mm"])) / 1000.0
    labels = remove_small_components(
        labels, posterior, voxel_ml=voxel_ml, minimum_ml=config.min_component_ml, token_size=token_size
    )
    if config.compatibility:
        smoothed = smooth_hu(volume.read("image"), labels != OUTSIDE)
        labels = check_hu_compatibility(labels, posterior, smoothed, token_size=token_size)
    return labels, drawn.confidence(labels)

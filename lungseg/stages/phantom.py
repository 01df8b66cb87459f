"""``lungseg phantom``: digital chests with known tissue, as scans with references, or as a patch store."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.phantom import PhantomConfig
from lungseg.config.preprocess import PreprocessConfig
from lungseg.errors import InputError
from lungseg.scan.phantom import Phantom, PhantomSpec, make_phantom
from lungseg.scan.phantom_scanner import KERNELS
from lungseg.scan.volume import Volume
from lungseg.stages.cohort import DONE, SKIPPED, StageResult, run_cases
from lungseg.stages.scan_case import case_datasets, crop_to_lungs
from lungseg.store.atomic import read_json, write_json, write_text
from lungseg.store.cases import Store, hashed_id
from lungseg.store.locks import lock
from lungseg.store.schema import make_provenance, write_artefact

SALT = "lungseg phantom"
"""Nobody has to be protected: the same settings make the same store everywhere."""
KVP = 120.0
MANUFACTURER = "lungseg phantom"
WHICH = ("num", "seed")
"""Options that say which phantoms are made, not what they are like."""
STORE_ONLY = ("store_spacing_mm", "patch_size", "patch_stride")


def phantom(
    output: Path, config: PhantomConfig = PhantomConfig(), *, execution: Execution = Execution()
) -> StageResult:
    """Write ``config.num`` phantoms under ``output``.

    As ``dicom`` or ``nifti`` each is ``<case_id>/`` (a DICOM series) or ``<case_id>.nii.gz``,
    ``reference/<case_id>.nii.gz`` (tissue ids on the same grid) and a row of ``manifest.csv``. As ``store`` they are
    cases of a patch store with references, as ``lungseg preprocess`` makes of the scans; this needs neither
    SimpleITK nor pydicom. The same settings give the same bytes; phantoms that are complete already are kept.

    Raises
    ------
    InputError
        If ``output`` is a file, or holds phantoms of other settings and ``execution.overwrite`` is off.
    MismatchError
        The same of a patch store.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; give the output folder another name")
    seeds = [config.seed + i for i in range(config.num)]
    names = [case_name(seed) for seed in seeds]
    if config.format == "store":
        prepare = config.preprocessing(SALT)
        store = Store.create(
            output,
            config={**prepare.settings(), "salt": SALT},
            salt=SALT,
            provenance="digital chest phantoms",
            overwrite=execution.overwrite,
        )
        outcomes = run_cases(
            _store_one, seeds, store, config, prepare, execution, names=names, title="phantom", execution=execution
        )
        return StageResult("phantom", output, outcomes, notes=(f"patch store: {output}",))
    settings = output / "phantom.json"
    shared = {key: value for key, value in to_dict(config).items() if key not in (*WHICH, *STORE_ONLY)}
    if settings.exists() and read_json(settings) != shared and not execution.overwrite:
        raise InputError(f"{output} holds phantoms of other settings; use --overwrite or another folder")
    write_json(settings, shared)
    (output / "reference").mkdir(exist_ok=True)
    outcomes = run_cases(
        _write_one, seeds, output, config, execution, names=names, title="phantom", execution=execution
    )
    _write_manifest(output, config.format)
    return StageResult("phantom", output, outcomes, notes=(f"phantoms and manifest in {output}",))


def case_name(seed: int) -> str:
    """Case id of the phantom of a seed."""
    return f"phantom-{seed}"


def phantom_spec(config: PhantomConfig, seed: int) -> PhantomSpec:
    """What the phantom of a seed is like."""
    severity = config.severity_of(seed)
    return PhantomSpec(
        extent_mm=config.extent_mm,
        spacing_mm=config.spacing_mm,
        severity=severity,
        diseases=() if severity == "healthy" else config.diseases,
        noise_hu=config.noise_hu,
        kernel=config.kernel,
        dose=config.dose,
        slice_thickness_mm=config.slice_thickness_mm,
        variants=config.variants,
    )


def as_volume(made: Phantom, spec: PhantomSpec) -> Volume:
    """The scan of a phantom with the covariates that its DICOM series states."""
    acquisition = {
        "kernel": KERNELS[spec.kernel].name,
        "kvp": KVP,
        "slice_thickness_mm": spec.thickness_mm,
        "manufacturer": MANUFACTURER,
        "modality": "CT",
        "spacing_mm": list(spec.spacing_mm),
    }
    return Volume(made.volume_hu, made.geometry, acquisition=acquisition)


def _write_one(seed: int, output: Path, config: PhantomConfig, execution: Execution) -> tuple[str, str]:
    """One scan and its reference."""
    from lungseg.scan.dicom_write import write_dicom_series
    from lungseg.scan.nifti import write_image

    name = case_name(seed)
    reference = output / "reference" / f"{name}.nii.gz"  # written last: its presence means the phantom is complete
    if reference.exists() and not execution.overwrite:
        return SKIPPED, ""
    spec = phantom_spec(config, seed)
    made = make_phantom(spec, seed=seed)
    folder = output / name
    for old in folder.glob("*.dcm"):
        old.unlink()
    if config.format == "nifti":
        write_image(output / f"{name}.nii.gz", made.volume_hu, made.geometry)
    else:
        write_dicom_series(
            folder,
            as_volume(made, spec),
            patient_id=name,
            series_seed=f"lungseg {name}",
            kernel=KERNELS[spec.kernel].name,
            kvp=KVP,
            slice_thickness_mm=spec.thickness_mm,
        )
    write_image(reference, made.labels, made.geometry)
    return DONE, ""


def _write_manifest(output: Path, format_: str) -> None:
    """List every complete phantom of the folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "case_id", "patient_id", "reference", "inspiration"))
    for reference in sorted((output / "reference").glob("phantom-*.nii.gz")):
        name = reference.name.removesuffix(".nii.gz")
        path = reference.name if format_ == "nifti" else name
        writer.writerow((path, name, name, f"reference/{reference.name}", "inspiration"))
    write_text(output / "manifest.csv", text.getvalue())


def _store_one(
    seed: int, store: Store, config: PhantomConfig, prepare: PreprocessConfig, execution: Execution
) -> tuple[str, str]:
    """One case of a patch store: what ``preprocess`` makes of the scan, and the reference on the scan's own grid."""
    name = case_name(seed)
    facts = {"split": "", "patient_id": name, "inspiration": "inspiration"}
    settings = {key: value for key, value in to_dict(config).items() if key not in (*WHICH, *STORE_ONLY, "format")}
    wanted = make_provenance(
        "phantom",
        {**prepare.settings(), **facts, "phantom": settings},
        inputs={"scan": hashed_id(store.salt, name)},
        seed=seed,
        case_id=name,
        permitted=prepare.permitted(),
        study="",
        **facts,
    )
    paths = {kind: store.case_file(name, kind) for kind in ("volume", "reference")}
    with lock(store.lock_file(name, "preprocess")):
        # The volume is written last: its presence means the phantom is complete.
        if store.is_done(paths["volume"], "volume", wanted, overwrite=execution.overwrite):
            return SKIPPED, ""
        spec = phantom_spec(config, seed)
        made = make_phantom(spec, seed=seed)
        labelled = make_provenance(
            "phantom",
            {"phantom": settings},
            inputs={"labels": hashed_id(store.salt, name)},
            seed=seed,
            grid=made.geometry.to_dict(),
            stored_axes=[0, 1, 2],
            stored_flips=[False, False, False],
        )
        write_artefact(paths["reference"], "reference", {"labels": made.labels}, provenance=labelled)
        scan = as_volume(made, spec)
        crop = crop_to_lungs(scan, prepare)
        datasets, found, attributes = case_datasets(scan, crop, prepare)
        write_artefact(paths["volume"], "volume", datasets, provenance={**wanted, **found}, attributes=attributes)
    return DONE, "; ".join(crop.messages)

"""``lungseg phantom``: digital chests with known tissue, as DICOM series, label maps and a manifest."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.config.phantom import PhantomConfig
from lungseg.errors import InputError
from lungseg.stages.cohort import DONE, SKIPPED, StageResult, run_cases
from lungseg.store.atomic import read_json, write_json, write_text


def phantom(
    output: Path, config: PhantomConfig = PhantomConfig(), *, execution: Execution = Execution()
) -> StageResult:
    """Write ``config.num`` phantoms under ``output``.

    Each is ``<case_id>/`` (a DICOM series), ``reference/<case_id>.nii.gz`` (tissue ids on the same grid) and a row of
    ``manifest.csv``. The same settings give the same bytes; phantoms that are complete already are kept.

    Raises
    ------
    InputError
        If ``output`` is a file, or holds phantoms of other settings and ``execution.overwrite`` is off.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; give the output folder another name")
    settings = output / "phantom.json"
    shared = {key: value for key, value in to_dict(config).items() if key not in ("num", "first_seed")}
    if settings.exists() and read_json(settings) != shared and not execution.overwrite:
        raise InputError(f"{output} holds phantoms of other settings; use --overwrite or another folder")
    write_json(settings, shared)
    (output / "reference").mkdir(exist_ok=True)
    seeds = [config.first_seed + i for i in range(config.num)]
    names = [f"phantom-{seed}" for seed in seeds]
    outcomes = run_cases(
        _write_one, seeds, output, config, execution, names=names, title="phantom", execution=execution
    )
    _write_manifest(output)
    return StageResult("phantom", output, outcomes, notes=(f"phantoms and manifest in {output}",))


def _write_one(seed: int, output: Path, config: PhantomConfig, execution: Execution) -> tuple[str, str]:
    from lungseg.scan.dicom import write_dicom_series
    from lungseg.scan.nifti import write_image
    from lungseg.scan.phantom import DISEASES, PhantomSpec, make_phantom
    from lungseg.scan.volume import Volume

    name = f"phantom-{seed}"
    reference = output / "reference" / f"{name}.nii.gz"  # written last: its presence means the phantom is complete
    if reference.exists() and not execution.overwrite:
        return SKIPPED, ""
    spec = PhantomSpec(
        extent_mm=config.extent_mm,
        spacing_mm=config.spacing_mm,
        severity=config.severity,
        diseases=() if config.severity == "healthy" else DISEASES,
        noise_hu=config.noise_hu,
    )
    made = make_phantom(spec, seed=seed)
    folder = output / name
    for old in folder.glob("*.dcm"):
        old.unlink()
    write_dicom_series(folder, Volume(made.volume_hu, made.geometry), patient_id=name, series_seed=f"lungseg {name}")
    write_image(reference, made.labels, made.geometry)
    return DONE, ""


def _write_manifest(output: Path) -> None:
    """List every complete phantom of the folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "case_id", "patient_id", "reference", "inspiration"))
    for reference in sorted((output / "reference").glob("phantom-*.nii.gz")):
        name = reference.name.removesuffix(".nii.gz")
        writer.writerow((name, name, name, f"reference/{reference.name}", "inspiration"))
    write_text(output / "manifest.csv", text.getvalue())

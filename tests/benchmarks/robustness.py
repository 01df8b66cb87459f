"""How much a method loses when the scanner, the patient or the grid changes: DSC per shift against a reference.

Run: ``python tests/benchmarks/robustness.py FOLDER [--benchmark TABLES] [--rows hu-thresholds,radiomics,diffseglung]
[--bundle FILE] [--shifts reference,kernel-soft] [--phantoms 2]``. The same phantoms (seeds) are scanned under each
shift; what a method has learned stays as it is. Stopped, the same command goes on. Prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fitted_rows import FittedRow, add_options, chosen_rows

from lungseg.config.execution import Execution
from lungseg.config.phantom import PhantomConfig
from lungseg.errors import MismatchError, UsageError
from lungseg.evaluation.label_counts import confusion_counts
from lungseg.evaluation.scores import ScoreSettings
from lungseg.evaluation.writers import number
from lungseg.scan.nifti import write_image
from lungseg.scan.phantom import make_phantom
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry
from lungseg.stages.benchmark_costs import Costs
from lungseg.stages.benchmark_rows import false_disease_percent, stage_config
from lungseg.stages.phantom import SALT, case_name, phantom, phantom_spec
from lungseg.stages.preprocess import preprocess
from lungseg.store.atomic import write_text
from lungseg.store.cases import Store
from lungseg.tissue import LUNG_RIGHT, MIXTURE_TISSUES, OUTSIDE

REFERENCE, HEALTHY, ONE_LUNG, GRID = "reference", "healthy", "one-lung", "grid-"
SEED = 640
IN_PLANE_MM = (PhantomConfig.spacing_mm[1], PhantomConfig.spacing_mm[2])
SOFT_TISSUE_HU, SOFT_TISSUE_SD_HU = 40.0, 22.0
"""What stands in the place of the removed lung: muscle, with the noise of the standard scan."""
SHIFTS: Mapping[str, Mapping[str, Any]] = {
    REFERENCE: {},
    "kernel-soft": {"kernel": "soft"},
    "kernel-sharp": {"kernel": "sharp"},
    "dose-low": {"dose": "low"},
    "dose-high": {"dose": "high"},
    "slices-1-mm": {"spacing_mm": (1.0, *IN_PLANE_MM)},
    "slices-2.5-mm": {"spacing_mm": (2.5, *IN_PLANE_MM)},
    "slices-5-mm": {"spacing_mm": (5.0, *IN_PLANE_MM)},
    "grid-0.6-mm": {"store_spacing_mm": 0.6},
    "grid-0.8-mm": {"store_spacing_mm": 0.8},
    "grid-1.0-mm": {"store_spacing_mm": 1.0},
    "grid-1.5-mm": {"store_spacing_mm": 1.5},
    "mild": {"severity": "mild"},
    "severe": {"severity": "severe"},
    ONE_LUNG: {},
    HEALTHY: {"severity": "healthy"},
}
"""Settings of the phantom that each shift changes; the reference is a moderate one of the benchmark's own grid."""


def shifted_store(path: Path, shift: str, settings: PhantomConfig) -> Store:
    """Phantoms of one shift as a patch store with references."""
    settings = dataclasses.replace(settings, **SHIFTS[shift])
    if shift == ONE_LUNG:
        scans = path.with_name(f"{path.name}-scans")
        manifest = one_lung_scans(scans, settings)
        preprocess(
            None, path, settings.preprocessing(SALT), manifest=manifest, execution=Execution(quiet=True)
        ).require_complete()
    else:
        phantom(path, settings, execution=Execution(quiet=True)).require_complete()
    return Store(path)


def one_lung_scans(folder: Path, settings: PhantomConfig) -> Path:
    """Scans and references of phantoms whose right lung has been taken out; their manifest."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", "case_id", "patient_id", "reference", "inspiration"))
    for seed in range(settings.seed, settings.seed + settings.num):
        name = case_name(seed)
        table.writerow((f"{name}.nii.gz", name, name, f"reference-{name}.nii.gz", "inspiration"))
        if (folder / f"reference-{name}.nii.gz").exists():
            continue
        made = make_phantom(phantom_spec(settings, seed), seed=seed)
        removed = made.lungs == LUNG_RIGHT
        filling = np.random.default_rng(seed).normal(SOFT_TISSUE_HU, SOFT_TISSUE_SD_HU, int(removed.sum()))
        made.volume_hu[removed] = np.rint(filling).astype(np.int16)
        made.labels[removed] = OUTSIDE
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"{name}.nii.gz", made.volume_hu, made.geometry)
        write_image(folder / f"reference-{name}.nii.gz", made.labels, made.geometry)
    write_text(folder / "manifest.csv", text.getvalue())
    return folder / "manifest.csv"


def percent(fitted: FittedRow, shift: str, store: Store, output: Path) -> float | None:
    """Mean DSC in percent, of healthy phantoms false disease; None if the method refuses this grid."""
    quiet = Execution(quiet=True)
    try:
        fitted.map(store, Costs(output / "seconds.json"), execution=quiet)
    except MismatchError:
        if not shift.startswith(GRID):
            raise
        return None  # what was learned on another grid does not hold here
    if shift == HEALTHY:
        return false_disease_percent(store, fitted.row.name)
    return mean_dice_percent(store, fitted.row.name)


def mean_dice_percent(store: Store, name: str) -> float:
    """Mean DSC as ``lungseg evaluate`` defines it, without the surfaces that this table does not show."""
    found = []
    for case_id in store.case_ids():
        with store.open(case_id, "reference") as file:
            reference, grid = file.read("labels"), Geometry.from_dict(file.provenance["grid"])
        with store.open(case_id, "volume") as file:
            own = Geometry.from_dict(file.provenance["grid"])
        with store.open(case_id, "labels", name) as file:
            labels = resample_onto(file.read("labels"), own, grid, kind="mask", fill=OUTSIDE)
        counts = confusion_counts(labels, reference)
        for tissue in MIXTURE_TISSUES:
            if ScoreSettings().counts(counts[:, tissue].sum() * grid.voxel_ml):
                found.append(2.0 * counts[tissue, tissue] / (counts[tissue].sum() + counts[:, tissue].sum()))
    return 100.0 * float(np.mean(found))


def main() -> int:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for phantoms, maps and scores")
    add_options(parser)
    parser.add_argument("--shifts", default=",".join(SHIFTS), help="shifts to try, the reference among them")
    parser.add_argument("--phantoms", type=int, default=2, help="of each shift")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first phantom")
    options = parser.parse_args()
    shifts = options.shifts.split(",")
    if REFERENCE not in shifts or set(shifts) - set(SHIFTS):
        parser.error(f"--shifts: {REFERENCE} and any of {', '.join(SHIFTS)}")
    try:
        config, rows = chosen_rows(options)
    except UsageError as error:
        parser.error(str(error))
    settings = stage_config(
        config, PhantomConfig, "phantom", num=options.phantoms, seed=options.seed, severity="moderate", format="store",
        extent_mm=config.extent_mm,
    )  # fmt: skip
    found: dict[str, list[float | None]] = {}
    print("| shift | " + " | ".join(fitted.row.name for fitted in rows) + " |")
    print("|---|" + "---|" * len(rows))
    for shift in (REFERENCE, *(name for name in shifts if name != REFERENCE)):
        path = options.folder / shift
        store = shifted_store(path / "store", shift, settings)
        found[shift] = [percent(fitted, shift, store, path) for fitted in rows]
        cells = (_cell(value, base, shift) for value, base in zip(found[shift], found[REFERENCE], strict=True))
        print(f"| {shift} | {' | '.join(cells)} |", flush=True)
    print(
        f"\nMean DSC in percent over all class-case pairs of {options.phantoms} phantoms (seeds from {options.seed}), "
        "and its change against the reference: a moderate phantom, standard kernel and dose, "
        f"{settings.spacing_mm[0]:g} mm slices, grid of {settings.store_spacing_mm:g} mm. `{HEALTHY}`: false disease, "
        "percent of the lung. A dash: the method refuses a grid that it has not learned on. With so few "
        "phantoms only large changes mean anything."
    )
    return 0


def _cell(value: float | None, base: float | None, shift: str) -> str:
    if value is None or base is None:
        return "–"
    return number(value, 1) if shift in (REFERENCE, HEALTHY) else f"{value:.1f} ({value - base:+.1f})"


if __name__ == "__main__":
    sys.exit(main())

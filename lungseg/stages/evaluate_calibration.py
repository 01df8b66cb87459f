"""What ``lungseg evaluate`` says of the confidences that a store's label maps carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.evaluation.calibration import (
    CALIBRATION_DEFINITION,
    Calibration,
    calibrate,
    calibration_counts,
    calibration_note,
    reliability_csv,
)
from lungseg.evaluation.writers import json_safe
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry, Volume
from lungseg.stages.evaluate_pairs import Method, View
from lungseg.store.atomic import write_text
from lungseg.tissue import OUTSIDE, Tissue

CURVE_FILE = "calibration.csv"


def case_calibration(method: Method, case_id: str, reference: Volume, view: View) -> np.ndarray | None:
    """Counts of one case on the working grid of the store, where the confidences are; None if there are none.

    The reference is brought onto that grid by nearest voxel, so that each voxel of the label map counts once.
    """
    if method.store is None or not method.store.case_file(case_id, "labels", method.clustering).exists():
        return None
    if not {int(i) for ids in view.values() for i in ids} <= set(map(int, Tissue)):
        return None  # lungs: the confidences are those of tissues
    with method.store.open(case_id, "labels", method.clustering) as labels:
        if "confidence" not in labels:
            return None
        shown, confidence = labels.read("labels"), labels.read("confidence")
    with method.store.open(case_id, "volume") as volume:
        grid = Geometry.from_dict(volume.provenance["grid"])
    true = resample_onto(reference.array, reference.geometry, grid, kind="mask", fill=OUTSIDE)
    return calibration_counts(confidence, shown, true, view)


def pooled(methods: Sequence[Method], cases: Sequence[dict[str, np.ndarray]]) -> dict[str, Calibration]:
    """Calibration of each method that has confidences, over all cases."""
    found = {}
    for method in methods:
        counts = [case[method.name] for case in cases if method.name in case]
        if counts and sum(map(np.sum, counts)):
            found[method.name] = calibrate(np.sum(counts, axis=0))
    return found


def calibration_notes(found: dict[str, Calibration]) -> list[str]:
    """Sentences that stand with the tables."""
    return [*([CALIBRATION_DEFINITION] if found else []), *(calibration_note(name, c) for name, c in found.items())]


def calibration_dict(found: dict[str, Calibration]) -> dict[str, Any]:
    """JSON types, by method."""
    return {name: json_safe(asdict(calibration)) for name, calibration in found.items()}


def write_curves(output: Path, found: dict[str, Calibration]) -> None:
    """Write the reliability curves, or remove those of an earlier evaluation into this folder."""
    if found:
        write_text(output / CURVE_FILE, reliability_csv(found))
    else:
        (output / CURVE_FILE).unlink(missing_ok=True)

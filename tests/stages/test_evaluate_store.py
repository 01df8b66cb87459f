"""Clusterings of a store against references: side by side, by the id map, and without a name of anybody."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_store import SHAPE, SPACING_MM, lungs, make_store

from lungseg.config import EvaluateConfig, Execution
from lungseg.errors import InputError, UsageError
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry
from lungseg.stages.evaluate import evaluate
from lungseg.store.cases import Store, write_id_map
from lungseg.store.schema import make_provenance, write_artefact

GRID = Geometry(SHAPE, (SPACING_MM,) * 3)
QUIET = Execution(quiet=True)
CONFIG = EvaluateConfig(bootstrap=100, worst=1)
CANARY = "KANARIENVOGEL"


def tissues(cut: float) -> np.ndarray:
    """Healthy lung, dense behind a plane at this share of the depth."""
    behind = (np.arange(SHAPE[1]) > cut * SHAPE[1])[None, :, None]
    return np.where(lungs() > 0, np.where(behind, 5, 1), 0).astype(np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three cases with two clusterings; the third has no `rough` one."""
    made = make_store(tmp_path / "cohort", cases=3)
    for case_id in made.case_ids():
        with made.open(case_id, "volume") as volume:
            inputs = {"volume.h5": volume.fingerprint}
        for name, cut in (("fine", 0.65), ("rough", 0.75)):
            if (name, case_id) != ("rough", "case-2"):
                datasets = {"labels": tissues(cut), "confidence": np.full(SHAPE, 200, np.uint8)}
                write_artefact(
                    made.case_file(case_id, "labels", name), "labels", datasets,
                    provenance=make_provenance("refine", {}, inputs=inputs),
                )  # fmt: skip
    return made


def test_clusterings_of_a_store_and_a_folder_are_compared(store: Store, tmp_path: Path) -> None:
    for case_id in store.case_ids():
        (tmp_path / "tool").mkdir(exist_ok=True)
        (tmp_path / "reference").mkdir(exist_ok=True)
        write_image(tmp_path / "reference" / f"{case_id}.nii.gz", tissues(0.6), GRID)
        write_image(tmp_path / "tool" / f"{case_id}.nii.gz", tissues(0.6), GRID)
    result = evaluate(
        [store, tmp_path / "tool"], tmp_path / "out", replace(CONFIG, names=("fine", "rough")),
        reference=tmp_path / "reference", execution=QUIET,
    )  # fmt: skip
    assert result.exit_code == 8
    summary = result.values["summary"]
    scores = {m["method"]: m for m in summary["methods"] if not m["is_oracle"]}
    assert list(scores) == ["fine", "rough", "tool"]
    assert scores["tool"]["overall"]["dice_mean"] == 1.0
    assert scores["rough"]["missing_predictions"] == ["case-2"]
    assert 1.0 > scores["fine"]["overall"]["dice_mean"] > scores["rough"]["overall"]["dice_mean"]
    with open(tmp_path / "out" / "cases.csv", newline="", encoding="utf-8") as stream:
        missing = [row for row in csv.DictReader(stream) if row["status"] == "missing prediction"]
    box = [np.flatnonzero((lungs() > 0).any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    diagonal = SPACING_MM * np.linalg.norm([hit[-1] - hit[0] + 1 for hit in box])
    penalties = {row["penalised_hd95_mm"] for row in missing if row["dice"]}
    assert penalties == {f"{diagonal:.6f}"}  # the store's lungs, not those of the reference
    assert (tmp_path / "out" / "worst.html").read_text(encoding="utf-8").count("CT alone") == 3  # the store has the CT
    assert {(row["method_a"], row["method_b"]) for row in summary["comparison"]["rows"]} == {
        ("fine", "rough"), ("fine", "tool"), ("rough", "tool"),
    }  # fmt: skip


def test_a_clustering_that_is_not_there_names_those_that_are(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no label maps of 'diffseglung'; there is fine, rough: give --names"):
        evaluate(store, tmp_path / "out", CONFIG, reference=tmp_path, execution=QUIET)
    with pytest.raises(UsageError, match="--label-map is for folders"):
        evaluate(store, tmp_path / "out", replace(CONFIG, names=("fine",), label_map=("medseg",)), execution=QUIET)


def test_no_file_name_reaches_results_or_messages(store: Store, tmp_path: Path) -> None:
    """References named like patients: one fits through the id map, one is damaged, one belongs to no case."""
    folder = tmp_path / CANARY
    folder.mkdir()
    for number in range(2):
        write_image(folder / f"{CANARY}-{number}.nii.gz", tissues(0.6), GRID)
    damaged = folder / f"{CANARY}-1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    write_image(folder / f"{CANARY}-9.nii.gz", tissues(0.6), GRID)
    mapping = folder / f"{CANARY}.json"
    mapping.write_text('{"healthy": 1, "consolidation": 5}', encoding="utf-8")
    id_map = tmp_path / "ids.csv"
    write_id_map(id_map, store.path, [(f"case-{n}", "p", f"/scans/{CANARY}-{n}.nii.gz") for n in range(2)])
    result = evaluate(
        store, tmp_path / "out", replace(CONFIG, names=("fine",), reference_label_map=str(mapping)),
        reference=folder, id_map=id_map, execution=QUIET,
    )  # fmt: skip
    assert result.exit_code == 8
    told = {outcome.case_id: outcome.message for outcome in result.outcomes}
    assert list(told) == ["case-0", "case-1", "case-2", "reference-0001"]
    assert told["case-1"].startswith("the reference")
    assert "case-2" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")  # has no reference
    with open(tmp_path / "out" / "cases.csv", newline="", encoding="utf-8") as stream:
        found = {row["case_id"]: row for row in csv.DictReader(stream)}
    assert {case_id: row["status"] for case_id, row in found.items()} == {
        "case-0": "scored", "case-1": "unusable", "case-2": "missing reference", "reference-0001": "missing prediction",
    }  # fmt: skip
    assert float(found["case-2"]["predicted_ml"]) > 0
    for path in (tmp_path / "out").iterdir():
        assert CANARY.encode() not in path.read_bytes(), path.name
        assert b"ids.csv" not in path.read_bytes(), path.name
    assert CANARY not in json.dumps(told) + " ".join(result.notes)


def test_confidences_of_a_store_are_checked_against_the_reference(store: Store, tmp_path: Path) -> None:
    """All voxels are sure by 200/255; those between the two planes are wrong, in the pooled counts of all cases."""
    (tmp_path / "reference").mkdir()
    for case_id in store.case_ids():
        write_image(tmp_path / "reference" / f"{case_id}.nii.gz", tissues(0.65), GRID)
    result = evaluate(
        store, tmp_path / "out", replace(CONFIG, names=("fine", "rough")), reference=tmp_path / "reference",
        execution=QUIET,
    )  # fmt: skip
    found = result.values["summary"]["calibration"]
    sure, lung = 200 / 255, int((lungs() > 0).sum())
    wrong = int((tissues(0.65) != tissues(0.75)).sum())
    assert found["fine"]["num_voxels"] == 3 * lung
    assert found["fine"]["ece"] == pytest.approx(1 - sure)
    assert found["rough"]["num_voxels"] == 2 * lung  # one case has no such map
    assert found["rough"]["ece"] == pytest.approx(abs(sure - (1 - wrong / lung)))
    assert "Calibration of rough: ECE" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    with open(tmp_path / "out" / "calibration.csv", newline="", encoding="utf-8") as stream:
        filled = [row for row in csv.DictReader(stream) if int(row["num_voxels"])]
    assert [row["method"] for row in filled] == ["fine", "rough"]
    evaluate(tmp_path / "reference", tmp_path / "out", CONFIG, reference=tmp_path / "reference", execution=QUIET)
    assert not (tmp_path / "out" / "calibration.csv").exists()  # label maps of folders have no confidence

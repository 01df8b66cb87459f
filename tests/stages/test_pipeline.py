"""The stages together: what they write, that it fits the scan, and that the same run gives the same bytes."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipeline_fixture import (
    CLUSTER,
    EVALUATE,
    PREPROCESS,
    QUIET,
    RADIOMICS,
    REFINE,
    SYNTHESIZE,
    TRAIN,
    run_stages,
    tree_hashes,
)

import lungseg
from lungseg.config import Execution
from lungseg.diffusion.checkpoint import load_student
from lungseg.errors import InputError, MismatchError, PartialError
from lungseg.scan.nifti import read_image
from lungseg.scan.sources import find_sources
from lungseg.stages.cluster import cluster
from lungseg.stages.evaluate import evaluate
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.stages.fits import load_fit
from lungseg.stages.preprocess import preprocess
from lungseg.stages.refine import refine
from lungseg.stages.synthesize import synthesize
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.cases import Store
from lungseg.store.verify import verify_store

CASES = ["phantom-11", "phantom-12"]


def test_every_stage_leaves_its_artefact(finished: Path) -> None:
    store = Store(finished / "store")
    assert store.case_ids() == CASES
    for case_id in CASES:
        names = {path.name for path in (finished / "store" / "cases" / case_id).iterdir()}
        assert names == {
            "volume.h5", "reference.h5", "radiomics.h5", "tokens.diffseglung.h5", "clusters.diffseglung.h5",
            "labels.diffseglung.h5",
        }  # fmt: skip
    assert {path.name for path in (finished / "results").iterdir()} == {
        *(f"{c}.nii.gz" for c in CASES), *(f"{c}.png" for c in CASES), "quantification.csv",
        "quantification-wide.csv", "quantification.json", "tissues.ctbl", "tissues-itksnap.txt",
    }  # fmt: skip
    assert {path.name for path in (finished / "scores").iterdir()} == {
        "cases.csv", "calibration.csv", "summary.json", "table.md", "table.tex", "boxplot.png", "worst.html",
    }  # fmt: skip
    assert not store.leftovers()
    assert not list(finished.rglob("*.lock"))
    assert all(not finding.problem for finding in verify_store(store))
    assert {finding.path for finding in verify_store(store)} >= set((finished / "store").rglob("*.h5"))


def test_label_maps_lie_on_the_scan_the_right_way_up(finished: Path, manifest: Path) -> None:
    for case_id in CASES:
        scan = find_sources([manifest.parent / case_id])[0].read()
        reference = read_image(manifest.parent / "reference" / f"{case_id}.nii.gz", integer=True)
        labels = read_image(finished / "results" / f"{case_id}.nii.gz", integer=True)
        assert labels.geometry.is_close(scan.geometry, tolerance_voxels=1e-3)
        predicted, truth = labels.array > 0, reference.array > 0
        overlap = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
        # any flip or transposition of this asymmetric chest falls below 0.9
        assert overlap > 0.93
        assert 2 * (predicted[:, :, ::-1] & truth).sum() / (predicted.sum() + truth.sum()) < overlap - 0.02
        assert np.median(scan.array[predicted]) < -600


def test_the_table_and_the_numbers_agree_with_the_files(finished: Path, manifest: Path) -> None:
    summary = json.loads((finished / "scores" / "summary.json").read_text())
    assert summary["num_cases"] == 2
    with open(finished / "results" / "quantification.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["region"] == "whole"]
    for case_id in CASES:
        labels = read_image(finished / "results" / f"{case_id}.nii.gz", integer=True)
        values = {row["metric"]: row for row in rows if row["case"] == case_id}
        for name, tissue in (("healthy", 1), ("ggo", 3), ("consolidation", 5)):
            ml = float((labels.array == tissue).sum() * labels.geometry.voxel_ml)
            assert float(values[f"{name}_ml"]["value"]) == pytest.approx(ml, abs=1e-3)
        assert float(values["volume_ml"]["value"]) == pytest.approx((labels.array > 0).sum() * labels.geometry.voxel_ml)


def test_training_distils_and_logs(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "run" / "stats.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16, 24]
    assert lines[-1]["weight"] == 0.5
    assert {"contrast", "regression", "diffusion", "mean_positives", "student_cosine", "gradient_norm"} <= set(
        lines[-1]
    )
    assert all(np.isfinite(line["total"]) for line in lines)
    student = load_student(finished / "run" / "model.safetensors")
    assert student.card["images"] == 24
    assert student.card["num_cases"] == 2
    assert len(list((finished / "run").glob("checkpoint-*.pt"))) == 2


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes_in_one_process_or_two(
    finished: Path, manifest: Path, tmp_path: Path
) -> None:
    run_stages(manifest, tmp_path, execution=Execution(quiet=True, jobs=2))
    assert tree_hashes(tmp_path) == tree_hashes(finished)


def test_running_again_changes_nothing(copy: Path, manifest: Path) -> None:
    before = tree_hashes(copy)
    results = [
        preprocess(None, copy / "store", PREPROCESS, manifest=manifest, execution=QUIET),
        extract_radiomics(copy / "store", RADIOMICS, execution=QUIET),
        cluster(copy / "store", copy / "run", CLUSTER, execution=QUIET),
        refine(copy / "store", REFINE, execution=QUIET),
    ]
    assert all(outcome.status == "complete already" for result in results for outcome in result.outcomes)
    assert "already complete" in train_ddpm(copy / "store", copy / "run", TRAIN, execution=QUIET).notes[0]
    assert tree_hashes(copy) == before


def test_bundle_applies_without_refitting(copy: Path, manifest: Path, tmp_path: Path) -> None:
    before = {c: (copy / "store" / "cases" / c / "clusters.diffseglung.h5").read_bytes() for c in CASES}
    for case_id in CASES:
        for name in ("clusters", "tokens", "labels"):
            (copy / "store" / "cases" / case_id / f"{name}.diffseglung.h5").unlink()
    shutil.rmtree(copy / "store" / "fits")
    bundle = copy / "bundle.safetensors"
    cluster(copy / "store", bundle, CLUSTER, fit=bundle, execution=QUIET)
    assert not (copy / "store" / "fits").exists()
    assert {c: (copy / "store" / "cases" / c / "clusters.diffseglung.h5").read_bytes() for c in CASES} == before
    assert load_fit(bundle).fingerprint == load_fit(_fit_of(copy, manifest)).fingerprint


def _fit_of(copy: Path, manifest: Path) -> Path:
    cluster(copy / "store", copy / "run", CLUSTER, fit_only=True, execution=QUIET)
    return copy / "store" / "fits" / CLUSTER.run_name


def test_other_settings_are_refused_and_overwritten_on_request(copy: Path, manifest: Path) -> None:
    other = dataclasses.replace(REFINE, fusion="none")
    result = refine(copy / "store", other, execution=QUIET)
    assert result.exit_code == MismatchError.exit_code
    assert "fusion" in result.outcomes[0].message
    assert "--overwrite" in result.outcomes[0].message
    replaced = refine(copy / "store", other, execution=Execution(quiet=True, overwrite=True))
    assert [outcome.status for outcome in replaced.outcomes] == ["done", "done"]
    with pytest.raises(MismatchError, match="spacing_mm"):
        preprocess(
            None, copy / "store", dataclasses.replace(PREPROCESS, spacing_mm=1.0), manifest=manifest, execution=QUIET
        )
    with pytest.raises(MismatchError, match="learning_rate"):
        train_ddpm(copy / "store", copy / "run", dataclasses.replace(TRAIN, learning_rate=0.1), execution=QUIET)
    with pytest.raises(MismatchError, match="pca"):
        cluster(copy / "store", copy / "run", dataclasses.replace(CLUSTER, pca=3), fit_only=True, execution=QUIET)


def test_a_stale_input_is_refused(copy: Path) -> None:
    """Posteriors of another volume than the one beside them are not refined further."""
    first, second = (copy / "store" / "cases" / c for c in CASES)
    shutil.copy(second / "clusters.diffseglung.h5", first / "clusters.diffseglung.h5")
    result = refine(copy / "store", REFINE, execution=QUIET)
    by_case = {outcome.case_id: outcome for outcome in result.outcomes}
    assert by_case[CASES[0]].status == "failed"
    assert by_case[CASES[1]].status == "complete already"
    with pytest.raises(PartialError):
        result.require_complete()


def test_one_bad_scan_does_not_stop_the_others(manifest: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(manifest.parent / CASES[0], scans / "good")
    shutil.copytree(manifest.parent / CASES[1], scans / "bad")
    for path in sorted((scans / "bad").glob("*.dcm"))[10:14]:
        path.unlink()
    result = preprocess([scans / "good", scans / "bad"], tmp_path / "store", PREPROCESS, execution=QUIET)
    assert result.exit_code == 8
    good, bad = result.outcomes
    assert good.status == "done"
    assert bad.status == "failed"
    assert bad.exit_code == 3
    assert "missing" in bad.message
    assert len(Store(tmp_path / "store").case_ids()) == 1


def test_ids_are_hashed_and_linked_only_by_the_id_map(manifest: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.csv"
    result = preprocess([manifest.parent / CASES[0]], tmp_path / "store", PREPROCESS, id_map=ids, execution=QUIET)
    (case_id,) = Store(tmp_path / "store").case_ids()
    assert case_id == result.outcomes[0].case_id
    assert "phantom" not in case_id
    assert ids.stat().st_mode & 0o777 == 0o600
    (row,) = csv.DictReader(ids.open())
    assert row["case_id"] == case_id
    assert row["source"].endswith(CASES[0])
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"phantom-11" not in stored
    assert str(manifest.parent).encode() not in stored


def test_patients_are_told_apart_by_the_manifest_or_a_hash(manifest: Path, tmp_path: Path) -> None:
    folders = [manifest.parent / case_id for case_id in CASES]
    preprocess(folders, tmp_path / "hashed", PREPROCESS, execution=QUIET)
    patients = {_patient(tmp_path / "hashed", case_id) for case_id in Store(tmp_path / "hashed").case_ids()}
    assert len(patients) == 2
    assert not patients & {*CASES, *Store(tmp_path / "hashed").case_ids()}
    table = tmp_path / "cases.csv"
    table.write_text(f"path,case_id,patient_id\n{folders[0]},a,same\n{folders[1]},b,same\n")
    preprocess(None, tmp_path / "listed", PREPROCESS, manifest=table, execution=QUIET)
    assert [_patient(tmp_path / "listed", case_id) for case_id in ("a", "b")] == ["same", "same"]


def _patient(store: Path, case_id: str) -> str:
    with Store(store).open(case_id, "volume") as volume:
        return str(volume.provenance["patient_id"])


def test_nifti_in_gives_a_map_on_the_files_own_grid(finished: Path, manifest: Path, tmp_path: Path) -> None:
    """A scan stored with other axes and flips gets its label map back in exactly that layout."""
    import SimpleITK as sitk

    scan = find_sources([manifest.parent / CASES[0]])[0].read()
    from lungseg.scan.nifti import write_image

    path = tmp_path / "scan.nii.gz"
    write_image(path, scan.array, scan.geometry, stored_axes=(2, 0, 1), stored_flips=(True, False, True))
    ids = tmp_path / "ids.csv"
    made = preprocess([path], tmp_path / "store", PREPROCESS, id_map=ids, execution=QUIET).require_complete()
    assert [outcome.case_id for outcome in made.outcomes] == Store(tmp_path / "store").case_ids()
    assert [row["source"] for row in csv.DictReader(ids.open())] == [str(path)]
    bundle = finished / "bundle.safetensors"
    cluster(tmp_path / "store", bundle, CLUSTER, fit=bundle, execution=QUIET)
    refine(tmp_path / "store", REFINE, export=tmp_path / "out", execution=QUIET)
    (written,) = (tmp_path / "out").glob("*.nii.gz")
    before, after = sitk.ReadImage(str(path)), sitk.ReadImage(str(written))
    assert before.GetSize() == after.GetSize()
    assert np.allclose(before.GetDirection(), after.GetDirection())
    assert np.allclose(before.GetOrigin(), after.GetOrigin(), atol=1e-3)
    inside = sitk.GetArrayFromImage(before)[sitk.GetArrayFromImage(after) > 0]
    assert np.median(inside) < -600


def test_evaluate_folders_counts_what_is_missing(finished: Path, manifest: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    shutil.copy(finished / "results" / f"{CASES[0]}.nii.gz", predictions)
    result = evaluate(
        predictions, tmp_path / "scores", EVALUATE, reference=manifest.parent / "reference", execution=QUIET
    )
    assert result.exit_code == 8
    assert {o.case_id: o.status for o in result.outcomes} == {CASES[0]: "done", CASES[1]: "failed"}
    assert "missing prediction 5" in (tmp_path / "scores" / "table.md").read_text(encoding="utf-8")
    own = json.loads((finished / "scores" / "summary.json").read_text())
    from_files = evaluate(
        finished / "results", tmp_path / "all", EVALUATE, reference=manifest.parent / "reference", execution=QUIET
    )
    mine, theirs = own["overall"], from_files.values["summary"]["overall"]
    assert mine["dice_mean"] == pytest.approx(theirs["dice_mean"], abs=1e-9)
    with pytest.raises(InputError, match="named like"):
        evaluate(tmp_path / "predictions", tmp_path / "x", EVALUATE, reference=finished / "scores", execution=QUIET)


def test_perfect_prediction_scores_one(manifest: Path, tmp_path: Path) -> None:
    references = manifest.parent / "reference"
    result = evaluate(references, tmp_path / "scores", EVALUATE, reference=references, execution=QUIET)
    assert result.values["summary"]["overall"]["dice_mean"] == 1.0
    assert result.values["summary"]["overall"]["hd95_mean_mm"] == 0.0


def test_synthetic_store_has_the_usual_layout_and_resumes(copy: Path) -> None:
    before = tree_hashes(copy / "synthetic")
    store = Store(copy / "synthetic")
    assert len(store.case_ids()) == 3
    assert "synthetic" in store.header["provenance"]
    with store.open("synthetic-000001", "volume") as volume:
        image = volume.read("image")
        assert image.shape == TRAIN.patch_size
        assert -1024 <= image.min() < image.max() <= 400
        assert volume.provenance["synthetic"] is True
    shutil.rmtree(copy / "synthetic" / "cases" / "synthetic-000001")
    synthesize(copy / "run", copy / "synthetic", SYNTHESIZE, execution=QUIET)
    assert tree_hashes(copy / "synthetic") == before
    other = dataclasses.replace(SYNTHESIZE, seed=1)
    with pytest.raises(MismatchError, match="seed"):
        synthesize(copy / "run", copy / "synthetic", other, execution=QUIET)


def test_training_needs_the_store_it_was_made_for(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="patches of"):
        train_ddpm(
            copy / "store", tmp_path / "run", dataclasses.replace(TRAIN, patch_size=(8, 16, 16)), execution=QUIET
        )
    (copy / "store" / "standardisation.json").unlink()
    with pytest.raises(InputError, match="extract-radiomics"):
        train_ddpm(copy / "store", tmp_path / "run", TRAIN, execution=QUIET)


def test_model_of_another_spacing_is_refused(finished: Path, manifest: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(PREPROCESS, spacing_mm=2.5)
    preprocess(None, tmp_path / "store", config, manifest=manifest, execution=QUIET)
    with pytest.raises(MismatchError, match=r"2\.0 mm"):
        cluster(tmp_path / "store", finished / "run", CLUSTER, execution=QUIET)


def test_shards_share_the_work(manifest: Path, tmp_path: Path, finished: Path) -> None:
    for index in (1, 2):
        shard = Execution(quiet=True, shard=f"{index}/2")
        result = preprocess(None, tmp_path / "store", PREPROCESS, manifest=manifest, execution=shard)
        assert len(result.outcomes) == 1
    for case_id in CASES:
        name = f"cases/{case_id}/volume.h5"
        assert (tmp_path / "store" / name).read_bytes() == (finished / "store" / name).read_bytes()


def test_no_source_saves_the_space_and_leaves_densities_blank(finished: Path, manifest: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(PREPROCESS, source=False)
    preprocess(None, tmp_path / "store", config, manifest=manifest, execution=QUIET)
    bundle = finished / "bundle.safetensors"
    cluster(tmp_path / "store", bundle, CLUSTER, fit=bundle, execution=QUIET)
    refine(tmp_path / "store", REFINE, export=tmp_path / "out", execution=QUIET)
    with open(tmp_path / "out" / "quantification.csv", newline="") as stream:
        rows = {row["metric"]: row for row in csv.DictReader(stream) if row["region"] == "whole"}
    assert rows["laa950_pct"]["value"] == ""
    assert float(rows["volume_ml"]["value"]) > 50


def test_lazy_namespace_has_every_stage() -> None:
    assert lungseg.preprocess is preprocess
    assert lungseg.train_ddpm is train_ddpm
    with pytest.raises(AttributeError):
        _ = lungseg.nothing


def test_a_fit_of_another_model_or_other_tokens_is_refused(copy: Path, tmp_path: Path) -> None:
    bundle = copy / "bundle.safetensors"
    other = dataclasses.replace(TRAIN, seed=TRAIN.seed + 1, total_images=4)
    train_ddpm(copy / "store", tmp_path / "other", other, execution=QUIET)
    with pytest.raises(MismatchError, match="another model"):
        cluster(copy / "store", tmp_path / "other", CLUSTER, fit=bundle, execution=QUIET)
    with pytest.raises(MismatchError, match="timesteps"):
        cluster(copy / "store", bundle, dataclasses.replace(CLUSTER, timesteps=(5,)), fit=bundle, execution=QUIET)


def test_tokens_of_the_fit_come_from_the_whole_lung_however_few(copy: Path) -> None:
    with Store(copy / "store").open(CASES[0], "tokens", CLUSTER.run_name) as sample:
        z = sample.read("index")[:, 0]
    assert len(np.unique(z)) > 5
    first = z[: len(z) // 5]  # what a fit takes that may use only a fifth of the tokens
    assert set(np.unique(first)) >= set(np.quantile(z, (0.1, 0.5, 0.9)).round().astype(int))


def test_results_of_a_replaced_volume_are_not_used(copy: Path, manifest: Path) -> None:
    """After preprocess --overwrite with another grid, old posteriors and old labels are refused, naming the stage."""
    config = dataclasses.replace(PREPROCESS, margin_mm=PREPROCESS.margin_mm + 4)
    preprocess(None, copy / "store", config, manifest=manifest, execution=Execution(quiet=True, overwrite=True))
    refined = refine(copy / "store", REFINE, execution=QUIET)
    assert [o.exit_code for o in refined.outcomes] == [4, 4]
    assert "another volume.h5" in refined.outcomes[0].message
    with pytest.raises(InputError, match=r"another volume\.h5"):
        evaluate(copy / "store", copy / "again", EVALUATE, execution=QUIET)


def test_a_case_that_was_not_clustered_is_reported(copy: Path, tmp_path: Path) -> None:
    (copy / "store" / "cases" / CASES[0] / "clusters.diffseglung.h5").unlink()
    (copy / "store" / "cases" / CASES[0] / "labels.diffseglung.h5").unlink()
    result = refine(copy / "store", REFINE, export=tmp_path / "out", execution=QUIET)
    assert result.exit_code == 8
    assert "not clustered" in result.outcomes[0].message
    with open(tmp_path / "out" / "quantification.csv", newline="") as stream:
        assert {row["case"] for row in csv.DictReader(stream)} == {CASES[1]}


def test_one_damaged_volume_leaves_the_other_cases_their_numbers(copy: Path, tmp_path: Path) -> None:
    path = copy / "store" / "cases" / CASES[0] / "volume.h5"
    path.write_bytes(path.read_bytes()[:5000])
    result = refine(copy / "store", REFINE, export=tmp_path / "out", execution=QUIET)
    assert [o.exit_code for o in result.outcomes] == [6, 0]
    assert (tmp_path / "out" / f"{CASES[1]}.nii.gz").is_file()
    with open(tmp_path / "out" / "quantification.csv", newline="") as stream:
        assert {row["case"] for row in csv.DictReader(stream)} == {CASES[1]}
    scored = evaluate(copy / "store", tmp_path / "scores", EVALUATE, execution=QUIET)
    assert scored.exit_code == 8


def test_shared_files_name_no_case_and_no_stranger(finished: Path, manifest: Path, tmp_path: Path) -> None:
    for case_id in CASES:
        assert case_id.encode() not in (finished / "bundle.safetensors").read_bytes()
        assert case_id.encode() not in (finished / "run" / "model.safetensors").read_bytes()
    references = tmp_path / "references"
    shutil.copytree(manifest.parent / "reference", references)
    shutil.copy(references / f"{CASES[0]}.nii.gz", references / "DOE_JOHN.nii.gz")
    result = evaluate(finished / "store", tmp_path / "scores", EVALUATE, reference=references, execution=QUIET)
    assert result.exit_code == 8
    assert "DOE_JOHN" not in (tmp_path / "scores" / "cases.csv").read_text(encoding="utf-8")
    assert [o.case_id for o in result.outcomes] == [*CASES, "reference-0001"]


def test_an_output_that_is_a_file_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        refine(finished / "store", REFINE, export=tmp_path / "file", execution=QUIET)
    with pytest.raises(InputError, match="is a file"):
        evaluate(finished / "store", tmp_path / "file" / "deeper", EVALUATE, execution=QUIET)
    assert (tmp_path / "file").read_text() == "mine"

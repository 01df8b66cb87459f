"""``run``, ``demo`` and ``phantom`` as a user calls them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipeline_fixture import PHANTOM, QUIET, TOML, TRAIN, tree_hashes
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.config import ClusterConfig, Execution, PreprocessConfig, RadiomicsConfig, TrainConfig
from lungseg.config import presets as preset_module
from lungseg.errors import InputError
from lungseg.scan.nifti import read_image
from lungseg.stages.demo import demo
from lungseg.stages.phantom import phantom


def test_run_trains_on_the_given_scans_and_scores(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(TOML)
    arguments = ["run", "-o", str(tmp_path / "out"), "--train", "--preset", "tiny", "--salt", "s"]
    arguments += ["--manifest", str(manifest), "--config", str(tmp_path / "settings.toml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "bundle.safetensors").is_file()
    assert {p.suffix for p in (tmp_path / "out" / "results").iterdir()} == {
        ".gz",
        ".png",
        ".csv",
        ".json",
        ".ctbl",
        ".txt",
    }
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    assert "HD95" in result.output
    assert "consolidation" in (tmp_path / "out" / "scores" / "table.md").read_text(encoding="utf-8")

    # the bundle alone is enough for another scan, with spacing and fit from the model
    again = ["run", str(manifest.parent / "phantom-11"), "-o", str(tmp_path / "new")]
    result = CliRunner().invoke(app, [*again, "--model", str(tmp_path / "out" / "bundle.safetensors")])
    assert result.exit_code == 0, result.output
    (label_map,) = (tmp_path / "new" / "results").glob("*.nii.gz")
    first = read_image(tmp_path / "out" / "results" / "phantom-11.nii.gz", integer=True)
    assert np.array_equal(read_image(label_map, integer=True).array, first.array)
    assert not (tmp_path / "new" / "store" / "fits").exists()


def test_run_with_a_model_without_fit_fits_on_the_scans(finished: Path, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(TOML)
    arguments = ["run", str(manifest.parent), "-o", str(tmp_path / "out"), "--model", str(finished / "run")]
    arguments += ["--manifest", str(manifest), "--config", str(tmp_path / "settings.toml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "store" / "fits" / "diffseglung" / "clusters.json").is_file()


def test_run_reports_a_bad_scan_and_finishes_the_others(finished: Path, manifest: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(manifest.parent / "phantom-11", scans / "good")
    (scans / "bad").mkdir()
    (scans / "bad" / "scan.nii.gz").write_bytes(b"not an image")
    bundle = finished / "bundle.safetensors"
    arguments = ["run", str(scans / "good"), str(scans / "bad"), "-o", str(tmp_path / "out"), "--model", str(bundle)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 8, result.output
    assert "1 done, 1 failed" in result.output
    assert len(list((tmp_path / "out" / "results").glob("*.nii.gz"))) == 1
    assert "Traceback" not in result.output
    only_bad = ["run", str(scans / "bad"), "-o", str(tmp_path / "none"), "--model", str(bundle)]
    assert CliRunner().invoke(app, only_bad).exit_code == 3


def test_demo_trains_on_one_set_and_scores_the_other(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tmp_path / "samples"
    shutil.copytree(manifest.parent, samples / "train")
    phantom(samples / "test", dataclasses.replace(PHANTOM, num=1, seed=31), execution=QUIET)
    small = {
        PreprocessConfig: {"spacing_mm": 2.0, "patch_size": (16, 16, 16), "patch_stride": (8, 8, 8)},
        RadiomicsConfig: {"window": 16, "samples_per_case": 60, "standardisation_windows": (8,)},
        TrainConfig: dict(vars(TRAIN)),
        ClusterConfig: {"components": 8, "pca": 4, "restarts": 1, "tokens_per_case": 400},
    }
    monkeypatch.setitem(preset_module.PRESETS, "tiny", small)  # type: ignore[arg-type]
    result = demo(samples, tmp_path / "out", execution=QUIET)
    assert result.exit_code == 0
    assert result.values["summary"]["num_cases"] == 1
    assert [table.title for table in result.tables]
    assert (tmp_path / "out" / "test" / "results" / "phantom-31.png").is_file()
    # labels of the training set reach no artefact of training or of the fit
    shutil.rmtree(samples / "train" / "reference")
    rows = ["path,case_id,patient_id,inspiration", *(f"{c},{c},{c},inspiration" for c in ("phantom-11", "phantom-12"))]
    (samples / "train" / "manifest.csv").write_text("\n".join(rows) + "\n")
    demo(samples, tmp_path / "blind", execution=QUIET)
    first, blind = tree_hashes(tmp_path / "out"), tree_hashes(tmp_path / "blind")
    assert first["bundle.safetensors"] == blind["bundle.safetensors"]
    assert first["test/results/phantom-31.nii.gz"] == blind["test/results/phantom-31.nii.gz"]
    with pytest.raises(InputError, match="phantom"):
        demo(tmp_path / "nothing", tmp_path / "x", execution=QUIET)


def test_phantoms_are_reproducible_and_kept(manifest: Path, tmp_path: Path) -> None:
    phantom(tmp_path / "again", PHANTOM, execution=QUIET)
    assert tree_hashes(tmp_path / "again") == tree_hashes(manifest.parent)
    result = phantom(tmp_path / "again", dataclasses.replace(PHANTOM, num=3), execution=QUIET)
    assert [outcome.status for outcome in result.outcomes] == ["complete already", "complete already", "done"]
    assert len((tmp_path / "again" / "manifest.csv").read_text().splitlines()) == 4
    with pytest.raises(InputError, match="other settings"):
        phantom(tmp_path / "again", dataclasses.replace(PHANTOM, noise_hu=1.0), execution=QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        phantom(tmp_path / "file", PHANTOM, execution=QUIET)


@pytest.mark.slow
def test_run_on_a_real_chest(finished: Path, shared_data: Path, tmp_path: Path) -> None:
    """covid-p002: 133 slices; the map covers both lungs, right side up, on the scan's grid."""
    folder = shared_data / "covid-p002" / "dicom"
    bundle = finished / "bundle.safetensors"
    arguments = ["run", str(folder), "-o", str(tmp_path / "out"), "--model", str(bundle)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    from lungseg.scan.sources import find_sources

    scan = find_sources([folder])[0].read()
    (path,) = (tmp_path / "out" / "results").glob("*.nii.gz")
    labels = read_image(path, integer=True)
    assert labels.geometry.is_close(scan.geometry, tolerance_voxels=1e-3)
    lung = labels.array > 0
    litres = lung.sum() * labels.geometry.voxel_ml / 1000
    assert 3.0 < litres < 5.0  # 3.9 L in the data's own description
    assert np.median(scan.array[lung]) < -700
    # both lungs together are widest at the base, which lies at low z, and narrow at the apex
    z = np.flatnonzero(lung.any(axis=(1, 2)))
    base, apex = (np.ptp(np.flatnonzero(lung[z[int(share * len(z))]].any(axis=0))) for share in (0.15, 0.85))
    assert base > 1.2 * apex


def test_execution_rejects_nonsense_before_work(manifest: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["preprocess", str(manifest.parent), "-o", str(tmp_path / "s"), "--jobs", "0"])
    assert result.exit_code == 2
    assert "minimum of 1" in result.output
    assert not (tmp_path / "s").exists()
    assert Execution().take_shard([1, 2]) == [1, 2]


def test_settings_of_all_stages_are_checked_before_any_work(finished: Path, manifest: Path, tmp_path: Path) -> None:
    settings, bundle = tmp_path / "settings.toml", finished / "bundle.safetensors"
    base = ["run", str(manifest.parent / "phantom-11"), "-o", str(tmp_path / "out"), "--config", str(settings)]
    for table, model, message in (
        ("[refine]\nfusoin = 'none'", bundle, "did you mean 'fusion'"),
        ("[cluster]\ntimesteps = [100]", bundle, "the model was made with"),
        ("[preprocess]\nspacing-mm = 3.0", bundle, "the model was made with 2.0"),
    ):
        settings.write_text(table)
        result = CliRunner().invoke(app, [*base, "--model", str(model)])
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert not (tmp_path / "out" / "store").exists()


def test_dry_run_shows_the_settings_of_every_stage(finished: Path, manifest: Path, tmp_path: Path) -> None:
    import json

    arguments = [
        "run",
        str(manifest.parent),
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(finished / "bundle.safetensors"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--seed", "5"])
    assert result.exit_code == 0, result.output
    stages = json.loads(result.output)["stages"]
    assert set(stages) == {"preprocess", "extract-radiomics", "train-ddpm", "cluster", "refine", "evaluate", "report"}
    assert stages["preprocess"]["spacing_mm"] == 2.0
    assert stages["cluster"]["components"] == 8
    assert stages["evaluate"]["seed"] == 5
    assert not (tmp_path / "out").exists()

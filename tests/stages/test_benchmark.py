"""The benchmark on the smallest cohort: what the tables hold, what rows share, and going on after kill -9."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lungseg.config import BenchmarkConfig, ClusterConfig, EvaluateConfig, Execution, RefineConfig
from lungseg.config.ablations import ABLATIONS, METHODS, ROWS, TABLE_3
from lungseg.config.cluster import STUDENT_METHODS
from lungseg.config.fields import from_dict
from lungseg.errors import LungsegError, MismatchError, UsageError
from lungseg.stages.benchmark import benchmark
from lungseg.stages.benchmark_rows import plan_rows, radiomics_config, table_rows
from lungseg.stages.evaluate import evaluate
from lungseg.store.cases import Store

QUIET = Execution(quiet=True)
TOML = """
[phantom]
spacing-mm = [2.5, 2.0, 2.0]
store-spacing-mm = 2.0
patch-size = [16, 16, 16]
patch-stride = [8, 8, 8]

[extract-radiomics]
samples-per-case = 60

[train-ddpm]
base-width = 8
patch-size = [16, 16, 16]
batch-size = 4
checkpoint-images = 8
log-images = 8
tokens-per-patch = 4

[cluster]
restarts = 1
tokens-per-case = 400

[refine]
""" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in ABLATIONS["6-sobel"].changes[RefineConfig].items())
"""Small settings; the default contours are those of the last row of the ablation, which is then not made twice."""
COHORT = {
    "train": 1, "test": 2, "healthy": 1, "train_seed": 510, "test_seed": 520, "extent_mm": (100, 110, 130),
    "images": 8, "bootstrap": 100,
}  # fmt: skip


def tiny(folder: Path, *rows: str) -> BenchmarkConfig:
    """Settings of a benchmark that takes seconds."""
    (folder / "settings.toml").write_text(TOML, encoding="utf-8")
    return from_dict(BenchmarkConfig, {**COHORT, "rows": rows, "config": str(folder / "settings.toml")})


def lines(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """A table by row and class, without what differs from run to run."""
    with open(path, newline="", encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    return {(row["row"], row["tissue"]): {k: v for k, v in row.items() if "seconds" not in k} for row in found}


def test_an_unknown_row_and_benchmark_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'ruels' is not one of hu-thresholds, .*did you mean 'rules'"):
        from_dict(BenchmarkConfig, {"rows": ("ruels",)})
    with pytest.raises(UsageError, match="there is no benchmark 'generation'; there is segmentation"):
        benchmark("generation", tmp_path / "out", execution=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        ({"train_seed": 8003}, "training phantoms 8003 to 8008 and test phantoms 8000 to 8006 overlap"),
        ({"train_seed": 8006}, "overlap"),  # the healthy one
        ({"severities": ()}, "--severities is empty"),
        ({"rows": ("rules", "rules")}, "each row once"),
        ({"test_seed": 2**32 - 2}, "--test-seed: the last seed would be above"),
    ],
)
def test_cohorts_that_cannot_be_are_refused(values: dict[str, object], phrase: str) -> None:
    with pytest.raises(UsageError, match=phrase):
        from_dict(BenchmarkConfig, values)


def test_severities_are_dealt_out_in_turn() -> None:
    config = BenchmarkConfig()
    assert config.blocks(100, 6) == [("moderate", 100, 3), ("mild", 103, 2), ("severe", 105, 1)]


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_rows_share_networks_and_fits_but_no_settings(preset: str) -> None:
    rows = {row.name: row for row in plan_rows(BenchmarkConfig(preset=preset))}
    assert list(rows) == list(ROWS)
    assert {row.network for row in rows.values()} == {
        "", "preset", "distill-none", "distill-none_hu_window-8-bit", "distill_full-0_distill_start-0",
    }  # fmt: skip
    assert rows["diffusion-only"].network == rows["attention"].network == rows["2-hu"].network == "distill-none"
    assert rows["1-8-bit"].cluster.method == rows["2-hu"].cluster.method == "diffusion-only"
    assert rows["6-sobel"].fit == rows["5-timesteps"].fit == "diffseglung"
    assert rows["4-warm-up"].fit == "4-warm-up"
    assert rows["5-timesteps"].same_as == "5-timesteps"
    for row in rows.values():
        assert (row.cluster.name, row.refine.name) == (row.name, row.name)
        method = ROWS[row.name].changes.get(ClusterConfig, {}).get("method", "diffseglung")
        assert (row.cluster.method, bool(row.network)) == (method, method in STUDENT_METHODS)
    windows = radiomics_config(BenchmarkConfig(preset=preset), list(rows.values())).standardisation_windows
    assert {8, 32} <= set(windows)


def test_a_toml_file_goes_below_what_makes_a_row(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(
        '[cluster]\ntimesteps = [0]\ncomponents = 9\n[refine]\nfusion = "none"\n', encoding="utf-8"
    )
    config = from_dict(
        BenchmarkConfig, {"config": str(tmp_path / "settings.toml"), "rows": ("4-warm-up", "6-sobel", "diffseglung")}
    )
    rows = {row.name: row for row in plan_rows(config)}
    assert rows["4-warm-up"].cluster.timesteps == (10,)
    assert rows["6-sobel"].cluster.timesteps == (0,)
    assert rows["6-sobel"].refine.fusion == "sobel"
    assert {row.cluster.components for row in rows.values()} == {9}
    # here the default is not the last row of the ablation, which then ends with it
    assert [row.name for row in table_rows(list(rows.values()), TABLE_3)] == ["4-warm-up", "6-sobel", "diffseglung"]
    assert [row.name for row in table_rows(list(rows.values()), tuple(METHODS))] == ["diffseglung"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished benchmark of two rows without a network, one with, and one that has to fail."""
    folder = tmp_path_factory.mktemp("benchmark")
    # so few phantoms hold fewer windows than k-means needs
    config = tiny(folder, "hu-thresholds", "rules", "radiomics-kmeans", "diffseglung", "6-sobel")
    result = benchmark("segmentation", folder / "out", config, execution=QUIET)
    assert result.exit_code == 8
    assert [row.name for row in result.values["rows"] if row.error] == ["radiomics-kmeans"]
    return folder / "out"


@pytest.mark.slow
def test_tables_hold_what_the_evaluation_found(made: Path, tmp_path: Path) -> None:
    """The same figures as ``lungseg evaluate`` on the same store; published ones beside them; failures told."""
    names = ("hu-thresholds", "rules", "diffseglung")
    scoring = EvaluateConfig(names=names, bootstrap=100, oracle=False, worst=0)
    evaluate(Store(made / "test"), tmp_path, scoring, execution=QUIET)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    table = lines(made / "table-2.csv")
    assert {name for name, _ in table} == {"hu-thresholds", "rules", "diffseglung"}
    for method in summary["methods"]:
        for row in (*method["classes"], method["overall"]):
            shown = table[method["method"], row["tissue"]]
            for key in ("dice_mean", "dice_ci_low", "hd95_mean_mm", "hd95_median_mm"):
                assert shown[key] == ("" if row[key] is None else f"{row[key]:.6f}"), (method["method"], key)
            assert (int(shown["missed"]), int(shown["pairs"])) == (row["num_missed"], row["num_pairs"])
    for name, found in summary["calibration"].items():
        assert table[name, "all"]["ece"] == f"{found['ece']:.6f}"
    assert table["diffseglung", "fibrosis"]["published_dice_percent"] == "86.400000"
    assert 0 < float(table["rules", "all"]["false_disease_percent"]) < 100
    text = (made / "table-2.md").read_text(encoding="utf-8")
    assert "Row radiomics-kmeans failed, so that it has no figures: " in text
    assert "n = 2 test phantoms (1 moderate, 1 mild; seeds from 520)" in text
    assert "Row 6-sobel has the settings of row diffseglung" in text
    third = lines(made / "table-3.csv")
    assert {key: third["6-sobel", "all"][key] for key in ("dice_mean", "missed")} == {
        key: table["diffseglung", "all"][key] for key in ("dice_mean", "missed")
    }
    assert not (made / "test" / "cases" / "phantom-520" / "labels.6-sobel.h5").exists()  # not mapped a second time


@pytest.mark.slow
def test_references_are_read_by_the_evaluation_alone(made: Path, tmp_path: Path) -> None:
    """Without the labels of the training and the healthy phantoms nothing changes."""
    copy = tmp_path / "out"
    shutil.copytree(made, copy)
    for name in ("train", "healthy"):
        for reference in (copy / name).rglob("reference.h5"):
            reference.unlink()
    for store in ("train", "test", "healthy"):
        for kind in ("tokens", "clusters", "labels"):
            for file in (copy / store).rglob(f"{kind}.rules.h5"):
                file.unlink()
    shutil.rmtree(copy / "train" / "fits" / "rules")
    again = tiny(tmp_path, "rules")
    benchmark("segmentation", copy, again, execution=QUIET)
    assert lines(copy / "table-2.csv") == {k: v for k, v in lines(made / "table-2.csv").items() if k[0] == "rules"}


@pytest.mark.slow
def test_results_of_other_settings_are_refused(made: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path, "rules")
    (tmp_path / "settings.toml").write_text(TOML.replace("2.5, 2.0, 2.0", "2.5, 2.5, 2.5"), encoding="utf-8")
    before = (made / "benchmark.json").read_bytes()
    with pytest.raises(LungsegError, match=r"phantom-510: .* was made with other settings") as refused:
        benchmark("segmentation", made, config, execution=QUIET)
    assert refused.value.exit_code == MismatchError.exit_code
    assert (made / "benchmark.json").read_bytes() == before


@pytest.mark.slow
def test_phantoms_of_a_larger_cohort_are_not_counted(made: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(tmp_path, "rules"), test=1, healthy=0)
    with pytest.raises(MismatchError, match=r"test holds other phantoms too \(phantom-521\)"):
        benchmark("segmentation", made, config, execution=QUIET)


@pytest.mark.slow
def test_killed_again_and_again_it_goes_on_to_the_same_tables(made: Path, tmp_path: Path) -> None:
    """Kill -9 of the command, as soon as each of these files is there; the last life gets through."""
    tiny(tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lungseg.cli.app", "benchmark", "segmentation", "-o", str(out), "--quiet"]
    for key, value in {**COHORT, "rows": ("rules", "diffseglung"), "config": tmp_path / "settings.toml"}.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        command += [f"--{key.replace('_', '-')}", text]
    for sign in (
        "test/cases/phantom-520/volume.h5",
        "test/cases/phantom-520/labels.rules.h5",
        "table-2.csv",
        "models/preset/config.json",
    ):
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ) as process:
            deadline = time.monotonic() + 300
            while not (out / sign).exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    assert {name for name, _ in lines(out / "table-2.csv")} == {"rules"}  # written as soon as there is a row
    assert "Not done yet: diffseglung." in (out / "table-2.md").read_text(encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = lines(made / "table-2.csv")
    found = lines(out / "table-2.csv")
    assert found.keys() == {key for key in expected if key[0] in ("rules", "diffseglung")}
    assert found == {key: expected[key] for key in found}

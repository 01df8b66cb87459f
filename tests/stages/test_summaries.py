"""What each command leaves for people and for machines: a picture, a table at the end, and JSON when asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pipeline_fixture import QUIET, SYNTHESIZE, TOML
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.errors import MismatchError
from lungseg.stages.synthesize import synthesize
from lungseg.store.cases import Store


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def commands(copy: Path) -> dict[str, list[object]]:
    """Every command again on its own finished results."""
    settings = copy / "settings.toml"
    settings.write_text(TOML, encoding="utf-8")
    preset = ["--preset", "tiny", "--config", settings]
    return {
        "train-ddpm": ["train-ddpm", copy / "store", "-o", copy / "run", *preset],
        "cluster": ["cluster", copy / "store", "--model", copy / "run", *preset],
        "evaluate": ["evaluate", copy / "store", "-o", copy / "scores", "--bootstrap", 100],
        "synthesize": ["synthesize", copy / "run", "-o", copy / "synthetic", "-n", 3, "--steps", 3, "--batch-size", 2,
                       "--preset", "tiny", "--real", copy / "store"],
    }  # fmt: skip


def test_each_command_ends_with_a_table_and_has_a_document(copy: Path) -> None:
    given = commands(copy)
    tables = {name: call(*arguments) for name, arguments in given.items()}
    assert "effective rank of the student" in tables["train-ddpm"]
    assert "8 components" in tables["cluster"]
    assert "95 % CI" in tables["evaluate"]
    assert "Hounsfield units of the patches" in tables["synthesize"]
    documents = {name: json.loads(call(*arguments, "--json", "-q")) for name, arguments in given.items()}
    assert all(documents[name]["stage"] == name for name in given)
    cases = set(Store(copy / "store").case_ids())
    assert set(documents["cluster"]["cases"]) == set(documents["evaluate"]["cases"]) == cases
    assert {case["status"] for case in documents["cluster"]["cases"].values()} == {"complete already"}
    written = json.loads((copy / "store" / "fits" / "diffseglung" / "clusters.json").read_text(encoding="utf-8"))
    assert documents["cluster"]["components"] == written["components"]
    written = json.loads((copy / "scores" / "summary.json").read_text(encoding="utf-8"))
    assert documents["evaluate"]["summary"] == written
    training = documents["train-ddpm"]
    lines = [json.loads(line) for line in (copy / "run" / "stats.jsonl").read_text().splitlines()]
    assert training["images"] == lines[-1]["images"] == 24
    assert training["figures"]["diffusion"]["first"] == lines[0]["diffusion"]
    assert training["figures"]["diffusion"]["last"] == lines[-1]["diffusion"]
    patches = documents["synthesize"]["patches"]
    with Store(copy / "synthetic").open("synthetic-000001", "volume") as volume:
        assert volume.read("image").shape == (16, 16, 16)
    assert patches["drawn"]["num"] == patches["real"]["num"] == 3
    assert -1024 <= patches["real"]["median_hu"] <= 200


def test_pictures_are_beside_the_results_they_show(finished: Path) -> None:
    for path in (
        "store/fits/diffseglung/embedding.png",
        "synthetic/samples.png",
        "run/curves.png",
        "scores/boxplot.png",
    ):
        data = (finished / path).read_bytes()
        assert data.startswith(b"\x89PNG")
        for chunk in (b"tEXt", b"iTXt", b"zTXt", b"tIME", str(finished).encode()):
            assert chunk not in data


def test_real_patches_of_another_grid_are_refused_before_any_is_drawn(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished / "store", other)
    header = json.loads((other / "store.json").read_text(encoding="utf-8"))
    header["config"]["spacing_mm"] = 1.0
    (other / "store.json").write_text(json.dumps(header), encoding="utf-8")
    with pytest.raises(MismatchError, match="give the store it was trained on"):
        synthesize(finished / "run", tmp_path / "out", SYNTHESIZE, real=other, execution=QUIET)
    assert not (tmp_path / "out").exists()


def test_the_same_seed_shows_the_same_real_patches(finished: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthesize(finished / "run", tmp_path / name, SYNTHESIZE, real=finished / "store", execution=QUIET)
    first = (tmp_path / "a" / "samples.png").read_bytes()
    assert first == (tmp_path / "b" / "samples.png").read_bytes()
    assert first != (finished / "synthetic" / "samples.png").read_bytes()  # that one has drawn ones only

"""`lungseg probe` on a model trained in the test, by its table, its JSON and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.config.execution import Execution
from lungseg.config.probe import ProbeConfig
from lungseg.errors import MismatchError, UsageError
from lungseg.stages.probe import probe

QUIET = Execution(quiet=True)
SMALL = ProbeConfig(timesteps=(0, 25), windows_per_case=3, tokens_per_case=60, clusters=4, pca=6)


def test_scores_every_level_and_block(finished: Path, tmp_path: Path) -> None:
    result = probe(finished / "run", finished / "store", SMALL, output=tmp_path / "scores.json", execution=QUIET)
    rows = result.values["scores"]
    blocks = ["encoder.0.0", "encoder.1.0", "middle", "embedding"]
    assert [(row["timestep"], row["block"]) for row in rows] == [(t, name) for t in (0, 25) for name in blocks]
    for row in rows:
        assert -1 <= row["silhouette"] <= 1
        assert 0 <= row["hu_separability"] <= 1
        assert 0 <= row["texture_separability"] <= 1
        assert 1 <= row["effective_rank"] <= 16 or row["block"] == "embedding"
        assert 80 <= row["tokens"] <= 130
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["scores"] == rows
    assert written["cases"] == 2
    again = probe(finished / "run", finished / "store", SMALL, execution=QUIET)
    assert again.values["scores"] == rows


def test_command_prints_json_and_takes_blocks(finished: Path) -> None:
    arguments = ["probe", str(finished / "run"), str(finished / "store"), "--json", "-q", "--timesteps", "5"]
    arguments += ["--blocks", "decoder.1.0,middle", "--windows-per-case", "1", "--tokens-per-case", "30"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["scores"]
    assert [row["block"] for row in rows] == ["decoder.1.0", "middle"]


def test_unknown_blocks_and_levels_are_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match=r"--blocks middel: this model has encoder\.0\.0"):
        probe(finished / "run", finished / "store", ProbeConfig(blocks=("middel",)), execution=QUIET)
    with pytest.raises(MismatchError, match="diffusion has 250 steps"):
        probe(finished / "run", finished / "store", ProbeConfig(timesteps=(0, 251)), execution=QUIET)

"""Options made from the configurations: help, defaults, presets, files, and every way to get them wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.cli.commands import COMMANDS
from lungseg.cli.options import Command, _defaults, make_configs
from lungseg.config.benchmark import BenchmarkConfig
from lungseg.config.execution import Execution
from lungseg.config.fields import flag_name, option_info, to_dict
from lungseg.config.presets import PRESETS, make_config

BY_NAME = {command.name: command for command in COMMANDS}
EXECUTION = {field.name: field for field in dataclasses.fields(Execution) if "option" in field.metadata}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def help_of(name: str) -> str:
    """Help with its line wrapping undone."""
    result = call(name, "--help")
    assert result.exit_code == 0
    return re.sub(r"\s+", " ", re.sub(r"-\n\s+", "-", result.stdout))


def paths_of(command: Command) -> list[str]:
    """Something for each required path."""
    arguments = []
    for path in command.paths:
        if path.required or path.many or (command.check and path.name == "output"):
            arguments += [path.flags[0], "somewhere"] if path.flags else ["somewhere"]
    return arguments


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_help_shows_each_option_with_default_unit_and_doc(command: Command) -> None:
    text = help_of(command.name)
    assert command.doc in text
    fields = list(dataclasses.fields(command.config)) if command.config else []
    for field in [*fields, *(EXECUTION[name] for name in command.execution)]:
        cls = command.config if field in fields else Execution
        assert f"{flag_name(field.name)} " in text.replace(",", " ").replace("/", " "), field.name
        assert option_info(field).doc in text, field.name
        assert f"[{_defaults(field, cls)}]" in text, field.name
        if option_info(field).unit:
            assert option_info(field).unit in _defaults(field, cls)
    for path in command.paths:
        assert path.doc in text
        assert "[required]" in text or not path.required
    if command.config is not None:
        assert "--preset" in text
        assert "--config" in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_help_has_two_examples_that_parse(command: Command) -> None:
    lines = call(command.name, "--help").stdout.splitlines()
    shown = [line.strip() for line in lines if line.strip().startswith("$ lungseg")]
    assert shown == [f"$ {example}" for example in command.examples]
    assert len(shown) == 2
    if "dry_run" in command.execution:
        for example in command.examples:
            words = example.split()
            assert words[:2] == ["lungseg", command.name]
            result = call(*words[1:], "--dry-run")
            # the settings of `run` follow from the model, and the example's model is not here
            needs_model = bool(command.plan) and "--model" in words
            assert result.exit_code == (3 if needs_model else 0), result.output
            assert ("no such model" in result.output) == needs_model


@pytest.mark.parametrize("name", [c.name for c in COMMANDS if "dry_run" in c.execution])
@pytest.mark.parametrize("preset", PRESETS)
def test_dry_run_prints_the_settings_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, preset: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = BY_NAME[name]
    result = call(name, *paths_of(command), "--preset", preset, "--dry-run")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["command"] == name
    assert set(plan["paths"]) == {path.name for path in command.paths}
    if name == "run":
        own = {"config": "", "salt": "", "lung_mask_labels": "auto", "seed": None}
        assert plan["config"] == {"preset": preset, **own}
    elif name == "benchmark":  # hands the preset on, as `run` does
        assert plan["config"] == to_dict(BenchmarkConfig(preset=preset))
    else:
        assert plan["config"] == to_dict(make_config(command.config, preset=preset))
    assert list(tmp_path.iterdir()) == []


def test_options_of_preprocess_that_let_more_scans_in() -> None:
    arguments = ["--allow-gaps", "3", "--correct-tilt", "--nan-to-air", "--volume", "1", "--resample-masks",
                 "--assume-hu", "--spacing", "2"]  # fmt: skip
    config = json.loads(call("preprocess", "a", "-o", "x", *arguments, "--dry-run").stdout)["config"]
    assert (config["allow_gaps"], config["volume"], config["spacing_mm"]) == (3, 1, 2.0)
    switches = ("correct_tilt", "nan_to_air", "resample_masks", "assume_hu", "source")
    assert all(config[name] for name in switches)
    off = [f"--no-{name.replace('_', '-')}" for name in switches]
    config = json.loads(call("preprocess", "a", "-o", "x", *off, "--volume", "none", "--dry-run").stdout)["config"]
    assert not any(config[name] for name in switches)
    assert config["volume"] is None


def test_dry_run_shows_what_was_typed() -> None:
    result = call(
        "train-ddpm", "cohort", "-o", "run", "--patch-size", "16,32,32", "--no-flips", "--learning-rate", "1e-3",
        "--dry-run",
    )  # fmt: skip
    plan = json.loads(result.stdout)
    assert plan["paths"] == {"store": "cohort", "output": "run", "as_json": False}
    assert plan["config"]["patch_size"] == [16, 32, 32]
    assert plan["config"]["flips"] is False
    assert plan["config"]["learning_rate"] == 0.001
    plan = json.loads(call("phantom", "-o", "x", "-n", "4", "--dry-run").stdout)
    assert plan["config"]["num"] == 4
    plan = json.loads(call("preprocess", "a", "b", "-o", "x", "--dry-run").stdout)
    switches = dict.fromkeys(("list_scans", "check", "as_json"), False)
    assert plan["paths"] == {
        "scans": ["a", "b"], "output": "x", "manifest": None, "id_map": None, "series": [], "lung_mask": None,
        **switches,
    }  # fmt: skip
    arguments = ("run", "a", "-o", "x", "--train", "--lung-mask", "masks", "--lung-mask-labels", "cip", "--dry-run")
    plan = json.loads(call(*arguments).stdout)
    assert plan["paths"]["lung_mask"] == "masks"
    assert plan["stages"]["preprocess"]["lung_mask_labels"] == "cip"
    plan = json.loads(call("preprocess", "a", "--check", "--series", "k1,k2", "--series", "k3", "--dry-run").stdout)
    assert plan["paths"]["series"] == ["k1,k2", "k3"]
    assert plan["paths"]["check"] is True
    plan = json.loads(call("cluster", "s", "--model", "m", "--fit-only", "--pca", "none", "--dry-run").stdout)
    switches = {"fit_only": True, "as_json": False}
    assert plan["paths"] == {"store": "s", "model": "m", "fit": None, "bundle": None, **switches}
    assert plan["config"]["pca"] is None
    plan = json.loads(call("report", "s", "-o", "x", "--pictures", "a", "--pictures", "b", "--dry-run").stdout)
    assert plan["paths"]["pictures"] == ["a", "b"]


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return str(path)


def test_options_beat_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    file = toml(tmp_path, "[preprocess]\nmargin-mm = 3\nspacing_mm = 2.0\n[cluster]\npca = 3\n")
    result = call(
        "preprocess", "a", "-o", "x", "--preset", "tiny", "--config", file, "--spacing-mm", "2.5", "--dry-run"
    )
    config = json.loads(result.stdout)["config"]
    assert (config["spacing_mm"], config["margin_mm"]) == (2.5, 3.0)
    assert config["patch_stride"] == list(PRESETS["tiny"][BY_NAME["preprocess"].config]["patch_stride"])


def test_run_hands_preset_and_file_to_its_stages(tmp_path: Path) -> None:
    file = toml(tmp_path, '[run]\nsalt = "s"\n[cluster]\npca = 3\n')
    config, execution = make_configs(BY_NAME["run"], {"preset": "tiny", "config": file, "salt": None}, {"jobs": "3"})
    assert (config.preset, config.config, config.salt) == ("tiny", file, "s")
    assert (execution.jobs, execution.interface) == (3, "cli")
    config, _ = make_configs(BY_NAME["run"], {"preset": None, "config": None, "salt": None}, {})
    assert (config.preset, config.config) == ("auto", "")


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["refine", "s", "--fusoin", "none"], ["--fusoin"]),
        (["refin", "s"], ["refin"]),
        (["refine"], ["STORE"]),
        (["refine", "s", "more"], ["more"]),
        (["preprocess", "a"], ["missing option '--output' / '-o'"]),
        (["preprocess", "a", "--dry-run"], ["--output"]),
        (["preprocess", "a", "--list", "--check"], ["--list and --check exclude each other"]),
        (["preprocess", "a", "-o", "x", "--json"], ["--json goes with --list or --check"]),
        (["preprocess", "a", "--check", "--id-map", "x"], ["--id-map is written by a real run"]),
        (["preprocess", "a", "--list", "--series", "k", "--manifest", "m"], ["--series and --manifest exclude"]),
        (
            ["preprocess", "--list", "--check", "--id-map", "x", "--series", "k", "--manifest", "m"],
            ["--list and --check", "--id-map is", "--series and --manifest"],
        ),
        (["refine", "s", "--fusion", "sobl"], ["'sobl' is not one of none, sobel, guided", "did you mean 'sobel'?"]),
        (["refine", "s", "--jobs", "0"], ["--jobs: 0 is below the minimum of 1"]),
        (["refine", "s", "--jobs", "many"], ["--jobs: 'many' is not a whole number"]),
        (["refine", "s", "--shard", "3/2"], ["--shard: '3/2' is not i/n"]),
        (["refine", "s", "-q", "-v"], ["--quiet and --verbose exclude each other"]),
        (["synthesize", "m", "-o", "x", "--device", "gpu"], ["--device: 'gpu' is not one of auto, cpu, cuda, cuda:N"]),
        (["preprocess", "a", "-o", "x", "--spacing-mm", "-1"], ["-1.0 is below the minimum of 0.3 mm"]),
        (["preprocess", "a", "-o", "x", "--spacing-mm", "nan"], ["nan is not finite"]),
        (["preprocess", "a", "-o", "x", "--preset", "huge"], ["'huge' is not one of tiny, small"]),
        (["run", "a", "-o", "x", "--preset", "huge"], ["'huge' is not one of auto, tiny, small"]),
        (["train-ddpm", "s", "-o", "x", "--batch-size", "0"], ["--batch-size: 0 is below the minimum of 1"]),
        (["train-ddpm", "s", "-o", "x", "--patch-size", "1,2"], ["is not 3 comma-separated values"]),
        (["run", "a", "-o", "x", "--config", "none.toml"], ["none.toml", "No such file"]),
        (
            ["train-ddpm", "s", "-o", "x", "--batch-size", "0", "--loss", "l7", "--timesteps", "3", "--stem", "x"],
            ["--batch-size", "--loss", "--timesteps: 3 is below the minimum of 10", "--stem: 'x'"],
        ),
    ],
)  # fmt: skip
def test_row_63_64_65_usage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], phrases: list[str]
) -> None:
    """Exit code 2, every problem named, before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    text = re.sub(r"\s+", " ", result.stderr)
    for phrase in phrases:
        assert phrase in text
    assert "Traceback" not in result.output or "-v" in arguments
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("[preprocess]\nspacin_mm = 1", "did you mean 'spacing_mm'"),
        ("[preproces]\nspacing_mm = 1", "did you mean [preprocess]"),
        ("[preprocess]\nspacing_mm = 99", "99.0 is above the maximum of 10 mm"),
        ("[preprocess", "not valid TOML"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_row_64_mistakes_in_the_file(tmp_path: Path, text: str, phrase: str, dry: bool) -> None:
    result = call("preprocess", "a", "-o", "x", "--config", toml(tmp_path, text), *(["--dry-run"] if dry else []))
    assert result.exit_code == 2
    assert phrase in result.stderr


def test_each_command_names_an_existing_stage_function() -> None:
    import importlib
    import inspect

    for command in COMMANDS:
        module, _, name = command.stage.partition(":")
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        wanted = {path.name for path in command.paths} | {"execution"} | ({"config"} if command.config else set())
        assert set(parameters) == wanted, command.name

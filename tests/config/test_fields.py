"""Fields: parsed, bounded, explained; every mistake of a user is told at once."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import lungseg.config
from lungseg.cli.commands import COMMANDS
from lungseg.config import Execution, PreprocessConfig, RadiomicsConfig, TrainConfig
from lungseg.config.cluster import ClusterConfig
from lungseg.config.fields import (
    MAX_SEED,
    TABLES,
    flag_name,
    from_dict,
    option,
    option_info,
    parse_value,
    read_toml,
    to_dict,
)
from lungseg.config.run import RunConfig
from lungseg.errors import UsageError

CONFIGS = sorted(
    {c for _, c in inspect.getmembers(lungseg.config, inspect.isclass)} | {RunConfig}, key=lambda c: c.__name__
)


def problems(cls: type, values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        from_dict(cls, values)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, "12", 12), (int, 12.0, 12), (int, "-3", -3),
        (float, "1e-3", 1e-3), (float, 2, 2.0), (float, " 1.5 ", 1.5),
        (str, "word", "word"), (bool, True, True),
        (tuple[int, ...], "1,2,3", (1, 2, 3)), (tuple[int, ...], [1, 2], (1, 2)), (tuple[int, ...], "4", (4,)),
        (tuple[int, ...], "1, 2,", (1, 2)), (tuple[int, ...], "", ()), (tuple[int, int, int], "1,2,3", (1, 2, 3)),
        (tuple[float, float, float], [1, 2, 3], (1.0, 2.0, 3.0)),
        (int | None, "none", None), (int | None, None, None), (int | None, "None", None), (int | None, "5", 5),
    ],
)  # fmt: skip
def test_parse_value(hint: Any, value: Any, expected: Any) -> None:
    parsed = parse_value(hint, value)
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, "1.5"), (int, 1.5), (int, "x"), (int, True), (int, None), (int, float("inf")), (int, float("nan")),
        (float, "x"), (float, True), (float, None), (float, 10**400), (str, 3), (str, True), (bool, "yes"), (bool, 1),
        (tuple[int, ...], 3), (tuple[int, ...], "1,x"), (tuple[int, ...], None), (tuple[int, int, int], "1,2"),
        (tuple[int, int, int], "1,2,3,4"), (int | None, "x"), (int, [1]), (float, {"a": 1}),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type(hint: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        parse_value(hint, value)


def test_row_63_out_of_range_names_the_value_the_bound_and_the_unit() -> None:
    assert "--spacing-mm: -1.0 is below the minimum of 0.3 mm" in problems(PreprocessConfig, {"spacing_mm": "-1"})
    assert "--spacing-mm: 11.0 is above the maximum of 10 mm" in problems(PreprocessConfig, {"spacing_mm": 11})
    assert "--batch-size: 0 is below the minimum of 1" in problems(TrainConfig, {"batch_size": 0})
    assert "--clip-norm: 0.0 must be above 0" in problems(TrainConfig, {"clip_norm": 0})
    assert "--patch-size: 4 is below the minimum of 8 voxels" in problems(PreprocessConfig, {"patch_size": "32,4,32"})
    assert "--schedule: 'cosin' is not one of cosine, linear; did you mean 'cosine'?" in problems(
        TrainConfig, {"schedule": "cosin"}
    )
    assert "--steps: 'ten' is not a whole number" in problems(
        dataclasses.make_dataclass("C", [("steps", int, option(1, "x"))]), {"steps": "ten"}
    )
    assert "--patch-size: '1,2' is not 3 comma-separated values (a whole number)" in problems(
        PreprocessConfig, {"patch_size": "1,2"}
    )
    assert "any number of comma-separated values" in problems(TrainConfig, {"multipliers": "a"})
    assert "--pca: 'x' is not a whole number or none" in problems(ClusterConfig, {"pca": "x"})
    assert "--flips: 'yes' is not true or false" in problems(TrainConfig, {"flips": "yes"})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_row_63_numbers_must_be_finite(value: str) -> None:
    assert "is not finite" in problems(TrainConfig, {"clip_norm": value})


@pytest.mark.parametrize("value", [10**400, -(10**400), MAX_SEED + 1, -1])
def test_row_63_seeds_fit_every_generator(value: int) -> None:
    """A seed beyond 64 bits would end as an OverflowError deep in numpy."""
    for command in COMMANDS:
        for field in dataclasses.fields(command.config or Execution):
            if "seed" in field.name:
                assert flag_name(field.name) in problems(command.config or Execution, {field.name: value})


def test_row_64_typo_names_the_nearest_option() -> None:
    assert "unknown option 'spacin-mm'; did you mean 'spacing_mm'?" in problems(PreprocessConfig, {"spacin-mm": 1})
    assert "unknown option 'zzz'; known: allow_gaps, assume_hu, " in problems(PreprocessConfig, {"zzz": 1})
    assert "unknown option 'interface'" in problems(Execution, {"interface": "cli"})  # not an option


def test_row_65_all_problems_and_conflicts_are_listed_at_once() -> None:
    text = problems(TrainConfig, {"lerning_rate": 1, "batch_size": 0, "loss": "l9", "multipliers": [1, 99], "flips": 3})
    assert len(text.splitlines()) == 5
    for part in ("did you mean 'learning_rate'", "--batch-size", "--loss", "--multipliers: 99 is above", "--flips"):
        assert part in text
    text = problems(
        TrainConfig,
        {"patch_size": "30,96,96", "distill_full": 0.1, "distill_start": 0.2, "negative_similarity": 0.9,
         "norm": "group", "base_width": 24, "teacher_windows": (9,)},
    )  # fmt: skip
    assert len(text.splitlines()) == 5
    for part in (
        "--patch-size (30, 96, 96) is not a multiple of the token size 8", "--distill-full lies before",
        "--negative-similarity is above", "--norm group needs widths", "--teacher-windows: 9 cannot be centred",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("cls", "values", "phrase"),
    [
        (TrainConfig, {"multipliers": ""}, "--multipliers is empty"),
        (TrainConfig, {"teacher_windows": (4,)}, "smaller than a token of 8"),
        (ClusterConfig, {"timesteps": []}, "--timesteps is empty"),
        (ClusterConfig, {"name": "a/b"}, "use letters, digits"),
        (ClusterConfig, {"name": ""}, "use letters, digits"),
    ],
)
def test_row_65_conflicts(cls: type, values: dict[str, Any], phrase: str) -> None:
    assert phrase in problems(cls, values)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_explains_itself(cls: type) -> None:
    for field in dataclasses.fields(cls):
        if cls is Execution and field.name == "interface":
            continue
        info = option_info(field)
        assert 8 <= len(info.doc) <= 110, field.name
        assert info.doc[-1] in ".)", field.name
        assert info.minimum is None or info.maximum is None or info.minimum < info.maximum
        if info.choices:
            assert set(field.default if isinstance(field.default, tuple) else [field.default]) <= set(info.choices)


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults_are_valid_and_survive_json(cls: type) -> None:
    config = cls()
    plain = {key: value for key, value in to_dict(config).items() if key != "interface"}
    assert from_dict(cls, plain) == config
    assert from_dict(cls, json.loads(json.dumps(plain))) == config
    texts = {
        key: ",".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, bool) else str(value)
        for key, value in plain.items()
    }
    assert from_dict(cls, texts) == config
    assert from_dict(cls, {key.replace("_", "-"): value for key, value in plain.items()}) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(cls)[0].name, 1)


def test_help_flags() -> None:
    assert flag_name("spacing_mm") == "--spacing-mm"


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def test_toml_tables(tmp_path: Path) -> None:
    path = toml(tmp_path, "[preprocess]\nspacing-mm = 1\npatch_size = [8, 16, 16]\n[train-ddpm]\nflips = false\n")
    assert read_toml(path, "preprocess") == {"spacing-mm": 1, "patch_size": [8, 16, 16]}
    assert read_toml(path, "cluster") == {}
    config = from_dict(PreprocessConfig, read_toml(path, "preprocess"))
    assert (config.spacing_mm, config.patch_size) == (1.0, (8, 16, 16))
    assert from_dict(TrainConfig, read_toml(path, "train-ddpm")).flips is False


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("[preprocess", "not valid TOML"),
        ("preprocess = 3", r"\[preprocess\] must be a table"),
        ("[preproces]\nspacing_mm = 1", r"unknown table 'preproces'; did you mean \[preprocess\]"),
        ("[train_ddpm]\nflips = false", r"unknown table 'train_ddpm'; did you mean \[train-ddpm\]"),
        ("spacing_mm = 1", "unknown table 'spacing_mm'; tables are named preprocess,"),
    ],
)
def test_row_64_mistakes_in_a_toml_file(tmp_path: Path, text: str, phrase: str) -> None:
    with pytest.raises(UsageError, match=phrase):
        read_toml(toml(tmp_path, text), "preprocess")


def test_row_65_all_wrong_tables_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_toml(toml(tmp_path, "a = 1\nrun = 2\n[refin]\n"), "run")
    assert len(str(caught.value).splitlines()) == 3


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_toml(tmp_path / "none.toml", "run")
    (tmp_path / "latin.toml").write_bytes(b'[run]\nsalt = "M\xfcller"')
    with pytest.raises(UsageError, match="not valid TOML"):
        read_toml(tmp_path / "latin.toml", "run")


def test_toml_tables_are_the_commands_with_settings() -> None:
    assert set(TABLES) == {command.name for command in COMMANDS if command.config is not None}


def test_radiomics_windows_may_be_left_out() -> None:
    assert from_dict(RadiomicsConfig, {"standardisation_windows": ""}).standardisation_windows == ()

"""Presets: each is valid for each command, and changes only what exists."""

from __future__ import annotations

import dataclasses

import pytest

from lungseg.cli.commands import COMMANDS
from lungseg.config import PRESETS, TrainConfig, make_config
from lungseg.config.phantom import PhantomConfig
from lungseg.config.preprocess import PreprocessConfig
from lungseg.config.presets import DEFAULT_PRESET
from lungseg.errors import UsageError

CLASSES = [command.config for command in COMMANDS if command.config is not None]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cls", CLASSES)
def test_every_preset_is_valid_for_every_command(preset: str, cls: type) -> None:
    config = make_config(cls, preset=preset)
    table = PRESETS[preset].get(cls, {})
    for field in dataclasses.fields(cls):
        assert getattr(config, field.name) == table.get(field.name, field.default)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_only_existing_fields_and_change_something(preset: str) -> None:
    for cls, table in PRESETS[preset].items():
        assert cls in CLASSES
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in table.items():
            assert name in defaults
            assert type(value) is type(defaults[name]) or None in (value, defaults[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_stages_of_one_preset_fit_together(preset: str) -> None:
    """The listed patches are those trained on, and the teacher's windows have a standardisation."""
    from lungseg.config import RadiomicsConfig

    prepared, train = make_config(PreprocessConfig, preset=preset), make_config(TrainConfig, preset=preset)
    radiomics = make_config(RadiomicsConfig, preset=preset)
    assert prepared.patch_size == train.patch_size
    phantoms = make_config(PhantomConfig, preset=preset)
    assert phantoms.preprocessing(prepared.salt) == prepared, "a store of phantoms is not what preprocess makes"
    assert train.distill != "tokens" or set(train.teacher_windows) <= set(radiomics.standardisation_windows)


def test_the_default_preset_is_the_defaults() -> None:
    assert DEFAULT_PRESET == "lungseg"
    assert PRESETS[DEFAULT_PRESET] == {}
    assert make_config(TrainConfig) == TrainConfig()


def test_options_beat_the_file_and_the_file_beats_the_preset() -> None:
    config = make_config(
        PreprocessConfig, preset="tiny", file_values={"spacing-mm": 2.0, "margin_mm": 1}, spacing_mm="3", salt=None
    )
    assert config.spacing_mm == 3.0
    assert config.margin_mm == 1.0
    assert config.patch_size == PRESETS["tiny"][PreprocessConfig]["patch_size"]
    assert config.salt == ""


def test_row_63_unknown_preset() -> None:
    with pytest.raises(UsageError, match="'huge' is not one of tiny, small, lungseg, paper-code, paper-text"):
        make_config(TrainConfig, preset="huge")


def test_row_64_typo_in_a_file_value() -> None:
    with pytest.raises(UsageError, match="did you mean 'batch_size'"):
        make_config(TrainConfig, file_values={"batch-sise": 3})

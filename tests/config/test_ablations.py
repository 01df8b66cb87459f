"""Each row of the ablation tables is a valid configuration of its own, and README lists the same ones as options."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from lungseg.config import ClusterConfig, RefineConfig, TrainConfig, make_config
from lungseg.config.ablations import ABLATIONS, METHODS, PUBLISHED, ROWS, TABLE_3, ablation_config
from lungseg.config.cluster import METHODS as CLUSTERINGS
from lungseg.config.fields import from_dict
from lungseg.errors import UsageError

COMMANDS = {"train-ddpm": TrainConfig, "cluster": ClusterConfig, "refine": RefineConfig}
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("preset", ["tiny", "small", "lungseg"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_is_valid_and_holds_its_changes(name: str, preset: str) -> None:
    for cls in COMMANDS.values():
        config, plain = ablation_config(cls, name, preset=preset), make_config(cls, preset=preset)
        changes = ABLATIONS[name].changes.get(cls, {})
        for key, value in vars(config).items():
            assert value == changes.get(key, getattr(plain, key))


def test_rows_differ() -> None:
    seen = {}
    for name in ABLATIONS:
        key = tuple(repr(ablation_config(cls, name)) for cls in COMMANDS.values())
        assert seen.setdefault(key, name) == name


def test_the_published_table_grows_by_one_switch_a_row() -> None:
    """METHOD 1.7: 8-bit, HU, distillation, warm-up, timesteps, Sobel."""
    rows = [name for name in ABLATIONS if name[0].isdigit() and name[1] == "-"][:6]
    assert rows == ["1-8-bit", "2-hu", "3-distillation", "4-warm-up", "5-timesteps", "6-sobel"]
    configs = [[ablation_config(cls, name) for cls in COMMANDS.values()] for name in rows]
    for before, after in itertools.pairwise(configs):
        changed = {
            key for a, b in zip(before, after, strict=True) for key, value in vars(a).items() if vars(b)[key] != value
        }
        assert changed in (
            # the head is there from distillation on: before, the bottleneck itself is clustered
            {"hu_window"}, {"distill", "distill_start", "distill_full", "method"}, {"distill_start", "distill_full"},
            {"timesteps"}, {"fusion"},
        )  # fmt: skip
    train, clustering, refining = configs[-1]
    assert (train, clustering) == (make_config(TrainConfig), make_config(ClusterConfig))
    assert refining == make_config(
        RefineConfig, fusion="sobel", rim_mm=0.0, min_component_ml=0.05
    )  # whatever the default


def test_rows_of_both_tables_and_their_published_figures() -> None:
    assert {ablation.changes[ClusterConfig]["method"] for ablation in METHODS.values()} == set(CLUSTERINGS)
    assert list(ROWS) == [*METHODS, *TABLE_3]
    assert set(PUBLISHED) <= set(ROWS)
    assert set(TABLE_3) <= set(PUBLISHED)
    for name in PUBLISHED.keys() & METHODS.keys():  # METHOD 1.7 derives the means from the four classes
        published = PUBLISHED[name]
        assert published.mean_dice == pytest.approx(sum(published.dice.values()) / 4, abs=0.051)
    steps = [PUBLISHED[name].mean_dice - PUBLISHED[before].mean_dice for before, name in itertools.pairwise(TABLE_3)]
    assert steps == pytest.approx([3.5, 2.8, 2.3, 2.2, 1.9])


def test_unknown_row_is_refused() -> None:
    with pytest.raises(UsageError, match="is not one of 1-8-bit, "):
        ablation_config(TrainConfig, "everything")


def test_readme_lists_every_row_as_options_of_the_same_meaning() -> None:
    text = README.read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|$", text.split("## Ablations")[1].split("\n## ")[0], re.M))
    assert list(table) == list(ABLATIONS)
    for name, cell in table.items():
        given: dict[type, dict[str, str | bool]] = {cls: {} for cls in COMMANDS.values()}
        for command in re.findall(r"`([^`]+)`", cell):
            command_name, *words = shlex.split(command)
            while words:
                flag = words.pop(0)
                key = flag.removeprefix("--").replace("-", "_")
                if words and not words[0].startswith("--"):
                    given[COMMANDS[command_name]][key] = words.pop(0)
                elif key.startswith("no_"):
                    given[COMMANDS[command_name]][key.removeprefix("no_")] = False
                else:
                    given[COMMANDS[command_name]][key] = True
        for cls, values in given.items():
            assert from_dict(cls, values) == ablation_config(cls, name), name

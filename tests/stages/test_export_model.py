"""``export-model`` and the shipped model: small, described, as good for tokens, refused where it cannot serve."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipeline_fixture import CLUSTER, QUIET, TRAIN
from typer.testing import CliRunner

import lungseg.models
from lungseg.cli.app import app
from lungseg.config import ExportModelConfig, PreprocessConfig, SynthesizeConfig, TrainConfig, make_config
from lungseg.config.ablations import ablation_config
from lungseg.config.fields import to_dict
from lungseg.diffusion.checkpoint import load_student, read_model_file
from lungseg.errors import InputError, MismatchError, UsageError
from lungseg.segmentation.encoding import encode_lung
from lungseg.stages.cluster import cluster
from lungseg.stages.doctor import doctor
from lungseg.stages.export_model import CARD_FIELDS, export_model, training_command
from lungseg.stages.fits import find_model, load_fit
from lungseg.stages.info import info
from lungseg.stages.synthesize import synthesize
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.cases import Store

CARD = """
name = "a test"
data = "two small phantoms"
seeds = "11 and 12"
licence = "Apache-2.0"
limits = "good for nothing but tests"
[figures]
dsc = 0.1
"""


@pytest.fixture
def slim(finished: Path, tmp_path: Path) -> Path:
    """The finished run's bundle, exported with a card."""
    (tmp_path / "card.toml").write_text(CARD)
    path = tmp_path / "slim.safetensors"
    result = export_model(finished / "bundle.safetensors", path, card=tmp_path / "card.toml", execution=QUIET)
    assert result.values["change"] < 5e-3
    assert "not state" not in " ".join(result.notes)
    return path


@pytest.fixture
def shipped(slim: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``slim`` in the place of the shipped model."""
    monkeypatch.setattr(lungseg.models, "STARTER_FILE", str(slim))
    return slim


def test_exported_bundle_maps_as_the_whole_one(finished: Path, slim: Path, copy: Path) -> None:
    whole = load_student(finished / "bundle.safetensors")
    half = load_student(slim)
    store = Store(finished / "store")
    (first, *_) = store.case_ids()
    with store.open(first, "volume") as volume:
        image, mask = volume.read("image"), volume.read("mask") > 0
    tokens = [encode_lung(image, mask, student, CLUSTER) for student in (whole, half)]
    usable = tokens[0][1]
    np.testing.assert_allclose(tokens[1][0][:, usable], tokens[0][0][:, usable], atol=5e-3)
    fits = [load_fit(path) for path in (finished / "bundle.safetensors", slim)]
    assert fits[1].provenance["inputs"]["model"] == half.fingerprint != whole.fingerprint
    named = [fit.mixture.posterior(t[0][:, usable].T).argmax(1) for fit, t in zip(fits, tokens, strict=True)]
    assert (named[0] == named[1]).mean() > 0.99
    # and the stage takes it as it is
    again = dataclasses.replace(CLUSTER, name="slim")
    assert cluster(Store(copy / "store"), slim, again, fit=slim, execution=QUIET).complete() == store.case_ids()


def test_the_card_is_in_the_file(finished: Path, slim: Path) -> None:
    card = read_model_file(slim)[0]["card"]
    assert set(CARD_FIELDS) <= set(card)
    assert card["figures"] == {"dsc": 0.1}
    assert card["images"] == TRAIN.total_images
    assert card["intended_use"].startswith("research use only")
    assert card["exported_from"] == load_student(finished / "run" / "model.safetensors").fingerprint
    assert card["command"].startswith("lungseg train-ddpm STORE -o RUN --preset tiny --base-width 8 ")
    shown = info(slim).values
    assert shown["limits"] == "good for nothing but tests"
    assert "no decoder" in shown["holds"]
    assert "decoder" in info(finished / "run" / "model.safetensors").values["holds"]


def test_the_card_of_a_run_has_its_last_figures(copy: Path, tmp_path: Path) -> None:
    lines = [
        '{"images":8,"effective_rank":2.0,"held_out_diffusion":0.5}',
        '{"images":16,"effective_rank":3.0,"rate":1}',
    ]
    (copy / "run" / "stats.jsonl").write_text("\n".join(lines) + "\n")
    export_model(copy / "run", tmp_path / "m.safetensors", execution=QUIET)
    card = read_model_file(tmp_path / "m.safetensors")[0]["card"]
    assert card["training_figures"] == {"effective_rank": 3.0, "held_out_diffusion": 0.5}


def test_same_export_gives_the_same_bytes_and_nothing_is_lost(finished: Path, slim: Path, tmp_path: Path) -> None:
    content, source = slim.read_bytes(), finished / "bundle.safetensors"
    export_model(source, slim, card=tmp_path / "card.toml", execution=QUIET)
    assert slim.read_bytes() == content
    with pytest.raises(UsageError, match="holds something else"):
        export_model(source, slim, execution=QUIET)
    assert slim.read_bytes() == content
    result = export_model(source, slim, execution=dataclasses.replace(QUIET, overwrite=True))
    assert slim.read_bytes() != content
    assert "does not state name, data, seeds, licence, limits, figures" in result.notes[-1]
    with pytest.raises(UsageError, match="is the model itself"):
        export_model(slim, slim, execution=dataclasses.replace(QUIET, overwrite=True))


def test_decoder_and_full_precision_can_be_kept(finished: Path, slim: Path, tmp_path: Path) -> None:
    config = ExportModelConfig(decoder=True, precision="fp32")
    result = export_model(finished / "run", tmp_path / "whole.safetensors", config, execution=QUIET)
    assert result.values["change"] == 0.0
    assert load_student(tmp_path / "whole.safetensors").unet.has_decoder
    with pytest.raises(MismatchError, match="no decoder, which --decoder needs"):
        export_model(slim, tmp_path / "x.safetensors", config, execution=QUIET)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("author = 'x'", "states author; it may state name"),
        ("name = 3", "name must be a text"),
        ("figures = 'good'", "figures must be a table"),
        ("[figures]\na = [1]", "figures must be a table"),
        ("name = ", "no TOML file"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_card_is_refused(finished: Path, tmp_path: Path, text: str | None, phrase: str) -> None:
    if text is not None:
        (tmp_path / "card.toml").write_text(text)
    with pytest.raises(InputError, match=phrase):
        export_model(finished / "run", tmp_path / "m", card=tmp_path / "card.toml", execution=QUIET)
    assert not (tmp_path / "m").exists()


def test_the_command_in_the_card_gives_the_same_settings() -> None:
    starter = make_config(
        TrainConfig, preset="small", stem=2, multipliers=(2, 3, 4), regression_weight=3.0, flips=False
    )
    for config in (TrainConfig(), TRAIN, starter, ablation_config(TrainConfig, "v-prediction", preset="paper-text")):
        words = training_command(config).split()[1:]
        result = CliRunner().invoke(app, [*words, "--dry-run"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.output)["config"] == to_dict(config)
    assert "--multipliers 2,3,4" in training_command(starter)
    assert "--preset small" in training_command(starter)
    assert "--no-flips" in training_command(starter)


def test_synthesize_and_training_refuse_a_model_for_features(slim: Path, copy: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["synthesize", str(slim), "-o", str(tmp_path / "s"), "-n", "1"])
    assert result.exit_code == 4
    assert "no decoder, which synthesize needs" in result.output
    assert not (tmp_path / "s").exists()
    with pytest.raises(MismatchError, match="no decoder"):
        synthesize(slim, tmp_path / "s", SynthesizeConfig(num=1), execution=QUIET)
    shutil.copy(slim, copy / "run" / "model.safetensors")
    with pytest.raises(MismatchError, match=r"it is not the result of this training, which goes on from checkpoint-\*"):
        train_ddpm(Store(copy / "store"), copy / "run", TRAIN, execution=QUIET)
    result = CliRunner().invoke(app, ["probe", str(slim), str(copy / "store"), "--blocks", "decoder.0.0"])
    assert result.exit_code == 4
    assert "no decoder" in result.output


def test_run_takes_the_shipped_model_and_says_so(shipped: Path, manifest: Path, tmp_path: Path) -> None:
    scan = str(manifest.parent / "phantom-11")
    toml = tmp_path / "method.toml"
    toml.write_text('[cluster]\nmethod = "diffseglung"\n', encoding="utf-8")
    asked = ["--config", str(toml)]
    result = CliRunner().invoke(app, ["run", scan, "-o", str(tmp_path / "out"), *asked])
    assert result.exit_code == 0, result.output
    assert "the starter model shipped with lungseg is used. Its limits: good for nothing but tests" in result.output
    named = CliRunner().invoke(app, ["run", scan, "-o", str(tmp_path / "named"), "--model", "starter"])
    assert named.exit_code == 0, named.output
    assert "Its limits" not in named.output
    maps = [next((tmp_path / name / "results").glob("*.nii.gz")).stat().st_size for name in ("out", "named")]
    assert maps[0] == maps[1]
    planned = CliRunner().invoke(app, ["run", scan, "-o", str(tmp_path / "x"), "--dry-run", *asked])
    assert json.loads(planned.output)["stages"]["preprocess"]["spacing_mm"] == 2.0
    trained = CliRunner().invoke(app, ["run", scan, "-o", str(tmp_path / "x"), "--dry-run", "--train"])
    assert json.loads(trained.output)["stages"]["preprocess"]["spacing_mm"] == PreprocessConfig().spacing_mm


def test_run_needs_neither_model_nor_training(manifest: Path, tmp_path: Path) -> None:
    """The rules, on the grid they were measured on; a preset or a file changes either."""
    words = ["run", str(manifest.parent / "phantom-11"), "-o", str(tmp_path / "out")]
    stages = json.loads(CliRunner().invoke(app, [*words, "--dry-run"]).output)["stages"]
    assert (stages["cluster"]["method"], stages["preprocess"]["spacing_mm"]) == ("rules", 1.0)
    assert stages["cluster"]["token_stride"] == 2
    result = CliRunner().invoke(app, [*words, "--preset", "tiny"])
    assert result.exit_code == 0, result.output
    assert "no --model given: method rules, which needs none" in result.output
    assert len(list((tmp_path / "out" / "results").glob("*.nii.gz"))) == 1


def test_starter_is_a_name_of_the_shipped_model(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(Path("starter")) == shipped
    assert info(Path("starter")).values["name"] == "a test"
    (row,) = (r for r in zip(*(c.cells for c in doctor().tables[0].columns), strict=True) if r[0] == "starter model")
    assert row[1] == f"{shipped.stat().st_size / 1e6:.1f} MB, {TRAIN.total_images} images, 2 mm"
    assert row[2] == "with its fit; good for nothing but tests"
    (tmp_path / "starter").write_bytes(b"a file of this name comes first")
    assert find_model(Path("starter")) == Path("starter")


def test_an_installation_without_a_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lungseg.models, "STARTER_FILE", "absent.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "method.toml").write_text('[cluster]\nmethod = "diffseglung"\n', encoding="utf-8")
    result = CliRunner().invoke(app, ["run", "scan", "-o", "out", "--config", "method.toml"])
    assert result.exit_code == 2
    assert all(word in result.output for word in ("ships no starter model", "--model", "--train"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="ships no starter model"):
        find_model(Path("starter"))
    assert ("starter model", "missing") in list(zip(*(c.cells for c in doctor().tables[0].columns[:2]), strict=True))
    monkeypatch.setattr(lungseg.models, "STARTER_FILE", str(tmp_path / "broken"))
    (tmp_path / "broken").write_bytes(b"x")
    assert ("starter model", "damaged") in list(zip(*(c.cells for c in doctor().tables[0].columns[:2]), strict=True))

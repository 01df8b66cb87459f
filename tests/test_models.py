"""The shipped starter model: there, small, for features, and described."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from lungseg.diffusion.checkpoint import Student, load_student, read_model_file
from lungseg.errors import MismatchError
from lungseg.models import STARTER_FILE, starter_path
from lungseg.stages.export_model import CARD_FIELDS, training_command

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 10_000_000
"""What people are made to download with the package (issue 6)."""
CARD_FILE = "starter-card.toml"


@pytest.fixture(scope="module")
def starter() -> Student:
    """The shipped model."""
    if not starter_path().is_file():
        pytest.skip("no starter model in lungseg/models: make it with lungseg export-model")
    return load_student(starter_path())


def test_it_is_package_data(starter: Student) -> None:
    resource = files("lungseg.models").joinpath(STARTER_FILE)
    assert resource.is_file()
    assert len(resource.read_bytes()) == starter_path().stat().st_size <= MAX_BYTES


def test_it_is_for_features_in_half_precision(starter: Student) -> None:
    metadata, tensors = read_model_file(starter_path())
    assert metadata["decoder"] is False
    assert {t.dtype for name, t in tensors.items() if name.startswith(("unet.", "head."))} == {torch.float16}
    with pytest.raises(MismatchError, match="no decoder"):
        starter.require_decoder("synthesize")
    bottleneck = starter.unet.encode(torch.zeros(1, 2, *starter.config.patch_size), torch.tensor([0]))
    tokens = starter.embed(bottleneck.movedim(1, -1).flatten(0, -2))
    assert tokens.shape[1] == starter.embedding
    assert bool(tokens.isfinite().all())
    assert starter.unet.spec.is_local  # a lung is encoded in slabs


def test_its_card_says_all_that_people_ask(starter: Student) -> None:
    card = starter.card
    assert set(CARD_FIELDS) <= set(card)
    assert card["intended_use"].startswith("research use only")
    assert card["command"] == training_command(starter.config)
    assert card["images"] >= starter.config.total_images
    assert card["num_cases"] == len(card["training_volumes"])
    written = tomllib.loads(files("lungseg.models").joinpath(CARD_FILE).read_text(encoding="utf-8"))
    assert {name: card[name] for name in written} == written  # the card in the file is the one beside it


@pytest.mark.slow
def test_a_wheel_holds_what_lies_in_models(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the sources."""
    import shutil

    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lungseg", source / "lungseg", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "lungseg" / "models" / STARTER_FILE).touch()  # where it is absent, the rule is tested all the same
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {f"lungseg/models/{name}" for name in ("__init__.py", STARTER_FILE, CARD_FILE)} <= names

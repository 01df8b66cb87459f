"""The commands of README.md are run, word for word, on the smallest cohort."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lungseg.config import Execution, PhantomConfig
from lungseg.stages.phantom import phantom

ROOT = Path(__file__).resolve().parents[1]


def readme_commands() -> list[str]:
    """The lungseg commands of README's section "The commands"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## The commands")[1].split("## The patch store")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, flags=re.S)
    return [line for line in block.splitlines() if line.startswith("lungseg ")]


@pytest.mark.slow
def test_commands_run_as_written(tmp_path: Path) -> None:
    commands = readme_commands()
    assert [command.split()[1] for command in commands] == [
        "preprocess", "extract-radiomics", "train-ddpm", "cluster", "refine", "evaluate", "synthesize", "report", "run",
        "doctor", "info",
    ]  # fmt: skip
    for part, seed in (("train", 1), ("test", 2)):
        config = PhantomConfig(num=1, seed=seed, extent_mm=(100, 110, 130), spacing_mm=(2.0, 1.5, 1.5))
        phantom(tmp_path / "data_samples" / part, config, execution=Execution(quiet=True))
    # the README trains for 4,800 images; the smallest cohort needs fewer to show that the command works
    (tmp_path / "short.toml").write_text("[train-ddpm]\ntotal-images = 96\n")
    for command in commands:
        words = command.split()
        if words[1] == "train-ddpm":
            words += ["--config", "short.toml"]
        done = subprocess.run(
            [sys.executable, "-m", "lungseg.cli.app", *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for path in ("results/quantification.csv", "scores/table.md", "out/scores/table.md", "synthetic/store.json",
                 "report/index.html", "out/report/index.html"):  # fmt: skip
        assert (tmp_path / path).is_file(), path
    assert list((tmp_path / "out" / "results").glob("*.png"))


def test_python_example_reads_the_store(tmp_path: Path) -> None:
    """The h5py example of the README works on a store made by the commands' functions."""
    import numpy as np

    from lungseg.store.schema import make_provenance, write_artefact

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    path = tmp_path / "cohort" / "cases" / "phantom-100" / "volume.h5"
    datasets = {
        "image": np.zeros((4, 4, 4), np.int16),
        "mask": np.ones((4, 4, 4), np.uint8),
        "patches/corner": np.zeros((1, 3), np.int32),
        "patches/mask_fraction": np.ones(1, np.float32),
    }
    write_artefact(
        path,
        "volume",
        datasets,
        provenance=make_provenance("preprocess", {}),
        attributes={"image": {"spacing_mm": [1, 1, 1]}},
    )
    script = code.replace("cohort/", f"{tmp_path}/cohort/")
    names: dict[str, object] = {}
    exec(script, names)
    assert names["image"].shape == (4, 4, 4)  # type: ignore[attr-defined]
    assert names["made_by"]["stage"] == "preprocess"  # type: ignore[index]


def test_every_command_is_in_the_readme() -> None:
    from lungseg.cli.commands import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"`{command.name}" in text, command.name
    assert not re.search(r"@@\w+@@", text), "a figure is still to be filled in"

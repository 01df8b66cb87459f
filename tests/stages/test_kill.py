"""Kill -9 and signals: the same command again completes, with the bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pipeline_fixture import QUIET, TOML, TRAIN, tree_hashes

from lungseg.config import TrainConfig


@pytest.mark.slow
def test_killed_again_and_again_in_every_stage_gives_the_same_bytes(
    finished: Path, manifest: Path, tmp_path: Path
) -> None:
    """Each life completes some more files than the one before and dies at the next one, through every stage."""
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(manifest), str(tmp_path)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    lives, partials = (int(word) for word in done.stdout.split()[-2:])
    assert lives > 8
    assert partials > 5
    assert tree_hashes(tmp_path) == tree_hashes(finished)


@pytest.mark.slow
def test_row_59_training_saves_at_sigterm_and_resumes_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    longer = TOML.replace("total-images = 24", "total-images = 240").replace(
        "checkpoint-images = 8", "checkpoint-images = 40"
    )
    (tmp_path / "settings.toml").write_text(longer)
    command = [sys.executable, "-m", "lungseg.cli.app", "train-ddpm", str(finished / "store"), "--preset", "tiny"]
    command += ["--config", str(tmp_path / "settings.toml"), "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    with subprocess.Popen([*command, str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True) as process:
        _wait_for(lambda: any((tmp_path / "stopped").glob("checkpoint-*.pt")), process)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "run the same command again" in error
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    subprocess.run([*command, str(tmp_path / "stopped")], check=True, capture_output=True)
    assert tree_hashes(tmp_path / "stopped") == tree_hashes(tmp_path / "whole")


def _wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_row_49_two_processes_train_one_model(finished: Path, tmp_path: Path) -> None:
    """The launcher, the gathered contrast and the shared order of images: nearly the updates of one process."""
    from lungseg.config import Execution
    from lungseg.stages.train_ddpm import train_ddpm

    config = dataclasses.replace(TRAIN, total_images=12, learning_rate=1e-4, distill_start=0.0, distill_full=0.0)
    two = Execution(quiet=True, gpus=2, device="cpu")
    runs = {
        "one": (config, QUIET),
        "two": (config, two),
        # what a mistake in the sharing would look like: half the batch, contrast of own rows only, other noise
        "half": (dataclasses.replace(config, total_images=6, batch_size=2), QUIET),
        "fewer-pairs": (dataclasses.replace(config, tokens_per_patch=2), QUIET),
        "no-teacher": (dataclasses.replace(config, distill="none"), QUIET),
    }
    for name, (settings, execution) in runs.items():
        result = train_ddpm(finished / "store", tmp_path / name, settings, execution=execution)
        assert result.values["images"] == settings.total_images
    start = _flat(_initial(config))
    updates = {name: _flat(_trained(tmp_path / name)) - start for name in runs}
    error = {name: float((u - updates["one"]).norm() / updates["one"].norm()) for name, u in updates.items()}
    assert error["two"] < 0.01
    assert min(error[name] for name in ("half", "fewer-pairs", "no-teacher")) > 0.1


def _initial(config: TrainConfig) -> dict[str, torch.Tensor]:
    from lungseg.diffusion.training import Trainer

    return Trainer(dataclasses.replace(config, distill="none"), (), device="cpu").student_weights()


def _trained(run: Path) -> dict[str, torch.Tensor]:
    from lungseg.diffusion.checkpoint import read_model_file

    return read_model_file(run / "model.safetensors")[1]


def _flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])

"""RELIABILITY 46-60 for training: the same command again gives the same model, or says why not."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixture import tree_hashes
from training_fixture import QUIET, make_cohort, quick

from lungseg.config import Execution
from lungseg.diffusion.checkpoint import load_training_state, read_model_file
from lungseg.diffusion.training import MAX_SKIPPED_IN_A_ROW, Trainer
from lungseg.errors import MismatchError, ResourceError, StoreError, UsageError
from lungseg.stages import launch as launching
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.cases import Store

TWO = dataclasses.replace(QUIET, gpus=2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_cohort(tmp_path_factory.mktemp("cohort") / "store")


@pytest.fixture(scope="module")
def whole(cohort: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run; never to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train_ddpm(cohort, run, quick(), execution=QUIET)
    return run


@pytest.fixture
def unfinished(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run that has been stopped at its last checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "model.safetensors").unlink()
    return run


def _driver(*arguments: Any) -> str:
    path = Path(__file__).with_name("kill_training.py")
    done = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_row_46_killed_at_random_moments_gives_the_same_bytes(
    cohort: Store, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """SIGKILL at ``--kills`` moments (5, or 25 as RELIABILITY asks), then the same command to the end."""
    kills = request.config.getoption("--kills")
    seconds = float(_driver(cohort.path, tmp_path / "whole", 0, kills))
    told = json.loads(_driver(cohort.path, tmp_path / "killed", kills, seconds))
    assert told["deaths"] == kills, told
    assert len(set(told["resumed_from"])) > kills // 2, told  # they died at different places of the run
    assert told["resumed_from"] == sorted(told["resumed_from"]), told  # no life lost what another had saved
    assert tree_hashes(tmp_path / "killed") == tree_hashes(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["written", "renamed"])
def test_row_46_stale_partial_files_are_removed(unfinished: Path, cohort: Store, whole: Path, moment: str) -> None:
    newest = sorted(unfinished.glob("checkpoint-*.pt"))[-1]
    partial = newest.with_name(newest.name + ".partial")
    if moment == "written":
        partial.write_bytes(newest.read_bytes()[:100])
        newest.unlink()
    else:
        partial.write_bytes(b"")
    train_ddpm(cohort, unfinished, quick(), execution=QUIET)
    assert tree_hashes(unfinished) == tree_hashes(whole)


@pytest.mark.parametrize("damage", ["truncated", "bytes", "another file", "missing part"])
def test_row_47_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    unfinished: Path, cohort: Store, whole: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = sorted(unfinished.glob("checkpoint-*.pt"))
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "bytes":
        newest.write_bytes(bytes(content[:64]) + b"\xff" * 512 + content[576:])
    elif damage == "another file":
        torch.save(torch.zeros(3), newest)
    else:
        state = load_training_state(newest)
        del state["optimiser"]
        torch.save(state, newest)
    with caplog.at_level(logging.INFO, logger="lungseg"):
        train_ddpm(cohort, unfinished, quick(), execution=QUIET)
    assert f"{newest.name} cannot be used" in caplog.text
    assert f"resuming from {older.name}" in caplog.text
    assert tree_hashes(unfinished) == tree_hashes(whole)


def test_row_47_no_checkpoint_that_loads_is_an_error(unfinished: Path, cohort: Store) -> None:
    for path in unfinished.glob("checkpoint-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(StoreError, match=r"none of 2 checkpoints in .* can be loaded; use a new output folder"):
        train_ddpm(cohort, unfinished, quick(), execution=QUIET)


def test_row_48_other_settings_are_refused_with_all_differences(unfinished: Path, cohort: Store) -> None:
    before = tree_hashes(unfinished)
    other = quick(base_width=16, teacher_windows=(8, 16), batch_size=8)
    with pytest.raises(MismatchError, match="made with other settings") as caught:
        train_ddpm(cohort, unfinished, other, execution=QUIET)
    for part in (
        "base_width: there 8, now 16", "batch_size: there 4, now 8", "teacher_windows: there [8], now [8, 16]",
        "another output folder",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert tree_hashes(unfinished) == before


def test_row_48_what_feeds_and_watches_a_run_may_change(unfinished: Path, cohort: Store, whole: Path) -> None:
    train_ddpm(cohort, unfinished, quick(cache_gib=0.0, workers=1), execution=QUIET)
    assert tree_hashes(unfinished) == tree_hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_row_49_a_run_goes_on_with_another_number_of_processes(cohort: Store, tmp_path: Path, first: int) -> None:
    """Float64, so that what is left is the order of sums; the images are the same ones in the same order."""
    config = quick(precision="fp64", queue_size=40, held_out=0.2, held_out_images=4, learning_rate=1e-4)
    executions = {1: QUIET, 2: TWO}
    train_ddpm(cohort, tmp_path / "whole", config, execution=QUIET)
    # a run whose newest checkpoint is that after 16 of 24 images
    train_ddpm(cohort, tmp_path / "changed", config, execution=executions[first])
    run = tmp_path / "changed"
    (run / "model.safetensors").unlink()
    newest = sorted(run.glob("checkpoint-*.pt"))[-1]
    newest.unlink()
    assert [path.name for path in run.glob("checkpoint-*.pt")] == ["checkpoint-0000000016.pt"]
    train_ddpm(cohort, run, config, execution=executions[3 - first])
    expected, found = (load_training_state(sorted((tmp_path / n).glob("*.pt"))[-1]) for n in ("whole", "changed"))
    assert expected["images"] == found["images"] == 24
    for name, value in expected["model"].items():
        assert (value - found["model"][name]).norm() <= 1e-5 * value.norm(), name
    torch.testing.assert_close(found["queue"]["rows"], expected["queue"]["rows"])


def test_row_50_nothing_to_resume_from_is_said(cohort: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lungseg"):
        train_ddpm(cohort, tmp_path / "run", quick(total_images=4), execution=QUIET)
    assert "no checkpoint in" in caplog.text
    assert "starting from the beginning" in caplog.text


def test_row_51_a_diverging_run_stops_with_a_diagnosis_and_keeps_its_last_checkpoint(
    cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(total_images=400)
    step = Trainer.step

    def poisoned(self: Trainer, batch: dict[str, torch.Tensor], *, num_images: int) -> Any:
        if self.images >= 16:
            batch = {**batch, "eps": torch.full_like(batch["eps"], torch.nan)}
        return step(self, batch, num_images=num_images)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(MismatchError, match=f"no finite gradient for {MAX_SKIPPED_IN_A_ROW} steps in a row") as caught:
        train_ddpm(cohort, tmp_path / "run", config, execution=QUIET)
    assert caught.value.exit_code == 4
    assert "--learning-rate (now 0.001)" in str(caught.value)
    newest = sorted((tmp_path / "run").glob("checkpoint-*.pt"))[-1]
    state = load_training_state(newest)
    assert all(value.isfinite().all() for value in state["model"].values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["total"] is None  # JSON knows no NaN
    assert lines[-1]["skipped"] > 0


def test_row_53_memory_that_runs_out_names_three_settings(
    cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Trainer, batch: Any, *, num_images: int) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "step", full)
    with pytest.raises(ResourceError) as caught:
        train_ddpm(cohort, tmp_path / "run", quick(), execution=QUIET)
    assert caught.value.exit_code == 5
    for part in ("--batch-size 4", "--accumulate 2", "--patch-size 16,16,16", "--preset small", "--gpus"):
        assert part in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_row_57_more_processes_than_devices(cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "resolve_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="--gpus 2: this machine has 1 CUDA devices"):
        train_ddpm(cohort, tmp_path / "run", quick(), execution=Execution(quiet=True, gpus=2))
    with pytest.raises(
        UsageError, match="--batch-size 4 cannot be shared equally by 2 processes in --accumulate 4 parts"
    ):
        train_ddpm(cohort, tmp_path / "run", quick(accumulate=4), execution=TWO)


def test_row_57_each_launch_takes_a_free_port() -> None:
    assert launching._launch_config(2).rdzv_endpoint == "localhost:0"


class _FullDisk:
    """Lets a number of files be written, then no more."""

    def __init__(self, files: int) -> None:
        self.left = files

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return _save(*arguments, **options)


_save = torch.save


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "save", _FullDisk(1))
    yield
    monkeypatch.setattr(torch, "save", _save)


def test_row_60_a_full_disk_keeps_the_checkpoint_before(
    cohort: Store, tmp_path: Path, whole: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ResourceError, match=r"disk full while writing .*checkpoint-0000000016\.pt"):
        train_ddpm(cohort, run, quick(), execution=QUIET)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-0000000008.pt"]
    monkeypatch.setattr(torch, "save", _save)
    train_ddpm(cohort, run, quick(), execution=QUIET)
    assert tree_hashes(run) == tree_hashes(whole)


def test_finished_runs_are_models_of_their_settings(whole: Path) -> None:
    metadata, tensors = read_model_file(whole / "model.safetensors")
    assert metadata["config"]["teacher_windows"] == [8]
    assert metadata["card"]["images"] == 24
    assert not any(name.startswith("teacher.") for name in tensors)

"""Training as a run: what it refuses, what it says when it ends badly, and several processes as one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from pipeline_fixture import QUIET, RADIOMICS, TOML, TRAIN, tree_hashes

from lungseg.config import Execution
from lungseg.diffusion.checkpoint import read_model_file
from lungseg.errors import InputError, Interrupted, MismatchError, PartialError, ResourceError
from lungseg.radiomics.descriptor import DESCRIPTOR_VERSION
from lungseg.stages import launch as launching
from lungseg.stages import training_loop as training
from lungseg.stages.extract_radiomics import extract_radiomics, find_training_cases, training_cases
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.store.atomic import read_json, write_json
from lungseg.store.cases import Store

CASES = ("phantom-11", "phantom-12")
TWO = Execution(quiet=True, gpus=2, device="cpu")


def _edit_json(path: Path, change: Any) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


def _edit_provenance(path: Path, change: Any) -> None:
    """Change the provenance of an artefact in place; its datasets and fingerprint stay."""
    with h5py.File(path, "r+") as file:
        provenance = json.loads(file.attrs["provenance"])
        change(provenance)
        data = json.dumps(provenance).encode()
        file.attrs.create("provenance", data, dtype=h5py.string_dtype("utf-8", len(data)))


def test_changed_standardisation_is_refused_at_resume_and_when_finished(copy: Path) -> None:
    header = read_json(copy / "run" / "config.json")
    assert set(header["inputs"]) == {*CASES, "standardisation"}
    assert len(header["inputs"]["standardisation"]) == 64

    def shift(content: dict[str, Any]) -> None:
        content["windows"]["8x8x8"]["median"][0] += 1.0

    _edit_json(copy / "store" / "standardisation.json", shift)
    with pytest.raises(MismatchError, match=r"inputs? standardisation: there .*, now "):
        train_ddpm(copy / "store", copy / "run", TRAIN, execution=QUIET)
    (copy / "run" / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match="standardisation"):
        train_ddpm(copy / "store", copy / "run", TRAIN, execution=QUIET)


def test_model_card_lists_volumes_by_fingerprint_alone(finished: Path) -> None:
    card = read_model_file(finished / "run" / "model.safetensors")[0]["card"]
    inputs = read_json(finished / "run" / "config.json")["inputs"]
    assert card["training_volumes"] == sorted(inputs[case_id] for case_id in CASES)
    assert card["num_cases"] == 2


def test_standardisation_of_another_window_may_change(copy: Path) -> None:
    def shift(content: dict[str, Any]) -> None:
        content["windows"]["16x16x16"]["median"][0] += 1.0

    _edit_json(copy / "store" / "standardisation.json", shift)
    assert "already complete" in train_ddpm(copy / "store", copy / "run", TRAIN, execution=QUIET).notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["inputs"].update({CASES[0]: "f" * 64}), f"{CASES[0]}: there volume ffff.*, now volume "),
        (lambda p: p["inputs"].pop(CASES[1]), f"{CASES[1]}: there not a training case, now volume "),
        (lambda p: p["inputs"].update({"gone": "a" * 64}), "gone: there volume aaaa.*, now not a training case"),
        (lambda p: p["config"].update(aggregation="mean"), "aggregation: there mean, the teacher's merged"),
        (lambda p: p["config"].update(backend="pyradiomics"), "backend: there pyradiomics, the teacher's torch"),
    ],
)
def test_standardisation_of_other_volumes_or_features_is_refused(
    copy: Path, tmp_path: Path, change: Any, said: str
) -> None:
    _edit_json(copy / "store" / "standardisation.json", lambda content: change(content["provenance"]))
    with pytest.raises(MismatchError, match=said) as caught:
        train_ddpm(copy / "store", tmp_path / "new", TRAIN, execution=QUIET)
    assert f"lungseg extract-radiomics {copy / 'store'} --overwrite" in str(caught.value)


def test_teacher_without_mcc_needs_a_standardisation_without(finished: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, mcc=not TRAIN.mcc)
    with pytest.raises(MismatchError, match=f"mcc: there {TRAIN.mcc}, the teacher's {config.mcc}"):
        train_ddpm(finished / "store", tmp_path / "new", config, execution=QUIET)


def test_feature_names_are_compared_too(copy: Path, tmp_path: Path) -> None:
    def claim(content: dict[str, Any]) -> None:
        content["provenance"]["config"]["mcc"] = not TRAIN.mcc

    _edit_json(copy / "store" / "standardisation.json", claim)
    with pytest.raises(MismatchError, match="feature_names"):
        train_ddpm(copy / "store", tmp_path / "new", dataclasses.replace(TRAIN, mcc=not TRAIN.mcc), execution=QUIET)


def test_refused_runs_leave_no_configuration(copy: Path, tmp_path: Path) -> None:
    (copy / "store" / "standardisation.json").unlink()
    with pytest.raises(InputError, match="extract-radiomics"):
        train_ddpm(copy / "store", tmp_path / "new", TRAIN, execution=QUIET)
    assert list((tmp_path / "new").iterdir()) == []


def test_cases_of_different_spacing_are_refused(copy: Path, tmp_path: Path) -> None:
    path = Store(copy / "store").case_file(CASES[1], "volume")
    _edit_provenance(path, lambda provenance: provenance["config"].update(spacing_mm=2.5))
    with pytest.raises(MismatchError, match=CASES[1]):
        train_ddpm(copy / "store", tmp_path / "new", TRAIN, execution=QUIET)


def test_unreadable_volume_leaves_the_others(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(copy / "store")
    broken = store.case_file(CASES[0], "volume")
    broken.write_bytes(broken.read_bytes()[:500])
    with caplog.at_level(logging.WARNING, logger="lungseg"):
        assert training_cases(store, list(CASES)) == [CASES[1]]
    assert CASES[0] in caplog.text
    assert f"lungseg doctor {store.path}" in caplog.text
    short = dataclasses.replace(TRAIN, total_images=4, batch_size=2)
    assert train_ddpm(store, tmp_path / "new", short, execution=QUIET).values["images"] == 4
    assert set(read_json(tmp_path / "new" / "config.json")["inputs"]) == {CASES[1], "standardisation"}
    with pytest.raises(InputError, match=f"unreadable \\({CASES[0]}"):
        find_training_cases(store, [CASES[0]])


def test_failed_cases_are_left_out_of_the_standardisation_until_they_are_complete(copy: Path, tmp_path: Path) -> None:
    store = Store(copy / "store")
    path = store.path / "standardisation.json"
    whole = path.read_bytes()
    broken = store.case_file(CASES[0], "volume")
    content = broken.read_bytes()
    path.unlink()
    broken.write_bytes(content[:500])
    result = extract_radiomics(store, RADIOMICS, execution=QUIET)
    assert result.exit_code == PartialError.exit_code
    assert result.notes == (f"standardisation.json leaves out {CASES[0]}",)
    assert set(read_json(path)["provenance"]["inputs"]) == {CASES[1]}
    # repaired: training may go on with what there is, and the same command completes it
    broken.write_bytes(content)
    short = dataclasses.replace(TRAIN, total_images=4, batch_size=2)
    train_ddpm(store, tmp_path / "new", short, execution=QUIET)
    assert extract_radiomics(store, RADIOMICS, execution=QUIET).exit_code == 0
    assert path.read_bytes() == whole


def test_no_complete_training_case_gives_no_standardisation(copy: Path) -> None:
    store = Store(copy / "store")
    _edit_provenance(store.case_file(CASES[1], "volume"), lambda provenance: provenance.update(split="test"))
    broken = store.case_file(CASES[0], "volume")
    broken.write_bytes(broken.read_bytes()[:500])
    (store.path / "standardisation.json").unlink()
    result = extract_radiomics(store, RADIOMICS, execution=QUIET)
    assert result.exit_code == PartialError.exit_code
    assert "not written" in result.notes[0]
    assert not (store.path / "standardisation.json").exists()


def test_descriptors_of_another_version_are_refused(copy: Path) -> None:
    store = Store(copy / "store")
    with store.open(CASES[0], "radiomics") as radiomics:
        assert radiomics.provenance["config"]["descriptor_version"] == DESCRIPTOR_VERSION
        assert radiomics.provenance["descriptor_version"] == DESCRIPTOR_VERSION
        assert len(radiomics.provenance["feature_names"]) == 34
    path = store.case_file(CASES[0], "radiomics")
    _edit_provenance(path, lambda provenance: provenance["config"].update(descriptor_version=0))
    result = extract_radiomics(store, RADIOMICS, execution=QUIET)
    assert {o.case_id: o.exit_code for o in result.outcomes} == {CASES[0]: 4, CASES[1]: 0}
    assert f"descriptor_version: there 0, now {DESCRIPTOR_VERSION}" in result.outcomes[0].message
    assert result.notes == ()  # the standardisation still holds this case
    done = extract_radiomics(store, RADIOMICS, execution=dataclasses.replace(QUIET, overwrite=True))
    assert [o.status for o in done.outcomes] == ["done", "complete already"]


def test_changed_environment_is_told_but_not_refused(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    _edit_json(copy / "run" / "config.json", lambda header: header["environment"].update(torch="2.0.1", processes=4))
    with caplog.at_level(logging.WARNING, logger="lungseg"):
        train_ddpm(copy / "store", copy / "run", TRAIN, execution=QUIET)
        assert "was begun with" not in caplog.text  # a finished run does not change any more
        (copy / "run" / "model.safetensors").unlink()
        train_ddpm(copy / "store", copy / "run", TRAIN, execution=QUIET)
    assert '"processes":4' in caplog.text
    assert "2.0.1" in caplog.text
    assert torch.__version__ in caplog.text


def test_cache_is_shared_by_all_loaders_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(workers: int, processes: int) -> int:
        return training._cache_bytes(dataclasses.replace(TRAIN, cache_gib=8.0, workers=workers), processes)

    assert share(0, 1) == share(1, 1) == 8 * 2**30
    assert share(8, 4) * 8 * 4 == 8 * 2**30
    assert launching.local_processes(1) == 1
    assert launching.local_processes(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # two machines under torchrun
    assert launching.local_processes(8) == 4


@pytest.mark.parametrize("below", [False, True])
def test_output_that_is_a_file(finished: Path, tmp_path: Path, below: bool) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "run" if below else tmp_path / "file"
    for execution in (QUIET, TWO):
        with pytest.raises(InputError, match="is a file"):
            train_ddpm(finished / "store", output, TRAIN, execution=execution)
    assert (tmp_path / "file").read_text() == "mine"


def _die(worker: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_row_55_killed_loader_process_is_lack_of_a_resource(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_ignore_signals", _die)
    config = dataclasses.replace(TRAIN, workers=1)
    with pytest.raises(ResourceError, match=r"--workers \(now 1\) or --cache-gib \(now 8\)"):
        train_ddpm(finished / "store", tmp_path / "new", config, execution=QUIET)


def test_other_runtime_errors_stay_bugs() -> None:
    with pytest.raises(RuntimeError, match="shape"), training._loader_deaths(TRAIN):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshape mismatch")


def test_either_weight_of_the_distillation_may_be_zero(finished: Path, tmp_path: Path) -> None:
    lines = {}
    changes: dict[str, dict[str, Any]] = {
        "contrast": {"regression_weight": 0.0},
        "regression": {"distill_weight": 0.0},
        "neither": {"regression_weight": 0.0, "distill_weight": 0.0},
    }
    for name, change in changes.items():
        config = dataclasses.replace(
            TRAIN, total_images=4, batch_size=4, log_images=4, distill_start=0.0, distill_full=0.0, **change
        )
        train_ddpm(finished / "store", tmp_path / name, config, execution=QUIET)
        lines[name] = json.loads((tmp_path / name / "stats.jsonl").read_text())
    one, other = lines["contrast"], lines["regression"]
    assert one["weight"] == TRAIN.distill_weight > 0
    assert other["weight"] == 0
    assert one["total"] == pytest.approx(one["diffusion"] + TRAIN.distill_weight * one["contrast"])
    assert other["total"] == pytest.approx(other["diffusion"] + TRAIN.regression_weight * other["regression"])
    assert other["regression"] > 0
    assert lines["neither"]["total"] == lines["neither"]["diffusion"]
    assert lines["neither"]["gradient_norm"] < other["gradient_norm"]


def test_error_of_the_lowest_rank_is_reported_and_its_file_removed(tmp_path: Path) -> None:
    def leave(rank: int, code: int, text: str) -> None:
        write_json(tmp_path / f".error-rank{rank}.json", {"exit_code": code, "text": text})

    assert launching.take_error(tmp_path) is None
    leave(0, 1, "bug that follows")
    leave(1, 143, "stopped")
    leave(2, 5, "out of memory")
    leave(10, 6, "damaged")
    (tmp_path / ".error-rank3.json").write_text("{")
    error = launching.take_error(tmp_path)
    assert error is not None
    assert (error.exit_code, str(error)) == (5, "out of memory")
    assert list(tmp_path.iterdir()) == []
    leave(0, 1, "bug")
    leave(1, 130, "stopped")
    error = launching.take_error(tmp_path)
    assert isinstance(error, Interrupted)
    assert error.exit_code == 130


def test_a_process_that_leaves_says_why(tmp_path: Path) -> None:
    """In processes of their own, as they end in ``os._exit``."""
    code = (
        "import os, sys; from pathlib import Path; from lungseg.stages.launch import _entry\n"
        "import lungseg.errors as e; from lungseg.config import Execution\n"
        "def work(*, execution): raise {error}\n"
        "os.environ['RANK'] = '1'\n"
        "_entry(work, (), Path(sys.argv[1]), Execution(quiet=True))\n"
    )
    expected = {
        "e.StoreError('held')": (6, "held"),
        "MemoryError()": (5, "not enough memory"),
        "ValueError('odd')": (1, "ValueError: odd"),
        "RuntimeError('Connection closed by peer [127.0.0.1]')": (1, None),
    }
    for error, (exit_code, text) in expected.items():
        done = subprocess.run([sys.executable, "-c", code.format(error=error), str(tmp_path)], capture_output=True)
        assert done.returncode == exit_code, done.stderr
        left = launching.take_error(tmp_path)
        assert (left is None) if text is None else (left is not None and text in str(left))


def _command(finished: Path, output: Path, settings: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "lungseg.cli.app", "train-ddpm", str(finished / "store"), "--preset", "tiny"]
    return [*command, "--config", str(settings), "-o", str(output), "--device", "cpu", *more]


@pytest.fixture
def long_settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    text = TOML.replace("total-images = 24", "total-images = 160")
    path.write_text(text.replace("checkpoint-images = 8", "checkpoint-images = 16"))
    return path


def _wait_for_checkpoint(output: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not any(output.glob("checkpoint-*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [False, True], ids=["launcher", "group"])
def test_row_59_sigterm_to_several_processes_saves_and_resumes(
    finished: Path, tmp_path: Path, long_settings: Path, to_group: bool
) -> None:
    """``kill`` reaches the launcher alone; SLURM and Ctrl-C reach every process, loaders included."""
    output = tmp_path / "two"
    command = _command(finished, output, long_settings, "--gpus", "2", "--workers", "1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        _wait_for_checkpoint(output, process)
        if to_group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    assert "error: stopped after" in error
    assert "Traceback" not in error
    assert "forcefully" not in error, "the launcher had to kill its processes at its time limit"
    saved = max(int(path.stem.partition("-")[2]) for path in output.glob("checkpoint-*.pt"))
    assert f"stopped after {saved} images" in error
    assert saved < 160
    assert not list(output.glob(".error-*"))
    assert not (output / "train.lock").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert (output / "model.safetensors").exists()
    if not to_group:
        whole = tmp_path / "whole"
        subprocess.run(_command(finished, whole, long_settings, "--gpus", "2"), check=True, capture_output=True)
        assert tree_hashes(whole) == tree_hashes(output)


@pytest.mark.slow
def test_locked_run_is_reported_with_its_holder(finished: Path, tmp_path: Path) -> None:
    from lungseg.store.locks import lock

    with lock(tmp_path / "run" / "train.lock"), pytest.raises(Exception, match="held by process") as caught:
        train_ddpm(finished / "store", tmp_path / "run", TRAIN, execution=TWO)
    assert getattr(caught.value, "exit_code", None) == 6
    assert f"held by process {os.getpid()}" in str(caught.value)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_damaged_data_met_by_one_of_two_processes_is_reported(copy: Path, tmp_path: Path) -> None:
    """A failure in the midst of training: both exit code and words come from the process that met it."""
    before = signal.getsignal(signal.SIGTERM)
    path = Store(copy / "store").case_file(CASES[0], "volume")
    with h5py.File(path, "r") as file:
        chunk = file["image"].id.get_chunk_info(file["image"].id.get_num_chunks() // 2)
    content = bytearray(path.read_bytes())
    for index in range(chunk.byte_offset, chunk.byte_offset + chunk.size):
        content[index] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"cannot be read|damaged") as caught:
        train_ddpm(copy / "store", tmp_path / "run", TRAIN, execution=TWO)
    assert getattr(caught.value, "exit_code", None) == 6
    assert str(path) in str(caught.value)
    assert not list((tmp_path / "run").glob(".error-*"))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_row_56_killed_process_is_lack_of_a_resource(finished: Path, tmp_path: Path, long_settings: Path) -> None:
    output = tmp_path / "two"
    command = _command(finished, output, long_settings, "--gpus", "2")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        _wait_for_checkpoint(output, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(ranks[-1]), signal.SIGKILL)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 5, error
    assert "died" in error
    assert "lack of memory" in error

"""What a run tells while it learns: held-out loss, pictures, the alarm of a collapse, event files, needs and speed."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from pipeline_fixture import tree_hashes
from training_fixture import QUIET, make_cohort, quick

from lungseg.config import Execution, TrainConfig, make_config
from lungseg.diffusion.checkpoint import load_student, read_model_file
from lungseg.diffusion.collapse import ALARM_AFTER
from lungseg.diffusion.footprint import device_peak, footprint
from lungseg.errors import UsageError
from lungseg.report.training_curves import curves_png, samples_png
from lungseg.stages import training_estimate
from lungseg.stages.train_ddpm import train_ddpm
from lungseg.stages.training_cases import held_out_cases
from lungseg.stages.training_estimate import estimate, summary
from lungseg.stages.training_loop import Pace, Seat
from lungseg.store.atomic import read_json
from lungseg.store.cases import Store


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_cohort(tmp_path_factory.mktemp("cohort") / "store")


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text(encoding="utf-8").splitlines()]


# --- held-out patients ---


def test_patients_are_held_out_whole_and_whatever_the_order() -> None:
    patients = {f"case-{i}": f"patient-{i // 2}" for i in range(40)}  # 20 patients with two cases each
    held_out = held_out_cases(patients, 0.1)
    assert len(held_out) == 4
    chosen = {patients[case_id] for case_id in held_out}
    assert len(chosen) == 2
    backwards = dict(reversed(patients.items()))
    assert set(held_out_cases(backwards, 0.1)) == set(held_out)
    assert chosen <= {patients[case_id] for case_id in held_out_cases(patients, 0.2)}


@pytest.mark.parametrize(("number", "expected"), [(1, 0), (3, 0), (4, 1), (9, 1), (14, 1), (16, 2), (100, 10)])
def test_number_of_patients_held_out(number: int, expected: int) -> None:
    patients = {f"c{i}": f"p{i}" for i in range(number)}
    assert len(held_out_cases(patients, 0.1)) == expected
    assert held_out_cases(patients, 0.0) == []


def test_held_out_cases_are_never_trained_on_and_judged_at_each_checkpoint(
    cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lungseg.store.patches import PatchSource

    seen: set[tuple[bool, str]] = set()
    read = PatchSource._read

    def spy(self: PatchSource, path: Path, *box: Any) -> Any:
        seen.add((self._flips, path.parent.name))
        return read(self, path, *box)

    monkeypatch.setattr(PatchSource, "_read", spy)
    config = quick(held_out=0.2, held_out_images=6, total_images=96, checkpoint_images=16, log_images=48)
    train_ddpm(cohort, tmp_path / "run", config, execution=QUIET)
    header = read_json(tmp_path / "run" / "config.json")
    (held_out,) = header["held_out"]
    trained = {name for augmented, name in seen if augmented}
    assert {name for augmented, name in seen if not augmented} == {held_out}
    assert trained == set(cohort.case_ids()) - {held_out}
    card = read_model_file(tmp_path / "run" / "model.safetensors")[0]["card"]
    assert card["num_cases"] == 5
    assert header["inputs"][held_out] not in card["training_volumes"]
    judged = [line for line in _lines(tmp_path / "run") if "held_out_diffusion" in line]
    assert [line["images"] for line in judged] == [16, 32, 48, 64, 80, 96]
    losses = [line["held_out_diffusion"] for line in judged]
    assert losses[-1] < losses[0]
    assert judged[-1]["held_out_regression"] < judged[0]["held_out_regression"]


def test_few_patients_are_all_trained_on_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_cohort(tmp_path / "store", cases=3)
    with caplog.at_level(logging.INFO, logger="lungseg"):
        train_ddpm(store, tmp_path / "run", quick(held_out=0.1, total_images=4), execution=QUIET)
    assert "fewer than 4 patients: none is held out" in caplog.text
    assert not any("held_out_diffusion" in line for line in _lines(tmp_path / "run"))


@pytest.mark.slow
def test_row_58_processes_share_the_held_out_images(cohort: Store, tmp_path: Path) -> None:
    """No process waits while another judges: each takes its part, and the loss is that of one process."""
    config = quick(held_out=0.2, held_out_images=8, total_images=8, learning_rate=1e-6)
    judged = []
    for name, execution in (("one", QUIET), ("two", dataclasses.replace(QUIET, gpus=2))):
        train_ddpm(cohort, tmp_path / name, config, execution=execution)
        judged.append([line for line in _lines(tmp_path / name) if "held_out_diffusion" in line][-1])
    for key, value in judged[0].items():
        assert judged[1][key] == pytest.approx(value, rel=1e-3), key


# --- what is logged ---


def test_all_figures_of_the_distillation_are_logged(cohort: Store, tmp_path: Path) -> None:
    config = quick(teacher_windows=(8, 16), contrast="soft", queue_size=64, collapse_weight=0.1, accumulate=2)
    train_ddpm(cohort, tmp_path / "run", config, execution=QUIET)
    last = _lines(tmp_path / "run")[-1]
    assert {
        "images", "weight", "rate", "total", "diffusion", "contrast", "regression", "collapse", "mean_positives",
        "student_cosine", "teacher_cosine", "effective_rank", "gradient_norm", "gradient_norm_unet",
        "gradient_norm_heads", "skipped",
    } == set(last)  # fmt: skip
    assert all(math.isfinite(value) for value in last.values())
    assert 1 <= last["effective_rank"] <= 16
    student = load_student(tmp_path / "run" / "model.safetensors")
    assert student.card["num_features"] == student.head.regress.out_features == 68
    assert len(student.card["standardisation"]) == 2


def test_collapse_is_told_once_and_not_again_after_resuming(
    cohort: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher whose embeddings all agree, and a contrast with nothing but positives: collapse is the optimum."""
    config = quick(
        total_images=80, log_images=4, checkpoint_images=40, positive_similarity=-1.0, negative_similarity=-1.0,
        distill_weight=20.0, regression_weight=0.0, learning_rate=0.02, distill_full=0.0,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="lungseg"):
        train_ddpm(cohort, tmp_path / "run", config, execution=QUIET)
    alarms = [r.message for r in caplog.records if "the embeddings collapse" in r.message]
    assert len(alarms) == 1
    assert "--collapse-weight" in alarms[0]
    values = _lines(tmp_path / "run")
    assert values[-1]["student_cosine"] > 0.9
    assert len(values) > ALARM_AFTER
    (tmp_path / "run" / "model.safetensors").unlink()
    newest = sorted((tmp_path / "run").glob("checkpoint-*.pt"))[-1]
    newest.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="lungseg"):
        train_ddpm(cohort, tmp_path / "run", config, execution=QUIET)
    assert "the embeddings collapse" not in caplog.text


def test_curves_and_previews_are_pictures_and_the_same_each_time(cohort: Store, tmp_path: Path) -> None:
    config = quick(preview_images=16, held_out=0.2, held_out_images=4)
    for name in ("a", "b"):
        train_ddpm(cohort, tmp_path / name, config, execution=QUIET)
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    previews = sorted(path.name for path in (tmp_path / "a" / "previews").iterdir())
    assert previews == ["0000000016.png", "0000000024.png"]
    for path in (tmp_path / "a" / "curves.png", tmp_path / "a" / "previews" / previews[0]):
        picture = imread(path)
        assert picture.shape[0] > 200
        assert picture.std() > 0.05


def test_curves_without_distillation_or_with_one_line_are_drawn() -> None:
    for lines in ([], [{"images": 8, "diffusion": 0.5}], [{"images": 8, "diffusion": None, "contrast": 1.0}]):
        assert curves_png(lines).startswith(b"\x89PNG")


def test_samples_are_shown_in_three_planes_superior_up() -> None:
    volume = np.full((1, 8, 16, 16), -1024, np.int16)
    volume[:, 4:] = 200  # the upper half
    data = samples_png(volume)
    assert data.startswith(b"\x89PNG")
    assert b"tEXt" not in data


def test_run_without_matplotlib_ends_with_a_word(
    cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, logger="lungseg"):
        train_ddpm(cohort, tmp_path / "run", quick(total_images=4, preview_images=4), execution=QUIET)
    assert "curves.png is not drawn, as matplotlib is not installed" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").exists()


# --- TensorBoard ---


class _Writer:
    """Stands in for SummaryWriter."""

    scalars: list[tuple[str, float, int]]

    def __init__(self, folder: str, purge_step: int) -> None:
        type(self).scalars = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        pass


class _BrokenWriter(_Writer):
    def add_scalar(self, name: str, value: float, step: int) -> None:
        raise OSError("No space left on device")


def _install(monkeypatch: pytest.MonkeyPatch, writer: type) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


def test_tensorboard_gets_what_stats_get(cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Writer)
    train_ddpm(cohort, tmp_path / "run", quick(tensorboard=True), execution=QUIET)
    expected = {
        (name, value, line["images"])
        for line in _lines(tmp_path / "run")
        for name, value in line.items()
        if name != "images"
    }
    assert set(_Writer.scalars) == expected
    # a run is the same run with and without it
    assert read_json(tmp_path / "run" / "config.json")["config"].get("tensorboard") is None


def test_row_61_a_failing_logger_never_stops_the_training(
    cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _install(monkeypatch, _BrokenWriter)
    with caplog.at_level(logging.WARNING, logger="lungseg"):
        train_ddpm(cohort, tmp_path / "run", quick(tensorboard=True), execution=QUIET)
    assert caplog.text.count("TensorBoard is switched off: OSError: No space left") == 1
    assert len(_lines(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_tensorboard_that_is_not_installed_is_told_before_the_work(
    cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'lungseg\[tensorboard\]'"):
        train_ddpm(cohort, tmp_path / "run", quick(tensorboard=True), execution=QUIET)
    assert not list((tmp_path / "run").glob("*.pt"))


# --- needs and speed ---


def test_footprint_counts_parameters_activations_and_operations() -> None:
    """METHOD 1.2: 38.6 M parameters and 656 G multiply-adds forward at 32x96x96; backward takes twice that."""
    cost = footprint(make_config(TrainConfig, preset="paper-code"))
    assert cost.parameters == 38_605_569
    assert cost.flops == pytest.approx(3 * 2 * 656e9, rel=0.01)
    # the input of each convolution must be kept: 25 maps of 64 channels at full size at the very least
    assert cost.kept_bytes > 2 * 64 * 32 * 96 * 96 * 4
    less = footprint(make_config(TrainConfig, preset="paper-code", gradient_checkpointing=True))
    assert less.kept_bytes < 0.6 * cost.kept_bytes
    assert less.flops >= cost.flops


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_footprint_of_a_batch_is_what_autograd_keeps(norm: str) -> None:
    """The same count on real tensors, of a batch of two."""
    from lungseg.diffusion.checkpoint import unet_spec
    from lungseg.diffusion.unet import UNet

    config = quick(norm=norm, base_width=32, multipliers=(1, 2), stem=2)
    unet, kept = UNet(unet_spec(config)), {}
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 2, *config.patch_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = unet(x, torch.tensor([1, 2]))
    assert 2 * footprint(config, "cpu").kept_bytes == pytest.approx(sum(kept.values()), rel=0.1)
    assert len(outputs) == 2


def test_dry_run_names_a_setting_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(TrainConfig, preset="small", batch_size=16)
    execution = Execution(device="cpu")
    cost = footprint(config, "cpu")

    def limit(images: int) -> None:
        there = cost.memory_bytes(images=images, precision="fp32", device="cpu")
        monkeypatch.setattr(training_estimate, "_limit", lambda device, size: there)

    limit(16)
    assert estimate(config, execution)["advice"] == "fits"
    limit(5)
    assert "--accumulate 4 fits" in estimate(config, execution)["advice"]
    limit(0)
    assert "no --accumulate fits" in estimate(config, execution)["advice"]
    limit(4)
    assert estimate(dataclasses.replace(config, accumulate=4), execution)["advice"] == "fits"
    assert estimate(config, dataclasses.replace(execution, gpus=4))["advice"] == "fits"


def test_a_run_that_will_not_fit_is_told_before_it_starts(
    cohort: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_estimate, "_limit", lambda device, size: 1000)
    with caplog.at_level(logging.WARNING, logger="lungseg"):
        train_ddpm(cohort, tmp_path / "run", quick(total_images=4), execution=QUIET)
    assert "of cpu: no --accumulate fits" in caplog.text


def test_summary_gives_speed_memory_and_the_share_of_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick()
    trainer = types.SimpleNamespace(config=config, precision="bf16")
    pace = Pace(images=500, seconds=10.0)
    assert summary(trainer, pace, Seat(0, 1, "cpu")).startswith("50 images/s, peak memory ")  # type: ignore[arg-type]
    assert "images/s" not in summary(trainer, Pace(0, 1.0), Seat(0, 1, "cpu"))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    share = 100 * footprint(config).flops * 50 / (2 * 989e12)
    text = summary(trainer, pace, Seat(0, 2, "cuda:0"))  # type: ignore[arg-type]
    assert text == f"50 images/s, peak memory 3 GiB a process, {share:.1f} % of the 989 TFLOP/s (bf16) of NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some New GPU")
    assert "TFLOP" not in summary(trainer, pace, Seat(0, 2, "cuda:0"))  # type: ignore[arg-type]


def test_longer_device_names_come_first() -> None:
    assert device_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert device_peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert device_peak("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert device_peak("Tesla K80", "bf16") is None
    assert device_peak("NVIDIA A100-SXM4-80GB", "fp64") is None

"""Model files and training states: the same bits back, and every kind of damage named (RELIABILITY 38, 46-48)."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from diffusion_fixture import tiny_config, tiny_student
from safetensors import safe_open
from safetensors.torch import save_file

import lungseg.diffusion.checkpoint as checkpoint_module
from lungseg.config.fields import to_dict
from lungseg.diffusion.checkpoint import (
    METADATA_KEY,
    MODEL_FORMAT,
    load_student,
    load_training_state,
    read_model_file,
    save_model,
    save_training_state,
    unet_spec,
)
from lungseg.diffusion.normalisation import HU_WINDOWS
from lungseg.errors import InputError, MismatchError, StoreError

CARD = {"num_features": 34, "images": 64, "num_cases": 2, "spacing_mm": 1.5, "intended_use": "research only"}


def _weights(student):
    unet = {f"unet.{name}": t for name, t in student.unet.state_dict().items()}
    return {**unet, **{f"head.{name}": t for name, t in student.head.state_dict().items()}}


def _saved(path, **values):
    student = tiny_student(**values)
    save_model(path, _weights(student), config=student.config, card=CARD)
    return student


def _header(path):
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()[METADATA_KEY])


def _rewrite(path, *, metadata=None, tensors=None):
    """Replace parts of a model file, as another program or version would have written it."""
    old, own = read_model_file(path)
    merged = {METADATA_KEY: json.dumps(old if metadata is None else metadata)}
    save_file(own if tensors is None else tensors, path, metadata=merged)


@pytest.mark.parametrize("values", [{}, {"head_norm": "batch"}, {"hu_window": "paper", "schedule": "linear"}], ids=str)
def test_model_comes_back_bit_for_bit(tmp_path, values):
    path = tmp_path / "run" / "model.safetensors"
    student = _saved(path, **values)
    loaded = load_student(path)
    for ours, theirs in ((student.unet, loaded.unet), (student.head, loaded.head)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())
        assert not theirs.training
        assert not any(p.requires_grad for p in theirs.parameters())
    assert loaded.config == student.config
    assert loaded.card == CARD
    assert loaded.window == student.window
    assert torch.equal(loaded.schedule.alpha_bar, student.schedule.alpha_bar)
    x, t = torch.randn(1, 2, 8, 16, 16), torch.tensor([7])
    assert torch.equal(loaded.unet(x, t)[0], student.unet(x, t)[0])


def test_same_model_gives_the_same_bytes(tmp_path):
    _saved(tmp_path / "a.safetensors")
    _saved(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_order_of_the_tensors_does_not_matter(tmp_path):
    student = tiny_student()
    weights = _weights(student)
    save_model(tmp_path / "a", weights, config=student.config, card=CARD)
    save_model(
        tmp_path / "b", dict(reversed(weights.items())), config=student.config, card=dict(reversed(CARD.items()))
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_says_all_that_is_needed(tmp_path):
    student = _saved(tmp_path / "m")
    header = _header(tmp_path / "m")
    assert header["format"] == MODEL_FORMAT
    assert header["kind"] == "model"
    assert header["config"] == to_dict(student.config)
    assert header["hu_window"] == HU_WINDOWS[student.config.hu_window].to_dict()
    assert header["card"] == CARD
    assert header["lungseg_version"]


def test_saved_window_wins_over_the_one_of_this_version(tmp_path):
    _saved(tmp_path / "m")
    header = _header(tmp_path / "m")
    header["hu_window"]["knots_norm"] = [-1.0, 0.2, 1.0]
    _rewrite(tmp_path / "m", metadata=header)
    assert load_student(tmp_path / "m").window.knots_norm == (-1.0, 0.2, 1.0)


def test_bundle_keeps_its_clustering(tmp_path):
    student = tiny_student()
    means = torch.arange(6.0).view(2, 3)
    save_model(
        tmp_path / "m",
        _weights(student),
        config=student.config,
        card=CARD,
        extra_tensors={"fit.means": means},
        extra={"names": ["healthy", "emphysema"]},
    )
    metadata, tensors = read_model_file(tmp_path / "m")
    assert metadata["kind"] == "bundle"
    assert metadata["extra"] == {"names": ["healthy", "emphysema"]}
    assert torch.equal(tensors["fit.means"], means)
    _saved(tmp_path / "plain")
    assert load_student(tmp_path / "m").fingerprint == load_student(tmp_path / "plain").fingerprint


def test_fingerprint_changes_with_weights_config_and_card(tmp_path):
    student = _saved(tmp_path / "m")
    base = load_student(tmp_path / "m").fingerprint
    assert len(base) == 64
    weights = _weights(student)
    moved = {**weights, "head.regress.bias": weights["head.regress.bias"] + 1e-3}
    marks = {base}
    for tensors, config, card in (
        (moved, student.config, CARD),
        (weights, tiny_config(total_images=65), CARD),
        (weights, student.config, {**CARD, "images": 65}),
    ):
        save_model(tmp_path / "m", tensors, config=config, card=card)
        marks.add(load_student(tmp_path / "m").fingerprint)
    assert len(marks) == 4


def test_missing_unexpected_and_misshaped_tensors_are_listed(tmp_path):
    _saved(tmp_path / "m")
    _, tensors = read_model_file(tmp_path / "m")
    del tensors["unet.conv_in.bias"]
    tensors["unet.extra"] = torch.zeros(1)
    tensors["unet.conv_out.bias"] = torch.zeros(3)
    _rewrite(tmp_path / "m", tensors=tensors)
    with pytest.raises(MismatchError) as caught:
        load_student(tmp_path / "m")
    message = str(caught.value)
    assert "missing conv_in.bias" in message
    assert "unexpected extra" in message
    assert "conv_out.bias has shape (3,), needs (8,)" in message
    assert str(tmp_path / "m") in message


def test_long_lists_of_problems_are_cut(tmp_path):
    _saved(tmp_path / "m")
    _, tensors = read_model_file(tmp_path / "m")
    _rewrite(tmp_path / "m", tensors={name: t for name, t in tensors.items() if name.startswith("head.")})
    with pytest.raises(MismatchError, match=r"missing time\.0\.weight; .*; and \d+ more"):
        load_student(tmp_path / "m")


def test_weights_of_another_width_are_refused(tmp_path):
    _saved(tmp_path / "m")
    header = _header(tmp_path / "m")
    header["config"]["base_width"] = 16
    _rewrite(tmp_path / "m", metadata=header)
    with pytest.raises(MismatchError, match="does not fit its own configuration"):
        load_student(tmp_path / "m")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_file_is_damaged(tmp_path, kept):
    _saved(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(data[:kept])
    with pytest.raises(StoreError, match="damaged or not a model file"):
        load_student(tmp_path / "m")


def test_garbage_is_damaged(tmp_path):
    (tmp_path / "m").write_bytes(bytes(range(256)) * 64)
    with pytest.raises(StoreError, match="damaged or not a model file"):
        read_model_file(tmp_path / "m")


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such model file"):
        read_model_file(tmp_path / "m")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_is_a_mismatch(tmp_path, metadata):
    save_file({"weight": torch.zeros(2)}, tmp_path / "m", metadata=metadata)
    with pytest.raises(MismatchError, match="not a lungseg model"):
        read_model_file(tmp_path / "m")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_version_is_a_mismatch(tmp_path, version):
    _saved(tmp_path / "m")
    _rewrite(tmp_path / "m", metadata={**_header(tmp_path / "m"), "format": version})
    with pytest.raises(MismatchError, match=f"has model format {version}, this lungseg reads {MODEL_FORMAT}"):
        read_model_file(tmp_path / "m")


def test_metadata_that_is_no_json_object_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "m", metadata={METADATA_KEY: "[1]"})
    with pytest.raises(MismatchError, match="model format None"):
        read_model_file(tmp_path / "m")
    save_file({"weight": torch.zeros(2)}, tmp_path / "m", metadata={METADATA_KEY: "{"})
    with pytest.raises(StoreError, match="damaged"):
        read_model_file(tmp_path / "m")


def test_settings_of_a_later_version_are_named(tmp_path):
    _saved(tmp_path / "m")
    header = _header(tmp_path / "m")
    header["config"]["gates"] = 3
    _rewrite(tmp_path / "m", metadata=header)
    with pytest.raises(MismatchError, match="settings this lungseg does not know: unknown option 'gates'"):
        load_student(tmp_path / "m")


@pytest.mark.parametrize("change", [{"card": {}}, {"card": None}, {"hu_window": {}}, {"config": None}], ids=str)
def test_incomplete_metadata_is_a_mismatch(tmp_path, change):
    _saved(tmp_path / "m")
    _rewrite(tmp_path / "m", metadata={**_header(tmp_path / "m"), **change})
    with pytest.raises(MismatchError, match=str(tmp_path / "m")):
        load_student(tmp_path / "m")


def test_network_shape_follows_the_configuration():
    config = tiny_config(encoder_blocks=2)
    spec = unet_spec(config)
    assert (spec.base_width, spec.multipliers, spec.stem, spec.norm) == (8, (1, 2), 2, "channel")
    assert spec.encoder_blocks == 2
    assert spec.token_size == config.token_size == 4


def _state():
    parameter = torch.nn.Parameter(torch.arange(4.0))
    optimiser = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(4)
    optimiser.step()
    return {"model": {"p": parameter.detach()}, "optimiser": optimiser.state_dict(), "images": 12, "skipped": 0}


def test_training_state_comes_back(tmp_path):
    state = _state()
    save_training_state(tmp_path / "c.pt", state)
    loaded = load_training_state(tmp_path / "c.pt")
    assert loaded.keys() == state.keys()
    assert loaded["images"] == 12
    assert torch.equal(loaded["model"]["p"], state["model"]["p"])
    ours, theirs = state["optimiser"]["state"][0], loaded["optimiser"]["state"][0]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert loaded["optimiser"]["param_groups"] == state["optimiser"]["param_groups"]
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("kept", [0, 10, 500, -1])
def test_truncated_training_state_is_damaged(tmp_path, kept):
    save_training_state(tmp_path / "c.pt", _state())
    data = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(data[:kept])
    with pytest.raises(StoreError, match="is damaged"):
        load_training_state(tmp_path / "c.pt")


def test_missing_training_state_is_a_store_error(tmp_path):
    with pytest.raises(StoreError):
        load_training_state(tmp_path / "c.pt")


def test_training_state_must_be_a_mapping(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "c.pt")
    with pytest.raises(StoreError, match="holds a Tensor, not a training state"):
        load_training_state(tmp_path / "c.pt")


class _Trap:
    """Creates a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("kind", ["torch", "plain pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, kind):
    target = tmp_path / "ran"
    if kind == "torch":
        torch.save({"model": _Trap(target)}, tmp_path / "c.pt")
    else:
        (tmp_path / "c.pt").write_bytes(pickle.dumps({"model": _Trap(target)}, protocol=2))
    with pytest.raises(StoreError, match="is damaged"):
        load_training_state(tmp_path / "c.pt")
    assert not target.exists()


def test_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    save_training_state(tmp_path / "c.pt", {"images": 1})

    def half(state, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_training_state(tmp_path / "c.pt", {"images": 2})
    monkeypatch.undo()
    assert load_training_state(tmp_path / "c.pt") == {"images": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_models_written_before_there_were_several_windows_are_read(tmp_path):
    """The settings of the first version: what is new takes the value that means what was done then."""
    student = _saved(tmp_path / "m")
    header = _header(tmp_path / "m")
    new = (
        "snr_gamma", "zero_terminal", "axial_turns", "hu_offset", "hu_noise", "hu_blur", "held_out", "held_out_images",
        "accumulate", "weight_decay", "positive_sigma", "queue_size", "collapse_weight", "rank_floor",
        "detach_bottleneck", "teacher_windows", "teacher_view", "preview_images", "tensorboard",
    )  # fmt: skip
    for key in new:
        del header["config"][key]
    header["config"]["teacher_window"] = 16
    _rewrite(tmp_path / "m", metadata=header)
    loaded = load_student(tmp_path / "m")
    assert loaded.config.teacher_windows == (16,)
    assert not loaded.config.axial_turns
    assert torch.equal(loaded.schedule.alpha_bar, student.schedule.alpha_bar)
    assert loaded.embedding == student.embedding == 16

"""Models for features: no decoder, half precision, and a clear refusal where the decoder is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_fixture import tiny_student

from lungseg.diffusion.checkpoint import Student, load_student, read_model_file, save_model
from lungseg.diffusion.sharing import half_precision, without_decoder
from lungseg.diffusion.tokens import NoiseField, encode_windows
from lungseg.diffusion.unet import OUTPUT
from lungseg.errors import MismatchError

CARD = {"num_features": 34, "images": 64, "spacing_mm": 1.5}


def weights_of(student: Student) -> dict[str, torch.Tensor]:
    unet = {f"unet.{name}": t for name, t in student.unet.state_dict().items()}
    return {**unet, **{f"head.{name}": t for name, t in student.head.state_dict().items()}}


def exported(path: Path, student: Student) -> Student:
    weights = half_precision(without_decoder(weights_of(student)))
    save_model(path, weights, config=student.config, card=CARD)
    return load_student(path)


@pytest.mark.parametrize("values", [{}, {"head_norm": "batch"}, {"distill": "none"}], ids=str)
def test_tokens_are_those_of_the_whole_model(tmp_path: Path, values: dict[str, str]) -> None:
    student = tiny_student(**values)
    slim = exported(tmp_path / "m", student)
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 200, (2, 8, 16, 16)).astype(np.int16)
    corners = np.zeros((2, 3), int)
    tokens = [
        encode_windows(one, hu, np.ones(hu.shape, bool), corners, NoiseField(0, (16, 16)), timesteps=(0, 5))
        for one in (student, slim)
    ]
    assert tokens[1].dtype == np.float32
    np.testing.assert_allclose(tokens[1], tokens[0], atol=5e-3)  # half precision: 5e-4 of each weight
    assert not np.array_equal(tokens[1], tokens[0])
    assert {t.dtype for n, t in read_model_file(tmp_path / "m")[1].items() if "num_batches" not in n} == {torch.float16}
    assert all(p.dtype == torch.float32 for p in (*slim.unet.parameters(), *slim.head.parameters()))


def test_file_says_that_it_has_no_decoder(tmp_path: Path) -> None:
    student = tiny_student()
    slim = exported(tmp_path / "m", student)
    save_model(tmp_path / "whole", weights_of(student), config=student.config, card=CARD)
    assert read_model_file(tmp_path / "m")[0]["decoder"] is False
    assert "decoder" not in read_model_file(tmp_path / "whole")[0]
    assert (tmp_path / "m").stat().st_size < 0.4 * (tmp_path / "whole").stat().st_size
    assert not slim.unet.has_decoder
    names = set(slim.unet.state_dict())
    assert names == {n for n in student.unet.state_dict() if not n.startswith(("decoder.", "norm_out.", "conv_out."))}


def test_what_needs_the_decoder_is_refused(tmp_path: Path) -> None:
    slim = exported(tmp_path / "m", tiny_student())
    x, t = torch.zeros(1, 2, 8, 16, 16), torch.tensor([3])
    for call in (lambda: slim.unet(x, t), lambda: slim.unet.activations(x, t, ["decoder.0.0"])):
        with pytest.raises(MismatchError, match="no decoder"):
            call()
    with pytest.raises(MismatchError, match=r"synthesize needs: give the model\.safetensors of its training run"):
        slim.require_decoder("synthesize")
    assert set(slim.unet.activations(x, t, ["encoder.0.0", "middle"])) == {"encoder.0.0", "middle"}
    tiny_student().require_decoder("synthesize")
    assert tiny_student().unet.activations(x, t, [OUTPUT])[OUTPUT].shape == (1, 1, 8, 16, 16)


def test_a_decoder_that_is_missing_without_notice_is_damage(tmp_path: Path) -> None:
    student = tiny_student()
    weights = {n: t for n, t in weights_of(student).items() if not n.startswith("unet.decoder.0.")}
    save_model(tmp_path / "m", weights, config=student.config, card=CARD)
    with pytest.raises(MismatchError, match=r"missing decoder\.0\."):
        load_student(tmp_path / "m")


@pytest.mark.parametrize("value", [1e6, float("nan"), float("-inf")])
def test_weights_beyond_half_precision_are_refused(value: float) -> None:
    weights = {"unet.a": torch.ones(2), "head.b": torch.tensor([0.0, value])}
    with pytest.raises(MismatchError, match=r"head\.b hold values that half precision cannot"):
        half_precision(weights)
    counts = half_precision({"n": torch.tensor(70000), "w": torch.tensor(0.1)})
    assert counts["n"].dtype == torch.int64
    assert counts["w"] == torch.tensor(0.1, dtype=torch.float16)

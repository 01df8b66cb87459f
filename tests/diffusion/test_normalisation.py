"""HU window: exact at the knots, inverted on every integer, clipped outside, refused when damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lungseg.diffusion.normalisation import HU_WINDOWS, HuWindow
from lungseg.errors import MismatchError

EXACT = {name: window for name, window in HU_WINDOWS.items() if not window.per_volume}
WINDOWS = pytest.mark.parametrize("window", EXACT.values(), ids=EXACT)


def _integers(window):
    return torch.arange(int(window.knots_hu[0]), int(window.knots_hu[-1]) + 1, dtype=torch.int16)


@WINDOWS
def test_every_integer_hu_comes_back(window):
    hu = _integers(window)
    back = window.denormalise(window.normalise(hu))
    assert (back - hu).abs().max() <= 2e-4
    assert torch.equal(back.round().to(torch.int16), hu)


@WINDOWS
def test_knots_are_hit_exactly(window):
    hu, norm = torch.tensor(window.knots_hu), torch.tensor(window.knots_norm)
    assert torch.equal(window.normalise(hu), norm)
    assert torch.equal(window.denormalise(norm), hu)


@WINDOWS
def test_map_rises_strictly_and_stays_in_range(window):
    x = window.normalise(_integers(window))
    assert x.dtype == torch.float32
    assert (x.diff() > 0).all()
    assert x[0] == -1
    assert x[-1] == 1
    fine = window.denormalise(torch.linspace(-1, 1, 5001))
    assert (fine.diff() > 0).all()


@WINDOWS
def test_values_outside_are_clipped(window):
    low, high = window.knots_hu[0], window.knots_hu[-1]
    outside = torch.tensor([-32768, low - 1, high + 1, 32767])
    assert window.normalise(outside).tolist() == [-1, -1, 1, 1]
    assert window.normalise(torch.tensor([-torch.inf, torch.inf])).tolist() == [-1, 1]
    assert window.denormalise(torch.tensor([-1.5, 7.0])).tolist() == [low, high]


def test_companded_spends_55_percent_below_minus_700():
    window = HU_WINDOWS["companded"]
    share = (window.normalise(torch.tensor(-700)) + 1) / 2
    assert share.item() == pytest.approx(0.55)
    # a 100 HU hole in lung: 0.34 of the range's 2, against 0.14 with the linear window (FEASIBILITY, failure 4)
    hole = torch.tensor([-950, -850])
    assert window.normalise(hole).diff().item() == pytest.approx(1.1 * 100 / 324, rel=1e-5)
    assert HU_WINDOWS["linear"].normalise(hole).diff().item() == pytest.approx(100 / 712, rel=1e-5)


@pytest.mark.parametrize(("name", "offset", "scale"), [("linear", 1024, 712), ("paper", 1000, 700)])
def test_linear_windows_equal_their_published_formula(name, offset, scale):
    window = HU_WINDOWS[name]
    hu = _integers(window)
    torch.testing.assert_close(window.normalise(hu), (hu.float() + offset) / scale - 1)


def test_nan_stays_nan():
    window = HU_WINDOWS["companded"]
    x = torch.tensor([torch.nan, -1024.0])
    assert window.normalise(x).isnan().tolist() == [True, False]
    assert window.denormalise(x).isnan().tolist() == [True, False]


@WINDOWS
def test_dict_round_trip_through_json(window):
    assert HuWindow.from_dict(json.loads(json.dumps(window.to_dict()))) == window


@pytest.mark.parametrize(
    "change",
    [
        {"knots_hu": [400, -700, -1024]},
        {"knots_hu": [-1024, -1024, 400]},
        {"knots_norm": [-1, 0.1, 0.1]},
        {"knots_hu": [-1024, float("nan"), 400]},
        {"knots_norm": [-1, 0.1, float("inf")]},
        {"knots_hu": [-1024, 400]},
        {"knots_hu": [-1024], "knots_norm": [-1]},
        {"knots_hu": []},
        {"knots_hu": None},
        {"knots_norm": ["low", "middle", "high"]},
    ],
    ids=str,
)
def test_bad_knots_are_refused(change):
    with pytest.raises(MismatchError, match="HU window"):
        HuWindow.from_dict({**HU_WINDOWS["companded"].to_dict(), **change})


def test_missing_knots_are_refused():
    with pytest.raises(MismatchError, match="HU window"):
        HuWindow.from_dict({"name": "companded"})


def test_8_bit_input_is_the_minimum_to_maximum_of_each_volume_in_256_steps():
    """METHOD 1.7: per-volume min-max, uint8, [-1, 1]; HU cannot be had back."""
    window = HU_WINDOWS["8-bit"]
    volumes = torch.tensor([[-1024, -850, 200, 976], [-500, -400, -300, -245]], dtype=torch.int16)
    limits = torch.tensor([[-1024.0, 976.0], [-500.0, -245.0]])
    x = window.normalise(volumes, limits)
    expected = [np.rint((v - v.min()) / (v.max() - v.min()) * 255) / 127.5 - 1 for v in volumes.numpy().astype(float)]
    np.testing.assert_allclose(x.numpy(), np.stack(expected), atol=1e-6)
    assert x[1].tolist() == pytest.approx([-1, 100 / 127.5 - 1, 200 / 127.5 - 1, 1])
    with pytest.raises(MismatchError, match="of_volume"):
        window.normalise(volumes)
    with pytest.raises(MismatchError, match="forgotten HU"):
        window.denormalise(x)
    # the way of inference: one volume at a time, windows of it cut anywhere
    for volume, row in zip(volumes, x, strict=True):
        own = window.of_volume(volume.numpy())
        assert torch.equal(own.normalise(volume), row)
        assert torch.equal(own.normalise(volume[1:3]), row[1:3])
        assert own.levels == 256
    assert HU_WINDOWS["companded"].of_volume(volumes.numpy()) is HU_WINDOWS["companded"]
    assert HuWindow.from_dict(json.loads(json.dumps(window.to_dict()))) == window


def test_windows_of_older_models_are_read():
    plain = HU_WINDOWS["companded"].to_dict()
    assert set(plain) == {"name", "knots_hu", "knots_norm"}
    assert HuWindow.from_dict(plain) == HU_WINDOWS["companded"]

"""Lungs by the package `lungmask`: found or not, its labels turned into ours, its silence and its failures."""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from lungmask_package import VERSION, WEIGHTS, install

from lungseg.errors import InputError, ResourceError
from lungseg.scan.lung_network import find_lung_network, lungs_from_network
from lungseg.scan.volume import Geometry, Volume

GRID = Geometry((24, 30, 36), (8.0, 8.0, 8.0))


def chest(lungs: bool = True) -> Volume:
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID.shape], indexing="ij")
    hu = np.where(y**2 + x**2 < 0.9, 40, -1000)
    if lungs:
        for side in (-0.45, 0.45):
            hu[(z / 0.8) ** 2 + (y / 0.6) ** 2 + ((x - side) / 0.3) ** 2 < 1] = -850
    return Volume(hu.astype(np.int16), GRID)


def test_the_networks_right_and_left_become_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch)
    filters = list(warnings.filters)
    network = find_lung_network()
    assert network.identity == f"{VERSION} R231 {hashlib.sha256(b'weights of a test').hexdigest()[:12]}"
    found = lungs_from_network(chest(), network)
    assert found.convention == "lungmask"
    lung = chest().array == -850
    left = np.arange(GRID.shape[2]) >= GRID.shape[2] / 2
    assert np.array_equal(found.field.labels, np.where(lung, np.where(left, 1, 2), 0))
    assert found.field.mean_hu == -850
    assert found.field.volume_ml == pytest.approx(lung.sum() * 0.512)
    assert capsys.readouterr().out == ""  # the package talks on standard output
    assert warnings.filters == filters


def test_no_lung_is_what_our_own_lungs_call_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    field = lungs_from_network(chest(lungs=False), find_lung_network()).field
    assert not field.labels.any()
    assert (field.volume_ml, field.warnings[0][:7]) == (0.0, "no lung")


def test_a_mirrored_scan_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network knows sides by the organs; the stand-in is made to, by turning what it gives."""
    install(tmp_path, monkeypatch)
    network = find_lung_network()
    original = sys.modules["lungmask.mask"].LMInferer.apply
    monkeypatch.setattr("lungmask.mask.LMInferer.apply", lambda self, image: original(self, image)[:, :, ::-1])
    with pytest.raises(InputError, match="patient's right"):
        lungs_from_network(chest(), network)


def test_a_missing_package_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lungmask", None)
    with pytest.raises(ResourceError, match=r"not installed.*pip install 'lungseg\[lungmask\]'"):
        find_lung_network()


def test_missing_weights_are_told_and_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, weights=None)
    with pytest.raises(ResourceError) as caught:
        find_lung_network()
    assert WEIGHTS in str(caught.value)
    assert "LMInferer()" in str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)


def test_damaged_weights_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, weights=b"cut")
    with pytest.raises(ResourceError, match=f"cannot load its weights {WEIGHTS} .RuntimeError.: the file is damaged"):
        lungs_from_network(chest(), find_lung_network())

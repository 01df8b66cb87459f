"""The reference backend: really pyradiomics, same columns, same guards."""

from __future__ import annotations

import sys

import pytest
import torch

from lungseg.errors import ResourceError
from lungseg.radiomics.descriptor import FAMILIES, FEATURE_NAMES, compute_descriptors
from lungseg.radiomics.glcm import Aggregation
from lungseg.radiomics.pyradiomics import GLCM_FEATURES, compute_descriptors_pyradiomics


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.0, 20.0, 80.0, 200.0, 900.0, 100.0, 100.0, 100.0]).view(-1, 1, 1, 1)
    patches = (torch.randn((8, 8, 9, 10), generator=generator) * spread - 700).round()  # row 4 leaves [-1024, 400]
    masks = torch.rand(patches.shape, generator=generator) < 0.8
    masks[1] = True
    masks[5] = False
    masks[5, 0, 0, :9] = True  # 9 voxels: invalid
    masks[6] = False
    masks[6, ::2, ::2, ::2] = True  # no pair of voxels
    masks[7, ..., 5:] = False
    return patches, masks, torch.full((8,), -850.0)


@pytest.mark.parametrize(("aggregation", "mcc"), [("merged", True), ("mean", True), ("merged", False)])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_backends_agree(
    aggregation: Aggregation, mcc: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Column for column: with ``mcc=False`` the last GLCM column is the dissimilarity in both."""
    their_glcm = pytest.importorskip("radiomics.glcm")
    patches, masks, median = _batch()
    calls: list[str] = []
    original = their_glcm.RadiomicsGLCM.execute

    def spy(self: object) -> object:
        calls.append(type(self).__name__)
        return original(self)

    monkeypatch.setattr(their_glcm.RadiomicsGLCM, "execute", spy)
    theirs = compute_descriptors_pyradiomics(patches, masks, lung_median_hu=median, aggregation=aggregation, mcc=mcc)
    ours = compute_descriptors(patches, masks, lung_median_hu=median, aggregation=aggregation, mcc=mcc)
    assert calls.count("RadiomicsGLCM") == 6  # every valid patch with a pair was really given to pyradiomics
    assert not caplog.records  # pyradiomics logs what fails inside it and goes on
    assert theirs.isnan().all(1).tolist() == [row == 5 for row in range(8)]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_texture_outside_pyradiomics_is_ours() -> None:
    pytest.importorskip("radiomics")
    patches, masks, median = _batch()
    theirs = compute_descriptors_pyradiomics(patches, masks, lung_median_hu=median)
    ours = compute_descriptors(patches, masks, lung_median_hu=median)
    columns = slice(FAMILIES["lbp"].start, FAMILIES["gabor"].stop)
    torch.testing.assert_close(theirs[:, columns], ours[:, columns], rtol=0, atol=0, equal_nan=True)
    assert set(GLCM_FEATURES) == {*FEATURE_NAMES[FAMILIES["glcm"]], "glcm_dissimilarity"}


def test_missing_pyradiomics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "radiomics", None)
    patches, masks, median = _batch()
    with pytest.raises(ResourceError, match=r"pip install lungseg\[pyradiomics\]"):
        compute_descriptors_pyradiomics(patches, masks, lung_median_hu=median)

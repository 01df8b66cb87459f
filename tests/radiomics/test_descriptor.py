"""The 34 columns together: names, validity, finiteness, chunks, standardisation."""

from __future__ import annotations

import importlib
import json
import math

import numpy as np
import pytest
import torch

from lungseg.errors import InputError, MismatchError
from lungseg.radiomics import descriptor
from lungseg.radiomics.descriptor import (
    DESCRIPTOR_VERSION,
    FAMILIES,
    FEATURE_NAMES,
    IBSI_CODES,
    MIN_LUNG_VOXELS,
    Standardisation,
    compute_descriptors,
    feature_names,
)
from lungseg.radiomics.glcm import Aggregation

ORACLES = {
    "hu_": ("test_first_order", "test_first_order_equals_scipy"),
    "glcm_": ("test_glcm", "test_glcm_equals_pyradiomics"),
    "lbp_": ("test_lbp", "test_lbp_equals_skimage_on_every_pattern"),
    "gabor_": ("test_gabor", "test_gabor_equals_direct_convolution"),
}
"""The test that compares each feature with an independent implementation, by prefix of its name."""


def _batch(num: int = 12, shape: tuple[int, int, int] = (8, 8, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0, 400, num).view(-1, 1, 1, 1)
    patches = torch.randn((num, *shape), generator=generator) * spread - 800
    masks = torch.rand((num, *shape), generator=generator) < torch.linspace(0.3, 1.1, num).view(-1, 1, 1, 1)
    return patches, masks, torch.linspace(-870, -750, num)


def test_names_families_and_oracles() -> None:
    assert len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == 34
    assert [(key, columns.stop - columns.start) for key, columns in FAMILIES.items()] == [
        ("first_order", 4),
        ("glcm", 14),
        ("lbp", 8),
        ("gabor", 8),
    ]
    covered = [index for columns in FAMILIES.values() for index in range(34)[columns]]
    assert covered == list(range(34))
    assert feature_names(mcc=False)[17] == "glcm_dissimilarity"
    assert set(feature_names(mcc=False)) ^ set(FEATURE_NAMES) == {"glcm_mcc", "glcm_dissimilarity"}
    for prefix, columns in zip(ORACLES, FAMILIES.values(), strict=True):
        assert all(name.startswith(prefix) for name in FEATURE_NAMES[columns])
        module, test = ORACLES[prefix]
        assert callable(getattr(importlib.import_module(module), test))


def test_every_glcm_feature_has_an_oracle_name_and_an_ibsi_code() -> None:
    from test_glcm import IBSI_TAGS, PYRADIOMICS

    names = set(FEATURE_NAMES[FAMILIES["glcm"]])
    assert set(PYRADIOMICS) == names
    assert set(IBSI_TAGS) == names - {"glcm_mcc"} | {"glcm_dissimilarity"}
    assert {name for name in IBSI_CODES if name.startswith("glcm_")} == set(IBSI_TAGS)
    assert set(IBSI_CODES) <= set(FEATURE_NAMES) | {"glcm_dissimilarity"}
    assert len(set(IBSI_CODES.values())) == len(IBSI_CODES)
    assert all(len(code) == 4 for code in IBSI_CODES.values())


@pytest.mark.parametrize("aggregation", ["merged", "mean"])
@pytest.mark.parametrize("mcc", [True, False])
def test_rows_are_valid_or_all_nan(aggregation: Aggregation, mcc: bool) -> None:
    patches, masks, median = _batch(8)
    masks[0] = False  # flat patch (spread 0), empty mask
    masks[1] = False
    masks[1, :3, :3, 0] = True  # 9 voxels
    masks[2] = False
    masks[2, ::2, ::2, ::2] = True  # 64 voxels, no pair, no neighbourhood
    masks[3] = False
    masks[3, 0, :5, :2] = True  # 10 voxels
    masks[4, ..., 4:] = False  # half
    patches[5] = -1024.0  # flat at the end of the range
    patches[6] = 3000.0  # dense beyond the last bin
    found = compute_descriptors(patches, masks, lung_median_hu=median, aggregation=aggregation, mcc=mcc)
    assert found.shape == (8, 34)
    assert found.dtype == torch.float32
    counts = masks.flatten(1).sum(1)
    assert counts[1] == MIN_LUNG_VOXELS - 1
    assert counts[3] == MIN_LUNG_VOXELS
    assert found.isnan().all(1).tolist() == [True, True, *[False] * 6]
    assert found[2:].isfinite().all()


def test_row_does_not_depend_on_its_batch_or_chunk() -> None:
    patches, masks, median = _batch(12)
    together = compute_descriptors(patches, masks, lung_median_hu=median)
    assert torch.equal(compute_descriptors(patches, masks, lung_median_hu=median), together)
    alone = [
        compute_descriptors(patches[i : i + 1], masks[i : i + 1], lung_median_hu=median[i : i + 1]) for i in range(12)
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-6, atol=1e-7)
    chunked = compute_descriptors(patches, masks, lung_median_hu=median, chunk_bytes=1)
    torch.testing.assert_close(chunked, together, rtol=1e-6, atol=1e-7)


def test_chunks_follow_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = descriptor.lbp.lbp_features

    def spy(patches: torch.Tensor, masks: torch.Tensor, **options: bool) -> torch.Tensor:
        sizes.append(len(patches))
        return original(patches, masks, **options)

    monkeypatch.setattr(descriptor.lbp, "lbp_features", spy)
    patches, masks, median = _batch(12)
    budget = 4 * descriptor._chunk_rows((1, 1, 1), "merged", 0) * (512 * 200 + 57**2 * 100)
    compute_descriptors(patches, torch.ones_like(masks), lung_median_hu=median, chunk_bytes=budget)
    assert sizes == [4, 4, 4]


def test_large_anisotropic_patch_and_scalar_median() -> None:
    patches, masks, _ = _batch(1, (6, 40, 33))
    found = compute_descriptors(patches, masks, lung_median_hu=torch.tensor(-850.0))
    assert found.isfinite().all()


def test_flips_leave_glcm_first_order_and_lbp_unchanged() -> None:
    patches, masks, median = _batch(6)
    expected = compute_descriptors(patches, masks, lung_median_hu=median)[:, : FAMILIES["lbp"].stop]
    for axis in (1, 2, 3):
        found = compute_descriptors(patches.flip(axis), masks.flip(axis), lung_median_hu=median)
        torch.testing.assert_close(found[:, : FAMILIES["lbp"].stop], expected, rtol=1e-6, atol=1e-6)


def test_no_patches() -> None:
    empty = torch.zeros((0, 8, 8, 8))
    assert compute_descriptors(empty, empty > 0, lung_median_hu=torch.zeros(0)).shape == (0, 34)


def test_bad_input_is_refused() -> None:
    patches, masks, median = _batch(4)
    with pytest.raises(InputError, match="lung_median_hu"):
        compute_descriptors(patches, masks, lung_median_hu=median[:2])
    patches[2, 4, 4, 4] = torch.nan
    masks[2, 4, 4, 4] = False
    assert compute_descriptors(patches, masks, lung_median_hu=median).isfinite().all()  # outside the lung: not read
    masks[2, 4, 4, 4] = True
    with pytest.raises(InputError, match="NaN"):
        compute_descriptors(patches, masks, lung_median_hu=median)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    patches, masks, median = _batch(32)
    expected = compute_descriptors(patches, masks, lung_median_hu=median)
    found = compute_descriptors(patches.cuda(), masks.cuda(), lung_median_hu=median.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _features(num: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn((num, 34), generator=generator) * torch.linspace(0.1, 100, 34) + torch.arange(34.0)
    features[:, 20] = 0.25
    features[::10] = torch.nan
    return features


def test_standardisation_is_median_and_iqr_balanced_by_family() -> None:
    features = _features()
    fitted = Standardisation.fit(features, window=(8, 8, 8))
    assert fitted.constant == ("lbp_2",)
    assert fitted.window == (8, 8, 8)
    found = fitted.apply(features)
    assert found.isnan().all(1).tolist() == features.isnan().all(1).tolist()
    valid = features[~features.isnan().any(1)].numpy().astype(np.float64)
    lower, median, upper = np.percentile(valid, [25, 50, 75], axis=0)
    iqr = np.where(upper > lower, upper - lower, 1.0)
    size = np.array([4] * 4 + [14] * 14 + [8] * 8 + [8] * 8)
    expected = np.clip((valid - median) / iqr, -4, 4) / np.sqrt(size)
    np.testing.assert_allclose(found[~found.isnan().any(1)].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_standardised_outliers_are_clipped() -> None:
    fitted = Standardisation.fit(_features(), window=(16, 16, 16))
    far = fitted.apply(torch.full((1, 34), 1e9))
    for columns in FAMILIES.values():
        assert far[0, columns].square().sum().item() == pytest.approx(16.0, rel=1e-5)  # each family weighs the same
    assert (fitted.apply(torch.full((1, 34), -1e9)) == -far).all()


def test_standardisation_survives_json() -> None:
    names = feature_names(mcc=False)
    fitted = Standardisation.fit(_features(), window=(32, 96, 96), feature_names=names)
    loaded = Standardisation.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert loaded == fitted
    assert loaded.feature_names == names
    assert loaded.descriptor_version == DESCRIPTOR_VERSION


def test_standardisation_refuses_bad_input() -> None:
    with pytest.raises(InputError, match="none of 3"):
        Standardisation.fit(torch.full((3, 34), torch.nan), window=(8, 8, 8))
    with pytest.raises(InputError, match="shape"):
        Standardisation.fit(torch.zeros((3, 33)), window=(8, 8, 8))
    with pytest.raises(InputError, match="window"):
        Standardisation.fit(_features(), window=(8, 8))
    with pytest.raises(InputError, match="shape"):
        Standardisation.fit(_features(), window=(8, 8, 8)).apply(torch.zeros((3, 35)))


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"descriptor_version": DESCRIPTOR_VERSION + 1}, "extract-radiomics"),
        ({"descriptor_version": None}, "version None"),
        ({"feature_names": ["a"] * 34}, "other features"),
        ({"median": [0.0] * 33}, "do not fit"),
        ({"window": [8, 8]}, "do not fit"),
        ({"scale": [0.0] * 34}, "not positive"),
        ({"median": [math.nan] * 34}, "NaN"),
        ({"scale": None}, "incomplete"),
        ({"scale": ["x"] * 34}, "incomplete"),
    ],
)
def test_standardisation_refuses_foreign_dicts(change: dict[str, object], phrase: str) -> None:
    data = Standardisation.fit(_features(), window=(8, 8, 8)).to_dict() | change
    with pytest.raises(MismatchError, match=phrase):
        Standardisation.from_dict(data)

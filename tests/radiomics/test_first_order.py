"""First-order features against scipy and pyradiomics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lungseg.errors import InputError
from lungseg.radiomics.first_order import NAMES, first_order_features
from lungseg.radiomics.windows import check_patches


def _patches(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([5.0, 40.0, 120.0, 400.0]).view(-1, 1, 1, 1)
    patches = torch.randn((4, 7, 9, 8), generator=generator) * spread - 750.0
    patches[1] += torch.rand(patches[1].shape, generator=generator) ** 8 * 900.0  # a skewed one
    masks = torch.rand(patches.shape, generator=generator) < 0.6
    masks[2] = True
    return patches, masks


def test_first_order_equals_scipy() -> None:
    patches, masks = _patches()
    found = first_order_features(patches, masks).numpy()
    for row, (patch, mask) in enumerate(zip(patches.numpy(), masks.numpy(), strict=True)):
        values = patch[mask].astype(np.float64)
        expected = [values.mean(), values.std(), stats.skew(values), stats.kurtosis(values)]
        np.testing.assert_allclose(found[row], expected, rtol=1e-10)


def test_first_order_equals_pyradiomics() -> None:
    first_order = pytest.importorskip("radiomics.firstorder")
    import SimpleITK as sitk

    patches, masks = _patches(1)
    found = first_order_features(patches, masks).numpy()
    for row, (patch, mask) in enumerate(zip(patches.numpy(), masks.numpy(), strict=True)):
        image = sitk.GetImageFromArray(patch.astype(np.float64))
        calculator = first_order.RadiomicsFirstOrder(image, sitk.GetImageFromArray(mask.astype(np.uint8)), binWidth=25)
        for name in ("Mean", "Variance", "Skewness", "Kurtosis"):
            calculator.enableFeatureByName(name)
        theirs = calculator.execute()
        expected = [theirs["Mean"], theirs["Variance"] ** 0.5, theirs["Skewness"], theirs["Kurtosis"] - 3.0]
        np.testing.assert_allclose(found[row], expected, rtol=1e-9)


@pytest.mark.parametrize("value", [-1000.0, -850.1, 0.1])
def test_flat_patch_has_no_spread(value: float) -> None:
    patches = torch.full((1, 5, 5, 5), value)
    found = first_order_features(patches, torch.ones_like(patches, dtype=torch.bool))
    assert found[0, 0].item() == pytest.approx(value, rel=1e-6)
    assert found[0, 1:].tolist() == [0.0, 0.0, 0.0]


def test_single_voxel_and_empty_mask() -> None:
    patches = torch.randn((2, 3, 3, 3))
    masks = torch.zeros_like(patches, dtype=torch.bool)
    masks[0, 1, 1, 1] = True
    found = first_order_features(patches, masks)
    assert found[0].tolist() == [pytest.approx(patches[0, 1, 1, 1].item()), 0.0, 0.0, 0.0]
    assert found[1].isnan().all()


def test_two_values_by_hand() -> None:
    patches = torch.tensor([-900.0, -900.0, -900.0, -500.0]).view(1, 1, 2, 2)
    found = first_order_features(patches, torch.ones_like(patches, dtype=torch.bool))[0].tolist()
    # p = 1/4: skewness (1 - 2p) / sqrt(pq), excess kurtosis (1 - 6pq) / pq
    assert found == [-800.0, pytest.approx(30000.0**0.5), pytest.approx(0.5 / 0.1875**0.5), pytest.approx(-2.0 / 3.0)]


def test_values_outside_the_mask_do_not_matter() -> None:
    patches, masks = _patches(2)
    other = torch.where(masks, patches, torch.nan)
    assert torch.equal(first_order_features(other, masks), first_order_features(patches, masks))


def test_no_patches() -> None:
    assert first_order_features(torch.zeros((0, 4, 4, 4)), torch.zeros((0, 4, 4, 4), dtype=torch.bool)).shape == (0, 4)
    assert len(NAMES) == 4


@pytest.mark.parametrize(
    ("patches", "masks", "phrase"),
    [
        (torch.zeros(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool), "N, D, H, W"),
        (torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 3, dtype=torch.bool), "N, D, H, W"),
        (torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 4), "bool"),
        (torch.zeros(2, 0, 4, 4), torch.ones(2, 0, 4, 4, dtype=torch.bool), "no voxel"),
    ],
)
def test_check_patches_refuses(patches: torch.Tensor, masks: torch.Tensor, phrase: str) -> None:
    with pytest.raises(InputError, match=phrase):
        check_patches(patches, masks)

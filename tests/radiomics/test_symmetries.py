"""What turning and mirroring a patch does to its features, and that no patch with lung gives a NaN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.radiomics.descriptor import FAMILIES, FEATURE_NAMES, compute_descriptors
from lungseg.radiomics.first_order import first_order_features
from lungseg.radiomics.gabor import gabor_features
from lungseg.radiomics.glcm import glcm_features
from lungseg.radiomics.lbp import lbp_features

ORDERS = tuple(itertools.permutations((1, 2, 3)))
FLIPS = tuple(itertools.chain.from_iterable(itertools.combinations((1, 2, 3), count) for count in range(4)))
"""The 48 symmetries of the cube: permutations of the axes times axes to mirror."""
KINDS = ("constant", "two levels", "integers", "floats", "quiet", "wild")


@st.composite
def patch_and_mask(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """One small patch (1, D, H, W), float64, of any kind, with a mask from nearly empty to full."""
    shape = draw(st.tuples(*[st.integers(1, 7)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = {"constant": 0.0, "two levels": 0.0, "quiet": 4.0, "wild": 900.0}
    kind = draw(st.sampled_from(KINDS))
    values = rng.normal(-800.0, spread.get(kind, 120.0), shape)
    if kind == "two levels":
        values += rng.choice([0.0, 500.0], shape)
    if kind == "integers":
        values = np.rint(values)
    mask = rng.random(shape) < draw(st.sampled_from([0.05, 0.5, 0.9, 1.0]))
    mask.flat[rng.integers(mask.size)] = True
    values[~mask] = rng.choice([np.nan, np.inf, -3000.0])
    return torch.from_numpy(values)[None], torch.from_numpy(mask)[None]


def _mirrored(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """A patch (1, ...) with its axes permuted, mirrored in all eight ways: (8, ...)."""
    return torch.cat([tensor.permute(0, *order).flip(axes) for axes in FLIPS])


def test_forty_eight_symmetries() -> None:
    corners = torch.arange(27.0).view(1, 3, 3, 3)
    seen = {tuple(patch.flatten().tolist()) for order in ORDERS for patch in _mirrored(corners, order)}
    assert len(seen) == 48


@settings(max_examples=25, deadline=None)
@given(patch_and_mask())
def test_glcm_and_first_order_do_not_see_the_symmetries_of_the_cube(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    patch, mask = case

    def features(values: torch.Tensor, lung: torch.Tensor) -> torch.Tensor:
        texture = [glcm_features(values, lung, aggregation=how) for how in ("merged", "mean")]
        return torch.cat((first_order_features(values, lung), *texture), 1)

    expected = features(patch, mask).expand(8, -1)
    for order in ORDERS:
        found = features(_mirrored(patch, order), _mirrored(mask, order))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(patch_and_mask())
def test_lbp_does_not_see_flips_and_half_turns(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    patch, mask = case
    expected = lbp_features(patch, mask)
    for axes in ((1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)):
        torch.testing.assert_close(lbp_features(patch.flip(axes), mask.flip(axes)), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(patch_and_mask())
def test_gabor_orientations_follow_quarter_turns_and_flips(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    patch, mask = case
    median = torch.tensor(-850.0)
    expected = gabor_features(patch, mask, lung_median_hu=median).view(2, 4)

    def moved(tensors: list[torch.Tensor]) -> torch.Tensor:
        return gabor_features(tensors[0], tensors[1], lung_median_hu=median).view(2, 4)

    turned = moved([tensor.rot90(1, (2, 3)) for tensor in case])
    torch.testing.assert_close(turned, expected[:, [2, 3, 0, 1]], rtol=1e-9, atol=1e-9)
    flipped = moved([tensor.flip(3) for tensor in case])
    torch.testing.assert_close(flipped, expected[:, [0, 3, 2, 1]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved([tensor.flip(1) for tensor in case]), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(patch_and_mask(), st.sampled_from(["merged", "mean"]), st.booleans())
def test_row_74_no_patch_with_lung_gives_a_nan(
    case: tuple[torch.Tensor, torch.Tensor], aggregation: str, mcc: bool
) -> None:
    """Every family is finite from one lung voxel on; the descriptor from ten on, and all NaN below."""
    patch, mask = case
    median = torch.tensor(-850.0)
    assert first_order_features(patch, mask).isfinite().all()
    assert glcm_features(patch, mask, aggregation=aggregation, mcc=mcc).isfinite().all()  # type: ignore[arg-type]
    assert lbp_features(patch, mask).isfinite().all()
    assert gabor_features(patch, mask, lung_median_hu=median).isfinite().all()
    row = compute_descriptors(patch, mask, lung_median_hu=median, aggregation=aggregation, mcc=mcc)  # type: ignore[arg-type]
    assert bool(row.isfinite().all()) == (int(mask.sum()) >= 10)


@pytest.mark.parametrize(
    ("kind", "ones", "other"),
    [
        ("constant", ("glcm_asm", "glcm_correlation", "glcm_idm", "glcm_mcc", "lbp_6"), {"hu_mean": -850.0}),
        ("far voxels", ("glcm_asm", "glcm_correlation", "glcm_idm", "glcm_mcc", "lbp_6"), {}),
        # two halves of one level each: entropies of almost one bit, a single uniform pattern on each side of the edge
        ("two levels", (), {"hu_sd": 150.0, "hu_kurtosis": -2.0, "hu_skewness": 0.0}),
    ],
)
def test_row_74_documented_values_of_degenerate_patches(
    kind: str, ones: tuple[str, ...], other: dict[str, float]
) -> None:
    patch = torch.full((1, 8, 8, 8), -850.0, dtype=torch.float64)
    mask = torch.ones_like(patch, dtype=torch.bool)
    if kind == "two levels":
        patch[..., 4:] = -550.0
    if kind == "far voxels":
        patch += torch.rand(patch.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 200
        mask = torch.zeros_like(mask)
        mask[:, ::2, ::2, ::2] = True
    found = dict(
        zip(FEATURE_NAMES, compute_descriptors(patch, mask, lung_median_hu=torch.tensor(-850.0))[0], strict=True)
    )
    assert {name: found[name].item() for name in ones} == dict.fromkeys(ones, 1.0)
    for name, value in other.items():
        assert found[name].item() == pytest.approx(value), name
    if kind != "two levels":
        for name in FEATURE_NAMES[FAMILIES["glcm"]]:
            if name not in ones and name != "glcm_sum_average":
                assert found[name].item() == 0.0, name

"""GLCM features against pyradiomics, the IBSI digital phantom and a plain loop."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lungseg.errors import InputError
from lungseg.radiomics.glcm import (
    DIRECTIONS,
    NAMES,
    NUM_LEVELS,
    Aggregation,
    count_pairs,
    glcm_features,
    glcm_features_of_levels,
    grey_levels,
)

PYRADIOMICS = {
    "glcm_asm": "JointEnergy",
    "glcm_contrast": "Contrast",
    "glcm_correlation": "Correlation",
    "glcm_variance": "SumSquares",
    "glcm_idm": "Idm",
    "glcm_sum_average": "JointAverage",  # twice it, and re-based
    "glcm_sum_variance": "ClusterTendency",
    "glcm_sum_entropy": "SumEntropy",
    "glcm_entropy": "JointEntropy",
    "glcm_difference_variance": "DifferenceVariance",
    "glcm_difference_entropy": "DifferenceEntropy",
    "glcm_imc1": "Imc1",
    "glcm_imc2": "Imc2",
    "glcm_mcc": "MCC",
}
IBSI_TAGS = {
    "glcm_asm": "energy",
    "glcm_contrast": "contrast",
    "glcm_correlation": "corr",
    "glcm_variance": "joint_var",
    "glcm_idm": "inv_diff_mom",
    "glcm_sum_average": "sum_avg",
    "glcm_sum_variance": "sum_var",
    "glcm_sum_entropy": "sum_entr",
    "glcm_entropy": "joint_entr",
    "glcm_difference_variance": "diff_var",
    "glcm_difference_entropy": "diff_entr",
    "glcm_imc1": "info_corr1",
    "glcm_imc2": "info_corr2",
    "glcm_dissimilarity": "dissimilarity",
}


def _patch(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One patch (1, D, H, W) of HU within [-1024, 400] and its mask."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn((1, *shape), generator=generator)

    patch = {
        "quiet": lambda: noise(8, 8, 8) * 40 - 850,
        "float": lambda: noise(9, 7, 8) * 60 - 700,
        "busy": lambda: noise(16, 16, 16) * 500 - 400,
        "smooth": lambda: torch.nn.functional.avg_pool3d(noise(14, 14, 14) * 600, 3, 1) - 700,
        "vessels": lambda: torch.where(noise(12, 12, 12) > 1.2, 30.0, -860.0) + noise(12, 12, 12) * 30,
        "tiny": lambda: noise(2, 3, 2) * 200 - 800,
        "thin": lambda: noise(1, 9, 9) * 100 - 800,
        "checkerboard": lambda: (torch.arange(216).view(1, 6, 6, 6) % 2) * 300.0 - 900,
        "half": lambda: noise(8, 8, 8) * 100 - 800,
        "masked": lambda: noise(10, 12, 11) * 150 - 750,
    }[kind]()
    patch = patch.clamp(-1024, 400)
    if kind not in ("float", "smooth"):
        patch = patch.round()
    mask = torch.ones_like(patch, dtype=torch.bool)
    if kind == "half":
        mask[..., :4] = False
    if kind == "masked":
        mask = torch.rand(patch.shape, generator=generator) < 0.6
    return patch, mask


def _by_pyradiomics(patch: torch.Tensor, mask: torch.Tensor, weighting: str | None) -> list[float]:
    """Haralick's fourteen by pyradiomics, with the grey levels re-based to -1024 HU."""
    their_glcm = pytest.importorskip("radiomics.glcm")
    import SimpleITK as sitk

    shifted = patch[0].numpy().astype(np.float64) + 1024.0
    inside = mask[0].numpy()
    calculator = their_glcm.RadiomicsGLCM(
        sitk.GetImageFromArray(shifted),
        sitk.GetImageFromArray(inside.astype(np.uint8)),
        binWidth=25,
        weightingNorm=weighting,
    )
    for name in PYRADIOMICS.values():
        calculator.enableFeatureByName(name)
    theirs = calculator.execute()
    lowest = math.floor(shifted[inside].min() / 25)
    values = [float(np.real(theirs[PYRADIOMICS[name]])) for name in NAMES]
    values[NAMES.index("glcm_sum_average")] = 2.0 * (values[NAMES.index("glcm_sum_average")] + lowest)
    return values


@pytest.mark.parametrize("aggregation", ["merged", "mean"])
@pytest.mark.parametrize(
    "kind", ["quiet", "float", "busy", "smooth", "vessels", "tiny", "thin", "checkerboard", "half", "masked"]
)
def test_glcm_equals_pyradiomics(kind: str, aggregation: Aggregation) -> None:
    for seed in range(3):
        patch, mask = _patch(kind, seed)
        found = glcm_features(patch, mask, aggregation=aggregation)[0].numpy()
        expected = _by_pyradiomics(patch, mask, "no_weighting" if aggregation == "merged" else None)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=str(NAMES))


def _significant(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits - 1}e}")


@pytest.mark.parametrize(("aggregation", "suffix"), [("merged", "3D_comb"), ("mean", "3D_avg")])
def test_glcm_equals_ibsi_digital_phantom(shared_data: Path, aggregation: Aggregation, suffix: str) -> None:
    import SimpleITK as sitk

    folder = shared_data / "ibsi"
    image = sitk.GetArrayFromImage(sitk.ReadImage(folder / "digital_phantom" / "image" / "phantom.nii.gz"))
    mask = sitk.GetArrayFromImage(sitk.ReadImage(folder / "digital_phantom" / "mask" / "mask.nii.gz")) > 0
    with (folder / "reference_values" / "ibsi_1_dig_phantom.csv").open() as file:
        reference = {row["tag"]: row for row in csv.DictReader(file, delimiter=";")}
    levels = torch.from_numpy(image.astype(np.int64))[None] - 1
    inside = torch.from_numpy(mask)[None]
    assert int(levels[inside].max()) < 9
    compared = set()
    for mcc in (True, False):
        found = glcm_features_of_levels(levels, inside, num_levels=9, aggregation=aggregation, mcc=mcc)[0].tolist()
        names = NAMES if mcc else (*NAMES[:-1], "glcm_dissimilarity")
        for name, value in zip(names, found, strict=True):
            if name == "glcm_mcc":
                continue  # not an IBSI feature
            row = reference[f"cm_{IBSI_TAGS[name]}_{suffix}"]
            expected, tolerance = float(row["reference value"]), float(row["tolerance"])
            # the values are given to three digits, and the phantom's tolerance is 0: equal once rounded to those
            assert abs(_significant(value) - expected) <= tolerance + 1e-12, (name, value, expected)
            compared.add(name)
    assert compared == set(IBSI_TAGS)


def _by_loop(levels: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    """Merged, symmetric, normalised matrix by visiting every pair."""
    matrix = np.zeros((size, size))
    for position in np.argwhere(mask):
        for step in DIRECTIONS:
            other = position + step
            if (other < 0).any() or (other >= mask.shape).any() or not mask[tuple(other)]:
                continue
            a, b = levels[tuple(position)], levels[tuple(other)]
            matrix[a, b] += 1
            matrix[b, a] += 1
    return matrix / matrix.sum()


def test_glcm_equals_plain_loop() -> None:
    """Haralick's formulas written out on a matrix counted pair by pair; independent of pyradiomics."""
    patch, mask = _patch("masked", 5)
    patch, mask = patch[:, :5, :6, :5], mask[:, :5, :6, :5]
    levels = grey_levels(patch, mask)[0].numpy()
    p = _by_loop(levels, mask[0].numpy(), NUM_LEVELS)
    i, j = np.mgrid[1 : NUM_LEVELS + 1, 1 : NUM_LEVELS + 1]
    px = p.sum(1)
    mean = (i * p).sum()
    variance = ((i - mean) ** 2 * p).sum()
    p_sum = np.array([p[i + j == k].sum() for k in range(2, 2 * NUM_LEVELS + 1)])
    p_diff = np.array([p[abs(i - j) == k].sum() for k in range(NUM_LEVELS)])
    k_diff, k_sum = np.arange(NUM_LEVELS), np.arange(2, 2 * NUM_LEVELS + 1)

    def entropy(q: np.ndarray) -> float:
        return float(-(q[q > 0] * np.log2(q[q > 0])).sum())

    outer = np.outer(px, px)
    hxy1 = -(p[outer > 0] * np.log2(outer[outer > 0])).sum()
    kept = px > 0
    q = (p[kept][:, kept] / px[kept][:, None]) @ (p[kept][:, kept] / px[kept][None, :]).T
    expected = [
        (p**2).sum(),
        ((i - j) ** 2 * p).sum(),
        ((i * j * p).sum() - mean**2) / variance,
        variance,
        (p / (1 + (i - j) ** 2)).sum(),
        (k_sum * p_sum).sum(),
        ((k_sum - (k_sum * p_sum).sum()) ** 2 * p_sum).sum(),
        entropy(p_sum),
        entropy(p),
        ((k_diff - (k_diff * p_diff).sum()) ** 2 * p_diff).sum(),
        entropy(p_diff),
        (entropy(p) - hxy1) / entropy(px),
        math.sqrt(1 - math.exp(-2 * (entropy(outer) - entropy(p)))),
        math.sqrt(sorted(np.linalg.eigvals(q).real)[-2]),
    ]
    np.testing.assert_allclose(glcm_features(patch, mask)[0].numpy(), expected, rtol=1e-9)
    without = glcm_features(patch, mask, mcc=False)[0].numpy()
    np.testing.assert_allclose(without, [*expected[:-1], (abs(i - j) * p).sum()], rtol=1e-9)


def test_grey_levels_at_the_edges() -> None:
    below = float(np.nextafter(np.float32(-999.0), np.float32(-np.inf)))
    values = torch.tensor([-3000.0, -1024.0, below, -999.0, -24.0000019, -24.0, 375.99, 376.0, 400.0, 401.0, 3000.0])
    patches = values.view(1, 1, 1, -1)
    levels = grey_levels(patches, torch.ones_like(patches, dtype=torch.bool))
    assert levels.flatten().tolist() == [0, 0, 0, 1, 39, 40, 55, 56, 56, 56, 56]
    whole = torch.arange(-1024, 401).to(torch.float32).view(1, 1, 1, -1)
    found = grey_levels(whole, torch.ones_like(whole, dtype=torch.bool)).flatten()
    assert torch.equal(found.long(), (torch.arange(-1024, 401) + 1024) // 25)


def test_flat_patch() -> None:
    patches = torch.full((1, 4, 4, 4), -850.0)
    for aggregation in ("merged", "mean"):
        found = dict(zip(NAMES, glcm_features(patches, patches < 0, aggregation=aggregation)[0].tolist(), strict=True))
        ones = {"glcm_asm", "glcm_correlation", "glcm_idm", "glcm_mcc"}
        level = (1024 - 850) // 25 + 1
        assert found == {name: float(name in ones) for name in NAMES} | {"glcm_sum_average": 2.0 * level}


@pytest.mark.parametrize("aggregation", ["merged", "mean"])
def test_no_pair_counts_as_flat(aggregation: Aggregation) -> None:
    """Single voxels far apart: no pair at all, yet finite; an empty mask has no features."""
    patches = torch.randn((3, 7, 7, 7)) * 100 - 800
    masks = torch.zeros_like(patches, dtype=torch.bool)
    masks[0, ::2, ::2, ::2] = True
    masks[1, 3, 3, 3] = True
    for mcc, last in ((True, 1.0), (False, 0.0)):
        found = glcm_features(patches, masks, aggregation=aggregation, mcc=mcc)
        assert found[:2].isfinite().all()
        assert found[2].isnan().all()
        levels = grey_levels(patches, masks)[0][masks[0]].to(torch.float64)
        assert found[0, 5].item() == pytest.approx(2 * (levels.mean().item() + 1))
        assert found[:2, 0].tolist() == [1.0, 1.0]
        assert found[:2, -1].tolist() == [last, last]
        assert found[:2, 7:13].abs().max().item() == 0.0


def test_mean_leaves_out_empty_directions() -> None:
    """One row of voxels has pairs in one direction only: mean and merged agree."""
    patches = torch.randn((1, 5, 5, 12)) * 200 - 700
    masks = torch.zeros_like(patches, dtype=torch.bool)
    masks[0, 2, 2] = True
    merged, mean = (glcm_features(patches, masks, aggregation=how) for how in ("merged", "mean"))
    torch.testing.assert_close(merged, mean, rtol=1e-12, atol=0.0)


def test_two_disconnected_levels_have_full_correlation() -> None:
    patches = torch.full((1, 3, 3, 7), -900.0)
    patches[..., 4:] = -200.0
    masks = torch.ones_like(patches, dtype=torch.bool)
    masks[..., 3] = False
    found = dict(zip(NAMES, glcm_features(patches, masks)[0].tolist(), strict=True))
    assert found["glcm_mcc"] == pytest.approx(1.0)
    assert found["glcm_correlation"] == pytest.approx(1.0)
    assert found["glcm_entropy"] == pytest.approx(1.0)
    assert found["glcm_imc1"] == pytest.approx(-1.0)


@pytest.mark.parametrize("aggregation", ["merged", "mean"])
def test_symmetries_of_the_cube_change_nothing(aggregation: Aggregation) -> None:
    patch, mask = _patch("masked", 3)
    expected = glcm_features(patch, mask, aggregation=aggregation)
    for axes in ((1,), (2,), (3,), (1, 3), (1, 2, 3)):
        flipped = glcm_features(patch.flip(axes), mask.flip(axes), aggregation=aggregation)
        torch.testing.assert_close(flipped, expected, rtol=1e-10, atol=1e-10)
    for order in ((0, 2, 1, 3), (0, 3, 1, 2)):
        turned = glcm_features(patch.permute(order), mask.permute(order), aggregation=aggregation)
        torch.testing.assert_close(turned, expected, rtol=1e-10, atol=1e-10)


def test_values_outside_the_mask_do_not_matter() -> None:
    patch, mask = _patch("masked", 4)
    assert torch.equal(glcm_features(torch.where(mask, patch, torch.nan), mask), glcm_features(patch, mask))


def test_unknown_aggregation_is_refused() -> None:
    patch, mask = _patch("tiny")
    with pytest.raises(InputError, match="aggregation"):
        glcm_features(patch, mask, aggregation="max")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("per_direction", [True, False])
def test_counts_on_cuda_are_exact(per_direction: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 31, (20, 13, 12, 11), generator=generator).to(torch.int16)  # 30 marks excluded voxels
    owners = torch.arange(20)[:, None, None, None]
    on_cpu, on_cuda = (
        count_pairs(
            levels.to(place), levels.to(place), owners.to(place), 20, size=30, per_direction=per_direction
        ).cpu()
        for place in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu, on_cuda)


def test_thirteen_directions() -> None:
    assert len(set(DIRECTIONS)) == 13
    assert not {tuple(-step for step in steps) for steps in DIRECTIONS} & set(DIRECTIONS)

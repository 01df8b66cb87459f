"""The descriptor against pyradiomics on many patches, and against the numbers pyradiomics publishes."""

from __future__ import annotations

import ast
import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from lungseg.radiomics.descriptor import FAMILIES, compute_descriptors
from lungseg.radiomics.first_order import first_order_features
from lungseg.radiomics.glcm import NAMES, Aggregation, glcm_features_of_levels
from lungseg.radiomics.pyradiomics import GLCM_FEATURES, compute_descriptors_pyradiomics
from lungseg.scan.phantom import PhantomSpec, make_phantom

COMMON = slice(0, FAMILIES["glcm"].stop)
"""Columns that pyradiomics has too."""


def random_patches(num: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 patches (N, 9, 11, 10) of noise of very different spread, or cut out of a phantom; half are masked."""
    rng = np.random.default_rng(7)
    size = (9, 11, 10)
    if kind == "noise":
        spread = rng.choice([3.0, 25.0, 80.0, 250.0, 700.0], (num, 1, 1, 1))
        patches = rng.normal(rng.uniform(-950, -200, (num, 1, 1, 1)), spread, (num, *size))
        patches[::3] = np.rint(patches[::3])
        masks = np.ones(patches.shape, dtype=bool)
    else:
        spec = PhantomSpec((100.0, 110.0, 130.0), (2.5, 2.5, 2.5), "severe", ("emphysema", "ggo", "fibrosis"))
        phantom = make_phantom(spec, seed=710)
        corners = np.argwhere(phantom.lungs[: -size[0], : -size[1], : -size[2]])
        chosen = rng.choice(corners, num, replace=False)
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True)) for corner in chosen]
        patches = np.stack([phantom.volume_hu[box] for box in boxes]).astype(np.float64)
        masks = np.stack([phantom.lungs[box] > 0 for box in boxes])
    masks[1::2] &= rng.random(masks[1::2].shape) < 0.7
    return torch.from_numpy(np.clip(patches, -1024, 400)), torch.from_numpy(masks)


@pytest.mark.parametrize("kind", ["noise", "phantom"])
def test_common_features_equal_pyradiomics_on_200_patches(kind: str) -> None:
    """100 patches of each kind, merged; ``mean`` on a quarter of them, as pyradiomics is slow."""
    pytest.importorskip("radiomics")
    patches, masks = random_patches(100, kind)
    median = torch.tensor(-850.0)
    for rows, aggregation in ((slice(None), "merged"), (slice(None, None, 4), "mean")):
        how: Aggregation = "merged" if aggregation == "merged" else "mean"
        ours = compute_descriptors(patches[rows], masks[rows], lung_median_hu=median, aggregation=how)
        theirs = compute_descriptors_pyradiomics(patches[rows], masks[rows], lung_median_hu=median, aggregation=how)
        assert ours.dtype == theirs.dtype == torch.float64
        valid = ~theirs.isnan().any(1)
        assert valid.sum() >= 0.9 * len(theirs)
        error = (ours - theirs).abs() / theirs.abs().clamp(min=1.0)
        assert error[valid][:, COMMON].max().item() < 1e-6


def _published(folder: Path, file: str, case: str) -> dict[str, str]:
    with (folder / "baseline" / file).open(encoding="utf-8") as stream:
        return {row["featureName"]: row[case] for row in csv.DictReader(stream)}


@pytest.mark.parametrize("case", ["brain1", "brain2", "breast1"])
def test_published_baselines_are_reproduced(shared_data: Path, case: str) -> None:
    """MR images, default settings of pyradiomics: bins of 25 from a multiple of 25, mean over directions."""
    import SimpleITK as sitk

    folder = shared_data / "pyradiomics-baseline"
    image, label = (
        torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(folder / f"{case}_{name}.nrrd")).astype(np.float64))
        for name in ("image", "label")
    )
    mask = (label == 1)[None]
    levels = (image / 25).floor().to(torch.int64)[None]
    levels -= levels[mask].min()
    expected = _published(folder, "baseline_glcm.csv", case)
    assert ast.literal_eval(expected["diagnostics_Configuration_Settings"])["binWidth"] == 25
    num_levels = int(levels[mask].max()) + 1
    levels[~mask] = 0
    found = glcm_features_of_levels(levels, mask, num_levels=num_levels, aggregation="mean")[0].tolist()
    for name, value in zip(NAMES, found, strict=True):
        published = float(expected[f"original_glcm_{GLCM_FEATURES[name]}"])
        if name == "glcm_sum_average":
            published *= 2.0  # of their JointAverage
        assert value == pytest.approx(published, rel=1e-6), name
    expected = _published(folder, "baseline_firstorder.csv", case)
    mean, sd, skewness, kurtosis = first_order_features(image[None], mask)[0].tolist()
    assert mean == pytest.approx(float(expected["original_firstorder_Mean"]), rel=1e-9)
    assert sd**2 == pytest.approx(float(expected["original_firstorder_Variance"]), rel=1e-9)
    assert skewness == pytest.approx(float(expected["original_firstorder_Skewness"]), rel=1e-9)
    assert kurtosis + 3.0 == pytest.approx(float(expected["original_firstorder_Kurtosis"]), rel=1e-9)

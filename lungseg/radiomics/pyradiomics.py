"""Reference backend: first-order and GLCM features from pyradiomics itself, for those who must cite it.

One patch after the other, on the CPU: some 20 ms a patch of 32 voxels cubed. LBP and Gabor, which pyradiomics does not
have in this form, come from this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lungseg.errors import ResourceError
from lungseg.radiomics import first_order, glcm
from lungseg.radiomics.descriptor import FAMILIES, compute_descriptors, feature_names
from lungseg.radiomics.glcm import Aggregation
from lungseg.radiomics.haralick import DISSIMILARITY

GLCM_FEATURES = {
    "glcm_asm": "JointEnergy",
    "glcm_contrast": "Contrast",
    "glcm_correlation": "Correlation",
    "glcm_variance": "SumSquares",
    "glcm_idm": "Idm",
    "glcm_sum_average": "JointAverage",
    "glcm_sum_variance": "ClusterTendency",
    "glcm_sum_entropy": "SumEntropy",
    "glcm_entropy": "JointEntropy",
    "glcm_difference_variance": "DifferenceVariance",
    "glcm_difference_entropy": "DifferenceEntropy",
    "glcm_imc1": "Imc1",
    "glcm_imc2": "Imc2",
    "glcm_mcc": "MCC",
    DISSIMILARITY: "DifferenceAverage",
}
"""pyradiomics' name of each of Haralick's fourteen, and of the dissimilarity in the place of the last; the
sum average is twice its JointAverage, re-based."""
FIRST_ORDER_FEATURES = ("Mean", "Variance", "Skewness", "Kurtosis")


def compute_descriptors_pyradiomics(
    patches_hu: Tensor,
    masks: Tensor,
    *,
    lung_median_hu: Tensor,
    aggregation: Aggregation = "merged",
    mcc: bool = True,
) -> Tensor:
    """The 34 radiomic features of each patch, first-order and GLCM computed by pyradiomics.

    HU are clipped to the range of the bins for the GLCM (pyradiomics bins are unlimited) and shifted by +1024 so that
    its bin edges, multiples of 25, fall on ours. Its grey levels start at the lowest of the patch: the sum average is
    brought back to levels from -1024 HU. Its kurtosis is not excess: 3 is taken off. The value of the torch backend
    stands where pyradiomics has none: a patch without any pair of lung voxels, and its IMC2 where the mutual
    information is 0 but rounds below it (the root of a negative number). It knows no halo: pairs lie in the patch.

    Parameters
    ----------
    patches_hu, masks, lung_median_hu, aggregation, mcc
        As ``descriptor.compute_descriptors``.

    Returns
    -------
    float32 tensor (float64 if the patches are), shape (N, 34)
        Columns ``feature_names(mcc=mcc)``; rows with fewer than ``MIN_LUNG_VOXELS`` lung voxels are all NaN.

    Raises
    ------
    ResourceError
        If pyradiomics is not installed.
    InputError
        As ``compute_descriptors``.

    Source
    ------
    METHOD 1.3, item 1; van Griethuysen et al., Cancer Research 2017.
    """
    classes = _feature_classes()
    result = compute_descriptors(patches_hu, masks, lung_median_hu=lung_median_hu, aggregation=aggregation, mcc=mcc)
    names = feature_names(mcc=mcc)[FAMILIES["glcm"]]
    values = patches_hu.detach().cpu().numpy().astype(np.float64)
    inside = masks.detach().cpu().numpy()
    valid = result.isfinite().all(1).cpu().numpy()
    for row in np.flatnonzero(valid):
        theirs = {"first_order": _first_order(classes, values[row], inside[row])}
        if _has_pair(inside[row]):
            theirs["glcm"] = _glcm(classes, values[row], inside[row], aggregation, names)
        for family, numbers in theirs.items():
            answer = torch.tensor(numbers, dtype=result.dtype, device=result.device)
            ours = result[row, FAMILIES[family]]
            result[row, FAMILIES[family]] = torch.where(answer.isfinite(), answer, ours)
    return result


def _has_pair(mask: np.ndarray) -> bool:
    """True if any two voxels of the mask touch (26-neighbourhood)."""
    return ndimage.label(mask, np.ones((3, 3, 3)))[1] < mask.sum()


def _feature_classes() -> tuple[ModuleType, ModuleType, ModuleType]:
    """pyradiomics' ``firstorder`` and ``glcm`` modules, and SimpleITK."""
    try:
        import SimpleITK as sitk
        from radiomics import firstorder as their_first_order  # absolute: the pyradiomics package
        from radiomics import glcm as their_glcm
    except ImportError as error:
        raise ResourceError(
            f"the pyradiomics backend needs pyradiomics ({error}): pip install lungseg[pyradiomics]"
        ) from error
    return their_first_order, their_glcm, sitk


def _first_order(classes: tuple[ModuleType, ModuleType, ModuleType], hu: np.ndarray, mask: np.ndarray) -> list[float]:
    """Mean, SD, skewness, excess kurtosis by pyradiomics."""
    module, _, sitk = classes
    found = _execute(module.RadiomicsFirstOrder, sitk, hu, mask, FIRST_ORDER_FEATURES)
    flat = found["Variance"] == 0  # pyradiomics gives a flat patch the kurtosis 0, which would be -3 here
    kurtosis = 0.0 if flat else found["Kurtosis"] - 3.0
    by_name = {"hu_mean": found["Mean"], "hu_sd": found["Variance"] ** 0.5, "hu_skewness": found["Skewness"]}
    by_name["hu_kurtosis"] = kurtosis
    return [by_name[name] for name in first_order.NAMES]


def _glcm(
    classes: tuple[ModuleType, ModuleType, ModuleType],
    hu: np.ndarray,
    mask: np.ndarray,
    aggregation: Aggregation,
    names: Sequence[str] = glcm.NAMES,
) -> list[float]:
    """The named co-occurrence features by pyradiomics, with the grey levels of ``glcm``."""
    _, module, sitk = classes
    shifted = np.clip(hu, glcm.LOWEST_HU, glcm.HIGHEST_HU) - glcm.LOWEST_HU
    weighting = "no_weighting" if aggregation == "merged" else None
    settings = {"binWidth": glcm.BIN_WIDTH_HU, "distances": [1], "symmetricalGLCM": True, "weightingNorm": weighting}
    theirs = tuple(GLCM_FEATURES[name] for name in names)
    found = _execute(module.RadiomicsGLCM, sitk, shifted, mask, theirs, **settings)
    lowest = np.floor(shifted[mask].min() / glcm.BIN_WIDTH_HU)
    found["JointAverage"] = 2.0 * (found["JointAverage"] + lowest)
    return [found[name] for name in theirs]


def _execute(
    feature_class: Any, sitk: ModuleType, image: np.ndarray, mask: np.ndarray, names: tuple[str, ...], **settings: Any
) -> dict[str, float]:
    """Values of the named features of one pyradiomics class; the class is called directly because the extractor
    refuses a mask that is 1 everywhere."""
    calculator = feature_class(sitk.GetImageFromArray(image), sitk.GetImageFromArray(mask.astype(np.uint8)), **settings)
    for name in names:
        calculator.enableFeatureByName(name)
    # IMC2 may be the root of a rounding error below 0; the answer, NaN, is dealt with by the caller.
    with np.errstate(all="ignore"):
        found = calculator.execute()
    return {name: float(np.real(found[name])) for name in names}

"""The radiomic descriptor: 34 features of the lung voxels of a patch, their names, families and standardisation.

Families in order: first-order 4, GLCM 14, LBP 8, Gabor 8. Everything is batched torch and runs on the device of its
input. Only lung voxels count; whether neighbours outside the patch are read is the choice of ``halo`` (``windows``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lungseg.errors import InputError, MismatchError
from lungseg.radiomics import first_order, gabor, glcm, haralick, lbp
from lungseg.radiomics.glcm import Aggregation
from lungseg.radiomics.windows import check_patches, computing_dtype, keep, keep_freed_memory, window_of

DESCRIPTOR_VERSION: int = 2
"""Raised whenever any of the 34 numbers changes; descriptors of different versions are never mixed.

2: a pattern point darker by exactly the dead band counts as equal whatever the weights round to.
"""

MIN_LUNG_VOXELS = 10
"""A patch with fewer lung voxels has no descriptor (METHOD 1.3)."""

FAMILIES: dict[str, slice] = {
    "first_order": slice(0, 4),
    "glcm": slice(4, 18),
    "lbp": slice(18, 26),
    "gabor": slice(26, 34),
}
"""Columns of each family."""

FEATURE_NAMES: tuple[str, ...] = first_order.NAMES + glcm.NAMES + lbp.NAMES + gabor.NAMES
"""Names of the 34 columns."""

IBSI_CODES: dict[str, str] = {
    "hu_mean": "Q4LE",
    "hu_skewness": "KE2A",
    "hu_kurtosis": "IPH6",
    "glcm_asm": "8ZQL",
    "glcm_contrast": "ACUI",
    "glcm_correlation": "NI2N",
    "glcm_variance": "UR99",
    "glcm_idm": "WF0Z",
    "glcm_sum_average": "ZGXS",
    "glcm_sum_variance": "OEEB",
    "glcm_sum_entropy": "P6QZ",
    "glcm_entropy": "TU9B",
    "glcm_difference_variance": "D3YU",
    "glcm_difference_entropy": "NTRS",
    "glcm_imc1": "R8DG",
    "glcm_imc2": "JN9H",
    "glcm_dissimilarity": "8S9J",
}
"""Codes of the Image Biomarker Standardisation Initiative; it has none for SD, MCC, LBP and these Gabor energies."""

DEFAULT_CHUNK_BYTES = 256 * 2**20
"""Working memory of ``compute_descriptors`` besides its input and output (bytes)."""

CLIP_IQR = 4.0
"""Standardised features are clipped at this many interquartile ranges from the median (METHOD 1.3)."""

_BYTES_PER_VOXEL = 200
"""Peak per voxel where a chunk is worked on at once, as on a CUDA device: 99 measured so on a CPU, and 52 for the pairs
of all directions, which are counted together there. In the blocks of a CPU it is 11 to 16."""
BYTES_PER_CELL = 100
"""Peak per cell of a co-occurrence matrix of all levels, float64 copies; measured: 70, rounded up."""


def feature_names(*, mcc: bool = True) -> tuple[str, ...]:
    """Names of the 34 columns; with ``mcc=False`` the column ``glcm_mcc`` is ``glcm_dissimilarity``."""
    if mcc:
        return FEATURE_NAMES
    return tuple(haralick.DISSIMILARITY if name == "glcm_mcc" else name for name in FEATURE_NAMES)


@torch.no_grad()
def compute_descriptors(
    patches_hu: Tensor,
    masks: Tensor,
    *,
    lung_median_hu: Tensor,
    aggregation: Aggregation = "merged",
    mcc: bool = True,
    halo: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """The 34 radiomic features of each patch, computed in chunks under a byte budget.

    Parameters
    ----------
    patches_hu : float32, float64 or int16 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask do not matter.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    lung_median_hu : float tensor, shape (N,) or ()
        Median HU of the whole lung of the scan each patch comes from (used by the Gabor family).
    aggregation : "merged" or "mean"
        How the 13 directions of the GLCM are joined.
    mcc : bool
        False replaces the maximal correlation coefficient by the dissimilarity; see ``feature_names``.
    halo : bool
        False: neighbours outside the patch do not exist. True: D, H and W include ``windows.HALO_VOXELS`` of the
        volume on each side of the window, which neighbours are read from (``windows``).
    chunk_bytes : int
        Working memory allowed; at least one patch is always processed at a time. On Linux a process keeps some of it,
        up to 62 MiB (``windows.keep_freed_memory``).

    Returns
    -------
    float32 tensor (float64 if the patches are), shape (N, 34)
        Columns ``feature_names(mcc=mcc)`` on the device of the input. A row is all NaN if its patch has fewer than
        ``MIN_LUNG_VOXELS`` lung voxels, else finite. N = 0 gives (0, 34).

    Raises
    ------
    InputError
        If shapes differ, ``masks`` is not bool, or a lung voxel is not finite.

    Notes
    -----
    On CUDA the Gabor family needs full float32 products, torch's default; TF32 costs it digits.

    Source
    ------
    METHOD 1.3.
    """
    check_patches(patches_hu, masks, halo=halo)
    num_patches = patches_hu.shape[0]
    dtype, device = computing_dtype(patches_hu), patches_hu.device
    medians = torch.as_tensor(lung_median_hu, device=device).to(dtype)
    if medians.ndim == 0:
        medians = medians.expand(num_patches)
    if medians.shape != (num_patches,):
        raise InputError(f"lung_median_hu must have shape ({num_patches},) or (), but has {tuple(medians.shape)}")
    keep_freed_memory(device)
    result = torch.full((num_patches, len(FEATURE_NAMES)), torch.nan, dtype=dtype, device=device)
    chunk = _chunk_rows(patches_hu.shape[1:], aggregation, chunk_bytes)
    for start in range(0, num_patches, chunk):
        inside = masks[start : start + chunk]
        counts = window_of(inside, halo=halo).flatten(1).sum(1)
        rows = (counts >= MIN_LUNG_VOXELS).nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        patches = patches_hu[start : start + chunk].to(dtype)
        if rows.numel() < len(counts):
            patches, inside = patches[rows], inside[rows]
        rows = rows + start
        moments = first_order.first_order_features(patches, inside, halo=halo)
        # the moments of a window are finite if its voxels are; only a halo must be looked at itself
        finite = keep(patches, inside).isfinite().all() if halo else moments.isfinite().all()
        if not bool(finite):
            raise InputError("a lung voxel of a patch is NaN or infinite: check the scan for missing HU values")
        families = (
            moments,
            glcm.glcm_features(patches, inside, aggregation=aggregation, mcc=mcc, halo=halo),
            lbp.lbp_features(patches, inside, halo=halo),
            gabor.gabor_features(patches, inside, lung_median_hu=medians[rows], halo=halo),
        )
        result[rows] = torch.cat(families, 1).to(dtype)
    return result


def _chunk_rows(shape: Sequence[int], aggregation: Aggregation, chunk_bytes: int) -> int:
    """Patches per chunk that keep the working memory under ``chunk_bytes``; at least 1."""
    directions = len(glcm.DIRECTIONS) if aggregation == "mean" else 1
    cells = directions * glcm.NUM_LEVELS**2
    return max(1, chunk_bytes // (math.prod(shape) * _BYTES_PER_VOXEL + cells * BYTES_PER_CELL))


@dataclass(frozen=True)
class Standardisation:
    """Median and interquartile range of each feature over training patches of one window size.

    After ``apply`` every family has the same weight in a squared distance: its features are divided by the root of
    their number (METHOD 1.3).
    """

    window: tuple[int, int, int]
    """Patch size in voxels (z, y, x) the statistics belong to."""
    feature_names: tuple[str, ...]
    """Names of the columns."""
    median: tuple[float, ...]
    """Median of each feature."""
    scale: tuple[float, ...]
    """Interquartile range of each feature; 1 where it is 0."""
    constant: tuple[str, ...]
    """Features whose interquartile range is 0: they carry next to no information."""
    descriptor_version: int = DESCRIPTOR_VERSION
    """Version of the features the statistics were taken from."""

    @classmethod
    def fit(
        cls, features: Tensor, *, window: Sequence[int], feature_names: tuple[str, ...] = FEATURE_NAMES
    ) -> Standardisation:
        """Median and interquartile range over the valid rows (linear interpolation between order statistics).

        Parameters
        ----------
        features : float tensor, shape (N, 34)
            Descriptors of training patches; rows with a NaN are left out.
        window : 3 ints
            Patch size in voxels (z, y, x).
        feature_names : 34 strings
            ``feature_names(mcc=False)`` if the descriptors were computed so.

        Raises
        ------
        InputError
            If no row is valid, or the shape does not fit the names.
        """
        _check_columns(features, feature_names)
        if len(window) != 3:
            raise InputError(f"window must be 3 sizes (z, y, x), but is {tuple(window)}")
        values = features.detach().cpu().numpy().astype(np.float64)
        valid = values[np.isfinite(values).all(1)]
        if len(valid) == 0:
            raise InputError(f"none of {len(values)} patches has a valid descriptor: nothing to standardise with")
        lower, median, upper = np.quantile(valid, (0.25, 0.5, 0.75), axis=0)
        spread = upper - lower
        constant = spread == 0
        return cls(
            window=(int(window[0]), int(window[1]), int(window[2])),
            feature_names=tuple(feature_names),
            median=tuple(median.tolist()),
            scale=tuple(np.where(constant, 1.0, spread).tolist()),
            constant=tuple(name for name, is_constant in zip(feature_names, constant, strict=True) if is_constant),
        )

    def apply(self, features: Tensor) -> Tensor:
        """Standardised features: (x - median) / IQR, clipped at 4, times 1 / sqrt(size of the family).

        Parameters
        ----------
        features : float tensor, shape (N, 34)
            Descriptors; NaN rows stay NaN.

        Returns
        -------
        float32 tensor, shape (N, 34)
            On the device of ``features``.

        Raises
        ------
        InputError
            If the shape does not fit the feature names.
        """
        _check_columns(features, self.feature_names)
        median = torch.tensor(self.median, dtype=torch.float64, device=features.device)
        scale = torch.tensor(self.scale, dtype=torch.float64, device=features.device)
        weight = torch.ones_like(scale)
        for columns in FAMILIES.values():
            weight[columns] = 1.0 / math.sqrt(columns.stop - columns.start)
        standard = ((features.to(torch.float64) - median) / scale).clamp(-CLIP_IQR, CLIP_IQR)
        return (standard * weight).to(torch.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON; ``from_dict`` gives an equal object back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Standardisation:
        """Object from ``to_dict``.

        Raises
        ------
        MismatchError
            If the descriptor version is another one, or fields are missing or do not fit each other.
        """
        version = data.get("descriptor_version")
        if version != DESCRIPTOR_VERSION:
            raise MismatchError(
                f"the standardisation is of radiomic descriptor version {version}, this lungseg computes version "
                f"{DESCRIPTOR_VERSION}: run extract-radiomics again"
            )
        try:
            window = tuple(int(size) for size in data["window"])
            names = tuple(str(name) for name in data["feature_names"])
            median = tuple(float(value) for value in data["median"])
            scale = tuple(float(value) for value in data["scale"])
            constant = tuple(str(name) for name in data["constant"])
        except (KeyError, TypeError, ValueError) as error:
            raise MismatchError(f"the standardisation is incomplete or damaged: {error!r}") from error
        numbers = np.array([*median, *scale])
        if names not in (feature_names(), feature_names(mcc=False)):
            raise MismatchError("the standardisation lists other features than this descriptor version has")
        if len(window) != 3 or not (len(median) == len(scale) == len(names)):
            raise MismatchError("the standardisation is damaged: its lists do not fit its feature names")
        if not np.isfinite(numbers).all() or min(scale) <= 0:
            raise MismatchError("the standardisation is damaged: it holds a NaN or a scale that is not positive")
        return cls((window[0], window[1], window[2]), names, median, scale, constant)


def _check_columns(features: Tensor, names: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``features`` is (N, number of names) and that number is 34."""
    if features.ndim != 2 or features.shape[1] != len(names) or len(names) != len(FEATURE_NAMES):
        raise InputError(f"features must have shape (N, {len(FEATURE_NAMES)}), but have {tuple(features.shape)}")

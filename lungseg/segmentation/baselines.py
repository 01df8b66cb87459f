"""Baselines that any user would try first: HU thresholds, and k-means on radiomic descriptors.

The third one, a 1-D Gaussian mixture of smoothed HU, is ``fit_mixture`` of one channel. METHOD 0.4, 1.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from lungseg import tissue as cut
from lungseg.errors import MismatchError
from lungseg.segmentation.density import TokenStatistics
from lungseg.segmentation.mixture import MINIMUM_TOKENS_PER_COMPONENT
from lungseg.segmentation.reduction import BATCH_TOKENS
from lungseg.tissue import UNCLASSIFIED, Tissue

MEDIAN_VOXELS = 3
"""Edge of the median filter before thresholds are applied (METHOD 0.4)."""
GGO_FIBROSIS_HU = cut.DENSE_LUNG_HU
"""Between -700 and -300 HU ground glass and fibrosis overlap and no threshold tells them apart; the bands are split
where ChestImagingPlatform ends its aerated lung (-500), which is also the middle of the two."""


def threshold_labels(volume_hu: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tissue of each lung voxel by literature thresholds of the median-filtered scan.

    At or below -950 HU emphysema, up to -700 healthy, up to -500 ground glass, below -300 fibrosis, else consolidation.

    Parameters
    ----------
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
        Lung. The filter sees what lies outside.

    Returns
    -------
    uint8 array, shape (Z, Y, X)
        ``Tissue`` ids; 0 outside the lung.

    Source
    ------
    METHOD 0.4 and 6; the cut points and their sources are in ``tissue``.
    """
    from scipy.ndimage import median_filter

    labels = np.zeros(mask.shape, dtype=np.uint8)
    if not mask.any():
        return labels
    filtered = median_filter(volume_hu, size=MEDIAN_VOXELS, mode="nearest")
    edges = np.array([cut.LAA950_HU, cut.HEALTHY_MEDIAN_HU, GGO_FIBROSIS_HU])
    tissues = np.array([Tissue.EMPHYSEMA, Tissue.HEALTHY, Tissue.GGO, Tissue.FIBROSIS], dtype=np.uint8)
    values = filtered[mask]
    found = tissues[np.searchsorted(edges, values, side="left")]
    found[values >= cut.CONSOLIDATION_MEDIAN_HU] = Tissue.CONSOLIDATION
    labels[mask] = found
    return labels


def tissue_shares(names: np.ndarray, tissues: Sequence[Tissue] = cut.MIXTURE_TISSUES) -> np.ndarray:
    """Names (N,) as shares of tissues, float32 (N, K): 1 for the tissue named, nothing for the unclassified."""
    shares = (names[:, None] == np.asarray(tissues, dtype=np.uint8)).astype(np.float32)
    shares[names == UNCLASSIFIED] = 0.0
    return shares


@dataclass(frozen=True)
class KMeansFit:
    """Fitted k-means: how tokens are scaled and reduced, and K centres. Plain arrays only."""

    offset: np.ndarray
    """float64 (D,): subtracted from the tokens."""
    projection: np.ndarray
    """float64 (D, d): multiplied afterwards (scaling and PCA in one matrix)."""
    centres: np.ndarray
    """float64 (K, d)."""
    weights: np.ndarray
    """float64 (K,): share of the fit sample."""
    inertia: float
    """Mean squared distance of the sample to its centres."""
    num_tokens: int
    """Tokens fitted on."""

    kind = "kmeans"

    @property
    def num_components(self) -> int:
        """Number of centres K."""
        return int(self.centres.shape[0])

    def posterior(self, tokens: np.ndarray, statistics: TokenStatistics | None = None) -> np.ndarray:
        """1 for the nearest centre of each token, else 0; float32 (N, K). ``statistics`` are not looked at.

        Raises
        ------
        MismatchError
            If tokens (N, D) have another D than at the fit, or a value is not finite.
        """
        _check_tokens(tokens, self.offset.size)
        result = np.zeros((len(tokens), self.num_components), dtype=np.float32)
        half = 0.5 * np.einsum("kd,kd->k", self.centres, self.centres)
        for start in range(0, len(tokens), BATCH_TOKENS):
            part = slice(start, start + BATCH_TOKENS)
            reduced = (tokens[part].astype(np.float64) - self.offset) @ self.projection
            nearest = np.argmin(half - reduced @ self.centres.T, axis=1)
            result[part][np.arange(len(nearest)), nearest] = 1.0
        return result

    def reorder(self, order: Sequence[int]) -> KMeansFit:
        """The same centres in another order (``order[i]`` becomes component i)."""
        index = np.asarray(order, dtype=np.intp)
        if sorted(index.tolist()) != list(range(self.num_components)):
            raise MismatchError(f"{list(order)} is not an order of {self.num_components} components")
        return replace(self, centres=self.centres[index], weights=self.weights[index])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every field as an array, by name; ``from_arrays`` reads it back exactly."""
        return {item.name: np.ascontiguousarray(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> KMeansFit:
        """Fit from the arrays of ``to_arrays``; ``MismatchError`` if one is missing or their shapes do not agree."""
        missing = [item.name for item in fields(cls) if item.name not in arrays]
        if missing:
            raise MismatchError(f"not saved k-means: {', '.join(missing)} missing")
        values: dict[str, Any] = {item.name: np.asarray(arrays[item.name]) for item in fields(cls)}
        values["inertia"] = float(values["inertia"].reshape(-1)[0])
        values["num_tokens"] = int(values["num_tokens"].reshape(-1)[0])
        fit = cls(**values)
        shapes = (fit.projection.shape, fit.weights.shape)
        if shapes != ((fit.offset.size, fit.centres.shape[1]), (fit.num_components,)):
            raise MismatchError(f"damaged k-means: shapes {shapes} do not fit {fit.centres.shape} centres")
        return fit


def fit_kmeans(
    tokens: np.ndarray,
    *,
    num_components: int = 5,
    pca_components: int | None = 15,
    whiten: bool = False,
    standardise: bool = True,
    restarts: int = 20,
    max_iterations: int = 300,
    seed: int,
) -> KMeansFit:
    """K-means of a bounded sample of tokens of a cohort; the defaults are the recipe of the paper's baseline.

    Parameters
    ----------
    tokens : float array, shape (N, D)
        Finite.
    num_components : int
        Centres K.
    pca_components : int or None
        Principal components kept (fewer if there are fewer); None: no reduction.
    whiten, standardise : bool
        Unit variance of the principal components; of each channel before (scikit-learn's StandardScaler).
    restarts, max_iterations : int
        As scikit-learn's ``n_init`` and ``max_iter``.
    seed : int
        The only source of randomness.

    Returns
    -------
    KMeansFit

    Raises
    ------
    MismatchError
        If there are too few tokens, or values that are not finite.

    Source
    ------
    METHOD 1.7 (K-means on radiomics, from the authors' visualize_clusters).
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    needed = num_components * MINIMUM_TOKENS_PER_COMPONENT
    if len(tokens) < needed:
        raise MismatchError(
            f"{len(tokens)} tokens cannot be fitted with {num_components} centres: at least {needed} are needed. Give "
            "more scans or fewer components"
        )
    _check_tokens(tokens, tokens.shape[1])
    scaler = StandardScaler(with_std=standardise).fit(tokens.astype(np.float64))
    scaled = scaler.transform(tokens.astype(np.float64))
    projection = np.eye(tokens.shape[1])
    if pca_components is not None:
        pca = PCA(min(pca_components, *tokens.shape), svd_solver="covariance_eigh").fit(scaled)
        kept = pca.explained_variance_ > 0
        projection = pca.components_[kept].T
        if whiten:
            projection = projection / np.sqrt(pca.explained_variance_[kept])
    reduced = scaled @ projection
    fitted = KMeans(num_components, n_init=restarts, max_iter=max_iterations, random_state=seed).fit(reduced)
    scale = scaler.scale_ if standardise else np.ones(tokens.shape[1])
    return KMeansFit(
        offset=np.asarray(scaler.mean_, dtype=np.float64),
        projection=np.ascontiguousarray(projection / scale[:, None]),
        centres=np.asarray(fitted.cluster_centers_, dtype=np.float64),
        weights=np.bincount(fitted.labels_, minlength=num_components) / len(tokens),
        inertia=float(fitted.inertia_) / len(tokens),
        num_tokens=len(tokens),
    )


def _check_tokens(tokens: np.ndarray, num_features: int) -> None:
    if tokens.ndim != 2 or tokens.shape[1] != num_features:
        raise MismatchError(f"tokens of shape {tokens.shape} given to k-means of {num_features} features")
    if not np.isfinite(tokens).all():
        raise MismatchError(f"some of {len(tokens)} tokens hold values that are not finite")

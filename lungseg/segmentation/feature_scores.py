"""How good a set of token features is for telling tissue apart, judged without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.segmentation.reduction import effective_rank

KMEANS_RESTARTS = 3
"""Starts of K-means: what it finds depends on them, the scores should not."""

FLAT = 1e-9
"""Relative spread below which values do not vary but by rounding."""


@dataclass(frozen=True)
class FeatureScores:
    """Scores of one set of features; higher is better."""

    silhouette: float
    """Mean silhouette of K-means clusters, -1 to 1: are there groups at all?"""
    hu_separability: float
    """Share of the variance of the tokens' median HU that lies between the clusters, 0 to 1."""
    texture_separability: float
    """The same of the logarithm of the tokens' local standard deviation of HU."""
    effective_rank: float
    """Directions the features really use; near 1 is collapse."""


def score_features(
    features: np.ndarray,
    median_hu: np.ndarray,
    local_sd_hu: np.ndarray,
    *,
    clusters: int,
    pca: int,
    max_silhouette: int,
    seed: int,
) -> FeatureScores:
    """Scores of token features by the clusters they fall into.

    Parameters
    ----------
    features : float array, shape (N, C)
        One row per token.
    median_hu : float array, shape (N,)
        HU.
    local_sd_hu : float array, shape (N,)
        HU, not negative: texture.
    clusters : int
        Of K-means on ``pca`` whitened principal components.
    max_silhouette : int
        Rows the silhouette is computed on, chosen at random.

    Raises
    ------
    InputError
        If there are not more tokens than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    if len(features) <= clusters:
        raise InputError(f"{len(features)} tokens are too few for {clusters} clusters: use more cases or windows")
    features = np.asarray(features, dtype=np.float64)
    rank = effective_rank(features)
    if np.ptp(features, axis=0).max() <= FLAT * np.abs(features).max():
        return FeatureScores(float("nan"), 0.0, 0.0, 0.0)  # collapsed: one point has no clusters
    components = min(pca, features.shape[1], len(features) - 1)
    fitted = PCA(components, svd_solver="full").fit(features)
    kept = fitted.explained_variance_ > FLAT * fitted.explained_variance_[0]  # rounding must not be whitened
    reduced = fitted.transform(features)[:, kept] / np.sqrt(fitted.explained_variance_[kept])
    labels = KMeans(clusters, n_init=KMEANS_RESTARTS, random_state=seed).fit_predict(reduced)
    silhouette = float("nan")
    if len(np.unique(labels)) > 1:
        size = min(max_silhouette, len(reduced))
        silhouette = float(silhouette_score(reduced, labels, sample_size=size, random_state=seed))
    return FeatureScores(
        silhouette,
        between_share(median_hu, labels),
        between_share(np.log1p(local_sd_hu), labels),
        rank,
    )


def between_share(values: np.ndarray, labels: np.ndarray) -> float:
    """Share of the variance of ``values`` that lies between groups (eta squared), 0 to 1; 0 if they do not vary."""
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) <= FLAT * np.abs(values).max():
        return 0.0
    total = float(((values - values.mean()) ** 2).sum())
    between = 0.0
    for label in np.unique(labels):
        own = values[labels == label]
        between += len(own) * float(own.mean() - values.mean()) ** 2
    return between / total

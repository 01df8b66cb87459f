"""EM of the HU-anchored mixture: parameters of the highest posterior under priors in the form of pseudo-tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungseg.segmentation.hu_anchors import Anchors
from lungseg.segmentation.mixture import gaussian_log_density
from lungseg.segmentation.reduction import log_sum_exp, parts_of

SMALLEST_COMPONENT = 1e-3
"""A component with fewer tokens has vanished: nothing could be said of its spread."""


@dataclass(frozen=True)
class Components:
    """Parameters of K components in d token dimensions and F HU features; one of weight 0 has vanished."""

    weights: np.ndarray
    """float64 (K,), sum 1."""
    means: np.ndarray
    """float64 (K, d)."""
    precision_cholesky: np.ndarray
    """float64 (K, d, d)."""
    hu_means: np.ndarray
    """float64 (K, F)."""
    hu_sds: np.ndarray
    """float64 (K, F)."""

    def log_joint(self, points: np.ndarray, features: np.ndarray, token_weight: float) -> np.ndarray:
        """log(weight N(point)^token_weight N(features)), float64 (N, K), of points (N, d) and features (N, F)."""
        alive = np.flatnonzero(self.weights)  # the others cost nothing
        means, sds = self.hu_means[alive], self.hu_sds[alive]
        scaled = (features[:, None] - means) / sds
        found = -0.5 * np.einsum("nkf,nkf->nk", scaled, scaled) + np.log(self.weights[alive])
        found -= np.log(sds).sum(axis=1) + 0.5 * features.shape[1] * np.log(2.0 * np.pi)
        if token_weight:
            found += token_weight * gaussian_log_density(points, self.means[alive], self.precision_cholesky[alive])
        joint = np.full((len(points), len(self.weights)), -np.inf)
        joint[:, alive] = found
        return joint


class AnchoredEM:
    """Steps of EM under the priors of the anchors.

    Parameters
    ----------
    anchors : Anchors
        Prior means and standard deviations of the HU features.
    anchor_count : float
        Pseudo-tokens behind each anchor; 0: none.
    token_variance : float
        Variance of the reduced tokens along a direction, on average: scale of the prior covariances.
    token_weight : float
        Power of the token likelihood.
    sparse : bool
        Let tissues without members vanish.
    regularisation : float
        Added to the diagonal of each token covariance.
    """

    def __init__(
        self,
        anchors: Anchors,
        *,
        anchor_count: float,
        token_variance: float,
        token_weight: float,
        sparse: bool,
        regularisation: float,
    ) -> None:
        self.anchors = anchors
        self.owner = np.unique(np.asarray(anchors.tissues), return_inverse=True)[1]
        self.anchor_count = anchor_count
        self.token_variance = token_variance
        self.token_weight = token_weight
        self.sparse = sparse
        self.regularisation = regularisation

    def start(self, points: np.ndarray, features: np.ndarray) -> Components:
        """Components of the tokens that the anchors alone would give them."""
        num, dim = len(self.anchors.tissues), points.shape[1]
        blank = Components(
            weights=np.full(num, 1.0 / num),
            means=np.zeros((num, dim)),
            precision_cholesky=np.broadcast_to(np.eye(dim), (num, dim, dim)).copy(),
            hu_means=self.anchors.centre.copy(),
            hu_sds=self.anchors.spread.copy(),
        )
        return self._maximise(self._expect(blank, points, features, token_weight=0.0)[0], blank)

    def step(self, state: Components, points: np.ndarray, features: np.ndarray) -> tuple[Components, float]:
        """One step of EM: new parameters, and the log posterior of the old ones, up to a constant."""
        sums, evidence = self._expect(state, points, features, token_weight=self.token_weight)
        return self._maximise(sums, state), evidence + self.log_prior(state)

    def log_prior(self, state: Components) -> float:
        """Log prior density of the parameters, up to a constant."""
        alive = state.weights > 0
        tissues = np.bincount(self.owner, weights=state.weights)
        centre, spread = self.anchors.centre[alive], self.anchors.spread[alive]
        variance = state.hu_sds[alive] ** 2
        pseudo = np.log(variance) + (spread**2 + (state.hu_means[alive] - centre) ** 2) / variance
        cholesky = state.precision_cholesky[alive]
        log_det = 2.0 * np.log(np.diagonal(cholesky, axis1=1, axis2=2)).sum()
        trace = self._prior_variance(state) * np.sum(cholesky**2)
        count = _covariance_count(state.means.shape[1])
        return float(
            -0.5 * self.anchor_count * pseudo.sum()
            + 0.5 * count * (log_det - trace)
            - self._cost(state) * np.log(tissues[tissues > 0]).sum()
        )

    def _expect(
        self, state: Components, points: np.ndarray, features: np.ndarray, *, token_weight: float
    ) -> tuple[_Sums, float]:
        """Sums over the tokens by their responsibilities, and their log likelihood."""
        sums = _Sums(len(state.weights), points.shape[1], features.shape[1])
        total = 0.0
        for part in parts_of(len(points)):
            joint = state.log_joint(points[part], features[part], token_weight)
            evidence = log_sum_exp(joint)
            total += float(evidence.sum())
            sums.add(np.exp(joint - evidence[:, None]), points[part], features[part])
        return sums, total

    def _maximise(self, sums: _Sums, before: Components) -> Components:
        """Parameters of the highest posterior given the responsibilities; vanished components keep theirs."""
        left = self._weights(sums.count, self._cost(before))
        means, cholesky = before.means.copy(), before.precision_cholesky.copy()
        hu_means, hu_sds = before.hu_means.copy(), before.hu_sds.copy()
        dim, variance = before.means.shape[1], self._prior_variance(before)
        count = _covariance_count(dim)
        for k in np.flatnonzero(left):
            means[k], scatter = sums.token_moments(int(k))
            # inverse-Wishart: so many pseudo-tokens of the prior covariance
            covariance = self.token_weight * scatter + count * variance * np.eye(dim)
            covariance /= self.token_weight * sums.count[k] + count
            covariance[np.diag_indices(dim)] += self.regularisation
            lower = np.linalg.cholesky(covariance)
            cholesky[k] = np.linalg.solve(lower, np.eye(dim)).T
            hu_means[k], hu_sds[k] = self._hu_gaussian(sums, int(k))
        return Components(left, means, cholesky, hu_means, hu_sds)

    def _weights(self, count: np.ndarray, cost: float) -> np.ndarray:
        """Weights (K,) of components with so many tokens: sparse over tissues, of highest likelihood within one.

        Figueiredo & Jain 2002, eq. 17, for tissues: were it for components, the anchors of one tissue would drive each
        other out and leave gaps between them. The largest tissue never vanishes.
        """
        tokens = np.bincount(self.owner, weights=count)
        left = np.maximum(tokens - cost, 0.0)
        if not left.any():
            left = np.where(tokens == tokens.max(), 1.0, 0.0)
        share = np.where(count >= SMALLEST_COMPONENT, count, 0.0)
        weights = left[self.owner] * share / np.maximum(tokens, SMALLEST_COMPONENT)[self.owner]
        return weights / weights.sum()

    def _hu_gaussian(self, sums: _Sums, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and SD (F,) of the members and the pseudo-tokens of the anchor together (normal-inverse-Gamma)."""
        centre, spread = self.anchors.centre[k], self.anchors.spread[k]
        total = sums.count[k] + self.anchor_count
        # about the anchor, so that no digits are lost
        shift = sums.hu_sum[k] - sums.count[k] * centre
        squares = sums.hu_squares[k] - 2.0 * centre * sums.hu_sum[k] + sums.count[k] * centre**2
        offset = shift / total
        variance = (squares + self.anchor_count * spread**2) / total - offset**2
        # members that all agree, and no anchor: a thousandth of the anchor's spread stands for rounding
        return centre + offset, np.sqrt(np.maximum(variance, (1e-3 * spread) ** 2))

    def _prior_variance(self, state: Components) -> float:
        """Fraley & Raftery 2007: the tokens' variance divided into K equal volumes."""
        num, dim = state.means.shape
        return float(self.token_variance * num ** (-2.0 / dim))

    def _cost(self, state: Components) -> float:
        """Tokens that a tissue must have: half the parameters of a component; 0 if none is to vanish."""
        dim = state.means.shape[1]
        return (dim + dim * (dim + 1) / 2 + 2 * state.hu_means.shape[1]) / 2 if self.sparse else 0.0


class _Sums:
    """Sums over tokens, weighted by responsibilities (N, K)."""

    def __init__(self, num: int, dim: int, num_hu: int) -> None:
        self.count = np.zeros(num)
        self.point_sum = np.zeros((num, dim))
        self.point_squares = np.zeros((num, dim, dim))
        self.hu_sum = np.zeros((num, num_hu))
        self.hu_squares = np.zeros((num, num_hu))

    def add(self, share: np.ndarray, points: np.ndarray, features: np.ndarray) -> None:
        """Add tokens."""
        self.count += share.sum(axis=0)
        self.point_sum += share.T @ points
        self.hu_sum += share.T @ features
        self.hu_squares += share.T @ features**2
        for k in np.flatnonzero(share.any(axis=0)):
            self.point_squares[k] += (points * share[:, k, None]).T @ points

    def token_moments(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) of component k, and scatter (d, d) about it."""
        mean = self.point_sum[k] / self.count[k]
        return mean, self.point_squares[k] - self.count[k] * np.outer(mean, mean)


def _covariance_count(dim: int) -> float:
    """Pseudo-tokens behind a prior covariance. Fraley & Raftery, J Classif 2007;24:155: d + 2."""
    return dim + 2.0

"""HU-anchored mixture: every component belongs to a tissue from the start, so that naming happens inside EM.

A token is explained twice: as a point of the reduced token space, by a free Gaussian, and by its HU features
(``hu_anchors``), by a Gaussian that a prior holds at the tissue's place in the literature. Components cannot swap
tissues; those without members vanish. METHOD 7.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lungseg.errors import MismatchError
from lungseg.segmentation.anchored_em import AnchoredEM, Components
from lungseg.segmentation.density import TokenStatistics
from lungseg.segmentation.hu_anchors import FEATURE_NAMES, Anchors, hu_features, literature_anchors
from lungseg.segmentation.reduction import Reduction, check_finite, fit_reduction, log_sum_exp, parts_of
from lungseg.tissue import Tissue

ARRAY_FIELDS = ("weights", "means", "precision_cholesky", "hu_means", "hu_sds")
"""Fields of an ``AnchoredFit`` that hold one row for each component."""


@dataclass(frozen=True)
class AnchoredFit:
    """A fitted anchored mixture of K components in d token dimensions and F HU features. Plain arrays only."""

    reduction: Reduction
    tissues: tuple[Tissue, ...]
    """Tissue of each component, by construction."""
    weights: np.ndarray
    """float64 (K,): mixing weights, sum 1."""
    means: np.ndarray
    """float64 (K, d)."""
    precision_cholesky: np.ndarray
    """float64 (K, d, d): upper triangular U with precision = U Uᵀ."""
    hu_means: np.ndarray
    """float64 (K, F), features of ``hu_anchors.FEATURE_NAMES``."""
    hu_sds: np.ndarray
    """float64 (K, F)."""
    token_weight: float
    """Power of the token likelihood beside that of the HU."""
    mean_objective: float
    """Log posterior per token that EM reached."""
    num_tokens: int
    num_iterations: int
    converged: bool

    kind = "anchored"

    @property
    def num_components(self) -> int:
        """Number of components K that have members."""
        return int(self.weights.shape[0])

    def posterior(self, tokens: np.ndarray, statistics: TokenStatistics | None = None) -> np.ndarray:
        """Probability of each component given each token and its HU.

        Parameters
        ----------
        tokens : float array, shape (N, D)
            Finite; D as at the fit.
        statistics : TokenStatistics
            Of the same tokens, from ``hu_anchors.refer_statistics``.

        Returns
        -------
        float32 array, shape (N, K)
            Rows sum to 1.

        Raises
        ------
        MismatchError
            If D differs from the fit, or the statistics are missing or of other tokens.
        """
        if statistics is None:
            raise MismatchError("an anchored mixture needs the HU statistics of the tokens")
        features = _features(tokens, statistics)
        result = np.empty((tokens.shape[0], self.num_components), dtype=np.float32)
        state = Components(**{name: getattr(self, name) for name in ARRAY_FIELDS})
        for part in parts_of(len(tokens)):
            joint = state.log_joint(self.reduction.apply(tokens[part]), features[part], self.token_weight)
            result[part] = np.exp(joint - log_sum_exp(joint)[:, None])
        return result

    def reorder(self, order: Sequence[int]) -> AnchoredFit:
        """The same mixture with ``order[i]`` as component i."""
        index = np.asarray(order, dtype=np.intp)
        if sorted(index.tolist()) != list(range(self.num_components)):
            raise MismatchError(f"{list(order)} is not an order of {self.num_components} components")
        arrays: dict[str, Any] = {name: getattr(self, name)[index] for name in ARRAY_FIELDS}
        return replace(self, tissues=tuple(self.tissues[i] for i in index), **arrays)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name; ``from_arrays`` reads it back exactly."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAY_FIELDS}
        arrays["tissues"] = np.asarray(self.tissues, dtype=np.uint8)
        for name in ("token_weight", "mean_objective", "num_tokens", "num_iterations", "converged"):
            arrays[name] = np.atleast_1d(getattr(self, name))
        return {**arrays, **self.reduction.to_arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> AnchoredFit:
        """From ``to_arrays``; ``MismatchError`` if one is missing or their shapes do not agree."""
        reduction = Reduction.from_arrays(arrays)
        try:
            fit = cls(
                reduction=reduction,
                tissues=tuple(Tissue(int(value)) for value in arrays["tissues"]),
                **{name: np.asarray(arrays[name]) for name in ARRAY_FIELDS},
                token_weight=float(arrays["token_weight"][0]),
                mean_objective=float(arrays["mean_objective"][0]),
                num_tokens=int(arrays["num_tokens"][0]),
                num_iterations=int(arrays["num_iterations"][0]),
                converged=bool(arrays["converged"][0]),
            )
        except (KeyError, ValueError) as error:
            raise MismatchError(f"not a saved anchored mixture: {error!r}") from error
        num, dim, features = len(fit.tissues), reduction.projection.shape[1], len(FEATURE_NAMES)
        wanted = [(num,), (num, dim), (num, dim, dim), (num, features), (num, features)]
        if [getattr(fit, name).shape for name in ARRAY_FIELDS] != wanted:
            raise MismatchError(f"damaged anchored mixture: shapes do not fit {num} components of {dim} dimensions")
        return fit


def fit_anchored(
    tokens: np.ndarray,
    statistics: TokenStatistics,
    *,
    anchors: Anchors | None = None,
    anchor_strength: float = 1.0,
    token_weight: float | None = None,
    sparse: bool = True,
    pca_components: int | None = 16,
    whiten: bool = True,
    standardise: bool = False,
    regularisation: float = 1e-3,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
) -> AnchoredFit:
    """Anchored mixture of a bounded sample of tokens of a cohort, by MAP-EM. Deterministic: nothing is drawn.

    Parameters
    ----------
    tokens : float32 array, shape (N, D)
        Finite.
    statistics : TokenStatistics
        Of the same tokens, from ``hu_anchors.refer_statistics``: each token referred to its own scan.
    anchors : Anchors, optional
        ``literature_anchors()`` by default. EM starts from them, and they are the means of the priors.
    anchor_strength : float
        Pseudo-tokens behind each anchor, as a multiple of N. Relative to N because an absolute number would let the
        anchors go in a large cohort. At 1 no component, however large, moves more than half the way from the
        literature to what its members say. 0: flat priors.
    token_weight : float, optional
        Power of the token likelihood. By default the root of F / d: log likelihoods of independent dimensions spread
        as the root of their number, so that those of the d token dimensions then spread as those of the F HU
        features. At 1 the tokens would drown the HU.
    sparse : bool
        Let tissues without members vanish.
    pca_components, whiten, standardise
        As for ``fit_mixture``.
    regularisation : float
        Added to the diagonal of each token covariance.
    max_iterations, tolerance : int, float
        EM stops when the log posterior per token gains less than ``tolerance``.

    Returns
    -------
    AnchoredFit
        Without the components that vanished.

    Raises
    ------
    MismatchError
        If tokens and statistics do not belong together, or too few tokens are given.

    Source
    ------
    METHOD 7.7. Conjugate priors in the form of pseudo-tokens (normal-inverse-Gamma for the HU, inverse-Wishart for the
    tokens' covariances; Fraley & Raftery, J Classif 2007;24:155). Weights of the tissues by minimum message length
    (Figueiredo & Jain, IEEE PAMI 2002;24:381, eq. 17): a Dirichlet prior of exponent -P / 2, P the parameters of a
    component, so that a tissue with too few tokens to pay for one vanishes.
    """
    features = _features(tokens, statistics)
    anchors = literature_anchors() if anchors is None else anchors
    num = len(anchors.tissues)
    if len(tokens) < 2 * num:
        raise MismatchError(f"{len(tokens)} tokens cannot be fitted with {num} anchored components: give more scans")
    reduction = fit_reduction(tokens, pca_components=pca_components, whiten=whiten, standardise=standardise)
    points = reduction.apply(tokens)
    dim = points.shape[1]
    power = float(np.sqrt(features.shape[1] / dim)) if token_weight is None else token_weight
    em = AnchoredEM(
        anchors,
        anchor_count=anchor_strength * len(tokens),
        token_variance=float(points.var(axis=0).mean()),
        token_weight=power,
        sparse=sparse,
        regularisation=regularisation,
    )
    state = em.start(points, features)
    history, converged = [-np.inf], False
    while not converged and len(history) <= max_iterations:
        state, objective = em.step(state, points, features)
        history.append(objective / len(tokens))
        converged = abs(history[-1] - history[-2]) < tolerance
    alive = state.weights > 0
    return AnchoredFit(
        reduction=reduction,
        tissues=tuple(tissue for tissue, kept in zip(anchors.tissues, alive, strict=True) if kept),
        **{name: getattr(state, name)[alive] for name in ARRAY_FIELDS},
        token_weight=float(power),
        mean_objective=float(history[-1]),
        num_tokens=len(tokens),
        num_iterations=len(history) - 1,
        converged=converged,
    )


def _features(tokens: np.ndarray, statistics: TokenStatistics) -> np.ndarray:
    """HU features of the tokens, (N, F)."""
    if len(statistics) != len(tokens):
        raise MismatchError(f"{len(statistics)} HU statistics do not belong to {len(tokens)} tokens")
    features = hu_features(statistics)
    check_finite(features)
    return features

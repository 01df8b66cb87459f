"""Gaussian mixture over tokens: one cohort-level fit, applied to any scan without refitting.

Fitting uses scikit-learn's EM; the fit itself is a handful of plain arrays, applied by numpy alone, so that a saved
fit depends on no library version. METHOD 1.5 step 5; FEASIBILITY: many components, whitened, regularised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from lungseg.errors import MismatchError
from lungseg.segmentation.density import TokenStatistics
from lungseg.segmentation.reduction import (
    check_finite,
    check_width,
    fit_reduction,
    log_sum_exp,
    parts_of,
)

Covariance = Literal["full", "tied", "diag", "spherical"]

MINIMUM_TOKENS_PER_COMPONENT = 5
"""Fewer tokens than this for each component cannot tell its centre and spread: our choice."""


@dataclass(frozen=True)
class MixtureFit:
    """A fitted mixture: how tokens are reduced, and K Gaussians in the reduced space. Plain arrays only."""

    num_features: int
    """Channels of the tokens it was fitted on."""
    kept_columns: np.ndarray
    """int64 (F,): channels used; the others were constant in the fit sample."""
    offset: np.ndarray
    """float64 (F,): subtracted from the kept channels."""
    projection: np.ndarray
    """float64 (F, d): multiplied afterwards (scaling, PCA and whitening in one matrix)."""
    weights: np.ndarray
    """float64 (K,): mixing weights, sum 1."""
    means: np.ndarray
    """float64 (K, d)."""
    precision_cholesky: np.ndarray
    """float64 (K, d, d): upper triangular U with precision = U Uᵀ."""
    explained_variance_share: float
    """Share of the variance of the (scaled) tokens kept by the PCA; 1 without one."""
    mean_log_likelihood: float
    """Lower bound of the log-likelihood per token that EM reached."""
    effective_rank: float
    """Of the tokens fitted on: the collapse alarm (FEASIBILITY failure mode 7)."""
    num_tokens: int
    """Tokens fitted on."""
    num_iterations: int
    """EM iterations of the best restart."""
    converged: bool
    """Whether EM met the tolerance within the iterations."""
    seed: int

    kind = "gmm"

    @property
    def num_components(self) -> int:
        """Number of Gaussians K."""
        return int(self.weights.shape[0])

    @property
    def dropped_columns(self) -> tuple[int, ...]:
        """Channels left out because they were constant."""
        return tuple(np.setdiff1d(np.arange(self.num_features), self.kept_columns).tolist())

    def reduce(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (N, D) in the space of the mixture, float64 (N, d)."""
        check_width(tokens, self.num_features)
        return (tokens[:, self.kept_columns].astype(np.float64) - self.offset) @ self.projection

    def posterior(self, tokens: np.ndarray, statistics: TokenStatistics | None = None) -> np.ndarray:
        """Probability of each component given each token.

        Parameters
        ----------
        tokens : float array, shape (N, D)
            Finite; D as at the fit.
        statistics : TokenStatistics, optional
            Not looked at: this mixture knows tokens only (see ``Clustering``).

        Returns
        -------
        float32 array, shape (N, K)
            Rows sum to 1. Shape (0, K) for no tokens.

        Raises
        ------
        MismatchError
            If D differs from the fit or a value is not finite.
        """
        result = np.empty((tokens.shape[0], self.num_components), dtype=np.float32)
        for part, joint in self._joint_log_density(tokens):
            result[part] = np.exp(joint - log_sum_exp(joint)[:, None])
        return result

    def log_likelihood(self, tokens: np.ndarray) -> np.ndarray:
        """Log density of each token under the mixture, in the reduced space; float64 (N,)."""
        result = np.empty(tokens.shape[0], dtype=np.float64)
        for part, joint in self._joint_log_density(tokens):
            result[part] = log_sum_exp(joint)
        return result

    def reorder(self, order: Sequence[int]) -> MixtureFit:
        """The same mixture with its components in another order (``order[i]`` becomes component i)."""
        index = np.asarray(order, dtype=np.intp)
        if sorted(index.tolist()) != list(range(self.num_components)):
            raise MismatchError(f"{list(order)} is not an order of {self.num_components} components")
        return replace(
            self,
            weights=self.weights[index],
            means=self.means[index],
            precision_cholesky=self.precision_cholesky[index],
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every field as an array, by name; ``from_arrays`` reads it back exactly."""
        return {item.name: np.ascontiguousarray(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> MixtureFit:
        """Fit from the arrays of ``to_arrays``; ``MismatchError`` if one is missing or their shapes do not agree."""
        names = [item.name for item in fields(cls)]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise MismatchError(f"not a saved mixture: {', '.join(missing)} missing")
        types = {"num_features": int, "num_tokens": int, "num_iterations": int, "seed": int, "converged": bool}
        values: dict[str, Any] = {}
        for name in names:
            value = np.asarray(arrays[name])
            if name in types:
                values[name] = types[name](value.reshape(-1)[0])
            elif name in ("explained_variance_share", "mean_log_likelihood", "effective_rank"):
                values[name] = float(value.reshape(-1)[0])
            else:
                values[name] = value
        fit = cls(**values)
        (num, dim), kept = fit.means.shape, fit.kept_columns.size
        shapes = (fit.weights.shape, fit.precision_cholesky.shape, fit.projection.shape, fit.offset.shape)
        if shapes != ((num,), (num, dim, dim), (kept, dim), (kept,)):
            raise MismatchError(f"damaged mixture: shapes {shapes} do not fit {num} components of {dim} dimensions")
        return fit

    def _joint_log_density(self, tokens: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Batches of log(weight_k N(x | mean_k, covariance_k)), float64 (B, K)."""
        check_width(tokens, self.num_features)
        for part in parts_of(len(tokens)):
            check_finite(tokens[part])
            density = gaussian_log_density(self.reduce(tokens[part]), self.means, self.precision_cholesky)
            yield part, density + np.log(self.weights)


def gaussian_log_density(points: np.ndarray, means: np.ndarray, precision_cholesky: np.ndarray) -> np.ndarray:
    """log N(x | mean_k, covariance_k), float64 (N, K), of points (N, d).

    ``means`` is (K, d); ``precision_cholesky`` (K, d, d) holds upper triangular U with precision = U Uᵀ.
    """
    log_det = np.log(np.diagonal(precision_cholesky, axis1=1, axis2=2)).sum(axis=1)
    constant = log_det - 0.5 * means.shape[1] * np.log(2.0 * np.pi)
    density = np.empty((points.shape[0], len(means)))
    for k, (mean, cholesky) in enumerate(zip(means, precision_cholesky, strict=True)):
        distance = (points - mean) @ cholesky
        density[:, k] = constant[k] - 0.5 * np.einsum("nd,nd->n", distance, distance)
    return density


def fit_mixture(
    tokens: np.ndarray,
    *,
    num_components: int = 24,
    pca_components: int | None = 16,
    whiten: bool = True,
    standardise: bool = False,
    regularisation: float = 1e-3,
    restarts: int = 5,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    covariance: Covariance = "full",
    seed: int,
) -> MixtureFit:
    """Gaussian mixture of a bounded sample of tokens of a cohort.

    Parameters
    ----------
    tokens : float32 array, shape (N, D)
        Finite. The caller bounds N (<= 500,000) and takes equally many tokens per patient.
    num_components : int
        Gaussians K.
    pca_components : int or None
        Principal directions kept (fewer if the tokens have fewer); None keeps the channels as they are.
    whiten : bool
        Give every principal direction unit variance; without a PCA it has no effect.
    standardise : bool
        Give every channel zero mean and unit variance first.
    regularisation : float
        Added to the diagonal of each covariance, in the units of the reduced space.
    restarts : int
        Independent k-means++ starts; the one with the highest likelihood is kept.
    max_iterations, tolerance : int, float
        EM stops when the mean log-likelihood gains less than ``tolerance``.
    covariance : str
        Shape of the covariances, as in scikit-learn; stored as full matrices in any case.
    seed : int
        The only source of randomness: the same tokens and seed give the same fit.

    Returns
    -------
    MixtureFit
        Constant channels are dropped and listed in ``dropped_columns``. Order the components with ``reorder``.

    Raises
    ------
    MismatchError
        If there are too few tokens or too few different ones, values that are not finite, or only constant channels;
        the message holds the counts.

    Source
    ------
    METHOD 1.5 step 5; start from k-means++ with covariance = mean variance x I as in the authors' code (METHOD 1.1).
    """
    _check_tokens(tokens, num_components)
    reduction = fit_reduction(tokens, pca_components=pca_components, whiten=whiten, standardise=standardise)
    reduced = reduction.apply(tokens)
    _check_distinct(reduced, num_components)
    best = _best_restart(
        reduced,
        restarts=restarts,
        seed=seed,
        options={
            "n_components": num_components,
            "covariance_type": covariance,
            "tol": tolerance,
            "reg_covar": regularisation,
            "max_iter": max_iterations,
        },
    )
    return MixtureFit(
        num_features=tokens.shape[1],
        kept_columns=reduction.kept_columns,
        offset=reduction.offset,
        projection=reduction.projection,
        weights=np.asarray(best.weights_, dtype=np.float64),
        means=np.asarray(best.means_, dtype=np.float64),
        precision_cholesky=_full_precisions(best, covariance),
        explained_variance_share=reduction.explained_variance_share,
        mean_log_likelihood=float(best.lower_bound_),
        effective_rank=reduction.effective_rank,
        num_tokens=tokens.shape[0],
        num_iterations=int(best.n_iter_),
        converged=bool(best.converged_),
        seed=seed,
    )


def _check_tokens(tokens: np.ndarray, num_components: int) -> None:
    """Raise unless the tokens can carry so many components."""
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise MismatchError(f"tokens must be an array (N, D), not of shape {tokens.shape}")
    needed = max(num_components * MINIMUM_TOKENS_PER_COMPONENT, 2)
    if num_components < 1 or tokens.shape[0] < needed:
        raise MismatchError(
            f"{tokens.shape[0]} tokens cannot be fitted with {num_components} components: at least {needed} are needed "
            f"({MINIMUM_TOKENS_PER_COMPONENT} for each). Give more scans or fewer components"
        )
    for part in parts_of(len(tokens)):
        check_finite(tokens[part])


def _check_distinct(reduced: np.ndarray, num_components: int) -> None:
    """Raise if there are fewer different tokens than components."""
    if np.unique(reduced[:, 0]).size >= num_components:
        return
    distinct = np.unique(reduced, axis=0).shape[0]
    if distinct < num_components:
        raise MismatchError(f"only {distinct} different tokens for {num_components} components")


def _best_restart(reduced: np.ndarray, *, restarts: int, seed: int, options: dict[str, Any]) -> Any:
    """The scikit-learn mixture with the highest likelihood of several k-means++ starts."""
    import warnings

    from sklearn.cluster import kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    number, dim = options["n_components"], reduced.shape[1]
    precision = 1.0 / (float(reduced.var(axis=0).mean()) + options["reg_covar"])
    start_precisions = {
        "full": np.broadcast_to(np.eye(dim) * precision, (number, dim, dim)).copy(),
        "tied": np.eye(dim) * precision,
        "diag": np.full((number, dim), precision),
        "spherical": np.full(number, precision),
    }[options["covariance_type"]]
    best = None
    for child in np.random.SeedSequence(seed).generate_state(max(restarts, 1)):
        centres, _ = kmeans_plusplus(reduced, number, random_state=int(child))
        mixture = GaussianMixture(
            **options,
            weights_init=np.full(number, 1.0 / number),
            means_init=centres,
            precisions_init=start_precisions,
            init_params="random",
            random_state=int(child),
        )
        with warnings.catch_warnings():
            # Reported as ``converged`` instead.
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                mixture.fit(reduced)
            except ValueError as error:
                raise MismatchError(
                    f"EM broke down on {reduced.shape[0]} tokens of {dim} dimensions with {number} components "
                    f"({error}): raise the regularisation or lower the number of components"
                ) from error
        if best is None or mixture.lower_bound_ > best.lower_bound_:
            best = mixture
    return best


def _full_precisions(mixture: Any, covariance: Covariance) -> np.ndarray:
    """Upper Cholesky factors of the precisions as full matrices, float64 (K, d, d)."""
    factor = np.asarray(mixture.precisions_cholesky_, dtype=np.float64)
    number, dim = mixture.means_.shape
    if covariance == "full":
        return factor
    if covariance == "tied":
        return np.broadcast_to(factor, (number, dim, dim)).copy()
    if covariance == "diag":
        return factor[:, :, None] * np.eye(dim)
    return factor[:, None, None] * np.eye(dim)

"""Mixture of von Mises-Fisher distributions: tokens that are unit vectors, or several of them side by side.

The tokens of the student lie on a sphere, or on a product of spheres where several noise levels are joined; there a
component has a mean direction and one concentration for each block, far fewer parameters than a covariance.
METHOD 7.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from lungseg.errors import MismatchError
from lungseg.segmentation.density import TokenStatistics
from lungseg.segmentation.mixture import MINIMUM_TOKENS_PER_COMPONENT
from lungseg.segmentation.reduction import check_finite, check_width, log_sum_exp, parts_of

LENGTH_TOLERANCE = 1e-3
"""How far the length of a block may be from 1 (half precision)."""
LARGEST_RESULTANT = 1.0 - 1e-6
"""Mean resultant length above which directions are one: rounding of float32."""


@dataclass(frozen=True)
class SphericalFit:
    """A fitted mixture of K components over tokens of B unit blocks of E channels. Plain arrays only."""

    weights: np.ndarray
    """float64 (K,): mixing weights, sum 1."""
    directions: np.ndarray
    """float64 (K, B, E): mean directions, unit vectors."""
    concentrations: np.ndarray
    """float64 (K, B): kappa."""
    mean_log_likelihood: float
    """Of the tokens fitted on, per token, with respect to the area of the spheres."""
    num_tokens: int
    num_iterations: int
    converged: bool
    seed: int

    kind = "vmf"

    @property
    def num_components(self) -> int:
        """Number of components K."""
        return int(self.weights.shape[0])

    @property
    def num_features(self) -> int:
        """Channels of a token."""
        return int(self.directions[0].size)

    def posterior(self, tokens: np.ndarray, statistics: TokenStatistics | None = None) -> np.ndarray:
        """Probability of each component given each token.

        Parameters
        ----------
        tokens : float array, shape (N, B * E)
            Each block of unit length.
        statistics : TokenStatistics, optional
            Not looked at (see ``Clustering``).

        Returns
        -------
        float32 array, shape (N, K)
            Rows sum to 1.

        Raises
        ------
        MismatchError
            If the tokens are of another width, or not unit vectors.
        """
        result = np.empty((len(tokens), self.num_components), dtype=np.float32)
        for part in parts_of(len(tokens)):
            joint = self._log_joint(tokens[part])
            result[part] = np.exp(joint - log_sum_exp(joint)[:, None])
        return result

    def log_likelihood(self, tokens: np.ndarray) -> np.ndarray:
        """Log density of each token with respect to the area of the spheres; float64 (N,)."""
        result = np.empty(len(tokens))
        for part in parts_of(len(tokens)):
            result[part] = log_sum_exp(self._log_joint(tokens[part]))
        return result

    def reorder(self, order: Sequence[int]) -> SphericalFit:
        """The same mixture with ``order[i]`` as component i."""
        index = np.asarray(order, dtype=np.intp)
        if sorted(index.tolist()) != list(range(self.num_components)):
            raise MismatchError(f"{list(order)} is not an order of {self.num_components} components")
        return replace(
            self,
            weights=self.weights[index],
            directions=self.directions[index],
            concentrations=self.concentrations[index],
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every field as an array, by name; ``from_arrays`` reads it back exactly."""
        return {item.name: np.atleast_1d(np.ascontiguousarray(getattr(self, item.name))) for item in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> SphericalFit:
        """From ``to_arrays``; ``MismatchError`` if one is missing or their shapes do not agree."""
        missing = [item.name for item in fields(cls) if item.name not in arrays]
        if missing:
            raise MismatchError(f"not a saved spherical mixture: {', '.join(missing)} missing")
        fit = cls(
            weights=np.asarray(arrays["weights"]),
            directions=np.asarray(arrays["directions"]),
            concentrations=np.asarray(arrays["concentrations"]),
            mean_log_likelihood=float(arrays["mean_log_likelihood"][0]),
            num_tokens=int(arrays["num_tokens"][0]),
            num_iterations=int(arrays["num_iterations"][0]),
            converged=bool(arrays["converged"][0]),
            seed=int(arrays["seed"][0]),
        )
        shape = fit.directions.shape
        if len(shape) != 3 or fit.weights.shape != shape[:1] or fit.concentrations.shape != shape[:2]:
            raise MismatchError(f"damaged spherical mixture: directions of shape {shape} do not fit the rest")
        return fit

    def _log_joint(self, tokens: np.ndarray) -> np.ndarray:
        """log(weight times density), float64 (N, K)."""
        blocks = _as_blocks(tokens, self.directions.shape[1:])
        # (N, B, E) x (K, B, E): kappa times the cosine, added over the blocks
        cosines = np.einsum("nbe,kbe->nk", blocks, self.directions * self.concentrations[..., None], optimize=True)
        constant = log_normaliser(self.concentrations, self.directions.shape[2]).sum(axis=1)
        joint: np.ndarray = cosines + constant + np.log(self.weights)
        return joint


def fit_spherical(
    tokens: np.ndarray,
    *,
    num_components: int = 24,
    blocks: int = 1,
    restarts: int = 5,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int,
) -> SphericalFit:
    """Mixture of von Mises-Fisher distributions of a bounded sample of tokens, by EM.

    Parameters
    ----------
    tokens : float32 array, shape (N, blocks * E)
        Each block of unit length (a noise level of the student). The caller bounds N.
    num_components : int
        Components K.
    blocks : int
        Unit vectors in a token, independent given the component.
    restarts : int
        Independent k-means++ starts; the one with the highest likelihood is kept.
    max_iterations, tolerance : int, float
        EM stops when the mean log-likelihood gains less than ``tolerance``.
    seed : int
        The only source of randomness.

    Returns
    -------
    SphericalFit

    Raises
    ------
    MismatchError
        If there are too few tokens, the channels are no multiple of the blocks, or a block is no unit vector.

    Source
    ------
    Banerjee et al., JMLR 2005;6:1345: EM (soft-moVMF) and kappa from the mean resultant length (eq. 4.4).
    """
    needed = max(num_components * MINIMUM_TOKENS_PER_COMPONENT, 2)
    if tokens.ndim != 2 or num_components < 1 or len(tokens) < needed:
        raise MismatchError(
            f"tokens of shape {tokens.shape} cannot be fitted with {num_components} components: at least {needed} are "
            f"needed ({MINIMUM_TOKENS_PER_COMPONENT} for each). Give more scans or fewer components"
        )
    if blocks < 1 or tokens.shape[1] % blocks:
        raise MismatchError(f"tokens of {tokens.shape[1]} channels are not {blocks} blocks of one size")
    shape = (blocks, tokens.shape[1] // blocks)
    for part in parts_of(len(tokens)):
        _as_blocks(tokens[part], shape)
    best: SphericalFit | None = None
    for child in np.random.SeedSequence(seed).generate_state(max(restarts, 1)):
        found = _expectation_maximisation(tokens, shape, num_components, int(child), max_iterations, tolerance)
        if best is None or found.mean_log_likelihood > best.mean_log_likelihood:
            best = found
    assert best is not None
    return replace(best, seed=seed)


def log_normaliser(concentration: np.ndarray, dimension: int) -> np.ndarray:
    """log c_E(kappa), the normaliser of the density c exp(kappa cosine) over the area of the sphere in E dimensions.

    Parameters
    ----------
    concentration : float array
        kappa, not negative; at 0 the sphere is covered evenly.
    dimension : int
        E, at least 2.

    Source
    ------
    Banerjee et al. 2005, eq. 2.2. log I_v(kappa) by scipy's scaled Bessel function; where that underflows (kappa far
    below the order v = E / 2 - 1), by the uniform expansion, Abramowitz & Stegun 9.7.7 with its first correction.
    """
    from scipy.special import gammaln, ive

    kappa = np.asarray(concentration, dtype=np.float64)
    order = dimension / 2.0 - 1.0
    even = gammaln(dimension / 2.0) - np.log(2.0) - 0.5 * dimension * np.log(np.pi)
    safe = np.maximum(kappa, np.finfo(np.float64).tiny)
    scaled = ive(order, safe)
    with np.errstate(divide="ignore"):
        log_bessel = np.log(scaled) + safe
    small = scaled < np.finfo(np.float64).tiny * 1e16
    if small.any() and order > 0:
        z = safe / order
        root = np.sqrt(1.0 + z * z)
        eta = root + np.log(z / (1.0 + root))
        correction = (3.0 / root - 5.0 / root**3) / (24.0 * order)
        uniform = order * eta - 0.5 * np.log(2.0 * np.pi * order * root) + np.log1p(correction)
        log_bessel = np.where(small, uniform, log_bessel)
    found = order * np.log(safe) - 0.5 * dimension * np.log(2.0 * np.pi) - log_bessel
    return np.where(kappa > np.sqrt(np.finfo(np.float64).eps), found, even)


def concentration_of(resultant: np.ndarray, dimension: int) -> np.ndarray:
    """kappa of directions whose mean has this length: r (E - r^2) / (1 - r^2). Banerjee et al. 2005, eq. 4.4."""
    length = np.clip(resultant, 0.0, LARGEST_RESULTANT)
    return length * (dimension - length**2) / (1.0 - length**2)


def _expectation_maximisation(
    tokens: np.ndarray, shape: tuple[int, int], num_components: int, seed: int, max_iterations: int, tolerance: float
) -> SphericalFit:
    """One run of EM from k-means++ centres."""
    from sklearn.cluster import kmeans_plusplus

    centres, _ = kmeans_plusplus(tokens, num_components, random_state=seed)
    directions = _normalised(centres.reshape(num_components, *shape).astype(np.float64))
    # all alike at first, as concentrated as the cohort is about its mean direction
    overall = np.linalg.norm(tokens.mean(axis=0, dtype=np.float64).reshape(shape), axis=-1)
    fit = SphericalFit(
        weights=np.full(num_components, 1.0 / num_components),
        directions=directions,
        concentrations=np.tile(concentration_of(overall, shape[1]), (num_components, 1)),
        mean_log_likelihood=-np.inf,
        num_tokens=len(tokens),
        num_iterations=0,
        converged=False,
        seed=seed,
    )
    for iteration in range(1, max_iterations + 1):
        count, sums, likelihood = np.zeros(num_components), np.zeros((num_components, tokens.shape[1])), 0.0
        for part in parts_of(len(tokens)):
            joint = fit._log_joint(tokens[part])
            evidence = log_sum_exp(joint)
            share = np.exp(joint - evidence[:, None])
            likelihood += float(evidence.sum())
            count += share.sum(axis=0)
            sums += share.T @ tokens[part]
        mean = likelihood / len(tokens)
        # the parameters that were scored are kept when EM stops, so that the likelihood told is theirs
        converged = abs(mean - fit.mean_log_likelihood) < tolerance
        if converged or iteration == max_iterations:
            return replace(fit, mean_log_likelihood=mean, num_iterations=iteration, converged=converged)
        resultants = sums.reshape(num_components, *shape) / np.maximum(count, 1e-12)[:, None, None]
        fit = replace(
            fit,
            weights=np.maximum(count, 1e-12) / np.maximum(count, 1e-12).sum(),
            directions=_normalised(resultants),
            concentrations=concentration_of(np.linalg.norm(resultants, axis=-1), shape[1]),
            mean_log_likelihood=mean,
        )
    raise MismatchError("no iteration of EM was allowed: give at least one")


def _normalised(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors along the last axis; zero stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _as_blocks(tokens: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Tokens (N, B, E), float64; ``MismatchError`` unless each block is a unit vector."""
    check_width(tokens, int(np.prod(shape)))
    check_finite(tokens)
    blocks = tokens.reshape(len(tokens), *shape).astype(np.float64)
    length = np.linalg.norm(blocks, axis=-1)
    wrong = int(np.count_nonzero(np.abs(length - 1.0).max(axis=1, initial=0.0) > LENGTH_TOLERANCE))
    if wrong:
        raise MismatchError(f"{wrong} of {len(tokens)} tokens are not {shape[0]} unit vectors of {shape[1]} channels")
    return blocks

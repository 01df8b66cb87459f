"""Reduction of tokens before a mixture: constant channels out, scaling, principal directions, whitening.

METHOD 1.5 step 5; FEASIBILITY failure mode 7: full covariances are ill-posed on tokens of small effective rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np

from lungseg.errors import MismatchError

CONSTANT_COLUMN_TOLERANCE = 1e-6
"""A column whose standard deviation is below this share of its largest value is constant (float32 rounding)."""
RANK_TOLERANCE = 1e-7
"""Principal directions below this share of the largest variance are rounding and are not whitened (float32)."""
BATCH_TOKENS = 50_000
"""Tokens handled at once: bounds the memory (METHOD 1.1, the authors' batch)."""


@dataclass(frozen=True)
class Reduction:
    """How tokens of D channels become points of d dimensions."""

    num_features: int
    """Channels D of the tokens it was fitted on."""
    kept_columns: np.ndarray
    """int64 (F,): channels used; the others were constant."""
    offset: np.ndarray
    """float64 (F,): subtracted from the kept channels."""
    projection: np.ndarray
    """float64 (F, d): multiplied afterwards (scaling, PCA and whitening in one matrix)."""
    explained_variance_share: float
    """Share of the variance of the (scaled) tokens kept by the PCA; 1 without one."""
    effective_rank: float
    """Of the tokens fitted on."""

    def apply(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (N, D) in the reduced space, float64 (N, d), batch by batch.

        Raises
        ------
        MismatchError
            If D differs from the fit or a value is not finite.
        """
        check_width(tokens, self.num_features)
        reduced = np.empty((tokens.shape[0], self.projection.shape[1]))
        for part in parts_of(len(tokens)):
            check_finite(tokens[part])
            reduced[part] = (tokens[part][:, self.kept_columns].astype(np.float64) - self.offset) @ self.projection
        return reduced

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every field as an array, by name; ``from_arrays`` reads it back exactly."""
        return {item.name: np.ascontiguousarray(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Reduction:
        """From the arrays of ``to_arrays``; ``MismatchError`` if one is missing or their shapes do not agree."""
        missing = [item.name for item in fields(cls) if item.name not in arrays]
        if missing:
            raise MismatchError(f"not a saved mixture: {', '.join(missing)} missing")
        kept, projection = np.asarray(arrays["kept_columns"]), np.asarray(arrays["projection"])
        offset = np.asarray(arrays["offset"])
        if projection.ndim != 2 or not kept.shape == offset.shape == projection.shape[:1]:
            raise MismatchError(f"damaged mixture: a projection of shape {projection.shape} for {kept.size} channels")
        return cls(
            num_features=int(np.asarray(arrays["num_features"]).reshape(-1)[0]),
            kept_columns=kept,
            offset=offset,
            projection=projection,
            explained_variance_share=float(np.asarray(arrays["explained_variance_share"]).reshape(-1)[0]),
            effective_rank=float(np.asarray(arrays["effective_rank"]).reshape(-1)[0]),
        )


def fit_reduction(
    tokens: np.ndarray, *, pca_components: int | None, whiten: bool = True, standardise: bool = False
) -> Reduction:
    """Reduction of a sample of tokens.

    Parameters
    ----------
    tokens : float array, shape (N, D)
        Finite.
    pca_components : int or None
        Principal directions kept (fewer if the tokens have fewer); None keeps the channels as they are.
    whiten : bool
        Give every principal direction unit variance; without a PCA it has no effect.
    standardise : bool
        Give every channel zero mean and unit variance first.

    Raises
    ------
    MismatchError
        If all channels are constant.
    """
    kept = _varying_columns(tokens)
    offset, covariance = _moments(tokens, kept)
    scale = 1.0 / np.sqrt(np.diag(covariance)) if standardise else np.ones(kept.size)
    rotation, share = _principal_directions(covariance * scale[:, None] * scale[None, :], pca_components, whiten)
    return Reduction(
        num_features=tokens.shape[1],
        kept_columns=kept,
        offset=offset,
        projection=scale[:, None] * rotation,
        explained_variance_share=share,
        effective_rank=_entropy_rank(np.linalg.eigvalsh(covariance)),
    )


def effective_rank(tokens: np.ndarray) -> float:
    """Number of directions that tokens really use: exp(entropy of the covariance's eigenvalue shares).

    Parameters
    ----------
    tokens : float array, shape (N, D)
        Finite.

    Returns
    -------
    float
        1 to D; 0 if the tokens do not vary, or there are fewer than two.

    Source
    ------
    Roy & Vetterli, EUSIPCO 2007 (there of singular values; here of variances, so that D equal variances give D).
    """
    if tokens.shape[0] < 2:
        return 0.0
    check_finite(tokens)
    _, covariance = _moments(tokens, np.arange(tokens.shape[1]))
    return _entropy_rank(np.linalg.eigvalsh(covariance))


def parts_of(number: int) -> Iterator[slice]:
    """Batches of so many tokens."""
    for start in range(0, number, BATCH_TOKENS):
        yield slice(start, min(start + BATCH_TOKENS, number))


def log_sum_exp(values: np.ndarray) -> np.ndarray:
    """log(sum(exp)) over the last axis without overflow."""
    top = values.max(axis=-1)
    return top + np.log(np.exp(values - top[..., None]).sum(axis=-1))


def check_finite(tokens: np.ndarray) -> None:
    """Raise ``MismatchError`` if a value is not finite, with the number of such tokens."""
    bad = int(tokens.shape[0] - np.count_nonzero(np.isfinite(tokens).all(axis=1)))
    if bad:
        raise MismatchError(f"{bad} of {tokens.shape[0]} tokens hold values that are not finite")


def check_width(tokens: np.ndarray, num_features: int) -> None:
    """Raise ``MismatchError`` unless the tokens are (N, ``num_features``)."""
    if tokens.ndim != 2 or tokens.shape[1] != num_features:
        raise MismatchError(f"tokens of shape {tokens.shape} given to a mixture of {num_features} features")


def _entropy_rank(eigenvalues: np.ndarray) -> float:
    """Effective rank of a covariance with these eigenvalues."""
    positive = np.clip(eigenvalues, 0.0, None)
    total = float(positive.sum())
    if total <= 0.0:
        return 0.0
    share = positive[positive > 0] / total
    return float(np.exp(-np.sum(share * np.log(share))))


def _varying_columns(tokens: np.ndarray) -> np.ndarray:
    """Indices of the channels that are not constant."""
    low, high = tokens.min(axis=0).astype(np.float64), tokens.max(axis=0).astype(np.float64)
    kept = np.flatnonzero(high - low > CONSTANT_COLUMN_TOLERANCE * np.maximum(np.abs(low), np.abs(high)))
    if not kept.size:
        raise MismatchError(f"all {tokens.shape[1]} features are constant over {tokens.shape[0]} tokens")
    return kept.astype(np.int64)


def _moments(tokens: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,) and covariance (F, F) with divisor N - 1 of the kept channels, float64, batch by batch."""
    mean = tokens[:, kept].mean(axis=0, dtype=np.float64)
    total = np.zeros((kept.size, kept.size))
    for start in range(0, tokens.shape[0], BATCH_TOKENS):
        centred = tokens[start : start + BATCH_TOKENS][:, kept] - mean
        total += centred.T @ centred
    return mean, total / (tokens.shape[0] - 1)


def _principal_directions(covariance: np.ndarray, pca_components: int | None, whiten: bool) -> tuple[np.ndarray, float]:
    """Matrix (F, d) that rotates (and whitens) centred tokens, and the share of variance it keeps."""
    if pca_components is None:
        return np.eye(covariance.shape[0]), 1.0
    variances, vectors = np.linalg.eigh(covariance)
    variances, vectors = variances[::-1], vectors[:, ::-1]
    rank = int(np.count_nonzero(variances > RANK_TOLERANCE * variances[0]))
    number = min(pca_components, rank)
    # The sign of an eigenvector is arbitrary: its largest entry is made positive, so that fits can be compared.
    top = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[top, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    rotation = vectors[:, :number]
    if whiten:
        rotation = rotation / np.sqrt(variances[:number])
    return np.ascontiguousarray(rotation), float(variances[:number].sum() / np.clip(variances, 0.0, None).sum())

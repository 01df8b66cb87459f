"""What every clustering of tokens can do, whatever it is made of, and the one that needs no fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lungseg.errors import MismatchError
from lungseg.segmentation.density import TokenStatistics
from lungseg.tissue import MIXTURE_TISSUES, Tissue


class Clustering(Protocol):
    """K components over tokens: a value object of plain arrays, applied to any scan without refitting.

    The kinds: ``gmm`` (`mixture`), ``kmeans`` (`baselines`), ``anchored`` (`anchored`), ``vmf`` (`spherical`) and
    ``rules`` (:class:`TissueVotes`).
    """

    @property
    def kind(self) -> str:
        """Name of the kind, as ``clusters.json`` says it."""

    @property
    def num_components(self) -> int:
        """Number of components K."""

    def posterior(self, tokens: np.ndarray, statistics: TokenStatistics | None = None) -> np.ndarray:
        """Probability of each component given each token, float32 (N, K); tokens (N, D).

        ``statistics`` are those of the same tokens; only the kinds that look at HU (``anchored``) need them.
        """

    def reorder(self, order: Sequence[int]) -> Clustering:
        """The same clustering with ``order[i]`` as component i."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name; ``from_arrays`` of the class reads it back exactly."""


@dataclass(frozen=True)
class TissueVotes:
    """Tokens that say their tissue themselves: component k is a tissue, and a token is its posterior already.

    Methods without a fit (naming rules, thresholds, merged attention maps) give such tokens.
    """

    tissues: tuple[Tissue, ...] = MIXTURE_TISSUES
    """Tissue of each component, by construction."""

    kind = "rules"

    @property
    def num_components(self) -> int:
        """Number of tissues K."""
        return len(self.tissues)

    def posterior(self, tokens: np.ndarray, statistics: TokenStatistics | None = None) -> np.ndarray:
        """The tokens (N, K) themselves, float32; a token without any vote counts for all alike.

        Raises
        ------
        MismatchError
            If they are not shares of K tissues.
        """
        if tokens.ndim != 2 or tokens.shape[1] != len(self.tissues):
            raise MismatchError(f"tokens of shape {tokens.shape} are not shares of {len(self.tissues)} tissues")
        shares = tokens.astype(np.float32)
        total = shares.sum(axis=1, keepdims=True)
        return np.where(total > 0, shares / np.where(total > 0, total, 1), np.float32(1 / len(self.tissues)))

    def reorder(self, order: Sequence[int]) -> TissueVotes:
        """Itself: its components are the channels of the tokens and keep their places.

        Raises
        ------
        MismatchError
            If another order is asked for.
        """
        if list(order) != list(range(len(self.tissues))):
            raise MismatchError("the components of a clustering by rules are tissues and keep their order")
        return self

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Ids of the tissues."""
        return {"tissues": np.asarray(self.tissues, dtype=np.uint8)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TissueVotes:
        """From ``to_arrays``; ``MismatchError`` if they are something else."""
        try:
            return cls(tuple(Tissue(int(value)) for value in arrays["tissues"]))
        except (KeyError, ValueError) as error:
            raise MismatchError(f"not a saved clustering by rules: {error!r}") from error

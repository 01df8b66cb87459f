"""Collapse of the student's embeddings: how it is measured, the term against it, and the alarm.

A contrast can be satisfied by embeddings that fill few directions, and a trained teacher head by one (METHOD 1.8, flaw
4). FEASIBILITY found 128-d embeddings of effective rank 3: too few for a mixture of five tissues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

COSINE_ALARM = 0.9
"""Mean pairwise cosine from which all tokens count as the same."""
RANK_ALARM = 3.0
"""Effective rank (FEASIBILITY, failure 7) at or below which a mixture has nothing to work with."""
ALARM_AFTER = 3
"""Looks in a row before the alarm: one bad batch is no collapse."""


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, or in float64 if it is so already."""
    return x if x.dtype == torch.float64 else x.float()


def mean_pairwise_cosine(z: torch.Tensor) -> torch.Tensor:
    """Mean cosine over the pairs of different rows of unit vectors (N, E); 0 for fewer than two rows."""
    n = z.shape[0]
    if n < 2:
        return z.new_zeros(())
    return (at_least_fp32(z).sum(0).square().sum() - n) / (n * (n - 1))


@torch.no_grad()
def effective_rank(z: torch.Tensor) -> float:
    """Number of directions that unit vectors (N, E) fill: exp of the entropy of their spectrum (Roy & Vetterli 2007).

    Of the second moments, not the covariance: vectors that all point one way, with a little noise, have rank 1. NaN for
    fewer than two rows.
    """
    if len(z) < 2:
        return math.nan
    z = z.double().cpu()
    share = torch.linalg.eigvalsh(z.T @ z if len(z) >= z.shape[1] else z @ z.T).clamp(min=0)
    share = share / share.sum()
    return math.exp(float(-(share * share.clamp(min=1e-300).log()).sum()))


def rank_penalty(z: torch.Tensor, *, floor: float) -> torch.Tensor:
    """Shortfall of the rank of unit vectors (N, E) below ``floor``: log(floor / rank), 0 above the floor.

    The rank here is the participation ratio of the second moments, 1 / mean squared cosine of different rows. It needs
    no eigenvalues, whose gradients are unstable where they meet, and never exceeds the effective rank (Rényi entropy of
    order 2 against Shannon's), so a floor for it is one for both. A floor and not a variance-covariance term (Bardes et
    al. 2022): the 34 features do not fill 128 dimensions, and a term that goes on asking for that works against the
    contrast; this one is silent while the embeddings are healthy. Few rows cannot show a high rank: the floor is at
    most half their number.
    """
    n = z.shape[0]
    if n < 4:
        return z.sum() * 0.0  # still part of the graph
    with torch.autocast(z.device.type, enabled=False):
        cosine = at_least_fp32(z) @ at_least_fp32(z).T
    squared = (cosine.square().sum() - cosine.diagonal().square().sum()) / (n * (n - 1))
    return (squared.clamp(min=1e-12).log() + math.log(min(floor, n / 2))).clamp(min=0)


class CollapseMonitor:
    """Says so, once, when embeddings have been alike for some looks in a row; and again after they have recovered."""

    def __init__(self) -> None:
        self._bad = 0

    def look(self, values: Mapping[str, float | None]) -> str:
        """Words of alarm, else ''. ``values`` as logged; lines without ``effective_rank`` say nothing."""
        rank = values.get("effective_rank")
        if rank is None or math.isnan(rank):
            return ""
        student, teacher = (float(values.get(f"{who}_cosine") or 0.0) for who in ("student", "teacher"))
        signs = [f"effective rank of the student {rank:.1f}"] if rank <= RANK_ALARM else []
        for who, cosine in (("student", student), ("teacher", teacher)):
            signs += [f"mean cosine of the {who}'s embeddings {cosine:.2f}"] if cosine >= COSINE_ALARM else []
        self._bad = self._bad + 1 if signs else 0
        if self._bad != ALARM_AFTER:
            return ""
        return (
            f"the embeddings collapse ({', '.join(signs)}): tissues will not be told apart; raise --collapse-weight or "
            "--regression-weight, or lower --distill-weight, in a new run"
        )

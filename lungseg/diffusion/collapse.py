"""Collapse of the student's embeddings: how it is measured, the term against it, and the alarm.

A contrast can be satisfied by embeddings that fill few directions, and a trained teacher head by one (METHOD 1.8, flaw
4). FEASIBILITY found 128-d embeddings of effective rank 3: too few for a mixture of five tissues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lungseg.config.train_ddpm import TrainConfig

COSINE_ALARM = 0.9
"""Mean pairwise cosine from which all tokens count as the same."""
RANK_ALARM = 1.5
"""Effective rank of a batch at or below which all tokens lie on a line. The demo's short run ends near 2, on phantoms;
FEASIBILITY (failure 7) found 3 poor already."""
GRACE_SHARE = 0.1
"""Share of a run the student is given before it is looked at."""
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


def rank_penalty(z: torch.Tensor, *, floor: float) -> torch.Tensor:
    """Shortfall of the rank of unit vectors (N, E) below ``floor``: log(floor / rank), 0 above the floor.

    The rank here is the participation ratio of the covariance, (sum of eigenvalues)^2 / sum of squares. It needs no
    eigenvalues, whose gradients are unstable where they meet, and never exceeds the effective rank (Rényi entropy of
    order 2 against Shannon's), so a floor for it is one for both. Of the covariance, as the clustering's principal
    components: a floor for the second moments was met by turning all vectors away from their mean, on the same line.

    A floor and not a variance-covariance term (Bardes et al. 2022): the 34 features do not fill 128 dimensions, and a
    term that goes on asking for that works against the contrast; this one is silent above the floor. Few rows cannot
    show a high rank: the floor is at most half their number.
    """
    n = z.shape[0]
    if n < 4:
        return z.sum() * 0.0  # still part of the graph
    with torch.autocast(z.device.type, enabled=False):
        centred = at_least_fp32(z) - at_least_fp32(z).mean(0)
        products = centred @ centred.T if n < z.shape[1] else centred.T @ centred
        rank = products.diagonal().sum().square() / products.square().sum().clamp(min=1e-20)
    return math.log(min(floor, n / 2)) - rank.clamp(min=1.0, max=min(floor, n / 2)).log()


class CollapseMonitor:
    """Says so, once, when embeddings have been alike for some looks in a row; and again after they have recovered."""

    def __init__(self, *, first_image: int) -> None:
        """Lines before ``first_image`` are passed over: a network that has learnt nothing makes all tokens alike."""
        self._first_image = first_image
        self._bad = 0

    @classmethod
    def of_run(cls, config: TrainConfig) -> CollapseMonitor:
        """A monitor that waits until the distillation has been fully on for a tenth of the run."""
        return cls(first_image=round((config.distill_full + GRACE_SHARE) * config.total_images))

    def look(self, line: Mapping[str, float | None]) -> str:
        """Words of alarm, else ''. A line as logged, with `images`; lines without `effective_rank` say nothing."""
        rank = line.get("effective_rank")
        if rank is None or (line["images"] or 0) < self._first_image:
            return ""
        student, teacher = (float(line.get(f"{who}_cosine") or 0.0) for who in ("student", "teacher"))
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

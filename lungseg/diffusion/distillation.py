"""Radiomic distillation: two heads, the contrast between them, and its warm-up (METHOD 1.1).

The teacher is the standardised 34-descriptor r of a window; the student is the bottleneck token at its centre. Which
pairs are positive is decided on r itself, which is fixed, never on a learned embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lungseg.diffusion.collapse import at_least_fp32, mean_pairwise_cosine

HIDDEN_TEACHER = 128
"""Hidden width of the teacher's projection (authors' code)."""


def _norm(kind: str, width: int) -> nn.Module:
    return nn.LayerNorm(width) if kind == "layer" else nn.BatchNorm1d(width)


class TeacherHead(nn.Module):
    """z^r = norm(W2 relu(norm(W1 r))): (M, 34) -> unit vectors (M, E). METHOD 1.1 (1)."""

    def __init__(self, num_features: int, embedding: int, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, HIDDEN_TEACHER),
            _norm(norm, HIDDEN_TEACHER),
            nn.ReLU(),
            nn.Linear(HIDDEN_TEACHER, embedding),
        )

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.layers(r), dim=-1)


class StudentHead(nn.Module):
    """Projection of bottleneck tokens: (M, C) -> unit vectors (M, E) and predicted descriptors (M, 34).

    METHOD 1.1 (2); a 1x1x1 convolution is a linear layer on tokens. The regression of r from the hidden layer keeps
    the embedding from forgetting what the contrast does not ask for (FEASIBILITY).
    """

    def __init__(self, channels: int, embedding: int, num_features: int, norm: str) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(channels, channels, bias=False), _norm(norm, channels), nn.ReLU())
        self.project = nn.Linear(channels, embedding, bias=False)
        self.regress = nn.Linear(channels, num_features)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.hidden(tokens)
        return F.normalize(self.project(hidden), dim=-1), self.regress(hidden)


def warmup_weight(progress: float, *, start: float, full: float, weight: float) -> float:
    """Weight of the contrast at a share ``progress`` of the run: 0, then linear, then ``weight``. METHOD 1.1 (4)."""
    if progress < start:
        return 0.0
    if progress >= full:
        return weight
    return weight * (progress - start) / (full - start)


@dataclass(frozen=True)
class ContrastResult:
    """Loss of one batch and what tells whether it is healthy."""

    loss: torch.Tensor
    mean_positives: torch.Tensor
    """Mean |P(i)|."""
    student_cosine: torch.Tensor
    """Mean pairwise cosine of the student's tokens; near 1 means collapse."""
    teacher_cosine: torch.Tensor


def contrastive_loss(
    z_student: torch.Tensor,
    z_teacher: torch.Tensor,
    similarity: torch.Tensor,
    own: torch.Tensor,
    valid: torch.Tensor,
    *,
    temperature: float,
    contrast: str = "grey-zone",
    positive: float = 0.7,
    negative: float = 0.5,
) -> ContrastResult:
    """Multi-positive InfoNCE with the sum outside the logarithm (METHOD 1.1 (3); Khosla et al. 2020).

    Parameters
    ----------
    z_student : tensor (M, E)
        Unit vectors of the anchors.
    z_teacher : tensor (A, E)
        Unit vectors of the teacher, over all devices; A >= M.
    similarity : tensor (M, A)
        Cosine of the standardised raw descriptors; for `soft` the weights of :func:`soft_positives`.
    own : int64 tensor (M,)
        Column of each anchor's own teacher.
    valid : bool tensor (A,)
        Columns that carry a valid descriptor; an anchor whose own column is invalid does not count.
    contrast : str
        `grey-zone`: positives above ``positive``, negatives below ``negative``, the rest in neither sum;
        `threshold`: everything not above ``positive`` is negative (the paper's sentence);
        `diagonal`: only the own pair is positive (the authors' code);
        `soft`: each pair is positive to the degree ``similarity`` says, 1 for the own one, and all pairs stand in the
        denominator (y-aware InfoNCE, Dufumier et al. 2021: METHOD 7.4).

    Returns
    -------
    ContrastResult
        Loss 0 when no anchor is valid.
    """
    is_own = F.one_hot(own, num_classes=similarity.shape[1]).bool()
    if contrast == "soft":
        used, weights = torch.ones_like(is_own), similarity.masked_fill(is_own, 1.0)
    elif contrast == "diagonal":
        used, weights = torch.ones_like(is_own), is_own.to(similarity.dtype)
    else:
        positives = (similarity > positive) | is_own
        used = positives | (similarity < negative) if contrast == "grey-zone" else torch.ones_like(is_own)
        weights = positives.to(similarity.dtype)
    used, weights = used & valid, weights * valid
    anchors = valid[own]
    logits = _dot_products(z_student, z_teacher) / temperature
    denominator = torch.logsumexp(logits.masked_fill(~used, float("-inf")), dim=1)
    count = weights.sum(1)
    # the own pair weighs 1; an anchor without it does not count
    mean_positive = (logits * weights).sum(1) / count.clamp(min=1)
    per_anchor = torch.where(anchors, denominator - mean_positive, torch.zeros_like(mean_positive))
    total = anchors.sum().clamp(min=1)
    with torch.no_grad():
        z_valid, r_valid = z_student[anchors], z_teacher[valid]
        statistics: dict[str, Any] = {
            "mean_positives": (count * anchors).sum() / total,
            "student_cosine": mean_pairwise_cosine(z_valid),
            "teacher_cosine": mean_pairwise_cosine(r_valid),
        }
    return ContrastResult(per_anchor.sum() / total, **statistics)


def descriptor_similarity(r_rows: torch.Tensor, r_columns: torch.Tensor) -> torch.Tensor:
    """Cosine (M, A) of standardised descriptors; NaN rows count as zero vectors."""
    a = F.normalize(torch.nan_to_num(at_least_fp32(r_rows)), dim=-1)
    b = F.normalize(torch.nan_to_num(at_least_fp32(r_columns)), dim=-1)
    return _dot_products(a, b)


def soft_positives(r_rows: torch.Tensor, r_columns: torch.Tensor, *, sigma: float) -> torch.Tensor:
    """Weights (M, A) exp(-|r_i - r_j|^2 / (2 sigma^2)) of pairs of standardised descriptors (METHOD 7.4)."""
    a, b = (torch.nan_to_num(at_least_fp32(r)) for r in (r_rows, r_columns))
    squared = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * _dot_products(a, b)).clamp(min=0)
    return torch.exp(-squared / (2 * sigma**2))


def _dot_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` in float32 or better even under autocast: bfloat16 moves pairs over the thresholds."""
    with torch.autocast(a.device.type, enabled=False):
        return at_least_fp32(a) @ at_least_fp32(b).T


class DescriptorQueue:
    """The standardised descriptors of the tokens taught last, as further columns of the contrast (METHOD 7.4).

    Only r is kept, which never changes; its embedding is computed anew by today's teacher head at every step, so that
    no column is stale and no second, slowly moving head is needed (as He et al. 2020 do for learned keys).
    """

    def __init__(self, size: int, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self._rows = torch.zeros(size, num_features, device=device)
        self._pushed = 0

    @property
    def rows(self) -> torch.Tensor:
        """Descriptors kept, float32 (min(size, number pushed), F), in no particular order."""
        return self._rows[: min(self._pushed, len(self._rows))]

    def push(self, r: torch.Tensor) -> None:
        """Keep ``r`` (N, F), in order of the images; the oldest rows go."""
        size = len(self._rows)
        r = r[-size:].to(self._rows) if size else r[:0].to(self._rows)
        place = (self._pushed + torch.arange(len(r), device=r.device)) % max(size, 1)
        self._rows[place] = r
        # counted modulo the size once full, so that the count stays small
        total = self._pushed + len(r)
        self._pushed = total if total < size else size + total % max(size, 1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"rows": self._rows, "pushed": self._pushed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of a queue of the same size."""
        self._rows.copy_(state["rows"])
        self._pushed = int(state["pushed"])

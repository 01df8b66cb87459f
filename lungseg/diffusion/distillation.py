"""Radiomic distillation: two heads, the contrast between them, and its warm-up (METHOD 1.1).

The teacher is the standardised 34-descriptor r of a window; the student is the bottleneck token at its centre. Which
pairs are positive is decided on r itself, which is fixed, never on a learned embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

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
        Cosine of the standardised raw descriptors.
    own : int64 tensor (M,)
        Column of each anchor's own teacher.
    valid : bool tensor (A,)
        Columns that carry a valid descriptor; an anchor whose own column is invalid does not count.
    contrast : str
        `grey-zone`: positives above ``positive``, negatives below ``negative``, the rest in neither sum;
        `threshold`: everything not above ``positive`` is negative (the paper's sentence);
        `diagonal`: only the own pair is positive (the authors' code).

    Returns
    -------
    ContrastResult
        Loss 0 when no anchor is valid.
    """
    is_own = F.one_hot(own, num_classes=similarity.shape[1]).bool()
    if contrast == "diagonal":
        positives, negatives = is_own, ~is_own
    else:
        positives = (similarity > positive) | is_own
        negatives = ~positives if contrast == "threshold" else (similarity < negative) & ~positives
    positives, negatives = positives & valid, negatives & valid
    anchors = valid[own]
    logits = _dot_products(z_student, z_teacher) / temperature
    denominator = torch.logsumexp(logits.masked_fill(~(positives | negatives), float("-inf")), dim=1)
    count = positives.sum(1)
    mean_positive = logits.masked_fill(~positives, 0.0).sum(1) / count.clamp(min=1)
    per_anchor = torch.where(anchors, denominator - mean_positive, torch.zeros_like(mean_positive))
    total = anchors.sum().clamp(min=1)
    with torch.no_grad():
        z_valid, r_valid = z_student[anchors], z_teacher[valid]
        statistics: dict[str, Any] = {
            "mean_positives": (count * anchors).sum() / total,
            "student_cosine": _mean_pairwise_cosine(z_valid),
            "teacher_cosine": _mean_pairwise_cosine(r_valid),
        }
    return ContrastResult(per_anchor.sum() / total, **statistics)


def _mean_pairwise_cosine(z: torch.Tensor) -> torch.Tensor:
    """Mean cosine over the pairs of different rows, from the norm of their sum; 0 for fewer than two rows."""
    n = z.shape[0]
    if n < 2:
        return z.new_zeros(())
    return (z.float().sum(0).square().sum() - n) / (n * (n - 1))


def descriptor_similarity(r_rows: torch.Tensor, r_columns: torch.Tensor) -> torch.Tensor:
    """Cosine (M, A) of standardised descriptors; NaN rows count as zero vectors."""
    a = F.normalize(torch.nan_to_num(r_rows.float()), dim=-1)
    b = F.normalize(torch.nan_to_num(r_columns.float()), dim=-1)
    return _dot_products(a, b)


def _dot_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` in float32 even under autocast: bfloat16 moves pairs over the thresholds."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, with the gradient summed back to the rank that made them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        rows = gradient.shape[0] // dist.get_world_size()
        return gradient[dist.get_rank() * rows :][:rows]


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order (equal counts), differentiable; ``x`` itself in a single process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    gathered: torch.Tensor = _GatherRows.apply(x)
    return gathered

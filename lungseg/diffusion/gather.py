"""Rows of all training processes as one: what a contrast over a batch needs when the batch is spread over devices."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """Number of this training process, 0 where there is one only."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, with the gradient summed back to the rank that made them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        rows = gradient.shape[0] // dist.get_world_size()
        return gradient[dist.get_rank() * rows :][:rows]


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order (equal counts), differentiable; ``x`` itself in a single process."""
    if world_size() == 1:
        return x
    gathered: torch.Tensor = _GatherRows.apply(x)
    return gathered


def in_image_order(rows: torch.Tensor, *, rows_an_image: int) -> torch.Tensor:
    """Gathered rows (in rank order) as one process would have them: process r holds images r, r + size, ..."""
    size = world_size()
    if size == 1:
        return rows
    by_process = rows.view(size, -1, rows_an_image, *rows.shape[1:])
    return by_process.transpose(0, 1).reshape(rows.shape)

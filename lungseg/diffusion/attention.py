"""Self-attention over the tokens of a feature map, or within fixed windows of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lungseg.diffusion.layers import make_norm, zero_init
from lungseg.errors import MismatchError


class Attention(nn.Module):
    """Self-attention with one head, residual.

    Parameters
    ----------
    channels : int
    norm : str
        See :func:`make_norm`.
    window : tuple of int, optional
        Tokens attend to those of their own window only: windows of this many tokens along each axis, side by side
        from the first token on; the last ones of an axis may be cut short. A map of at most one window is attended as
        a whole, so a patch of one window gives what it gives without windows. None: the whole map is one window.
    """

    def __init__(self, channels: int, norm: str, window: Sequence[int] | None = None) -> None:
        super().__init__()
        self.norm = make_norm(norm, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.project = zero_init(nn.Conv1d(channels, channels, 1))
        self.window = tuple(window) if window is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x).movedim(1, -1)  # (N, *S, C)
        sizes = h.shape[1:-1]
        if self.window is None or all(n <= w for n, w in zip(sizes, self.window, strict=True)):
            mixed = self._attend(h.flatten(1, -2)).view(h.shape)
        else:
            mixed = torch.empty_like(h)
            for part, shape in _equal_windows(sizes, self.window):
                region = h[:, *part]
                mixed[:, *part] = _join(self._attend(_partition(region, shape)), region.shape[1:-1], shape)
        return x + mixed.movedim(-1, 1)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """How much each token of a map attends to each: rows sum to 1.

        Parameters
        ----------
        x : tensor (N, C, *S)
            What :meth:`forward` is given; at most one window along each axis.

        Returns
        -------
        float32 tensor (N, L, L)
            L the product of S, row i of token i.

        Raises
        ------
        MismatchError
            If the map is larger than a window.
        """
        if self.window is not None and any(n > w for n, w in zip(x.shape[2:], self.window, strict=True)):
            raise MismatchError(f"a map of {tuple(x.shape[2:])} tokens is larger than attention windows {self.window}")
        tokens = self.norm(x).flatten(2).movedim(1, -1)  # (N, L, C)
        q, k, _ = F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2)).float() / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attention among the tokens (B, L, C) of each row of the batch."""
        q, k, v = F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return F.linear(mixed, self.project.weight.flatten(1), self.project.bias)  # type: ignore[arg-type, operator]


def _equal_windows(sizes: Sequence[int], window: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
    """Regions of a map whose windows all have one shape, and that shape: the whole windows, and those cut short."""
    axes = []
    for n, w in zip(sizes, window, strict=True):
        whole = n // w * w
        axes.append([(slice(a, b), min(w, b - a)) for a, b in ((0, whole), (whole, n)) if b > a])
    for choice in itertools.product(*axes):
        yield tuple(part for part, _ in choice), tuple(edge for _, edge in choice)


def _partition(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Windows of ``shape`` of a map (N, *S, C), one after the other: (N windows, L, C)."""
    dims = len(shape)
    counts = [n // w for n, w in zip(x.shape[1:-1], shape, strict=True)]
    split = x.reshape(x.shape[0], *[part for pair in zip(counts, shape, strict=True) for part in pair], x.shape[-1])
    order = [1 + 2 * i for i in range(dims)] + [2 + 2 * i for i in range(dims)]
    return split.permute(0, *order, 1 + 2 * dims).reshape(-1, math.prod(shape), x.shape[-1])


def _join(windows: torch.Tensor, sizes: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The map (N, *sizes, C) that :func:`_partition` cut."""
    dims = len(shape)
    counts = [n // w for n, w in zip(sizes, shape, strict=True)]
    split = windows.view(-1, *counts, *shape, windows.shape[-1])
    order = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
    return split.permute(0, *order, 1 + 2 * dims).reshape(-1, *sizes, windows.shape[-1])

"""The student: a 3-D U-Net of the guided-diffusion family (METHOD 1.2), whose encoder can be run alone.

Input (N, 2, D, H, W): x_t and the lung mask in {0, 1}; output (N, 1, D, H, W). The encoder plus the middle block
gives the bottleneck, one token per ``token_size``^3 voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MAX_PERIOD = 1000.0
"""Longest period of the time embedding (authors' code)."""


@dataclass(frozen=True)
class UNetSpec:
    """Shape of the network."""

    base_width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    encoder_blocks: int = 1
    stem: int = 1
    norm: str = "channel"
    in_channels: int = 2

    @property
    def token_size(self) -> int:
        """Voxels along one edge of a bottleneck token."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    @property
    def token_channels(self) -> int:
        """Channels of the bottleneck."""
        return self.base_width * self.multipliers[-1]


class ChannelNorm(nn.Module):
    """Normalisation over the channels of each voxel (root mean square, Zhang & Sennrich 2019).

    Unlike group norm it does not look at other voxels, so a feature does not depend on the size of the patch around
    it (FEASIBILITY, failure 6).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + 1e-6).to(x.dtype)
        return x * scale * self.weight.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def make_norm(kind: str, channels: int) -> nn.Module:
    """`channel`: :class:`ChannelNorm`; `group`: 32 groups as published."""
    return ChannelNorm(channels) if kind == "channel" else nn.GroupNorm(32, channels)


class ResidualBlock(nn.Module):
    """norm-SiLU-conv, + time, norm-SiLU-conv(zero), + skip."""

    def __init__(self, width_in: int, width_out: int, width_time: int, norm: str) -> None:
        super().__init__()
        self.norm_in = make_norm(norm, width_in)
        self.conv_in = nn.Conv3d(width_in, width_out, 3, padding=1)
        self.time = nn.Linear(width_time, width_out)
        self.norm_out = make_norm(norm, width_out)
        self.conv_out = _zero(nn.Conv3d(width_out, width_out, 3, padding=1))
        self.skip = nn.Conv3d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.time(F.silu(time))[:, :, None, None, None]
        h = self.conv_out(F.silu(self.norm_out(h)))
        skip: torch.Tensor = self.skip(x)
        return skip + h


class Attention(nn.Module):
    """Self-attention with one head over all voxels of a feature map, residual."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = make_norm(norm, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.project = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.qkv(self.norm(x).flatten(2))  # (N, 3C, L)
        q, k, v = h.transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)  # (N, 1, L, C) each
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.project(h).view_as(x)


class Upsample(nn.Module):
    """Trilinear doubling, then a 3^3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="trilinear"))
        return result


class UNet(nn.Module):
    """The network of ``spec``; ``encode`` stops at the bottleneck."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = [spec.base_width * m for m in spec.multipliers]
        width_time = 4 * spec.base_width
        self.time = nn.Sequential(nn.Linear(spec.base_width, width_time), nn.SiLU(), nn.Linear(width_time, width_time))
        folded = spec.stem**3
        self.conv_in = nn.Conv3d(spec.in_channels * folded, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList()
        skips = [widths[0]]
        width = widths[0]
        for level, target in enumerate(widths):
            for _ in range(spec.encoder_blocks):
                self.encoder.append(ResidualBlock(width, target, width_time, spec.norm))
                width = target
                skips.append(width)
            if level < len(widths) - 1:
                self.encoder.append(nn.Conv3d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(width, width, width_time, spec.norm),
                Attention(width, spec.norm),
                ResidualBlock(width, width, width_time, spec.norm),
            ]
        )
        self.decoder = nn.ModuleList()
        for level, target in reversed(list(enumerate(widths))):
            # One block more than in the encoder: each takes one skip, those of the blocks and of the downsampling.
            for _ in range(spec.encoder_blocks + 1):
                self.decoder.append(ResidualBlock(width + skips.pop(), target, width_time, spec.norm))
                width = target
            if level:
                self.decoder.append(Upsample(width))
        self.norm_out = make_norm(spec.norm, width)
        self.conv_out = _zero(nn.Conv3d(width, folded, 3, padding=1))

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        """Sinusoidal embedding of ``t`` (N,), then two linear layers: (N, 4 base)."""
        half = self.spec.base_width // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
        result: torch.Tensor = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return result

    def _encode(self, x: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        h = self.conv_in(fold(x, self.spec.stem))
        skips = [h]
        for layer in self.encoder:
            h = layer(h, time) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time) if isinstance(layer, ResidualBlock) else layer(h)
        return h, skips

    def encode(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Bottleneck (N, C, D/p, H/p, W/p) of inputs (N, 2, D, H, W) at times (N,): 17 % of a full pass."""
        return self._encode(x, self.embed_time(t))[0]

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction (N, 1, D, H, W) and bottleneck (N, C, d, h, w)."""
        time = self.embed_time(t)
        bottleneck, skips = self._encode(x, time)
        h = bottleneck
        for layer in self.decoder:
            h = layer(torch.cat([h, skips.pop()], dim=1), time) if isinstance(layer, ResidualBlock) else layer(h)
        return unfold(self.conv_out(F.silu(self.norm_out(h))), self.spec.stem), bottleneck


def fold(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Space to depth: (N, C, D, H, W) -> (N, C f^3, D/f, H/f, W/f)."""
    if factor == 1:
        return x
    n, c, d, h, w = x.shape
    x = x.view(n, c, d // factor, factor, h // factor, factor, w // factor, factor)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, c * factor**3, d // factor, h // factor, w // factor)


def unfold(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Depth to space: the inverse of :func:`fold`."""
    if factor == 1:
        return x
    n, c, d, h, w = x.shape
    x = x.view(n, c // factor**3, factor, factor, factor, d, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, c // factor**3, d * factor, h * factor, w * factor)


def _zero(layer: nn.Conv1d | nn.Conv3d) -> nn.Conv1d | nn.Conv3d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

"""Parts of the U-Net: norms, convolutions and residual blocks, in 2-D and 3-D (METHOD 1.2).

Feature maps are (N, C, *space) with the channels last in memory: convolutions need no reordering, and a 1x1x1
convolution or a norm over channels is a row operation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

CHANNEL_NORM_EPS = 1e-6
"""Added to the mean square of a voxel's channels."""
NUM_GROUPS = 32
"""Groups of the published group norm."""
_INTERPOLATION = {2: "bilinear", 3: "trilinear"}
_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_misjudged(x: torch.Tensor) -> bool:
    """Whether torch would take its slow convolution on a CPU: it thinks a batch of one is small work.

    ``ConvParams::use_mkldnn`` (torch 2.8 to 2.13) multiplies four of the five sizes of a volume, and takes oneDNN, four
    times faster, from 20,480 on only.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # the function is not documented: a torch without it is slower, no worse
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch, "mkldnn_convolution")
    return plain and len(x) == 1 and has_onednn and not torch.compiler.is_compiling()


class _Convolution2d(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _convolve(self, x) if _is_misjudged(x) else super().forward(x)


class _Convolution3d(nn.Conv3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _convolve(self, x) if _is_misjudged(x) else super().forward(x)


def _convolve(layer: nn.Conv2d | nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.mkldnn_convolution(
        x, layer.weight, layer.bias, [n // 2 for n in layer.kernel_size], layer.stride, layer.dilation, layer.groups
    )
    return result


_CONVOLUTIONS: dict[int, Any] = {2: _Convolution2d, 3: _Convolution3d}


def convolution(dims: int, width_in: int, width_out: int, kernel: int = 3, *, stride: int = 1) -> nn.Module:
    """Convolution over ``dims`` axes that keeps the size at stride 1; zeros beyond the border."""
    layer: nn.Module = _CONVOLUTIONS[dims](width_in, width_out, kernel, stride=stride, padding=kernel // 2)
    return layer


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with all its parameters zero: the branch it ends starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same values with the channels last in memory; no copy if they are already."""
    return x.contiguous(memory_format=_MEMORY_FORMATS[x.ndim])


def pointwise(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A convolution with kernel size 1, as the matrix product it is: several times faster than as a convolution."""
    rows: torch.Tensor = F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias)  # type: ignore[arg-type, operator]
    return rows.movedim(-1, 1)


class _NormSilu(torch.autograd.Function):
    """silu(x / rms(x) * weight) over the last axis, in few passes over memory and with one tensor kept.

    Eager torch takes some twenty passes forward and back, and keeps four tensors. The gradient of the norm is that of
    a layer norm with mean 0, for which torch has one fused kernel, but for the term of the mean: it is added back.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(CHANNEL_NORM_EPS).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return F.silu((x * scale).mul_(weight), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, scale = ctx.saved_tensors
        activated = (x * scale).mul_(weight)  # again: keeping it would double the memory
        gradient = torch.ops.aten.silu_backward.grad_input(gradients[0], activated, grad_input=activated)
        mean = torch.zeros_like(scale)
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, [x.shape[-1]], mean, scale, weight, None, [True, True, False]
        )
        centred = (gradient @ weight).unsqueeze(-1).mul_(scale).div_(x.shape[-1])
        return grad_x.add_(centred), grad_weight


class ChannelNorm(nn.Module):
    """Normalisation over the channels of each voxel (root mean square, Zhang & Sennrich 2019).

    Unlike group norm it does not look at other voxels, so a feature does not depend on the size of the patch around
    it (FEASIBILITY, failure 6).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight.to(x.dtype), CHANNEL_NORM_EPS)
        return rows.movedim(-1, 1)


def make_norm(kind: str, channels: int) -> nn.Module:
    """`channel`: :class:`ChannelNorm`; `group`: 32 groups as published."""
    return ChannelNorm(channels) if kind == "channel" else nn.GroupNorm(NUM_GROUPS, channels)


def norm_silu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``silu(norm(x))``. On a CPU the channel norm takes the fused path; elsewhere torch has fused kernels itself."""
    whole = x.dtype in (torch.float32, torch.float64)
    if isinstance(norm, ChannelNorm) and whole and x.device.type == "cpu" and not torch.compiler.is_compiling():
        fused: torch.Tensor = _NormSilu.apply(x.movedim(1, -1), norm.weight)
        return fused.movedim(-1, 1)
    return F.silu(norm(x))


class ResidualBlock(nn.Module):
    """norm-SiLU-conv, + time, norm-SiLU-conv(zero), + skip."""

    def __init__(self, width_in: int, width_out: int, width_time: int, norm: str, *, dims: int = 3) -> None:
        super().__init__()
        self.norm_in = make_norm(norm, width_in)
        self.conv_in = convolution(dims, width_in, width_out)
        self.time = nn.Linear(width_time, width_out)
        self.norm_out = make_norm(norm, width_out)
        self.conv_out = zero_init(convolution(dims, width_out, width_out))
        self.skip = convolution(dims, width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.conv_in(norm_silu(self.norm_in, x))
        shift = self.time(F.silu(time))
        h.add_(shift.view(*shift.shape, *[1] * (x.ndim - 2)))  # in place: a convolution does not keep its output
        h = self.conv_out(norm_silu(self.norm_out, h))
        return h.add_(x if isinstance(self.skip, nn.Identity) else pointwise(x, self.skip))


class Upsample(nn.Module):
    """Linear doubling, then a convolution of size 3."""

    def __init__(self, channels: int, *, dims: int = 3) -> None:
        super().__init__()
        self.conv = convolution(dims, channels, channels)
        self._mode = _INTERPOLATION[dims]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(channels_last(F.interpolate(x, scale_factor=2.0, mode=self._mode)))
        return result


def fold(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Space to depth: (N, C, D, H, W) -> (N, C f^3, D/f, H/f, W/f); the same in 2-D."""
    if factor == 1:
        return x
    n, c, *sizes = x.shape
    dims = len(sizes)
    x = x.reshape(n, c, *[part for size in sizes for part in (size // factor, factor)])
    coarse, fine = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, 1, *fine, *coarse).reshape(n, c * factor**dims, *[size // factor for size in sizes])


def unfold(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Depth to space: the inverse of :func:`fold`."""
    if factor == 1:
        return x
    n, c, *sizes = x.shape
    dims = len(sizes)
    x = x.reshape(n, c // factor**dims, *[factor] * dims, *sizes)
    pairs = [axis for i in range(dims) for axis in (2 + dims + i, 2 + i)]
    return x.permute(0, 1, *pairs).reshape(n, c // factor**dims, *[size * factor for size in sizes])

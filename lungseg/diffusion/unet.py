"""The student: a U-Net of the guided-diffusion family (METHOD 1.2), whose encoder can be run alone.

Input (N, 2, D, H, W): x_t and the lung mask in {0, 1}; output (N, 1, D, H, W). The encoder plus the middle block
gives the bottleneck, one token per ``token_size``^3 voxels. The same in 2-D, without the D.

The encoder has two parts. The *trunk* is all that is finer than a token: convolutions and norms per voxel, so with
channel norm a token depends on the voxels within :attr:`UNetSpec.trunk_reach` of it and on nothing else. The rest,
:meth:`UNet.contextualise`, works on tokens: the coarsest level, and the middle with its attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lungseg.diffusion.attention import Attention
from lungseg.diffusion.layers import (
    ResidualBlock,
    Upsample,
    channels_last,
    convolution,
    fold,
    make_norm,
    norm_silu,
    unfold,
    zero_init,
)
from lungseg.errors import MismatchError, UsageError

MAX_PERIOD = 1000.0
"""Longest period of the time embedding (authors' code)."""
MIDDLE, OUTPUT = "middle", "output"
"""Names of the bottleneck and of the prediction among the blocks."""


@dataclass(frozen=True)
class UNetSpec:
    """Shape of the network."""

    base_width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    encoder_blocks: int = 1
    stem: int = 1
    norm: str = "channel"
    in_channels: int = 2
    condition_channels: int = 0
    """Channels given beside the input, such as a mask to draw a lesion in."""
    out_channels: int = 1
    dims: int = 3
    attention_window: tuple[int, ...] | None = None
    """Tokens along each axis of an attention window; None: attention over all that the network is given."""

    @property
    def token_size(self) -> int:
        """Voxels along one edge of a bottleneck token."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    @property
    def token_channels(self) -> int:
        """Channels of the bottleneck."""
        return self.base_width * self.multipliers[-1]

    @property
    def is_local(self) -> bool:
        """Whether a feature is the same however much of the volume is given around it (a wide enough halo)."""
        return self.norm == "channel" and self.attention_window is not None

    @property
    def trunk_reach(self) -> int:
        """Voxels beyond a token's own that the trunk's output at this token depends on.

        A convolution of size 3 reaches one voxel of its level further: one at the stem, two in each residual block,
        one in each downsampling.
        """
        reach, scale = self.stem, self.stem
        for _ in self.multipliers[:-1]:
            reach += (2 * self.encoder_blocks + 1) * scale
            scale *= 2
        return reach

    @property
    def context_reach(self) -> tuple[int, int]:
        """Tokens beyond its own that reach a token before the attention, and after it."""
        return 2 * self.encoder_blocks + 2, 2

    @property
    def block_names(self) -> tuple[str, ...]:
        """Blocks in the order they are computed: ``encoder.LEVEL.BLOCK``, ``middle``, ``decoder.LEVEL.BLOCK``."""
        levels = range(len(self.multipliers))
        encoder = [f"encoder.{level}.{i}" for level in levels for i in range(self.encoder_blocks)]
        decoder = [f"decoder.{level}.{i}" for level in reversed(levels) for i in range(self.encoder_blocks + 1)]
        return (*encoder, MIDDLE, *decoder)

    def voxels_per_cell(self, name: str) -> int:
        """Voxels along one edge of a cell of a block's feature map."""
        return self.token_size if name == MIDDLE else self.stem * 2 ** int(name.split(".")[1])


class UNet(nn.Module):
    """The network of ``spec``; ``encode`` stops at the bottleneck, and is all that is left without the decoder."""

    gradient_checkpointing = False
    """Recompute the blocks in the backward pass instead of keeping what they computed: less memory, same gradients."""

    def __init__(self, spec: UNetSpec, *, decoder: bool = True) -> None:
        """``decoder=False``: for features alone, in a third of the memory."""
        super().__init__()
        self.spec = spec
        self.has_decoder = decoder
        widths = [spec.base_width * m for m in spec.multipliers]
        width_time = 4 * spec.base_width
        self.time = nn.Sequential(nn.Linear(spec.base_width, width_time), nn.SiLU(), nn.Linear(width_time, width_time))
        folded = spec.stem**spec.dims
        channels = spec.in_channels + spec.condition_channels
        self.conv_in = convolution(spec.dims, channels * folded, widths[0])
        self.encoder = nn.ModuleList()
        skips = [widths[0]]
        width = widths[0]
        for level, target in enumerate(widths):
            for _ in range(spec.encoder_blocks):
                self.encoder.append(self._block(width, target, width_time))
                width = target
                skips.append(width)
            if level < len(widths) - 1:
                self.encoder.append(convolution(spec.dims, width, width, stride=2))
                skips.append(width)
        self._encoder_names = _layer_names(self.encoder, "encoder", range(len(widths)))
        self.middle = nn.ModuleList(
            [
                self._block(width, width, width_time),
                Attention(width, spec.norm, spec.attention_window),
                self._block(width, width, width_time),
            ]
        )
        self.decoder = nn.ModuleList()
        for level, target in reversed(list(enumerate(widths)) if decoder else []):
            # One block more than in the encoder: each takes one skip, those of the blocks and of the downsampling.
            for _ in range(spec.encoder_blocks + 1):
                self.decoder.append(self._block(width + skips.pop(), target, width_time))
                width = target
            if level:
                self.decoder.append(Upsample(width, dims=spec.dims))
        self._decoder_names = _layer_names(self.decoder, "decoder", reversed(range(len(widths))))
        if decoder:
            self.norm_out = make_norm(spec.norm, width)
            self.conv_out = zero_init(convolution(spec.dims, width, spec.out_channels * folded))
        # weights in the layout of the feature maps: a convolution would reorder them at every call
        for parameter in self.parameters():
            if parameter.ndim == spec.dims + 2:
                parameter.data = channels_last(parameter.data)

    def _block(self, width_in: int, width_out: int, width_time: int) -> ResidualBlock:
        return ResidualBlock(width_in, width_out, width_time, self.spec.norm, dims=self.spec.dims)

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        """Sinusoidal embedding of ``t`` (N,), then two linear layers: (N, 4 base)."""
        half = self.spec.base_width // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        result: torch.Tensor = self.time(sinusoid.to(next(self.parameters()).dtype))
        return result

    def encode(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Bottleneck (N, C, D/p, H/p, W/p) of inputs (N, 2, D, H, W) at times (N,): 17 % of a full pass."""
        return self.activations(x, t, (MIDDLE,), condition)[MIDDLE]

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction (N, 1, D, H, W) and bottleneck (N, C, d, h, w)."""
        found = self.activations(x, t, (MIDDLE, OUTPUT), condition)
        return found[OUTPUT], found[MIDDLE]

    def activations(
        self, x: torch.Tensor, t: torch.Tensor, names: Sequence[str], condition: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Feature maps of named blocks; nothing deeper than the deepest one asked is computed.

        Parameters
        ----------
        x : tensor (N, in_channels, D, H, W)
            D, H, W multiples of the token size.
        t : tensor (N,)
            Noise levels.
        names : sequence of str
            Of ``spec.block_names``, or ``output``.
        condition : tensor (N, condition_channels, D, H, W), optional
            Needed exactly when the network has condition channels.

        Raises
        ------
        UsageError
            For an unknown name.
        MismatchError
            If the input does not fit the network, or a block is asked for that a network without decoder lacks.
        """
        last = self._deepest(names)
        found: dict[str, torch.Tensor] = {}
        time = self.embed_time(t)
        h = self._stem(x, condition)
        skips = [h]
        for name, layer in zip(self._encoder_names, self.encoder, strict=True):
            h = found[name] = self._layer(layer, h, time)
            if name == last:
                return {name: found[name] for name in names}
            skips.append(h)
        for layer in self.middle:
            h = self._layer(layer, h, time)
        found[MIDDLE] = h
        if last == MIDDLE:
            return {name: found[name] for name in names}
        for name, layer in zip(self._decoder_names, self.decoder, strict=True):
            joined = torch.cat([h, skips.pop()], dim=1) if isinstance(layer, ResidualBlock) else h
            h = found[name] = self._layer(layer, joined, time)
            if name == last:
                return {name: found[name] for name in names}
        found[OUTPUT] = unfold(self.conv_out(norm_silu(self.norm_out, h)), self.spec.stem)
        return {name: found[name] for name in names}

    def trunk(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """First part of :meth:`encode`, all that is finer than a token: (N, C, d, h, w) of inputs (N, 2, D, H, W)."""
        time = self.embed_time(t)
        h = self._stem(x, condition)
        for layer in self.encoder[: self._num_trunk_layers]:
            h = self._layer(layer, h, time)
        return h

    def contextualise(self, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Second part of :meth:`encode`: bottleneck (N, C, d, h, w) of what :meth:`trunk` gave.

        ``tokens`` may be a part of a volume's that begins at an attention window; see :attr:`UNetSpec.context_reach`.
        """
        time = self.embed_time(t)
        h = tokens
        for layer in (*self.encoder[self._num_trunk_layers :], *self.middle):
            h = self._layer(layer, h, time)
        return h

    @property
    def _num_trunk_layers(self) -> int:
        return (len(self.spec.multipliers) - 1) * (self.spec.encoder_blocks + 1)

    def _deepest(self, names: Sequence[str]) -> str:
        order = (*self.spec.block_names, OUTPUT)
        unknown = [name for name in names if name not in order]
        if unknown or not names:
            raise UsageError(f"no block {', '.join(unknown) or 'named'}; this network has {', '.join(order)}")
        last = max(names, key=order.index)
        if not self.has_decoder and order.index(last) > order.index(MIDDLE):
            raise MismatchError(f"this network has no decoder, for features alone: {last} needs the whole model")
        return last

    def _stem(self, x: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """First feature map of an input, which is checked."""
        spec = self.spec
        if condition is not None:
            x = torch.cat([x, condition.to(x.dtype)], dim=1)
        wanted = spec.in_channels + spec.condition_channels
        if x.ndim != spec.dims + 2 or x.shape[1] != wanted or any(n % spec.token_size for n in x.shape[2:]):
            raise MismatchError(
                f"the network takes {wanted} channels on {spec.dims} axes that are multiples of {spec.token_size}, "
                f"not an input of shape {tuple(x.shape)}"
            )
        h: torch.Tensor = self.conv_in(channels_last(fold(x, spec.stem)))
        return h

    def _layer(self, layer: nn.Module, h: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """One layer; recomputed in the backward pass if so wanted."""
        inputs = (h, time) if isinstance(layer, ResidualBlock) else (h,)
        if self.gradient_checkpointing and torch.is_grad_enabled() and h.requires_grad:
            recomputed: torch.Tensor = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        result: torch.Tensor = layer(*inputs)
        return result


def _layer_names(layers: nn.ModuleList, part: str, levels: Iterable[int]) -> tuple[str, ...]:
    """Name of each layer's output: ``PART.LEVEL.BLOCK`` for residual blocks, ``PART.LEVEL`` for what ends a level."""
    names, remaining = [], iter(levels)
    level, block = next(remaining), 0
    for layer in layers:
        if isinstance(layer, ResidualBlock):
            names.append(f"{part}.{level}.{block}")
            block += 1
        else:
            names.append(f"{part}.{level}")
            level, block = next(remaining), 0
    return tuple(names)

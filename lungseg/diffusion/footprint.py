"""What a training step costs before it is run: memory and arithmetic, by a dry pass of the network itself.

The network is built and run on torch's `meta` device, which has shapes and no numbers; what autograd would keep for the
backward pass and the operations of both passes are counted. So the figures follow the network, whatever it becomes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import unet_spec
from lungseg.diffusion.unet import UNet
from lungseg.radiomics.descriptor import DEFAULT_CHUNK_BYTES

BYTES_A_PARAMETER = 5 * 4
"""Weight, gradient, two moments and averaged weight in float32."""
MARGIN = 1.3
"""Factor on what autograd keeps: gradients in flight, convolution workspaces, fragmentation."""
FIXED_BYTES = {"cuda": 2**30, "cpu": 600 * 2**20}
"""Libraries and context of the process."""
_DEVICE_PEAKS = {
    # dense, without sparsity, in operations a second: makers' data sheets
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "A40": {"bf16": 149.7e12, "fp32": 37.4e12},
    "RTX 4090": {"bf16": 165.2e12, "fp32": 82.6e12},
    "RTX 3090": {"bf16": 71e12, "fp32": 35.6e12},
}
"""By a part of the device's name, the longer before the shorter."""


@dataclass(frozen=True)
class Footprint:
    """Cost of training with a configuration."""

    parameters: int
    """Of the U-Net; the heads are small beside it."""
    kept_bytes: int
    """What autograd keeps of one image in float32."""
    flops: float
    """Operations (two a multiply-add) of the forward and backward pass of one image."""

    def memory_bytes(self, *, images: int, precision: str, device: str) -> int:
        """Memory of a process that works on ``images`` at a time.

        Parameters
        ----------
        precision : str
            `bf16`, `fp32` or `fp64`.
        device : str
            `cuda` or `cpu`.
        """
        width = {"bf16": 0.5, "fp32": 1.0, "fp64": 2.0}[precision]
        weights = self.parameters * BYTES_A_PARAMETER * max(width, 1.0)
        cast = self.parameters * 2 if precision == "bf16" else 0  # autocast keeps its copies
        kept = images * self.kept_bytes * width * MARGIN
        return round(FIXED_BYTES[device] + DEFAULT_CHUNK_BYTES + weights + cast + kept)


def footprint(config: TrainConfig, device: str = "cuda") -> Footprint:
    """Cost of one image of a configuration.

    Parameters
    ----------
    device : str
        `cuda` or `cpu`. A CPU runs norms that keep less, which `meta` does not show: there a small patch is really
        computed, and scaled by its voxels.
    """
    with torch.device("meta"):
        unet = UNet(unet_spec(config))
    with FlopCounterMode(display=False) as counter:
        kept, outputs = _keep(unet, config)
        torch.autograd.backward([output.sum() for output in outputs])
    if device == "cpu":
        edge = 2 * config.token_size
        small = dataclasses.replace(config, patch_size=(edge, edge, edge))
        kept = round(_keep(UNet(unet_spec(small)), small)[0] * math.prod(config.patch_size) / edge**3)
    return Footprint(sum(p.numel() for p in unet.parameters()), kept, float(counter.get_total_flops()))


def _keep(unet: UNet, config: TrainConfig) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Bytes autograd keeps of one image where the network lies, and what the network gives."""
    place = next(unet.parameters()).device
    parameters = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, torch.Tensor] = {}
    inputs: dict[int, torch.Tensor] = {}
    started: dict[torch.nn.Module, int] = {}
    largest_layer = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = tensor
        return tensor

    def before(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs[given[0].untyped_storage()._cdata] = given[0]
        started[layer] = _bytes(kept)

    def after(layer: torch.nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        nonlocal largest_layer
        largest_layer = max(largest_layer, _bytes(kept) - started[layer])

    for layer in (*unet.encoder, *unet.middle, *unet.decoder):
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    x = torch.zeros(1, unet.spec.in_channels, *config.patch_size, device=place)
    t = torch.zeros(1, dtype=torch.long, device=place)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = unet(x, t)
    # recomputing layer by layer keeps what enters each, and all of one at a time
    return _bytes(inputs) + largest_layer if config.gradient_checkpointing else _bytes(kept), outputs


def _bytes(tensors: dict[int, torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def fitting_parts(config: TrainConfig, cost: Footprint, *, share: int, precision: str, device: str, limit: int) -> int:
    """Smallest number of parts of a share of a batch that fit into ``limit`` bytes; 0 if not even single images do.

    Parameters
    ----------
    share : int
        Images of a batch on one device.
    """
    for parts in range(config.accumulate, share + 1):
        images = share // parts
        if share % parts == 0 and cost.memory_bytes(images=images, precision=precision, device=device) <= limit:
            return parts
    return 0


def device_peak(name: str, precision: str) -> float | None:
    """Operations a second that a device can do at most; None where no data sheet was read."""
    for part, peaks in _DEVICE_PEAKS.items():
        if part.lower() in name.lower():
            return peaks.get(precision)
    return None


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.3g} GiB"

"""One training step and the state between steps: weights, averaged weights, optimiser, queue and counters."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.acceleration import compile_network, fused_adamw
from lungseg.diffusion.distillation import DescriptorQueue, warmup_weight
from lungseg.diffusion.distilled_diffusion import DESCRIPTORS, EMBEDDINGS, DistilledDiffusion
from lungseg.diffusion.gather import world_size
from lungseg.errors import MismatchError, UsageError
from lungseg.radiomics.descriptor import Standardisation

MAX_SKIPPED_IN_A_ROW = 20
"""Steps without a finite loss or gradient after which the run stops (RELIABILITY 51)."""

Batch = Mapping[str, torch.Tensor]


@dataclass
class StepResult:
    """What one optimiser step did."""

    values: dict[str, float]
    """Losses of this process's part of the batch, and what the step was made with."""
    skipped: bool
    embeddings: torch.Tensor | None = None
    """Unit vectors (N, E) of the student's valid tokens over all processes; None without distillation."""


class Trainer:
    """Model, averaged weights and optimiser; one ``step`` per batch. Its state is what a checkpoint holds."""

    def __init__(self, config: TrainConfig, standardisations: Sequence[Standardisation], *, device: str) -> None:
        self.config = config
        self.device = torch.device(device)
        self.precision = precision_of(config, self.device)
        with torch.random.fork_rng(devices=[]):  # weights are a function of the seed; the caller's state is untouched
            torch.manual_seed(config.seed)
            self.model = DistilledDiffusion(config, standardisations).to(self.device)
        if self.precision == "fp64":
            self.model.double()
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._compile()
        self.parallel: nn.Module = self.model
        if world_size() > 1:
            if config.head_norm == "batch":
                if self.device.type == "cpu":
                    raise UsageError("--head-norm batch needs GPUs or a single process: use --head-norm layer")
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            devices = [self.device] if self.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        self.queue = DescriptorQueue(config.queue_size, self.model.num_features, device=self.device)
        self.optimiser = _make_optimiser(self.model, config, self.device)
        self.images = 0
        self.steps = 0
        self.skipped = 0
        self._skipped_in_a_row = 0

    def _compile(self) -> None:
        """Compile the network for the shape of a part of a batch, where that pays."""
        config = self.config
        images = max(1, config.batch_size // world_size() // config.accumulate)
        dtype = next(self.model.unet.parameters()).dtype
        channels = self.model.unet.spec.in_channels
        x = torch.zeros(images, channels, *config.patch_size, device=self.device, dtype=dtype)
        t = torch.ones(images, device=self.device, dtype=torch.long)
        compile_network(self.model.unet, (x, t), mode=config.compile, autocast=self._autocast())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def distill_ramp(self) -> float:
        """How far the distillation is on for the next step, 0 to 1."""
        config = self.config
        progress = self.images / config.total_images
        return warmup_weight(progress, start=config.distill_start, full=config.distill_full, weight=1.0)

    @property
    def distill_weight(self) -> float:
        """Weight of the contrast for the next step."""
        return self.distill_ramp * self.config.distill_weight

    def step(self, batch: Batch, *, num_images: int) -> StepResult:
        """Train on this process's part of a batch of ``num_images`` over all processes.

        Raises
        ------
        MismatchError
            When losses or gradients have not been finite for many steps in a row.
        """
        config = self.config
        weight = self.distill_weight
        rate = _rate(self.images / config.total_images, config.warmup_share)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * group["scale"] * rate
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.optimiser.zero_grad(set_to_none=True)
        losses, descriptors = self._backward(batch)
        norms = self._clip()
        # Gradients are averaged over processes, so their norm is the same on all of them: all skip, or none does.
        finite = math.isfinite(norms["gradient_norm"])
        if finite:
            self.optimiser.step()
            self._update_ema()
            for rows in descriptors:
                self.queue.push(rows)
        else:  # batch statistics change in the forward pass already
            for buffer, old in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(old)
        self._count(finite)
        self.images += num_images
        self.steps += 1
        embeddings = losses.pop(EMBEDDINGS, None)
        names = list(losses)
        read = torch.stack([losses[name].double() for name in names]).tolist() if names else []  # one wait for the GPU
        values = dict(zip(names, read, strict=True))
        values |= {"weight": weight, "rate": rate, **norms, "skipped": float(self.skipped)}
        return StepResult(values, not finite, embeddings)

    def _backward(self, batch: Batch) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Gradients of all parts of the batch; mean losses, the embeddings of the last part, descriptors of each."""
        ramp, parts = self.distill_ramp, self.config.accumulate
        on_device = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        # counted over the whole batch, so that neither parts nor processes change what an image weighs
        noisy = (on_device["t"] > 0).sum().double()
        if world_size() > 1:
            torch.distributed.all_reduce(noisy)
        noisy = (noisy / (parts * world_size())).clamp(min=1 / (parts * world_size()))
        queue = self.queue.rows.clone() if self.config.queue_size else None
        sums: dict[str, torch.Tensor] = {}
        descriptors = []
        for number, part in enumerate(_parts(on_device, parts)):
            last = number == parts - 1
            silent = nullcontext() if last or self.parallel is self.model else self.parallel.no_sync()  # type: ignore[operator]
            with silent:
                with self._autocast():
                    losses = self.parallel(part, ramp, noisy, queue)
                (losses["total"] / parts).backward()
            embeddings = losses.pop(EMBEDDINGS, None)
            if DESCRIPTORS in losses:
                descriptors.append(losses.pop(DESCRIPTORS))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / parts
        return sums | ({} if embeddings is None else {EMBEDDINGS: embeddings}), descriptors

    def _clip(self) -> dict[str, float]:
        """Norms of the gradients before they are clipped."""
        unet = [p.grad for p in self.model.unet.parameters() if p.grad is not None]
        heads = [p.grad for m in (self.model.head, self.model.teacher) for p in m.parameters() if p.grad is not None]
        norms = [nn.utils.get_total_norm(gradients) for gradients in (unet, heads)]
        total = torch.stack(norms).norm()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, total)
        read = torch.stack([total, *norms]).tolist()
        return dict(zip(("gradient_norm", "gradient_norm_unet", "gradient_norm_heads"), read, strict=True))

    def _count(self, finite: bool) -> None:
        self.skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise MismatchError(
                f"no finite gradient for {MAX_SKIPPED_IN_A_ROW} steps in a row after {self.images} images "
                f"({self.skipped} of {self.steps + 1} steps in all): lower --learning-rate (now "
                f"{self.config.learning_rate:g}) or --clip-norm, or use --precision fp32 (now {self.precision}); the "
                "last checkpoint is kept"
            )

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps))
        own = self.model.state_dict()
        for name, average in self.ema.state_dict().items():
            if average.dtype.is_floating_point:
                average.lerp_(own[name], 1 - decay)
            else:
                average.copy_(own[name])

    @torch.no_grad()
    def judge(self, batch: Batch) -> dict[str, float]:
        """Losses of the averaged weights on this process's part of a batch, without training on it.

        Of the diffusion and, where a teacher is heard, of the regression: both are means over images or tokens, while
        a contrast depends on what else is in the batch.
        """
        on_device = {key: value.to(self.device) for key, value in batch.items()}
        with self._autocast():
            losses = self.ema(on_device, 1.0)
        names = [name for name in ("diffusion", "regression") if name in losses]
        return {name: float(losses[name]) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; ``load_state_dict`` continues the run exactly."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "queue": self.queue.state_dict(),
            "images": self.images,
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same configuration."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.queue.load_state_dict(state["queue"])
        self.images, self.steps = int(state["images"]), int(state["steps"])
        self.skipped, self._skipped_in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])

    def student_weights(self) -> dict[str, torch.Tensor]:
        """Averaged weights that are used after training: U-Net and student head; the teacher is discarded."""
        weights = {n: tensor for n, tensor in self.ema.state_dict().items() if n.startswith(("unet.", "head."))}
        return {n: t.float() if t.dtype == torch.float64 else t for n, t in weights.items()}


def precision_of(config: TrainConfig, device: torch.device) -> str:
    """Numbers a run computes with: `bf16`, `fp32` or `fp64`.

    Raises
    ------
    UsageError
        If the device computes wrongly with them.
    """
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    precision = ("bf16" if bf16 else "fp32") if config.precision == "auto" else config.precision
    if precision == "bf16" and device.type == "cpu":
        # torch 2.13: weight gradients of conv3d on maps as small as 2x4x4 come from uninitialised memory
        raise UsageError("--precision bf16 gives wrong gradients on a CPU: use --precision fp32")
    return precision


def _make_optimiser(model: DistilledDiffusion, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    heads = [*model.head.parameters(), *model.teacher.parameters()]
    groups = [
        {"params": list(model.unet.parameters()), "scale": config.unet_rate_scale},
        {"params": heads, "scale": 1.0},
    ]
    return fused_adamw(groups, learning_rate=config.learning_rate, weight_decay=config.weight_decay, device=device)


def _parts(batch: Batch, parts: int) -> list[dict[str, torch.Tensor]]:
    """Equal shares of a batch, in order."""
    size = len(batch["t"]) // parts
    return [{key: value[k * size : (k + 1) * size] for key, value in batch.items()} for k in range(parts)]


def _rate(progress: float, warmup: float) -> float:
    """Learning rate relative to its peak: linear rise, then half a cosine down to 2 %."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))

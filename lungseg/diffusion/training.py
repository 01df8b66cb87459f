"""Training the student: what one image is, what one step does, and the state between steps.

Everything random follows from (seed, index of the training image): neither the step, nor the rank, nor resuming
changes what image i looks like.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import unet_spec
from lungseg.diffusion.distillation import (
    StudentHead,
    TeacherHead,
    contrastive_loss,
    descriptor_similarity,
    gather_rows,
    warmup_weight,
)
from lungseg.diffusion.normalisation import HU_WINDOWS
from lungseg.diffusion.schedule import make_schedule
from lungseg.diffusion.unet import UNet
from lungseg.errors import MismatchError, UsageError
from lungseg.radiomics.descriptor import FEATURE_NAMES, Standardisation, compute_descriptors
from lungseg.store.patches import PatchSource, mask_fractions

MAX_SKIPPED_IN_A_ROW = 20
"""Steps without a finite loss or gradient after which the run stops (RELIABILITY 51)."""
MIN_TOKEN_LUNG = 0.5
"""Share of lung in the teacher's window below which a token is not taught (METHOD 1.5 step 3)."""
_NOISE_STREAM = 2**62
"""Separates the noise of image i from its place and flips, which use the same seed.

Less than 2**63: numpy turns a key of signed and unsigned integers into float64, the same for 2048 images in a row.
"""


def teacher_halo(config: TrainConfig) -> int:
    """Voxels around a patch that the teacher's windows of its border tokens reach into."""
    return (config.teacher_window - config.token_size) // 2 if config.distill == "tokens" else 0


def taught_levels(config: TrainConfig) -> int:
    """Highest noise level at which the teacher is contrasted: above it the texture it speaks of is drowned in noise."""
    return max(1, round(config.distill_levels * config.timesteps))


class TrainingImages(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Image number i of the run: patch, noise, noise level and the tokens to teach."""

    def __init__(self, source: PatchSource, config: TrainConfig) -> None:
        self._source = source
        self._config = config
        self._halo = teacher_halo(config)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        config = self._config
        patch = self._source.read(index)
        rng = np.random.Generator(np.random.Philox(key=[config.seed, _NOISE_STREAM + index]))
        # t = 0 is taught but has no noise to predict; tokens are read at t = 0 and little noise
        low = rng.random() < config.low_noise_share
        t = int(rng.integers(0, taught_levels(config) + 1) if low else rng.integers(1, config.timesteps + 1))
        eps = rng.standard_normal(config.patch_size, dtype=np.float32)
        token, valid = self._choose_tokens(patch.mask, rng)
        return {
            "volume_hu": torch.from_numpy(patch.volume_hu),
            "mask": torch.from_numpy(patch.mask),
            "lung_median_hu": torch.tensor(patch.lung_median_hu, dtype=torch.float32),
            "t": torch.tensor(t),
            "eps": torch.from_numpy(eps),
            "token": torch.from_numpy(token),
            "token_valid": torch.from_numpy(valid & (t <= taught_levels(config))),
        }

    def _choose_tokens(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Lattice indices (M, 3) of tokens whose window is mostly lung, and which of the M slots are filled."""
        config = self._config
        count, p, w = config.tokens_per_patch, config.token_size, config.teacher_window
        lattice = tuple(n // p for n in config.patch_size)
        if config.distill != "tokens":
            return np.zeros((count, 3), dtype=np.int64), np.zeros(count, dtype=bool)
        index = np.stack(np.unravel_index(np.arange(math.prod(lattice)), lattice), axis=1)
        # window of token i starts at i p - (w - p) / 2 in the patch, that is at i p in the patch with its halo
        share = mask_fractions(mask, (index * p).astype(np.int32), (w, w, w))
        candidates = np.flatnonzero(share >= MIN_TOKEN_LUNG)
        chosen = rng.permutation(candidates)[:count]
        token = np.zeros((count, 3), dtype=np.int64)
        token[: len(chosen)] = index[chosen]
        return token, np.arange(count) < len(chosen)


class DistilledDiffusion(nn.Module):
    """U-Net and heads; ``forward`` gives the losses of a batch, so that data parallelism sees one call."""

    def __init__(self, config: TrainConfig, standardisation: Standardisation | None) -> None:
        """``standardisation`` belongs to the teacher's window; None only without distillation."""
        super().__init__()
        self.config = config
        self.halo = teacher_halo(config)
        self.standardisation = standardisation
        self.window = HU_WINDOWS[config.hu_window]
        self.schedule = make_schedule(config.schedule, config.timesteps)
        spec = unet_spec(config)
        self.unet = UNet(spec)
        num_features = len(FEATURE_NAMES)
        self.head = StudentHead(spec.token_channels, config.embedding, num_features, config.head_norm)
        self.teacher = TeacherHead(num_features, config.embedding, config.head_norm)

    def forward(self, batch: Mapping[str, torch.Tensor], ramp: float) -> dict[str, torch.Tensor]:
        """Losses of a batch; ``ramp`` in 0..1 is how far the distillation is on, a factor of both its weights."""
        config = self.config
        inner = tuple(slice(self.halo, self.halo + n) for n in config.patch_size)
        hu = batch["volume_hu"][:, *inner]
        x_0 = self.window.normalise(hu)
        mask = batch["mask"][:, *inner].float()
        x_t = self.schedule.q_sample(x_0, batch["t"], batch["eps"])
        output, bottleneck = self.unet(torch.stack([x_t, mask], dim=1), batch["t"])
        target = self.schedule.target(x_0, batch["eps"], batch["t"], config.prediction)
        distance = F.l1_loss if config.loss == "l1" else F.mse_loss
        per_image = distance(output[:, 0].float(), target, reduction="none").flatten(1).mean(1)
        noisy = batch["t"] > 0
        result = {"diffusion": (per_image * noisy).sum() / noisy.sum().clamp(min=1)}
        taught = config.distill != "none" and max(config.distill_weight, config.regression_weight) > 0
        if ramp > 0 and taught:
            result.update(self._distill(batch, bottleneck))
            total = result["diffusion"] + ramp * config.distill_weight * result["contrast"]
            result["total"] = total + ramp * config.regression_weight * result["regression"]
        else:
            # every parameter takes part in every step: distributed reduction waits for all gradients
            idle = sum(
                (p.sum() * 0.0 for m in (self.head, self.teacher) for p in m.parameters()), start=x_0.new_zeros(())
            )
            result["total"] = result["diffusion"] + idle
        return result

    def _distill(self, batch: Mapping[str, torch.Tensor], bottleneck: torch.Tensor) -> dict[str, torch.Tensor]:
        config = self.config
        if config.distill == "tokens":
            windows, masks, valid = self._teacher_windows(batch)
            median = batch["lung_median_hu"].repeat_interleave(config.tokens_per_patch)
            b, m = batch["token"].shape[:2]
            rows = torch.arange(b, device=bottleneck.device)[:, None].expand(b, m)
            z, y, x = batch["token"].unbind(-1)
            tokens = bottleneck.movedim(1, -1)[rows, z, y, x].flatten(0, 1)  # (B M, C)
            student, predicted = self.head(tokens)
        else:
            windows, masks = batch["volume_hu"], batch["mask"]
            valid, median = batch["t"] <= taught_levels(config), batch["lung_median_hu"]
            dense = bottleneck.movedim(1, -1)  # (B, d, h, w, C)
            z_dense, r_dense = self.head(dense.flatten(0, -2))
            student = F.normalize(z_dense.view(len(dense), -1, z_dense.shape[-1]).mean(1), dim=-1)
            predicted = r_dense.view(len(dense), -1, r_dense.shape[-1]).mean(1)
        return self._losses(student, predicted, self._descriptors(windows, masks, median, valid), valid)

    def _teacher_windows(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows (B M, w, w, w) of the chosen tokens, their masks, and which slots are filled."""
        p, w = self.config.token_size, self.config.teacher_window
        b, m = batch["token"].shape[:2]
        rows = torch.arange(b, device=batch["token"].device)[:, None].expand(b, m)
        z, y, x = batch["token"].unbind(-1)
        views = [batch[k].unfold(1, w, p).unfold(2, w, p).unfold(3, w, p)[rows, z, y, x] for k in ("volume_hu", "mask")]
        return views[0].flatten(0, 1), views[1].flatten(0, 1), batch["token_valid"].flatten()

    @torch.no_grad()
    def _descriptors(
        self, windows: torch.Tensor, masks: torch.Tensor, median: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Standardised teacher descriptors (M, 34) in fp32; rows that are not valid are NaN."""
        if self.standardisation is None:
            raise MismatchError("distillation needs the standardisation of the teacher's window")
        rows = torch.full((len(windows), len(FEATURE_NAMES)), float("nan"), device=windows.device)
        if bool(valid.any()):
            with torch.autocast(windows.device.type, enabled=False):
                raw = compute_descriptors(
                    windows[valid].float(), masks[valid], lung_median_hu=median[valid], mcc=self.config.mcc
                )
                rows[valid] = self.standardisation.apply(raw)
        return rows

    def _losses(
        self, student: torch.Tensor, predicted: torch.Tensor, r: torch.Tensor, valid: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        config = self.config
        valid = valid & torch.isfinite(r).all(1)
        r = torch.nan_to_num(r)
        z_teacher = gather_rows(self.teacher(r))
        r_all = gather_rows(r)
        valid_all = gather_rows(valid.float()) > 0.5
        # ranks have different numbers of valid rows but their gradients the same weight: scale to the mean number
        mean_valid = valid_all.sum().clamp(min=1) / _world_size()
        offset = _rank() * len(r)
        contrast = contrastive_loss(
            student,
            z_teacher,
            descriptor_similarity(r, r_all),
            torch.arange(len(r), device=r.device) + offset,
            valid_all,
            temperature=config.temperature,
            contrast=config.contrast,
            positive=config.positive_similarity,
            negative=config.negative_similarity,
        )
        # families are scaled by 1/sqrt(n): weigh them equally here too, by summing over features
        error = F.smooth_l1_loss(predicted.float(), r, reduction="none").sum(1)
        regression = (error * valid).sum() / mean_valid
        return {
            "contrast": contrast.loss * (valid.sum() / mean_valid),
            "regression": regression,
            "mean_positives": contrast.mean_positives,
            "student_cosine": contrast.student_cosine,
            "teacher_cosine": contrast.teacher_cosine,
        }


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@dataclass
class StepResult:
    """What one optimiser step did."""

    values: dict[str, float]
    skipped: bool


class Trainer:
    """Model, averaged weights and optimiser; one ``step`` per batch. Its state is what a checkpoint holds."""

    def __init__(self, config: TrainConfig, standardisation: Standardisation | None, *, device: str) -> None:
        self.config = config
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):  # weights are a function of the seed; the caller's state is untouched
            torch.manual_seed(config.seed)
            self.model = DistilledDiffusion(config, standardisation).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.parallel: nn.Module = self.model
        if _world_size() > 1:
            if config.head_norm == "batch":
                if self.device.type == "cpu":
                    raise UsageError("--head-norm batch needs GPUs or a single process: use --head-norm layer")
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            devices = [self.device] if self.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        heads = [*self.model.head.parameters(), *self.model.teacher.parameters()]
        groups = [
            {"params": list(self.model.unet.parameters()), "scale": config.unet_rate_scale},
            {"params": heads, "scale": 1.0},
        ]
        self.optimiser = torch.optim.Adam(groups, lr=config.learning_rate, fused=self.device.type == "cuda")
        self.images = 0
        self.steps = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.precision = ("bf16" if bf16 else "fp32") if config.precision == "auto" else config.precision
        if self.precision == "bf16" and self.device.type == "cpu":
            # torch 2.13: weight gradients of conv3d on maps as small as 2x4x4 come from uninitialised memory
            raise UsageError("--precision bf16 gives wrong gradients on a CPU: use --precision fp32")

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

    def step(self, batch: Mapping[str, torch.Tensor], *, num_images: int) -> StepResult:
        """Train on this rank's part of a batch of ``num_images`` over all ranks.

        Raises
        ------
        MismatchError
            When losses or gradients have not been finite for many steps in a row.
        """
        config = self.config
        ramp, weight = self.distill_ramp, self.distill_weight
        rate = _rate(self.images / config.total_images, config.warmup_share)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * group["scale"] * rate
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        on_device = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.parallel(on_device, ramp)
        losses["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        # Gradients are averaged over ranks, so their norm is the same on all of them: all skip, or none does.
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimiser.step()
            self._update_ema()
        else:  # batch statistics change in the forward pass already
            for buffer, old in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(old)
        self._count(finite)
        self.images += num_images
        self.steps += 1
        values = {key: float(value.detach()) for key, value in losses.items()}
        return StepResult({**values, "weight": weight, "rate": rate, "gradient_norm": float(norm)}, not finite)

    def _count(self, finite: bool) -> None:
        self.skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise MismatchError(
                f"no finite gradient for {MAX_SKIPPED_IN_A_ROW} steps in a row after {self.images} images: lower "
                "--learning-rate or use --precision fp32; the last checkpoint is kept"
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

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; ``load_state_dict`` continues the run exactly."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
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
        self.images, self.steps = int(state["images"]), int(state["steps"])
        self.skipped, self._skipped_in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])

    def student_weights(self) -> dict[str, torch.Tensor]:
        """Averaged weights that are used after training: U-Net and student head; the teacher is discarded."""
        return {name: tensor for name, tensor in self.ema.state_dict().items() if name.startswith(("unet.", "head."))}


def _rate(progress: float, warmup: float) -> float:
    """Learning rate relative to its peak: linear rise, then half a cosine down to 2 %."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

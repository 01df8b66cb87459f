"""U-Net and heads as one module: the losses of a batch (METHOD 1.1, 7.3-7.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import unet_spec
from lungseg.diffusion.collapse import at_least_fp32, rank_penalty
from lungseg.diffusion.distillation import (
    StudentHead,
    TeacherHead,
    contrastive_loss,
    descriptor_similarity,
    soft_positives,
)
from lungseg.diffusion.gather import gather_rows, in_image_order, rank, world_size
from lungseg.diffusion.normalisation import HU_WINDOWS
from lungseg.diffusion.schedule import schedule_of
from lungseg.diffusion.training_images import taught_levels, teacher_halo, window_offset
from lungseg.diffusion.unet import UNet
from lungseg.errors import MismatchError
from lungseg.radiomics.descriptor import FEATURE_NAMES, Standardisation, compute_descriptors

EMBEDDINGS, DESCRIPTORS = "embeddings", "descriptors"
"""Keys of what ``forward`` returns beside losses: the valid tokens of all devices."""


@dataclass(frozen=True)
class _Taught:
    """The tokens of this device and what the teacher says of them."""

    student: torch.Tensor
    """Unit vectors (M, E)."""
    predicted: torch.Tensor
    """Descriptors (M, F) the student's head gives."""
    r: torch.Tensor
    """Standardised descriptors (M, F); NaN where there are none."""
    valid: torch.Tensor


class DistilledDiffusion(nn.Module):
    """U-Net and heads; ``forward`` gives the losses of a batch, so that data parallelism sees one call."""

    def __init__(self, config: TrainConfig, standardisations: Sequence[Standardisation]) -> None:
        """``standardisations``: one per window of the teacher, in its order; none only without distillation."""
        super().__init__()
        self.config = config
        self.halo = teacher_halo(config)
        self.standardisations = tuple(standardisations)
        self.window = HU_WINDOWS[config.hu_window]
        self.schedule = schedule_of(config)
        spec = unet_spec(config)
        self.unet = UNet(spec)
        self.unet.gradient_checkpointing = config.gradient_checkpointing
        self.num_features = num_features(config)
        self.head = StudentHead(spec.token_channels, config.embedding, self.num_features, config.head_norm)
        self.teacher = TeacherHead(self.num_features, config.embedding, config.head_norm)

    def forward(
        self,
        batch: Mapping[str, torch.Tensor],
        ramp: float,
        noisy: torch.Tensor | None = None,
        queue: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of this device's part of a batch, normalised so that their mean over parts and devices is the batch's.

        Parameters
        ----------
        batch : mapping
            As ``TrainingImages`` gives them, stacked.
        ramp : float
            0 ... 1, how far the distillation is on: a factor of all its weights.
        noisy : tensor (), optional
            Images with t > 0 a part and device have on average; None: this batch is all there is.
        queue : tensor (Q, F), optional
            Descriptors of earlier tokens.
        """
        config = self.config
        inner = tuple(slice(self.halo, self.halo + n) for n in config.patch_size)
        x_0 = self.window.normalise(batch["volume_hu"][:, *inner], batch.get("limits_hu"))
        x_0 = x_0.to(next(self.head.parameters()).dtype)
        mask = batch["mask"][:, *inner].to(x_0.dtype)
        x_t = self.schedule.q_sample(x_0, batch["t"], batch["eps"].to(x_0.dtype))
        output, bottleneck = self.unet(torch.stack([x_t, mask], dim=1), batch["t"])
        is_noisy = batch["t"] > 0
        count = is_noisy.sum().clamp(min=1) if noisy is None else noisy
        result = {"diffusion": (self._per_image(output[:, 0], x_0, batch) * is_noisy).sum() / count}
        taught = (
            config.distill != "none"
            and max(config.distill_weight, config.regression_weight, config.collapse_weight) > 0
        )
        if ramp > 0 and taught:
            tokens = self._taught(batch, bottleneck.detach() if config.detach_bottleneck else bottleneck)
            result.update(self._distillation(tokens, queue))
            result["total"] = result["diffusion"] + ramp * (
                config.distill_weight * result["contrast"]
                + config.regression_weight * result["regression"]
                + config.collapse_weight * result["collapse"]
            )
        else:
            # every parameter takes part in every step: distributed reduction waits for all gradients
            heads = [p for module in (self.head, self.teacher) for p in module.parameters()]
            result["total"] = result["diffusion"] + sum((p.sum() * 0.0 for p in heads), start=x_0.new_zeros(()))
        return result

    def _per_image(self, output: torch.Tensor, x_0: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Error (N,) of the prediction of each image, weighted by its noise level."""
        config = self.config
        target = self.schedule.target(x_0, batch["eps"].to(x_0.dtype), batch["t"], config.prediction)
        distance = F.l1_loss if config.loss == "l1" else F.mse_loss
        error = distance(at_least_fp32(output), target, reduction="none").flatten(1).mean(1)
        if config.snr_gamma > 0:
            weight = self.schedule.loss_weight(batch["t"], config.prediction, config.snr_gamma)
            # the weights are those of squared errors
            error = error * (weight.sqrt() if config.loss == "l1" else weight).to(error.dtype)
        return error

    def _taught(self, batch: Mapping[str, torch.Tensor], bottleneck: torch.Tensor) -> _Taught:
        config = self.config
        if config.distill == "tokens":
            valid = batch["token_valid"].flatten()
            median = batch["lung_median_hu"].repeat_interleave(config.tokens_per_patch)
            rows, (z, y, x) = _batch_rows(batch["token"]), batch["token"].unbind(-1)
            tokens = bottleneck.movedim(1, -1)[rows, z, y, x].flatten(0, 1)  # (B M, C)
            student, predicted = self.head(tokens)
            views = [self.teacher_windows(batch, window) for window in config.teacher_windows]
        else:
            valid, median = batch["t"] <= taught_levels(config), batch["lung_median_hu"]
            dense = bottleneck.movedim(1, -1)  # (B, d, h, w, C)
            z_dense, r_dense = self.head(dense.flatten(0, -2))
            student = F.normalize(z_dense.view(len(dense), -1, z_dense.shape[-1]).mean(1), dim=-1)
            predicted = r_dense.view(len(dense), -1, r_dense.shape[-1]).mean(1)
            views = [(batch.get("teacher_hu", batch["volume_hu"]), batch["mask"])]
        return _Taught(student, predicted, self.describe(views, median, valid), valid)

    def teacher_windows(self, batch: Mapping[str, torch.Tensor], window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """HU and masks (B M, w, w, w) of the windows of ``window`` voxels around the chosen tokens."""
        p, first = self.config.token_size, window_offset(self.config, window)
        rows, (z, y, x) = _batch_rows(batch["token"]), batch["token"].unbind(-1)
        views = []
        for volume in (batch.get("teacher_hu", batch["volume_hu"]), batch["mask"]):
            d, h, w = (n - 2 * first for n in volume.shape[1:])
            inner = volume[:, first : first + d, first : first + h, first : first + w]
            views.append(inner.unfold(1, window, p).unfold(2, window, p).unfold(3, window, p)[rows, z, y, x])
        return views[0].flatten(0, 1), views[1].flatten(0, 1)

    @torch.no_grad()
    def describe(
        self, views: Sequence[tuple[torch.Tensor, torch.Tensor]], median: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Standardised descriptors float32 (M, F) of windows and masks of each size; NaN in rows that are not valid.

        Several windows stand side by side, divided by the root of their number, so that distances keep their scale.
        """
        if len(self.standardisations) != len(views):
            raise MismatchError(
                f"distillation needs the standardisation of each of the teacher's {len(views)} windows, "
                f"not {len(self.standardisations)}"
            )
        rows = torch.full((len(valid), self.num_features), float("nan"), device=valid.device)
        if bool(valid.any()):
            parts = []
            with torch.autocast(valid.device.type, enabled=False):
                for (windows, masks), standardisation in zip(views, self.standardisations, strict=True):
                    raw = compute_descriptors(
                        windows[valid].float(), masks[valid], lung_median_hu=median[valid], mcc=self.config.mcc
                    )
                    parts.append(standardisation.apply(raw) / len(views) ** 0.5)
            rows[valid] = torch.cat(parts, dim=1)
        return rows

    def _distillation(self, tokens: _Taught, queue: torch.Tensor | None) -> dict[str, torch.Tensor]:
        config = self.config
        valid = tokens.valid & torch.isfinite(tokens.r).all(1)
        r = torch.nan_to_num(tokens.r).to(at_least_fp32(tokens.student).dtype)
        z_teacher, r_all, valid_all = gather_rows(self.teacher(r)), gather_rows(r), gather_rows(valid.float()) > 0.5
        # devices have different numbers of valid rows but their gradients the same weight: scale to the mean number
        mean_valid = valid_all.sum().clamp(min=1) / world_size()
        offset = rank() * len(r)
        r_columns, usable = r_all, valid_all
        if queue is not None and len(queue):
            queue = queue.to(r.dtype)
            z_teacher = torch.cat([z_teacher, self.teacher(queue)])
            r_columns = torch.cat([r_all, queue])
            usable = torch.cat([valid_all, valid_all.new_ones(len(queue))])
        similarity = (
            soft_positives(r, r_columns, sigma=config.positive_sigma)
            if config.contrast == "soft"
            else descriptor_similarity(r, r_columns)
        )
        contrast = contrastive_loss(
            tokens.student,
            z_teacher,
            similarity,
            torch.arange(len(r), device=r.device) + offset,
            usable,
            temperature=config.temperature,
            contrast=config.contrast,
            positive=config.positive_similarity,
            negative=config.negative_similarity,
        )
        # families are scaled by 1/sqrt(n): weigh them equally here too, by summing over features
        error = F.smooth_l1_loss(at_least_fp32(tokens.predicted), r, reduction="none").sum(1)
        ordered = partial(in_image_order, rows_an_image=config.tokens_per_patch if config.distill == "tokens" else 1)
        z_student = ordered(gather_rows(tokens.student))[ordered(valid_all)]
        return {
            "contrast": contrast.loss * (valid.sum() / mean_valid),
            "regression": (error * valid).sum() / mean_valid,
            "collapse": rank_penalty(z_student, floor=config.rank_floor),
            "mean_positives": contrast.mean_positives,
            "student_cosine": contrast.student_cosine,
            "teacher_cosine": contrast.teacher_cosine,
            EMBEDDINGS: z_student.detach(),
            DESCRIPTORS: ordered(r_all)[ordered(valid_all)],
        }


def num_features(config: TrainConfig) -> int:
    """Length F of the teacher's descriptor: 34 for each of its windows."""
    return len(FEATURE_NAMES) * (len(config.teacher_windows) if config.distill == "tokens" else 1)


def _batch_rows(token: torch.Tensor) -> torch.Tensor:
    """Row of the batch (B, M) each chosen token belongs to."""
    b, m = token.shape[:2]
    return torch.arange(b, device=token.device)[:, None].expand(b, m)

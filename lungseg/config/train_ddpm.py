"""Configuration of ``lungseg train-ddpm``: the network, the diffusion and the distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lungseg.config.fields import MAX_SEED, option


@dataclass(frozen=True)
class TrainConfig:
    """A diffusion model taught by radiomics. Sources: METHOD 1.1, 1.2, 7.3, 7.5."""

    # network
    base_width: int = option(64, "Channels of the first level.", minimum=8, maximum=512)
    multipliers: tuple[int, ...] = option((1, 2, 3, 4), "Width of each level, times the base.", minimum=1, maximum=16)
    encoder_blocks: int = option(
        1, "Residual blocks per encoder level (the decoder has one more).", minimum=1, maximum=8
    )
    stem: int = option(1, "Space-to-depth factor of the first layer (2: eight times cheaper).", minimum=1, maximum=4)
    norm: str = option(
        "channel", "channel: per voxel, independent of the patch size; group: 32 groups.", choices=("channel", "group")
    )
    attention: str = option(
        "window",
        "Attention over fixed windows of one training patch, wherever they lie in a lung, or over the patch given.",
        choices=("window", "patch"),
    )
    gradient_checkpointing: bool = option(
        False, "Compute blocks again in the backward pass instead of keeping them: less memory, a third slower."
    )
    compile: str = option(
        "auto",
        "torch.compile of the network, which changes nothing but rounding; auto: on CUDA, where a compiler works.",
        choices=("auto", "on", "off"),
    )
    head_norm: str = option("layer", "Normalisation in the two heads.", choices=("layer", "batch"))
    embedding: int = option(128, "Length of the student and teacher embeddings.", minimum=8, maximum=1024)
    # diffusion
    hu_window: str = option(
        "companded",
        "How HU become network input; 8-bit: each volume's own minimum to maximum in 256 steps, a baseline.",
        choices=("companded", "linear", "paper", "8-bit"),
    )
    schedule: str = option("cosine", "Noise schedule.", choices=("cosine", "linear"))
    timesteps: int = option(250, "Diffusion steps T.", minimum=10, maximum=4000)
    prediction: str = option("eps", "What the network predicts.", choices=("eps", "v", "x0"))
    loss: str = option("l1", "Distance of the prediction.", choices=("l1", "l2"))
    snr_gamma: float = option(
        0.0, "Min-SNR weighting: noise levels cleaner than this count no more (5 is usual); 0: no weighting.", minimum=0
    )
    zero_terminal: bool = option(
        False, "Rescale the schedule so that its last step is pure noise; for prediction v or x0."
    )
    # data
    patch_size: tuple[int, int, int] = option((32, 96, 96), "Training patch (z,y,x).", unit="voxels", minimum=8)
    flips: bool = option(True, "Random flips along the three axes.")
    axial_turns: bool = option(True, "Random turns by 0, 90, 180 or 270 degrees in the axial plane.")
    hu_offset: float = option(
        0.0, "Random shift of a patch, up to this either way (air calibration: 15).", unit="HU", minimum=0, maximum=200
    )
    hu_noise: float = option(
        0.0, "White noise of random SD up to this, added before the blur (dose: 30).", unit="HU", minimum=0, maximum=500
    )
    hu_blur: float = option(
        0.0, "Gaussian blur of random SD up to this (kernel: 0.8).", unit="voxels", minimum=0, maximum=4
    )
    held_out: float = option(
        0.1,
        "Share of the patients never trained on, for the held-out loss (4 or more patients).",
        minimum=0,
        maximum=0.5,
    )
    held_out_images: int = option(64, "Fixed patches, with fixed noise, of the held-out loss.", minimum=1)
    # optimisation
    total_images: int = option(480_000, "Length of the run.", unit="images", minimum=1)
    batch_size: int = option(16, "Images per step over all devices.", minimum=1)
    accumulate: int = option(
        1,
        "Parts a device works through its share of a batch in: less memory, but tokens contrast within a part.",
        minimum=1,
    )
    learning_rate: float = option(1e-4, "Peak learning rate.", above=0.0, maximum=1.0)
    unet_rate_scale: float = option(1.0, "Learning rate of the U-Net relative to the heads.", above=0.0, maximum=10.0)
    warmup_share: float = option(0.02, "Share of the run over which the learning rate rises.", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "Weight decay (AdamW; 0 is Adam).", minimum=0.0, maximum=1.0)
    clip_norm: float = option(1.0, "Largest gradient norm.", above=0.0)
    ema_decay: float = option(
        0.9995, "Decay per step of the averaged weights (shorter at the start).", minimum=0, maximum=1
    )
    precision: str = option("auto", "auto: bf16 on CUDA, fp32 elsewhere.", choices=("auto", "fp32", "bf16", "fp64"))
    # distillation
    distill: str = option(
        "tokens",
        "What is contrasted: tokens of the bottleneck, whole patches, or nothing.",
        choices=("tokens", "patches", "none"),
    )
    contrast: str = option(
        "grey-zone",
        "Positives: similar pairs with a grey zone, one threshold, only the own pair, or all pairs by their distance.",
        choices=("grey-zone", "threshold", "diagonal", "soft"),
    )
    temperature: float = option(0.07, "Temperature of the contrast (authors' code).", above=0.0)
    positive_similarity: float = option(0.7, "Cosine above which a pair is positive.", minimum=-1, maximum=1)
    negative_similarity: float = option(0.5, "Cosine below which a pair is negative.", minimum=-1, maximum=1)
    positive_sigma: float = option(
        0.5, "Contrast soft: distance of standardised descriptors at which a pair counts exp(-1/2).", above=0.0
    )
    queue_size: int = option(
        0, "Descriptors of earlier tokens contrasted as well (4096 is usual); 0: none.", minimum=0, maximum=1_000_000
    )
    distill_weight: float = option(0.5, "Weight of the contrast when fully on (authors' code).", minimum=0)
    distill_start: float = option(1 / 6, "Share of the run at which distillation starts.", minimum=0, maximum=1)
    distill_full: float = option(7 / 30, "Share of the run at which it is fully on.", minimum=0, maximum=1)
    distill_levels: float = option(
        0.2, "Share of the noise levels, from the clean end, at which the teacher is heard.", above=0.0, maximum=1.0
    )
    low_noise_share: float = option(
        0.5, "Share of the images shown at these levels; the others at any level.", minimum=0.0, maximum=1.0
    )
    regression_weight: float = option(
        1.0, "Weight of the radiomics regression head, same warm-up as the contrast.", minimum=0
    )
    collapse_weight: float = option(
        0.1, "Weight of the term against collapse; it is zero while the rank is above the floor.", minimum=0
    )
    rank_floor: float = option(
        12.0, "Effective rank of the student's embeddings below which that term acts.", minimum=1, maximum=1024
    )
    detach_bottleneck: bool = option(False, "Train the heads alone: no gradient of the distillation reaches the U-Net.")
    tokens_per_patch: int = option(8, "Tokens taught per patch and step.", minimum=1, maximum=4096)
    teacher_windows: tuple[int, ...] = option(
        (8, 16), "Edges of the teacher's windows around a token.", unit="voxels", minimum=4, maximum=64
    )
    teacher_view: str = option(
        "shown",
        "What the teacher sees of a patch with shifted, noisy or blurred HU: the patch as shown, or the clean one.",
        choices=("shown", "clean"),
    )
    mcc: bool = option(True, "Teacher with the maximal correlation coefficient (else dissimilarity).")
    # bookkeeping
    checkpoint_images: int = option(8_000, "Images between checkpoints.", minimum=1)
    log_images: int = option(1_600, "Images between lines of stats.jsonl.", minimum=1)
    preview_images: int = option(80_000, "Images between pictures of samples in previews/; 0: none.", minimum=0)
    tensorboard: bool = option(False, "Also write TensorBoard event files (extra `tensorboard`).")
    workers: int = option(0, "Loader processes per device.", minimum=0, maximum=64)
    cache_gib: float = option(
        8.0, "Memory for volumes kept by all loader processes of a machine together.", unit="GiB", minimum=0
    )
    seed: int = option(0, "Seed of weights, order, noise and augmentation.", minimum=0, maximum=MAX_SEED)

    @property
    def token_size(self) -> int:
        """Edge of a bottleneck token in voxels."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    def check(self) -> list[str]:
        """Conflicts between fields, in words."""
        if not self.multipliers:
            return ["--multipliers is empty"]
        problems = []
        if any(size % self.token_size for size in self.patch_size):
            problems.append(f"--patch-size {self.patch_size} is not a multiple of the token size {self.token_size}")
        if self.base_width % 2:
            problems.append(f"--base-width {self.base_width} is odd; the time embedding needs pairs")
        if self.distill_full < self.distill_start:
            problems.append("--distill-full lies before --distill-start")
        if self.negative_similarity > self.positive_similarity:
            problems.append("--negative-similarity is above --positive-similarity")
        if self.norm == "group" and any(self.base_width * m % 32 for m in self.multipliers):
            problems.append("--norm group needs widths that are multiples of 32")
        if self.distill == "tokens":
            problems += self._teacher_problems()
        if self.zero_terminal and self.prediction == "eps":
            problems.append(
                "--zero-terminal with --prediction eps: pure noise says nothing of the image, whose zero signal would "
                "be divided by; use --prediction v or x0"
            )
        if self.axial_turns and self.patch_size[1] != self.patch_size[2]:
            problems.append(f"--axial-turns needs patches as wide as high, not {self.patch_size}: use --no-axial-turns")
        if self.batch_size % self.accumulate:
            problems.append(
                f"--batch-size {self.batch_size} cannot be shared equally by --accumulate {self.accumulate}"
            )
        if self.hu_window == "8-bit" and (self.hu_offset or self.hu_noise or self.hu_blur):
            problems.append("--hu-window 8-bit has no HU to shift: drop --hu-offset, --hu-noise and --hu-blur")
        return problems

    def _teacher_problems(self) -> list[str]:
        size = self.token_size
        if not self.teacher_windows:
            return ["--teacher-windows is empty: give --distill none, or a window"]
        if len(set(self.teacher_windows)) < len(self.teacher_windows):
            return [f"--teacher-windows {self.teacher_windows} names a window twice"]
        problems = []
        for window in self.teacher_windows:
            if (window - size) % 2:
                problems.append(f"--teacher-windows: {window} cannot be centred on a token of {size}")
            if window < size:
                problems.append(f"--teacher-windows: {window} is smaller than a token of {size}")
        return problems


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model of an earlier lungseg in today's names: the one ``teacher_window`` became several."""
    current = dict(values)
    current.setdefault("axial_turns", False)  # earlier models may have patches that cannot be turned
    if "teacher_window" in current:
        current["teacher_windows"] = [current.pop("teacher_window")]
    return current

"""Configuration of ``lungseg train-ddpm``: the network, the diffusion and the distillation."""

from __future__ import annotations

from dataclasses import dataclass

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
        "torch.compile of the network; auto: on CUDA, where a compiler works; it never changes what is computed but "
        "by rounding.",
        choices=("auto", "on", "off"),
    )
    head_norm: str = option("layer", "Normalisation in the two heads.", choices=("layer", "batch"))
    embedding: int = option(128, "Length of the student and teacher embeddings.", minimum=8, maximum=1024)
    # diffusion
    hu_window: str = option("companded", "How HU become network input.", choices=("companded", "linear", "paper"))
    schedule: str = option("cosine", "Noise schedule.", choices=("cosine", "linear"))
    timesteps: int = option(250, "Diffusion steps T.", minimum=10, maximum=4000)
    prediction: str = option("eps", "What the network predicts.", choices=("eps", "v", "x0"))
    loss: str = option("l1", "Distance of the prediction.", choices=("l1", "l2"))
    # data
    patch_size: tuple[int, int, int] = option((32, 96, 96), "Training patch (z,y,x).", unit="voxels", minimum=8)
    flips: bool = option(True, "Random flips along the three axes.")
    # optimisation
    total_images: int = option(480_000, "Length of the run.", unit="images", minimum=1)
    batch_size: int = option(16, "Images per step over all devices.", minimum=1)
    learning_rate: float = option(1e-4, "Peak learning rate.", above=0.0, maximum=1.0)
    unet_rate_scale: float = option(1.0, "Learning rate of the U-Net relative to the heads.", above=0.0, maximum=10.0)
    warmup_share: float = option(0.02, "Share of the run over which the learning rate rises.", minimum=0, maximum=1)
    clip_norm: float = option(1.0, "Largest gradient norm.", above=0.0)
    ema_decay: float = option(
        0.9995, "Decay per step of the averaged weights (shorter at the start).", minimum=0, maximum=1
    )
    precision: str = option("auto", "auto: bf16 on CUDA, fp32 elsewhere.", choices=("auto", "fp32", "bf16"))
    # distillation
    distill: str = option(
        "tokens",
        "What is contrasted: tokens of the bottleneck, whole patches, or nothing.",
        choices=("tokens", "patches", "none"),
    )
    contrast: str = option(
        "grey-zone",
        "Positives: similar pairs with a grey zone, one threshold, or only the own pair.",
        choices=("grey-zone", "threshold", "diagonal"),
    )
    temperature: float = option(0.07, "Temperature of the contrast (authors' code).", above=0.0)
    positive_similarity: float = option(0.7, "Cosine above which a pair is positive.", minimum=-1, maximum=1)
    negative_similarity: float = option(0.5, "Cosine below which a pair is negative.", minimum=-1, maximum=1)
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
    tokens_per_patch: int = option(8, "Tokens taught per patch and step.", minimum=1, maximum=4096)
    teacher_window: int = option(
        8, "Edge of the teacher's window around a token.", unit="voxels", minimum=4, maximum=64
    )
    mcc: bool = option(True, "Teacher with the maximal correlation coefficient (else dissimilarity).")
    # bookkeeping
    checkpoint_images: int = option(8_000, "Images between checkpoints.", minimum=1)
    log_images: int = option(1_600, "Images between lines of stats.jsonl.", minimum=1)
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
        if self.distill == "tokens" and (self.teacher_window - self.token_size) % 2:
            problems.append(f"--teacher-window {self.teacher_window} cannot be centred on a token of {self.token_size}")
        if self.distill == "tokens" and self.teacher_window < self.token_size:
            problems.append(f"--teacher-window {self.teacher_window} is smaller than a token of {self.token_size}")
        return problems

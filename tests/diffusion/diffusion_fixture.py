"""Small volumes, configurations and models shared by the tests of the diffusion room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from lungseg.config.presets import make_config
from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.checkpoint import Student, unet_spec
from lungseg.diffusion.distillation import StudentHead
from lungseg.diffusion.normalisation import HU_WINDOWS
from lungseg.diffusion.schedule import make_schedule
from lungseg.diffusion.unet import UNet
from lungseg.radiomics.descriptor import FEATURE_NAMES, Standardisation, compute_descriptors
from lungseg.store.patches import PatchSource
from lungseg.store.reader import Artefact
from lungseg.store.schema import make_provenance, write_artefact

SHAPE = (20, 36, 36)
PATCH = (8, 16, 16)


def tiny_config(**values) -> TrainConfig:
    """A network of some 50,000 parameters with tokens of 4^3 voxels; every setting that a test leans on is given."""
    settings = {
        "base_width": 8,
        "multipliers": (1, 2),
        "stem": 2,
        "embedding": 16,
        "norm": "channel",
        "head_norm": "layer",
        "hu_window": "companded",
        "schedule": "cosine",
        "timesteps": 50,
        "prediction": "eps",
        "loss": "l1",
        "patch_size": PATCH,
        "flips": True,
        "total_images": 64,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "unet_rate_scale": 1.0,
        "warmup_share": 0.0,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "precision": "fp32",
        "distill": "tokens",
        "contrast": "grey-zone",
        "distill_weight": 0.5,
        "distill_start": 0.0,
        "distill_full": 0.0,
        "distill_levels": 1.0,
        "low_noise_share": 0.0,
        "tokens_per_patch": 4,
        "teacher_windows": (8,),
        "collapse_weight": 0.0,
        "axial_turns": False,
        "mcc": False,
        "seed": 3,
    }
    return make_config(TrainConfig, **{**settings, **values})


def write_volume(path: Path, seed: int) -> Path:
    """A ``volume.h5`` of one ellipsoid lung whose texture changes from place to place."""
    rng = np.random.default_rng(seed)
    coarse = 250 * gaussian_filter(rng.standard_normal(SHAPE), 4) / 0.04
    fine = gaussian_filter(rng.standard_normal(SHAPE), 0.6)
    image = np.clip(-820 + coarse + 120 * fine * (1 + coarse / 250), -1024, 400).astype(np.int16)
    grid = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    mask = sum(((g - n / 2 + 0.5) / (0.55 * n)) ** 2 for g, n in zip(grid, SHAPE, strict=True)) <= 1
    corners = np.array([[0, 0, 0], [6, 10, 10], [12, 20, 20], [6, 0, 20]], dtype=np.int32)
    datasets = {
        "image": image,
        "mask": mask.astype(np.uint8),
        "patches/corner": corners,
        "patches/mask_fraction": np.ones(len(corners), dtype=np.float32),
    }
    provenance = make_provenance("preprocess", {}, lung_median_hu=float(np.median(image[mask])))
    write_artefact(path, "volume", datasets, provenance=provenance)
    return path


def patch_source(volumes: list[Path], config: TrainConfig, *, halo: int, cache_bytes: int = 2**20) -> PatchSource:
    """The patches of some volumes, as the training stage lists them."""
    return PatchSource(
        volumes,
        size=config.patch_size,
        halo=halo,
        seed=config.seed,
        flips=config.flips,
        cache_bytes=cache_bytes,
        turns=config.axial_turns,
        limits=config.hu_window == "8-bit",
    )


def window_statistics(volumes: list[Path], window: int) -> Standardisation:
    """Standardisation of random windows of some volumes."""
    rng = np.random.default_rng(0)
    rows = []
    for path in volumes:
        with Artefact(path, "volume") as artefact:
            image, mask = artefact.read("image"), artefact.read("mask") > 0
            median = torch.tensor(artefact.provenance["lung_median_hu"])
        corners = rng.integers(0, np.array(SHAPE) - window + 1, size=(20, 3))
        boxes = [tuple(slice(c, c + window) for c in corner) for corner in corners]
        windows = torch.from_numpy(np.stack([image[box] for box in boxes])).float()
        inside = torch.from_numpy(np.stack([mask[box] for box in boxes]))
        rows.append(compute_descriptors(windows, inside, lung_median_hu=median, mcc=False))
    return Standardisation.fit(torch.cat(rows), window=(window,) * 3)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter, the zero-initialised ones too, with values that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 else 0.0) * (parameter == 1))


def tiny_student(**values) -> Student:
    """A student with random weights in evaluation mode."""
    config = tiny_config(**values)
    spec = unet_spec(config)
    unet = UNet(spec)
    head = StudentHead(spec.token_channels, config.embedding, len(FEATURE_NAMES), config.head_norm)
    randomise(unet, 1)
    randomise(head, 2)
    unet.eval().requires_grad_(False)
    head.eval().requires_grad_(False)
    schedule = make_schedule(config.schedule, config.timesteps)
    return Student(unet, head, HU_WINDOWS[config.hu_window], schedule, config, {"num_features": len(FEATURE_NAMES)})

"""Images a second of the training loader, alone and with a network, from memory and from disk.

Run as ``python tests/benchmarks/loader_speed.py``; about a minute. Processor time of one core, so that other work on
the machine changes little; the volumes are made of noise, as reading does not depend on what is in them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.utils.data import default_collate

from lungseg.config import TrainConfig, make_config
from lungseg.diffusion.training import Trainer
from lungseg.diffusion.training_images import TrainingImages, teacher_halo
from lungseg.radiomics.descriptor import FEATURE_NAMES, Standardisation
from lungseg.store.patches import PatchSource, patch_table
from lungseg.store.schema import make_provenance, write_artefact

SHAPE = (160, 224, 256)
IMAGES = 48


def make_volume(path: Path, size: tuple[int, int, int], seed: int) -> Path:
    """A ``volume.h5`` of one ellipsoid of smoothed noise."""
    rng = np.random.default_rng(seed)
    image = (-850 + 60 * gaussian_filter(rng.standard_normal(SHAPE, np.float32), 0.7)).astype(np.int16)
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in SHAPE)]
    mask = (sum(a**2 for a in axes) <= 0.9).astype(np.uint8)
    corners, fractions = patch_table(mask, size=size, stride=[n // 2 for n in size], min_fraction=0.5)
    datasets = {"image": image, "mask": mask, "patches/corner": corners, "patches/mask_fraction": fractions}
    write_artefact(path, "volume", datasets, provenance=make_provenance("preprocess", {}, lung_median_hu=-850.0))
    return path


def rate(work: Callable[[int], object], images: int = IMAGES) -> float:
    """Images a second of processor time, the first left out."""
    work(0)
    began = time.process_time()
    for index in range(1, images + 1):
        work(index)
    return images / (time.process_time() - began)


def main() -> None:
    """Print one line per case."""
    torch.set_num_threads(1)
    rows = [("preset", "patch", "from memory", "from disk", "all augmentation", "network alone", "loader and network")]
    with tempfile.TemporaryDirectory() as folder:
        for preset in ("tiny", "small", "lungseg"):
            config = make_config(TrainConfig, preset=preset)
            path = make_volume(Path(folder) / preset / "volume.h5", config.patch_size, 0)

            def images(config: TrainConfig, cache: int, path: Path = path) -> TrainingImages:
                source = PatchSource(
                    [path], size=config.patch_size, halo=teacher_halo(config), seed=0, flips=True, cache_bytes=cache,
                    turns=config.axial_turns,
                )  # fmt: skip
                return TrainingImages(source, config)

            loud = make_config(TrainConfig, preset=preset, hu_offset=15.0, hu_noise=30.0, hu_blur=0.8)
            cells = [rate(images(c, cache).__getitem__) for c, cache in ((config, 2**30), (config, 0), (loud, 2**30))]
            steps = ["", ""]
            if preset == "tiny":  # a step of the others takes minutes on one core
                names = FEATURE_NAMES
                plain = Standardisation((8, 8, 8), names, (0.0,) * len(names), (1.0,) * len(names), ())
                trainer, loader, batch = (
                    Trainer(config, (plain,), device="cpu"),
                    images(config, 2**30),
                    config.batch_size,
                )
                fixed = default_collate([loader[i] for i in range(batch)])

                def both(n: int, trainer: Trainer = trainer, loader: TrainingImages = loader) -> None:
                    batch = trainer.config.batch_size
                    trainer.step(default_collate([loader[n * batch + i] for i in range(batch)]), num_images=batch)

                alone = rate(lambda n, t=trainer, f=fixed: t.step(f, num_images=len(f["t"])), images=10)  # type: ignore[misc]
                steps = [f"{batch * alone:.0f}", f"{batch * rate(both, images=10):.0f}"]
            patch = "x".join(map(str, config.patch_size))
            rows.append((preset, patch, *(f"{cell:.0f}" for cell in cells), *steps))
    for row in rows:
        print(" | ".join(f"{cell:>18}" for cell in row))


if __name__ == "__main__":
    main()

"""Images, batches and steps of small runs, and whether two states are one."""

from __future__ import annotations

import torch
from diffusion_fixture import patch_source
from torch.utils.data import default_collate

from lungseg.diffusion.training_images import TrainingImages, teacher_halo


def images_of(volumes, config, **options):
    return TrainingImages(patch_source(volumes, config, halo=teacher_halo(config), **options), config)


def batch_of(images, indices):
    return default_collate([images[i] for i in indices])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def equal_states(a, b):
    flat_a, flat_b = _flatten(a), _flatten(b)
    return flat_a.keys() == flat_b.keys() and all(
        torch.equal(value, flat_b[key]) if isinstance(value, torch.Tensor) else value == flat_b[key]
        for key, value in flat_a.items()
    )


def _flatten(state, prefix=""):
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in _flatten(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def train(trainer, images, start, stop, batch_size=4):
    return [
        trainer.step(batch_of(images, range(i, i + batch_size)), num_images=batch_size)
        for i in range(start, stop, batch_size)
    ]

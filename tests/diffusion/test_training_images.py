"""What image i of a run is: its patch, noise, noise level and the tokens that are taught."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusion_fixture import tiny_config
from torch.utils.data import DataLoader
from training_batches import batch_of, images_of, same

from lungseg.diffusion.distilled_diffusion import DistilledDiffusion
from lungseg.diffusion.training_images import MIN_TOKEN_LUNG, teacher_halo


def test_image_is_the_same_in_any_order_and_from_any_cache(volumes):
    config = tiny_config()
    expected = [images_of(volumes, config)[i] for i in range(8)]
    images = images_of(volumes, config)
    hyperslabs = images_of(volumes, config, cache_bytes=0)
    for i in (7, 3, 3, 0, 5, 1):
        assert same(images[i], expected[i])
        assert same(hyperslabs[i], expected[i])


def test_ranks_share_the_images_of_one_process(volumes):
    config = tiny_config()
    single = list(DataLoader(images_of(volumes, config), batch_size=4, sampler=range(12)))
    ranks = [list(DataLoader(images_of(volumes, config), batch_size=2, sampler=range(r, 12, 2))) for r in range(2)]
    for whole, *parts in zip(single, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert same({key: value[rank::2] for key, value in whole.items()}, part)


def test_images_differ_by_index_and_seed(volumes):
    images, other = images_of(volumes, tiny_config()), images_of(volumes, tiny_config(seed=4))
    eps = [images[i]["eps"] for i in range(6)] + [other[i]["eps"] for i in range(6)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(eps, 2))
    assert len({int(images[i]["t"]) for i in range(20)}) > 8


def test_noise_of_neighbouring_images_is_independent(volumes):
    images = images_of(volumes, tiny_config(distill="none"))
    eps = torch.stack([images[i]["eps"].flatten() for i in (0, 1, 2, 1023, 1024, 10**6, 10**6 + 1)])
    correlation = torch.corrcoef(eps) - torch.eye(len(eps))
    assert correlation.abs().max() < 5 / math.sqrt(eps.shape[1])


def test_image_has_the_stated_shapes(volumes):
    config = tiny_config()
    image = images_of(volumes, config)[0]
    assert teacher_halo(config) == 2
    box = tuple(n + 4 for n in config.patch_size)
    assert (image["volume_hu"].shape, image["volume_hu"].dtype) == (box, torch.int16)
    assert (image["mask"].shape, image["mask"].dtype) == (box, torch.bool)
    assert (image["eps"].shape, image["eps"].dtype) == (config.patch_size, torch.float32)
    assert (image["token"].shape, image["token_valid"].shape) == ((4, 3), (4,))


@pytest.mark.parametrize(("values", "halo"), [({"teacher_windows": (16,)}, 6), ({"teacher_windows": (4,)}, 0)])
def test_halo_follows_the_teacher_window(values, halo):
    assert teacher_halo(tiny_config(**values)) == halo
    assert teacher_halo(tiny_config(**values, distill="none")) == 0
    assert teacher_halo(tiny_config(**values, distill="patches")) == 0


def test_noise_levels_run_from_one_to_the_last(volumes):
    images = images_of(volumes[:1], tiny_config(timesteps=10, distill="none"))
    t = [int(images[i]["t"]) for i in range(300)]
    assert set(t) == set(range(1, 11))
    eps = torch.stack([images[i]["eps"] for i in range(60)])
    assert abs(eps.mean()) < 4 / math.sqrt(eps.numel())
    assert abs(eps.var() - 1) < 4 * math.sqrt(2 / eps.numel())


def test_teacher_is_heard_at_low_noise_only_and_clean_images_have_no_noise_to_predict(volumes, statistics):
    config = tiny_config(timesteps=50, distill_levels=0.2, low_noise_share=0.5)
    images = images_of(volumes, config)
    low = 10  # 0.2 of 50
    t = np.array([int(images[i]["t"]) for i in range(400)])
    assert set(range(low + 1)) <= set(t.tolist())
    expected = 0.5 + 0.5 * low / 50  # half of all images, and a fifth of the others
    assert abs((t <= low).mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / 400)
    assert all(images[i]["token_valid"].any() <= (t[i] <= low) for i in range(60))
    assert any(images[i]["token_valid"].any() for i in range(60))

    model = DistilledDiffusion(config, statistics)
    clean = [i for i in range(400) if t[i] == 0][:2]
    noisy = [i for i in range(400) if t[i] > 0][:2]
    alone, mixed = model(batch_of(images, noisy), 0.0), model(batch_of(images, [*noisy, *clean]), 0.0)
    assert mixed["diffusion"].item() == pytest.approx(alone["diffusion"].item(), rel=1e-5)
    assert model(batch_of(images, clean), 0.0)["diffusion"].item() == 0.0


@pytest.mark.parametrize("window", [4, 8, 12])
def test_chosen_tokens_are_different_and_mostly_lung(volumes, window):
    config = tiny_config(teacher_windows=(window,), tokens_per_patch=20)
    images = images_of(volumes, config)
    filled = []
    for i in range(12):
        image = images[i]
        valid = image["token_valid"]
        assert valid.tolist() == sorted(valid.tolist(), reverse=True)
        tokens = image["token"][valid]
        assert len({tuple(token) for token in tokens.tolist()}) == len(tokens)
        count = 0
        for z, y, x in itertools.product(range(2), range(4), range(4)):
            corner = [4 * z, 4 * y, 4 * x]
            cut = image["mask"][tuple(slice(c, c + window) for c in corner)]
            assert cut.shape == (window,) * 3
            is_lung = cut.float().mean() >= MIN_TOKEN_LUNG
            count += is_lung
            assert is_lung or [z, y, x] not in tokens.tolist()
        assert len(tokens) == min(count, 20)
        filled.append(len(tokens))
    assert min(filled) < 20  # some patches have less lung than slots


@pytest.mark.parametrize("distill", ["none", "patches"])
def test_without_token_distillation_no_token_is_chosen(volumes, distill):
    image = images_of(volumes, tiny_config(distill=distill))[0]
    assert not image["token_valid"].any()

"""What the teacher sees: the window centred on a token, flipped with the patch, at low noise."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from diffusion_fixture import patch_source, tiny_config, window_statistics
from torch.utils.data import default_collate
from training_batches import batch_of, images_of

from lungseg.diffusion.distilled_diffusion import DistilledDiffusion
from lungseg.diffusion.training_images import TrainingImages, teacher_halo
from lungseg.errors import MismatchError
from lungseg.radiomics.descriptor import compute_descriptors
from lungseg.store.reader import Artefact


@pytest.mark.parametrize("window", [4, 8, 12])
def test_teacher_sees_the_window_centred_on_its_token(volumes, statistics, window):
    """Cut directly from the volume: a token of 4^3 voxels, and as much around it on either side."""
    config = tiny_config(teacher_windows=(window,), flips=False, tokens_per_patch=3)
    source = patch_source(volumes, config, halo=teacher_halo(config))
    images, model = TrainingImages(source, config), DistilledDiffusion(config, statistics)
    for index in range(8):
        batch = batch_of(images, [index])
        valid = batch["token_valid"].flatten()
        windows, masks = model.teacher_windows(batch, window)
        raw = model.describe([(windows, masks)], batch["lung_median_hu"].repeat_interleave(3), valid)
        path, corner = _place(source, config, index)
        with Artefact(path, "volume") as artefact:
            pad = [(16, 16)] * 3
            hu = np.pad(artefact.read("image"), pad, constant_values=-1024)
            lung = np.pad(artefact.read("mask"), pad) > 0
            median = artefact.provenance["lung_median_hu"]
        for slot in range(3):
            if not valid[slot]:
                assert raw[slot].isnan().all()
                continue
            # centre of the token, in voxel edges of the padded volume
            centre = corner + 4 * batch["token"][0, slot].numpy() + 2 + 16
            box = tuple(slice(c - window // 2, c + window // 2) for c in centre)
            cut, inside = torch.from_numpy(hu[box].copy()), torch.from_numpy(lung[box].copy())
            assert torch.equal(windows[slot], cut)
            assert torch.equal(masks[slot], inside)
            rows = compute_descriptors(cut[None].float(), inside[None], lung_median_hu=torch.tensor(median), mcc=False)
            assert torch.equal(raw[slot], statistics[0].apply(rows)[0])


def _place(source, config, index):
    """Volume and corner of image ``index``, drawn as ``PatchSource.read`` documents: from (seed, index) only."""
    rng = np.random.Generator(np.random.Philox(key=[config.seed, index]))
    case = source._cases[int(rng.integers(len(source._cases)))]
    path, corners = case.path, case.corners
    return path, corners[int(rng.integers(len(corners)))] + source._jitter(rng)


def test_flipped_patch_has_flipped_teacher_windows(volumes, statistics):
    plain, flipped = tiny_config(flips=False), tiny_config(flips=True)
    model = DistilledDiffusion(plain, statistics)
    seen = 0
    for index in range(12):
        a, b = (batch_of(images_of(volumes, config), [index]) for config in (plain, flipped))
        axes = [
            flips
            for n in range(4)
            for flips in itertools.combinations((1, 2, 3), n)
            if torch.equal(a["volume_hu"].flip(flips) if flips else a["volume_hu"], b["volume_hu"])
        ]
        assert len(axes) == 1
        seen += bool(axes[0])
        mirrored = b["token"].clone()
        for axis in axes[0]:
            mirrored[..., axis - 1] = plain.patch_size[axis - 1] // 4 - 1 - mirrored[..., axis - 1]
        mine = model.teacher_windows(b, 8)[0]
        theirs = model.teacher_windows({**a, "token": mirrored}, 8)[0]
        assert torch.equal(mine, theirs.flip(axes[0]) if axes[0] else theirs)
    assert seen > 4


def test_student_token_lies_under_the_teachers_window(volumes, statistics):
    """With the tokens of the bottleneck marked by their place, the head must see the marks of the chosen ones."""
    config = tiny_config()
    model = DistilledDiffusion(config, statistics)
    batch = batch_of(images_of(volumes, config), range(4))
    d, h, w = (n // 4 for n in config.patch_size)
    place = torch.arange(4 * d * h * w, dtype=torch.float32).view(4, 1, d, h, w)
    seen = []
    model.head.forward = lambda tokens: seen.append(tokens) or (torch.eye(16, 16), torch.zeros(16, 34))
    model._taught(batch, place.expand(4, 16, d, h, w))
    z, y, x = batch["token"].reshape(-1, 3).unbind(1)
    row = torch.arange(4).repeat_interleave(4)
    assert torch.equal(seen[0], place[row, 0, z, y, x][:, None].expand(16, 16))


def test_two_windows_stand_side_by_side(volumes):
    """One token taught by its 8^3 and its 16^3 voxels: each as if it were the only one, divided by sqrt(2)."""
    both = tiny_config(teacher_windows=(8, 16), tokens_per_patch=3)
    statistics = {window: window_statistics(volumes, window) for window in (8, 16)}
    model = DistilledDiffusion(both, [statistics[8], statistics[16]])
    assert teacher_halo(both) == 6
    assert model.num_features == 68
    batch = batch_of(images_of(volumes, both), range(6))
    valid, median = batch["token_valid"].flatten(), batch["lung_median_hu"].repeat_interleave(3)
    views = [model.teacher_windows(batch, window) for window in (8, 16)]
    rows = model.describe(views, median, valid)
    for number, window in enumerate((8, 16)):
        hu, inside = views[number]
        assert hu.shape[1:] == (window,) * 3
        alone = DistilledDiffusion(tiny_config(teacher_windows=(window,)), [statistics[window]])
        expected = alone.describe([(hu, inside)], median, valid) / math.sqrt(2)
        torch.testing.assert_close(rows[:, 34 * number : 34 * number + 34], expected, equal_nan=True)
    # the small window is the middle of the large one: both lie around the same token
    assert torch.equal(views[0][0], views[1][0][:, 4:12, 4:12, 4:12])
    losses = model(batch, 1.0)
    losses["total"].backward()
    assert losses["regression"].isfinite()
    with pytest.raises(MismatchError, match="2 windows, not 1"):
        DistilledDiffusion(both, [statistics[8]])(batch, 1.0)


def _aligned(volumes, config, view):
    return images_of(volumes, tiny_config(**config, teacher_view=view))


def test_change_of_scanner_enters_the_teacher_where_it_is_shown(volumes, statistics):
    """``shown``: the teacher's window is the one the network gets; ``clean``: the one of the scan."""
    change = {"hu_offset": 40.0, "hu_noise": 30.0, "hu_blur": 0.8}
    for index in range(4):
        plain = images_of(volumes, tiny_config())[index]
        shown, clean = (_aligned(volumes, change, view)[index] for view in ("shown", "clean"))
        assert torch.equal(shown["volume_hu"], clean["volume_hu"])  # what the network sees
        assert not torch.equal(shown["volume_hu"], plain["volume_hu"])
        assert "teacher_hu" not in shown
        assert torch.equal(clean["teacher_hu"], plain["volume_hu"])
        assert clean["lung_median_hu"] == plain["lung_median_hu"]
        assert abs(shown["lung_median_hu"] - plain["lung_median_hu"]) <= 40
        for key in ("t", "eps", "token", "mask"):
            assert torch.equal(shown[key], plain[key])
    model = DistilledDiffusion(tiny_config(), statistics)
    plain, shown, clean = (
        default_collate([images[i] for i in range(4)])
        for images in (images_of(volumes, tiny_config()), *(_aligned(volumes, change, v) for v in ("shown", "clean")))
    )
    reference = model.teacher_windows(plain, 8)[0]
    assert torch.equal(model.teacher_windows(clean, 8)[0], reference)
    assert not torch.equal(model.teacher_windows(shown, 8)[0], reference)


def test_8_bit_input_is_scaled_by_its_own_volume(volumes):
    config = tiny_config(hu_window="8-bit", distill="none")
    batch = batch_of(images_of(volumes, config), range(6))
    model = DistilledDiffusion(config, ())
    seen = []
    model.schedule = copy.copy(model.schedule)
    object.__setattr__(model.schedule, "q_sample", lambda x_0, t, eps: seen.append(x_0) or x_0)
    model(batch, 0.0)
    low, high = (v.view(-1, 1, 1, 1) for v in batch["limits_hu"].unbind(1))
    expected = ((batch["volume_hu"].float() - low) / (high - low) * 255).round().clamp(0, 255) / 127.5 - 1
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)
    assert len(set(batch["limits_hu"][:, 1].tolist())) > 1  # volumes differ


def test_distillation_needs_the_standardisation(volumes):
    config = tiny_config()
    with pytest.raises(MismatchError, match="standardisation"):
        DistilledDiffusion(config, ())(batch_of(images_of(volumes, config), range(4)), 0.5)

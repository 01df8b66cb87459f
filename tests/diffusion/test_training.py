"""What image i is, what one step does, and that neither resuming nor the number of processes changes a run."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from diffusion_fixture import patch_source, randomise, tiny_config, window_statistics, write_volume
from torch.utils.data import DataLoader, default_collate

import lungseg.diffusion.distilled_diffusion as losses_module
import lungseg.diffusion.training as training_module
from lungseg.diffusion.checkpoint import load_training_state, save_training_state, unet_spec
from lungseg.diffusion.distillation import StudentHead
from lungseg.diffusion.distilled_diffusion import DistilledDiffusion
from lungseg.diffusion.training import MAX_SKIPPED_IN_A_ROW, Trainer
from lungseg.diffusion.training_images import MIN_TOKEN_LUNG, TrainingImages, teacher_halo
from lungseg.diffusion.unet import UNet
from lungseg.errors import MismatchError, UsageError
from lungseg.radiomics.descriptor import FEATURE_NAMES, compute_descriptors
from lungseg.store.reader import Artefact


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return [write_volume(folder / f"case-{i}" / "volume.h5", seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def statistics(volumes):
    return (window_statistics(volumes, 8),)


def _images(volumes, config, **options):
    return TrainingImages(patch_source(volumes, config, halo=teacher_halo(config), **options), config)


def _batch(images, indices):
    return default_collate([images[i] for i in indices])


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _equal_states(a, b):
    flat_a, flat_b = _flatten(a), _flatten(b)
    return flat_a.keys() == flat_b.keys() and all(
        torch.equal(value, flat_b[key]) if isinstance(value, torch.Tensor) else value == flat_b[key]
        for key, value in flat_a.items()
    )


def _flatten(state, prefix=""):
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in _flatten(value, f"{prefix}/{key}").items()}
    return {prefix: state}


# --- images ---


def test_image_is_the_same_in_any_order_and_from_any_cache(volumes):
    config = tiny_config()
    expected = [_images(volumes, config)[i] for i in range(8)]
    images = _images(volumes, config)
    hyperslabs = _images(volumes, config, cache_bytes=0)
    for i in (7, 3, 3, 0, 5, 1):
        assert _same(images[i], expected[i])
        assert _same(hyperslabs[i], expected[i])


def test_ranks_share_the_images_of_one_process(volumes):
    config = tiny_config()
    single = list(DataLoader(_images(volumes, config), batch_size=4, sampler=range(12)))
    ranks = [list(DataLoader(_images(volumes, config), batch_size=2, sampler=range(r, 12, 2))) for r in range(2)]
    for whole, *parts in zip(single, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert _same({key: value[rank::2] for key, value in whole.items()}, part)


def test_images_differ_by_index_and_seed(volumes):
    images, other = _images(volumes, tiny_config()), _images(volumes, tiny_config(seed=4))
    eps = [images[i]["eps"] for i in range(6)] + [other[i]["eps"] for i in range(6)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(eps, 2))
    assert len({int(images[i]["t"]) for i in range(20)}) > 8


def test_noise_of_neighbouring_images_is_independent(volumes):
    images = _images(volumes, tiny_config(distill="none"))
    eps = torch.stack([images[i]["eps"].flatten() for i in (0, 1, 2, 1023, 1024, 10**6, 10**6 + 1)])
    correlation = torch.corrcoef(eps) - torch.eye(len(eps))
    assert correlation.abs().max() < 5 / math.sqrt(eps.shape[1])


def test_image_has_the_stated_shapes(volumes):
    config = tiny_config()
    image = _images(volumes, config)[0]
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
    images = _images(volumes[:1], tiny_config(timesteps=10, distill="none"))
    t = [int(images[i]["t"]) for i in range(300)]
    assert set(t) == set(range(1, 11))
    eps = torch.stack([images[i]["eps"] for i in range(60)])
    assert abs(eps.mean()) < 4 / math.sqrt(eps.numel())
    assert abs(eps.var() - 1) < 4 * math.sqrt(2 / eps.numel())


def test_teacher_is_heard_at_low_noise_only_and_clean_images_have_no_noise_to_predict(volumes, statistics):
    config = tiny_config(timesteps=50, distill_levels=0.2, low_noise_share=0.5)
    images = _images(volumes, config)
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
    alone, mixed = model(_batch(images, noisy), 0.0), model(_batch(images, [*noisy, *clean]), 0.0)
    assert mixed["diffusion"].item() == pytest.approx(alone["diffusion"].item(), rel=1e-5)
    assert model(_batch(images, clean), 0.0)["diffusion"].item() == 0.0


@pytest.mark.parametrize("window", [4, 8, 12])
def test_chosen_tokens_are_different_and_mostly_lung(volumes, window):
    config = tiny_config(teacher_windows=(window,), tokens_per_patch=20)
    images = _images(volumes, config)
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
    image = _images(volumes, tiny_config(distill=distill))[0]
    assert not image["token_valid"].any()


# --- the teacher ---


@pytest.mark.parametrize("window", [4, 8, 12])
def test_teacher_sees_the_window_centred_on_its_token(volumes, statistics, window):
    """Cut directly from the volume: a token of 4^3 voxels, and as much around it on either side."""
    config = tiny_config(teacher_windows=(window,), flips=False, tokens_per_patch=3)
    source = patch_source(volumes, config, halo=teacher_halo(config))
    images, model = TrainingImages(source, config), DistilledDiffusion(config, statistics)
    for index in range(8):
        batch = _batch(images, [index])
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
        a, b = (_batch(_images(volumes, config), [index]) for config in (plain, flipped))
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
    batch = _batch(_images(volumes, config), range(4))
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
    batch = _batch(_images(volumes, both), range(6))
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
    return _images(volumes, tiny_config(**config, teacher_view=view))


def test_change_of_scanner_enters_the_teacher_where_it_is_shown(volumes, statistics):
    """``shown``: the teacher's window is the one the network gets; ``clean``: the one of the scan."""
    change = {"hu_offset": 40.0, "hu_noise": 30.0, "hu_blur": 0.8}
    for index in range(4):
        plain = _images(volumes, tiny_config())[index]
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
        for images in (_images(volumes, tiny_config()), *(_aligned(volumes, change, v) for v in ("shown", "clean")))
    )
    reference = model.teacher_windows(plain, 8)[0]
    assert torch.equal(model.teacher_windows(clean, 8)[0], reference)
    assert not torch.equal(model.teacher_windows(shown, 8)[0], reference)


def test_8_bit_input_is_scaled_by_its_own_volume(volumes):
    config = tiny_config(hu_window="8-bit", distill="none")
    batch = _batch(_images(volumes, config), range(6))
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
        DistilledDiffusion(config, ())(_batch(_images(volumes, config), range(4)), 0.5)


# --- losses ---


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_diffusion_loss_of_an_untrained_network_is_the_size_of_its_target(volumes, prediction, loss):
    config = tiny_config(prediction=prediction, loss=loss, distill="none")
    batch = _batch(_images(volumes, config), range(4))
    model = DistilledDiffusion(config, ())
    x_0 = model.window.normalise(batch["volume_hu"])
    a = model.schedule.alpha_bar[batch["t"]].view(-1, 1, 1, 1)
    eps = batch["eps"]
    target = {"eps": eps, "x0": x_0, "v": a.sqrt() * eps - (1 - a).sqrt() * x_0}[prediction]
    expected = (target.abs() if loss == "l1" else target.square()).mean().item()
    values = model(batch, 0.0)
    assert values["diffusion"].item() == pytest.approx(expected, rel=1e-5)
    assert values["total"].item() == values["diffusion"].item()


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_min_snr_weights_are_those_of_squared_errors(volumes, loss):
    plain = tiny_config(prediction="v", loss=loss, distill="none")
    batch = _batch(_images(volumes, plain), range(4))
    each = []
    for i in range(4):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        each.append(DistilledDiffusion(plain, ())(one, 0.0)["diffusion"].item())
    snr = DistilledDiffusion(plain, ()).schedule.snr(batch["t"])
    weight = snr.clamp(max=5) / (snr + 1)
    weight = weight.sqrt() if loss == "l1" else weight
    expected = (torch.tensor(each, dtype=torch.float64) * weight).mean().item()
    weighted = tiny_config(prediction="v", loss=loss, distill="none", snr_gamma=5.0)
    assert DistilledDiffusion(weighted, ())(batch, 0.0)["diffusion"].item() == pytest.approx(expected, rel=1e-5)


def test_diffusion_loss_compares_the_prediction_with_the_noise_of_the_patch(volumes, statistics):
    config = tiny_config()
    model = DistilledDiffusion(config, statistics)
    randomise(model.unet)
    batch = _batch(_images(volumes, config), range(4))
    inner = (slice(None), *(slice(2, 2 + n) for n in config.patch_size))
    hu, mask = batch["volume_hu"][inner], batch["mask"][inner]
    x_t = model.schedule.q_sample(model.window.normalise(hu), batch["t"], batch["eps"])
    output = model.unet(torch.stack([x_t, mask.float()], dim=1), batch["t"])[0]
    expected = (output[:, 0] - batch["eps"]).abs().mean().item()
    assert model(batch, 0.0)["diffusion"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distill", ["tokens", "patches"])
def test_total_grows_linearly_with_the_weight(volumes, distill):
    window = 8 if distill == "tokens" else 16
    config = tiny_config(distill=distill, patch_size=(16, 16, 16), regression_weight=1.5, distill_weight=0.5)
    model = DistilledDiffusion(config, (window_statistics(volumes, window),))
    batch = _batch(_images(volumes, config), range(4))
    quarter, half = model(batch, 0.25), model(batch, 0.5)
    assert half["contrast"].item() == quarter["contrast"].item()
    gain = [v["total"].item() - v["diffusion"].item() for v in (quarter, half)]
    assert gain[1] == pytest.approx(2 * gain[0], rel=1e-4)
    assert gain[1] >= 0.5 * half["contrast"].item()
    assert half["mean_positives"].item() >= 1
    half["total"].backward()
    for module in (model.unet, model.head, model.teacher):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("detach", [False, True])
def test_distillation_reaches_the_network_unless_detached(volumes, statistics, detach):
    """METHOD 1.8, flaw 5: gradients of the contrast alone, without those of the diffusion."""
    config = tiny_config(detach_bottleneck=detach)
    model = DistilledDiffusion(config, statistics)
    randomise(model.unet)
    values = model(_batch(_images(volumes, config), range(4)), 1.0)
    (values["contrast"] + values["regression"]).backward()
    encoder = [p.grad for p in model.unet.encoder.parameters()]
    assert all(g is None for g in encoder) == detach
    assert any(g is not None and g.abs().sum() > 0 for g in encoder) != detach
    for module in (model.head, model.teacher):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_rank_floor_is_part_of_the_total(volumes, statistics):
    config = tiny_config(collapse_weight=2.0, rank_floor=8.0)
    model = DistilledDiffusion(config, statistics)
    with torch.no_grad():  # all tokens alike
        model.head.project.weight.zero_()
        model.head.project.weight[0] = 1.0
    values = model(_batch(_images(volumes, config), range(4)), 0.5)
    parts = values["contrast"] * config.distill_weight + values["regression"] * config.regression_weight
    expected = values["diffusion"] + 0.5 * (parts + 2.0 * values["collapse"])
    assert values["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert values["collapse"].item() == pytest.approx(math.log(min(8.0, len(values["embeddings"]) / 2)), rel=0.01)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_every_parameter_takes_part_in_every_step(volumes, statistics, weight):
    """Distributed reduction waits for the gradient of each parameter."""
    config = tiny_config()
    model = DistilledDiffusion(config, statistics)
    model(_batch(_images(volumes, config), range(4)), weight)["total"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_batch_without_lung_still_trains(volumes, statistics):
    config = tiny_config()
    trainer = Trainer(config, statistics, device="cpu")
    batch = _batch(_images(volumes, config), range(4))
    batch["mask"][:] = False
    batch["token_valid"][:] = False
    result = trainer.step(batch, num_images=4)
    assert not result.skipped
    assert result.values["contrast"] == result.values["regression"] == 0
    assert math.isfinite(result.values["gradient_norm"])


# --- steps ---


def _train(trainer, images, start, stop, batch_size=4):
    return [
        trainer.step(_batch(images, range(i, i + batch_size)), num_images=batch_size)
        for i in range(start, stop, batch_size)
    ]


def test_weights_follow_from_the_seed_alone(statistics):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = Trainer(tiny_config(), statistics, device="cpu").state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert _equal_states(first, Trainer(tiny_config(), statistics, device="cpu").state_dict())
    assert not _equal_states(first, Trainer(tiny_config(seed=9), statistics, device="cpu").state_dict())


@pytest.mark.parametrize("head_norm", ["layer", "batch"])
def test_resumed_run_is_the_uninterrupted_run(volumes, statistics, tmp_path, head_norm):
    config = tiny_config(head_norm=head_norm, distill_start=0.1, distill_full=0.3)
    images = _images(volumes, config)
    whole = Trainer(config, statistics, device="cpu")
    _train(whole, images, 0, 12)
    save_training_state(tmp_path / "state.pt", whole.state_dict())
    _train(whole, images, 12, 24)
    resumed = Trainer(config, statistics, device="cpu")
    resumed.load_state_dict(load_training_state(tmp_path / "state.pt"))
    assert (resumed.images, resumed.steps) == (12, 3)
    _train(resumed, _images(volumes, config), 12, 24)
    assert _equal_states(resumed.state_dict(), whole.state_dict())


def test_state_of_another_network_is_refused(statistics):
    state = Trainer(tiny_config(), statistics, device="cpu").state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        Trainer(tiny_config(base_width=16), statistics, device="cpu").load_state_dict(state)


def test_distillation_weight_follows_the_share_of_images(statistics):
    published = tiny_config(
        total_images=30_000 * 16, distill_start=1 / 6, distill_full=7 / 30, distill_weight=0.5, batch_size=16
    )
    trainer = Trainer(published, statistics, device="cpu")
    for step, weight in ((0, 0), (5000, 0), (6000, 0.25), (7000, 0.5), (30_000, 0.5)):
        trainer.images = step * 16
        assert trainer.distill_weight == pytest.approx(weight, abs=1e-9)


def test_step_reports_the_weight_it_used(volumes, statistics):
    config = tiny_config(total_images=32, distill_start=0.25, distill_full=0.5)
    results = _train(Trainer(config, statistics, device="cpu"), _images(volumes, config), 0, 24)
    assert [r.values["weight"] for r in results] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.5])
    assert ["contrast" in r.values for r in results] == [False, False, False, True, True, True]


def test_learning_rate_rises_then_falls(volumes):
    config = tiny_config(distill="none", total_images=80, warmup_share=0.2, unet_rate_scale=0.05, learning_rate=2e-3)
    trainer, images = Trainer(config, (), device="cpu"), _images(volumes, config)
    batch, rates = _batch(images, range(4)), []
    for _ in range(20):
        rates.append(trainer.step(batch, num_images=4).values["rate"])
        unet, heads = (group["lr"] for group in trainer.optimiser.param_groups)
        assert heads == pytest.approx(2e-3 * rates[-1])
        assert unet == pytest.approx(0.05 * heads)
    assert rates[1:4] == pytest.approx([0.25, 0.5, 0.75])
    assert max(rates) == rates[4] == pytest.approx(1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] < 0.05


def test_averaged_weights_follow_their_formula(volumes, statistics):
    config = tiny_config(ema_decay=0.2)
    trainer, images = Trainer(config, statistics, device="cpu"), _images(volumes, config)
    expected = copy.deepcopy(trainer.model.state_dict())
    for step in range(5):
        _train(trainer, images, 4 * step, 4 * step + 4)
        decay = min(0.2, (1 + step) / (10 + step))  # 0.1, 0.18, then 0.2
        for name, value in trainer.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in trainer.ema.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert not any(p.requires_grad for p in trainer.ema.parameters())


def test_student_weights_fit_a_student(volumes, statistics):
    config = tiny_config()
    trainer = Trainer(config, statistics, device="cpu")
    _train(trainer, _images(volumes, config), 0, 4)
    weights = trainer.student_weights()
    spec = unet_spec(config)
    head = StudentHead(spec.token_channels, config.embedding, len(FEATURE_NAMES), config.head_norm)
    for prefix, module in (("unet.", UNet(spec)), ("head.", head)):
        own = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        module.load_state_dict(own)
    assert not any(name.startswith("teacher.") for name in weights)
    assert torch.equal(weights["unet.conv_in.weight"], trainer.ema.unet.conv_in.weight)


def test_gradient_norm_is_clipped(volumes):
    config = tiny_config(distill="none", clip_norm=1e-3)
    trainer = Trainer(config, (), device="cpu")
    result = trainer.step(_batch(_images(volumes, config), range(4)), num_images=4)
    squares = sum(p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None)
    assert result.values["gradient_norm"] > 1e-2
    assert squares.sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def _nan(batch):
    return {**batch, "eps": torch.full_like(batch["eps"], torch.nan)}


@pytest.mark.parametrize("head_norm", ["layer", "batch"])
def test_row_51_batch_with_nan_is_skipped_and_counted(volumes, statistics, head_norm):
    config = tiny_config(head_norm=head_norm)
    trainer, images = Trainer(config, statistics, device="cpu"), _images(volumes, config)
    _train(trainer, images, 0, 4)
    before = copy.deepcopy(trainer.state_dict())
    result = trainer.step(_nan(_batch(images, range(4, 8))), num_images=4)
    after = trainer.state_dict()
    assert result.skipped
    assert math.isnan(result.values["total"])
    assert (after["images"], after["steps"], after["skipped"], after["skipped_in_a_row"]) == (8, 2, 1, 1)
    for part in ("model", "ema"):
        assert _equal_states(after[part], before[part])
    assert _equal_states(after["optimiser"]["state"], before["optimiser"]["state"])
    result = trainer.step(_batch(images, range(8, 12)), num_images=4)
    assert not result.skipped
    assert math.isfinite(result.values["total"])
    assert (trainer.skipped, trainer.state_dict()["skipped_in_a_row"]) == (1, 0)
    assert all(t.isfinite().all() for t in trainer.student_weights().values())


def test_row_51_many_skipped_steps_in_a_row_stop_the_run(volumes):
    config = tiny_config(distill="none", total_images=1000)
    trainer, images = Trainer(config, (), device="cpu"), _images(volumes, config)
    good, bad = _batch(images, [0]), _nan(_batch(images, [0]))
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        trainer.step(bad, num_images=1)
    trainer.step(good, num_images=1)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        trainer.step(bad, num_images=1)
    with pytest.raises(MismatchError, match=rf"no finite gradient for {MAX_SKIPPED_IN_A_ROW} steps in a row"):
        trainer.step(bad, num_images=1)
    assert trainer.skipped == 2 * MAX_SKIPPED_IN_A_ROW - 1


def test_count_of_skipped_steps_survives_resuming(volumes):
    config = tiny_config(distill="none")
    trainer = Trainer(config, (), device="cpu")
    trainer.step(_nan(_batch(_images(volumes, config), [0])), num_images=1)
    resumed = Trainer(config, (), device="cpu")
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert (resumed.skipped, resumed.state_dict()["skipped_in_a_row"]) == (1, 1)


def test_row_52_bf16_on_a_cpu_is_refused(statistics):
    with pytest.raises(UsageError, match="wrong gradients on a CPU: use --precision fp32"):
        Trainer(tiny_config(precision="bf16"), statistics, device="cpu")


def test_teacher_and_contrast_stay_in_fp32_under_autocast(volumes, statistics, monkeypatch):
    config = tiny_config()
    model = DistilledDiffusion(config, statistics)
    batch = _batch(_images(volumes, config), range(4))
    exact = model(batch, 0.5)
    dtypes = []
    compute = losses_module.compute_descriptors

    def spy(patches, masks, **options):
        dtypes.append((patches.dtype, torch.is_autocast_enabled("cpu")))
        return compute(patches, masks, **options)

    monkeypatch.setattr(losses_module, "compute_descriptors", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(batch, 0.5)
    assert dtypes == [(torch.float32, False)]
    assert mixed["mean_positives"].item() == exact["mean_positives"].item()
    for name in ("diffusion", "contrast", "regression"):
        assert mixed[name].dtype == torch.float32
        assert mixed[name].item() == pytest.approx(exact[name].item(), rel=0.03)


@pytest.mark.gpu
def test_bf16_step_on_a_gpu(volumes, statistics):
    config = tiny_config(precision="auto")
    trainer = Trainer(config, statistics, device="cuda")
    result = trainer.step(_batch(_images(volumes, config), range(4)), num_images=4)
    assert trainer.precision == "bf16"
    assert not result.skipped
    exact = Trainer(tiny_config(), statistics, device="cpu").step(
        _batch(_images(volumes, config), range(4)), num_images=4
    )
    assert result.values["diffusion"] == pytest.approx(exact.values["diffusion"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "auto"])
def test_all_options_together_on_a_gpu(volumes, compiled):
    """Parts, queue, rank floor, recomputation, 8-bit input and compilation: near the losses on the CPU."""
    settings = {
        "accumulate": 2, "queue_size": 30, "collapse_weight": 0.5, "contrast": "soft", "gradient_checkpointing": True,
        "hu_window": "8-bit", "prediction": "v", "zero_terminal": True, "snr_gamma": 5.0, "teacher_windows": (8, 16),
    }  # fmt: skip
    config = tiny_config(**settings, precision="auto", compile=compiled)
    statistics = tuple(window_statistics(volumes, window) for window in (8, 16))
    images = _images(volumes, config)
    trainers = [Trainer(config, statistics, device=device) for device in ("cuda", "cpu")]
    results = [_train(trainer, images, 0, 8) for trainer in trainers]
    for on_gpu, on_cpu in zip(*results, strict=True):
        assert not on_gpu.skipped
        assert on_gpu.values["diffusion"] == pytest.approx(on_cpu.values["diffusion"], rel=0.03)
        assert on_gpu.values["regression"] == pytest.approx(on_cpu.values["regression"], rel=0.05)
    assert len(trainers[0].queue.rows) == len(trainers[1].queue.rows)


@pytest.mark.gpu
def test_estimate_of_the_memory_bounds_the_peak_on_a_gpu(volumes):
    from lungseg.diffusion.footprint import footprint

    config = tiny_config(base_width=32, batch_size=8, precision="auto", compile="off", distill="none")
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, (), device="cuda")
    _train(trainer, _images(volumes, config), 0, 16, batch_size=8)
    needed = footprint(config).memory_bytes(images=8, precision=trainer.precision, device="cuda")
    assert torch.cuda.max_memory_allocated() < needed


def test_row_52_auto_precision_is_fp32_on_a_cpu(statistics):
    assert Trainer(tiny_config(precision="auto"), statistics, device="cpu").precision == "fp32"


# --- parts of a batch, the queue, fixed patches ---


def test_parts_of_a_batch_give_the_gradient_of_the_whole(volumes):
    """Without contrast nothing in a batch depends on the rest of it; images at t = 0 fall unevenly into the parts."""
    settings = {"distill": "none", "low_noise_share": 0.6, "distill_levels": 0.02, "batch_size": 8, "clip_norm": 1e9}
    batch = _batch(_images(volumes, tiny_config(**settings)), range(8))
    noisy = [int((batch["t"][k : k + 2] > 0).sum()) for k in range(0, 8, 2)]
    assert len(set(noisy)) > 1
    results = []
    for parts in (1, 2, 4):
        trainer = Trainer(tiny_config(**settings, accumulate=parts), (), device="cpu")
        values = trainer.step(batch, num_images=8).values
        results.append((values["diffusion"], values["gradient_norm"], trainer.model.unet.conv_in.weight.grad.clone()))
    for loss, norm, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-4)
        torch.testing.assert_close(gradient, results[0][2], rtol=1e-3, atol=1e-7)


def test_queue_holds_the_descriptors_of_steps_before_and_adds_negatives(volumes, statistics):
    config = tiny_config(queue_size=24, accumulate=2)
    images, trainer = _images(volumes, config), Trainer(config, statistics, device="cpu")
    assert len(trainer.queue.rows) == 0
    _train(trainer, images, 0, 4)
    first = trainer.queue.rows.clone()
    valid = sum(int(images[i]["token_valid"].sum()) for i in range(4))
    assert 0 < len(first) == valid
    batch = _batch(images, range(4, 8))
    with torch.no_grad():
        alone = trainer.model(batch, 1.0)["contrast"].item()
        more = trainer.model(batch, 1.0, None, first)["contrast"].item()
    assert more > alone  # more columns in the denominator
    _train(trainer, images, 4, 20)
    assert len(trainer.queue.rows) == 24
    assert trainer.queue.rows.isfinite().all()
    before = trainer.queue.rows.clone()
    trainer.step(_nan(_batch(images, range(20, 24))), num_images=4)
    assert torch.equal(trainer.queue.rows, before)  # a skipped step leaves nothing


@pytest.mark.parametrize("contrast", ["grey-zone", "soft"])
def test_resumed_run_with_a_queue_is_the_uninterrupted_run(volumes, tmp_path, contrast):
    config = tiny_config(
        queue_size=20, contrast=contrast, accumulate=2, collapse_weight=0.5, teacher_windows=(8, 16), axial_turns=True,
        hu_noise=20.0, total_images=64,
    )  # fmt: skip
    statistics = tuple(window_statistics(volumes, window) for window in (8, 16))
    images, whole = _images(volumes, config), Trainer(config, statistics, device="cpu")
    _train(whole, images, 0, 12)
    save_training_state(tmp_path / "state.pt", whole.state_dict())
    _train(whole, images, 12, 24)
    resumed = Trainer(config, statistics, device="cpu")
    resumed.load_state_dict(load_training_state(tmp_path / "state.pt"))
    _train(resumed, images, 12, 24)
    assert _equal_states(resumed.state_dict(), whole.state_dict())


def test_judging_changes_nothing_and_uses_the_averaged_weights(volumes, statistics):
    config = tiny_config(ema_decay=0.5)
    images, trainer = _images(volumes, config), Trainer(config, statistics, device="cpu")
    _train(trainer, images, 0, 8)
    before = copy.deepcopy(trainer.state_dict())
    batch = _batch(images, range(50, 54))
    values = trainer.judge(batch)
    assert _equal_states(trainer.state_dict(), before)
    with torch.no_grad():
        expected = trainer.ema(batch, 1.0)
    assert values == pytest.approx({name: expected[name].item() for name in ("diffusion", "regression")})
    assert values["diffusion"] != pytest.approx(trainer.model(batch, 1.0)["diffusion"].item(), rel=1e-6)


def test_gradient_norms_are_those_of_network_and_heads(volumes, statistics):
    config = tiny_config(clip_norm=1e9)
    trainer = Trainer(config, statistics, device="cpu")
    values = trainer.step(_batch(_images(volumes, config), range(4)), num_images=4).values

    def norm(*modules):
        return torch.cat([p.grad.flatten() for m in modules for p in m.parameters()]).norm().item()

    assert values["gradient_norm_unet"] == pytest.approx(norm(trainer.model.unet), rel=1e-5)
    assert values["gradient_norm_heads"] == pytest.approx(norm(trainer.model.head, trainer.model.teacher), rel=1e-5)
    assert values["gradient_norm"] == pytest.approx(norm(trainer.model), rel=1e-5)


# --- learning ---


@pytest.mark.slow
def test_one_patch_is_learnt(volumes):
    config = tiny_config(
        distill="none", base_width=16, flips=False, total_images=960, learning_rate=2e-3, warmup_share=0.05
    )
    images = _images(volumes[:1], config)
    one = images[0]
    trainer = Trainer(config, (), device="cpu")

    def batch(indices):
        drawn = _batch(images, indices)
        return {**drawn, **{key: one[key].expand_as(drawn[key]) for key in ("volume_hu", "mask")}}

    unseen = batch(range(10_000, 10_016))
    with torch.no_grad():
        before = trainer.model(unseen, 0.0)["diffusion"].item()
    for i in range(0, 960, 8):
        trainer.step(batch(range(i, i + 8)), num_images=8)
    with torch.no_grad():
        own, averaged = (m(unseen, 0.0)["diffusion"].item() for m in (trainer.model, trainer.ema))
    assert before == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)  # E|eps|: the untrained output is 0
    assert own < 0.65 * before
    assert averaged < 0.65 * before


def _scalars(losses):
    return {name: value.item() for name, value in losses.items() if value.ndim == 0}


@pytest.mark.slow
def test_student_learns_what_the_teacher_says(volumes, statistics):
    config = tiny_config(total_images=400, learning_rate=3e-3, batch_size=8, tokens_per_patch=8, distill_weight=1.0)
    images = _images(volumes, config)
    trainer = Trainer(config, statistics, device="cpu")
    test = _batch(images, range(5000, 5016))
    with torch.no_grad():
        before = _scalars(trainer.model(test, 1.0))
    _train(trainer, images, 0, 320, batch_size=8)
    with torch.no_grad():
        after = _scalars(trainer.model(test, 1.0))
    assert after["contrast"] < 0.6 * before["contrast"]
    assert after["regression"] < 0.4 * before["regression"]
    assert after["diffusion"] < 0.9 * before["diffusion"]


# --- several processes ---


def test_synchronised_batch_norm_on_cpus_is_refused(statistics, monkeypatch):
    monkeypatch.setattr(training_module, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="--head-norm batch needs GPUs or a single process"):
        Trainer(tiny_config(head_norm="batch"), statistics, device="cpu")


FULL = {
    # everything at once: parts, a queue, the rank floor, two windows' worth of columns, images at t = 0, in float64
    "precision": "fp64", "batch_size": 4, "total_images": 80, "accumulate": 2, "queue_size": 30, "rank_floor": 10.0,
    "collapse_weight": 0.5, "low_noise_share": 0.5, "distill_levels": 0.1, "axial_turns": True, "distill_full": 0.2,
    "learning_rate": 3e-4,
}  # fmt: skip
STEPS = 10


def _rank_worker(rank, folder, volumes, config, statistics, short):
    """Steps on this rank's rows of each batch; saves its state."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trainer, images = Trainer(config, statistics, device="cpu"), _images(volumes, config)
    for batch in _some_batches(images, short):
        trainer.step({key: value[rank::2] for key, value in batch.items()}, num_images=4)
    save_training_state(folder / f"rank{rank}.pt", trainer.state_dict())
    torch.distributed.destroy_process_group()


def _some_batches(images, short):
    """Batches of 4; with ``short`` most slots of rank 1 (rows 1 and 3) are empty."""
    for i in range(0, 4 * STEPS, 4):
        batch = _batch(images, range(i, i + 4))
        if short:
            batch["token_valid"][1::2, 1:] = False
        yield batch


@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["grey-zone", "soft"])
@pytest.mark.parametrize("short", [False, True], ids=["full", "unequal number of tokens"])
def test_row_49_two_processes_train_like_one(volumes, statistics, tmp_path, short, contrast):
    config = tiny_config(**FULL, contrast=contrast)
    torch.multiprocessing.spawn(_rank_worker, args=(tmp_path, volumes, config, statistics, short), nprocs=2)
    states = [load_training_state(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert _equal_states(states[0], states[1])
    single = Trainer(config, statistics, device="cpu")
    start = copy.deepcopy(single.model.state_dict())
    for batch in _some_batches(_images(volumes, config), short):
        single.step(batch, num_images=4)
    assert states[0]["images"] == single.images == 4 * STEPS
    assert states[0]["skipped"] == 0
    whole = single.model.state_dict()
    assert all((value - start[name]).norm() > 0 for name, value in whole.items())
    for name, value in whole.items():
        apart = (value - states[0]["model"][name]).norm()
        assert apart <= 1e-5 * value.norm(), name
    assert torch.equal(states[0]["queue"]["rows"], single.queue.state_dict()["rows"])

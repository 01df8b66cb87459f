"""What one step does, that resuming does not change a run, and that students learn."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from diffusion_fixture import tiny_config, window_statistics
from training_batches import batch_of, equal_states, images_of, train

import lungseg.diffusion.distilled_diffusion as losses_module
from lungseg.diffusion.checkpoint import load_training_state, save_training_state, unet_spec
from lungseg.diffusion.distillation import StudentHead
from lungseg.diffusion.distilled_diffusion import DistilledDiffusion
from lungseg.diffusion.training import MAX_SKIPPED_IN_A_ROW, Trainer
from lungseg.diffusion.unet import UNet
from lungseg.errors import MismatchError, UsageError
from lungseg.radiomics.descriptor import FEATURE_NAMES

# --- steps ---


def test_weights_follow_from_the_seed_alone(statistics):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = Trainer(tiny_config(), statistics, device="cpu").state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal_states(first, Trainer(tiny_config(), statistics, device="cpu").state_dict())
    assert not equal_states(first, Trainer(tiny_config(seed=9), statistics, device="cpu").state_dict())


@pytest.mark.parametrize("head_norm", ["layer", "batch"])
def test_resumed_run_is_the_uninterrupted_run(volumes, statistics, tmp_path, head_norm):
    config = tiny_config(head_norm=head_norm, distill_start=0.1, distill_full=0.3)
    images = images_of(volumes, config)
    whole = Trainer(config, statistics, device="cpu")
    train(whole, images, 0, 12)
    save_training_state(tmp_path / "state.pt", whole.state_dict())
    train(whole, images, 12, 24)
    resumed = Trainer(config, statistics, device="cpu")
    resumed.load_state_dict(load_training_state(tmp_path / "state.pt"))
    assert (resumed.images, resumed.steps) == (12, 3)
    train(resumed, images_of(volumes, config), 12, 24)
    assert equal_states(resumed.state_dict(), whole.state_dict())


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
    results = train(Trainer(config, statistics, device="cpu"), images_of(volumes, config), 0, 24)
    assert [r.values["weight"] for r in results] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.5])
    assert ["contrast" in r.values for r in results] == [False, False, False, True, True, True]


def test_learning_rate_rises_then_falls(volumes):
    config = tiny_config(distill="none", total_images=80, warmup_share=0.2, unet_rate_scale=0.05, learning_rate=2e-3)
    trainer, images = Trainer(config, (), device="cpu"), images_of(volumes, config)
    batch, rates = batch_of(images, range(4)), []
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
    trainer, images = Trainer(config, statistics, device="cpu"), images_of(volumes, config)
    expected = copy.deepcopy(trainer.model.state_dict())
    for step in range(5):
        train(trainer, images, 4 * step, 4 * step + 4)
        decay = min(0.2, (1 + step) / (10 + step))  # 0.1, 0.18, then 0.2
        for name, value in trainer.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in trainer.ema.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert not any(p.requires_grad for p in trainer.ema.parameters())


def test_student_weights_fit_a_student(volumes, statistics):
    config = tiny_config()
    trainer = Trainer(config, statistics, device="cpu")
    train(trainer, images_of(volumes, config), 0, 4)
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
    result = trainer.step(batch_of(images_of(volumes, config), range(4)), num_images=4)
    squares = sum(p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None)
    assert result.values["gradient_norm"] > 1e-2
    assert squares.sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def _nan(batch):
    return {**batch, "eps": torch.full_like(batch["eps"], torch.nan)}


@pytest.mark.parametrize("head_norm", ["layer", "batch"])
def test_row_51_batch_with_nan_is_skipped_and_counted(volumes, statistics, head_norm):
    config = tiny_config(head_norm=head_norm)
    trainer, images = Trainer(config, statistics, device="cpu"), images_of(volumes, config)
    train(trainer, images, 0, 4)
    before = copy.deepcopy(trainer.state_dict())
    result = trainer.step(_nan(batch_of(images, range(4, 8))), num_images=4)
    after = trainer.state_dict()
    assert result.skipped
    assert math.isnan(result.values["total"])
    assert (after["images"], after["steps"], after["skipped"], after["skipped_in_a_row"]) == (8, 2, 1, 1)
    for part in ("model", "ema"):
        assert equal_states(after[part], before[part])
    assert equal_states(after["optimiser"]["state"], before["optimiser"]["state"])
    result = trainer.step(batch_of(images, range(8, 12)), num_images=4)
    assert not result.skipped
    assert math.isfinite(result.values["total"])
    assert (trainer.skipped, trainer.state_dict()["skipped_in_a_row"]) == (1, 0)
    assert all(t.isfinite().all() for t in trainer.student_weights().values())


def test_row_51_many_skipped_steps_in_a_row_stop_the_run(volumes):
    config = tiny_config(distill="none", total_images=1000)
    trainer, images = Trainer(config, (), device="cpu"), images_of(volumes, config)
    good, bad = batch_of(images, [0]), _nan(batch_of(images, [0]))
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
    trainer.step(_nan(batch_of(images_of(volumes, config), [0])), num_images=1)
    resumed = Trainer(config, (), device="cpu")
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert (resumed.skipped, resumed.state_dict()["skipped_in_a_row"]) == (1, 1)


def test_row_52_bf16_on_a_cpu_is_refused(statistics):
    with pytest.raises(UsageError, match="wrong gradients on a CPU: use --precision fp32"):
        Trainer(tiny_config(precision="bf16"), statistics, device="cpu")


def test_teacher_and_contrast_stay_in_fp32_under_autocast(volumes, statistics, monkeypatch):
    config = tiny_config()
    model = DistilledDiffusion(config, statistics)
    batch = batch_of(images_of(volumes, config), range(4))
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
    result = trainer.step(batch_of(images_of(volumes, config), range(4)), num_images=4)
    assert trainer.precision == "bf16"
    assert not result.skipped
    exact = Trainer(tiny_config(), statistics, device="cpu").step(
        batch_of(images_of(volumes, config), range(4)), num_images=4
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
    images = images_of(volumes, config)
    trainers = [Trainer(config, statistics, device=device) for device in ("cuda", "cpu")]
    results = [train(trainer, images, 0, 8) for trainer in trainers]
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
    train(trainer, images_of(volumes, config), 0, 16, batch_size=8)
    needed = footprint(config).memory_bytes(images=8, precision=trainer.precision, device="cuda")
    assert torch.cuda.max_memory_allocated() < needed


def test_row_52_auto_precision_is_fp32_on_a_cpu(statistics):
    assert Trainer(tiny_config(precision="auto"), statistics, device="cpu").precision == "fp32"


# --- parts of a batch, the queue, fixed patches ---


def test_parts_of_a_batch_give_the_gradient_of_the_whole(volumes):
    """Without contrast nothing in a batch depends on the rest of it; images at t = 0 fall unevenly into the parts."""
    settings = {"distill": "none", "low_noise_share": 0.6, "distill_levels": 0.02, "batch_size": 8, "clip_norm": 1e9}
    batch = batch_of(images_of(volumes, tiny_config(**settings)), range(8))
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
    images, trainer = images_of(volumes, config), Trainer(config, statistics, device="cpu")
    assert len(trainer.queue.rows) == 0
    train(trainer, images, 0, 4)
    first = trainer.queue.rows.clone()
    valid = sum(int(images[i]["token_valid"].sum()) for i in range(4))
    assert 0 < len(first) == valid
    batch = batch_of(images, range(4, 8))
    with torch.no_grad():
        alone = trainer.model(batch, 1.0)["contrast"].item()
        more = trainer.model(batch, 1.0, None, first)["contrast"].item()
    assert more > alone  # more columns in the denominator
    train(trainer, images, 4, 20)
    assert len(trainer.queue.rows) == 24
    assert trainer.queue.rows.isfinite().all()
    before = trainer.queue.rows.clone()
    trainer.step(_nan(batch_of(images, range(20, 24))), num_images=4)
    assert torch.equal(trainer.queue.rows, before)  # a skipped step leaves nothing


@pytest.mark.parametrize("contrast", ["grey-zone", "soft"])
def test_resumed_run_with_a_queue_is_the_uninterrupted_run(volumes, tmp_path, contrast):
    config = tiny_config(
        queue_size=20, contrast=contrast, accumulate=2, collapse_weight=0.5, teacher_windows=(8, 16), axial_turns=True,
        hu_noise=20.0, total_images=64,
    )  # fmt: skip
    statistics = tuple(window_statistics(volumes, window) for window in (8, 16))
    images, whole = images_of(volumes, config), Trainer(config, statistics, device="cpu")
    train(whole, images, 0, 12)
    save_training_state(tmp_path / "state.pt", whole.state_dict())
    train(whole, images, 12, 24)
    resumed = Trainer(config, statistics, device="cpu")
    resumed.load_state_dict(load_training_state(tmp_path / "state.pt"))
    train(resumed, images, 12, 24)
    assert equal_states(resumed.state_dict(), whole.state_dict())


def test_judging_changes_nothing_and_uses_the_averaged_weights(volumes, statistics):
    config = tiny_config(ema_decay=0.5)
    images, trainer = images_of(volumes, config), Trainer(config, statistics, device="cpu")
    train(trainer, images, 0, 8)
    before = copy.deepcopy(trainer.state_dict())
    batch = batch_of(images, range(50, 54))
    values = trainer.judge(batch)
    assert equal_states(trainer.state_dict(), before)
    with torch.no_grad():
        expected = trainer.ema(batch, 1.0)
    assert values == pytest.approx({name: expected[name].item() for name in ("diffusion", "regression")})
    assert values["diffusion"] != pytest.approx(trainer.model(batch, 1.0)["diffusion"].item(), rel=1e-6)


def test_gradient_norms_are_those_of_network_and_heads(volumes, statistics):
    config = tiny_config(clip_norm=1e9)
    trainer = Trainer(config, statistics, device="cpu")
    values = trainer.step(batch_of(images_of(volumes, config), range(4)), num_images=4).values

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
    images = images_of(volumes[:1], config)
    one = images[0]
    trainer = Trainer(config, (), device="cpu")

    def batch(indices):
        drawn = batch_of(images, indices)
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
    images = images_of(volumes, config)
    trainer = Trainer(config, statistics, device="cpu")
    test = batch_of(images, range(5000, 5016))
    with torch.no_grad():
        before = _scalars(trainer.model(test, 1.0))
    train(trainer, images, 0, 320, batch_size=8)
    with torch.no_grad():
        after = _scalars(trainer.model(test, 1.0))
    assert after["contrast"] < 0.6 * before["contrast"]
    assert after["regression"] < 0.4 * before["regression"]
    assert after["diffusion"] < 0.9 * before["diffusion"]

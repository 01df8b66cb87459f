"""The losses of a batch, what they are compared with, and what they reach."""

from __future__ import annotations

import math

import pytest
import torch
from diffusion_fixture import randomise, tiny_config, window_statistics
from training_batches import batch_of, images_of

from lungseg.diffusion.distilled_diffusion import DistilledDiffusion
from lungseg.diffusion.training import Trainer


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_diffusion_loss_of_an_untrained_network_is_the_size_of_its_target(volumes, prediction, loss):
    config = tiny_config(prediction=prediction, loss=loss, distill="none")
    batch = batch_of(images_of(volumes, config), range(4))
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
    batch = batch_of(images_of(volumes, plain), range(4))
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
    batch = batch_of(images_of(volumes, config), range(4))
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
    batch = batch_of(images_of(volumes, config), range(4))
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
    values = model(batch_of(images_of(volumes, config), range(4)), 1.0)
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
    values = model(batch_of(images_of(volumes, config), range(4)), 0.5)
    parts = values["contrast"] * config.distill_weight + values["regression"] * config.regression_weight
    expected = values["diffusion"] + 0.5 * (parts + 2.0 * values["collapse"])
    assert values["total"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert values["collapse"].item() == pytest.approx(math.log(min(8.0, len(values["embeddings"]) / 2)), rel=0.01)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_every_parameter_takes_part_in_every_step(volumes, statistics, weight):
    """Distributed reduction waits for the gradient of each parameter."""
    config = tiny_config()
    model = DistilledDiffusion(config, statistics)
    model(batch_of(images_of(volumes, config), range(4)), weight)["total"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_batch_without_lung_still_trains(volumes, statistics):
    config = tiny_config()
    trainer = Trainer(config, statistics, device="cpu")
    batch = batch_of(images_of(volumes, config), range(4))
    batch["mask"][:] = False
    batch["token_valid"][:] = False
    result = trainer.step(batch, num_images=4)
    assert not result.skipped
    assert result.values["contrast"] == result.values["regression"] == 0
    assert math.isfinite(result.values["gradient_norm"])

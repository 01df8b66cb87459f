"""Forward process: the reference values of METHOD 0.3 and the identities between x_0, eps, v and x_t.

METHOD numbers the T noisy steps 0 ... T - 1; here t = 0 is the clean scan, so its row t is alpha_bar[t + 1].
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from lungseg.config.train_ddpm import TrainConfig
from lungseg.diffusion.schedule import make_schedule
from lungseg.errors import UsageError

T = 250
# t, alpha_bar, sqrt(1 - alpha_bar), logSNR, noise sd in HU of a window of +-700
TABLE = [
    (5, 0.99767, 0.0483, 6.06, 34),
    (10, 0.99360, 0.0800, 5.05, 56),
    (25, 0.97000, 0.1732, 3.48, 123),
    (50, 0.89491, 0.3242, 2.14, 240),
    (75, 0.78178, 0.4671, 1.28, 370),
    (100, 0.64151, 0.5987, 0.58, 523),
    (125, 0.48761, 0.7158, -0.05, 718),
    (150, 0.33491, 0.8155, -0.69, 986),
]


@pytest.mark.parametrize(("t", "alpha_bar", "noise", "log_snr", "noise_hu"), TABLE)
def test_cosine_equals_the_reference_table(t, alpha_bar, noise, log_snr, noise_hu):
    a = make_schedule("cosine", T).alpha_bar[t + 1].item()
    assert a == pytest.approx(alpha_bar, abs=5.1e-6)
    assert math.sqrt(1 - a) == pytest.approx(noise, abs=5.1e-5)
    assert math.log(a / (1 - a)) == pytest.approx(log_snr, abs=5.1e-3)
    assert 700 * math.sqrt((1 - a) / a) == pytest.approx(noise_hu, abs=0.51)


def test_cosine_ends():
    schedule = make_schedule("cosine", T)
    a = schedule.alpha_bar
    beta = 1 - a[1:] / a[:-1]
    assert schedule.num_steps == T
    assert beta[0].item() == pytest.approx(1.9427e-4, abs=5e-9)
    assert beta[-3:].tolist() == pytest.approx([0.5555, 0.7500, 0.999], abs=5.1e-5)
    assert a[-1].item() == pytest.approx(4e-8, rel=0.05)
    assert math.log(a[-1].item()) == pytest.approx(-17.1, abs=0.05)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [10, 50, 250, 1000, 4000])
def test_alpha_bar_falls_strictly_from_one(name, num_steps):
    a = make_schedule(name, num_steps).alpha_bar
    assert a.dtype == torch.float64
    assert a.shape == (num_steps + 1,)
    assert a[0] == 1
    assert (a.diff() < 0).all()
    assert 0 < a[-1] < 1e-3


@pytest.mark.parametrize("num_steps", [50, 250, 1000])
def test_cosine_equals_diffusers_squared_cosine(num_steps):
    oracle = DDPMScheduler(num_train_timesteps=num_steps, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(make_schedule("cosine", num_steps).alpha_bar[1:].float(), oracle, rtol=1e-4, atol=1e-9)


def test_linear_equals_diffusers():
    oracle = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    ours = make_schedule("linear", 1000).alpha_bar[1:].float()
    torch.testing.assert_close(ours, oracle.alphas_cumprod, rtol=1e-5, atol=0)


def test_linear_of_fewer_steps_ends_as_noisy():
    logs = [math.log(make_schedule("linear", n).alpha_bar[-1].item()) for n in (250, 1000)]
    assert logs[0] == pytest.approx(logs[1], rel=0.05)


def test_unknown_schedule_is_refused():
    with pytest.raises(UsageError, match="'sigmoid' is not one of cosine, linear"):
        make_schedule("sigmoid", T)


@pytest.mark.parametrize("t", [1, 26, 101, 250])
def test_q_sample_has_the_stated_mean_and_variance(t):
    schedule = make_schedule("cosine", T)
    eps = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    x_t = schedule.q_sample(torch.full_like(eps, 0.3), torch.full((8,), t), eps)
    a = schedule.alpha_bar[t].item()
    standard_error = math.sqrt((1 - a) / eps.numel())
    assert x_t.mean().item() == pytest.approx(0.3 * math.sqrt(a), abs=4 * standard_error)
    assert x_t.var().item() == pytest.approx(1 - a, rel=4 * math.sqrt(2 / eps.numel()))


def test_time_zero_is_the_clean_scan_bit_for_bit():
    x_0, eps = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(make_schedule("cosine", T).q_sample(x_0, torch.zeros(3, dtype=torch.long), eps), x_0)


def test_each_row_has_its_own_time():
    schedule = make_schedule("cosine", T)
    x_0, eps = torch.randn(2, 3, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 100, 250])
    together = schedule.q_sample(x_0, t, eps)
    for row in range(3):
        alone = schedule.q_sample(x_0[row : row + 1], t[row : row + 1], eps[row : row + 1])
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_target_is_inverted(prediction):
    schedule = make_schedule("cosine", T)
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 5, 60, 125, 200, 249, 250])
    x_0, eps = torch.randn(2, len(t), 2, 3, 3, 3, generator=generator, dtype=torch.float64)
    x_t = schedule.q_sample(x_0, t, eps)
    output = schedule.target(x_0, eps, t, prediction)
    torch.testing.assert_close(schedule.to_x_0(x_t, output, t, prediction), x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.to_eps(x_t, x_0, t), eps, rtol=0, atol=1e-9)


def test_targets_by_definition():
    schedule = make_schedule("cosine", T)
    x_0, eps, t = torch.tensor([[2.0]]), torch.tensor([[-3.0]]), torch.tensor([100])
    a = schedule.alpha_bar[100].item()
    assert schedule.target(x_0, eps, t, "eps") is eps
    assert schedule.target(x_0, eps, t, "x0") is x_0
    v = schedule.target(x_0, eps, t, "v").item()
    assert v == pytest.approx(-3 * math.sqrt(a) - 2 * math.sqrt(1 - a), rel=1e-6)


# --- zero terminal SNR, min-SNR, posteriors ---


@pytest.mark.parametrize(("name", "num_steps"), [("cosine", 250), ("linear", 1000)])
def test_zero_terminal_ends_in_pure_noise_and_keeps_the_first_step(name, num_steps):
    plain, rescaled = make_schedule(name, num_steps), make_schedule(name, num_steps, zero_terminal=True)
    assert rescaled.zero_terminal
    assert not plain.zero_terminal
    assert rescaled.alpha_bar[0] == 1
    assert rescaled.alpha_bar[-1] == 0
    assert rescaled.alpha_bar[1].item() == pytest.approx(plain.alpha_bar[1].item(), rel=1e-12)
    assert (rescaled.alpha_bar.diff() < 0).all()


def test_zero_terminal_equals_diffusers():
    ours = make_schedule("linear", 1000, zero_terminal=True).alpha_bar[1:]
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True).alphas_cumprod
    # diffusers goes back to betas and forth in float32, and its last signal is not exactly 0
    torch.testing.assert_close(ours, theirs.double(), rtol=2e-3, atol=1e-6)


def test_zero_terminal_refuses_to_predict_noise():
    for prediction, refused in (("eps", True), ("v", False), ("x0", False)):
        problems = TrainConfig(zero_terminal=True, prediction=prediction).check()
        assert any("--zero-terminal with --prediction eps" in text for text in problems) == refused


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weighs_the_error_of_x_0_by_the_capped_snr(prediction):
    """An error of the output is one of x_0 by ``to_x_0``; the weight must be min(SNR, 5) times its square."""
    schedule, t = make_schedule("cosine", 250), torch.tensor([1, 10, 60, 125, 200, 249])
    weight = schedule.loss_weight(t, prediction, 5.0)
    x_t, output = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    moved = schedule.to_x_0(x_t, output + 1e-3, t, prediction) - schedule.to_x_0(x_t, output, t, prediction)
    in_x_0 = (moved[:, 0] / 1e-3).square()  # squared error of x_0 of a unit error of the output
    torch.testing.assert_close(weight, schedule.snr(t).clamp(max=5.0) * in_x_0, rtol=1e-9, atol=0)
    assert schedule.loss_weight(torch.tensor([0]), prediction, 5.0).item() == 0


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_min_snr_still_teaches_the_last_step_of_zero_terminal(prediction):
    weight = make_schedule("cosine", 250, zero_terminal=True).loss_weight(torch.tensor([250, 240]), prediction, 5.0)
    assert weight.tolist() == pytest.approx([1.0, 1.0], rel=0.02)


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("t", [1, 2, 57, 249, 250])
def test_posterior_equals_bayes_rule(t, zero_terminal):
    """q(x_{t-1} | x_t, x_0) on a fine grid of x_{t-1}: prior q(x_{t-1} | x_0) times q(x_t | x_{t-1})."""
    schedule = make_schedule("cosine", 250, zero_terminal=zero_terminal)
    x_0, x_t = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    mean, variance = schedule.posterior(x_0, x_t, t)
    before, now = schedule.alpha_bar[t - 1], schedule.alpha_bar[t]
    if t == 1:  # x_0 itself
        assert mean.item() == pytest.approx(0.4)
        assert variance == 0
        return
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    alpha = now / before
    log_density = -((grid - before.sqrt() * x_0) ** 2) / (2 * (1 - before))
    log_density -= (x_t - alpha.sqrt() * grid) ** 2 / (2 * (1 - alpha))
    share = torch.softmax(log_density, dim=0)
    expected = (share * grid).sum()
    assert mean.item() == pytest.approx(expected.item(), abs=2e-4)
    assert variance == pytest.approx((share * (grid - expected) ** 2).sum().item(), abs=2e-4)

"""Both samplers on data whose score is known in closed form, and against diffusers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from lungseg.diffusion.sampling import sample_ddpm, sample_dpm_solver, solver_times
from lungseg.diffusion.schedule import make_schedule
from lungseg.errors import UsageError

MEAN, SD = 0.3, 0.5


def _gaussian(schedule, mean=MEAN, sd=SD):
    """Exact E[x_0 | x_t] of data N(mean, sd^2), by Bayes' rule."""

    def predict(x, t):
        a = schedule.alpha_bar[t].item()
        return mean + sd**2 * math.sqrt(a) * (x - math.sqrt(a) * mean) / (sd**2 * a + 1 - a)

    return predict


def _mixture(schedule):
    """Exact E[x_0 | x_t] of a mixture of three narrow Gaussians."""
    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mean = torch.tensor([-0.2, 0.3, 0.7], dtype=torch.float64)
    sd = torch.tensor([0.08, 0.12, 0.05], dtype=torch.float64)

    def predict(x, t):
        a = schedule.alpha_bar[t]
        variance = sd**2 * a + 1 - a
        away = x[:, None] - a.sqrt() * mean
        share = torch.softmax(weight.log() - variance.log() / 2 - away**2 / (2 * variance), dim=1)
        return (share * (mean + sd**2 * a.sqrt() * away / variance)).sum(1)

    return predict


def _start(count=20_000, seed=0):
    """Standard normal quantiles: mean 0 and SD 1 without sampling error."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(u)


@pytest.mark.parametrize(("name", "num_steps", "tolerance"), [("cosine", 250, 0.02), ("linear", 1000, 0.01)])
def test_ddpm_draws_the_data(name, num_steps, tolerance):
    schedule = make_schedule(name, num_steps)
    generator = torch.Generator().manual_seed(0)
    x = sample_ddpm(_gaussian(schedule), schedule, lambda t: torch.randn(20_000, generator=generator), clamp=None)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(SD, rel=tolerance)


def test_ddpm_equals_the_recursion_of_its_moments():
    """The chain is linear in x for Gaussian data: its mean and variance follow from Ho et al. Eq. 6-7 alone."""
    schedule = make_schedule("cosine", 250)
    a = schedule.alpha_bar.tolist()
    mean, variance = 0.0, 1.0
    for t in range(250, 0, -1):
        beta = 1 - a[t] / a[t - 1]
        gain = SD**2 * math.sqrt(a[t]) / (SD**2 * a[t] + 1 - a[t])  # x_0 = shift + gain x_t
        shift = MEAN * (1 - gain * math.sqrt(a[t]))
        on_x_0 = math.sqrt(a[t - 1]) * beta / (1 - a[t])
        slope = on_x_0 * gain + math.sqrt(1 - beta) * (1 - a[t - 1]) / (1 - a[t])
        mean = on_x_0 * shift + slope * mean
        variance = slope**2 * variance + beta * (1 - a[t - 1]) / (1 - a[t]) * (t > 1)
    generator = torch.Generator().manual_seed(1)
    x = sample_ddpm(_gaussian(schedule), schedule, lambda t: torch.randn(50_000, generator=generator), clamp=None)
    error = math.sqrt(variance / x.numel())
    assert x.mean().item() == pytest.approx(mean, abs=4 * error)
    assert x.std().item() == pytest.approx(math.sqrt(variance), abs=3 * error)


def test_ddpm_asks_for_the_noise_of_each_step_once():
    schedule = make_schedule("cosine", 20)
    asked, predicted = [], []

    def noise_at(t):
        asked.append(t)
        return torch.zeros(2)

    def predict(x, t):
        predicted.append(t)
        return x

    sample_ddpm(predict, schedule, noise_at)
    assert asked == predicted == list(range(20, 0, -1))


@pytest.mark.parametrize(("name", "num_steps"), [("cosine", 250), ("linear", 1000)])
@pytest.mark.parametrize("sd", [0.5, 0.1])
def test_dpm_solver_draws_the_data(name, num_steps, sd):
    schedule = make_schedule(name, num_steps)
    x_T = _start()
    error = {}
    for steps in (20, 50):
        x = sample_dpm_solver(_gaussian(schedule, sd=sd), schedule, x_T, steps=steps, clamp=None)
        # the linear schedule does not end in pure noise: x_T = noise leaves a trace of the mean
        assert x.mean().item() == pytest.approx(MEAN, abs=0.012)
        error[steps] = abs(x.std().item() / sd - 1)
    assert error[20] < 0.05
    assert error[50] < 0.01


def test_dpm_solver_follows_the_probability_flow():
    """For Gaussian data the exact flow maps quantiles to quantiles."""
    schedule = make_schedule("cosine", 250)
    x_T = _start(1000)
    a = schedule.alpha_bar[-1].item()
    flow = MEAN + SD * (x_T - math.sqrt(a) * MEAN) / math.sqrt(SD**2 * a + 1 - a)
    x = sample_dpm_solver(_gaussian(schedule), schedule, x_T, steps=50, clamp=None)
    assert (x - flow).abs().max() < 2e-3


@pytest.mark.parametrize(("name", "num_steps"), [("cosine", 250), ("linear", 1000)])
def test_dpm_solver_is_of_second_order(name, num_steps):
    schedule = make_schedule(name, num_steps)
    predict, x_T = _mixture(schedule), _start(300)

    def solve(steps):
        return sample_dpm_solver(predict, schedule, x_T, steps=steps, clamp=None)

    reference = solve(num_steps)
    errors = [(solve(steps) - reference).square().mean().sqrt().item() for steps in (10, 20, 40)]
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[2] < 3e-3


@pytest.mark.parametrize(("name", "num_steps"), [("cosine", 250), ("linear", 1000)])
@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_dpm_solver_equals_diffusers(name, num_steps, steps):
    schedule = make_schedule(name, num_steps)
    predict, x = _mixture(schedule), _start(500)
    ours = sample_dpm_solver(predict, schedule, x, steps=steps, clamp=None)
    oracle = DPMSolverMultistepScheduler(
        num_train_timesteps=num_steps,
        trained_betas=(1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]).numpy(),
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    # diffusers numbers the noisy steps 0 ... T - 1
    oracle.set_timesteps(timesteps=[t - 1 for t in solver_times(num_steps, steps)[:-1]])
    for t in oracle.timesteps:
        x = oracle.step(predict(x, int(t) + 1), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


def test_perfect_model_returns_x_0():
    schedule = make_schedule("cosine", 250)
    x_0 = torch.linspace(-1, 1, 27).view(1, 3, 3, 3)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    solved = sample_dpm_solver(lambda x, t: x_0, schedule, noise, steps=10)
    drawn = sample_ddpm(lambda x, t: x_0, schedule, lambda t: noise)
    assert torch.equal(solved, x_0)
    torch.testing.assert_close(drawn, x_0, rtol=0, atol=1e-6)


def test_perfect_noise_prediction_returns_x_0():
    schedule = make_schedule("cosine", 250)
    x_0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-1, 1)
    t_end = torch.tensor([250])

    def predict(x, t):
        t = torch.tensor([t])
        return schedule.to_x_0(x, schedule.to_eps(x, x_0, t), t, "eps")

    x_T = schedule.q_sample(x_0, t_end, eps)
    torch.testing.assert_close(sample_dpm_solver(predict, schedule, x_T, steps=7), x_0, rtol=0, atol=1e-9)


def test_prediction_is_clamped_not_rescaled():
    schedule = make_schedule("cosine", 50)
    wild = torch.tensor([-3.0, 0.25, 40.0])
    for sample in (
        lambda clamp: sample_dpm_solver(lambda x, t: wild, schedule, torch.zeros(3), steps=5, clamp=clamp),
        lambda clamp: sample_ddpm(lambda x, t: wild, schedule, lambda t: torch.zeros(3), clamp=clamp),
    ):
        torch.testing.assert_close(sample(1.0), torch.tensor([-1.0, 0.25, 1.0]), rtol=0, atol=1e-6)
        torch.testing.assert_close(sample(None), wild, rtol=1e-6, atol=0)


def test_solver_is_deterministic_and_asks_each_time_once():
    schedule = make_schedule("cosine", 250)
    asked = []

    def predict(x, t):
        asked.append(t)
        return x / 2

    x_T = _start(100)
    first = sample_dpm_solver(predict, schedule, x_T, steps=12)
    assert asked == solver_times(250, 12)[:-1]
    assert torch.equal(first, sample_dpm_solver(predict, schedule, x_T, steps=12))


@pytest.mark.parametrize("num_steps", [2, 3, 10, 50, 97, 250])
def test_times_never_repeat(num_steps):
    for steps in range(2, num_steps + 1):
        times = solver_times(num_steps, steps)
        assert times[0] == num_steps
        assert times[-2:] == [1, 0]
        assert len(times) == steps + 1
        assert all(a > b for a, b in itertools.pairwise(times))


def test_all_times_of_a_diffusion():
    assert solver_times(250, 250) == list(range(250, -1, -1))


@pytest.mark.parametrize("steps", [0, 1, 251, 1000])
def test_impossible_numbers_of_steps_are_refused(steps):
    schedule = make_schedule("cosine", 250)
    with pytest.raises(UsageError, match=rf"--steps {steps}: this model's diffusion has 250 steps; give 2 to 250"):
        sample_dpm_solver(lambda x, t: x, schedule, torch.zeros(1), steps=steps)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver"])
def test_zero_terminal_schedules_draw_the_data_and_stay_finite(sampler):
    """The first step starts from a signal of exactly zero: half log SNR is minus infinity there."""
    schedule = make_schedule("cosine", 250, zero_terminal=True)
    predict = _gaussian(schedule)
    if sampler == "ddpm":
        generator = torch.Generator().manual_seed(0)
        x = sample_ddpm(predict, schedule, lambda t: torch.randn(20_000, generator=generator), clamp=None)
    else:
        x = sample_dpm_solver(predict, schedule, _start(), steps=60, clamp=None)
    assert x.isfinite().all()
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(SD, rel=0.03)

"""The forward process: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, and what follows from it.

``t`` runs over 0 ... T with alpha_bar_0 = 1: t = 0 is the clean scan, t = 1 the first noisy step (Ho et al. 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lungseg.config.train_ddpm import TrainConfig
from lungseg.errors import UsageError

COSINE_OFFSET = 0.008
"""s of Nichol & Dhariwal 2021, Eq. 17."""
MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """Cumulative signal levels of a diffusion of T steps."""

    alpha_bar: torch.Tensor
    """float64, shape (T + 1,), from 1 down."""

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.alpha_bar) - 1

    @property
    def zero_terminal(self) -> bool:
        """Whether the last step is pure noise."""
        return bool(self.alpha_bar[-1] == 0)

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), float64, infinite at t = 0."""
        a = self.alpha_bar.to(t.device)[t]
        return a / (1 - a)

    def loss_weight(self, t: torch.Tensor, prediction: str, gamma: float) -> torch.Tensor:
        """Min-SNR weight of the squared error of a prediction at ``t`` (Hang et al. 2023, Section 3.4).

        Whatever is predicted, the error of the implied x_0 counts min(SNR, gamma): an error of eps is one of x_0 times
        sqrt(SNR), one of v times sqrt(SNR + 1). Where the last step is pure noise, the SNR counts at least 1 (truncated
        SNR, Salimans & Ho 2022, Eq. 9), as that step would not be learnt otherwise.

        Parameters
        ----------
        t : int64 tensor (N,)
            1 ... T; the weight at 0, where there is no noise to predict, is 0.
        prediction : str
            `eps`, `x0` or `v`.
        gamma : float
            Cap of the signal-to-noise ratio.

        Returns
        -------
        float64 tensor (N,)
        """
        snr = self.snr(t)
        weight = snr.clamp(min=1.0 if self.zero_terminal else 0.0, max=gamma)
        per_error = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction]
        return torch.where(t > 0, weight / per_error, torch.zeros_like(snr))

    def posterior(self, x_0: torch.Tensor, x_t: torch.Tensor, t: int) -> tuple[torch.Tensor, float]:
        """Mean and variance of q(x_{t-1} | x_t, x_0) at ``t`` >= 1 (Ho et al. 2020, Eq. 6-7)."""
        before, now = float(self.alpha_bar[t - 1]), float(self.alpha_bar[t])
        alpha = now / before
        beta = 1 - alpha
        mean = (math.sqrt(before) * beta * x_0 + math.sqrt(alpha) * (1 - before) * x_t) / (1 - now)
        return mean, beta * (1 - before) / (1 - now)

    def _level(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.alpha_bar.to(t.device)[t].view(-1, *[1] * (like.ndim - 1))
        return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)

    def q_sample(self, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Noisy x_t of a batch (Ho et al. 2020, Eq. 4).

        Parameters
        ----------
        x_0, eps : tensor (N, ...)
            Clean input and standard normal noise.
        t : int64 tensor (N,)
            0 ... T; 0 gives ``x_0`` unchanged.
        """
        signal, noise = self._level(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, prediction: str) -> torch.Tensor:
        """What a network of this prediction type should output: `eps`, `x0`, or `v` (Salimans & Ho 2022, App. D)."""
        if prediction == "eps":
            return eps
        if prediction == "x0":
            return x_0
        signal, noise = self._level(t, x_0)
        return signal * eps - noise * x_0

    def to_x_0(self, x_t: torch.Tensor, output: torch.Tensor, t: torch.Tensor, prediction: str) -> torch.Tensor:
        """Clean input implied by a network output at ``t`` >= 1."""
        signal, noise = self._level(t, x_t)
        if prediction == "eps":
            return (x_t - noise * output) / signal
        if prediction == "x0":
            return output
        return signal * x_t - noise * output

    def to_eps(self, x_t: torch.Tensor, x_0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Noise implied by x_t and x_0 at ``t`` >= 1."""
        signal, noise = self._level(t, x_t)
        return (x_t - signal * x_0) / noise


def schedule_of(config: TrainConfig) -> NoiseSchedule:
    """Noise schedule of a training configuration."""
    return make_schedule(config.schedule, config.timesteps, zero_terminal=config.zero_terminal)


def make_schedule(name: str, num_steps: int, *, zero_terminal: bool = False) -> NoiseSchedule:
    """Noise schedule `cosine` or `linear` of T steps.

    `cosine` is METHOD 0.3's cosine-lucid: beta_i = clip(1 - f(i/T)/f((i-1)/T), 0, 0.999). `linear`: beta from 1e-4 to
    0.02 at T = 1000, scaled by 1000/T otherwise so that the end of the diffusion is as noisy. ``zero_terminal``
    rescales either to end in pure noise; a network must then predict v or x0, as noise alone says nothing of x_0.

    Raises
    ------
    UsageError
        For another name.
    """
    if name == "cosine":
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        f = torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(0, MAX_BETA)
    elif name == "linear":
        scale = 1000 / num_steps
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64).clamp(max=MAX_BETA)
    else:
        raise UsageError(f"noise schedule '{name}' is not one of cosine, linear")
    alpha_bar = torch.cumprod(1 - beta, 0)
    if zero_terminal:
        alpha_bar = _end_in_noise(alpha_bar)
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar]))


def _end_in_noise(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Signal levels shifted and scaled so that the last is 0 and the first stays (Lin et al. 2024, Algorithm 1)."""
    signal = alpha_bar.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)).square()

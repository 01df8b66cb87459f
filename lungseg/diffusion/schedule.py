"""The forward process: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, and what follows from it.

``t`` runs over 0 ... T with alpha_bar_0 = 1: t = 0 is the clean scan, t = 1 the first noisy step (Ho et al. 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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


def make_schedule(name: str, num_steps: int) -> NoiseSchedule:
    """Noise schedule `cosine` or `linear` of T steps.

    `cosine` is METHOD 0.3's cosine-lucid: beta_i = clip(1 - f(i/T)/f((i-1)/T), 0, 0.999). `linear`: beta from 1e-4 to
    0.02 at T = 1000, scaled by 1000/T otherwise so that the end of the diffusion is as noisy.

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
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)]))

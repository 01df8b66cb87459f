"""Configuration of ``lungseg synthesize``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option


@dataclass(frozen=True)
class SynthesizeConfig:
    """Patches drawn from a trained model. Source: METHOD 0.3."""

    num: int = option(64, "Patches to draw.", minimum=1)
    sampler: str = option("dpm-solver++", "How the diffusion is reversed.", choices=("ddpm", "dpm-solver++"))
    steps: int = option(50, "Network evaluations of DPM-Solver++ (DDPM takes all T).", minimum=2, maximum=4000)
    batch_size: int = option(16, "Patches drawn together.", minimum=1)
    seed: int = option(0, "Seed; patch i depends on it and on i only.", minimum=0, maximum=MAX_SEED)

"""Configuration of ``lungseg phantom``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import MAX_SEED, option


@dataclass(frozen=True)
class PhantomConfig:
    """Digital chest phantoms with known tissue, written as DICOM series."""

    num: int = option(1, "Phantoms to make.", minimum=1, maximum=10_000)
    first_seed: int = option(1000, "Seed of the first phantom; the next ones count up.", minimum=0, maximum=MAX_SEED)
    extent_mm: tuple[float, float, float] = option(
        (300.0, 260.0, 340.0), "Field of view (z,y,x).", unit="mm", minimum=60, maximum=600
    )
    spacing_mm: tuple[float, float, float] = option(
        (1.25, 0.8, 0.8), "Voxel spacing of the scan (z,y,x).", unit="mm", minimum=0.4, maximum=10
    )
    severity: str = option("moderate", "Share of diseased lung.", choices=("healthy", "mild", "moderate", "severe"))
    noise_hu: float = option(40.0, "Standard deviation of the scan's noise.", unit="HU", minimum=0, maximum=300)

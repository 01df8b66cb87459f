"""Configuration of ``lungseg refine``: from posteriors to contours."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import option


@dataclass(frozen=True)
class RefineConfig:
    """Sobel-Diffusion Fusion and clean-up. Source: METHOD 1.6."""

    name: str = option("diffseglung", "Clustering to refine.")
    fusion: str = option(
        "sobel", "Contours: Sobel-Diffusion Fusion, or the plain posterior.", choices=("sobel", "none")
    )
    label_sigma: float = option(2.0, "Smoothing of the label map.", unit="voxels", above=0.0)
    image_sigma: float = option(1.0, "Smoothing of the scan before its gradient.", unit="voxels", above=0.0)
    band: float = option(0.1, "Label gradient, relative to its maximum, where contours may move.", minimum=0, maximum=1)
    edge_floor: float = option(0.05, "Fused edge below which the posterior decides.", minimum=0, maximum=1)
    min_component_ml: float = option(0.05, "Smaller connected pieces join their surroundings.", unit="ml", minimum=0)
    compatibility: bool = option(False, "Check each voxel's HU against its class (lowered DSC in our study).")
    lower_bounds: bool = option(
        False, "Of a lung cut by the field of view, export volumes as lower bounds in place of blanks."
    )

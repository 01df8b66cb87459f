"""Configuration of ``lungseg refine``: from posteriors to contours."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import option
from lungseg.tissue import LOBE_CONVENTIONS

FUSIONS = ("none", "sobel", "guided", "potts", "guided-sobel", "guided-potts", "potts-sobel", "guided-potts-sobel")
"""Ways to draw contours: steps in the order in which they run, joined by hyphens."""


@dataclass(frozen=True)
class RefineConfig:
    """Contours and clean-up. Sources: METHOD 1.6, 7.8, 7.9."""

    name: str = option("diffseglung", "Clustering to refine.")
    fusion: str = option(
        "guided",
        "Contours: guided by the scan's edges, Potts smoothing, Sobel-Diffusion Fusion, in turn; or none.",
        choices=FUSIONS,
    )
    rim_mm: float = option(
        8.0,
        "Bands up to this thickness round solid bodies are partial volume, not disease; 0: keep them.",
        unit="mm",
        minimum=0,
    )
    potts_strength: float = option(1.0, "Potts: tie of neighbours of equal HU, in log probability.", minimum=0)
    potts_iterations: int = option(5, "Potts: updates of all voxels.", minimum=0, maximum=100)
    hu_evidence: float = option(0.5, "Potts: weight of each voxel's HU; 0: none.", minimum=0, maximum=1)
    label_sigma: float = option(2.0, "Smoothing of the label map.", unit="voxels", above=0.0)
    image_sigma: float = option(1.0, "Smoothing of the scan before its gradient.", unit="voxels", above=0.0)
    band: float = option(0.1, "Label gradient, relative to its maximum, where contours may move.", minimum=0, maximum=1)
    edge_floor: float = option(0.05, "Fused edge below which the posterior decides.", minimum=0, maximum=1)
    min_component_ml: float = option(
        0.5, "Smaller connected pieces join their surroundings (a ball 1 cm wide).", unit="ml", minimum=0
    )
    compatibility: bool = option(False, "Check each voxel's HU against its class (lowered DSC in our study).")
    lower_bounds: bool = option(
        False, "Of a lung cut by the field of view, export volumes as lower bounds in place of blanks."
    )
    inspiration: str = option(
        "",
        "Breath of these scans, if the manifest does not say; decides which densities are exported.",
        choices=("", "inspiration", "expiration"),
    )
    lobe_mask_labels: str = option("auto", "Whose labels the lobe masks have.", choices=("auto", *LOBE_CONVENTIONS))
    resample_masks: bool = option(False, "Move a lobe mask onto the grid of its scan (nearest voxel), else refuse it.")

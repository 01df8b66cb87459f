"""Configuration of ``lungseg report``: pages for people."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import option
from lungseg.tissue import LOBE_CONVENTIONS


@dataclass(frozen=True)
class ReportConfig:
    """What the pages show. The settings of numbers are those of ``refine --export``."""

    name: str = option("diffseglung", "Clustering to report.")
    title: str = option("Lung tissue maps", "Heading of the page.")
    num_slices: int = option(
        48, "Most slices of a scan in the viewer: bounds the size of its page.", minimum=4, maximum=400
    )
    width_px: int = option(448, "Width and height of a slice.", unit="pixels", minimum=96, maximum=1024)
    lower_bounds: bool = option(
        False, "Of a lung cut by the field of view, give volumes as lower bounds in place of blanks."
    )
    inspiration: str = option(
        "",
        "Breath of these scans, if the manifest does not say; decides which densities are given.",
        choices=("", "inspiration", "expiration"),
    )
    lobe_mask_labels: str = option("auto", "Whose labels the lobe masks have.", choices=("auto", *LOBE_CONVENTIONS))
    resample_masks: bool = option(False, "Move a lobe mask onto the grid of its scan (nearest voxel), else refuse it.")

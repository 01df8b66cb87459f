"""Configuration of ``lungseg preprocess``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import option


@dataclass(frozen=True)
class PreprocessConfig:
    """From scans to a patch store."""

    spacing_mm: float = option(0.6, "Isotropic spacing of the working grid.", unit="mm", minimum=0.3, maximum=10)
    patch_size: tuple[int, int, int] = option(
        (32, 96, 96), "Training patch listed in the patch table (z,y,x).", unit="voxels", minimum=8, maximum=512
    )
    patch_stride: tuple[int, int, int] = option(
        (16, 48, 48), "Distance between listed patches (z,y,x).", unit="voxels", minimum=1, maximum=512
    )
    min_lung_fraction: float = option(
        0.5, "Smallest share of lung in a listed patch (authors' code: 0.5).", minimum=0.0, maximum=1.0
    )
    margin_mm: float = option(8.0, "Tissue kept around the lungs.", unit="mm", minimum=0.0, maximum=100)
    source: bool = option(True, "Keep the scan's own grid too: density numbers and exports need it.")
    assume_hu: bool = option(False, "Accept DICOM without rescale slope and intercept as Hounsfield units.")
    salt: str = option("", "Secret that makes case ids reproducible; empty: a new random one for each store.")

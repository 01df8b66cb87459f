"""Configuration of ``lungseg preprocess``."""

from __future__ import annotations

from dataclasses import dataclass

from lungseg.config.fields import option


@dataclass(frozen=True)
class ReadOptions:
    """What a reader may do to a scan that is not right as it stands: nothing, unless the user asks for it.

    Whatever was done because of one is told in ``Volume.notes`` and ``Volume.status``.
    """

    assume_hu: bool = False
    """Take stored values as HU where a DICOM file has no RescaleSlope and RescaleIntercept. RELIABILITY row 12."""
    allow_gaps: int = 0
    """Most missing slices of one scan that are filled by interpolation. RELIABILITY row 6."""
    correct_tilt: bool = False
    """Shear slices of a tilted gantry back to a rectangular grid. RELIABILITY row 8."""
    nan_to_air: bool = False
    """Replace NaN and infinite voxels by air. RELIABILITY row 26."""
    volume: int | None = None
    """Which volume of a four-dimensional image file, from 0. RELIABILITY row 27."""


@dataclass(frozen=True)
class PreprocessConfig:
    """From scans to a patch store."""

    spacing_mm: float = option(
        0.6, "Isotropic spacing of the working grid.", unit="mm", minimum=0.3, maximum=10, flag="--spacing"
    )
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
    allow_gaps: int = option(0, "Missing slices of one scan that are filled by interpolation.", minimum=0, maximum=100)
    correct_tilt: bool = option(False, "Shear slices of a tilted gantry back to a rectangular grid.")
    nan_to_air: bool = option(False, "Replace NaN and infinite voxels of image files by air.")
    volume: int | None = option(None, "Which volume of a four-dimensional image file, from 0.", minimum=0)
    resample_masks: bool = option(False, "Accept a reference on another grid than its scan (nearest neighbour).")
    salt: str = option("", "Secret that makes case ids reproducible; empty: a new random one for each store.")

    def read_options(self) -> ReadOptions:
        """The part that readers need."""
        return ReadOptions(self.assume_hu, self.allow_gaps, self.correct_tilt, self.nan_to_air, self.volume)

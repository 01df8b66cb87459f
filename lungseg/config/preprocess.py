"""Configuration of ``lungseg preprocess``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lungseg.config.fields import option, to_dict

PERMISSIONS = ("assume_hu", "allow_gaps", "correct_tilt", "nan_to_air", "volume", "resample_masks")
"""Options that let more scans in without changing those that come in anyway: cases of one store may differ in them."""


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
    assume_hu: bool = option(False, "Take DICOM values as HU where rescale slope and intercept are missing.")
    allow_gaps: int = option(
        0, "Fill up to this many missing slices of a scan, else refuse it.", minimum=0, maximum=100
    )
    correct_tilt: bool = option(False, "Shear slices of a tilted gantry back into a box, else refuse the scan.")
    nan_to_air: bool = option(False, "Replace NaN and infinite voxels of image files by air, else refuse the file.")
    volume: int | None = option(None, "Volume to take of a four-dimensional image file, from 0.", minimum=0)
    resample_masks: bool = option(False, "Move a reference onto the grid of its scan (nearest voxel), else refuse it.")
    salt: str = option("", "Secret that makes case ids reproducible; empty: a new random one for each store.")

    def read_options(self) -> ReadOptions:
        """The part that readers need."""
        return ReadOptions(self.assume_hu, self.allow_gaps, self.correct_tilt, self.nan_to_air, self.volume)

    def settings(self) -> dict[str, Any]:
        """What every case of a store shares."""
        return {name: value for name, value in to_dict(self).items() if name not in ("salt", *PERMISSIONS)}

    def permitted(self) -> dict[str, Any]:
        """What was permitted: said in each case, compared with none."""
        return {name: getattr(self, name) for name in PERMISSIONS}


def check_modes(given: Mapping[str, Any]) -> list[str]:
    """Conflicts between what `preprocess` is asked to do, in words; ``given`` holds its paths and switches by name."""
    looking = bool(given["list_scans"] or given["check"])
    problems = []
    if given["list_scans"] and given["check"]:
        problems.append("--list and --check exclude each other")
    if given["as_json"] and not looking:
        problems.append("--json goes with --list or --check")
    if given["output"] is None and not looking:
        problems.append("missing option '--output' / '-o': the patch store to make or to add to")
    if given["id_map"] and looking:
        problems.append("--id-map is written by a real run, not by --list or --check")
    if given["series"] and given["manifest"]:
        problems.append("--series and --manifest exclude each other: the manifest has a column 'series'")
    return problems

"""What one class of one case scored, and the settings it was scored with: what every table is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lungseg.errors import InputError
from lungseg.evaluation.surface import (
    ASSD_DEFINITION,
    BORDER,
    HD95_DEFINITIONS,
    require_definition,
    surface_dice_definition,
)

MIN_REFERENCE_ML = 1.0
"""In a volume a class counts from this reference volume on, inclusive (METHOD 0.4); in a slice from one voxel on."""
VOLUME_TOLERANCE_ML = 1e-9
"""Rounding allowed in the comparison with ``MIN_REFERENCE_ML``: voxels × spacing is not exact in binary."""

SCORED = "scored"
MISSED = "missed"
FALSE_TISSUE = "false tissue"
ABSENT = "absent"
MISSING_PREDICTION = "missing prediction"
MISSING_REFERENCE = "missing reference"
UNUSABLE = "unusable"
STATUSES = (SCORED, MISSED, FALSE_TISSUE, ABSENT, MISSING_PREDICTION, MISSING_REFERENCE, UNUSABLE)
NOT_COMPARED = (MISSING_REFERENCE, UNUSABLE)
"""Nothing was compared: no reference, or a side that cannot be read or lies on another grid. Counted, in no figure."""

VOLUME, SLICES = "volume", "slices"
COUNTING_RULES: Mapping[str, str] = {
    VOLUME: (
        f"3-D, per case. A class counts in a case where the reference holds at least {MIN_REFERENCE_ML:g} mL of it; "
        "one not predicted there scores Dice 0 and is counted as missed; tissue predicted where the reference holds "
        "less is false tissue (mL) and not averaged."
    ),
    SLICES: (
        "Per annotated axial slice, distances in plane. A class counts in a slice where the reference holds a voxel "
        "of it; one not predicted there scores Dice 0 and is counted as missed; tissue predicted where the reference "
        "holds none is false tissue (mL) and not averaged."
    ),
}
"""What counts in each mode: printed with every table."""
PENALTY_DEFINITION = (
    "The penalised HD95 charges a missed class the diagonal of the lung's bounding box, in slice mode "
    "that of the box in the plane."
)


@dataclass(frozen=True)
class ScoreSettings:
    """How pairs are scored; part of every table's text through ``definitions``."""

    hd95: str = BORDER
    """Which HD95: a key of ``surface.HD95_DEFINITIONS``."""
    tolerance_mm: float = 2.0
    """Tolerance of the surface Dice in mm, inclusive."""
    mode: str = VOLUME
    """`volume` (3-D) or `slices` (each annotated axial slice by itself)."""
    slices: Sequence[int] | None = None
    """Annotated slices, as indices on the reference's first axis. None: those where the reference is not all 0."""

    def __post_init__(self) -> None:
        require_definition(self.hd95, self.tolerance_mm)
        if self.mode not in COUNTING_RULES:
            raise InputError(f"unknown mode {self.mode!r}: choose one of {', '.join(COUNTING_RULES)}")
        if self.slices is not None and self.mode != SLICES:
            raise InputError("annotated slices are given, but the mode is not `slices`")

    def counts(self, reference_ml: float) -> bool:
        """Whether a reference holds enough of a class to be averaged."""
        if self.mode == SLICES:
            return reference_ml > 0
        return reference_ml >= MIN_REFERENCE_ML - VOLUME_TOLERANCE_ML

    @property
    def definitions(self) -> tuple[str, ...]:
        """Sentences that say what was counted and measured, for the text of every table."""
        return (
            COUNTING_RULES[self.mode],
            HD95_DEFINITIONS[self.hd95],
            PENALTY_DEFINITION,
            ASSD_DEFINITION,
            surface_dice_definition(self.tolerance_mm),
        )


@dataclass(frozen=True)
class ClassScore:
    """One class of one case, or of one slice. Numbers that cannot be had, or must not be averaged, are ``nan``.

    "Counts" means: the reference holds enough of the class (``MIN_REFERENCE_ML``, in slice mode one voxel).
    """

    case_id: str
    """De-identified id of the scan."""
    patient_id: str
    """De-identified id of the patient; statistics resample patients."""
    tissue: str
    """Name of the class in the view."""
    status: str
    """One of ``STATUSES``; `unusable`: a side cannot be read, has foreign ids or lies on another grid."""
    dice: float
    """0 to 1; 0 when missed; nan when the class does not count."""
    iou: float
    """0 to 1, as ``dice``."""
    precision: float
    """0 to 1; nan when nothing was predicted."""
    recall: float
    """0 to 1; 0 when missed."""
    reference_ml: float
    """Reference volume in mL; nan when there is no reference file."""
    predicted_ml: float
    """Predicted volume in mL; nan when there is no prediction file. With status `false tissue` all of it is false."""
    volume_error_ml: float
    """Predicted minus reference volume in mL."""
    hd95_mm: float
    """HD95 in mm by the definition of the settings; nan when missed."""
    penalised_hd95_mm: float
    """HD95 in mm; diagonal of the lung's box when missed."""
    volume_error_percent: float = math.nan
    """Volume error in % of the reference volume; -100 when missed, nan when the class does not count."""
    overlap_ml: float = math.nan
    """Volume of A∩B in mL, for the pooled Dice: 2·Σ overlap / (Σ predicted + Σ reference) over all rows with a
    reference. 0 when there is no prediction file; nan when there is no reference file."""
    assd_mm: float = math.nan
    """Average symmetric surface distance in mm; nan when missed."""
    surface_dice: float = math.nan
    """Surface Dice at the tolerance of the settings, 0 to 1; 0 when missed, nan when the class does not count."""
    slice_index: int | None = None
    """Axial index on the reference's grid in slice mode; None for a volume."""

    @property
    def is_averaged(self) -> bool:
        """Whether this row enters the means: its reference holds enough of the class."""
        return not math.isnan(self.dice)

    @property
    def is_missed(self) -> bool:
        """Whether the class counts and no voxel of it was predicted."""
        return self.is_averaged and self.status in (MISSED, MISSING_PREDICTION)

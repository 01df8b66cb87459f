"""The tissue classes: ids, names, HU ranges, colours and cut points. The only home of clinical knowledge.

Ids are those of METHOD 0.1. Cut points carry their source; none is fitted to labels of any phantom.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum

OUTSIDE = 0
UNCLASSIFIED = 255
"""Lung voxel that no class explains: reported, and counted as an error by the evaluation."""

LUNG_LEFT = 1
LUNG_RIGHT = 2


class Tissue(IntEnum):
    """Tissue classes of the label maps (uint8)."""

    HEALTHY = 1
    EMPHYSEMA = 2
    GGO = 3
    FIBROSIS = 4
    CONSOLIDATION = 5
    CAVITY = 6


@dataclass(frozen=True)
class TissueInfo:
    """What is known about one tissue class."""

    name: str
    """Machine name, used in files and tables."""
    title: str
    """Name for people."""
    colour: tuple[int, int, int]
    """sRGB colour, 0-255 (Okabe-Ito palette: distinguishable with colour-vision deficiency)."""
    prototype_hu: float | None
    """Prototype mean HU of `mean-hu` naming and of the HU-anchored mixture (METHOD 1.6, 7.7)."""
    compatible_hu: tuple[float, float] | None
    """HU range of the optional compatibility check, before its tolerance of 50 HU (METHOD 1.6)."""


TISSUES: Mapping[Tissue, TissueInfo] = {
    Tissue.HEALTHY: TissueInfo("healthy", "Healthy lung", (0, 158, 115), -850.0, (-980.0, -650.0)),
    Tissue.EMPHYSEMA: TissueInfo("emphysema", "Emphysema", (86, 180, 233), -955.0, (-float("inf"), -880.0)),
    Tissue.GGO: TissueInfo("ggo", "Ground glass", (240, 228, 66), -600.0, (-800.0, -250.0)),
    Tissue.FIBROSIS: TissueInfo("fibrosis", "Fibrosis", (213, 94, 0), -450.0, (-800.0, 50.0)),
    Tissue.CONSOLIDATION: TissueInfo("consolidation", "Consolidation", (204, 121, 167), 0.0, (-400.0, 300.0)),
    Tissue.CAVITY: TissueInfo("cavity", "Cavity", (0, 114, 178), None, None),
}

MIXTURE_TISSUES: tuple[Tissue, ...] = (
    Tissue.HEALTHY,
    Tissue.EMPHYSEMA,
    Tissue.GGO,
    Tissue.FIBROSIS,
    Tissue.CONSOLIDATION,
)
"""Classes a mixture component may be named; a cavity is derived by rule, never by a component (METHOD 0.1)."""

LAA950_HU = -950.0
"""Low attenuation area, inclusive, inspiratory thin-section CT. Schroeder et al., AJR 2013 (COPDGene); CIP `LAA950`."""
LAA950_EMPHYSEMA_SHARE = 0.10
"""LAA-950 share above which tissue is emphysema: healthy mean 2.0 % + 3 SD of 2.7 %. Zach et al. 2012."""
EMPHYSEMA_BELOW_HEALTHY_MODE_HU = 60.0
"""Median this far below the scan's healthy mode is emphysema: our choice (METHOD 1.6)."""
CONSOLIDATION_MEDIAN_HU = -300.0
"""Median at or above: consolidation. BMC Infect Dis 2021, s12879-021-06556-z (best of eight cuts)."""
HEALTHY_MEDIAN_HU = -700.0
"""Median at or below: healthy. Lower bound of ground glass, general knowledge (METHOD 6)."""
FIBROSIS_LOCAL_SD_HU = 120.0
"""Local standard deviation (5 mm window) above which an intermediate density is fibrosis: our choice (METHOD 1.6)."""
FIBROSIS_TO_HEALTHY_TEXTURE = 2.0
"""The same cut against the median local standard deviation of the scan's own healthy tokens; the lower of both cuts
counts. Thick slices and soft kernels wash texture out, in fibrosis and in healthy lung alike (FEASIBILITY, failure 8).
The factor is our choice; it was last looked at on validation phantoms 300-302, so it is phantom-informed."""
HEALTHY_MODE_RANGE_HU = (-950.0, -700.0)
"""Band in which a scan's healthy mode is looked for: usual inspiratory band of healthy lung (METHOD 6)."""
DENSE_HU = -200.0
"""Above it a voxel is soft tissue or nearly so: share reported as a sign of vessels (METHOD 1.6, "> -200 HU")."""
PAPER_CODE_EMPHYSEMA_BELOW_HU = -800.0
"""Median below: emphysema. Only the `mean-hu-adaptive` naming, from the authors' script (METHOD 1.6 [C])."""
PAPER_CODE_CONSOLIDATION_HU = -200.0
"""Median at or above: consolidation, same rule. It holds for any scan, before the scan's percentiles."""
PAPER_CODE_LOW_QUARTER_HU = -700.0
"""Lowest quarter of the scan: emphysema below, else ground glass, same rule."""
PAPER_CODE_FIBROSIS_HU = -500.0
"""Upper half of the scan: fibrosis above, else healthy, same rule."""
PAPER_CODE_DENSE_QUARTER_HU = -300.0
"""Highest quarter of the scan: consolidation above, same rule."""
COMPATIBILITY_TOLERANCE_HU = 50.0
"""Tolerance of the optional HU compatibility check (METHOD 1.6)."""

VIEWS: Mapping[str, Mapping[str, tuple[Tissue, ...]]] = {
    "tissues": {TISSUES[tissue].name: (tissue,) for tissue in MIXTURE_TISSUES},
    "paper": {
        "healthy": (Tissue.HEALTHY,),
        "ggo": (Tissue.GGO,),
        "fibrosis": (Tissue.FIBROSIS,),
        "emphysema": (Tissue.EMPHYSEMA,),
    },
    "ild": {
        "healthy": (Tissue.HEALTHY,),
        "emphysema": (Tissue.EMPHYSEMA,),
        "ild": (Tissue.GGO, Tissue.FIBROSIS),
    },
    "abnormal": {
        "abnormal": (
            Tissue.EMPHYSEMA,
            Tissue.GGO,
            Tissue.FIBROSIS,
            Tissue.CONSOLIDATION,
            Tissue.CAVITY,
        )
    },
}
"""Named class views: column of a table -> label ids merged into it (METHOD 0.1: explicit mappings, never reuse)."""


def tissue_by_name(name: str) -> Tissue:
    """Tissue class with this machine name; ``KeyError`` if there is none."""
    for tissue, info in TISSUES.items():
        if info.name == name:
            return tissue
    raise KeyError(name)


# ---------------------------------------------------------------- lung masks of other programs

LUNG_EITHER = 3
"""In a convention: lung whose side the label does not say. Never in a mask of ours; position decides it."""
_CIP_LUNG_REGIONS: Mapping[int, int] = {
    **dict.fromkeys((1, 20, 21, 22), LUNG_EITHER),  # whole lung; upper, middle and lower third of both
    **dict.fromkeys((2, 4, 5, 6, 12, 13, 14), LUNG_RIGHT),  # lung; superior, middle, inferior lobe; thirds
    **dict.fromkeys((3, 7, 8, 9, 10, 11), LUNG_LEFT),  # lung; superior, inferior lobe; thirds
}
_CIP_REGIONS, _CIP_TYPES = range(69), range(92)
_CIP_CENTRAL_AIRWAY = (38, 39)
"""Types trachea and main bronchus: no lung, whatever their region."""


@dataclass(frozen=True)
class LungMaskConvention:
    """What the labels of one program's lung masks mean."""

    title: str
    """For people: which labels are which lung."""
    sides: Mapping[int, int]
    """Label -> ``LUNG_LEFT``, ``LUNG_RIGHT`` or ``LUNG_EITHER``; empty: any one label, lung of either side."""
    others: frozenset[int]
    """Labels that may occur and are no lung; 0 always may."""
    source: str

    def strangers(self, labels: Collection[int]) -> list[int]:
        """Those of ``labels`` that this convention does not know, ascending."""
        if not self.sides:
            return sorted(set(labels) - {0}) if len(set(labels) - {0}) > 1 else []
        return sorted(label for label in labels if label and label not in self.sides and label not in self.others)


LUNG_MASK_CONVENTIONS: Mapping[str, LungMaskConvention] = {
    "lungseg": LungMaskConvention(
        "1 left lung, 2 right lung", {1: LUNG_LEFT, 2: LUNG_RIGHT}, frozenset(), "the masks of a lungseg store"
    ),
    "lungmask": LungMaskConvention(
        "1 right lung, 2 left lung",
        {1: LUNG_RIGHT, 2: LUNG_LEFT},
        frozenset(),
        "lungmask 0.2.22, README, two label models (R231, R231CovidWeb)",
    ),
    "lungmask-lobes": LungMaskConvention(
        "1-2 lobes of the left lung, 3-5 of the right lung",
        {1: LUNG_LEFT, 2: LUNG_LEFT, 3: LUNG_RIGHT, 4: LUNG_RIGHT, 5: LUNG_RIGHT},
        frozenset(),
        "lungmask 0.2.22, README, five label models (LTRCLobes, LTRCLobes_R231)",
    ),
    "totalsegmentator": LungMaskConvention(
        "10-11 lobes of the left lung, 12-14 of the right lung",
        {10: LUNG_LEFT, 11: LUNG_LEFT, 12: LUNG_RIGHT, 13: LUNG_RIGHT, 14: LUNG_RIGHT},
        frozenset({*range(1, 10), *range(15, 118)}),
        "TotalSegmentator v2, map_to_binary.py, class map 'total' (117 classes; written with --ml)",
    ),
    "cip": LungMaskConvention(
        "region + 256 * type: 1 whole lung, 2 right, 3 left, 4-8 lobes, 9-14 and 20-22 thirds",
        {
            region + 256 * kind: side
            for kind in _CIP_TYPES
            if kind not in _CIP_CENTRAL_AIRWAY
            for region, side in _CIP_LUNG_REGIONS.items()
        },
        frozenset(
            region + 256 * kind
            for kind in _CIP_TYPES
            for region in _CIP_REGIONS
            if region not in _CIP_LUNG_REGIONS or kind in _CIP_CENTRAL_AIRWAY
        ),
        "ChestImagingPlatform, ChestConventions.py: ChestRegion 0-68, ChestType 0-91; bronchi and vessels within a "
        "lung region are lung, as in its own whole-lung masks",
    ),
    "binary": LungMaskConvention("one label: lung, sides by position", {}, frozenset(), "any thresholded mask"),
}
"""Name -> convention. Where several fit a mask, its geometry decides (`lungseg/scan/lung_mask_labels.py`)."""

LUNG_MEAN_HU = (-970.0, -200.0)
"""Mean inside a lung mask that belongs to its scan. Above is soft tissue, even for lungs full of disease; below is the
air around the body: lungs of the severest emphysema have about -900 (`elastix-emphysema` of the test data: -896)."""

"""The tissue classes: ids, names, HU ranges, colours and cut points. The only home of clinical knowledge.

Ids are those of METHOD 0.1. Cut points carry their source; none is fitted to labels of any phantom.
"""

from __future__ import annotations

from collections.abc import Mapping
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

UNCLASSIFIED_COLOUR = (190, 190, 190)
"""sRGB of lung that no class explains."""

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

# ---------------------------------------------------------------- densities that are reported

LAA_HU: Mapping[str, float] = {"laa950": LAA950_HU, "laa910": -910.0, "laa856": -856.0}
"""Low attenuation areas, inclusive: name -> HU. CIP `LAA950`, `LAA910`, `LAA856` (parenchyma_phenotypes.py)."""
HAA_HU: Mapping[str, float] = {"haa700": -700.0, "haa600": -600.0, "haa500": -500.0, "haa250": -250.0}
"""High attenuation areas, inclusive: name -> HU. CIP `HAA700` to `HAA250` (parenchyma_phenotypes.py)."""
HAA_BAND_HU = (-600.0, -250.0)
"""High attenuation area of interstitial lung disease, both ends inclusive. Podolanczuk, ERJ 2016;48:1442."""
AERATION_HU: Mapping[str, tuple[float, float]] = {
    "aeration_emphysema": (-float("inf"), -950.0),
    "inflated": (-950.0, -750.0),
    "infiltrated": (-750.0, -400.0),
    "collapsed": (-400.0, 0.0),
    "vessels": (0.0, 3000.0),
}
"""Aeration bands, lower end inclusive, upper exclusive (the last one inclusive). Slicer Lung CT Analyzer, defaults."""
FUNCTIONAL_BANDS, AFFECTED_BANDS = ("inflated",), ("infiltrated", "collapsed")
"""Sums of bands. Slicer Lung CT Analyzer, README."""
DENSE_LUNG_HU = -500.0
"""Density statistics `...500` leave denser voxels (vessels, walls) out, inclusive. CIP `HUMean500`."""
SEVERITY_CUTS_PCT = (0.0, 5.0, 25.0, 50.0, 75.0)
"""Lobe score: 0 none, 1 up to 5 %, 2 up to 25 %, 3 up to 50 %, 4 up to 75 %, 5 above. CT severity score of COVID-19."""
SEVERITY_TISSUES = (Tissue.GGO, Tissue.FIBROSIS, Tissue.CONSOLIDATION)
"""Opacities that count as involvement in that score."""


# ---------------------------------------------------------------- lobes and label maps of them


@dataclass(frozen=True)
class LobeInfo:
    """One of the five lobes."""

    name: str
    """Region of the tables."""
    side: int
    """``LUNG_LEFT`` or ``LUNG_RIGHT``."""


LOBES: Mapping[int, LobeInfo] = {
    1: LobeInfo("left_upper_lobe", LUNG_LEFT),
    2: LobeInfo("left_lower_lobe", LUNG_LEFT),
    3: LobeInfo("right_upper_lobe", LUNG_RIGHT),
    4: LobeInfo("right_middle_lobe", LUNG_RIGHT),
    5: LobeInfo("right_lower_lobe", LUNG_RIGHT),
}
"""Ids of the lobes inside lungseg (those of lungmask's LTRCLobes)."""
LOBE_CONVENTIONS: Mapping[str, Mapping[int, int]] = {
    "lungmask": {1: 1, 2: 2, 3: 3, 4: 4, 5: 5},
    "totalsegmentator": {10: 1, 11: 2, 12: 3, 13: 4, 14: 5},
    "cip": {7: 1, 8: 2, 4: 3, 5: 4, 6: 5},
}
"""Program -> its label of a lobe -> ours. lungmask README (LTRCLobes); TotalSegmentator v2 map_to_binary.py, `total`;
CIP ChestConventions (region in the low byte, type in the high one: superior, middle, inferior lobes are 4 to 8)."""


# ---------------------------------------------------------------- codes for DICOM


@dataclass(frozen=True)
class Code:
    """A coded concept: scheme, value and its meaning."""

    value: str
    scheme: str
    """SCT (SNOMED CT) or DCM (PS3.16)."""
    meaning: str


ABNORMAL_STRUCTURE = Code("49755003", "SCT", "Morphologically Abnormal Structure")
ANATOMICAL_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
LUNG_CODE = Code("39607008", "SCT", "Lung")
"""All three: PS3.16 CID 7150 and CID 4, as in pydicom's concept dictionary."""
TISSUE_CODES: Mapping[Tissue, Code] = {
    Tissue.EMPHYSEMA: Code("87433001", "SCT", "Pulmonary emphysema"),
    Tissue.GGO: Code("112120", "DCM", "Ground glass opacity"),
    Tissue.FIBROSIS: Code("51615001", "SCT", "Fibrosis of lung"),
    Tissue.CONSOLIDATION: Code("95436008", "SCT", "Lung consolidation"),
}
"""Segmented property type of a tissue; one that is not here (healthy lung, cavity, unclassified) is coded as lung.
Ground glass: PS3.16 CID 6104 (pydicom's concept dictionary). The SNOMED CT codes are none of PS3.16: 87433001 and
51615001 as public FHIR value sets give them, 95436008 as the OMOP vocabulary gives it ("Lung consolidation")."""

# ---------------------------------------------------------------- the HU check, and views

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

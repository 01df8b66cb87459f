"""The tissue classes: ids, names, HU ranges, colours and cut points. The only home of clinical knowledge.

Ids are those of METHOD 0.1. Cut points carry their source; none is fitted to labels of any phantom.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

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
LAA_LOWEST_HU = -970.0
"""The same area is never counted lower than this: the lowest of the cut points that agree best with pathology in
multi-detector CT. Madani et al., Radiology 2006;238:1036 (-960 and -970 HU)."""
LAA950_EMPHYSEMA_SHARE = 0.10
"""LAA-950 share above which tissue is emphysema: healthy mean 2.0 % + 3 SD of 2.7 %. Zach et al. 2012."""
EMPHYSEMA_EDGE_TO_CORE = 0.3
"""The same cut against the mean share of the emphysema around: the higher of both counts. A window across the edge of
an even region of share s has s / 2; holes lie in clumps, so our choice is lower. Phantom-informed (0.25 to 0.3 cost
nothing on validation phantoms 300-305, 311-313, 315; 0.35 costs 1 point of emphysema)."""
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
DENSE_BODY_HU = -400.0
"""A body of lung, wider than a small vessel, denser than this is consolidated: between the -300 HU of the median above
and the -500 HU at which lung is no longer normally aerated (Gattinoni, AJRCCM 164:1701). Phantom-informed (validation
phantoms 300-301; -450 did no better)."""
THIN_CONTRAST_HU = 120.0
"""A structure this much denser than what lies around it, beyond what noise makes of it, is a vessel, a wall or a
septum: a seventh of the contrast of blood against lung. Our choice."""
FIBROSIS_THIN_SHARE = 0.15
"""Share of thin dense structure above which lung that is dense and textured is fibrosis: vessels and airway walls take
about a tenth of normal lung. Phantom-informed (0.10 to 0.20 give the same on validation phantoms 300-301)."""
FIBROSIS_TO_HEALTHY_THIN = 2.0
"""The same cut against the mean share of the scan's own healthy lung; the lower of both counts. Thick slices and soft
kernels wash septa out, and vessels with them. Phantom-informed (validation phantoms 300, 310-313)."""
BODY_SHARE_ERROR, LAA950_SHARE_ERROR, RAISED_SHARE_ERROR = 0.3, 0.06, 0.15
"""Standard errors of the shares at their cut points: sqrt(p (1 - p) / n) of n independent pieces of lung in the window.
Noise and blur tie about 27 mm3 together: n is about 26 in the window of 2.5 mm (6 % at a share of 10 %); lung structure
is coarser: about 10 for raised density, 3 in a cell of 2 mm."""
PLAIN_BAND_HU = 60.0
"""Parenchyma this near to the scan's healthy lung is plain healthy lung: the distance that makes emphysema below it."""
BUNDLE_PLAIN_BY_TUBENESS = 0.04
"""Thin dense structure is a bundle of vessels, not fibrosis, if the share of plain healthy lung between it times its
mean tubeness is this large, in a whole piece or around one place of it. Phantom-informed: on phantoms of every kernel,
dose and slice (validation phantoms 302, 305, 312, 313, 315; 8200 on 1.5 mm) pieces of fibrosis have 0.005 to 0.032,
bundles 0.043 to 0.086. Either factor alone overlaps."""
LEAST_THIN_SHARE = 0.03
"""The cut is never lower: a chance voxel in a window is no mesh. Our choice."""
THIN_SHARE_ERROR = 0.33
"""Standard error of the share of thin structures, relative to its cut point: vessels are few in a window (about 10)."""
TEXTURE_ERROR_HU, BROAD_MEAN_ERROR_HU = 15.0, 30.0
"""Standard errors of the texture (120 HU over 2 x 30 independent pieces) and of the mean of the surroundings."""
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
    "lungmask-lobes": {1: 1, 2: 2, 3: 3, 4: 4, 5: 5},
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

VIEWS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
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
_CIP_REGIONS, _CIP_TYPES = range(79), range(92)
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
        {label: LOBES[lobe].side for label, lobe in LOBE_CONVENTIONS["lungmask-lobes"].items()},
        frozenset(),
        "lungmask 0.2.22, README, five label models (LTRCLobes, LTRCLobes_R231)",
    ),
    "totalsegmentator": LungMaskConvention(
        "10-11 lobes of the left lung, 12-14 of the right lung",
        {label: LOBES[lobe].side for label, lobe in LOBE_CONVENTIONS["totalsegmentator"].items()},
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
        "ChestImagingPlatform, Resources/ChestConventions.xml: regions 0-78, types 0-91; bronchi and vessels within a "
        "lung region are lung, as in its own whole-lung masks",
    ),
    "binary": LungMaskConvention("one label: lung, sides by position", {}, frozenset(), "any thresholded mask"),
}
"""Name -> convention. Where several fit a mask, its geometry decides (`lungseg/scan/lung_mask_labels.py`)."""

LUNG_MEAN_HU = (-970.0, -200.0)
"""Mean inside a lung mask that belongs to its scan. Above is soft tissue, even for lungs full of disease; below is the
air around the body: lungs of the severest emphysema have about -900 (`elastix-emphysema` of the test data: -896)."""


# Label maps of other tools: what their ids mean when `lungseg evaluate` scores them. -------------------------------


class LungLabel(IntEnum):
    """Lungs among the classes of an evaluation: ids of their own, so that a lung is never taken for a tissue."""

    LEFT = 101
    RIGHT = 102
    LUNG = 103
    """Lung of a tool that does not tell the sides."""


LUNG_VIEWS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "lungs": {"left lung": (LungLabel.LEFT,), "right lung": (LungLabel.RIGHT,)},
    "lung": {"lung": (LungLabel.LEFT, LungLabel.RIGHT, LungLabel.LUNG)},
}
"""Views of lung masks, for tools that find lungs."""
EVALUATION_VIEWS: Mapping[str, Mapping[str, tuple[int, ...]]] = {**VIEWS, **LUNG_VIEWS}
"""Every view that `lungseg evaluate` knows."""

NO_CLASS = ("none", "background", "outside", "clear label")
"""Names that map an id to nothing, explicitly; the last is ITK-SNAP's. Not nnU-Net's `ignore`: not annotated."""
CLASS_NAMES: Mapping[str, int] = {
    **dict.fromkeys(NO_CLASS, OUTSIDE),
    "unclassified": UNCLASSIFIED,
    **{info.name: int(tissue) for tissue, info in TISSUES.items()},
    **{info.title.lower(): int(tissue) for tissue, info in TISSUES.items()},
    "normal": int(Tissue.HEALTHY),
    "normal lung": int(Tissue.HEALTHY),
    "ground glass opacity": int(Tissue.GGO),
    "reticulation": int(Tissue.FIBROSIS),
    "honeycombing": int(Tissue.FIBROSIS),
    "lung left": int(LungLabel.LEFT),
    "left lung": int(LungLabel.LEFT),
    "lung right": int(LungLabel.RIGHT),
    "right lung": int(LungLabel.RIGHT),
    "lung": int(LungLabel.LUNG),
}
"""Names of a label map file -> class; case, hyphens and underscores do not matter. Reticulation and honeycombing are
fibrosis by METHOD 0.1."""


def class_name(label: int) -> str:
    """Name of a class of the evaluation (`none` for ``OUTSIDE``); ``KeyError`` if there is none."""
    for name, value in CLASS_NAMES.items():
        if value == int(label):
            return name
    raise KeyError(label)


MAIN_NAMES = tuple(dict.fromkeys(class_name(value) for value in CLASS_NAMES.values()))
"""One name of each class, for messages."""


@dataclass(frozen=True)
class LabelConvention:
    """What the ids of a tool or data set mean."""

    classes: Mapping[int, int]
    """Id -> class; ``OUTSIDE`` for ids that are known and mean none of our classes."""
    source: str
    """Where that is written."""
    part: Literal["id", "type", "region"] = "id"
    """What of a stored id counts: all of it, or for CIP its upper (type) or lower (region) byte."""
    file_names: Mapping[str, int] | None = None
    """Class files in a folder per case, without their endings -> class; other files there are other structures."""


_LUNG_CLASSES: Mapping[int, int] = {
    OUTSIDE: OUTSIDE,
    LUNG_LEFT: LungLabel.LEFT,
    LUNG_RIGHT: LungLabel.RIGHT,
    LUNG_EITHER: LungLabel.LUNG,
}


def _lung_labels(name: str, *, file_names: Mapping[str, int] | None = None) -> LabelConvention:
    """A convention of lung masks, for scoring lungs."""
    convention = LUNG_MASK_CONVENTIONS[name]
    classes = {**dict.fromkeys(convention.others, OUTSIDE), **convention.sides}
    return LabelConvention(
        {label: _LUNG_CLASSES[side] for label, side in classes.items()}, convention.source, file_names=file_names
    )


LABEL_CONVENTIONS: Mapping[str, LabelConvention] = {
    "lungseg": LabelConvention(
        {**{int(tissue): int(tissue) for tissue in Tissue}, UNCLASSIFIED: UNCLASSIFIED}, "METHOD 0.1"
    ),
    "lungseg-lungs": _lung_labels("lungseg"),
    "binary-lung": LabelConvention({1: LungLabel.LUNG}, "a lung mask of one value"),
    # Bullae are counted as emphysema: our choice. Types that are neither one of our tissues nor plainly none of them
    # (nodules, mosaic, gas trapping, atelectasis, scars) are left out, so that a map that holds them is refused.
    "cip": LabelConvention(
        {
            **dict.fromkeys((0, 2, 3, 8, 9, *range(38, 49), 50, 51, *range(55, 67), *range(72, 77)), OUTSIDE),
            1: Tissue.HEALTHY,
            **dict.fromkeys((4, *range(10, 22), 67, 68, 69), Tissue.EMPHYSEMA),
            5: Tissue.GGO,
            **dict.fromkeys((6, 37), Tissue.FIBROSIS),
        },
        "ChestImagingPlatform, Resources/ChestConventions.xml: id = region + 256 * type",
        part="type",
    ),
    # by region alone: the few voxels of main bronchi with a lung's region count as lung here
    "cip-lungs": LabelConvention(
        {region: _LUNG_CLASSES[_CIP_LUNG_REGIONS.get(region, OUTSIDE)] for region in _CIP_REGIONS},
        LUNG_MASK_CONVENTIONS["cip"].source,
        part="region",
    ),
    "medseg": LabelConvention(
        {1: Tissue.GGO, 2: Tissue.CONSOLIDATION, 3: OUTSIDE},
        "medicalsegmentation.com, COVID-19 CT: 1 ground glass, 2 consolidation, 3 pleural effusion",
    ),
    "lungmask": _lung_labels("lungmask"),
    "lungmask-lobes": _lung_labels("lungmask-lobes"),
    "totalsegmentator": _lung_labels(
        "totalsegmentator",
        file_names={
            "lung_upper_lobe_left": LungLabel.LEFT,
            "lung_lower_lobe_left": LungLabel.LEFT,
            "lung_upper_lobe_right": LungLabel.RIGHT,
            "lung_middle_lobe_right": LungLabel.RIGHT,
            "lung_lower_lobe_right": LungLabel.RIGHT,
        },
    ),
}
"""Built-in names of `--label-map`. Nothing tells consolidation in CIP, and nothing but GGO and consolidation in MedSeg:
classes that a reference cannot hold are not scored."""

SEGMENT_CODES: Mapping[tuple[str, str], int] = {
    **{(code.scheme, code.value): int(tissue) for tissue, code in TISSUE_CODES.items()},
    ("DCM", "112113"): Tissue.FIBROSIS,  # Reticular pattern, CID 6103
    ("DCM", "112106"): Tissue.FIBROSIS,  # Honeycomb pattern, CID 6103
    ("SCT", "44029006"): LungLabel.LEFT,  # Left lung
    ("SCT", "3341006"): LungLabel.RIGHT,  # Right lung
    (LUNG_CODE.scheme, LUNG_CODE.value): LungLabel.LUNG,
}
"""Coding scheme and value of a DICOM segment's SegmentedPropertyTypeCode -> class. Source: DICOM PS3.16, SNOMED CT."""

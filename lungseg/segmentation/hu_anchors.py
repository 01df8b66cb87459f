"""What the literature says the HU of a token of each tissue are: features, their reference conditions, and anchors.

The HU statistics of a token are referred to its own scan first, so that kernel, dose and depth of breath, which shift
and widen healthy lung as they do the rest, fall out (FEASIBILITY failure mode 8). All cut points come from
``lungseg.tissue``; between two cuts the anchors of a tissue are spread evenly, and neighbouring tissues meet at their
cut. Nothing here was fitted to labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lungseg import tissue as cut
from lungseg.errors import MismatchError
from lungseg.segmentation.density import TokenStatistics
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, Tissue

FEATURE_NAMES = ("floor_hu", "rise_hu", "log_texture", "laa")
"""The features of a token: density of the parenchyma, how far the median lies above it, texture, low attenuation."""
DENSEST_LUNG_HU = 100.0
"""Upper end of non-aerated lung. ARDS compartments, -100 to 100 HU (METHOD 6)."""
AIR_HU = -1000.0
"""Air, by the definition of the Hounsfield scale: nothing in a lung is thinner."""
QUARTILE = 0.6745
"""How far the first quartile of a normal distribution lies under its median, in standard deviations."""
REFERENCE_TEXTURE_HU = cut.FIBROSIS_LOCAL_SD_HU / cut.FIBROSIS_TO_HEALTHY_TEXTURE
"""Local SD of healthy lung in the scan of reference: there the absolute and the relative cut for fibrosis agree."""
SMALLEST_TEXTURE_HU = 1.0
"""Texture below it counts as this: a logarithm follows, and CT numbers are whole."""
DENSITIES_A_TISSUE = 4
"""Anchors along the density of a tissue: steps of 100 HU between ground glass and consolidation, our choice."""


@dataclass(frozen=True)
class Anchors:
    """Where the literature expects K components: normal priors of each feature."""

    tissues: tuple[Tissue, ...]
    """Tissue of each, K."""
    centre: np.ndarray
    """float64 (K, F)."""
    spread: np.ndarray
    """float64 (K, F): standard deviations."""


def refer_statistics(statistics: TokenStatistics, *, healthy_mode_hu: float) -> TokenStatistics:
    """Statistics of the tokens of one scan as they would be in a scan of reference.

    There the healthy mode is the prototype, -850 HU, noise takes nothing off the first quartile of healthy lung, and
    the texture of healthy lung makes both cuts for fibrosis, the absolute and the relative one, the same. Densities
    above the mode are scaled about water (lung of another depth of breath holds another share of gas), those below it
    are shifted.

    Parameters
    ----------
    statistics : TokenStatistics
        Of tokens of one scan, all or a sample. Healthy are those whose median is nearer to the mode than emphysema
        is (``EMPHYSEMA_BELOW_HEALTHY_MODE_HU``); without any, noise and texture stay as they are.
    healthy_mode_hu : float
        From ``healthy_mode_hu`` of the same scan.

    Returns
    -------
    TokenStatistics
        With other ``median_hu``, ``p25_hu`` and ``local_sd_median``; NaN where they are.

    Source
    ------
    FEASIBILITY failure modes 2 and 8.
    """
    near = np.abs(statistics.median_hu - healthy_mode_hu) < cut.EMPHYSEMA_BELOW_HEALTHY_MODE_HU
    noise, texture = 0.0, REFERENCE_TEXTURE_HU
    if near.any():
        noise = float(np.median(statistics.median_hu[near] - statistics.p25_hu[near]))
        texture = max(float(np.median(statistics.local_sd_median[near])), SMALLEST_TEXTURE_HU)
    return replace(
        statistics,
        median_hu=_referred(statistics.median_hu, healthy_mode_hu),
        p25_hu=_referred(statistics.p25_hu + np.float32(noise), healthy_mode_hu),
        local_sd_median=(statistics.local_sd_median * (REFERENCE_TEXTURE_HU / texture)).astype(np.float32),
    )


def hu_features(statistics: TokenStatistics) -> np.ndarray:
    """Features of tokens from their referred statistics.

    The floor is the first quartile, robust to vessels; the rise is what the median lies above it: vessels and septa
    raise it.

    Parameters
    ----------
    statistics : TokenStatistics
        From ``refer_statistics``, of N tokens with lung.

    Returns
    -------
    float64 array, shape (N, 4)
        ``FEATURE_NAMES``: HU, HU, log of texture over the cut for fibrosis, arcsine of the root of the LAA-950 share
        (whose variance is that of a proportion anywhere).

    Raises
    ------
    MismatchError
        If a token holds no lung.

    Source
    ------
    FEASIBILITY failure modes 1-3; METHOD 1.6.
    """
    if not (statistics.num_voxels > 0).all():
        empty = int((statistics.num_voxels <= 0).sum())
        raise MismatchError(f"{empty} of {len(statistics)} tokens hold no lung: leave them out")
    floor, median = statistics.p25_hu.astype(np.float64), statistics.median_hu.astype(np.float64)
    texture = np.maximum(statistics.local_sd_median.astype(np.float64), SMALLEST_TEXTURE_HU)
    laa = np.arcsin(np.sqrt(np.clip(statistics.laa950_share.astype(np.float64), 0.0, 1.0)))
    return np.stack([floor, median - floor, np.log(texture / cut.FIBROSIS_LOCAL_SD_HU), laa], axis=1)


def literature_anchors(tissues: Sequence[Tissue] = MIXTURE_TISSUES, *, num: int = DENSITIES_A_TISSUE) -> Anchors:
    """Anchors of each tissue: ``num`` along each band of densities in which it occurs, smooth or textured.

    The anchors of a band lie side by side, each as wide as half its part of the band. Texture, rise and holes have the
    same spread on both sides of their cut: a wider one would move it.

    Source
    ------
    Cut points and their sources: ``lungseg.tissue``; rules: METHOD 1.6. GGO and fibrosis overlap in density and differ
    in texture (METHOD 6). Vessels raise the median over a healthy floor (FEASIBILITY failure mode 2). Emphysema lowers
    the floor, or makes holes over a healthy one (LAA-950). At the edge of a consolidation the floor is any aerated one
    that is no healthy lung, and the median dense (rule 3, failure mode 3).
    """
    healthy = _prototype(Tissue.HEALTHY)
    emphysema_cut = healthy - cut.EMPHYSEMA_BELOW_HEALTHY_MODE_HU
    solid_band = (cut.CONSOLIDATION_MEDIAN_HU, DENSEST_LUNG_HU)
    solid, solid_reach = sum(solid_band) / 2, (solid_band[1] - solid_band[0]) / 2
    doubling = math.log(2.0)
    smooth, textured = (-doubling, doubling), (doubling, doubling)
    # a normal tissue of twice the cut's texture has its quartile this much lower than healthy lung's
    rise = QUARTILE * (2.0 - 1.0 / cut.FIBROSIS_TO_HEALTHY_TEXTURE) * cut.FIBROSIS_LOCAL_SD_HU
    no_rise, some_rise, vessel = (0.0, rise / 2), (rise, rise / 2), (rise, rise)
    # healthy lung reaches the cut at three standard deviations, which is how the cut was chosen (Zach et al. 2012)
    laa_cut = math.asin(math.sqrt(cut.LAA950_EMPHYSEMA_SHARE))
    no_laa, some_laa, any_laa = (0.0, laa_cut / 3), (0.0, laa_cut), (math.pi / 4, math.pi / 4)
    holes = (2 * laa_cut, laa_cut / 3)

    rows: list[tuple[Tissue, tuple[tuple[float, float], ...]]] = []
    for floor, step in _tiles(AIR_HU, emphysema_cut, num):
        rows.append((Tissue.EMPHYSEMA, ((floor, step), no_rise, smooth, any_laa)))
        rows.append((Tissue.EMPHYSEMA, ((floor, step), some_rise, textured, any_laa)))
    for floor, step in _tiles(emphysema_cut, cut.HEALTHY_MEDIAN_HU, num):
        rows.append((Tissue.HEALTHY, ((floor, step), no_rise, smooth, no_laa)))
        rows.append((Tissue.HEALTHY, ((floor, step), vessel, textured, no_laa)))
        rows.append((Tissue.EMPHYSEMA, ((floor, step), no_rise, smooth, holes)))
        rows.append((Tissue.EMPHYSEMA, ((floor, step), vessel, textured, holes)))
    for floor, step in _tiles(cut.HEALTHY_MEDIAN_HU, cut.CONSOLIDATION_MEDIAN_HU, num):
        rows.append((Tissue.GGO, ((floor, step), no_rise, smooth, no_laa)))
        rows.append((Tissue.CONSOLIDATION, ((floor, step), (solid - floor, solid_reach), textured, no_laa)))
    for median, step in _tiles(*cut.HAA_BAND_HU, num):
        rows.append((Tissue.FIBROSIS, ((median - rise, step), some_rise, textured, some_laa)))
    for median, step in _tiles(*solid_band, num):
        rows.append((Tissue.CONSOLIDATION, ((median, step), no_rise, smooth, no_laa)))
        rows.append((Tissue.CONSOLIDATION, ((median - rise, step), some_rise, textured, no_laa)))
    rows = [row for row in rows if row[0] in tissues]
    table = np.array([features for _, features in rows], dtype=np.float64)
    return Anchors(tuple(tissue for tissue, _ in rows), table[:, :, 0], table[:, :, 1])


def _tiles(low: float, high: float, num: int) -> list[tuple[float, float]]:
    """Centres and half widths of ``num`` equal parts of a band."""
    step = (high - low) / num
    return [(low + (i + 0.5) * step, step / 2) for i in range(num)]


def _prototype(tissue: Tissue) -> float:
    value = TISSUES[tissue].prototype_hu
    assert value is not None
    return value


def _referred(hu: np.ndarray, mode: float) -> np.ndarray:
    """Density in a scan whose healthy mode is the prototype: scaled about water above the mode, shifted below it."""
    healthy = _prototype(Tissue.HEALTHY)
    return np.where(hu > mode, hu * (healthy / mode), hu + (healthy - mode)).astype(np.float32)

"""What stands beside the panels of a preview: colours with mL, and the histogram of the lung with its thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg.report.density import Histogram
from lungseg.tissue import (
    HAA_BAND_HU,
    LAA950_HU,
    LAA_HU,
    MIXTURE_TISSUES,
    TISSUES,
    UNCLASSIFIED,
    UNCLASSIFIED_COLOUR,
    Tissue,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEALTHY_ALPHA, DISEASE_ALPHA = 0.20, 0.55
"""Opacity over the CT: healthy lung only tinted, so that disease stands out and vessels stay visible."""
LEGEND_STEP_INCH = 0.3
BACKGROUND, FOREGROUND, FAINT, GUIDE = "#101214", "#f2f2f2", "#9aa0a6", "#ff9d2e"
FONT = "DejaVu Sans"
"""Ships with matplotlib, so that pictures do not depend on the fonts of the machine."""
HISTOGRAM_RANGE_HU = (-1100.0, 100.0)
HISTOGRAM_BIN_HU = 8.0
THRESHOLDS_HU = (LAA950_HU, LAA_HU["laa910"], *HAA_BAND_HU)
"""Lines in the histogram: emphysema, and the band of interstitial disease."""


def draw_legend(axes: Axes, rows: Sequence[LegendRow], *, num_maps: int, lung_ml: float) -> float:
    """Table of colours with mL and % of the lung, and the mL of each further map.

    Parameters
    ----------
    axes : Axes
        In inches, y running down from 0.
    rows : sequence of LegendRow
    num_maps : int
        1, or 2 with a reference.
    lung_ml : float

    Returns
    -------
    float
        Where the table ends, in inches from the top.
    """
    from matplotlib.patches import Rectangle

    stops = (1.98, 2.72, 3.36)  # right edges of the number columns, in inches
    y = 0.12

    def line(cells: Sequence[str], name: str, colour: str, size: float, weight: str = "normal") -> None:
        axes.text(0.42, y, name, va="center", size=size, weight=weight, **text_style(colour))
        for stop, cell in zip(stops, cells, strict=False):
            axes.text(stop, y, cell, ha="right", va="center", size=size, weight=weight, **text_style(colour))

    line(("mL", "% of lung", "ref. mL")[: num_maps + 1], "Tissue", FAINT, 8)
    for row in rows:
        y += LEGEND_STEP_INCH
        swatch = tuple(channel / 255 for channel in row.colour)
        axes.add_patch(Rectangle((0.12, y - 0.09), 0.2, 0.18, facecolor=swatch, edgecolor="none", antialiased=False))
        share = f"{100 * row.ml[0] / lung_ml:.1f}" if lung_ml > 0 else "\u2013"
        line([format_ml(row.ml[0]), share, *map(format_ml, row.ml[1:])], row.title, FOREGROUND, 9.5)
    y += LEGEND_STEP_INCH
    axes.plot([0.12, stops[num_maps]], [y - LEGEND_STEP_INCH / 2] * 2, color=FAINT, linewidth=0.6, marker="")
    line([format_ml(lung_ml)], "Lung", FOREGROUND, 9.5, "bold")
    return y + LEGEND_STEP_INCH / 2


def draw_histogram(axes: Axes, histogram: Histogram) -> None:
    """HU of the lung in percent of its voxels per bin, with the thresholds of the tables as lines.

    Parameters
    ----------
    axes : Axes
        Its own, in the picture's legend column.
    histogram : Histogram
        Of the whole lung.
    """
    edges, percent = histogram_bins(histogram)
    axes.set_facecolor(BACKGROUND)
    axes.stairs(percent, edges, fill=True, color=FAINT, alpha=0.75)
    top = max(float(percent.max(initial=0.0)), 1e-6) * 1.18
    for number, threshold in enumerate(THRESHOLDS_HU):
        axes.axvline(threshold, color=GUIDE, linewidth=0.9, linestyle="-", marker="")
        text = f"{threshold:g}".replace("-", "\u2212")
        # the first two are too close for both numbers on one side
        side, place = ("right", threshold - 8) if number == 0 else ("left", threshold + 8)
        axes.text(place, 0.99 * top, text, ha=side, va="top", size=7, **text_style(GUIDE))
    axes.set_xlim(*HISTOGRAM_RANGE_HU)
    axes.set_ylim(0, top)
    axes.set_yticks([])
    ticks = [-1000, -800, -600, -400, -200, 0]
    axes.set_xticks(ticks, [f"{tick}".replace("-", "\u2212") for tick in ticks])
    axes.tick_params(colors=FAINT, labelsize=7, length=2)
    for label in axes.get_xticklabels():
        label.set_fontfamily(FONT)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(FAINT)
    axes.set_title("HU of the lung, share of its voxels", loc="left", size=8, **text_style(FAINT))


def histogram_bins(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Bin edges in HU, float64 (K + 1,), and percent of the voxels in each; voxels outside count in the outer bins."""
    low, high = HISTOGRAM_RANGE_HU
    edges = np.append(np.arange(low, high, HISTOGRAM_BIN_HU), high)
    index = np.clip(np.searchsorted(edges, histogram.values, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(index, weights=histogram.counts, minlength=len(edges) - 1)
    return edges, 100.0 * counts / max(histogram.size, 1)


def format_ml(ml: float) -> str:
    """Millilitres for people: whole from 100 on, else one decimal."""
    return f"{ml:,.0f}" if ml >= 100 else f"{ml:.1f}"


@dataclass(frozen=True)
class LegendRow:
    """A line of the legend: name, sRGB colour, mL per label map."""

    title: str
    colour: tuple[int, int, int]
    ml: tuple[float, ...]


def legend_rows(maps: Sequence[np.ndarray], voxel_ml: float) -> Iterator[LegendRow]:
    """Title, colour and mL per map: the five classes always, the others where a map holds them."""
    volumes = [label_ml(labels, voxel_ml) for labels in maps]
    for tissue in Tissue:
        ml = tuple(float(volume[tissue]) for volume in volumes)
        if tissue in MIXTURE_TISSUES or any(ml):
            yield LegendRow(TISSUES[tissue].title, TISSUES[tissue].colour, ml)
    ml = tuple(float(volume[UNCLASSIFIED]) for volume in volumes)
    if any(ml):
        yield LegendRow("Unclassified", UNCLASSIFIED_COLOUR, ml)


def label_ml(labels: np.ndarray, voxel_ml: float) -> np.ndarray:
    """mL per label id, float64 (256,); slice by slice, for bincount widens its input to 8 bytes a voxel."""
    counts = np.zeros(256, dtype=np.int64)
    for picture in labels:
        counts += np.bincount(picture.ravel(), minlength=256)
    return counts * voxel_ml


def colour_table() -> np.ndarray:
    """RGBA per label id, uint8 (256, 4); transparent outside the lung and for unknown ids."""
    table = np.zeros((256, 4), dtype=np.uint8)
    for tissue, info in TISSUES.items():
        alpha = HEALTHY_ALPHA if tissue is Tissue.HEALTHY else DISEASE_ALPHA
        table[tissue] = (*info.colour, round(255 * alpha))
    table[UNCLASSIFIED] = (*UNCLASSIFIED_COLOUR, round(255 * DISEASE_ALPHA))
    return table


def text_style(colour: str) -> dict[str, Any]:
    """Text properties that keep the picture independent of the user's matplotlib settings."""
    return {"color": colour, "family": FONT, "parse_math": False}


def rimmed_text(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Text over a picture at axes fractions, with a dark rim so that it stays readable on bright tissue."""
    from matplotlib import patheffects

    rim = [patheffects.withStroke(linewidth=2.0, foreground=BACKGROUND)]
    axes.text(x, y, text, transform=axes.transAxes, path_effects=rim, **text_style(FOREGROUND), **options)

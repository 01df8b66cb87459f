"""Patches drawn from a model beside real ones: the same cut, window and scale, and their Hounsfield units together.

As in :mod:`lungseg.report.overlays`: matplotlib's object-oriented interface on Agg, and the same bytes for the same
content.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lungseg.errors import InputError
from lungseg.report.legend import text_style
from lungseg.report.overlays import FOOTER, WINDOW_LEVEL_HU, WINDOW_WIDTH_HU, scale_bar_mm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PATCHES = 16
"""Of each kind; more would be too small to judge."""
CELL_INCH, GAP_INCH, MARGIN_INCH, TITLE_INCH, HEADING_INCH, PLOT_INCH, DPI = 1.15, 0.06, 0.25, 0.45, 0.3, 1.9, 110
INK, FAINT, DRAWN, REAL = "#17191c", "#5b6168", "#c2410c", "#0b5c8a"
BIN_HU, SHOWN_HU = 10.0, (-1100.0, 200.0)
"""Bins and range of the curves of HU; voxels beyond count in the outer bins."""


def sample_grid_png(drawn_hu: np.ndarray, real_hu: np.ndarray | None, *, spacing_mm: float) -> bytes:
    """Middle axial slices of drawn patches on the left, of real ones on the right, and the HU of both below.

    Parameters
    ----------
    drawn_hu : int16 array, shape (N, D, H, W)
        HU; the first ``MAX_PATCHES`` are shown.
    real_hu : int16 array, shape (M, D, H, W), optional
        Of the same size and spacing.
    spacing_mm : float
        Edge of a voxel, for the scale bar.

    Returns
    -------
    bytes
        PNG without text chunks.

    Raises
    ------
    InputError
        If there is no patch, or the two kinds differ in size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [("Drawn from the model", DRAWN, drawn_hu)] + ([] if real_hu is None else [("Real", REAL, real_hu)])
    if any(patches.ndim != 4 or not len(patches) for _, _, patches in kinds):
        raise InputError("patches to show must be arrays (N, D, H, W) with at least one patch")
    if len({patches.shape[1:] for _, _, patches in kinds}) > 1:
        raise InputError(f"drawn patches {drawn_hu.shape[1:]} and real ones {kinds[-1][2].shape[1:]} differ in size")
    side = math.ceil(math.sqrt(max(min(len(patches), MAX_PATCHES) for _, _, patches in kinds)))
    block = side * CELL_INCH + (side - 1) * GAP_INCH
    width = max(len(kinds) * block + (len(kinds) + 1) * MARGIN_INCH, 6.0)
    height = TITLE_INCH + HEADING_INCH + block + PLOT_INCH + 0.95
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top = height - TITLE_INCH - HEADING_INCH
    for number, (title, colour, patches) in enumerate(kinds):
        edge = MARGIN_INCH + number * (block + MARGIN_INCH)
        shown = patches[:MAX_PATCHES]
        count = f"{len(shown)} of {len(patches)}" if len(shown) < len(patches) else f"{len(shown)}"
        figure.text(
            edge / width, (top + 0.08) / height, f"{title} ({count})", size=10.5, weight="bold", **text_style(colour)
        )
        _slices(figure, shown, edge, top, side, spacing_mm)
    window = f"middle axial slices, level {WINDOW_LEVEL_HU:g} HU, width {WINDOW_WIDTH_HU:g} HU".replace("-", "\u2212")
    left = MARGIN_INCH / width
    figure.text(left, 1 - 0.3 / height, "Patches of the model", size=13, weight="bold", **text_style(INK))
    figure.text(left, 0.08 / height, f"{FOOTER} Shown: {window}.", size=7.5, **text_style(FAINT))
    plot = figure.add_axes((left, 0.6 / height, 1 - 2 * left, PLOT_INCH / height))
    _curves(plot, kinds)
    out = io.BytesIO()
    canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _slices(figure: Figure, patches: np.ndarray, left: float, top: float, side: int, spacing_mm: float) -> None:
    """A square of slices; the first carries the scale bar."""
    width, height = (float(inch) for inch in figure.get_size_inches())
    low, high = WINDOW_LEVEL_HU - WINDOW_WIDTH_HU / 2, WINDOW_LEVEL_HU + WINDOW_WIDTH_HU / 2
    for index, patch in enumerate(patches):
        row, column = divmod(index, side)
        x = left + column * (CELL_INCH + GAP_INCH)
        y = top - row * (CELL_INCH + GAP_INCH) - CELL_INCH
        axes = figure.add_axes((x / width, y / height, CELL_INCH / width, CELL_INCH / height))
        axes.set_axis_off()
        axes.imshow(patch[len(patch) // 2], cmap="gray", vmin=low, vmax=high, interpolation="nearest", origin="upper")
        if index == 0:
            _scale_bar(axes, patch.shape[1:], spacing_mm)


def _scale_bar(axes: Axes, shape: Sequence[int], spacing_mm: float) -> None:
    rows, columns = shape
    bar = scale_bar_mm(columns * spacing_mm)
    ends = [0.05 * columns - 0.5, 0.05 * columns - 0.5 + bar / spacing_mm]
    for thickness, colour in ((4.0, "black"), (1.8, "white")):
        axes.plot(ends, [0.93 * rows - 0.5] * 2, color=colour, linewidth=thickness, linestyle="-", marker="")
    from matplotlib import patheffects

    rim = [patheffects.withStroke(linewidth=2.0, foreground="black")]
    axes.text(ends[0], 0.89 * rows - 0.5, f"{bar:g} mm", size=7, path_effects=rim, **text_style("white"))


def _curves(axes: Axes, kinds: Sequence[tuple[str, str, np.ndarray]]) -> None:
    """Share of voxels per bin of HU, of all patches of each kind, with mean and standard deviation."""
    low, high = SHOWN_HU
    edges = np.arange(low, high + BIN_HU / 2, BIN_HU)
    top = 0.0
    for number, (title, colour, patches) in enumerate(kinds):
        values = np.clip(patches.ravel(), low, high - BIN_HU / 2)
        percent = 100.0 * np.histogram(values, edges)[0] / values.size
        top = max(top, float(percent.max()))
        axes.stairs(percent, edges, color=colour, linewidth=1.4, linestyle="-")
        text = f"{title.split()[0]}: mean {patches.mean():.0f} HU, SD {patches.std():.0f} HU".replace("-", "\u2212")
        axes.text(
            0.985, 0.93 - 0.13 * number, text, transform=axes.transAxes, ha="right", va="top", size=8.5,
            **text_style(colour),
        )  # fmt: skip
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.12 * top)
    axes.set_yticks([])
    ticks = list(range(-1000, int(high) + 1, 200))
    axes.set_xticks(ticks, [f"{tick}".replace("-", "\u2212") for tick in ticks])
    axes.tick_params(colors=FAINT, labelsize=8, length=2)
    for label in axes.get_xticklabels():
        label.set(fontfamily=text_style(FAINT)["family"])
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set(color=FAINT, linewidth=0.8)
    axes.set_title("Hounsfield units of all patches, share of voxels", loc="left", size=9, **text_style(FAINT))

"""One preview picture of a scan: three planes through the most diseased place, CT beside its tissue map.

Drawn with matplotlib's object-oriented interface on Agg: no pyplot, no global state, no display, and no time stamp or
software name in the file, so that the same arrays give the same bytes. Every panel has the same scale in mm.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.surface import bounding_box, require_spacing
from lungseg.report.density import Histogram
from lungseg.report.legend import (
    BACKGROUND,
    FAINT,
    FONT,
    FOREGROUND,
    GUIDE,
    colour_table,
    draw_histogram,
    draw_legend,
    format_ml,
    legend_rows,
    rimmed_text,
    text_style,
)
from lungseg.tissue import OUTSIDE, VIEWS

__all__ = [
    "BACKGROUND",
    "FONT",
    "FOOTER",
    "FOREGROUND",
    "WINDOW_LEVEL_HU",
    "WINDOW_WIDTH_HU",
    "disease_focus",
    "format_ml",
    "preview_figure_png",
    "scale_bar_mm",
]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW_LEVEL_HU, WINDOW_WIDTH_HU = -600.0, 1500.0
"""Usual lung window."""
FOCUS_SIGMA_MM = 15.0
"""Scale at which the most diseased place is looked for."""
FOCUS_GRID_MM = 4.0
"""Grid of that search."""
MARGIN_MM = 8.0
"""Shown around the lungs."""
SCALE_BARS_MM = (50, 20, 10, 5, 2, 1)
"""Length of the scale bar: 50 mm, or the longest that fits a small volume."""
COLUMN_INCH, MAX_BODY_INCH, MIN_ROW_INCH, GAP_INCH = 4.0, 11.0, 0.5, 0.08
TITLE_INCH, FOOTER_INCH, DPI = 0.75, 0.4, 110
HISTOGRAM_INCH = (2.3, 1.5)
"""Width and height of the histogram."""
UNCERTAIN_MAP = "magma"
"""Colours of 1 - confidence: dark where the map is sure."""
FOOTER = "Research use only. Not for diagnosis or treatment."


@dataclass(frozen=True)
class _Plane:
    """One of the three planes: the axis it cuts, the axes of its rows and columns, and its edge letters."""

    name: str
    axis: int
    row: int
    column: int
    left: str
    right: str


# Rows run to posterior in the axial plane and, flipped for display, to inferior in the other two; x runs to the
# patient's left, so plain display has the patient's right on the viewer's left (radiological convention).
PLANES = (
    _Plane("Axial", 0, 1, 2, "R", "L"),
    _Plane("Coronal", 1, 0, 2, "R", "L"),
    _Plane("Sagittal", 2, 0, 1, "A", "P"),
)


@dataclass(frozen=True)
class _Layout:
    """Sizes of the picture, in inches; one scale for all panels."""

    inch_per_mm: float
    column: float
    rows: tuple[float, ...]
    legend: float
    num_columns: int

    @property
    def width(self) -> float:
        return self.num_columns * (self.column + GAP_INCH) + GAP_INCH + self.legend

    @property
    def height(self) -> float:
        return TITLE_INCH + sum(self.rows) + (len(self.rows) + 1) * GAP_INCH + FOOTER_INCH


def preview_figure_png(
    volume_hu: np.ndarray,
    labels: np.ndarray,
    lungs: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    title: str,
    reference: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
    histogram: Histogram | None = None,
) -> bytes:
    """PNG of three planes through the most diseased place: CT, tissue map and, if given, the reference.

    Parameters
    ----------
    volume_hu : int16 or float array, shape (Z, Y, X)
        CT in Hounsfield units, not windowed; index 0 of z inferior, y to posterior, x to the patient's left.
    labels : uint8 array of that shape
        Label map (METHOD 0.1). The legend gives the mL of every label of it.
    lungs : uint8 or bool array of that shape
        Lung field, non-zero = lung; outlined, and the view is cropped to it.
    spacing_mm : sequence of float
        (z, y, x) in mm.
    title : str
        Printed as it is (no markup). The caller sees to it that it names no patient.
    reference : uint8 array of that shape, optional
        Expert label map; adds a column and its mL.
    confidence : uint8 array of that shape, optional
        Posterior of the label of each voxel, 0 to 255; adds a column with what is missing to 1.
    histogram : Histogram, optional
        HU of the whole lung on its own grid; drawn below the legend with the thresholds of the tables.

    Returns
    -------
    bytes
        PNG without text chunks; equal input gives equal bytes with the same matplotlib. Radiological orientation:
        the patient's right on the viewer's left, superior and anterior up, anterior left in the sagittal plane.

    Raises
    ------
    InputError
        If the shapes differ or are not 3-D, or labels are not uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spacing = require_spacing(spacing_mm, 3)
    maps = [labels] if reference is None else [labels, reference]
    _check(volume_hu, lungs, maps, confidence)
    box = _view_box(lungs, maps, spacing)
    point = disease_focus(labels, lungs, spacing_mm=spacing)
    layout = _layout(box, spacing, num_maps=len(maps), extra=confidence is not None)
    figure = Figure(figsize=(layout.width, layout.height), dpi=DPI, facecolor=BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    cuts = [_Cut(plane, box, point, spacing) for plane in PLANES]
    _draw_panels(figure, layout, cuts, volume_hu, lungs, maps, confidence)
    _draw_texts(figure, layout, title, ["Tissue map", "Reference"][: len(maps)], confidence is not None)
    _draw_side(figure, layout, maps, math.prod(spacing) / 1000.0, int(np.count_nonzero(lungs)), histogram)
    out = io.BytesIO()
    # print_png and not savefig: the latter obeys the user's matplotlibrc (dpi, bbox, transparency).
    canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def disease_focus(labels: np.ndarray, lungs: np.ndarray, *, spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Voxel where abnormal tissue is densest, for the planes of a preview.

    Parameters
    ----------
    labels : uint8 array, shape (Z, Y, X)
        Label map; the view `abnormal` says which classes count.
    lungs : uint8 or bool array of that shape
    spacing_mm : sequence of float
        (z, y, x) in mm.

    Returns
    -------
    (z, y, x)
        A voxel of abnormal tissue: the one with most of it around (Gaussian, 15 mm). Without disease the planes that
        cut most lung; without lung the middle of the volume.
    """
    from scipy import ndimage

    spacing = require_spacing(spacing_mm, 3)
    abnormal_ids = [int(tissue) for tissue in VIEWS["abnormal"]["abnormal"]]
    steps = [max(1, round(FOCUS_GRID_MM / step)) for step in spacing]
    coarse = np.isin(labels[:: steps[0], :: steps[1], :: steps[2]], abnormal_ids)
    if not coarse.any():  # a lesion smaller than the coarse grid must still be found
        steps = [1, 1, 1]
        coarse = np.isin(labels, abnormal_ids)
    if coarse.any():
        sigma = [FOCUS_SIGMA_MM / (step * size) for step, size in zip(steps, spacing, strict=True)]
        amount = ndimage.gaussian_filter(coarse.astype(np.float32), sigma, mode="constant")
        best = np.unravel_index(int(np.argmax(np.where(coarse, amount, -1.0))), coarse.shape)
        return int(best[0]) * steps[0], int(best[1]) * steps[1], int(best[2]) * steps[2]
    is_lung = lungs != OUTSIDE
    if is_lung.any():
        areas = [np.count_nonzero(is_lung, axis=others) for others in ((1, 2), (0, 2), (0, 1))]
        return int(np.argmax(areas[0])), int(np.argmax(areas[1])), int(np.argmax(areas[2]))
    return labels.shape[0] // 2, labels.shape[1] // 2, labels.shape[2] // 2


class _Cut:
    """One plane through the volume, cropped to the view and turned for display (superior up)."""

    def __init__(
        self, plane: _Plane, box: tuple[slice, ...], point: tuple[int, int, int], spacing: tuple[float, ...]
    ) -> None:
        self.plane, self.index = plane, point[plane.axis]
        self._box = tuple(slice(self.index, self.index + 1) if a == plane.axis else box[a] for a in range(3))
        self.flipped = plane.axis != 0
        sizes = [box[a].stop - box[a].start for a in range(3)]
        self.height_mm = sizes[plane.row] * spacing[plane.row]
        self.width_mm = sizes[plane.column] * spacing[plane.column]
        self.pixel_mm = (spacing[plane.row], spacing[plane.column])
        across = (point[plane.row] - box[plane.row].start + 0.5) * spacing[plane.row]
        self.guide_row_mm = self.height_mm - across if self.flipped else across
        self.guide_column_mm = (point[plane.column] - box[plane.column].start + 0.5) * spacing[plane.column]

    def of(self, array: np.ndarray) -> np.ndarray:
        """The plane of an array, as a picture: row 0 on top."""
        picture = array[self._box].squeeze(axis=self.plane.axis)
        return picture[::-1] if self.flipped else picture


def _check(volume_hu: np.ndarray, lungs: np.ndarray, maps: Sequence[np.ndarray], confidence: np.ndarray | None) -> None:
    """Raise ``InputError`` on arrays that cannot be shown together."""
    shapes = {volume_hu.shape, lungs.shape, *(labels.shape for labels in maps)}
    shapes |= {confidence.shape} if confidence is not None else set()
    if len(shapes) != 1 or volume_hu.ndim != 3:
        raise InputError(f"image, labels, lungs and reference must have one 3-D shape, not {sorted(shapes)}")
    if any(labels.dtype != np.uint8 for labels in maps):
        raise InputError(f"label maps must be uint8, not {[str(labels.dtype) for labels in maps]}")


def _view_box(lungs: np.ndarray, maps: Sequence[np.ndarray], spacing: tuple[float, ...]) -> tuple[slice, ...]:
    """Box around lungs and labels with a margin; the whole volume if both are empty."""
    shown = lungs != OUTSIDE
    for labels in maps:
        shown |= labels != OUTSIDE
    box = bounding_box(shown) or tuple(slice(0, size) for size in lungs.shape)
    pads = [math.ceil(MARGIN_MM / step) for step in spacing]
    return tuple(
        slice(max(0, side.start - pad), min(size, side.stop + pad))
        for side, pad, size in zip(box, pads, lungs.shape, strict=True)
    )


def _layout(box: tuple[slice, ...], spacing: tuple[float, ...], *, num_maps: int, extra: bool) -> _Layout:
    """Sizes in inches: the widest plane fills its column unless the picture would become too tall."""
    extent = [(side.stop - side.start) * step for side, step in zip(box, spacing, strict=True)]
    width_mm = max(extent[plane.column] for plane in PLANES)
    height_mm = sum(extent[plane.row] for plane in PLANES)
    scale = min(COLUMN_INCH / width_mm, MAX_BODY_INCH / height_mm)
    rows = tuple(max(MIN_ROW_INCH, extent[plane.row] * scale) for plane in PLANES)
    column = max(width_mm * scale, 2.0)  # a long, narrow volume still needs room for the headings
    return _Layout(scale, column, rows, legend=2.9 if num_maps == 1 else 3.5, num_columns=1 + num_maps + extra)


def _panel(figure: Figure, layout: _Layout, row: int, column: int, cut: _Cut) -> Axes:
    """Axes in mm of one panel, centred in its cell; y runs down."""
    width, height = cut.width_mm * layout.inch_per_mm, cut.height_mm * layout.inch_per_mm
    left = GAP_INCH + column * (layout.column + GAP_INCH) + (layout.column - width) / 2
    below = sum(layout.rows[row + 1 :]) + (len(layout.rows) - row) * GAP_INCH + FOOTER_INCH
    bottom = below + (layout.rows[row] - height) / 2
    axes = figure.add_axes((left / layout.width, bottom / layout.height, width / layout.width, height / layout.height))
    axes.set_axis_off()
    axes.set_xlim(0, cut.width_mm)
    axes.set_ylim(cut.height_mm, 0)
    return axes


def _draw_panels(
    figure: Figure,
    layout: _Layout,
    cuts: Sequence[_Cut],
    volume_hu: np.ndarray,
    lungs: np.ndarray,
    maps: Sequence[np.ndarray],
    confidence: np.ndarray | None,
) -> None:
    """All panels: a row per plane; the CT alone in the first column, something over it in each of the others."""
    for row, cut in enumerate(cuts):
        grey, lung = cut.of(volume_hu), cut.of(lungs) != OUTSIDE
        for column in range(layout.num_columns):
            axes = _panel(figure, layout, row, column, cut)
            _draw_ct(axes, grey, cut)
            if column == 0:
                _draw_guides(axes, cut, volume_hu.shape[cut.plane.axis])
            elif column <= len(maps):
                _draw_labels(axes, cut.of(maps[column - 1]), lung, cut)
            elif confidence is not None:
                _draw_uncertainty(axes, cut.of(confidence), lung, cut)
            _draw_letters(axes, cut)


def _draw_ct(axes: Axes, grey: np.ndarray, cut: _Cut) -> None:
    """CT in the lung window."""
    low, high = WINDOW_LEVEL_HU - WINDOW_WIDTH_HU / 2, WINDOW_LEVEL_HU + WINDOW_WIDTH_HU / 2
    axes.imshow(
        grey, cmap="gray", vmin=low, vmax=high, interpolation="bilinear", aspect="auto", origin="upper",
        extent=(0, cut.width_mm, cut.height_mm, 0),
    )  # fmt: skip


def _draw_labels(axes: Axes, labels: np.ndarray, lung: np.ndarray, cut: _Cut) -> None:
    """Tissue colours over the CT, and the outline of the lung field."""
    axes.imshow(
        colour_table()[labels], interpolation="nearest", aspect="auto", origin="upper",
        extent=(0, cut.width_mm, cut.height_mm, 0),
    )  # fmt: skip
    if min(lung.shape) > 1 and lung.any():
        # One ring of background, so that a lung cut by the view is closed; coordinates are voxel centres.
        y = (np.arange(-1, lung.shape[0] + 1) + 0.5) * cut.pixel_mm[0]
        x = (np.arange(-1, lung.shape[1] + 1) + 0.5) * cut.pixel_mm[1]
        axes.contour(x, y, np.pad(lung, 1).astype(float), levels=[0.5], colors=[FOREGROUND], linewidths=0.6, alpha=0.6)


def _draw_uncertainty(axes: Axes, confidence: np.ndarray, lung: np.ndarray, cut: _Cut) -> None:
    """1 - confidence of the lung over the CT."""
    shown = np.ma.masked_array(1.0 - confidence / 255.0, mask=~lung)
    axes.imshow(
        shown, cmap=UNCERTAIN_MAP, vmin=0, vmax=1, alpha=0.85, interpolation="nearest", aspect="auto", origin="upper",
        extent=(0, cut.width_mm, cut.height_mm, 0),
    )  # fmt: skip


def _draw_guides(axes: Axes, cut: _Cut, num_slices: int) -> None:
    """Where the other two planes cut this one, the name of the plane, and the scale bar."""
    for draw, position in ((axes.axhline, cut.guide_row_mm), (axes.axvline, cut.guide_column_mm)):
        draw(position, color=GUIDE, linewidth=0.7, alpha=0.7, linestyle=(0, (5, 4)), marker="")
    rimmed_text(axes, 0.02, 0.98, f"{cut.plane.name}  {cut.index + 1}/{num_slices}", ha="left", va="top", size=9)
    bar = scale_bar_mm(cut.width_mm)
    right, y = 0.97 * cut.width_mm, 0.95
    for width, colour in ((4.4, BACKGROUND), (2.2, FOREGROUND)):  # dark rim: the bar often lies over soft tissue
        ends = [right - bar, right]
        line: dict[str, Any] = {"color": colour, "linewidth": width, "linestyle": "-", "marker": ""}
        axes.plot(ends, [cut.height_mm * y] * 2, solid_capstyle="butt", **line)
    rimmed_text(
        axes, (right - bar / 2) / cut.width_mm, 1.0 - y + 0.015, f"{bar:g} mm", ha="center", va="bottom", size=8
    )


def scale_bar_mm(width_mm: float) -> float:
    """Length of the scale bar in mm: 50, or the longest of 20, 10, 5, 2, 1 that takes at most 60 % of the width."""
    return float(next((bar for bar in SCALE_BARS_MM if bar <= 0.6 * width_mm), SCALE_BARS_MM[-1]))


def _draw_letters(axes: Axes, cut: _Cut) -> None:
    """Side letters at the left and right edge."""
    rimmed_text(axes, 0.015, 0.5, cut.plane.left, ha="left", va="center", size=11, weight="bold")
    rimmed_text(axes, 0.985, 0.5, cut.plane.right, ha="right", va="center", size=11, weight="bold")


def _draw_texts(figure: Figure, layout: _Layout, title: str, maps: Sequence[str], has_confidence: bool) -> None:
    """Title, headings of the columns and the footer."""
    headings = ["CT, lung window", *maps, *["Uncertainty: dark 0, bright 1"] * has_confidence]
    left = GAP_INCH / layout.width
    figure.text(left, 1 - 0.1 / layout.height, title, va="top", size=13, weight="bold", **text_style(FOREGROUND))
    for column, heading in enumerate(headings):
        centre = GAP_INCH + column * (layout.column + GAP_INCH) + layout.column / 2
        y = 1 - (TITLE_INCH - 0.02) / layout.height
        figure.text(centre / layout.width, y, heading, ha="center", va="bottom", size=10, **text_style(FAINT))
    window = f"Window: level {WINDOW_LEVEL_HU:g} HU, width {WINDOW_WIDTH_HU:g} HU".replace("-", "\u2212")
    figure.text(left, 0.13 / layout.height, FOOTER, va="bottom", size=9, weight="bold", **text_style(FOREGROUND))
    figure.text(1 - left, 0.13 / layout.height, window, ha="right", va="bottom", size=8, **text_style(FAINT))


def _draw_side(
    figure: Figure,
    layout: _Layout,
    maps: Sequence[np.ndarray],
    voxel_ml: float,
    num_lung: int,
    histogram: Histogram | None,
) -> None:
    """Right of the panels: the table of colours, and below it the histogram where there is room."""
    height = layout.height - TITLE_INCH
    axes = figure.add_axes((1 - layout.legend / layout.width, 0, layout.legend / layout.width, height / layout.height))
    axes.set_axis_off()
    axes.set_xlim(0, layout.legend)
    axes.set_ylim(height, 0)
    end = draw_legend(axes, list(legend_rows(maps, voxel_ml)), num_maps=len(maps), lung_ml=num_lung * voxel_ml)
    wide, tall = HISTOGRAM_INCH
    bottom = height - end - 0.35 - tall
    if histogram is not None and histogram.size and bottom > FOOTER_INCH + 0.2:
        left = layout.width - layout.legend + 0.12
        draw_histogram(
            figure.add_axes((left / layout.width, bottom / layout.height, wide / layout.width, tall / layout.height)),
            histogram,
        )

"""Box plots of an evaluation: every class-case pair as a point over the box of its class and method.

Drawn with matplotlib's object-oriented interface on Agg: no pyplot, no global state, no display, and no time stamp or
software name in the file, so that the same scores give the same bytes. Every line is drawn here rather than by
matplotlib's ``boxplot`` and axis, whose look follows the user's settings.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg.evaluation.scores import ClassScore
from lungseg.report.overlays import FONT, FOOTER
from lungseg.tissue import TISSUES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[float, float, float]

BACKGROUND, FOREGROUND, FAINT, GRID = "#ffffff", "#17191c", "#5b6168", "#dfe2e5"
PANELS = {"dice": "DSC", "hd95_mm": "HD95 (mm)"}
"""Figures of the picture and their names, from top to bottom."""
BOX_WIDTH, GROUP_GAP = 0.72, 0.6
"""Width of a box and gap between classes, in units of one box's place."""
INCH_PER_BOX, MIN_WIDTH_INCH, LEFT_INCH, RIGHT_INCH = 0.62, 5.5, 0.75, 0.2
PANEL_INCH, COUNT_INCH, CLASS_INCH, TOP_INCH, LEGEND_LINE_INCH, FOOTER_INCH, DPI = 2.7, 0.34, 0.3, 0.42, 0.24, 0.5, 110
WHISKER = 1.5
"""Whiskers reach the last value within 1.5 times the interquartile range (Tukey 1977)."""
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
"""Spreads points sideways evenly and without chance: the i-th lies at the fractional part of i times it."""
SPREAD = 0.55
"""Share of a box's width over which points spread."""
CROWD = 60
"""Points of one box above which they are drawn smaller and fainter, so that the box stays visible."""
MAX_CLASS_CHARACTERS = 14


@dataclass(frozen=True)
class _Box:
    """Values of one class of one method in one figure."""

    values: np.ndarray
    num_missed: int
    colour: Colour
    place: float


def score_boxplot_png(scores: Mapping[str, Sequence[ClassScore]], *, hd95_name: str = "") -> bytes:
    """Box plots of Dice and HD95 per class and method, with a point for every class-case pair.

    Parameters
    ----------
    scores : mapping of method name to its scores
        Of whole volumes or of slices, in the order of the legend. One method: boxes in the colours of the tissues;
        several: one colour a method.
    hd95_name : str
        Which HD95 it is, for the axis; the tables carry the full definition.

    Returns
    -------
    bytes
        PNG without text chunks. Under each box stands n, the pairs it is drawn from. A missed pair has Dice 0 and no
        HD95; there the number missed stands under n. Equal input gives equal bytes with the same matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tissues = list(dict.fromkeys(s.tissue for rows in scores.values() for s in rows))
    num_boxes = max(1, len(tissues) * len(scores))
    span = num_boxes + GROUP_GAP * max(0, len(tissues) - 1)
    width = max(MIN_WIDTH_INCH, LEFT_INCH + RIGHT_INCH + span * INCH_PER_BOX)
    legend = LEGEND_LINE_INCH * len(scores) if len(scores) > 1 else 0.0
    block = TOP_INCH + PANEL_INCH + COUNT_INCH + CLASS_INCH
    height = legend + len(PANELS) * block + FOOTER_INCH
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    colours = _method_colours(list(scores))
    for index, (name, title) in enumerate(PANELS.items()):
        bottom = FOOTER_INCH + (len(PANELS) - 1 - index) * block + COUNT_INCH + CLASS_INCH
        axes = figure.add_axes(
            (LEFT_INCH / width, bottom / height, 1 - (LEFT_INCH + RIGHT_INCH) / width, PANEL_INCH / height)
        )
        boxes = _boxes(scores, tissues, name, colours)
        if name == "hd95_mm" and hd95_name:
            title = f"{title}, {hd95_name}"
        _draw_panel(axes, boxes, tissues, len(scores), title, is_share=name == "dice")
    if legend:
        _draw_legend(figure.add_axes((0, 1 - legend / height, 1, legend / height)), colours, width, legend)
    in_slices = any(row.slice_index is not None for rows in scores.values() for row in rows)
    pairs = "class-slice pairs" if in_slices else "class-case pairs"
    _draw_footer(figure.add_axes((0, 0, 1, FOOTER_INCH / height)), width, pairs)
    out = io.BytesIO()
    # print_png and not savefig: the latter obeys the user's matplotlibrc (dpi, bbox, transparency).
    canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _method_colours(methods: Sequence[str]) -> dict[str, Colour]:
    """One colour of the Okabe-Ito palette a method; yellow last, for it is faint on white."""
    palette = sorted((info.colour for info in TISSUES.values()), key=lambda colour: sum(colour) > 500)
    return {method: _rgb(palette[index % len(palette)]) for index, method in enumerate(methods)}


def _tissue_colour(tissue: str) -> Colour:
    """Colour of a tissue; grey for a class that is none, as `abnormal`."""
    return _rgb(next((info.colour for info in TISSUES.values() if info.name == tissue), (120, 120, 120)))


def _rgb(colour: tuple[int, int, int]) -> Colour:
    """sRGB 0 to 255 as 0 to 1."""
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


def _boxes(
    scores: Mapping[str, Sequence[ClassScore]], tissues: Sequence[str], figure: str, colours: Mapping[str, Colour]
) -> list[_Box]:
    """Boxes of one panel from left to right: classes, and in each the methods."""
    boxes = []
    for group, tissue in enumerate(tissues):
        for index, (method, rows) in enumerate(scores.items()):
            pairs = sorted(
                (row for row in rows if row.tissue == tissue and row.is_averaged),
                key=lambda row: (row.case_id, -1 if row.slice_index is None else row.slice_index),
            )
            values = np.array([getattr(pair, figure) for pair in pairs], dtype=np.float64)
            values = values[np.isfinite(values)]
            colour = colours[method] if len(scores) > 1 else _tissue_colour(tissue)
            place = group * (len(scores) + GROUP_GAP) + index + 0.5
            boxes.append(_Box(values, sum(pair.is_missed for pair in pairs), colour, place))
    return boxes


def _draw_panel(
    axes: Axes, boxes: Sequence[_Box], tissues: Sequence[str], num_methods: int, title: str, *, is_share: bool
) -> None:
    """One figure: grid, boxes, points, n and names of the classes."""
    finite = [float(box.values.max()) for box in boxes if box.values.size]
    top = 1.0 if is_share else _ceiling(max(finite, default=1.0))
    right = len(tissues) * num_methods + GROUP_GAP * max(0, len(tissues) - 1) if tissues else 1.0
    axes.set_axis_off()
    axes.set_xlim(-GROUP_GAP / 2, right + GROUP_GAP / 2)
    axes.set_ylim(0.0, top * 1.03)
    for tick in np.linspace(0.0, top, 6):
        ends, colour = [-GROUP_GAP / 2, right + GROUP_GAP / 2], GRID if tick else FAINT
        axes.plot(ends, [tick] * 2, color=colour, linewidth=0.8, linestyle="-", marker="", zorder=0, clip_on=False)
        _text(axes, -GROUP_GAP / 2, tick, f"{tick:.3g} ", ha="right", va="center", size=8, color=FAINT)
    inch = top * 1.03 / PANEL_INCH
    _text(axes, -GROUP_GAP / 2, top * 1.03 + 0.08 * inch, title, ha="left", va="bottom", size=10, weight="bold")
    for box in boxes:
        _draw_box(axes, box)
        _text(axes, box.place, -0.05 * inch, f"n={box.values.size}", ha="center", va="top", size=7.5, color=FAINT)
        if box.num_missed:
            text = f"{box.num_missed} missed"
            _text(axes, box.place, -0.19 * inch, text, ha="center", va="top", size=7.5, color=FOREGROUND)
    for group, tissue in enumerate(tissues):
        middle = group * (num_methods + GROUP_GAP) + num_methods / 2
        name = next((info.title for info in TISSUES.values() if info.name == tissue), tissue)
        if len(name) > MAX_CLASS_CHARACTERS:
            name = name[: MAX_CLASS_CHARACTERS - 1] + "\u2026"
        _text(axes, middle, -COUNT_INCH * inch, name, ha="center", va="top", size=9)


def _ceiling(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 ... that is not less; at least 1."""
    if value <= 1.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0) if step * power >= value)


def _draw_box(axes: Axes, box: _Box) -> None:
    """Box from quartile to quartile, median, whiskers, and all points."""
    from matplotlib.patches import Rectangle

    if not box.values.size:
        return
    low, median, high = (float(q) for q in np.percentile(box.values, (25, 50, 75)))
    reach = WHISKER * (high - low)
    inside = box.values[(box.values >= low - reach) & (box.values <= high + reach)]
    left, right = box.place - BOX_WIDTH / 2, box.place + BOX_WIDTH / 2
    line: dict[str, Any] = {
        "color": FOREGROUND,
        "linewidth": 1.0,
        "solid_capstyle": "butt",
        "zorder": 2,
        "marker": "",
        "linestyle": "-",
    }
    # a quartile between two far values may have no value inside the whisker's reach: then there is no whisker
    for quartile, end in ((low, min(low, float(inside.min()))), (high, max(high, float(inside.max())))):
        axes.plot([box.place] * 2, [quartile, end], **line)
        axes.plot([box.place - BOX_WIDTH / 5, box.place + BOX_WIDTH / 5], [end] * 2, **line)
    axes.add_patch(
        Rectangle(
            (left, low), right - left, high - low,
            facecolor=(*box.colour, 0.45), edgecolor=FOREGROUND, linewidth=1.0, zorder=1,
        )
    )  # fmt: skip
    axes.plot([left, right], [median] * 2, **(line | {"linewidth": 2.0, "zorder": 4}))
    size, alpha = (3.2, 0.85) if box.values.size <= CROWD else (2.0, 0.35)
    offsets = (np.arange(1, box.values.size + 1) * GOLDEN) % 1.0 - 0.5
    axes.plot(
        box.place + offsets * SPREAD * BOX_WIDTH, box.values, linestyle="none", marker="o", markersize=size,
        markerfacecolor=box.colour, markeredgecolor=FOREGROUND, markeredgewidth=0.5, alpha=alpha,
        zorder=3, clip_on=False,
    )  # fmt: skip


def _draw_legend(axes: Axes, colours: Mapping[str, Colour], width: float, height: float) -> None:
    """One line a method: long names need room."""
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    for index, (method, colour) in enumerate(colours.items()):
        y = (index + 0.6) * LEGEND_LINE_INCH
        axes.add_patch(
            Rectangle((LEFT_INCH, y - 0.07), 0.22, 0.14, facecolor=(*colour, 0.45), edgecolor=FOREGROUND, linewidth=0.8)
        )
        _text(axes, LEFT_INCH + 0.32, y, method, ha="left", va="center", size=9)


def _draw_footer(axes: Axes, width: float, pairs: str) -> None:
    """What boxes and points are, and the use."""
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, FOOTER_INCH)
    rules = f"Points: {pairs}. Box: quartiles, median; whiskers: 1.5 × IQR. A missed pair has DSC 0, no HD95."
    _text(axes, 0.12, 0.32, rules, ha="left", va="center", size=6.5, color=FAINT)
    _text(axes, 0.12, 0.14, FOOTER, ha="left", va="center", size=7.5, weight="bold")


def _text(axes: Axes, x: float, y: float, text: str, *, color: str = FOREGROUND, **options: Any) -> None:
    """Text in data coordinates, independent of the user's matplotlib settings; never read as mathematics."""
    axes.text(x, y, text, color=color, family=FONT, parse_math=False, clip_on=False, **options)

"""Where a method fails most: which class-case pairs, which axial slice of them, and its picture.

Volumes are cut to one small slice at once, so that a page of many pairs never holds many volumes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.scores import MISSING_PREDICTION, ClassScore
from lungseg.evaluation.surface import bounding_box, require_spacing
from lungseg.report.overlays import (
    BACKGROUND,
    FONT,
    FOREGROUND,
    WINDOW_LEVEL_HU,
    WINDOW_WIDTH_HU,
    scale_bar_mm,
)
from lungseg.tissue import OUTSIDE, TISSUES, Tissue

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREDICTION_COLOUR = TISSUES[Tissue.FIBROSIS].colour
REFERENCE_COLOUR = TISSUES[Tissue.EMPHYSEMA].colour
"""Vermillion and sky blue of the Okabe-Ito palette: told apart with any colour vision, and on grey."""
ERROR_ALPHA = 0.35
"""Opacity of what only one side holds."""
MARGIN_MM = 12.0
"""Shown around everything that either side labels in the slice."""
DASHES = (0, (3.0, 1.5))
"""Of the prediction's outline, so that the reference's shows through where both agree."""
PICTURE_INCH, DPI = 4.4, 110
"""Longer side of a picture: 484 pixels, sharp on a telephone and small enough for a page of many."""
BLANK_HU, LABELLED_HU = -1400.0, -1050.0
"""Greys on which a pair without a CT is drawn: black, and dark where either side has any label."""


@dataclass(frozen=True)
class WorstSlice:
    """One axial slice of one class of one case, cropped: all that a picture needs of the volumes."""

    slice_index: int
    """On the reference's grid, 0 is the lowest."""
    num_slices: int
    """Of the volume."""
    prediction: np.ndarray
    """bool, (Y, X): the class in the prediction."""
    reference: np.ndarray
    """bool, (Y, X): the class in the reference."""
    labelled: np.ndarray
    """bool, (Y, X): where either side has any label; it gives a picture without a CT its shape."""
    spacing_mm: tuple[float, float]
    """(y, x) in mm."""
    image_hu: np.ndarray | None = None
    """int16 or float, (Y, X): CT in HU; None if there is none."""


def worst_pairs(scores: Sequence[ClassScore], count: int) -> list[ClassScore]:
    """Class-case pairs that a method did worst on.

    Parameters
    ----------
    scores : sequence of ClassScore
        Of one method.
    count : int
        At most so many.

    Returns
    -------
    list of ClassScore
        Missed ones first, those with most reference in front; then by Dice, lowest first, and HD95, highest first.
        Pairs that are not averaged, or that have no prediction at all, are left out: there is nothing to look at.
    """
    shown = [score for score in scores if score.is_averaged and score.status != MISSING_PREDICTION]

    def badness(score: ClassScore) -> tuple[object, ...]:
        hd95 = -score.hd95_mm if math.isfinite(score.hd95_mm) else 0.0
        names = (score.case_id, score.tissue, -1 if score.slice_index is None else score.slice_index)
        return (not score.is_missed, score.dice, hd95, -score.reference_ml, *names)

    return sorted(shown, key=badness)[: max(count, 0)]


def worst_slice(
    prediction: np.ndarray,
    reference: np.ndarray,
    ids: Sequence[int],
    *,
    spacing_mm: Sequence[float],
    volume_hu: np.ndarray | None = None,
    slice_index: int | None = None,
) -> WorstSlice:
    """The axial slice in which prediction and reference of a class differ most, cropped to what is labelled.

    Parameters
    ----------
    prediction, reference : integer arrays of one shape, (Z, Y, X)
        Label maps on the reference's grid.
    ids : sequence of int
        Label ids of the class, as in the view.
    spacing_mm : sequence of float
        (z, y, x) in mm.
    volume_hu : int16 or float array of that shape, optional
        CT in HU on the same grid.
    slice_index : int, optional
        This slice and no other: the pair is one of slice mode.

    Returns
    -------
    WorstSlice
        Copies, so that the volumes can be freed. Without any difference the slice with most of the class.

    Raises
    ------
    InputError
        If the shapes differ or are not 3-D, or there is no such slice.
    """
    spacing = require_spacing(spacing_mm, 3)
    arrays = [prediction, reference, *([] if volume_hu is None else [volume_hu])]
    if prediction.ndim != 3 or len({array.shape for array in arrays}) > 1:
        raise InputError(
            f"prediction, reference and CT must share one shape (Z, Y, X), not {[a.shape for a in arrays]}"
        )
    if slice_index is None:
        slice_index = _most_different(prediction, reference, ids)
    elif not 0 <= slice_index < len(prediction):
        raise InputError(f"slice {slice_index} does not lie in 0 to {len(prediction) - 1}")
    here = prediction[slice_index], reference[slice_index]
    labelled = (here[0] != OUTSIDE) | (here[1] != OUTSIDE)
    window = _window(labelled, spacing[1:])
    return WorstSlice(
        slice_index=slice_index,
        num_slices=len(prediction),
        prediction=np.isin(here[0][window], list(ids)),
        reference=np.isin(here[1][window], list(ids)),
        labelled=labelled[window].copy(),
        spacing_mm=(spacing[1], spacing[2]),
        image_hu=None if volume_hu is None else volume_hu[slice_index][window].copy(),
    )


def _most_different(prediction: np.ndarray, reference: np.ndarray, ids: Sequence[int]) -> int:
    """Slice with most voxels in one mask only; without any, the one with most of the class."""
    differ = np.zeros(len(prediction), dtype=np.int64)
    present = np.zeros(len(prediction), dtype=np.int64)
    for index, (predicted, wanted) in enumerate(zip(prediction, reference, strict=True)):
        here, there = np.isin(predicted, list(ids)), np.isin(wanted, list(ids))
        differ[index], present[index] = np.count_nonzero(here ^ there), np.count_nonzero(here | there)
    return int(np.argmax(differ if differ.any() else present))


def _window(labelled: np.ndarray, spacing: Sequence[float]) -> tuple[slice, ...]:
    """Box around what is labelled, with a margin; the whole slice if nothing is."""
    box = bounding_box(labelled)
    if box is None:
        return tuple(slice(0, size) for size in labelled.shape)
    margins = [math.ceil(MARGIN_MM / step) for step in spacing]
    return tuple(
        slice(max(0, side.start - margin), min(size, side.stop + margin))
        for side, margin, size in zip(box, margins, labelled.shape, strict=True)
    )


def slice_png(cut: WorstSlice, *, outlines: bool = True) -> bytes:
    """Picture of a slice in the lung window, with both outlines and the disagreement tinted.

    Parameters
    ----------
    cut : WorstSlice
        Rows to posterior, columns to the patient's left, as all volumes here.
    outlines : bool
        False: the CT alone, to look at what the outlines hide.

    Returns
    -------
    bytes
        PNG without text chunks, the longer side 484 pixels; equal input gives equal bytes with the same matplotlib.
        Radiological orientation: the patient's right on the viewer's left.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = (size * step for size, step in zip(cut.reference.shape, cut.spacing_mm, strict=True))
    scale = PICTURE_INCH / max(height, width)
    figure = Figure(figsize=(width * scale, height * scale), dpi=DPI, facecolor=BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    low, high = WINDOW_LEVEL_HU - WINDOW_WIDTH_HU / 2, WINDOW_LEVEL_HU + WINDOW_WIDTH_HU / 2
    grey = np.where(cut.labelled, LABELLED_HU, BLANK_HU) if cut.image_hu is None else cut.image_hu
    extent = (0.0, width, height, 0.0)
    axes.imshow(
        grey, cmap="gray", vmin=low, vmax=high, interpolation="bilinear", aspect="auto", origin="upper", extent=extent
    )
    if outlines:
        axes.imshow(_errors(cut), interpolation="nearest", aspect="auto", origin="upper", extent=extent)
        _outline(axes, cut.reference, cut.spacing_mm, REFERENCE_COLOUR, "solid")
        _outline(axes, cut.prediction, cut.spacing_mm, PREDICTION_COLOUR, DASHES)
    _marks(axes, width, height)
    out = io.BytesIO()
    # print_png and not savefig: the latter obeys the user's matplotlibrc (dpi, bbox, transparency).
    canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _errors(cut: WorstSlice) -> np.ndarray:
    """RGBA, uint8 (Y, X, 4): what only the prediction or only the reference holds."""
    tint = np.zeros((*cut.reference.shape, 4), dtype=np.uint8)
    for mask, colour in (
        (cut.prediction & ~cut.reference, PREDICTION_COLOUR),
        (cut.reference & ~cut.prediction, REFERENCE_COLOUR),
    ):
        tint[mask] = (*colour, round(255 * ERROR_ALPHA))
    return tint


def _outline(
    axes: Axes, mask: np.ndarray, spacing: tuple[float, float], colour: tuple[int, int, int], style: Any
) -> None:
    """Border of a mask, closed at the edge of the picture."""
    if not mask.any():
        return
    # One ring of background, so that a mask cut by the view is closed; coordinates are voxel centres.
    y = (np.arange(-1, mask.shape[0] + 1) + 0.5) * spacing[0]
    x = (np.arange(-1, mask.shape[1] + 1) + 0.5) * spacing[1]
    axes.contour(
        x, y, np.pad(mask, 1).astype(float),
        levels=[0.5], colors=[tuple(c / 255 for c in colour)], linewidths=1.6, linestyles=[style],
    )  # fmt: skip


def _marks(axes: Axes, width: float, height: float) -> None:
    """Side letters and scale bar."""
    from matplotlib import patheffects

    rim = [patheffects.withStroke(linewidth=2.0, foreground=BACKGROUND)]
    bar = scale_bar_mm(width)
    texts = ((0.02, 0.5, "R", "left"), (0.98, 0.5, "L", "right"), (0.97, 0.045, f"{bar:g} mm", "right"))
    for x, y, text, side in texts:
        axes.text(
            x, y, text, transform=axes.transAxes, ha=side, va="center" if len(text) == 1 else "bottom", size=10,
            color=FOREGROUND, family=FONT, weight="bold", parse_math=False, path_effects=rim,
        )  # fmt: skip
    right = 0.97 * width
    for thickness, colour in ((4.4, BACKGROUND), (2.2, FOREGROUND)):
        axes.plot(
            [right - bar, right],
            [0.965 * height] * 2,
            color=colour,
            linewidth=thickness,
            solid_capstyle="butt",
            linestyle="-",
            marker="",
        )

"""Pictures of a training run: its losses and whether the embeddings collapse, and patches drawn on the way.

As in :mod:`lungseg.report.overlays`: matplotlib's object-oriented interface on Agg, and the same bytes for the same
content.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg.diffusion.collapse import COSINE_ALARM, RANK_ALARM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_HU = (-1024, 200)
"""Grey range of previews: lung and soft tissue."""
LOSSES = (
    ("diffusion", "diffusion", "#1f77b4", "-"),
    ("held_out_diffusion", "diffusion, held out", "#1f77b4", "--"),
    ("contrast", "contrast", "#d62728", "-"),
    ("regression", "regression", "#2ca02c", "-"),
    ("held_out_regression", "regression, held out", "#2ca02c", "--"),
    ("collapse", "collapse term", "#9467bd", "-"),
)
"""Key of a line of stats.jsonl, name, colour and style."""
COSINES = (("student_cosine", "student", "#d62728"), ("teacher_cosine", "teacher", "#2ca02c"))
_DPI = 110


def curves_png(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Losses above, effective rank and pairwise cosines below, over the images seen.

    Parameters
    ----------
    lines : sequence of mappings
        Lines of ``stats.jsonl``; each has `images`, the rest may be missing or None.

    Returns
    -------
    bytes
        PNG without text chunks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), dpi=_DPI)
    losses, rank = figure.subplots(2, 1, sharex=True)
    losses.set_yscale("log")
    for key, label, colour, style in LOSSES:
        _curve(losses, lines, key, label, colour, style)
    losses.set_ylabel("loss")
    _curve(rank, lines, "effective_rank", "effective rank of the student", "#1f77b4", "-")
    rank.axhline(RANK_ALARM, color="#1f77b4", linewidth=0.8, linestyle=":", marker="")
    rank.set_ylabel("effective rank")
    rank.set_xlabel("images seen")
    rank.set_ylim(bottom=0)
    cosine = rank.twinx()
    for key, label, colour in COSINES:
        _curve(cosine, lines, key, f"mean cosine, {label}", colour, "-")
    cosine.axhline(COSINE_ALARM, color="#d62728", linewidth=0.8, linestyle=":", marker="")
    cosine.set_ylim(-0.1, 1.0)
    cosine.set_ylabel("pairwise cosine (alarms dotted)")
    losses.yaxis.set_major_formatter("{x:.3g}")
    losses.yaxis.set_minor_formatter("{x:.3g}")
    for axes, shown in ((losses, (losses,)), (rank, (rank, cosine))):
        lines_drawn = [line for part in shown for line in part.get_lines() if not str(line.get_label()).startswith("_")]
        if lines_drawn:
            place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncol": 3, "fontsize": 8, "frameon": False}
            axes.legend(handles=lines_drawn, **place)
    figure.subplots_adjust(left=0.09, right=0.92, bottom=0.07, top=0.93, hspace=0.18)
    return _png(figure)


def _curve(axes: Axes, lines: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, style: str) -> None:
    points = [(line["images"], line[key]) for line in lines if line.get(key) is not None]
    if axes.get_yscale() == "log":  # zero, the collapse term of a healthy run, has no place there
        points = [(x, y) for x, y in points if y > 0]
    if points:
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), style, marker=marker, color=colour, label=label, linewidth=1.2)


def samples_png(volumes_hu: np.ndarray) -> bytes:
    """The middle axial, coronal and sagittal slice of each patch, one patch a column.

    Parameters
    ----------
    volumes_hu : int16 array, shape (N, D, H, W)
        Patches drawn from the model.

    Returns
    -------
    bytes
        PNG without text chunks.
    """
    from matplotlib.figure import Figure

    n, d, h, w = volumes_hu.shape
    cuts = [volumes_hu[:, d // 2], volumes_hu[:, ::-1, h // 2], volumes_hu[:, ::-1, :, w // 2]]
    figure = Figure(figsize=(2 * n, 2 * (1 + 2 * d / max(h, w))), dpi=_DPI)
    panels = figure.subplots(3, n, squeeze=False, height_ratios=[h, d, d])
    for row, views in zip(panels, cuts, strict=True):
        for axes, view in zip(row, views, strict=True):
            axes.imshow(view, cmap="gray", vmin=SHOWN_HU[0], vmax=SHOWN_HU[1], interpolation="nearest")
            axes.set_axis_off()
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, wspace=0.03, hspace=0.03)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()

"""A picture of descriptors: how the 34 features correlate, and how known tissues differ in them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from lungseg.errors import InputError
from lungseg.radiomics.descriptor import CLIP_IQR, FAMILIES
from lungseg.tissue import TISSUES, Tissue

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
FAMILY_TITLES = {"first_order": "First order", "glcm": "GLCM", "lbp": "LBP", "gabor": "Gabor"}
MIN_WINDOWS = 10
"""A tissue with fewer windows is left out of the distributions."""


def descriptor_figure_png(
    features: np.ndarray, names: tuple[str, ...], *, title: str, tissues: np.ndarray | None = None
) -> bytes:
    """PNG of the correlation matrix of the features and, if tissues are given, of their distributions.

    Parameters
    ----------
    features : float array, shape (N, 34)
        Descriptors; rows with a NaN are left out.
    names : 34 strings
        Of the columns.
    title : str
        Printed as it is (no markup). The caller sees to it that it names no patient.
    tissues : integer array, shape (N,), optional
        Tissue of each window, 0 where it has no single one.

    Returns
    -------
    bytes
        PNG without text chunks; equal input gives equal bytes with the same matplotlib. Correlations are Spearman's,
        so that no outlier makes them. Distributions are median and quartiles in units of the interquartile range of
        all windows shown.

    Raises
    ------
    InputError
        If the shapes do not fit, or fewer than three rows are valid.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if features.ndim != 2 or features.shape[1] != len(names) or (tissues is not None and len(tissues) != len(features)):
        raise InputError(f"features of shape {features.shape} do not fit {len(names)} names and the tissues given")
    valid = np.isfinite(features).all(1)
    features, tissues = features[valid], None if tissues is None else tissues[valid]
    if len(features) < 3:
        raise InputError(f"a picture of correlations needs three valid descriptors, but there are {len(features)}")
    groups = [] if tissues is None else [t for t in Tissue if np.count_nonzero(tissues == t) >= MIN_WINDOWS]
    figure = Figure(figsize=(17 if groups else 10, 9), dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if groups else 1, squeeze=False, width_ratios=[10, 7] if groups else None)[0]
    _draw_correlations(axes[0], features, names)
    if groups:
        assert tissues is not None
        _draw_distributions(axes[1], features, names, tissues, groups)
    figure.suptitle(title, parse_math=False)
    out = io.BytesIO()
    # print_png and not savefig: the latter obeys the user's matplotlibrc (dpi, bbox, transparency).
    canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def correlations(features: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of every two columns, 0 with a constant one; (F, F) of (N, F)."""
    from scipy.stats import rankdata

    ranks = rankdata(features, axis=0)
    centred = ranks - ranks.mean(0)
    norm = np.sqrt((centred**2).sum(0))
    scaled = centred / np.where(norm > 0, norm, 1.0)
    return np.clip(scaled.T @ scaled, -1.0, 1.0)


def _draw_correlations(axes: Axes, features: np.ndarray, names: tuple[str, ...]) -> None:
    image = axes.imshow(correlations(features), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label="Spearman correlation")
    ticks = np.arange(len(names))
    axes.set_xticks(ticks, names, rotation=90, fontsize=7)
    axes.set_yticks(ticks, names, fontsize=7)
    for family, columns in FAMILIES.items():
        axes.text(len(names), (columns.start + columns.stop - 1) / 2, FAMILY_TITLES[family], va="center", fontsize=8)
        if columns.start:
            axes.axhline(columns.start - 0.5, color="black", linewidth=0.8)
            axes.axvline(columns.start - 0.5, color="black", linewidth=0.8)
    axes.set_title(f"Correlation of the features, {len(features)} windows", fontsize=10)


def _draw_distributions(
    axes: Axes, features: np.ndarray, names: tuple[str, ...], tissues: np.ndarray, groups: list[Tissue]
) -> None:
    shown = features[np.isin(tissues, groups)]
    lower, centre, upper = np.quantile(shown, (0.25, 0.5, 0.75), axis=0)
    scale = np.where(upper > lower, upper - lower, 1.0)
    rows = np.arange(len(names))
    for index, tissue in enumerate(groups):
        part = np.clip((features[tissues == tissue] - centre) / scale, -CLIP_IQR, CLIP_IQR)
        low, middle, high = np.quantile(part, (0.25, 0.5, 0.75), axis=0)
        place = rows + (index - (len(groups) - 1) / 2) * 0.8 / len(groups)
        colour = tuple(value / 255 for value in TISSUES[tissue].colour)
        label = f"{TISSUES[tissue].title} ({len(part)})"
        axes.hlines(place, low, high, color=colour, linewidth=2.0)
        axes.plot(
            middle, place, "o", color=colour, markeredgecolor="black", markeredgewidth=0.4, markersize=4, label=label
        )
    axes.set_yticks(rows, names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-CLIP_IQR - 0.2, CLIP_IQR + 0.2)
    axes.grid(axis="x", linewidth=0.3)
    for columns in FAMILIES.values():
        if columns.start:
            axes.axhline(columns.start - 0.5, color="black", linewidth=0.8)
    axes.set_xlabel(
        f"median and quartiles, in interquartile ranges from the median of all, clipped at {CLIP_IQR:g}", fontsize=8
    )
    axes.set_title("Windows more than half of whose lung is one tissue (number)", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncol=3, fontsize=8, frameon=False)

"""A map of the embedding that was clustered: tokens in their first two principal directions, by name and by HU.

As in :mod:`lungseg.report.overlays`: matplotlib's object-oriented interface on Agg, and the same bytes for the same
content. A principal component analysis and no t-SNE: distances and the share of variance that is seen can be read off
it, and it has no setting to choose.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lungseg.errors import InputError
from lungseg.report.legend import text_style
from lungseg.report.overlays import FOOTER
from lungseg.tissue import MIXTURE_TISSUES, TISSUES, UNCLASSIFIED, UNCLASSIFIED_COLOUR, Tissue

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 8000
"""Tokens drawn; the directions are those of the same tokens."""
SHOWN_HU = (-1000.0, -300.0)
"""Range of the colours of HU, from air to dense disease; the ends stand for all beyond."""
HU_MAP = "viridis"
INK, FAINT, FRAME = "#17191c", "#5b6168", "#c9ced3"
WIDTH_INCH, HEIGHT_INCH, DPI = 11.0, 6.1, 110
SHOWN_PERCENTILES = (0.5, 99.5)
"""The axes hold these percentiles of the tokens, widened by ``MARGIN``: single outliers do not squeeze the rest."""
MARGIN = 0.08


@dataclass(frozen=True)
class EmbeddingMap:
    """Tokens and components in the plane."""

    points: np.ndarray
    """float64 (N, 2)."""
    centres: np.ndarray
    """float64 (K, 2): mean of each component's tokens, weighted by posterior; nan for one without any."""
    variance_share: tuple[float, float]
    """Of the tokens' variance in each direction, 0 to 1."""


def project_tokens(tokens: np.ndarray, posterior: np.ndarray) -> EmbeddingMap:
    """Tokens and centres of components in the first two principal directions of the tokens.

    Parameters
    ----------
    tokens : float array, shape (N, D)
        Finite, N > 1.
    posterior : float array, shape (N, K)
        Probability of each component given each token; rows sum to 1.

    Raises
    ------
    InputError
        If the shapes do not go together or there are fewer than two tokens.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 2 or posterior.shape[:1] != tokens.shape[:1]:
        raise InputError(f"tokens {tokens.shape} and posterior {posterior.shape} must be (N, D) and (N, K), N > 1")
    values = tokens.astype(np.float64)
    values -= values.mean(axis=0)
    variances, directions = np.linalg.eigh(values.T @ values / len(values))
    top = directions[:, ::-1][:, :2]
    # an eigenvector has no sign of its own: the largest entry is made positive, so that equal tokens look equal
    top = top * np.sign(np.take_along_axis(top, np.abs(top).argmax(axis=0)[None], axis=0))
    points = values @ top
    if points.shape[1] == 1:
        points = np.column_stack([points, np.zeros(len(points))])
    shares = np.append(variances[::-1].clip(0), 0.0)[:2] / max(float(variances.clip(0).sum()), np.finfo(float).tiny)
    weight = posterior.astype(np.float64).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        centres = posterior.T.astype(np.float64) @ points / weight[:, None]
    return EmbeddingMap(points, centres, (float(shares[0]), float(shares[1])))


def embedding_map_png(
    tokens: np.ndarray, posterior: np.ndarray, density_hu: np.ndarray, tissues: Sequence[Tissue]
) -> bytes:
    """Two panels of the same tokens: coloured by the name they were given, and by their HU.

    Parameters
    ----------
    tokens : float array, shape (N, D)
        A random sample of what was clustered, in random order: the first ``MAX_POINTS`` are drawn.
    posterior : float array, shape (N, K)
        A row of zeros is a token that no component took: it is shown as unclassified.
    density_hu : float array, shape (N,)
        Median HU around each token; nan where there is none.
    tissues : sequence of K Tissue
        Name of each component.

    Returns
    -------
    bytes
        PNG without text chunks. Discs are the components, numbered as in ``clusters.json``.

    Raises
    ------
    InputError
        If the shapes do not go together.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if posterior.ndim != 2 or posterior.shape[1] != len(tissues) or density_hu.shape != tokens.shape[:1]:
        raise InputError(
            f"posterior {posterior.shape}, HU {density_hu.shape} and {len(tissues)} names do not fit tokens "
            f"{tokens.shape}"
        )
    tokens, posterior, density_hu = tokens[:MAX_POINTS], posterior[:MAX_POINTS], density_hu[:MAX_POINTS]
    plane = project_tokens(tokens, posterior)
    named = np.array([int(tissue) for tissue in tissues])[posterior.argmax(axis=1)]
    named[posterior.max(axis=1) <= 0] = UNCLASSIFIED
    figure = Figure(figsize=(WIDTH_INCH, HEIGHT_INCH), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    by_name, by_hu = (figure.add_axes((left, 0.2, 0.435, 0.68)) for left in (0.045, 0.53))
    limits = _limits(plane)
    for axes, title in ((by_name, "By name"), (by_hu, "By median HU")):
        _frame(axes, limits, plane, title)
    table = np.zeros((256, 3))
    table[[int(tissue) for tissue in TISSUES]] = [[c / 255 for c in info.colour] for info in TISSUES.values()]
    table[UNCLASSIFIED] = [channel / 255 for channel in UNCLASSIFIED_COLOUR]
    style: dict[str, Any] = {"s": 5.0, "marker": "o", "linewidths": 0, "zorder": 1}
    x, y = plane.points.T
    by_name.scatter(x, y, c=table[named], alpha=0.55, **style)
    low, high = SHOWN_HU
    known = np.isfinite(density_hu)
    drawn = by_hu.scatter(x[known], y[known], c=density_hu[known], cmap=HU_MAP, vmin=low, vmax=high, alpha=0.7, **style)
    for axes in (by_name, by_hu):
        _centres(axes, plane, tissues)
    _name_legend(figure.add_axes((0.045, 0.055, 0.435, 0.09)), named, tissues)
    bar = figure.add_axes((0.60, 0.1, 0.3, 0.022))
    drawn.set_alpha(1.0)  # a bar of the same colours, not of paler ones
    figure.colorbar(drawn, cax=bar, orientation="horizontal", extend="both")
    drawn.set_alpha(0.7)
    ticks = list(range(int(low), int(high) + 1, 100))
    bar.set_xticks(ticks, [f"{tick} HU".replace("-", "\u2212") if tick == high else f"\u2212{-tick}" for tick in ticks])
    bar.tick_params(labelsize=8, colors=FAINT, length=2)
    for label in bar.get_xticklabels():
        label.set(fontfamily=text_style(FAINT)["family"])
    heading = f"What was clustered: {len(tokens):,} tokens, {len(tissues)} components"
    figure.text(0.045, 0.955, heading, size=13, weight="bold", **text_style(INK))
    figure.text(0.045, 0.015, FOOTER, size=8, weight="bold", **text_style(INK))
    out = io.BytesIO()
    canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _limits(plane: EmbeddingMap) -> np.ndarray:
    """(2, 2): lower and upper end of both axes; every centre lies inside."""
    low, high = np.percentile(plane.points, SHOWN_PERCENTILES, axis=0)
    centres = plane.centres[np.isfinite(plane.centres).all(axis=1)]
    if len(centres):
        low, high = np.minimum(low, centres.min(axis=0)), np.maximum(high, centres.max(axis=0))
    pad = np.maximum(MARGIN * (high - low), 1e-6)
    return np.stack([low - pad, high + pad])


def _frame(axes: Axes, limits: np.ndarray, plane: EmbeddingMap, title: str) -> None:
    """Title, limits and the share of variance; no ticks, for the units of an embedding mean nothing."""
    axes.set_xlim(*limits[:, 0])
    axes.set_ylim(*limits[:, 1])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=FRAME, linewidth=0.8)
    axes.set_title(title, loc="left", size=10.5, weight="bold", **text_style(INK))
    shares = [f"{100 * share:.0f} % of variance" for share in plane.variance_share]
    axes.set_xlabel(f"principal direction 1: {shares[0]}", size=8.5, **text_style(FAINT))
    axes.set_ylabel(f"principal direction 2: {shares[1]}", size=8.5, **text_style(FAINT))


def _centres(axes: Axes, plane: EmbeddingMap, tissues: Sequence[Tissue]) -> None:
    """A numbered disc at each component, in the colour of its name."""
    for number, ((x, y), tissue) in enumerate(zip(plane.centres.tolist(), tissues, strict=True)):
        if not np.isfinite((x, y)).all():
            continue
        colour = tuple(channel / 255 for channel in TISSUES[tissue].colour)
        axes.scatter(x, y, s=95, marker="o", facecolors=[colour], edgecolors=INK, linewidths=0.9, zorder=3)
        dark = sum(TISSUES[tissue].colour) < 330
        style = text_style("white" if dark else INK)
        axes.text(x, y, str(number), size=6.5, weight="bold", ha="center", va="center", zorder=4, **style)


def _name_legend(axes: Axes, named: np.ndarray, tissues: Sequence[Tissue]) -> None:
    """Colour, name, share of the tokens shown and number of components of each tissue that was named."""
    axes.set_axis_off()
    axes.set_xlim(0, 3)
    axes.set_ylim(2, 0)
    shown = [tissue for tissue in MIXTURE_TISSUES if tissue in tissues]
    for place, tissue in enumerate(shown):
        column, row = place % 3, place // 3 + 0.4
        colour = tuple(channel / 255 for channel in TISSUES[tissue].colour)
        axes.scatter(column + 0.04, row, s=55, marker="s", facecolors=[colour], linewidths=0)
        number = sum(other == tissue for other in tissues)
        share = f"{100 * np.mean(named == int(tissue)):.0f} %, {number} component{'s' * (number != 1)}"
        axes.text(column + 0.1, row - 0.16, TISSUES[tissue].title, size=8.5, va="center", **text_style(INK))
        axes.text(column + 0.1, row + 0.24, share, size=7, va="center", **text_style(FAINT))

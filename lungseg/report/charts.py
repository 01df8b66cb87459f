"""Small drawings inside a page, as SVG: tissue bars, the histogram of the lung, disease from slice to slice."""

from __future__ import annotations

from collections.abc import Sequence

from lungseg.report.density import Histogram
from lungseg.report.html import Markup, joined, tag
from lungseg.report.legend import HISTOGRAM_RANGE_HU, THRESHOLDS_HU, histogram_bins
from lungseg.report.summary import COLOURS, TITLES, CaseSummary

BAR_WIDTH, BAR_HEIGHT = 300.0, 16.0
HISTOGRAM_SIZE = (560.0, 190.0)
PROFILE_SIZE = (560.0, 44.0)


def tissue_bar(summary: CaseSummary, region: str = "whole") -> Markup:
    """One bar: the shares of all tissues of a region, in the order of the legend; empty without numbers."""
    at, parts = 0.0, []
    told = []
    for name, title in TITLES.items():
        share = summary.value(f"{name}_pct", region)
        if share:
            width = BAR_WIDTH * share / 100.0
            parts.append(_rect(at, 0, width, BAR_HEIGHT, _rgb(COLOURS[name])))
            told.append(f"{title} {share:.1f} %")
            at += width
    frame = tag("rect", x=0.5, y=0.5, width=BAR_WIDTH - 1, height=BAR_HEIGHT - 1, class_="frame")
    label = ", ".join(told) or f"no numbers: {summary.status('volume_ml', region)}"
    return tag(
        "svg", tag("title", label), *parts, frame, viewBox=f"0 0 {BAR_WIDTH:g} {BAR_HEIGHT:g}", class_="bar",
        preserveAspectRatio="none", role="img", aria_label=label,
    )  # fmt: skip


def histogram_chart(histogram: Histogram) -> Markup:
    """HU of the lung with the thresholds of the tables as lines."""
    width, height = HISTOGRAM_SIZE
    floor, top = height - 22.0, 26.0
    edges, percent = histogram_bins(histogram)
    low, high = HISTOGRAM_RANGE_HU
    highest = max(float(percent.max(initial=0.0)), 1e-9)

    def across(hu: float) -> float:
        return width * (hu - low) / (high - low)

    points = [f"{across(low):.1f},{floor:.1f}"]
    for left, right, share in zip(edges[:-1], edges[1:], percent, strict=True):
        y = floor - (floor - top) * float(share) / highest
        points += [f"{across(float(left)):.1f},{y:.1f}", f"{across(float(right)):.1f},{y:.1f}"]
    points.append(f"{width:.1f},{floor:.1f}")
    parts = [tag("polygon", points=" ".join(points), class_="hist")]
    for number, threshold in enumerate(THRESHOLDS_HU):
        x = across(threshold)
        parts.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=12, y2=floor, class_="limit"))
        text = _minus(f"{threshold:g}")
        # the first two are too close for both numbers on one side
        near = {"x": f"{x - 3:.1f}", "text_anchor": "end"} if number == 0 else {"x": f"{x + 3:.1f}"}
        parts.append(tag("text", text, y=20, class_="limit-text", **near))
    for hu in range(-1000, 1, 200):
        at = f"{across(hu):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=floor, y2=floor + 4, class_="axis"))
        parts.append(tag("text", _minus(str(hu)), x=at, y=height - 5, class_="tick"))
    parts.append(tag("line", x1=0, x2=width, y1=floor, y2=floor, class_="axis"))
    return tag(
        "svg", *parts, viewBox=f"0 0 {width:g} {height:g}", class_="chart", role="img",
        aria_label="Histogram of the Hounsfield units of the lung",
    )  # fmt: skip


def slice_profile(abnormal_pct: Sequence[float]) -> Markup:
    """Abnormal share of each slice, from inferior to superior: where to move the slider."""
    width, height = PROFILE_SIZE
    step = width / max(len(abnormal_pct), 1)
    bars = [
        _rect(number * step, height * (1 - share / 100.0), max(step - 0.6, 0.4), height * share / 100.0, "#b3541e")
        for number, share in enumerate(abnormal_pct)
    ]
    floor = tag("line", x1=0, x2=width, y1=height - 0.5, y2=height - 0.5, class_="axis")
    return tag(
        "svg", *bars, floor, viewBox=f"0 0 {width:g} {height:g}", class_="profile", preserveAspectRatio="none",
        role="img", aria_label="Abnormal share of each slice, from the lowest slice to the highest",
    )  # fmt: skip


def legend_list(names: Sequence[str]) -> Markup:
    """Colours and names of tissues."""
    items = []
    for name in names:
        swatch = tag("svg", _rect(0, 0, 14, 14, _rgb(COLOURS[name])), viewBox="0 0 14 14", class_="swatch")
        items.append(tag("li", swatch, TITLES[name]))
    return tag("ul", joined(items), class_="legend")


def _rect(x: float, y: float, width: float, height: float, fill: str) -> Markup:
    return tag("rect", x=f"{x:.2f}", y=f"{y:.2f}", width=f"{width:.2f}", height=f"{height:.2f}", fill=fill)


def _rgb(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")

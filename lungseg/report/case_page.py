"""The page of one scan: a slice viewer, what was found where, the densities, and how it was made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lungseg.report.agreement import Agreement, tissue_title
from lungseg.report.charts import histogram_chart, legend_list, slice_profile, tissue_bar
from lungseg.report.density import Histogram
from lungseg.report.html import Markup, data_block, data_uri, document, joined, tag, void_tag
from lungseg.report.page import BLANK, definition_list
from lungseg.report.slices import SliceStack
from lungseg.report.summary import TITLES, CaseSummary

LAYER_TITLES = {"tissue": "Tissue map", "reference": "Reference", "uncertainty": "Uncertainty"}
REGION_COLUMNS = (
    ("volume_ml", "mL", 0), ("mass_g", "g", 0), ("mld_hu", "Mean HU", 0), ("perc15_hu", "Perc15", 0),
    ("laa950_pct", "LAA-950 %", 1), ("laa910_pct", "LAA-910 %", 1), ("laa856_pct", "LAA-856 %", 1),
    ("haa600_250_pct", "HAA \u2212600\u2026\u2212250 %", 1), ("inflated_pct", "Inflated %", 1),
    ("infiltrated_pct", "Infiltrated %", 1), ("collapsed_pct", "Collapsed %", 1), ("severity_score", "Score", 0),
)  # fmt: skip


def case_page(
    summary: CaseSummary,
    stack: SliceStack,
    *,
    histogram: Histogram | None,
    preview: bytes,
    spacing_z_mm: float,
    provenance: Sequence[tuple[str, str]],
    back: str,
) -> str:
    """HTML of one scan.

    Parameters
    ----------
    summary : CaseSummary
    stack : SliceStack
        What the viewer shows.
    histogram : Histogram, optional
        HU of the whole lung on its own grid.
    preview : bytes
        PNG of three planes.
    spacing_z_mm : float
        Distance of the slices of the volume that ``stack`` was made of.
    provenance : sequence of (name, value)
        What was scanned and how the map was made.
    back : str
        Address of the cohort's page, relative to this one.
    """
    parts = [tag("p", summary.finding, class_="say")]
    if summary.cautions:
        items = [tag("li", text) for text in summary.cautions]
        parts.append(tag("section", tag("h2", "Before you use these numbers"), tag("ul", *items), class_="caution"))
    parts.append(_viewer(summary, stack, spacing_z_mm))
    if summary.agreement is not None and summary.agreement.scores:
        parts += [tag("h2", "Against the reference"), *_scores(summary.agreement)]
    regions = list(dict.fromkeys(row.region for row in summary.quantities.rows))
    parts += [tag("h2", "Tissue of each region"), _bars(summary, regions)]
    if columns := _region_columns(summary, regions):
        parts += [tag("h2", "Density of each region"), _region_table(summary, regions, columns)]
    if histogram is not None and histogram.size:
        parts += [tag("h2", "Hounsfield units of the lung"), histogram_chart(histogram)]
    alt = "Axial, coronal and sagittal plane through the most abnormal place"
    parts += [
        tag("h2", "Three planes through the most abnormal place"),
        tag("div", void_tag("img", src=data_uri(preview, "png"), alt=alt, class_="preview"), class_="scroll"),
        tag("p", tag("a", "This picture alone", href=f"../previews/{summary.case_id}.png"), class_="sub"),
        tag("h2", "How it was made"),
        definition_list(provenance),
    ]
    link = tag("nav", tag("a", "\u2190 all scans", href=back))
    return document(summary.case_id, [tag("header", link, tag("h1", summary.case_id)), tag("main", *parts)])


def _viewer(summary: CaseSummary, stack: SliceStack, spacing_z_mm: float) -> Markup:
    """Slices with a slider; without script the slice with most disease is shown."""
    width, height = stack.size
    first = stack.start
    images = [
        void_tag(
            "img", src=data_uri(stack.ct[first], "jpeg"), width=width, height=height, id="ct",
            alt="Axial slice of the CT, the patient's right on the left",
        )
    ]  # fmt: skip
    images += [
        void_tag(
            "img", src=data_uri(pictures[first], "png"), width=width, height=height, id=f"layer-{name}", class_="layer",
            alt="", hidden=name != "tissue",
        )
        for name, pictures in stack.layers.items()
    ]  # fmt: skip
    letters = [tag("span", letter, class_=f"side {place}") for letter, place in (("R", "west"), ("L", "east"))]
    slider = void_tag(
        "input", type="range", id="slice", min=0, max=len(stack.index) - 1, value=first, step=1,
        aria_label="Slice, from the lowest to the highest",
    )  # fmt: skip
    choices = [
        tag("label", void_tag("input", type="radio", name="layer", value=value, checked=value == "tissue"), f" {title}")
        for value, title in [
            *((name, title) for name, title in LAYER_TITLES.items() if name in stack.layers),
            ("", "CT only"),
        ]
    ]
    opacity = tag(
        "label", "Strength ",
        void_tag("input", type="range", id="opacity", min=0, max=100, value=100, aria_label="Strength of the overlay"),
    )  # fmt: skip
    captions = [
        f"slice {z + 1}, {z * spacing_z_mm:.0f} mm above the lowest; {share:.0f} % of its lung is abnormal"
        for z, share in zip(stack.index, stack.abnormal_pct, strict=True)
    ]
    data = {
        "ct": [data_uri(picture, "jpeg") for picture in stack.ct],
        "layers": {name: [data_uri(p, "png") for p in pictures] for name, pictures in stack.layers.items()},
        "slices": captions,
    }
    # a reference may hold tissue that the map does not
    complete = "reference" in stack.layers
    found = [name for name in TITLES if complete or summary.value(f"{name}_ml")]
    return tag(
        "section",
        tag("figure", tag("div", *images, *letters, class_="stack"), class_="view"),
        tag(
            "div",
            tag("p", "Drag the slider or use the arrow keys: lowest slice on the left.", class_="sub"),
            slice_profile(stack.abnormal_pct),
            slider,
            tag("p", captions[first], id="slice-text", aria_live="polite"),
            tag("fieldset", tag("legend", "Show over the CT"), *choices, opacity),
            legend_list(found or list(TITLES)),
            class_="controls",
        ),
        data_block("viewer-data", data),
        class_="viewer",
    )


def _scores(agreement: Agreement) -> list[Markup]:
    """One line a class: how well the map agrees with the reference."""
    columns: tuple[str, ...] = ("Class", "Result", "DSC", "HD95 mm", "Surface Dice", "Reference mL", "Map mL")
    in_slices = any(score.slice_index is not None for score in agreement.scores)
    if in_slices:
        columns = (columns[0], "Slice", *columns[1:])
    rows = []
    for score in agreement.scores:
        cells = [tag("th", tissue_title(score.tissue), scope="row")]
        if in_slices:
            cells.append(tag("td", "" if score.slice_index is None else score.slice_index + 1, class_="number"))
        cells.append(tag("td", score.status, class_="bad" if score.is_missed else None))
        for value, digits in (
            (score.dice, 2), (score.hd95_mm, 1), (score.surface_dice, 2), (score.reference_ml, 1),
            (score.predicted_ml, 1),
        ):  # fmt: skip
            cells.append(tag("td", f"{value:,.{digits}f}" if math.isfinite(value) else BLANK, class_="number"))
        rows.append(tag("tr", *cells))
    head = tag("tr", *(tag("th", name, scope="col") for name in columns))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers scores")
    words = agreement.finding[:1].upper() + agreement.finding[1:]
    said = [tag("p", f"{words}.")] if words else []
    note = "Missed: the reference holds it and the map has none. False tissue: the reverse; it is in no mean."
    return [*said, tag("div", table, class_="scroll"), tag("p", note, class_="sub")]


def _region_name(region: str) -> str:
    return region.replace("_", " ").capitalize()


def _bars(summary: CaseSummary, regions: Sequence[str]) -> Markup:
    rows = []
    for region in regions:
        share = summary.value("abnormal_pct", region)
        text = f"{share:.0f} % abnormal" if share is not None else f"{BLANK} ({summary.status('volume_ml', region)})"
        name = tag("th", _region_name(region), scope="row")
        rows.append(tag("tr", name, tag("td", tissue_bar(summary, region), class_="wide"), tag("td", text)))
    head = tag("tr", *(tag("th", text, scope="col") for text in ("Region", "Share of its volume", "")))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="bars")


def _region_columns(summary: CaseSummary, regions: Sequence[str]) -> list[tuple[str, str, int]]:
    """Columns with any number: none for a lung that is cut by the field of view."""
    return [c for c in REGION_COLUMNS if any(summary.value(c[0], region) is not None for region in regions)]


def _region_table(summary: CaseSummary, regions: Sequence[str], columns: Sequence[tuple[str, str, int]]) -> Markup:
    head = tag("tr", tag("th", "Region", scope="col"), *(tag("th", title, scope="col") for _, title, _ in columns))
    rows = []
    for region in regions:
        cells = [tag("th", _region_name(region), scope="row")]
        for metric, _, digits in columns:
            value, status = summary.value(metric, region), summary.status(metric, region)
            text = f"{value:,.{digits}f}".replace("-", "\u2212") if value is not None else BLANK
            cells.append(tag("td", text, title=None if status == "ok" else status, class_="number"))
        rows.append(tag("tr", *cells))
    note = tag("p", f"{BLANK} no number: point at it to see why. LAA-856 is of expiratory scans only.", class_="sub")
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers")
    return joined((tag("div", table, class_="scroll"), note))

"""The page of a cohort: which scan is worst and why, in one table that can be sorted."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lungseg.report.charts import legend_list, tissue_bar
from lungseg.report.html import Markup, data_uri, document, joined, tag, void_tag
from lungseg.report.summary import DISEASE, TITLES, CaseSummary, ranked

BLANK = "\u2013"
BROAD = 1.5
"""Pictures wider than this for their height take a row of their own."""


@dataclass(frozen=True)
class Column:
    """A sortable column of numbers."""

    metric: str
    title: str
    explained: str
    digits: int


RANKED_BY = "affected_pct"
COLUMNS = (
    Column(
        RANKED_BY, "Affected %", "Share of the lung that the map calls abnormal, or LAA-950 where the map misses it", 0
    ),
    *(Column(f"{name}_pct", f"{TITLES[name]} %", f"Share of the lung: {TITLES[name].lower()}", 1) for name in DISEASE),
    Column("volume_ml", "Lung mL", "Volume of both lungs", 0),
    Column("mld_hu", "Mean HU", "Mean lung density", 0),
    Column("laa950_pct", "LAA-950 %", "Lung at or below -950 HU (emphysema index)", 1),
)


SCORE_COLUMNS = (
    Column("dice", "Mean DSC", "Mean DSC over the classes of the reference, a missed one as 0", 2),
    Column("hd95_mm", "Mean HD95 mm", "Mean HD95 over the classes that were found; missed ones have none", 1),
)
"""Of :class:`lungseg.report.agreement.Agreement`; there if any scan was evaluated."""
RARE_METRICS = ("cavity_pct",)


@dataclass(frozen=True)
class Picture:
    """A picture of another stage, shown at the end of the page."""

    title: str
    png: bytes
    explained: str = ""
    """What to look for."""
    address: str = ""
    """Address of the picture as a file, relative to the page."""


def cohort_page(
    summaries: Sequence[CaseSummary],
    *,
    title: str,
    left_out: Mapping[str, str] | None = None,
    pictures: Sequence[Picture] = (),
    worst_pairs: str = "",
    provenance: Sequence[tuple[str, str]] = (),
) -> str:
    """HTML of the whole cohort.

    Parameters
    ----------
    summaries : sequence of CaseSummary
        In any order: the table starts with the most affected scan.
    title : str
    left_out : mapping of case id to reason
        Scans without a map, and why.
    pictures : sequence of Picture
        Of the other stages.
    worst_pairs : str
        Address of the page of the worst class-case pairs, if there is one.
    provenance : sequence of (name, value)
        How the maps were made.
    """
    order = ranked(summaries)
    body = [
        tag("header", tag("h1", title), tag("p", _count(len(order)), class_="sub")),
        tag("main", *_main(order, left_out or {}, pictures, worst_pairs, provenance)),
    ]
    return document(title, body)


def _count(number: int) -> str:
    return "1 scan" if number == 1 else f"{number} scans"


def _main(
    order: Sequence[CaseSummary],
    left_out: Mapping[str, str],
    pictures: Sequence[Picture],
    worst_pairs: str,
    provenance: Sequence[tuple[str, str]],
) -> list[Markup]:
    parts = []
    if order:
        parts.append(_worst(order[0], several=len(order) > 1))
        parts += _least_agreeing(order, worst_pairs)
        parts += [tag("h2", "All scans"), legend_list(_shown_tissues(order)), _table(order)]
    if left_out:
        rows = [tag("li", tag("strong", case_id), f": {reason}") for case_id, reason in sorted(left_out.items())]
        parts += [tag("h2", "Scans without a map"), tag("ul", *rows)]
    if pictures:
        parts += [
            tag("h2", "How the map came about, and how good it is"),
            tag("div", *(_figure(picture) for picture in pictures), class_="figures"),
        ]
    parts += [tag("h2", "How the numbers were made"), _explanation(), definition_list(provenance)]
    return parts


def _worst(summary: CaseSummary, *, several: bool) -> Markup:
    """The scan to look at first, and why."""
    heading = "Most affected scan" if several else "The scan"
    picture = void_tag("img", src=data_uri(summary.thumbnail, "jpeg"), alt=f"Slice of {summary.case_id}")
    words = [tag("p", tag("a", summary.case_id, href=summary.page, class_="case"), " ", summary.finding, class_="say")]
    words.append(tissue_bar(summary))
    if summary.cautions:
        words.append(tag("p", "Before you use its numbers: ", "; ".join(summary.cautions), ".", class_="caution"))
    return tag("section", tag("a", picture, href=summary.page), tag("div", tag("h2", heading), *words), class_="worst")


def _least_agreeing(order: Sequence[CaseSummary], worst_pairs: str) -> list[Markup]:
    """The scan whose map agrees least with its reference, and where to see the worst pairs."""
    scored = [(s.agreement.dice, s) for s in order if s.agreement is not None and s.agreement.dice is not None]
    if not scored:
        return []
    _, lowest = min(scored, key=lambda pair: pair[0])
    assert lowest.agreement is not None
    words: list[object] = [
        tag("strong", "Least like its reference: " if len(scored) > 1 else "Against its reference: ")
    ]
    words += [tag("a", lowest.case_id, href=lowest.page), f", {lowest.agreement.finding}. "]
    if worst_pairs:
        words.append(tag("a", "See the worst classes as pictures", href=worst_pairs))
    return [tag("p", *words)]


def _figure(picture: Picture) -> Markup:
    image = void_tag("img", src=data_uri(picture.png, "png"), alt=picture.title, loading="lazy")
    shown = tag("a", image, href=picture.address) if picture.address else image
    words = tag("figcaption", tag("strong", picture.title), " ", picture.explained)
    return tag("figure", shown, words, class_="broad" if _is_broad(picture.png) else None)


def _is_broad(png: bytes) -> bool:
    """Whether a picture is much wider than high; False for what is no PNG, which the browser will not show either."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n") or len(png) < 24:
        return False
    width, height = struct.unpack(">II", png[16:24])
    return bool(width > BROAD * height)


def _shown_tissues(summaries: Sequence[CaseSummary]) -> list[str]:
    """Tissues that any scan has."""
    return [name for name in TITLES if any(summary.value(f"{name}_ml") for summary in summaries)]


def _table(order: Sequence[CaseSummary]) -> Markup:
    # a cavity is rare: its column is there when any scan has one
    columns = [c for c in COLUMNS if c.metric not in RARE_METRICS or any(s.value(c.metric) for s in order)]
    if any(summary.agreement for summary in order):
        columns[1:1] = SCORE_COLUMNS
    headings = [tag("th", "Picture", scope="col"), _heading("Scan", "Name of the scan", text=True)]
    headings += [tag("th", "Tissues", scope="col", class_="wide")]
    headings += [_heading(c.title, c.explained, sorted_now=c.metric == RANKED_BY) for c in columns]
    headings += [_heading("Look out", "Things to know before the numbers are used")]
    rows = [tag("tr", *_cells(summary, columns, rank)) for rank, summary in enumerate(order, start=1)]
    table = tag("table", tag("thead", tag("tr", *headings)), tag("tbody", *rows), id="cases")
    return tag("div", table, class_="scroll")


def _heading(title: str, explained: str, *, text: bool = False, sorted_now: bool = False) -> Markup:
    button = tag("button", title, type="button", title=explained, data_text=text or None)
    return tag("th", button, scope="col", aria_sort="descending" if sorted_now else "none")


def _cells(summary: CaseSummary, columns: Sequence[Column], rank: int) -> list[Markup]:
    picture = void_tag("img", src=data_uri(summary.thumbnail, "jpeg"), alt="", loading="lazy")
    cells = [
        tag("td", tag("a", picture, href=summary.page, tabindex=-1, aria_hidden="true"), class_="picture"),
        tag(
            "th", tag("a", summary.case_id, href=summary.page),
            tag("p", tag("strong", f"{rank}. "), summary.why, class_="why"),
            tag("p", summary.acquisition, class_="why"), scope="row", data_value=summary.case_id,
        ),
        tag("td", tissue_bar(summary), class_="wide"),
    ]  # fmt: skip
    for column in columns:
        value, status = _number(summary, column)
        shown = f"{value:,.{column.digits}f}".replace("-", "\u2212") if value is not None else BLANK
        cells.append(
            tag(
                "td", shown, data_label=column.title, data_value="" if value is None else f"{value:.6g}",
                title=None if status == "ok" else status, class_="number",
            )
        )  # fmt: skip
    cautions = summary.cautions
    cells.append(
        tag(
            "td", tag("details", tag("summary", len(cautions)), "; ".join(cautions)) if cautions else BLANK,
            data_label="Look out", data_value=len(cautions), class_="cautions",
        )
    )  # fmt: skip
    return cells


def _number(summary: CaseSummary, column: Column) -> tuple[float | None, str]:
    """Value of a column, and `ok` or why there is none."""
    if column.metric == RANKED_BY:
        return summary.affected_pct, summary.status("abnormal_pct")
    if column in SCORE_COLUMNS:
        if summary.agreement is None:
            return None, "not evaluated"
        value = summary.agreement.dice if column.metric == "dice" else summary.agreement.hd95_mm
        return value, "ok" if value is not None else "no class of the reference to score"
    return summary.value(column.metric), summary.status(column.metric)


def _explanation() -> Markup:
    return joined(
        (
            tag(
                "p",
                "The map gives each voxel of the lung one tissue; nobody annotated these scans. Abnormal is all lung "
                "that is neither healthy nor unclassified. Scans are ranked by that share, or by LAA-950 where it says "
                "emphysema (10 % or more) and the map shows less than half of it. Densities are counted on the scan's "
                "own voxels as ChestImagingPlatform defines them and are not corrected for kernel, dose or breath.",
            ),
            tag(
                "p",
                f"A number that cannot be had is left blank ({BLANK}) and says why when it is pointed at. All numbers "
                "of all regions: quantification.csv.",
            ),
        )
    )


def definition_list(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Names and values, one line each."""
    return tag("dl", *(joined((tag("dt", name), tag("dd", value))) for name, value in pairs), class_="facts")

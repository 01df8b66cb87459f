"""Pages as files: all in one, nothing fetched, text escaped, blanks with a reason, the worst scan first."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import find_browser, opened
from PIL import Image

from lungseg.evaluation.scores import ClassScore
from lungseg.report.agreement import Agreement
from lungseg.report.case_page import case_page
from lungseg.report.density import Histogram
from lungseg.report.html import data_block, document, tag
from lungseg.report.page import Picture, cohort_page
from lungseg.report.quantify import quantify
from lungseg.report.quantity_tables import CaseQuantities, Covariates
from lungseg.report.slices import encode_slices
from lungseg.report.summary import CaseSummary, ranked
from lungseg.tissue import TISSUES, Tissue

SHAPE, SPACING = (30, 40, 60), (5.0, 5.0, 5.0)
EVIL = '<img src=x onerror="alert(1)">&</script>'


def chest(consolidation: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, labels and lungs with some dense slices in the right lung."""
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[3:27, 8:34, 5:25] = 2
    lungs[3:27, 8:34, 35:55] = 1
    labels = np.minimum(lungs, 1)
    labels[4 : 4 + consolidation, 10:30, 6:24] = Tissue.CONSOLIDATION
    hu = np.where(lungs > 0, -850, 40).astype(np.int16)
    hu[labels == Tissue.CONSOLIDATION] = -50
    return hu, labels, lungs


def summary(case_id: str, consolidation: int, **quantity: Any) -> CaseSummary:
    hu, labels, lungs = chest(consolidation)
    rows = tuple(quantify(labels, lungs, hu, spacing_mm=SPACING, **quantity))
    status = "truncated" if quantity.get("truncated") else ""
    covariates = Covariates(kernel=EVIL, slice_thickness_mm=2.0, scan_status=status)
    stack = encode_slices(hu, labels, lungs, spacing_mm=SPACING, num_slices=8, width_px=96)
    return CaseSummary(
        case_id, CaseQuantities(rows, covariates, (EVIL,)), stack.thumbnail, 12.0, f"cases/{case_id}.html"
    )


def page_of(summary: CaseSummary, consolidation: int, **settings: int) -> str:
    hu, labels, lungs = chest(consolidation)
    confidence = np.where(lungs > 0, 200, 0).astype(np.uint8)
    sizes = {"num_slices": 8, "width_px": 96, **settings}
    stack = encode_slices(hu, labels, lungs, spacing_mm=SPACING, confidence=confidence, reference=labels, **sizes)
    values, counts = np.unique(hu[lungs > 0], return_counts=True)
    return case_page(
        summary, stack, histogram=Histogram(values.astype(float), counts), preview=stack.thumbnail, spacing_z_mm=5.0,
        provenance=[("Kernel", EVIL)], back="../index.html",
    )  # fmt: skip


def cohort(**settings: Any) -> str:
    summaries = [summary("mild", 2), summary("cut", 9, truncated=("left", "right", "whole")), summary("severe", 9)]
    return cohort_page(summaries, title=f"Cohort {EVIL}", **settings)


class Reader(HTMLParser):
    """Elements with their attributes, and the text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        while self.open and self.open.pop() != name:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open[-1:]):
            self.text += data + " "


@pytest.mark.parametrize("page", [cohort(), page_of(summary("one", 5), 5)], ids=["cohort", "scan"])
def test_a_page_fetches_nothing_runs_nothing_foreign_and_says_what_it_is_for(page: str) -> None:
    reader = Reader(page)
    for name, attributes in reader.elements:
        assert not [key for key in attributes if key.startswith("on")], attributes
        assert "style" not in attributes  # the policy would block it
        for key in ("src", "href"):
            value = attributes.get(key)
            if value is not None:
                wanted = (
                    r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+" if key == "src" else r"(\.\./)?[\w/]+\.(html|png)"
                )
                assert re.fullmatch(wanted, value), (name, value[:80])
    (policy,) = [a["content"] for n, a in reader.elements if n == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    for element in ("style", "script"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "Research use only" in reader.text
    assert EVIL in reader.text  # told, as text
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_the_worst_scan_is_told_first_and_why() -> None:
    reader = Reader(cohort(left_out={"lost": "no label map yet"}, pictures=[Picture("Training: loss", b"png")]))
    text = " ".join(reader.text.split())
    assert re.search(r"Most affected scan severe 13 % of the lung is abnormal: consolidation 13 %\.", text)
    assert text.index("severe 13") < text.index("mild ") < text.index("cut 3. no numbers: the lung is cut")
    assert "lost : no label map yet" in text
    assert "Training: loss" in text
    order = [a["data-value"] for n, a in reader.elements if n == "th" and a.get("scope") == "row"]
    assert order == ["severe", "mild", "cut"]
    assert "1. 13 % abnormal, most of it consolidation" in text
    assert [s.case_id for s in ranked([summary("b", 0), summary("a", 0)])] == ["a", "b"]


def pair(
    tissue: str, status: str, dice: float, hd95: float, *, reference: float = 10.0, mapped: float = 9.0
) -> ClassScore:
    """Scores of one class in mL and mm."""
    return ClassScore(
        "case", "patient", tissue, status, dice, dice, dice, dice, reference, mapped, mapped - reference, hd95, hd95,
        surface_dice=dice,
    )  # fmt: skip


GOOD = (pair("healthy", "scored", 0.9, 2.0), pair("ggo", "scored", 0.8, 6.0))
BAD = (
    pair("healthy", "scored", 0.7, 3.0), pair("ggo", "missed", 0.0, math.nan, mapped=0.0),
    pair("fibrosis", "false tissue", math.nan, math.nan, reference=0.0, mapped=4.0),
)  # fmt: skip


def evaluated(case_id: str, scores: tuple[ClassScore, ...]) -> CaseSummary:
    return dataclasses.replace(summary(case_id, 5), agreement=Agreement(scores))


def test_scores_stand_beside_the_numbers_and_the_least_agreeing_scan_is_told() -> None:
    good, bad = evaluated("good", GOOD), evaluated("bad", BAD)
    page = cohort_page([good, bad, summary("plain", 2)], title="t", worst_pairs="worst.html")
    reader = Reader(page)
    text = " ".join(reader.text.split())
    assert "Least like its reference: bad , mean DSC 0.35, ground glass missed." in text
    assert ("a", {"href": "worst.html"}) in reader.elements
    cells = [a for n, a in reader.elements if n == "td" and a.get("data-label") == "Mean DSC"]
    assert [c["data-value"] for c in cells] == ["0.35", "0.85", ""]  # equally affected scans go by name
    assert cells[2]["title"] == "not evaluated"
    hd95 = [a["data-value"] for n, a in reader.elements if n == "td" and a.get("data-label") == "Mean HD95 mm"]
    assert hd95 == ["3", "4", ""]  # missed pairs have none, false tissue counts nowhere
    assert "Mean DSC" not in cohort()
    scan = " ".join(Reader(page_of(bad, 5)).text.split())
    assert "Mean DSC 0.35, ground glass missed. Class Result DSC" in scan
    assert "Ground glass missed 0.00 \u2013 0.00 10.0 0.0" in scan
    assert "Fibrosis false tissue \u2013 \u2013 \u2013 0.0 4.0" in scan


def test_why_names_the_number_the_score_and_the_caution() -> None:
    one = evaluated("one", (pair("ggo", "scored", 0.4, 2.0),))
    first, score, caution = one.why.split("; ", 2)
    assert re.fullmatch(r"\d+ % abnormal, most of it consolidation", first)
    assert score == "mean DSC 0.40, ground glass 0.40"
    assert caution.startswith("look out: ")
    assert "DSC" not in evaluated("one", BAD[2:]).why


def test_emphysema_that_the_map_misses_ranks_a_scan_and_is_told() -> None:
    """The density is counted, the map is estimated: where they contradict each other the page says so."""
    hu, labels, lungs = chest(0)
    hu[lungs == 2] = -970
    rows = tuple(quantify(labels, lungs, hu, spacing_mm=SPACING))
    missed = CaseSummary("missed", CaseQuantities(rows))
    assert missed.affected_pct == pytest.approx(50.0)
    assert missed.finding.startswith("LAA-950 is 50 %: emphysema, which the map does not show.")
    assert any("the map is wrong there" in text for text in missed.cautions)
    assert [s.case_id for s in ranked([summary("severe", 9), missed])] == ["missed", "severe"]
    labels[lungs == 2] = Tissue.EMPHYSEMA
    found = CaseSummary("found", CaseQuantities(tuple(quantify(labels, lungs, hu, spacing_mm=SPACING))))
    assert found.missed_emphysema_pct is None
    assert found.finding == "50 % of the lung is abnormal: emphysema 50 %."
    assert not found.doubted_emphysema
    hu[lungs == 2] = -900
    doubted = CaseSummary("doubted", CaseQuantities(tuple(quantify(labels, lungs, hu, spacing_mm=SPACING))))
    assert doubted.cautions == ["the map shows emphysema in 50 % of the lung, but LAA-950 is 0.0 %: look at it"]


def test_numbers_that_cannot_be_had_are_blank_and_say_why() -> None:
    reader = Reader(cohort_page([summary("cut", 9, truncated=("whole",))], title="x"))
    cells = [a for n, a in reader.elements if n == "td" and "number" in (a.get("class") or "")]
    assert cells
    assert {(a["data-value"], a.get("title")) for a in cells} == {("", "truncated")}
    assert "the lung is cut by the field of view" in reader.text
    assert "no numbers: truncated" in {a.get("aria-label") for n, a in reader.elements if n == "svg"}


def test_the_size_of_a_page_does_not_grow_with_the_scan() -> None:
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 100, (200, 200, 200)).astype(np.int16)
    labels = rng.integers(1, 6, hu.shape).astype(np.uint8)
    stack = encode_slices(hu, labels, labels, spacing_mm=(1, 1, 1), num_slices=12, width_px=128)
    assert len(stack.ct) <= 12
    assert stack.size == (128, 128)
    assert all(Image.open(io.BytesIO(data)).size == (128, 128) for data in (*stack.ct, *stack.layers["tissue"]))
    assert len(stack.thumbnail) < 20_000


def test_slices_keep_aspect_side_and_colour() -> None:
    hu, labels, lungs = chest(6)
    labels[:, 10:14, 50:54] = Tissue.EMPHYSEMA  # in the patient's left lung
    stack = encode_slices(hu, labels, lungs, spacing_mm=(5.0, 2.5, 5.0), num_slices=30, width_px=300)
    assert stack.index[stack.start] in range(4, 10), "within the consolidation"
    assert stack.index == tuple(range(3, 27))
    width, height = stack.size
    assert width == 300
    assert height == pytest.approx(300 * (26 + 2 * 4) * 2.5 / ((50 + 2 * 2) * 5.0), abs=2)  # lungs and 8 mm around
    picture = Image.open(io.BytesIO(stack.layers["tissue"][stack.start])).convert("RGBA")
    pixels = np.array(picture)
    for tissue, right in ((Tissue.CONSOLIDATION, False), (Tissue.EMPHYSEMA, True)):
        hit = (pixels[..., :3] == TISSUES[tissue].colour).all(axis=-1) & (pixels[..., 3] > 0)
        assert hit.any()
        assert (np.nonzero(hit)[1].mean() > width / 2) == right, "the patient's left on the viewer's right"
    assert pixels[0, 0, 3] == 0
    assert max(stack.abnormal_pct) > 20


def test_elements_escape_what_they_are_given() -> None:
    assert tag("p", EVIL, title=EVIL).count("<") == 2
    assert tag("a", tag("b", "x"), hidden=True, data_x=None, class_="c") == '<a hidden class="c"><b>x</b></a>'
    block = data_block("d", {"text": "</script><script>alert(1)</script>&"})
    assert block.count("<") == 2
    assert "<title>&lt;b&gt;</title>" in document("<b>", [])


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> str:
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium or Chrome is installed")
    return found


def test_a_browser_sorts_the_table_without_complaint(browser: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(cohort(), encoding="utf-8")
    names = "Array.from(document.querySelectorAll('#cases tbody th')).map(cell => cell.dataset.value).join()"
    click = "Array.from(document.querySelectorAll('#cases button')).find(b => b.textContent === %r).click()"
    with opened(browser, tmp_path / "profile") as page:
        for width in (1280, 390):
            page.open(tmp_path / "index.html", width=width)
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run(names) == "severe,mild,cut"
            for title, first, second in (
                ("Affected %", "mild,severe,cut", "severe,mild,cut"),  # blanks stay last
                ("Scan", "cut,mild,severe", "severe,mild,cut"),
                ("Consolidation %", "severe,mild,cut", "mild,severe,cut"),
            ):
                for wanted in (first, second):
                    page.run(click % title)
                    assert page.run(names) == wanted, title
                sorted_by = "document.querySelectorAll('#cases th[aria-sort$=ending]').length"
                assert page.run(sorted_by) == 1
            assert page.run("document.images.length && Array.from(document.images).every(i => i.naturalWidth > 0)")
        assert page.troubles == []


def test_the_browser_sees_what_goes_wrong(browser: str, tmp_path: Path) -> None:
    foreign = cohort().replace("<h1>", "<script>document.title = 'run'</script><img src='http://localhost/x.png'><h1>")
    (tmp_path / "index.html").write_text(foreign, encoding="utf-8")
    with opened(browser, tmp_path / "profile") as page:
        page.open(tmp_path / "index.html", width=800)
        assert page.run("document.title") != "run"
        assert len(page.troubles) >= 2


def test_a_browser_moves_through_the_slices(browser: str, tmp_path: Path) -> None:
    (tmp_path / "one.html").write_text(page_of(summary("one", 5), 5), encoding="utf-8")
    shown = "['ct', 'layer-tissue', 'layer-reference', 'layer-uncertainty'].map(name => document.getElementById(name))"
    with opened(browser, tmp_path / "profile") as page:
        for width in (1280, 390):
            page.open(tmp_path / "one.html", width=width)
            assert page.run("document.documentElement.scrollWidth") <= width
            before = page.run("document.getElementById('ct').src + document.getElementById('slice-text').textContent")
            page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowUp', bubbles: true}))"
                     .replace("document.dispatch", "document.body.dispatch"))  # fmt: skip
            after = page.run("document.getElementById('ct').src + document.getElementById('slice-text').textContent")
            assert before != after
            page.run("(() => { const s = document.getElementById('slice'); s.value = 0; "
                     "s.dispatchEvent(new Event('input')); })()")  # fmt: skip
            assert page.run("document.getElementById('slice-text').textContent").startswith("slice ")
            for layer in ("reference", "uncertainty", ""):
                page.run(f"document.querySelector('input[name=layer][value=\"{layer}\"]').click()")
                visible = page.run(f"{shown}.filter(image => !image.hidden).map(image => image.id).join()")
                assert visible == ("ct" if not layer else f"ct,layer-{layer}")
            assert page.run("Array.from(document.images).every(i => i.naturalWidth > 0)")
        assert page.troubles == []

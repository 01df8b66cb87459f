"""One self-contained HTML page of the class-case pairs that each method did worst on.

It opens from disk, needs no script and no other file, and fits a telephone. All text is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lungseg.evaluation.scores import ClassScore
from lungseg.evaluation.summary import Summary
from lungseg.evaluation.tables import header_lines
from lungseg.report.overlays import FOOTER, WINDOW_LEVEL_HU, WINDOW_WIDTH_HU
from lungseg.report.worst_slices import PREDICTION_COLOUR, REFERENCE_COLOUR, WorstSlice, slice_png

TITLE = "Worst class-case pairs"
STYLE = """
:root{color-scheme:light dark;--fg:#17191c;--faint:#5b6168;--bg:#fff;--card:#f4f5f6;--line:#d5d8db}
@media (prefers-color-scheme:dark){:root{--fg:#f2f2f2;--faint:#a4aab0;--bg:#101214;--card:#1b1e21;--line:#33383d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1rem;font:16px/1.45 system-ui,sans-serif;color:var(--fg);
  background:var(--bg)}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;overflow-wrap:anywhere}
h3{font-size:1rem;margin:0 0 .5rem;overflow-wrap:anywhere}
.use{font-weight:700}.faint,summary{color:var(--faint)}
article{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem;margin:.8rem 0}
.pictures{display:flex;flex-wrap:wrap;gap:.5rem}
figure{margin:0;flex:1 1 17rem;max-width:31rem}figure img{display:block;width:100%;height:auto;border-radius:.25rem}
figcaption{font-size:.85rem;color:var(--faint)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.5rem,1fr));gap:.3rem .8rem;margin:.6rem 0 0}
dl div{min-width:0}dt{font-size:.8rem;color:var(--faint)}dd{margin:0;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:1.6rem;height:0;border-top:3px solid;vertical-align:middle;margin-right:.3rem}
li{margin:.2rem 0;overflow-wrap:anywhere}
"""


@dataclass(frozen=True)
class WorstPair:
    """One entry of the page."""

    method: str
    """Name of the method."""
    score: ClassScore
    """What it scored."""
    picture: WorstSlice | None = None
    """Its worst slice; None if it could not be drawn."""
    problem: str = ""
    """Why there is no picture, in words and free of paths."""


def worst_cases_html(pairs: Sequence[WorstPair], summaries: Sequence[Summary]) -> str:
    """The page.

    Parameters
    ----------
    pairs : sequence of WorstPair
        Grouped by method, the worst first. Case ids stand on the page: the caller sees to it that they name nobody.
    summaries : sequence of Summary
        Of the same methods, for the counts and definitions; their order is that of the page.

    Returns
    -------
    str
        HTML; equal input gives equal text with the same matplotlib.
    """
    methods = list(dict.fromkeys([*(s.method for s in summaries if not s.is_oracle), *(p.method for p in pairs)]))
    body = [
        f"<h1>{TITLE}</h1>",
        f'<p class="use">{escape(FOOTER)}</p>',
        f"<p>{_key(REFERENCE_COLOUR, 'solid')}reference &ensp; {_key(PREDICTION_COLOUR, 'dashed')}prediction</p>",
        '<p class="faint">The axial slice in which both differ most. Tinted: what only one of them holds. Lung window '
        f"(level {WINDOW_LEVEL_HU:g} HU, width {WINDOW_WIDTH_HU:g} HU); the patient's right is on the left. Missed "
        "pairs first, then the lowest DSC.</p>",
    ]
    for method in methods:
        body.append(f"<h2>{escape(method) or 'Prediction'}</h2>")
        own = [pair for pair in pairs if pair.method == method]
        body += [_article(pair) for pair in own] or ["<p>No class-case pair with a prediction to show.</p>"]
    notes = "".join(f"<li>{escape(line)}</li>" for line in header_lines(summaries))
    body.append(f"<h2>Counts and definitions</h2><ul>{notes}</ul>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _article(pair: WorstPair) -> str:
    """One pair: pictures and numbers."""
    score = pair.score
    place = "" if score.slice_index is None else f", slice {score.slice_index + 1}"
    title = f"{score.tissue} \u2013 case {score.case_id}{place}"
    numbers = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _numbers(score))
    return f"<article>\n<h3>{escape(title)}</h3>\n{_pictures(pair)}\n<dl>{numbers}</dl>\n</article>"


def _pictures(pair: WorstPair) -> str:
    """CT beside the outlines; the outlines alone without a CT."""
    cut = pair.picture
    if cut is None:
        return f'<p class="faint">No picture: {escape(pair.problem or "the volumes could not be read")}.</p>'
    where = f"axial slice {cut.slice_index + 1} of {cut.num_slices}"
    name = f"{pair.score.tissue} of case {pair.score.case_id}, {where}"
    figures = []
    if cut.image_hu is not None:
        figures.append(_figure(slice_png(cut, outlines=False), f"CT alone: {name}", f"CT, {where}"))
    figures.append(_figure(slice_png(cut), f"Outlines of prediction and reference: {name}", f"outlines, {where}"))
    return f'<div class="pictures">{"".join(figures)}</div>'


def _figure(png: bytes, description: str, caption: str) -> str:
    """One picture inside the page."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(description)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _key(colour: tuple[int, int, int], style: str) -> str:
    """Line of the legend."""
    return f'<span class="key" style="border-top-style:{style};border-color:rgb{colour}"></span>'


def _numbers(score: ClassScore) -> list[tuple[str, str]]:
    """Names and values shown of one pair."""
    return [
        ("result", score.status),
        ("DSC", _text(score.dice, 3)),
        ("NSD", _text(score.surface_dice, 3)),
        ("HD95", _text(score.hd95_mm, 1, " mm")),
        ("HD95 penalised", _text(score.penalised_hd95_mm, 1, " mm")),
        ("ASSD", _text(score.assd_mm, 2, " mm")),
        ("precision", _text(score.precision, 3)),
        ("recall", _text(score.recall, 3)),
        ("reference", _text(score.reference_ml, 1, " mL")),
        ("prediction", _text(score.predicted_ml, 1, " mL")),
        ("patient", score.patient_id),
    ]


def _text(value: float, digits: int, unit: str = "") -> str:
    """A number with its unit; a dash if there is none."""
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "\u2013"

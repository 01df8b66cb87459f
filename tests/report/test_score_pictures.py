"""The box plot: same bytes, no metadata, a point for every pair, n under every box."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest

from lungseg.evaluation.scores import ClassScore
from lungseg.report.score_pictures import score_boxplot_png
from lungseg.tissue import TISSUES, Tissue

NAN = math.nan


def score(case: str, tissue: str, dice: float, hd95: float) -> ClassScore:
    status = "missed" if dice == 0 else "scored"
    return ClassScore(case, case, tissue, status, dice, dice, dice, dice, 10.0, 9.0, -1.0, hd95, hd95)


def rows(tissue: str, values: list[float]) -> list[ClassScore]:
    return [score(f"c{i:02d}", tissue, v, NAN if v == 0 else 20 * (1 - v)) for i, v in enumerate(values)]


SPREAD = [0.2, 0.5, 0.6, 0.7, 0.8, 0.95]


def pixels(png: bytes) -> np.ndarray:
    from matplotlib import image

    return np.rint(image.imread(io.BytesIO(png), format="png")[..., :3] * 255).astype(int)


def on_white(tissue: Tissue) -> np.ndarray:
    """Colour of a box: 45 % of the tissue's colour on white."""
    return np.rint(0.45 * np.array(TISSUES[tissue].colour) + 0.55 * 255).astype(int)


def columns(picture: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Columns that hold this colour, of the upper panel."""
    upper = picture[: picture.shape[0] // 2]
    return np.flatnonzero((np.abs(upper - colour).max(axis=-1) <= 2).sum(axis=0) > 10)


def test_same_scores_same_bytes_and_nothing_but_pixels():
    scores = {"a": rows("ggo", SPREAD), "b": rows("ggo", SPREAD[::-1])}
    first = score_boxplot_png(scores)
    assert first == score_boxplot_png(scores)
    assert first == score_boxplot_png({"a": scores["a"][::-1], "b": scores["b"]}), "order of the cases"
    at, names = 8, set()
    while at < len(first):
        (length,) = struct.unpack(">I", first[at : at + 4])
        names.add(first[at + 4 : at + 8])
        at += 12 + length
    assert names <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


def test_user_settings_do_not_matter():
    import matplotlib

    scores = {"a": rows("ggo", SPREAD), "b": rows("fibrosis", SPREAD)}
    plain = score_boxplot_png(scores)
    settings = {
        "savefig.dpi": 40,
        "lines.marker": "s",
        "lines.linestyle": "--",
        "boxplot.notch": True,
        "font.family": "monospace",
        "axes.facecolor": "red",
        "text.color": "red",
    }
    with matplotlib.rc_context(settings):
        assert score_boxplot_png(scores) == plain


def test_one_method_has_the_colours_of_its_tissues_in_their_order():
    scores = [*rows("healthy", SPREAD), *rows("fibrosis", SPREAD)]
    picture = pixels(score_boxplot_png({"only": scores}))
    healthy, fibrosis = (columns(picture, on_white(t)) for t in (Tissue.HEALTHY, Tissue.FIBROSIS))
    assert healthy.size > 30
    assert healthy.max() < fibrosis.min()


def test_boxes_lie_at_their_quartiles():
    """Quartiles of SPREAD are 0.525 and 0.775; the panel runs from 0 to 1.03 over 2.7 inches at 110 dpi."""
    picture = pixels(score_boxplot_png({"only": rows("fibrosis", SPREAD)}))
    upper = picture[: picture.shape[0] // 2]
    inside = (np.abs(upper - on_white(Tissue.FIBROSIS)).max(axis=-1) <= 2).sum(axis=1) > 5
    height = np.ptp(np.flatnonzero(inside))
    assert height == pytest.approx(0.25 / 1.03 * 2.7 * 110, abs=4)


def test_two_methods_are_told_apart_and_named():
    one = score_boxplot_png({"a": rows("ggo", SPREAD)})
    two = score_boxplot_png({"a": rows("ggo", SPREAD), "b": rows("ggo", SPREAD)})
    assert pixels(two).shape[0] > pixels(one).shape[0], "room for the legend"
    first, second = (columns(pixels(two), on_white(t)) for t in (Tissue.HEALTHY, Tissue.EMPHYSEMA))
    assert first.size > 20
    assert second.size > 20


def texts_of(monkeypatch, scores) -> list[str]:
    from matplotlib.axes import Axes

    seen, draw = [], Axes.text

    def spy(self, x, y, text, **options):
        seen.append(text)
        return draw(self, x, y, text, **options)

    monkeypatch.setattr(Axes, "text", spy)
    score_boxplot_png(scores, hd95_name="border voxels")
    return seen


def test_n_stands_under_each_box_and_missed_pairs_are_counted(monkeypatch):
    absent = ClassScore("z", "z", "ggo", "absent", NAN, NAN, NAN, NAN, 0.0, 0.0, 0.0, NAN, NAN)
    scores = {"m_1 $x$ <b>": [*rows("ggo", [*SPREAD, 0.0, 0.0]), absent, *rows("ild", [0.5])]}
    texts = texts_of(monkeypatch, {**scores, "other": []})
    assert texts.count("n=8") == 1, "Dice: missed pairs are points at 0"
    assert texts.count("n=6") == 1, "HD95: detected pairs only"
    assert texts.count("n=1") == 2
    assert texts.count("n=0") == 4
    assert texts.count("2 missed") == 2
    assert {"Ground glass", "ild", "m_1 $x$ <b>", "HD95 (mm), border voxels"} <= set(texts)


@pytest.mark.parametrize("scores", [{}, {"a": []}, {"a": rows("ggo", [0.0])}, {"a": rows("ggo", [0.5])}])
def test_nothing_or_one_point_still_gives_a_picture(scores):
    assert pixels(score_boxplot_png(scores)).shape[2] == 3

"""The page of the worst pairs: which pairs, which slice, what the picture shows, and a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.evaluation.scores import ClassScore
from lungseg.evaluation.summary import summarise_methods
from lungseg.report.worst_cases import WorstPair, worst_cases_html
from lungseg.report.worst_slices import PREDICTION_COLOUR, REFERENCE_COLOUR, slice_png, worst_pairs, worst_slice

NAN = math.nan
SPACING = (5.0, 1.0, 2.0)
SHAPE = (6, 60, 50)


def score(case: str, dice: float, *, status: str = "scored", hd95: float = 5.0, ml: float = 10.0, **more) -> ClassScore:
    hd95 = NAN if dice == 0 else hd95
    return ClassScore(case, "p-" + case, "ggo", status, dice, dice, NAN, dice, ml, 1.0, 1.0 - ml, hd95, hd95, **more)


def volumes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class 3: 16 voxels in slice 1, half of them at fault; 120 in slice 4, where the prediction lies too far to the
    patient's left; most of it, 500, in slice 2, where both agree."""
    hu = np.full(SHAPE, -850, dtype=np.int16)
    reference = np.zeros(SHAPE, dtype=np.uint8)
    reference[:, 10:50, 10:40] = 1
    prediction = reference.copy()
    reference[2, 12:32, 12:37] = prediction[2, 12:32, 12:37] = 3
    reference[1, 20:24, 20:24] = reference[4, 20:32, 12:22] = 3
    prediction[1, 20:24, 22:26] = prediction[4, 20:32, 24:34] = 3
    return hu, prediction, reference


def cut(**changes):
    hu, prediction, reference = volumes()
    arguments = {"spacing_mm": SPACING, "volume_hu": hu} | changes
    return worst_slice(prediction, reference, [3], **arguments)


def pixels(png: bytes) -> np.ndarray:
    from matplotlib import image

    return np.rint(image.imread(io.BytesIO(png), format="png")[..., :3] * 255).astype(int)


def columns_of(picture: np.ndarray, colour: tuple[int, int, int], *, tolerance: int = 12) -> np.ndarray:
    return np.nonzero((np.abs(picture - np.array(colour)) <= tolerance).all(axis=-1))[1]


def test_missed_pairs_come_first_then_dice_then_hd95():
    scores = [
        score("good", 0.9),
        score("far", 0.4, hd95=50.0),
        score("near", 0.4, hd95=3.0),
        score("missed-small", 0.0, status="missed", ml=2.0),
        score("missed-large", 0.0, status="missed", ml=200.0),
        score("touching", 0.0, status="scored"),
        score("no-file", 0.0, status="missing prediction"),
        ClassScore("false", "p", "ggo", "false tissue", NAN, NAN, NAN, NAN, 0.0, 3.0, 3.0, NAN, NAN),
    ]
    wanted = ["missed-large", "missed-small", "touching", "far", "near", "good"]
    assert [s.case_id for s in worst_pairs(scores, 99)] == wanted
    assert [s.case_id for s in worst_pairs(scores[::-1], 2)] == wanted[:2]
    assert worst_pairs(scores, 0) == []
    slices = [score("a", 0.5, slice_index=z) for z in (7, 2, 4)]
    assert [s.slice_index for s in worst_pairs(slices, 3)] == [2, 4, 7], "equal scores in the order of the slices"


def test_the_slice_is_the_one_with_most_difference_and_is_cropped():
    found = cut()
    assert (found.slice_index, found.num_slices) == (4, 6)
    # labelled rows 10 to 50 and columns 10 to 40; margin 12 mm: 12 rows of 1 mm, cut off at the top, and 6 columns of 2
    assert found.reference.shape == (60, 42) == found.image_hu.shape
    assert found.reference.sum() == found.prediction.sum() == 120
    assert found.spacing_mm == (1.0, 2.0)
    hu, prediction, _ = volumes()
    assert worst_slice(prediction, prediction, [3], spacing_mm=SPACING).slice_index == 2, "no difference: most tissue"
    assert cut(slice_index=1).slice_index == 1
    empty = np.zeros(SHAPE, dtype=np.uint8)
    assert worst_slice(empty, empty, [3], spacing_mm=SPACING, volume_hu=hu).reference.shape == SHAPE[1:]


def test_views_of_several_ids_and_faults():
    _, prediction, reference = volumes()
    both = worst_slice(prediction, reference, [1, 3], spacing_mm=SPACING)
    assert np.array_equal(both.reference, both.prediction)
    with pytest.raises(InputError, match="one shape"):
        worst_slice(prediction, reference[:-1], [3], spacing_mm=SPACING)
    with pytest.raises(InputError, match="slice 6"):
        cut(slice_index=6)


def test_the_picture_shows_both_outlines_on_their_sides():
    png = slice_png(cut())
    assert png == slice_png(cut())
    assert b"atplotlib" not in png
    picture = pixels(png)
    assert max(picture.shape) == 484
    assert picture.shape[0] / picture.shape[1] == pytest.approx(60 / 84, abs=0.01), "millimetres, not voxels"
    reference, prediction = columns_of(picture, REFERENCE_COLOUR), columns_of(picture, PREDICTION_COLOUR)
    assert min(reference.size, prediction.size) > 100
    assert reference.max() < prediction.min(), "x runs to the patient's left, which is on the viewer's right"
    grey = 255 * (-850 + 1350) / 1500  # level -600 HU, width 1500 HU
    for tint, place in ((REFERENCE_COLOUR, reference), (PREDICTION_COLOUR, prediction)):
        filled = columns_of(picture, tuple(0.35 * c + 0.65 * grey for c in tint), tolerance=4)
        assert filled.size > 2000, "what only one side holds is tinted in its colour"
        assert place.min() < np.median(filled) < place.max()
    plain = pixels(slice_png(cut(), outlines=False))
    assert columns_of(plain, REFERENCE_COLOUR).size == columns_of(plain, PREDICTION_COLOUR).size == 0
    assert columns_of(pixels(slice_png(cut(volume_hu=None))), REFERENCE_COLOUR).size > 100


class Page(HTMLParser):
    """What the page holds; fails on a tag that is closed in the wrong order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.images, self.links, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src", "srcset", "action")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


HOSTILE = '<script>alert(1)</script>" onload="x'


def page(**changes) -> str:
    scores = {HOSTILE: [score("c1<b>", 0.3), score("no-file", 0.0, status="missing prediction")], "other": []}
    pairs = [WorstPair(HOSTILE, scores[HOSTILE][0], cut(**changes))]
    return worst_cases_html(pairs, summarise_methods(scores, num_bootstrap=10))


def test_the_page_is_one_file_without_scripts():
    text = page()
    found = Page(text)
    assert len(found.images) == 2, "CT and outlines"
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text
    assert all(image["alt"] for image in found.images)
    png = base64.b64decode(found.images[1]["src"].split(",")[1])
    assert png == slice_png(cut())
    assert text == page()


def test_text_is_escaped_and_the_rules_stand_on_the_page():
    found = Page(page())
    for phrase in (
        HOSTILE,
        "Research use only",
        "ggo – case c1<b>",
        "axial slice 5 of 6",
        "0.300",
        "5.0 mm",
        "Without a prediction, scored as missed: no-file.",
        "95th percentiles",
        "No class-case pair with a prediction to show.",
    ):
        assert phrase in found.text, phrase
    assert "nan" not in found.text.split()


def test_a_pair_without_ct_or_picture_says_so():
    assert len(Page(page(volume_hu=None)).images) == 1
    pair = WorstPair("m", score("c", 0.1), None, "the prediction <lies> elsewhere")
    found = Page(worst_cases_html([pair], ()))
    assert found.images == []
    assert "No picture: the prediction <lies> elsewhere." in found.text


def test_user_settings_do_not_matter():
    import matplotlib

    plain = slice_png(cut())
    settings = {"image.origin": "lower", "contour.linewidth": 9, "lines.marker": "s", "lines.dashed_pattern": [9, 9]}
    with matplotlib.rc_context(settings):
        assert slice_png(cut()) == plain

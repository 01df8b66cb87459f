"""The preview picture: same bytes, no metadata, right colours in the right place, right way up."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.report.density import Histogram
from lungseg.report.overlays import disease_focus, format_ml, preview_figure_png, scale_bar_mm
from lungseg.tissue import TISSUES, Tissue

SPACING = (3.0, 2.0, 2.0)
SHAPE = (30, 50, 70)


def phantom() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two boxes of lung in soft tissue; ground glass low in the patient's right lung, fibrosis high in the left."""
    hu = np.full(SHAPE, 40, dtype=np.int16)
    lungs = np.zeros(SHAPE, dtype=np.uint8)
    lungs[4:26, 10:40, 8:30] = 2
    lungs[4:26, 10:40, 40:62] = 1
    labels = (lungs > 0).astype(np.uint8)
    labels[5:14, 18:34, 12:26] = Tissue.GGO
    labels[20:24, 14:20, 46:52] = Tissue.FIBROSIS
    for label, density in ((1, -850), (Tissue.GGO, -600), (Tissue.FIBROSIS, -450)):
        hu[labels == label] = density
    return hu, labels, lungs


def pixels(png: bytes) -> np.ndarray:
    from matplotlib import image

    return np.rint(image.imread(io.BytesIO(png), format="png")[..., :3] * 255).astype(int)


def chunks(png: bytes) -> list[str]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    names, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        names.append(png[at + 4 : at + 8].decode())
        at += 12 + length
    return names


def count(picture: np.ndarray, colour: tuple[int, int, int], *, tolerance: int = 0) -> int:
    return int(np.count_nonzero((np.abs(picture - np.array(colour)) <= tolerance).all(axis=-1)))


def blended(tissue: Tissue, density: float, alpha: float) -> tuple[int, int, int]:
    """Colour of a tissue over CT of one density in the lung window (level -600, width 1500)."""
    grey = 255 * min(max((density + 1350) / 1500, 0), 1)
    red, green, blue = (round(alpha * channel + (1 - alpha) * grey) for channel in TISSUES[tissue].colour)
    return red, green, blue


def render(**changes) -> bytes:
    hu, labels, lungs = phantom()
    arguments = {"volume_hu": hu, "labels": labels, "lungs": lungs, "spacing_mm": SPACING, "title": "case"} | changes
    return preview_figure_png(**arguments)


def test_same_input_same_bytes_and_nothing_but_pixels():
    first = render()
    assert first == render()
    assert set(chunks(first)) <= {"IHDR", "pHYs", "IDAT", "IEND"}, "no text, time stamp or software name"
    assert b"atplotlib" not in first


def test_user_settings_and_pyplot_are_left_alone_and_do_not_matter():
    import matplotlib

    plain = render()
    settings = {
        "savefig.dpi": 40,
        "savefig.bbox": "tight",
        "image.origin": "lower",
        "image.cmap": "jet",
        "figure.facecolor": "red",
        "font.family": "monospace",
    }
    with matplotlib.rc_context(settings):
        assert render() == plain


def test_the_legend_shows_each_class_and_the_overlay_its_place():
    picture = pixels(render())
    legend = {tissue: count(picture, TISSUES[tissue].colour) for tissue in Tissue}
    for tissue in (Tissue.HEALTHY, Tissue.EMPHYSEMA, Tissue.GGO, Tissue.FIBROSIS, Tissue.CONSOLIDATION):
        assert legend[tissue] > 200, tissue
    assert legend[Tissue.CAVITY] == 0, "a class outside the mixture is listed only where it is found"
    assert count(picture, blended(Tissue.GGO, -600, 0.55), tolerance=3) > 2000
    assert count(picture, blended(Tissue.HEALTHY, -850, 0.20), tolerance=3) > 2000


def test_cavity_and_unclassified_are_listed_where_found():
    _, labels, _ = phantom()
    labels[15, 12, 12], labels[16, 12, 12] = Tissue.CAVITY, 255
    picture = pixels(render(labels=labels))
    assert count(picture, TISSUES[Tissue.CAVITY].colour) > 200
    assert count(picture, (190, 190, 190)) > 200


def test_the_patients_right_is_on_the_left_and_superior_up():
    picture = pixels(render())
    height, width = picture.shape[:2]
    ggo = (np.abs(picture - np.array(blended(Tissue.GGO, -600, 0.55))) <= 3).all(axis=-1)
    rows, columns = np.nonzero(ggo)
    # Without a reference there are two columns of panels, then the legend of 2.9 inches at 110 dpi.
    panel_centre = (width - 2.9 * 110) * 0.75
    upper = rows < height / 2  # axial and, below it, the coronal and sagittal panels
    assert np.median(columns[upper]) < panel_centre - 20, "ground glass of the right lung, in the axial plane"
    # In the coronal and sagittal planes it lies low in the lung: below healthy tissue.
    healthy = (np.abs(picture - np.array(blended(Tissue.HEALTHY, -850, 0.20))) <= 3).all(axis=-1)
    bottom = slice(int(height * 0.68), height)
    assert np.median(np.nonzero(ggo[bottom])[0]) > np.median(np.nonzero(healthy[bottom])[0])


def test_the_reference_adds_a_column():
    _, labels, _ = phantom()
    reference = np.where(labels == Tissue.GGO, Tissue.CONSOLIDATION, labels).astype(np.uint8)
    alone, beside = pixels(render()), pixels(render(reference=reference))
    assert beside.shape[0] == alone.shape[0]
    assert beside.shape[1] > alone.shape[1] + 300
    assert count(alone, blended(Tissue.CONSOLIDATION, -600, 0.55), tolerance=3) == 0
    assert count(beside, blended(Tissue.CONSOLIDATION, -600, 0.55), tolerance=3) > 2000


def test_uncertainty_adds_a_column_and_the_histogram_its_thresholds():
    hu, _, lungs = phantom()
    sure = np.where(lungs > 0, 255, 0).astype(np.uint8)
    doubtful = np.where(lungs > 0, 0, 0).astype(np.uint8)
    alone, with_sure = pixels(render()), pixels(render(confidence=sure))
    assert with_sure.shape[0] == alone.shape[0]
    assert with_sure.shape[1] > alone.shape[1] + 300
    # magma ends in a pale yellow (252, 253, 191), here over CT of -850 HU at an opacity of 0.85
    pale = tuple(round(0.85 * channel + 0.15 * 255 * (-850 + 1350) / 1500) for channel in (252, 253, 191))
    assert count(pixels(render(confidence=doubtful)), pale, tolerance=4) > 2000
    assert count(with_sure, pale, tolerance=4) < 20
    values, counts = np.unique(hu[lungs > 0], return_counts=True)
    drawn = render(histogram=Histogram(values.astype(float), counts))
    changed = (pixels(drawn) != alone).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert columns.min() > alone.shape[1] - 2.9 * 110, "in the column of the legend"
    orange = (np.abs(pixels(drawn)[rows, columns] - np.array([255, 157, 46])) <= 40).all(axis=-1)
    assert orange.sum() > 100, "threshold lines"
    assert drawn == render(histogram=Histogram(values.astype(float), counts))
    with pytest.raises(InputError, match="one 3-D shape"):
        render(confidence=sure[1:])


def test_panels_keep_the_aspect_of_the_patient():
    """A cube of 40 mm on a 5 x 1 x 2 mm grid is a square in each plane."""
    spacing, shape = (5.0, 1.0, 2.0), (20, 100, 50)
    labels = np.zeros(shape, dtype=np.uint8)
    labels[6:14, 30:70, 15:35] = Tissue.CONSOLIDATION
    lungs = np.full(shape, 1, dtype=np.uint8)
    hu = np.full(shape, -300, dtype=np.int16)
    picture = pixels(render(volume_hu=hu, labels=labels, lungs=lungs, spacing_mm=spacing))
    hit = (np.abs(picture - np.array(blended(Tissue.CONSOLIDATION, -300, 0.55))) <= 3).all(axis=-1)
    filled = np.flatnonzero(hit.sum(axis=1) > 40)
    parts = np.split(filled, np.flatnonzero(np.diff(filled) > 10) + 1)
    assert len(parts) == 3, "three planes"
    for part in parts:
        wide = np.median(hit[part].sum(axis=1))
        assert len(part) == pytest.approx(wide, rel=0.06)


def test_focus_is_in_the_largest_lesion_and_works_without_one():
    _, labels, lungs = phantom()
    z, y, x = disease_focus(labels, lungs, spacing_mm=SPACING)
    assert labels[z, y, x] == Tissue.GGO
    assert abs(x - 18.5) < 4
    healthy = (lungs > 0).astype(np.uint8)
    z, y, x = disease_focus(healthy, lungs, spacing_mm=SPACING)
    assert lungs[z, y, x] != 0
    assert disease_focus(np.zeros_like(labels), np.zeros_like(lungs), spacing_mm=SPACING) == (15, 25, 35)


def test_a_single_diseased_voxel_is_found():
    labels = np.ones((40, 40, 40), dtype=np.uint8)
    labels[7, 11, 13] = Tissue.CONSOLIDATION
    assert disease_focus(labels, labels, spacing_mm=(0.6, 0.6, 0.6)) == (7, 11, 13)


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 4, 90), (6, 6, 6)])
def test_odd_shapes_and_empty_maps_are_drawn(shape):
    empty = np.zeros(shape, dtype=np.uint8)
    png = preview_figure_png(
        np.zeros(shape, np.int16), empty, empty, spacing_mm=(1, 1, 1), title="$not$ math\\frac", reference=empty
    )
    assert pixels(png).std() > 0


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"labels": np.zeros((2, 2, 2), np.uint8)}, "one 3-D shape"),
        ({"labels": np.zeros(SHAPE, np.int64)}, "must be uint8"),
        ({"reference": np.zeros(SHAPE, float)}, "must be uint8"),
        ({"spacing_mm": (1, 1, 0)}, "strictly positive"),
    ],
)
def test_bad_input_is_named(changes, phrase):
    with pytest.raises(InputError, match=phrase):
        render(**changes)


def test_scale_bar_and_volumes_for_people():
    assert [scale_bar_mm(width) for width in (300, 83, 40, 1)] == [50.0, 20.0, 20.0, 1.0]
    assert [format_ml(ml) for ml in (0.0, 3.14159, 99.94, 100.4, 4512.3)] == ["0.0", "3.1", "99.9", "100", "4,512"]

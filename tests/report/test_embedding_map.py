"""The map of an embedding: directions and centres as computed by hand, and a picture that says nothing else."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lungseg.errors import InputError
from lungseg.report.embedding_map import MAX_POINTS, embedding_map_png, project_tokens
from lungseg.tissue import TISSUES, Tissue

NAMES = (Tissue.HEALTHY, Tissue.EMPHYSEMA, Tissue.CONSOLIDATION)


def tokens(seed: int = 0, number: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three groups along the fourth of six channels, their posteriors, and HU."""
    rng = np.random.default_rng(seed)
    group = np.arange(number) % 3
    values = rng.normal(0, [0.1, 0.1, 0.1, 0.3, 1.0, 0.1], (number, 6))
    values[:, 3] += 10.0 * group
    return values.astype(np.float32), np.eye(3, dtype=np.float32)[group], np.array([-850.0, -970.0, -40.0])[group]


def test_directions_centres_and_shares_are_those_of_the_tokens() -> None:
    values, posterior, _ = tokens()
    plane = project_tokens(values, posterior)
    centred = values - values.mean(axis=0)
    np.testing.assert_allclose(np.abs(np.corrcoef(plane.points[:, 0], centred[:, 3])[0, 1]), 1.0, atol=1e-3)
    np.testing.assert_allclose(np.abs(np.corrcoef(plane.points[:, 1], centred[:, 4])[0, 1]), 1.0, atol=1e-3)
    shares = plane.points.var(axis=0) / values.astype(float).var(axis=0).sum()
    np.testing.assert_allclose(plane.variance_share, shares, rtol=1e-6)
    for k in range(3):
        np.testing.assert_allclose(plane.centres[k], plane.points[k::3].mean(axis=0), atol=1e-9)
    again = project_tokens(values, posterior[:, ::-1])
    np.testing.assert_array_equal(again.points, plane.points)


def test_a_component_without_tokens_and_a_single_channel_are_no_problem() -> None:
    values, posterior, hu = tokens()
    posterior = np.column_stack([posterior, np.zeros(len(values), np.float32)])
    plane = project_tokens(values[:, 3:4], posterior)
    assert np.isnan(plane.centres[3]).all()
    assert plane.variance_share == pytest.approx((1.0, 0.0))
    assert embedding_map_png(values[:, 3:4], posterior, hu, (*NAMES, Tissue.FIBROSIS)).startswith(b"\x89PNG")


def test_the_picture_is_the_same_again_and_shows_each_name_in_its_colour() -> None:
    values, posterior, hu = tokens(number=MAX_POINTS + 300)
    hu[::7] = np.nan
    png = embedding_map_png(values, posterior, hu, NAMES)
    assert png == embedding_map_png(values[:MAX_POINTS], posterior[:MAX_POINTS], hu[:MAX_POINTS], NAMES)
    for chunk in (b"tEXt", b"iTXt", b"zTXt", b"tIME"):
        assert chunk not in png
    colours = {tuple(pixel) for row in np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for pixel in row.tolist()}
    for tissue in NAMES:  # the discs are opaque
        assert TISSUES[tissue].colour in colours
    assert TISSUES[Tissue.FIBROSIS].colour not in colours


def test_tokens_that_no_component_took_are_unclassified() -> None:
    values, posterior, hu = tokens()
    nothing = embedding_map_png(values, np.zeros_like(posterior), hu, NAMES)
    pixels = np.asarray(Image.open(io.BytesIO(nothing)).convert("RGB")).reshape(-1, 3).astype(int)
    assert not any((pixels == TISSUES[tissue].colour).all(axis=1)[: len(pixels) * 3 // 4].any() for tissue in NAMES)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    values, posterior, hu = tokens()
    with pytest.raises(InputError, match="do not fit"):
        embedding_map_png(values, posterior, hu[:-1], NAMES)
    with pytest.raises(InputError, match="do not fit"):
        embedding_map_png(values, posterior, hu, NAMES[:2])
    with pytest.raises(InputError, match="N > 1"):
        project_tokens(values[:1], posterior[:1])

"""Drawn patches beside real ones: one window, one scale, and only what fits together."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lungseg.errors import InputError
from lungseg.report.overlays import WINDOW_LEVEL_HU
from lungseg.report.sample_grid import MAX_PATCHES, sample_grid_png

SHAPE = (8, 12, 12)


def greys(png: bytes) -> np.ndarray:
    """Number of pixels of each pure grey."""
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    same = (picture[..., 0] == picture[..., 1]) & (picture[..., 1] == picture[..., 2])
    return np.bincount(picture[..., 0][same], minlength=256)


def test_both_kinds_have_one_window_and_only_the_middle_slice_is_shown() -> None:
    patches = np.full((4, *SHAPE), 3000, np.int16)
    patches[:, SHAPE[0] // 2] = int(WINDOW_LEVEL_HU)
    alone, both = (greys(sample_grid_png(patches, real, spacing_mm=1.5)) for real in (None, patches))
    middle = slice(126, 130)
    assert alone[middle].sum() > 10_000
    assert both[middle].sum() == pytest.approx(2 * alone[middle].sum(), rel=0.02)


def test_the_picture_is_the_same_again_and_bounded() -> None:
    rng = np.random.default_rng(3)
    many = rng.normal(-800, 60, (MAX_PATCHES + 9, *SHAPE)).astype(np.int16)
    png = sample_grid_png(many, many[:2], spacing_mm=1.5)
    assert png == sample_grid_png(many, many[:2], spacing_mm=1.5)
    width, height = Image.open(io.BytesIO(png)).size
    assert max(width, height) < 1400
    for chunk in (b"tEXt", b"iTXt", b"zTXt", b"tIME"):
        assert chunk not in png


def test_patches_of_other_sizes_and_none_are_refused() -> None:
    patches = np.zeros((2, *SHAPE), np.int16)
    with pytest.raises(InputError, match="differ in size"):
        sample_grid_png(patches, patches[:, :4], spacing_mm=1.0)
    for nothing in (patches[:0], patches[0]):
        with pytest.raises(InputError, match="at least one patch"):
            sample_grid_png(nothing, None, spacing_mm=1.0)

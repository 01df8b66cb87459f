"""Slices of a scan as small pictures for a page: CT as JPEG, what lies over it as PNG with few colours.

Sizes are bounded by the number of slices and the width in pixels, whatever the scan has.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.surface import bounding_box, require_spacing
from lungseg.report.legend import colour_table
from lungseg.report.overlays import MARGIN_MM, WINDOW_LEVEL_HU, WINDOW_WIDTH_HU, disease_focus
from lungseg.tissue import OUTSIDE, VIEWS

JPEG_QUALITY = 74
UNCERTAINTY_LEVELS = 16
"""Steps of the uncertainty map: fewer colours make smaller files."""
UNCERTAINTY_ALPHA = 215
THUMBNAIL_PX = 160


@dataclass(frozen=True)
class SliceStack:
    """Axial slices of one scan, from inferior to superior."""

    index: tuple[int, ...]
    """Slice of the volume each picture shows, from 0."""
    start: int
    """Picture with most disease around: shown first."""
    abnormal_pct: tuple[float, ...]
    """Percent of the lung in the slice that is abnormal; 0 without lung."""
    size: tuple[int, int]
    """Width and height in pixels."""
    ct: tuple[bytes, ...]
    """JPEG, lung window."""
    layers: dict[str, tuple[bytes, ...]]
    """PNG of that size with transparency: `tissue`, `uncertainty`, `reference` where there is one."""
    thumbnail: bytes
    """JPEG of the first slice shown, with its tissue."""


def encode_slices(
    volume_hu: np.ndarray,
    labels: np.ndarray,
    lungs: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    confidence: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    num_slices: int = 48,
    width_px: int = 448,
) -> SliceStack:
    """Pictures of evenly spaced axial slices through the lungs.

    Parameters
    ----------
    volume_hu : int16 array, shape (Z, Y, X)
        CT in HU; index 0 of z inferior.
    labels, lungs : uint8 arrays of that shape
        Tissue ids; lung field.
    spacing_mm : sequence of float
        (z, y, x) in mm.
    confidence, reference : uint8 arrays of that shape, optional
        Posterior of each label, 0 to 255; expert label map.
    num_slices : int
        Most slices shown.
    width_px : int
        Largest width and height of a picture.

    Returns
    -------
    SliceStack
        Radiological orientation: the patient's right on the viewer's left, anterior up.
    """
    spacing = require_spacing(spacing_mm, 3)
    shapes = {array.shape for array in (volume_hu, labels, lungs, confidence, reference) if array is not None}
    if len(shapes) != 1 or volume_hu.ndim != 3:
        raise InputError(
            f"image, labels, lungs, confidence and reference must have one 3-D shape, not {sorted(shapes)}"
        )
    box = _box(lungs, spacing)
    focus = disease_focus(labels, lungs, spacing_mm=spacing)[0]
    index = _indices(box[0], focus, num_slices)
    extent = [(side.stop - side.start) * step for side, step in zip(box[1:], spacing[1:], strict=True)]
    scale = width_px / max(extent)
    size = max(1, round(extent[1] * scale)), max(1, round(extent[0] * scale))
    colours = colour_table()
    ct, layers = [], {"tissue": [], "uncertainty": [], "reference": []}  # type: ignore[var-annotated]
    for z in index:
        plane = (z, *box[1:])
        ct.append(_jpeg(_window(volume_hu[plane]), size))
        layers["tissue"].append(_palette_png(labels[plane], colours, size))
        if confidence is not None:
            levels = _uncertainty_levels(confidence[plane], lungs[plane])
            layers["uncertainty"].append(_palette_png(levels, _uncertainty_colours(), size))
        if reference is not None:
            layers["reference"].append(_palette_png(reference[plane], colours, size))
    abnormal = np.isin(labels, [int(tissue) for tissue in VIEWS["abnormal"]["abnormal"]])
    shares = []
    for z in index:
        area = np.count_nonzero(lungs[z])
        shares.append(100.0 * np.count_nonzero(abnormal[z] & (lungs[z] != OUTSIDE)) / area if area else 0.0)
    plane = (focus, *box[1:])
    return SliceStack(
        index=tuple(index),
        start=index.index(focus),
        abnormal_pct=tuple(shares),
        size=size,
        ct=tuple(ct),
        layers={name: tuple(pictures) for name, pictures in layers.items() if pictures},
        thumbnail=_thumbnail(volume_hu[plane], labels[plane], size),
    )


def _box(lungs: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice, slice]:
    """Box around the lungs with a margin in the plane; the whole volume without lung."""
    found = bounding_box(lungs != OUTSIDE) or tuple(slice(0, size) for size in lungs.shape)
    pads = [0, *(math.ceil(MARGIN_MM / step) for step in spacing[1:])]
    z, y, x = (
        slice(max(0, side.start - pad), min(size, side.stop + pad))
        for side, pad, size in zip(found, pads, lungs.shape, strict=True)
    )
    return z, y, x


def _indices(span: slice, focus: int, num_slices: int) -> list[int]:
    """Evenly spaced slices of a span, the focus among them."""
    step = max(1, math.ceil((span.stop - span.start) / num_slices))
    focus = min(max(focus, span.start), span.stop - 1)
    return list(range(span.start + (focus - span.start) % step, span.stop, step))


def _window(hu: np.ndarray) -> np.ndarray:
    """uint8 in the lung window."""
    low = WINDOW_LEVEL_HU - WINDOW_WIDTH_HU / 2
    return np.rint(255 * np.clip((hu - low) / WINDOW_WIDTH_HU, 0, 1)).astype(np.uint8)


def _jpeg(grey: np.ndarray, size: tuple[int, int]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    picture = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR)
    picture.save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return out.getvalue()


def _palette_png(ids: np.ndarray, colours: np.ndarray, size: tuple[int, int]) -> bytes:
    """PNG of ids with the colour and opacity of each, uint8 (256, 4); only the ids that occur are kept."""
    from PIL import Image

    found, index = np.unique(ids, return_inverse=True)
    picture = Image.fromarray(index.reshape(ids.shape).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    picture.putpalette(colours[found, :3].astype(np.uint8).tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", transparency=colours[found, 3].astype(np.uint8).tobytes(), optimize=True)
    return out.getvalue()


def _uncertainty_levels(confidence: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """0 outside, else 1 (sure) to 16 (not at all)."""
    levels = 1 + (255 - confidence.astype(np.int32)) * UNCERTAINTY_LEVELS // 256
    return np.where(lungs != OUTSIDE, levels, 0).astype(np.uint8)


def _uncertainty_colours() -> np.ndarray:
    """RGBA of each level, uint8 (256, 4): matplotlib's magma, as in the preview."""
    from matplotlib import colormaps

    from lungseg.report.overlays import UNCERTAIN_MAP

    table = np.zeros((256, 4), dtype=np.uint8)
    ramp = colormaps[UNCERTAIN_MAP](np.linspace(0, 1, UNCERTAINTY_LEVELS))
    table[1 : UNCERTAINTY_LEVELS + 1, :3] = np.rint(255 * ramp[:, :3])
    table[1 : UNCERTAINTY_LEVELS + 1, 3] = UNCERTAINTY_ALPHA
    return table


def _thumbnail(hu: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> bytes:
    """JPEG of a slice with its tissue over it."""
    from PIL import Image

    scale = THUMBNAIL_PX / max(size)
    small = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    rgba = colour_table()[labels].astype(np.float32)
    alpha = rgba[..., 3:] / 255.0
    mixed = (1 - alpha) * _window(hu)[..., None] + alpha * rgba[..., :3]
    out = io.BytesIO()
    picture = Image.fromarray(np.rint(mixed).astype(np.uint8)).resize(small, Image.Resampling.BOX)
    picture.save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return out.getvalue()

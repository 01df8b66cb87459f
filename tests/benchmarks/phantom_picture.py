"""A picture of digital phantoms for the README: healthy, each disease, a severe mix; CT above, reference below.

Run: ``python tests/benchmarks/phantom_picture.py [-o phantoms.png]``. About two minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from lungseg.scan.phantom import DISEASES, Phantom, PhantomSpec, make_phantom
from lungseg.tissue import TISSUES, Tissue

EXTENT_MM, SPACING_MM = (300.0, 260.0, 340.0), (2.0, 0.9, 0.9)
WINDOW_HU = (-1350.0, 150.0)
"""Lung window: centre -600, width 1500."""
PANELS: tuple[tuple[str, str, tuple[str, ...], int], ...] = (
    ("healthy", "healthy", (), 31),
    ("emphysema", "moderate", ("emphysema",), 32),
    ("ground glass", "moderate", ("ggo",), 33),
    ("fibrosis", "moderate", ("fibrosis",), 34),
    ("consolidation", "moderate", ("consolidation",), 35),
    ("severe mix", "severe", DISEASES, 36),
)
"""Title, severity, diseases, seed."""
COLUMNS = 3
HEIGHT, WIDTH = 176, 228
"""Pixels of one axial picture."""
LEVELS = 28
"""Grey levels: the noise of CT does not compress, and more levels make a larger file."""
TINT = 0.45
"""Share of a class's colour in the tint of its regions."""
MAX_BYTES = 400_000


def palette() -> list[int]:
    """Colours by index: ``kind * LEVELS + level``; the first kind is plain, outlines hold one colour each."""
    colours: list[int] = []
    for colour in (None, *(info.colour for info in TISSUES.values())):
        for level in np.linspace(0.0, 255.0, LEVELS):
            mixed = (level,) * 3 if colour is None else [(1.0 - TINT) * level + TINT * part for part in colour]
            colours += [round(part) for part in mixed]
    for info in TISSUES.values():
        colours += info.colour
    return colours


def draw(slice_hu: np.ndarray, labels: np.ndarray, size: tuple[int, int], *, tinted: bool) -> np.ndarray:
    """Palette indices (height, width) of one slice, regions of disease tinted and outlined if asked for."""
    flat = Image.fromarray(slice_hu.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    regions = np.asarray(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
    low, high = WINDOW_HU
    index = np.rint(np.clip((np.asarray(flat) - low) / (high - low), 0.0, 1.0) * (LEVELS - 1)).astype(np.uint8)
    for tissue in TISSUES if tinted else ():
        region = regions == tissue
        if tissue != Tissue.HEALTHY and region.any():
            edge = region & ~ndimage.binary_erosion(region)
            index[region] += np.uint8(LEVELS * int(tissue))
            index[edge] = LEVELS * (len(TISSUES) + 1) + int(tissue) - 1
    return index


def show(phantom: Phantom) -> np.ndarray:
    """One panel: the axial slice with most disease (or lung) and a coronal one, plain above tinted."""
    shown = phantom.labels > 1 if (phantom.labels > 1).any() else phantom.labels > 0
    axial = int(shown.sum(axis=(1, 2)).argmax())
    coronal = int((phantom.lungs > 0).sum(axis=(0, 2)).argmax())
    box = tuple(
        slice(max(int(hit.min()) - pad, 0), int(hit.max()) + 1 + pad)
        for hit, pad in zip(np.nonzero(phantom.lungs), (4, 34, 40), strict=True)
    )
    rows = []
    for tinted in (False, True):
        volume, labels = phantom.volume_hu[:, box[1], box[2]], phantom.labels[:, box[1], box[2]]
        flat = draw(volume[axial], labels[axial], (HEIGHT, WIDTH), tinted=tinted)
        upright = draw(
            phantom.volume_hu[box[0], coronal, box[2]][::-1],
            phantom.labels[box[0], coronal, box[2]][::-1],
            (HEIGHT, round(0.72 * WIDTH)),
            tinted=tinted,
        )
        rows.append(np.hstack([flat, upright]))
    return np.vstack(rows)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, default=Path("phantoms.png"))
    output = parser.parse_args().output
    panels = []
    for _, severity, diseases, seed in PANELS:
        spec = PhantomSpec(extent_mm=EXTENT_MM, spacing_mm=SPACING_MM, severity=severity, diseases=diseases)
        panels.append(show(make_phantom(spec, seed=seed)))
    rows = [np.hstack(panels[i : i + COLUMNS]) for i in range(0, len(panels), COLUMNS)]
    sheet = Image.fromarray(np.vstack(rows), mode="P")
    sheet.putpalette(palette())
    pen = ImageDraw.Draw(sheet)
    height, width = panels[0].shape
    for number, (title, *_) in enumerate(PANELS):
        pen.text((number % COLUMNS * width + 5, number // COLUMNS * height + 3), title, fill=LEVELS - 1)
    sheet.save(output, optimize=True)
    size = output.stat().st_size
    print(f"{output}: {sheet.width}x{sheet.height}, {size / 1000:.0f} kB{' (too large)' if size > MAX_BYTES else ''}")


if __name__ == "__main__":
    main()

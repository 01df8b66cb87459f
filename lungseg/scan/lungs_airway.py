"""Trachea and main bronchi on the coarse grid of the lung field: seed, growth with a leakage guard, thick part."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_closing import dilate, erode

SEED_HU = -850.0
SEED_AREA_MM2 = (25.0, 700.0)
"""Cross-section of a trachea, child to adult (general knowledge: adult 200-300 mm2, up to 500 in men)."""
SEED_HEIGHT_MM = 14.0
"""A trachea can be followed over this height; a slab thinner than that is not searched."""
MAX_STEP_MM = 6.0
"""How far the centre of a trachea moves from slice to slice (2 mm)."""
GROWTH_HU = (-950.0, -925.0, -900.0, -875.0, -850.0, -825.0, -800.0, -775.0, -750.0)
"""Thresholds tried one after the other until the growth leaks into the lung."""
MAX_AIRWAY_ML = 110.0
LEAK_ML = 12.0
"""A single step of the threshold that adds more than this and half of the volume so far is a leak."""
BRONCHUS_RADIUS_MM = 2.6
"""Parts thinner than this are bronchi inside the lung and stay there."""
WALL_MM = 2.2
"""The wall, taken out with the lumen; at least one voxel of the scan, which blurs the wall."""


def find_airway(
    hu: np.ndarray, air: np.ndarray, spacing_mm: tuple[float, float, float], *, pixel_mm: float = 0.0
) -> np.ndarray:
    """Trachea and main bronchi with their wall, bool; empty if no trachea is seen.

    Parameters
    ----------
    hu : float32 array (Z, Y, X)
        Coarse scan (about 2 mm).
    air : bool array (Z, Y, X)
        Air inside the body.
    spacing_mm
        Voxel size.
    pixel_mm
        Pixel size of the scan itself.
    """
    seed = _trachea(hu, air, spacing_mm)
    if not seed.any():
        return seed
    grown = _grow(hu, air, seed, spacing_mm)
    inner = erode(grown, BRONCHUS_RADIUS_MM, spacing_mm)
    pieces, _ = ndimage.label(inner | seed)
    ids = np.unique(pieces[seed])
    thick = np.isin(pieces, ids[ids > 0])
    lumen = grown & dilate(thick, BRONCHUS_RADIUS_MM + 1.0, spacing_mm)
    return dilate(lumen, max(WALL_MM, pixel_mm), spacing_mm)


def _trachea(hu: np.ndarray, air: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """The tallest pile of small round pieces of air, one per slice."""
    pixel = spacing_mm[1] * spacing_mm[2]
    slices: list[list[tuple[int, np.ndarray]]] = []
    labelled = np.zeros(hu.shape, dtype=np.int32)
    for z in range(hu.shape[0]):
        pieces, _ = ndimage.label(air[z] & (hu[z] < SEED_HU))
        labelled[z] = pieces
        found = []
        for index, box in enumerate(ndimage.find_objects(pieces), start=1):
            area = float((pieces[box] == index).sum()) * pixel
            size = [(s.stop - s.start) * mm for s, mm in zip(box, spacing_mm[1:], strict=True)]
            is_round = area > 0.45 * size[0] * size[1] and max(size) < 2.2 * min(size) + 4.0
            centre = np.array([(s.start + s.stop - 1) / 2.0 for s in box])
            if SEED_AREA_MM2[0] <= area <= SEED_AREA_MM2[1] and is_round:
                found.append((index, centre * np.asarray(spacing_mm[1:])))
        slices.append(found)
    heights = np.count_nonzero(air, axis=(1, 2))
    middle = float((heights * np.arange(len(heights))).sum() / max(heights.sum(), 1))
    chain = _best_chain(slices, middle, spacing_mm)
    seed = np.zeros_like(air)
    for z, index in chain:
        seed[z] = labelled[z] == index
    return seed


def _best_chain(
    slices: list[list[tuple[int, np.ndarray]]], middle: float, spacing_mm: tuple[float, float, float]
) -> list[tuple[int, int]]:
    """Longest run of pieces whose centres follow each other from slice to slice; ties go to the upper one.

    It must reach above the middle of all inside air: a long gas-filled colon does not.
    """
    finished: list[list[tuple[int, int]]] = []
    growing: list[tuple[list[tuple[int, int]], np.ndarray]] = []
    for z, found in enumerate(slices):
        free = dict(found)
        following = []
        for chain, centre in growing:
            near = [(float(np.linalg.norm(point - centre)), index) for index, point in free.items()]
            if near and min(near)[0] <= MAX_STEP_MM:
                index = min(near)[1]
                following.append(([*chain, (z, index)], free.pop(index)))
            else:
                finished.append(chain)
        growing = following + [([(z, index)], point) for index, point in free.items()]
    finished += [chain for chain, _ in growing]
    tall = [c for c in finished if len(c) * spacing_mm[0] >= SEED_HEIGHT_MM and c[-1][0] > middle]
    return max(tall, key=lambda chain: (len(chain), chain[-1][0]), default=[])


def _grow(hu: np.ndarray, air: np.ndarray, seed: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Air connected to the seed under the highest threshold that does not leak into the lung."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000.0
    grown = seed
    for threshold in GROWTH_HU:
        pieces, _ = ndimage.label((air & (hu < threshold)) | seed)
        ids = np.unique(pieces[seed])
        attempt = np.isin(pieces, ids[ids > 0])
        volume, before = float(attempt.sum()) * voxel_ml, float(grown.sum()) * voxel_ml
        if volume > MAX_AIRWAY_ML or (volume - before > LEAK_ML and volume > 1.5 * before and threshold > GROWTH_HU[0]):
            break
        grown = attempt
    return grown

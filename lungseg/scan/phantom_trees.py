"""Vessels, bronchi and fissures of the digital phantom's lungs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from lungseg.scan.phantom_anatomy import Chest
from lungseg.scan.phantom_noise import smooth_noise
from lungseg.scan.phantom_tubes import Tubes, companions, draw_tubes, grow_tree

LEAVES_PER_ML = 1.0
MIN_LEAVES, MAX_LEAVES = 150, 1500
"""Ends of one vessel tree: by the volume of the lung, within bounds that keep a phantom in seconds."""
MARGIN_MM = 2.5
"""Vessels end this far below the pleura: a scan shows none beyond."""
WALL_MM, WALL_GROWTH = 0.6, 1.25
"""Outer radius of a bronchus: so many mm more than so many times the radius of its lumen (walls of 1 to 2 mm)."""
BRONCHUS_RADIUS_MM = 1.3
"""Bronchi beside arteries thinner than this are not seen in aerated lung."""
BRONCHIOLE_RADIUS_MM = 0.8
"""The same in airless lung: the air bronchogram reaches further out."""
FISSURE_HU = 170.0
"""What a fissure adds to the lung in its middle: a sheet thinner than a voxel."""


@dataclass(frozen=True)
class Trees:
    """Shares per voxel, float32 (Z, Y, X), 0 to 1."""

    vessels: np.ndarray
    walls: np.ndarray
    lumen: np.ndarray


def grow_trees(chest: Chest, rngs: dict[int, np.random.Generator], airless: np.ndarray | None) -> Trees:
    """Arteries, veins and bronchi of both lungs.

    Small bronchi show only where the lung around them is ``airless`` (share per voxel): the air bronchogram.
    """
    vessels, bronchi, bronchioles = [], [], []
    for side, rng in rngs.items():
        inside = np.argwhere((chest.sides == side) & (chest.lung_mm > MARGIN_MM))
        if len(inside) == 0:
            continue
        lung_ml = len(inside) * float(np.prod(chest.spacing_mm)) / 1000.0
        num_leaves = int(np.clip(LEAVES_PER_ML * lung_ml, MIN_LEAVES, MAX_LEAVES))
        root = chest.hila_mm[side]
        for shift in (8.0, -8.0):  # arteries above veins
            ends = (inside[rng.integers(len(inside), size=num_leaves)] + 0.5) * np.asarray(chest.spacing_mm)
            start = root + np.array([shift * chest.scale, -shift * 0.5 * chest.scale, 0.0])
            tree = grow_tree(start, ends, leaf_mm=0.39 + 0.11 * chest.scale, rng=rng)
            vessels.append(tree)
            if shift > 0:
                angle = float(rng.uniform(0.0, 6.28))
                bronchi.append(companions(tree, min_radius_mm=BRONCHUS_RADIUS_MM, ratio=0.85, angle=angle))
                bronchioles.append(companions(tree, min_radius_mm=BRONCHIOLE_RADIUS_MM, ratio=0.9, angle=angle))
    shape, spacing = chest.sides.shape, chest.spacing_mm
    inner = _join(bronchi)
    lumen = draw_tubes(shape, spacing, inner)
    if airless is not None:
        lumen = np.maximum(lumen, airless * draw_tubes(shape, spacing, _join(bronchioles)))
    walls = draw_tubes(shape, spacing, replace(inner, radius_mm=WALL_GROWTH * inner.radius_mm + WALL_MM))
    return Trees(draw_tubes(shape, spacing, _join(vessels)), walls, lumen)


def _join(trees: list[Tubes]) -> Tubes:
    """All pieces of several trees."""
    if not trees:
        return Tubes(np.empty((0, 3)), np.empty((0, 3)), np.empty(0))
    return Tubes(
        np.concatenate([tree.start_mm for tree in trees]),
        np.concatenate([tree.stop_mm for tree in trees]),
        np.concatenate([tree.radius_mm for tree in trees]),
    )


def fissures(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """HU that the oblique fissure of each lung and the horizontal one of the right add: thin sheets."""
    z = chest.z_mm / chest.height_mm - 0.45
    y = chest.y_mm / chest.half_depth_mm
    wave = 0.03 * smooth_noise(chest.sides.shape, chest.spacing_mm, knot_mm=35.0, rng=rng)
    tilt = float(rng.uniform(0.26, 0.36))
    oblique = (z - tilt * y + wave) * chest.height_mm * 0.85
    sheet = np.clip(1.2 - np.abs(oblique), 0.0, 1.0)
    middle = (z - 0.06 - 0.03 * y + wave) * chest.height_mm
    horizontal = np.clip(1.2 - np.abs(middle), 0.0, 1.0) * ((oblique < 0) == (y > 0)) * (chest.x_mm < 0) * (y < 0.1)
    result: np.ndarray = (FISSURE_HU * np.maximum(sheet, horizontal)).astype(np.float32)
    return result


def lung_box(chest: Chest, margin: int = 3) -> tuple[slice, slice, slice]:
    """Voxel box around both lungs; the whole grid if there is none."""
    found = ndimage.find_objects((chest.sides > 0).astype(np.uint8))
    if not found:
        return slice(0, None), slice(0, None), slice(0, None)
    return tuple(slice(max(part.start - margin, 0), part.stop + margin) for part in found[0])  # type: ignore[return-value]

"""The healthy chest of the digital phantom as implicit surfaces: body, rib cage, mediastinum, diaphragm, lungs.

Every ``*_mm`` array is a signed distance in mm (approximate away from the surface), positive inside the structure.
Coordinates: z up from the lowest slice, y to posterior and x to the patient's left from the body axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.scan.phantom_noise import smooth_noise
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

REFERENCE_HALF_WIDTH_MM = 165.0
REFERENCE_HALF_DEPTH_MM = 115.0
REFERENCE_HEIGHT_MM = 300.0
"""Adult chest to which the sizes below refer; smaller fields of view hold a smaller chest."""
MAX_HALF_WIDTH_MM, MAX_HALF_DEPTH_MM, MAX_HEIGHT_MM = 190.0, 130.0, 330.0
"""A larger field of view shows more air around the body, not a larger body."""

AIR, FAT, MUSCLE, SKIN, BLOOD, LIVER, WATER = -1000.0, -100.0, 50.0, 15.0, 42.0, 58.0, 15.0
BONE_CORTEX, BONE_MARROW, CARTILAGE = 620.0, 190.0, 110.0
"""HU of tissues outside the lung, unenhanced scan at 120 kV (general knowledge)."""


@dataclass(frozen=True)
class Chest:
    """The grid of the simulation and what is where on it."""

    z_mm: np.ndarray
    """Shape (Z, 1, 1)."""
    y_mm: np.ndarray
    """Shape (1, Y, 1)."""
    x_mm: np.ndarray
    """Shape (1, 1, X)."""
    spacing_mm: tuple[float, float, float]
    scale: float
    """Size against the reference adult."""
    half_width_mm: float
    """Of the rib cage."""
    half_depth_mm: float
    height_mm: float
    lung_mm: np.ndarray
    """float32 (Z, Y, X): depth below the pleura, negative outside the lungs."""
    sides: np.ndarray
    """uint8 (Z, Y, X): 1 left, 2 right lung, 0 else; trachea and main bronchi are 0."""
    body_hu: np.ndarray
    """float32 (Z, Y, X): everything but the lungs."""
    trachea_lumen: np.ndarray
    """float32 (Z, Y, X): share of trachea and main bronchi in each voxel."""
    hila_mm: dict[int, np.ndarray]
    """Side -> point (z, y, x) in mm from the outer corner of voxel (0, 0, 0) where vessels enter."""


def build_chest(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], rng: np.random.Generator) -> Chest:
    """Chest that fills the grid, its proportions drawn from ``rng``."""
    extent = np.asarray(shape) * np.asarray(spacing_mm)
    body = _Body(extent, rng)
    z, y, x = body.axes(shape, spacing_mm)
    rho, ray = _ellipse(y - body.cage_y, x, body.depth, body.width, body.power)
    cage_mm = _cage(z, rho, ray, body)
    cage_mm += 0.8 * body.scale * smooth_noise(shape, spacing_mm, knot_mm=22.0, rng=rng)
    diaphragm = {side: _diaphragm(y, x, side, body) for side in (LUNG_LEFT, LUNG_RIGHT)}
    middle_mm, heart_mm = _mediastinum(z, y, x, body)
    middle_mm += 1.2 * body.scale * smooth_noise(shape, spacing_mm, knot_mm=18.0, rng=rng)
    wave = 0.8 * body.scale * smooth_noise(shape, spacing_mm, knot_mm=25.0, rng=rng)[0]

    airway_mm = _main_airways(z, y, x, body)
    wall_mm = 1.0 + 0.5 * body.scale
    floor_mm = np.where(x > 0, diaphragm[LUNG_LEFT], diaphragm[LUNG_RIGHT]) + wave
    lung_mm = np.minimum(cage_mm - 1.0, -middle_mm)
    # Half the slope of a dome lies off the vertical: 0.8 turns the height above it roughly into a distance.
    lung_mm = np.minimum(lung_mm, 0.8 * (z - floor_mm))
    lung_mm = np.minimum(lung_mm, -airway_mm - wall_mm).astype(np.float32)
    sides = _two_lungs(lung_mm, x)

    outside = _outside_hu(shape, spacing_mm, (z, y, x), body, rng)
    inside = _mediastinum_hu(shape, spacing_mm, middle_mm, heart_mm, rng)
    abdomen = _abdomen_hu(z, y, x, floor_mm, body, rng)
    below = (z < floor_mm) & (heart_mm < 0)
    hu = np.where(cage_mm > 0, np.where(below, abdomen, inside), outside)
    del inside, outside, abdomen
    hu = _spine(hu, z, y, x, body)
    hu = np.where(airway_mm > -wall_mm, np.float32(30.0), hu)
    lumen = np.clip(airway_mm / min(spacing_mm) + 0.5, 0.0, 1.0).astype(np.float32)
    return Chest(
        z, y, x, spacing_mm, body.scale, body.width, body.depth, body.height, lung_mm, sides,
        hu.astype(np.float32), lumen, {side: body.hilum(side) + body.corner for side in diaphragm},
    )  # fmt: skip


class _Body:
    """The random proportions of one person, in mm."""

    def __init__(self, extent: np.ndarray, rng: np.random.Generator) -> None:
        vary = rng.uniform
        self.extent = extent
        self.height = min(float(extent[0]), MAX_HEIGHT_MM)
        self.base = (float(extent[0]) - self.height) / 2.0
        self.outer_width = min(0.49 * float(extent[2]), MAX_HALF_WIDTH_MM)
        self.outer_depth = min(0.455 * float(extent[1]), MAX_HALF_DEPTH_MM)
        ratio = (
            (self.outer_width / REFERENCE_HALF_WIDTH_MM)
            * (self.outer_depth / REFERENCE_HALF_DEPTH_MM)
            * (self.height / REFERENCE_HEIGHT_MM)
        )
        self.scale = float(np.clip(ratio ** (1.0 / 3.0), 0.4, 1.15))
        self.width = self.outer_width * vary(0.845, 0.885)
        self.depth = self.outer_depth * vary(0.80, 0.84)
        self.cage_y = -0.035 * self.outer_depth
        self.power = vary(2.1, 2.4)
        self.apex = self.height * vary(0.91, 0.945)
        self.recess = self.height * vary(0.05, 0.08)
        self.dome = {
            LUNG_RIGHT: self.height * vary(0.26, 0.32),
            LUNG_LEFT: self.height * vary(0.22, 0.28),
        }
        self.heart = vary(0.9, 1.1)
        self.carina = self.height * vary(0.56, 0.60)
        self.airway = 9.0 * self.scale * vary(0.9, 1.1)
        self.fat = 11.0 * self.scale * vary(0.6, 1.3)
        self.spine_y = self.cage_y + 0.66 * self.depth
        self.tilt = vary(-0.05, 0.05)
        self.corner = np.array([self.base, extent[1] / 2.0 - 0.02 * extent[1], extent[2] / 2.0])

    def axes(self, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
        """Broadcastable z, y, x of the voxel centres; the body sits a little high to leave room for the table."""
        z, y, x = (
            ((np.arange(n) + 0.5) * s - c).astype(np.float32)
            for n, s, c in zip(shape, spacing_mm, self.corner, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def hilum(self, side: int) -> np.ndarray:
        """Where vessels and bronchus enter a lung, (z, y, x)."""
        sign = 1.0 if side == LUNG_LEFT else -1.0
        return np.array([0.52 * self.height, 0.05 * self.depth, sign * 0.27 * self.width])


def _ellipse(
    y: np.ndarray, x: np.ndarray, half_depth: float, half_width: float, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """Level of a superellipse (1 on it) and mm per unit of level along the ray from the centre."""
    rho = (np.abs(x / half_width) ** power + np.abs(y / half_depth) ** power) ** (1.0 / power)
    rho = np.maximum(rho, 1e-3)
    ray = np.maximum(np.sqrt(x**2 + y**2) / rho, 0.5 * min(half_depth, half_width))
    return rho, ray


def _cage(z: np.ndarray, rho: np.ndarray, ray: np.ndarray, body: _Body) -> np.ndarray:
    """Inside of the rib cage: straight below, closing to a dome at the apex."""
    t = np.clip((z - 0.0) / body.apex, 0.0, 1.2)
    inside = np.clip(1.0 - t**3.4, 0.0, 1.0)
    level = np.where(t < 1.0, inside**0.5, -(t - 1.0) * 4.0)
    slope = np.where(t < 1.0, 1.7 * t**2.4 / np.sqrt(np.maximum(inside, 0.02)), 4.0) / body.apex
    distance: np.ndarray = (level - rho) * ray / np.sqrt(1.0 + (slope * ray) ** 2)
    return distance


def _diaphragm(y: np.ndarray, x: np.ndarray, side: int, body: _Body) -> np.ndarray:
    """Height of one dome over the axial plane, shape (1, Y, X)."""
    sign = 1.0 if side == LUNG_LEFT else -1.0
    across = (x - sign * 0.42 * body.width) / (0.62 * body.width)
    along = (y + 0.18 * body.depth) / (1.10 * body.depth)
    level = np.clip(1.0 - across**2 - along**2, -0.15, 1.0)
    height = body.recess + body.dome[side] * np.where(level > 0, np.maximum(level, 0.0) ** 0.8, level)
    # Behind the sternum the diaphragm rises to its attachment.
    front = 1.0 / (1.0 + np.exp((y / body.depth + 0.55) / 0.10))
    rise = body.recess + 0.17 * body.height * front * np.exp(-((x / (0.30 * body.width)) ** 2))
    return _smooth_max(height, rise, 8.0 * body.scale)


def _mediastinum(z: np.ndarray, y: np.ndarray, x: np.ndarray, body: _Body) -> tuple[np.ndarray, np.ndarray]:
    """Everything between the lungs, and the heart in it."""
    s = body.scale
    t = z / body.height
    bulge = np.exp(-(((y - 0.05 * body.depth) / (0.38 * body.depth)) ** 2))
    # Wide at the great vessels, and wider again where the apices part around the neck.
    half = s * (3.5 + 27.0 * bulge + 24.0 * np.clip((t - 0.72) / 0.24, 0.0, 1.0) * (1.0 - 0.4 * (1.0 - bulge)))
    core = half - np.abs(x - 2.0 * s)
    centre = (0.27 * body.height, -0.33 * body.depth, 0.17 * body.width)
    heart = _ellipsoid(
        z - centre[0] + 0.25 * (x - centre[2]), y - centre[1], x - centre[2],
        (0.24 * body.height * body.heart, 0.47 * body.depth * body.heart, 0.40 * body.width * body.heart),
    )  # fmt: skip
    parts = [core, heart]
    for side in (LUNG_LEFT, LUNG_RIGHT):
        hz, hy, hx = body.hilum(side)
        parts.append(_ellipsoid(z - hz, y - hy, x - hx, (20.0 * s, 14.0 * s, 12.0 * s)))
    arch = _ellipsoid(z - 0.68 * body.height, y + 2.0, x - 13.0 * s, (13.0 * s, 34.0 * s, 16.0 * s))
    aorta = 13.0 * s - np.hypot(y - body.spine_y + 16.0 * s, x - 20.0 * s)
    aorta = np.minimum(aorta, 0.70 * body.height - z)
    spine = 20.0 * s - np.hypot((y - body.spine_y) * 1.05, x)
    behind = np.minimum(19.0 * s - np.abs(x), y - body.spine_y)
    for part in (*parts[2:], arch, aorta, spine, behind):
        parts[0] = _smooth_max(parts[0], part, 3.0 * s)
    return _smooth_max(parts[0], heart, 5.0 * s), heart


def _ellipsoid(z: np.ndarray, y: np.ndarray, x: np.ndarray, radii: tuple[float, float, float]) -> np.ndarray:
    """Approximate signed distance of an ellipsoid at the origin, positive inside."""
    level = np.sqrt((z / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2)
    distance: np.ndarray = (1.0 - level) * float(np.cbrt(np.prod(radii)))
    return distance


def _smooth_max(a: np.ndarray, b: np.ndarray, width_mm: float) -> np.ndarray:
    """Union of two signed distances with a rounded seam."""
    gap = np.clip(1.0 - np.abs(a - b) / width_mm, 0.0, 1.0)
    union: np.ndarray = np.maximum(a, b) + gap**2 * (width_mm / 4.0)
    return union


def _main_airways(z: np.ndarray, y: np.ndarray, x: np.ndarray, body: _Body) -> np.ndarray:
    """Lumen of trachea and both main bronchi."""
    # It runs backwards on its way down.
    trachea = body.airway - np.hypot(y - 0.12 * body.depth + 0.08 * (z - body.carina), x * 0.92)
    trachea = np.minimum(trachea, z - body.carina + 2.0)
    lumen = np.broadcast_to(trachea, np.broadcast_shapes(z.shape, y.shape, x.shape))
    start = np.array([body.carina, 0.12 * body.depth, 0.0])
    for side in (LUNG_LEFT, LUNG_RIGHT):
        stop = body.hilum(side)
        radius = body.airway * (0.72 if side == LUNG_LEFT else 0.80)
        vector = stop - start
        squared = float(vector @ vector)
        along = ((z - start[0]) * vector[0] + (y - start[1]) * vector[1] + (x - start[2]) * vector[2]) / squared
        along = np.clip(along, 0.0, 1.0)
        distance = np.sqrt(
            (z - start[0] - along * vector[0]) ** 2
            + (y - start[1] - along * vector[1]) ** 2
            + (x - start[2] - along * vector[2]) ** 2
        )
        lumen = np.maximum(lumen, radius - distance)
    return lumen


def _two_lungs(lung_mm: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Largest piece of lung on either side of the midline; slivers cut off by heart or diaphragm are no lung."""
    sides = np.zeros(lung_mm.shape, dtype=np.uint8)
    for side, half in ((LUNG_LEFT, x > 0), (LUNG_RIGHT, x <= 0)):
        pieces, count = ndimage.label((lung_mm > 0) & half)
        if count:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            sides[pieces == sizes.argmax()] = side
    return sides


def _outside_hu(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    axes: tuple[np.ndarray, ...],
    body: _Body,
    rng: np.random.Generator,
) -> np.ndarray:
    """Chest wall: skin, fat, muscle, ribs and sternum; air and table around it."""
    z, y, x = axes
    rho, ray = _ellipse(y, x, body.outer_depth, body.outer_width, 2.3)
    skin_mm = (1.0 - rho) * ray
    rho, ray = _ellipse(y - body.cage_y, x, body.depth, body.width, body.power)
    wall_mm = -_cage(z, rho, ray, body)
    patchy = smooth_noise(shape, spacing_mm, knot_mm=9.0 * body.scale + 3.0, rng=rng)
    # Fat between muscles lies in sheets (level set of the noise) and in the armpits (its peaks).
    fat = ((np.abs(patchy) < 0.14) | (patchy > 1.1)) & (wall_mm > 8.0 * body.scale)
    fat |= skin_mm < body.fat + 2.0 * body.scale * patchy
    hu = np.where(fat, np.float32(FAT), np.float32(MUSCLE))
    hu = np.where(skin_mm < 1.8, np.float32(SKIN), hu)

    # Ribs fall to the front: along the wall the height of one rib drops by about five ribs.
    pitch = 25.0 * body.scale
    phase = (z - 0.65 * y - body.tilt * x) / pitch
    across = np.abs(phase - np.floor(phase) - 0.5) * pitch
    rib_mm = np.minimum(5.2 * body.scale - across, 3.2 * body.scale - np.abs(wall_mm - 4.6 * body.scale))
    front = (y < -0.72 * body.depth) & (np.abs(x) < 0.45 * body.width)
    cortex = np.where(front, np.float32(CARTILAGE), np.float32(BONE_CORTEX))
    marrow = np.where(front, np.float32(CARTILAGE), np.float32(BONE_MARROW))
    hu = np.where(rib_mm > 0, np.where(rib_mm > 1.1, marrow, cortex), hu)
    plate = np.minimum(16.0 * body.scale - np.abs(x), 5.0 * body.scale - np.abs(wall_mm - 5.5 * body.scale))
    plate = np.where((y < 0) & (z > 0.33 * body.height), plate, -1.0)
    hu = np.where(plate > 0, np.where(plate > 1.3, np.float32(BONE_MARROW), np.float32(BONE_CORTEX)), hu)
    scapula = np.abs(wall_mm - 13.0 * body.scale - 0.2 * (np.abs(x) - 0.6 * body.width))
    blade = (
        (scapula < 1.8)
        & (y > 0.35 * body.depth)
        & (np.abs(x) > 0.35 * body.width)
        & (np.abs(z / body.height - 0.68) < 0.16)
    )
    hu = np.where(blade & (skin_mm > 4.0), np.float32(350.0), hu)
    hu = np.where(skin_mm < 0, np.float32(AIR), hu)
    table = np.abs(y - (body.outer_depth + 3.0 - 0.05 * body.outer_depth * (x / body.outer_width) ** 2))
    hu = np.where((table < 0.9) & (skin_mm < 0), np.float32(-350.0), hu)
    result: np.ndarray = hu
    return result


def _mediastinum_hu(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    middle_mm: np.ndarray,
    heart_mm: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Fat, vessels, nodes and heart."""
    patchy = smooth_noise(shape, spacing_mm, knot_mm=8.0, rng=rng)
    hu = np.where(patchy > -0.35, np.float32(BLOOD), np.float32(FAT + 15.0))
    # A pericardial layer of fat, thicker where the noise is high.
    hu = np.where(heart_mm > 0.5 + np.maximum(patchy, 0.0), np.float32(BLOOD), hu)
    edge = (middle_mm < 2.0) & (patchy < 0.2)
    return np.where(edge & (heart_mm < 0), np.float32(FAT + 25.0), hu)


def _abdomen_hu(
    z: np.ndarray, y: np.ndarray, x: np.ndarray, floor_mm: np.ndarray, body: _Body, rng: np.random.Generator
) -> np.ndarray:
    """Liver, spleen and stomach with its gas bubble below the diaphragm."""
    s = body.scale
    depth_mm = floor_mm - z
    hu = np.where(depth_mm < 2.5, np.float32(MUSCLE), np.float32(FAT))
    organ = depth_mm > 3.5 + 1.5 * s
    liver = organ & (x < 0.16 * body.width - 0.1 * y)
    spleen = organ & (x > 0.45 * body.width) & (y > 0.15 * body.depth)
    stomach = _ellipsoid(
        z - body.recess - 0.30 * body.dome[LUNG_LEFT], y + 0.15 * body.depth, x - 0.46 * body.width,
        (0.5 * body.dome[LUNG_LEFT], 0.45 * body.depth, 0.26 * body.width),
    )  # fmt: skip
    hu = np.where(organ & (depth_mm < 18.0 * s) & ~liver, np.float32(MUSCLE), hu)
    hu = np.where(liver, np.float32(LIVER), hu)
    hu = np.where(spleen, np.float32(LIVER - 10.0), hu)
    level = -body.depth * float(rng.uniform(-0.05, 0.35))
    lumen = (stomach > 2.5) & (depth_mm > 4.0 + 2.0 * s)
    hu = np.where(organ & (stomach > 0), np.float32(MUSCLE), hu)
    # Supine: gas rises to the front (small y), fluid lies behind it.
    result: np.ndarray = np.where(lumen, np.where(y < level, np.float32(AIR), np.float32(WATER)), hu)
    return result


def _spine(hu: np.ndarray, z: np.ndarray, y: np.ndarray, x: np.ndarray, body: _Body) -> np.ndarray:
    """Vertebral bodies with discs, canal, arches and spinous processes."""
    s = body.scale
    centre = body.spine_y
    vertebra = 16.0 * s - np.hypot((y - centre) * 1.15, x)
    phase = z / (27.0 * s)
    disc = np.abs(phase - np.floor(phase) - 0.5) > 0.40
    bone = np.where(vertebra > 1.5, np.float32(BONE_MARROW), np.float32(BONE_CORTEX))
    hu = np.where(vertebra > 0, np.where(disc, np.float32(90.0), bone), hu)
    canal_y = centre + 20.0 * s
    ring = 12.0 * s - np.hypot(y - canal_y, x * 0.85)
    hu = np.where(ring > 0, np.where(ring > 3.0 * s, np.float32(WATER + 15.0), np.float32(BONE_CORTEX - 150.0)), hu)
    process = np.minimum(2.6 * s - np.abs(x), 14.0 * s - np.abs(y - canal_y - 22.0 * s))
    transverse = np.minimum(26.0 * s - np.abs(x), 3.2 * s - np.abs(y - canal_y + 3.0 * s - 0.2 * np.abs(x)))
    transverse = np.where(np.abs(phase - np.floor(phase) - 0.5) < 0.2, transverse, -1.0)
    wings = np.maximum(process, np.where(ring > 0, -1.0, transverse))
    result: np.ndarray = np.where(wings > 0, np.float32(BONE_CORTEX - 250.0), hu)
    return result

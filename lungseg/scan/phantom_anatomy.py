"""The healthy chest of the digital phantom as implicit surfaces: lungs, mediastinum, diaphragm and abdomen.

Every ``*_mm`` array is a signed distance in mm (approximate away from the surface), positive inside the structure.
Coordinates as in ``phantom_person.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import ndimage

from lungseg.scan.phantom_noise import smooth_noise
from lungseg.scan.phantom_person import (
    Person,
    Posture,
    cage_distance,
    ellipse,
    ellipsoid,
    smooth_max,
)
from lungseg.scan.phantom_tubes import Grid, unite_tube
from lungseg.scan.phantom_wall import AIR, BLOOD, FAT, LIVER, MUSCLE, WATER, draw_spine, wall_hu
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

PLEURA_REACH_MM = 14.0
"""Depth below the pleura counts great vessels up to this distance."""
AIRWAY_WALL_MM = 1.8
"""Wall of trachea and main bronchi (1 to 3 mm, general knowledge), in small chests too."""
SEPTUM_MM = 2.0
"""Half of the thinnest wall between the lungs, in front of the heart."""
MIDLINE_MM = 4.0
"""How far to the left the mediastinum lies in a reference adult."""


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

    def crop(self, box: tuple[slice, slice, slice]) -> Chest:
        """The part of the chest in a voxel box; arrays are views."""
        corner = np.array([part.start * s for part, s in zip(box, self.spacing_mm, strict=True)])
        return replace(
            self,
            z_mm=self.z_mm[box[0]],
            y_mm=self.y_mm[:, box[1]],
            x_mm=self.x_mm[:, :, box[2]],
            lung_mm=self.lung_mm[box],
            sides=self.sides[box],
            body_hu=self.body_hu[box],
            trachea_lumen=self.trachea_lumen[box],
            hila_mm={side: point - corner for side, point in self.hila_mm.items()},
        )


def build_chest(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    posture: Posture,
) -> Chest:
    """Chest that fills the grid, its proportions drawn from ``rng``."""
    grid = Grid(shape, spacing_mm)
    person = Person(np.asarray(shape) * np.asarray(spacing_mm), rng, posture)
    z, y, x = person.axes(shape, spacing_mm)
    rho, ray = ellipse(y - person.cage_y, x, person.depth, person.width, person.power)
    cage_mm = cage_distance(z, rho, ray, person).astype(np.float32)
    cage_mm += 0.8 * person.scale * smooth_noise(shape, spacing_mm, knot_mm=22.0, rng=rng)
    diaphragm = {side: _diaphragm(y, x, side, person) for side in (LUNG_LEFT, LUNG_RIGHT)}
    vessel_mm = _great_vessels(grid, person)
    heart_mm = _heart(z, y, x, person)
    middle_mm = _mediastinum(z, y, x, vessel_mm, heart_mm, person)
    middle_mm += 1.0 * person.scale * smooth_noise(shape, spacing_mm, knot_mm=18.0, rng=rng)
    # The lungs touch in front of the heart but never open into each other: two pleuras keep them apart.
    np.maximum(middle_mm, SEPTUM_MM - np.abs(x - MIDLINE_MM * person.scale), out=middle_mm)
    wave = 0.8 * person.scale * smooth_noise(shape, spacing_mm, knot_mm=25.0, rng=rng)[0]

    airway_mm = _main_airways(grid, person)
    wall_mm = AIRWAY_WALL_MM
    floor_mm = (np.where(x > 0, diaphragm[LUNG_LEFT], diaphragm[LUNG_RIGHT]) + wave).astype(np.float32)
    # Corners between ribs and mediastinum are round.
    lung_mm = -smooth_max(1.0 - cage_mm, middle_mm, 11.0 * person.scale)
    # Half the slope of a dome lies off the vertical: 0.8 turns the height above it roughly into a distance.
    lung_mm = np.minimum(lung_mm, 0.8 * (z - floor_mm))
    lung_mm = np.minimum(lung_mm, -airway_mm - wall_mm).astype(np.float32, copy=False)
    sides = _two_lungs(lung_mm, x, MIDLINE_MM * person.scale)

    hu = wall_hu(grid, person, rng)
    below = (z < floor_mm) & (heart_mm < 0)
    inside = cage_mm > 0
    hu = np.where(inside & ~below, _mediastinum_hu(grid, z, y, middle_mm, vessel_mm, heart_mm, person, rng), hu)
    del middle_mm, vessel_mm
    hu = np.where(inside & below, _abdomen_hu(grid, z, y, x, floor_mm, person, rng), hu)
    del inside, below, heart_mm, cage_mm
    draw_spine(hu, grid, person)
    hu[airway_mm > -wall_mm] = 30.0
    lumen = np.clip(airway_mm / min(spacing_mm) + 0.5, 0.0, 1.0).astype(np.float32, copy=False)
    return Chest(
        z, y, x, spacing_mm, person.scale, person.width, person.depth, person.height, lung_mm, sides,
        hu, lumen, {side: person.hilum(side) + person.corner for side in diaphragm},
    )  # fmt: skip


def _diaphragm(y: np.ndarray, x: np.ndarray, side: int, person: Person) -> np.ndarray:
    """Height of one dome over the axial plane, shape (1, Y, X)."""
    sign = 1.0 if side == LUNG_LEFT else -1.0
    across = (x - sign * 0.42 * person.width) / (0.62 * person.width)
    along = (y + 0.12 * person.depth) / (1.12 * person.depth)
    level = np.clip(1.0 - across**2 - along**2, -0.15, 1.0)
    height = person.recess + person.dome[side] * np.where(level > 0, np.maximum(level, 0.0) ** 0.75, level)
    # Behind the sternum the diaphragm rises to its attachment.
    front = 1.0 / (1.0 + np.exp((y / person.depth + 0.55) / 0.10))
    rise = person.recess + 0.17 * person.height * front * np.exp(-((x / (0.30 * person.width)) ** 2))
    return smooth_max(height, rise, 8.0 * person.scale)


def _heart(z: np.ndarray, y: np.ndarray, x: np.ndarray, person: Person) -> np.ndarray:
    """Heart with its long axis to the left and front, and the right atrium."""
    centre = np.array([0.335 * person.height, -0.25 * person.depth, 0.22 * person.width])
    cosine, sine = np.cos(person.heart_angle), np.sin(person.heart_angle)
    dz, dy, dx = z - centre[0], y - centre[1], x - centre[2]
    long = dx * cosine - dy * sine
    short = dx * sine + dy * cosine
    # The apex hangs lower than the base.
    body = ellipsoid(
        dz + 0.22 * long, short, long,
        (0.195 * person.height * person.heart, 0.42 * person.depth * person.heart, 0.43 * person.width * person.heart),
    )  # fmt: skip
    atrium = ellipsoid(
        dz - 0.02 * person.height, y + 0.12 * person.depth, x + 0.08 * person.width,
        (0.14 * person.height * person.heart, 0.34 * person.depth, 0.20 * person.width * person.heart),
    )  # fmt: skip
    return smooth_max(body, atrium, 12.0 * person.scale).astype(np.float32)


def _great_vessels(grid: Grid, person: Person) -> np.ndarray:
    """Aorta with arch and branches, pulmonary arteries and veins, caval veins and oesophagus; -20 away from them.

    Paths are points (share of the height, y, x): our drawing, after any atlas of the chest.
    """
    s, h, d, w = person.scale, person.height, person.depth, person.width
    behind = person.spine_y - 18.0 * s
    aorta = [(0.40, -0.20 * d, 0.02 * w), (0.52, -0.30 * d, -0.05 * w), (0.62, -0.28 * d, -0.04 * w)]
    arch = [
        (0.69 - 0.07 * (2.0 * p - 1.0) ** 2, (1.0 - p) * -0.28 * d + p * behind, (1.0 - p) * -0.04 * w + p * 17.0 * s)
        for p in np.linspace(0.0, 1.0, 6)[1:]
    ]
    down = [(0.40, behind + 2.0 * s, 15.0 * s), (-0.05, behind + 6.0 * s, 7.0 * s)]
    hila = {side: person.hilum(side) for side in (LUNG_LEFT, LUNG_RIGHT)}
    trunk = (0.56, -0.22 * d, 0.11 * w)
    right, left = ((hila[side][0] / h, hila[side][1], 1.1 * hila[side][2]) for side in (LUNG_RIGHT, LUNG_LEFT))
    paths: list[tuple[float, list[tuple[float, float, float]]]] = [
        (person.aorta * 1.1, aorta + arch[:1]),
        (person.aorta * 0.95, arch),
        (person.aorta * 0.85, [arch[-1], *down]),
        (13.0 * s, [(0.46, -0.36 * d, 0.12 * w), trunk]),
        (10.5 * s, [trunk, (0.565, 0.0, 0.05 * w), right]),
        (10.5 * s, [trunk, (0.575, 0.0, 0.2 * w), left]),
        (8.5 * s, [(0.44, -0.18 * d, -0.17 * w), (0.72, -0.20 * d, -0.19 * w), (0.88, -0.30 * d, -0.20 * w)]),
        (6.5 * s, [(0.73, -0.24 * d, -0.17 * w), (0.76, -0.34 * d, 0.06 * w), (0.90, -0.32 * d, 0.20 * w)]),
        (5.0 * s, [(0.69, -0.10 * d, -0.03 * w), (0.85, -0.05 * d, -0.14 * w), (1.05, -0.05 * d, -0.16 * w)]),
        (4.0 * s, [(0.70, 0.02 * d, 0.06 * w), (1.05, 0.0, 0.14 * w)]),
        (4.5 * s, [(0.69, 0.10 * d, 0.11 * w), (0.93, 0.05 * d, 0.22 * w)]),
        (10.0 * s, [(0.38, 0.05 * d, 0.0), (0.43, 0.08 * d, -0.24 * w)]),
        (10.0 * s, [(0.38, 0.05 * d, 0.0), (0.44, 0.10 * d, 0.24 * w)]),
        (7.0 * s, [(1.05, behind - 2.0 * s, 3.0 * s), (0.4, behind - 6.0 * s, 2.0 * s)]),
        (7.0 * s, [(0.4, behind - 6.0 * s, 2.0 * s), (0.1, behind - 6.0 * s, 8.0 * s)]),
        (11.0 * s, [(0.30, -0.02 * d, -0.16 * w), (0.05, 0.04 * d, -0.18 * w)]),
    ]  # fmt: skip
    field = np.full(grid.shape, -20.0, dtype=np.float32)
    for radius, path in paths:
        points = [np.array([t * h, py, px]) + person.corner for t, py, px in path]
        for start, stop in pairwise(points):
            unite_tube(field, grid, start, stop, radius, reach_mm=PLEURA_REACH_MM)
    return field


def _mediastinum(
    z: np.ndarray, y: np.ndarray, x: np.ndarray, vessel_mm: np.ndarray, heart_mm: np.ndarray, person: Person
) -> np.ndarray:
    """Everything between the lungs."""
    s = person.scale
    t = z / person.height
    bulge = np.exp(-(((y - 0.02 * person.depth) / (0.30 * person.depth)) ** 2))
    # The lungs nearly touch in front of the heart's vessels; the apices part around the neck.
    half = s * (2.8 + 19.0 * bulge + 27.0 * np.clip((t - 0.74) / 0.22, 0.0, 1.0) * (1.0 - 0.4 * (1.0 - bulge)))
    core = half - np.abs(x - MIDLINE_MM * s)
    # Fat of the front: a wedge behind the sternum.
    wedge = 15.0 * s - 0.6 * (y + person.depth) - 0.7 * np.abs(x)
    spine = 18.5 * s - np.hypot((y - person.spine_y) * 1.05, x)
    # Lungs reach back on either side of the spine; heads of ribs and muscles widen the wedge behind it.
    back = np.maximum(y - person.spine_y, 0.0) / (60.0 * s)
    behind = (14.0 + 7.0 * back + 14.0 * back**3) * s - np.abs(x)
    behind = np.minimum(behind, y - person.spine_y)
    union = smooth_max(core.astype(np.float32), wedge, 8.0 * s)
    union = smooth_max(union, np.maximum(spine, behind), 5.0 * s)
    for side in (LUNG_LEFT, LUNG_RIGHT):
        hz, hy, hx = person.hilum(side)
        union = smooth_max(union, ellipsoid(z - hz, y - hy, x - hx, (21.0 * s, 13.0 * s, 11.0 * s)), 3.0 * s)
    union = smooth_max(union, vessel_mm + 1.2 * s, 3.0 * s)
    return smooth_max(union, heart_mm + 1.0, 5.0 * s).astype(np.float32)


def _main_airways(grid: Grid, person: Person) -> np.ndarray:
    """Lumen of trachea, main bronchi and the first lobar bronchi; -20 away from them."""
    d, carina = person.depth, person.carina
    field = np.full(grid.shape, -20.0, dtype=np.float32)
    fork = np.array([carina, 0.10 * d, 0.0])
    # The trachea runs backwards on its way down.
    upper = np.array([person.height * 1.3, 0.10 * d - 0.12 * (1.3 * person.height - carina), 2.0 * person.scale])
    unite_tube(field, grid, fork + person.corner, upper + person.corner, person.airway, reach_mm=PLEURA_REACH_MM)
    for side in (LUNG_LEFT, LUNG_RIGHT):
        stop = person.hilum(side)
        radius = person.airway * (0.70 if side == LUNG_LEFT else 0.80)
        unite_tube(field, grid, fork + person.corner, stop + person.corner, radius, reach_mm=PLEURA_REACH_MM)
    return field


def _two_lungs(lung_mm: np.ndarray, x: np.ndarray, midline_mm: float) -> np.ndarray:
    """Largest piece of lung on either side of the midline; slivers cut off by heart or diaphragm are no lung."""
    sides = np.zeros(lung_mm.shape, dtype=np.uint8)
    for side, half in ((LUNG_LEFT, x > midline_mm), (LUNG_RIGHT, x <= midline_mm)):
        pieces, count = ndimage.label((lung_mm > 0) & half)
        if count:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            sides[pieces == sizes.argmax()] = side
    return sides


def _mediastinum_hu(
    grid: Grid,
    z: np.ndarray,
    y: np.ndarray,
    middle_mm: np.ndarray,
    vessel_mm: np.ndarray,
    heart_mm: np.ndarray,
    person: Person,
    rng: np.random.Generator,
) -> np.ndarray:
    """Fat with nodes in it, vessels, and the heart below its own layer of fat."""
    s = person.scale
    patchy = smooth_noise(grid.shape, grid.spacing_mm, knot_mm=8.0, rng=rng)
    # Nodes and small vessels; the neck and the space beside the spine hold muscle.
    muscle = (patchy > 0.9) | (y > person.spine_y - 4.0 * s) | ((z > 0.82 * person.height) & (patchy > -0.5))
    hu = np.where(muscle, np.float32(MUSCLE - 8.0), np.float32(FAT + 8.0))
    hu += 6.0 * patchy
    blood = (vessel_mm > 0) | (heart_mm > (1.5 + 2.0 * np.maximum(patchy, 0.0)) * s)
    hu[blood] = BLOOD
    # The wall of the mediastinum is a thin line of its own against the fat.
    hu[(middle_mm < 0.8) & ~blood] = 0.0
    return hu


def _abdomen_hu(
    grid: Grid,
    z: np.ndarray,
    y: np.ndarray,
    x: np.ndarray,
    floor_mm: np.ndarray,
    person: Person,
    rng: np.random.Generator,
) -> np.ndarray:
    """Liver, spleen and stomach with its gas bubble below the diaphragm, in fat."""
    s = person.scale
    depth_mm = floor_mm - z
    patchy = smooth_noise(grid.shape, grid.spacing_mm, knot_mm=14.0, rng=rng)
    hu = np.where(depth_mm < 3.0 * s, np.float32(MUSCLE), np.float32(FAT))
    organ = depth_mm > 3.0 * s
    edge = 3.0 * s * patchy
    liver = organ & (x + edge < 0.16 * person.width - 0.1 * y) & (y < 0.62 * person.depth)
    spleen = organ & (x > 0.45 * person.width + edge) & (y > 0.15 * person.depth)
    stomach = ellipsoid(
        z - person.recess - 0.38 * person.dome[LUNG_LEFT], y + 0.15 * person.depth, x - 0.46 * person.width,
        (0.48 * person.dome[LUNG_LEFT], 0.45 * person.depth, 0.26 * person.width),
    ) + 0.5 * edge  # fmt: skip
    hu = np.where(organ & (patchy > 0.8), np.float32(MUSCLE - 15.0), hu)
    hu = np.where(liver, np.float32(LIVER), hu)
    hu = np.where(spleen, np.float32(LIVER - 10.0), hu)
    level = -person.depth * float(rng.uniform(-0.05, 0.35))
    lumen = (stomach > 2.5) & (depth_mm > 7.0 + 3.0 * s)
    hu = np.where(organ & (stomach > 0), np.float32(MUSCLE), hu)
    # Supine: gas rises to the front (small y), fluid lies behind it.
    result: np.ndarray = np.where(lumen, np.where(y < level, np.float32(AIR), np.float32(WATER)), hu)
    return result

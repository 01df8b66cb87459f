"""The chest wall of the digital phantom: skin, fat, muscles, ribs, sternum, spine, breasts, arms and couch."""

from __future__ import annotations

import numpy as np

from lungseg.scan.phantom_noise import smooth_noise
from lungseg.scan.phantom_person import Person, cage_distance, ellipse, ellipsoid, smooth_max, smooth_step
from lungseg.scan.phantom_tubes import Grid, unite_tube

AIR, FAT, MUSCLE, SKIN, BLOOD, LIVER, WATER = -1000.0, -100.0, 50.0, 15.0, 42.0, 58.0, 15.0
BONE_CORTEX, BONE_MARROW, CARTILAGE = 620.0, 190.0, 110.0
GLAND, COUCH_SHELL, COUCH_FOAM = 20.0, 60.0, -940.0
"""HU of tissues outside the lung, unenhanced scan at 120 kV (general knowledge)."""
RIB_DROP = 4.6
"""A rib ends at the front this many ribs lower than it began at the spine."""
RIB_TURN = 2.25
"""Angle from the spine, in radians, at which the bony rib ends and its cartilage climbs to the sternum."""


def wall_hu(grid: Grid, person: Person, rng: np.random.Generator) -> np.ndarray:
    """HU of everything outside the rib cage, float32 (Z, Y, X); meaningless inside of it."""
    z, y, x = person.axes(grid.shape, grid.spacing_mm)
    s = person.scale
    skin_mm = _skin(z, y, x, person)
    rho, ray = ellipse(y - person.cage_y, x, person.depth, person.width, person.power)
    wall_mm = -cage_distance(z, rho, ray, person)
    patchy = smooth_noise(grid.shape, grid.spacing_mm, knot_mm=7.0 * s + 3.0, rng=rng)
    # Thicker fat at the flanks and in front, thinner over the spine and the shoulder blades.
    flank = 0.85 + 0.3 * np.abs(x) / person.outer_width + 0.15 * smooth_step(-z / person.height, -0.5, -0.1)
    fat = skin_mm < person.fat * flank + 1.0 * s * patchy
    # Sheets of fat between layers of muscle, and fat with muscles in it where the wall is thick (armpit, shoulder).
    layer = (wall_mm + 1.6 * s * patchy) / (8.5 * s)
    sheet = (
        (np.abs(layer - np.floor(layer) - 0.5) * 8.5 * s < 0.55)
        & (patchy > -0.1)
        & (wall_mm > 8.0 * s)
        & (wall_mm < 24.0 * s)
    )
    armpit = (wall_mm > 17.0 * s) & (np.abs(x) > 0.55 * person.width) & (patchy < 0.35)
    fat |= sheet | armpit
    back = (np.abs(x) < 0.36 * person.width) & (y > person.spine_y + 8.0 * s) & (skin_mm > 0.6 * person.fat)
    fat &= ~(back & (patchy > -1.1))
    hu = np.where(fat, np.float32(FAT), np.float32(MUSCLE))
    if person.female:
        gland = (y < -0.8 * person.outer_depth) & (skin_mm > 7.0 * s) & (wall_mm > 17.0 * s) & (np.abs(patchy) < 0.3)
        hu = np.where(gland & (np.abs(x) > 0.12 * person.width), np.float32(GLAND), hu)
    hu = np.where(skin_mm < 1.6, np.float32(SKIN), hu)
    _ribs(hu, z, y, x, wall_mm, person)
    _sternum(hu, z, y, x, wall_mm, person)
    _shoulder_girdle(hu, grid, skin_mm > 4.0 * s, person)
    hu = np.where(skin_mm < 0, np.float32(AIR), hu)
    if person.posture.arms_down:
        hu = _arms(hu, y, x, skin_mm, person)
    if person.posture.table:
        hu = _couch(hu, y, x, skin_mm, person)
    return hu.astype(np.float32, copy=False)


def _skin(z: np.ndarray, y: np.ndarray, x: np.ndarray, person: Person) -> np.ndarray:
    """Depth below the skin: wider at the shoulders, narrower at the waist, flat at the back."""
    t = z / person.height
    wide = 0.955 + 0.045 * smooth_step(t, 0.35, 0.75)
    deep = 1.0 - 0.12 * smooth_step(t, 0.70, 1.0)
    flat = np.where(y > 0, 1.0 + 0.06 * smooth_step(np.abs(x) / person.outer_width, 0.9, 0.1), 1.0)
    rho, ray = ellipse(y / flat, x, person.outer_depth * deep, person.outer_width * wide, 2.35)
    skin = (1.0 - rho) * ray
    if person.female:
        for sign in (-1.0, 1.0):
            b = person.breast
            radii = (0.15 * person.height, 0.30 * person.outer_depth + b, 0.36 * person.outer_width)
            centre = (0.42 * person.height, -0.72 * person.outer_depth, sign * 0.46 * person.outer_width)
            breast = ellipsoid(z - centre[0], y - centre[1], x - centre[2], radii)
            skin = smooth_max(skin, breast, 14.0 * person.scale)
    result: np.ndarray = skin.astype(np.float32)
    return result


def _ribs(hu: np.ndarray, z: np.ndarray, y: np.ndarray, x: np.ndarray, wall_mm: np.ndarray, person: Person) -> None:
    """Ribs fall from the spine to the front; their cartilage climbs to the sternum. Drawn into ``hu``."""
    s, pitch = person.scale, person.rib_pitch
    angle = np.arctan2(np.abs(x), y - person.cage_y)  # 0 at the back, pi in front; (1, Y, X)
    drop = RIB_DROP * np.minimum(angle / RIB_TURN, 1.0) - 2.2 * np.maximum(angle - RIB_TURN, 0.0)
    index = np.flatnonzero((wall_mm > 0.5 * s) & (wall_mm < 10.0 * s) & (angle > 0.22))
    plane = index % (y.size * x.size)
    phase = z.ravel()[index // (y.size * x.size)] / pitch + drop.ravel()[plane] + person.rib_phase
    across = np.abs(phase - np.floor(phase) - 0.5) * pitch
    # Flat ovals, about 12 mm high and 7 mm thick; the cosine shortens the height where the rib runs down steeply.
    level = np.sqrt((across / (6.6 * s)) ** 2 + ((wall_mm.ravel()[index] - 5.0 * s) / (3.7 * s)) ** 2)
    rib_mm = (1.0 - level) * 4.6 * s
    front = angle.ravel()[plane] > RIB_TURN + 0.12
    value = np.where(rib_mm > 1.2, np.float32(BONE_MARROW), np.float32(BONE_CORTEX))
    value[front] = CARTILAGE
    inside = rib_mm > 0
    hu.ravel()[index[inside]] = value[inside]


def _sternum(hu: np.ndarray, z: np.ndarray, y: np.ndarray, x: np.ndarray, wall_mm: np.ndarray, person: Person) -> None:
    """Body of the sternum and the wider manubrium above it. Drawn into ``hu``."""
    s = person.scale
    half = 14.0 * s + 9.0 * s * smooth_step(z / person.height, 0.66, 0.74)
    rows = (z.ravel() > 0.36 * person.height) & (z.ravel() < 0.84 * person.height)
    columns = np.abs(x.ravel()) < 26.0 * s
    in_front = y.ravel() < person.cage_y
    box = np.ix_(rows, in_front, columns)
    depth = 5.0 * s - np.abs(wall_mm[box] - 6.0 * s)
    plate = np.minimum(half[rows] - np.abs(x[:, :, columns]), depth)
    value = np.where(plate > 1.3, np.float32(BONE_MARROW), np.float32(BONE_CORTEX))
    hu[box] = np.where(plate > 0, value, hu[box])


def _shoulder_girdle(hu: np.ndarray, grid: Grid, deep: np.ndarray, person: Person) -> None:
    """Collar bones and shoulder blades. Drawn into ``hu``."""
    s = person.scale
    bone = np.full(grid.shape, -9.0, dtype=np.float32)
    for sign in (-1.0, 1.0):
        inner = np.array([0.86 * person.height, -0.62 * person.depth, sign * 24.0 * s]) + person.corner
        outer = np.array([0.93 * person.height, -0.15 * person.depth, sign * 0.80 * person.width]) + person.corner
        unite_tube(bone, grid, inner, outer, 5.0 * s)
        # A blade is a fan of thin rods from its lower tip to its upper edge.
        tip = np.array([0.52 * person.height, 0.86 * person.depth, sign * 0.62 * person.width]) + person.corner
        for part in np.linspace(0.0, 1.0, 25):
            edge = np.array(
                [0.88 * person.height, (0.90 - 0.42 * part) * person.depth, sign * (0.45 + 0.53 * part) * person.width]
            )
            unite_tube(bone, grid, tip, edge + person.corner, 2.4 * s)
    inside = (bone > 0) & deep
    hu[inside] = np.where(bone[inside] > 1.3, np.float32(BONE_MARROW), np.float32(BONE_CORTEX - 150.0))


def _arms(hu: np.ndarray, y: np.ndarray, x: np.ndarray, skin_mm: np.ndarray, person: Person) -> np.ndarray:
    """Upper arms beside the chest: skin, fat, muscle and the humerus."""
    radius = 0.5 * (0.485 * float(person.extent[2]) - person.outer_width)
    centre = person.outer_width + radius + 1.0
    arm = radius - np.hypot(y - 0.1 * person.outer_depth, np.abs(x) - centre)
    arm = np.where(np.abs(x) > person.outer_width * 0.9, arm, -1.0)
    value = np.where(arm < 1.6, np.float32(SKIN), np.where(arm < 1.6 + 0.35 * person.fat, np.float32(FAT), MUSCLE))
    bone = 0.36 * radius
    value = np.where(arm > radius - bone, np.where(arm > radius - 0.6 * bone, BONE_MARROW, BONE_CORTEX), value)
    return np.where((arm > 0) & (skin_mm < 0), value.astype(np.float32), hu)


def _couch(hu: np.ndarray, y: np.ndarray, x: np.ndarray, skin_mm: np.ndarray, person: Person) -> np.ndarray:
    """A curved couch: two thin shells with foam between them, below the back."""
    across = np.minimum((x / 200.0) ** 2, 1.4)
    top = person.outer_depth * 1.06 + 3.0 - 22.0 * person.table_curve * across
    bottom = person.outer_depth * 1.06 + 26.0 - 34.0 * person.table_curve * across
    shell = (np.abs(y - top) < 0.9) | (np.abs(y - bottom) < 1.1)
    foam = (y > top) & (y < bottom) & (np.abs(x) < 235.0)
    value = np.where(shell, np.float32(COUCH_SHELL), np.float32(COUCH_FOAM))
    return np.where((shell | foam) & (skin_mm < -0.5), value, hu)


def draw_spine(hu: np.ndarray, grid: Grid, person: Person) -> None:
    """Vertebral bodies with discs, canal, arches, transverse and spinous processes. Drawn into ``hu``."""
    s = person.scale
    z, y, x = person.axes(grid.shape, grid.spacing_mm)
    rows = (y.ravel() > person.spine_y - 20.0 * s) & (y.ravel() < person.spine_y + 62.0 * s)
    columns = np.abs(x.ravel()) < 34.0 * s
    box = (slice(None), *(slice(*_span(keep)) for keep in (rows, columns)))
    y, x, part = y[:, box[1]], x[:, :, box[2]], hu[box]
    centre = person.spine_y
    # Vertebral bodies are a little waisted and flat at the back.
    phase = z / (25.0 * s)
    middle = np.abs(phase - np.floor(phase) - 0.5)
    vertebra = (15.0 + 2.5 * np.clip(middle * 2.0, 0.0, 1.0)) * s - np.hypot((y - centre) * 1.1, x)
    vertebra = np.minimum(vertebra, centre + 13.5 * s - y)
    disc = middle > 0.41
    bone = np.where(vertebra > 1.4, np.float32(BONE_MARROW), np.float32(BONE_CORTEX))
    part = np.where(vertebra > 0, np.where(disc, np.float32(85.0), bone), part)
    canal_y = centre + 20.0 * s
    ring = 11.5 * s - np.hypot(y - canal_y, x * 0.85)
    arch = np.where(disc & (y > canal_y), np.float32(60.0), np.float32(BONE_CORTEX - 200.0))
    part = np.where((ring > 0) & (vertebra <= 0), np.where(ring > 3.2 * s, np.float32(WATER + 15.0), arch), part)
    # Spinous processes slope downwards; transverse processes reach out to the ribs.
    sloped = (z + 0.8 * (y - canal_y)) / (25.0 * s)
    process = np.minimum(2.8 * s - np.abs(x), 15.0 * s - np.abs(y - canal_y - 22.0 * s))
    process = np.where(np.abs(sloped - np.floor(sloped) - 0.5) < 0.32, process, -1.0)
    transverse = np.minimum(30.0 * s - np.abs(x), 4.0 * s - np.abs(y - canal_y + 1.0 * s - 0.25 * np.abs(x)))
    transverse = np.where(middle < 0.19, transverse, -1.0)
    wings = np.maximum(process, np.where(ring > 0, -1.0, transverse))
    wing = np.where(wings > 1.2, np.float32(BONE_MARROW), np.float32(BONE_CORTEX - 200.0))
    hu[box] = np.where((wings > 0) & (vertebra <= 0), wing, part)


def _span(keep: np.ndarray) -> tuple[int, int]:
    index = np.flatnonzero(keep)
    return (int(index[0]), int(index[-1]) + 1) if index.size else (0, 0)

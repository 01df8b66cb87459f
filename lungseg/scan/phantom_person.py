"""The proportions of one imaginary person of the digital phantom, and the signed distances anatomy is built from.

Every ``*_mm`` distance is approximate away from its surface and positive inside the structure. Coordinates: z up from
the lowest slice of the body, y to posterior and x to the patient's left from the body axis, in mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT

REFERENCE_HALF_WIDTH_MM = 165.0
REFERENCE_HALF_DEPTH_MM = 115.0
REFERENCE_HEIGHT_MM = 300.0
"""Adult chest to which the sizes of organs refer; smaller fields of view hold a smaller chest."""
MAX_HALF_WIDTH_MM, MAX_HALF_DEPTH_MM, MAX_HEIGHT_MM = 195.0, 135.0, 330.0
"""A larger field of view shows more air around the body, not a larger body."""
MIN_AIRWAY_MM = 4.2
"""Radius of the narrowest trachea: that of a child of about four years (general knowledge)."""
FAT_MM = (4.0, 26.0)
"""Subcutaneous fat of a slim and of an obese reference adult (general knowledge)."""
FEMALE_SIZE = 0.94
"""Width and depth of a woman's chest against a man's (general knowledge)."""
ARMS_DOWN_WIDTH = 0.74
"""Width left to the trunk when the arms lie beside it."""
TRUNCATED_WIDTH, TRUNCATED_MAX_MM = 1.32, 235.0
"""Width of the body against the field of view when the sides are cut off, and the largest half of it."""


@dataclass(frozen=True)
class Posture:
    """How the person lies in the scanner."""

    arms_down: bool = False
    """Arms beside the chest instead of above the head."""
    truncated: bool = False
    """The body is wider than the field of view."""
    table: bool = True
    """Whether the couch is in the picture."""


class Person:
    """The random proportions of one person, all in mm of the scanner."""

    def __init__(self, extent_mm: np.ndarray, rng: np.random.Generator, posture: Posture = Posture()) -> None:
        vary = rng.uniform
        self.posture = posture
        self.female = bool(rng.random() < 0.5)
        self.extent = extent_mm
        # Habitus: most people are in between; drawn before sizes so that fat takes room from the lungs.
        fat = FAT_MM[0] + (FAT_MM[1] - FAT_MM[0]) * float(rng.beta(1.6, 3.0))
        fill = vary(0.95, 1.0) * (1.0 if posture.table else 1.02) * (FEMALE_SIZE if self.female else 1.0)
        self.height = min(float(extent_mm[0]), MAX_HEIGHT_MM)
        self.base = (float(extent_mm[0]) - self.height) / 2.0
        width = 0.485 * float(extent_mm[2]) * fill
        if posture.arms_down:
            width *= ARMS_DOWN_WIDTH
        if posture.truncated:
            width *= TRUNCATED_WIDTH
        widest = TRUNCATED_MAX_MM if posture.truncated else MAX_HALF_WIDTH_MM * (FEMALE_SIZE if self.female else 1.0)
        self.outer_width = min(width, widest)
        depth = 0.425 * float(extent_mm[1]) * fill
        if posture.truncated:
            depth *= 1.08
        self.outer_depth = min(depth, MAX_HALF_DEPTH_MM, 0.80 * self.outer_width)
        ratio = (
            (self.outer_width / REFERENCE_HALF_WIDTH_MM)
            * (self.outer_depth / REFERENCE_HALF_DEPTH_MM)
            * (self.height / REFERENCE_HEIGHT_MM)
        )
        self.scale = s = float(np.clip(ratio ** (1.0 / 3.0), 0.4, 1.15))
        thin = s**1.25  # small chests have relatively thin walls
        self.fat = fat * thin
        self.muscle = thin * vary(13.0, 17.0) * (0.88 if self.female else 1.0)
        self.width = self.outer_width - self.fat - self.muscle
        self.depth = self.outer_depth - 0.8 * self.fat - 0.8 * self.muscle
        self.cage_y = -0.02 * self.outer_depth
        self.power = vary(2.05, 2.4)
        self.apex = self.height * vary(0.915, 0.95)
        self.recess = self.height * vary(0.04, 0.07)
        self.dome = {LUNG_RIGHT: self.height * vary(0.24, 0.30), LUNG_LEFT: self.height * vary(0.21, 0.27)}
        self.heart = vary(0.92, 1.10)
        self.heart_angle = vary(0.55, 0.85)
        self.carina = self.height * vary(0.59, 0.63)
        self.airway = max(9.2 * s * vary(0.9, 1.1) * (0.92 if self.female else 1.0), MIN_AIRWAY_MM)
        self.aorta = 13.5 * s * vary(0.88, 1.15)
        self.spine_y = self.cage_y + vary(0.40, 0.46) * self.depth
        self.rib_pitch = vary(24.0, 28.0) * s
        self.rib_phase = vary(0.0, 1.0)
        self.breast = self.fat * vary(0.6, 1.4) + 6.0 * s if self.female else 0.0
        self.table_curve = vary(0.7, 1.3)
        shift = 0.012 * float(extent_mm[2])
        self.corner = np.array(
            [self.base, extent_mm[1] / 2.0 - 0.035 * extent_mm[1], extent_mm[2] / 2.0 + vary(-shift, shift)]
        )

    def axes(self, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
        """Broadcastable z, y, x of the voxel centres; the body sits a little high to leave room for the table."""
        z, y, x = (
            ((np.arange(n) + 0.5) * s - c).astype(np.float32)
            for n, s, c in zip(shape, spacing_mm, self.corner, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def hilum(self, side: int) -> np.ndarray:
        """Where vessels and bronchus enter a lung, (z, y, x); the left one lies higher."""
        sign, lift = (1.0, 0.015) if side == LUNG_LEFT else (-1.0, -0.01)
        return np.array([(0.545 + lift) * self.height, 0.04 * self.depth, sign * 0.27 * self.width])


def ellipse(
    y: np.ndarray, x: np.ndarray, half_depth: float | np.ndarray, half_width: float | np.ndarray, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """Level of a superellipse (1 on it) and mm per unit of level along the ray from the centre."""
    rho = (np.abs(x / half_width) ** power + np.abs(y / half_depth) ** power) ** (1.0 / power)
    rho = np.maximum(rho, 1e-3)
    ray = np.maximum(np.sqrt(x**2 + y**2) / rho, 0.5 * np.minimum(half_depth, half_width))
    return rho, ray


def ellipsoid(z: np.ndarray, y: np.ndarray, x: np.ndarray, radii: tuple[float, float, float]) -> np.ndarray:
    """Approximate signed distance of an ellipsoid at the origin."""
    level = np.sqrt((z / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2)
    distance: np.ndarray = (1.0 - level) * float(np.cbrt(np.prod(radii)))
    return distance


def smooth_max(a: np.ndarray, b: np.ndarray, width_mm: float) -> np.ndarray:
    """Union of two signed distances with a rounded seam."""
    gap = np.clip(1.0 - np.abs(a - b) / width_mm, 0.0, 1.0)
    union: np.ndarray = np.maximum(a, b) + gap**2 * (width_mm / 4.0)
    return union


def smooth_step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below ``low``, 1 above ``high``, smooth in between."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    step: np.ndarray = t * t * (3.0 - 2.0 * t)
    return step


def cage_distance(z: np.ndarray, rho: np.ndarray, ray: np.ndarray, person: Person) -> np.ndarray:
    """Distance inside the rib cage: straight below, closing to a dome at the apex."""
    t = np.clip(z / person.apex, 0.0, 1.2)
    inside = np.clip(1.0 - t**3.2, 0.0, 1.0)
    level = np.where(t < 1.0, inside**0.5, -(t - 1.0) * 4.0)
    slope = np.where(t < 1.0, 1.6 * t**2.2 / np.sqrt(np.maximum(inside, 0.02)), 4.0) / person.apex
    distance: np.ndarray = (level - rho) * ray / np.sqrt(1.0 + (slope * ray) ** 2)
    return distance

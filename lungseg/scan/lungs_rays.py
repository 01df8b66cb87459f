"""The chest wall seen from the middle of the chest: rays in every slice, the outermost lung on each, and the ribs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Spacing = tuple[float, float, float]

NUM_RAYS = 120
RIB_HU = 180.0
"""Bone on the coarse grid; contrast medium in vessels is as dense, but lies inside the lungs' outer surface."""
SOFT_MINIMUM_MM = 4.0
"""Scale of the soft minimum over neighbouring rays: between two ribs the shoulder blade must not count."""
NEIGHBOURS_MM, NEIGHBOUR_RAYS = 10.0, 4.0
"""Standard deviations, along z and over rays, of that minimum: ribs are 15-25 mm apart."""

BESIDE_SPINE_RAD, BESIDE_SPINE_RAYS = 0.6, 9
"""How near to straight back a ray counts as beside the spine, and over how many rays the ribs are looked for there."""


@dataclass(frozen=True)
class Rays:
    """Polar coordinates of the pixels of every slice around the middle of the chest."""

    index: np.ndarray
    """int64 (Y, X): the ray of a pixel, 0 to NUM_RAYS - 1."""
    radius_mm: np.ndarray
    """float32 (Y, X)."""
    across_mm: np.ndarray
    """float32 (1, X): from the middle of the chest to the patient's left."""
    is_behind: np.ndarray
    """bool (Y, 1): rows behind the middle of the chest."""

    @classmethod
    def around(cls, sides: np.ndarray, spacing_mm: Spacing) -> Rays:
        """Rays from the middle between both lungs, or from the medial edge of a single one (labels 1 left, 2 right)."""
        _, y, _ = np.nonzero(sides)
        columns = [np.nonzero(sides == side)[2] for side in (1, 2)]
        if len(columns[0]) and len(columns[1]):
            middle = (columns[0].mean() + columns[1].mean()) / 2.0
        else:
            middle = float(columns[0].min()) if len(columns[0]) else float(columns[1].max())
        rows = (np.arange(sides.shape[1]) - y.mean())[:, None] * spacing_mm[1]
        across = (np.arange(sides.shape[2]) - middle)[None, :] * spacing_mm[2]
        index = ((np.arctan2(rows, across) + np.pi) / (2.0 * np.pi) * NUM_RAYS).astype(np.int64) % NUM_RAYS
        return cls(index, np.hypot(rows, across).astype(np.float32), across.astype(np.float32), rows > 0)

    def outermost(self, lung: np.ndarray) -> np.ndarray:
        """Largest radius of a mask on each ray of each slice, float32 (Z, NUM_RAYS); inf where it has none."""
        furthest = np.full((lung.shape[0], NUM_RAYS), -1.0, dtype=np.float32)
        z, y, x = np.nonzero(lung)
        np.maximum.at(furthest, (z, self.index[y, x]), self.radius_mm[y, x])
        furthest[furthest < 0] = np.inf
        return furthest

    def carried_down(self, reach: np.ndarray, over_mm: float, spacing_mm: Spacing) -> np.ndarray:
        """Largest ``reach`` on each ray among a slice and those up to ``over_mm`` above it; inf where there is none."""
        size = max(1, round(over_mm / spacing_mm[0]))
        known = np.where(np.isfinite(reach), reach, -1.0)
        padded = np.vstack([known, np.full((size, NUM_RAYS), -1.0, dtype=reach.dtype)])
        carried = ndimage.maximum_filter1d(padded, size + 1, axis=0, origin=-((size + 1) // 2), mode="nearest")
        result: np.ndarray = np.where(carried[: len(reach)] < 0, np.inf, carried[: len(reach)])
        return result

    def bridged(self, reach: np.ndarray, over_rays: int, over_mm: float, spacing_mm: Spacing) -> np.ndarray:
        """``reach`` with pits narrower than a window filled to the level of their rim (grey closing on the map)."""
        rows = max(1, round(over_mm / spacing_mm[0]))
        known = np.where(np.isfinite(reach), reach, -1.0)
        padded = np.pad(
            np.pad(known, ((rows, rows), (0, 0)), mode="edge"), ((0, 0), (over_rays, over_rays)), mode="wrap"
        )
        closed = ndimage.grey_closing(padded, size=(2 * (rows // 2) + 1, 2 * (over_rays // 2) + 1))
        closed = closed[rows:-rows, over_rays:-over_rays]
        result: np.ndarray = np.where(np.isfinite(reach), closed, np.inf)
        return result

    def ribs(self, hu: np.ndarray, beyond: np.ndarray, spacing_mm: Spacing) -> np.ndarray:
        """Radius of the inner side of the ribs on each ray, float32 (Z, NUM_RAYS); inf where none is near.

        ``beyond`` (Z, NUM_RAYS) is where the search begins. Gaps between ribs are bridged by their neighbours.
        """
        z, y, x = np.nonzero(hu > RIB_HU)
        ray, radius = self.index[y, x], self.radius_mm[y, x]
        outside = radius > beyond[z, ray]
        first = np.full(beyond.shape, np.inf, dtype=np.float32)
        np.minimum.at(first, (z[outside], ray[outside]), radius[outside])
        seen = np.isfinite(first)
        if not seen.any():
            return first
        nearest = float(first[seen].min())
        weight = np.where(seen, np.exp(-(np.where(seen, first, nearest) - nearest) / SOFT_MINIMUM_MM), 0.0)
        share, total = (
            ndimage.gaussian_filter1d(values.astype(np.float64), NEIGHBOURS_MM / spacing_mm[0], axis=0, mode="nearest")
            for values in (seen, weight)
        )
        near = (share > 0.02) & (total > 0.0)
        ribs = np.full(first.shape, np.inf, dtype=np.float32)
        ribs[near] = nearest - SOFT_MINIMUM_MM * np.log(total[near] / share[near])
        known = np.isfinite(ribs)
        share, total = (
            ndimage.gaussian_filter(values, (0.0, NEIGHBOUR_RAYS), mode=("nearest", "wrap"), truncate=2.5)
            for values in (known.astype(np.float64), np.where(known, ribs, 0.0))
        )
        bridged = ~known & (share > 0.02)
        ribs[bridged] = total[bridged] / share[bridged]
        # The lung reaches around the vertebrae and their processes, which hide the ribs behind them.
        angle = (np.arange(NUM_RAYS) + 0.5) / NUM_RAYS * 2.0 * np.pi - np.pi
        beside_spine = np.abs(angle - np.pi / 2.0) < BESIDE_SPINE_RAD
        known = np.where(np.isfinite(ribs), ribs, -1.0)
        widest = ndimage.maximum_filter1d(known, BESIDE_SPINE_RAYS, axis=1, mode="wrap")
        ribs[:, beside_spine] = np.where(widest < 0, np.inf, widest)[:, beside_spine]
        return ribs

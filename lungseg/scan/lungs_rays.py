"""The chest wall seen from the middle of the chest: rays in every slice, the outermost lung on each, and the ribs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.scan.lungs_grid import CoarseScan, Spacing
from lungseg.tissue import LUNG_LEFT

NUM_RAYS = 120
RIB_HU = 180.0
"""Bone on the coarse grid; contrast medium in vessels is as dense, but lies inside the lungs' outer surface."""
SOFT_MINIMUM_MM = 4.0
"""Scale of the soft minimum over neighbouring slices: between two ribs the shoulder blade must not count."""
NEIGHBOURS_MM, NEIGHBOUR_RAYS = 10.0, 4.0
"""Standard deviations, along z and over rays, by which gaps between ribs (15-25 mm) are bridged."""
MIN_WEIGHT = 0.02
"""Less than this share of a neighbourhood is none."""
ABOVE_MM, SLACK_MM = 60.0, 15.0
"""Where a slice has no lung on a ray, ribs are looked for this much within the outermost lung up to so far above."""

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
    slice_mm: float
    """Distance of slices."""

    @classmethod
    def around(cls, sides: np.ndarray, spacing_mm: Spacing) -> Rays:
        """Rays from the middle between both lungs, or from the medial edge of a single one (labels 1 left, 2 right)."""
        _, y, x = np.nonzero(sides)
        is_left = sides[sides > 0] == LUNG_LEFT
        if is_left.all() or not is_left.any():
            middle = float(x.min() if is_left.all() else x.max())
        else:
            middle = float(x[is_left].mean() + x[~is_left].mean()) / 2.0
        rows = (np.arange(sides.shape[1]) - y.mean())[:, None] * spacing_mm[1]
        across = (np.arange(sides.shape[2]) - middle)[None, :] * spacing_mm[2]
        index = ((np.arctan2(rows, across) + np.pi) / (2.0 * np.pi) * NUM_RAYS).astype(np.int64) % NUM_RAYS
        radius = np.hypot(rows, across).astype(np.float32)
        return cls(index, radius, across.astype(np.float32), rows > 0, spacing_mm[0])

    def lateral_mm(self, side: int) -> np.ndarray:
        """Distance of columns from the middle of the chest towards a side, float32 (1, X), negative on the other."""
        result: np.ndarray = self.across_mm if side == LUNG_LEFT else -self.across_mm
        return result

    def between(self, low: np.ndarray | float, high: np.ndarray) -> np.ndarray:
        """Voxels between two radii (Z, NUM_RAYS) of their ray, bool (Z, Y, X)."""
        low = np.broadcast_to(low, high.shape)
        result = np.empty((len(high), *self.index.shape), dtype=bool)
        for z in range(len(high)):
            result[z] = (self.radius_mm > low[z][self.index]) & (self.radius_mm < high[z][self.index])
        return result

    def outermost(self, lung: np.ndarray) -> np.ndarray:
        """Largest radius of a mask on each ray of each slice, float32 (Z, NUM_RAYS); inf where it has none."""
        furthest = np.full((lung.shape[0], NUM_RAYS), -1.0, dtype=np.float32)
        z, y, x = np.nonzero(lung)
        np.maximum.at(furthest, (z, self.index[y, x]), self.radius_mm[y, x])
        furthest[furthest < 0] = np.inf
        return furthest

    def carried_down(self, reach: np.ndarray, over_mm: float) -> np.ndarray:
        """Largest ``reach`` on each ray among a slice and those up to ``over_mm`` above it; inf where there is none."""
        size = max(1, round(over_mm / self.slice_mm))
        known = np.where(np.isfinite(reach), reach, -1.0)
        padded = np.vstack([known, np.full((size, NUM_RAYS), -1.0, dtype=reach.dtype)])
        carried = ndimage.maximum_filter1d(padded, size + 1, axis=0, origin=-((size + 1) // 2), mode="nearest")
        result: np.ndarray = np.where(carried[: len(reach)] < 0, np.inf, carried[: len(reach)])
        return result

    def ribs(self, hu: np.ndarray, beyond: np.ndarray) -> np.ndarray:
        """Radius of the inner side of the ribs on each ray, float32 (Z, NUM_RAYS); inf where none is near.

        ``beyond`` (Z, NUM_RAYS) is where the search begins. Gaps between ribs are bridged by their neighbours, first
        along z, then over rays.
        """
        z, y, x = np.nonzero(hu > RIB_HU)
        ray, radius = self.index[y, x], self.radius_mm[y, x]
        outside = radius > beyond[z, ray]
        first = np.full(beyond.shape, np.inf, dtype=np.float32)
        np.minimum.at(first, (z[outside], ray[outside]), radius[outside])
        if not np.isfinite(first).any():
            return first
        ribs = _soft_minimum(first, NEIGHBOURS_MM / self.slice_mm)
        known = np.isfinite(ribs)
        share, total = (
            ndimage.gaussian_filter(values, (0.0, NEIGHBOUR_RAYS), mode=("nearest", "wrap"), truncate=2.5)
            for values in (known.astype(np.float64), np.where(known, ribs, 0.0))
        )
        bridged = ~known & (share > MIN_WEIGHT)
        ribs[bridged] = total[bridged] / share[bridged]
        # The lung reaches around the vertebrae and their processes, which hide the ribs behind them.
        angle = (np.arange(NUM_RAYS) + 0.5) / NUM_RAYS * 2.0 * np.pi - np.pi
        beside_spine = np.abs(angle - np.pi / 2.0) < BESIDE_SPINE_RAD
        finite = np.where(np.isfinite(ribs), ribs, -1.0)
        widest = ndimage.maximum_filter1d(finite, BESIDE_SPINE_RAYS, axis=1, mode="wrap")
        ribs[:, beside_spine] = np.where(widest < 0, np.inf, widest)[:, beside_spine]
        return ribs


@dataclass(frozen=True)
class Wall:
    """The outer limits of one lung on each ray of each slice, (Z, NUM_RAYS) both; inf where there is none."""

    reach: np.ndarray
    """Outermost lung, mm from the middle."""
    ribs: np.ndarray
    """Inner side of the ribs."""

    @classmethod
    def around(cls, lung: np.ndarray, rays: Rays, scan: CoarseScan) -> Wall:
        """The ribs are looked for from the outermost lung of the slice, or near that of the slices above."""
        reach = rays.outermost(lung)
        above = rays.carried_down(reach, ABOVE_MM) - SLACK_MM
        begin = np.where(np.isfinite(reach), np.maximum(reach, above), above)
        return cls(reach, rays.ribs(scan.hu, begin))


def _soft_minimum(first: np.ndarray, sigma: float) -> np.ndarray:
    """Soft minimum of finite values over neighbouring slices, weighted by a Gaussian; inf where there are none."""
    seen = np.isfinite(first)
    nearest = float(first[seen].min())
    weight = np.where(seen, np.exp(-(np.where(seen, first, nearest) - nearest) / SOFT_MINIMUM_MM), 0.0)
    share, total = (
        ndimage.gaussian_filter1d(values.astype(np.float64), sigma, axis=0, mode="nearest") for values in (seen, weight)
    )
    near = (share > MIN_WEIGHT) & (total > 0.0)
    result = np.full(first.shape, np.inf, dtype=np.float32)
    result[near] = nearest - SOFT_MINIMUM_MM * np.log(total[near] / share[near])
    return result

"""HU textures of the digital phantom: parenchyma and four diseases, before vessels, blur and noise.

Every class overlaps its neighbours voxel by voxel, as in nature; mean HU differ by up to 20 HU between seeds.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from lungseg.scan.phantom_anatomy import Chest
from lungseg.scan.phantom_disease import Diseases
from lungseg.scan.phantom_noise import smooth_noise
from lungseg.tissue import Tissue

HEALTHY_HU = -880.0
"""Parenchyma between visible vessels; vessels and airway walls raise the mean of the lung to about -830."""
GRAVITY_HU = (60.0, 100.0)
"""Dependent lung is denser by this much from front to back (METHOD 6: up to 200 HU, less in inspiration)."""
EMPHYSEMA_WALL_HU, HOLE_HU, BULLA_HU = -918.0, -985.0, -995.0
GGO_HU = -650.0
FIBROSIS_HU, MESH_HU, CYST_HU = -700.0, -320.0, -940.0
CONSOLIDATION_HU = 5.0
MEAN_SD_HU = 12.0
"""Spread of the class means between seeds; cut at 20 HU."""


class _Noise:
    """Smooth noise on the grid of one chest."""

    def __init__(self, chest: Chest, rng: np.random.Generator) -> None:
        self.chest, self.rng = chest, rng

    def __call__(self, knot_mm: float) -> np.ndarray:
        return smooth_noise(self.chest.sides.shape, self.chest.spacing_mm, knot_mm=knot_mm, rng=self.rng)

    def mean(self, hu: float) -> float:
        """A class mean of this seed."""
        return hu + float(np.clip(self.rng.normal(scale=MEAN_SD_HU), -20.0, 20.0))


def lung_texture(chest: Chest, diseases: Diseases, rng: np.random.Generator) -> np.ndarray:
    """HU of lung tissue without vessels and airways, float32 (Z, Y, X); meaningless outside the lungs."""
    noise = _Noise(chest, rng)
    gravity = float(rng.uniform(*GRAVITY_HU)) * (chest.y_mm / (2.0 * chest.half_depth_mm))
    # Lobules (10-20 mm) differ a little in aeration; below them a fine grain of vessels too small to see.
    hu = noise.mean(HEALTHY_HU) + gravity + 14.0 * noise(12.0) + 16.0 * noise(5.0) + 22.0 * noise(2.2)
    paint = {
        Tissue.EMPHYSEMA: _emphysema,
        Tissue.GGO: _ggo,
        Tissue.FIBROSIS: _fibrosis,
        Tissue.CONSOLIDATION: _consolidation,
    }
    for tissue in (Tissue.EMPHYSEMA, Tissue.GGO, Tissue.FIBROSIS, Tissue.CONSOLIDATION):
        if tissue in diseases.weights:
            weight = diseases.weights[tissue]
            hu += weight * (paint[tissue](noise, gravity, weight > 0.02) - hu)
    return hu.astype(np.float32, copy=False)


def _emphysema(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Thin tissue with round holes of 2-8 mm, here and there merging into bullae."""
    tissue = noise.mean(EMPHYSEMA_WALL_HU) + 0.5 * gravity + 18.0 * noise(4.0) + 20.0 * noise(2.2)
    extent = 0.35 * noise(16.0)
    holes = np.clip((0.75 * noise(4.5) + 0.55 * noise(2.6) + extent - 0.25) / 0.35 + 0.5, 0.0, 1.0)
    bullae = np.clip((noise(9.0) + 0.25 * noise(4.0) - 1.45) / 0.15 + 0.5, 0.0, 1.0)
    hu = tissue + holes * (HOLE_HU - tissue)
    painted: np.ndarray = hu + bullae * (BULLA_HU - hu)
    return painted


def _ggo(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Haze: cloudy over centimetres, faintly granular, some regions with fine septal lines (crazy paving)."""
    hu = noise.mean(GGO_HU) + 0.6 * gravity + 45.0 * noise(10.0) + 38.0 * noise(4.0) + 30.0 * noise(2.2)
    lines, _ = _mesh(noise, region, period_mm=7.0, width_mm=1.0)
    strength = 90.0 * np.clip(noise(20.0), 0.0, 1.5)
    painted: np.ndarray = hu + strength * lines
    return painted


def _fibrosis(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Network of thick septa over mild haze; next to the pleura cells turn into honeycomb cysts."""
    rng = noise.rng
    background = noise.mean(FIBROSIS_HU) + 0.6 * gravity + 45.0 * noise(8.0) + 30.0 * noise(2.4)
    lines, cells = _mesh(noise, region, period_mm=float(rng.uniform(5.5, 7.5)), width_mm=float(rng.uniform(1.8, 2.6)))
    depth = noise.chest.lung_mm + 2.5 * noise(8.0)
    is_cyst = np.flatnonzero(rng.random(int(cells.max()) + 2) < 0.7)
    shallow = (cells > 0) & (depth < 9.0) & np.isin(cells, is_cyst)
    hu = np.where(shallow, np.float32(CYST_HU), background)
    line_hu = noise.mean(MESH_HU) + 60.0 * noise(6.0) + np.where(depth < 9.0, 60.0, 0.0)
    painted: np.ndarray = hu + lines * (line_hu - hu)
    return painted


def _consolidation(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Airless lung, slightly uneven, with pockets that still hold air."""
    hu = noise.mean(CONSOLIDATION_HU) + 22.0 * noise(6.0) + 18.0 * noise(2.5)
    pockets = np.clip((noise(4.0) - 1.75) / 0.5, 0.0, 1.0)
    painted: np.ndarray = hu + pockets * (-450.0 - hu)
    return painted


def _mesh(noise: _Noise, region: np.ndarray, *, period_mm: float, width_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Walls of a foam: share of wall per voxel, and the number of the cell (0 outside ``region``).

    Cells are Voronoi cells of a jittered lattice; their walls fade in and out with smooth noise.
    """
    spacing = np.asarray(noise.chest.spacing_mm)
    walls = np.zeros(region.shape, dtype=np.float32)
    cells = np.zeros(region.shape, dtype=np.int32)
    counts = np.ceil(np.asarray(region.shape) * spacing / period_mm).astype(int) + 1
    lattice = np.stack(np.meshgrid(*[np.arange(n) for n in counts], indexing="ij"), axis=-1).reshape(-1, 3)
    seeds = (lattice + noise.rng.uniform(-0.42, 0.42, size=lattice.shape)) * period_mm
    index = np.flatnonzero(region)
    if index.size == 0:
        return walls, cells
    points = (np.stack(np.unravel_index(index, region.shape), axis=1) + 0.5) * spacing
    distance, nearest = cKDTree(seeds).query(points, k=2)
    apart = np.linalg.norm(seeds[nearest[:, 0]] - seeds[nearest[:, 1]], axis=1)
    # Distance of a point from the plane halfway between its two nearest seeds.
    from_wall = (distance[:, 1] ** 2 - distance[:, 0] ** 2) / (2.0 * np.maximum(apart, 1e-6))
    half = 0.5 * width_mm * np.clip(0.9 + 0.45 * noise(7.0).ravel()[index], 0.0, 1.6)
    blur = float(spacing.mean())
    share = np.clip((half - from_wall) / blur + 0.5, 0.0, 1.0) * np.minimum(1.0, 2.0 * half / blur)
    walls.ravel()[index] = share
    cells.ravel()[index] = nearest[:, 0] + 1
    return walls, cells

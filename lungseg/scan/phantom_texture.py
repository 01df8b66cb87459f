"""HU textures of the digital phantom: parenchyma and its diseases, before vessels, blur and noise.

Every class overlaps its neighbours voxel by voxel, as in nature; mean HU differ by up to 20 HU between seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from lungseg.scan.phantom_anatomy import Chest
from lungseg.scan.phantom_disease import Diseases
from lungseg.scan.phantom_noise import smooth_noise
from lungseg.tissue import Tissue

HEALTHY_HU = -878.0
"""Parenchyma between visible vessels; vessels and airway walls raise the mean of the lung to about -830."""
GRAVITY_HU = (50.0, 85.0)
"""Dependent lung is denser by this much from front to back (METHOD 6: up to 200 HU, less in inspiration)."""
EMPHYSEMA_HU, HOLE_HU, BULLA_HU, BULLA_WALL_HU = -896.0, -994.0, -997.0, -640.0
HOLE_PERIOD_MM, HOLE_RADIUS_MM = 7.5, (2.2, 5.5)
"""Centrilobular holes: distance of lobule centres and radius, so 3 to 10 mm wide."""
BULLA_MM, BULLA_DEPTH_MM = 15.0, 14.0
"""Paraseptal bullae: width, and how far below the pleura they reach."""
GGO_HU = -625.0
FIBROSIS_HU, MESH_HU, CYST_HU = -705.0, -90.0, -955.0
HONEYCOMB_DEPTH_MM = 13.0
"""Next to the pleura cells of the network turn into honeycomb cysts."""
CONSOLIDATION_HU = 40.0
CAVITY_HU = -985.0
MEAN_SD_HU = 12.0
"""Spread of the class means between seeds; cut at 20 HU."""


class _Noise:
    """Smooth noise on (a part of) the grid of one chest."""

    def __init__(self, chest: Chest, rng: np.random.Generator, box: tuple[slice, ...] | None = None) -> None:
        self.rng, self.spacing_mm = rng, chest.spacing_mm
        self.lung_mm = chest.lung_mm if box is None else chest.lung_mm[box]

    def __call__(self, knot_mm: float) -> np.ndarray:
        return smooth_noise(self.lung_mm.shape, self.spacing_mm, knot_mm=knot_mm, rng=self.rng)

    def mean(self, hu: float) -> float:
        """A class mean of this seed."""
        return hu + float(np.clip(self.rng.normal(scale=MEAN_SD_HU), -20.0, 20.0))


Painter = Callable[[_Noise, np.ndarray, np.ndarray], np.ndarray]
"""Noise, gravity (1, Y, 1) and region (bool) of a box to HU in it."""


def lung_texture(chest: Chest, diseases: Diseases, rng: np.random.Generator) -> np.ndarray:
    """HU of lung tissue without vessels and airways, float32 (Z, Y, X); meaningless outside the lungs."""
    noise = _Noise(chest, rng)
    gravity = float(rng.uniform(*GRAVITY_HU)) * (chest.y_mm / (2.0 * chest.half_depth_mm))
    # Lobules (10-20 mm) differ a little in aeration; below them a fine grain of vessels too small to see.
    hu = noise.mean(HEALTHY_HU) + gravity + 10.0 * noise(12.0) + 9.0 * noise(5.0) + 12.0 * noise(2.2)
    hu = hu.astype(np.float32, copy=False)
    painters: dict[Tissue, Painter] = {
        Tissue.EMPHYSEMA: _emphysema,
        Tissue.GGO: _ggo,
        Tissue.FIBROSIS: _fibrosis,
        Tissue.CONSOLIDATION: _consolidation,
        Tissue.CAVITY: _cavity,
    }
    for tissue, painter in painters.items():
        weight = diseases.weights.get(tissue)
        found = ndimage.find_objects((weight > 0.02).astype(np.uint8)) if weight is not None else []
        if weight is None or not found:
            continue
        box = found[0]
        part = weight[box]
        region = (part > 0.02) & (chest.lung_mm[box] > -2.0)
        painted = painter(_Noise(chest, rng, box), gravity[:, box[1]], region)
        hu[box] += part * (painted - hu[box])
    return hu


def _emphysema(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Centrilobular holes of 3 to 10 mm without walls of their own; at the pleura a row of walled bullae."""
    rng = noise.rng
    tissue = noise.mean(EMPHYSEMA_HU) + 0.5 * gravity + 18.0 * noise(5.0) + 22.0 * noise(2.2)
    walls, _ = _mesh(noise, region & (noise.lung_mm < BULLA_DEPTH_MM + 3.0), period_mm=BULLA_MM, width_mm=0.9)
    index = np.flatnonzero(region)
    holes = np.zeros(region.size, dtype=np.float32)
    if index.size:
        seeds = _jittered(region.shape, noise.spacing_mm, HOLE_PERIOD_MM, rng)
        low, high = np.log(HOLE_RADIUS_MM)
        radius = np.exp(rng.uniform(low, high, size=len(seeds))) * (rng.random(len(seeds)) < 0.95)
        distance, nearest = cKDTree(seeds).query(_points(index, region.shape, noise.spacing_mm))
        grown = radius[nearest] + (0.7 * noise(3.0) + 0.9 * noise(16.0)).ravel()[index]
        holes[index] = np.clip((grown - distance) / 1.2 + 0.5, 0.0, 1.0)
    hu = tissue + holes.reshape(region.shape) * (HOLE_HU - tissue)
    bullous = np.clip((BULLA_DEPTH_MM + 2.0 * noise(9.0) - noise.lung_mm) / 2.0, 0.0, 1.0)
    bullous *= np.clip((noise(30.0) - 0.1) / 0.2 + 0.5, 0.0, 1.0)
    bulla = BULLA_HU + walls * (BULLA_WALL_HU - BULLA_HU)
    painted: np.ndarray = hu + bullous * (bulla - hu)
    return painted


def _ggo(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Haze: cloudy over centimetres, faintly granular, some regions with fine septal lines (crazy paving)."""
    hu = noise.mean(GGO_HU) + 0.6 * gravity + 48.0 * noise(16.0) + 38.0 * noise(6.0) + 30.0 * noise(2.4)
    lines, _ = _mesh(noise, region, period_mm=7.0, width_mm=1.0)
    painted: np.ndarray = hu + 120.0 * np.clip(noise(20.0), 0.0, 1.5) * lines
    return painted


def _fibrosis(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Network of septa 1 to 3 mm thick over mild haze; at the pleura honeycomb cysts of 3 to 10 mm in layers."""
    rng = noise.rng
    background = noise.mean(FIBROSIS_HU) + 0.6 * gravity + 60.0 * noise(9.0) + 35.0 * noise(2.6)
    lines, cells = _mesh(noise, region, period_mm=float(rng.uniform(5.5, 8.0)), width_mm=float(rng.uniform(1.3, 2.0)))
    depth = noise.lung_mm + 3.0 * noise(9.0)
    is_cyst = np.append(False, rng.random(int(cells.max()) + 1) < 0.85)  # cell 0 is no cell
    shallow = (depth < HONEYCOMB_DEPTH_MM) & is_cyst[cells]
    hu = np.where(shallow, np.float32(CYST_HU), background)
    line_hu = noise.mean(MESH_HU) + 70.0 * noise(6.0)
    painted: np.ndarray = hu + lines * (line_hu - hu)
    return painted


def _consolidation(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Airless lung, slightly uneven, with lobules that still hold some air."""
    hu = noise.mean(CONSOLIDATION_HU) + 14.0 * noise(6.0) + 12.0 * noise(2.5)
    partly = np.clip((noise(11.0) + 0.5 * noise(4.0) - 1.2) / 0.8, 0.0, 1.0)
    painted: np.ndarray = hu + partly * (-480.0 - hu)
    return painted


def _cavity(noise: _Noise, gravity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Gas."""
    return np.full(region.shape, CAVITY_HU, dtype=np.float32)


def _jittered(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], period_mm: float, rng: np.random.Generator
) -> np.ndarray:
    """Points (N, 3) in mm of a lattice over a grid, each moved at random by up to 0.42 periods."""
    counts = np.ceil(np.asarray(shape) * np.asarray(spacing_mm) / period_mm).astype(int) + 1
    lattice = np.stack(np.meshgrid(*[np.arange(n) for n in counts], indexing="ij"), axis=-1).reshape(-1, 3)
    points: np.ndarray = (lattice + rng.uniform(-0.42, 0.42, size=lattice.shape)) * period_mm
    return points


def _points(index: np.ndarray, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Centres (N, 3) in mm of voxels given by flat index."""
    centres: np.ndarray = (np.stack(np.unravel_index(index, shape), axis=1) + 0.5) * np.asarray(spacing_mm)
    return centres


def _mesh(noise: _Noise, region: np.ndarray, *, period_mm: float, width_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Walls of a foam: share of wall per voxel, and the number of the cell (0 outside ``region``).

    Cells are Voronoi cells of a jittered lattice; their walls fade in and out with smooth noise.
    """
    walls = np.zeros(region.shape, dtype=np.float32)
    cells = np.zeros(region.shape, dtype=np.int32)
    index = np.flatnonzero(region)
    if index.size == 0:
        return walls, cells
    seeds = _jittered(region.shape, noise.spacing_mm, period_mm, noise.rng)
    distance, nearest = cKDTree(seeds).query(_points(index, region.shape, noise.spacing_mm), k=2)
    apart = np.linalg.norm(seeds[nearest[:, 0]] - seeds[nearest[:, 1]], axis=1)
    # Distance of a point from the plane halfway between its two nearest seeds.
    from_wall = (distance[:, 1] ** 2 - distance[:, 0] ** 2) / (2.0 * np.maximum(apart, 1e-6))
    half = 0.5 * width_mm * np.clip(0.9 + 0.45 * noise(7.0).ravel()[index], 0.0, 1.6)
    blur = float(np.mean(noise.spacing_mm))
    share = np.clip((half - from_wall) / blur + 0.5, 0.0, 1.0) * np.minimum(1.0, 2.0 * half / blur)
    walls.ravel()[index] = share
    cells.ravel()[index] = nearest[:, 0] + 1
    return walls, cells

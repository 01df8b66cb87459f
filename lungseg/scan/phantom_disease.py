"""Where the diseases of the digital phantom sit: irregular regions at plausible sites.

A region is a level set of "distance from a few lesion centres plus smooth noise", so its border is irregular and
its total volume can be set exactly. Textures are in ``phantom_texture.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.scan.phantom_anatomy import Chest
from lungseg.scan.phantom_noise import smooth_noise
from lungseg.tissue import Tissue, tissue_by_name

SEVERITY_SHARE = {"healthy": (0.0, 0.0), "mild": (0.10, 0.18), "moderate": (0.29, 0.39), "severe": (0.50, 0.62)}
"""Diseased share of the lung, lowest and highest: our choice."""
CONSOLIDATION_SHARE_MAX = 0.09
"""Consolidation above this share of the lung is left to the other diseases, if there are any."""
RADIUS_MM = (8.0, 21.0)
"""Radius of one lesion before its border is roughened; a region is about 15 to 45 mm wide."""
PLEURAL_CONSOLIDATION_RADIUS_MM = 12.0
"""Largest radius of a consolidation near the pleura, so that a simple closing of the lung field can bridge it."""
MIN_PIECE_ML = 0.3
"""Smaller islands of a disease are given back to healthy lung."""
ORDER = (Tissue.CONSOLIDATION, Tissue.FIBROSIS, Tissue.EMPHYSEMA, Tissue.GGO)
"""Diseases with the strictest sites choose first."""
SOFTNESS_MM = {Tissue.CONSOLIDATION: 1.0, Tissue.FIBROSIS: 2.0, Tissue.EMPHYSEMA: 3.0, Tissue.GGO: 2.5}
"""Half-width of the border over which a disease fades into its surroundings."""


@dataclass(frozen=True)
class Sites:
    """Position of lung voxels in words of anatomy."""

    depth_mm: np.ndarray
    """Below the pleura."""
    cranial: np.ndarray
    """0 at the lowest, 1 at the highest voxel of the lungs."""
    dorsal: np.ndarray
    """0 at the front, 1 at the back."""


@dataclass(frozen=True)
class Diseases:
    """Region labels and soft shares on the grid of the simulation."""

    labels: np.ndarray
    """uint8 tissue ids, 0 outside the lungs."""
    weights: dict[Tissue, np.ndarray]
    """float32 share of each disease, 0...1, for mixing HU at the borders."""


def place_diseases(chest: Chest, names: Sequence[str], severity: str, rng: np.random.Generator) -> Diseases:
    """Regions of the named diseases in the lungs of ``chest``.

    The diseased share is drawn from ``SEVERITY_SHARE``; each disease gets a random, similar part of it.
    """
    inside = chest.sides > 0
    labels = inside.astype(np.uint8)
    shares = _shares(names, severity, rng)
    weights: dict[Tissue, np.ndarray] = {}
    if not shares:
        return Diseases(labels, weights)
    num_lung = int(inside.sum())
    for tissue in ORDER:
        if tissue not in shares:
            continue
        free = labels == Tissue.HEALTHY
        field = _lesions(chest, tissue, free, round(shares[tissue] * num_lung), rng)
        field += _roughness(chest, tissue, rng)
        wanted = min(shares[tissue] * num_lung / max(int(free.sum()), 1), 1.0)
        level = min(float(np.quantile(field[free], wanted)), 1.7)
        taken = _drop_islands(free & (field < level), chest.spacing_mm)
        labels[taken] = tissue
        weights[tissue] = _soft(taken, SOFTNESS_MM[tissue], chest.spacing_mm)
    return Diseases(labels, weights)


def _shares(names: Sequence[str], severity: str, rng: np.random.Generator) -> dict[Tissue, float]:
    """Share of the lung for each disease; draws the same numbers for any subset of names."""
    low, high = SEVERITY_SHARE[severity]
    total = float(rng.uniform(low, high))
    parts = dict(zip(ORDER, rng.uniform(0.7, 1.3, size=len(ORDER)), strict=True))
    tissues = [tissue_by_name(name) for name in names]
    if not tissues:
        return {}
    whole = sum(parts[tissue] for tissue in tissues)
    shares = {tissue: float(total * parts[tissue] / whole) for tissue in tissues}
    surplus = shares.get(Tissue.CONSOLIDATION, 0.0) - CONSOLIDATION_SHARE_MAX
    if surplus > 0 and len(shares) > 1:
        shares[Tissue.CONSOLIDATION] = CONSOLIDATION_SHARE_MAX
        for tissue in shares.keys() - {Tissue.CONSOLIDATION}:
            shares[tissue] += surplus / (len(shares) - 1)
    return shares


def _lesions(chest: Chest, tissue: Tissue, free: np.ndarray, num_wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Distance from the nearest lesion in units of its radius; lesions are added until they cover enough."""
    field = np.full(free.shape, 4.0, dtype=np.float32)
    points = np.argwhere(free)
    points = points[rng.integers(len(points), size=6000)]
    depth = chest.lung_mm[tuple(points.T)]
    lung_z = np.flatnonzero((chest.sides > 0).any(axis=(1, 2)))
    sites = Sites(
        depth,
        (points[:, 0] - lung_z[0]) / max(lung_z[-1] - lung_z[0], 1),
        np.clip(chest.y_mm[0, points[:, 1], 0] / chest.half_depth_mm * 0.5 + 0.5, 0.0, 1.0),
    )
    prior = _prior(tissue, sites, rng)
    spacing = np.asarray(chest.spacing_mm)
    covered = 0
    for chosen in rng.choice(len(points), size=400, p=prior / prior.sum()):
        radius = float(rng.uniform(*RADIUS_MM))
        stretch = rng.uniform(0.8, 1.2, size=3)
        if tissue == Tissue.CONSOLIDATION:
            stretch = rng.uniform(0.7, 1.35, size=3)
            if depth[chosen] < radius:
                radius = min(radius, PLEURAL_CONSOLIDATION_RADIUS_MM)
                if field[tuple(points[chosen])] < 1.8:
                    continue
        covered += _stamp(field, free, points[chosen], radius * stretch, spacing)
        if covered >= num_wanted:
            break
    return field


def _stamp(field: np.ndarray, free: np.ndarray, centre: np.ndarray, radii: np.ndarray, spacing: np.ndarray) -> int:
    """Lower ``field`` around one ellipsoid; the number of free voxels newly inside it."""
    reach = np.ceil(2.2 * radii / spacing).astype(int)
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, field.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    z, y, x = (
        ((np.arange(a, b) - c) * s / r).astype(np.float32) ** 2
        for a, b, c, s, r in zip(low, high, centre, spacing, radii, strict=True)
    )
    distance = np.sqrt(z[:, None, None] + y[None, :, None] + x[None, None, :])
    gained = int(((distance < 1.0) & (field[box] >= 1.0) & free[box]).sum())
    np.minimum(field[box], distance, out=field[box])
    return gained


def _prior(tissue: Tissue, sites: Sites, rng: np.random.Generator) -> np.ndarray:
    """How likely a lesion starts at a point: usual distribution of each disease (general knowledge)."""
    if tissue == Tissue.EMPHYSEMA:  # centrilobular: upper lobes; one in four is basal (panlobular)
        height = 1.0 - sites.cranial if rng.random() < 0.25 else sites.cranial
        return 0.06 + height**2.5
    if tissue == Tissue.FIBROSIS:  # basal and subpleural
        return 0.01 + (1.0 - sites.cranial) ** 1.5 * np.exp(-sites.depth_mm / 7.0) * (0.2 + sites.dorsal)
    if tissue == Tissue.CONSOLIDATION:  # dependent, lower zones
        return 0.03 + (0.15 + sites.dorsal) ** 1.5 * (1.1 - sites.cranial)
    return 0.3 + np.exp(-sites.depth_mm / 15.0) * (0.5 + sites.dorsal)  # GGO: patchy, mostly peripheral


def _roughness(chest: Chest, tissue: Tissue, rng: np.random.Generator) -> np.ndarray:
    """Noise that makes borders irregular; fibrosis also fades with depth below the pleura."""
    shape = chest.sides.shape
    rough = 0.22 * smooth_noise(shape, chest.spacing_mm, knot_mm=9.0, rng=rng)
    rough += 0.12 * smooth_noise(shape, chest.spacing_mm, knot_mm=4.0, rng=rng)
    if tissue == Tissue.CONSOLIDATION:
        rough *= 1.7
    if tissue == Tissue.FIBROSIS:
        rough += np.clip((chest.lung_mm - 14.0) / 14.0, 0.0, 3.0)
    return rough


def _drop_islands(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """``mask`` without pieces below ``MIN_PIECE_ML``; the largest piece always stays."""
    pieces, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    keep = sizes * float(np.prod(spacing_mm)) / 1000.0 >= MIN_PIECE_ML
    keep[sizes.argmax()] = True
    kept: np.ndarray = keep[pieces]
    return kept


def _soft(mask: np.ndarray, softness_mm: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Share that runs from 0 to 1 over the border of a region."""
    sigma = softness_mm / np.asarray(spacing_mm)
    return ndimage.gaussian_filter(mask.astype(np.float32), sigma, truncate=2.5)

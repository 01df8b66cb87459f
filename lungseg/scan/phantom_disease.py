"""Where the diseases of the digital phantom sit: irregular regions at plausible sites.

A region is a level set of a smooth field on a lattice of about 2.5 mm: distance from a few lesion centres (or, for
fibrosis, depth below the pleura) plus noise, so its border is irregular and its volume can be set. Secondary lobules
shift the field one by one: ground glass and consolidation end at them. Textures are in ``phantom_texture.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from lungseg.scan.phantom_anatomy import Chest
from lungseg.scan.phantom_noise import knot_count, smooth_noise, spread_knots
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT, Tissue, tissue_by_name

SEVERITY_SHARE = {"healthy": (0.0, 0.0), "mild": (0.10, 0.18), "moderate": (0.29, 0.39), "severe": (0.50, 0.62)}
"""Diseased share of the lung, lowest and highest: our choice."""
CONSOLIDATION_SHARE_MAX = {"healthy": 0.0, "mild": 0.06, "moderate": 0.09, "severe": 0.14}
"""Consolidation above this share of the lung is left to the other diseases, if there are any."""
LATTICE_MM = 2.5
RADIUS_MM = {Tissue.EMPHYSEMA: (12.0, 30.0), Tissue.GGO: (11.0, 30.0), Tissue.CONSOLIDATION: (11.0, 24.0)}
"""Radius of one lesion in a reference adult before its border is roughened."""
LARGE_RADIUS_MM = (22.0, 32.0)
"""Of the large consolidation at the pleura: wider than 3 cm in an adult."""
LOBULE_MM = 14.0
"""Size of a secondary pulmonary lobule (10 to 25 mm, general knowledge)."""
LOBULE_EDGE = {Tissue.EMPHYSEMA: 0.10, Tissue.GGO: 0.30, Tissue.FIBROSIS: 0.12, Tissue.CONSOLIDATION: 0.22}
"""Standard deviation between lobules of a field that is 1 at the edge of a lesion."""
MIN_PIECE_ML = 0.3
"""Smaller islands of a disease are given back to healthy lung."""
ORDER = (Tissue.CONSOLIDATION, Tissue.FIBROSIS, Tissue.EMPHYSEMA, Tissue.GGO)
"""Diseases with the strictest sites choose first."""
SOFTNESS = {Tissue.CONSOLIDATION: 0.14, Tissue.FIBROSIS: 0.30, Tissue.EMPHYSEMA: 0.15, Tissue.GGO: 0.24}
"""Half-width of the border over which a disease fades into its surroundings, in units of the field (1 is a radius)."""
FAR = 9.0
"""Value of a field away from every lesion."""
NODULE_RADIUS_MM, NUM_NODULES = (2.5, 9.0), (4, 9)
MASS_RADIUS_MM = (13.0, 20.0)
CAVITY_SHARE = (0.45, 0.62)
"""Radius of a cavity against that of the mass it lies in; the wall stays thicker than 3 mm."""


@dataclass(frozen=True)
class Diseases:
    """Region labels and soft shares on the grid of the simulation."""

    labels: np.ndarray
    """uint8 tissue ids, 0 outside the lungs."""
    weights: dict[Tissue, np.ndarray]
    """float32 share of each disease, 0 to 1, for mixing HU at the borders; `Tissue.CAVITY`: share of its gas."""


@dataclass(frozen=True)
class _Lattice:
    """Lung points of the coarse lattice in words of anatomy; arrays of the lattice's shape."""

    picks: tuple[np.ndarray, ...]
    """Index of the nearest voxel of the grid, for :func:`numpy.ix_`."""
    lung: np.ndarray
    depth_mm: np.ndarray
    cranial: np.ndarray
    """0 at the lowest, 1 at the highest slice of each lung."""
    dorsal: np.ndarray
    """0 at the front, 1 at the back."""
    medial: np.ndarray
    """1 at the midline, 0 in the outer half of the chest."""
    lobule: np.ndarray
    """Standard normal number of the lobule a point lies in."""

    def noise(self, knot_mm: float, rng: np.random.Generator) -> np.ndarray:
        """Smooth noise on the lattice."""
        return smooth_noise(self.lung.shape, (LATTICE_MM,) * 3, knot_mm=knot_mm, rng=rng)


def place_diseases(
    chest: Chest,
    names: Sequence[str],
    severity: str,
    rng: np.random.Generator,
    *,
    large_consolidation: bool = False,
    cavity: bool = False,
    nodules: bool = False,
) -> Diseases:
    """Regions of the named diseases in the lungs of ``chest``.

    The diseased share is drawn from ``SEVERITY_SHARE``; each disease gets a random, similar part of it. Nodules, and
    the wall of a cavity, are airless and count as consolidation; the gas in it counts as cavity.
    """
    labels = (chest.sides > 0).astype(np.uint8)
    weights: dict[Tissue, np.ndarray] = {}
    shares = _shares(names, severity, rng)
    if shares and labels.any():
        lattice = _lattice(chest, rng)
        free = lattice.lung.copy()
        num_lung, num_voxels = int(free.sum()), int((labels > 0).sum())
        for tissue in (tissue for tissue in ORDER if tissue in shares):
            large = large_consolidation and tissue == Tissue.CONSOLIDATION
            field = _field(lattice, tissue, free, shares[tissue] * num_lung, chest.scale, large, rng)
            wanted = min(shares[tissue] * num_lung / max(int(free.sum()), 1), 0.9)
            near = free & (field < float(np.quantile(field[free], wanted)))
            field[near & ~_drop_islands(near)] = FAR
            field = spread_knots(field, labels.shape, chest.spacing_mm, knot_mm=LATTICE_MM)
            # The lattice is too coarse to count by: the level that gives the share is found on the voxels.
            healthy = labels == Tissue.HEALTHY
            wanted = min(shares[tissue] * num_voxels / max(int(healthy.sum()), 1), 0.9)
            field -= np.float32(np.quantile(field[healthy], wanted))
            weights[tissue] = np.clip(0.5 - field / np.float32(2.0 * SOFTNESS[tissue]), 0.0, 1.0)
            labels[healthy & (field < 0)] = tissue
            free = lattice.lung & (labels[lattice.picks] == Tissue.HEALTHY)
        if {Tissue.GGO, Tissue.EMPHYSEMA} <= weights.keys():
            # The only one that chooses after another and is painted over it: the picture must show what the label says.
            weights[Tissue.GGO] *= np.float32(1.0) - weights[Tissue.EMPHYSEMA]
    if nodules:
        for _ in range(int(rng.integers(*NUM_NODULES))):
            radius = float(np.exp(rng.uniform(*np.log(NODULE_RADIUS_MM)))) * chest.scale
            _draw_ball(chest, labels, weights, Tissue.CONSOLIDATION, _site(chest, radius + 2.0, rng), radius, rng)
    if cavity:
        radius = float(rng.uniform(*MASS_RADIUS_MM)) * chest.scale
        centre = _site(chest, radius, rng)
        _draw_ball(chest, labels, weights, Tissue.CONSOLIDATION, centre, radius, rng)
        inner = min(radius * float(rng.uniform(*CAVITY_SHARE)), radius - 3.0)
        _draw_ball(chest, labels, weights, Tissue.CAVITY, centre, inner, rng)
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
    surplus = shares.get(Tissue.CONSOLIDATION, 0.0) - CONSOLIDATION_SHARE_MAX[severity]
    if surplus > 0 and len(shares) > 1:
        shares[Tissue.CONSOLIDATION] -= surplus
        for tissue in shares.keys() - {Tissue.CONSOLIDATION}:
            shares[tissue] += surplus / (len(shares) - 1)
    return shares


def _lattice(chest: Chest, rng: np.random.Generator) -> _Lattice:
    """The lattice over a chest, sampled at the nearest voxels."""
    picks = []
    for n, s in zip(chest.sides.shape, chest.spacing_mm, strict=True):
        position = (np.arange(knot_count(n, s, LATTICE_MM)) - 1.0) * LATTICE_MM
        picks.append(np.clip(np.floor(position / s).astype(int), 0, n - 1))
    grid = np.ix_(*picks)
    sides = chest.sides[grid]
    lung = sides > 0
    cranial = np.zeros(lung.shape, dtype=np.float32)
    for side in (LUNG_LEFT, LUNG_RIGHT):
        rows = np.flatnonzero((sides == side).any(axis=(1, 2)))
        if rows.size:
            height = (np.arange(lung.shape[0]) - rows[0]) / max(int(rows[-1] - rows[0]), 1)
            cranial = np.where(sides == side, height[:, None, None].astype(np.float32), cranial)
    dorsal = np.clip(chest.y_mm[0, picks[1], 0] / chest.half_depth_mm * 0.5 + 0.5, 0.0, 1.0)
    points = np.argwhere(lung) * LATTICE_MM
    counts = np.ceil(np.asarray(lung.shape) * LATTICE_MM / LOBULE_MM).astype(int) + 1
    seeds = np.stack(np.meshgrid(*[np.arange(n) for n in counts], indexing="ij"), axis=-1).reshape(-1, 3)
    seeds = (seeds + rng.uniform(-0.4, 0.4, size=seeds.shape)) * LOBULE_MM
    values = rng.standard_normal(len(seeds)).astype(np.float32)
    lobule = np.zeros(lung.shape, dtype=np.float32)
    if len(points):
        lobule[lung] = values[cKDTree(seeds).query(points)[1]]
    medial = np.clip(1.0 - 2.0 * np.abs(chest.x_mm[0, 0, picks[2]]) / chest.half_width_mm, 0.0, 1.0)
    return _Lattice(
        grid,
        lung,
        chest.lung_mm[grid],
        cranial,
        np.broadcast_to(dorsal[None, :, None], lung.shape).astype(np.float32),
        np.broadcast_to(medial[None, None, :], lung.shape).astype(np.float32),
        lobule,
    )


def _field(
    lattice: _Lattice,
    tissue: Tissue,
    free: np.ndarray,
    num_wanted: float,
    scale: float,
    large: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Field of one disease on the lattice: below about 1 inside its lesions."""
    size = float(np.clip(scale, 0.55, 1.0))
    if tissue == Tissue.FIBROSIS:
        # A rind below the pleura of ribs and diaphragm, thick at the base and at the back, with gaps.
        field = lattice.depth_mm / (15.0 * size) + 2.4 * lattice.cranial + 1.2 * (1.0 - lattice.dorsal)
        field = (field + 0.9 * lattice.medial + 0.6 * lattice.noise(26.0 * size, rng)).astype(np.float32)
    else:
        field = _lesions(lattice, tissue, free, num_wanted, size, large, rng)
    field += 0.16 * lattice.noise(9.0, rng) + 0.10 * lattice.noise(4.0, rng)
    field += LOBULE_EDGE[tissue] * lattice.lobule
    return field


def _lesions(
    lattice: _Lattice,
    tissue: Tissue,
    free: np.ndarray,
    num_wanted: float,
    size: float,
    large: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Distance from the nearest lesion in units of its radius; lesions are added until they cover enough."""
    field = np.full(free.shape, FAR, dtype=np.float32)
    points = np.argwhere(free)
    if len(points) == 0:
        return field
    points = points[rng.integers(len(points), size=4000)]
    index = tuple(points.T)
    prior = _prior(tissue, lattice, index, rng)
    covered = 0.0
    if large:
        shallow = np.flatnonzero((lattice.depth_mm[index] < 8.0) & (lattice.dorsal[index] > 0.5))
        first = int(shallow[0]) if shallow.size else 0
        covered += _stamp(field, free, points[first], rng.uniform(*LARGE_RADIUS_MM) * size * rng.uniform(0.85, 1.2, 3))
    for chosen in rng.choice(len(points), size=300, p=prior / prior.sum()):
        if covered >= 1.1 * num_wanted:
            break
        radius = float(rng.uniform(*RADIUS_MM[tissue])) * size
        covered += _stamp(field, free, points[chosen], radius * rng.uniform(0.75, 1.3, size=3))
    return field


def _stamp(field: np.ndarray, free: np.ndarray, centre: np.ndarray, radii_mm: np.ndarray) -> float:
    """Lower ``field`` around one ellipsoid; the number of free points newly inside it."""
    reach = np.ceil(2.5 * radii_mm / LATTICE_MM).astype(int)
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, field.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    z, y, x = (
        ((np.arange(a, b) - c) * LATTICE_MM / r).astype(np.float32) ** 2
        for a, b, c, r in zip(low, high, centre, radii_mm, strict=True)
    )
    distance = np.sqrt(z[:, None, None] + y[None, :, None] + x[None, None, :])
    gained = int(((distance < 1.0) & (field[box] >= 1.0) & free[box]).sum())
    np.minimum(field[box], distance, out=field[box])
    return float(gained)


def _prior(tissue: Tissue, lattice: _Lattice, index: tuple[np.ndarray, ...], rng: np.random.Generator) -> np.ndarray:
    """How likely a lesion starts at a point: usual distribution of each disease (general knowledge)."""
    cranial, dorsal, depth = lattice.cranial[index], lattice.dorsal[index], lattice.depth_mm[index]
    if tissue == Tissue.EMPHYSEMA:  # centrilobular: upper lobes; one in seven is basal (panlobular)
        height = 1.0 - cranial if rng.random() < 0.15 else cranial
        return 0.01 + height**4
    if tissue == Tissue.CONSOLIDATION:  # dependent, lower zones
        return 0.02 + (0.1 + dorsal) ** 2 * (1.1 - cranial)
    return 0.1 + np.exp(-depth / 15.0) * (0.4 + dorsal)  # GGO: patchy, mostly peripheral


def _drop_islands(mask: np.ndarray) -> np.ndarray:
    """``mask`` on the lattice without pieces below ``MIN_PIECE_ML``; the largest piece always stays."""
    pieces, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    keep = sizes * LATTICE_MM**3 / 1000.0 >= MIN_PIECE_ML
    keep[sizes.argmax()] = True
    kept: np.ndarray = keep[pieces]
    return kept


def _site(chest: Chest, depth_mm: float, rng: np.random.Generator) -> np.ndarray:
    """A random lung voxel about this deep below the pleura, or the deepest there is."""
    deep = np.flatnonzero((chest.lung_mm > depth_mm) & (chest.sides > 0))
    if deep.size == 0:
        deep = np.array([int(np.argmax(np.where(chest.sides > 0, chest.lung_mm, -1.0)))])
    return np.asarray(np.unravel_index(int(deep[rng.integers(deep.size)]), chest.sides.shape))


def _draw_ball(
    chest: Chest,
    labels: np.ndarray,
    weights: dict[Tissue, np.ndarray],
    tissue: Tissue,
    centre: np.ndarray,
    radius_mm: float,
    rng: np.random.Generator,
) -> None:
    """A rounded lesion with an uneven edge, drawn into labels and weights."""
    if tissue not in weights:
        weights[tissue] = np.zeros(labels.shape, dtype=np.float32)
    reach = np.ceil(1.5 * (radius_mm + 1.0) / np.asarray(chest.spacing_mm)).astype(int)
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, labels.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = ((np.arange(a, b) - c) * s for a, b, c, s in zip(low, high, centre, chest.spacing_mm, strict=True))
    z, y, x = np.ix_(*axes)
    distance = np.sqrt(z**2 + y**2 + x**2)
    uneven = smooth_noise(distance.shape, chest.spacing_mm, knot_mm=0.6 * radius_mm + 1.5, rng=rng)
    distance = distance + 0.12 * radius_mm * uneven
    share = np.clip((radius_mm - distance) / 1.2 + 0.5, 0.0, 1.0).astype(np.float32)
    share *= chest.sides[box] > 0
    np.maximum(weights[tissue][box], share, out=weights[tissue][box])
    labels[box][(share > 0.5) & (labels[box] > 0)] = tissue

"""The digital chest phantom: a CT-like scan of which the truth is known voxel by voxel.

``make_phantom`` builds a chest that fills the field of view, paints lung tissue and diseases with their own
textures, then blurs, averages down to the slices asked for and adds correlated noise. Axes as in ``volume.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.errors import InputError
from lungseg.scan.phantom_anatomy import AIR, Chest, build_chest
from lungseg.scan.phantom_disease import SEVERITY_SHARE, Diseases, place_diseases
from lungseg.scan.phantom_noise import ct_noise, smooth_noise
from lungseg.scan.phantom_texture import lung_texture
from lungseg.scan.phantom_tubes import Tubes, companions, draw_tubes, grow_tree
from lungseg.scan.volume import AIR_HU, Geometry, Triple
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT, Tissue

DISEASES = ("emphysema", "ggo", "fibrosis", "consolidation")
"""Names a phantom's ``diseases`` may hold."""
SIMULATION_SPACING_MM = 1.0
"""The grid of the simulation divides each output voxel into pieces of about this size; finer output stays as it is."""
VESSEL_HU = 30.0
AIRWAY_HU, AIRWAY_WALL_HU = -985.0, -200.0
MAX_HU = 3071
MIN_EXTENT_MM = (100.0, 110.0, 130.0)
"""Smallest field of view that still holds a chest with room for lesions."""


@dataclass(frozen=True)
class PhantomSpec:
    """What to scan and how; a phantom is a function of this and a seed."""

    extent_mm: Triple = (150.0, 190.0, 240.0)
    """Field of view (z, y, x) in mm, edge to edge; the chest is scaled to fill it. The default is a small chest."""
    spacing_mm: Triple = (2.0, 1.25, 1.25)
    """Voxel size (z, y, x) of the output in mm; z is both slice distance and slice thickness."""
    severity: str = "healthy"
    """healthy, mild (about 10-18 % of the lung), moderate (about 29-39 %) or severe (about 50-62 %)."""
    diseases: tuple[str, ...] = ()
    """Tissue names out of emphysema, ggo, fibrosis, consolidation; empty if, and only if, healthy."""
    noise_hu: float = 30.0
    """Standard deviation of the noise in HU in the middle of the body."""
    psf_mm: float = 0.6
    """Standard deviation in mm of the Gaussian point-spread function, besides the averaging over a voxel."""

    def __post_init__(self) -> None:
        if any(have < need for have, need in zip(self.extent_mm, MIN_EXTENT_MM, strict=True)):
            raise InputError(f"a phantom needs a field of view of at least {MIN_EXTENT_MM} mm, not {self.extent_mm}")
        if not all(0.3 <= s <= 10.0 for s in self.spacing_mm):
            raise InputError(f"phantom spacing must lie between 0.3 and 10 mm, not {self.spacing_mm}")
        if self.severity not in SEVERITY_SHARE:
            raise InputError(f"phantom severity is one of {', '.join(SEVERITY_SHARE)}, not {self.severity!r}")
        unknown = set(self.diseases) - set(DISEASES)
        if unknown or len(set(self.diseases)) != len(self.diseases):
            raise InputError(f"phantom diseases are distinct names of {DISEASES}, not {self.diseases}")
        if (self.severity == "healthy") != (not self.diseases):
            raise InputError(f"a {self.severity} phantom does not fit diseases {self.diseases}")
        if self.noise_hu < 0 or self.psf_mm < 0:
            raise InputError(f"noise ({self.noise_hu} HU) and blur ({self.psf_mm} mm) must not be negative")


@dataclass(frozen=True)
class Phantom:
    """A simulated scan and its truth, all on one grid."""

    volume_hu: np.ndarray
    """int16 (Z, Y, X), HU, between -1024 and 3071."""
    labels: np.ndarray
    """uint8 (Z, Y, X): tissue ids of regions (vessels, cysts and bronchograms belong to the tissue around them)."""
    lungs: np.ndarray
    """uint8 (Z, Y, X): 1 left, 2 right, 0 else; holds all disease, not trachea, main bronchi and mediastinum."""
    geometry: Geometry
    """Axial grid whose field of view is centred on the world's origin."""


def make_phantom(spec: PhantomSpec, *, seed: int) -> Phantom:
    """Digital chest phantom of a specification and a seed.

    The seed changes proportions of the body, vessels, sites and sizes of disease, class means (by up to 20 HU),
    textures and noise. The same arguments give the same arrays on the same package set.

    Parameters
    ----------
    spec : PhantomSpec
        Field of view, voxel size, diseases, noise and blur.
    seed : int
        Any non-negative integer.

    Returns
    -------
    Phantom
        ``volume_hu`` int16 HU, ``labels`` and ``lungs`` uint8, of one shape (Z, Y, X): the extent divided by the
        spacing, rounded.

    Source
    ------
    METHOD 0.5 and 6 for HU and textures, FEASIBILITY for their overlap.
    """
    geometry = _geometry(spec)
    factors, fine = _simulation_grid(geometry)
    seeds = np.random.SeedSequence([seed, 0x6C756E67]).spawn(6)
    anatomy, sites, texture, left, right, noise = (np.random.default_rng(child) for child in seeds)
    shape: tuple[int, int, int] = tuple(n * f for n, f in zip(geometry.shape, factors, strict=True))  # type: ignore[assignment]
    chest = build_chest(shape, fine, anatomy)
    diseases = place_diseases(chest, spec.diseases, spec.severity, sites)
    hu = _paint(chest, diseases, texture, {LUNG_LEFT: left, LUNG_RIGHT: right})
    if spec.psf_mm > 0:
        ndimage.gaussian_filter(hu, spec.psf_mm / np.asarray(fine), output=hu, truncate=3.0)
    volume = block_mean(hu, factors)
    del hu
    depth = np.clip(block_mean(chest.body_hu, factors), AIR, 0.0) / 1000.0 + 1.0
    if spec.noise_hu > 0:
        # Rays through the body carry fewer photons than rays through the air around it.
        outside = ndimage.gaussian_filter(depth, 12.0 / np.asarray(geometry.spacing_mm), truncate=2.0)
        volume += spec.noise_hu * (0.35 + 0.65 * outside) * ct_noise(geometry.shape, geometry.spacing_mm, rng=noise)
    lungs = _majority(chest.sides, factors, (LUNG_LEFT, LUNG_RIGHT))
    labels = _majority(diseases.labels, factors, tuple(Tissue)[: int(Tissue.CONSOLIDATION)], inside=lungs > 0)
    return Phantom(np.clip(np.rint(volume), AIR_HU, MAX_HU).astype(np.int16), labels, lungs, geometry)


def block_mean(array: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """Mean over blocks of ``factors`` voxels, float32; every axis must be a multiple of its factor."""
    result = array.astype(np.float32, copy=False)
    for axis, factor in enumerate(factors):
        if factor > 1:
            shape = result.shape
            result = result.reshape(*shape[:axis], shape[axis] // factor, factor, *shape[axis + 1 :]).mean(axis + 1)
    return result.copy() if result is array else result


def _geometry(spec: PhantomSpec) -> Geometry:
    shape = tuple(round(e / s) for e, s in zip(spec.extent_mm, spec.spacing_mm, strict=True))
    origin = tuple(-0.5 * (n - 1) * s for n, s in zip(shape, spec.spacing_mm, strict=True))
    return Geometry(shape, spec.spacing_mm, origin)  # type: ignore[arg-type]


def _simulation_grid(geometry: Geometry) -> tuple[tuple[int, int, int], Triple]:
    """How many pieces each output voxel has along (z, y, x), and their size in mm."""
    factors = tuple(max(1, int(s / SIMULATION_SPACING_MM + 0.05)) for s in geometry.spacing_mm)
    fine = tuple(s / f for s, f in zip(geometry.spacing_mm, factors, strict=True))
    return factors, fine  # type: ignore[return-value]


def _majority(
    labels: np.ndarray, factors: tuple[int, int, int], values: tuple[int, ...], *, inside: np.ndarray | None = None
) -> np.ndarray:
    """Most frequent of ``values`` in each block; 0 where they fill less than half of it (or outside ``inside``)."""
    if max(factors) == 1:
        kept = np.isin(labels, values) if inside is None else inside
        return np.where(kept, labels, 0).astype(np.uint8)
    best = np.zeros(tuple(n // f for n, f in zip(labels.shape, factors, strict=True)), dtype=np.float32)
    total = np.zeros_like(best)
    result = np.zeros(best.shape, dtype=np.uint8)
    for value in values:
        share = block_mean(labels == value, factors)
        total += share
        better = share > best
        result[better] = value
        best[better] = share[better]
    result[total < 0.5 if inside is None else ~inside] = 0
    return result


def _paint(
    chest: Chest, diseases: Diseases, rng: np.random.Generator, side_rngs: dict[int, np.random.Generator]
) -> np.ndarray:
    """HU of the whole scene on the grid of the simulation, float32."""
    hu = lung_texture(chest, diseases, rng)
    hu += _fissures(chest, rng)
    vessels, walls, lumen = _trees(chest, side_rngs, diseases.weights.get(Tissue.CONSOLIDATION))
    thin = diseases.weights.get(Tissue.EMPHYSEMA)
    if thin is not None:  # emphysema destroys small vessels: what remains is sparse
        vessels *= 1.0 - 0.65 * thin
    hu += vessels * (VESSEL_HU - np.minimum(hu, VESSEL_HU))
    hu += walls * (AIRWAY_WALL_HU - np.minimum(hu, AIRWAY_WALL_HU))
    hu += lumen * (AIRWAY_HU - hu)
    # Partial volume at the pleura; pieces that belong to no lung (slivers) are soft tissue.
    share = np.clip(chest.lung_mm / min(chest.spacing_mm) + 0.5, 0.0, 1.0)
    share *= ndimage.binary_dilation(chest.sides > 0)
    hu *= share
    hu += (1.0 - share) * chest.body_hu
    hu += chest.trachea_lumen * (AIR + 5.0 - hu)
    return hu


def _fissures(chest: Chest, rng: np.random.Generator) -> np.ndarray:
    """Oblique fissure of each lung and the horizontal one of the right: thin sheets, slightly dense."""
    z = chest.z_mm / chest.height_mm - 0.45
    y = chest.y_mm / chest.half_depth_mm
    wave = 0.03 * smooth_noise(chest.sides.shape, chest.spacing_mm, knot_mm=35.0, rng=rng)
    tilt = float(rng.uniform(0.26, 0.36))
    oblique = (z - tilt * y + wave) * chest.height_mm * 0.85
    sheet = np.clip(1.2 - np.abs(oblique), 0.0, 1.0)
    middle = (z - 0.06 - 0.03 * y + wave) * chest.height_mm
    horizontal = np.clip(1.2 - np.abs(middle), 0.0, 1.0) * ((oblique < 0) == (y > 0)) * (chest.x_mm < 0) * (y < 0.1)
    result: np.ndarray = (170.0 * np.maximum(sheet, horizontal)).astype(np.float32)
    return result


def _trees(
    chest: Chest, rngs: dict[int, np.random.Generator], airless: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vessels, bronchial walls and bronchial lumen of both lungs, each a share per voxel.

    Small bronchi show only where the lung around them is ``airless`` (share per voxel): the air bronchogram.
    """
    vessels, bronchi, bronchioles = [], [], []
    for side, rng in rngs.items():
        inside = np.argwhere((chest.sides == side) & (chest.lung_mm > 2.5))
        lung_ml = len(inside) * float(np.prod(chest.spacing_mm)) / 1000.0
        if len(inside) == 0:
            continue
        num_leaves = int(np.clip(1.1 * lung_ml, 150, 1300))
        root = chest.hila_mm[side]
        for shift in (8.0, -8.0):  # arteries above veins
            ends = (inside[rng.integers(len(inside), size=num_leaves)] + 0.5) * np.asarray(chest.spacing_mm)
            start = root + np.array([shift * chest.scale, -shift * 0.5 * chest.scale, 0.0])
            tree = grow_tree(start, ends, leaf_mm=0.42 + 0.12 * chest.scale, rng=rng)
            vessels.append(tree)
            if shift > 0:
                angle = float(rng.uniform(0.0, 6.28))
                bronchi.append(companions(tree, min_radius_mm=1.3, ratio=0.85, angle=angle))
                bronchioles.append(companions(tree, min_radius_mm=0.75, ratio=1.0, angle=angle))
    shape, spacing = chest.sides.shape, chest.spacing_mm
    lumen = draw_tubes(shape, spacing, _join(bronchi))
    if airless is not None:
        lumen = np.maximum(lumen, airless * draw_tubes(shape, spacing, _join(bronchioles)))
    walls = draw_tubes(shape, spacing, _join(bronchi), grow_mm=0.7)
    return draw_tubes(shape, spacing, _join(vessels)), walls, lumen


def _join(trees: list[Tubes]) -> Tubes:
    """All pieces of several trees."""
    return Tubes(
        np.concatenate([tree.start_mm for tree in trees]),
        np.concatenate([tree.stop_mm for tree in trees]),
        np.concatenate([tree.radius_mm for tree in trees]),
    )

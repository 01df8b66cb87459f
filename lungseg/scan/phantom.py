"""The digital chest phantom: a CT-like scan of which the truth is known voxel by voxel.

``make_phantom`` builds a chest that fills the field of view, paints lung tissue and diseases with their own
textures, then scans it: blur of a reconstruction kernel, slices of some thickness, noise of a kernel and a dose. Axes
as in ``volume.py``. Needs numpy and scipy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungseg.config.phantom import DISEASES
from lungseg.errors import InputError
from lungseg.scan.phantom_anatomy import Chest, build_chest
from lungseg.scan.phantom_disease import SEVERITY_SHARE, Diseases, place_diseases
from lungseg.scan.phantom_person import Posture
from lungseg.scan.phantom_scanner import (
    DOSES,
    KERNELS,
    blur,
    ct_noise,
    noise_map,
    noise_sd,
    outside_circle,
    slice_profile,
)
from lungseg.scan.phantom_texture import lung_texture
from lungseg.scan.phantom_trees import fissures, grow_trees, lung_box
from lungseg.scan.phantom_wall import AIR
from lungseg.scan.volume import AIR_HU, Geometry, Triple
from lungseg.tissue import LUNG_LEFT, LUNG_RIGHT, Tissue

VARIANTS = {
    "equal-hu": "ground glass and fibrosis have the same mean HU: only texture tells them apart",
    "large-consolidation": "one consolidation at the pleura wider than 3 cm (always there in severe phantoms)",
    "cavity": "a mass with a gas-filled cavity (label 6; its wall counts as consolidation)",
    "nodules": "solid nodules of 5 to 18 mm (they count as consolidation)",
    "arms-down": "arms beside the chest",
    "no-table": "no couch in the picture",
    "circle": "nothing is reconstructed outside the circle that touches the edges of a slice",
    "truncated": "the body is wider than the field of view, which cuts the lungs",
}
"""Names a phantom's ``variants`` may hold, and what they mean."""
SIMULATION_SPACING_MM = 1.0
"""The grid of the simulation divides each output voxel into pieces of about this size; finer output stays as it is."""
VESSEL_HU = 30.0
AIRWAY_HU, AIRWAY_WALL_HU = -985.0, -150.0
VESSELS_LOST = 0.65
"""Share of the vessels' contrast that emphysema takes: it destroys the small ones."""
MAX_HU = 3071
MIN_EXTENT_MM = (100.0, 110.0, 130.0)
"""Smallest field of view that still holds a chest with room for lesions."""
THICKNESS_MM = (0.3, 15.0)


@dataclass(frozen=True)
class PhantomSpec:
    """What to scan and how; a phantom is a function of this and a seed."""

    extent_mm: Triple = (150.0, 190.0, 240.0)
    """Field of view (z, y, x) in mm, edge to edge; the chest is scaled to fill it. The default is a small chest."""
    spacing_mm: Triple = (2.0, 1.25, 1.25)
    """Voxel size (z, y, x) of the output in mm."""
    severity: str = "healthy"
    """healthy, mild (about 10-18 % of the lung), moderate (about 29-39 %) or severe (about 50-62 %)."""
    diseases: tuple[str, ...] = ()
    """Tissue names out of emphysema, ggo, fibrosis, consolidation; empty if, and only if, healthy."""
    noise_hu: float = 22.0
    """Standard deviation of the noise in HU in the middle of the body, for the standard kernel, the standard dose and
    slices of 2 mm."""
    psf_mm: float = 0.6
    """Standard deviation in mm of the standard kernel's point-spread function, besides the averaging over a voxel."""
    kernel: str = "standard"
    """Reconstruction kernel: soft, standard or sharp."""
    dose: str = "standard"
    """low (a quarter), standard or high (2.5 times): noise goes with one over its square root."""
    slice_thickness_mm: float | None = None
    """Thickness of a slice in mm; None: the slice distance. Thicker slices overlap, thinner ones leave gaps."""
    variants: tuple[str, ...] = ()
    """Names out of ``VARIANTS``."""

    def __post_init__(self) -> None:
        if any(have < need for have, need in zip(self.extent_mm, MIN_EXTENT_MM, strict=True)):
            raise InputError(f"a phantom needs a field of view of at least {MIN_EXTENT_MM} mm, not {self.extent_mm}")
        if not all(0.3 <= s <= 10.0 for s in self.spacing_mm):
            raise InputError(f"phantom spacing must lie between 0.3 and 10 mm, not {self.spacing_mm}")
        if self.severity not in SEVERITY_SHARE:
            raise InputError(f"phantom severity is one of {', '.join(SEVERITY_SHARE)}, not {self.severity!r}")
        for field, given, known in (
            ("diseases", self.diseases, DISEASES),
            ("variants", self.variants, tuple(VARIANTS)),
        ):
            if set(given) - set(known) or len(set(given)) != len(given):
                raise InputError(f"phantom {field} are distinct names of {known}, not {given}")
        if (self.severity == "healthy") != (not self.diseases):
            raise InputError(f"a {self.severity} phantom does not fit diseases {self.diseases}")
        if "equal-hu" in self.variants and not {"ggo", "fibrosis"} <= set(self.diseases):
            raise InputError("the phantom variant equal-hu needs the diseases ggo and fibrosis")
        if "large-consolidation" in self.variants and "consolidation" not in self.diseases:
            raise InputError("the phantom variant large-consolidation needs the disease consolidation")
        if not (0.0 <= self.noise_hu < np.inf and 0.0 <= self.psf_mm < np.inf):
            raise InputError(f"noise ({self.noise_hu} HU) and blur ({self.psf_mm} mm) must not be negative")
        if self.kernel not in KERNELS:
            raise InputError(f"phantom kernel is one of {', '.join(KERNELS)}, not {self.kernel!r}")
        if self.dose not in DOSES:
            raise InputError(f"phantom dose is one of {', '.join(DOSES)}, not {self.dose!r}")
        low, high = THICKNESS_MM
        if not low <= self.thickness_mm <= high:
            raise InputError(f"slice thickness must lie between {low} and {high} mm, not {self.thickness_mm}")

    @property
    def thickness_mm(self) -> float:
        """Slice thickness in mm."""
        return self.spacing_mm[0] if self.slice_thickness_mm is None else self.slice_thickness_mm

    @property
    def posture(self) -> Posture:
        """How the person lies in the scanner."""
        return Posture("arms-down" in self.variants, "truncated" in self.variants, "no-table" not in self.variants)


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

    The seed changes sex, habitus and proportions of the body, vessels, sites and sizes of disease, class means (by up
    to 20 HU), textures and noise. The same arguments give the same arrays on the same package set; kernel, dose, blur
    and noise change nothing but the picture.

    Parameters
    ----------
    spec : PhantomSpec
        Field of view, voxel size, diseases, kernel, dose, slice thickness and variants.
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
    chest = build_chest(shape, fine, anatomy, spec.posture)
    rough = noise_map(block_mean(chest.body_hu, factors), geometry.spacing_mm) if spec.noise_hu > 0 else None
    box = lung_box(chest)
    lungs_only = chest.crop(box)
    diseases = place_diseases(
        lungs_only, spec.diseases, spec.severity, sites,
        large_consolidation=spec.severity == "severe" or "large-consolidation" in spec.variants,
        cavity="cavity" in spec.variants,
        nodules="nodules" in spec.variants,
    )  # fmt: skip
    hu, haze = chest.body_hu, None
    hu += chest.trachea_lumen * (AIR + 5.0 - hu)
    hu[box], haze_box = _paint(lungs_only, diseases, texture, {LUNG_LEFT: left, LUNG_RIGHT: right})
    lungs = _majority(chest.sides, factors, (LUNG_LEFT, LUNG_RIGHT))
    labels = np.zeros(shape, dtype=np.uint8)
    labels[box] = diseases.labels
    labels = _majority(labels, factors, tuple(Tissue), inside=lungs > 0)
    if "equal-hu" in spec.variants:
        haze = np.zeros(shape, dtype=np.float32)
        haze[box] = haze_box
    del chest, lungs_only, diseases, haze_box
    volume = _scan(hu, spec, factors, fine)
    if haze is not None:
        volume = _equal_means(volume, _scan(haze, spec, factors, fine), labels)
    if rough is not None:
        rough *= noise_sd(spec.noise_hu, KERNELS[spec.kernel], spec.dose, spec.thickness_mm)
        rough *= ct_noise(
            geometry.shape, geometry.spacing_mm, rng=noise,
            kernel=KERNELS[spec.kernel], psf_mm=spec.psf_mm, thickness_mm=spec.thickness_mm,
        )  # fmt: skip
        volume += rough
    if "circle" in spec.variants:
        volume[:, outside_circle(geometry)] = AIR_HU
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


def _scan(hu: np.ndarray, spec: PhantomSpec, factors: tuple[int, int, int], fine: Triple) -> np.ndarray:
    """The scene ``hu`` (changed) as the scanner shows it without noise: kernel, pixels, slices."""
    hu = blur(hu, fine, KERNELS[spec.kernel], spec.psf_mm)
    hu = slice_profile(hu, factors[0], spec.thickness_mm / spec.spacing_mm[0])
    return block_mean(hu, (1, *factors[1:]))


def _equal_means(volume: np.ndarray, haze: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``volume`` with the ground glass shifted until its mean HU is that of fibrosis.

    ``haze`` says how much of a shift each voxel shows; what is not haze (vessels, borders) keeps its value.
    """
    ggo, fibrosis = labels == Tissue.GGO, labels == Tissue.FIBROSIS
    if ggo.any() and fibrosis.any():
        gap = float(volume[fibrosis].mean(dtype=np.float64) - volume[ggo].mean(dtype=np.float64))
        gain = float(haze[ggo].mean(dtype=np.float64) - haze[fibrosis].mean(dtype=np.float64))
        volume += np.float32(gap / max(gain, 0.1)) * haze
    return volume


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
) -> tuple[np.ndarray, np.ndarray]:
    """HU of the scene around the lungs on the grid of the simulation, and the share of ground glass; float32."""
    hu = lung_texture(chest, diseases, rng)
    hu += fissures(chest, rng)
    haze = diseases.weights.get(Tissue.GGO, np.zeros((1, 1, 1), dtype=np.float32)).copy()
    for tissue in (Tissue.FIBROSIS, Tissue.CONSOLIDATION, Tissue.CAVITY):  # painted over ground glass
        if tissue in diseases.weights:
            haze = haze * (1.0 - diseases.weights[tissue])
    trees = grow_trees(chest, side_rngs, diseases.weights.get(Tissue.CONSOLIDATION))
    thin = diseases.weights.get(Tissue.EMPHYSEMA)
    vessels = trees.vessels if thin is None else trees.vessels * (1.0 - VESSELS_LOST * thin)
    hu += vessels * (VESSEL_HU - np.minimum(hu, VESSEL_HU))
    hu += trees.walls * (AIRWAY_WALL_HU - np.minimum(hu, AIRWAY_WALL_HU))
    hu += trees.lumen * (AIRWAY_HU - hu)
    haze = haze * (1.0 - vessels) * (1.0 - trees.walls) * (1.0 - trees.lumen)
    gas = diseases.weights.get(Tissue.CAVITY)
    if gas is not None:
        hu += gas * (AIRWAY_HU - hu)
    # Partial volume at the pleura; pieces that belong to no lung (slivers) are soft tissue.
    share = np.clip(chest.lung_mm / min(chest.spacing_mm) + 0.5, 0.0, 1.0)
    share *= ndimage.binary_dilation(chest.sides > 0)
    hu *= share
    hu += (1.0 - share) * chest.body_hu
    hu += chest.trachea_lumen * (AIR + 5.0 - hu)
    return hu, haze * share

"""The unit-test fixture of METHOD 0.5: two ellipsoid lungs with separable tissue. Not the product's phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from lungseg.tissue import Tissue

SPACING_MM = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Fixture:
    """HU, lung mask and the true tissue of each voxel."""

    volume_hu: np.ndarray
    mask: np.ndarray
    reference: np.ndarray


def _ellipsoid(shape, centre, radii):
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1.0


def _tubes(shape, lung_centres):
    """Branching vessels: cylinders from each hilum outwards, 1 to 3 mm in radius."""
    z, y, x = np.ogrid[tuple(slice(0, n) for n in shape)]
    tubes = np.zeros(shape, dtype=bool)
    for side, (cz, cy, cx) in enumerate(lung_centres):
        direction = 1 if side else -1
        along = (x - cx) * direction
        for slope, radius in ((0.0, 3.0), (0.5, 2.0), (-0.5, 2.0), (0.9, 1.0), (-0.9, 1.0)):
            distance = (z - cz - slope * along) ** 2 + (y - cy - 0.3 * slope * along) ** 2
            tubes |= (distance <= radius**2) & (along > -16)
    return tubes


def _mesh(shape, period_mm=5, wall_mm=2):
    """Honeycomb: walls of 2 mm every 5 mm, in two directions."""
    z, y, _ = np.indices(shape)
    return (z % period_mm < wall_mm) | (y % period_mm < wall_mm)


def make_fixture(*, noise_hu=30.0, seed=0, healthy_only=False, same_mean=False, vessels=True) -> Fixture:
    """Lungs of about 0.35 l with one lesion of each kind, on a grid of 96 x 80 x 112 voxels of 1 mm."""
    rng = np.random.default_rng(seed)
    shape = (96, 80, 112)
    centres = ((47.5, 40.0, 29.0), (47.5, 40.0, 83.0))
    lungs = [_ellipsoid(shape, centre, (44, 34, 24)) for centre in centres]
    mask = lungs[0] | lungs[1]
    hu = np.full(shape, 40.0)
    hu[mask] = -850 + 25 * rng.standard_normal(int(mask.sum()))
    reference = np.where(mask, np.uint8(Tissue.HEALTHY), np.uint8(0))
    if not healthy_only:
        mesh = _mesh(shape)
        fibrosis = np.where(mesh, -250.0, -700.0)
        region = _ellipsoid(shape, (66, 40, 83), (15, 15, 15)) & mask
        ground_glass = float(fibrosis[region].mean()) if same_mean else -600.0
        blobs = gaussian_filter(rng.standard_normal(shape), 2.5) > -0.02
        lesions = [
            (Tissue.EMPHYSEMA, _ellipsoid(shape, (26, 40, 29), (15, 15, 15)), np.where(blobs, -965.0, -880.0)),
            (Tissue.GGO, _ellipsoid(shape, (66, 40, 29), (15, 15, 15)), ground_glass + 40 * rng.standard_normal(shape)),
            (Tissue.FIBROSIS, region, fibrosis),
            (
                Tissue.CONSOLIDATION,
                _ellipsoid(shape, (26, 40, 83), (13, 13, 13)),
                30 * rng.standard_normal(shape),
            ),
        ]
        for tissue, where, values in lesions:
            hu = np.where(where & mask, values, hu)
            reference[where & mask] = tissue
    if vessels:
        tubes = _tubes(shape, centres) & mask & (reference == Tissue.HEALTHY)
        hu[tubes] = 30.0
    hu = gaussian_filter(hu, 0.5)
    hu += noise_hu * rng.standard_normal(shape)
    return Fixture(np.clip(np.rint(hu), -1024, 3071).astype(np.int16), mask, reference)


def dice(prediction, reference, tissue) -> float:
    """Dice of one tissue."""
    a, b = prediction == tissue, reference == tissue
    return 2.0 * np.count_nonzero(a & b) / max(np.count_nonzero(a) + np.count_nonzero(b), 1)

"""From posteriors on a lattice to tissue on voxels: the one interface of every way to draw contours.

Steps, each optional: upsampling (trilinear or guided by HU), rims round solid bodies given away, mean-field Potts
smoothing with the scan's own HU as evidence, Sobel-Diffusion Fusion. Everything runs inside the lung's bounding box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.config.refine import FUSIONS
from lungseg.errors import InputError
from lungseg.segmentation.density import smooth_hu
from lungseg.segmentation.guided import guided_slabs, require_known
from lungseg.segmentation.lattice import Region, bounding_region, upsample_slabs
from lungseg.segmentation.potts import ITERATIONS, STRENGTH, hu_evidence, mean_field
from lungseg.segmentation.sobel_fusion import (
    BAND_LEVEL,
    EDGE_FLOOR,
    IMAGE_SIGMA_VOXELS,
    LABEL_SIGMA_VOXELS,
    check_posterior,
    sobel_diffusion_fusion,
)
from lungseg.segmentation.vessels import give_rims_away, posterior_argmax
from lungseg.tissue import MIXTURE_TISSUES, OUTSIDE, Tissue

MARGIN_VOXELS = 8
"""Voxels round the lung's box: smoothings end before its border (four standard deviations of 2)."""
GUIDE_RADIUS_VOXELS = 5
"""Largest half box of the guided filter: it holds both sides of an edge anywhere in a cell of 8. With 8, emphysema lost
seven points of Dice to vessels in the box (validation phantom 300)."""
RIM_MM = 8.0
"""A window of the default tokens at 1 mm: thicker bands round solid bodies are no partial volume."""
EVIDENCE_WEIGHT = 0.5
"""Half of what independent voxels would say: smoothing and PSF tie neighbours together. Our choice."""
ALIKE_IN_HU = ((MIXTURE_TISSUES.index(Tissue.FIBROSIS), MIXTURE_TISSUES.index(Tissue.HEALTHY)),)
"""Fibrosis and healthy lung are air, walls and vessels in turn: texture tells them apart, no voxel's HU (METHOD 6)."""


@dataclass(frozen=True)
class ContourSettings:
    """How contours are drawn."""

    method: str = "sobel"
    """One of ``config.refine.FUSIONS``."""
    rim_mm: float = 0.0
    """Rims of ground glass or fibrosis up to this thickness round solid bodies are given away; 0 keeps them."""
    strength: float = STRENGTH
    """Potts: tie of neighbours of equal HU."""
    evidence_weight: float = EVIDENCE_WEIGHT
    """Potts: weight of each voxel's HU."""
    iterations: int = ITERATIONS
    """Potts: updates."""
    label_sigma: float = LABEL_SIGMA_VOXELS
    image_sigma: float = IMAGE_SIGMA_VOXELS
    band: float = BAND_LEVEL
    edge_floor: float = EDGE_FLOOR
    """Sobel-Diffusion Fusion, as its parameters there."""


@dataclass(frozen=True)
class Contours:
    """Tissue of every lung voxel, and how sure it is."""

    labels: np.ndarray
    """uint8 (Z, Y, X): ``Tissue`` ids, 0 outside the lung."""
    posterior: np.ndarray
    """float16 (5, ...) of the region: per ``MIXTURE_TISSUES``, on voxels; 0 outside the lung."""
    region: Region
    """Box of voxels of the posterior."""

    def confidence(self, labels: np.ndarray) -> np.ndarray:
        """Posterior of each voxel's label, uint8 0 to 255; 0 outside the lung and for labels no mixture has."""
        result = np.zeros(labels.shape, dtype=np.uint8)
        view, inside = result[self.region], labels[self.region]
        for k, values in enumerate(self.posterior):
            mine = inside == k + 1  # ids of MIXTURE_TISSUES are 1 to 5, in order
            view[mine] = np.round(255 * np.clip(values[mine].astype(np.float32), 0, 1)).astype(np.uint8)
        return result


def contours(
    posterior: np.ndarray,
    volume_hu: np.ndarray,
    mask: np.ndarray,
    *,
    token_size: int,
    spacing_mm: Sequence[float],
    settings: ContourSettings = ContourSettings(),
) -> Contours:
    """Draw the contours of the tissues.

    Parameters
    ----------
    posterior : float array, shape (5, z, y, x)
        Per tissue, in the order of ``MIXTURE_TISSUES``, on the token lattice, every token filled
        (``lattice.fill_uncovered``); on the voxels with ``token_size`` 1.
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
        Lung.
    token_size : int
        Cell size of the lattice in voxels.
    spacing_mm : three floats
        Voxel spacing (z, y, x).
    settings : ContourSettings

    Returns
    -------
    Contours
        All 0 if the mask is empty. The posterior is that before Sobel-Diffusion Fusion, which moves labels alone.

    Raises
    ------
    InputError
        If the method is unknown, or mask and volume differ in shape.
    MismatchError
        If the posterior does not fit the volume, or is missing or not finite somewhere in the lung.

    Source
    ------
    METHOD 1.6, 7.8, 7.9; FEASIBILITY failure modes 2 and 3.
    """
    if settings.method not in FUSIONS:
        raise InputError(f"unknown method of contours '{settings.method}': one of {', '.join(FUSIONS)}")
    check_posterior(posterior, mask, token_size)
    if volume_hu.shape != mask.shape:
        raise InputError(f"volume of shape {volume_hu.shape} and mask of shape {mask.shape} are not on one grid")
    labels = np.full(mask.shape, OUTSIDE, dtype=np.uint8)
    if not mask.any():
        nowhere = (slice(0, 0), slice(0, 0), slice(0, 0))
        return Contours(labels, np.zeros((len(posterior), 0, 0, 0), dtype=np.float16), nowhere)
    steps = settings.method.split("-")
    region = bounding_region(mask, margin=MARGIN_VOXELS)
    hu, lung = volume_hu[region], mask[region]
    smoothed = smooth_hu(hu, lung) if {"guided", "potts"} & set(steps) else hu
    chance = _on_voxels(posterior, smoothed, mask, region, token_size, guided="guided" in steps)
    if settings.rim_mm > 0:
        chance = give_rims_away(chance, hu, lung, spacing_mm=spacing_mm, rim_mm=settings.rim_mm)
    if "potts" in steps:
        chance = mean_field(
            chance,
            smoothed,
            lung,
            spacing_mm=spacing_mm,
            evidence=hu_evidence(chance, smoothed, lung, alike=ALIKE_IN_HU) if settings.evidence_weight > 0 else None,
            evidence_weight=settings.evidence_weight,
            strength=settings.strength,
            iterations=settings.iterations,
        )
    if "sobel" in steps:
        labels[region] = sobel_diffusion_fusion(
            chance,
            hu,
            lung,
            label_sigma=settings.label_sigma,
            image_sigma=settings.image_sigma,
            band=settings.band,
            edge_floor=settings.edge_floor,
        )
    else:
        labels[region] = posterior_argmax(chance, lung)
    return Contours(labels, chance, region)


def _on_voxels(
    posterior: np.ndarray, guide_hu: np.ndarray, mask: np.ndarray, region: Region, token_size: int, *, guided: bool
) -> np.ndarray:
    """Posterior on the voxels of a region, float16 (5, ...), 0 outside the lung."""
    lung = mask[region]
    result = np.zeros((len(posterior), *lung.shape), dtype=np.float16)
    slabs = (
        guided_slabs(
            posterior, guide_hu, mask, token_size=token_size, radius=min(token_size, GUIDE_RADIUS_VOXELS), region=region
        )
        if guided
        else upsample_slabs(posterior, mask.shape, token_size, region=region)
    )
    for part, values in slabs:
        inside = lung[part]
        if not guided:  # the filter has looked already, before it blurred what is missing
            require_known(values, inside)
        np.multiply(values, inside, out=result[:, part], casting="same_kind")
    return result

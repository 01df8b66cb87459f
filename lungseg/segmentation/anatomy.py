"""What the voxels of a lung are before anybody asks for tissue: dense bodies, thin dense structures, and the rest.

Bodies of dense lung have a shell of partial volume around them, the lung mask a rim of it; neither says anything about
density.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lungseg import tissue as cut
from lungseg.errors import InputError
from lungseg.scan.volume import Triple

OPENING_MM = 5.0
"""Edge of the cube of the grey opening: what is narrower counts as thin, what holds it as a body. Most vessels, and
the septa of a mesh of 3 to 5 mm (METHOD 0.5), are narrower. Phantom-informed (5 mm against 7 mm)."""
SHELL_MM, RIND_MM = 2.0, 1.0
"""Partial volume reaches this far: around a dense body and inside the lung's rim. About two blurs of 0.6 to 0.8 mm and
half a slice: our choice. For thin structures and texture the rim is 1 mm: fibrosis begins at the pleura, and partial
volume makes a rim look like ground glass, not like septa (validation phantoms 300-305: fibrosis +1.4). On grids of
1.5 mm and more both are one voxel."""
SPARE_WEIGHT = 0.02
"""Weight of rim and shell voxels beside 1 of the others: they count only where nothing else is in reach, and for
ground glass, with ``evidence.HEALTHY_WEIGHT``, not even there: a sheet of lung thinner than about 5 mm never is."""


class Anatomy(NamedTuple):
    """What the voxels of a lung are."""

    body: np.ndarray
    """bool: dense bodies, vessels of the hila and fat among them."""
    thin: np.ndarray
    """bool: thin dense structures."""
    weight: np.ndarray
    """float32: what a voxel that is no body says about density, 0 to 1."""
    rind_weight: np.ndarray
    """float32: the same about thin structures and texture, which begin nearer to the pleura."""


def lung_anatomy(smoothed_hu: np.ndarray, lung: np.ndarray, *, spacing_mm: Triple) -> Anatomy:
    """Bodies, thin structures and weights of the voxels of a lung.

    Parameters
    ----------
    smoothed_hu : array, shape (Z, Y, X)
        HU, from ``smooth_hu``.
    lung : bool array, shape (Z, Y, X)
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    Anatomy
        Arrays of shape (Z, Y, X).

    Raises
    ------
    InputError
        If the shapes differ.

    Source
    ------
    FEASIBILITY failure modes 2 and 3; the rules are ours.
    """
    from scipy.ndimage import binary_dilation, binary_erosion, maximum_filter, minimum_filter

    if smoothed_hu.shape != lung.shape:
        raise InputError(f"HU of shape {smoothed_hu.shape} and lung of shape {lung.shape} are not on one grid")
    edge = [max(2 * round((OPENING_MM / s - 1.0) / 2.0) + 1, 3) for s in spacing_mm]  # odd
    # Air outside for bodies: a sheet of partial volume along the pleura is none. Density outside for thin structures:
    # lung in the angles of the pleura is not thin.
    opened = maximum_filter(minimum_filter(np.where(lung, smoothed_hu, np.float32(-1000.0)), edge), edge)
    dense = lung & (smoothed_hu > cut.DENSE_BODY_HU)
    body = dense & (opened > cut.DENSE_BODY_HU)
    # The opening rounds a body's corners off: they are grown back, over dense lung only.
    body = reach(body, SHELL_MM, spacing_mm, binary_dilation, mask=dense)
    opened = maximum_filter(minimum_filter(np.where(lung, smoothed_hu, np.float32(100.0)), edge), edge)
    shell = reach(body, SHELL_MM, spacing_mm, binary_dilation)
    weights = []
    for rim_mm in (SHELL_MM, RIND_MM):
        spare = shell | ~reach(lung, rim_mm, spacing_mm, binary_erosion, border_value=1)
        weight = np.where(spare, np.float32(SPARE_WEIGHT), np.float32(1.0))
        weight[~lung | body] = 0.0
        weights.append(weight)
    contrast = smoothed_hu - opened
    aerated = contrast[(weights[0] == 1.0) & (smoothed_hu <= cut.HEALTHY_MEDIAN_HU)]
    # Noise alone lifts a voxel above the least of its neighbours: the scan's own parenchyma says by how much.
    floor = float(np.median(aerated)) if aerated.size else 0.0
    thin = lung & ~body & (contrast > floor + cut.THIN_CONTRAST_HU)
    return Anatomy(body, thin, *weights)


def reach(
    region: np.ndarray, width_mm: float, spacing_mm: Triple, operation: Callable[..., np.ndarray], **options: Any
) -> np.ndarray:
    """A mask dilated or eroded (``operation`` of :mod:`scipy.ndimage`) by a width: whole voxels, at least one."""
    steps = max(1, round(width_mm / float(np.exp(np.mean(np.log(spacing_mm))))))
    return operation(region, iterations=steps, **options)

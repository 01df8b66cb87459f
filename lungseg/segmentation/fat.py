"""Fat that a lung mask holds, of the mediastinum and the diaphragm: dense, wide, and no consolidation.

Fat is even: a cube of it holds nothing but adipose densities. Between consolidation and aerated lung lie the same
densities, but in a sheet that is thinner than the cube.
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.volume import Triple
from lungseg.segmentation.anatomy import reach

FAT_HU = (-190.0, -30.0)
"""Attenuation of adipose tissue. Kvist et al., Am J Clin Nutr 1988;48:1351; the range in use for body composition."""
CUBE_MM = 5.0
"""Edge of the cube that holds nothing else: wider than two blurs of 0.6 to 0.8 mm and a slice. Phantom-informed (3 mm
take consolidation too, 5 mm take none on validation phantoms 300-305, 311-313, 315)."""
REACH_MM = 8.0
"""Fat is grown from such cubes this far over dense lung of the same densities: partial volume makes its rim uneven."""


def fat(smoothed_hu: np.ndarray, body: np.ndarray, lung: np.ndarray, *, spacing_mm: Triple) -> np.ndarray:
    """Dense voxels that are fat.

    Parameters
    ----------
    smoothed_hu : array, shape (Z, Y, X)
        HU, from ``smooth_hu``: noise of more than about 25 HU left in it hides fat, and makes none.
    body : bool array, shape (Z, Y, X)
        Dense lung, wider than small vessels.
    lung : bool array, shape (Z, Y, X)
        Lung; what lies outside it has no say.
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    bool array, shape (Z, Y, X)
        Part of ``body``.

    Raises
    ------
    InputError
        If the shapes differ.

    Source
    ------
    The rule is ours.
    """
    from scipy.ndimage import binary_dilation, maximum_filter, minimum_filter

    if not smoothed_hu.shape == body.shape == lung.shape:
        raise InputError(
            f"HU of shape {smoothed_hu.shape}, bodies of {body.shape} and lung of {lung.shape} are not on one grid"
        )
    low, high = FAT_HU
    adipose = body & (smoothed_hu > low) & (smoothed_hu < high)
    # A slice that is thicker than the cube still has neighbours: one alone would be even by itself.
    edge = [max(2 * round((CUBE_MM / s - 1.0) / 2.0) + 1, 3) for s in spacing_mm]
    values = np.where(lung, smoothed_hu, np.float32((low + high) / 2.0))
    core = adipose & (minimum_filter(values, edge) > low) & (maximum_filter(values, edge) < high)
    return reach(core, REACH_MM, spacing_mm, binary_dilation, mask=adipose)

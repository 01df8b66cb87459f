"""Whether a lung mask of others lies on the lungs of its scan, and what to know before its numbers are used.

What lies outside is judged on a copy of about 2 mm, where walls and partial volume no longer count.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.errors import InputError
from lungseg.scan.lung_mask_sides import JUDGED_MM, airway_of
from lungseg.scan.lungs import TRUNCATED_SHARE, LungField, usual_warnings
from lungseg.scan.lungs_grid import coarsen
from lungseg.tissue import LUNG_MEAN_HU

AERATED_HU = (-950.0, -500.0)
"""Lung that is neither empty nor full: what a mask must not leave out."""
SHELL_MM = (2.5, 8.0)
"""Distance from the mask within which its surroundings are judged; nearer lies partial volume."""
MISSED_SHARE = 0.03
"""Aerated share of the surroundings. Masks that fit have at most 0.006, masks moved by 10 mm at least 0.053
(`tests/benchmarks/RESULTS.md`)."""
AIRWAY_SHARE, AIRWAY_ML = 0.5, 8.0
"""Share and volume of trachea and main bronchi inside the mask from which they count as included."""


def check_lungs(labels: np.ndarray, volume_hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> LungField:
    """A mask of others as a lung field, with the volume, density and warnings that our own lungs have.

    Parameters
    ----------
    labels : uint8 array, shape (Z, Y, X)
        1 left lung, 2 right lung; at least one voxel.
    volume_hu : int16 array, same shape
        The scan.
    spacing_mm : (z, y, x)

    Returns
    -------
    LungField
        Besides the warnings of :func:`find_lungs`: "lung beside the mask" (a mask of another scan, moved, or of a part
        of the lungs only) and "trachea included".

    Raises
    ------
    InputError
        If the mean HU inside is not that of any lung; the message holds no names.
    """
    lung = labels > 0
    count = int(np.count_nonzero(lung))
    mean_hu = float(volume_hu[lung].mean(dtype=np.float64))
    if not LUNG_MEAN_HU[0] <= mean_hu <= LUNG_MEAN_HU[1]:
        raise InputError(
            f"the lung mask holds no lung of this scan: mean {mean_hu:.0f} HU inside, lungs have "
            f"{LUNG_MEAN_HU[0]:.0f} to {LUNG_MEAN_HU[1]:.0f}. Is it the mask of another scan, or of "
            "something else?"
        )
    volume_ml = count * float(np.prod(spacing_mm)) / 1000.0
    warnings = [*_usual_warnings(labels, volume_ml), *_misfits(lung, volume_hu, spacing_mm)]
    return LungField(labels=labels, volume_ml=volume_ml, mean_hu=mean_hu, warnings=tuple(warnings))


def _misfits(lung: np.ndarray, volume_hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> list[str]:
    """What lies beside the mask and should not, and what lies inside and should not."""
    hu, coarse_mm = coarsen(volume_hu, spacing_mm, JUDGED_MM)
    share, _ = coarsen(lung, spacing_mm, JUDGED_MM)
    mask = share >= 0.5
    airway = airway_of(hu, coarse_mm)
    found = []
    missed = aerated_beside(mask, hu, airway, coarse_mm)
    if missed > MISSED_SHARE:
        found.append(
            f"lung beside the mask: {100.0 * missed:.0f} % of what lies {SHELL_MM[0]:g} to {SHELL_MM[1]:g} mm outside "
            "of it is aerated lung; the mask was moved, belongs to another scan, or leaves lung out"
        )
    inside_ml = float(np.count_nonzero(airway & mask)) * float(np.prod(coarse_mm)) / 1000.0
    if inside_ml > max(AIRWAY_ML, AIRWAY_SHARE * np.count_nonzero(airway) * float(np.prod(coarse_mm)) / 1000.0):
        found.append(f"trachea included: {inside_ml:.0f} ml of trachea and main bronchi count as lung")
    return found


def aerated_beside(
    mask: np.ndarray, volume_hu: np.ndarray, airway: np.ndarray, spacing_mm: tuple[float, float, float]
) -> float:
    """Share of aerated lung in the surroundings of a mask (``SHELL_MM``), without the airway; 0 to 1.

    ``mask`` and ``airway`` are bool, all of one shape (Z, Y, X); 0 for an empty mask.
    """
    around = volume_hu[_shell(mask, spacing_mm) & ~airway]
    return float(((around > AERATED_HU[0]) & (around < AERATED_HU[1])).mean()) if around.size else 0.0


def _shell(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Voxels at a distance of ``SHELL_MM`` from a mask."""
    shell = np.zeros_like(mask)
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if boxes:
        margins = [int(np.ceil(SHELL_MM[1] / s)) for s in spacing_mm]
        box = tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(boxes[0], margins, strict=True))
        distance = ndimage.distance_transform_edt(~mask[box], sampling=spacing_mm)
        shell[box] = (distance > SHELL_MM[0]) & (distance <= SHELL_MM[1])
    return shell


def _usual_warnings(labels: np.ndarray, volume_ml: float) -> list[str]:
    """The warnings of :func:`find_lungs`."""
    found = usual_warnings(labels, volume_ml, one_lung="the mask holds nothing but the {} lung")
    for axis in (1, 2):
        area = np.count_nonzero(labels, axis=tuple(other for other in range(3) if other != axis))
        if max(area[0], area[-1]) > TRUNCATED_SHARE * area.max():
            return [*found, "truncated: the lung is cut at the side of the field of view"]
    return found

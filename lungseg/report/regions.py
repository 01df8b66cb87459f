"""Parts of the lungs that numbers are given for: sides, thirds, core and rim, lobes.

Everything is a vector over the lung voxels of a scan in the order of the array (z slowest), so that tables of a scan
need no mask of its size per region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.tissue import LOBES, LUNG_LEFT, LUNG_RIGHT, OUTSIDE

SIDES = {"left": LUNG_LEFT, "right": LUNG_RIGHT}
THIRDS = ("lower_third", "middle_third", "upper_third")
"""In the order of the array: index 0 of z is inferior."""
REGIONS = ("whole", *SIDES, *reversed(THIRDS), "core", "rim")
LOBE_REGIONS = tuple(info.name for info in LOBES.values())
RIM_GRID_MM = 2.0
"""Grid on which the distance to the lung's surface is measured: finer scans are taken at every n-th voxel."""
MIN_LOBE_ON_SIDE = 0.9
"""Share of a lobe that must lie in the lung of its side, else left and right are mistaken for each other."""


@dataclass(frozen=True)
class RegionVoxels:
    """Which lung voxels belong to a region."""

    name: str
    inside: np.ndarray | None
    """bool (N,) over the lung voxels; None: all of them."""
    reason: str = ""
    """Why the region has no numbers; '' if it has."""


def region_voxels(
    lungs: np.ndarray, *, spacing_mm: Sequence[float], lobes: np.ndarray | None = None
) -> Iterator[RegionVoxels]:
    """Each region in the order of ``REGIONS``, then the lobes if they are given.

    Parameters
    ----------
    lungs : uint8 or bool array, shape (Z, Y, X)
        1 left, 2 right, 0 outside; index 0 of z inferior. A bool mask has no sides.
    spacing_mm : sequence of float
        (z, y, x) in mm.
    lobes : uint8 array of that shape, optional
        Ids of ``tissue.LOBES``; 0 where no lobe is known.

    Notes
    -----
    Thirds are of equal volume, both lungs together, counted voxel by voxel from the lowest slice up, as in CIP
    (`CIPLabelLungRegionsImageFilter::SetLungThirds`). Rim: the outer half of each lung by distance to its surface (at
    least half of its volume, with all voxels of the last distance); core: the rest. That cut is our choice.
    """
    is_lung = lungs != OUTSIDE
    count = int(np.count_nonzero(is_lung))
    nothing = "lung mask is empty" if count == 0 else ""
    side = lungs[is_lung]
    yield RegionVoxels("whole", None, nothing)
    for name, label in SIDES.items():
        if lungs.dtype == np.bool_:
            yield RegionVoxels(name, None, nothing or "lung mask has no sides")
            continue
        inside = side == label
        yield RegionVoxels(name, inside, "" if inside.any() else nothing or f"no {name} lung in the lung mask")
    thirds = np.arange(count) * 3 // max(count, 1)
    for number, name in reversed(list(enumerate(THIRDS))):
        inside = thirds == number
        yield RegionVoxels(name, inside, "" if inside.any() else nothing or "too few lung voxels for thirds")
    rim = _rim(lungs, spacing_mm)[is_lung] if count else np.zeros(0, dtype=bool)
    yield RegionVoxels("core", ~rim, nothing or ("" if not rim.all() else "too few lung voxels for a core"))
    yield RegionVoxels("rim", rim, nothing)
    if lobes is None:
        return
    found = lobes[is_lung]
    for label, info in LOBES.items():
        inside = found == label
        yield RegionVoxels(info.name, inside, "" if inside.any() else nothing or "no such lobe in the lobe mask")


def check_lobes(lobes: np.ndarray, lungs: np.ndarray, *, name: str) -> None:
    """Refuse lobes that lie in the lung of the other side, or in no lung.

    Parameters
    ----------
    lobes, lungs : uint8 arrays of one shape
        Ids of ``tissue.LOBES``; 1 left, 2 right.
    name : str
        What is checked, for the message.

    Raises
    ------
    InputError
        Naming the lobe and where it lies.
    """
    if not lobes.any():
        raise InputError(f"{name}: no lobe is labelled")
    for label, info in LOBES.items():
        sides = np.bincount(lungs[lobes == label].ravel(), minlength=3)
        in_lung = int(sides[1:].sum())
        if sides.sum() and not in_lung:
            raise InputError(f"{name}: the {info.name} lies outside of both lungs; is it the mask of another scan?")
        if in_lung and sides[info.side] < MIN_LOBE_ON_SIDE * in_lung:
            raise InputError(
                f"{name}: only {100 * sides[info.side] / in_lung:.0f} % of the {info.name} lies in the lung of its "
                "side: the labels are of another program (--lobe-mask-labels), or left and right are swapped"
            )


def _rim(lungs: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """bool array of that shape: the outer half of each lung."""
    from scipy.ndimage import distance_transform_edt

    steps = [max(1, int(RIM_GRID_MM // step)) for step in spacing_mm]
    coarse = lungs[tuple(slice(step // 2, None, step) for step in steps)]
    index = [
        np.minimum(np.arange(size) // step, short - 1)
        for size, step, short in zip(lungs.shape, steps, coarse.shape, strict=True)
    ]
    result = np.zeros(lungs.shape, dtype=bool)
    for label in (1,) if lungs.dtype == np.bool_ else SIDES.values():
        # beyond the array there is no lung
        inside = np.pad(coarse == label, 1)
        depth = distance_transform_edt(inside, sampling=[s * n for s, n in zip(spacing_mm, steps, strict=True)])
        fine = depth[1:-1, 1:-1, 1:-1].astype(np.float32)[np.ix_(*index)]
        mine = lungs == label
        if mine.any():
            values = fine[mine]
            middle = (values.size - 1) // 2
            result |= mine & (fine <= np.partition(values, middle)[middle])
    return result

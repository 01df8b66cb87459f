"""What the headers of image files have in common: the grid, its plausibility, and which of several volumes is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.orientation import orthonormal_direction
from lungseg.scan.volume import Geometry

SPACING_RANGE_MM = (0.1, 20.0)
"""Spacings outside are taken for wrong units or a default of a converter, as in DICOM: photon-counting CT goes down to
0.2 mm, and pixels of a chest in centimetres are below 0.1. RELIABILITY row 30."""
USUAL_MM = (0.3, 10.0)
"""Spacings outside are told as unusual. RELIABILITY row 30."""
ROUNDING = 1e-6
"""Headers hold float32: 0.1 mm may read as 0.09999999."""
CHEST_EXTENT_MM = (150.0, 450.0)
"""Second largest extent of a chest CT: a field of view of 200-500 mm, or a crop to one lung. 512 voxels that lost
their spacing make 512 mm in two directions."""
MAX_AXIS = 65535
"""More voxels along one axis are taken for a damaged header (RELIABILITY section 4, point 8)."""
MAX_MM = 1e6
"""Largest step or distance from the origin: a kilometre."""


@dataclass(frozen=True)
class ImageHeader:
    """All that is needed to decode the voxels of a file."""

    geometry: Geometry
    """Of one volume, in our world and the file's own axis order (slowest axis first)."""
    dtype: np.dtype[Any]
    """As stored, byte order included."""
    data_path: Path
    """File that holds the voxels; the header's own but for .mhd."""
    encoding: str = "raw"
    """raw, gzip, zlib or bzip2: how the bytes from ``file_offset`` on are coded."""
    file_offset: int = 0
    """Bytes of the file before the coded part."""
    skip: int = 0
    """Decoded bytes before the voxels."""
    volumes: int = 1
    slope: float = 1.0
    intercept: float = 0.0
    notes: tuple[str, ...] = ()


def grid_of(axes: np.ndarray, origin: np.ndarray, shape: tuple[int, ...], to_spl: np.ndarray, name: str) -> Geometry:
    """Grid from the step vectors and origin of a file.

    Parameters
    ----------
    axes : float array, shape (3, 3)
        Column j: step in mm from voxel to voxel along the j-th fastest axis (x, y, z), in the file's world.
    origin : float array, shape (3,)
        Centre of the first voxel in mm, in the file's world.
    shape : three ints
        Voxels, slowest axis first.
    to_spl : float array, shape (3, 3)
        The file's world axes to ours, see ``orientation``.
    name : str
        What is being read, for the message.

    Raises
    ------
    InputError
        If a number is not finite, a spacing is not positive or not plausible, or the axes are sheared.
    """
    if not (np.abs(axes) < MAX_MM).all() or not (np.abs(origin) < MAX_MM).all():  # NaN is not below either
        raise InputError(f"{name}: damaged header (orientation or origin is not a number, or absurd)")
    steps = (to_spl @ axes)[:, ::-1]
    spacing = np.linalg.norm(steps, axis=0)
    check_spacing(spacing, name)
    direction = orthonormal_direction(steps / spacing, name=name)
    position = tuple(float(v) for v in to_spl @ origin)
    return Geometry(shape, tuple(float(s) for s in spacing), position, direction)  # type: ignore[arg-type]


def check_spacing(spacing: np.ndarray, name: str) -> None:
    """Refuse spacings (mm) that are not positive or not plausible for a CT. RELIABILITY rows 29, 30."""
    text = " x ".join(f"{s:.4g}" for s in spacing)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(
            f"{name}: spacing must be strictly positive, not {text} mm; repair the header or convert again"
        )
    low, high = SPACING_RANGE_MM
    if spacing.min() < low * (1 - ROUNDING) or spacing.max() > high * (1 + ROUNDING):
        raise InputError(
            f"{name}: a spacing of {text} mm is not plausible for CT ({low:g}-{high:g} mm); are its units millimetres?"
        )


def spacing_note(geometry: Geometry) -> tuple[str, ...]:
    """A warning of an unusual spacing, or of 1 x 1 x 1 mm that gives no chest: what converters write if they know none.

    Source
    ------
    RELIABILITY row 30.
    """
    if min(geometry.spacing_mm) < USUAL_MM[0] * (1 - ROUNDING) or max(geometry.spacing_mm) > USUAL_MM[1] * (
        1 + ROUNDING
    ):
        text = " x ".join(f"{s:.4g}" for s in geometry.spacing_mm)
        usual = f"{USUAL_MM[0]:g}-{USUAL_MM[1]:g} mm"
        return (f"a spacing of {text} mm is unusual for CT ({usual}): are its units millimetres?",)
    second = sorted(geometry.extent_mm)[1]
    low, high = CHEST_EXTENT_MM
    if any(s != 1.0 for s in geometry.spacing_mm) or low <= second <= high:
        return ()
    extent = " x ".join(f"{e:.0f}" for e in geometry.extent_mm)
    return (
        f"the spacing is 1 x 1 x 1 mm, which makes a scan of {extent} mm: is it the default of a converter? "
        "Every volume in ml depends on it",
    )


def check_sizes(sizes: tuple[int, ...], name: str) -> tuple[tuple[int, int, int], int]:
    """Shape (slowest axis first) of one volume and the number of volumes, from sizes in the order x, y, z, t, ...

    Raises
    ------
    InputError
        If there are not three or four axes longer than one voxel in their places, or one is absurdly long.
    """
    if len(sizes) < 3 or min(sizes) < 1 or any(n != 1 for n in sizes[4:]):
        fix = "store a single slice as a volume of one slice" if len(sizes) < 3 else "extract one volume"
        raise InputError(f"{name}: one three-dimensional volume is needed, not shape {sizes}; {fix}")
    if max(sizes) > MAX_AXIS:
        raise InputError(f"{name}: {max(sizes)} voxels along one axis: the header is damaged; convert the scan again")
    return (sizes[2], sizes[1], sizes[0]), (sizes[3] if len(sizes) > 3 else 1)


def choose_volume(header: ImageHeader, asked: int | None, name: str) -> int:
    """Index of the volume to read; refused if it is not said, or is not there. RELIABILITY row 27."""
    count = header.volumes
    if asked is None and count > 1:
        raise InputError(
            f"{name}: one three-dimensional volume is needed, and this file holds {count}; say which with --volume K "
            f"(0 to {count - 1}), or extract one volume"
        )
    if asked is not None and not 0 <= asked < count:
        there = f"{count} volumes, numbered 0 to {count - 1}" if count > 1 else "one volume, number 0"
        raise InputError(
            f"{name}: there is no volume {asked}; the file holds {there}. Change --volume, or leave it out"
        )
    return asked or 0

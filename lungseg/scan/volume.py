"""A CT volume: an array and its geometry. The one home of the axis rule.

Arrays are ``(z, y, x)`` = (slice, row, column) with index 0 of z inferior. Spacing, origin and direction are in
the array's own axis order; the world is LPS millimetres, so a world point is written ``(S, P, L)``. Nothing
outside ``dicom.py`` and ``nifti.py`` moves axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lungseg.errors import InputError

Triple = tuple[float, float, float]
IDENTITY: tuple[Triple, Triple, Triple] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
AIR_HU = -1024
"""HU written where a scan holds no data (padding, outside the field of view)."""
MIN_SLICES = 6
MIN_COVERAGE_MM = 20.0
"""Fewer slices or less coverage are no chest scan. RELIABILITY row 21."""
STATUS_WORDS = {
    "gaps-filled": "missing slices were filled by interpolation",
    "tilt-corrected": "slices of a tilted gantry were sheared back",
    "respaced": "unevenly spaced slices were interpolated to even ones",
    "hu-assumed": "stored values were taken as HU without a rescale",
    "nan-replaced": "NaN or infinite voxels were replaced by air",
    "clipped": "more than 4 % of the voxels lay outside the range that is kept",
    "truncated": "the lung is cut by the field of view",
    "no-lung": "no lung was found",
}
"""What `status` of a scan may hold, and its meaning."""


@dataclass(frozen=True)
class Geometry:
    """Where a voxel grid lies in the patient.

    ``world_spl = direction @ (index_zyx * spacing_mm) + origin_mm``, all in millimetres.
    """

    shape: tuple[int, int, int]
    """Voxels along (z, y, x)."""
    spacing_mm: Triple
    """Distance of neighbouring voxel centres along (z, y, x), strictly positive."""
    origin_mm: Triple = (0.0, 0.0, 0.0)
    """World position (S, P, L) of the centre of voxel (0, 0, 0)."""
    direction: tuple[Triple, Triple, Triple] = IDENTITY
    """Orthonormal 3x3; column j is the world unit vector (S, P, L) of array axis j. Identity = axial supine grid."""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InputError(f"a volume has three axes of at least one voxel, not shape {self.shape}")
        if not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise InputError(f"spacing must be strictly positive and finite, not {self.spacing_mm} mm")
        matrix = np.asarray(self.direction, dtype=float)
        if matrix.shape != (3, 3) or not np.allclose(matrix.T @ matrix, np.eye(3), atol=1e-3):
            raise InputError(f"direction cosines are not orthonormal: {self.direction}")

    @property
    def extent_mm(self) -> Triple:
        """Edge-to-edge size along (z, y, x) in mm."""
        return tuple(n * s for n, s in zip(self.shape, self.spacing_mm, strict=True))  # type: ignore[return-value]

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    def to_world(self, index: np.ndarray | Sequence[float]) -> np.ndarray:
        """World points (S, P, L) in mm of voxel indices (z, y, x), shape (..., 3)."""
        scaled = np.asarray(index, dtype=float) * np.asarray(self.spacing_mm)
        return scaled @ np.asarray(self.direction).T + np.asarray(self.origin_mm)

    def to_index(self, world: np.ndarray | Sequence[float]) -> np.ndarray:
        """Fractional voxel indices (z, y, x) of world points (S, P, L) in mm, shape (..., 3)."""
        offset = np.asarray(world, dtype=float) - np.asarray(self.origin_mm)
        return offset @ np.asarray(self.direction) / np.asarray(self.spacing_mm)

    def crop(self, start: Sequence[int], stop: Sequence[int]) -> Geometry:
        """Geometry of the sub-grid ``[start, stop)`` in voxels (z, y, x)."""
        shape = tuple(int(b) - int(a) for a, b in zip(start, stop, strict=True))
        origin = self.to_world(np.asarray(start, dtype=float))
        return Geometry(shape, self.spacing_mm, tuple(float(v) for v in origin), self.direction)  # type: ignore[arg-type]

    def with_spacing(self, spacing_mm: Triple) -> Geometry:
        """The grid of another spacing that covers the same extent, aligned at the outer edge of voxel (0, 0, 0).

        The number of voxels is rounded to the nearest, at least one.
        """
        shape = tuple(max(1, round(extent / new)) for extent, new in zip(self.extent_mm, spacing_mm, strict=True))
        shift = (np.asarray(spacing_mm) - np.asarray(self.spacing_mm)) / 2.0
        origin = np.asarray(self.direction) @ shift + np.asarray(self.origin_mm)
        return Geometry(shape, spacing_mm, tuple(float(v) for v in origin), self.direction)  # type: ignore[arg-type]

    def is_close(self, other: Geometry, *, tolerance_voxels: float = 0.1) -> bool:
        """Whether both grids have the same shape and put every corner within ``tolerance_voxels`` of each other."""
        if self.shape != other.shape:
            return False
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), axis=-1).reshape(-1, 3)
        distance = np.linalg.norm(self.to_world(corners) - other.to_world(corners), axis=1).max()
        return bool(distance <= tolerance_voxels * min(self.spacing_mm))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``from_dict`` reads it back exactly."""
        return {
            "shape": list(self.shape),
            "spacing_mm": list(self.spacing_mm),
            "origin_mm": list(self.origin_mm),
            "direction": [list(row) for row in self.direction],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Geometry:
        """Geometry from the dictionary of ``to_dict``."""
        return cls(
            tuple(int(n) for n in data["shape"]),  # type: ignore[arg-type]
            tuple(float(v) for v in data["spacing_mm"]),  # type: ignore[arg-type]
            tuple(float(v) for v in data["origin_mm"]),  # type: ignore[arg-type]
            tuple(tuple(float(v) for v in row) for row in data["direction"]),  # type: ignore[arg-type]
        )


def extent_problem(num_slices: int, coverage_mm: float) -> str | None:
    """Why slices are too few or cover too little for a chest scan, in words; None if they do not."""
    if num_slices >= MIN_SLICES and coverage_mm >= MIN_COVERAGE_MM:
        return None
    slices = "1 slice" if num_slices == 1 else f"{num_slices} slices"
    needed = f"at least {MIN_SLICES} slices and {MIN_COVERAGE_MM:g} mm are needed"
    return f"only {slices} covering {coverage_mm:.1f} mm; {needed}"


@dataclass(frozen=True)
class Volume:
    """An array on a grid: int16 HU for CT, bool or uint8 for masks and labels."""

    array: np.ndarray
    """Shape (Z, Y, X)."""
    geometry: Geometry
    """Grid of ``array``, in the canonical orientation (index 0 of z inferior, y to posterior, x to left)."""
    stored_axes: tuple[int, int, int] = (0, 1, 2)
    """Axis of the file's own (reversed: slowest first) array that became z, y, x. For export on the file's grid."""
    stored_flips: tuple[bool, bool, bool] = (False, False, False)
    """Which of z, y, x were flipped against the file."""
    acquisition: dict[str, Any] = field(default_factory=dict)
    """Allow-listed covariates of the scan: kernel, kvp, slice_thickness_mm, manufacturer, modality. No patient data."""
    notes: tuple[str, ...] = ()
    """What was found and done while reading, in words for the user; free of paths and patient data."""
    status: tuple[str, ...] = ()
    """Stable words for what numbers of this scan depend on, see ``STATUS_WORDS``; the words of ``notes`` explain."""

    def __post_init__(self) -> None:
        if tuple(self.array.shape) != self.geometry.shape:
            raise InputError(f"array of shape {self.array.shape} on a grid of shape {self.geometry.shape}")

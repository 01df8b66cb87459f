"""From a file's own grid to the canonical one and back: axes are moved here and nowhere else.

Canonical means nearest to axial supine: z to superior, y to posterior, x to left. Only whole axes are permuted and
flipped, so no voxel value changes; what is left of an oblique orientation stays in ``direction``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.volume import Geometry, Triple, Volume

ORTHONORMAL_TOLERANCE = 1e-3
"""Largest accepted entry of |D'D - 1|; smaller deviations (rounded headers) are removed. RELIABILITY row 28."""
ROUNDING_NOISE = 1e-9
"""Deviations below this are double rounding and are left alone, so that exact cosines stay exact."""
RAS_TO_SPL = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
"""World axes of NIfTI (right, anterior, superior) to ours (superior, posterior, left)."""
LPS_TO_SPL = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
"""World axes of DICOM and ITK (left, posterior, superior) to ours (superior, posterior, left)."""
LAS_TO_SPL = np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
"""World axes of some NRRD files (left, anterior, superior) to ours."""

Direction = tuple[Triple, Triple, Triple]


def orthonormal_direction(matrix: np.ndarray | Sequence[Sequence[float]], *, name: str) -> Direction:
    """Nearest orthonormal direction matrix, or an error if the axes are sheared.

    Parameters
    ----------
    matrix : float array, shape (3, 3)
        Unit vectors as columns.
    name : str
        What is being read, for the message.

    Raises
    ------
    InputError
        If any entry of ``D'D - 1`` exceeds 1e-3.
    """
    direction = np.asarray(matrix, dtype=float)
    deviation = np.abs(direction.T @ direction - np.eye(3)).max() if np.isfinite(direction).all() else np.inf
    if deviation > ORTHONORMAL_TOLERANCE:
        raise InputError(
            f"{name}: its axes are not at right angles (deviation {deviation:.2g}, at most {ORTHONORMAL_TOLERANCE}): "
            "a sheared or damaged orientation. Resample the scan to a regular grid, or repair the header "
            "(for NIfTI: `fslorient -copyqform2sform FILE` if its qform is right)"
        )
    if deviation > ROUNDING_NOISE:
        left, _, right = np.linalg.svd(direction)
        direction = left @ right
    rows = [tuple(float(v) + 0.0 for v in row) for row in direction]  # + 0.0 turns -0.0 into 0.0
    return rows[0], rows[1], rows[2]  # type: ignore[return-value]


def _nearest_axes(direction: np.ndarray) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """File axis that becomes each of z, y, x and whether it runs backwards; the first of equally good answers."""
    axes = max(permutations(range(3)), key=lambda p: round(sum(abs(direction[i, p[i]]) for i in range(3)), 9))
    return axes, tuple(bool(direction[i, axes[i]] < 0) for i in range(3))


def canonical_grid(geometry: Geometry) -> tuple[Geometry, tuple[int, int, int], tuple[bool, bool, bool]]:
    """The canonical grid of a file's grid, and which axes of the file become z, y, x and run backwards.

    Parameters
    ----------
    geometry : Geometry
        The file's own grid (slowest axis first); may be left-handed, as NIfTI grids often are.

    Returns
    -------
    (Geometry, three ints, three bools)
        Grid, ``stored_axes`` and ``stored_flips`` as in ``Volume``.
    """
    axes, flips = _nearest_axes(np.asarray(geometry.direction))
    return move_axes(geometry, axes, flips), axes, flips  # type: ignore[return-value]


def move_axes(geometry: Geometry, axes: Sequence[int], flips: Sequence[bool]) -> Geometry:
    """The same grid, its axes in another order: axis ``axes[i]`` becomes axis i, then is flipped if ``flips[i]``."""
    first = [0, 0, 0]
    for axis, flip in zip(axes, flips, strict=True):
        first[axis] = geometry.shape[axis] - 1 if flip else 0
    direction = np.asarray(geometry.direction)[:, list(axes)] * np.where(flips, -1.0, 1.0) + 0.0
    return Geometry(
        tuple(geometry.shape[a] for a in axes),  # type: ignore[arg-type]
        tuple(geometry.spacing_mm[a] for a in axes),  # type: ignore[arg-type]
        tuple(float(v) for v in geometry.to_world(first)),  # type: ignore[arg-type]
        tuple(tuple(float(v) for v in row) for row in direction),  # type: ignore[arg-type]
    )


def stored_view(array: np.ndarray, axes: Sequence[int], flips: Sequence[bool]) -> np.ndarray:
    """A view of a canonical array in the file's own axis order: readers write slices through it, without a copy."""
    order = [list(axes).index(i) for i in range(3)]
    return np.flip(array, tuple(i for i in range(3) if flips[i])).transpose(order)


def to_canonical(array: np.ndarray, geometry: Geometry) -> Volume:
    """The same voxels in the canonical orientation, contiguous in memory.

    Parameters
    ----------
    array : array, shape of ``geometry``
        Any dtype, in the file's own axis order (slowest axis first).
    geometry : Geometry
        Grid of ``array`` in that order; may be left-handed, as NIfTI grids often are.

    Returns
    -------
    Volume
        With ``stored_axes`` and ``stored_flips`` filled; a copy only where axes move.

    Source
    ------
    STYLE section 6.3; RELIABILITY rows 9-11.
    """
    grid, axes, flips = canonical_grid(geometry)
    moved = np.flip(array.transpose(axes), tuple(i for i in range(3) if flips[i]))
    return Volume(np.ascontiguousarray(moved), grid, axes, flips)


def to_stored(
    array: np.ndarray, geometry: Geometry, *, stored_axes: Sequence[int], stored_flips: Sequence[bool]
) -> tuple[np.ndarray, Geometry]:
    """Array and grid in the file's own order again: the inverse of ``to_canonical``.

    Parameters
    ----------
    array : array, shape (Z, Y, X)
        Any dtype, canonical.
    geometry : Geometry
        Canonical grid of ``array``; any spacing (a resampled grid keeps the file's orientation).
    stored_axes, stored_flips : three ints, three bools
        As in ``Volume``.

    Raises
    ------
    InputError
        If ``stored_axes`` is no permutation of 0, 1, 2.
    """
    if sorted(stored_axes) != [0, 1, 2] or len(stored_flips) != 3:
        raise InputError(f"stored axes {tuple(stored_axes)} are no permutation of (0, 1, 2)")
    order = [list(stored_axes).index(i) for i in range(3)]
    first = [n - 1 if flip else 0 for n, flip in zip(geometry.shape, stored_flips, strict=True)]
    direction = (np.asarray(geometry.direction) * np.where(stored_flips, -1.0, 1.0))[:, order] + 0.0
    grid = Geometry(
        tuple(geometry.shape[i] for i in order),  # type: ignore[arg-type]
        tuple(geometry.spacing_mm[i] for i in order),  # type: ignore[arg-type]
        tuple(float(v) for v in geometry.to_world(first)),  # type: ignore[arg-type]
        tuple(tuple(float(v) for v in row) for row in direction),  # type: ignore[arg-type]
    )
    return np.ascontiguousarray(stored_view(array, stored_axes, stored_flips)), grid

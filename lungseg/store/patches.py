"""Patches are hyperslabs of ``volume.h5``: the table that lists them and the loader that reads them.

The order of training images is a function of (seed, index of the image) alone, so it does not depend on the number
of devices, workers or on resuming.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungseg.errors import InputError, UsageError
from lungseg.scan.volume import AIR_HU
from lungseg.store.reader import ReaderPool

INT32_VOXELS = 2**31
"""Volumes below this many voxels are counted in 32 bits: half the memory of a summed-volume table."""


def grid_corners(shape: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> np.ndarray:
    """Corners of a regular grid of boxes that covers a volume, the last one of each axis shifted inside.

    Parameters
    ----------
    shape, size, stride : three integers (z, y, x)
        Volume, box and step in voxels. A box larger than the volume gives the corner 0 (padding is the reader's).

    Returns
    -------
    int32 array, shape (N, 3)
        In order of z, then y, then x.
    """
    axes = []
    for length, edge, step in zip(shape, size, stride, strict=True):
        last = max(length - edge, 0)
        axes.append(np.unique(np.append(np.arange(0, last + 1, step), last)))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int32)


def mask_fractions(mask: np.ndarray, corners: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Share of mask voxels in each box, by summed-volume table; voxels outside the volume count as outside.

    The table takes 4 bytes per voxel (8 from 2^31 voxels on), and nothing else of the size of the mask is made.

    Parameters
    ----------
    mask : bool or uint8 array, shape (Z, Y, X)
        Nonzero = lung.
    corners : int array, shape (N, 3)
        Box corners, not negative.
    size : three integers
        Box edges.

    Returns
    -------
    float32 array, shape (N,)
        0 to 1.
    """
    counts = np.int32 if mask.size < INT32_VOXELS else np.int64
    table = np.zeros(tuple(n + 1 for n in mask.shape), dtype=counts)
    inside = table[1:, 1:, 1:]
    np.greater(mask, 0, out=inside)
    for axis in range(3):
        np.cumsum(inside, axis=axis, out=inside)
    limits = np.asarray(mask.shape)
    low, high = np.minimum(corners, limits), np.minimum(corners + np.asarray(size), limits)
    total = np.zeros(len(corners), dtype=np.int64)
    for bits in range(8):
        pick = [(high if bits >> axis & 1 else low)[:, axis] for axis in range(3)]
        sign = 1 if bin(bits).count("1") % 2 else -1
        total += sign * table[pick[0], pick[1], pick[2]].astype(np.int64)
    return (total / float(np.prod(np.asarray(size)))).astype(np.float32)


def patch_table(
    mask: np.ndarray, *, size: Sequence[int], stride: Sequence[int], min_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the patches with enough lung, and their share of lung.

    If no patch reaches ``min_fraction`` (small lungs, large patches), the fullest one is listed alone, so that a case
    with lung always has a patch.

    Returns
    -------
    corners : int32 array, shape (N, 3)
    fractions : float32 array, shape (N,)
        Both empty if the mask is.
    """
    corners = grid_corners(mask.shape, size, stride)
    fractions = mask_fractions(mask, corners, size)
    keep = fractions >= min_fraction
    if not keep.any() and fractions.max(initial=0.0) > 0:
        keep = np.arange(len(corners)) == int(fractions.argmax())
    keep &= fractions > 0
    return corners[keep], fractions[keep]


def read_box(array: np.ndarray, corner: Sequence[int] | np.ndarray, size: Sequence[int], fill: int) -> np.ndarray:
    """A box of an array; what lies outside the array is ``fill``. Corners may be negative."""
    slices, pads = _clip_box(array.shape, corner, size)
    return _padded(array[slices], pads, fill)


def _clip_box(
    shape: Sequence[int], corner: Sequence[int] | np.ndarray, size: Sequence[int]
) -> tuple[tuple[slice, ...], list[tuple[int, int]]]:
    slices, pads = [], []
    for length, start, edge in zip(shape, corner, size, strict=True):
        low, high = min(max(int(start), 0), length), min(max(int(start) + edge, 0), length)
        slices.append(slice(low, high))
        before = min(max(-int(start), 0), edge)
        pads.append((before, edge - before - (high - low)))
    return tuple(slices), pads


def _padded(box: np.ndarray, pads: list[tuple[int, int]], fill: int) -> np.ndarray:
    return box if not any(map(any, pads)) else np.pad(box, pads, constant_values=fill)


@dataclass(frozen=True)
class Patch:
    """One training patch with the halo the teacher's windows need."""

    volume_hu: np.ndarray
    """int16, shape = patch + 2 halo; -1024 outside the volume."""
    mask: np.ndarray
    """bool, same shape; False outside the volume."""
    lung_median_hu: float
    """Median HU of the whole lung of the case (reference of the Gabor features)."""
    limits_hu: tuple[float, float] | None = None
    """Least and largest HU of the volume, where asked for."""


@dataclass(frozen=True)
class _Case:
    """What is known of a case before a patch is read."""

    path: Path
    corners: np.ndarray
    """Of its listed patches, int32 (N, 3)."""
    lung_median_hu: float
    limits_hu: tuple[float, float] | None


class PatchSource:
    """Random patches of a store, balanced over cases: image ``index`` of a run is always the same patch."""

    def __init__(
        self,
        volumes: Sequence[Path],
        *,
        size: Sequence[int],
        halo: int,
        seed: int,
        flips: bool,
        cache_bytes: int,
        turns: bool = False,
        limits: bool = False,
    ) -> None:
        """List the patches of ``volumes`` (paths of ``volume.h5``).

        Volumes are kept decoded in memory, per process, while they fit in ``cache_bytes``; the others are read as
        hyperslabs. ``turns`` also turns patches in the axial plane (they must be square there); ``limits`` also finds
        the least and largest HU of each volume, which reads all of them once.

        Raises
        ------
        InputError
            If no volume lists a patch.
        UsageError
            If patches that are not square are to be turned.
        """
        self._size = tuple(int(n) for n in size)
        self._halo = halo
        self._seed = seed
        self._flips = flips
        self._turns = turns
        if turns and self._size[1] != self._size[2]:
            raise UsageError(f"patches of {self._size} voxels cannot be turned in the axial plane: they are not square")
        self._cache_bytes = cache_bytes
        self._pool = ReaderPool()
        self._cache: OrderedDict[Path, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._cases: list[_Case] = []
        for path in volumes:
            artefact = self._pool.get(path, "volume")
            corners = artefact.read("patches/corner")
            if len(corners):
                median = float(artefact.provenance["lung_median_hu"])
                self._cases.append(
                    _Case(path, corners, median, volume_limits(artefact.read("image")) if limits else None)
                )
        if not self._cases:
            raise InputError(
                f"none of the {len(volumes)} cases lists a training patch: no lung was found in them, "
                "or the store was made for a larger patch"
            )

    def __len__(self) -> int:
        return len(self._cases)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def read(self, index: int) -> Patch:
        """Patch number ``index`` of the run: its case, place, flips and turn follow from (seed, index) only."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        case = self._cases[int(rng.integers(len(self._cases)))]
        corner = case.corners[int(rng.integers(len(case.corners)))] + self._jitter(rng)
        flips = rng.integers(2, size=3).astype(bool) if self._flips else np.zeros(3, dtype=bool)
        # flips of both axes are half turns already: a quarter turn or none gives all eight positions
        turns = int(rng.integers(2 if self._flips else 4)) if self._turns else 0
        box = tuple(n + 2 * self._halo for n in self._size)
        steps = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
        views = (np.rot90(view[steps], turns, axes=(1, 2)) for view in self._read(case.path, corner - self._halo, box))
        image, mask = (np.ascontiguousarray(view) for view in views)
        return Patch(image, mask, case.lung_median_hu, case.limits_hu)

    def _jitter(self, rng: np.random.Generator) -> np.ndarray:
        """Up to a quarter patch, so that patches do not always meet tissue at the same phase of the table's grid."""
        reach = np.asarray(self._size) // 4
        return rng.integers(-reach, reach + 1)

    def _read(self, path: Path, corner: np.ndarray, box: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        cached = self._cached(path)
        if cached is not None:
            return read_box(cached[0], corner, box, AIR_HU), read_box(cached[1], corner, box, 0) > 0
        artefact = self._pool.get(path, "volume")
        slices, pads = _clip_box(artefact.shape("image"), corner, box)
        image = _padded(artefact.read("image", slices), pads, AIR_HU)
        return image, _padded(artefact.read("mask", slices), pads, 0) > 0

    def _cached(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        if path in self._cache:
            return self._cache[path]
        artefact = self._pool.get(path, "volume")
        needed = 3 * int(np.prod(artefact.shape("image"), dtype=np.int64))
        held = sum(image.nbytes + mask.nbytes for image, mask in self._cache.values())
        if held + needed > self._cache_bytes:
            return None
        self._cache[path] = (artefact.read("image"), artefact.read("mask"))
        return self._cache[path]


def volume_limits(image_hu: np.ndarray) -> tuple[float, float]:
    """Least and largest HU of a volume, at least one apart."""
    low = float(image_hu.min())
    return low, max(float(image_hu.max()), low + 1)

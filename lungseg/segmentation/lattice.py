"""The token lattice: windows over a volume, fusion of their tokens, and the way back to voxels.

Token ``(i, j, k)`` of cell size ``p`` covers the voxels ``[i*p, (i+1)*p)`` of each axis, so that its centre lies at
voxel ``(i + 0.5) * p - 0.5``. Volumes are padded at the end of each axis only: lattice and voxel indices of the
padded and the unpadded volume agree. Nothing of the size features x voxels is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lungseg.errors import InputError, MismatchError

Region = tuple[slice, slice, slice]

GAUSSIAN_SIGMA_FRACTION = 1.0 / 8.0
"""Standard deviation of a window's weights as a share of the window (METHOD 1.5 step 4; as nnU-Net)."""
GAUSSIAN_FLOOR = 1e-12
"""Smallest weight of a token: far corners must count where no other window covers them."""
SLAB_VOXELS = 16
"""Voxels along z of one slab of an upsampled posterior: bounds the memory."""


def lattice_shape(shape: Sequence[int], token_size: int) -> tuple[int, int, int]:
    """Tokens along (z, y, x) that cover a volume of ``shape`` voxels: ceil(shape / token_size)."""
    _check_token_size(token_size)
    z, y, x = (-(-int(n) // token_size) for n in shape)
    return z, y, x


def padded_shape(shape: Sequence[int], patch_size: Sequence[int], token_size: int) -> tuple[int, int, int]:
    """Voxels along (z, y, x) after padding: a multiple of the token size and at least one patch.

    Raises
    ------
    MismatchError
        If the patch is no multiple of the token size.
    """
    _check_multiple("patch size", patch_size, token_size)
    z, y, x = (max(n * token_size, int(p)) for n, p in zip(lattice_shape(shape, token_size), patch_size, strict=True))
    return z, y, x


def pad_volume(volume: np.ndarray, target_shape: Sequence[int]) -> np.ndarray:
    """Volume padded at the end of each axis to ``target_shape`` voxels.

    Reflected without repeating the last voxel; an axis too short to be reflected repeats its last voxel instead.

    Parameters
    ----------
    volume : array, shape (Z, Y, X)
        Any dtype, kept. Returned unchanged (not copied) if nothing is to be added.
    target_shape : three ints
        From ``padded_shape``; not below the shape of ``volume``.

    Raises
    ------
    MismatchError
        If the target is smaller than the volume.
    """
    result = volume
    for axis, (have, want) in enumerate(zip(volume.shape, target_shape, strict=True)):
        missing = int(want) - have
        if missing < 0:
            raise MismatchError(f"cannot pad a volume of shape {volume.shape} to the smaller {tuple(target_shape)}")
        if missing:
            widths = [(0, missing if other == axis else 0) for other in range(volume.ndim)]
            result = np.pad(result, widths, mode="reflect" if missing < have else "edge")
    return result


def window_corners(
    volume_shape: Sequence[int], patch_size: Sequence[int], stride: Sequence[int], *, token_size: int
) -> np.ndarray:
    """First voxels of the windows that cover a padded volume, all on the token lattice.

    Windows are ``stride`` voxels apart; the last one of each axis is shifted inside, so that every voxel is covered.

    Parameters
    ----------
    volume_shape, patch_size, stride : three ints each
        Voxels along (z, y, x). The volume is padded (``padded_shape``), the stride not larger than the patch.
    token_size : int
        Cell size of the lattice in voxels.

    Returns
    -------
    int32 array, shape (N, 3)
        Corners (z, y, x) in voxels, z slowest, without repeats.

    Raises
    ------
    MismatchError
        If volume, patch or stride is no multiple of the token size, the volume is smaller than the patch, or the
        stride leaves gaps.

    Source
    ------
    METHOD 1.5 steps 1 and 4.
    """
    for name, sizes in (("volume", volume_shape), ("patch size", patch_size), ("stride", stride)):
        _check_multiple(name, sizes, token_size)
    axes = []
    for size, patch, step in zip(volume_shape, patch_size, stride, strict=True):
        if size < patch or step > patch:
            raise MismatchError(
                f"windows of {tuple(patch_size)} voxels with stride {tuple(stride)} do not cover a volume of "
                f"{tuple(volume_shape)}: pad the volume to the patch, and keep the stride within it"
            )
        regular = np.arange(0, size - patch + 1, step)
        axes.append(np.unique(np.append(regular, size - patch)))
    grid = np.meshgrid(*axes, indexing="ij")
    return np.stack([axis.ravel() for axis in grid], axis=1).astype(np.int32)


def gaussian_window(token_grid_shape: Sequence[int], sigma_fraction: float = GAUSSIAN_SIGMA_FRACTION) -> np.ndarray:
    """Weight of each token of a window: a Gaussian around the window's centre.

    Parameters
    ----------
    token_grid_shape : three ints
        Tokens of a window along (z, y, x).
    sigma_fraction : float
        Standard deviation as a share of the window's size, per axis.

    Returns
    -------
    float32 array, shape ``token_grid_shape``
        Strictly positive, at most 1.

    Source
    ------
    METHOD 1.5 step 4.
    """
    weights = np.ones(tuple(token_grid_shape), dtype=np.float64)
    for axis, n in enumerate(token_grid_shape):
        offset = (np.arange(n) - (n - 1) / 2.0) / (sigma_fraction * n)
        weights *= np.exp(-0.5 * offset**2).reshape([-1 if other == axis else 1 for other in range(3)])
    return np.maximum(weights, GAUSSIAN_FLOOR).astype(np.float32)


class TokenFusion:
    """Weighted average of the tokens of overlapping windows on one lattice.

    Holds ``channels + 1`` float32 values per token of the lattice, and nothing per voxel. Tokens of a window that
    lie beyond the lattice (padding) are dropped.

    Parameters
    ----------
    lattice_shape : three ints
        Tokens along (z, y, x), from ``lattice_shape`` of the unpadded volume.
    channels : int
        Features per token.

    Source
    ------
    METHOD 1.5 step 4 (fusion at token level).
    """

    def __init__(self, lattice_shape: Sequence[int], channels: int) -> None:
        self._sum = np.zeros((channels, *lattice_shape), dtype=np.float32)
        self._weight = np.zeros(tuple(lattice_shape), dtype=np.float32)

    def add(self, corner_tokens: Sequence[int] | np.ndarray, features: np.ndarray, weights: np.ndarray) -> None:
        """Add one window whose first token is ``corner_tokens`` (z, y, x).

        ``features`` has shape (C, d, h, w); ``weights`` has shape (d, h, w), not negative; a token of weight zero
        is ignored. Raises ``MismatchError`` if shapes do not fit or the corner lies outside the lattice.
        """
        corner = [int(c) for c in corner_tokens]
        if features.shape[0] != self._sum.shape[0] or features.shape[1:] != weights.shape or weights.ndim != 3:
            raise MismatchError(
                f"window of features {features.shape} with weights {weights.shape} does not fit a fusion of "
                f"{self._sum.shape[0]} channels"
            )
        lattice = self._weight.shape
        if any(not 0 <= c < n for c, n in zip(corner, lattice, strict=True)):
            raise MismatchError(f"window corner {tuple(corner)} lies outside the lattice of {lattice} tokens")
        target = tuple(slice(c, min(c + n, m)) for c, n, m in zip(corner, weights.shape, lattice, strict=True))
        source = tuple(slice(0, part.stop - part.start) for part in target)
        kept = np.asarray(weights[source], dtype=np.float32)
        self._sum[(slice(None), *target)] += features[(slice(None), *source)] * kept
        self._weight[target] += kept

    def result(self, *, unit_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Fused features and which tokens any window covered.

        Parameters
        ----------
        unit_blocks : int
            Channels per block that is brought back to unit length (128 for one noise level of the student head);
            0 leaves the averages as they are. Blocks of length zero stay zero.

        Returns
        -------
        features : float32 array, shape (C, z, y, x)
            Zero where no window was added.
        coverage : bool array, shape (z, y, x)

        Raises
        ------
        MismatchError
            If the channels are no multiple of ``unit_blocks``.
        """
        channels = self._sum.shape[0]
        if unit_blocks and channels % unit_blocks:
            raise MismatchError(f"{channels} channels are no multiple of blocks of {unit_blocks}")
        covered = self._weight > 0
        divisor = np.where(covered, self._weight, np.float32(1.0))
        features = self._sum / divisor
        for start in range(0, channels, unit_blocks) if unit_blocks else ():
            block = features[start : start + unit_blocks]
            length = np.sqrt(np.einsum("czyx,czyx->zyx", block, block))
            block /= np.where(length > 0, length, np.float32(1.0))
        return features, covered


def token_mask_fraction(mask: np.ndarray, token_size: int) -> np.ndarray:
    """Share of each token's cell that lies in a mask.

    Parameters
    ----------
    mask : bool array, shape (Z, Y, X)
    token_size : int
        Cell size in voxels.

    Returns
    -------
    float32 array, shape ceil(shape / token_size)
        0 to 1, of the whole cell of ``token_size``³ voxels: what lies beyond the volume counts as outside the mask.
    """
    shape = lattice_shape(mask.shape, token_size)
    counts = np.asarray(mask, dtype=bool)
    dtype = np.uint32
    for axis, n in enumerate(shape):
        starts = np.arange(n) * token_size
        counts = np.add.reduceat(counts, starts, axis=axis, dtype=dtype)
    return (counts / float(token_size**3)).astype(np.float32)


def fill_uncovered(posterior: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Posterior in which each token without a value takes that of the nearest token with one.

    Thin rims of lung lie in cells that are mostly outside and carry no token; they need a value before upsampling.

    Parameters
    ----------
    posterior : float array, shape (K, z, y, x)
    coverage : bool array, shape (z, y, x)
        Tokens whose posterior is known.

    Returns
    -------
    array like ``posterior``
        All zero if no token is covered.
    """
    from scipy.ndimage import distance_transform_edt

    if posterior.shape[1:] != coverage.shape:
        raise MismatchError(f"posterior {posterior.shape} and coverage {coverage.shape} are not on one lattice")
    if not coverage.any():
        return np.zeros_like(posterior)
    nearest = distance_transform_edt(~coverage, return_distances=False, return_indices=True)
    return posterior[:, nearest[0], nearest[1], nearest[2]]


def upsample_slabs(
    posterior: np.ndarray,
    shape: Sequence[int],
    token_size: int,
    *,
    region: Region | None = None,
    slab: int = SLAB_VOXELS,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Posterior on voxels, slab by slab along z (trilinear between token centres).

    Parameters
    ----------
    posterior : float array, shape (K, z, y, x)
        On the lattice; float16 is read as float32. A lattice of ``token_size`` 1 comes back unchanged.
    shape : three ints
        Voxels of the (unpadded) volume.
    token_size : int
        Cell size in voxels.
    region : three slices, optional
        Box of voxels wanted, with explicit bounds; the whole volume by default.
    slab : int
        Voxels along z per slab; the memory is ``K * slab * Y * X`` float32.

    Yields
    ------
    z : slice
        Voxels of the slab along z, counted from the start of the region.
    values : float32 array, shape (K, slab, Y, X) of the region
        Beyond the outermost token centres the outermost token is continued.

    Raises
    ------
    MismatchError
        If the posterior does not lie on the lattice of ``shape``.

    Source
    ------
    METHOD 1.5 step 6.
    """
    if posterior.ndim != 4 or posterior.shape[1:] != lattice_shape(shape, token_size):
        raise MismatchError(
            f"posterior of shape {posterior.shape} is not on the lattice {lattice_shape(shape, token_size)} of a "
            f"volume of {tuple(shape)} voxels with tokens of {token_size}"
        )
    box = region or tuple(slice(0, int(n)) for n in shape)
    lines = [_linear_weights(part, n, token_size) for part, n in zip(box, posterior.shape[1:], strict=True)]
    depth = box[0].stop - box[0].start
    for start in range(0, depth, slab):
        part = slice(start, min(start + slab, depth))
        low, high, weight = (line[part] for line in lines[0])
        values = _blend(posterior, 1, low, high, weight)
        for axis in (1, 2):
            values = _blend(values, axis + 1, *lines[axis])
        yield part, values


def upsample_posterior(
    posterior: np.ndarray, shape: Sequence[int], token_size: int, *, region: Region | None = None
) -> np.ndarray:
    """Posterior on voxels in one array, float32 (K, Z, Y, X) of the region; see ``upsample_slabs``."""
    box = region or tuple(slice(0, int(n)) for n in shape)
    result = np.empty((posterior.shape[0], *(part.stop - part.start for part in box)), dtype=np.float32)
    for part, values in upsample_slabs(posterior, shape, token_size, region=region):
        result[:, part] = values
    return result


def bounding_region(mask: np.ndarray, *, margin: int = 0) -> Region:
    """Smallest box around a mask, widened by ``margin`` voxels within the array; explicit bounds.

    Raises ``InputError`` if the mask is empty.
    """
    parts = []
    for axis, n in enumerate(mask.shape):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not hit.size:
            raise InputError("the mask is empty: there is no lung to work on")
        parts.append(slice(max(int(hit[0]) - margin, 0), min(int(hit[-1]) + 1 + margin, n)))
    return parts[0], parts[1], parts[2]


def _linear_weights(part: slice, num_tokens: int, token_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower token, upper token and weight of the upper one for the voxels of one axis."""
    position = (np.arange(part.start, part.stop) + 0.5) / token_size - 0.5
    position = np.clip(position, 0.0, num_tokens - 1)
    low = np.floor(position).astype(np.intp)
    high = np.minimum(low + 1, num_tokens - 1)
    return low, high, (position - low).astype(np.float32)


def _blend(values: np.ndarray, axis: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Linear interpolation along one axis, float32."""
    first = np.take(values, low, axis=axis).astype(np.float32, copy=False)
    if not weight.any():
        return first
    second = np.take(values, high, axis=axis).astype(np.float32, copy=False)
    second -= first
    second *= weight.reshape([-1 if other == axis else 1 for other in range(values.ndim)])
    second += first
    return second


def _check_token_size(token_size: int) -> None:
    if token_size < 1:
        raise MismatchError(f"a token covers at least one voxel, not {token_size}")


def _check_multiple(name: str, sizes: Sequence[int], token_size: int) -> None:
    _check_token_size(token_size)
    if len(sizes) != 3 or any(int(n) < token_size or int(n) % token_size for n in sizes):
        raise MismatchError(f"{name} {tuple(sizes)} is not a multiple of the token size {token_size} on every axis")

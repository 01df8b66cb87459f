"""Tokens of one lung, by the way its student allows: slabs of the whole lung, or overlapping windows fused."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lungseg.config.cluster import ClusterConfig
from lungseg.diffusion.checkpoint import Student
from lungseg.diffusion.tokens import NoiseField, encode_windows, reflected
from lungseg.errors import UsageError
from lungseg.segmentation.lattice import (
    TokenFusion,
    gaussian_window,
    lattice_shape,
    pad_volume,
    padded_shape,
    token_mask_fraction,
    window_corners,
)
from lungseg.segmentation.slabs import encode_slabs, max_slab_voxels
from lungseg.store.patches import mask_fractions

log = logging.getLogger(__name__)


def resolve_encoding(student: Student, encoding: str) -> str:
    """`slabs` or `windows`: what was asked for, or for `auto` slabs wherever the student allows them.

    Raises
    ------
    UsageError
        If slabs are asked for and the student's features depend on how much it is given.
    """
    local = student.unet.spec.is_local
    if encoding == "slabs" and not local:
        raise UsageError(
            "--encoding slabs needs a model with --norm channel and --attention window: the features of this one "
            "depend on the patch around them; use --encoding windows"
        )
    return ("slabs" if local else "windows") if encoding == "auto" else encoding


@dataclass(frozen=True)
class TokenPass:
    """Tokens of one pass over a volume: every ``factor``-th site of the lattice along each axis."""

    sites: tuple[slice, slice, slice]
    """Which sites of the lattice they are."""
    features: np.ndarray
    """float32 (C, z, y, x); zero where the student was not asked."""
    usable: np.ndarray
    """bool (z, y, x): tokens that were encoded and whose cell holds any lung."""


def encode_lung(
    image_hu: np.ndarray, mask: np.ndarray, student: Student, config: ClusterConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one volume, all at once; ``encode_passes`` gives them part by part.

    Parameters
    ----------
    image_hu : int16 array, shape (Z, Y, X)
        HU on the student's grid.
    mask : bool array, same shape
        Lung.
    student : Student
    config : ClusterConfig
        Its ``encoding`` may be `auto`.

    Returns
    -------
    features : float32 array, shape (C, z, y, x)
        On the lattice of ``lattice_cell`` voxels; zero where no window reached.
    usable : bool array, shape (z, y, x)
        Tokens that were encoded and whose cell holds any lung.

    Raises
    ------
    UsageError
        From :func:`resolve_encoding` and :func:`lattice_cell`.
    """
    features: np.ndarray | None = None
    lattice = lattice_shape(image_hu.shape, lattice_cell(student, config.token_stride))
    usable = np.zeros(lattice, dtype=bool)
    for part in encode_passes(image_hu, mask, student, config):
        if part.usable.shape == lattice:
            return part.features, part.usable
        if features is None:
            features = np.zeros((part.features.shape[0], *lattice), dtype=np.float32)
        features[:, *part.sites], usable[part.sites] = part.features, part.usable
    assert features is not None, "there is at least one pass"
    return features, usable


def lattice_cell(student: Student, token_stride: int | None) -> int:
    """Voxels along the edge of a cell of the lattice: the token size, or the stride asked for.

    Raises
    ------
    UsageError
        If tokens cannot lie around the centres of such cells.
    """
    p = student.config.token_size
    cell = p if token_stride is None else token_stride
    if cell < 1 or p % cell or (p - cell) % 2:
        possible = [c for c in range(1, p + 1) if p % c == 0 and (p - c) % 2 == 0]
        raise UsageError(
            f"--token-stride {cell} does not fit the model's tokens of {p} voxels: use one of "
            f"{', '.join(map(str, possible))}"
        )
    return cell


def encode_passes(
    image_hu: np.ndarray, mask: np.ndarray, student: Student, config: ClusterConfig
) -> Iterator[TokenPass]:
    """Tokens of one volume, pass by pass, so that those of a fine lattice are never all held.

    A lattice finer than the tokens is that of several passes over the volume shifted by whole cells: eight at half
    the token size. A token lies around the centre of its cell: for tokens of 8 voxels and cells of 4 the token of
    site j begins at voxel 4 j - 2. The noise is that of the unshifted volume, voxel by voxel.

    Parameters, errors
        As :func:`encode_lung`.

    Yields
    ------
    TokenPass

    Source
    ------
    METHOD 7.3 (sub-lattice shifts).
    """
    student = student.for_volume(image_hu)
    p, cell = student.config.token_size, lattice_cell(student, config.token_stride)
    slabs = resolve_encoding(student, config.encoding) == "slabs"
    patch = (p, p, p) if slabs else student.config.patch_size
    plane = padded_shape(image_hu.shape, patch, p)[1:]
    fine = lattice_shape(image_hu.shape, cell)
    cell_has_lung = token_mask_fraction(mask, cell) > 0
    for shift in itertools.product(_axis_shifts(p, cell), repeat=3):
        widened = [(step.before, 0) for step in shift]
        image, lung = _reflect_before(image_hu, [step.before for step in shift]), np.pad(mask, widened)
        noise = NoiseField(config.seed, plane, origin=[-step.before for step in shift])
        encode = _encode_slabs if slabs else _encode_windows
        features, usable = encode(image, lung, student, config, noise)
        sites = tuple(slice(step.first_site, n, p // cell) for step, n in zip(shift, fine, strict=True))
        counts = cell_has_lung[sites].shape
        own = tuple(slice(step.first_token, step.first_token + n) for step, n in zip(shift, counts, strict=True))
        features, usable = features[:, *own], usable[own] & cell_has_lung[sites]
        features[:, ~usable] = 0.0
        yield TokenPass((sites[0], sites[1], sites[2]), features, usable)


@dataclass(frozen=True)
class _Shift:
    """One axis of a pass: how the volume is widened, and which sites its tokens are."""

    before: int
    """Voxels put before the first one."""
    first_site: int
    """Site of the first token that counts."""
    first_token: int
    """Which token that is; those before it lie before the lattice."""


def _axis_shifts(token_size: int, cell: int) -> list[_Shift]:
    """The passes along one axis: tokens begin at ``cell * site - (token_size - cell) / 2``.

    A volume is only ever widened: cutting its first voxels off would take them from the student's sight.
    """
    shifts = []
    for site in range(token_size // cell):
        start = cell * site - (token_size - cell) // 2
        shifts.append(_Shift(before=-start % token_size, first_site=site, first_token=1 if start > 0 else 0))
    return shifts


def _reflect_before(volume: np.ndarray, before: Sequence[int]) -> np.ndarray:
    """Volume with so many voxels more at the beginning of each axis, reflected as ``reflected`` does."""
    for axis, count in enumerate(before):
        if count:
            length = volume.shape[axis]
            volume = np.take(volume, reflected(-count, count + length, length), axis=axis)
    return volume


def _encode_slabs(
    image: np.ndarray, mask: np.ndarray, student: Student, config: ClusterConfig, noise: NoiseField
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a volume in slabs, and those with lung."""
    return encode_slabs(
        student, image, mask, timesteps=config.timesteps, combine=config.combine, seed=config.seed,
        max_voxels=max_slab_voxels(student.unet.spec, config.slab_gib), noise=noise,
    )  # fmt: skip


def _encode_windows(
    image: np.ndarray, mask: np.ndarray, student: Student, config: ClusterConfig, noise: NoiseField
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a volume by overlapping windows, and those with lung that a window covered."""
    embedding, p = student.embedding, student.config.token_size
    channels = embedding * (len(config.timesteps) if config.combine == "concat" else 1)
    fusion = TokenFusion(lattice_shape(image.shape, p), channels)
    weights = gaussian_window([n // p for n in student.config.patch_size], config.window_sigma)
    for corners, features in _windows(image, mask, student, config, noise):
        for corner, feature in zip(corners, features, strict=True):
            fusion.add(corner // p, feature, weights)
    fused, covered = fusion.result(unit_blocks=embedding)
    return fused, covered & (token_mask_fraction(mask, p) > 0)


def _windows(
    image: np.ndarray, mask: np.ndarray, student: Student, config: ClusterConfig, noise: NoiseField
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Corners (n, 3) and token descriptors (n, C, d, h, w) of all windows with lung, batch by batch."""
    patch, p = student.config.patch_size, student.config.token_size
    target = padded_shape(image.shape, patch, p)
    image, mask = pad_volume(image, target), np.pad(mask, [(0, t - n) for t, n in zip(target, mask.shape, strict=True)])
    stride = [max(p, round(n * (1 - config.overlap) / p) * p) for n in patch]
    corners = window_corners(target, patch, stride, token_size=p)
    corners = corners[mask_fractions(mask, corners, patch) >= max(config.min_window_lung, 1e-9)]
    size, start = config.batch_size, 0
    while start < len(corners):
        part = corners[start : start + size]
        boxes = [tuple(slice(c, c + n) for c, n in zip(corner, patch, strict=True)) for corner in part]
        hu, lung = np.stack([image[box] for box in boxes]), np.stack([mask[box] > 0 for box in boxes])
        try:
            tokens = encode_windows(student, hu, lung, part, noise, timesteps=config.timesteps, combine=config.combine)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            torch.cuda.empty_cache()
            log.warning("the device has no memory for the windows; going on with %d at a time", size)
            continue
        yield part, tokens
        start += size

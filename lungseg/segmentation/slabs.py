"""A whole lung through the student in slabs: the tokens of one pass over the volume, in bounded memory.

It needs a student whose features do not depend on how much is seen at once (``UNetSpec.is_local``), and takes two
steps for each noise level. The *trunk*, all that is finer than a token, is run on boxes with a halo as wide as it
reaches; where a box ends inside the volume its halo is thrown away, so the zeros that convolutions put beyond an end
count at the borders of the volume only, as in one pass. The rest works on the token lattice, which is some hundred
times smaller than the volume, in slabs that begin and end at attention windows.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lungseg.diffusion.checkpoint import Student
from lungseg.diffusion.tokens import NoiseField, combine_levels, embed, network_input
from lungseg.diffusion.unet import UNetSpec
from lungseg.errors import MismatchError
from lungseg.segmentation.lattice import lattice_shape, pad_volume, token_mask_fraction

log = logging.getLogger(__name__)

MAX_PIECES = 64
"""Pieces an axis is cut into at most, when looking for the cheapest boxes."""
MIN_SLAB_VOXELS = 64**3
"""Below this a device without memory for a box is given up on."""


FINE_MAPS = 4
"""Feature maps of the finest level that exist at the same time in a pass without gradients (measured)."""
INPUT_BYTES = 24
"""Memory of a voxel of the input and its copies: two channels, folded and with the channels last (measured)."""


@dataclass(frozen=True)
class Piece:
    """One axis of a box: what it is for, and what the network must see for it."""

    core: slice
    seen: slice


def axis_pieces(length: int, count: int, *, unit: int, halo: int) -> list[Piece]:
    """An axis of ``length`` voxels in ``count`` pieces or fewer, multiples of ``unit``, with halos within the axis."""
    step = -(-(length // unit) // count) * unit
    return [
        Piece(slice(a, min(a + step, length)), slice(max(a - halo, 0), min(a + step + halo, length)))
        for a in range(0, length, step)
    ]


def max_slab_voxels(spec: UNetSpec, gib: float) -> int:
    """Voxels of the largest box that the trunk takes through ``gib`` GiB of memory, in float32; at least one."""
    per_voxel = 4 * FINE_MAPS * spec.base_width / spec.stem**spec.dims + INPUT_BYTES
    return max(1, int(gib * 2**30 / per_voxel))


def plan_boxes(
    shape: Sequence[int], *, token_size: int, halo: int, max_voxels: int
) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """Pieces along (z, y, x) whose boxes cover a volume, see at most ``max_voxels``, and cost least altogether.

    Parameters
    ----------
    shape : three ints
        Voxels, multiples of the token size.
    token_size : int
        Boxes and halo are multiples of it.
    halo : int
        Voxels around each box that are seen as well.
    max_voxels : int
        Largest box with its halo. If no box is that small, those of one token are taken.

    Returns
    -------
    three lists of Piece
    """
    options = []
    for length in shape:
        counts = range(1, min(length // token_size, MAX_PIECES) + 1)
        options.append([axis_pieces(length, count, unit=token_size, halo=halo) for count in counts])

    def seen(pieces: list[Piece]) -> list[int]:
        return [piece.seen.stop - piece.seen.start for piece in pieces]

    largest = [np.array([max(seen(pieces)) for pieces in axis]) for axis in options]
    total = [np.array([sum(seen(pieces)) for pieces in axis]) for axis in options]
    memory = np.multiply.outer(np.multiply.outer(largest[0], largest[1]), largest[2])
    cost = np.multiply.outer(np.multiply.outer(total[0], total[1]), total[2]).astype(np.float64)
    fitting = np.where(memory <= max_voxels, cost, np.inf)
    best = fitting if np.isfinite(fitting).any() else memory
    i, j, k = np.unravel_index(int(np.argmin(best)), best.shape)
    return options[0][int(i)], options[1][int(j)], options[2][int(k)]


def needed_tokens(wanted: np.ndarray, spec: UNetSpec) -> np.ndarray:
    """Tokens whose trunk reaches a wanted one through the coarsest level, the middle and its attention windows.

    ``wanted`` and the result are bool arrays on the lattice.
    """
    if spec.attention_window is None:
        return np.ones_like(wanted)
    before, after = spec.context_reach
    attended = _dilate(wanted, after)
    window = spec.attention_window
    counts = [-(-n // w) for n, w in zip(wanted.shape, window, strict=True)]
    padded = np.pad(attended, [(0, c * w - n) for c, w, n in zip(counts, window, wanted.shape, strict=True)])
    grouped = padded.reshape([part for pair in zip(counts, window, strict=True) for part in pair])
    touched = grouped.any(axis=(1, 3, 5), keepdims=True)
    windows = np.broadcast_to(touched, grouped.shape).reshape(padded.shape)
    return _dilate(windows[tuple(slice(0, n) for n in wanted.shape)], before)


@torch.no_grad()
def encode_slabs(
    student: Student,
    image_hu: np.ndarray,
    mask: np.ndarray,
    *,
    timesteps: Sequence[int],
    combine: str = "concat",
    seed: int,
    max_voxels: int,
    noise: NoiseField | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Token descriptors of a lung: those of one pass over the whole volume, up to rounding.

    Parameters
    ----------
    student : Student
        With a local network (``UNetSpec.is_local``); its window must know the volume.
    image_hu : int16 array, shape (Z, Y, X)
        HU; reflected at the end of each axis to a multiple of the token size.
    mask : bool array, same shape
        Lung.
    timesteps, combine
        As for :func:`lungseg.diffusion.tokens.encode_windows`.
    seed : int
        Of the noise, which belongs to voxels.
    max_voxels : int
        Largest box, with its halo, that is given to the network: bounds the memory. Halved if a CUDA device has none
        left.
    noise : NoiseField, optional
        Noise to take instead of that of ``seed``: of a volume that this one was cut from.

    Returns
    -------
    features : float32 array, shape (C, z, y, x)
        On the token lattice; zero for tokens without lung.
    usable : bool array, shape (z, y, x)
        Tokens that hold any lung.

    Raises
    ------
    MismatchError
        If the network's features depend on what it is given around them.
    """
    spec = student.unet.spec
    if not spec.is_local:
        raise MismatchError("slabs need a network with channel norm and attention windows; use windows instead")
    p = spec.token_size
    usable = token_mask_fraction(mask, p) > 0
    target = tuple(n * p for n in lattice_shape(mask.shape, p))
    image = pad_volume(image_hu, target)
    padded_mask = np.pad(mask, [(0, t - n) for t, n in zip(target, mask.shape, strict=True)])
    num_blocks = len(timesteps) if combine == "concat" else 1
    width = student.embedding
    features = np.zeros((width * num_blocks, *usable.shape), dtype=np.float32)
    if not usable.any():
        return features, usable
    noise = noise or NoiseField(seed, (image.shape[1], image.shape[2]))
    blocks = []
    for t in timesteps:
        tokens, max_voxels = _trunk(student, image, padded_mask, usable, noise, t, max_voxels)
        blocks.append(_context(student, tokens, usable, t, max_voxels))
    features[:, usable] = combine_levels(blocks, combine).cpu().numpy().T
    return features, usable


def _trunk(
    student: Student,
    image: np.ndarray,
    mask: np.ndarray,
    usable: np.ndarray,
    noise: NoiseField,
    t: int,
    max_voxels: int,
) -> tuple[torch.Tensor, int]:
    """The trunk's tokens (C, z, y, x) of a padded volume, zero where none is needed; and the box size that worked."""
    spec = student.unet.spec
    p = spec.token_size
    halo = -(-spec.trunk_reach // p) * p
    needed = needed_tokens(usable, spec)
    while True:
        axes = plan_boxes(image.shape, token_size=p, halo=halo, max_voxels=max_voxels)
        noise.keep(max(piece.seen.stop - piece.seen.start for piece in axes[0]))
        try:
            return _trunk_boxes(student, image, mask, needed, noise, t, itertools.product(*axes)), max_voxels
        except torch.cuda.OutOfMemoryError:
            if max_voxels // 2 < MIN_SLAB_VOXELS:
                raise
            max_voxels //= 2
            torch.cuda.empty_cache()
            log.warning("the device has no memory for the slabs; going on with slabs of %d voxels", max_voxels)


def _trunk_boxes(
    student: Student,
    image: np.ndarray,
    mask: np.ndarray,
    needed: np.ndarray,
    noise: NoiseField,
    t: int,
    boxes: Iterator[tuple[Piece, ...]],
) -> torch.Tensor:
    p = student.unet.spec.token_size
    tokens: torch.Tensor | None = None
    for box in boxes:
        core = tuple(slice(piece.core.start // p, piece.core.stop // p) for piece in box)
        if not needed[core].any():
            continue
        seen = tuple(piece.seen for piece in box)
        corner = np.array([[part.start for part in seen]])
        inputs = network_input(student, image[seen][None], mask[seen][None], corner, noise, t)
        found = student.unet.trunk(*inputs)[0]  # (C, d, h, w) of what was seen
        if tokens is None:
            tokens = found.new_zeros((found.shape[0], *needed.shape))
        inner = tuple(
            slice((piece.core.start - piece.seen.start) // p, (piece.core.stop - piece.seen.start) // p)
            for piece in box
        )
        tokens[:, *core] = found[:, *inner]
    if tokens is None:
        raise MismatchError("no part of the volume is needed: the mask is empty")
    return tokens


def _context(student: Student, tokens: torch.Tensor, usable: np.ndarray, t: int, max_voxels: int) -> torch.Tensor:
    """Unit vectors (M, E) of the M usable tokens, in the order of the lattice, of the trunk's tokens (C, z, y, x)."""
    spec = student.unet.spec
    edge = spec.attention_window[0] if spec.attention_window else usable.shape[0]
    before, after = spec.context_reach
    halo = (-(-before // edge) + -(-after // edge)) * edge  # whole windows, so that the slab's are the volume's
    # a token holds token_channels values where a voxel of the trunk holds base_width
    budget = max_voxels * spec.base_width // spec.token_channels
    per_plane = math.prod(usable.shape[1:])
    step = max(budget // per_plane - 2 * halo, edge) // edge * edge
    where = torch.from_numpy(usable).to(tokens.device)
    time = torch.full((1,), int(t), device=tokens.device)
    parts = []
    for a in range(0, usable.shape[0], step):
        b = min(a + step, usable.shape[0])
        if not usable[a:b].any():
            continue
        low, high = max(a - halo, 0), min(b + halo, usable.shape[0])
        bottleneck = student.unet.contextualise(tokens[None, :, low:high], time)[0, :, a - low : b - low]
        chosen = bottleneck[:, where[a:b]]  # (C, M)
        parts.append(embed(student, chosen[None])[0].T)
    return torch.cat(parts)


def _dilate(region: np.ndarray, reach: int) -> np.ndarray:
    """Cells within ``reach`` of a region along each axis (a box, as convolutions reach)."""
    from scipy.ndimage import maximum_filter

    dilated: np.ndarray = maximum_filter(region, size=2 * reach + 1, mode="constant", cval=False)
    return dilated

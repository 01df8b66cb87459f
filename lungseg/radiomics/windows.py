"""Windows of a lung: what a window is, which voxels around it a feature may read, and how they are laid out.

*Without a halo* a window is all there is: both voxels of a pair, and every pixel of a neighbourhood, lie inside it
(the rule of pyradiomics). *With a halo* the neighbours come from the volume: a pair belongs to the window of its first
voxel, a neighbourhood to that of its centre, so that the counts of windows that tile a volume add up to those of the
volume. A window then comes with ``HALO_VOXELS`` of its surroundings on each side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lungseg.errors import InputError

HALO_VOXELS: tuple[int, int, int] = (1, 14, 14)
"""Surroundings (z, y, x) on each side of a window with a halo: one voxel for pairs and patterns, in the axial plane the
reach of the longest Gabor kernel (``gabor.radius(8)``)."""

CACHE_VOXELS = 2**17
"""Voxels worked on at once on a CPU: their temporaries stay in the second-level cache (1 MiB a core), without which the
passes over memory cost three times the arithmetic."""
_NO_LIMIT = 2**62


def check_patches(patches_hu: Tensor, masks: Tensor, *, halo: bool = False) -> None:
    """Raise ``InputError`` unless patches and masks are (N, D, H, W), equal in shape and device, masks bool.

    With ``halo`` they must be larger than the halo itself, too.
    """
    if patches_hu.ndim != 4 or patches_hu.shape != masks.shape:
        shapes = f"{tuple(patches_hu.shape)} and {tuple(masks.shape)}"
        raise InputError(f"patches and masks must both have shape (N, D, H, W), but have {shapes}")
    if masks.dtype != torch.bool:
        raise InputError(f"patch masks must be bool, but are {masks.dtype}")
    if patches_hu.device != masks.device:
        raise InputError(f"patches are on {patches_hu.device} but masks on {masks.device}")
    shape = tuple(patches_hu.shape[1:])
    if min(window_shape(shape, halo=halo)) < 1:
        around = f" besides a halo of {HALO_VOXELS} voxels on each side" if halo else ""
        raise InputError(f"patches of shape {shape} hold no voxel{around}")


def window_shape(shape: Sequence[int], *, halo: bool) -> tuple[int, int, int]:
    """Size (D, H, W) of the window in a patch of ``shape``."""
    margins = HALO_VOXELS if halo else (0, 0, 0)
    depth, height, width = (int(n) - 2 * margin for n, margin in zip(shape, margins, strict=True))
    return depth, height, width


def window_of(patches: Tensor, *, halo: bool) -> Tensor:
    """The window (N, D, H, W) of each patch: a view without the halo."""
    return _crop(patches, HALO_VOXELS) if halo else patches


def with_border(patches: Tensor, *, halo: bool, fill: float | bool) -> Tensor:
    """Windows with a voxel between each and the next, contiguous: read in one row, no step leads into another window.

    With a halo that voxel is its innermost layer, on both sides: (N, D+2, H+2, W+2). Without, ``fill`` stands behind
    each axis: (N, D+1, H+1, W+1); the voxel before an axis is then the one behind the row, slice or patch before.
    """
    if halo:
        inner = (HALO_VOXELS[0] - 1, HALO_VOXELS[1] - 1, HALO_VOXELS[2] - 1)
        return _crop(patches, inner).contiguous()
    return torch.nn.functional.pad(patches, (0, 1, 0, 1, 0, 1), value=fill).contiguous()


def own_voxels(masks: Tensor, *, halo: bool) -> Tensor:
    """Lung voxels of the windows themselves, bool in the layout of ``with_border``."""
    if not halo:
        return with_border(masks, halo=False, fill=False)
    return torch.nn.functional.pad(window_of(masks, halo=True), (1, 1, 1, 1, 1, 1), value=False)


def flat_step(shape: Sequence[int], steps: Sequence[int]) -> int:
    """Distance in a flat (..., D, H, W) array of the voxel that is ``steps`` (z, y, x) away."""
    return (steps[0] * int(shape[-2]) + steps[1]) * int(shape[-1]) + steps[2]


def computing_dtype(values: Tensor) -> torch.dtype:
    """float64 for float64 input, the path of the exactness tests; float32 for anything else."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def items_at_once(voxels_each: int, device: torch.device) -> int:
    """How many items of so many voxels are worked on together: what fits the cache of a CPU, any number elsewhere."""
    return max(1, (CACHE_VOXELS if device.type == "cpu" else _NO_LIMIT) // max(1, voxels_each))


def cache_blocks(num_patches: int, shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Slices of the patches that are worked on together."""
    step = items_at_once(math.prod(shape), device)
    for start in range(0, num_patches, step):
        yield slice(start, min(start + step, num_patches))


def keep_freed_memory(device: torch.device) -> None:
    """Let the process keep memory that temporaries of up to 31 MiB leave behind, instead of asking for it afresh.

    The C library of Linux (glibc) gives an array of more than 128 KiB back to the system when it is freed, and each new
    one then costs page faults, here as much time as the arithmetic. It raises that limit to the size of the largest
    array up to 32 MiB it has seen freed: this frees one that was never touched. The limit is the process's own and
    stays, as it would after any array of that size; up to twice as much free memory is then kept. Other C libraries
    (macOS, Windows, musl) and CUDA see an array come and go.
    """
    if device.type == "cpu":
        torch.empty(31 * 2**20, dtype=torch.uint8)


def keep(values: Tensor, masks: Tensor, *, fill: float = 0.0) -> Tensor:
    """Float values inside the mask and ``fill`` outside, whatever stands there (NaN too); a new tensor.

    As ``torch.where``, by bits: on a CPU ``where`` costs 2-3 ns a voxel at the random border of a mask, this 0.3 ns.
    """
    bits = torch.int64 if values.dtype == torch.float64 else torch.int32
    inside = masks.view(torch.uint8).to(bits).neg_()  # all bits set, or none
    kept = torch.bitwise_and(values.view(bits), inside)
    if fill != 0.0:
        pattern = int(torch.tensor(fill, dtype=values.dtype).view(bits))
        kept.bitwise_or_(inside.bitwise_not_().bitwise_and_(pattern))
    return kept.view(values.dtype)


def _crop(patches: Tensor, margins: Sequence[int]) -> Tensor:
    for axis, margin in enumerate(margins, start=1):
        patches = patches.narrow(axis, margin, patches.shape[axis] - 2 * margin)
    return patches

"""Local binary patterns of float HU on the three orthogonal planes of a patch: 8 shares that sum to 1."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lungseg.radiomics.windows import (
    cache_blocks,
    check_patches,
    computing_dtype,
    flat_step,
    own_voxels,
    window_of,
    with_border,
)

NUM_BINS = 8
"""P + 2 with P = 6 points: 0..6 = number of points not darker in a uniform pattern, 7 = any other pattern."""
NAMES = tuple(f"lbp_{index}" for index in range(NUM_BINS))
"""Columns of ``lbp_features``."""
DEAD_BAND_HU = 5.0
"""A point up to this much darker than the centre still counts as equal to it, against noise (METHOD 1.3, item 2)."""
FLAT_BIN = 6
"""Bin of a voxel in a flat neighbourhood: all six points equal the centre."""

PLANES = (((0, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 0)))
"""Steps (z, y, x) to the next row and the next column of axial, coronal and sagittal slices."""
_SIN60 = 0.86603
"""Row offset of the four oblique points of a circle of radius 1, rounded to five decimals as scikit-image does."""
_CODES = 64  # 2^6 patterns; code 64 marks voxels without a full neighbourhood


def lbp_features(
    patches_hu: Tensor, masks: Tensor, *, dead_band_hu: float = DEAD_BAND_HU, halo: bool = False
) -> Tensor:
    """Uniform rotation-invariant LBP histogram (P = 6, R = 1) of the lung voxels of each patch.

    Every axial, coronal and sagittal slice is used. The four oblique points are bilinear between pixels, which takes
    the whole 3 x 3 neighbourhood: a voxel counts only if all nine pixels are lung, and inside the patch unless it has
    a halo. The shares of each plane orientation are averaged over the orientations that have such a voxel.

    Parameters
    ----------
    patches_hu : float32 or float64 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask do not matter.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    dead_band_hu : float
        A point is "not darker" if it is at least the centre minus this many HU; 0 is scikit-image's rule.
    halo : bool
        Whether the patches come with a halo (``windows``).

    Returns
    -------
    float64 tensor, shape (N, 8)
        Shares, columns ``NAMES``. Where no voxel has a full lung neighbourhood the patch counts as flat (1 in
        ``lbp_6``); NaN where the mask is empty.

    Raises
    ------
    InputError
        If shapes differ or ``masks`` is not bool.

    Source
    ------
    METHOD 1.3, item 2; Ojala et al., TPAMI 2002; scikit-image ``local_binary_pattern(method="uniform")``.
    """
    check_patches(patches_hu, masks, halo=halo)
    num_patches = len(masks)
    counts = torch.empty((num_patches, len(PLANES), NUM_BINS), dtype=torch.float64, device=masks.device)
    for block in cache_blocks(num_patches, masks.shape[1:], masks.device):
        values = with_border(patches_hu[block].to(computing_dtype(patches_hu)), halo=halo, fill=0.0)
        own = own_voxels(masks[block], halo=halo)
        owners = torch.arange(len(values), device=values.device, dtype=torch.int32)[:, None, None, None]
        lung = with_border(masks[block], halo=halo, fill=False)
        counts[block] = pattern_counts(values, lung, own, owners, len(values), dead_band_hu=dead_band_hu)
    any_lung = window_of(masks, halo=halo).flatten(1).sum(1) > 0
    return pattern_shares(counts, any_lung)


def pattern_counts(
    values: Tensor, lung: Tensor, own: Tensor, owners: Tensor, num_owners: int, *, dead_band_hu: float = DEAD_BAND_HU
) -> Tensor:
    """How many voxels of each owner show each pattern, plane by plane.

    Parameters
    ----------
    values : float tensor, shape (..., D, H, W), contiguous
        HU, in a layout in which no step of one voxel leads from a voxel of ``own`` to a lung voxel that is not its
        neighbour (``windows.with_border``).
    lung, own : bool tensors, shape of ``values``, contiguous
        Voxels that may be read; those of them that count as centres.
    owners : integer tensor that broadcasts to the shape of ``values``
        Number of the window or block each voxel belongs to, 0 to ``num_owners`` - 1.

    Returns
    -------
    float64 tensor, shape (num_owners, 3, 8)
        Whole numbers.
    """
    table = _bin_of_code().to(values.device)
    edge = _CODES + 1
    dtype = torch.int16 if num_owners * edge < 2**15 else torch.int32
    excluded = (owners * edge + _CODES).to(dtype)
    flat, shape = values.reshape(-1), values.shape
    lung_bits, own_bits = (flags.view(torch.uint8).to(dtype).reshape(-1) for flags in (lung, own))
    # rows of three lung voxels along each axis, once for the two planes that need them
    threes = {step: _all_three(lung_bits, flat_step(shape, step)) for _, step in PLANES}
    counts = []
    for row, column in PLANES:
        down, right = flat_step(shape, row), flat_step(shape, column)
        start, length = down + right, flat.numel() - 2 * (down + right)
        keys = torch.zeros_like(own_bits)
        if length > 0:
            full = _all_three(threes[column], down).bitwise_and_(own_bits).narrow(0, start, length)
            codes = _pattern_codes(flat, down, right, dead_band_hu).to(dtype)
            torch.mul(codes.sub_(_CODES), full, out=keys.narrow(0, start, length))
        keys = keys.view(shape).add_(excluded).view(-1)
        found = torch.bincount(keys, minlength=num_owners * edge).view(num_owners, edge)
        counts.append(found[:, :_CODES].to(torch.float64) @ table)
    return torch.stack(counts, 1)


def pattern_shares(counts: Tensor, any_lung: Tensor) -> Tensor:
    """Shares (..., 8) of the patterns from their counts (..., 3, 8), the mean over planes that have any."""
    sites = counts.sum(-1, keepdim=True)
    planes = (sites > 0).sum(-2)
    result = (counts / sites.clamp(min=1.0)).sum(-2) / planes.clamp(min=1)
    flat_row = torch.zeros(NUM_BINS, dtype=result.dtype, device=result.device)
    flat_row[FLAT_BIN] = 1.0
    return torch.where(any_lung[..., None], torch.where(planes > 0, result, flat_row), torch.nan)


def _pattern_codes(flat: Tensor, down: int, right: int, dead_band_hu: float) -> Tensor:
    """6-bit pattern of each voxel from ``down + right`` on, as many before the end left out; whole floats."""
    start, length = down + right, flat.numel() - 2 * (down + right)

    def at(values: Tensor, shift: int) -> Tensor:
        return values.narrow(0, start + shift, length)

    # An oblique point lies between two rows, half-way between two columns. lerp gives a exactly between a and a,
    # whatever the weight: equal pixels are equal to the centre, or darker by exactly the dead band.
    middle = torch.lerp(flat[:-right], flat[right:], 0.5)  # at i: between column i and the next
    above = torch.lerp(middle[down:], middle[:-down], _SIN60)  # at i - down: between row i and the one above
    below = torch.lerp(middle[:-down], middle[down:], _SIN60)
    darkest = at(flat, 0) - dead_band_hu
    # Bits go round the circle counter-clockwise: right, up-right, up-left, left, down-left, down-right.
    points = (at(below, 0), at(below, -right), at(flat, -right), at(above, -down - right), at(above, -down))
    # Comparisons into floats, which are 4 times faster than into bools on a CPU
    codes, bit = torch.ge(points[0], darkest, out=torch.empty_like(darkest)), torch.empty_like(darkest)
    for point in (*points[1:], at(flat, right)):
        torch.ge(point, darkest, out=bit)
        torch.add(bit, codes, alpha=2, out=codes)
    return codes


def _all_three(flags: Tensor, step: int) -> Tensor:
    """1 where an integer flag and both its neighbours along an axis are 1; the ends of the flat array are 0."""
    result = torch.zeros_like(flags)
    torch.bitwise_and(flags[: -2 * step], flags[2 * step :], out=result[step:-step])
    return result.bitwise_and_(flags)


@functools.cache
def _bin_of_code() -> Tensor:
    """Table (64, 8) of 0 and 1: which bin each 6-bit pattern falls into."""
    table = torch.zeros((_CODES, NUM_BINS), dtype=torch.float64)
    for code in range(_CODES):
        bits = [code >> bit & 1 for bit in range(6)]
        changes = sum(bits[bit] != bits[bit - 1] for bit in range(6))
        table[code, sum(bits) if changes <= 2 else NUM_BINS - 1] = 1.0
    return table

"""Local binary patterns of float HU on the three orthogonal planes of a patch: 8 shares that sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from lungseg.radiomics.first_order import check_patches

NUM_BINS = 8
"""P + 2 with P = 6 points: 0..6 = number of points not darker in a uniform pattern, 7 = any other pattern."""
NAMES = tuple(f"lbp_{index}" for index in range(NUM_BINS))
"""Columns of ``lbp_features``."""
DEAD_BAND_HU = 5.0
"""A point up to this much darker than the centre still counts as equal to it, against noise (METHOD 1.3, item 2)."""
FLAT_BIN = 6
"""Bin of a voxel in a flat neighbourhood: all six points equal the centre."""

_PLANES = ((2, 3), (1, 3), (1, 2))
"""Row and column axis of axial, coronal and sagittal slices of (N, D, H, W)."""
_SIN60 = 0.86603
"""Row offset of the four oblique points of a circle of radius 1, rounded to five decimals as scikit-image does."""
_CODES = 64  # 2^6 patterns; code 64 marks voxels without a full neighbourhood


def lbp_features(patches_hu: Tensor, masks: Tensor, *, dead_band_hu: float = DEAD_BAND_HU) -> Tensor:
    """Uniform rotation-invariant LBP histogram (P = 6, R = 1) of the lung voxels of each patch.

    Every axial, coronal and sagittal slice is used. The four oblique points are bilinear between pixels, which takes
    the whole 3 x 3 neighbourhood: a voxel counts only if all nine pixels are lung and inside the patch. The shares of
    each plane orientation are averaged over the orientations that have such a voxel.

    Parameters
    ----------
    patches_hu : float32 tensor, shape (N, D, H, W)
        CT in Hounsfield units; values outside the mask do not matter.
    masks : bool tensor, shape (N, D, H, W)
        Lung voxels.
    dead_band_hu : float
        A point is "not darker" if it is at least the centre minus this many HU; 0 is scikit-image's rule.

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
    check_patches(patches_hu, masks)
    num_patches = patches_hu.shape[0]
    values = patches_hu.to(torch.float32)
    table = _bin_of_code().to(values.device)
    total = torch.zeros((num_patches, NUM_BINS), dtype=torch.float64, device=values.device)
    planes = torch.zeros((num_patches, 1), dtype=torch.float64, device=values.device)
    for row_axis, column_axis in _PLANES:
        if values.shape[row_axis] < 3 or values.shape[column_axis] < 3:
            continue
        codes = _pattern_codes(values, row_axis, column_axis, dead_band_hu).to(torch.int32)
        codes.masked_fill_(~_full_neighbourhood(masks, row_axis, column_axis), _CODES)
        first = torch.arange(num_patches, device=values.device, dtype=torch.int32) * (_CODES + 1)
        flat = (codes + first[:, None, None, None]).reshape(-1)
        counts = torch.bincount(flat, minlength=num_patches * (_CODES + 1)).view(num_patches, _CODES + 1)
        histogram = counts[:, :_CODES].to(torch.float64) @ table
        sites = histogram.sum(1, keepdim=True)
        total += histogram / sites.clamp(min=1.0)
        planes += sites > 0
    result = total / planes.clamp(min=1.0)
    flat_row = torch.zeros_like(result[0:1]).index_fill_(1, torch.tensor([FLAT_BIN], device=result.device), 1.0)
    result = torch.where(planes > 0, result, flat_row)
    return torch.where(masks.flatten(1).any(1)[:, None], result, torch.nan)


def _pattern_codes(values: Tensor, row_axis: int, column_axis: int, dead_band_hu: float) -> Tensor:
    """6-bit pattern of each interior pixel of the slices; uint8, two shorter along both axes of the plane."""
    centre = _shifted(values, row_axis, column_axis, 0, 0)

    def difference(row: int, column: int) -> Tensor:
        # Differences first: in a flat neighbourhood they are exactly 0, whatever the interpolation weights round to.
        return _shifted(values, row_axis, column_axis, row, column) - centre

    right, left = difference(0, 1), difference(0, -1)
    near, far = 0.5 * (1.0 - _SIN60), 0.5 * _SIN60
    codes = (right >= -dead_band_hu).to(torch.uint8)
    codes |= (left >= -dead_band_hu).to(torch.uint8) << 3
    # Bits go round the circle counter-clockwise: right, up-right, up-left, left, down-left, down-right.
    for row, right_bit, left_bit in ((-1, 1, 2), (1, 5, 4)):
        middle = difference(row, 0)
        for column, level, bit in ((1, right, right_bit), (-1, left, left_bit)):
            point = (difference(row, column) + middle).mul_(far).add_(level, alpha=near)
            codes |= (point >= -dead_band_hu).to(torch.uint8) << bit
    return codes


def _full_neighbourhood(masks: Tensor, row_axis: int, column_axis: int) -> Tensor:
    """True for interior pixels whose 3 x 3 neighbourhood in the plane is all lung."""
    result = masks
    for axis in (row_axis, column_axis):
        size = result.shape[axis] - 2
        result = result.narrow(axis, 0, size) & result.narrow(axis, 1, size) & result.narrow(axis, 2, size)
    return result


def _shifted(values: Tensor, row_axis: int, column_axis: int, row: int, column: int) -> Tensor:
    """Interior view of ``values`` moved by (row, column) pixels in the plane."""
    rows = values.narrow(row_axis, 1 + row, values.shape[row_axis] - 2)
    return rows.narrow(column_axis, 1 + column, values.shape[column_axis] - 2)


def _bin_of_code() -> Tensor:
    """Table (64, 8) of 0 and 1: which bin each 6-bit pattern falls into."""
    table = torch.zeros((_CODES, NUM_BINS), dtype=torch.float64)
    for code in range(_CODES):
        bits = [code >> bit & 1 for bit in range(6)]
        changes = sum(bits[bit] != bits[bit - 1] for bit in range(6))
        table[code, sum(bits) if changes <= 2 else NUM_BINS - 1] = 1.0
    return table

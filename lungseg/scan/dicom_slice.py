"""From stored values of a slice to HU: its own rescale and its padding."""

from __future__ import annotations

import numpy as np

from lungseg.scan.dicom_headers import SliceHeader
from lungseg.scan.volume import AIR_HU


def rescaled(stored: np.ndarray, header: SliceHeader) -> np.ndarray:
    """``stored * RescaleSlope + RescaleIntercept``, with padding around the field of view below -1024.

    Parameters
    ----------
    stored : integer array, shape (rows, columns)
        Stored values.
    header : SliceHeader
        Of this slice; a missing slope counts as 1, a missing intercept as 0.

    Returns
    -------
    int64 array where slope and intercept are whole numbers, else float64 array, shape (rows, columns)

    Source
    ------
    PS3.3 C.11.1.1.2; RELIABILITY rows 13-15: computed wide, so that nothing wraps round.
    """
    slope, intercept = _rescale(header)
    values: np.ndarray
    if slope.is_integer() and intercept.is_integer():
        values = stored.astype(np.int64) * int(slope) + int(intercept)
    else:
        values = stored * slope + intercept
    padded = padding_region(stored, header)
    if padded is not None:
        values[padded & (values > AIR_HU)] = AIR_HU
    return values


def _rescale(header: SliceHeader) -> tuple[float, float]:
    """Slope and intercept, 1 and 0 where they are missing."""
    return 1.0 if header.slope is None else header.slope, 0.0 if header.intercept is None else header.intercept


def padding_region(stored: np.ndarray, header: SliceHeader) -> np.ndarray | None:
    """Pixels around the field of view that hold PixelPaddingValue; None if there are none, or they are air anyway.

    The value is compared as 16 bits, because it is often written with the wrong sign (63536 for -2000). Pixels inside
    the image may hold the same value by chance, so only regions that reach a corner of the image count.
    """
    if header.layout.padding is None or header.layout.bits_allocated != 16:
        return None
    low, high = (v - 0x10000 if header.layout.signed and v >= 0x8000 else v for v in header.layout.padding)
    slope, intercept = _rescale(header)
    if max(low * slope, high * slope) + intercept <= AIR_HU:
        return None  # -2000 and the like, nearly always: to find the regions would take longer than to read the slice
    padded = (stored >= min(low, high)) & (stored <= max(low, high))
    corners = [(r, c) for r in (0, -1) for c in (0, -1) if padded[r, c]]
    if not corners:
        return None
    from scipy import ndimage

    regions, _ = ndimage.label(padded)
    return np.isin(regions, [regions[corner] for corner in corners])

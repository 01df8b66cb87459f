"""What the HU around a token say: smoothing, texture, the scan's healthy mode and statistics per token.

All of it uses lung voxels only: nothing outside the mask leaks into a value inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError, MismatchError
from lungseg.scan.volume import Triple
from lungseg.segmentation.lattice import bounding_region, lattice_shape
from lungseg.tissue import DENSE_HU, HEALTHY_MODE_RANGE_HU, LAA950_HU, PLAIN_BAND_HU, TISSUES, Tissue

SMOOTHING_SIGMA_VOXELS = 1.0
"""Smoothing before voxels are counted: noise of 50 HU alone makes 2 % false LAA-950 (METHOD 1.6 and 6)."""
TEXTURE_WINDOW_MM = 5.0
"""Edge of the cube of the local standard deviation (METHOD 1.6)."""
NOISE_PERCENTILE = 10.0
"""The smoothest tenth of the healthy lung shows the noise of the scan and no structure: our choice."""
HISTOGRAM_BIN_HU = 5.0
HISTOGRAM_SIGMA_BINS = 2.0
"""The mode is looked for in a histogram of 5 HU bins smoothed by 10 HU: noise has no say, our choice."""
MODE_MINIMUM_SHARE = 0.01
"""With a smaller share of the lung in the healthy band there is no healthy mode to find: our choice."""
PROFILE_MINIMUM_VOXELS = 200
"""Rows with fewer voxels of healthy parenchyma have no median to speak of: our choice."""
PROFILE_MINIMUM_SHARE = 0.5
"""Most of a row must be healthy for its median to be that of healthy lung."""
STEEPEST_HU_PER_MM = 1.0
"""200 HU (METHOD 6) over the 200 mm of a lung from front to back."""
CHUNK_VALUES = 4_000_000
"""Voxels of token windows gathered at once (16 MB float32 each array)."""


@dataclass(frozen=True)
class TokenStatistics:
    """HU statistics of the lung voxels around each token; every field has shape (N,). NaN where there are none."""

    mean_hu: np.ndarray
    """float32, HU."""
    median_hu: np.ndarray
    """float32, HU."""
    p25_hu: np.ndarray
    """float32, HU: the floor of the parenchyma, robust to vessels."""
    p75_hu: np.ndarray
    """float32, HU."""
    laa950_share: np.ndarray
    """float32, 0 to 1: voxels at or below -950 HU."""
    local_sd_mean: np.ndarray
    """float32, HU: mean of the texture, the local standard deviation (5 mm) beyond the noise of the scan."""
    local_sd_median: np.ndarray
    """float32, HU: its median, robust to a vessel that crosses."""
    dense_share: np.ndarray
    """float32, 0 to 1: voxels above -200 HU."""
    num_voxels: np.ndarray
    """int32: lung voxels of the window."""

    def __len__(self) -> int:
        return int(self.num_voxels.shape[0])


def smooth_hu(
    volume_hu: np.ndarray, mask: np.ndarray, sigma_voxels: float | Sequence[float] = SMOOTHING_SIGMA_VOXELS
) -> np.ndarray:
    """Gaussian smoothing inside the lung, of lung voxels only (normalised convolution).

    Parameters
    ----------
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
    sigma_voxels : float or three floats
        Standard deviation along (z, y, x); 0 leaves the values as they are.

    Returns
    -------
    float32 array, shape (Z, Y, X)
        Outside the mask the input, unchanged.

    Raises
    ------
    InputError
        If the shapes differ.
    """
    _check_pair(volume_hu, mask)
    result = volume_hu.astype(np.float32)
    if not mask.any():
        return result
    reach = int(np.ceil(4.0 * np.max(sigma_voxels)))
    region = bounding_region(mask, margin=reach)
    inside = mask[region]
    smoothed = masked_gaussian(result[region], inside, sigma_voxels)
    view = result[region]
    view[inside] = smoothed[inside]
    return result


def masked_gaussian(values: np.ndarray, mask: np.ndarray, sigma_voxels: float | Sequence[float]) -> np.ndarray:
    """G(values * mask) / G(mask), float32: smooth inside the mask and continued a few voxels beyond it.

    Zero where no masked voxel is within four sigma.
    """
    from scipy.ndimage import gaussian_filter

    weight = gaussian_filter(mask.astype(np.float32), sigma_voxels, mode="constant")
    total = np.where(mask, values, np.float32(0.0)).astype(np.float32, copy=False)
    total = gaussian_filter(total, sigma_voxels, mode="constant")
    # Below 1e-6 the quotient would be rounding over rounding.
    known = weight > 1e-6
    np.divide(total, weight, out=total, where=known)
    total[~known] = 0.0
    return total


def healthy_mode_hu(smoothed_hu: np.ndarray, mask: np.ndarray) -> float:
    """Most frequent HU of the scan's healthy lung.

    Parameters
    ----------
    smoothed_hu : array, shape (Z, Y, X)
        HU, from ``smooth_hu``.
    mask : bool array, shape (Z, Y, X)

    Returns
    -------
    float
        Highest peak of the histogram inside ``HEALTHY_MODE_RANGE_HU``. A histogram that only rises or falls there
        (a lung all dense, or all emphysema) has no healthy peak, nor has one with under 1 % of the lung in the
        band: then the prototype, -850.

    Source
    ------
    METHOD 1.6 rule 1; FEASIBILITY failure mode 8 (kernel and dose shift every fixed threshold).
    """
    from scipy.ndimage import gaussian_filter1d

    _check_pair(smoothed_hu, mask)
    prototype = TISSUES[Tissue.HEALTHY].prototype_hu
    assert prototype is not None
    low, high = HEALTHY_MODE_RANGE_HU
    values = smoothed_hu[mask]
    # The histogram reaches beyond the band so that its ends are no artificial peaks.
    edges = np.arange(low - 100.0, high + 100.0 + HISTOGRAM_BIN_HU, HISTOGRAM_BIN_HU)
    counts, _ = np.histogram(values, bins=edges)
    centres = (edges[:-1] + edges[1:]) / 2.0
    band = (centres > low) & (centres < high)
    if counts[band].sum() < max(MODE_MINIMUM_SHARE * values.size, 1):
        return prototype
    smooth = gaussian_filter1d(counts.astype(np.float64), HISTOGRAM_SIGMA_BINS)
    peak = np.zeros_like(band)
    peak[1:-1] = (smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:])
    candidates = np.flatnonzero(peak & band)
    if not candidates.size:
        return prototype
    return float(centres[candidates[np.argmax(smooth[candidates])]])


def healthy_profile_hu(
    smoothed_hu: np.ndarray, parenchyma: np.ndarray, mode_hu: float, spacing_mm: Triple
) -> np.ndarray:
    """HU of the scan's healthy lung in each row from front to back: gravity makes dependent lung denser.

    A straight line through the healthy mode, fitted to the medians of those rows in which most of the parenchyma is
    about as dense as that mode (60 HU to either side, which flattens steep slopes by up to a third); constant beyond
    them. Prone scans have the opposite slope.

    Parameters
    ----------
    smoothed_hu : array, shape (Z, Y, X)
        HU, from ``smooth_hu``.
    parenchyma : bool array, shape (Z, Y, X)
        Lung without vessels, walls and dense bodies.
    mode_hu : float
        From :func:`healthy_mode_hu`.
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    float32 array, shape (Y,)
        HU; the mode everywhere if fewer than three rows have enough such parenchyma.

    Raises
    ------
    InputError
        If the shapes differ or the parenchyma is not bool.

    Source
    ------
    METHOD 6 (up to 200 HU from front to back); the fit is ours.
    """
    _check_pair(smoothed_hu, parenchyma)
    plain = parenchyma & (np.abs(smoothed_hu - mode_hu) < PLAIN_BAND_HU)
    counts = plain.sum(axis=(0, 2))
    # In a row full of disease only the tail of it lies near the mode, and would bend the line towards it.
    mostly = counts >= PROFILE_MINIMUM_SHARE * parenchyma.sum(axis=(0, 2))
    rows = np.flatnonzero(mostly & (counts >= PROFILE_MINIMUM_VOXELS))
    profile = np.full(smoothed_hu.shape[1], mode_hu, dtype=np.float32)
    if rows.size < 3:
        return profile
    medians = np.asarray([np.median(smoothed_hu[:, row][plain[:, row]]) for row in rows], dtype=np.float64)
    weights, y_mm = counts[rows].astype(np.float64), rows * float(spacing_mm[1])
    middle = np.average(y_mm, weights=weights)
    rise = (y_mm - middle) * (medians - np.average(medians, weights=weights))
    slope = np.average(rise, weights=weights) / np.average((y_mm - middle) ** 2, weights=weights)
    slope = float(np.clip(slope, -STEEPEST_HU_PER_MM, STEEPEST_HU_PER_MM))
    held = np.clip(np.arange(profile.size), rows[0], rows[-1]) * float(spacing_mm[1])
    profile += np.float32(slope) * (held - middle).astype(np.float32)
    return profile


def local_sd(
    volume_hu: np.ndarray, mask: np.ndarray, spacing_mm: Triple, *, window_mm: float = TEXTURE_WINDOW_MM
) -> np.ndarray:
    """Standard deviation of the lung voxels in a cube around each lung voxel.

    Parameters
    ----------
    volume_hu : array, shape (Z, Y, X)
        HU.
    mask : bool array, shape (Z, Y, X)
    spacing_mm : three floats
        Voxel spacing (z, y, x).
    window_mm : float
        Edge of the cube; the nearest odd number of voxels, at least 3.

    Returns
    -------
    float32 array, shape (Z, Y, X)
        HU; 0 outside the mask and where only one lung voxel is in reach. Divisor n.

    Source
    ------
    METHOD 1.6 rule 4.
    """
    from scipy.ndimage import uniform_filter

    _check_pair(volume_hu, mask)
    result = np.zeros(volume_hu.shape, dtype=np.float32)
    if not mask.any():
        return result
    size = [max(2 * round((window_mm / s - 1.0) / 2.0) + 1, 3) for s in spacing_mm]
    region = bounding_region(mask, margin=max(size) // 2)
    inside = mask[region]
    # Centred on the lung's mean: float32 would lose the variance of values near -850 to rounding.
    centre = np.float32(volume_hu[mask].mean(dtype=np.float64))
    centred = np.where(inside, volume_hu[region].astype(np.float32) - centre, np.float32(0.0))
    share = uniform_filter(inside.astype(np.float32), size, mode="constant")
    share[~inside] = 1.0
    mean = uniform_filter(centred, size, mode="constant") / share
    variance = uniform_filter(np.square(centred, out=centred), size, mode="constant") / share
    variance -= mean * mean
    result[region][inside] = np.sqrt(np.maximum(variance[inside], 0.0))
    return result


def texture_hu(volume_hu: np.ndarray, smoothed_hu: np.ndarray, mask: np.ndarray, spacing_mm: Triple) -> np.ndarray:
    """Local standard deviation beyond the noise of the scan.

    The noise is the 10th percentile of the local SD over the lung whose smoothed HU lie in the healthy band (over the
    whole lung, if that is under 1 % of it); it is taken off in quadrature. Smoothing instead would take the septa
    off with the noise: a mesh of 5 mm loses a third of its SD.

    Parameters
    ----------
    volume_hu, smoothed_hu : array, shape (Z, Y, X)
        HU as scanned, and from ``smooth_hu``.
    mask : bool array, shape (Z, Y, X)
    spacing_mm : three floats
        Voxel spacing (z, y, x).

    Returns
    -------
    float32 array, shape (Z, Y, X)
        HU; 0 outside the mask.

    Source
    ------
    METHOD 1.6 rule 4; FEASIBILITY failure mode 8 (refer to the scan's own healthy lung).
    """
    result = local_sd(volume_hu, mask, spacing_mm)
    if not mask.any():
        return result
    low, high = HEALTHY_MODE_RANGE_HU
    values, hu = result[mask], smoothed_hu[mask]
    healthy = values[(hu >= low) & (hu <= high)]
    noise = np.percentile(healthy if healthy.size > MODE_MINIMUM_SHARE * hu.size else values, NOISE_PERCENTILE)
    result[mask] = np.sqrt(np.maximum(np.square(values) - np.float32(noise) ** 2, 0.0))
    return result


def token_statistics(
    volume_hu: np.ndarray,
    mask: np.ndarray,
    token_indices: np.ndarray,
    *,
    token_size: int,
    window: int,
    spacing_mm: Triple,
    smoothing_voxels: float = SMOOTHING_SIGMA_VOXELS,
    chunk_values: int = CHUNK_VALUES,
) -> TokenStatistics:
    """HU statistics of the lung in a cube around each token.

    Parameters
    ----------
    volume_hu : array, shape (Z, Y, X)
        HU as scanned: densities are counted after ``smooth_hu``, texture is measured before it.
    mask : bool array, shape (Z, Y, X)
    token_indices : int array, shape (N, 3)
        Tokens (z, y, x) on the lattice.
    token_size : int
        Cell size in voxels.
    window : int
        Edge of the cube in voxels, centred on the token's cell (half a voxel low if one of both is odd), clipped to
        the volume.
    spacing_mm : three floats
        Voxel spacing (z, y, x).
    smoothing_voxels : float
        Sigma of that smoothing; the healthy mode is to be taken from a scan smoothed alike.
    chunk_values : int
        Voxels gathered at once; bounds the memory and changes no value.

    Returns
    -------
    TokenStatistics
        In the order of ``token_indices``; NaN and ``num_voxels`` 0 where the cube holds no lung.

    Raises
    ------
    InputError
        If the shapes differ.
    MismatchError
        If a token is not on the lattice, or the window is empty.

    Source
    ------
    METHOD 1.6.
    """
    _check_pair(volume_hu, mask)
    tokens = np.asarray(token_indices, dtype=np.int64).reshape(-1, 3)
    lattice = lattice_shape(volume_hu.shape, token_size)
    if window < 1 or (tokens < 0).any() or (tokens >= np.asarray(lattice)).any():
        raise MismatchError(f"tokens outside the lattice of {lattice}, or an empty window of {window} voxels")
    columns = np.full((8, len(tokens)), np.nan, dtype=np.float32)
    counts = np.zeros(len(tokens), dtype=np.int32)
    if not mask.any():
        return _as_statistics(columns, counts)
    region = bounding_region(mask)
    inside = mask[region]
    smoothed = smooth_hu(volume_hu[region], inside, smoothing_voxels)
    texture = texture_hu(volume_hu[region], smoothed, inside, spacing_mm)
    # Infinity marks what is not lung: it sorts behind every lung voxel.
    views = [_windows(np.where(inside, values, np.float32(np.inf)), window) for values in (smoothed, texture)]
    start = tokens * token_size + (token_size - window) // 2 - [part.start for part in region]
    # Windows clear of the lung's box end up in the padding, where there is no lung.
    start = np.clip(start + window, 0, np.asarray(inside.shape) + window)
    step = max(1, chunk_values // window**3)
    for first in range(0, len(tokens), step):
        part = slice(first, first + step)
        z, y, x = start[part].T
        hu, sd = (view[z, y, x].reshape(len(z), -1) for view in views)
        counts[part], columns[:, part] = _summaries(hu, sd)
    return _as_statistics(columns, counts)


def _as_statistics(columns: np.ndarray, counts: np.ndarray) -> TokenStatistics:
    """Statistics from the eight rows of ``_summaries``, which are in the order of the fields."""
    mean, median, p25, p75, laa950, sd_mean, sd_median, dense = columns
    return TokenStatistics(mean, median, p25, p75, laa950, sd_mean, sd_median, dense, counts)


def _windows(values: np.ndarray, window: int) -> np.ndarray:
    """View of all cubes of a volume widened by ``window`` voxels of infinity on every side."""
    padded = np.pad(values, window, constant_values=np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, (window, window, window))


def _summaries(hu: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts (n,) and the eight statistics (8, n) of windows (n, w³) in which infinity means no lung."""
    hu.sort(axis=1)
    sd.sort(axis=1)
    inside = np.isfinite(hu)
    counts = inside.sum(axis=1)
    some = np.maximum(counts, 1)
    result = np.stack(
        [
            np.where(inside, hu, 0.0).sum(axis=1, dtype=np.float64) / some,
            _sorted_quantile(hu, counts, 0.5),
            _sorted_quantile(hu, counts, 0.25),
            _sorted_quantile(hu, counts, 0.75),
            (hu <= LAA950_HU).sum(axis=1) / some,
            np.where(inside, sd, 0.0).sum(axis=1, dtype=np.float64) / some,
            _sorted_quantile(sd, counts, 0.5),
            (inside & (hu > DENSE_HU)).sum(axis=1) / some,
        ]
    ).astype(np.float32)
    result[:, counts == 0] = np.nan
    return counts.astype(np.int32), result


def _sorted_quantile(values: np.ndarray, counts: np.ndarray, share: float) -> np.ndarray:
    """Quantile (linear interpolation, as numpy) of the first ``counts`` values of each sorted row."""
    rows = np.arange(len(values))
    position = share * np.maximum(counts - 1, 0)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, np.maximum(counts - 1, 0))
    first = np.where(counts > 0, values[rows, low], 0.0)
    second = np.where(counts > 0, values[rows, high], 0.0)
    return first + (second - first) * (position - low)


def _check_pair(volume_hu: np.ndarray, mask: np.ndarray) -> None:
    if volume_hu.shape != mask.shape or mask.dtype != np.bool_:
        raise InputError(
            f"volume of shape {volume_hu.shape} and mask of shape {mask.shape}, {mask.dtype}: the mask must be bool "
            "and on the same grid"
        )

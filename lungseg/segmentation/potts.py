"""Mean-field Potts smoothing of tissue posteriors, with the scan's own HU distributions as evidence.

Neighbours that look alike tend to be one tissue; across an edge of the scan they are free. On voxels the lattice's
posterior is the prior, and the likelihood of each voxel's HU under each tissue, estimated from the same scan and the
same posterior, moves contours from cells to voxels. No label enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lungseg.errors import InputError, MismatchError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

EDGE_HU = 60.0
"""Difference of neighbours at which their tie has lost 40 % (METHOD 7.8)."""
STRENGTH = 1.0
"""Tie of two neighbours of equal HU, in units of log probability: our choice."""
ITERATIONS = 5
"""Updates of all voxels; a voxel then knows of its neighbours this many steps away: our choice."""
EVIDENCE_RANGE_HU = (-1050.0, 200.0)
EVIDENCE_BIN_HU = 10.0
EVIDENCE_SIGMA_BINS = 2.0
"""Histograms of 10 HU bins smoothed by 20 HU: a voxel's noise after smoothing, our choice."""
EVIDENCE_MINIMUM_VOXELS = 1000.0
"""A tissue with less (posterior-weighted) has no distribution of its own: its evidence is neutral. Our choice."""
EVIDENCE_FLOOR = 1e-3
"""Share of a flat density mixed into each histogram: no HU is impossible. Our choice."""
PRIOR_FLOOR = 1e-3
"""Least prior of any tissue: a posterior of exactly 0 could never be mended. Our choice."""
SLAB_VOXELS = 48
"""Voxels along z of one slab; bounds the memory and changes no value beyond rounding."""


@dataclass(frozen=True)
class HuEvidence:
    """Log density of the HU of each tissue of one scan, relative to that of the whole lung."""

    log_ratio: np.ndarray
    """float32, shape (K, B): 0 for a tissue without a distribution."""

    def __call__(self, hu: np.ndarray) -> np.ndarray:
        """Log ratio of voxels of shape (N,), float32 (K, N)."""
        result: np.ndarray = self.log_ratio[:, _bin_of(hu)]
        return result


def hu_evidence(
    posterior: np.ndarray,
    smoothed_hu: np.ndarray,
    mask: np.ndarray,
    *,
    alike: Sequence[tuple[int, int]] = (),
) -> HuEvidence:
    """Distribution of HU in each tissue, from the scan's own posterior-weighted voxels.

    Parameters
    ----------
    posterior : float array, shape (K, Z, Y, X)
        On voxels.
    smoothed_hu : array, shape (Z, Y, X)
        HU, from ``density.smooth_hu``.
    mask : bool array, shape (Z, Y, X)
        Lung.
    alike : sequence of pairs of int
        Classes (indices of K) that take the evidence of another one: HU do not tell the two apart.

    Returns
    -------
    HuEvidence

    Raises
    ------
    InputError
        If the shapes differ.
    """
    from scipy.ndimage import gaussian_filter1d

    _check(posterior, smoothed_hu, mask)
    number = _num_bins()
    counts = np.zeros((len(posterior), number))
    for z in range(mask.shape[0]):  # plane by plane: no float64 copy of a whole posterior
        inside = mask[z]
        bins = _bin_of(smoothed_hu[z][inside])
        for k in range(len(posterior)):
            counts[k] += np.bincount(bins, weights=posterior[k, z][inside].astype(np.float64), minlength=number)
    counts = gaussian_filter1d(counts, EVIDENCE_SIGMA_BINS, axis=1, mode="nearest")
    total = counts.sum(axis=1, keepdims=True)
    whole = counts.sum(axis=0) / max(float(counts.sum()), 1.0)
    shares = counts / np.maximum(total, 1.0)
    floor = EVIDENCE_FLOOR / number
    ratio = np.log((shares + floor) / (whole + floor))
    ratio[total[:, 0] < EVIDENCE_MINIMUM_VOXELS] = 0.0
    for one, other in alike:
        ratio[one] = ratio[other]
    return HuEvidence(ratio.astype(np.float32))


def mean_field(
    posterior: np.ndarray,
    smoothed_hu: np.ndarray,
    mask: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    evidence: HuEvidence | None = None,
    evidence_weight: float = 1.0,
    strength: float = STRENGTH,
    edge_hu: float = EDGE_HU,
    iterations: int = ITERATIONS,
    slab: int = SLAB_VOXELS,
) -> np.ndarray:
    """Posterior after mean-field updates of a Potts model over the six neighbours of each lung voxel.

    ``Q_i(k) ~ P_i(k) L_i(k)^w exp(strength * sum_j w_ij Q_j(k))`` with
    ``w_ij = exp(-(HU_i - HU_j)^2 / (2 edge_hu^2))`` times the finest spacing over that of the axis; all voxels are
    updated at once.

    Parameters
    ----------
    posterior : float array, shape (K, Z, Y, X)
        Prior of each voxel (or token, with its mean HU as ``smoothed_hu``); sum 1 over K in the mask.
    smoothed_hu : array, shape (Z, Y, X)
        HU, from ``density.smooth_hu``.
    mask : bool array, shape (Z, Y, X)
        Voxels of the field; nothing crosses its border.
    spacing_mm : three floats
        Voxel spacing (z, y, x).
    evidence : HuEvidence, optional
        Likelihood of each voxel's HU.
    evidence_weight : float
        The power w of that likelihood: below 1 because neighbouring voxels do not speak independently.
    strength, edge_hu, iterations
        Of the field. 0 iterations give prior times likelihood.
    slab : int
        Voxels along z worked on at once; each slab has as many voxels beside it as there are iterations.

    Returns
    -------
    float16 array, shape (K, Z, Y, X)
        0 outside the mask.

    Raises
    ------
    InputError
        If the shapes differ.

    Source
    ------
    METHOD 7.8; Zhang, Brady and Smith, IEEE TMI 2001 (hidden Markov random field for segmentation).
    """
    _check(posterior, smoothed_hu, mask)
    result = np.zeros(posterior.shape, dtype=np.float16)
    for start in range(0, mask.shape[0], slab):
        stop = min(start + slab, mask.shape[0])
        low, high = max(start - iterations, 0), min(stop + iterations, mask.shape[0])
        lung, hu = mask[low:high], smoothed_hu[low:high].astype(np.float32)
        if not lung[start - low : stop - low].any():
            continue
        prior = np.stack([values[low:high][lung] for values in posterior], axis=1).astype(np.float32)  # (N, K)
        unary = np.log(np.maximum(prior, np.float32(PRIOR_FLOOR)))
        if evidence is not None:
            unary += np.float32(evidence_weight) * evidence(hu[lung]).T
        chance = _softmax(unary.copy())
        ties = _ties(hu, lung, spacing_mm, edge_hu) if iterations else None
        for _ in range(iterations):
            chance = _softmax(unary + np.float32(strength) * (ties @ chance))
        kept = lung.copy()
        kept[: start - low] = kept[stop - low :] = False
        columns = chance[kept[lung]]
        for k in range(len(posterior)):
            result[k, low:high][kept] = columns[:, k]
    return result


def _ties(hu: np.ndarray, lung: np.ndarray, spacing_mm: Sequence[float], edge_hu: float) -> csr_matrix:
    """Symmetric matrix (N, N) of the weights between neighbouring lung voxels."""
    from scipy.sparse import coo_matrix

    number = int(np.count_nonzero(lung))
    index = np.full(lung.shape, -1, dtype=np.int32)
    index[lung] = np.arange(number, dtype=np.int32)
    rows, columns, weights = [], [], []
    for axis, spacing in enumerate(spacing_mm):
        first, second = [slice(None)] * 3, [slice(None)] * 3
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        both = lung[tuple(first)] & lung[tuple(second)]
        rows.append(index[tuple(first)][both])
        columns.append(index[tuple(second)][both])
        step = (hu[tuple(second)][both] - hu[tuple(first)][both]) / np.float32(edge_hu)
        weights.append(np.exp(-0.5 * step * step) * np.float32(min(spacing_mm) / spacing))
    one_way = coo_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(number, number)
    ).tocsr()
    return (one_way + one_way.T).tocsr()


def _softmax(values: np.ndarray) -> np.ndarray:
    """Softmax over the last axis (``values`` may be changed)."""
    values -= values.max(axis=1, keepdims=True)
    np.exp(values, out=values)
    values /= values.sum(axis=1, keepdims=True)
    return values


def _num_bins() -> int:
    low, high = EVIDENCE_RANGE_HU
    return round((high - low) / EVIDENCE_BIN_HU)


def _bin_of(hu: np.ndarray) -> np.ndarray:
    """Bin of each HU; those beyond the range count in the first or last bin."""
    position = (np.asarray(hu, dtype=np.float32) - EVIDENCE_RANGE_HU[0]) / EVIDENCE_BIN_HU
    return np.clip(position, 0, _num_bins() - 1).astype(np.intp)


def _check(posterior: np.ndarray, hu: np.ndarray, mask: np.ndarray) -> None:
    if mask.dtype != np.bool_:
        raise InputError(f"the lung mask must be bool, not {mask.dtype}")
    if posterior.ndim != 4 or posterior.shape[1:] != mask.shape or hu.shape != mask.shape:
        raise MismatchError(
            f"posterior {posterior.shape}, HU {hu.shape} and mask {mask.shape} do not lie on one grid of voxels"
        )

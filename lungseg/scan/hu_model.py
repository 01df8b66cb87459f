"""Which offset, factor or sign best explains the values of a scan as Hounsfield units of a chest.

The histogram of a chest CT has a shape of its own: air, lung, hardly anything, then fat and soft tissue 140 HU apart,
and a little bone. Its shares differ between patients, crops and protocols, its positions do not. So the shares of
Gaussian components at fixed HU are fitted, held near their usual values, to the histogram as it stands and to shifted,
scaled and inverted copies, and the likelihoods are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.ndimage import maximum_filter1d
from scipy.special import ndtr

COMPONENTS = np.array(
    [
        # centre HU, standard deviation HU, usual share
        (-1000, 30, 0.12), (-985, 70, 0.08), (-920, 45, 0.10), (-860, 50, 0.14), (-780, 60, 0.06), (-680, 70, 0.03),
        (-560, 80, 0.02), (-430, 80, 0.015), (-300, 80, 0.015), (-200, 50, 0.015), (-105, 35, 0.16), (-30, 40, 0.04),
        (40, 35, 0.20), (100, 50, 0.03), (200, 80, 0.015), (330, 120, 0.01), (600, 200, 0.01), (1100, 300, 0.005),
        (2000, 600, 0.002),
    ]
)  # fmt: skip
"""Air, lung from empty to dense, partial volume, fat, muscle and blood, enhanced blood, bone, metal. Positions are
those of the modes of 14 public chest CTs (air -1002..-960, fat -127..-84, soft tissue 28..61); shares are rounded."""
BIN_HU = 10
SPAN_HU = 8000
OUTLIER_DENSITY, OUTLIER_SHARE = 1e-4, 0.002
"""Density (per value as read) and usual share of voxels that belong to no component: values that wrapped round,
interpolated padding, noise in it. Their share is fitted like the others, so that some of them do not decide."""
EVIDENCE, PRIOR = 100.0, 60.0
"""The histogram counts as this many independent voxels, the usual shares as that many: neighbours are alike, and no
scan is more than one sample of the shapes there are."""
ITERATIONS = 8
OFFSET_STEP_HU = 20
INTERCEPT_HU = -1024
"""Of most CT."""
NEAR_HU = 150
"""Offsets up to this are not told apart from differences of scanners and patients. RELIABILITY row 31."""
FACTORS = (0.05, 0.1, 0.2, 0.25, 0.5, 0.67, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)
INVERTED_MARGIN = 25.0
"""An inverted reading must beat every other by this: inverted chests do, MR images and noise do not; inverted crops of
the lungs may look shifted instead."""
PILE_SHARE, PILE_RATIO, PILE_NEIGHBOURS = 0.003, 3.0, 3
"""A single value holding this share, and so many times more than any of the values up to three beside it, is padding
or a clipping bound, not tissue. HU in steps (8 bits and a slope, for instance) are counted in these steps."""
MIN_BODY_SHARE, MIN_LOW_SHARE, MAX_VALLEY_SHARE = 0.15, 0.02, 0.15
"""Least shares of soft tissue and fat, and of air and lung, and largest share between lung and fat, for an explanation
to be a chest. In public CTs 0.34-0.72, 0.07-0.56 and 0.01-0.07; body 0-0.07 in MR images at their best offset."""


@dataclass(frozen=True)
class Explanation:
    """Values as read are ``scale * HU + offset_hu``; a negative scale means inverted contrast."""

    offset_hu: int
    scale: float
    gain: float
    """Log-likelihood over that of the values being HU as they stand, for ``EVIDENCE`` voxels."""
    is_chest: bool
    """Whether body, air and what lies between hold the shares of a chest once the explanation is undone."""


def find_piles(counts: np.ndarray) -> np.ndarray:
    """Which values of a 1 HU histogram are piles: padding, or the bound at which a scan was clipped.

    Parameters
    ----------
    counts : int array, shape (N,)
        Voxels of each whole value.

    Returns
    -------
    bool array, shape (N,)
    """
    total = counts.sum()
    steps = np.diff(np.flatnonzero(counts > 0.1 * PILE_SHARE * total))
    reach = PILE_NEIGHBOURS * max(1, round(float(np.median(steps)))) if len(steps) else PILE_NEIGHBOURS
    reach = min(reach, len(counts) - 1)
    following = maximum_filter1d(counts, reach, mode="constant", origin=-(reach // 2))  # from each value on
    preceding = maximum_filter1d(counts, reach, mode="constant", origin=(reach - 1) // 2)  # up to each value
    beside = np.maximum(np.append(following[1:], 0), np.append(0, preceding[:-1]))
    pile: np.ndarray = (counts > PILE_SHARE * total) & (counts > PILE_RATIO * beside)
    return pile


def explain(values: np.ndarray, counts: np.ndarray) -> Explanation | None:
    """Best reading of a histogram as HU of a chest, over offsets, a few factors and inversion.

    Parameters
    ----------
    values : int array, shape (N,)
        Distinct values, ascending.
    counts : int array, shape (N,)
        Voxels of each; padding left out (``find_piles``).

    Returns
    -------
    Explanation or None
        Offset 0, scale 1, gain 0 if nothing beats the values as they stand; among readings of nearly equal
        likelihood one that looks like a chest comes first. None for an empty histogram.

    Source
    ------
    RELIABILITY row 31. Measured on 20 public CT series and phantoms, their crops, blurred, noisier and padded copies
    (gain of any offset beyond 150 HU, factor or inversion at most 5), and shifts of 200-2000 HU of them (gain at least
    48, offset found within 60 HU); factors 0.1-10 gain at least 29, before the intercept was added 38.
    """
    if not counts.sum():
        return None
    centres, shares = _rebin(values, counts, 1.0)
    as_read = float(_likelihood(centres, shares, np.array([0]), 1.0)[0])
    found = [Explanation(0, 1.0, 0.0, _is_chest(centres, shares, 0))]
    for scale in (1.0, -1.0, *FACTORS):
        centres, shares = _rebin(values, counts, scale)
        offsets = _offsets(centres, shares) if abs(scale) == 1.0 else _offsets_of_factor(scale)
        gains = _likelihood(centres, shares, offsets, scale) - as_read
        for i in np.argsort(gains)[-2:]:
            offset = int(offsets[i])
            shift = offset if scale == 1.0 else round(offset * scale)
            found.append(Explanation(shift, scale, float(gains[i]), _is_chest(centres, shares, offset)))
    upright = max(e.gain for e in found if e.scale > 0)
    found = [e for e in found if e.scale > 0 or e.gain >= upright + INVERTED_MARGIN]
    best = max(found, key=lambda e: e.gain)
    chests = [e for e in found if e.is_chest]
    chest = max(chests, key=lambda e: e.gain, default=best)
    return chest if chest.gain >= best.gain / 2 else best


def _offsets(centres: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Offsets worth trying: near 0, and where the lowest percent of the values would be air, lung or even fat."""
    lowest = int(centres[np.searchsorted(np.cumsum(shares), 0.01)]) // OFFSET_STEP_HU * OFFSET_STEP_HU
    near = np.arange(-8 * OFFSET_STEP_HU, 8 * OFFSET_STEP_HU + 1, OFFSET_STEP_HU)
    return np.union1d(near, np.arange(lowest - 100, lowest + 1200, OFFSET_STEP_HU))


def _offsets_of_factor(scale: float) -> np.ndarray:
    """Offsets worth trying with a factor: none, or that of a wrong slope before an intercept of -1024 was added."""
    near = np.arange(-2, 3) * OFFSET_STEP_HU
    return np.union1d(near, near + round(-INTERCEPT_HU * (1 - 1 / scale)))


def _rebin(values: np.ndarray, counts: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Bin centres and shares of the histogram divided by ``scale``, in bins of ``BIN_HU``."""
    pieces = max(1, round(1 / abs(scale)))  # a whole value stands for the interval that was rounded to it
    inside = (np.arange(pieces) + 0.5) / pieces - 0.5
    scaled = (values[:, None] + inside) / scale
    index, where = np.unique(np.floor(scaled / BIN_HU).astype(np.int64).ravel(), return_inverse=True)
    mass = np.bincount(where, np.repeat(counts / pieces, pieces))
    return index * BIN_HU + BIN_HU / 2, mass / mass.sum()


@cache
def _component_table() -> np.ndarray:
    """Mass of every component in every bin from -SPAN_HU to SPAN_HU, shape (K, bins)."""
    edges = np.arange(-SPAN_HU, SPAN_HU + 1, BIN_HU)
    mean, deviation = COMPONENTS[:, :1], COMPONENTS[:, 1:2]
    table: np.ndarray = np.diff(ndtr((edges - mean) / deviation), axis=1)
    return table


def _likelihood(centres: np.ndarray, shares: np.ndarray, offsets: np.ndarray, scale: float) -> np.ndarray:
    """Penalised log-likelihood of the values as read for each offset, the shares of the components fitted by EM."""
    table, usual = _component_table(), np.append(COMPONENTS[:, 2], OUTLIER_SHARE)
    usual /= usual.sum()
    outlier = np.full(len(centres), OUTLIER_DENSITY * BIN_HU * abs(scale))
    result = np.empty(len(offsets))
    for j, offset in enumerate(offsets):
        index = np.clip((centres - offset + SPAN_HU) // BIN_HU, 0, table.shape[1] - 1).astype(int)
        mass = np.vstack([table[:, index], outlier])  # (K + 1, bins of the histogram)
        weights = usual
        for _ in range(ITERATIONS):
            weights = EVIDENCE * weights * (mass @ (shares / (weights @ mass))) + PRIOR * usual
            weights /= weights.sum()
        fit = EVIDENCE * float(shares @ np.log(weights @ mass))
        result[j] = fit + PRIOR * float(usual @ np.log(weights / usual)) - EVIDENCE * np.log(abs(scale))
    return result


def _is_chest(centres: np.ndarray, shares: np.ndarray, offset: int) -> bool:
    """Whether soft tissue and air or lung are there, and little between them, once the offset is taken off."""
    hu = centres - offset
    body, low = shares[(hu > -160) & (hu < 150)].sum(), shares[(hu > -1150) & (hu < -600)].sum()
    valley = shares[(hu > -450) & (hu < -180)].sum()
    return bool(body >= MIN_BODY_SHARE and low >= MIN_LOW_SHARE and valley <= MAX_VALLEY_SHARE)

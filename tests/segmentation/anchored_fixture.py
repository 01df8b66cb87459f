"""Synthetic tokens with HU statistics for the HU-anchored mixture."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from lungseg.segmentation.density import TokenStatistics
from lungseg.tissue import Tissue

LOOKS = {
    # median, first quartile below it, texture, LAA-950 share
    Tissue.HEALTHY: (-850.0, 15.0, 60.0, 0.01),
    Tissue.EMPHYSEMA: (-960.0, 20.0, 50.0, 0.6),
    Tissue.GGO: (-600.0, 35.0, 60.0, 0.0),
    Tissue.FIBROSIS: (-450.0, 130.0, 230.0, 0.0),
    Tissue.CONSOLIDATION: (0.0, 30.0, 40.0, 0.0),
}


def make_statistics(median, quartile_below, texture, laa):
    """Statistics with these values; the others follow from them."""
    median = np.asarray(median, dtype=np.float32)
    below, texture = np.asarray(quartile_below, dtype=np.float32), np.asarray(texture, dtype=np.float32)
    values = {
        "mean_hu": median,
        "median_hu": median,
        "p25_hu": median - below,
        "p75_hu": median + below,
        "laa950_share": np.asarray(laa, dtype=np.float32),
        "local_sd_mean": texture,
        "local_sd_median": texture,
        "dense_share": (median > -200).astype(np.float32),
        "num_voxels": np.full(len(median), 512, dtype=np.int32),
    }
    return TokenStatistics(**values)


def make_tokens(counts, *, seed=0, dim=6, vessels=0.0):
    """Tokens (N, dim), statistics and tissues of so many tokens of each tissue; a share of healthy ones with a vessel.

    Each tissue has a place of its own in token space, which the HU do not know.
    """
    rng = np.random.default_rng(seed)
    centres = 3.0 * np.random.default_rng(1).standard_normal((8, dim))
    owner = np.concatenate([np.full(count, tissue) for tissue, count in counts.items()])
    tokens = centres[owner] + rng.standard_normal((len(owner), dim))
    looks = np.array([LOOKS[Tissue(tissue)] for tissue in owner])
    n = len(owner)
    median = looks[:, 0] + 20.0 * rng.standard_normal(n)
    below = looks[:, 1] * np.exp(0.3 * rng.standard_normal(n))
    texture = looks[:, 2] * np.exp(0.3 * rng.standard_normal(n))
    laa = np.clip(looks[:, 3] * np.exp(0.3 * rng.standard_normal(n)), 0.0, 1.0)
    crossed = (owner == Tissue.HEALTHY) & (rng.random(n) < vessels)
    rise = rng.uniform(50.0, 400.0, n)
    median, below = np.where(crossed, median + rise, median), np.where(crossed, below + rise, below)
    texture = np.where(crossed, 3.0 * texture, texture)
    return tokens.astype(np.float32), make_statistics(median, below, texture, laa), owner


def chosen(statistics, index):
    """Some of the tokens."""
    return TokenStatistics(**{item.name: getattr(statistics, item.name)[index] for item in fields(statistics)})

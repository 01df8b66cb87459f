"""How often each label of a prediction meets each label of the reference: one pass counts everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_IDS = 256
"""Label maps are uint8."""
MAX_VOXELS_AT_ONCE = 2**22
"""Voxels counted in one go: NumPy's count makes an int64 copy of what it is given (here 32 MiB)."""


def confusion_counts(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Joint histogram of two label maps.

    Parameters
    ----------
    prediction, reference : uint8 arrays of one shape

    Returns
    -------
    int64 array, shape (256, 256)
        Voxels with the id of the row in the prediction and that of the column in the reference.
    """
    counts = np.zeros(NUM_IDS * NUM_IDS, dtype=np.int64)
    first, second = prediction.reshape(-1), reference.reshape(-1)
    for start in range(0, first.size, MAX_VOXELS_AT_ONCE):
        part = slice(start, start + MAX_VOXELS_AT_ONCE)
        code = first[part].astype(np.uint16)
        code <<= np.uint16(8)
        code |= second[part]
        counts += np.bincount(code, minlength=counts.size)
    return counts.reshape(NUM_IDS, NUM_IDS)


def class_counts(counts: np.ndarray, ids: Sequence[int]) -> tuple[int, int, int]:
    """Voxels of a class, its label ids merged: predicted, in the reference, in both."""
    chosen = list(map(int, ids))
    return int(counts[chosen].sum()), int(counts[:, chosen].sum()), int(counts[np.ix_(chosen, chosen)].sum())

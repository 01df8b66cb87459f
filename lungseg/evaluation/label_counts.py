"""How often each label of a prediction meets each label of the reference: one pass counts everything.

Also the checks of what may be counted: label maps are integers, and every id they hold is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lungseg.errors import InputError
from lungseg.tissue import OUTSIDE, UNCLASSIFIED, Tissue

View = Mapping[str, Sequence[int]]
"""Class name -> label ids merged into it, as in ``tissue.VIEWS``."""

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


def require_view(view: View) -> None:
    """Raise ``InputError`` unless every class of the view has ids that mean tissue."""
    for name, ids in view.items():
        if not ids or any(int(i) in (OUTSIDE, UNCLASSIFIED) or not 0 <= int(i) <= 255 for i in ids):
            raise InputError(f"class {name!r} of the view needs tissue ids 1 to 254, not {list(map(int, ids))}")


def label_bytes(labels: np.ndarray, *, side: str, case_id: str) -> np.ndarray:
    """Label map as uint8; ``InputError`` naming case and side if it is none."""
    if labels.dtype.kind not in "iu":
        raise InputError(f"case {case_id}: the {side} must be an integer label map, not {labels.dtype}")
    if labels.dtype == np.uint8:
        return labels
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise InputError(
            f"case {case_id}: the {side} has labels from {labels.min()} to {labels.max()}; known ids are 0 to 255. "
            "Map foreign labels to them first"
        )
    return labels.astype(np.uint8)


def require_known(counts: np.ndarray, view: View, *, side: str, case_id: str) -> None:
    """Ids that neither the taxonomy nor the view knows are an error, never ignored; ``counts`` is voxels per id."""
    known = {OUTSIDE, UNCLASSIFIED, *map(int, Tissue)} | {int(i) for ids in view.values() for i in ids}
    foreign = sorted(set(np.flatnonzero(counts).tolist()) - known)
    if foreign:
        raise InputError(
            f"case {case_id}: the {side} has unknown label ids {foreign}; known ids are {sorted(known)}. "
            "Map foreign labels to them first"
        )

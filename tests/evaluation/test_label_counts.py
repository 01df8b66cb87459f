"""One pass counts every pair of labels, in parts and for any memory layout."""

from __future__ import annotations

import numpy as np

from lungseg.evaluation import label_counts
from lungseg.evaluation.label_counts import class_counts, confusion_counts


def test_counts_equal_scikit_learn_and_do_not_depend_on_the_parts(monkeypatch):
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    prediction, reference = (rng.choice(np.array([0, 3, 4, 255], dtype=np.uint8), size=(5, 6, 7)) for _ in range(2))
    wanted = confusion_matrix(prediction.ravel(), reference.ravel(), labels=np.arange(256))
    assert np.array_equal(confusion_counts(prediction, reference), wanted)
    monkeypatch.setattr(label_counts, "MAX_VOXELS_AT_ONCE", 11)
    assert np.array_equal(confusion_counts(prediction, reference), wanted)
    assert np.array_equal(confusion_counts(prediction[::-1, :, ::2], reference[::-1, :, ::2]).sum(), 5 * 6 * 4)


def test_merged_classes_count_each_voxel_once():
    prediction, reference = np.array([3, 4, 4, 1, 0], np.uint8), np.array([4, 4, 1, 3, 3], np.uint8)
    counts = confusion_counts(prediction, reference)
    assert class_counts(counts, (3, 4)) == (3, 4, 2)
    assert class_counts(counts, (4,)) == (2, 2, 1)
    assert class_counts(counts, (7,)) == (0, 0, 0)

"""Oracle naming: what each predicted label would be called by somebody who knows the reference.

It bounds what a better naming of the same regions could reach one to one, and is never a method's own result
(METHOD 0.4). The naming is one for the whole cohort, never one per case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import InputError
from lungseg.evaluation.label_counts import (
    NUM_IDS,
    View,
    class_counts,
    confusion_counts,
    label_bytes,
    require_known,
    require_view,
)
from lungseg.evaluation.overlap import annotated_parts, require_same_shape
from lungseg.evaluation.scores import ScoreSettings
from lungseg.evaluation.surface import require_spacing
from lungseg.tissue import OUTSIDE, UNCLASSIFIED

ORACLE_DEFINITION = (
    "Oracle naming (uses the reference): the method's own regions, each label renamed to the class that maximises the "
    "mean Dice over the whole cohort (Hungarian matching, one naming for all cases). It bounds what naming can reach; "
    "it is no result of the method."
)
"""Printed with every table that shows oracle rows."""


@dataclass(frozen=True)
class CaseConfusion:
    """Voxels of each predicted label and class of the view in one case, or in one annotated slice."""

    ids: np.ndarray
    """int64, (labels,): predicted ids that occur, but 0 and 255."""
    joint: np.ndarray
    """int64, (labels, classes): voxels of the predicted id that lie in the class of the reference."""
    predicted: np.ndarray
    """int64, (labels,): voxels of the predicted id."""
    reference: np.ndarray
    """int64, (classes,): voxels of the class in the reference."""
    is_counted: np.ndarray
    """bool, (classes,): the class counts here and enters the mean."""


@dataclass(frozen=True)
class OracleNaming:
    """A naming found with the reference."""

    classes: Mapping[int, int]
    """Predicted id -> label id of the class it is renamed to; ids not listed match no class."""
    mean_dice: float
    """Mean Dice over the class-case pairs that count, under this naming; nan if there is none."""
    named_mean_dice: float
    """The same under the method's own naming."""
    is_own_naming: bool
    """Whether the method's own naming could not be improved one to one, and is kept."""


def confusion_of_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    view: View,
    case_id: str,
    settings: ScoreSettings = ScoreSettings(),
) -> list[CaseConfusion]:
    """What the oracle must know of a case: one entry, in slice mode one per annotated slice.

    Parameters
    ----------
    prediction, reference, spacing_mm, view, case_id, settings
        As in ``overlap.score_case``. The prediction may hold any ids from 0 to 255: it need not be named yet.

    Raises
    ------
    InputError
        As ``overlap.score_case``, but for unknown ids of the prediction.
    """
    spacing = require_spacing(spacing_mm, reference.ndim)
    require_same_shape(prediction, reference, case_id)
    require_view(view)
    prediction = label_bytes(prediction, side="prediction", case_id=case_id)
    reference = label_bytes(reference, side="reference", case_id=case_id)
    voxel_ml = math.prod(spacing) / 1000.0
    found = []
    for slice_index in annotated_parts(reference, settings, case_id):
        part = slice(None) if slice_index is None else slice_index
        counts = confusion_counts(prediction[part], reference[part])
        require_known(counts.sum(axis=0), view, side="reference", case_id=case_id)
        predicted = counts.sum(axis=1)
        ids = np.setdiff1d(np.flatnonzero(predicted), [OUTSIDE, UNCLASSIFIED])
        wanted = np.array([class_counts(counts, members)[1] for members in view.values()])
        found.append(
            CaseConfusion(
                ids=ids,
                joint=np.stack([counts[ids][:, list(map(int, members))].sum(axis=1) for members in view.values()], 1),
                predicted=predicted[ids],
                reference=wanted,
                is_counted=np.array([settings.counts(voxels * voxel_ml) for voxels in wanted]),
            )
        )
    return found


def oracle_naming(confusions: Sequence[CaseConfusion], view: View) -> OracleNaming:
    """Naming of the predicted labels that maximises the mean Dice over the cohort.

    Parameters
    ----------
    confusions : sequence of CaseConfusion
        Of all cases (or slices) that have both sides.
    view : mapping of class name to label ids
        The view they were counted with.

    Returns
    -------
    OracleNaming
        Each predicted id (0 and 255 never) gets at most one class, and each class as many ids as the view merges
        in it. In a view without merged classes no one-to-one naming scores higher. If the method's own naming scores
        at least as high, as one that gives several ids to a class may, it is kept.

    Raises
    ------
    InputError
        If classes of the view share a label id.

    Source
    ------
    Kuhn 1955 (Hungarian method, ``scipy.optimize.linear_sum_assignment``). The mean over class-case pairs of the
    Dice of id k and class c is a sum over the pairs (k, c) that are matched, so the matching is exact.
    """
    from scipy.optimize import linear_sum_assignment

    own = {int(i): int(ids[0]) for ids in view.values() for i in ids}
    if len(own) < sum(len(ids) for ids in view.values()):
        raise InputError(f"the classes {', '.join(view)} share label ids: no naming gives each id one class")
    named = _mean_dice(confusions, view, own)
    gain = np.zeros((NUM_IDS, len(view)))
    for confusion in confusions:
        total = confusion.predicted[:, None] + confusion.reference
        gain[confusion.ids] += 2.0 * confusion.joint / total * confusion.is_counted
    ids = np.flatnonzero(gain.any(axis=1))
    # one column for each label id merged into a class
    columns = [(column, int(members[0])) for column, members in enumerate(view.values()) for _ in members]
    scores = gain[ids][:, [column for column, _ in columns]]
    rows, chosen = linear_sum_assignment(scores, maximize=True)
    matched = {
        int(ids[row]): columns[column][1] for row, column in zip(rows, chosen, strict=True) if scores[row, column] > 0
    }
    best = _mean_dice(confusions, view, matched)
    if math.isnan(named) or named >= best:
        return OracleNaming(own, named, named, True)
    return OracleNaming(matched, best, named, False)


def rename_labels(prediction: np.ndarray, naming: OracleNaming) -> np.ndarray:
    """Prediction under the oracle's names.

    Parameters
    ----------
    prediction : integer array with ids 0 to 255

    Returns
    -------
    uint8 array of the same shape
        Ids that the naming does not list become 255 (unclassified): they are lung and match nothing. 0 stays 0.
    """
    table = np.full(NUM_IDS, UNCLASSIFIED, dtype=np.uint8)
    table[OUTSIDE] = OUTSIDE
    table[list(naming.classes)] = list(naming.classes.values())
    return table[prediction]


def _mean_dice(confusions: Sequence[CaseConfusion], view: View, classes: Mapping[int, int]) -> float:
    """Mean Dice over the pairs that count under a naming; nan if there are none."""
    values = []
    for column, members in enumerate(view.values()):
        ids = [i for i, name in classes.items() if name == int(members[0])]
        for confusion in confusions:
            if confusion.is_counted[column]:
                chosen = np.isin(confusion.ids, ids)
                total = confusion.predicted[chosen].sum() + confusion.reference[column]
                values.append(2.0 * confusion.joint[chosen, column].sum() / total)
    return float(np.mean(values)) if values else math.nan

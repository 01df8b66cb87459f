"""The oracle naming: found again, never beaten by any other naming, and never below the method's own."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.evaluation.oracle import ORACLE_DEFINITION, confusion_of_case, oracle_naming, rename_labels
from lungseg.evaluation.overlap import score_case
from lungseg.evaluation.scores import ScoreSettings
from lungseg.tissue import VIEWS

SPACING = (10.0, 10.0, 10.0)
"""One voxel = 1 mL."""
VIEW = VIEWS["tissues"]
SLICES = ScoreSettings(mode="slices")


def cohort(seed: int, *, noise: float, names: dict[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (prediction, reference): the reference with a share of random labels, then renamed."""
    rng = np.random.default_rng(seed)
    table = np.arange(256, dtype=np.uint8)
    table[list(names)] = list(names.values())
    pairs = []
    for _ in range(4):
        reference = rng.integers(0, 6, size=(4, 6, 7)).astype(np.uint8)
        prediction = np.where(rng.random(reference.shape) < noise, rng.integers(1, 6, reference.shape), reference)
        pairs.append((table[prediction.astype(np.uint8)], reference))
    return pairs


def confusions(pairs, view=VIEW, settings=ScoreSettings()):
    return [
        entry
        for prediction, reference in pairs
        for entry in confusion_of_case(
            prediction, reference, spacing_mm=SPACING, view=view, case_id="c", settings=settings
        )
    ]


def mean_dice(pairs, naming, view=VIEW, settings=ScoreSettings()) -> float:
    """Through the scores themselves: what the table of oracle rows will show."""
    rows = [
        score
        for prediction, reference in pairs
        for score in score_case(
            rename_labels(prediction, naming), reference, spacing_mm=SPACING, view=view,
            case_id="c", patient_id="p", settings=settings,
        )
    ]  # fmt: skip
    return float(np.mean([score.dice for score in rows if score.is_averaged]))


def test_shuffled_names_are_found_again():
    names = {1: 40, 2: 7, 3: 1, 4: 200, 5: 2}
    pairs = cohort(1, noise=0.2, names=names)
    naming = oracle_naming(confusions(pairs), VIEW)
    assert dict(naming.classes) == {new: old for old, new in names.items()}
    assert not naming.is_own_naming
    assert naming.mean_dice > 0.7 > naming.named_mean_dice
    assert mean_dice(pairs, naming) == pytest.approx(naming.mean_dice)


@pytest.mark.parametrize("settings", [ScoreSettings(), SLICES])
def test_no_other_naming_one_to_one_scores_higher(settings):
    """Strong noise, so that the best naming is not the obvious one; all 120 namings are tried by scoring them."""
    pairs = cohort(3, noise=0.85, names={1: 2, 2: 1})
    counted = confusions(pairs, settings=settings)
    naming = oracle_naming(counted, VIEW)
    tissues = sorted(int(ids[0]) for ids in VIEW.values())
    best = 0.0
    for order in permutations(tissues):
        total, number = 0.0, 0
        for prediction, reference in pairs:
            parts = [(prediction, reference)] if settings.mode == "volume" else zip(prediction, reference, strict=True)
            for predicted, wanted in parts:
                for label, tissue in zip(tissues, order, strict=True):
                    a, b = predicted == label, wanted == tissue
                    if b.any():
                        total, number = total + 2 * (a & b).sum() / (a.sum() + b.sum()), number + 1
        best = max(best, total / number)
    assert naming.mean_dice == pytest.approx(best)
    assert mean_dice(pairs, naming, settings=settings) == pytest.approx(best)


def test_a_good_naming_is_kept():
    pairs = cohort(2, noise=0.1, names={})
    naming = oracle_naming(confusions(pairs), VIEW)
    assert naming.is_own_naming
    assert naming.mean_dice == naming.named_mean_dice == pytest.approx(mean_dice(pairs, naming))


@pytest.mark.parametrize("view", ["ild", "abnormal"])
def test_the_bound_is_never_below_the_methods_own_naming(view):
    """Where a class merges labels, one-to-one matching may lose to the naming as given: then that is the bound."""
    for seed in range(6):
        pairs = cohort(seed, noise=0.5, names={})
        naming = oracle_naming(confusions(pairs, VIEWS[view]), VIEWS[view])
        assert naming.mean_dice >= naming.named_mean_dice
        assert mean_dice(pairs, naming, VIEWS[view]) == pytest.approx(naming.mean_dice)


def test_labels_left_over_match_nothing():
    """Six labels for two classes: the rest is renamed to unclassified, and outside stays outside."""
    reference = np.array([[[1, 1, 3, 3, 0, 0]]], dtype=np.uint8)
    prediction = np.array([[[11, 12, 13, 13, 0, 14]]], dtype=np.uint8)
    view = {"healthy": (1,), "ggo": (3,)}
    naming = oracle_naming(confusions([(prediction, reference)], view), view)
    assert rename_labels(prediction, naming).tolist() in ([[[1, 255, 3, 3, 0, 255]]], [[[255, 1, 3, 3, 0, 255]]])
    assert naming.mean_dice == pytest.approx((2 / 3 + 1) / 2)


def test_unclassified_and_outside_are_never_named():
    reference = np.full((1, 1, 4), 3, dtype=np.uint8)
    prediction = np.array([[[255, 255, 0, 0]]], dtype=np.uint8)
    naming = oracle_naming(confusions([(prediction, reference)]), VIEW)
    assert naming.mean_dice == 0.0
    assert not {0, 255} & set(naming.classes)


def test_classes_below_the_limit_do_not_decide():
    """0.5 mL of fibrosis must not steal the label that is most of the ground glass."""
    spacing = (5.0, 10.0, 10.0)
    reference = np.array([[[4, 3, 3, 3, 1, 1, 1, 1]]], dtype=np.uint8)
    prediction = np.array([[[5, 5, 5, 2, 1, 1, 1, 1]]], dtype=np.uint8)
    (entry,) = confusion_of_case(prediction, reference, spacing_mm=spacing, view=VIEW, case_id="c")
    assert dict(zip(VIEW, entry.is_counted.tolist(), strict=True)) == {
        "healthy": True, "emphysema": False, "ggo": True, "fibrosis": False, "consolidation": False,
    }  # fmt: skip
    assert oracle_naming([entry], VIEW).classes[5] == 3


def test_no_pairs_have_no_bound():
    naming = oracle_naming([], VIEW)
    assert np.isnan(naming.mean_dice)
    assert naming.is_own_naming


def test_bad_input_is_named():
    labels = np.ones((1, 1, 2), dtype=np.uint8)
    with pytest.raises(InputError, match="share label ids"):
        oracle_naming([], {"ild": (3, 4), "ggo": (3,)})
    with pytest.raises(InputError, match="case c: prediction"):
        confusion_of_case(labels, labels[..., :1], spacing_mm=SPACING, view=VIEW, case_id="c")
    with pytest.raises(InputError, match=r"reference has unknown label ids \[77\]"):
        confusion_of_case(labels, labels * 77, spacing_mm=SPACING, view=VIEW, case_id="c")


def test_the_tables_say_that_it_uses_the_reference():
    assert "uses the reference" in ORACLE_DEFINITION
    assert "no result of the method" in ORACLE_DEFINITION

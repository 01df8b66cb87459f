"""Overlap scores by hand, the rules for empty sides, and scikit-learn as oracle."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.evaluation.overlap import (
    dice,
    missing_prediction_scores,
    missing_reference_scores,
    score_case,
)
from lungseg.evaluation.scores import COUNTING_RULES, MIN_REFERENCE_ML, ClassScore, ScoreSettings
from lungseg.evaluation.surface import HD95_DEFINITIONS, hd95_mm
from lungseg.tissue import VIEWS

SPACING = (10.0, 10.0, 10.0)
"""One voxel = 1 mL."""
VIEW = {"ggo": (3,), "fibrosis": (4,)}
IN_SLICES = ScoreSettings(mode="slices")


def score(prediction, reference, *, spacing=SPACING, view=VIEW, **options) -> list[ClassScore]:
    return score_case(
        np.asarray(prediction, np.uint8),
        np.asarray(reference, np.uint8),
        spacing_mm=spacing,
        view=view,
        case_id="c1",
        patient_id="p1",
        **options,
    )


def row(*labels: int) -> np.ndarray:
    """A volume of one line of voxels."""
    return np.array(labels, dtype=np.uint8)[None, None]


def test_dice_by_hand():
    first, second = np.array([True, True, False, False]), np.array([False, True, True, False])
    assert dice(first, second) == 0.5
    assert dice(first, first) == 1.0
    assert dice(first, ~first) == 0.0
    empty = np.zeros(4, dtype=bool)
    assert dice(first, empty) == dice(empty, first) == 0.0
    assert math.isnan(dice(empty, empty))


def test_dice_of_a_shifted_cube():
    cube = np.zeros((20, 20, 20), dtype=bool)
    cube[5:15, 5:15, 5:15] = True
    assert dice(np.roll(cube, 2, axis=0), cube) == pytest.approx(0.8)


def test_dice_refuses_label_maps_and_other_grids():
    with pytest.raises(InputError, match="bool mask"):
        dice(np.ones(3, np.uint8), np.ones(3, bool))
    with pytest.raises(InputError, match="different grids"):
        dice(np.ones(3, bool), np.ones(4, bool))


def test_two_voxels_of_which_one_is_hit():
    ggo = score(row(1, 3, 3, 1), row(1, 1, 3, 3))[0]
    assert (ggo.case_id, ggo.patient_id, ggo.tissue, ggo.status) == ("c1", "p1", "ggo", "scored")
    assert ggo.dice == 0.5
    assert ggo.iou == pytest.approx(1 / 3)
    assert ggo.precision == ggo.recall == 0.5
    assert (ggo.reference_ml, ggo.predicted_ml, ggo.volume_error_ml) == (2.0, 2.0, 0.0)
    # Directed distances are {10, 0} both ways: the 95th percentile is 9.5 mm.
    assert ggo.hd95_mm == ggo.penalised_hd95_mm == pytest.approx(9.5)
    assert ggo.assd_mm == pytest.approx(5.0)
    assert (ggo.overlap_ml, ggo.volume_error_percent, ggo.slice_index) == (1.0, 0.0, None)
    assert ggo.is_averaged
    assert not ggo.is_missed


def test_row_69_the_four_combinations_of_empty_sides():
    both, only_reference = score(row(3, 3, 1), row(3, 3, 1))[0], score(row(1, 1, 1), row(3, 3, 1))[0]
    only_prediction, neither = score(row(3, 3, 1), row(1, 1, 1))[0], score(row(1, 1, 1), row(1, 1, 1))[0]
    assert [s.status for s in (both, only_reference, only_prediction, neither)] == [
        "scored",
        "missed",
        "false tissue",
        "absent",
    ]
    assert both.dice == 1.0
    assert both.hd95_mm == 0.0
    assert only_reference.dice == only_reference.iou == only_reference.recall == 0.0
    assert only_reference.is_missed
    assert math.isnan(only_reference.hd95_mm)
    assert math.isnan(only_reference.precision)
    assert only_reference.volume_error_ml == -2.0
    assert only_reference.volume_error_percent == -100.0
    assert math.isnan(only_reference.assd_mm)
    assert only_reference.surface_dice == only_reference.overlap_ml == 0.0
    assert only_prediction.predicted_ml == 2.0
    for excluded in (only_prediction, neither):
        assert not excluded.is_averaged
        assert not excluded.is_missed
        unknown = ("dice", "iou", "hd95_mm", "penalised_hd95_mm", "assd_mm", "surface_dice", "volume_error_percent")
        assert all(math.isnan(getattr(excluded, name)) for name in unknown)


def test_a_missed_class_is_charged_the_diagonal_of_the_lung_box():
    reference, prediction = row(0, 3, 3, 1, 0, 0), row(0, 1, 1, 1, 0, 0)
    spacing = (10.0, 20.0, 10.0)
    # Without a lung mask the reference's own voxels are the lung: 1 x 1 x 3 voxels.
    assert score(prediction, reference, spacing=spacing)[0].penalised_hd95_mm == pytest.approx(math.hypot(10, 20, 30))
    lungs = row(0, 1, 1, 1, 2, 0)
    missed = score(prediction, reference, spacing=spacing, lung_mask=lungs)[0]
    assert missed.penalised_hd95_mm == pytest.approx(math.hypot(10, 20, 40))


@pytest.mark.parametrize(("voxels", "status"), [(999, "false tissue"), (1000, "scored"), (1001, "scored")])
def test_a_class_counts_from_one_millilitre_on_inclusive(voxels, status):
    reference = np.ones(2000, dtype=np.uint8)
    reference[:voxels] = 3
    prediction = np.full(2000, 3, dtype=np.uint8)
    scored = score(prediction[None, None], reference[None, None], spacing=(1, 1, 1))[0]
    assert scored.status == status
    assert scored.reference_ml == pytest.approx(voxels / 1000)
    assert scored.predicted_ml == pytest.approx(2.0)
    assert MIN_REFERENCE_ML == 1.0


def test_the_limit_survives_rounding():
    """0.1³ mm³ x 1,000,000 voxels is 1 mL, whatever binary floating point makes of it."""
    for side in (0.1, 0.2, 0.5):
        num = round(1000 / side**3)
        labels = np.full((1, 1, num), 3, dtype=np.uint8)
        assert score(labels, labels, spacing=(side,) * 3, view={"ggo": (3,)})[0].status == "scored"


def test_unclassified_lung_is_an_error_on_either_side():
    ggo = score(row(255, 3, 3, 1), row(3, 3, 255, 1))[0]
    assert (ggo.precision, ggo.recall, ggo.dice) == (0.5, 0.5, 0.5)
    assert score(row(255, 255), row(255, 3))[0].status == "missed"
    for side in (0, 255):
        with pytest.raises(InputError, match="tissue ids 1 to 254"):
            score(row(1), row(1), view={"x": (side,)})


def test_a_view_merges_classes():
    prediction, reference = row(3, 4, 2, 1), row(4, 3, 2, 1)
    by_tissue = {s.tissue: s for s in score(prediction, reference, view=VIEWS["tissues"])}
    merged = {s.tissue: s for s in score(prediction, reference, view=VIEWS["ild"])}
    assert by_tissue["ggo"].dice == by_tissue["fibrosis"].dice == 0.0
    assert by_tissue["ggo"].status == "scored"  # predicted, though elsewhere: it has a distance
    assert by_tissue["ggo"].hd95_mm == pytest.approx(10.0)
    assert merged["ild"].dice == 1.0
    assert list(merged) == ["healthy", "emphysema", "ild"]


def test_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    prediction, reference = (rng.integers(1, 6, size=(6, 7, 8)).astype(np.uint8) for _ in range(2))
    for scored, label in zip(score(prediction, reference, view=VIEWS["tissues"]), range(1, 6), strict=True):
        pair = ((reference == label).ravel(), (prediction == label).ravel())
        assert scored.dice == pytest.approx(metrics.f1_score(*pair))
        assert scored.iou == pytest.approx(metrics.jaccard_score(*pair))
        assert scored.precision == pytest.approx(metrics.precision_score(*pair))
        assert scored.recall == pytest.approx(metrics.recall_score(*pair))


def test_row_70_a_reference_without_prediction_is_missed():
    reference = row(0, 3, 3, 1, 1)
    lungs = row(1, 1, 1, 1, 1)
    scores = missing_prediction_scores(
        reference, spacing_mm=SPACING, view=VIEW, lung_mask=lungs, case_id="c2", patient_id="p2"
    )
    ggo, fibrosis = scores
    assert ggo.status == fibrosis.status == "missing prediction"
    assert (ggo.dice, ggo.iou, ggo.recall, ggo.reference_ml) == (0.0, 0.0, 0.0, 2.0)
    assert ggo.is_missed
    assert math.isnan(ggo.predicted_ml)
    assert ggo.overlap_ml == ggo.surface_dice == 0.0
    assert math.isnan(ggo.volume_error_ml)
    assert math.isnan(ggo.hd95_mm)
    assert ggo.penalised_hd95_mm == pytest.approx(math.hypot(10, 10, 50))
    assert not fibrosis.is_averaged
    assert not fibrosis.is_missed
    assert math.isnan(fibrosis.penalised_hd95_mm)


def test_integer_label_maps_of_any_width_are_read():
    wide = row(1, 3, 3).astype(np.int64)
    scores = score_case(wide, wide, spacing_mm=SPACING, view=VIEW, case_id="c", patient_id="p")
    assert scores[0].dice == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "options", "phrase"),
    [
        (row(1, 1), row(1, 1, 1), {}, r"case c1.*different grids"),
        (row(1, 17), row(1, 1), {}, r"prediction has unknown label ids \[17\]"),
        (row(1, 1), row(1, 99), {}, r"reference has unknown label ids \[99\]"),
        (row(1, 1), row(1, 1), {"lung_mask": row(0, 0)}, "lung mask is empty"),
        (row(1, 1), row(1, 1), {"lung_mask": row(1)}, "differ in shape"),
        (row(1, 1), row(1, 1), {"view": {"none": ()}}, "tissue ids 1 to 254"),
        (row(1, 1), row(1, 1), {"spacing": (1, -1, 1)}, "strictly positive"),
    ],
)
def test_bad_input_is_named(prediction, reference, options, phrase):
    with pytest.raises(InputError, match=phrase):
        score(prediction, reference, **options)


def test_float_and_out_of_range_labels_are_refused():
    names = {"spacing_mm": SPACING, "view": VIEW, "case_id": "c", "patient_id": "p"}
    with pytest.raises(InputError, match="integer label map, not float64"):
        score_case(row(1).astype(float), row(1), **names)
    with pytest.raises(InputError, match="labels from -1 to -1"):
        score_case(row(1), row(1).astype(np.int16) * -1, **names)


def test_a_label_named_by_the_view_is_known():
    assert score(row(42, 42), row(42, 1), view={"part": (42,)})[0].dice == pytest.approx(2 / 3)


def test_scores_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        score(row(1), row(1))[0].dice = 1.0


def test_row_70_a_prediction_without_reference_is_counted():
    prediction = row(0, 3, 3, 255, 1)
    for settings in (ScoreSettings(), IN_SLICES):
        ggo, fibrosis = missing_reference_scores(
            prediction, spacing_mm=SPACING, view=VIEW, case_id="c3", patient_id="p3", settings=settings
        )
        assert ggo.status == fibrosis.status == "missing reference"
        assert (ggo.case_id, ggo.tissue, ggo.predicted_ml, fibrosis.predicted_ml) == ("c3", "ggo", 2.0, 0.0)
        numbers = [v for k, v in dataclasses.asdict(ggo).items() if isinstance(v, float) and k != "predicted_ml"]
        assert len(numbers) == 12
        assert all(math.isnan(value) for value in numbers)
        assert not ggo.is_averaged
        assert not ggo.is_missed


def test_row_71_another_grid_is_an_error_that_names_the_case():
    with pytest.raises(InputError, match=r"case c1: prediction \(1, 1, 2\) and reference \(1, 1, 3\)"):
        score(row(1, 1), row(1, 1, 1))


def test_volume_error_is_in_millilitres_and_percent():
    over, under = score(row(3, 3, 3, 1, 1), row(3, 3, 1, 1, 1))[0], score(row(3, 1, 1), row(3, 3, 1))[0]
    assert (over.volume_error_ml, over.volume_error_percent) == (1.0, 50.0)
    assert (under.volume_error_ml, under.volume_error_percent) == (-1.0, -50.0)


def test_the_pooled_dice_comes_from_the_volumes():
    """Whatever counts or not: overlap, predicted and reference volumes of all rows give the Dice of all voxels."""
    rng = np.random.default_rng(4)
    pairs = [rng.integers(1, 6, size=(2, 3, 4, 5)).astype(np.uint8) for _ in range(5)]
    spacing = (4.0, 5.0, 5.0)
    rows = [score(p, r, spacing=spacing, view=VIEWS["tissues"]) for p, r in pairs]
    assert {s.is_averaged for case in rows for s in case} == {True, False}
    for index, label in enumerate(range(1, 6)):
        chosen = [case[index] for case in rows]
        pooled = 2 * sum(s.overlap_ml for s in chosen) / sum(s.predicted_ml + s.reference_ml for s in chosen)
        predictions, references = (np.stack(side) == label for side in zip(*pairs, strict=True))
        assert pooled == pytest.approx(dice(predictions, references))


@pytest.mark.parametrize("definition", list(HD95_DEFINITIONS))
def test_the_chosen_definition_is_what_is_measured(definition):
    rng = np.random.default_rng(8)
    prediction, reference = (rng.integers(3, 5, size=(6, 7, 8)).astype(np.uint8) for _ in range(2))
    settings = ScoreSettings(hd95=definition, tolerance_mm=3.5)
    scored = score(prediction, reference, spacing=(5.0, 6.0, 7.0), settings=settings)
    for s, label in zip(scored, (3, 4), strict=True):
        wanted = hd95_mm(prediction == label, reference == label, spacing_mm=(5.0, 6.0, 7.0), definition=definition)
        assert s.hd95_mm == s.penalised_hd95_mm == wanted
    text = " ".join(settings.definitions)
    assert HD95_DEFINITIONS[definition] in text
    assert "within 3.5 mm" in text
    assert "ASSD" in text
    assert COUNTING_RULES["volume"] in text


def three_slices() -> tuple[np.ndarray, np.ndarray]:
    """Slice 0: not annotated. Slice 1: ground glass half hit. Slice 2: fibrosis missed, ground glass invented."""
    reference = np.array([[[0, 0, 0, 0]], [[1, 3, 3, 1]], [[1, 4, 1, 1]]], dtype=np.uint8)
    prediction = np.array([[[3, 3, 4, 4]], [[1, 1, 3, 3]], [[1, 1, 3, 3]]], dtype=np.uint8)
    return prediction, reference


def test_only_annotated_slices_count_and_each_by_itself():
    prediction, reference = three_slices()
    scores = score(prediction, reference, spacing=(100.0, 0.5, 2.0), settings=IN_SLICES)
    assert [(s.slice_index, s.tissue, s.status) for s in scores] == [
        (1, "ggo", "scored"),
        (1, "fibrosis", "absent"),
        (2, "ggo", "false tissue"),
        (2, "fibrosis", "missed"),
    ]
    hit, _, invented, missed = scores
    # 0.2 mL in all, far below the limit of a volume
    assert (hit.dice, hit.reference_ml) == (0.5, pytest.approx(0.2))
    assert hit.hd95_mm == pytest.approx(1.9)  # in plane: distances {2, 0} mm
    assert invented.predicted_ml == pytest.approx(0.2)
    assert missed.dice == 0.0
    # the box of the reference in plane: 1 x 4 pixels
    assert missed.penalised_hd95_mm == pytest.approx(math.hypot(0.5, 8.0))
    assert missed.is_missed


def test_annotated_slices_can_be_named():
    prediction, reference = three_slices()
    settings = ScoreSettings(mode="slices", slices=(2, 0))
    scores = score(prediction, reference, settings=settings)
    assert [(s.slice_index, s.tissue, s.status) for s in scores] == [
        (0, "ggo", "false tissue"),
        (0, "fibrosis", "false tissue"),
        (2, "ggo", "false tissue"),
        (2, "fibrosis", "missed"),
    ]
    lungs = np.ones((3, 1, 4), dtype=bool)
    missed = missing_prediction_scores(
        reference, spacing_mm=SPACING, view=VIEW, lung_mask=lungs, case_id="c", patient_id="p", settings=IN_SLICES
    )
    assert [(s.slice_index, s.tissue, s.is_missed) for s in missed] == [
        (1, "ggo", True),
        (1, "fibrosis", False),
        (2, "ggo", False),
        (2, "fibrosis", True),
    ]
    assert missed[0].penalised_hd95_mm == pytest.approx(math.hypot(10, 40))


def test_a_slice_scores_as_a_volume_of_that_slice():
    """But for the border: in a slice only neighbours in plane make a border, so a volume of one slice differs."""
    rng = np.random.default_rng(12)
    prediction, reference = (rng.integers(1, 6, size=(3, 9, 9)).astype(np.uint8) for _ in range(2))
    spacing = (10.0, 10.0, 10.0)
    by_slice = score(prediction, reference, spacing=spacing, view=VIEWS["tissues"], settings=IN_SLICES)
    for index in range(3):
        alone = score(
            prediction[index : index + 1], reference[index : index + 1], spacing=spacing, view=VIEWS["tissues"]
        )
        for ours, volume in zip([s for s in by_slice if s.slice_index == index], alone, strict=True):
            assert (ours.dice, ours.iou, ours.overlap_ml) == (volume.dice, volume.iou, volume.overlap_ml)
            flat = [labels[index] == VIEWS["tissues"][ours.tissue][0] for labels in (prediction, reference)]
            assert ours.hd95_mm == hd95_mm(*flat, spacing_mm=spacing[1:])


def test_a_foreign_id_in_a_slice_that_does_not_count_is_still_named():
    prediction, reference = three_slices()
    prediction[0, 0, 0] = 77
    with pytest.raises(InputError, match=r"prediction has unknown label ids \[77\]"):
        score(prediction, reference, settings=IN_SLICES)


@pytest.mark.parametrize(
    ("labels", "settings", "phrase"),
    [
        (np.zeros((2, 3, 3)), {"mode": "slices"}, "case c1: the reference has no annotated slice"),
        (np.ones((2, 3, 3)), {"mode": "slices", "slices": (0, 2)}, r"annotated slices \[0, 2\] do not lie in 0 to 1"),
        (np.ones((2, 3, 3)), {"mode": "slices", "slices": (-1,)}, "do not lie in 0 to 1"),
        (np.ones((2, 3, 3)), {"slices": (0,)}, "the mode is not `slices`"),
        (np.ones((2, 3, 3)), {"mode": "axial"}, "unknown mode 'axial': choose one of volume, slices"),
        (np.ones((2, 3, 3)), {"hd95": "max"}, "unknown HD95 definition 'max'"),
        (np.ones((2, 3, 3)), {"tolerance_mm": -2.0}, "tolerance"),
    ],
)
def test_bad_settings_are_named(labels, settings, phrase):
    with pytest.raises(InputError, match=phrase):
        score(labels, labels, settings=ScoreSettings(**settings))


def test_slice_mode_needs_a_volume():
    flat = np.ones((3, 3), dtype=np.uint8)
    with pytest.raises(InputError, match="slice mode needs volumes"):
        score(flat, flat, spacing=(1.0, 1.0), settings=IN_SLICES)


def test_empty_label_maps_are_absent_everywhere():
    empty = np.zeros((2, 3, 4), dtype=np.uint8)
    assert {s.status for s in score(empty, empty)} == {"absent"}

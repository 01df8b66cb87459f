"""Quantities of small volumes by hand, their sums, and blanks with a reason."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.report.quantify import QuantityRow, quantification_csv, quantify
from lungseg.tissue import TISSUES

VOXEL_ML = 0.5


def small() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left lung of 4 voxels, right of 3, one labelled voxel outside."""
    lungs = np.array([[[0, 1, 1, 1, 1, 2, 2, 2]]], dtype=np.uint8)
    labels = np.array([[[3, 1, 2, 2, 255, 1, 3, 0]]], dtype=np.uint8)
    hu = np.array([[[40, -850, -950, -970, -100, -800, -600, 0]]], dtype=np.int16)
    return labels, lungs, hu


def value_of(rows: list[QuantityRow], region: str, metric: str) -> float | None:
    (row,) = [row for row in rows if (row.region, row.metric) == (region, metric)]
    return row.value


def test_values_by_hand():
    rows = quantify(*small(), voxel_ml=VOXEL_ML)
    wanted = {
        ("left", "volume_ml"): 2.0,
        ("left", "mld_hu"): -717.5,
        ("left", "laa950_pct"): 50.0,  # -950 itself counts
        ("left", "perc15_hu"): -970 + 0.45 * 20,
        ("left", "emphysema_ml"): 1.0,
        ("left", "emphysema_pct"): 50.0,
        ("left", "emphysema_mean_hu"): -960.0,
        ("left", "emphysema_sd_hu"): 10.0,
        ("left", "emphysema_p15_hu"): -967.0,
        ("left", "unclassified_ml"): 0.5,
        ("left", "ggo_ml"): 0.0,
        ("right", "volume_ml"): 1.5,
        ("right", "laa950_pct"): 0.0,
        ("right", "ggo_mean_hu"): -600.0,
        ("right", "unclassified_ml"): 0.5,  # a lung voxel with label 0 is not lost
        ("right", "unclassified_mean_hu"): 0.0,
        ("whole", "volume_ml"): 3.5,
        ("whole", "healthy_ml"): 1.0,
        ("whole", "healthy_pct"): 200 / 7,
        ("whole", "labelled_outside_lung_ml"): 0.5,
    }
    for (region, metric), value in wanted.items():
        assert value_of(rows, region, metric) == pytest.approx(value), (region, metric)


def test_tissues_sum_to_the_lung_and_sides_to_the_whole():
    rng = np.random.default_rng(3)
    shape = (9, 10, 11)
    labels = rng.choice(np.array([0, 1, 2, 3, 4, 5, 6, 255], np.uint8), size=shape)
    lungs = rng.integers(0, 3, size=shape).astype(np.uint8)
    hu = rng.integers(-1024, 100, size=shape).astype(np.int16)
    rows = quantify(labels, lungs, hu, voxel_ml=0.003)
    names = [*(info.name for info in TISSUES.values()), "unclassified"]
    for region in ("whole", "left", "right"):
        total = value_of(rows, region, "volume_ml")
        assert sum(value_of(rows, region, f"{name}_ml") for name in names) == pytest.approx(total)
        assert sum(value_of(rows, region, f"{name}_pct") for name in names) == pytest.approx(100.0)
    for metric in ("volume_ml", *(f"{name}_ml" for name in names)):
        sides = value_of(rows, "left", metric) + value_of(rows, "right", metric)
        assert sides == pytest.approx(value_of(rows, "whole", metric))
    inside = lungs > 0
    assert value_of(rows, "whole", "laa950_pct") == pytest.approx(100 * np.mean(hu[inside] <= -950))
    assert value_of(rows, "whole", "volume_ml") == pytest.approx(np.count_nonzero(inside) * 0.003)


def test_types_are_plain_and_units_follow_the_name():
    rows = quantify(*small(), voxel_ml=np.float64(VOXEL_ML))
    units = {"ml": "ml", "hu": "HU", "pct": "%"}
    for row in rows:
        assert row.value is None or type(row.value) is float
        assert row.unit == units[row.metric.rsplit("_", 1)[1]]
        assert (row.value is None) == (row.status != "ok")
    keys = [(row.region, row.metric) for row in rows]
    assert len(set(keys)) == len(keys)


def test_a_number_that_cannot_be_had_is_blank_with_its_reason():
    labels, lungs, hu = small()
    no_voxel = [r for r in quantify(labels, lungs, hu, voxel_ml=1.0) if r.metric == "fibrosis_mean_hu"]
    assert {(r.value, r.status) for r in no_voxel} == {(None, "no voxel of this tissue")}

    only_right = np.where(lungs == 1, 0, lungs)
    left = [r for r in quantify(labels, only_right, hu, voxel_ml=1.0) if r.region == "left"]
    assert {(r.value, r.status) for r in left} == {(None, "no left lung in the lung mask")}

    no_sides = quantify(labels, lungs > 0, hu, voxel_ml=1.0)
    assert {r.status for r in no_sides if r.region != "whole"} == {"lung mask has no sides"}
    assert value_of(no_sides, "whole", "volume_ml") == 7.0

    nothing = quantify(labels, np.zeros_like(lungs), hu, voxel_ml=1.0)
    assert {r.status for r in nothing if r.region == "whole" and r.value is None} == {"lung mask is empty"}
    assert value_of(nothing, "whole", "volume_ml") is None

    no_image = quantify(labels, lungs, None, voxel_ml=1.0)
    assert {r.status for r in no_image if r.unit == "HU" or r.metric == "laa950_pct"} == {"no source image"}
    assert value_of(no_image, "left", "emphysema_ml") == 2.0

    cut = quantify(labels, lungs, hu, voxel_ml=1.0, truncated=("left",))
    status = {region: {r.status for r in cut if r.region == region and r.metric == "volume_ml"} for region in
              ("whole", "left", "right")}  # fmt: skip
    assert status == {"whole": {"truncated"}, "left": {"truncated"}, "right": {"ok"}}


def test_row_22_volumes_of_a_cut_lung_are_lower_bounds_on_request():
    labels, lungs, hu = small()
    whole = {(r.region, r.metric): r for r in quantify(labels, lungs, hu, voxel_ml=1.0)}
    cut = quantify(labels, lungs, hu, voxel_ml=1.0, truncated=("left",), lower_bounds=True)
    for row in cut:
        usual = whole[row.region, row.metric]
        if row.region == "right" or row.metric == "labelled_outside_lung_ml":
            assert row == usual
        elif row.unit == "ml":
            assert (row.value, row.status) == (usual.value, "lower bound")
        else:
            assert (row.value, row.status) == (None, "truncated")
    blank = quantify(labels, np.zeros_like(lungs), hu, voxel_ml=1.0, truncated=("left",), lower_bounds=True)
    assert {r.status for r in blank if r.region == "left"} == {"truncated"}


def test_the_rows_are_the_same_for_every_scan():
    labels, lungs, hu = small()
    full = [(r.region, r.metric, r.unit) for r in quantify(labels, lungs, hu, voxel_ml=1.0)]
    blank = [(r.region, r.metric, r.unit) for r in quantify(labels, np.zeros_like(lungs), None, voxel_ml=1.0)]
    assert full == blank


def test_csv_is_long_sorted_and_blank_where_there_is_no_number():
    labels, lungs, hu = small()
    text = quantification_csv({"b": quantify(labels, lungs, hu, voxel_ml=1.0), "a": [
        QuantityRow("whole", "volume_ml", None, "ml", "truncated")]})  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "case,region,metric,value,unit,status"
    assert lines[1] == "a,whole,volume_ml,,ml,truncated"
    assert lines[2] == "b,whole,volume_ml,7.000000,ml,ok"
    parsed = list(csv.DictReader(io.StringIO(text)))
    assert {row["value"] for row in parsed if row["status"] != "ok"} == {""}


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"labels": np.zeros((1, 1, 7), np.uint8)}, "one shape"),
        ({"labels": np.full((1, 1, 8), 7, np.uint8)}, r"unknown ids \[7\]"),
        ({"labels": np.ones((1, 1, 8), np.int32)}, "must be uint8"),
        ({"lungs": np.full((1, 1, 8), 3, np.uint8)}, "known: 0, 1 left, 2 right"),
        ({"volume_hu": np.full((1, 1, 8), np.nan, np.float32)}, "nan or infinite HU"),
        ({"voxel_ml": 0.0}, "must be positive"),
        ({"truncated": ("lobe",)}, "unknown regions"),
    ],
)
def test_bad_input_is_named(change, phrase):
    labels, lungs, hu = small()
    arguments = {"labels": labels, "lungs": lungs, "volume_hu": hu, "voxel_ml": 1.0} | change
    with pytest.raises(InputError, match=phrase):
        quantify(**arguments)


def test_emphysema_of_a_real_lung(shared_data):
    """The mean of the mask is the data's own README; LAA-950 there is strict (45.5 %), ours inclusive as CIP."""
    sitk = pytest.importorskip("SimpleITK")
    folder = shared_data / "elastix-emphysema"
    image = sitk.ReadImage(str(folder / "ct.mha"))
    hu = sitk.GetArrayFromImage(image)
    lungs = np.where(sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "right_lung_mask.mha"))) == 1, 2, 0)
    lungs = lungs.astype(np.uint8)
    voxel_ml = float(np.prod(image.GetSpacing())) / 1000
    rows = quantify((lungs > 0).astype(np.uint8), lungs, hu, voxel_ml=voxel_ml)
    assert value_of(rows, "right", "mld_hu") == pytest.approx(-896, abs=0.5)
    strict = 100 * float(np.mean(hu[lungs > 0] < -950))
    assert strict == pytest.approx(45.5, abs=0.1)
    on_the_limit = 100 * float(np.mean(hu[lungs > 0] == -950))
    assert value_of(rows, "right", "laa950_pct") == pytest.approx(strict + on_the_limit)
    assert value_of(rows, "left", "volume_ml") is None

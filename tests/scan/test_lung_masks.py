"""Lung masks of other programs: every convention of labels, every way to be wrong, and the checks against the scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lungseg.errors import InputError
from lungseg.scan.lung_mask_labels import read_sides
from lungseg.scan.lung_masks import MaskedLungs, lungs_from_mask, read_lung_mask
from lungseg.scan.nifti import read_image, write_image
from lungseg.scan.orientation import to_stored
from lungseg.scan.volume import Geometry, Volume
from lungseg.tissue import LUNG_EITHER, LUNG_LEFT, LUNG_MASK_CONVENTIONS, LUNG_RIGHT

GRID = Geometry((32, 40, 48), (5.0, 5.0, 5.0), (-300.0, 20.0, -110.0))
Z, Y, X = (
    (np.arange(n) - (n - 1) / 2.0).reshape([-1 if a == axis else 1 for a in range(3)]) * 5.0
    for axis, n in enumerate(GRID.shape)
)
"""Millimetres from the middle of the chest: to superior, posterior, left."""
SIDES = np.zeros(GRID.shape, np.uint8)
for _side, _x in ((LUNG_LEFT, 55.0), (LUNG_RIGHT, -55.0)):
    SIDES[(Z / 60.0) ** 2 + (Y / 60.0) ** 2 + ((X - _x) / 40.0) ** 2 < 1.0] = _side
TRACHEA = (X**2 + Y**2 < 8.5**2) & (Z > -10.0)
LEFT, RIGHT = SIDES == LUNG_LEFT, SIDES == LUNG_RIGHT


def chest() -> Volume:
    """A small chest with two lungs (1.2 L together) and a trachea; int16 HU."""
    hu = np.where((Y / 90.0) ** 2 + (X / 110.0) ** 2 < 1.0, 40.0, -1000.0) + 0.0 * Z
    hu[SIDES > 0] = -850.0
    hu[TRACHEA] = -990.0
    return Volume((hu + np.random.default_rng(0).normal(0.0, 10.0, hu.shape)).round().astype(np.int16), GRID)


CHEST = chest()


def lobes(*labels: int) -> np.ndarray:
    """Labels of left upper, left lower, right upper, right middle and right lower lobe, here cut by height."""
    mask = np.zeros(GRID.shape, np.uint16)
    for label, part in zip(labels, (LEFT & (Z > 0), LEFT & (Z <= 0), RIGHT & (Z > 20), RIGHT & (abs(Z) <= 20),
                                    RIGHT & (Z < -20)), strict=True):  # fmt: skip
        mask[part] = label
    return mask


def with_organs(mask: np.ndarray, organs: dict[int, tuple[float, float, float]]) -> np.ndarray:
    """A mask with a ball of each label added, where no lung is."""
    for label, (z, y, x) in organs.items():
        mask[((Z - z) ** 2 + (Y - y) ** 2 + (X - x) ** 2 < 18.0**2) & (mask == 0)] = label
    return mask


def cip() -> np.ndarray:
    """Lobes by region, a vessel and a bronchus in them; the trachea without region and within the right lung."""
    mask = lobes(7, 8, 4, 5, 6)
    mask[LEFT & (abs(Y) < 6)] += 3 * 256
    mask[RIGHT & (abs(Y - 20) < 6)] += 2 * 256
    mask[TRACHEA] = 2 * 256
    mask[TRACHEA & (Z > 60)] = 2 + 38 * 256
    return mask


MASKS: dict[str, Callable[[], np.ndarray]] = {
    "lungseg": lambda: SIDES.copy(),
    "lungmask": lambda: np.array([0, 2, 1], np.uint8)[SIDES],
    "lungmask-lobes": lambda: lobes(1, 2, 3, 4, 5),
    "totalsegmentator": lambda: with_organs(
        lobes(10, 11, 12, 13, 14), {5: (-70, 0, -40), 51: (-20, -50, 5), 92: (0, 85, 0)}
    ),
    "cip": cip,
    "binary": lambda: (SIDES > 0).astype(np.uint8) * 255,
}


def read(mask: np.ndarray, labels: str = "auto", *, scan: Volume = CHEST) -> MaskedLungs:
    return lungs_from_mask(Volume(mask, GRID), scan, labels=labels)


def refusal(mask: np.ndarray, labels: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        read(mask, labels)
    return str(caught.value)


@pytest.mark.parametrize("labels", ["auto", "named"])
@pytest.mark.parametrize("name", MASKS)
def test_every_convention_gives_the_same_lungs(name: str, labels: str) -> None:
    found = read(MASKS[name](), "auto" if labels == "auto" else name)
    assert found.convention == name
    assert np.array_equal(found.field.labels, SIDES)
    assert found.field.labels.dtype == np.uint8
    assert found.field.warnings == ()
    assert found.field.volume_ml == pytest.approx(np.count_nonzero(SIDES) * 0.125)
    assert found.field.mean_hu == pytest.approx(-850.0, abs=1.0)


def test_conventions_are_those_of_their_programs() -> None:
    """Each label of a lung as its program's documentation names it."""
    left, right, either = LUNG_LEFT, LUNG_RIGHT, LUNG_EITHER
    table = {name: convention.sides for name, convention in LUNG_MASK_CONVENTIONS.items()}
    assert table["lungmask"] == {1: right, 2: left}
    assert table["lungmask-lobes"] == {1: left, 2: left, 3: right, 4: right, 5: right}
    assert table["totalsegmentator"] == {10: left, 11: left, 12: right, 13: right, 14: right}
    regions = {label: side for label, side in table["cip"].items() if label < 256}
    assert regions == {1: either, 2: right, 3: left, 4: right, 5: right, 6: right, 7: left, 8: left, 9: left, 10: left,
                       11: left, 12: right, 13: right, 14: right, 20: either, 21: either, 22: either}  # fmt: skip
    assert all(table["cip"][label + 256 * kind] == side for label, side in regions.items() for kind in (2, 3, 91))
    for convention in LUNG_MASK_CONVENTIONS.values():
        assert convention.source
        assert not convention.others & set(convention.sides)
    assert LUNG_MASK_CONVENTIONS["totalsegmentator"].strangers([0, 14, 117, 118]) == [118]
    assert LUNG_MASK_CONVENTIONS["cip"].strangers([79, 78, 92 * 256 + 2]) == [79, 92 * 256 + 2]
    assert LUNG_MASK_CONVENTIONS["binary"].strangers([0, 7]) == []


@pytest.mark.parametrize(("name", "meant"), [("lungseg", "lungmask"), ("lungmask", "lungseg")])
def test_swapped_sides_are_refused_with_the_other_reading(name: str, meant: str) -> None:
    message = refusal(MASKS[meant](), name)
    assert "the left lung would lie on the patient's right" in message
    assert f"as {name} reads it" in message
    assert f"{meant} ({LUNG_MASK_CONVENTIONS[meant].title})" in message


def test_a_mirrored_mask_is_refused() -> None:
    mirrored = MASKS["totalsegmentator"]()[:, :, ::-1].copy()
    assert "patient's right" in refusal(mirrored)
    assert "mirrored" in refusal(mirrored, "totalsegmentator")


def test_labels_that_lie_nowhere_are_refused_with_every_reading() -> None:
    """Upper and lower halves of both lungs as 1 and 2: neither left nor right, whoever wrote it."""
    halves = np.where(SIDES > 0, np.where(Z > 0, 1, 2), 0).astype(np.uint8)
    message = refusal(halves)
    for name in ("lungseg", "lungmask", "lungmask-lobes"):
        assert f"as {name} (" in message
    assert "would not lie beside each other" in message
    assert "the left lung would lie on both sides" in message


def test_what_labels_and_anatomy_leave_open_is_refused_until_it_is_named() -> None:
    """9 to 14: thirds of CIP, or TotalSegmentator's lobes and an adrenal gland."""
    mask = np.zeros(GRID.shape, np.uint8)
    for side, first in ((LEFT, 9), (RIGHT, 12)):
        for third, part in enumerate((Z > 20, abs(Z) <= 20, Z < -20)):
            mask[side & part] = first + third
    message = refusal(mask)
    assert "totalsegmentator (" in message
    assert "cip (" in message
    assert "--lung-mask-labels" in message
    assert np.array_equal(read(mask, "cip").field.labels, SIDES)
    assert read(np.where(mask == 9, 10, mask)).convention == "totalsegmentator"  # both readings agree


def test_lungs_with_disease_as_third_label_are_not_read_as_something_else() -> None:
    """1 left, 2 right, 3 infection in both: CIP would read whole lung, right lung and left lung."""
    mask = SIDES.copy()
    mask[(SIDES > 0) & (Z < -30) & (Y > 0)] = 3
    message = refusal(mask)
    assert "as cip (" in message
    assert "labels with and without side are mixed" in message
    assert "3 (" in refusal(mask, "lungseg")


def test_row_34_unknown_labels_are_refused_with_their_voxels() -> None:
    mask = SIDES.copy()
    mask[0, 0, :3] = 7
    message = refusal(mask, "lungmask")
    assert "7 (3 voxels)" in message
    mask[0, 0, 3:5] = 200
    message = refusal(mask)
    assert "200 (2 voxels)" in message
    assert "no known program" in message
    assert "7 (3 voxels)" in refusal(np.where(mask == 200, 0, mask), "binary")


def test_row_34_labels_of_no_lung_are_not_taken_for_one() -> None:
    organs = with_organs(np.zeros(GRID.shape, np.uint8), {5: (-70, 0, -40), 52: (0, 60, 0), 90: (0, -60, 0)})
    assert "holds no lung as totalsegmentator reads it" in refusal(organs, "totalsegmentator")
    assert "no known program" in refusal(organs)


@pytest.mark.parametrize("labels", ["auto", "lungmask", "binary"])
def test_row_35_an_empty_mask_is_refused(labels: str) -> None:
    assert "the lung mask is empty" in refusal(np.zeros(GRID.shape, np.uint8), labels)


def test_row_35_one_voxel_is_judged_and_does_not_crash() -> None:
    mask = np.zeros(GRID.shape, np.uint8)
    mask[16, 20, 35] = 1
    found = read(mask)
    assert np.count_nonzero(found.field.labels) == 1
    assert {text.split(":")[0] for text in found.field.warnings} >= {"small lung volume", "one lung only"}


@pytest.mark.parametrize("side", [LUNG_LEFT, LUNG_RIGHT])
def test_a_single_lung_is_named_by_the_trachea(side: int) -> None:
    lung = (side == SIDES).astype(np.uint8) * 3
    field = read(lung).field
    assert np.array_equal(field.labels, np.where(lung, side, 0))
    assert any(text.startswith("one lung only") for text in field.warnings)


def test_a_speck_of_the_other_label_does_not_make_a_second_lung() -> None:
    mask = np.where(LEFT, 2, 0).astype(np.uint8)
    mask[16, 20, 44] = 1  # lungmask's right lung, within the left side
    assert np.count_nonzero(read(mask, "lungmask").field.labels == LUNG_LEFT) == np.count_nonzero(LEFT)


def test_a_single_lung_on_the_other_side_is_told() -> None:
    """Not refused: without its partner the position is less sure than the label."""
    field = read(LEFT.astype(np.uint8), "lungmask").field
    assert np.unique(field.labels).tolist() == [0, LUNG_RIGHT]
    assert any("would be the right one, but lies where the left one is" in text for text in field.warnings)


def test_touching_lungs_of_a_binary_mask_are_parted() -> None:
    joined = SIDES > 0
    joined |= (abs(X) < 20) & (abs(Z) < 6) & (abs(Y + 30) < 6)
    labels = read(joined.astype(np.uint8)).field.labels
    assert np.array_equal(labels > 0, joined)
    assert (labels[SIDES > 0] == SIDES[SIDES > 0]).all()


def test_lungs_that_a_mask_joins_widely_are_parted_at_the_neck() -> None:
    """With the mediastinum between the hila, as a closing of a coarse mask leaves it."""
    joined = (SIDES > 0) | ((abs(X) < 30) & (abs(Z) < 30) & (abs(Y) < 28))
    labels = read_sides(joined.astype(np.uint8), CHEST.array, GRID.spacing_mm).labels
    assert (labels[SIDES > 0] == SIDES[SIDES > 0]).mean() > 0.99


def test_open_sides_of_cip_are_named_by_position() -> None:
    mask = np.where(SIDES > 0, np.where(Z > 20, 20, 21), 0).astype(np.uint16)
    mask[(SIDES > 0) & (Z < -20)] = 22
    found = read(mask)
    assert found.convention == "cip"
    assert np.array_equal(found.field.labels, SIDES)


def test_missing_lobes_are_told() -> None:
    mask = lobes(10, 11, 12, 13, 14)
    mask[mask == 13] = 0
    assert any(text.startswith("lobes missing: the mask holds 4 of 5") for text in read(mask).field.warnings)


def test_row_33_another_grid_is_refused_or_resampled() -> None:
    finer = Geometry(GRID.shape, (5.0, 5.0, 5.5), GRID.origin_mm)
    mask = Volume(SIDES, finer)
    with pytest.raises(InputError, match=r"(?s)the lung mask: the mask lies on another grid.*--resample-masks"):
        lungs_from_mask(mask, CHEST)
    found = lungs_from_mask(mask, CHEST, allow_resample=True)
    assert found.convention == "lungseg"
    assert found.field.labels.shape == GRID.shape


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_row_33_a_file_in_any_format_and_axis_order_is_the_same_mask(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mask{suffix}"
    if suffix == ".nii.gz":
        write_image(path, MASKS["cip"](), GRID, stored_axes=(2, 0, 1), stored_flips=(True, False, True))
    else:
        stored, grid = to_stored(MASKS["cip"](), GRID, stored_axes=(0, 1, 2), stored_flips=(False, True, True))
        image = sitk.GetImageFromArray(stored)
        image.SetSpacing(grid.spacing_mm[::-1])
        image.SetOrigin(grid.origin_mm[::-1])
        image.SetDirection([v for row in grid.direction[::-1] for v in row[::-1]])
        sitk.WriteImage(image, str(path))
    found = lungs_from_mask(read_lung_mask(path), CHEST)
    assert found.convention == "cip"
    assert np.array_equal(found.field.labels, SIDES)


def test_a_mask_on_tissue_or_on_air_is_of_another_scan() -> None:
    wall = ((Y / 90.0) ** 2 + (X / 110.0) ** 2 < 1.0) & (SIDES == 0) & ~TRACHEA & (abs(Z) < 60)
    message = refusal(wall.astype(np.uint8))
    assert "mean 40 HU inside" in message
    assert "-970 to -200" in message
    corner = ((abs(X) > 100) & (abs(Y) > 80) & (Z < 60)) + np.zeros(GRID.shape, bool)
    assert "holds no lung of this scan: mean -1000 HU" in refusal(corner.astype(np.uint8))


@pytest.mark.parametrize(("axis", "voxels"), [(0, 4), (1, 3), (2, -3)])
def test_a_moved_mask_is_told(axis: int, voxels: int) -> None:
    warnings = read(np.roll(SIDES, voxels, axis)).field.warnings
    assert any(text.startswith("lung beside the mask: ") and "moved" in text for text in warnings)


def test_a_mask_that_leaves_lung_out_is_told() -> None:
    part = np.where(Z < 20, SIDES, 0).astype(np.uint8)
    assert any(text.startswith("lung beside the mask") for text in read(part).field.warnings)


def test_an_included_trachea_is_told() -> None:
    mask = (SIDES > 0) | TRACHEA
    (warning,) = [text for text in read(mask.astype(np.uint8)).field.warnings if text.startswith("trachea included")]
    assert float(warning.split()[2]) == pytest.approx(np.count_nonzero(TRACHEA) * 0.125, rel=0.35)


def test_dense_disease_inside_the_mask_is_no_reason_to_doubt_it() -> None:
    scan = CHEST.array.copy()
    scan[LEFT & (Z < 0)] = 30
    found = read(SIDES.copy(), scan=dataclasses.replace(CHEST, array=scan))
    assert found.field.warnings == ()
    assert np.array_equal(found.field.labels, SIDES)


def test_the_usual_warnings_are_those_of_our_own_lungs(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = dataclasses.replace(
        CHEST, array=np.ascontiguousarray(CHEST.array[:20]), geometry=GRID.crop((0, 0, 0), (20, 40, 48))
    )
    field = lungs_from_mask(Volume(np.ascontiguousarray(SIDES[:20]), cut.geometry), cut).field
    assert [text.split(":")[0] for text in field.warnings] == ["small lung volume", "truncated"]
    assert "highest slice" in field.warnings[1]
    monkeypatch.setattr("lungseg.scan.lung_mask_checks.JUDGED_MM", 8.0)  # a large chest takes long at 2 mm
    large = Geometry(GRID.shape, (10.0, 10.0, 10.0))
    field = lungs_from_mask(Volume(SIDES, large), Volume(CHEST.array, large)).field
    assert field.warnings[0] == f"large lung volume: {field.volume_ml:.0f} ml (above 9 L)"


def test_a_cip_mask_of_real_lungs_is_its_own_whole_lung(shared_data: Path) -> None:
    """COPD case; regions 9-14 with bronchi and vessels, and the same lungs as one label."""
    folder = shared_data / "cip-small"
    scan = read_image(folder / "ct-64.nrrd")
    whole = read_lung_mask(folder / "wholeLung-64.nrrd")
    regions, one = (lungs_from_mask(mask, scan) for mask in (read_lung_mask(folder / "lm-64.nrrd"), whole))
    assert (regions.convention, one.convention) == ("cip", "binary")
    assert np.array_equal(regions.field.labels > 0, whole.array > 0)
    assert np.array_equal(regions.field.labels, one.field.labels)
    assert regions.field.warnings == one.field.warnings == ()
    assert regions.field.mean_hu == pytest.approx(-873.8, abs=0.1)


def test_two_real_slices_of_cip(shared_data: Path) -> None:
    folder = shared_data / "cip-small"
    mask = read_lung_mask(folder / "crop_ct_2slices_lunglabels.nrrd")
    scan = read_image(folder / "crop_ct_2slices.nrrd")
    reading = read_sides(mask.array, scan.array, scan.geometry.spacing_mm)
    assert reading.convention == "cip"
    assert np.array_equal(reading.labels, np.array([0, 0, LUNG_RIGHT, LUNG_LEFT], np.uint8)[mask.array])


def test_a_single_real_lung(shared_data: Path) -> None:
    """Severe emphysema, right lung only."""
    folder = shared_data / "elastix-emphysema"
    found = lungs_from_mask(read_lung_mask(folder / "right_lung_mask.mha"), read_image(folder / "ct.mha"))
    assert np.unique(found.field.labels).tolist() == [0, LUNG_RIGHT]
    assert found.field.mean_hu == pytest.approx(-896, abs=1)
    assert [text.split(":")[0] for text in found.field.warnings] == ["one lung only"]

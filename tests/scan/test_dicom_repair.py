"""Repairs of a stack: missing slices, uneven spacing and gantry tilt, only as far as the user or the row allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_fixture import GRID, chest, read_only_series, refusal, save, slice_dataset, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from scipy import ndimage

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom import choose_series, find_series
from lungseg.scan.dicom_repair import blend, fill_gaps, respace, shear_slice
from lungseg.scan.dicom_stack import measure_spacing, spacing_defects
from lungseg.scan.volume import AIR_HU, Geometry

GAPS = ReadOptions(allow_gaps=3)
TILT = ReadOptions(correct_tilt=True)
RAMP = Geometry((12, 10, 11), (2.5, 2.2, 2.0), GRID.origin_mm)


def ramp(z_mm: np.ndarray) -> np.ndarray:
    """A chest whose values rise linearly along z, so that linear interpolation is exact."""
    plane = chest((1, 10, 11), seed=3)[0].clip(-1020)
    return np.rint(plane[None] + 2.0 * np.asarray(z_mm)[:, None, None]).astype(np.int16)


def place(positions: list[float]):
    """An edit that moves slice k to positions[k] (mm above the first)."""

    def move(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, round(-310 + positions[k], 6)]

    return move


# ---------------------------------------------------------------- missing slices


@pytest.mark.parametrize("reverse", [False, True])
def test_row_06_gaps_are_filled_by_linear_interpolation(tmp_path: Path, reverse: bool) -> None:
    array = ramp(2.5 * np.arange(12))
    write_folder(tmp_path, array, geometry=RAMP, skip=(3, 6, 7), flips=(reverse, False, False))
    volume = read_only_series(tmp_path, options=GAPS)
    assert np.abs(volume.array.astype(int) - array).max() <= 1  # rounding
    kept = [0, 1, 2, 4, 5, 8, 9, 10, 11] if not reverse else [0, 1, 2, 3, 6, 7, 9, 10, 11]
    assert np.array_equal(volume.array[kept], array[kept])
    assert volume.geometry.is_close(RAMP, tolerance_voxels=1e-3)
    assert volume.status == ("gaps-filled",)
    where = "1 between -305.00 and -300.00 mm" if not reverse else "1 between -292.50 and -287.50 mm"
    assert where in volume.notes[0]
    assert "filled by interpolation, as asked" in volume.notes[0]


def test_row_06_more_gaps_than_allowed_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, skip=(3, 6, 7))
    (series,) = find_series(tmp_path).series
    assert series.refusal(GAPS) is None
    assert series.facts().repairs == ("--allow-gaps 3",)
    assert series.facts().missing_slices == 3
    text = series.refusal(ReadOptions(allow_gaps=2))
    assert text == series.problem
    assert "or fill the gaps by interpolation with --allow-gaps 3" in text
    with pytest.raises(InputError, match="1 between -305"):
        read_only_series(tmp_path, options=ReadOptions(allow_gaps=2))
    with pytest.raises(InputError, match="missing slices"):
        choose_series([series])
    assert choose_series([series], GAPS).chosen == series


def test_row_06_nothing_is_extrapolated(tmp_path: Path) -> None:
    array = ramp(2.5 * np.arange(12))
    write_folder(tmp_path, array, geometry=RAMP, skip=(0, 11))
    volume = read_only_series(tmp_path, options=GAPS)
    assert np.array_equal(volume.array, array[1:11])
    assert volume.status == ()


def test_row_06_padding_is_not_mixed_into_filled_slices() -> None:
    array = np.zeros((3, 1, 4), np.int16)
    array[0] = [[AIR_HU, AIR_HU, 40, -900]]
    array[2] = [[AIR_HU, 60, 60, -700]]
    fill_gaps(array, (0, 2))
    assert array[1].tolist() == [[AIR_HU, 60, 50, -800]]


# ---------------------------------------------------------------- uneven spacing


@pytest.mark.parametrize("off", [0.05, 0.15, 0.24])
def test_row_07_up_to_ten_percent_is_resampled(tmp_path: Path, off: float) -> None:
    positions = [2.5 * k + (off if k >= 4 else 0.0) + (off / 2 if k >= 9 else 0.0) for k in range(12)]
    write_folder(tmp_path, ramp(np.array(positions)), geometry=RAMP, edit=place(positions))
    volume = read_only_series(tmp_path)
    assert volume.status == ("respaced",)
    step = (27.5 + 1.5 * off) / 11
    assert volume.geometry.spacing_mm[0] == pytest.approx(step)
    assert volume.geometry.origin_mm == GRID.origin_mm
    assert np.abs(volume.array.astype(int) - ramp(step * np.arange(12))).max() <= 1
    assert f"up to {100 * off / 2.5:.1f} % off 2.5 mm" in volume.notes[0]


def test_row_07_more_than_ten_percent_or_with_gaps_is_refused(tmp_path: Path) -> None:
    positions = [2.5 * k + (0.3 if k >= 4 else 0.0) for k in range(12)]
    write_folder(tmp_path / "a", ramp(np.array(positions)), geometry=RAMP, edit=place(positions))
    assert "uneven slice spacing: mostly 2.5 mm, but 2.8 mm at -302.50 mm" in refusal(tmp_path / "a")
    positions = [2.5 * k + (0.15 if k >= 4 else 0.0) for k in range(12)]
    write_folder(tmp_path / "b", ramp(np.array(positions)), geometry=RAMP, edit=place(positions), skip=(7,))
    (series,) = find_series(tmp_path / "b").series
    text = str(series.refusal(ReadOptions(allow_gaps=100, correct_tilt=True)))
    assert "missing slices: 1 between" in text
    assert "uneven slice spacing: mostly 2.5 mm, but 2.65 mm" in text
    assert "--allow-gaps" not in text


@given(
    st.lists(st.sampled_from([1, 1, 1, 1, 2, 3]), min_size=6, max_size=40).filter(lambda n: n.count(1) > len(n) / 2),
    st.floats(0.3, 10),
)
def test_row_06_every_pattern_of_missing_slices_is_counted(steps: list[int], step: float) -> None:
    positions = tuple(float(p) for p in np.concatenate([[0], np.cumsum(steps)]) * step - 300)
    spacing = measure_spacing(positions)
    assert spacing.steps == tuple(steps)
    assert spacing.missing == sum(steps) - len(steps)
    assert spacing.is_even
    assert spacing.grid_step_mm == pytest.approx(step)
    assert len(spacing_defects(spacing)) == (spacing.missing > 0)


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_respacing_an_even_stack_changes_nothing(seed: int) -> None:
    array = np.random.default_rng(seed).integers(-1024, 2000, (7, 3, 4)).astype(np.int16)
    assert np.array_equal(respace(array, [2.0 * k for k in range(7)]), array)


@settings(max_examples=50)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_blend_stays_between_its_values_and_never_mixes_padding(weight: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.integers(-1030, -900, (2, 50)).clip(AIR_HU).astype(np.int16)
    mixed = blend(first, second, weight)
    assert (mixed >= np.minimum(first, second)).all()
    assert (mixed <= np.maximum(first, second)).all()
    padded = (first == AIR_HU) | (second == AIR_HU)
    assert np.array_equal(mixed[padded], (first if weight < 0.5 else second)[padded])


# ---------------------------------------------------------------- gantry tilt

SPHERES = np.array([(-255.0, 40.0, -10.0), (-240.0, 15.0, 18.0), (-225.0, 55.0, 22.0)])
"""World positions (S, P, L) in mm of dense balls in lung."""
RADIUS_MM = 8.0


def write_tilted(
    folder: Path, degrees: float, *, skip: tuple[int, ...] = (), padded: bool = False, around_y: bool = False
) -> None:
    """Slices of a tilted gantry: planes tilted about the left axis (or the row axis), stacked straight along z.

    The balls are rendered analytically: each voxel is the mean of 27 points in it.
    """
    a = np.radians(degrees)
    row = np.array([np.cos(a), 0.0, -np.sin(a)]) if around_y else np.array([1.0, 0.0, 0.0])  # (L, P, S)
    column = np.array([0.0, 1.0, 0.0]) if around_y else np.array([0.0, np.cos(a), np.sin(a)])
    normal = np.cross(row, column)
    rows, columns, step, pixel = 56, 52, 2.0, (1.3, 1.2)
    balls = SPHERES[:, ::-1]
    fine = (np.arange(3) - 1) / 3
    for k in range(50):
        if k in skip:
            continue
        # a straight table: origins move along z only, by what gives slices `step` apart along their normal
        origin = np.array([-30.0, 0.0, -280.0 + k * step / normal[2]])
        total = np.zeros((rows, columns))
        for dr in fine:
            for dc in fine:
                for dn in fine:
                    r, c = np.meshgrid(np.arange(rows) + dr, np.arange(columns) + dc, indexing="ij")
                    points = origin + c[..., None] * pixel[1] * row + r[..., None] * pixel[0] * column
                    points = points + dn * step * normal
                    inside = np.zeros((rows, columns), bool)
                    for ball in balls:
                        inside |= ((points - ball) ** 2).sum(-1) < RADIUS_MM**2
                    total += inside
        hu = -850 + np.rint(890 * total / 27)
        hu[:4] = 30  # chest wall: makes it plausible HU
        if padded:
            hu[:, :3] = -3024
        ds = slice_dataset((hu + 1024).astype(np.int16), origin, np.concatenate([row, column]), pixel)
        ds.ImagePositionPatient = [f"{v:.6f}" for v in origin]
        save(ds, folder / f"{k:02d}")


def centroids(volume) -> np.ndarray:
    """Centres (S, P, L) in mm of the balls, weighted by what they add to lung."""
    weight = (volume.array.astype(float) + 850).clip(0)
    weight[volume.array == AIR_HU] = 0
    regions, n = ndimage.label(weight > 300)
    sizes = ndimage.sum_labels(np.ones_like(weight), regions, range(1, n + 1))
    balls = [i + 1 for i in range(n) if 50 < sizes[i] < 2000]
    around = [ndimage.binary_dilation(regions == i, iterations=2) for i in balls]
    found = [ndimage.center_of_mass(weight * near) for near in around]
    world = np.array([volume.geometry.to_world(c) for c in found])
    return world[np.argsort(world[:, 0])]


@pytest.mark.parametrize(
    ("degrees", "around_y"), [(18.5, False), (-16.5, False), (3.0, False), (-30.0, False), (12.0, True)]
)
def test_row_08_balls_of_a_tilted_phantom_are_where_they_belong(tmp_path: Path, degrees: float, around_y: bool) -> None:
    write_tilted(tmp_path, degrees, around_y=around_y)
    assert f"gantry tilt of {abs(degrees):.1f} degrees" in refusal(tmp_path)
    volume = read_only_series(tmp_path, options=TILT)
    assert volume.status == ("tilt-corrected",)
    assert f"gantry tilt of {abs(degrees):.1f} degrees" in " ".join(volume.notes)
    found = centroids(volume)
    assert found.shape == (3, 3)
    assert np.abs(found - SPHERES).max() < 0.1 * min(volume.geometry.spacing_mm)
    # nothing is lost: the canvas holds the drift of all slices
    drift = 49 * 2.0 * np.tan(np.radians(abs(degrees))) / (1.2 if around_y else 1.3)
    assert volume.array.shape[2 if around_y else 1] == (52 if around_y else 56) + int(np.ceil(drift - 1e-6))


def test_row_08_tilt_with_gaps_needs_both_options(tmp_path: Path) -> None:
    write_tilted(tmp_path, 15.0, skip=(11, 24))
    (series,) = find_series(tmp_path).series
    assert series.facts().repairs == ("--correct-tilt", "--allow-gaps 2")
    assert "missing slices" in str(series.refusal(TILT))
    assert "gantry tilt" in str(series.refusal(GAPS))
    volume = read_only_series(tmp_path, options=ReadOptions(allow_gaps=2, correct_tilt=True))
    assert volume.status == ("tilt-corrected", "gaps-filled")
    assert volume.array.shape[0] == 50
    # two slices of a ball 8 slices high are made up, so its centre is known less well than without gaps
    assert np.abs(centroids(volume) - SPHERES).max() < 0.2 * min(volume.geometry.spacing_mm)


def test_row_08_padding_never_mixes_into_tissue(tmp_path: Path) -> None:
    write_tilted(tmp_path / "a", 18.5, padded=True)
    padded = read_only_series(tmp_path / "a", options=TILT)
    values = np.unique(padded.array)
    assert values[0] == AIR_HU
    assert values[1] == -850  # nothing between padding and lung
    assert (padded.array[:, :, :3] == AIR_HU).all()


def test_row_08_more_than_a_gantry_tilts_is_refused(tmp_path: Path) -> None:
    write_tilted(tmp_path, 40.0)
    (series,) = find_series(tmp_path).series
    assert "more than any gantry does" in str(series.refusal(TILT))


@settings(max_examples=40)
@given(st.floats(0, 5), st.floats(0, 5))
def test_shearing_keeps_the_sum_of_a_flat_image_and_moves_its_centre(down: float, right: float) -> None:
    values = np.full((9, 8), AIR_HU, np.int16)
    values[3:6, 3:6] = -500
    values[values == AIR_HU] = -1000  # air, not padding
    out = np.empty((9 + 6, 8 + 6), np.int16)
    shear_slice(values, (down, right), out)
    weight = np.where(out == AIR_HU, 0.0, out + 1000.0).clip(0)
    assert weight.sum() == pytest.approx(9 * 500, rel=0.01)
    centre = ndimage.center_of_mass(weight)
    assert centre == pytest.approx((4 + down, 4 + right), abs=0.02)

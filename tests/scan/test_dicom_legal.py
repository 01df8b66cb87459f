"""Odd but legal: what hospitals export every day is read as it is, neither refused nor repaired without need."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_fixture import CANARY, GRID, SECONDARY, Edit, chest, edit_all, read_only_series, save, write_folder
from pydicom.dataset import Dataset

from lungseg.config.preprocess import ReadOptions
from lungseg.scan.dicom import choose_series, find_series, read_series
from lungseg.scan.volume import Geometry, Volume

SIDE = 64


def body(slices: int, *, half_width: float = 0.9, dome: float = 0.75, seed: int = 0) -> np.ndarray:
    """int16 HU (slices, 64, 64): chest wall with fat, two lungs that open and close along z, heart and spine."""
    y, x = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    volume = np.full((slices, SIDE, SIDE), -1000.0)
    for k, z in enumerate(np.linspace(-1, 1, slices)):
        inside = (y / 0.7) ** 2 + (x / half_width) ** 2
        volume[k][inside < 1] = -100
        volume[k][inside < 0.85] = 40
        reach = 1 - (z / dome) ** 2 if abs(z) < dome else 0.0
        for centre in (-0.4, 0.42):
            lung = (y / 0.5) ** 2 + ((x - centre) / 0.32) ** 2
            volume[k][lung < reach] = -850
        volume[k][((y + 0.1) / 0.2) ** 2 + (x / 0.25) ** 2 < 1] = 50
        volume[k][(y - 0.5) ** 2 + x**2 < 0.01] = 500
    volume += np.random.default_rng(seed).normal(0, 15, volume.shape)
    return np.rint(volume).clip(-1024, 3071).astype(np.int16)


def grid(array: np.ndarray, step: float = 5.0) -> Geometry:
    return Geometry(array.shape, (step, 5.0, 5.0), (-300.0, -160.0, -160.0))


def read_as_it_is(folder: Path, array: np.ndarray, *, step: float = 5.0, edit: Edit | None = None) -> Volume:
    """Written and read: the very voxels, and nothing repaired."""
    write_folder(folder, array, geometry=grid(array, step), edit=edit)
    volume = read_only_series(folder)
    assert np.array_equal(volume.array, array)
    assert volume.status == ()
    return volume


# ---------------------------------------------------------------- rounded positions


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize("step", [0.4, 0.5, 0.625, 0.67, 0.7, 0.75, 0.8, 1.25, 3.75])
def test_row_07_rounded_positions_are_an_even_grid(tmp_path: Path, step: float, digits: int) -> None:
    array = chest((80, 10, 11))

    def place(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, round(-310.03 + step * k, digits)]

    write_folder(tmp_path, array, geometry=Geometry(array.shape, (step, 2.2, 2.0), GRID.origin_mm), edit=place)
    volume = read_only_series(tmp_path)
    assert volume.status == ()
    assert volume.notes == ()
    assert np.array_equal(volume.array, array)
    assert volume.geometry.spacing_mm[0] == pytest.approx(step, abs=0.1 / 79 + 1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.31])
def test_row_06_missing_slices_are_counted_in_rounded_positions(tmp_path: Path, shift: float) -> None:
    array = chest((80, 10, 11))

    def place(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, round(-310 + shift + 0.625 * k, 1)]

    write_folder(tmp_path, array, edit=place, skip=(7, 8, 40, *range(50, 61)))
    (series,) = find_series(tmp_path).series
    assert series.facts().missing_slices == 14
    assert series.facts().repairs == ("--allow-gaps 14",)
    volume = read_only_series(tmp_path, options=ReadOptions(allow_gaps=14))
    assert volume.status == ("gaps-filled",)
    assert volume.array.shape == array.shape
    assert np.array_equal(volume.array[61:], array[61:])


def test_row_08_rounded_positions_of_an_oblique_slab_are_no_tilt(tmp_path: Path) -> None:
    a = np.radians(23.0)
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(a), np.sin(a)])
    normal = np.cross(row, column)

    def turn(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [f"{v:.6f}" for v in (*row, *column)]
        ds.ImagePositionPatient = [round(v, 1) for v in np.array([-40.25, 12.5, -310.0]) + 2.5 * k * normal]

    write_folder(tmp_path, edit=turn)
    volume = read_only_series(tmp_path)
    assert volume.status == ()
    assert np.array_equal(volume.array, chest())


# ---------------------------------------------------------------- anatomy that jumps


def air_beyond(array: np.ndarray) -> None:
    """A phantom shorter than the scan: nothing but the table at both ends."""
    array[:3] = array[-3:] = -1000
    array[:3, 58:60] = array[-3:, 58:60] = -300


def air_at_one_end(array: np.ndarray) -> None:
    array[0] = np.random.default_rng(1).normal(-1000, 12, array[0].shape).clip(-1024)


def blank_at_the_ends_and_within(array: np.ndarray) -> None:
    array[[0, 7, -1]] = -1024


def metal(array: np.ndarray) -> None:
    """A screw in one thick slice, on the extended scale, with streaks across the image."""
    array[7, 20:26, 30:36] = 20000
    array[7, 22, :] = 1500
    array[7, :, 33] = -700


def breath(array: np.ndarray) -> None:
    """A rotation at another depth of breath: a dome of liver fills the lungs in one slice."""
    array[9][array[9] < -700] = 60
    array[9, :6] = array[9, -6:] = -1000


def neck(array: np.ndarray) -> None:
    """Shoulders, and in the next slice a neck."""
    y, x = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    array[-1] = np.where(y**2 + x**2 < 0.06, 45, -1000)


def abdomen(array: np.ndarray) -> None:
    array[0] = np.where(array[0] > -500, 60, array[0])


def bolus(array: np.ndarray) -> None:
    """Contrast arrives while the table moves."""
    for k in range(len(array)):
        array[k, 26:32, 26:38] = 50 + 25 * k


@pytest.mark.parametrize("step", [5.0, 10.0])
@pytest.mark.parametrize(
    "change", [air_beyond, air_at_one_end, blank_at_the_ends_and_within, metal, breath, neck, abdomen, bolus]
)
def test_anatomy_may_jump_from_slice_to_slice(tmp_path: Path, change, step: float) -> None:
    array = body(16)
    change(array)
    read_as_it_is(tmp_path, array, step=step)


def test_a_narrow_field_of_view_ends_in_tissue(tmp_path: Path) -> None:
    """One lung fills the image, and in the next slice there is none of it."""
    array = np.full((10, 32, 32), 40) + np.random.default_rng(2).normal(0, 15, (10, 32, 32))
    array[2:-1, 2:-2, 2:-2] -= 890
    read_as_it_is(tmp_path, array.astype(np.int16))


def test_slices_of_two_phases_in_turn(tmp_path: Path) -> None:
    """Interleaved ECG gating: every other slice shows another size of the heart and place of the diaphragm."""
    array = body(24)
    other = body(24, dome=0.55, seed=1)
    array[1::2] = other[1::2]
    read_as_it_is(tmp_path, array, step=2.5)


def test_an_odd_slice_is_told_but_not_refused(tmp_path: Path) -> None:
    array = body(16)
    array[8] = 40
    array[8, ::2, :20] = -1000
    volume = read_as_it_is(tmp_path, array)
    assert "slices unlike both of their neighbours, at -260.00 mm: look at them" in volume.notes


@pytest.mark.parametrize("folder", ["covid-p002", "lungdx-a0002", "lidc0001-slab", "cip-small/ct-64Dicom"])
def test_no_real_slice_along_any_axis_is_damaged(shared_data: Path, folder: str) -> None:
    from lungseg.scan.dicom_neighbours import unlike_slices

    array = read_series(choose_series(find_series(shared_data / folder).series).chosen).array
    for axis in range(3):
        for thinned in (1, 5, 10):
            stack = np.moveaxis(array, axis, 0)[::thinned]
            if len(stack) >= 6:
                assert unlike_slices(stack, range(len(stack)))[0] == []


# ---------------------------------------------------------------- rescale


@pytest.mark.parametrize("kind", ["half", "a few", "each its own", "the ends"])
def test_row_13_any_mixture_of_rescales_is_legal(tmp_path: Path, kind: str) -> None:
    array = body(16)
    neck(array)

    def rescale(ds: Dataset, k: int) -> None:
        chosen = {"half": k < 8, "a few": k in (3, 4, 11), "each its own": True, "the ends": k in (0, 15)}[kind]
        if chosen:
            intercept = -1000 - 3 * k if kind == "each its own" else 0 if kind != "a few" else -1000
            stored = np.frombuffer(ds.PixelData, np.int16) - 1024 - intercept
            ds.RescaleIntercept, ds.PixelData = str(intercept), stored.astype(np.int16).tobytes()

    read_as_it_is(tmp_path, array, edit=rescale)


# ---------------------------------------------------------------- SliceLocation


@pytest.mark.parametrize(
    "location",
    [
        lambda k: -300 + 5 * k,
        lambda k: 812.5 - 5 * k,
        lambda k: 0.0,
        lambda k: round(5 * k / 3),
        lambda k: 5 * k + (1000 if k > 9 else 0),
        lambda k: 5 * k if k != 4 else 5 * 9,
        lambda k: 5 * k if k != 4 else 999,
        lambda k: float(np.random.default_rng(k).integers(100)),
        lambda k: 5 * (k // 2),
        lambda k: 5 * (15 - k if 2 < k < 13 else k),
    ],
)
def test_slice_locations_that_need_not_be_wrong(tmp_path: Path, location) -> None:
    def write(ds: Dataset, k: int) -> None:
        ds.SliceLocation = f"{location(k):g}"

    read_as_it_is(tmp_path, body(16), edit=write)


@pytest.mark.parametrize("pairs", [{3: 9, 9: 3}, {6: 7, 7: 6}, {2: 5, 5: 11, 11: 2}, {0: 15, 15: 0}])
@pytest.mark.parametrize("sign", [1, -1])
def test_row_09_exchanged_positions_are_given_away_by_slice_location(tmp_path: Path, pairs, sign: int) -> None:
    def exchange(ds: Dataset, k: int) -> None:
        ds.SliceLocation = f"{17.3 + sign * 5.0 * k:.1f}"
        ds.ImagePositionPatient = [-160, -160, -300 + 5.0 * pairs.get(k, k)]

    array = body(16)
    write_folder(tmp_path, array, geometry=grid(array), edit=exchange)
    (series,) = find_series(tmp_path).series
    assert "each other's ImagePositionPatient" in str(series.problem)
    assert all(f"IM{k:04d}" in str(series.problem) for k in pairs)


# ---------------------------------------------------------------- what lies beside a series


def test_a_monitor_slice_next_to_the_scan_is_not_missed(tmp_path: Path) -> None:
    """Bolus tracking: one image exactly where the next slice would be, of a scan of its own."""

    def monitor(ds: Dataset, k: int) -> None:
        ds.SeriesInstanceUID, ds.AcquisitionNumber, ds.SliceThickness = "1.2.3.7", "1", "10"
        ds.ConvolutionKernel = "B20f"

    write_folder(tmp_path, edit=monitor, skip=tuple(range(1, 9)))
    (tmp_path / "IM0000").rename(tmp_path / "monitor")
    write_folder(tmp_path, skip=(0,))
    choice = choose_series(find_series(tmp_path).series)
    assert np.array_equal(read_series(choice.chosen).array, chest()[1:])


def test_a_screen_capture_in_the_series_does_not_disturb_it(tmp_path: Path) -> None:
    paths = write_folder(tmp_path)
    ds = pydicom.dcmread(paths[0])
    ds.SOPClassUID, ds.ImageType = SECONDARY, ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    save(ds, tmp_path / "capture")
    choice = choose_series(find_series(tmp_path).series)
    assert np.array_equal(read_series(choice.chosen).array, chest())
    assert "1 image of another or no orientation in the same series left out" in choice.chosen.dropped


@pytest.mark.parametrize("name", ["LOCKFILE", "VERSION", "Icon\r", ".DS_Store", "Thumbs.db", "notes.txt"])
def test_empty_files_that_are_no_slices_do_not_disturb_a_series(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / name).touch()
    assert np.array_equal(read_only_series(tmp_path).array, chest())


@pytest.mark.parametrize("content", [b"", bytes(100), bytes(9000)])
@pytest.mark.parametrize("name", ["IM0009", "1.2.840.113619.2.55", "x.dcm", "I10"])
def test_row_17_an_empty_end_slice_does_not_vanish(tmp_path: Path, name: str, content: bytes) -> None:
    write_folder(tmp_path, skip=(8,))
    (tmp_path / name).write_bytes(content)
    (series,) = find_series(tmp_path).series
    assert name in str(series.problem)


TAILS = {
    "zeros": bytes(300),
    "line end": b"\n",
    "blanks": b"    ",
    "trailing padding": struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, 10) + b"\1\2" * 5,
    "private group": struct.pack("<HH2sH", 0x7FE1, 0x0010, b"LO", 4) + b"MINE",
    "signature": struct.pack("<HH2sHI", 0xFFFA, 0xFFFA, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_elements_and_filling_behind_the_pixels(tmp_path: Path, tail: bytes) -> None:
    for path in write_folder(tmp_path):
        path.write_bytes(path.read_bytes() + tail)
    assert np.array_equal(read_only_series(tmp_path).array, chest())


@pytest.mark.parametrize("size", [4, 16, 100])
def test_row_17_a_block_doubled_within_the_pixels_is_refused(tmp_path: Path, size: int) -> None:
    path = write_folder(tmp_path)[4]
    data = path.read_bytes()
    path.write_bytes(data[:-150] + data[-150 : -150 + size] + data[-150:])
    (series,) = find_series(tmp_path).series
    assert f"IM0004: damaged: {size} bytes more than it should have" in str(series.problem)


# ---------------------------------------------------------------- several scans of one study


@pytest.mark.parametrize("tag", ["AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime"])
def test_row_05_phases_in_one_series_leave_the_choice_to_another(tmp_path: Path, tag: str) -> None:
    """Inspiration and expiration, or the phases of a heart beat, in one series: known before anything is decoded."""
    for phase in (1, 2):
        write_folder(tmp_path / str(phase), chest(seed=phase), edit=edit_all(**{tag: str(phase)}))
    thick = Geometry((7, 10, 11), (3.0, 2.2, 2.0), GRID.origin_mm)
    write_folder(tmp_path / "c", chest(thick.shape), geometry=thick, edit=edit_all(SeriesInstanceUID="1.2.3.9"))
    choice = choose_series(find_series(tmp_path).series)
    assert choice.chosen.series_uid == "1.2.3.9"
    assert "two different images at -310.00 mm" in choice.others[0][1]
    assert CANARY not in choice.others[0][1]


@pytest.mark.parametrize("image_type", [["DERIVED", "SECONDARY", "MIP"], ["DERIVED", "PRIMARY", "VOLUME", "MINIMUM"],
                                        ["DERIVED", "SECONDARY", "REFORMATTED", "CSA MIP"]])  # fmt: skip
def test_row_20_projections_are_no_scan(tmp_path: Path, image_type: list[str]) -> None:
    write_folder(tmp_path, edit=edit_all(ImageType=image_type))
    (series,) = find_series(tmp_path).series
    assert "a projection (MIP, MinIP)" in str(series.problem)


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 0, 1)], ids=["coronal", "sagittal"])
@pytest.mark.parametrize("reverse", [False, True])
def test_row_10_reformats_are_read_through_their_geometry(tmp_path: Path, axes, reverse: bool) -> None:
    array, flips = chest((12, 14, 13)), tuple(reverse and i == axes[0] for i in range(3))
    geometry = Geometry(array.shape, (2.0, 2.2, 2.4), GRID.origin_mm)
    write_folder(tmp_path, array, geometry=geometry, axes=axes, flips=flips)
    (series,) = find_series(tmp_path).series
    assert series.facts().orientation == ("coronal" if axes[0] == 1 else "sagittal")
    volume = read_series(series)
    assert np.array_equal(volume.array, array)
    assert volume.geometry.is_close(geometry, tolerance_voxels=1e-3)


def test_series_without_uid_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """Two scans of one patient, emptied by an anonymiser; one slice alone that lost its UID belongs to its folder."""
    empty = {"SeriesInstanceUID": "", "StudyInstanceUID": "", "PatientID": ""}
    for folder in ("a", "b"):
        write_folder(tmp_path / folder, chest(seed=ord(folder)), edit=edit_all(**empty))
    found = [read_series(series).array for series in find_series(tmp_path).series]
    assert sorted(a.sum() for a in found) == sorted(chest(seed=ord(folder)).sum() for folder in "ab")
    write_folder(tmp_path / "c", edit=lambda ds, k: edit_all(SeriesInstanceUID="")(ds, k) if k == 8 else None)
    problems = [series.problem for series in find_series(tmp_path / "c").series if len(series.slices) == 8]
    assert "IM0008 lies where the next slice" in str(problems)

"""DICOM folders that are no volume: each is refused with its reason."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_fixture import (
    CANARY,
    ENHANCED,
    GRID,
    SECONDARY,
    chest,
    edit_all,
    read_only_series,
    refusal,
    save,
    write_folder,
)
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from lungseg.errors import InputError
from lungseg.scan.dicom import choose_series, find_series, read_series
from lungseg.scan.volume import Geometry


def test_row_01_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no readable DICOM image among the 0 files looked at"):
        find_series(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG" + bytes(200))
    with pytest.raises(InputError, match=rf"{tmp_path}.*among the 3 files looked at"):
        find_series(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        find_series(tmp_path / "none")


def test_row_06_missing_slices_are_named_with_their_position(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", skip=(3, 6, 7))
    text = refusal(tmp_path)
    assert "missing slices: 1 between -305.00 and -300.00 mm, 2 between -297.50 and -290.00 mm" in text


def test_row_07_uneven_spacing_is_refused(tmp_path: Path) -> None:
    def move(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, -310 + 2.5 * k + (0.6 if k > 5 else 0.0)]

    write_folder(tmp_path, edit=move)
    text = refusal(tmp_path)
    assert "uneven slice spacing: mostly 2.5 mm, but 3.1 mm at -297.50 mm" in text


def test_row_07_jitter_below_one_percent_is_accepted(tmp_path: Path) -> None:
    def move(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, round(-310 + 2.5 * k + 0.01 * (k % 2), 2)]

    write_folder(tmp_path, edit=move)
    assert read_only_series(tmp_path).geometry.spacing_mm[0] == pytest.approx(2.5, abs=1e-9)


def test_row_05_different_images_at_one_position(tmp_path: Path) -> None:
    def other(ds: Dataset, k: int) -> None:
        ds.AcquisitionNumber = "2"

    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", chest(seed=1), edit=other, skip=(0, 1, 2, 3, 4, 6, 7, 8))
    with pytest.raises(InputError, match=r"two different images at -297\.50 mm.*acquisition numbers 1 and 2"):
        read_only_series(tmp_path)


@pytest.mark.parametrize("degrees", [18.5, -4.0, 1.0])
def test_row_08_gantry_tilt_is_refused(tmp_path: Path, degrees: float) -> None:
    a = np.radians(degrees)

    def tilt(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(np.cos(a), 8), round(np.sin(a), 8)]

    write_folder(tmp_path, edit=tilt)
    assert f"gantry tilt of {abs(degrees):.1f} degrees" in refusal(tmp_path)


def test_slice_shifted_sideways(tmp_path: Path) -> None:
    def shift(ds: Dataset, k: int) -> None:
        if k == 4:
            ds.ImagePositionPatient = [-40.25 + 3.0, 12.5, -310 + 2.5 * k]

    write_folder(tmp_path, edit=shift)
    assert "shifted sideways" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("tags", "phrase"),
    [
        ({"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "modality is MR, not CT"),
        ({"Modality": "PT"}, "modality is PT, not CT"),
        ({"SOPClassUID": SECONDARY}, "secondary capture"),
        ({"SOPClassUID": ENHANCED}, r"declares 1 frames, but describes 0 \(functional groups\)"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient.*missing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, 0]}, "ImageOrientationPatient.*missing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.1, 0.99498744, 0]}, "not at right angles"),
        ({"PixelSpacing": None}, "PixelSpacing is missing"),
        ({"PixelSpacing": [0, 0]}, "PixelSpacing is 0 x 0 mm, outside 0.1 to 10 mm"),
        ({"PixelSpacing": [2.2, 22]}, "PixelSpacing is 2.2 x 22 mm, outside 0.1 to 10 mm"),
        ({"RescaleSlope": "0"}, "RescaleSlope is 0"),
        ({"RescaleSlope": "1e4"}, "RescaleSlope is 10000"),
        ({"RescaleIntercept": "-1e9"}, r"RescaleIntercept is -1e\+09"),
        ({"RescaleType": "Z_EFF"}, "values are Z_EFF, not HU"),
        ({"BitsStored": 17, "HighBit": 16}, "BitsStored 17 does not fit into BitsAllocated 16"),
        ({"HighBit": 11}, "HighBit 11 contradicts BitsStored 16"),
        ({"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11}, "BitsAllocated is 12"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "110 bytes, but holds 220 bytes of pixels"),
        ({"BitsAllocated": 32}, "truncated: 220 of 220 bytes|440 bytes, but holds 220 bytes"),
        ({"Rows": 9}, "198 bytes, but holds 220 bytes of pixels"),
        ({"Columns": 12}, "240 bytes, but holds 220 bytes of pixels"),
        ({"Rows": 0}, "declares 1 frames of 0 x 11 pixels"),
        ({"Rows": 65535, "Columns": 65535}, "but holds 220 bytes of pixels"),
        ({"NumberOfFrames": "-1"}, "declares -1 frames"),
        ({"NumberOfFrames": "1000000000"}, "declares 1000000000 x 10 x 11 pixels"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour image"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
    ],
)
def test_tags_that_make_a_series_unusable(tmp_path: Path, tags: dict, phrase: str) -> None:
    write_folder(tmp_path, edit=edit_all(**tags))
    assert re.search(phrase, refusal(tmp_path))


def test_values_beyond_bits_stored(tmp_path: Path) -> None:
    write_folder(tmp_path / "damaged", edit=edit_all(BitsStored=10, HighBit=9))
    with pytest.raises(InputError, match=r"IM0000: BitsStored is 10, but the values run from \d+ to 1\d+: a damaged"):
        read_only_series(tmp_path / "damaged")

    def overlay(ds: Dataset, k: int) -> None:
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, 12, 11
        stored = np.frombuffer(ds.PixelData, np.uint16).copy()
        stored[::3] |= 0x1000
        ds.PixelData = stored.tobytes()
        ds.add_new(0x60000010, "US", 10)
        ds.add_new(0x60000100, "US", 16)
        ds.add_new(0x60000102, "US", 12)

    write_folder(tmp_path / "overlay", edit=overlay)
    assert np.array_equal(read_only_series(tmp_path / "overlay").array, chest())

    def zero_filled(ds: Dataset, k: int) -> None:
        ds.BitsStored, ds.HighBit = 12, 11
        stored = np.frombuffer(ds.PixelData, np.int16) - 1024
        ds.PixelData, ds.RescaleIntercept = (stored & 0xFFF).astype(np.uint16).tobytes(), "0"

    write_folder(tmp_path / "signed", edit=zero_filled)
    assert np.array_equal(read_only_series(tmp_path / "signed").array, chest())


def test_colour_images(tmp_path: Path) -> None:
    def colour(ds: Dataset, k: int) -> None:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = bytes(ds.Rows * ds.Columns * 3)

    write_folder(tmp_path, edit=colour)
    assert "colour image" in refusal(tmp_path)


def test_row_21_too_few_slices_or_too_little_coverage(tmp_path: Path) -> None:
    write_folder(tmp_path / "few", skip=(5, 6, 7, 8))
    assert "only 5 slices covering 12.5 mm" in refusal(tmp_path / "few")
    thin = Geometry(GRID.shape, (1.0, 2.2, 2.0), GRID.origin_mm)
    write_folder(tmp_path / "thin", geometry=thin)
    assert "only 9 slices covering 9.0 mm" in refusal(tmp_path / "thin")


@pytest.mark.parametrize("kept", [0, 900, -50])
def test_row_17_truncated_and_empty_files_are_named(tmp_path: Path, kept: int) -> None:
    paths = write_folder(tmp_path / "a")
    other = write_folder(tmp_path / "b", edit=edit_all(SeriesInstanceUID="1.2.3.9"))
    paths[8].write_bytes(paths[8].read_bytes()[:kept])  # the last slice: no gap would betray it
    scan = find_series(tmp_path)
    broken, whole = scan.series
    expected = {0: "in the same folder is empty (0 bytes)", 900: "in the same folder is truncated or damaged",
                -50: ": truncated: 170 of 220 bytes of pixels are there"}  # fmt: skip
    assert [bad.path for bad in scan.damaged] == ([] if kept == -50 else [paths[8]])
    assert f"IM0008{' ' * (kept != -50)}{expected[kept]}" in str(broken.problem)
    with pytest.raises(InputError, match="IM0008"):
        read_series(broken)
    assert whole.files == tuple(other)
    assert np.array_equal(read_series(whole).array, chest())
    for path in paths[:8] + other:
        path.unlink()
    with pytest.raises(InputError, match="IM0008"):
        choose_series(find_series(tmp_path).series)


def test_row_17_file_damaged_after_the_search(tmp_path: Path) -> None:
    paths = write_folder(tmp_path)
    (series,) = find_series(tmp_path).series
    paths[2].write_bytes(paths[2].read_bytes()[:-50])
    with pytest.raises(InputError, match="IM0002: it has changed since its header was read"):
        read_series(series)
    small = pydicom.dcmread(paths[3])
    small.Rows, small.PixelData = 2, small.PixelData[: 2 * 11 * 2]
    save(small, paths[2])
    with pytest.raises(InputError, match="IM0002: it has changed"):
        read_series(series)


def test_row_16_syntax_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    for path in write_folder(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    assert re.search(r"transfer syntax 1\.2\.840\.10008\.1\.2\.9 .*gdcmconv --raw", refusal(tmp_path))


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.201", "High-Throughput JPEG 2000 Lossless"),
        ("1.2.840.10008.1.2.4.92", "JPEG 2000 Part 2 Multi-component Lossless"),
    ],
)
def test_row_16_known_syntaxes_are_named_with_what_to_install(tmp_path: Path, syntax: str, name: str) -> None:
    for path in write_folder(tmp_path):
        ds = pydicom.dcmread(path)
        ds.PixelData = encapsulate([ds.PixelData])
        ds.file_meta.TransferSyntaxUID = syntax
        ds["PixelData"].is_undefined_length = True
        ds.save_as(path, enforce_file_format=True)
    text = refusal(tmp_path)
    assert f"transfer syntax {syntax} {name} cannot be decoded" in text
    assert "pip install pylibjpeg" in text


def test_one_slice_with_another_pixel_spacing(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        if k == 8:
            ds.PixelSpacing = [2.3, 2.0]

    write_folder(tmp_path, edit=change)
    with pytest.raises(InputError, match=r"1 of 9 slices differ in matrix or pixel spacing.*IM0008"):
        choose_series(find_series(tmp_path).series)


def test_row_03_two_patients_are_never_mixed(tmp_path: Path) -> None:
    def second(ds: Dataset, k: int) -> None:
        ds.PatientID = "another"
        ds.ImagePositionPatient = [-40.25, 12.5, -310 + 2.5 * k + 1.25]  # would interleave

    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", chest(seed=1), edit=second)
    scan = find_series(tmp_path)
    assert [s.patient_id for s in scan.series] == [CANARY, "another"]
    assert [len(s.files) for s in scan.series] == [9, 9]
    assert np.array_equal(read_series(scan.series[1]).array, chest(seed=1))
    with pytest.raises(InputError, match="several patients"):
        choose_series(scan.series)
    with pytest.raises(InputError, match="there is none"):
        choose_series([])


def test_row_23_file_and_folder_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_folder(tmp_path)
    real_open = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self == paths[3]:
            raise PermissionError(13, "Permission denied")
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"IM0003: cannot be read .errno 13: Permission denied"):
        find_series(tmp_path)
    monkeypatch.undo()

    def refuse_folder(top: Path, *, onerror, followlinks):
        error = PermissionError(13, "Permission denied")
        error.filename = str(top)
        onerror(error)

    monkeypatch.setattr(os, "walk", refuse_folder)
    with pytest.raises(InputError, match=r"cannot be listed .Permission denied"):
        find_series(tmp_path)


def test_row_23_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr("lungseg.scan.dicom_headers.MAX_FILES", 5)
    with pytest.raises(InputError, match="more than 5 files"):
        find_series(tmp_path)

"""Hostile and odd DICOM: transfer syntaxes, order of files, contradictions, sizes, and what is never opened."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_fixture import (
    CANARY,
    GRID,
    chest,
    edit_all,
    read_only_series,
    refusal,
    save,
    write_folder,
)  # fmt: skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)  # fmt: skip

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError, ResourceError
from lungseg.scan.dicom import choose_series, find_series, read_series, write_dicom_series
from lungseg.scan.dicom_headers import read_header
from lungseg.scan.dicom_pixels import SliceDecoder
from lungseg.scan.volume import Geometry, Volume


def oracle(series) -> np.ndarray:
    """The same voxels by pydicom: stored values times slope plus intercept, in float64, clipped and rounded."""
    slices = [pydicom.dcmread(path) for path in series.files]
    hu = [ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices]
    return np.rint(np.stack(hu).clip(-1024, 32767)).astype(np.int16)


# ---------------------------------------------------------------- transfer syntaxes

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian,
            RLELossless]  # fmt: skip


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("syntax", "bits"),
    [*((syntax, 16) for syntax in SYNTAXES), (ExplicitVRLittleEndian, 32), (ExplicitVRBigEndian, 32)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_syntax_equals_pydicom(tmp_path: Path, syntax: pydicom.uid.UID, signed: bool, bits: int) -> None:
    def encode(ds: Dataset, k: int) -> None:
        stored = np.frombuffer(ds.PixelData, np.int16).astype(f"{'i' if signed else 'u'}{bits // 8}")
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits, bits - 1, int(signed)
        ds.RescaleSlope, ds.RescaleIntercept = "0.73", f"{-1023.5 + k / 3:.6f}"
        stored = np.rint(stored / 0.73).astype(stored.dtype)
        ds.PixelData = (
            stored.astype(stored.dtype.newbyteorder(">")) if syntax == ExplicitVRBigEndian else stored
        ).tobytes()
        ds["PixelData"].VR = "OW"

    if syntax == RLELossless:
        for path in write_folder(tmp_path, edit=encode):
            ds = pydicom.dcmread(path)
            ds.compress(RLELossless, generate_instance_uid=False)
            ds.save_as(path)
    else:
        write_folder(tmp_path, edit=encode, syntax=syntax)
    (series,) = find_series(tmp_path).series
    assert syntax.name.split(",")[0].split(" (")[0][:12] in series.facts().syntax
    assert np.array_equal(read_series(series).array, oracle(series))


@pytest.mark.parametrize("signed", [True, False])
def test_jpeg_2000_equals_pydicom(tmp_path: Path, signed: bool) -> None:
    array = chest()
    write_dicom_series(tmp_path, Volume(array, GRID), patient_id="P", series_seed="s", compress=True)
    (series,) = find_series(tmp_path).series
    assert "JPEG 2000" in series.facts().syntax
    assert np.array_equal(read_series(series).array, array)
    assert np.array_equal(oracle(series), array)


def test_real_encodings_are_decoded_alike(shared_data: Path) -> None:
    reference = pydicom.dcmread(shared_data / "lidc0001-slab" / "dicom" / "005.dcm").pixel_array
    with SliceDecoder() as decoder:
        for name in ("implicit_le", "rle", "j2k_lossless", "jpegls_lossless"):
            values = decoder.stored_values(read_header(shared_data / "encodings" / f"{name}.dcm"))
            assert np.array_equal(values, reference), name


@pytest.mark.parametrize("folder", ["lidc0001-slab", "cip-small/ct-64Dicom", "lungdx-a0002"])
def test_real_series_equal_pydicom(shared_data: Path, folder: str) -> None:
    series = choose_series(find_series(shared_data / folder).series).chosen
    assert np.array_equal(read_series(series).array, oracle(series))


def test_files_without_preamble_or_meta_information(tmp_path: Path) -> None:
    for path in write_folder(tmp_path, syntax=ImplicitVRLittleEndian):
        data = path.read_bytes()
        start = data.index(struct.pack("<HHI", 8, 8, 22))  # ImageType, the first element of the data set
        path.write_bytes(data[start:])
    assert np.array_equal(read_only_series(tmp_path).array, chest())


# ---------------------------------------------------------------- any order, any names


NAMES = st.text("abcXYZ019._- äß", min_size=1, max_size=12).map(str.strip)
"""After a letter each of them is a file name."""


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_row_09_any_order_names_and_folders_give_the_same_volume(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("series")
    paths = write_folder(folder / "x")
    order = data.draw(st.permutations(range(9)))
    names = data.draw(st.lists(NAMES, min_size=9, max_size=9, unique_by=str.lower))
    depth = data.draw(st.lists(st.integers(0, 2), min_size=9, max_size=9))
    for path, k, name, below in zip(paths, order, names, depth, strict=True):
        ds = pydicom.dcmread(path)
        ds.InstanceNumber = k
        ds.save_as(path)
        new = folder.joinpath("x", *["sub", "deeper"][:below], f"f{name}")
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    (series,) = find_series(folder).series
    volume = read_series(series)
    assert np.array_equal(volume.array, chest())
    assert volume.geometry == read_again(tmp_path_factory).geometry
    assert series.key == KEY


KEY = "36a6722bb8"
"""Of the synthetic chest: keys in users' notes must not change between versions."""


def read_again(tmp_path_factory) -> Volume:
    folder = tmp_path_factory.mktemp("plain")
    write_folder(folder)
    return read_only_series(folder)


def test_the_key_names_geometry_and_nothing_of_the_patient(tmp_path: Path) -> None:
    def key(name: str, **changes: object) -> str:
        edit = changes.pop("edit", None)
        write_folder(tmp_path / name, edit=edit, **changes)
        (series,) = find_series(tmp_path / name).series
        assert CANARY not in repr(series.facts()) + series.label
        return series.key

    plain = key("plain")
    assert plain == KEY
    assert plain == key("patient", edit=edit_all(PatientID="another", PatientName="x", StudyInstanceUID="1.9"))
    other = [
        key("uid", edit=edit_all(SeriesInstanceUID="1.2.3.5")),
        key("fewer", skip=(8,)),
        key("turned", flips=(False, True, False)),
        key("moved", geometry=Geometry(GRID.shape, GRID.spacing_mm, (-309.0, 12.5, -40.25))),
        key("spacing", geometry=Geometry(GRID.shape, (2.5, 2.2, 2.1), GRID.origin_mm)),
        key("modality", edit=edit_all(Modality="PT")),
    ]
    assert len({plain, *other}) == 7


# ---------------------------------------------------------------- rows 5, 14, 15


def test_row_05_duplicates_with_rounded_positions(tmp_path: Path) -> None:
    def rounded(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [-40.25, 12.5, -310 + 2.5 * k + 0.02]

    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", edit=rounded, skip=(0, 2, 3, 4, 5, 6, 8))
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, chest())
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-3)
    assert volume.notes == ("2 slices were stored twice with the same pixels: one of each was used",)


@pytest.mark.parametrize(("stored", "vr", "tag"), [(-600, "SS", -600), (-600, "US", 64936), (2500, "SS", 2500)])
def test_row_14_padding_around_the_field_of_view_becomes_air(tmp_path: Path, stored: int, vr: str, tag: int) -> None:
    array = chest().astype(np.int32)
    outside = np.zeros(array.shape, bool)
    outside[:, :2, :3] = True

    def pad(ds: Dataset, k: int) -> None:
        values = (array[k] + 1024).astype(np.int16)
        values[outside[k]] = stored
        values[5, 5] = stored  # by chance, inside the image
        ds.PixelData, ds.RescaleIntercept = (values - 0).tobytes(), "-1024"
        ds.add_new("PixelPaddingValue", vr, tag)

    write_folder(tmp_path, edit=pad)
    expected = array.copy()
    expected[:, 5, 5] = max(stored - 1024, -1024)
    expected[outside] = -1024
    assert np.array_equal(read_only_series(tmp_path).array, expected)


def test_row_15_values_that_wrapped_are_told(tmp_path: Path) -> None:
    def unsigned(ds: Dataset, k: int) -> None:  # signed values declared as unsigned: negative ones become huge
        values = np.frombuffer(ds.PixelData, np.int16).copy()
        values[::9] = -(np.arange(len(values[::9])) * 7) - 300
        ds.PixelData, ds.PixelRepresentation = values.tobytes(), 0

    write_folder(tmp_path, edit=unsigned)
    volume = read_only_series(tmp_path)
    assert volume.status == ("clipped",)
    assert any("outside padding" in note for note in volume.notes)
    assert volume.array.max() == 32767


@pytest.mark.parametrize("intercept", ["-900", "-1424"])
def test_row_13_a_slice_whose_own_rescale_does_not_fit_is_refused(tmp_path: Path, intercept: str) -> None:
    def damage(ds: Dataset, k: int) -> None:
        if k == 4:
            ds.RescaleIntercept = intercept

    write_folder(tmp_path, edit=damage)
    with pytest.raises(InputError, match=r"IM0004 has RescaleSlope 1\.0, RescaleIntercept .*damaged header"):
        read_only_series(tmp_path)


def test_row_15_a_slice_of_the_wrong_sign_is_refused(tmp_path: Path) -> None:
    def damage(ds: Dataset, k: int) -> None:
        ds.PixelData = (np.frombuffer(ds.PixelData, np.int16) - 1024).astype(np.int16).tobytes()
        ds.RescaleIntercept, ds.PixelRepresentation = "0", int(k != 8)

    write_folder(tmp_path, edit=damage)
    with pytest.raises(InputError, match=r"IM0008 has .* unsigned pixels, most slices 1\.0, 0\.0 and signed"):
        read_only_series(tmp_path)


def test_row_13_damaged_rescale_in_a_tilted_series(tmp_path: Path) -> None:
    a = np.radians(15.0)

    def damage(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(np.cos(a), 8), round(np.sin(a), 8)]
        if k == 4:
            ds.RescaleIntercept = "-700"

    write_folder(tmp_path, edit=damage)
    with pytest.raises(InputError, match=r"IM0004 has RescaleSlope 1\.0, RescaleIntercept -700"):
        read_only_series(tmp_path, options=ReadOptions(correct_tilt=True))


# ---------------------------------------------------------------- rows 16, 17: compressed pixels


def compressed(folder: Path) -> list[Path]:
    return write_dicom_series(folder, Volume(chest(), GRID), patient_id="P", series_seed="s", compress=True)


def change_frame(path: Path, change) -> None:
    ds = pydicom.dcmread(path)
    frame = change(next(generate_frames(ds.PixelData, number_of_frames=1)))
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda f: f[:12] + struct.pack(">I", 5000) + f[16:], "the compressed image"),
        (lambda f: b"\0" * len(f), "have no image header"),
        (lambda f: f[: len(f) // 3], "cannot be decompressed|copy the file again"),
    ],
)
def test_row_17_damaged_compressed_pixels_are_named(tmp_path: Path, change, phrase: str) -> None:
    change_frame(compressed(tmp_path)[3], change)
    with pytest.raises(InputError, match=rf"003\.dcm: .*({phrase})"):
        read_only_series(tmp_path)


@pytest.mark.parametrize(("rows", "columns"), [(1, 11), (9, 11), (10, 10), (11, 11)])
def test_row_17_rle_pixels_of_another_size_are_refused(tmp_path: Path, rows: int, columns: int) -> None:
    for path in write_folder(tmp_path):
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless, generate_instance_uid=False)
        ds.Rows, ds.Columns = rows, columns
        ds.save_as(path)
    with pytest.raises(InputError, match=rf"its RLE pixels are \d+ values, not {rows} x {columns}"):
        read_only_series(tmp_path)


@given(st.binary(max_size=400))
def test_rle_of_any_bytes_ends_at_its_limit(data: bytes) -> None:
    from lungseg.scan.dicom_pixels import _unpacked

    assert len(_unpacked(data, 300)) <= 300


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000", "JPEGLS"])
def test_compressed_values_beyond_bits_stored_are_not_cut(tmp_path: Path, compressor: str) -> None:
    """The compressed image has 16 bits: with BitsStored 12 a decoder would drop four of them without a word."""
    import SimpleITK as sitk

    stored = np.arange(-2000, 3000, 5000 / 1024).astype(np.int16).reshape(1, 32, 32)
    for name, values in (("wide", stored), ("narrow", stored // 2)):
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(str(tmp_path / f"{name}.dcm"))
        writer.Execute(sitk.GetImageFromArray(values))
        ds = pydicom.dcmread(tmp_path / f"{name}.dcm")
        ds.BitsStored, ds.HighBit = 12, 11
        ds.save_as(tmp_path / f"{name}.dcm")
    with SliceDecoder() as decoder:
        assert np.array_equal(decoder.stored_values(read_header(tmp_path / "narrow.dcm")), stored[0] // 2)
        with pytest.raises(InputError, match="BitsStored is 12, but the values run from -2000 to 29"):
            decoder.stored_values(read_header(tmp_path / "wide.dcm"))


@pytest.mark.parametrize("cut", [10, 100])
def test_row_17_compressed_pixels_without_an_end(tmp_path: Path, cut: int) -> None:
    path = compressed(tmp_path)[3]
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"003\.dcm: truncated"):
        read_only_series(tmp_path)


def test_row_16_syntax_and_pixels_that_contradict_each_other(tmp_path: Path) -> None:
    paths = write_folder(tmp_path / "a")
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    assert "its pixels are not encapsulated, as transfer syntax 1.2.840.10008.1.2.5 RLE Lossless" in refusal(
        tmp_path / "a"
    )
    for path in compressed(tmp_path / "b"):
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.1\0\0\0"))
    (series,) = find_series(tmp_path / "b").series
    assert "its pixels are encapsulated, but its transfer syntax is an uncompressed one" in str(series.problem)


def test_nothing_of_a_scan_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    compressed(tmp_path / "a")
    read_only_series(tmp_path / "a")
    change_frame(tmp_path / "a" / "003.dcm", lambda f: f[: len(f) // 3])
    with pytest.raises(InputError):
        read_only_series(tmp_path / "a")
    assert list((tmp_path / "tmp").iterdir()) == []


# ---------------------------------------------------------------- rows 19, 21, 24; hostile headers


def test_row_19_only_geometry_tags_are_required(tmp_path: Path) -> None:
    keep = {"SOPClassUID", "Modality", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows",
            "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
            "PixelData", "SliceThickness"}  # fmt: skip

    def strip(ds: Dataset, k: int) -> None:
        ds.SOPInstanceUID = ""
        for element in list(ds):
            if element.keyword not in keep | {"SOPInstanceUID"}:
                del ds[element.tag]
        ds.SliceThickness = "" if k % 2 else "99"

    write_folder(tmp_path, edit=strip)
    volume = read_only_series(tmp_path)
    assert np.array_equal(volume.array, chest())
    assert volume.geometry.is_close(GRID, tolerance_voxels=1e-3)


def test_row_21_a_thin_slab_is_accepted(tmp_path: Path) -> None:
    grid = Geometry((10, 10, 11), (2.5, 2.2, 2.0), GRID.origin_mm)
    write_folder(tmp_path, chest(grid.shape), geometry=grid)
    assert read_only_series(tmp_path).array.shape[0] == 10


def test_row_21_more_than_memory_is_refused_before_anything_is_decoded(tmp_path: Path, monkeypatch) -> None:
    write_folder(tmp_path)
    (series,) = find_series(tmp_path).series
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 0 if name == "SC_PHYS_PAGES" else real(name))
    monkeypatch.setattr("lungseg.scan.dicom_pixels.SliceDecoder.stored_values", None)
    with pytest.raises(ResourceError, match="9 x 10 x 11 voxels"):
        read_series(series)


def test_row_21_declared_sizes_that_are_not_there_are_refused_without_memory(tmp_path: Path) -> None:
    for path in compressed(tmp_path):
        ds = pydicom.dcmread(path)
        ds.Rows = ds.Columns = 20_000
        ds.save_as(path)
    with pytest.raises((InputError, ResourceError), match="20000"):
        read_only_series(tmp_path)


def test_row_24_a_dicomdir_and_what_it_names_is_never_opened(tmp_path: Path) -> None:
    write_folder(tmp_path / "scan")
    outside = write_folder(tmp_path / "outside", chest(seed=4))[0]
    listing = Dataset()
    listing.SOPClassUID, listing.SOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3.9"
    record = Dataset()
    record.ReferencedFileID = ["..", "outside", outside.name]
    listing.DirectoryRecordSequence = [record]
    for name in ("DICOMDIR", "dicomdir", "index.dcm"):  # under another name it is no image either
        save(listing, tmp_path / "scan" / name)

    def link(ds: Dataset, k: int) -> None:
        ds.ReferencedFileID = ["..", "outside", outside.name]

    write_folder(tmp_path / "scan", edit=link)
    opened = []
    real_open = Path.open

    def watch(self: Path, *args, **kwargs):
        opened.append(self)
        return real_open(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", watch)
        scan = find_series(tmp_path / "scan")
        volume = read_series(scan.series[0])
    assert np.array_equal(volume.array, chest())
    assert len(scan.series) == 1
    assert {path.parent for path in opened} == {tmp_path / "scan"}
    assert not any(path.name.upper() == "DICOMDIR" for path in opened)


def test_deep_sequences_and_absurd_lengths_are_damage_not_a_crash(tmp_path: Path) -> None:
    paths = write_folder(tmp_path)
    data = paths[0].read_bytes()
    at = data.index(struct.pack("<HH", 0x0008, 0x0060))
    nested = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    paths[0].write_bytes(data[:at] + nested * 5000 + data[at:])
    huge = struct.pack("<HH2sHI", 8, 0x0060, b"UT", 0, 0xFFFFFFF0)
    paths[1].write_bytes(data[:at] + huge + data[at:])
    bomb = struct.pack("<HH2sHI", 0x0009, 0x0010, b"OB", 0, 0x7FFFFFFF)
    paths[2].write_bytes(data[:at] + bomb + data[at:])
    scan = find_series(tmp_path)
    assert {bad.path.name for bad in scan.damaged} == {"IM0000", "IM0001", "IM0002"}
    assert all("truncated or damaged" in bad.reason for bad in scan.damaged)
    assert "in the same folder is" in str(scan.series[0].refusal(ReadOptions(allow_gaps=9)))


def test_a_deflated_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_folder(tmp_path, syntax=DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr("lungseg.scan.dicom_headers.MAX_INFLATED_BYTES", 300)
    scan_error = "inflates to more than"
    with pytest.raises(InputError, match=scan_error):
        find_series(paths[0])


def test_headers_of_many_files_stay_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 23: the pixels of uncompressed files are never read while searching."""
    path = write_folder(tmp_path)[0]
    read = []
    from lungseg.scan import dicom_headers

    real = dicom_headers._dataset

    def watch(stream, *args):
        dataset = real(stream, *args)
        read.append(stream.tell())
        return dataset

    monkeypatch.setattr(dicom_headers, "_dataset", watch)
    assert read_header(path) is not None
    assert read == [path.stat().st_size - 220 - 12]


# ---------------------------------------------------------------- slices that damaged tags put elsewhere


@pytest.mark.parametrize(
    "tags",
    [
        {"SeriesInstanceUID": "1.2.3.44"},
        {"PatientID": "another"},
        {"StudyInstanceUID": "1.2.33"},
        {"Modality": "MR"},
        {"ImageOrientationPatient": [1, 0, 0, 0, -1, 0]},
        {"PixelSpacing": [2.2, 2.4]},
        {"PatientID": "", "ImageOrientationPatient": [1, 0, 0, 0, 0, 0]},
        {"PatientID": "another", "ImagePositionPatient": [1, 2]},
        {"Modality": None, "SOPClassUID": "1.2.x", "Rows": 0, "Columns": 0},
        {"BitsAllocated": 0, "PatientID": "another", "ConvolutionKernel": "B30v"},
        {"Columns": 0, "PatientID": ""},
    ],
    ids=lambda tags: "-".join(tags),
)
@pytest.mark.parametrize("index", [0, 8])
def test_an_end_slice_with_a_damaged_tag_does_not_vanish(tmp_path: Path, tags: dict, index: int) -> None:
    def damage(ds: Dataset, k: int) -> None:
        if k == index:
            edit_all(**tags)(ds, k)

    write_folder(tmp_path, edit=damage)
    (whole,) = [s for s in find_series(tmp_path).series if len(s.slices) == 8]
    assert f"IM000{index}" in str(whole.problem)


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_an_end_slice_without_geometry_does_not_vanish(tmp_path: Path, tag: str) -> None:
    def damage(ds: Dataset, k: int) -> None:
        if k == 8:
            delattr(ds, tag)

    write_folder(tmp_path, edit=damage)
    problems = " ".join(str(s.problem) for s in find_series(tmp_path).series)
    assert tag in problems
    with pytest.raises(InputError):
        choose_series(find_series(tmp_path).series)


@pytest.mark.parametrize("at", [128, 142, 180])
def test_a_file_whose_first_bytes_are_damaged_does_not_vanish(tmp_path: Path, at: int) -> None:
    path = write_folder(tmp_path)[8]
    data = bytearray(path.read_bytes())
    data[at : at + 4] = b"\xff\xfe\xfd\xfc"
    path.write_bytes(data)
    scan = find_series(tmp_path)
    assert all("IM0008" in str(s.problem) for s in scan.series if len(s.slices) == 8)


@pytest.mark.parametrize(("low", "high"), [(0, 1100), (30000, 32767), (2000, 2001)])
def test_a_slice_of_noise_is_refused(tmp_path: Path, low: int, high: int) -> None:
    def noise(ds: Dataset, k: int) -> None:
        if k == 5:
            ds.PixelData = np.random.default_rng(0).integers(low, high, 110).astype(np.int16).tobytes()

    write_folder(tmp_path, edit=noise)
    with pytest.raises(InputError, match="the image in IM0005 is unlike the slices next to it"):
        read_only_series(tmp_path)


def test_single_images_elsewhere_do_not_disturb_a_series(tmp_path: Path) -> None:
    """Bolus tracking leaves single slices inside or beside the range of a scan, at places of their own."""

    def monitor(ds: Dataset, k: int) -> None:
        ds.SeriesInstanceUID = "1.2.3.7"
        ds.ImagePositionPatient = [-40.25, 12.5, -310 + 9 * 2.5 + 1.1]

    write_folder(tmp_path)
    write_folder(tmp_path / "b", edit=monitor, skip=tuple(range(1, 9)))
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / f"monitor-{path.name}")
    choice = choose_series(find_series(tmp_path).series)
    assert np.array_equal(read_series(choice.chosen).array, chest())

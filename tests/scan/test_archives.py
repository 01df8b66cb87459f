"""Zip archives as input: what is in them is read as if it lay in a folder; what could do harm is refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import shutil
import stat
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_sources import GRID, dicom, manifest, nifti, volume

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError, ResourceError
from lungseg.scan import archives
from lungseg.scan.archives import list_members, local_files, packed_kind, taken_out
from lungseg.scan.nifti import write_image
from lungseg.scan.sources import find_sources, locations, read_manifest, search


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever a test does, nothing may be left in the temporary folder."""
    folder = tmp_path / "system-temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def pack(folder: Path, archive: Path, *, method: int = zipfile.ZIP_DEFLATED, prefix: str = "") -> Path:
    """All files of a folder, in the order of their names."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", method) as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, prefix + str(file.relative_to(folder)))
    return archive


def made(archive: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return archive


# ---- what is in an archive is read


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("inside_folder", [False, True])
def test_an_archive_reads_as_its_folder_does(tmp_path: Path, method: int, inside_folder: bool) -> None:
    folder = dicom(tmp_path / "scan" / "a" / "b").parents[1]
    archive = pack(folder, tmp_path / "cohort" / "scan.zip", method=method)
    (plain,) = find_sources([folder])
    (packed,) = find_sources([archive.parent if inside_folder else archive])
    assert packed.problem == ""
    assert packed.key() == plain.key() != ""
    assert packed.series is not None
    assert plain.series is not None
    assert packed.series.key == plain.series.key
    assert packed.archives == (archive,)
    assert [file.relative_to(archive) for file in packed.series.files] == [
        file.relative_to(folder) for file in plain.series.files
    ]
    np.testing.assert_array_equal(packed.read().array, plain.read().array)
    assert packed.read().geometry == plain.read().geometry
    assert locations([packed]) == [archive.resolve() / "a" / "b"]
    again = pickle.loads(pickle.dumps(packed))  # as a worker process gets it
    np.testing.assert_array_equal(again.read().array, plain.read().array)


@pytest.mark.parametrize("name", ["a.nii.gz", "sub/b.NRRD", "c.mha", "x" * 240 + ".nii.gz", "Ünï çode/d e.nii"])
def test_image_files_in_an_archive_are_scans(tmp_path: Path, name: str) -> None:
    image = nifti(tmp_path / "a.nii.gz")
    content = image.read_bytes()
    if not name.endswith(".gz"):
        import SimpleITK as sitk

        other = tmp_path / f"other{Path(name).suffix.lower()}"
        sitk.WriteImage(sitk.ReadImage(str(image)), str(other))
        content = other.read_bytes()
    archive = tmp_path / "images.zip"
    made(archive, **{name: content, "readme.txt": b"text", "._a.nii.gz": b"\0\5\x16\7", "__MACOSX/a.nii.gz": b"x"})
    found = search([archive])
    (source,) = found.sources
    assert (source.series, source.problem, source.key()) == (None, "", "")
    assert archive in source.path.parents
    assert (found.looked_at, found.skipped, found.archives) == (2, 1, 1)
    np.testing.assert_array_equal(source.read().array, volume().array)


def test_dicom_and_images_in_one_archive_and_a_folder_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    dicom(tmp_path / "one" / "ct", patient="p", study="x", series="1")
    nifti(tmp_path / "one" / "scan.nii.gz", 3)
    pack(tmp_path / "one", root / "one.zip")
    dicom(root / "two", patient="q", study="y", series="2", seed=1)
    sources = find_sources([root])
    assert [(s.series is None, s.patient_id, s.problem) for s in sources] == [
        (True, "", ""), (False, "p", ""), (False, "q", ""),
    ]  # fmt: skip
    for source, seed in zip(sources, (3, 0, 1), strict=True):
        np.testing.assert_array_equal(source.read().array, volume(seed).array)


@pytest.mark.parametrize("together", [False, True])
def test_series_of_one_study_in_two_archives_are_one_case(tmp_path: Path, together: bool) -> None:
    soft = pack(dicom(tmp_path / "1", study="x", series="1"), tmp_path / "in" / "soft.zip")
    sharp = pack(dicom(tmp_path / "2", study="x", series="2", kernel="B70f"), tmp_path / "in" / "sharp.zip")
    (source,) = find_sources([tmp_path / "in"] if together else [sharp, soft])
    assert source.archives == (sharp, soft)
    assert [candidate.chosen for candidate in source.candidates] == [True, False]
    assert source.series is not None
    assert all(soft in file.parents for file in source.series.files)
    assert len(source.others) == 1
    np.testing.assert_array_equal(source.read().array, volume().array)


def test_slices_of_one_series_in_two_archives_below_one_folder(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan")
    (tmp_path / "rest").mkdir()
    for file in sorted(folder.iterdir())[::2]:
        file.rename(tmp_path / "rest" / file.name)
    for name in ("scan", "rest"):
        pack(tmp_path / name, tmp_path / "in" / f"{name}.zip")
    (source,) = find_sources([tmp_path / "in"])
    np.testing.assert_array_equal(source.read().array, volume().array)
    (apart,) = find_sources(sorted((tmp_path / "in").iterdir()))
    assert "the folder above both" in apart.problem


def test_an_archive_and_its_unpacked_folder_are_one_scan(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "in" / "scan")
    archive = pack(folder, tmp_path / "in" / "scan.zip")
    (source,) = find_sources([tmp_path / "in"])
    read = source.read()
    np.testing.assert_array_equal(read.array, volume().array)
    assert any("twice" in note for note in read.notes)
    (apart,) = find_sources([folder, archive])
    assert "give one of the two" in apart.problem


def test_an_archive_reached_by_several_paths_counts_once(tmp_path: Path) -> None:
    archive = pack(dicom(tmp_path / "scan"), tmp_path / "in" / "scan.zip")
    (tmp_path / "link.zip").symlink_to(archive)
    for paths in ([archive, archive], [tmp_path / "in", archive], [tmp_path / "link.zip", tmp_path / "in"]):
        (source,) = find_sources(paths)
        np.testing.assert_array_equal(source.read().array, volume().array)


def test_a_manifest_names_archives_and_series_in_them(tmp_path: Path) -> None:
    for number in "12":
        dicom(tmp_path / "d" / number, study="x", series=number, seed=int(number))
    archive = pack(tmp_path / "d", tmp_path / "d.zip")
    keys = {c.series.key: c.series.files[0].parent.name for c in find_sources([archive])[0].candidates}
    rows = "".join(f"d.zip,{key},case-{number}\n" for key, number in keys.items())
    for source in read_manifest(manifest(tmp_path, "path,series,case_id\n" + rows)):
        np.testing.assert_array_equal(source.read().array, volume(int(source.case_id[-1])).array)


def test_members_of_one_name_and_with_backslashes_are_all_read(tmp_path: Path) -> None:
    """Tools that drop folders on packing give many slices one name."""
    archive = tmp_path / "flat.zip"
    with zipfile.ZipFile(archive, "w") as packed, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile tells of the doubled name
        for file in sorted(dicom(tmp_path / "scan").iterdir()):
            packed.writestr("export\\IM.dcm", file.read_bytes())
    assert len({member.path for member in list_members(archive)}) == GRID.shape[0]
    (source,) = find_sources([archive])
    np.testing.assert_array_equal(source.read().array, volume().array)
    assert find_sources([archive]) == [source]


def test_row_24_dicomdir_in_an_archive_is_ignored(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan")
    shutil.copy(next(folder.iterdir()), folder / "DICOMDIR")
    found = search([pack(folder, tmp_path / "scan.zip")])
    assert found.skipped == 1
    assert found.sources[0].series is not None
    assert len(found.sources[0].series.files) == GRID.shape[0]


def test_disk_stays_bounded_by_one_member_while_headers_are_read(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        pack(dicom(tmp_path / str(number), patient=str(number), series=str(number)), tmp_path / "in" / f"{number}.zip")
    most = []
    from lungseg.scan import discovery

    real = discovery.read_header

    def read_header(path: Path) -> object:
        most.append(sum(1 for file in temporary.rglob("*") if file.is_file()))
        assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in temporary.iterdir())
        assert path.name == "000001.dcm"
        return real(path)

    monkeypatch.setattr(discovery, "read_header", read_header)
    assert len(find_sources([tmp_path / "in"])) == 3
    assert set(most) == {1}


def test_only_the_members_of_the_chosen_series_are_taken_out_to_read(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        dicom(tmp_path / "d" / str(number), patient=str(number), series=str(number))
    sources = find_sources([pack(tmp_path / "d", tmp_path / "d.zip")])
    from lungseg.scan import sources as module

    real = module.read_series

    def read_series(series: object, options: ReadOptions) -> object:
        names = sorted(file.name for folder in temporary.iterdir() for file in folder.iterdir())
        assert names == [f"{i:06d}.dcm" for i in range(1, GRID.shape[0] + 1)]
        return real(series, options)

    monkeypatch.setattr(module, "read_series", read_series)
    for source in sources:
        source.read()


# ---- what is not right is refused


def test_damaged_archive_is_a_problem_of_its_own(tmp_path: Path) -> None:
    good = nifti(tmp_path / "in" / "a.nii.gz")
    archive = pack(dicom(tmp_path / "scan"), tmp_path / "in" / "b.zip")
    whole = archive.read_bytes()
    for content in (b"", b"PK", b"PK\3\4", whole[: len(whole) // 2], whole[:-30], b"text", b"\0" * 1000):
        archive.write_bytes(content)
        image, bad = find_sources([tmp_path / "in"])
        assert (image.path, image.problem) == (good, "")
        assert bad.path == archive
        assert str(archive) in bad.problem
        with pytest.raises(InputError) as caught:
            bad.read()
        assert caught.value.exit_code == 3


def test_row_17_damaged_member_refuses_its_series_only(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "d" / "bad", patient="a", series="1")
    dicom(tmp_path / "d" / "good", patient="b", series="2")
    victim = sorted(folder.iterdir())[3]
    archive = pack(tmp_path / "d", tmp_path / "d.zip", method=zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    at = content.index(victim.read_bytes())
    content[at + 700] ^= 0xFF  # the checksum of the member gives it away
    archive.write_bytes(content)
    bad, good = find_sources([archive])
    assert f"{victim.name} in the same folder is damaged in its archive" in bad.problem
    assert victim.name not in bad.hide(bad.problem)
    assert good.problem == ""


@pytest.mark.parametrize(
    "name", ["../evil.dcm", "a/../../evil.dcm", "/etc/evil.dcm", "\\evil.dcm", "C:\\evil.dcm", "C:/evil.dcm", "..",
             "a\\..\\..\\evil.dcm"],
)  # fmt: skip
def test_security_2_names_that_lead_out(tmp_path: Path, name: str) -> None:
    archive = made(tmp_path / "a.zip", **{"fine.txt": b"text", name: b"x"})
    with pytest.raises(InputError, match=r"a\.zip: entry 2 has a name that leads out") as caught:
        list_members(archive)
    assert caught.value.exit_code == 3
    (source,) = find_sources([archive])
    assert "leads out of its folder" in source.problem
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_security_2_links_and_devices(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("scan.nii.gz")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr(info, b"/etc/passwd")
    with pytest.raises(InputError, match="is a link or device"):
        list_members(tmp_path / "a.zip")


def test_security_2_encrypted(tmp_path: Path) -> None:
    archive = made(tmp_path / "a.zip", **{"a.nii.gz": b"x"})
    content = bytearray(archive.read_bytes())
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(magic) + offset] |= 1
    archive.write_bytes(content)
    (source,) = find_sources([archive])
    assert "encrypted: unpack the archive with its password" in source.problem


def test_security_2_ratio_is_bounded_by_what_comes_out(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "ALLOWANCE_BYTES", 1 << 20)
    bomb = b"\0" * 128 + b"DICM" + b"\0" * (4 << 20)  # 1000 : 1
    honest = made(tmp_path / "a.zip", bomb=bomb)
    with pytest.raises(InputError, match="more than 100 times its size"):
        list_members(honest)
    lying = bytearray(honest.read_bytes())  # says that it is small: no more than that ever comes out
    struct.pack_into("<I", lying, lying.index(b"PK\1\2") + 24, 2000)
    struct.pack_into("<I", lying, lying.index(b"PK\3\4") + 22, 2000)
    (tmp_path / "b.zip").write_bytes(lying)
    with taken_out(tmp_path / "b.zip") as members:
        assert [path for _, path in members] == [None]
    assert "no readable DICOM image" in find_sources([tmp_path / "b.zip"])[0].problem


def test_security_2_entries_that_share_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifield 2019: every entry is small against its compressed size, all of them together are not."""
    monkeypatch.setattr(archives, "ALLOWANCE_BYTES", 1 << 20)
    kernel = made(tmp_path / "kernel.zip", a=b"\0" * 128 + b"DICM" + random.Random(0).randbytes(20_000)).read_bytes()
    start, directory = kernel.index(b"PK\1\2"), kernel.index(b"PK\5\6")
    record, end = kernel[start:directory], bytearray(kernel[directory:])
    count = 3000
    struct.pack_into("<HHI", end, 8, count, count, len(record) * count)
    (tmp_path / "bomb.zip").write_bytes(kernel[:start] + record * count + end)
    with pytest.raises(InputError, match="more than 100 times"):
        list_members(tmp_path / "bomb.zip")


def test_security_2_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = made(tmp_path / "a.zip", **{f"{i}.txt": b"" for i in range(6)})
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    with pytest.raises(InputError, match="more than 5 entries"):
        list_members(archive)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 6)
    assert len(list_members(archive)) == 6
    monkeypatch.setattr(archives, "MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(InputError, match="more than 6 entries"):
        list_members(archive)


def test_security_2_zip64_directory_is_checked_before_it_is_parsed(tmp_path: Path) -> None:
    """A directory of 4 GiB that is declared in the zip64 record."""
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 10**8, 10**8, 1 << 32, 0)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, 0, 1)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "a.zip").write_bytes(record + locator + end)
    with pytest.raises(InputError, match="more than 200000 entries"):
        list_members(tmp_path / "a.zip")


def test_security_2_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(dicom(tmp_path / "scan"), tmp_path / "scan.zip")
    (source,) = find_sources([archive])
    usage = shutil._ntuple_diskusage(10**12, 10**12, archives.RESERVE_BYTES + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="make room, or set TMPDIR") as caught:
        source.read()
    assert caught.value.exit_code == 5
    (full,) = find_sources([archive])
    assert "make room" in full.problem


def test_a_method_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    archive = made(tmp_path / "a.zip", **{"a.nii.gz": b"some text"})
    content = bytearray(archive.read_bytes())
    for magic, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        struct.pack_into("<H", content, content.index(magic) + offset, 9)  # Deflate64
    archive.write_bytes(content)
    (source,) = find_sources([archive])
    with pytest.raises(InputError, match="packed in a way that cannot be read"):
        source.read()


def test_nested_archives_are_counted_and_told_but_not_opened(tmp_path: Path) -> None:
    inner = pack(dicom(tmp_path / "scan"), tmp_path / "inner.zip").read_bytes()
    archive = pack(dicom(tmp_path / "good", patient="q", series="q"), tmp_path / "outer.zip")
    with zipfile.ZipFile(archive, "a") as packed:
        for name in ("p1.zip", "sub/p2", "p3.tar.gz"):
            packed.writestr(name, inner if "tar" not in name else gzip.compress(b"x"))
        packed.writestr("manual.docx", inner)
    problem, good = sorted(find_sources([archive]), key=lambda source: source.problem, reverse=True)
    assert "holds 3 archives that were not opened: unpack it" in problem.problem
    assert good.problem == ""
    assert good.patient_id == "q"


def test_archives_without_scans_beside_scans_are_skipped(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    made(tmp_path / "code.zip", **{"main.py": b"print()", "empty.txt": b""})
    made(tmp_path / "report.docx", **{"[Content_Types].xml": b"x"})
    found = search([tmp_path])
    assert [source.problem for source in found.sources] == [""]
    assert found.skipped == 3
    assert found.notes == (
        "1 zip archives looked into",
        "3 files skipped that are neither DICOM images nor image files",
    )
    (alone,) = find_sources([tmp_path / "code.zip"])
    assert "no readable DICOM image among the 2 files looked at" in alone.problem


def tar(mode: str) -> Callable[[Path], bytes]:
    def content(file: Path) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=mode) as packed:
            packed.add(file, "scan.nii")
        return stream.getvalue()

    return content


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.tar", tar("w"), "tar"),
        ("a", tar("w"), "tar"),
        ("a.tar.gz", tar("w:gz"), "tar.gz"),
        ("a.tgz", tar("w:gz"), "tar.gz"),
        ("cohort", tar("w:gz"), "tar.gz"),
        ("a.tar.bz2", tar("w:bz2"), "tar.bz2"),
        ("a.tar.xz", tar("w:xz"), "tar.xz"),
        ("a.7z", lambda _: b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
        ("a.bin", lambda _: b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
        ("a.rar", lambda _: b"Rar!\x1a\x07\x01\0", "rar"),
    ],
)
def test_other_archives_are_named_and_not_opened(
    tmp_path: Path, name: str, content: Callable[[Path], bytes], kind: str
) -> None:
    image = nifti(tmp_path / "in" / "scan.nii.gz")
    (tmp_path / "in" / name).write_bytes(content(image))
    sources = find_sources([tmp_path / "in"])
    (problem,) = [source for source in sources if source.problem]
    assert f"a {kind} archive is not opened: unpack it first" in problem.problem
    assert len(sources) == 2


def test_gzip_compressed_slices_are_told(tmp_path: Path) -> None:
    for file in sorted(dicom(tmp_path / "scan").iterdir())[:2]:
        (tmp_path / "scan" / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    problems = [source.problem for source in find_sources([tmp_path / "scan"]) if source.problem]
    assert len(problems) == 2  # and the rest of the series, which is too short now
    assert "2 gz-compressed DICOM files are not opened" in problems[0]


def test_kind_by_first_bytes() -> None:
    polyglot = b"PK\3\4" + b"\0" * 124 + b"DICM"
    assert packed_kind(Path("a"), polyglot) is None  # a preamble may hold anything
    assert packed_kind(Path("a.zip"), polyglot) is None
    assert packed_kind(Path("a"), b"PK\3\4") == "zip"
    assert packed_kind(Path("a.ZIP"), b"") == "zip"
    assert packed_kind(Path("a.xlsx"), b"PK\3\4") is None
    assert packed_kind(Path("a.gz"), gzip.compress(b"text" * 200)) is None
    assert packed_kind(Path("a.gz"), b"\x1f\x8b\x08text") is None
    assert packed_kind(Path("a.txt"), b"text") is None


# ---- temporary folders


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, InputError("no")])
def test_security_8_a_read_that_breaks_off_leaves_nothing(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (source,) = find_sources([pack(dicom(tmp_path / "scan"), tmp_path / "scan.zip")])
    seen = []

    def broken(*_: object) -> None:
        seen.extend(temporary.iterdir())
        raise error

    monkeypatch.setattr("lungseg.scan.sources.read_series", broken)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        source.read()
    assert len(seen) == 1  # the fixture sees that it is gone


def test_no_temporary_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = find_sources([pack(dicom(tmp_path / "scan"), tmp_path / "scan.zip")])
    before = tempfile.tempdir
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="no temporary folder can be made"):
        source.read()
    monkeypatch.setattr(tempfile, "tempdir", before)


def test_errors_name_the_member_and_not_the_temporary_file(tmp_path: Path, temporary: Path) -> None:
    archive = made(tmp_path / "a.zip", **{"sub/scan of Z.nii.gz": b"\x1f\x8b garbage"})
    (source,) = find_sources([archive])
    with pytest.raises(InputError) as caught:
        source.read()
    assert str(archive / "sub" / "scan of Z.nii.gz") in str(caught.value)
    assert str(temporary) not in str(caught.value)
    assert "scan of Z" not in source.hide(str(caught.value))
    file = tmp_path / "plain.nii.gz"
    file.write_bytes(b"x")
    with local_files([file], []) as real:
        assert real == {file: file}


def test_an_archive_that_has_changed_since(tmp_path: Path) -> None:
    archive = pack(dicom(tmp_path / "scan"), tmp_path / "scan.zip")
    (source,) = find_sources([archive])
    made(archive, other=b"x")
    with pytest.raises(InputError, match="has changed since"):
        source.read()
    with pytest.raises(InputError, match="has changed since"):
        source.key()
    archive.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        source.read()


def test_damaged_archives_of_every_kind_raise_input_errors_only(tmp_path: Path) -> None:
    """Bytes changed and cut at random: a clear refusal, or the right members."""
    rng = random.Random(0)
    write_image(tmp_path / "a.nii.gz", np.zeros((4, 4, 4), np.int16), GRID.crop((0, 0, 0), (4, 4, 4)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "IM1.dcm").write_bytes(sorted(dicom(tmp_path / "scan").iterdir())[0].read_bytes())
    shutil.copy(tmp_path / "a.nii.gz", tmp_path / "d" / "a.nii.gz")
    refused = 0
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        whole = pack(tmp_path / "d", tmp_path / "whole.zip", method=method).read_bytes()
        directory = whole.index(b"PK\1\2")
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(rng.choice((1, 1, 3, 10))):
                at = rng.randrange(directory, len(content)) if rng.random() < 0.7 else rng.randrange(len(content))
                content[at] = rng.randrange(256)
            if rng.random() < 0.2:
                del content[rng.randrange(len(content)) :]
            (tmp_path / "m.zip").write_bytes(content)
            try:
                with taken_out(tmp_path / "m.zip") as members:
                    for member, file in members:
                        assert tmp_path / "m.zip" in member.path.parents
                        assert file is None or file.stat().st_size <= max(member.size, 1)
            except (InputError, ResourceError):
                refused += 1
    assert refused > 60
    assert os.listdir(tmp_path / "system-temp") == []

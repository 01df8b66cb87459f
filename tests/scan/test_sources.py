"""Which files form a case: folders, files and manifests become scans, one patient's each; nothing is lost silently."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lungseg.errors import InputError
from lungseg.scan.dicom import write_dicom_series
from lungseg.scan.nifti import write_image
from lungseg.scan.sources import Source, find_sources, locations, read_manifest, voxel_digest
from lungseg.scan.volume import Geometry, Volume

GRID = Geometry((9, 10, 11), (2.5, 2.2, 2.0), (-310.0, 12.5, -40.25))


def volume(seed: int = 0, grid: Geometry = GRID) -> Volume:
    values = np.random.default_rng(seed).normal(-850, 60, grid.shape)
    values[:, : grid.shape[1] // 2] += 890
    return Volume(np.rint(values).clip(-1024, 3071).astype(np.int16), grid)


def nifti(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, volume(seed).array, GRID)
    return path


def dicom(folder: Path, *, patient: str = "p", series: str = "s", study: str | None = None, grid: Geometry = GRID,
          kernel: str = "B30f", seed: int = 0) -> Path:  # fmt: skip
    write_dicom_series(
        folder,
        volume(seed, grid),
        patient_id=patient,
        series_seed=series,
        study_seed=study,
        kernel=kernel,
        compress=False,
    )
    return folder


def names(sources: list[Source]) -> list[str]:
    return [source.path.name for source in sources]


def test_no_scans_at_all() -> None:
    with pytest.raises(InputError, match="no scans given"):
        find_sources([])


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder") as caught:
        find_sources([nifti(tmp_path / "a.nii.gz"), tmp_path / "none"])
    assert caught.value.exit_code == 3


def test_image_files_in_the_order_given(tmp_path: Path) -> None:
    b, a = nifti(tmp_path / "b.nii.gz", 1), nifti(tmp_path / "a.nii.gz", 2)
    sources = find_sources([b, a])
    assert names(sources) == ["b.nii.gz", "a.nii.gz"]
    np.testing.assert_array_equal(sources[0].read().array, volume(1).array)
    assert sources[0].key() == ""


def test_folder_of_images_is_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii.gz", "sub/c.NII.GZ", "sub/d.nrrd", "e.mha"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(find_sources([tmp_path])) == ["a.nii.gz", "b.nii.gz", "e.mha", "c.NII.GZ", "d.nrrd"]


STRANGERS = [
    "README.md",
    "README",
    "LICENSE",
    "table.csv",
    "notes.txt",
    ".DS_Store",
    "Thumbs.db",
    "figure.png",
    "a.xyz",
]


@pytest.mark.parametrize("content", [b"", b"some text\n", bytes(range(256)) * 4])
def test_other_files_beside_images_are_no_failed_case(tmp_path: Path, content: bytes) -> None:
    nifti(tmp_path / "a.nii.gz")
    for name in STRANGERS:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "README").write_bytes(content)
    sources = find_sources([tmp_path])
    assert names(sources) == ["a.nii.gz"]
    assert sources[0].problem == ""


def test_what_macos_and_killed_runs_leave_is_no_scan(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    (tmp_path / "._a.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".a.123.partial.nii.gz").write_bytes(b"\x1f\x8b")
    assert names(find_sources([tmp_path])) == ["a.nii.gz"]


@pytest.mark.parametrize(("shape", "words"), [((5, 30, 30), "only 5 slices"), ((30, 30, 1), "only 1 slice covering")])
def test_row_21_an_image_file_needs_the_extent_of_a_scan(
    tmp_path: Path, shape: tuple[int, int, int], words: str
) -> None:
    path = tmp_path / "slab.nii.gz"
    write_image(path, volume(grid=Geometry(shape, (5.0, 2.0, 2.0))).array, Geometry(shape, (5.0, 2.0, 2.0)))
    (source,) = find_sources([path])
    with pytest.raises(InputError, match=f"{words}.*at least 6 slices and 20 mm"):
        source.read()


def test_images_and_dicom_in_one_folder_are_both_found(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    dicom(tmp_path / "scan")
    sources = find_sources([tmp_path])
    assert [source.series is None for source in sources] == [True, False]
    assert [source.problem for source in sources] == ["", ""]
    np.testing.assert_array_equal(sources[1].read().array, volume().array)


def test_damaged_dicom_beside_images_is_told(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    file = sorted(dicom(tmp_path / "scan").iterdir())[0]
    for other in (tmp_path / "scan").iterdir():
        if other != file:
            other.unlink()
    file.write_bytes(file.read_bytes()[:300])
    sources = find_sources([tmp_path])
    assert [bool(source.problem) for source in sources] == [False, True]
    with pytest.raises(InputError, match="no readable DICOM image"):
        sources[1].read()


@pytest.mark.parametrize("content", [None, b"text"])
def test_row_1_folder_without_a_scan_is_listed_with_its_problem(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "empty" / "thesis.doc").write_bytes(content)
    good = nifti(tmp_path / "a.nii.gz")
    sources = find_sources([tmp_path / "empty", good])
    assert "no readable DICOM image among the" in sources[0].problem
    assert sources[1].problem == ""  # the others go on


def test_row_3_one_case_per_study_with_its_best_series(tmp_path: Path) -> None:
    thick = Geometry((9, 10, 11), (5.0, 2.2, 2.0))
    dicom(tmp_path / "p1" / "thin-sharp", patient="p1", study="x", series="1", kernel="B70f")
    dicom(tmp_path / "p1" / "thin-soft", patient="p1", study="x", series="2", kernel="B30f")
    dicom(tmp_path / "p1" / "thick", patient="p1", study="x", series="3", grid=thick)
    dicom(tmp_path / "p1" / "later", patient="p1", study="y", series="4")
    dicom(tmp_path / "p2", patient="p2", study="z", series="5")
    sources = find_sources([tmp_path])
    assert [source.patient_id for source in sources] == ["p1", "p1", "p2"]
    assert sorted(len(source.others) for source in sources) == [0, 0, 2]
    study = next(source for source in sources if source.others)
    assert study.series is not None
    assert {file.parent.name for file in study.series.files} == {"thin-soft"}
    assert all("not used: " in text and str(tmp_path) not in text for text in study.others)
    assert len({source.key() for source in sources}) == 3
    assert find_sources([tmp_path]) == sources


def test_row_3_patients_are_not_mixed_by_a_shared_study_uid(tmp_path: Path) -> None:
    dicom(tmp_path / "a", patient="p1", study="same", series="1")
    dicom(tmp_path / "b", patient="p2", study="same", series="2")
    assert [source.patient_id for source in find_sources([tmp_path])] == ["p1", "p2"]


def test_study_without_a_usable_series_is_told_and_keeps_its_patient(tmp_path: Path) -> None:
    dicom(tmp_path / "slab", patient="p1", grid=Geometry((4, 10, 11), (2.5, 2.2, 2.0)))
    dicom(tmp_path / "good", patient="p2", series="2")
    bad, good = find_sources([tmp_path])
    assert bad.patient_id == "p1"
    assert "no series of this study can be read" in bad.problem
    assert good.problem == ""
    with pytest.raises(InputError, match="no series of this study"):
        bad.read()


def test_row_23_link_back_to_the_folder_ends(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(find_sources([tmp_path])) == ["a.nii.gz"]


def test_row_23_linked_folder_is_searched(tmp_path: Path) -> None:
    nifti(tmp_path / "elsewhere" / "a.nii.gz")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "link").symlink_to(tmp_path / "elsewhere")
    assert names(find_sources([tmp_path / "scans"])) == ["a.nii.gz"]


def test_row_23_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on; the message has the reason of the system."""
    nifti(tmp_path / "fine" / "a.nii.gz")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    fine, closed = find_sources([tmp_path])
    assert fine.problem == ""
    assert closed.path == tmp_path / "closed"
    assert "cannot be listed (errno 13: Permission denied)" in closed.problem
    with pytest.raises(InputError) as caught:
        closed.read()
    assert caught.value.exit_code == 3


def test_key_changes_with_the_files_of_a_series(tmp_path: Path) -> None:
    (source,) = find_sources([dicom(tmp_path / "scan")])
    before = source.key()
    sorted((tmp_path / "scan").iterdir())[-1].unlink()
    (after,) = find_sources([tmp_path / "scan"])
    assert before != after.key()
    assert after.series is not None
    assert before.split("/")[0] == after.key().split("/")[0] == after.series.series_uid


def test_voxel_digest_tells_voxels_and_grid(tmp_path: Path) -> None:
    one = volume(1)
    digests = {
        voxel_digest(one),
        voxel_digest(volume(2)),
        voxel_digest(Volume(one.array, replace(GRID, origin_mm=(0.0, 0.0, 1.0)))),
    }
    assert len(digests) == 3
    assert voxel_digest(volume(1)) in digests
    path = tmp_path / "a.nii.gz"  # the same scan stored with other axes is the same scan
    write_image(path, one.array, GRID, stored_axes=(2, 0, 1), stored_flips=(True, False, True))
    (source,) = find_sources([path])
    read = source.read()
    np.testing.assert_array_equal(read.array, one.array)
    assert len(voxel_digest(read)) == 32


# ---- manifests


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cases.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_manifest_says_everything(tmp_path: Path) -> None:
    nifti(tmp_path / "scans" / "a.nii.gz")
    nifti(tmp_path / "b, c.nii.gz", 1)
    dicom(tmp_path / "dicom", patient="header")
    path = manifest(
        tmp_path,
        "path,case_id,patient_id,split,reference,inspiration\n"
        "scans/a.nii.gz, case-1 ,p1,train,labels/a.nii.gz,inspiration\n"
        '"b, c.nii.gz",case-2,p1,test,,expiration\n'
        "\n"
        "dicom,,,,,\n",
    )
    first, second, third = read_manifest(path)
    assert first.path == tmp_path / "scans/a.nii.gz"
    assert (first.case_id, first.given_patient_id) == ("case-1", "p1")
    assert (first.split, first.inspiration) == ("train", "inspiration")
    assert first.reference == tmp_path / "labels/a.nii.gz"
    assert (second.case_id, second.split, second.inspiration, second.reference) == (
        "case-2",
        "test",
        "expiration",
        None,
    )
    np.testing.assert_array_equal(second.read().array, volume(1).array)
    assert third.series is not None
    # a tag of the header never counts as the manifest's own: it would be written unhashed
    assert (third.case_id, third.given_patient_id, third.patient_id) == ("", "", "header")


def test_manifest_with_only_paths_and_absolute_ones(tmp_path: Path) -> None:
    a = nifti(tmp_path / "elsewhere" / "a.nii.gz")
    (tmp_path / "lists").mkdir()
    path = manifest(tmp_path / "lists", f"\ufeffpath\n{a}\n../elsewhere/a.nii.gz\n")
    assert [source.path.resolve() for source in read_manifest(path)] == [a, a]


def test_manifest_restricted_by_given_scans(tmp_path: Path) -> None:
    for name in ("one/a.nii.gz", "one/b.nii.gz", "one-more/c.nii.gz"):
        nifti(tmp_path / name)
    path = manifest(tmp_path, "path,case_id\none/a.nii.gz,x\none/b.nii.gz,y\none-more/c.nii.gz,x\n")
    assert [s.case_id for s in read_manifest(path, [tmp_path / "one"])] == ["x", "y"]
    assert [s.case_id for s in read_manifest(path, [tmp_path / "one" / ".." / "one" / "b.nii.gz"])] == ["y"]
    assert [s.path.name for s in read_manifest(path, [tmp_path / "one-more"])] == ["c.nii.gz"]
    with pytest.raises(InputError, match="case_id x appears more than once"):
        read_manifest(path)
    with pytest.raises(InputError, match="lists no scan below the given paths"):
        read_manifest(path, [tmp_path / "two"])


def test_manifest_chooses_a_series(tmp_path: Path) -> None:
    dicom(tmp_path / "d" / "1", study="x", series="1")
    dicom(tmp_path / "d" / "2", study="x", series="2", kernel="B70f")
    uids = {s.name: find_sources([s])[0].series.series_uid for s in (tmp_path / "d").iterdir()}  # type: ignore[union-attr]
    path = manifest(tmp_path, f"path,series\nd,{uids['2']}\nd,1.2.3\nd,\nnone,1.2.3\n")
    chosen, unknown, best, absent = read_manifest(path)
    assert chosen.series is not None
    assert chosen.series.series_uid == uids["2"]
    assert "line 3: " in unknown.problem
    assert "series '1.2.3' was not found" in unknown.problem
    assert all(key in unknown.problem for key in {one.series.key for one in best.candidates})
    assert best.series is not None
    assert best.series.series_uid == uids["1"]
    assert len(best.others) == 1
    assert "does not exist" in absent.problem
    (tmp_path / "a.nii.gz").write_bytes(b"")
    (image,) = read_manifest(manifest(tmp_path, "path,series\na.nii.gz,1.2.3\n"))
    assert "line 2" in image.problem


def test_manifest_row_that_names_several_scans(tmp_path: Path) -> None:
    dicom(tmp_path / "d" / "1", study="x", series="1")
    dicom(tmp_path / "d" / "2", study="y", series="2")
    (source,) = read_manifest(manifest(tmp_path, "path\nd\n"))
    assert "line 2: " in source.problem
    assert "holds 2 scans; name one file, folder or series" in source.problem


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("path,case_id,pateint_id\na,b,c\n", r"unknown columns pateint_id; the columns are path, series, case_id"),
        ("case_id\na\n", "no column 'path'"),
        ("", "no column 'path'"),
        ("path\n", "lists no scan"),
        ("path,case_id\n,x\n", "line 2: the path is empty"),
        ("path,case_id\na.nii.gz,x\n\n\n ,y\n", "line 5: the path is empty"),
        ("path,split\na.nii.gz,train\na.nii.gz,trian\n", "line 3: split 'trian' is not one of train, val, test"),
        ("path,inspiration\na.nii.gz,full\n", "line 2: inspiration 'full' is not one of inspiration, expiration"),
        ("path,case_id\na.nii.gz,x\na.nii.gz,x\n", "case_id x appears more than once"),
        ("path,case_id\na.nii.gz,b,c\n", "line 2: more values than columns"),
        ("path,case_id\na\0.nii.gz,b\n", "line 2: holds a NUL character"),
        ("path,case_id\na.nii.gz,Case\na.nii.gz,case\n", "case_id case appears more than once"),
        (f"path\n{'x' * 300}.nii.gz\n", "cannot be reached .errno"),
    ],
)
def test_row_65_manifest_mistakes(tmp_path: Path, text: str, phrase: str) -> None:
    nifti(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=phrase) as caught:
        read_manifest(manifest(tmp_path, text))
    assert caught.value.exit_code == 3
    assert "cases.csv" in str(caught.value) or "x.nii.gz" in str(caught.value)


def test_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match="cannot be read as CSV"):
            read_manifest(path)
    (tmp_path / "latin.csv").write_bytes(b"path\nM\xfcller\n")
    with pytest.raises(InputError, match="cannot be read as CSV"):
        read_manifest(tmp_path / "latin.csv")


def test_short_rows_leave_the_rest_empty(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    (source,) = read_manifest(manifest(tmp_path, "path,case_id,split\na.nii.gz\n"))
    assert (source.case_id, source.split) == ("", "")


def test_one_study_given_as_several_paths_is_one_case(tmp_path: Path) -> None:
    """`preprocess study/*`: the series are collected first, then one is chosen."""
    sharp = dicom(tmp_path / "study" / "a-sharp", study="x", series="1", kernel="B70f")
    soft = dicom(tmp_path / "study" / "b-soft", study="x", series="2", kernel="B30f")
    other = dicom(tmp_path / "other", patient="q", study="y", series="3")
    image = nifti(tmp_path / "scan.nii.gz")
    sources = find_sources([image, sharp, other, soft])
    assert [source.path for source in sources] == [image, sharp, other]  # in the order given
    study = sources[1]
    assert study.series is not None
    assert {file.parent for file in study.series.files} == {soft}
    (reason,) = study.others
    assert "sharper kernel" in reason
    assert find_sources([tmp_path / "study"])[0].series == study.series


def test_files_reached_by_several_paths_count_once(tmp_path: Path) -> None:
    root = dicom(tmp_path / "scans" / "one").parent
    dicom(root / "two", patient="q", series="2")
    (tmp_path / "link").symlink_to(root / "one")
    expected = find_sources([root])
    file = min((root / "one").iterdir())
    for more in ([root / "one"], [root], [tmp_path / "link"], [file], [root / "two", file, root / "one"]):
        sources = find_sources([root, *more])
        assert [source.series for source in sources] == [source.series for source in expected]
        assert not any(source.problem for source in sources)
        (turned, *_) = find_sources([*more, root])
        assert not turned.problem


def test_slices_given_one_by_one_form_their_series(tmp_path: Path) -> None:
    """`preprocess series/*`."""
    folder = dicom(tmp_path / "scan")
    (source,) = find_sources(sorted(folder.iterdir()))
    assert source.problem == ""
    assert source.series == find_sources([folder])[0].series
    np.testing.assert_array_equal(source.read().array, volume().array)
    files = sorted(folder.iterdir())
    files[-1].write_bytes(files[-1].read_bytes()[:300])
    series, damaged = find_sources(files)
    assert f"{files[-1].name} in the same folder is" in series.problem
    assert damaged.path == files[-1]
    assert "no readable DICOM image" in damaged.problem


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_series_in_two_places_is_an_error_of_its_case(tmp_path: Path, seed: int) -> None:
    one, two = dicom(tmp_path / "one"), dicom(tmp_path / "two", seed=seed)
    good = dicom(tmp_path / "good", patient="q", series="q")
    bad, fine = find_sources([one, two, good])
    assert f"lies in {one} and, with other files, in {two}" in bad.problem
    assert bad.patient_id == "p"
    assert bad.series is None
    assert fine.problem == ""
    with pytest.raises(InputError, match="give one of the two"):
        bad.read()


def test_parts_of_a_series_in_two_folders_need_the_folder_above(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan" / "a")
    (tmp_path / "scan" / "b").mkdir()
    for file in sorted(folder.iterdir())[5:]:
        file.rename(tmp_path / "scan" / "b" / file.name)
    (source,) = find_sources([tmp_path / "scan" / "a", tmp_path / "scan" / "b"])
    assert "the folder above both" in source.problem
    (source,) = find_sources([tmp_path / "scan"])
    np.testing.assert_array_equal(source.read().array, volume().array)
    assert locations([source]) == [(tmp_path / "scan").resolve()]


def test_locations_differ(tmp_path: Path) -> None:
    """A series' folder, whatever was typed; the first file where cases share a folder; an image file itself."""
    alone = dicom(tmp_path / "all" / "alone" / "ct", patient="a", series="a")
    for name in ("b", "c"):
        for file in sorted(dicom(tmp_path / name, patient=name, series=name).iterdir()):
            (tmp_path / "all" / "mixed").mkdir(exist_ok=True)
            file.rename(tmp_path / "all" / "mixed" / f"{name}-{file.name}")
    image = nifti(tmp_path / "all" / "scan.nii.gz")
    (tmp_path / "empty").mkdir()
    sources = find_sources([tmp_path / "all", tmp_path / "empty"])
    mixed = sorted((tmp_path / "all" / "mixed").iterdir())
    half = len(mixed) // 2
    assert set(locations(sources)) == {alone, mixed[0], mixed[half], image, tmp_path / "empty"}
    assert mixed[half].name.startswith("c-")

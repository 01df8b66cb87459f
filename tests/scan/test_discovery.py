"""Any folder a hospital exports: every study is found exactly once, whatever lies beside it, however it is packed."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import GRID, dicom, manifest, nifti, volume

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan import discovery
from lungseg.scan.sources import Search, Source, find_sources, read_manifest, search
from lungseg.scan.volume import Geometry

AWKWARD_NAMES = (
    "with space", "  two  ", "-leading", "Ünïcödé 肺", "u\u0308 decomposed", "emoji \U0001fac1", "x" * 200, "100%d %s",
    "quote's \"double\"", "new\nline", "dots...", "#hash;semi&amp", "CON", "a.zip.dcm",
)  # fmt: skip


# ---------------------------------------------------------------- patients are never mixed, and none is lost


@dataclass(frozen=True)
class Piece:
    """One slice file of the pool."""

    patient: str
    study: str
    series: str
    content: bytes


def make_pool(folder: Path) -> list[Piece]:
    """Three patients, five studies, eight series; two patients share a study UID, two series their geometry."""
    thin, thick = Geometry((8, 4, 5), (2.5, 2.2, 2.0)), Geometry((6, 4, 5), (4.0, 2.2, 2.0))
    wanted = [
        ("p1", "a", "1", thin, "B30f"), ("p1", "a", "2", thin, "B70f"), ("p1", "a", "3", thick, "B30f"),
        ("p1", "b", "4", thick, "B30f"), ("p2", "c", "5", thin, "B30f"), ("p3", "c", "6", thin, "B30f"),
        ("p3", "d", "7", thick, "B70f"), ("p3", "d", "8", thick, "B30f"),
    ]  # fmt: skip
    pool = []
    for patient, study, series, grid, kernel in wanted:
        place = dicom(folder / series, patient=patient, study=study, series=series, grid=grid, kernel=kernel)
        pool += [Piece(patient, study, series, file.read_bytes()) for file in sorted(place.iterdir())]
    return pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Piece]:
    return make_pool(tmp_path_factory.mktemp("pool"))


def contents(source: Source) -> list[bytes]:
    """Files of the chosen series in their order, wherever they lie."""
    assert source.series is not None
    found = []
    for file in source.series.files:
        archive = next((archive for archive in source.archives if archive in file.parents), None)
        if archive is None:
            found.append(file.read_bytes())
        else:
            with zipfile.ZipFile(archive) as packed:
                found.append(packed.read(str(file.relative_to(archive))))
    return found


def facts(found: Search) -> list[tuple[Any, ...]]:
    """All that may not depend on where files lie."""
    assert not any(source.problem for source in found.sources)
    return [
        (s.patient_id, s.series.study_uid, s.series.key, contents(s), s.others, s.key(),
         [(c.series.key, c.chosen, c.reason) for c in s.candidates])
        for s in found.sources if s.series is not None
    ]  # fmt: skip


PLACES = ("", "a", "a/b", "c d/é", "one.zip", "a/two.zip", "a/two.zip/deep/er")


def scatter(root: Path, pool: list[Piece], places: list[str], order: list[int]) -> None:
    """Each piece to a folder or archive of its own choice, in an order and under names that say nothing."""
    packed: dict[Path, zipfile.ZipFile] = {}
    for place, index in zip(places, order, strict=True):
        archive, _, inside = place.partition(".zip")
        name = f"{(index * 7919) % 10007:05d}"
        if place == archive:
            (root / place).mkdir(parents=True, exist_ok=True)
            (root / place / name).write_bytes(pool[index].content)
            continue
        path = root / f"{archive}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path not in packed:
            packed[path] = zipfile.ZipFile(path, "w")
        packed[path].writestr(f"{inside.strip('/')}/{name}".strip("/"), pool[index].content)
    for one in packed.values():
        one.close()


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_study_is_found_once_in_any_arrangement(
    data: st.DataObject, pool: list[Piece], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("mix")
    order = data.draw(st.permutations(range(len(pool))))
    places = data.draw(st.lists(st.sampled_from(PLACES), min_size=len(pool), max_size=len(pool)))
    scatter(tmp_path / "mixed", pool, places, order)
    scatter(tmp_path / "plain", pool, [piece.series for piece in pool], list(range(len(pool))))
    mixed, plain = search([tmp_path / "mixed"]), search([tmp_path / "plain"])
    assert facts(mixed) == facts(plain)
    assert mixed.looked_at == plain.looked_at == len(pool)
    chosen = [(p.patient, p.study, p.series) for s in mixed.sources for p in pool if p.content in contents(s)]
    assert sorted(set(chosen)) == [("p1", "a", "1"), ("p1", "b", "4"), ("p2", "c", "5"), ("p3", "c", "6"),
                                   ("p3", "d", "8")]  # fmt: skip
    assert len(chosen) == sum(len(s.series.files) for s in mixed.sources if s.series)
    shutil.rmtree(tmp_path)


def test_patients_without_any_uid_are_kept_apart_by_folder(tmp_path: Path) -> None:
    """Anonymised to the bone: one folder is one scan, for nothing else says what belongs together."""
    import pydicom

    for number, offset in ((1, 0.0), (2, 22.5)):  # the second scan would continue the first one seamlessly
        grid = Geometry((9, 10, 11), GRID.spacing_mm, (GRID.origin_mm[0] + offset, *GRID.origin_mm[1:]))
        folder = dicom(tmp_path / "in" / str(number), grid=grid, seed=number)
        for file in folder.iterdir():
            dataset = pydicom.dcmread(file)
            dataset.PatientID = ""
            dataset.StudyInstanceUID = dataset.SeriesInstanceUID = ""
            dataset.save_as(file)
    one, two = find_sources([tmp_path / "in"])
    assert (one.problem, two.problem) == ("", "")
    for source, seed in ((one, 1), (two, 2)):
        np.testing.assert_array_equal(source.read().array, volume(seed).array)
        assert source.key() == ""  # only the voxels tell it from another


# ---------------------------------------------------------------- what is not a scan


def test_row_2_other_files_are_counted_and_the_first_five_listed(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan")
    for number in range(8):
        (folder / f"note {number}.txt").write_bytes(b"text")
    found = search([tmp_path])
    assert (found.looked_at, found.skipped, found.damaged) == (17, 8, 0)
    assert [path.name for path in found.examples] == [f"note {number}.txt" for number in range(5)]
    assert found.notes == ("8 files skipped that are neither DICOM images nor image files",)
    (source,) = found.sources
    assert source.series is not None
    assert len(source.series.files) == 9


def test_row_4_a_localizer_is_listed_with_the_reason(tmp_path: Path) -> None:
    import pydicom

    folder = dicom(tmp_path / "scan", study="x")
    dataset = pydicom.dcmread(min(folder.iterdir()))
    dataset.SeriesInstanceUID = "1.2.3.4"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    dataset.save_as(folder / "scout")
    (source,) = find_sources([tmp_path])
    assert [candidate.chosen for candidate in source.candidates] == [True, False]
    assert "localizer" in source.candidates[1].reason
    assert "localizer" in source.others[0]


def test_folder_with_nothing_but_damaged_slices_is_told_beside_good_ones(tmp_path: Path) -> None:
    """A patient whose copy failed does not vanish among the others."""
    dicom(tmp_path / "good", patient="a", series="a")
    cut, empty = dicom(tmp_path / "cut", patient="b", series="b"), dicom(tmp_path / "empty", patient="c", series="c")
    for file in cut.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    for file in empty.iterdir():
        file.write_bytes(b"")
    (tmp_path / "LOCK").write_bytes(b"")
    sources = find_sources([tmp_path])
    assert sorted(source.path.name for source in sources if source.problem) == ["cut", "empty"]
    for source in sources:
        if source.problem:
            assert "no readable DICOM image among the 9 files looked at" in source.problem
            assert "; 4 more damaged" in source.problem
            assert "000.dcm" not in source.hide(source.problem)


@pytest.mark.parametrize("packed", [False, True])
def test_row_23_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """Its series is refused, with the errno; other patients go on."""
    bad, good = dicom(tmp_path / "bad", patient="a", series="1"), dicom(tmp_path / "good", patient="b", series="2")
    closed = sorted(bad.iterdir())[3]
    if packed:
        closed = tmp_path / "bad.zip"
        closed.write_bytes(b"PK\3\4")
        shutil.rmtree(bad)
    real_open = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == closed:
            raise PermissionError(13, "Permission denied")
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    sources = {source.patient_id: source for source in find_sources([tmp_path])}
    problem = sources["" if packed else "a"].problem
    assert closed.name in problem
    assert "(errno 13: Permission denied)" in problem
    assert sources["b"].series is not None
    assert {file.parent for file in sources["b"].series.files} == {good}


def test_row_23_pipes_sockets_loops_and_dangling_links(tmp_path: Path) -> None:
    nifti(tmp_path / "in" / "a.nii.gz")
    os.mkfifo(tmp_path / "in" / "pipe")
    os.mkfifo(tmp_path / "in" / "pipe.nii.gz")
    (tmp_path / "in" / "self").symlink_to("self")
    (tmp_path / "in" / "one").symlink_to("two")
    (tmp_path / "in" / "two").symlink_to("one")
    (tmp_path / "in" / "nowhere").symlink_to("gone")
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "sub" / "same.nii.gz").symlink_to(tmp_path / "in" / "a.nii.gz")
    found = search([tmp_path / "in"])
    assert [source.path.name for source in found.sources] == ["a.nii.gz"]  # once, by whatever names
    assert found.sources[0].problem == ""


def test_row_17_links_to_slices_and_scans_that_are_gone(tmp_path: Path) -> None:
    """As git-annex leaves them where a data set was not fetched: the rest must not pass for the whole."""
    folder = dicom(tmp_path / "in" / "a")
    last = sorted(folder.iterdir())[-1]
    last.unlink()
    last.with_suffix(".dcm").symlink_to("../../objects/xyz")
    (tmp_path / "in" / "b.nii.gz").symlink_to("../objects/abc")
    image, study = find_sources([tmp_path / "in"])
    assert "No such file or directory" in study.problem
    with pytest.raises(InputError, match=r"b\.nii\.gz: no such image file"):
        image.read()


@pytest.mark.parametrize("name", [".Trashes", ".Trash-1000", "$RECYCLE.BIN"])
def test_deleted_files_are_no_scans(tmp_path: Path, name: str) -> None:
    nifti(tmp_path / "in" / "a.nii.gz")
    nifti(tmp_path / "in" / name / "501" / "b.nii.gz")
    dicom(tmp_path / "in" / name / "c")
    assert [source.path.name for source in find_sources([tmp_path / "in"])] == ["a.nii.gz"]
    assert len(find_sources([tmp_path / "in" / name])) == 2  # named by the user


def test_security_8_depth_and_count_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "in"
    for _ in range(discovery.MAX_DEPTH + 1):
        deep = deep / "d"
    deep.mkdir(parents=True)
    nifti(deep / "b.nii.gz")
    nifti(tmp_path / "in" / "a.nii.gz")
    fine, problem = find_sources([tmp_path / "in"])
    assert fine.problem == ""
    assert "more than 64 folders deep" in problem.problem
    monkeypatch.setattr("lungseg.scan.dicom_headers.MAX_FILES", 3)
    for name in "bcd":
        nifti(tmp_path / "in" / f"{name}.nii.gz")
    (only,) = find_sources([tmp_path / "in"])
    assert "more than 3 files; give the folder of one study" in only.problem


def test_folders_deeper_than_python_may_recurse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    depth = sys.getrecursionlimit() + 200
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    try:
        (source,) = find_sources([tmp_path])
        assert "folders deep" in source.problem
    finally:
        for _ in range(depth):  # step by step: rmtree recurses too
            os.chdir("..")
            os.rmdir("d")


@pytest.mark.parametrize("name", AWKWARD_NAMES)
@pytest.mark.parametrize("place", ["folder", "file", "archive", "member"])
def test_row_36_awkward_names(tmp_path: Path, name: str, place: str) -> None:
    folder = dicom(tmp_path / "scan")
    image = nifti(tmp_path / "image.nii.gz", 2)
    root = tmp_path / "in"
    root.mkdir()
    if place == "folder":
        shutil.copytree(folder, root / name)
        shutil.copy(image, root / name / "a.nii.gz")
    elif place == "file":
        for file in folder.iterdir():
            shutil.copy(file, root / f"{name}{file.stem}")
        shutil.copy(image, root / f"{name}.nii.gz")
    else:
        inside = name if place == "member" else "IM"
        archive = f"{name[:190]}.zip" if place == "archive" else "a.zip"
        with zipfile.ZipFile(root / archive, "w") as packed:
            for file in folder.iterdir():
                packed.write(file, f"{inside}{file.stem}")
            packed.write(image, f"{inside}/{inside}.nii.gz")
    scan, series = find_sources([root])
    assert (scan.problem, series.problem) == ("", "")
    np.testing.assert_array_equal(scan.read().array, volume(2).array)
    np.testing.assert_array_equal(series.read().array, volume().array)


# ---------------------------------------------------------------- the user's own choice of a series


def two_studies(tmp_path: Path) -> dict[str, str]:
    """Series name -> key, of two studies with two series each; the first of each is the usual choice."""
    for patient, study, series, kernel in (("p", "x", "1", "B30f"), ("p", "x", "2", "B70f"), ("q", "y", "3", "B30f"),
                                           ("q", "y", "4", "B70f")):  # fmt: skip
        dicom(tmp_path / "in" / series, patient=patient, study=study, series=series, kernel=kernel)
    sources = find_sources([tmp_path / "in"])
    assert [names(source) for source in sources] == ["1", "3"]
    return {c.series.files[0].parent.name: c.series.key for source in sources for c in source.candidates}


def names(source: Source) -> str:
    assert source.series is not None
    return source.series.files[0].parent.name


@pytest.mark.parametrize("form", [str, lambda key: key[:6], lambda key: f" {key.upper()} "])
def test_row_3_series_chosen_by_key(tmp_path: Path, form: Callable[[str], str]) -> None:
    keys = two_studies(tmp_path)
    sources = find_sources([tmp_path / "in"], series=[form(keys["2"])])
    assert [names(source) for source in sources] == ["2", "3"]  # the other study keeps the usual choice
    chosen, other = sources[0].candidates
    assert (chosen.chosen, chosen.reason) == (True, "asked for")
    assert (other.chosen, other.reason) == (False, "another series was asked for")
    both = find_sources([tmp_path / "in"], series=[keys["2"], keys["4"]])
    assert [names(source) for source in both] == ["2", "4"]


def test_row_3_series_chosen_by_uid(tmp_path: Path) -> None:
    two_studies(tmp_path)
    uid = next(c.series.series_uid for c in find_sources([tmp_path / "in"])[1].candidates if not c.chosen)
    assert [names(source) for source in find_sources([tmp_path / "in"], series=[uid])] == ["1", "4"]
    (source,) = find_sources([tmp_path / "in" / "4"], series=[uid])
    assert names(source) == "4"


def test_row_3_series_that_cannot_be_chosen(tmp_path: Path) -> None:
    keys = two_studies(tmp_path)
    for wrong in ("ffffff0000", keys["1"][:5], "1.2.3", "", "no such"):
        with pytest.raises(InputError, match="was not found: there are") as caught:
            find_sources([tmp_path / "in"], series=[wrong])
        assert all(key in str(caught.value) for key in keys.values())
        assert caught.value.exit_code == 3
    with pytest.raises(InputError, match="lie in one study, which is one case"):
        find_sources([tmp_path / "in"], series=[keys["1"], keys["2"]])
    nifti(tmp_path / "image" / "a.nii.gz")
    with pytest.raises(InputError, match="there is no DICOM series"):
        find_sources([tmp_path / "image"], series=[keys["1"]])


def test_row_3_first_digits_of_several_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lungseg.scan.dicom_series import Series

    two_studies(tmp_path)
    monkeypatch.setattr(Series, "key", property(lambda self: f"abcdef{self.series_uid[-4:]}"))
    with pytest.raises(InputError, match="may be any of abcdef"):
        find_sources([tmp_path / "in"], series=["abcdef"])


def test_row_3_a_chosen_series_that_is_refused_is_not_replaced(tmp_path: Path) -> None:
    dicom(tmp_path / "in" / "good", study="x", series="1")
    slab = dicom(tmp_path / "in" / "slab", study="x", series="2", grid=Geometry((4, 10, 11), (2.5, 2.2, 2.0)))
    (alone,) = find_sources([slab])
    key = alone.candidates[0].series.key
    (source,) = find_sources([tmp_path / "in"], series=[key])
    assert source.series is None
    assert "only 4 slices" in source.problem
    assert [candidate.chosen for candidate in source.candidates] == [False, False]
    by_manifest, wrong = read_manifest(manifest(tmp_path, f"path,series\nin,{key}\nin,{key[:5]}\n"))
    assert "only 4 slices" in by_manifest.problem
    assert "line 3: " in wrong.problem


def test_options_decide_which_series_can_be_chosen(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan")
    sorted(folder.iterdir())[4].unlink()
    (refused,) = find_sources([tmp_path])
    assert "missing slices" in refused.problem
    allowed = ReadOptions(allow_gaps=1)
    (source,) = find_sources([tmp_path], options=allowed)
    if not source.problem:  # what the reader may repair grows with it
        assert source.series is not None
        assert source.candidates[0].reason == "the only one of its study"

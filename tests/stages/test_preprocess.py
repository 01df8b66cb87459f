"""What a manifest says of a case, where the id map points, and which places are refused before any work."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from scan_fixture import CONFIG, GRID, QUIET, body, chest, dicom, image, quick

from lungseg.config import Execution
from lungseg.errors import InputError, MismatchError, PartialError
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry
from lungseg.stages.cohort import StageResult
from lungseg.stages.preprocess import preprocess
from lungseg.stages.scan_list import list_scans
from lungseg.store.cases import Store, hashed_id, read_id_map
from lungseg.store.schema import make_provenance, write_artefact

pytestmark = pytest.mark.usefixtures(quick.__name__)
OVERWRITE = Execution(quiet=True, overwrite=True)


def write_reference(folder: Path, value: int) -> None:
    write_image(folder / "reference.nii.gz", (chest() < -500).astype(np.uint8) * value, GRID)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder with one image file and its reference."""
    folder = tmp_path / "scans"
    folder.mkdir()
    write_image(folder / "scan.nii.gz", chest(), GRID)
    write_reference(folder, 1)
    return folder


def made(scans: Path, execution: Execution = QUIET, **values: str) -> StageResult:
    """Preprocess the scan as a manifest of these values says."""
    row = {"path": "scan.nii.gz", "case_id": "a", **values}
    (scans / "cases.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    return preprocess(None, scans.parent / "store", CONFIG, manifest=scans / "cases.csv", execution=execution)


FACTS = {"split": "train", "patient_id": "p1", "inspiration": "inspiration"}


CHANGED = {"split": "test", "patient_id": "p2", "inspiration": "expiration"}


def test_changed_facts_are_refused_and_replaced_on_request(scans: Path) -> None:
    store = scans.parent / "store"
    assert made(scans, QUIET, **FACTS).outcomes[0].status == "done"
    before = (store / "cases" / "a" / "volume.h5").read_bytes()
    assert made(scans, QUIET, **FACTS).outcomes[0].status == "complete already"
    assert made(scans, OVERWRITE, **FACTS).outcomes[0].status == "complete already"
    for key, value in CHANGED.items():
        (outcome,) = made(scans, QUIET, **{**FACTS, key: value}).outcomes
        assert outcome.exit_code == MismatchError.exit_code
        assert f"{key}: there {FACTS[key]}, now {value}" in outcome.message
        assert outcome.message.count("there ") == 1
    assert (store / "cases" / "a" / "volume.h5").read_bytes() == before
    assert made(scans, OVERWRITE, **CHANGED).outcomes[0].status == "done"
    with Store(store).open("a", "volume") as volume:
        found = volume.provenance
    assert {name: found[name] for name in CHANGED} == {name: found["config"][name] for name in CHANGED} == CHANGED
    assert found["case_id"] == "a"
    assert made(scans).outcomes[0].exit_code == MismatchError.exit_code  # taken back: a change too


def labels(store: Path) -> np.ndarray:
    with Store(store).open("a", "reference") as reference:
        return np.unique(reference.read("labels"))


def test_a_reference_is_kept_apart_from_the_volume(scans: Path) -> None:
    store = scans.parent / "store"
    case = store / "cases" / "a"
    made(scans)
    before = (case / "volume.h5").read_bytes()
    assert not (case / "reference.h5").exists()
    (added,) = made(scans, reference="reference.nii.gz").outcomes
    assert (added.status, added.message) == ("done", "only the reference was written")
    assert labels(store).tolist() == [0, 1]
    assert made(scans, reference="reference.nii.gz").outcomes[0].status == "complete already"
    with Store(store).open("a", "reference") as reference:
        digest = reference.provenance["inputs"]["labels"]
    write_reference(scans, 3)
    (other,) = made(scans, reference="reference.nii.gz").outcomes
    assert other.exit_code == MismatchError.exit_code
    assert f"input labels: there {digest}, now " in other.message
    assert "reference.h5" in other.message
    assert labels(store).tolist() == [0, 1]
    assert made(scans).outcomes[0].status == "complete already"  # none named: left alone
    assert labels(store).tolist() == [0, 1]
    assert made(scans, OVERWRITE, reference="reference.nii.gz").outcomes[0].status == "done"
    assert labels(store).tolist() == [0, 3]
    (case / "reference.h5").unlink()
    made(scans, reference="reference.nii.gz")
    assert labels(store).tolist() == [0, 3]
    assert (case / "volume.h5").read_bytes() == before


def test_a_reference_that_cannot_be_used_fails_its_case(scans: Path) -> None:
    write_image(scans / "reference.nii.gz", np.full(GRID.shape, 300, np.uint16), GRID)
    (outcome,) = made(scans, reference="reference.nii.gz").outcomes
    assert outcome.exit_code == InputError.exit_code
    assert "300" in outcome.message
    assert not list((scans.parent / "store").rglob("*.h5"))


def test_the_reference_does_not_change_with_the_files_layout(scans: Path) -> None:
    made(scans, reference="reference.nii.gz")
    values = (chest() < -500).astype(np.uint16)
    write_image(scans / "reference.nii.gz", values, GRID, stored_axes=(2, 0, 1), stored_flips=(True, False, True))
    assert made(scans, reference="reference.nii.gz").outcomes[0].status == "complete already"


@pytest.mark.slow
def test_the_id_map_tells_patients_of_one_folder_apart(tmp_path: Path) -> None:
    """The study's own folder, whatever was typed; files of several patients in one folder by their first file."""
    root, ids = tmp_path / "all", tmp_path / "ids.csv"
    second = dicom(root / "two" / "ct", patient="p2", series="2")
    mixed = root / "mixed"
    for name in ("p3", "p4"):
        for path in sorted(dicom(tmp_path / name, patient=name, series=name).iterdir()):
            mixed.mkdir(exist_ok=True)
            shutil.copy(path, mixed / f"{name}-{path.name}")
    write_image(root / "scan.nii.gz", chest(), GRID)
    preprocess([root], tmp_path / "store", CONFIG, id_map=ids, execution=QUIET).require_complete()
    rows = read_id_map(ids)
    assert {row["case_id"] for row in rows} == set(Store(tmp_path / "store").case_ids())
    firsts = [min(path for path in mixed.iterdir() if path.name.startswith(name)) for name in ("p3", "p4")]
    expected = {second, root / "scan.nii.gz", *firsts}
    assert {row["source"] for row in rows} == {str(path.resolve()) for path in expected}
    by_source = {row["source"]: row["patient_id"] for row in rows}
    salt = Store(tmp_path / "store").salt
    assert by_source[str(second.resolve())] == hashed_id(salt, "patient p2")
    assert by_source[str(firsts[1].resolve())] == hashed_id(salt, "patient p4")


@pytest.mark.parametrize("place", ["store/ids.csv", "store/cases/../ids.csv"])
def test_an_id_map_in_the_store_is_refused_before_any_work(scans: Path, place: str) -> None:
    with pytest.raises(InputError, match="lies inside the store"):
        preprocess([scans], scans.parent / "store", CONFIG, id_map=scans.parent / place, execution=QUIET)
    assert not (scans.parent / "store").exists()


def test_another_file_is_not_taken_for_an_id_map(scans: Path) -> None:
    (scans.parent / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="is no id map"):
        preprocess([scans], scans.parent / "store", CONFIG, id_map=scans.parent / "mine.csv", execution=QUIET)
    assert (scans.parent / "mine.csv").read_text() == "a,b\n1,2\n"
    assert not (scans.parent / "store").exists()


@pytest.mark.parametrize("output", ["scans", "scans/store", "scans/deep/../store", "link/store"])
@pytest.mark.parametrize("listed", [False, True])
def test_row_62_output_inside_the_input(tmp_path: Path, output: str, listed: bool) -> None:
    dicom(tmp_path / "scans")
    (tmp_path / "link").symlink_to(tmp_path / "scans")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "cases.csv").write_text("path\nscans\n")
    given, manifest = (None, tmp_path / "cases.csv") if listed else ([tmp_path / "scans"], None)
    with pytest.raises(InputError, match=r"lies inside the input folder|is not a patch store"):
        preprocess(given, tmp_path / output, CONFIG, manifest=manifest, execution=QUIET)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "cases.csv"])


@pytest.mark.parametrize("output", ["thesis.tex", "thesis.tex/store", "scans/scan.nii.gz"])
def test_row_62_output_that_is_a_file(scans: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (scans.parent / "thesis.tex").write_text("mine")
    monkeypatch.setattr("lungseg.stages.preprocess.find_scans", lambda *_, **__: pytest.fail("scans were looked at"))
    with pytest.raises(InputError, match="is a file") as caught:
        preprocess([scans / "scan.nii.gz"], scans.parent / output, CONFIG, execution=QUIET)
    assert caught.value.exit_code == 3
    assert (scans.parent / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
def test_one_study_given_series_by_series_is_one_case_of_its_patient(tmp_path: Path) -> None:
    """Only distinct studies tell whether the PatientID is the same for all."""
    soft = dicom(tmp_path / "study" / "soft", series="1", study="x", kernel="B30f")
    sharp = dicom(tmp_path / "study" / "sharp", series="2", study="x", kernel="B70f")
    ids = tmp_path / "ids.csv"
    result = preprocess([sharp, soft], tmp_path / "store", CONFIG, id_map=ids, execution=QUIET).require_complete()
    assert len(result.outcomes) == 1
    (row,) = read_id_map(ids)
    assert row["source"] == str(soft.resolve())
    (tmp_path / "cases.csv").write_text("path,case_id\nstudy/soft,a\nstudy/sharp,b\n")
    preprocess(None, tmp_path / "two", CONFIG, manifest=tmp_path / "cases.csv", execution=QUIET).require_complete()
    patients = set()
    for case_id in ("a", "b"):
        with Store(tmp_path / "two").open(case_id, "volume") as volume:
            patients.add(volume.provenance["patient_id"])
    assert patients == {row["patient_id"]} == {hashed_id("test", "patient p")}


def test_copies_in_two_places_fail_that_case_only(tmp_path: Path) -> None:
    one = dicom(tmp_path / "one")
    two = Path(shutil.copytree(one, tmp_path / "two"))
    good = dicom(tmp_path / "good", patient="q", series="q")
    result = preprocess([one, two, good], tmp_path / "store", CONFIG, execution=QUIET)
    assert sorted(outcome.status for outcome in result.outcomes) == ["done", "failed"]
    with pytest.raises(PartialError, match="the same series lies in"):
        result.require_complete()


def test_cases_left_behind_by_other_settings_are_found(scans: Path) -> None:
    """`--overwrite` with another spacing changes the store's settings and the cases given, no others."""
    made(scans)
    write_image(scans / "other.nii.gz", chest(1), GRID)
    (scans / "cases.csv").write_text("path,case_id\nother.nii.gz,b\n")
    finer = dataclasses.replace(CONFIG, spacing_mm=5.0)
    store = scans.parent / "store"
    preprocess(None, store, finer, manifest=scans / "cases.csv", execution=OVERWRITE).require_complete()
    Store(store).check_uniform(["b"])
    with pytest.raises(MismatchError, match=r"1 cases .*a \(spacing_mm 6.0\).*--overwrite") as caught:
        Store(store).check_uniform()
    assert "b (" not in str(caught.value)


def test_a_reference_without_a_digest_is_refused(scans: Path) -> None:
    made(scans, reference="reference.nii.gz")
    path = scans.parent / "store" / "cases" / "a" / "reference.h5"
    write_artefact(path, "reference", {"labels": np.zeros(GRID.shape, np.uint8)}, provenance=make_provenance("x", {}))
    (outcome,) = made(scans, reference="reference.nii.gz").outcomes
    assert "input labels: there None" in outcome.message


def test_one_series_in_two_rows_is_refused(tmp_path: Path) -> None:
    folder = dicom(tmp_path / "scan")
    (tmp_path / "cases.csv").write_text("path,split\nscan,train\nscan,test\n")
    with pytest.raises(InputError, match="the same series was given more than once") as caught:
        preprocess(None, tmp_path / "store", CONFIG, manifest=tmp_path / "cases.csv", execution=QUIET)
    assert str(folder) in str(caught.value)


def status_of(store: Path, case_id: str) -> list[str]:
    with Store(store).open(case_id, "volume") as volume:
        status: list[str] = volume.provenance["status"]
    return status


@pytest.mark.parametrize(
    ("array", "status", "phrase"),
    [
        (chest(), [], ""),
        (body(), ["no-lung"], "no lung found"),
        (chest(top=0.1), ["truncated"], "truncated: the lung is"),
    ],
    ids=["whole", "no-lung", "truncated"],
)
def test_row_20_22_no_lung_and_a_cut_lung_are_flagged(
    tmp_path: Path, array: np.ndarray, status: list[str], phrase: str
) -> None:
    (outcome,) = preprocess([image(tmp_path / "scan.nii.gz", array)], tmp_path / "s", CONFIG, execution=QUIET).outcomes
    assert outcome.status == "done"
    assert list(outcome.flags) == status_of(tmp_path / "s", outcome.case_id) == status
    assert phrase in outcome.message
    assert bool(outcome.message) == bool(phrase)


@pytest.mark.parametrize("fault", ["spacing", "shifted", "shape"])
def test_row_33_reference_on_another_grid(scans: Path, fault: str) -> None:
    """Refused with the option that moves it; with the option it is moved to the nearest voxel."""
    labels_there = (chest() < -500).astype(np.uint8)
    other = {
        "spacing": (labels_there, Geometry(GRID.shape, (8.0, 5.0, 5.2))),
        "shifted": (labels_there, Geometry(GRID.shape, GRID.spacing_mm, (0.0, 2.0, 0.0))),
        "shape": (labels_there[:, ::2, ::2], Geometry((20, 25, 25), (8.0, 10.0, 10.0))),
    }
    write_image(scans / "reference.nii.gz", *other[fault])
    (outcome,) = made(scans, reference="reference.nii.gz").outcomes
    assert outcome.exit_code == InputError.exit_code
    assert "--resample-masks" in outcome.message
    assert not list((scans.parent / "store").rglob("*.h5"))
    moved = dataclasses.replace(CONFIG, resample_masks=True)
    store = scans.parent / "store"
    preprocess(None, store, moved, manifest=scans / "cases.csv", execution=QUIET).require_complete()
    with Store(store).open("a", "reference") as reference, Store(store).open("a", "volume") as volume:
        assert reference.provenance["grid"] == volume.provenance["source"]["full_grid"]
        found = reference.read("labels")
    assert found.shape == GRID.shape
    assert (found == labels_there).mean() > 0.9


def test_row_33_a_reference_added_later_is_held_against_the_scan_in_the_store(scans: Path) -> None:
    made(scans)
    write_image(scans / "reference.nii.gz", (chest() < -500).astype(np.uint8), Geometry(GRID.shape, (8.0, 5.0, 6.0)))
    (outcome,) = made(scans, reference="reference.nii.gz").outcomes
    assert "--resample-masks" in outcome.message
    write_reference(scans, 1)
    assert made(scans, reference="reference.nii.gz").outcomes[0].status == "done"


def test_row_34_unexpected_labels_are_listed(scans: Path) -> None:
    values = (chest() < -500).astype(np.uint8)
    values[3, 4, 5:7] = 77, 99
    write_image(scans / "reference.nii.gz", values, GRID)
    (outcome,) = made(scans, reference="reference.nii.gz").outcomes
    assert outcome.exit_code == InputError.exit_code
    assert "77" in outcome.message
    assert "99" in outcome.message


@pytest.mark.parametrize("voxels", [0, 1])
def test_row_35_empty_and_tiny_references_are_kept(scans: Path, voxels: int) -> None:
    values = np.zeros(GRID.shape, np.uint8)
    values.flat[:voxels] = 1
    write_image(scans / "reference.nii.gz", values, GRID)
    (outcome,) = made(scans, reference="reference.nii.gz").outcomes
    assert outcome.status == "done"
    assert ("the reference is empty" in outcome.message) == (voxels == 0)
    assert labels(scans.parent / "store").sum() == voxels


def test_options_that_let_more_in_leave_the_store_as_it_is(scans: Path) -> None:
    made(scans)
    before = (scans.parent / "store" / "store.json").read_bytes()
    more = dataclasses.replace(CONFIG, allow_gaps=3, assume_hu=True, resample_masks=True, correct_tilt=True)
    write_image(scans / "other.nii.gz", chest(1), GRID)
    (scans / "cases.csv").write_text("path,case_id\nscan.nii.gz,a\nother.nii.gz,b\n")
    result = preprocess(None, scans.parent / "store", more, manifest=scans / "cases.csv", execution=QUIET)
    assert [outcome.status for outcome in result.outcomes] == ["complete already", "done"]
    assert (scans.parent / "store" / "store.json").read_bytes() == before
    Store(scans.parent / "store").check_uniform()


def test_results_name_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tables and errors of a result are shown to others; the log of the person who runs it may name the file."""
    folder = tmp_path / "Zebrafink-Anna"
    image(folder / "good.nii.gz", chest())
    (folder / "Zebrafink.nii.gz").write_bytes(b"no image")
    (dicom(folder / "ct" / "Zebrafink") / "010.dcm").unlink()
    result = preprocess([folder], tmp_path / "store", CONFIG, execution=QUIET)
    failed = [outcome for outcome in result.outcomes if outcome.status == "failed"]
    assert len(failed) == 2
    assert "Zebrafink" not in "".join(outcome.message for outcome in result.outcomes)
    assert "Zebrafink.nii.gz" in caplog.text
    with pytest.raises(PartialError) as caught:
        result.require_complete()
    assert "Zebrafink" not in str(caught.value)


def test_a_chosen_series_is_taken(tmp_path: Path) -> None:
    """RELIABILITY row 3: `--series` by key or UID, alone or with commas."""
    dicom(tmp_path / "study" / "soft", series="1", study="x", kernel="B30f")
    dicom(tmp_path / "study" / "sharp", series="2", study="x", kernel="B70f")
    rows = list_scans([tmp_path / "study"], CONFIG, execution=QUIET).values["rows"]
    (sharp,) = [row.series for row in rows if row.kernel == "B70f"]
    for given in ([sharp], [f" {sharp[:8]},"]):
        store = tmp_path / f"store-{len(given[0])}"
        preprocess([tmp_path / "study"], store, CONFIG, series=given, execution=QUIET).require_complete()
        (case_id,) = Store(store).case_ids()
        with Store(store).open(case_id, "volume") as volume:
            assert volume.provenance["acquisition"]["kernel"] == "B70f"
    with pytest.raises(InputError, match=sharp):
        preprocess([tmp_path / "study"], tmp_path / "none", CONFIG, series=["0123456789"], execution=QUIET)


def test_another_series_of_a_study_that_is_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft = dicom(tmp_path / "study" / "soft", series="1", study="x", kernel="B30f")
    sharp = dicom(tmp_path / "study" / "sharp", series="2", study="x", kernel="B70f")
    other = dicom(tmp_path / "other", patient="q", series="3", study="y")
    logging.getLogger("lungseg").propagate = True  # the command line, in another test, may have turned it off
    (first,) = preprocess(soft, tmp_path / "store", CONFIG, execution=QUIET).outcomes
    preprocess([soft, other], tmp_path / "store", CONFIG, execution=QUIET)
    assert "another series of the same study" not in caplog.text
    preprocess(sharp, tmp_path / "store", CONFIG, execution=QUIET)
    assert f"another series of the same study (case {first.case_id})" in caplog.text

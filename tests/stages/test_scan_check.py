"""`preprocess --list` and `--check`: what they say is what a real run does, and they write nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scan_fixture import CONFIG, GRID, QUIET, body, chest, dicom, image, quick
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.config import Execution
from lungseg.errors import InputError, MismatchError, UsageError
from lungseg.scan.nifti import write_image
from lungseg.stages.preprocess import preprocess
from lungseg.stages.scan_case import find_scans
from lungseg.stages.scan_check import Estimate, check_scans
from lungseg.stages.scan_list import list_scans

pytestmark = pytest.mark.usefixtures(quick.__name__)
NAME = "Zebrafink-Anna"
VERBOSE = Execution(verbose=True)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two series of one study, a study with a gap, image files with lungs, without, with cut ones, and rubbish."""
    root = tmp_path / NAME
    dicom(root / "one" / "soft", patient="p1", series="1", study="x")
    dicom(root / "one" / "sharp", patient="p1", series="2", study="x", kernel="B70f")
    (dicom(root / "two", patient="p2", series="3") / "010.dcm").unlink()
    image(root / "three" / "a.nii.gz", chest(3))
    image(root / "three" / "b.nii.gz", body())
    image(root / "three" / "c.nii.gz", chest(4, top=0.1))
    (root / "three" / f"{NAME}.nii.gz").write_bytes(b"no image")
    (root / "three" / "report.txt").write_text(NAME)
    return root


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


SIZES = ("--spacing", 6, "--patch-size", "8,8,8", "--patch-stride", "8,8,8", "--salt", "test")


def test_row_3_list_shows_every_series_the_choice_and_why(cohort: Path) -> None:
    before = tree(cohort.parent)
    result = list_scans([cohort], execution=QUIET)
    rows = result.values["rows"]
    soft, sharp = (next(row for row in rows if row.kernel == kernel and row.study == 5) for kernel in ("B30f", "B70f"))
    assert (soft.taken, sharp.taken) == (True, False)
    assert "sharper kernel" in sharp.reason
    assert (soft.kind, soft.slices, soft.spacing_mm, soft.coverage_mm) == ("CT", 20, (8.0, 5.0, 5.0), 160.0)
    assert soft.orientation == "axial"
    assert len({row.series for row in rows if row.series}) == sum(bool(row.series) for row in rows) >= 2
    (gap,) = [row for row in rows if row.study == 6]
    assert not gap.taken
    assert "missing slices: 1 between" in gap.reason
    assert [row.kind for row in rows if row.study <= 4] == ["NIfTI"] * 4
    assert result.exit_code == 8
    assert result.values["not_images"] == 1
    assert tree(cohort.parent) == before


def test_list_follows_what_may_be_repaired(cohort: Path) -> None:
    allowing = dataclasses.replace(CONFIG, allow_gaps=1)
    (row,) = list_scans([cohort / "two"], execution=QUIET).values["rows"]
    assert (row.taken, row.missing_slices, row.repairs) == (False, 1, ("--allow-gaps 1",))
    (row,) = list_scans([cohort / "two"], allowing, execution=QUIET).values["rows"]
    assert row.taken
    assert row.missing_slices == 1
    result = list_scans([cohort / "two"], execution=QUIET)
    assert (result.exit_code, result.values["usable"]) == (3, 0)
    assert list_scans([cohort / "one"], execution=QUIET).exit_code == 0


@pytest.mark.parametrize("mode", ["--list", "--check"])
def test_json_and_tables_are_the_same_and_free_of_names(cohort: Path, mode: str) -> None:
    """Only JSON on standard output, also with -q; places with -v only."""
    done = call("preprocess", cohort, mode, "--json", *SIZES, "-q")
    assert done.exit_code == 8
    document = json.loads(done.stdout)
    table = call("preprocess", cohort, mode, *SIZES)
    assert table.exit_code == 8
    for text in (done.stdout, table.stdout):
        assert NAME not in text
        assert str(cohort.parent) not in text
    rows = document["series" if mode == "--list" else "cases"]
    assert len(rows) == (7 if mode == "--list" else 6)
    for row in rows:
        assert row["series"] in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 120
    place = json.loads(call("preprocess", cohort, mode, "--json", *SIZES, "-v").stdout)
    assert str(cohort / "two") in {row["place"] for row in place["series" if mode == "--list" else "cases"]}


@pytest.fixture
def manifest(cohort: Path) -> Path:
    """Every scan by name; one reference fits its scan, one lies on another grid."""
    lungs = (chest(3) < -500).astype(np.uint8)
    write_image(cohort / "fits.nii.gz", lungs, GRID)
    write_image(cohort / "other.nii.gz", lungs, dataclasses.replace(GRID, spacing_mm=(8.0, 5.0, 6.0)))
    lines = ["path,case_id,reference", "one,study,", "two,gap,", "three/a.nii.gz,whole,fits.nii.gz",
             "three/a.nii.gz,mask,other.nii.gz", "three/b.nii.gz,empty,", "three/c.nii.gz,cut,",
             f"three/{NAME}.nii.gz,rubbish,"]  # fmt: skip
    (cohort / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return cohort / "cases.csv"


VERDICTS = {"study": "ok", "gap": "refused", "whole": "ok", "mask": "refused", "empty": "ok with warnings",
            "cut": "ok with warnings", "rubbish": "refused"}  # fmt: skip


def test_check_says_what_the_real_run_does(cohort: Path, manifest: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    result = check_scans([], tmp_path / "store", CONFIG, manifest=manifest, execution=QUIET)
    assert tree(tmp_path) == before
    rows = {row.case_id: row for row in result.values["rows"]}
    assert {case_id: row.verdict for case_id, row in rows.items()} == VERDICTS
    assert result.exit_code == 8
    real = preprocess(None, tmp_path / "store", CONFIG, manifest=manifest, execution=QUIET)
    assert [outcome.case_id for outcome in real.outcomes] == list(rows)
    for outcome in real.outcomes:
        row = rows[outcome.case_id]
        assert (row.message, row.status) == (outcome.message, outcome.flags)
        assert (row.verdict == "refused") == (outcome.status == "failed")
    assert rows["study"].hu_range is not None
    assert rows["study"].air_hu == pytest.approx(-1000, abs=30)
    assert rows["study"].body_hu == pytest.approx(40, abs=30)
    assert rows["study"].lung_ml == pytest.approx(1500, rel=0.05)
    assert (rows["cut"].status, rows["empty"].status, rows["empty"].lung_ml) == (("truncated",), ("no-lung",), 0)
    assert rows["whole"].orientation == rows["study"].orientation == "axial"
    assert "--resample-masks" in rows["mask"].message


def test_ids_of_check_are_those_of_the_real_run(cohort: Path, tmp_path: Path) -> None:
    """With the salt given, or read from the store that is there; else it says that they are made anew."""
    good = [cohort / "one", cohort / "three" / "a.nii.gz"]
    real = preprocess(good, tmp_path / "store", CONFIG, execution=QUIET)
    ids = [outcome.case_id for outcome in real.outcomes]
    unsalted = dataclasses.replace(CONFIG, salt="")
    found = check_scans(good, None, CONFIG, execution=QUIET)
    assert [row.case_id for row in found.values["rows"]] == ids
    assert not any("made anew" in note for note in found.notes)
    found = check_scans(good, tmp_path / "store", unsalted, execution=QUIET)
    assert [row.case_id for row in found.values["rows"]] == ids
    assert all(row.complete for row in found.values["rows"])
    assert found.values["estimate"] is None
    found = check_scans(good, None, unsalted, execution=QUIET)
    assert not {row.case_id for row in found.values["rows"]} & set(ids)
    assert any("made anew" in note for note in found.notes)


def test_check_meets_the_store_as_the_real_run_would(cohort: Path, manifest: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    preprocess(None, store, CONFIG, manifest=manifest, execution=QUIET)
    (cohort / "cases.csv").write_text("path,case_id,split\none,study,test\n", encoding="utf-8")
    (row,) = check_scans([], store, CONFIG, manifest=manifest, execution=QUIET).values["rows"]
    assert row.verdict == "refused"
    assert "split: there" in row.message
    overwriting = Execution(quiet=True, overwrite=True)
    (row,) = check_scans([], store, CONFIG, manifest=manifest, execution=overwriting).values["rows"]
    assert row.verdict == "ok"
    with pytest.raises(MismatchError, match="spacing_mm"):
        check_scans([cohort], store, dataclasses.replace(CONFIG, spacing_mm=5.0), execution=QUIET)
    with pytest.raises(MismatchError, match="--salt"):
        check_scans([cohort], store, dataclasses.replace(CONFIG, salt="other"), execution=QUIET)
    with pytest.raises(InputError, match="is not a patch store"):
        check_scans([cohort], cohort, CONFIG, execution=QUIET)


def test_the_estimate_is_near_the_real_size(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = [image(tmp_path / "more" / f"{seed}.nii.gz", chest(seed)) for seed in range(3)]
    found = check_scans(scans, tmp_path / "store", CONFIG, execution=QUIET)
    estimate = found.values["estimate"]
    assert estimate.num_cases == 3
    assert estimate.fits
    preprocess(scans, tmp_path / "store", CONFIG, execution=QUIET).require_complete()
    real = sum(path.stat().st_size for path in (tmp_path / "store").rglob("volume.h5"))
    assert estimate.bytes == pytest.approx(real, rel=0.05)
    assert estimate.seconds > 0
    shutil.rmtree(tmp_path / "store")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = check_scans(scans, tmp_path / "deep" / "store", CONFIG, execution=QUIET)
    assert any("does not fit" in note for note in found.notes)
    assert Estimate(1, 2**30, 7200, None).text().endswith("1.00 GiB on disk and 2.0 h at this --jobs")


@pytest.mark.slow
def test_jobs_and_shards(cohort: Path) -> None:
    some = [cohort / "two", cohort / "one", cohort / "three" / "b.nii.gz"]
    one = check_scans(some, None, CONFIG, execution=QUIET).values["rows"]
    two = check_scans(some, None, CONFIG, execution=Execution(quiet=True, jobs=2)).values["rows"]
    timeless = [dataclasses.replace(row, seconds=0.0) for row in one]
    assert [dataclasses.replace(row, seconds=0.0) for row in two] == timeless
    part = check_scans(some, None, CONFIG, execution=Execution(quiet=True, shard="2/2")).values["rows"]
    assert [dataclasses.replace(row, seconds=0.0) for row in part] == timeless[1::2]
    listed = list_scans([cohort], execution=Execution(quiet=True, shard="2/2")).values["rows"]
    assert {row.study for row in listed} == {2, 4, 6}


def test_exit_codes_of_check(cohort: Path) -> None:
    assert check_scans([cohort / "one"], None, CONFIG, execution=QUIET).exit_code == 0
    assert check_scans([cohort / "two"], None, CONFIG, execution=QUIET).exit_code == 3
    with pytest.raises(InputError):
        check_scans([cohort / "nowhere"], None, CONFIG, execution=QUIET)
    with pytest.raises(UsageError, match="column 'series'"):
        find_scans([cohort], CONFIG, manifest=cohort / "cases.csv", series=["k"])

"""RELIABILITY 4, point 5: what identifies a patient reaches no artefact and no output of a command that went well."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.scan.dicom import write_dicom_series
from lungseg.scan.volume import Geometry, Volume
from lungseg.store.cases import Store, read_id_map

CANARY = "Zebrafink"
TAGS = ("PatientName", "PatientID", "PatientComments", "InstitutionName", "ReferringPhysicianName", "SeriesDescription",
        "StudyDescription", "AccessionNumber", "StudyID", "StationName", "OperatorsName", "ProtocolName")  # fmt: skip


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A chest with every patient tag, and the folder's name, set to a canary."""
    grid = Geometry((24, 60, 60), (8.0, 5.0, 5.0))
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in grid.shape], indexing="ij")
    hu = np.where(y**2 / 0.8 + x**2 < 0.9, 40.0, -1000.0)
    for side in (-0.42, 0.42):
        hu[(z / 0.8) ** 2 + (y / 0.6) ** 2 + ((x - side) / 0.32) ** 2 < 1] = -850
    hu = np.rint(hu + np.random.default_rng(0).normal(0, 15, hu.shape)).clip(-1024, 3000).astype(np.int16)
    folder = tmp_path / CANARY / "dicom"
    write_dicom_series(folder, Volume(hu, grid), patient_id=CANARY, series_seed="s", compress=False)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for tag in TAGS:
            setattr(dataset, tag, CANARY[:16])
        dataset.PatientBirthDate, dataset.StudyDate = "19010203", "19010203"
        dataset.save_as(path)
    return folder.parent


def test_canaries_reach_no_artefact_and_no_output(scans: Path, tmp_path: Path) -> None:
    store, ids = tmp_path / "cohort", tmp_path / "ids.csv"
    said = call("preprocess", scans, "-o", store, "--spacing-mm", "6", "--patch-size", "8,8,8", "--id-map", ids, "-v")
    said += call("info", store) + call("doctor", store)
    case_id = Store(store).case_ids()[0]
    said += call("info", Store(store).case_file(case_id, "volume"))
    for canary in (CANARY, "19010203", str(tmp_path / CANARY)):
        assert canary not in said.replace(str(store), "")
        for path in (p for p in store.rglob("*") if p.is_file()):
            assert canary.encode() not in path.read_bytes(), path
            assert canary not in str(path.relative_to(tmp_path))
    assert len(case_id) == 12
    (row,) = read_id_map(ids)  # the only link back, private and outside the store
    assert row["case_id"] == case_id
    assert CANARY in row["source"]
    assert stat.S_IMODE(ids.stat().st_mode) == 0o600


@pytest.mark.slow
def test_ids_depend_on_the_salt_alone(scans: Path, tmp_path: Path) -> None:
    names = []
    for number, salt in enumerate(("one", "one", "two")):
        store = tmp_path / f"store-{number}"
        call("preprocess", scans, "-o", store, "--spacing-mm", "6", "--patch-size", "8,8,8", "--salt", salt, "-q")
        names.append(Store(store).case_ids())
    assert names[0] == names[1] != names[2]

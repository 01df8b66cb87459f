"""``extract-radiomics`` beyond its artefacts: the backends, the table and the picture."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_store import add_case, make_store

from lungseg.config.execution import Execution
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.radiomics.descriptor import FEATURE_NAMES, IBSI_CODES, feature_names
from lungseg.radiomics.picture import correlations, descriptor_figure_png
from lungseg.stages.extract_radiomics import extract_radiomics
from lungseg.store.cases import Store
from lungseg.store.reader import Artefact
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.store.verify import verify_store
from lungseg.tissue import Tissue

QUIET = Execution(quiet=True, device="cpu")
CONFIG = RadiomicsConfig(window=8, stride=8, samples_per_case=20, standardisation_windows=(8,))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "cohort", cases=2)


def add_reference(store: Store, case_id: str) -> None:
    """Healthy lung, and consolidation where the tiny chest is dense."""
    with store.open(case_id, "volume") as volume:
        image, mask = volume.read("image"), volume.read("mask")
    labels = np.where(mask > 0, np.where(image > -600, Tissue.CONSOLIDATION, Tissue.HEALTHY), 0).astype(np.uint8)
    provenance = make_provenance("preprocess", {}, inputs={})
    write_artefact(store.case_file(case_id, "reference"), "reference", {"labels": labels}, provenance=provenance)


def features(store: Store, case_id: str) -> np.ndarray:
    with store.open(case_id, "radiomics") as radiomics:
        return radiomics.read("features")


def test_names_and_codes_are_in_the_artefact(store: Store) -> None:
    extract_radiomics(store, dataclasses.replace(CONFIG, mcc=False), execution=QUIET).require_complete()
    with store.open("case-0", "radiomics") as radiomics:
        assert tuple(radiomics.provenance["feature_names"]) == feature_names(mcc=False)
        assert radiomics.provenance["ibsi_codes"] == IBSI_CODES


def test_backends_agree_in_the_store(store: Store) -> None:
    pytest.importorskip("radiomics")
    few = dataclasses.replace(CONFIG, stride=12)
    extract_radiomics(store, few, execution=QUIET).require_complete()
    ours = features(store, "case-0")
    overwrite = dataclasses.replace(QUIET, overwrite=True)
    theirs_config = dataclasses.replace(few, backend="pyradiomics")
    extract_radiomics(store, theirs_config, execution=overwrite).require_complete()
    theirs = features(store, "case-0")
    assert len(ours) > 3
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with store.open("case-0", "radiomics") as radiomics:
        assert radiomics.provenance["config"]["backend"] == "pyradiomics"


def test_table_holds_every_window(store: Store) -> None:
    result = extract_radiomics(store, dataclasses.replace(CONFIG, csv=True), execution=QUIET)
    with (store.path / "radiomics.csv").open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["case_id", "corner_z", "corner_y", "corner_x", *FEATURE_NAMES]
    begin = 0
    for case_id in ("case-0", "case-1"):
        with store.open(case_id, "radiomics") as radiomics:
            corners, values = radiomics.read("corner"), radiomics.read("features")
        part = rows[begin : begin + len(corners)]
        begin += len(corners)
        assert {row[0] for row in part} == {case_id}
        np.testing.assert_array_equal(np.array([row[1:4] for row in part], dtype=int), corners)
        np.testing.assert_array_equal(np.array([row[4:] for row in part], dtype=np.float32), values)
    assert begin == len(rows)
    assert f"{begin} windows of 2 cases are in radiomics.csv" in result.notes


def test_table_and_picture_change_nothing_else(store: Store) -> None:
    """Asked for later, they are made from what is there; the artefacts and the standardisation stay as they are."""
    extract_radiomics(store, CONFIG, execution=QUIET).require_complete()
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    result = extract_radiomics(store, dataclasses.replace(CONFIG, csv=True, picture=True), execution=QUIET)
    assert {outcome.status for outcome in result.outcomes} == {"complete already"}
    after = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    made = {path.name for path in set(after) - set(before)}
    assert made == {"radiomics.csv", "radiomics.png"}
    assert {path: after[path] for path in before} == before
    assert not [finding for finding in verify_store(store) if finding.problem]
    extract_radiomics(store, dataclasses.replace(CONFIG, csv=True, picture=True), execution=QUIET)
    assert {path: path.read_bytes() for path in after} == after  # same input, same bytes


def test_picture_alone_reads_references(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_reference(store, "case-0")
    opened: list[str] = []
    original = Artefact.__init__

    def spy(self: Artefact, path: Path, kind: str) -> None:
        opened.append(kind)
        original(self, path, kind)

    monkeypatch.setattr(Artefact, "__init__", spy)
    extract_radiomics(store, dataclasses.replace(CONFIG, csv=True), execution=QUIET).require_complete()
    assert "reference" not in opened
    assert not (store.path / "radiomics.png").exists()
    result = extract_radiomics(store, dataclasses.replace(CONFIG, picture=True), execution=QUIET)
    assert "reference" in opened
    assert any("1 of 2 cases have a reference" in note for note in result.notes)
    assert (store.path / "radiomics.png").read_bytes().startswith(b"\x89PNG")


def test_table_and_picture_of_a_partly_failed_cohort(store: Store) -> None:
    broken = add_case(store, "case-2", seed=2)
    broken.write_bytes(b"no HDF5")
    result = extract_radiomics(store, dataclasses.replace(CONFIG, csv=True, picture=True), execution=QUIET)
    assert result.exit_code == 8
    text = (store.path / "radiomics.csv").read_text(encoding="utf-8")
    assert "case-1" in text
    assert "case-2" not in text
    assert any("2 cases" in note for note in result.notes)


def test_picture_of_too_few_windows_is_not_made(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=1)
    config = dataclasses.replace(CONFIG, window=40, stride=40, picture=True, min_lung_fraction=0.05)
    result = extract_radiomics(store, config, execution=QUIET)
    assert "radiomics.png is not written: fewer than three windows have a descriptor" in result.notes
    assert not (store.path / "radiomics.png").exists()


def test_figure_needs_names_and_rows() -> None:
    from lungseg.errors import InputError

    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 34))
    values[:30, 3] = np.nan
    tissues = np.repeat([Tissue.HEALTHY, Tissue.GGO], 30)
    plain = descriptor_figure_png(values, FEATURE_NAMES, title="a $ b")
    assert plain.startswith(b"\x89PNG")
    assert plain != descriptor_figure_png(values, FEATURE_NAMES, title="a $ b", tissues=tissues)
    with pytest.raises(InputError, match="names"):
        descriptor_figure_png(values[:, :33], FEATURE_NAMES, title="")
    with pytest.raises(InputError, match="valid"):
        descriptor_figure_png(values[:30], FEATURE_NAMES, title="")


def test_correlations_are_spearmans() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    values = rng.normal(size=(50, 5))
    values[:, 1] = np.exp(values[:, 0]) + rng.normal(size=50) * 0.1
    np.testing.assert_allclose(correlations(values), spearmanr(values).statistic, atol=1e-12)
    values[:, 2] = 1.0
    assert np.abs(correlations(values)[2, [0, 1, 3, 4]]).max() == 0.0

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
from lungseg.scan.volume import Geometry
from lungseg.stages import extract_radiomics as stage
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
    """Healthy lung, and consolidation where the tiny chest is dense.

    On another grid than the descriptors, as ``preprocess`` keeps it: the whole scan, here of half the spacing.
    """
    with store.open(case_id, "volume") as volume:
        image, mask = volume.read("image"), volume.read("mask")
        grid = Geometry.from_dict(volume.provenance["grid"])
    labels = np.where(mask > 0, np.where(image > -600, Tissue.CONSOLIDATION, Tissue.HEALTHY), 0).astype(np.uint8)
    spacing = np.asarray(grid.spacing_mm) / 2
    labels = np.pad(labels.repeat(2, 0).repeat(2, 1).repeat(2, 2), ((3, 5), (4, 0), (1, 2)))
    origin = np.asarray(grid.origin_mm) - np.asarray(grid.direction) @ (spacing * (np.array([3, 4, 1]) + 0.5))
    full = Geometry(labels.shape, tuple(spacing.tolist()), tuple(origin.tolist()), grid.direction)
    provenance = make_provenance("preprocess", {}, inputs={}, grid=full.to_dict())
    write_artefact(store.case_file(case_id, "reference"), "reference", {"labels": labels}, provenance=provenance)


def features(store: Store, case_id: str) -> np.ndarray:
    with store.open(case_id, "radiomics") as radiomics:
        return radiomics.read("features")


def test_names_and_codes_are_in_the_artefact(store: Store) -> None:
    extract_radiomics(store, dataclasses.replace(CONFIG, mcc=False), execution=QUIET).require_complete()
    with store.open("case-0", "radiomics") as radiomics:
        assert tuple(radiomics.provenance["feature_names"]) == feature_names(mcc=False)
        assert radiomics.provenance["ibsi_codes"] == IBSI_CODES


@pytest.mark.parametrize("mcc", [True, False])
def test_backends_agree_in_the_store(store: Store, mcc: bool) -> None:
    pytest.importorskip("radiomics")
    few = dataclasses.replace(CONFIG, stride=12, mcc=mcc)
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


def test_windows_in_the_picture_have_the_tissue_that_stands_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference lies on the scan's grid, the windows on that of the resampled lungs: matched by position."""
    add_reference(store, "case-0")
    drawn: list[np.ndarray] = []

    def spy(features: np.ndarray, names: tuple[str, ...], *, title: str, tissues: np.ndarray) -> bytes:
        drawn.append(tissues)
        return descriptor_figure_png(features, names, title=title, tissues=tissues)

    monkeypatch.setattr(stage, "descriptor_figure_png", spy)
    extract_radiomics(store, dataclasses.replace(CONFIG, picture=True), execution=QUIET)
    with store.open("case-0", "radiomics") as radiomics, store.open("case-0", "volume") as volume:
        corners, image, mask = radiomics.read("corner"), volume.read("image"), volume.read("mask")
    expected = []
    for z, y, x in corners.tolist():
        box = (slice(z, z + 8), slice(y, y + 8), slice(x, x + 8))
        dense = np.mean(image[box][mask[box] > 0] > -600)
        expected.append(Tissue.CONSOLIDATION if dense > 0.5 else Tissue.HEALTHY if dense < 0.5 else 0)
    assert drawn[0][: len(corners)].tolist() == expected
    assert {Tissue.CONSOLIDATION, Tissue.HEALTHY} <= set(expected)
    assert not drawn[0][len(corners) :].any()  # case-1 has no reference


def test_a_shard_says_what_it_does_not_write(store: Store) -> None:
    shard = dataclasses.replace(QUIET, shard="1/2")
    result = extract_radiomics(store, dataclasses.replace(CONFIG, csv=True, picture=True), execution=shard)
    assert "standardisation.json and radiomics.csv and radiomics.png are written by a run without" in result.notes[0]
    assert not list(store.path.glob("radiomics.*"))


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

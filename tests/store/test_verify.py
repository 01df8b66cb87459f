"""doctor STORE: each kind of damage is found and comes with its cure; a sound store has no finding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_store import make_store

from lungseg.store.atomic import write_json
from lungseg.store.cases import Store
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.store.verify import verify_store

CASE = "cases/case-0"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Volumes, radiomics, clusters, labels and a fit."""
    store = make_store(tmp_path / "cohort", cases=2)
    for case_id in store.case_ids():
        with store.open(case_id, "volume") as volume:
            mark = {"volume.h5": volume.fingerprint}
        radiomics = {"corner": np.zeros((2, 3), np.int32), "features": np.zeros((2, 34), np.float32)}
        path = store.case_file(case_id, "radiomics")
        write_artefact(path, "radiomics", radiomics, provenance=make_provenance("extract-radiomics", {}, inputs=mark))
        clusters = {"posterior": np.zeros((2, 3, 3, 3), np.float16), "coverage": np.zeros((3, 3, 3), np.uint8)}
        path = store.case_file(case_id, "clusters", "gmm")
        inputs = {**mark, "model": "m", "fit": "f"}
        clusters_mark = write_artefact(
            path, "clusters", clusters, provenance=make_provenance("cluster", {}, inputs=inputs)
        )
        labels = {"labels": np.zeros((3, 3, 3), np.uint8), "confidence": np.zeros((3, 3, 3), np.uint8)}
        path = store.case_file(case_id, "labels", "gmm")
        inputs = {**mark, "clusters.gmm.h5": clusters_mark}
        write_artefact(path, "labels", labels, provenance=make_provenance("refine", {}, inputs=inputs))
    store.fit_dir("gmm").mkdir(parents=True)
    write_json(store.fit_dir("gmm") / "clusters.json", {"components": []})
    save_file({"means": np.zeros(3)}, store.fit_dir("gmm") / "mixture.safetensors")
    write_json(store.path / "standardisation.json", {"windows": {}})
    return store


def findings(store: Store) -> dict[str, tuple[str, str]]:
    return {str(f.path.relative_to(store.path)): (f.problem, f.fix) for f in verify_store(store)}


def test_a_sound_store_has_every_file_and_no_problem(store: Store) -> None:
    found = findings(store)
    assert len(found) == 2 * 4 + 3
    assert set(found.values()) == {("", "")}


def rewrite(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def truncated(case: Path) -> None:
    path = case / "volume.h5"
    path.write_bytes(path.read_bytes()[:5000])


def empty(case: Path) -> None:
    (case / "radiomics.h5").write_bytes(b"")


def bit_rot(case: Path) -> None:
    with h5py.File(case / "volume.h5") as file:
        info = file["image"].id.get_chunk_info(0)
    data = bytearray((case / "volume.h5").read_bytes())
    data[info.byte_offset + 20] ^= 1
    (case / "volume.h5").write_bytes(data)


def edited(case: Path) -> None:
    """Changed with h5py: checksums are right, the fingerprint is not."""

    def change(file: h5py.File) -> None:
        file["labels"][0, 0, 0] = 3

    rewrite(case / "labels.gmm.h5", change)


def edited_settings(case: Path) -> None:
    def change(file: h5py.File) -> None:
        file.attrs["provenance"] = np.bytes_(file.attrs["provenance"].replace(b'"stage":"refine"', b'"stage":"other"'))

    rewrite(case / "labels.gmm.h5", change)


def no_inputs(case: Path) -> None:
    def change(file: h5py.File) -> None:
        file.attrs["provenance"] = np.bytes_(b"{}")

    rewrite(case / "radiomics.h5", change)


def stale(case: Path) -> None:
    """The posteriors were made again, the labels were not."""
    content = {"posterior": np.ones((2, 3, 3, 3), np.float16), "coverage": np.ones((3, 3, 3), np.uint8)}
    with h5py.File(case / "volume.h5") as file:
        mark = {"volume.h5": file.attrs["fingerprint"].decode()}
    provenance = make_provenance("cluster", {}, inputs=mark)
    write_artefact(case / "clusters.gmm.h5", "clusters", content, provenance=provenance)


def input_gone(case: Path) -> None:
    (case / "clusters.gmm.h5").unlink()


def stranger(case: Path) -> None:
    (case / "thesis.h5").write_bytes(b"x")


def interrupted(case: Path) -> None:
    (case / "radiomics.h5.partial").write_bytes(b"x")


def external(case: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["source/mask"]
        file["source/mask"] = h5py.ExternalLink("/etc/passwd", "/")

    rewrite(case / "volume.h5", change)


def fit_json(case: Path) -> None:
    (case.parents[1] / "fits/gmm/clusters.json").write_text("{")


def fit_mixture(case: Path) -> None:
    (case.parents[1] / "fits/gmm/mixture.safetensors").write_bytes(b"\xff" * 64)


def standardisation(case: Path) -> None:
    (case.parents[1] / "standardisation.json").write_bytes(b"\xff")


RERUN = "delete it and run its stage again"


@pytest.mark.parametrize(
    ("damage", "file", "problem", "fix"),
    [
        (truncated, f"{CASE}/volume.h5", "not a readable HDF5 file", RERUN),
        (empty, f"{CASE}/radiomics.h5", "not a readable HDF5 file", RERUN),
        (bit_rot, f"{CASE}/volume.h5", "image is damaged", RERUN),
        (edited, f"{CASE}/labels.gmm.h5", "content does not match its fingerprint", RERUN),
        (edited_settings, f"{CASE}/labels.gmm.h5", "content does not match its fingerprint", RERUN),
        (no_inputs, f"{CASE}/radiomics.h5", "no fingerprint or inputs in its header", RERUN),
        (stale, f"{CASE}/labels.gmm.h5", "made from another clusters.gmm.h5 than the one beside it", RERUN),
        (
            input_gone,
            f"{CASE}/labels.gmm.h5",
            "made from clusters.gmm.h5, which is missing",
            "make clusters.gmm.h5 again",
        ),
        (stranger, f"{CASE}/thesis.h5", "not a file of the store's layout", "move it elsewhere"),
        (interrupted, f"{CASE}/radiomics.h5.partial", "left by an interrupted run", "run the same command again"),
        (external, f"{CASE}/volume.h5", "is a link to elsewhere", RERUN),
        (fit_json, "fits/gmm/clusters.json", "is damaged", RERUN),
        (fit_mixture, "fits/gmm/mixture.safetensors", "is damaged", RERUN),
        (standardisation, "standardisation.json", "is damaged", RERUN),
    ],
)
def test_row_38_43_each_damage_is_found_with_its_cure(
    store: Store, damage: Callable[[Path], None], file: str, problem: str, fix: str
) -> None:
    damage(store.path / CASE)
    bad = {name: found for name, found in findings(store).items() if found[0]}
    assert list(bad) == [file]  # nothing else is accused
    assert problem in bad[file][0]
    assert fix in bad[file][1]


def test_volume_made_again_accuses_all_that_came_from_it(store: Store) -> None:
    (store.path / CASE / "volume.h5").write_bytes((store.path / "cases/case-1/volume.h5").read_bytes())
    bad = {name for name, found in findings(store).items() if found[0]}
    assert bad == {f"{CASE}/{name}" for name in ("radiomics.h5", "clusters.gmm.h5", "labels.gmm.h5")}


def test_volume_deleted_accuses_all_that_came_from_it(store: Store) -> None:
    (store.path / CASE / "volume.h5").unlink()
    bad = {name: found for name, found in findings(store).items() if found[0]}
    assert len(bad) == 3
    assert all("made from volume.h5, which is missing" in problem for problem, _ in bad.values())


def test_row_45_empty_store_has_no_finding(tmp_path: Path) -> None:
    assert findings(make_store(tmp_path / "cohort", cases=0)) == {}

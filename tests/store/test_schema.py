"""Writing artefacts: the same content gives the same bytes, another content another fingerprint."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from tiny_store import volume_datasets, volume_provenance

from lungseg.errors import MismatchError, ResourceError
from lungseg.store.reader import Artefact
from lungseg.store.schema import MAX_CHUNK_BYTES, SCHEMA, check_current, fingerprint, make_provenance, write_artefact

RNG = np.random.default_rng(0)


def example(kind: str) -> dict[str, np.ndarray]:
    """Random content of every dataset of a kind."""
    return {
        name: RNG.integers(0, 50, size=(5, 6, 7, 8)[: spec.rank]).astype(spec.dtype)
        for name, spec in SCHEMA[kind].items()
    }


PROVENANCE = make_provenance("test", {"a": 1, "b": [1, 2]}, inputs={"volume.h5": "0" * 64}, note="x")


@pytest.mark.parametrize("kind", SCHEMA)
def test_what_is_written_is_read(tmp_path: Path, kind: str) -> None:
    content = example(kind)
    mark = write_artefact(tmp_path / "a.h5", kind, content, provenance=PROVENANCE)
    with Artefact(tmp_path / "a.h5", kind) as artefact:
        assert artefact.fingerprint == mark == fingerprint(kind, PROVENANCE, content)
        assert artefact.provenance == PROVENANCE
        assert artefact.names() == list(content)
        for name, array in content.items():
            np.testing.assert_array_equal(artefact.read(name), array)
            assert artefact.shape(name) == array.shape
            assert name in artefact
        assert "nothing" not in artefact


@pytest.mark.parametrize("kind", SCHEMA)
def test_empty_content_is_read_back(tmp_path: Path, kind: str) -> None:
    content = {name: np.zeros((0,) * spec.rank, spec.dtype) for name, spec in SCHEMA[kind].items()}
    write_artefact(tmp_path / "a.h5", kind, content, provenance=PROVENANCE)
    with Artefact(tmp_path / "a.h5", kind) as artefact:
        for name in content:
            assert artefact.read(name).size == 0


def test_same_content_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        content = volume_datasets(3)
        content["source/image"] = content["image"]  # a hard link, and a group that exists for it alone
        time.sleep(1.1 if name == "b" else 0)  # HDF5 keeps times in whole seconds
        write_artefact(
            tmp_path / name, "volume", content, provenance=volume_provenance("c", content),
            attributes={"image": {"unit": "HU", "spacing_mm": [1.5] * 3}},
        )  # fmt: skip
        os.utime(tmp_path / name, (0, 0))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_time_stamps_and_no_names_of_this_machine(tmp_path: Path) -> None:
    write_artefact(tmp_path / "a.h5", "reference", example("reference"), provenance=PROVENANCE)
    with h5py.File(tmp_path / "a.h5") as file:
        info = h5py.h5o.get_info(file["labels"].id)
        assert (info.mtime, info.ctime) == (0, 0) if hasattr(info, "mtime") else True
    assert os.fsencode(tmp_path) not in (tmp_path / "a.h5").read_bytes()


def test_fingerprint_changes_with_any_content() -> None:
    base = example("volume")
    marks = {fingerprint("volume", PROVENANCE, base)}
    for name, array in base.items():
        changed = array.copy()
        changed.flat[array.size // 2] += 1
        marks.add(fingerprint("volume", PROVENANCE, {**base, name: changed}))
        marks.add(fingerprint("volume", PROVENANCE, {**base, name: array.reshape(1, *array.shape)}))
    marks.add(fingerprint("volume", make_provenance("test", {"a": 2, "b": [1, 2]}), base))
    marks.add(fingerprint("volume", {**PROVENANCE, "note": "y"}, base))
    marks.add(fingerprint("volume", {**PROVENANCE, "inputs": {"volume.h5": "1" * 64}}, base))
    marks.add(fingerprint("reference", PROVENANCE, base))
    assert len(marks) == 1 + 2 * len(base) + 4


def test_fingerprint_does_not_depend_on_memory_layout() -> None:
    base = example("volume")
    other = {name: np.asfortranarray(array) for name, array in reversed(base.items())}
    assert fingerprint("volume", PROVENANCE, base) == fingerprint("volume", PROVENANCE, other)


def test_shared_arrays_become_hard_links(tmp_path: Path) -> None:
    content = volume_datasets()
    apart = {**content, "source/image": content["image"].copy(), "source/mask": content["mask"].copy()}
    mark = write_artefact(tmp_path / "linked.h5", "volume", content, provenance=PROVENANCE)
    assert write_artefact(tmp_path / "apart.h5", "volume", apart, provenance=PROVENANCE) == mark
    with h5py.File(tmp_path / "linked.h5") as file:
        assert file["image"] == file["source/image"]
        assert file["mask"] == file["source/mask"]
    assert (tmp_path / "linked.h5").stat().st_size < 0.6 * (tmp_path / "apart.h5").stat().st_size
    with Artefact(tmp_path / "linked.h5", "volume") as linked, Artefact(tmp_path / "apart.h5", "volume") as both:
        for name in content:
            np.testing.assert_array_equal(linked.read(name), both.read(name))


def test_attributes_for_people_who_use_plain_h5py(tmp_path: Path) -> None:
    write_artefact(
        tmp_path / "a.h5", "reference", example("reference"), provenance=PROVENANCE,
        attributes={"labels": {"unit": "class", "spacing_mm": [1.0, 2.0, 3.0]}},
    )  # fmt: skip
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["labels"].attrs["unit"] == "class"
        assert file["labels"].fletcher32
        assert file["labels"].compression == "gzip"
    with Artefact(tmp_path / "a.h5", "reference") as artefact:
        assert list(artefact.attributes("labels")["spacing_mm"]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"labels": None}, r"missing \['labels'\]"),
        ({"extra": np.zeros(3)}, r"unknown \['extra'\]"),
        ({"labels": np.zeros((2, 2, 2), np.int16)}, "int16 rank 3"),
        ({"labels": np.zeros((2, 2), np.uint8)}, "uint8 rank 2"),
    ],
)
def test_wrong_content_is_a_bug_not_a_file(tmp_path: Path, change: dict[str, Any], phrase: str) -> None:
    content = {k: v for k, v in {**example("reference"), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=phrase):
        write_artefact(tmp_path / "a.h5", "reference", content, provenance=PROVENANCE)
    assert list(tmp_path.iterdir()) == []


def test_chunks_stay_below_what_the_reader_accepts(tmp_path: Path) -> None:
    """A posterior on a fine lattice: one class alone is larger than the largest chunk."""
    posterior = np.zeros((2, 340, 340, 340), np.float16)
    assert posterior[0].nbytes > MAX_CHUNK_BYTES
    content = {"posterior": posterior, "coverage": np.zeros(posterior.shape[1:], np.uint8)}
    write_artefact(tmp_path / "a.h5", "clusters", content, provenance=PROVENANCE)
    with Artefact(tmp_path / "a.h5", "clusters") as artefact:
        assert artefact.shape("posterior") == posterior.shape


def test_row_60_real_full_disk_does_not_crash_the_process(tmp_path: Path) -> None:
    """HDF5 itself ends in a segmentation fault here; the limit on file sizes stands for the full disk."""
    code = """
import resource, sys
import numpy as np
from pathlib import Path
from lungseg.errors import ResourceError
from lungseg.store.schema import write_artefact
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
labels = np.random.default_rng(0).integers(0, 255, (64, 64, 64)).astype("uint8")
try:
    write_artefact(Path(sys.argv[1]), "reference", {"labels": labels}, provenance={"inputs": {}})
except ResourceError as error:
    print(error.exit_code, error)
"""
    path = tmp_path / "reference.h5"
    write_artefact(path, "reference", example("reference"), provenance=PROVENANCE)
    before = path.read_bytes()
    assert resource.RLIMIT_FSIZE
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 disk full while writing")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["reference.h5"]


def test_row_60_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="disk full") as caught:
        write_artefact(tmp_path / "a.h5", "reference", example("reference"), provenance=PROVENANCE)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from tiny_store import volume_datasets, volume_provenance
from lungseg.store.schema import write_artefact
os.replace = lambda *_: os.kill(os.getpid(), 9)
content = volume_datasets(7)
write_artefact(Path(sys.argv[1]), "volume", content, provenance=volume_provenance("c", content))
"""


def test_row_37_killed_before_the_rename(tmp_path: Path) -> None:
    """The old artefact is intact; the rerun gives the bytes of an uninterrupted run."""
    path, expected = tmp_path / "case" / "volume.h5", tmp_path / "volume.h5"
    old, new = volume_datasets(6), volume_datasets(7)
    write_artefact(path, "volume", old, provenance=volume_provenance("c", old))
    before = path.read_bytes()
    code = KILLED.format(path=[str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in sorted(path.parent.iterdir())] == ["volume.h5", "volume.h5.partial"]
    for target in (path, expected):
        write_artefact(target, "volume", new, provenance=volume_provenance("c", new))
    assert path.read_bytes() == expected.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["volume.h5"]


@pytest.mark.parametrize(
    ("existing", "wanted"),
    [
        ({"config": {"a": (1, 2), "b": None}}, {"config": {"a": [1, 2]}}),
        ({"config": {"spacing_mm": 1}}, {"config": {"spacing_mm": 1.0}}),
        ({"config": {}, "inputs": {}, "lungseg_version": "9"}, {}),
    ],
)
def test_equal_settings_are_current(existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    check_current(existing, wanted, what="x")


def test_row_39_other_settings_are_all_named() -> None:
    existing = {"config": {"window": 32, "stride": 16, "same": 1}, "inputs": {"volume.h5": "a" * 64}}
    wanted = {"config": {"window": 8, "seed": 1, "same": 1}, "inputs": {"volume.h5": "b" * 64}}
    with pytest.raises(MismatchError) as caught:
        check_current(existing, wanted, what="radiomics.h5")
    assert caught.value.exit_code == 4
    text = str(caught.value)
    for part in (
        "radiomics.h5 was made with other settings", "window: there 32, now 8", "stride: there 16, now None",
        "seed: there None, now 1", f"input volume.h5: there {'a' * 12}", f"now {'b' * 12}", "--overwrite",
    ):  # fmt: skip
        assert part in text
    assert "same" not in text
    assert "a" * 13 not in text

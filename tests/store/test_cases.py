"""The store as a folder: who may make it, what may stand in it, and what its files are called."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_store import SETTINGS, add_case, make_store, volume_provenance

from lungseg.errors import InputError, MismatchError, StoreError
from lungseg.store.cases import Store, check_id_map_place, check_name, hashed_id, read_id_map, write_id_map
from lungseg.store.reader import Artefact

GOOD_NAMES = ["a", "A-1", "case_7", "1.2.840.113", "-leading", "x" * 64, "comet", "con_", "a.b"]
BAD_NAMES = [
    "", ".", "..", ".hidden", "a/b", "../x", "/abs", "a\\b", "a b", "a\n", "\na", "ä", "１", "x" * 65, "a:b", "a*",
    "a?", 'a"', "a<", "a|b", "$HOME", "a;b", "con", "CON", "nul.h5", "com1", "LPT9.x", "aux", "prn", "a\x00b", "a.",
    "a.partial",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_row_36_names_that_are_not_safe(name: str) -> None:
    """Security point 3: no path, no reserved name, nothing a shell or Windows would trip over."""
    with pytest.raises(InputError, match="use letters, digits") as caught:
        check_name(name)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("link", ["cases/c1", "cases", "fits/gmm", "fits"])
def test_security_3_no_link_leads_out_of_the_store(tmp_path: Path, link: str) -> None:
    store, outside = create(tmp_path / "store"), tmp_path / "outside"
    outside.mkdir()
    (store.path / link).parent.mkdir(exist_ok=True)
    (store.path / link).symlink_to(outside)
    with pytest.raises(StoreError, match="a link that leads out of the store") as caught:
        store.fit_dir("gmm") if link.startswith("fits") else store.case_file("c1", "volume")
    assert caught.value.exit_code == 6
    if link.startswith("cases"):
        with pytest.raises(StoreError, match="a link that leads out of the store"):
            store.lock_file("c1", "preprocess")
    assert not list(outside.iterdir())
    assert store.case_file("c2", "volume").name == "volume.h5" if link == "cases/c1" else True


def test_security_3_the_store_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    create(tmp_path / "store")
    (tmp_path / "link").symlink_to("store")
    assert Store(tmp_path / "link").case_file("c1", "volume") == tmp_path / "link/cases/c1/volume.h5"


@given(st.text(max_size=70))
def test_accepted_names_stay_in_their_folder(name: str) -> None:
    try:
        check_name(name)
    except InputError:
        return
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name)
    assert os.path.normpath(os.path.join("/store/cases", name)) == f"/store/cases/{name}"


def test_hashed_ids_are_stable_and_depend_on_the_salt() -> None:
    # printf 1.2.3 | openssl dgst -sha256 -hmac salt
    assert hashed_id("salt", "1.2.3") == hashed_id("salt", b"1.2.3") == "c28d8a4cae63"
    first = hashed_id("salt", "1.2.3")
    assert re.fullmatch("[0-9a-f]{12}", first)
    assert first != hashed_id("pepper", "1.2.3")
    assert first != hashed_id("salt", "1.2.4")


def create(path: Path, **changed: Any) -> Store:
    options = {"config": SETTINGS, "salt": "salt", "provenance": "made for a test", **changed}
    return Store.create(path, **options)


def test_new_store(tmp_path: Path) -> None:
    store = create(tmp_path / "deep" / "cohort")
    assert sorted(p.name for p in store.path.iterdir()) == ["store.json"]
    assert store.salt == "salt"
    assert store.case_ids() == []
    assert store.header["config"] == SETTINGS
    assert Store(store.path).header == store.header
    text = (store.path / "store.json").read_text()
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d", text)  # no time stamp


def test_random_salt_is_long_and_kept(tmp_path: Path) -> None:
    salt = create(tmp_path / "a", salt="").salt
    assert re.fullmatch("[0-9a-f]{32}", salt)
    assert create(tmp_path / "a", salt="").salt == salt
    assert create(tmp_path / "b", salt="").salt != salt


def test_row_62_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cohort").write_text("mine")
    with pytest.raises(InputError, match=r"cohort is a file"):
        create(tmp_path / "cohort")
    assert (tmp_path / "cohort").read_text() == "mine"


def test_row_62_folder_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="is not a patch store"):
        create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_empty_folder_and_remains_of_a_killed_start_are_taken(tmp_path: Path) -> None:
    (tmp_path / "store.json.partial").write_text("{")
    assert create(tmp_path).salt == "salt"
    assert [p.name for p in tmp_path.iterdir()] == ["store.json"]


def test_row_39_other_settings_are_refused(tmp_path: Path) -> None:
    create(tmp_path)
    other = {**SETTINGS, "spacing_mm": 0.6}
    with pytest.raises(MismatchError, match=r"spacing_mm: there 1.5, now 0.6") as caught:
        create(tmp_path, config=other)
    assert caught.value.exit_code == 4
    assert create(tmp_path, config=other, overwrite=True).header["config"]["spacing_mm"] == 0.6
    assert create(tmp_path, config=other).salt == "salt"


def test_other_salt_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    create(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(MismatchError, match="another --salt"):
            create(tmp_path, config={**SETTINGS, "salt": "pepper"}, overwrite=overwrite)
    assert create(tmp_path, config={**SETTINGS, "salt": "salt"}).salt == "salt"


@pytest.mark.parametrize(
    ("header", "error", "phrase"),
    [
        (None, StoreError, r"is not a patch store .*lungseg preprocess SCANS -o"),
        ("[]", StoreError, "not a JSON object"),
        ("{", StoreError, "is damaged"),
        ('{"format": "other"}', MismatchError, "store of format None"),
        (
            '{"format": "lungseg-store", "format_version": 99}',
            MismatchError,
            "store of format 99; this lungseg reads 1",
        ),
        ('{"format": "lungseg-store", "format_version": 1}', StoreError, "lungseg_version, config, salt"),
    ],
)
def test_row_38_39_what_is_no_store(tmp_path: Path, header: str | None, error: type[Exception], phrase: str) -> None:
    if header is not None:
        (tmp_path / "store.json").write_text(header)
    with pytest.raises(error, match=phrase):
        Store(tmp_path)


def test_row_45_empty_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no complete case; run: lungseg preprocess"):
        create(tmp_path).require_cases()


def test_cases_are_those_with_a_complete_volume(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=2)
    (store.path / "cases" / "half").mkdir()
    (store.path / "cases" / "half" / "volume.h5.partial").touch()
    assert store.case_ids() == store.require_cases() == ["case-0", "case-1"]
    assert store.leftovers() == [store.path / "cases" / "half" / "volume.h5.partial"]


def test_paths_of_artefacts(tmp_path: Path) -> None:
    store = create(tmp_path)
    assert store.case_file("a", "volume") == tmp_path / "cases" / "a" / "volume.h5"
    assert store.case_file("a", "labels", "gmm") == tmp_path / "cases" / "a" / "labels.gmm.h5"
    assert store.lock_file("a", "refine") == tmp_path / "cases" / "a" / ".refine.lock"
    assert store.fit_dir("gmm") == tmp_path / "fits" / "gmm"
    for call in (
        lambda: store.case_file("../a", "volume"),
        lambda: store.case_file("a", "labels", "../../x"),
        lambda: store.lock_file("..", "refine"),
        lambda: store.fit_dir("a/b"),
    ):
        with pytest.raises(InputError):
            call()


def test_is_done(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=1)
    path = store.case_file("case-0", "volume")
    with Artefact(path, "volume") as artefact:
        wanted = artefact.provenance
    other = {**wanted, "inputs": {"scan": "another"}}
    assert not store.is_done(store.case_file("none", "volume"), "volume", wanted, overwrite=False)
    assert store.is_done(path, "volume", wanted, overwrite=False)
    assert store.is_done(path, "volume", wanted, overwrite=True)
    with pytest.raises(MismatchError, match=r"volume.h5 was made with other settings or inputs \(input scan"):
        store.is_done(path, "volume", other, overwrite=False)
    assert not store.is_done(path, "volume", other, overwrite=True)


def test_row_38_damaged_result_is_made_again_with_overwrite_only(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=1)
    path = store.case_file("case-0", "volume")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreError, match="not a readable HDF5 file"):
        store.is_done(path, "volume", {}, overwrite=False)
    assert not store.is_done(path, "volume", {}, overwrite=True)


STARTER = """
import sys, time
from pathlib import Path
from lungseg.store.cases import Store
time.sleep(max(0, float(sys.argv[2]) - time.time()))
print(Store.create(Path(sys.argv[1]), config={"a": 1}, salt="", provenance="x").salt)
"""


def test_row_66_shards_that_start_together_make_one_store(tmp_path: Path) -> None:
    start = str(time.time() + 0.8)
    shards = [
        subprocess.Popen([sys.executable, "-c", STARTER, tmp_path / "s", start], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    salts = {shard.communicate()[0].strip() for shard in shards}
    assert salts == {Store(tmp_path / "s").salt}
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["store.json"]


ROWS = [("case-b", "p1", "/scans/Müller, Anna/1"), ("case-a", "p1", "-leading 'name'\"")]


def test_id_map_is_private_sorted_and_grows(tmp_path: Path) -> None:
    path, store = tmp_path / "ids.csv", tmp_path / "cohort"
    assert read_id_map(path) == []
    write_id_map(path, store, ROWS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [row["case_id"] for row in read_id_map(path)] == ["case-a", "case-b"]
    write_id_map(path, store, [("case-c", "p2", "new"), ("case-a", "p9", "moved")])
    rows = {row["case_id"]: (row["patient_id"], row["source"]) for row in read_id_map(path)}
    assert rows == {"case-a": ("p9", "moved"), "case-b": ("p1", ROWS[0][2]), "case-c": ("p2", "new")}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


MAPPER = """
import sys, time
from pathlib import Path
from lungseg.store.cases import write_id_map
time.sleep(max(0, float(sys.argv[2]) - time.time()))
write_id_map(Path(sys.argv[1]), Path("store"), [(f"case-{sys.argv[3]}", "p", "s")])
"""


def test_row_66_shards_add_their_rows_to_one_id_map(tmp_path: Path) -> None:
    start = str(time.time() + 0.8)
    shards = [subprocess.Popen([sys.executable, "-c", MAPPER, tmp_path / "ids.csv", start, str(i)]) for i in range(4)]
    assert [shard.wait() for shard in shards] == [0, 0, 0, 0]
    assert [row["case_id"] for row in read_id_map(tmp_path / "ids.csv")] == [f"case-{i}" for i in range(4)]
    assert [p.name for p in tmp_path.iterdir()] == ["ids.csv"]


@pytest.mark.parametrize(
    "place", ["cohort/ids.csv", "cohort/cases/ids.csv", "cohort/../cohort/ids.csv", "link/ids.csv"]
)
def test_id_map_never_lies_in_the_store(tmp_path: Path, place: str) -> None:
    store = create(tmp_path / "cohort")
    (tmp_path / "link").symlink_to(store.path)
    with pytest.raises(InputError, match="lies inside the store"):
        write_id_map(tmp_path / place, store.path, ROWS)
    assert [p.name for p in store.path.iterdir()] == ["store.json"]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "case_id,patient_id,source\nx,y\n", "\x00\n\x00"])
def test_other_files_are_no_id_maps(tmp_path: Path, content: str) -> None:
    (tmp_path / "ids.csv").write_text(content)
    with pytest.raises(InputError, match=r"ids\.csv"):
        read_id_map(tmp_path / "ids.csv")


def test_id_map_keeps_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"/scans/M\xfcller")
    write_id_map(tmp_path / "ids.csv", tmp_path / "cohort", [("a", "a", name)])
    assert read_id_map(tmp_path / "ids.csv")[0]["source"] == name


def test_store_json_holds_no_path(tmp_path: Path) -> None:
    store = make_store(tmp_path / "Doe_John", cases=1)
    assert "Doe" not in json.dumps(store.header)
    assert "Doe" not in json.dumps(volume_provenance("c", {"image": np.zeros((1, 1, 1)), "mask": np.zeros((1, 1, 1))}))
    assert b"Doe" not in add_case(store, "x").read_bytes()


def test_row_62_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for place in ("thesis.tex/cohort", "thesis.tex/deep/cohort"):
        with pytest.raises(InputError, match=r"thesis.tex is a file"):
            create(tmp_path / place)


def test_id_map_beside_a_store_of_the_same_beginning(tmp_path: Path) -> None:
    check_id_map_place(tmp_path / "cohort-ids.csv", tmp_path / "cohort")
    with pytest.raises(InputError, match="lies inside the store"):
        check_id_map_place(tmp_path / "cohort" / "ids.csv", tmp_path / "cohort")


@pytest.mark.parametrize(
    ("key", "value"), [("spacing_mm", 0.6), ("patch_size", [8, 16, 16]), ("patch_stride", [4, 8, 8])]
)
def test_cases_of_other_settings_than_the_stores_are_listed(tmp_path: Path, key: str, value: Any) -> None:
    store = make_store(tmp_path / "cohort", cases=2)
    store.check_uniform()
    other = create(store.path, config={**SETTINGS, key: value}, overwrite=True)
    other.check_uniform([])
    with pytest.raises(MismatchError, match="2 cases were made with other settings") as caught:
        other.check_uniform()
    for case_id in store.case_ids():
        assert f"{case_id} ({key} {SETTINGS[key]})" in str(caught.value)
    with pytest.raises(MismatchError, match="1 cases") as caught:
        other.check_uniform(["case-1"])
    assert "case-0" not in str(caught.value)
    assert caught.value.exit_code == 4
    create(store.path, config={**SETTINGS, "min_lung_fraction": 0.1}, overwrite=True).check_uniform()


def test_stores_that_state_no_spacing_are_uniform(tmp_path: Path) -> None:
    """Synthetic ones: their settings are those of the sampler."""
    store = create(tmp_path, config={"steps": 20, "seed": 0})
    add_case(store, "case-0")
    store.check_uniform()


def test_long_lists_of_other_cases_are_cut(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cohort", cases=1)
    for number in range(1, 12):
        (store.path / "cases" / f"case-{number:02d}").mkdir()
        shutil.copy(store.case_file("case-0", "volume"), store.case_file(f"case-{number:02d}", "volume"))
    other = create(store.path, config={**SETTINGS, "spacing_mm": 0.6}, overwrite=True)
    with pytest.raises(MismatchError, match=r"12 cases .* and 2 more\."):
        other.check_uniform()

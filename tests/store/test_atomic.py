"""Atomic writes: whatever happens, a file is either the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lungseg.errors import ResourceError, StoreError
from lungseg.store import atomic
from lungseg.store.atomic import atomic_path, canonical_json, read_json, write_bytes, write_json, write_text


def write_file(final: Path, text: str) -> None:
    write_text(final, text)


def write_folder(final: Path, text: str) -> None:
    with atomic_path(final) as partial:
        partial.mkdir()
        (partial / "part.txt").write_text(text)
        write_text(partial / "inner.json", text)


def content(final: Path) -> str:
    if final.is_dir():
        assert sorted(p.name for p in final.iterdir()) == ["inner.json", "part.txt"]
        return (final / "part.txt").read_text()
    return final.read_text()


WRITERS = [write_file, write_folder]


@pytest.mark.parametrize("write", WRITERS)
def test_writes_and_replaces_leaving_nothing_else(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    final = tmp_path / "new" / "folder" / "artefact"
    write(final, "old")
    write(final, "new")
    assert content(final) == "new"
    assert [p.name for p in final.parent.iterdir()] == ["artefact"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("write", WRITERS)
def test_exception_in_the_block_keeps_the_old_one(
    tmp_path: Path, write: Callable[[Path, str], None], error: BaseException
) -> None:
    final = tmp_path / "artefact"
    write(final, "old")
    with pytest.raises(type(error)), atomic_path(final) as partial:  # noqa: PT012
        if write is write_folder:
            partial.mkdir()
            (partial / "half").write_text("half")
        else:
            partial.write_text("half")
        assert content(final) == "old"
        raise error
    assert content(final) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


@pytest.mark.parametrize(
    ("write", "step"),
    [
        (write_file, "replace"),
        (write_file, "fsync"),
        (write_folder, "replace"),
        (write_folder, "rename"),  # files are replaced in one step, folders in two
        (write_folder, "fsync"),
    ],
)
def test_error_at_any_step_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None], step: str
) -> None:
    final = tmp_path / "artefact"
    write(final, "old")
    real = getattr(os, step)

    def fail(*args: object) -> None:
        if step != "rename" or str(args[0]) == str(final):  # moving the old folder back must work
            raise OSError(errno.EIO, "broken disk")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="broken disk"):
            write(final, "new")
    assert content(final) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


KILLED_AT = """
import os, sys
from pathlib import Path
sys.path[:0] = {path!r}
import test_atomic
real = {{name: getattr(os, name) for name in ("replace", "rename", "fsync")}}
left = {nth}
def kill(*args, _name={step!r}):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return real[_name](*args)
os.{step} = kill
getattr(test_atomic, {writer!r})(Path(sys.argv[1]), "new")
print("finished")
"""


@pytest.mark.parametrize(
    ("writer", "step", "nth"),
    [
        ("write_file", "replace", 1),
        ("write_file", "fsync", 1),
        ("write_folder", "replace", 2),  # the first one is that of the file inside
        ("write_folder", "rename", 1),
        ("write_folder", "fsync", 3),
    ],
)
def test_row_37_killed_while_writing(tmp_path: Path, writer: str, step: str, nth: int) -> None:
    """SIGKILL at each step leaves the old artefact, and the rerun completes."""
    write = {"write_file": write_file, "write_folder": write_folder}[writer]
    final = tmp_path / "artefact"
    write(final, "old")
    code = KILLED_AT.format(path=[str(Path(__file__).parent)], step=step, nth=nth, writer=writer)
    done = subprocess.run([sys.executable, "-c", code, str(final)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    if step != "replace" or writer == "write_file":
        assert content(final) == "old"
    with pytest.raises(RuntimeError), atomic_path(final):  # the old folder is back as soon as anyone writes again
        raise RuntimeError
    assert content(final) == "old"
    write(final, "new")
    assert content(final) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_partial_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "junk").write_text("junk")
    write_text(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_row_60_disk_full_keeps_the_old_file(tmp_path: Path, number: int) -> None:
    final = tmp_path / "artefact"
    write_file(final, "old")
    with (  # noqa: PT012
        pytest.raises(ResourceError, match=r"disk full while writing .*artefact") as caught,
        atomic_path(final) as part,
    ):
        part.write_text("half")
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 5
    assert content(final) == "old"
    assert not part.exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_row_62_unwritable_folder_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match=r"cannot write .*sub"):
        write_text(tmp_path / "sub" / "file", "text")


def test_file_and_folder_are_flushed_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    inode = {}
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        inode[events[-1]] = os.fstat(descriptor).st_ino
        real_fsync(descriptor)

    def replace(a: Path, b: Path) -> None:
        events.append("rename")
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_bytes(tmp_path / "a", b"1")
    assert events == ["file", "rename", "folder"]
    assert inode == {"file": (tmp_path / "a").stat().st_ino, "folder": tmp_path.stat().st_ino}


@pytest.mark.parametrize(("number", "tolerated"), [(errno.EINVAL, True), (errno.EBADF, True), (errno.EIO, False)])
def test_network_folders_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tolerated: bool
) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if tolerated:
        write_text(tmp_path / "a", "1")
    else:
        with pytest.raises(OSError, match="Input/output"):
            write_text(tmp_path / "a", "1")
    assert (tmp_path / "a").exists() == tolerated


def test_private_mode_also_replaces_a_public_file(tmp_path: Path) -> None:
    path = tmp_path / "ids.csv"
    path.write_text("public")
    path.chmod(0o644)
    write_text(path, "private", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    """Linux file names are bytes: a Latin-1 name must not break the id map."""
    write_text(tmp_path / "a", os.fsdecode(b"M\xfcller"))
    assert (tmp_path / "a").read_bytes() == b"M\xfcller"


def test_json_is_canonical_and_finite(tmp_path: Path) -> None:
    assert canonical_json({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
    write_json(tmp_path / "a.json", {"b": 1, "a": "ä"})
    assert read_json(tmp_path / "a.json") == {"b": 1, "a": "ä"}
    assert (tmp_path / "a.json").read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("inf"))
    assert read_json(tmp_path / "a.json")["b"] == 1


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [
        (None, "is missing"),
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
    ],
)
def test_row_38_damaged_json(tmp_path: Path, damage: bytes | None, phrase: str) -> None:
    path = tmp_path / "store.json"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(StoreError, match=phrase) as caught:
        read_json(path)
    assert caught.value.exit_code == 6
    assert str(path) in str(caught.value)


def test_row_38_json_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        read_json(tmp_path)


def test_partial_suffix_is_what_the_store_looks_for() -> None:
    assert atomic.PARTIAL == ".partial"

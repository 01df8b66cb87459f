"""Locks: one holder at a time, none for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lungseg.errors import LockedError, ResourceError
from lungseg.store import locks
from lungseg.store.locks import lock

HOST = socket.gethostname()
GONE_PID = 2**22 + 12345
"""Above the largest process number of Linux."""


def held_by(path: Path, **holder: object) -> None:
    path.write_text(json.dumps({"host": HOST, "pid": os.getpid(), "start": "0", **holder}))


def start_of_this_process() -> str:
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".preprocess.lock"


def test_lock_is_there_in_the_block_and_gone_after(path: Path) -> None:
    with lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_lock_is_released_after_an_exception(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), lock(path):
        raise error
    assert list(path.parent.iterdir()) == []
    with lock(path):
        pass


def test_row_40_held_lock_is_refused_and_names_the_holder(path: Path) -> None:
    with (
        lock(path),
        pytest.raises(LockedError, match=f"held by process {os.getpid()} on {HOST}") as caught,
        lock(path),
    ):
        pytest.fail("two holders")
    assert caught.value.exit_code == 6
    assert not path.exists()


def test_row_40_lock_of_a_dead_process_is_taken_over(path: Path) -> None:
    held_by(path, pid=GONE_PID)
    with lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_row_40_lock_of_a_reused_process_number_is_taken_over(path: Path) -> None:
    held_by(path, start="1")
    with lock(path):
        pass


def test_row_40_lock_of_a_living_process_is_respected(path: Path) -> None:
    held_by(path, start=start_of_this_process())
    with pytest.raises(LockedError, match="is held by"), lock(path):
        pytest.fail("two holders")
    assert path.exists()


def test_row_40_unknown_start_means_living(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes do not tell when they started, a lock whose number exists is respected."""
    monkeypatch.setattr(locks, "_start_of", lambda pid: "")
    held_by(path, start="")
    with pytest.raises(LockedError), lock(path):
        pytest.fail("two holders")


def test_row_40_process_of_another_user_counts_as_living(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(pid: int, number: int) -> None:
        raise PermissionError

    held_by(path)
    monkeypatch.setattr(os, "kill", denied)
    with pytest.raises(LockedError), lock(path):
        pytest.fail("two holders")


def test_row_40_lock_of_another_host_is_respected(path: Path) -> None:
    held_by(path, host="another-node", pid=GONE_PID)
    with pytest.raises(LockedError, match=r"on another-node; wait for it, or delete this file"), lock(path):
        pytest.fail("two holders")
    assert path.exists()


@pytest.mark.parametrize("content", ["", "garbage", "[1]", '{"pid": "x"}'])
def test_unreadable_lock_is_respected(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(LockedError, match="delete this file"), lock(path):
        pytest.fail("two holders")


def test_late_taker_does_not_remove_the_first_takers_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw the stale lock; the second one must find the first one's lock when it looks again."""
    held_by(path, pid=GONE_PID)
    living = {"host": HOST, "pid": os.getpid(), "start": start_of_this_process()}
    real = locks._remove_stale

    def slow(path: Path, mine: Path, holder: dict[str, object]) -> None:
        path.write_text(json.dumps(living))  # meanwhile another process has taken over
        real(path, mine, holder)

    monkeypatch.setattr(locks, "_remove_stale", slow)
    with pytest.raises(LockedError, match="is held by"), lock(path):
        pytest.fail("two holders")
    assert json.loads(path.read_text()) == living
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_takeover_in_other_hands_is_left_alone(path: Path) -> None:
    held_by(path, pid=GONE_PID)
    guard = path.with_name(f"{path.name}.{GONE_PID}.takeover")
    held_by(guard, start=start_of_this_process())
    with pytest.raises(LockedError, match="being taken by another process"), lock(path):
        pytest.fail("two holders")
    held_by(guard, pid=GONE_PID)  # killed in the midst of it
    with lock(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_released_between_two_looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_by(path, host="another-node")
    real = locks._holder

    def released(path: Path) -> dict[str, object] | None:
        path.unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(locks, "_holder", released)
    with lock(path):
        assert path.exists()


def test_waits_for_a_moment_if_asked(path: Path) -> None:
    inside = threading.Event()

    def hold() -> None:
        with lock(path):
            inside.set()
            time.sleep(0.15)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    with lock(path, wait_s=30):
        pass
    holder.join()
    with lock(path), pytest.raises(LockedError), lock(path, wait_s=0.1):
        pytest.fail("two holders")


def test_row_62_folder_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ResourceError, match="cannot write"), lock(path):
        pytest.fail("no lock")


CONTENDER = """
import sys, time
from pathlib import Path
from lungseg.errors import LockedError
from lungseg.store.locks import lock
path, log, start = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0, start - time.time()))
try:
    with lock(path):
        with open(log, "a") as stream:
            stream.write("in\\n")
        time.sleep(0.6)
        with open(log, "a") as stream:
            stream.write("out\\n")
    print("held")
except LockedError as error:
    print("locked", error.exit_code)
"""


@pytest.mark.parametrize("stale", [False, True])
def test_row_66_two_processes_contend(path: Path, tmp_path: Path, stale: bool) -> None:
    if stale:
        held_by(path, pid=GONE_PID)
    log = tmp_path / "log"
    start = str(time.time() + 0.8)
    racers = [
        subprocess.Popen([sys.executable, "-c", CONTENDER, path, log, start], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = sorted(racer.communicate()[0].strip() for racer in racers)
    assert said.count("held") >= 1
    assert set(said) <= {"held", "locked 6"}
    lines = log.read_text().split()
    assert lines == ["in", "out"] * said.count("held")  # never two inside
    assert not path.exists()


def test_lock_of_a_killed_process_is_taken_over(path: Path) -> None:
    code = (
        f"import os\nfrom pathlib import Path\nfrom lungseg.store.locks import lock\nwith lock(Path({str(path)!r})):\n"
    )
    done = subprocess.run([sys.executable, "-c", code + "    os.kill(os.getpid(), 9)"], check=False)
    assert done.returncode == -9
    assert path.exists()
    with lock(path):
        pass
    assert list(path.parent.iterdir()) == []

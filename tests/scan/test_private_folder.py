"""RELIABILITY 4.8: the temporary folder of patient data is private, and gone however its process ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lungseg.scan.private_folder import PREFIX, SETTLED_S, private_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "system-temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class Stop(BaseException):
    """As a signal handler may raise."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_security_8_private_and_removed_whatever_happens(temporary: Path, error: type[BaseException]) -> None:
    def use() -> None:
        with private_folder() as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.parent == temporary
            (folder / "000001.dcm").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        use()
    assert list(temporary.iterdir()) == []


def old(folder: Path) -> None:
    when = folder.stat().st_mtime - SETTLED_S - 1
    os.utime(folder, (when, when))


def test_security_8_what_a_killed_process_left_is_removed_by_the_next(temporary: Path) -> None:
    code = (
        "import os, signal, sys, tempfile\ntempfile.tempdir = sys.argv[1]\n"
        "from lungseg.scan.private_folder import private_folder\n"
        "with private_folder() as folder:\n"
        "    (folder / '000001.nii.gz').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(temporary)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = temporary.iterdir()
    with private_folder():
        assert left.exists()  # so young that its process may be about to lock it
    old(left)
    with private_folder() as folder:
        assert list(temporary.iterdir()) == [folder]


def test_folders_in_use_and_those_of_others_are_left_alone(temporary: Path) -> None:
    mine = temporary / f"{PREFIX}results"  # somebody's own choice of a name
    mine.mkdir()
    (mine / "thesis.doc").write_bytes(b"x")
    other = temporary / "lungseg-store"
    other.mkdir()
    link = temporary / f"{PREFIX}link"
    link.symlink_to(other)
    with private_folder() as first:
        (first / "000001.dcm").write_bytes(b"x")
        for folder in (first, mine, other):
            old(folder)
        with private_folder():
            assert (first / "000001.dcm").exists()
    assert sorted(temporary.iterdir()) == sorted([mine, other, link])
    assert (mine / "thesis.doc").exists()

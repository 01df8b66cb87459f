"""Locks per case and stage, and for store-level files: two runs on one store share the work, never a file.

A lock is a small file made atomically with its content (host, process, its start). A lock whose process is gone
from this host is stale and taken over; one of another host is respected, since its process cannot be seen from here.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lungseg.errors import LockedError
from lungseg.store.atomic import disk_errors

POLL_S = 0.05
"""Time between two looks at a lock that is waited for."""


@contextmanager
def lock(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` for the block.

    Parameters
    ----------
    path : Path
        Made, with its folder, and removed at the end of the block.
    wait_s : float
        Seconds to wait for another holder: for files that are held for a moment only.

    Raises
    ------
    LockedError
        If another living process, or a process of another host, holds it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                _acquire(path)
                break
            except LockedError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _acquire(path: Path) -> None:
    mine = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    mine.unlink(missing_ok=True)  # left by a killed process of our number, it may be a link to the lock itself
    mine.write_text(json.dumps(_identity(os.getpid())), encoding="utf-8")
    try:
        for _ in range(4):  # a stale guard and a stale lock take one round each
            try:
                os.link(mine, path)  # atomic, and the content is there from the first moment
                return
            except FileExistsError:
                holder = _holder(path)
                if holder is None:
                    continue  # released meanwhile
                if not _is_stale(holder):
                    raise LockedError(
                        f"{path} is held by process {holder.get('pid')} on {holder.get('host')}; "
                        "wait for it, or delete this file if that process is gone"
                    ) from None
                _remove_stale(path, mine, holder)
        raise LockedError(f"{path} is being taken by another process; run the command again")
    finally:
        mine.unlink(missing_ok=True)


def _remove_stale(path: Path, mine: Path, holder: dict[str, object]) -> None:
    """Remove a stale lock under a guard, looking again first: a second taker must not remove the first one's lock."""
    guard = path.with_name(f"{path.name}.{holder['pid']}.takeover")
    try:
        os.link(mine, guard)
    except FileExistsError:
        other = _holder(guard)
        if other and _is_stale(other):  # killed in the midst of a takeover
            guard.unlink(missing_ok=True)
        return
    try:
        if _holder(path) == holder:
            path.unlink()
    finally:
        guard.unlink(missing_ok=True)


def _identity(pid: int) -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": pid, "start": _start_of(pid)}


def _start_of(pid: int) -> str:
    """Start tick of a process: tells a reused process number from the one that took the lock ("" if unknown)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _holder(path: Path) -> dict[str, object] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_stale(holder: dict[str, object]) -> bool:
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    pid = int(str(holder["pid"]))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return bool(holder.get("start")) and holder["start"] != _start_of(pid)

"""Locks per case and stage, and for store-level files: two runs on one store share the work, never a file.

A lock is a small file made atomically with its content (host, process, its start). A lock whose process is gone
from this host is stale and taken over; one of another host is respected, since its process cannot be seen from here.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lungseg.errors import LockedError
from lungseg.store.atomic import disk_errors


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for the block.

    Raises
    ------
    LockedError
        If another living process, or a process of another host, holds it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _acquire(path: Path) -> None:
    mine = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    mine.write_text(json.dumps(_identity(os.getpid())), encoding="utf-8")
    try:
        for _ in range(2):
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
                # Move the stale lock away under a name only we use: of two takers, one finds it gone.
                stale = path.with_name(mine.name + ".stale")
                try:
                    os.rename(path, stale)
                    stale.unlink()
                except FileNotFoundError:
                    continue
        raise LockedError(f"{path} is being taken by another process; run the command again")
    finally:
        mine.unlink(missing_ok=True)


def _identity(pid: int) -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": pid, "start": _start_of(pid)}


def _start_of(pid: int) -> str:
    """Start tick of a process: tells a reused process number from the one that took the lock ("" if unknown)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
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

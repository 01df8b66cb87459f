"""A temporary folder for patient data: nobody else can enter it, and it is gone afterwards, a killed process's too."""

from __future__ import annotations

import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lungseg.errors import ResourceError

PREFIX = "lungseg-members-"
OWN_NAME = re.compile(r"\d{6}(\.\w+){0,2}")
"""Files in it: 000001.dcm. Nothing else is ever removed from a folder that another process left."""
SETTLED_S = 60.0
"""A younger folder may not have been locked yet by the process that makes it."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new temporary folder that only this user can enter (mode 0700), removed with its content at the end.

    It is locked for as long as it is used; unlocked ones of the same user, which killed processes left, are removed.

    Raises
    ------
    ResourceError
        If it cannot be made.

    Source
    ------
    RELIABILITY 4.8.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix=PREFIX)
    except OSError as error:
        raise ResourceError(
            f"no temporary folder can be made ({error.strerror}): make room, or set TMPDIR to a folder with some"
        ) from error
    with made as name:
        held = _locked(Path(name))
        try:
            _sweep(Path(name).parent)
            yield Path(name)
        finally:
            if held is not None:
                os.close(held)


def _locked(folder: Path) -> int | None:
    """Descriptor of the folder with a lock that ends with the process; None if it is held, or locks do not work."""
    try:
        import fcntl
    except ImportError:  # Windows: folders of killed processes stay
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None


def _sweep(parent: Path) -> None:
    """Remove what killed processes of this user left in ``parent``."""
    with suppress(OSError):
        names = [name for name in os.listdir(parent) if name.startswith(PREFIX)]
        for folder in (parent / name for name in names):
            with suppress(OSError):  # removed by its owner, or by another sweep, at this moment
                info = folder.lstat()
                mine = stat.S_ISDIR(info.st_mode) and info.st_uid == getattr(os, "getuid", lambda: -1)()
                if not mine or time.time() - info.st_mtime < SETTLED_S:
                    continue
                held = _locked(folder)
                if held is None:
                    continue
                try:
                    for file in folder.iterdir():
                        if OWN_NAME.fullmatch(file.name):
                            file.unlink()
                    folder.rmdir()
                finally:
                    os.close(held)

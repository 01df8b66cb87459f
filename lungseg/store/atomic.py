"""The one home of atomic writes: a file exists if and only if it is complete.

Everything is written to ``NAME.partial`` in the same folder, flushed to disk and renamed; the folder is flushed
too, so that a crash of the machine keeps the order. Kill -9 leaves at most a ``.partial`` that the next run replaces.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lungseg.errors import ResourceError, StoreError

PARTIAL = ".partial"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into an error that names the path and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = os.strerror(error.errno)
            raise ResourceError(
                f"disk full while writing {path} ({reason}): free some space and run the command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(f"cannot write {path}: {os.strerror(error.errno)}") from error
        raise


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Path to write to; renamed to ``final`` when the block ends well, removed when it does not.

    Parameters
    ----------
    final : Path
        The file (or folder) to be. Its parent is made if missing.

    Yields
    ------
    Path
        ``final`` with ``.partial`` appended, in the same folder, not existing yet.

    Raises
    ------
    ResourceError
        If the disk is full or the folder cannot be written.
    """
    partial = final.with_name(final.name + PARTIAL)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # left by a killed run; the caller holds the lock
        _put_back(final)
        try:
            yield partial
            _flush_tree(partial)
            if partial.is_dir() and final.exists():
                os.rename(final, _aside(final))  # a folder cannot be replaced in one step
            os.replace(partial, final)
            _flush(final.parent)
            _remove(_aside(final))
        except BaseException:
            _remove(partial)
            _put_back(final)
            raise


def _aside(final: Path) -> Path:
    """Where the old folder waits while the new one takes its name."""
    return final.with_name(final.name + ".old" + PARTIAL)


def _put_back(final: Path) -> None:
    """The old folder of a replacement that stopped between its two steps returns under its name."""
    aside = _aside(final)
    if not final.exists() and aside.exists():
        os.rename(aside, final)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _flush_tree(child)
    _flush(path)


def _flush(path: Path) -> None:
    """Bring a file, or the list of names of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as partial:
        partial.touch(mode=mode)
        partial.write_bytes(text.encode("utf-8", "surrogateescape"))  # file names need not be valid UTF-8


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: sorted keys, two spaces, newline at the end."""
    write_text(path, json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    StoreError
        If it is missing, unreadable or not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged or cannot be read: {error}") from error

"""Every error a user can cause or meet, each with the exit code the CLI returns for it.

0 is success and 1 is a bug in lungseg (any exception that is not a ``LungsegError``); the rest are below.
Messages say what happened, where (file, series or case) and what to do about it.
"""

from __future__ import annotations


class LungsegError(Exception):
    """Base of all errors that are not bugs; ``exit_code`` is what the command returns."""

    exit_code = 1


class UsageError(LungsegError):
    """An option is unknown, out of range or in conflict with another one."""

    exit_code = 2


class InputError(LungsegError):
    """A scan, mask or reference cannot be used as it is."""

    exit_code = 3


class MismatchError(LungsegError):
    """A configuration or an artefact does not fit another one (stale, foreign, wrong version)."""

    exit_code = 4


class ResourceError(LungsegError):
    """Memory, disk or device is missing or exhausted."""

    exit_code = 5


class StoreError(LungsegError):
    """A store or checkpoint is damaged, or locked by another process."""

    exit_code = 6


class LockedError(StoreError):
    """Another living process holds the lock of this case and stage, or of this store-level file."""


class PartialError(LungsegError):
    """Some cases failed; the others are complete."""

    exit_code = 8


class Interrupted(LungsegError):
    """Stopped by a signal after saving; the same command again resumes. 130 for SIGINT, 143 for SIGTERM."""

    exit_code = 130

    def __init__(self, message: str, *, signal_number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

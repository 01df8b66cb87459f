"""Working through a cohort: one bad case never stops the others, and the result says what became of each.

Cases run in this process, or in several through joblib (``loky`` here; any joblib backend, such as dask, on a
cluster). Nothing a case writes depends on how many run at once.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lungseg.config.execution import Execution
from lungseg.errors import InputError, Interrupted, LockedError, LungsegError, PartialError, ResourceError
from lungseg.stages.progress import progress
from lungseg.store.atomic import disk_errors

log = logging.getLogger(__name__)

DONE, SKIPPED, BUSY, FAILED = "done", "complete already", "in other hands", "failed"


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case."""

    case_id: str
    status: str
    """`done`, `complete already`, `in other hands` (locked by another run) or `failed`."""
    message: str = ""
    """Warnings of a case that is done; what happened and what to do for one that failed."""
    exit_code: int = 0
    trace: str = ""
    """Traceback, shown with ``-v`` only: it may hold paths."""
    value: Any = None
    """What the case gave back besides its files."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did."""

    stage: str
    output: Path
    outcomes: tuple[CaseOutcome, ...] = ()
    tables: tuple[Any, ...] = ()
    """rich tables to print at the end."""
    notes: tuple[str, ...] = ()
    """Sentences to print at the end."""
    values: dict[str, Any] = field(default_factory=dict)
    """Figures for the caller in Python."""

    def require_complete(self) -> StageResult:
        """Itself if every case is complete.

        Raises
        ------
        PartialError
            If some cases failed or are in other hands, and others are complete.
        LungsegError
            If all failed: with the exit code of the first one.
        """
        failed = [outcome for outcome in self.outcomes if outcome.status in (FAILED, BUSY)]
        if not failed:
            return self
        text = "; ".join(f"{outcome.case_id}: {outcome.message}" for outcome in failed)
        if len(failed) < len(self.outcomes):
            raise PartialError(f"{self.stage}: {len(failed)} of {len(self.outcomes)} cases failed: {text}")
        error = LungsegError(f"{self.stage}: {text}")
        error.exit_code = failed[0].exit_code
        raise error

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, 8 when some cases are not complete, that of the first failure when none is."""
        open_cases = [outcome for outcome in self.outcomes if outcome.status in (FAILED, BUSY)]
        if not open_cases:
            return 0
        return 8 if len(open_cases) < len(self.outcomes) else open_cases[0].exit_code

    def complete(self) -> list[str]:
        """Ids of the cases whose result is there."""
        return [outcome.case_id for outcome in self.outcomes if outcome.status in (DONE, SKIPPED)]

    def counts(self) -> str:
        """For example ``3 done, 1 failed``."""
        counter = Counter(outcome.status for outcome in self.outcomes)
        return ", ".join(f"{counter[s]} {s}" for s in (DONE, SKIPPED, BUSY, FAILED) if counter[s])


CaseReturn = tuple[str, str] | tuple[str, str, Any]
"""Status and message of a case, and what it gives back besides its files."""
Work = Callable[..., CaseReturn]
"""Does one case: ``work(item, *arguments)``. A status of `failed` counts as bad input (exit code 3)."""


def run_cases(
    work: Work, items: Sequence[Any], *arguments: Any, names: Sequence[str], title: str, execution: Execution
) -> tuple[CaseOutcome, ...]:
    """Apply ``work`` to each item of this shard; outcomes in the order of the items.

    Parameters
    ----------
    work : picklable callable
        ``work(item, *arguments)`` returns a ``CaseReturn``, or raises.
    items, names : sequences
        Items and their case ids for the outcome.
    title : str
        What is being done, for people.

    Raises
    ------
    ResourceError
        If a worker process dies (most often: memory).
    """
    pairs = execution.take_shard(list(zip(items, names, strict=True)))
    outcomes: list[CaseOutcome] = []
    with progress(title, len(pairs), execution) as advance:
        for outcome in _results(work, pairs, arguments, execution):
            outcomes.append(outcome)
            advance(1, outcome.case_id)
            line = f"{title}: {outcome.case_id} ({len(outcomes)}/{len(pairs)}) {outcome.status}"
            if outcome.status == FAILED:
                log.error("%s: %s", line, outcome.message)
                log.debug("%s", outcome.trace)
            else:
                log.info("%s%s", line, f" ({outcome.message})" if outcome.message else "")
    return tuple(outcomes)


def _results(
    work: Work, pairs: Sequence[tuple[Any, str]], arguments: Iterable[Any], execution: Execution
) -> Iterator[CaseOutcome]:
    if execution.jobs == 1 or len(pairs) < 2:
        for item, name in pairs:
            yield guarded(work, item, name, *arguments)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    parallel = Parallel(n_jobs=min(execution.jobs, len(pairs)), return_as="generator")
    try:
        yield from parallel(delayed(guarded)(work, item, name, *arguments) for item, name in pairs)
    except TerminatedWorkerError as error:
        raise ResourceError(
            "a worker process died, most likely for lack of memory: run the same command again with --jobs 1 "
            "(finished cases are kept)"
        ) from error


def guarded(work: Work, item: Any, name: str, *arguments: Any) -> CaseOutcome:
    """The per-case boundary: any error but an interruption becomes an outcome, with its exit code and traceback."""
    with limited_threads(1):
        try:
            status, message, *value = work(item, *arguments)
            code = InputError.exit_code if status == FAILED else 0
            return CaseOutcome(name, status, message, code, value=value[0] if value else None)
        except Interrupted:  # SIGTERM: the whole run stops, not this case
            raise
        except LockedError as error:
            return CaseOutcome(name, BUSY, str(error), error.exit_code)
        except LungsegError as error:
            return CaseOutcome(name, FAILED, str(error), error.exit_code, traceback.format_exc())
        except MemoryError:
            text = "not enough memory for this case: run it alone with --jobs 1, or at a coarser spacing"
            return CaseOutcome(name, FAILED, text, ResourceError.exit_code, traceback.format_exc())
        except Exception as error:
            text = f"bug in lungseg (please report): {type(error).__name__}: {error}"
            return CaseOutcome(name, FAILED, text, 1, traceback.format_exc())


def output_folder(path: Path) -> Path:
    """``path`` as a folder that exists, made if need be.

    Raises
    ------
    InputError
        If it, or a folder above it, is a file.
    ResourceError
        If it cannot be written.
    """
    for parent in (path, *path.parents):
        if parent.exists() and not parent.is_dir():
            raise InputError(f"{parent} is a file; give the output folder another name")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Run a block on ``count`` threads: on shared cores more are slower, and results depend on their number."""
    from threadpoolctl import threadpool_limits

    torch = _loaded_torch()
    before = torch.get_num_threads() if torch else 0
    with threadpool_limits(count):
        if torch:
            torch.set_num_threads(count)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def _loaded_torch() -> Any:
    """torch if some module has imported it: stages without tensors do not pay for it."""
    import sys

    return sys.modules.get("torch")

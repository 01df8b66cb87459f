"""Working through a cohort: one bad case never stops the others, and the result says what became of each.

Cases run in this process, in worker processes (:mod:`lungseg.stages.workers`), or on a cluster through another joblib
backend, such as dask. Nothing a case writes depends on how many run at once.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lungseg.config.execution import Execution
from lungseg.errors import InputError, Interrupted, LockedError, LungsegError, PartialError, ResourceError
from lungseg.stages.progress import progress
from lungseg.stages.workers import Death, in_workers
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
    flags: tuple[str, ...] = ()
    """Words of ``STATUS_WORDS``: what numbers of a finished case depend on."""


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
    document: Any = None
    """JSON types: printed in place of everything else if there are any."""
    verdict: int | None = None
    """Exit code of a command that only looks; None: it follows from the outcomes."""

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
        if self.verdict is not None:
            return self.verdict
        open_cases = [outcome for outcome in self.outcomes if outcome.status in (FAILED, BUSY)]
        if not open_cases:
            return 0
        return 8 if len(open_cases) < len(self.outcomes) else open_cases[0].exit_code

    def complete(self) -> list[str]:
        """Ids of the cases whose result is there."""
        return [outcome.case_id for outcome in self.outcomes if outcome.status in (DONE, SKIPPED)]

    def as_document(self, **content: Any) -> StageResult:
        """Itself with a document for machines: what became of each case, and ``content`` (JSON types)."""
        cases = {o.case_id: {"status": o.status, "message": o.message, "exit_code": o.exit_code} for o in self.outcomes}
        document = {"stage": self.stage, "cases": cases, **content}
        return dataclasses.replace(self, document=document)

    def counts(self) -> str:
        """For example ``3 done, 1 failed``."""
        counter = Counter(outcome.status for outcome in self.outcomes)
        return ", ".join(f"{counter[s]} {s}" for s in (DONE, SKIPPED, BUSY, FAILED) if counter[s])


CaseReturn = tuple[str, str] | tuple[str, str, Any]
"""Status and message of a case, and what it gives back besides its files."""
Work = Callable[..., CaseReturn]
"""Does one case: ``work(item, *arguments)``. A status of `failed` counts as bad input (exit code 3)."""


def run_cases(
    work: Work,
    items: Sequence[Any],
    *arguments: Any,
    names: Sequence[str],
    title: str,
    execution: Execution,
    isolate: bool = False,
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
    isolate : bool
        Files of others are read, on which a library may crash: on the command line a single job runs in a worker too.
        From Python it stays in the calling process, where it can be debugged.

    Notes
    -----
    A case whose worker dies has failed, with the cause (exit code 5); the others go on.
    """
    pairs = execution.take_shard(list(zip(items, names, strict=True)))
    outcomes: dict[int, CaseOutcome] = {}
    with (
        progress(title, len(pairs), execution) as advance,
        closing(_results(work, pairs, arguments, execution, isolate=isolate)) as results,
    ):
        for number, outcome in results:
            outcomes[number] = outcome
            advance(1, outcome.case_id)
            line = f"{title}: {outcome.case_id} ({len(outcomes)}/{len(pairs)}) {outcome.status}"
            if outcome.status == FAILED:
                log.error("%s: %s", line, outcome.message)
                if outcome.trace:
                    log.debug("%s", outcome.trace)
            else:
                log.info("%s%s", line, f" ({outcome.message})" if outcome.message else "")
    return tuple(outcomes[number] for number in sorted(outcomes))


def _results(
    work: Work, pairs: Sequence[tuple[Any, str]], arguments: Iterable[Any], execution: Execution, *, isolate: bool
) -> Generator[tuple[int, CaseOutcome], None, None]:
    """Number and outcome of each case, as they become ready."""
    several = execution.jobs > 1 and len(pairs) > 1
    if not several and not (isolate and execution.interface == "cli"):
        for number, (item, name) in enumerate(pairs):
            yield number, guarded(work, item, name, *arguments)
        return
    if several and _other_backend():
        from joblib import Parallel, delayed

        parallel = Parallel(n_jobs=min(execution.jobs, len(pairs)), return_as="generator")
        yield from enumerate(parallel(delayed(guarded)(work, item, name, *arguments) for item, name in pairs))
        return
    function = partial(_guarded_pair, work, tuple(arguments))
    for number, result in in_workers(function, pairs, jobs=execution.jobs, verbose=execution.verbose):
        if isinstance(result, Death):
            result = CaseOutcome(pairs[number][1], FAILED, result.cause, ResourceError.exit_code)
        yield number, result


def _other_backend() -> bool:
    """Whether the caller chose a joblib backend, such as dask, with ``joblib.parallel_config``."""
    from joblib.parallel import get_active_backend

    return type(get_active_backend()[0]).__name__ != "LokyBackend"


def _guarded_pair(work: Work, arguments: tuple[Any, ...], pair: tuple[Any, str]) -> CaseOutcome:
    item, name = pair
    return guarded(work, item, name, *arguments)


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

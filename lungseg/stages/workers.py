"""Worker processes that have one item each at a time, so that it is known which one a process died on.

Every worker is a pool of its own (loky: started afresh, safe with threads, ends with the process that started it). When
one dies, the others keep their items, and a new one takes the next item.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WAIT_S = 1.0
"""Longest wait without a look round."""
PARENT_CHECK_S = 0.5
"""Time between two looks of a worker whether the process that started it still lives."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Results depend on the number of threads, bit for bit: one in every worker."""
CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
"""Signals by which compiled code ends the process it runs in."""
_EXIT_CODE = re.compile(r"\((-?\d+)\)")


@dataclass(frozen=True)
class Death:
    """The end of a worker process in place of its result."""

    exit_code: int | None
    """As of :mod:`subprocess`: minus the number of a signal; None if the system did not say."""

    @property
    def signal_name(self) -> str:
        """For example ``SIGKILL``; '' if no signal ended it."""
        if self.exit_code is None or self.exit_code >= 0:
            return ""
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"

    @property
    def cause(self) -> str:
        """What happened and what to do, in words."""
        name = self.signal_name
        if name == "SIGKILL":
            return (
                "its process was killed (SIGKILL), most likely for lack of memory: run it alone with --jobs 1, or at a "
                "coarser --spacing"
            )
        if name in CRASHES:
            return (
                f"a library crashed on this case ({name}): its file is probably damaged; export or convert it again, "
                "or leave it out, and please report it"
            )
        if name:
            return f"its process was ended from outside ({name}): run the same command again"
        if self.exit_code is None:
            return "its process died for an unknown reason, perhaps lack of memory: run it alone with --jobs 1"
        return f"its process ended with exit code {self.exit_code} and no result: run it alone with --jobs 1 -v"


def in_workers(
    function: Callable[[Any], Any], items: Sequence[Any], *, jobs: int, verbose: bool = False
) -> Iterator[tuple[int, Any]]:
    """Apply a function to each item in worker processes; results as they come.

    Parameters
    ----------
    function : picklable callable
        An exception of it ends everything.
    items : sequence
        Picklable.
    jobs : int
        Workers at the same time.
    verbose : bool
        Let a crashing worker print where it was.

    Yields
    ------
    (int, Any)
        Number of the item, and its result, or :class:`Death` if its process died.
    """
    from concurrent.futures import FIRST_COMPLETED, Future, wait

    from joblib.externals.loky.process_executor import TerminatedWorkerError

    waiting = deque(enumerate(items))
    idle: list[Any] = []
    running: dict[Future[Any], tuple[int, Any]] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to kill subprocesses")  # of workers, which have none
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    number, item = waiting.popleft()
                    worker, future = _start(idle.pop() if idle else _new_worker(verbose), function, item, verbose)
                    running[future] = number, worker
                for future in wait(running, timeout=WAIT_S, return_when=FIRST_COMPLETED).done:
                    number, worker = running.pop(future)
                    error = future.exception()
                    if isinstance(error, TerminatedWorkerError):
                        worker.shutdown(wait=True, kill_workers=True)
                        yield number, _death(error)
                    elif error is not None:
                        idle.append(worker)
                        raise error
                    else:
                        idle.append(worker)
                        yield number, future.result()
        finally:
            for _, worker in running.values():
                worker.shutdown(wait=True, kill_workers=True)
            for worker in idle:
                worker.shutdown(wait=True)


def _start(worker: Any, function: Callable[[Any], Any], item: Any, verbose: bool) -> tuple[Any, Any]:
    """Hand an item to a worker, or to a new one if it died while it was idle."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    try:
        return worker, worker.submit(function, item)
    except BrokenProcessPool:
        worker.shutdown(wait=True, kill_workers=True)
        worker = _new_worker(verbose)
        return worker, worker.submit(function, item)


def _new_worker(verbose: bool) -> Any:
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    # an empty value keeps Python's and loky's fault handler off: what happened is told in words
    environment = ONE_THREAD if verbose else {**ONE_THREAD, "PYTHONFAULTHANDLER": ""}
    return ProcessPoolExecutor(max_workers=1, env=environment, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    """First call in a worker: leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        os._exit(1)

    if os.name == "posix":  # elsewhere the number of a dead parent stays
        threading.Thread(target=watch, daemon=True).start()


def _death(error: BaseException) -> Death:
    """How the worker ended: loky tells it in its message only."""
    codes = [int(code) for code in _EXIT_CODE.findall(str(error))]
    return Death(codes[0] if len(codes) == 1 else None)

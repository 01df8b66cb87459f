"""What a benchmark's work took, kept over interruptions: seconds by task, and how many things they were for.

CPU seconds, of this process and its workers, say more than wall time on a machine that is shared; on a GPU wall time
does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lungseg.stages.cohort import DONE, StageResult
from lungseg.store.atomic import read_json, write_json

CPU, WALL = "cpu_seconds", "wall_seconds"


@dataclass
class Measured:
    """What a measured block did."""

    count: int = 0

    def of(self, result: StageResult) -> None:
        """Count the cases that a stage made now, not those that were there; all must be complete."""
        result.require_complete()
        self.count += sum(outcome.status == DONE for outcome in result.outcomes)


class Costs:
    """Seconds in a JSON file. Work that was killed before it was written down is not counted, nor what it made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}

    @contextmanager
    def measure(self, task: str, *, count: int = 0) -> Iterator[Measured]:
        """Add the seconds of a block to a task; a block that made nothing, or failed, is not counted."""
        measured = Measured(count)
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield measured
        if measured.count:
            spent = {WALL: time.perf_counter() - wall, CPU: cpu_seconds() - cpu, "count": measured.count}
            known = self._table.get(task, {})
            self._table[task] = {key: round(known.get(key, 0) + value, 3) for key, value in spent.items()}
            write_json(self._path, self._table)

    def mean(self, task: str, key: str) -> float:
        """Seconds (``CPU`` or ``WALL``) for one; ``nan`` if nothing was measured."""
        known = self._table.get(task)
        return known[key] / known["count"] if known else float("nan")

    def total(self, prefix: str, key: str) -> float:
        """Seconds of all tasks whose name begins so."""
        return sum(known[key] for task, known in self._table.items() if task.startswith(prefix))


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system

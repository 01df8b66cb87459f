"""What a benchmark's work took, kept over interruptions: seconds by task, and how many things they were for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lungseg.stages.cohort import DONE, StageResult
from lungseg.store.atomic import read_json, write_json


@dataclass
class Measured:
    """What a measured block did."""

    count: int = 0

    def of(self, result: StageResult) -> None:
        """Count the cases that a stage made now, not those that were there; all must be complete."""
        result.require_complete()
        self.count += sum(outcome.status == DONE for outcome in result.outcomes)


class Costs:
    """Wall seconds in a JSON file. Work that was killed before it was written down is not counted, nor what it made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}

    @contextmanager
    def measure(self, task: str, *, count: int = 0) -> Iterator[Measured]:
        """Add the seconds of a block to a task; a block that made nothing, or failed, is not counted."""
        measured = Measured(count)
        begin = time.perf_counter()
        yield measured
        if measured.count:
            known = self._table.get(task, {"count": 0, "seconds": 0.0})
            seconds = round(known["seconds"] + time.perf_counter() - begin, 3)
            self._table[task] = {"count": known["count"] + measured.count, "seconds": seconds}
            write_json(self._path, self._table)

    def mean(self, task: str) -> float:
        """Seconds for one; ``nan`` if nothing was measured."""
        known = self._table.get(task)
        return known["seconds"] / known["count"] if known else float("nan")

    def total(self, prefix: str) -> float:
        """Seconds of all tasks whose name begins so."""
        return sum(known["seconds"] for task, known in self._table.items() if task.startswith(prefix))

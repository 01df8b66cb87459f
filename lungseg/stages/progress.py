"""The one helper that shows progress: rich on a terminal, tqdm for the Python API and notebooks, else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lungseg.config.execution import Execution

Advance = Callable[[int, str], None]


@contextmanager
def progress(title: str, total: int, execution: Execution, *, done: int = 0, unit: str = "case") -> Iterator[Advance]:
    """Show how far long work is, with rate and time left, on standard error.

    Parameters
    ----------
    title : str
        What is being done.
    total, done : int
        Amount of work, and how much of it an earlier run has done.
    execution : Execution
        ``quiet`` shows nothing; so does a standard error that is no terminal.

    Yields
    ------
    callable ``(amount, note)``
        Tell that ``amount`` more is done; ``note`` stands beside the bar.
    """
    if execution.quiet or not sys.stderr.isatty():
        yield lambda amount, note: None
    elif execution.interface == "cli":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + "  {task.fields[rate]}  {task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done, note="", rate="")

            def advance(amount: int, note: str) -> None:
                speed = bar.tasks[task].speed
                bar.update(task, advance=amount, note=note, rate=f"{speed:.3g}/s" if speed else "")

            yield advance
    else:
        from tqdm.auto import tqdm

        with tqdm(total=total, initial=done, desc=title, unit=unit) as meter:

            def advance(amount: int, note: str) -> None:
                meter.set_postfix_str(note, refresh=False)
                meter.update(amount)

            yield advance

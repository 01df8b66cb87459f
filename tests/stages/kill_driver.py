"""Runs all stages in one forked life after another, each killed at a later write point, until one life gets through.

A program of its own: a process may only be forked safely before it has started threads, and the test process has.
Prints the number of lives, and of those that left a partial file behind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from pipeline_fixture import run_stages

from lungseg.store.cases import Store

MAX_LIVES = 60


def _run_and_die(manifest: Path, root: Path, death: int) -> None:
    """Run all stages, but be killed just before the ``death``-th file would become complete."""
    real, count = os.replace, 0

    def replace(source: str, target: str) -> None:
        nonlocal count
        count += 1
        if count == death:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace  # type: ignore[assignment]
    run_stages(manifest, root)


def main(manifest: Path, root: Path) -> None:
    """Live and die until everything is done."""
    context = multiprocessing.get_context("fork")
    partials = 0
    for lives in range(MAX_LIVES):
        life = context.Process(target=_run_and_die, args=(manifest, root, 4 + lives // 2))
        life.start()
        life.join()
        if life.exitcode == 0:
            print(lives + 1, partials)
            return
        if life.exitcode != -signal.SIGKILL:
            sys.exit(f"life {lives} ended with {life.exitcode}")
        partials += bool(list(root.rglob("*.partial")))
        if (root / "store" / "store.json").exists():
            Store(root / "store")  # opens at any moment
    sys.exit("no progress")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Trains in one forked life after another, each killed at a random moment, until the run is done.

A program of its own: a process may only be forked safely before it has started threads, and the test process has.
Arguments: store, run folder, number of kills, seconds an undisturbed run takes. Prints one line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from lungseg.config import TrainConfig
from lungseg.stages.train_ddpm import train_ddpm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does

from training_fixture import QUIET, quick

IMAGES_A_KILL = 32


def config_for(kills: int) -> TrainConfig:
    """Settings of a run long enough to be killed so often."""
    return quick(total_images=IMAGES_A_KILL * max(kills, 4), checkpoint_images=8, held_out=0.2, held_out_images=4)


def _train(store: Path, run: Path, kills: int) -> None:
    train_ddpm(store, run, config_for(kills), execution=QUIET)


def _saved(run: Path) -> int:
    """Images of the newest checkpoint, 0 if there is none."""
    return max([int(path.stem.split("-")[1]) for path in run.glob("checkpoint-*.pt")], default=0)


def main(store: Path, run: Path, kills: int, seconds: float) -> None:
    """Live and die ``kills`` times, then live to the end.

    Every second life may save once before its hour comes, as a short one would otherwise never get beyond its start.
    """
    context, moments = multiprocessing.get_context("fork"), random.Random(kills)
    resumed_from, deaths, partials = [], 0, 0
    while True:
        before = _saved(run)
        life = context.Process(target=_train, args=(store, run, kills))
        life.start()
        if deaths < kills:
            while deaths % 2 and life.exitcode is None and _saved(run) == before:
                time.sleep(0.002)
            life.join(moments.random() * seconds / kills)
            if life.exitcode is None:
                os.kill(life.pid or 0, signal.SIGKILL)
                deaths += 1
        life.join()
        if life.exitcode == 0:
            break
        if life.exitcode != -signal.SIGKILL:
            sys.exit(f"a life ended with {life.exitcode}")
        partials += bool(list(run.glob("**/*.partial")))
        resumed_from.append(_saved(run))
    print(json.dumps({"deaths": deaths, "partials": partials, "resumed_from": resumed_from}))


if __name__ == "__main__":
    if sys.argv[3] == "0":
        began = time.perf_counter()
        _train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]))
        print(time.perf_counter() - began)
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))

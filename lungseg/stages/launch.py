"""One process per device: torch's elastic launcher, with the error of whichever process failed first as the outcome.

A process that fails leaves its error as ``.error-rank<r>.json`` in the run folder and ends at once with the error's
exit code, so that the launcher stops the others; the parent raises that error again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from lungseg.config.execution import Execution, resolve_device
from lungseg.errors import Interrupted, LungsegError, ResourceError, StoreError, UsageError
from lungseg.store.atomic import read_json, write_json

SHUTDOWN_S = 90
"""Seconds the processes have after SIGTERM to finish a step and save, where torch lets one say it (else 30)."""
_PEER_IS_GONE = re.compile("closed by peer|reset by peer|[Bb]roken pipe|NCCL")
"""What a collective says when another process of the group has died: a consequence, not the cause."""
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")

Work = Callable[..., Any]
"""``work(*arguments, execution=...)``: importable by name, as the processes are spawned."""


@contextmanager
def world(execution: Execution) -> Iterator[tuple[int, int, str]]:
    """(rank, number of processes, device) of this process; joins the group of a launcher where there is one."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = resolve_device(execution.device)
    if size == 1:
        yield 0, 1, device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    together = True
    try:
        yield rank, size, device
    except BaseException as error:
        # leaving NCCL waits for the others, which may be in the midst of a collective: only when all leave
        together = isinstance(error, Interrupted) or not device.startswith("cuda")
        raise
    finally:
        if together:
            torch.distributed.destroy_process_group()


def local_processes(size: int) -> int:
    """How many of ``size`` processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(size))) if size > 1 else 1


def launch(work: Work, *arguments: Any, folder: Path, execution: Execution) -> Any:
    """Run ``work`` in ``execution.gpus`` processes that form one group; returns what rank 0 returned.

    Parameters
    ----------
    work, arguments
        Called as ``work(*arguments, execution=...)`` in each process, with ``gpus=0``.
    folder : Path
        Where failing processes leave their error; exists.

    Raises
    ------
    Interrupted
        After a signal, when the processes have saved and ended.
    ResourceError
        If a process was killed.
    LungsegError
        Whatever a process raised: that of the lowest rank, with its exit code.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    device = resolve_device(execution.device)
    if device.startswith("cuda") and execution.gpus > torch.cuda.device_count():
        raise UsageError(f"--gpus {execution.gpus}: this machine has {torch.cuda.device_count()} CUDA devices")
    remove_errors(folder)
    inside = dataclasses.replace(execution, gpus=0)
    with _launcher_manners(verbose=execution.verbose):
        try:
            results = elastic_launch(_launch_config(execution.gpus), _entry)(work, arguments, folder, inside)
            return results[0]
        except SignalException as caught:
            failure = take_error(folder)
            if failure is not None and failure.exit_code > 1:  # also the words of the rank that saved
                raise failure from None
            raise Interrupted(
                "stopped; run the same command again to go on from the last checkpoint", signal_number=caught.sigval
            ) from None
        except ChildFailedError as caught:
            raise take_error(folder) or _lost(caught) from None


def remove_errors(folder: Path) -> None:
    """Remove what failed processes left."""
    for path in folder.glob(".error-rank*.json*"):
        path.unlink(missing_ok=True)


def take_error(folder: Path) -> LungsegError | None:
    """The error that explains the end of a group, None if none was left; the files are removed.

    Real errors come before interruptions, those before bugs (which often only follow from another rank's end), and
    the lowest rank first.
    """
    found = []
    for path in folder.glob(".error-rank*.json"):
        try:
            content = read_json(path)
            found.append((int(path.stem.rpartition("rank")[2]), int(content["exit_code"]), str(content["text"])))
        except (StoreError, KeyError, TypeError, ValueError):  # its process was killed while it wrote
            continue
    remove_errors(folder)
    if not found:
        return None
    _, code, text = min(found, key=lambda item: (item[1] == 1, item[1] >= 128, item[0]))
    return as_error(code, text)


def as_error(code: int, text: str) -> LungsegError:
    """An error that was sent as exit code and text."""
    if code >= 128:
        return Interrupted(text, signal_number=code - 128)
    error = LungsegError(text)
    error.exit_code = code
    return error


def _lost(failed: Any) -> LungsegError:
    """For a process that died without a word."""
    rank, failure = failed.get_first_failure()
    return ResourceError(
        f"training process {rank} died (exit code {failure.exitcode}), most likely for lack of memory: lower --workers,"
        " --cache-gib or --batch-size and run the same command again"
    )


def _launch_config(count: int) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="lungseg",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=1,
        start_method="spawn",
    )
    if hasattr(config, "shutdown_timeout"):  # newer torch only
        config.shutdown_timeout = SHUTDOWN_S
    return config


@contextmanager
def _launcher_manners(*, verbose: bool) -> Iterator[None]:
    """Undo what torch's launcher does to its process: signal handlers stay, tracebacks are logged of mere errors."""
    names = ["torch.multiprocessing.spawn"]
    names += [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    loggers = [] if verbose else [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {name: signal.getsignal(getattr(signal, name)) for name in _SIGNALS if hasattr(signal, name)}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)


def _entry(work: Work, arguments: tuple[Any, ...], folder: Path, execution: Execution) -> Any:
    """What each launched process runs."""
    rank = int(os.environ["RANK"])
    if not execution.quiet:
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        return work(*arguments, execution=execution)
    except LungsegError as error:
        _leave(folder, rank, error.exit_code, str(error))
    except MemoryError:
        _leave(folder, rank, ResourceError.exit_code, "not enough memory: lower --cache-gib, --workers or --batch-size")
    except Exception as error:
        if _PEER_IS_GONE.search(str(error)):
            _leave(folder, rank, 1, "")
        traceback.print_exc()
        text = f"bug in lungseg, please report it with the output above: {type(error).__name__}: {error}"
        _leave(folder, rank, 1, text)


def _leave(folder: Path, rank: int, code: int, text: str) -> NoReturn:
    """End this process now. A launched function that returns waits for its launcher, which may be waiting for us."""
    try:
        if text:
            write_json(folder / f".error-rank{rank}.json", {"exit_code": code, "text": text})
    except (OSError, LungsegError):  # a full disk: the other ranks or standard error have to tell
        print(json.dumps({"rank": rank, "exit_code": code, "text": text}), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)

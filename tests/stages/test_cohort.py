"""Working through a cohort: a bad case never stops the others, and the result says what became of each."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lungseg.config.execution import Execution
from lungseg.errors import InputError, Interrupted, LockedError, LungsegError, PartialError, StoreError
from lungseg.stages import progress as progress_module
from lungseg.stages.cohort import (
    BUSY,
    DONE,
    FAILED,
    SKIPPED,
    CaseOutcome,
    CaseReturn,
    StageResult,
    guarded,
    limited_threads,
    run_cases,
)
from lungseg.stages.progress import progress

QUIET = Execution(quiet=True)


def work(item: str, *arguments: str) -> CaseReturn:
    """Does what the item says."""
    known = {
        "locked": LockedError("held by process 1"),
        "input": InputError("no lung"),
        "store": StoreError("damaged"),
        "memory": MemoryError(),
        "bug": KeyError("x"),
        "interrupt": KeyboardInterrupt(),
        "terminate": Interrupted("terminated", signal_number=15),
    }
    if item in known:
        raise known[item]
    if item.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[item])
    if item.startswith("exit"):
        os._exit(int(item.removeprefix("exit")))
    if item == "skip":
        return SKIPPED, ""
    if item == "missed":
        return FAILED, "scored as missed", {"dice": 0.0}
    return DONE, " ".join(arguments), item


def run(items: list[str], *arguments: str, execution: Execution = QUIET) -> StageResult:
    outcomes = run_cases(work, items, *arguments, names=[f"case-{i}" for i in items], title="t", execution=execution)
    return StageResult("t", Path("out"), outcomes)


def test_a_bad_case_does_not_stop_the_others() -> None:
    result = run(["a", "input", "locked", "skip", "bug", "memory", "missed", "b"], "with", "words")
    rows = [(o.case_id, o.status, o.message, o.exit_code) for o in result.outcomes]
    assert rows == [
        ("case-a", DONE, "with words", 0),
        ("case-input", FAILED, "no lung", 3),
        ("case-locked", BUSY, "held by process 1", 6),
        ("case-skip", SKIPPED, "", 0),
        ("case-bug", FAILED, "bug in lungseg (please report): KeyError: 'x'", 1),
        (
            "case-memory",
            FAILED,
            "not enough memory for this case: run it alone with --jobs 1, or at a coarser spacing",
            5,
        ),
        ("case-missed", FAILED, "scored as missed", 3),
        ("case-b", DONE, "with words", 0),
    ]
    assert [o.value for o in result.outcomes if o.value] == ["a", {"dice": 0.0}, "b"]
    assert result.counts() == "2 done, 1 complete already, 1 in other hands, 4 failed"
    assert [bool(o.trace) for o in result.outcomes] == [False, True, False, False, True, True, False, False]
    assert "KeyError" in result.outcomes[4].trace


@pytest.mark.parametrize(
    ("items", "code"),
    [([], 0), (["a", "skip"], 0), (["a", "skip", "locked"], 8), (["a", "input"], 8), (["locked", "store"], 6),
     (["store", "input"], 6), (["input"], 3), (["bug"], 1)],
)  # fmt: skip
def test_exit_codes(items: list[str], code: int) -> None:
    result = run(items)
    assert result.exit_code == code
    if code == 0:
        assert result.require_complete() is result
        return
    with pytest.raises(PartialError if code == 8 else LungsegError) as caught:
        result.require_complete()
    assert caught.value.exit_code == code
    assert "case-" in str(caught.value)


@pytest.mark.parametrize(("item", "error"), [("interrupt", KeyboardInterrupt), ("terminate", Interrupted)])
def test_row_59_interruption_stops_the_run_not_the_case(item: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        run(["a", item, "b"])


def test_shards_take_every_nth_case() -> None:
    result = run(["a", "b", "c", "d", "e"], execution=Execution(quiet=True, shard="2/2"))
    assert [o.case_id for o in result.outcomes] == ["case-b", "case-d"]


@pytest.mark.slow
def test_several_processes_give_the_same_outcomes_in_order() -> None:
    items = ["a", "input", "b", "bug", "locked"]
    one, two = run(items, "x"), run(items, "x", execution=Execution(quiet=True, jobs=2))
    strip = [(o.case_id, o.status, o.message, o.exit_code, o.value) for o in one.outcomes]
    assert [(o.case_id, o.status, o.message, o.exit_code, o.value) for o in two.outcomes] == strip


DEATHS = {
    "SIGKILL": "was killed (SIGKILL), most likely for lack of memory: run it alone with --jobs 1, or at a coarser --sp",
    "SIGSEGV": "a library crashed on this case (SIGSEGV): its file is probably damaged",
    "SIGABRT": "a library crashed on this case (SIGABRT)",
    "SIGTERM": "ended from outside (SIGTERM): run the same command again",
    "exit3": "ended with exit code 3 and no result",
    "exit0": "ended with exit code 0 and no result",
}


@pytest.mark.slow
def test_row_55_dead_workers_fail_their_cases_with_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    items = ["a", *DEATHS, "input", "b", "c"]
    result = run(items, "x", execution=Execution(quiet=True, jobs=2))
    assert [outcome.case_id for outcome in result.outcomes] == [f"case-{item}" for item in items]
    found = {outcome.case_id.removeprefix("case-"): outcome for outcome in result.outcomes}
    for item, phrase in DEATHS.items():
        assert (found[item].status, found[item].exit_code) == (FAILED, 5)
        assert phrase in found[item].message
    assert [found[item].status for item in ("a", "b", "c")] == [DONE] * 3
    assert (found["input"].exit_code, result.exit_code) == (3, 8)
    said = capfd.readouterr().err
    assert "Fatal Python error" not in said
    assert "Warning" not in said


@pytest.mark.slow
def test_row_55_a_single_job_is_isolated_on_the_command_line_where_asked() -> None:
    cli = Execution(quiet=True, interface="cli")
    for items, codes in ((["SIGSEGV"], [5]), (["a", "SIGKILL", "b"], [0, 5, 0])):
        outcomes = run_cases(work, items, names=items, title="t", execution=cli, isolate=True)
        assert [outcome.exit_code for outcome in outcomes] == codes
    here = [
        run_cases(pid, ["a"], names=["a"], title="t", execution=e, isolate=i) for e, i in ((cli, False), (QUIET, True))
    ]
    assert [outcomes[0].value for outcomes in here] == [os.getpid()] * 2
    assert run_cases(pid, ["a"], names=["a"], title="t", execution=cli, isolate=True)[0].value != os.getpid()


def pid(item: str) -> CaseReturn:
    return DONE, "", os.getpid()


ORPHANS = """
import os, sys, time
from lungseg.config.execution import Execution
from lungseg.stages.cohort import run_cases

def work(item):
    os.write(1, b"%d\\n" % os.getpid())  # at once: print may write the line's end by itself, and two would mix
    time.sleep(600)
    return "done", ""

run_cases(work, [1, 2], names=["a", "b"], title="t", execution=Execution(quiet=True, jobs=2))
"""


def _runs(process: str) -> bool:
    """Whether a process runs: one that has ended, but that nobody has waited for, stands in /proc without a line."""
    try:
        return Path("/proc", process, "cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    workers = [process.stdout.readline().strip() for _ in range(2)]
    assert all(map(str.isdecimal, workers)), workers
    process.send_signal(number)
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stdout.close()


def test_another_backend_of_joblib_is_used_if_it_was_chosen() -> None:
    import joblib

    with joblib.parallel_config(backend="threading"):
        outcomes = run_cases(pid, ["a", "b"], names=["a", "b"], title="t", execution=Execution(quiet=True, jobs=2))
    assert [outcome.value for outcome in outcomes] == [os.getpid()] * 2


def test_log_tells_each_case(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="lungseg"):
        run(["a", "input"], "warned")
    lines = [(record.levelname, record.message) for record in caplog.records]
    assert lines[0] == ("INFO", "t: case-a (1/2) done (warned)")
    assert lines[1] == ("ERROR", "t: case-input (2/2) failed: no lung")
    assert lines[2][0] == "DEBUG"
    assert "Traceback" in lines[2][1]


def test_threads_are_limited_in_a_case_and_restored() -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with limited_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="x"), limited_threads(1):
            raise ValueError("x")
        assert torch.get_num_threads() == 2
        seen = guarded(lambda item: (DONE, str(torch.get_num_threads())), "a", "a")
        assert seen == CaseOutcome("a", DONE, "1")
    finally:
        torch.set_num_threads(before)


class Terminal:
    """A standard error that is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("interface", ["cli", "python"])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, interface: str) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("refine", 4, Execution(interface=interface), done=1) as advance:
        advance(1, "case-1")
        advance(2, "case-2")
    assert "refine" in terminal.text
    assert "4/4" in terminal.text


@pytest.mark.parametrize("execution", [QUIET, Execution(), Execution(interface="cli")])
def test_row_67_no_progress_when_quiet_or_without_a_terminal(
    capsys: pytest.CaptureFixture[str], execution: Execution
) -> None:
    with progress("refine", 2, execution) as advance:
        advance(1, "case")
    assert capsys.readouterr() == ("", "")
    assert progress_module.Advance

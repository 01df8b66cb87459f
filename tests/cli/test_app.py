"""The way out of every command: results on standard output, errors as exit codes, nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from tiny_store import make_store
from typer.testing import CliRunner

import lungseg
from lungseg import errors
from lungseg.cli.app import app
from lungseg.errors import Interrupted, LungsegError
from lungseg.stages.cohort import CaseOutcome, StageResult

PROGRAM = [sys.executable, "-m", "lungseg.cli.app"]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def program(*arguments: object, code: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", code] if code else PROGRAM
    return subprocess.run(
        [*start, *map(str, arguments)], **{"capture_output": True, "text": True, "check": False, **options}
    )


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a function in the place of the stage of `lungseg info`."""

    def put(function: Any) -> None:
        monkeypatch.setattr("lungseg.stages.info.info", lambda artefact, *, execution: function())

    return put


def raising(error: BaseException) -> Any:
    def function() -> StageResult:
        raise error

    return function


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"lungseg {lungseg.__version__}\n")


def test_no_command_shows_the_help() -> None:
    result = call()
    assert "Commands:" in result.output
    assert "Traceback" not in result.output


ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, LungsegError)]
CODES = {"UsageError": 2, "InputError": 3, "MismatchError": 4, "ResourceError": 5, "StoreError": 6, "LockedError": 6,
         "PartialError": 8, "Interrupted": 130, "LungsegError": 1}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("flags", [(), ("-v",), ("-q",)], ids=["plain", "verbose", "quiet"])
def test_errors_become_exit_codes(stage: Any, error: type[LungsegError], flags: tuple[str, ...]) -> None:
    stage(raising(error("what happened, where, what to do")))
    result = call("info", "x", *flags)
    assert result.exit_code == CODES[error.__name__]
    assert result.stderr.startswith("error: what happened, where, what to do\n")
    assert ("Traceback" in result.stderr) == ("-v" in flags)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "phrase"),
    [
        (ZeroDivisionError("division by zero"), 1, "bug in lungseg, please report it with the output of -v: ZeroDiv"),
        (MemoryError(), 5, "not enough memory: use --jobs 1"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
        (Interrupted("stopped", signal_number=signal.SIGTERM), 143, "stopped"),
    ],
)
def test_other_ends(stage: Any, error: BaseException, code: int, phrase: str) -> None:
    stage(raising(error))
    result = call("info", "x")
    assert result.exit_code == code
    assert phrase in result.stderr
    assert "Traceback" not in result.stderr
    assert ("Traceback" in call("info", "x", "-v").stderr) == (not isinstance(error, KeyboardInterrupt))


def outcomes() -> tuple[CaseOutcome, ...]:
    return (
        CaseOutcome("a", "done"),
        CaseOutcome("b", "done", "a warning"),
        CaseOutcome("c", "failed", "[/data] holds [bold]nothing[/bold] :smile:", 3),
    )


def test_result_is_printed_as_it_is(stage: Any) -> None:
    """Square brackets and colons of messages are no markup."""
    table = Table("what")
    table.add_row("pip install 'lungseg[cluster]'")
    note = "results: " + "/long" * 40 + "/[x]"
    stage(lambda: StageResult("refine", Path(), outcomes(), tables=(table,), notes=(note,)))
    result = call("info", "x")
    assert result.exit_code == 8
    for text in ("[/data] holds [bold]nothing[/bold] :smile:", "a warning", "refine: 2 done, 1 failed",
                 "'lungseg[cluster]'", note):  # fmt: skip
        assert text in result.stdout
    assert not re.search(r"^. a ", result.stdout, re.M)  # cases without a message are not listed
    assert result.stderr == ""


def test_quiet_prints_nothing_but_errors(stage: Any) -> None:
    stage(lambda: StageResult("refine", Path(), outcomes(), notes=("a note",)))
    result = call("info", "x", "-q")
    assert (result.exit_code, result.output) == (8, "")


def test_exit_code_when_every_case_failed(stage: Any) -> None:
    stage(lambda: StageResult("refine", Path(), (CaseOutcome("a", "failed", "no lung", 5),)))
    assert call("info", "x").exit_code == 5


def test_real_errors_of_a_store(tmp_path: Path) -> None:
    result = call("info", str(tmp_path / "none"))
    assert result.exit_code == 3
    assert result.stderr == f"error: {tmp_path / 'none'}: no such file or folder\n"
    (tmp_path / "store.json").write_text("{")
    result = call("info", str(tmp_path))
    assert result.exit_code == 6
    assert "is damaged" in result.stderr


def test_row_62_output_is_refused_before_work(tmp_path: Path) -> None:
    scans, file = tmp_path / "scans", tmp_path / "file"
    scans.mkdir()
    (scans / "a.nii.gz").write_bytes(b"no scan")
    file.write_text("mine")
    for output, phrase in ((file, "is a file"), (scans / "cohort", "lies inside the input folder"),
                           (scans, "lies inside the input folder")):  # fmt: skip
        result = call("preprocess", str(scans), "-o", str(output))
        assert result.exit_code == 3
        assert phrase in result.stderr
    assert file.read_text() == "mine"
    assert [p.name for p in scans.iterdir()] == ["a.nii.gz"]


NAMES = [
    "with space",
    "ünïcödé",
    "日本",
    "-leading",
    "quote'\"",
    "semi;colon",
    "$HOME",
    "[brackets]",
    "a" * 200,
    ".hidden",
]


@pytest.mark.parametrize("name", NAMES)
def test_row_36_names_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_store(tmp_path / name, cases=1)
    monkeypatch.chdir(tmp_path)
    result = call("info", "--", name)
    assert result.exit_code == 0, result.output
    assert "patch store" in result.stdout


SLOW_STAGE = """
import sys, time
import lungseg.stages.info as module
from lungseg.cli.app import main
from lungseg.stages.cohort import StageResult, run_cases

def work(item):
    print("ready", flush=True)
    time.sleep(60)
    return "done", ""

def info(artefact, *, execution):
    return StageResult("info", artefact, run_cases(work, [1, 2], names=["a", "b"], title="t", execution=execution))

module.info = info
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_the_run_not_only_the_case(number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STAGE, "info", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == ""  # the second case never began
    assert "run the same command again to resume" in err
    assert "Traceback" not in err


ISOLATED = SLOW_STAGE.replace("execution=execution)", "execution=execution, isolate=True)")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_the_run_while_a_worker_is_at_it(number: int, code: int) -> None:
    """Sent to every process of the group, as a terminal sends Ctrl-C and a batch system its end of time."""
    process = subprocess.Popen(
        [sys.executable, "-c", ISOLATED, "info", "x"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == ""
    assert err.strip() in (
        "error: terminated; run the same command again to resume",
        "error: interrupted; run the same command again to resume",
    )


def test_a_document_is_all_that_is_printed(stage: Any) -> None:
    stage(lambda: StageResult("check", Path(), outcomes(), notes=("a note",), document={"a": ["ä", None]}, verdict=8))
    for flags in ((), ("-q",), ("-v",)):
        result = call("info", "x", *flags)
        assert (result.exit_code, json.loads(result.stdout)) == (8, {"a": ["ä", None]})
        assert result.stdout.isascii()


def test_what_numbers_depend_on_is_told_beside_the_status(stage: Any) -> None:
    stage(lambda: StageResult("preprocess", Path(), (CaseOutcome("a", "done", flags=("truncated", "clipped")),)))
    assert "done, truncated, clipped" in call("info", "x").stdout


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("app") / "cohort", cases=1).path


def test_row_67_reader_of_the_output_is_gone(store: Path) -> None:
    for arguments in (["info", store], ["refine", store, "--dry-run"]):
        read, write = os.pipe()
        os.close(read)
        done = program(*arguments, capture_output=False, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")


def test_row_67_head(store: Path) -> None:
    line = f"set -o pipefail; '{sys.executable}' -m lungseg.cli.app info '{store}' | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_row_67_ascii_terminal_without_home(store: Path) -> None:
    """LANG=C, a strict ASCII stream, no HOME, no TERM: a table of ASCII, not a UnicodeEncodeError."""
    environment = {
        "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = program("info", store, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "patch store" in done.stdout
    done = program("refine", store, "--name", "ä", env=environment)
    assert done.returncode == 3
    assert done.stderr.isascii()
    assert "Traceback" not in done.stderr


def test_row_68_module_is_guarded_against_reimport(store: Path) -> None:
    """A spawned worker imports the program's modules again: that must not run a command."""
    done = program(code="import lungseg.cli.app, sys; print(len(lungseg.cli.app.COMMANDS))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "16\n", "")

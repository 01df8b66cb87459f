"""The command line: options in, a stage function called, its result printed, errors turned into exit codes."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import typer

from lungseg.cli.commands import COMMANDS
from lungseg.cli.options import Command, command_function, make_configs
from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.errors import Interrupted, LungsegError, UsageError

app = typer.Typer(
    name="lungseg",
    help="Maps and numbers of lung pathology from unlabelled CT scans. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def version_option(
    version: bool = typer.Option(False, "--version", help="Print the version.", show_default=False),
) -> None:
    """Maps and numbers of lung pathology from unlabelled CT scans. Research use only."""
    if version:
        from lungseg import __version__

        typer.echo(f"lungseg {__version__}")
        raise typer.Exit


def run(
    command: Command, paths: dict[str, Any], values: Mapping[str, Any], execution_values: Mapping[str, Any]
) -> None:
    """Run one command; every error leaves through here with its exit code."""
    verbose = bool(execution_values.get("verbose"))
    _start_logging(quiet=bool(execution_values.get("quiet")), verbose=verbose)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        config, execution = make_configs(command, values, execution_values)
        conflicts = _load(command.check)(paths) if command.check else []
        if conflicts:
            raise UsageError("\n".join(conflicts))
        if execution.dry_run:
            _print_plan(command, paths, config, execution)
            return
        function = _load(command.stage)
        settings = {} if config is None else {"config": config}
        result = function(**paths, **settings, execution=execution)
        _print_result(result, execution)
        code = result.exit_code
    except LungsegError as error:
        _print_error(str(error), verbose)
        code = error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted; run the same command again to resume", verbose=False)
        code = 130
    except BrokenPipeError:
        # the reader of our output is gone (`| head`): nothing is left to say, nor to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except MemoryError:
        _print_error("not enough memory: use --jobs 1, a smaller --batch-size or a coarser spacing", verbose)
        code = 5
    except Exception as error:
        _print_error(
            f"bug in lungseg, please report it with the output of -v: {type(error).__name__}: {error}", verbose
        )
        code = 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise typer.Exit(code)


class _StderrHandler(logging.Handler):
    """Messages as plain lines on whatever standard error is at the moment (tests and notebooks replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def _start_logging(*, quiet: bool, verbose: bool) -> None:
    """Progress in words goes to standard error; standard output is for results."""
    handler = _StderrHandler()
    logger = logging.getLogger("lungseg")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Interrupted("terminated; run the same command again to resume", signal_number=number)


def _print_error(text: str, verbose: bool) -> None:
    print(f"error: {text}", file=sys.stderr)
    if verbose:
        import traceback

        traceback.print_exc()


def _print_plan(command: Command, paths: Mapping[str, Any], config: Any, execution: Execution) -> None:
    """What a dry run shows: paths, the full configuration (for `run` of all stages), what it will need, as JSON."""
    plan: dict[str, Any] = {
        "command": command.name,
        "paths": {key: _plain(value) for key, value in paths.items()},
        "config": to_dict(config) if config is not None else {},
    }
    if command.plan:
        also = {"train": paths["train"]} if "train" in paths else {}
        plan["stages"] = _load(command.plan)(config, model=paths.get("model"), **also)
    if command.estimate:
        plan["estimate"] = _load(command.estimate)(config, execution)
    typer.echo(json.dumps(plan, indent=2))


def _load(name: str) -> Any:
    """Object named ``module:attribute``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return value if isinstance(value, bool) or value is None else str(value)


def _print_result(result: Any, execution: Execution) -> None:
    from rich.console import Console

    if result.document is not None:  # asked for, so printed with --quiet too
        print(json.dumps(result.document, indent=2, allow_nan=False), flush=True)
        return
    if execution.quiet:
        return
    # no markup: messages hold [brackets] that are meant
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    with console.capture() as capture:
        _fill(console, result)
    print(capture.get(), end="", flush=True)  # by hand: rich makes exit code 1 of a broken pipe


def _fill(console: Any, result: Any) -> None:
    from rich.table import Table

    noteworthy = [o for o in result.outcomes if o.message or o.flags or o.status == "failed"]
    if noteworthy:
        table = Table(title=f"{result.stage}: cases to look at")
        for column in ("case", "status", "message"):
            table.add_column(column, overflow="fold")
        for outcome in noteworthy:
            table.add_row(outcome.case_id, ", ".join((outcome.status, *outcome.flags)), outcome.message)
        console.print(table)
    if result.outcomes:
        console.print(f"{result.stage}: {result.counts()}")
    for table in result.tables:
        console.print(table)
    for note in result.notes:
        console.print(note, soft_wrap=True)


for _command in COMMANDS:
    app.command(_command.name)(command_function(_command, run))


def main() -> None:
    """Entry point of ``lungseg``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # LANG=C must not turn a table into a UnicodeEncodeError
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()

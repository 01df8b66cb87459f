"""From configuration dataclasses to command line options: one function makes them all."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from lungseg.config.execution import Execution
from lungseg.config.fields import flag_name, from_dict, option_info, read_toml
from lungseg.config.presets import DEFAULT_PRESET, PRESETS, make_config

SHORT_FLAGS = {"quiet": "-q", "verbose": "-v", "num": "-n"}


@dataclass(frozen=True)
class PathOption:
    """A path a command takes: an argument, or an option where ``flags`` are given."""

    name: str
    doc: str
    flags: tuple[str, ...] = ()
    required: bool = False
    many: bool = False
    switch: bool = False
    """A yes/no option instead of a path."""
    words: bool = False
    """An option that takes words, several times, instead of a path."""

    def parameter(self) -> inspect.Parameter:
        """Typer parameter of this path."""
        missing: Any = ... if self.required else None
        if self.switch:
            default = typer.Option(False, *self.flags, help=self.doc, show_default=False)
            return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=bool)
        if self.words:
            default = typer.Option([], *self.flags, help=self.doc, metavar="WORD", show_default=False)
            return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=list[str])
        if self.flags:
            default = typer.Option(missing, *self.flags, help=self.doc, metavar="PATH", show_default=False)
        else:
            default = typer.Argument(missing, help=self.doc, metavar=self.name.upper() + ("..." if self.many else ""))
        annotation: Any = list[Path] if self.many else Path if self.required else Path | None
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@dataclass(frozen=True)
class Command:
    """One command of the tool: its stage function, what it takes, and how it is explained."""

    name: str
    stage: str
    """``module:function``, imported when the command runs."""
    doc: str
    paths: tuple[PathOption, ...]
    config: type | None
    examples: tuple[str, ...]
    execution: tuple[str, ...] = ("device", "jobs", "shard", "overwrite", "dry_run", "quiet", "verbose")
    """Fields of :class:`Execution` that mean something to this command."""
    check: str = ""
    """``module:function`` of the paths: what does not go together, in words; asked before anything is done."""
    plan: str = ""
    """``module:function`` of (config, model path, train if the command can) that tells a dry run all settings."""
    estimate: str = ""
    """``module:function`` of (config, execution) that tells a dry run what the work will need."""


def command_function(command: Command, run: Callable[..., None]) -> Callable[..., None]:
    """Function with a signature Typer understands; calls ``run(command, paths, values, execution_values)``."""
    parameters = [path.parameter() for path in command.paths]
    if command.config is not None:
        own = _option_fields(command.config)
        if not {"preset", "config"} & {field.name for field in own}:  # `run` hands them on to its stages
            parameters.append(
                _text_option("preset", f"Named settings: {', '.join(PRESETS)}. [{DEFAULT_PRESET}]", "NAME")
            )
            parameters.append(_text_option("config", f"TOML file; its table [{command.name}] sets options.", "FILE"))
        parameters += [_field_option(field, command.config) for field in own]
    taken = {field.name for field in _option_fields(command.config)} if command.config else set()
    fields = [f for f in _option_fields(Execution) if f.name in command.execution and f.name not in taken]
    parameters += [_field_option(field, Execution) for field in fields]

    def function(**values: Any) -> None:
        paths = {path.name: values.pop(path.name) for path in command.paths}
        execution_values = {field.name: values.pop(field.name) for field in fields}
        run(command, paths, values, execution_values)

    function.__name__ = command.name.replace("-", "_")
    function.__doc__ = help_text(command)
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def help_text(command: Command) -> str:
    """Description and examples, with the line breaks kept."""
    examples = "\n".join(f"  $ {example}" for example in command.examples)
    return f"{command.doc}\n\n\b\nExamples:\n{examples}"


def make_configs(
    command: Command, values: Mapping[str, Any], execution_values: Mapping[str, Any]
) -> tuple[Any, Execution]:
    """Configuration and execution from what was typed: defaults, then preset, then file, then options."""
    given = {key: value for key, value in execution_values.items() if value is not None}
    execution = dataclasses.replace(from_dict(Execution, given), interface="cli")
    if command.config is None:
        return None, execution
    options = {key: value for key, value in values.items() if value is not None}
    file_values = read_toml(Path(options["config"]), command.name) if "config" in options else {}
    if {"preset", "config"} <= {field.name for field in _option_fields(command.config)}:
        return from_dict(command.config, {**file_values, **options}), execution  # hands both on to its stages
    preset = options.pop("preset", DEFAULT_PRESET)
    options.pop("config", None)
    return make_config(command.config, preset=preset, file_values=file_values, **options), execution


def _option_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if "option" in field.metadata]


def _text_option(name: str, doc: str, metavar: str) -> inspect.Parameter:
    default = typer.Option(None, flag_name(name), help=doc, metavar=metavar, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=str | None)


def _field_option(field: dataclasses.Field[Any], cls: type) -> inspect.Parameter:
    info = option_info(field)
    hint = typing.get_type_hints(cls)[field.name]
    flag = flag_name(field.name)
    short = [SHORT_FLAGS[field.name]] if field.name in SHORT_FLAGS else []
    short += [info.flag] if info.flag else []
    doc = f"{info.doc} [{_defaults(field, cls)}]"
    if hint is bool:
        flags = [f"{flag}/--no-{field.name.replace('_', '-')}"] if field.default or cls is not Execution else [flag]
        default = typer.Option(None, *flags, *short, help=doc, show_default=False)
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=bool | None)
    metavar = "|".join(info.choices) if info.choices else _metavar(hint)
    default = typer.Option(None, flag, *short, help=doc, metavar=metavar, show_default=False)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=str | None)


def _defaults(field: dataclasses.Field[Any], cls: type) -> str:
    unit = f" {option_info(field).unit}" if option_info(field).unit else ""
    text = _shown(field.default) + unit
    for preset, table in PRESETS.items():
        if field.name in table.get(cls, {}):
            text += f"; {preset}: {_shown(table[cls][field.name])}"
    return text


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return ",".join(_shown(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value in (None, "") else str(value)


def _metavar(hint: Any) -> str:
    text = str(hint)
    if "tuple" in text:
        return "A,B,..."
    return "INT" if "int" in text else "NUMBER" if "float" in text else "TEXT"

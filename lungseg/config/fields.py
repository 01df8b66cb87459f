"""How a configuration field is declared, validated, parsed and written down.

A configuration is a frozen dataclass whose fields are made by :func:`option`. The command line, ``--help``, TOML
files and the provenance of every artefact are derived from these declarations, so they cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lungseg.errors import UsageError

ConfigT = TypeVar("ConfigT")

TABLES = (
    "preprocess", "extract-radiomics", "train-ddpm", "synthesize", "cluster", "refine", "evaluate", "report",
    "run", "phantom", "probe", "export-model", "benchmark",
)  # fmt: skip
"""Tables of a TOML file: the commands that have settings."""
MAX_SEED = 2**32 - 1
"""Largest seed that every generator takes."""


@dataclass(frozen=True)
class OptionInfo:
    """What a field says about itself."""

    doc: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    flag: str = ""


def option(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    flag: str = "",
) -> Any:
    """Declare a configuration field.

    Parameters
    ----------
    default
        Value of the `lungseg` preset. Tuples are written ``a,b,c`` on the command line.
    doc
        One line for ``--help``.
    unit
        Unit shown in the help, e.g. ``mm``.
    minimum, maximum
        Inclusive bounds (each element of a tuple).
    above
        Exclusive lower bound.
    choices
        Allowed words.
    flag
        Another name on the command line, beside the one made from the field's.
    """
    info = OptionInfo(doc, unit, minimum, maximum, above, tuple(choices), flag)
    return dataclasses.field(default=default, metadata={"option": info})


def option_info(field: dataclasses.Field[Any]) -> OptionInfo:
    """Declaration of a field made by :func:`option`."""
    info: OptionInfo = field.metadata["option"]
    return info


def flag_name(field_name: str) -> str:
    """Command line flag of a field: ``spacing_mm`` -> ``--spacing-mm``."""
    return "--" + field_name.replace("_", "-")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON types of a configuration (tuples become lists), for provenance and files."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Configuration of class ``cls`` from plain values.

    Raises
    ------
    UsageError
        For an unknown key (with the nearest valid name), a value of the wrong type or out of range; all problems
        are listed at once.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if "option" in f.metadata}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    problems: list[str] = []
    parsed: dict[str, Any] = {}
    for raw_key, value in values.items():
        key = raw_key.replace("-", "_")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(fields))}"
            problems.append(f"unknown option '{raw_key}'{hint}")
            continue
        try:
            parsed[key] = parse_value(hints[key], value)
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{flag_name(key)}: {value!r} is not {_type_words(hints[key])}")
            continue
        problems += [f"{flag_name(key)}: {text}" for text in _range_problems(option_info(fields[key]), parsed[key])]
    if problems:
        raise UsageError("\n".join(problems))
    config = cls(**parsed)
    if hasattr(config, "check"):
        conflicts = list(config.check())
        if conflicts:
            raise UsageError("\n".join(conflicts))
    return config


def parse_value(hint: Any, value: Any) -> Any:
    """Value of the annotated type from a string, number or list; ``ValueError``/``TypeError`` if it is none."""
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        items = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ValueError(f"needs {len(args)} values")
        return tuple(parse_value(args[0], item.strip() if isinstance(item, str) else item) for item in items)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise TypeError("not a boolean")
    if isinstance(value, bool) or (hint is not str and value is None):
        raise TypeError("wrong type")
    if hint is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError("not an integer")
        return int(value)
    if hint is float:
        return float(value)
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _type_words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_words(arg) if arg is not type(None) else "none" for arg in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        count = "any number of" if args[-1] is Ellipsis else str(len(args))
        return f"{count} comma-separated values ({_type_words(args[0])})"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _range_problems(info: OptionInfo, value: Any) -> list[str]:
    problems = []
    for item in value if isinstance(value, tuple) else (value,):
        if item is None or isinstance(item, bool):
            continue
        if info.choices and item not in info.choices:
            near = difflib.get_close_matches(str(item), info.choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            problems.append(f"'{item}' is not one of {', '.join(info.choices)}{hint}")
        if isinstance(item, (int, float)):
            if isinstance(item, float) and not math.isfinite(item):
                problems.append(f"{item} is not finite")
            if info.minimum is not None and item < info.minimum:
                problems.append(f"{item} is below the minimum of {info.minimum:g}{_unit(info)}")
            if info.above is not None and item <= info.above:
                problems.append(f"{item} must be above {info.above:g}{_unit(info)}")
            if info.maximum is not None and item > info.maximum:
                problems.append(f"{item} is above the maximum of {info.maximum:g}{_unit(info)}")
    return problems


def _unit(info: OptionInfo) -> str:
    return f" {info.unit}" if info.unit else ""


def read_toml(path: Path, table: str) -> dict[str, Any]:
    """Values of one table (the command's name) of a TOML file; empty if the table is absent.

    Raises
    ------
    UsageError
        If the file cannot be read or parsed, or holds anything but tables named like commands.
    """
    try:
        with open(path, "rb") as stream:
            document = tomllib.load(stream)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from error
    problems = []
    for name, content in document.items():
        if name not in TABLES:
            near = difflib.get_close_matches(name, TABLES, n=1)
            hint = f"did you mean [{near[0]}]?" if near else f"tables are named {', '.join(TABLES)}"
            problems.append(f"--config {path}: unknown table '{name}'; {hint}")
        elif not isinstance(content, dict):
            problems.append(f"--config {path}: [{name}] must be a table of options")
    if problems:
        raise UsageError("\n".join(problems))
    values: dict[str, Any] = document.get(table, {})
    return values

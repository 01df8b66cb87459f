"""The scores of an evaluation read back from its ``cases.csv``."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import MISSING, fields
from typing import get_type_hints

from lungseg.errors import InputError
from lungseg.evaluation.scores import STATUSES, ClassScore
from lungseg.evaluation.summary import ORACLE_SUFFIX

MAX_ROWS = 5_000_000
"""Of a table that is read: more is no evaluation of scans."""
_TEXTS = ("case_id", "patient_id", "tissue", "status")


def read_cases_csv(text: str, *, what: str) -> dict[str, list[ClassScore]]:
    """Scores by method, in the order of the file; those of oracle namings are left out.

    Parameters
    ----------
    text : str
        As ``tables.cases_csv`` writes it; further columns are ignored, columns with a default may be missing.
    what : str
        Name of the table in messages.

    Raises
    ------
    InputError
        If a column is missing, a status is unknown or a number is none.
    """
    reader = csv.DictReader(io.StringIO(text))
    known = {field.name: field.default is not MISSING for field in fields(ClassScore)}
    missing = [name for name, optional in known.items() if not optional and name not in (reader.fieldnames or ())]
    if missing or "method" not in (reader.fieldnames or ()):
        raise InputError(
            f"{what} is no table of scores: {', '.join(missing or ['method'])} missing; run lungseg evaluate again"
        )
    types = get_type_hints(ClassScore)
    found: dict[str, list[ClassScore]] = {}
    for number, row in enumerate(reader):
        if number >= MAX_ROWS:
            raise InputError(f"{what} has more than {MAX_ROWS} lines: it is no table of scores")
        if row["method"].endswith(ORACLE_SUFFIX):
            continue
        values: dict[str, object] = {name: row[name] for name in _TEXTS}
        if row["status"] not in STATUSES:
            raise InputError(f"{what}, line {number + 2}: unknown status '{row['status']}'")
        try:
            for name in known.keys() - set(_TEXTS):
                if row.get(name) is not None:
                    values[name] = _value(types[name], row[name])
        except ValueError as error:
            raise InputError(f"{what}, line {number + 2}: {error}") from error
        found.setdefault(row["method"], []).append(ClassScore(**values))  # type: ignore[arg-type]
    return found


def _value(kind: object, text: str) -> object:
    """A cell as its column's type: a number, nan where a float is blank, None where an integer is."""
    if kind is str:
        return text
    if kind is float:
        return float(text) if text else math.nan
    return int(text) if text else None

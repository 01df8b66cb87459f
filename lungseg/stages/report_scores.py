"""Scores of an earlier evaluation, for the pages of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lungseg.errors import InputError
from lungseg.evaluation.score_files import read_cases_csv
from lungseg.report.agreement import Agreement

TABLE = "cases.csv"


def read_agreement(folder: Path, name: str, *, asked: bool) -> Mapping[str, Agreement]:
    """Scores of each case of one method, from the folder that `evaluate` wrote.

    Parameters
    ----------
    folder : Path
    name : str
        The method: the name of the clustering that is reported.
    asked : bool
        The user named this folder: then it must hold scores of the method, or of one method only. One that was found
        beside the store is passed over if it does not.

    Raises
    ------
    InputError
        If the folder was asked for and holds no such scores; if its table is damaged.
    """
    path = folder / TABLE
    if not path.is_file():
        if asked:
            raise InputError(f"--scores {folder} holds no {TABLE}: give the output folder of lungseg evaluate")
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    methods = read_cases_csv(text, what=str(path))
    if name not in methods and not (asked and len(methods) == 1):
        if asked:
            known = ", ".join(methods) or "no method"
            raise InputError(f"--scores {folder} holds scores of {known}, not of '{name}': choose one with --name")
        return {}
    rows = methods[name] if name in methods else next(iter(methods.values()))
    case_ids = dict.fromkeys(row.case_id for row in rows)
    return {case_id: Agreement(tuple(row for row in rows if row.case_id == case_id)) for case_id in case_ids}

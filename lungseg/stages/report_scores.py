"""Scores of an earlier evaluation, for the pages of a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from lungseg.errors import InputError
from lungseg.evaluation.score_files import read_cases_csv
from lungseg.report.agreement import Agreement
from lungseg.store.cases import Store

TABLE, SUMMARY = "cases.csv", "summary.json"


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


def scores_of_other_maps(folder: Path, name: str, store: Store, case_ids: Iterable[str]) -> frozenset[str]:
    """Cases whose label map is not the one that was scored: their scores say nothing of what the page shows.

    The evaluation of a store leaves the fingerprint of each map. Where there is none (label maps of a folder were
    scored), a map that was written after the scores counts as another one.
    """
    scored = _scored_maps(folder, name)
    written = (folder / TABLE).stat().st_mtime_ns
    others = set()
    for case_id in case_ids:
        path = store.case_file(case_id, "labels", name)
        if not path.exists():
            continue
        if case_id in scored:
            with store.open(case_id, "labels", name) as labels:
                is_other = labels.fingerprint != scored[case_id]
        else:
            is_other = path.stat().st_mtime_ns > written
        if is_other:
            others.add(case_id)
    return frozenset(others)


def _scored_maps(folder: Path, name: str) -> Mapping[str, str]:
    """Fingerprint of the label map that was scored, by case; empty if the evaluation did not say."""
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / SUMMARY} cannot be read: {error}; run lungseg evaluate again") from error
    maps = found.get("map_fingerprints", {}) if isinstance(found, dict) else {}
    mine = maps.get(name, {}) if isinstance(maps, dict) else {}
    return mine if isinstance(mine, dict) else {}

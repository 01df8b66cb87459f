"""The worst class-case pairs of each method: their volumes are read once more and cut to one slice each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lungseg.config.execution import Execution
from lungseg.errors import InputError, LungsegError
from lungseg.evaluation.scores import ClassScore
from lungseg.report.worst_cases import WorstPair
from lungseg.report.worst_slices import worst_pairs, worst_slice
from lungseg.scan.nifti import read_image
from lungseg.scan.privacy import replace_path
from lungseg.scan.resample import resample_onto
from lungseg.scan.sources import find_sources
from lungseg.scan.volume import AIR_HU, Geometry, Volume
from lungseg.stages.cohort import DONE, CaseReturn, run_cases
from lungseg.stages.evaluate_case import Scoring, nameless, read_prediction, read_reference
from lungseg.stages.evaluate_pairs import Pair, ScoringPlan


@dataclass(frozen=True)
class _Wanted:
    """What is to be shown of one case."""

    pair: Pair
    shown: tuple[WorstPair, ...]


def worst_of_methods(
    plan: ScoringPlan,
    scoring: Scoring,
    scores: Mapping[str, Sequence[ClassScore]],
    *,
    count: int,
    execution: Execution,
    isolate: bool,
) -> list[WorstPair]:
    """The worst pairs of each method with their pictures, grouped by method, the worst first.

    Parameters
    ----------
    plan, scoring
        What was scored, and how.
    scores : mapping of method name to its rows
    count : int
        Pairs of each method.
    execution, isolate
        As for ``run_cases``.
    """
    ordered = [WorstPair(method, row) for method, rows in scores.items() for row in worst_pairs(rows, count)]
    by_case: dict[str, list[WorstPair]] = {}
    for shown in ordered:
        by_case.setdefault(shown.score.case_id, []).append(shown)
    wanted = [_Wanted(p, tuple(by_case[p.case_id])) for p in plan.pairs if p.case_id in by_case]
    outcomes = run_cases(
        _with_pictures, wanted, scoring,
        names=[item.pair.case_id for item in wanted], title="evaluate, worst pairs", execution=execution,
        isolate=isolate,
    )  # fmt: skip
    found: dict[tuple[str, ClassScore], WorstPair] = {}
    for item, outcome in zip(wanted, outcomes, strict=True):
        drawn = outcome.value if outcome.status == DONE else [replace(p, problem=outcome.message) for p in item.shown]
        found.update({(before.method, before.score): after for before, after in zip(item.shown, drawn, strict=True)})
    return [found[shown.method, shown.score] for shown in ordered]


def _with_pictures(item: _Wanted, scoring: Scoring) -> CaseReturn:
    """Entries of one case with their slices; one that cannot be drawn says why."""
    try:
        reference = read_reference(item.pair, scoring)
        if reference is None:
            raise InputError("the reference is gone")
        grid = reference.volume.geometry
        image, problem = _image(item.pair, scoring, grid)
    except LungsegError as error:
        text = nameless(str(error), item.pair, scoring)
        return DONE, "", [replace(shown, problem=text) for shown in item.shown]
    drawn = []
    sides: dict[str, np.ndarray] = {}
    names = [method.name for method in scoring.methods]
    for shown in item.shown:
        if shown.method not in sides:
            side = read_prediction(item.pair, names.index(shown.method), scoring, grid)
            sides = {} if side is None else {shown.method: side.labels}  # one at a time: methods are grouped
        if shown.method not in sides:
            drawn.append(replace(shown, problem="the prediction is gone"))
            continue
        picture = worst_slice(
            sides[shown.method],
            reference.volume.array,
            scoring.view[shown.score.tissue],
            spacing_mm=grid.spacing_mm,
            volume_hu=image,
            slice_index=shown.score.slice_index,
        )
        drawn.append(replace(shown, picture=picture))
    return DONE, problem, drawn


def _image(pair: Pair, scoring: Scoring, grid: Geometry) -> tuple[np.ndarray | None, str]:
    """CT on the reference's grid, from the folder of scans or the store, and why it is missing if it could not be read.

    Raises
    ------
    StoreError
        If the store's volume is damaged.
    """
    if pair.image is not None:
        try:
            scan = _scan(pair.image)
        except LungsegError as error:
            return None, f"no CT in the pictures: {replace_path(str(error), pair.image, 'the scan')}"
        return resample_onto(scan.array, scan.geometry, grid, kind="ct", fill=AIR_HU), ""
    for method in scoring.methods:
        if method.store is not None and method.store.case_file(pair.case_id, "volume").exists():
            with method.store.open(pair.case_id, "volume") as volume:
                if "source/image" not in volume:
                    return None, ""
                source = Geometry.from_dict(volume.provenance["source"]["grid"])
                return resample_onto(volume.read("source/image"), source, grid, kind="ct", fill=AIR_HU), ""
    return None, ""


def _scan(path: Path) -> Volume:
    """CT of an image file or a DICOM folder."""
    if path.is_file():
        return read_image(path)
    sources = find_sources([path])
    if len(sources) != 1:
        raise InputError(f"{path} holds {len(sources)} scans, not one")
    return sources[0].read()

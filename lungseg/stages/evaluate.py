"""``lungseg evaluate``: label maps against references, as METHOD 0.4 defines it; nothing is dropped silently."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungseg.config.evaluate import EvaluateConfig
from lungseg.config.execution import Execution
from lungseg.config.fields import to_dict
from lungseg.errors import InputError, StoreError
from lungseg.evaluation.overlap import missing_prediction_scores, score_case
from lungseg.evaluation.summary import summarise
from lungseg.evaluation.tables import cases_csv, markdown_table, results_dict, rich_table
from lungseg.scan.nifti import read_image
from lungseg.scan.resample import resample_onto
from lungseg.scan.sources import IMAGE_SUFFIXES
from lungseg.scan.volume import Geometry, Volume
from lungseg.stages.cohort import DONE, FAILED, CaseReturn, StageResult, output_folder, run_cases
from lungseg.stages.refine import source_labels
from lungseg.store.atomic import write_json, write_text
from lungseg.store.cases import Store, read_id_map
from lungseg.tissue import OUTSIDE, VIEWS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    """A prediction and its reference; either may be missing."""

    case_id: str
    patient_id: str
    reference: Path | None
    """Label map file; None: the store's own reference.h5, or none at all."""
    prediction: Path | None
    """Label map file; None: the store's labels, or none at all."""


def evaluate(
    predictions: Store | Path | str,
    output: Path,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    reference: Path | None = None,
    id_map: Path | None = None,
    execution: Execution = Execution(),
) -> StageResult:
    """Score predictions and write ``cases.csv``, ``summary.json`` and ``table.md`` into ``output``.

    Parameters
    ----------
    predictions : store or folder
        A patch store (its labels are put on each reference's grid), or a folder of label maps named like the
        references.
    reference : folder, optional
        Label maps named ``<case_id>.nii.gz``, or like the sources of the store (``id_map``). Without it the store's
        own references are used.

    Returns
    -------
    StageResult
        ``values["summary"]`` holds the figures of ``summary.json``.

    Raises
    ------
    InputError
        If there is no reference at all, or none that fits a prediction.
    """
    output = output_folder(Path(output))
    store = predictions if isinstance(predictions, Store) else _as_store(Path(predictions))
    if store is not None:
        pairs = _store_pairs(store, config.name, reference, id_map)
    else:
        if reference is None:
            raise InputError(f"{predictions} is a folder of label maps: give --reference DIR")
        pairs = _folder_pairs(Path(str(predictions)), Path(reference))
    outcomes = run_cases(
        _score_one, pairs, store, config,
        names=[pair.case_id for pair in pairs], title="evaluate", execution=execution,
    )  # fmt: skip
    scores = [score for outcome in outcomes for score in outcome.value or ()]
    if not scores:
        raise InputError(f"nothing could be scored: {outcomes[0].message if outcomes else 'no reference was found'}")
    scored = {pair.case_id for pair in pairs}
    left = [c for c in store.case_ids() if c not in scored] if store else []
    unscored = (f"{len(left)} cases have no reference and are not scored: {', '.join(left[:5])}",) if left else ()
    summary = summarise(scores, num_bootstrap=config.bootstrap, seed=config.seed)
    figures = {**results_dict([summary]), "config": to_dict(config)}
    write_text(output / "cases.csv", cases_csv({config.name: scores}))
    write_json(output / "summary.json", figures)
    write_text(output / "table.md", markdown_table(summary))
    return StageResult(
        "evaluate",
        output,
        outcomes,
        tables=(rich_table(summary),),
        notes=(*unscored, f"tables: {output}"),
        values={"summary": figures},
    )


def _as_store(path: Path) -> Store | None:
    return Store(path) if (path / "store.json").is_file() else None


def _stem(path: Path) -> str:
    name = path.name
    for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _label_maps(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of label maps")
    return {_stem(f): f for f in sorted(folder.iterdir()) if f.name.lower().endswith(IMAGE_SUFFIXES)}


def _store_pairs(store: Store, name: str, reference: Path | None, id_map: Path | None) -> list[_Pair]:
    """References by file stem = case id or = source name through the id map, else the store's own."""
    case_ids = store.require_cases()
    maps = _label_maps(Path(reference)) if reference else {}
    sources = {}
    if id_map:
        rows = read_id_map(Path(id_map))
        stems = [_stem(Path(row["source"])) for row in rows]
        # two sources of one name cannot be told apart by a reference of that name: their case ids still can
        sources = {stem: row["case_id"] for stem, row in zip(stems, rows, strict=True) if stems.count(stem) == 1}
    by_case = {sources.get(stem, stem): path for stem, path in maps.items()}
    pairs = []
    for case_id in case_ids:
        if case_id in by_case or (not reference and store.case_file(case_id, "reference").exists()):
            pairs.append(_Pair(case_id, _patient(store, case_id), by_case.get(case_id), None))
    strangers = [path for case_id, path in by_case.items() if case_id not in case_ids]
    # file names of strangers may hold patients' names: they get numbers, and only -v tells which is which
    for number, path in enumerate(strangers, start=1):
        name = f"reference-{number:04d}"
        log.debug("evaluate: %s is %s", name, path)
        pairs.append(_Pair(name, name, path, None))
    if not any(pair.case_id in case_ids for pair in pairs):
        where = f"in {reference}" if reference else "in the store"
        raise InputError(
            f"no reference {where} belongs to a case of {store.path}: name them <case_id>.nii.gz "
            f"(cases: {', '.join(case_ids[:5])} ...), or give --id-map"
        )
    return pairs


def _patient(store: Store, case_id: str) -> str:
    """Patient of a case; the case itself if its volume cannot be read (its scoring then fails and says why)."""
    try:
        with store.open(case_id, "volume") as volume:
            return str(volume.provenance["patient_id"])
    except StoreError:
        return case_id


def _folder_pairs(predictions: Path, reference: Path) -> list[_Pair]:
    predicted, references = _label_maps(predictions), _label_maps(reference)
    if not set(predicted) & set(references):
        raise InputError(f"no file of {predictions} is named like one of {reference}")
    pairs = [_Pair(stem, stem, path, predicted.get(stem)) for stem, path in references.items()]
    return pairs + [_Pair(stem, stem, None, path) for stem, path in predicted.items() if stem not in references]


def _score_one(pair: _Pair, store: Store | None, config: EvaluateConfig) -> CaseReturn:
    """Scores of one case; a missing side is reported as failed (exit code 8), never dropped."""
    view = VIEWS[config.view]
    expected = _reference(pair, store)
    if expected is None:
        raise InputError("there is a prediction but no reference: not scored")
    spacing = expected.geometry.spacing_mm
    ids = {"case_id": pair.case_id, "patient_id": pair.patient_id}
    found = _prediction(pair, store, config, expected)
    if found is None:
        missed = missing_prediction_scores(expected.array, spacing_mm=spacing, view=view, lung_mask=None, **ids)
        return FAILED, "there is a reference but no prediction: scored as missed", missed
    labels, lungs = found
    return DONE, "", score_case(labels, expected.array, spacing_mm=spacing, view=view, lung_mask=lungs, **ids)


def _reference(pair: _Pair, store: Store | None) -> Volume | None:
    if pair.reference is not None:
        return read_image(pair.reference, integer=True)
    if store is None or not store.case_file(pair.case_id, "reference").exists():
        return None
    with store.open(pair.case_id, "reference") as artefact:
        return Volume(artefact.read("labels"), Geometry.from_dict(artefact.provenance["grid"]))


def _prediction(
    pair: _Pair, store: Store | None, config: EvaluateConfig, expected: Volume
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Predicted labels and, from a store, the lungs, on the reference's grid."""
    if store is None:
        if pair.prediction is None:
            return None
        predicted = read_image(pair.prediction, integer=True)
        if not predicted.geometry.is_close(expected.geometry) and not config.resample:
            raise InputError(
                f"prediction and reference lie on different grids: {predicted.geometry} and {expected.geometry}; "
                "use --resample to bring the prediction onto the reference's grid"
            )
        grid = predicted.geometry
        return resample_onto(predicted.array, grid, expected.geometry, kind="mask", fill=OUTSIDE), None
    if not store.case_file(pair.case_id, "labels", config.name).exists():
        return None
    with store.open(pair.case_id, "volume") as volume, store.open(pair.case_id, "labels", config.name) as artefact:
        artefact.require_input("volume.h5", volume.fingerprint)
        labels, lungs, _ = source_labels(volume, artefact.read("labels"))
        grid = Geometry.from_dict(volume.provenance["source"]["grid"])
        if lungs is None:
            lungs = labels
    moved = resample_onto(labels, grid, expected.geometry, kind="mask", fill=OUTSIDE)
    return moved, resample_onto(lungs, grid, expected.geometry, kind="mask", fill=OUTSIDE) > 0

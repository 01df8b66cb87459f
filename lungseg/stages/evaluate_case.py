"""One case of ``lungseg evaluate``: both sides read, put on one grid and scored, for every method."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lungseg.errors import InputError, LungsegError, StoreError
from lungseg.evaluation.oracle import CaseConfusion, OracleNaming, confusion_of_case, rename_labels
from lungseg.evaluation.overlap import missing_prediction_scores, missing_reference_scores, score_case
from lungseg.evaluation.scores import SLICES, ClassScore, ScoreSettings
from lungseg.scan.label_images import LabelImage, onto_reference, read_labels
from lungseg.scan.label_maps import LabelMap
from lungseg.scan.privacy import replace_path
from lungseg.scan.resample import resample_onto
from lungseg.scan.volume import Geometry, Triple, Volume
from lungseg.stages.cohort import DONE, FAILED, CaseReturn
from lungseg.stages.evaluate_calibration import case_calibration
from lungseg.stages.evaluate_pairs import LABEL_MAP, REFERENCE_LABEL_MAP, Method, Pair, View
from lungseg.stages.refine import source_labels
from lungseg.store.cases import Store
from lungseg.tissue import OUTSIDE, LungLabel, Tissue, class_name

log = logging.getLogger(__name__)

THE_REFERENCE = "the reference"
NO_PREDICTION = "there is a reference but no prediction: scored as missed"
NO_REFERENCE = "there is a prediction but no reference: not scored"
"""Problems that have sentences of their own in every table."""


@dataclass(frozen=True)
class Scoring:
    """What all cases are scored with."""

    methods: tuple[Method, ...]
    view: View
    reference_map: LabelMap | None
    settings: ScoreSettings
    resample: bool
    """Bring predictions of another grid onto the reference's."""
    oracle: bool
    """Also count what the oracle naming must know."""


@dataclass(frozen=True)
class CaseScores:
    """What one case gave; a method without an entry could not be scored on it."""

    scores: Mapping[str, list[ClassScore]] = field(default_factory=dict)
    confusions: Mapping[str, list[CaseConfusion]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    """What is wrong, by method; '' for the reference. Free of paths."""
    resampled: tuple[str, ...] = ()
    """Methods whose prediction came from another grid."""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Classes that the view has no place for, by method: lungs among tissues, or tissues among lungs."""
    calibrations: dict[str, np.ndarray] = field(default_factory=dict)
    """Right and wrong voxels by confidence, of methods that tell theirs."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of the label map that was scored, by method, of maps of a store."""


@dataclass(frozen=True)
class Side:
    """Classes of a prediction on the reference's grid; on its own if there is no reference."""

    labels: np.ndarray
    spacing_mm: Triple
    is_resampled: bool = False
    """Taken from a file on another grid, by `--resample-to reference`."""
    left_out: tuple[str, ...] = ()
    """Classes of the file that the view has no place for."""
    fingerprint: str = ""
    """Of the label map, if it is one of a store."""


def score_pair(pair: Pair, scoring: Scoring) -> CaseReturn:
    """Scores of one case for every method; a missing or unusable side is reported as failed, never dropped."""
    try:
        reference = read_reference(pair, scoring)
    except LungsegError as error:
        return _outcome(CaseScores(problems={"": nameless(str(error), pair, scoring)}))
    scores: dict[str, list[ClassScore]] = {}
    confusions: dict[str, list[CaseConfusion]] = {}
    problems: dict[str, str] = {}
    resampled = []
    left_out = {}
    calibrations: dict[str, np.ndarray] = {}
    fingerprints = {}
    if reference is None:
        problems[""] = NO_REFERENCE
    lungs = None if reference is None else _lungs(pair, scoring, reference.volume.geometry)
    for index, method in enumerate(scoring.methods):
        try:
            if reference is None:
                scores[method.name] = _without_reference(pair, index, scoring)
                continue
            side = read_prediction(pair, index, scoring, reference.volume.geometry)
            if side is None:
                problems[method.name] = NO_PREDICTION
                scores[method.name] = _without_prediction(pair, reference, lungs, scoring)
                continue
            scores[method.name] = _score(pair, side, reference, lungs, scoring)
            if side.left_out:
                left_out[method.name] = side.left_out
            if side.fingerprint:
                fingerprints[method.name] = side.fingerprint
            if side.is_resampled:
                resampled.append(method.name)
            counts = case_calibration(method, pair.case_id, reference.volume, scoring.view)
            if counts is not None:
                calibrations[method.name] = counts
            if scoring.oracle:
                confusions[method.name] = confusion_of_case(
                    side.labels,
                    reference.volume.array,
                    spacing_mm=reference.volume.geometry.spacing_mm,
                    view=scoring.view,
                    case_id=pair.case_id,
                    settings=_settings(scoring, reference),
                )
        except LungsegError as error:
            problems[method.name] = nameless(str(error), pair, scoring)
            log.debug("evaluate: %s", error)
    found = {name: rows for name, rows in scores.items() if rows}
    if not found and problems.keys() == {""}:
        problems[""] = "there is neither a reference nor a prediction"
    return _outcome(CaseScores(found, confusions, problems, tuple(resampled), left_out, calibrations, fingerprints))


def oracle_scores(pair: Pair, scoring: Scoring, namings: Mapping[str, OracleNaming]) -> CaseReturn:
    """Scores of one case under the oracle namings; the side is read again, so that no volume is kept."""
    reference = read_reference(pair, scoring)
    lungs = None if reference is None else _lungs(pair, scoring, reference.volume.geometry)
    found: dict[str, list[ClassScore]] = {}
    for index, method in enumerate(scoring.methods):
        if reference is None or method.name not in namings:
            continue
        side = read_prediction(pair, index, scoring, reference.volume.geometry)
        if side is not None:
            renamed = replace(side, labels=rename_labels(side.labels, namings[method.name]))
            found[method.name] = _score(pair, renamed, reference, lungs, scoring)
    return DONE, "", CaseScores(found)


def _outcome(result: CaseScores) -> CaseReturn:
    """Status of a case: failed if anything is wrong with it."""
    if not result.problems:
        return DONE, "", result
    text = "; ".join(f"{name}: {problem}" if name else problem for name, problem in result.problems.items())
    if len(set(result.problems.values())) == 1 and len(result.scores) <= 1:
        text = next(iter(result.problems.values()))
    return FAILED, text, result


def nameless(text: str, pair: Pair, scoring: Scoring) -> str:
    """A message without the files it is about: their names may be patients'."""
    if pair.reference is not None:
        text = replace_path(text, pair.reference, THE_REFERENCE)
    for path, method in zip(pair.predictions, scoring.methods, strict=True):
        if path is not None:
            text = replace_path(text, path, _prediction_name(method))
    return text


def _prediction_name(method: Method) -> str:
    return f"the prediction of {method.name}"


# ---------------------------------------------------------------- scores


def _score(
    pair: Pair, side: Side, reference: LabelImage, lungs: np.ndarray | None, scoring: Scoring
) -> list[ClassScore]:
    """Rows of one prediction."""
    return score_case(
        side.labels,
        reference.volume.array,
        spacing_mm=reference.volume.geometry.spacing_mm,
        view=scoring.view,
        lung_mask=lungs,
        case_id=pair.case_id,
        patient_id=pair.patient_id,
        settings=_settings(scoring, reference),
    )


def _without_prediction(
    pair: Pair, reference: LabelImage, lungs: np.ndarray | None, scoring: Scoring
) -> list[ClassScore]:
    return missing_prediction_scores(
        reference.volume.array,
        spacing_mm=reference.volume.geometry.spacing_mm,
        view=scoring.view,
        lung_mask=lungs,
        case_id=pair.case_id,
        patient_id=pair.patient_id,
        settings=_settings(scoring, reference),
    )


def _without_reference(pair: Pair, index: int, scoring: Scoring) -> list[ClassScore]:
    """Rows that count a prediction without a reference; none if there is no prediction either."""
    side = read_prediction(pair, index, scoring, None)
    if side is None:
        return []
    return missing_reference_scores(
        side.labels,
        spacing_mm=side.spacing_mm,
        view=scoring.view,
        case_id=pair.case_id,
        patient_id=pair.patient_id,
        settings=scoring.settings,
    )


def _settings(scoring: Scoring, reference: LabelImage) -> ScoreSettings:
    """Settings of one case: in slice mode with the slices that its reference annotates."""
    if scoring.settings.mode != SLICES:
        return scoring.settings
    return replace(scoring.settings, slices=reference.annotated)


# ---------------------------------------------------------------- sides


def read_reference(pair: Pair, scoring: Scoring) -> LabelImage | None:
    """The reference of a case, in classes of the view; None if there is none."""
    if pair.reference is not None:
        found = read_labels(pair.reference, scoring.reference_map, name=THE_REFERENCE, option=REFERENCE_LABEL_MAP)
    elif pair.reference_store is not None:
        with pair.reference_store.open(pair.case_id, "reference") as artefact:
            volume = Volume(artefact.read("labels"), Geometry.from_dict(artefact.provenance["grid"]))
        annotated = np.flatnonzero(volume.array.any(axis=(1, 2))).tolist()
        found = LabelImage(volume, tuple(annotated))
    else:
        return None
    return replace(found, volume=_in_view(found.volume, scoring.view, THE_REFERENCE)[0])


def read_prediction(pair: Pair, index: int, scoring: Scoring, grid: Geometry | None) -> Side | None:
    """Prediction of one method on a grid (its own without one); None if there is none."""
    method, path = scoring.methods[index], pair.predictions[index]
    name = _prediction_name(method)
    if method.store is not None:
        return _from_store(method.store, pair.case_id, method.clustering, grid)
    if path is None:
        return None
    image = read_labels(path, method.mapping, name=name, option=LABEL_MAP)
    volume, left_out = _in_view(image.volume, scoring.view, name)
    image = replace(image, volume=volume)
    if grid is None:
        return Side(image.volume.array, image.volume.geometry.spacing_mm, left_out=left_out)
    labels, is_resampled = onto_reference(image, grid, resample=scoring.resample, name=name)
    return Side(labels, grid.spacing_mm, is_resampled, left_out)


def _from_store(store: Store, case_id: str, clustering: str, grid: Geometry | None) -> Side | None:
    """Predicted labels of a store, on the reference's grid, or without one on their scan's."""
    if not store.case_file(case_id, "labels", clustering).exists():
        return None
    with store.open(case_id, "volume") as volume, store.open(case_id, "labels", clustering) as artefact:
        artefact.require_input("volume.h5", volume.fingerprint)
        labels, _, _ = source_labels(volume, artefact.read("labels"))
        source = Geometry.from_dict(volume.provenance["source"]["grid"])
        fingerprint = artefact.fingerprint
    if grid is None:
        return Side(labels, source.spacing_mm, fingerprint=fingerprint)
    moved = resample_onto(labels, source, grid, kind="mask", fill=OUTSIDE)
    return Side(moved, grid.spacing_mm, fingerprint=fingerprint)


def _lungs(pair: Pair, scoring: Scoring, grid: Geometry) -> np.ndarray | None:
    """Lungs of a store on the reference's grid, for the penalty of every method alike; None: those of the reference."""
    for method in scoring.methods:
        if method.store is None or not method.store.case_file(pair.case_id, "volume").exists():
            continue
        try:
            with method.store.open(pair.case_id, "volume") as volume:
                kept = "source/mask" in volume
                mask = volume.read("source/mask" if kept else "mask")
                facts = volume.provenance["source"]["grid"] if kept else volume.provenance["grid"]
        except StoreError:
            continue  # its labels cannot be read either, and say why
        lungs = resample_onto(mask, Geometry.from_dict(facts), grid, kind="mask", fill=OUTSIDE) > 0
        return lungs if lungs.any() else None
    return None


def _in_view(volume: Volume, view: View, name: str) -> tuple[Volume, tuple[str, ...]]:
    """The volume, in place without lungs in a view of tissues, and without tissues in a view of lungs; what it lost.

    Raises
    ------
    InputError
        If the view tells the sides of the lung and the label map does not.
    """
    kept = {int(i) for ids in view.values() for i in ids}
    is_lung_view = not kept & set(map(int, Tissue))
    if is_lung_view and LungLabel.LUNG not in kept and (volume.array == LungLabel.LUNG).any():
        raise InputError(f"{name} does not tell the sides of the lung: use --view lung")
    table = np.arange(256, dtype=np.uint8)
    others = sorted(set(map(int, Tissue if is_lung_view else LungLabel)) - kept)
    table[others] = OUTSIDE
    present = np.zeros(256, dtype=bool)
    for plane in volume.array:
        present[plane] = True
        plane[...] = table[plane]
    return volume, tuple(class_name(i) for i in others if present[i])

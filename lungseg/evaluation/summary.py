"""What an evaluation found: means, medians, counts and 95 % intervals by patient, per class and over all pairs.

A *pair* is a class of a case (of an annotated slice in slice mode) that its reference holds. The mean of a class is
over its pairs; its uncertainty is that of the patients, whatever the number of pairs each brings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.evaluation.bootstrap import PatientBootstrap
from lungseg.evaluation.scores import (
    ABSENT,
    FALSE_TISSUE,
    MISSING_PREDICTION,
    MISSING_REFERENCE,
    NOT_COMPARED,
    STATUSES,
    UNUSABLE,
    ClassScore,
    ScoreSettings,
)

ALL_CLASSES = "all"
"""Name of the summary row over all class-case pairs."""
ORACLE_SUFFIX = ", oracle naming"
"""Ends the name of a method whose classes were named with the reference's help."""
AVERAGED = ("dice", "iou", "precision", "recall", "surface_dice", "hd95_mm", "penalised_hd95_mm", "assd_mm",
            "volume_error_ml", "volume_error_percent")  # fmt: skip
"""Figures of a ``ClassScore`` that are averaged over the pairs where they exist."""


@dataclass(frozen=True)
class Figure:
    """One figure over many pairs; ``nan`` where nothing can be averaged."""

    num: int
    """Pairs in which it exists: an HD95 needs both sides, a precision something predicted."""
    mean: float
    """Arithmetic mean over those pairs."""
    median: float
    """Median over those pairs."""
    ci_low: float
    """Lower end of the 95 % bootstrap interval of the mean, by patient; nan with fewer than two patients."""
    ci_high: float
    """Upper end."""


@dataclass(frozen=True)
class ClassSummary:
    """One row of the table: a class, or all class-case pairs."""

    tissue: str
    """Name of the class, or `all`."""
    num_pairs: int
    """Class-case pairs averaged (class-slice pairs in slice mode)."""
    num_cases: int
    """Cases among them."""
    num_patients: int
    """Patients among them: the units of the bootstrap."""
    figures: Mapping[str, Figure]
    """By the names of ``AVERAGED``."""
    pooled_dice: float
    """2·Σ|A∩B| / Σ(|A|+|B|) over every pair with a reference, false tissue included, in mL; nan without tissue."""
    pooled_dice_ci_low: float
    """Lower end of its 95 % bootstrap interval, by patient."""
    pooled_dice_ci_high: float
    """Upper end."""
    num_missed: int
    """Pairs with no voxel predicted, missing predictions included."""
    num_missing_prediction: int
    """Pairs whose case has no prediction at all."""
    num_false_tissue: int
    """Cases (slices) where the class was predicted and the reference holds less than the limit."""
    false_tissue_ml: float
    """Volume predicted there, in mL, summed."""
    num_absent: int
    """Pairs without the class on either side: excluded from the means."""
    num_missing_reference: int
    """Cases whose prediction has no reference: nothing can be said of them."""

    @property
    def num_detected(self) -> int:
        """Pairs with an HD95: the class was predicted at all."""
        return self.figures["hd95_mm"].num


@dataclass(frozen=True)
class Summary:
    """Result of one method: one row per class and one over all pairs."""

    method: str
    """Name of the method; empty if there is only one and it has none."""
    is_oracle: bool
    """Whether the classes were named by the reference (Hungarian matching): a bound, not a result of the method."""
    settings: ScoreSettings
    """How the pairs were scored: HD95 definition, tolerance, volumes or slices."""
    classes: tuple[ClassSummary, ...]
    """In the order of the view."""
    overall: ClassSummary
    """Over all class-case pairs."""
    num_cases: int
    """Distinct cases compared with a reference, missing predictions included."""
    num_patients: int
    """Distinct patients of these cases."""
    num_slices: int
    """Annotated slices scored; 0 for whole volumes."""
    status_counts: tuple[tuple[str, int], ...]
    """Class-case pairs per status, zero included."""
    missing_predictions: tuple[str, ...]
    """Ids of the cases without a prediction, sorted."""
    missing_references: tuple[str, ...]
    """Ids of the cases without a reference, sorted."""
    unusable: tuple[str, ...]
    """Ids of the cases of which a side could not be used, sorted."""
    num_bootstrap: int
    """Bootstrap samples."""
    seed: int
    """Seed of the bootstrap."""
    notes: tuple[str, ...] = ()
    """What else must stand with the table: cases that could not be read, classes that the reference cannot tell."""

    @property
    def title(self) -> str:
        """Name for tables: the method, marked where its classes were named by the reference."""
        return f"{self.method}{ORACLE_SUFFIX}" if self.is_oracle else self.method


def summarise(
    scores: Sequence[ClassScore],
    *,
    method: str = "",
    is_oracle: bool = False,
    settings: ScoreSettings = ScoreSettings(),
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> Summary:
    """Means, medians and 95 % intervals by patient of one method, per class and over all pairs.

    Parameters
    ----------
    scores : sequence of ClassScore
        In any order; classes keep the order of their first appearance.
    method : str
        Its name in the tables.
    is_oracle : bool
        Whether the scores belong to the oracle naming of the method.
    settings : ScoreSettings
        With which the scores were made; only carried into the tables.
    num_bootstrap : int
        Resamples of the patients (all cases of a patient go together). 0 gives no interval.
    seed : int
        The same scores and seed give the same intervals, whatever the order of the scores. Methods scored on the same
        patients share the resamples.

    Returns
    -------
    Summary
        No scores: no class rows and ``nan`` in the row over all pairs.

    Source
    ------
    METHOD 0.4.
    """
    names = list(dict.fromkeys(score.tissue for score in scores))
    # Sums of floats depend on their order: sort, so that cases scored in parallel give the same bits.
    ordered = sorted(scores, key=lambda s: (s.patient_id, s.case_id, names.index(s.tissue), s.slice_index or 0))
    known = [score for score in ordered if score.status not in NOT_COMPARED]
    bootstrap = PatientBootstrap.of([s.patient_id for s in known], num_bootstrap=num_bootstrap, seed=seed)
    counts = Counter(score.status for score in ordered)
    return Summary(
        method=method,
        is_oracle=is_oracle,
        settings=settings,
        classes=tuple(_summary_row([s for s in ordered if s.tissue == name], name, bootstrap) for name in names),
        overall=_summary_row(ordered, ALL_CLASSES, bootstrap),
        num_cases=len({score.case_id for score in known}),
        num_patients=len(bootstrap.patients),
        num_slices=len({(s.case_id, s.slice_index) for s in known if s.slice_index is not None}),
        status_counts=tuple((status, counts[status]) for status in STATUSES),
        missing_predictions=_case_ids(ordered, MISSING_PREDICTION),
        missing_references=_case_ids(ordered, MISSING_REFERENCE),
        unusable=_case_ids(ordered, UNUSABLE),
        num_bootstrap=num_bootstrap,
        seed=seed,
    )


def summarise_methods(
    scores: Mapping[str, Sequence[ClassScore]],
    oracle: Mapping[str, Sequence[ClassScore]] | None = None,
    *,
    settings: ScoreSettings = ScoreSettings(),
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> tuple[Summary, ...]:
    """Summaries of several methods, each followed by that of its oracle naming if there is one.

    Parameters
    ----------
    scores : mapping of method name to its scores
        In the order of the tables.
    oracle : mapping of method name to the scores of its oracle naming, optional
        Names that are not in ``scores`` are ignored.
    settings, num_bootstrap, seed
        As in ``summarise``.

    Returns
    -------
    tuple of Summary
    """
    summaries = []
    for method, rows in scores.items():
        named = [(rows, False), *([(oracle[method], True)] if oracle and method in oracle else [])]
        summaries += [
            summarise(
                some, method=method, is_oracle=is_oracle, settings=settings, num_bootstrap=num_bootstrap, seed=seed
            )
            for some, is_oracle in named
        ]
    return tuple(summaries)


def _case_ids(scores: Sequence[ClassScore], status: str) -> tuple[str, ...]:
    """Ids of the cases with this status, sorted."""
    return tuple(sorted({score.case_id for score in scores if score.status == status}))


def _summary_row(scores: Sequence[ClassScore], name: str, bootstrap: PatientBootstrap) -> ClassSummary:
    """Summary of the given scores under a name."""
    pairs = [score for score in scores if score.is_averaged]
    known = [score for score in scores if score.status not in NOT_COMPARED]
    false_ml = [score.predicted_ml for score in scores if score.status == FALSE_TISSUE]
    values = {figure: _values(pairs, figure) for figure in AVERAGED}
    overlaps, sizes = _pooled(known)
    columns = [(bootstrap.totals(x, who), bootstrap.totals([1.0] * len(x), who)) for x, who in values.values()]
    owners = [score.patient_id for score in known]
    columns.append((bootstrap.totals(overlaps, owners), bootstrap.totals(sizes, owners)))
    intervals = bootstrap.ratio_intervals(
        np.stack([top for top, _ in columns], axis=1), np.stack([below for _, below in columns], axis=1)
    )
    figures = {
        figure: Figure(len(x), _mean(x), _median(x), float(low), float(high))
        for (figure, (x, _)), (low, high) in zip(values.items(), intervals, strict=False)
    }
    statuses = Counter(score.status for score in scores)
    return ClassSummary(
        tissue=name,
        num_pairs=len(pairs),
        num_cases=len({score.case_id for score in pairs}),
        num_patients=len({score.patient_id for score in pairs}),
        figures=figures,
        pooled_dice=math.fsum(overlaps) / math.fsum(sizes) if math.fsum(sizes) > 0 else float("nan"),
        pooled_dice_ci_low=float(intervals[-1][0]),
        pooled_dice_ci_high=float(intervals[-1][1]),
        num_missed=sum(score.is_missed for score in pairs),
        num_missing_prediction=sum(score.status == MISSING_PREDICTION for score in pairs),
        num_false_tissue=len(false_ml),
        false_tissue_ml=float(math.fsum(false_ml)),
        num_absent=statuses[ABSENT],
        num_missing_reference=statuses[MISSING_REFERENCE],
    )


def _values(pairs: Sequence[ClassScore], figure: str) -> tuple[list[float], list[str]]:
    """Values of a figure that exist, and the patient of each."""
    found = [(float(getattr(pair, figure)), pair.patient_id) for pair in pairs]
    found = [(value, patient) for value, patient in found if math.isfinite(value)]
    return [value for value, _ in found], [patient for _, patient in found]


def _pooled(scores: Sequence[ClassScore]) -> tuple[list[float], list[float]]:
    """2|A∩B| and |A|+|B| of each score in mL; a missing prediction is an empty one here."""
    overlaps = [2.0 * _or_zero(score.overlap_ml) for score in scores]
    return overlaps, [_or_zero(score.predicted_ml) + score.reference_ml for score in scores]


def _or_zero(value: float) -> float:
    """The value; 0 for nan."""
    return 0.0 if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    """Mean; nan of nothing, without NumPy's warning."""
    return math.fsum(values) / len(values) if values else float("nan")


def _median(values: Sequence[float]) -> float:
    """Median; nan of nothing, without NumPy's warning."""
    return float(np.median(values)) if values else float("nan")

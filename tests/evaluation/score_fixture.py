"""Class scores made by hand for the tests of statistics, tables and pictures."""

from __future__ import annotations

import math
import random

from lungseg.evaluation.scores import ClassScore

NAN = float("nan")


def scored(case: str, patient: str, dice: float, *, tissue: str = "ggo", hd95: float = 2.0, **more) -> ClassScore:
    """A pair of 10 mL in the reference and 9 mL in the prediction."""
    return ClassScore(
        case, patient, tissue, "scored", dice, dice / (2 - dice), dice, dice, 10.0, 9.0, -1.0, hd95, hd95,
        **{"volume_error_percent": -10.0, "overlap_ml": dice * 19.0 / 2, "assd_mm": hd95 / 4, "surface_dice": dice}
        | more,
    )  # fmt: skip


def missed(case: str, patient: str, *, tissue: str = "ggo", status: str = "missed", **more) -> ClassScore:
    """A class of 10 mL of which nothing is predicted, or whose case has no prediction."""
    predicted = NAN if status == "missing prediction" else 0.0
    return ClassScore(
        case, patient, tissue, status, 0.0, 0.0, NAN, 0.0, 10.0, predicted, predicted - 10.0, NAN, 300.0,
        volume_error_percent=10 * (predicted - 10.0), overlap_ml=0.0, surface_dice=0.0, **more,
    )  # fmt: skip


def uncounted(case: str, patient: str, *, tissue: str = "ggo", false_ml: float = 0.0, **more) -> ClassScore:
    """A class that the reference does not hold; false tissue if something was predicted."""
    status = "false tissue" if false_ml else "absent"
    return ClassScore(
        case, patient, tissue, status, NAN, NAN, NAN, NAN, 0.0, false_ml, false_ml, NAN, NAN, overlap_ml=0.0, **more
    )


def without_reference(case: str, patient: str, *, tissue: str = "ggo") -> ClassScore:
    """A prediction that has no reference."""
    return ClassScore(case, patient, tissue, "missing reference", NAN, NAN, NAN, NAN, NAN, 9.0, NAN, NAN, NAN)


def unusable(case: str, patient: str, *, tissue: str = "ggo") -> ClassScore:
    """A case of which a side cannot be used."""
    return ClassScore(case, patient, tissue, "unusable", *[NAN] * 9)


def cohort(seed: int, *, num_cases: int = 24, shift: float = 0.0) -> list[ClassScore]:
    """Two classes in cases of a third as many patients; the cases are the same for every seed."""
    rng = random.Random(seed)
    scores = []
    for index in range(num_cases):
        for tissue, mean in (("healthy", 0.8), ("ggo", 0.6)):
            value = min(1.0, max(0.0, mean + shift + rng.gauss(0, 0.1)))
            hd95 = math.fabs(rng.gauss(8, 3))
            scores.append(scored(f"c{index:02d}", f"p{index // 3}", value, tissue=tissue, hd95=hd95))
    return scores


SCORES = [
    scored("a", "p1", 0.8, hd95=2.0),
    scored("b", "p1", 0.6, hd95=6.0),
    missed("c", "p2"),
    uncounted("d", "p3", false_ml=4.5),
    uncounted("e", "p4"),
    scored("a", "p1", 0.9, tissue="healthy", hd95=1.0),
    missed("f", "p5", tissue="healthy", status="missing prediction"),
    without_reference("g", "p6"),
]
"""Every status once at least: seven cases of six patients, one of them without a reference."""

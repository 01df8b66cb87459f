"""What a scan scored against its reference, in the few numbers and words a page has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lungseg.evaluation.scores import FALSE_TISSUE, ClassScore
from lungseg.tissue import TISSUES

LOW_DICE = 0.5
"""A class below it is named where a scan is described: our choice."""


@dataclass(frozen=True)
class Agreement:
    """Scores of one scan; see :class:`lungseg.evaluation.scores.ClassScore` for what counts."""

    scores: tuple[ClassScore, ...]
    """Of each class, in slice mode of each class and slice."""

    @property
    def averaged(self) -> list[ClassScore]:
        """Those that the reference holds enough of."""
        return [score for score in self.scores if score.is_averaged]

    @property
    def dice(self) -> float | None:
        """Mean DSC over classes, missed ones as 0; None if the reference holds none."""
        return _mean([score.dice for score in self.averaged])

    @property
    def hd95_mm(self) -> float | None:
        """Mean HD95 over the classes that were found; None if none was."""
        return _mean([score.hd95_mm for score in self.averaged if math.isfinite(score.hd95_mm)])

    @property
    def missed(self) -> list[str]:
        """Titles of the classes that the reference holds and the map does not."""
        return list(dict.fromkeys(tissue_title(score.tissue) for score in self.averaged if score.is_missed))

    @property
    def finding(self) -> str:
        """For example ``mean DSC 0.44, ground glass missed``; empty without a score."""
        if self.dice is None:
            return ""
        words = [f"mean DSC {self.dice:.2f}"]
        if self.missed:
            words.append(f"{' and '.join(title.lower() for title in self.missed)} missed")
        else:
            worst = min(self.averaged, key=lambda score: score.dice)
            if worst.dice < LOW_DICE:
                words.append(f"{tissue_title(worst.tissue).lower()} {worst.dice:.2f}")
        return ", ".join(words)

    @property
    def false_ml(self) -> float:
        """Tissue of classes that the reference does not hold, in mL."""
        return sum(score.predicted_ml for score in self.scores if score.status == FALSE_TISSUE)


def tissue_title(name: str) -> str:
    """Title of a tissue; the name itself of a class that is none, such as `abnormal`."""
    return next((info.title for info in TISSUES.values() if info.name == name), name)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

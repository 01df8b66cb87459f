"""One scan in a few words and numbers: what a reader of many scans looks at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lungseg.report.agreement import Agreement
from lungseg.report.quantify import UNCLASSIFIED_NAME, QuantityRow
from lungseg.report.quantity_tables import CaseQuantities
from lungseg.scan.volume import STATUS_WORDS
from lungseg.tissue import LAA950_EMPHYSEMA_SHARE, TISSUES, UNCLASSIFIED_COLOUR, VIEWS, Tissue

WORTH_NAMING_PCT = 1.0
"""Smaller shares are left out of the sentence about a scan."""
SMALL_LUNG_ML, LARGE_LUNG_ML = 1500.0, 9000.0
"""Beyond these a lung field is looked at: healthy adults have 4.5 ± 1.3 L (Cheng et al. 2019), wide of three SD."""
UNCERTAIN_PCT = 25.0
"""Share of lung whose label has a posterior below one half, from which a map is called uncertain: our choice."""
DOUBTED_EMPHYSEMA_PCT, DOUBTED_RATIO = 5.0, 4.0
"""Mapped emphysema of at least this share of the lung is doubted where LAA-950 is less than a quarter of it: our
choice. Emphysema holds denser voxels too, so that a map shows more of it than LAA-950."""
OUTDATED_SCORES = "its scores are of an earlier map and are not shown: run lungseg evaluate again"
DISEASE = tuple(TISSUES[Tissue(tissue)].name for tissue in VIEWS["abnormal"]["abnormal"])
TITLES: Mapping[str, str] = {info.name: info.title for info in TISSUES.values()} | {UNCLASSIFIED_NAME: "Unclassified"}
COLOURS: Mapping[str, tuple[int, int, int]] = {info.name: info.colour for info in TISSUES.values()} | {
    UNCLASSIFIED_NAME: UNCLASSIFIED_COLOUR
}


@dataclass(frozen=True)
class CaseSummary:
    """One scan on the page of a cohort."""

    case_id: str
    quantities: CaseQuantities
    thumbnail: bytes = b""
    """JPEG."""
    uncertain_pct: float | None = None
    """Lung whose label has a posterior below one half; None if it is not known."""
    page: str = ""
    """Address of its own page, relative to the cohort's."""
    agreement: Agreement | None = None
    """Scores against a reference, if it was evaluated."""
    scored_another_map: bool = False
    """The scores that there are belong to an earlier map of this scan: they are not shown."""
    numbers: Mapping[tuple[str, str], QuantityRow] = field(init=False)
    """Rows by region and metric."""

    def __post_init__(self) -> None:
        rows = {(row.region, row.metric): row for row in self.quantities.rows}
        object.__setattr__(self, "numbers", rows)

    def value(self, metric: str, region: str = "whole") -> float | None:
        """A number, or None where there is none."""
        row = self.numbers.get((region, metric))
        return row.value if row else None

    def status(self, metric: str, region: str = "whole") -> str:
        """`ok`, or why there is no number."""
        row = self.numbers.get((region, metric))
        return row.status if row else "not counted"

    @property
    def missed_emphysema_pct(self) -> float | None:
        """LAA-950 where it says emphysema and the map has less than half of it; else None."""
        density, mapped = self.value("laa950_pct"), self.value("emphysema_pct")
        if density is None or mapped is None or density < 100 * LAA950_EMPHYSEMA_SHARE or mapped >= density / 2:
            return None
        return density

    @property
    def doubted_emphysema(self) -> str:
        """What to look at where the map shows much emphysema and hardly any voxel is as thin as that; else ''."""
        density, mapped = self.value("laa950_pct"), self.value("emphysema_pct")
        if density is None or mapped is None or mapped < DOUBTED_EMPHYSEMA_PCT or DOUBTED_RATIO * density >= mapped:
            return ""
        return f"the map shows emphysema in {mapped:.0f} % of the lung, but LAA-950 is {density:.1f} %: look at it"

    @property
    def affected_pct(self) -> float | None:
        """By how much of the lung scans are ranked: what the map calls abnormal, or LAA-950 where the map misses it."""
        abnormal = self.value("abnormal_pct")
        return abnormal if abnormal is None else max(abnormal, self.missed_emphysema_pct or 0.0)

    @property
    def finding(self) -> str:
        """What was found, the largest share first."""
        abnormal = self.value("abnormal_pct")
        if abnormal is None:
            return f"No numbers: {STATUS_WORDS.get(self.status('abnormal_pct'), self.status('abnormal_pct'))}."
        missed = self.missed_emphysema_pct
        if missed is not None:
            density = f"LAA-950 is {missed:.0f} %: emphysema, which the map does not show."
            return f"{density} By the map, {self._mapped(abnormal)}"
        return self._mapped(abnormal)

    def _mapped(self, abnormal: float) -> str:
        """What the map shows."""
        shares = sorted(((self.value(f"{name}_pct") or 0.0, name) for name in DISEASE), reverse=True)
        named = [f"{TITLES[name].lower()} {share:.0f} %" for share, name in shares if share >= WORTH_NAMING_PCT]
        if not named:
            return f"{100 - abnormal:.0f} % of the lung looks healthy or is unclassified; no disease above 1 %."
        return f"{abnormal:.0f} % of the lung is abnormal: {', '.join(named)}."

    @property
    def why(self) -> str:
        """Why it has its place among the scans, in one phrase: which number, what it scored, which caution."""
        affected, missed, cautions = self.affected_pct, self.missed_emphysema_pct, self.cautions
        if affected is None:
            reason = STATUS_WORDS.get(self.status("abnormal_pct"), self.status("abnormal_pct"))
            first, cautions = f"no numbers: {reason}", [text for text in cautions if text != reason]
        elif missed is not None and affected == missed:
            first = f"LAA-950 {missed:.0f} %, which the map misses"
        else:
            share, name = max((self.value(f"{name}_pct") or 0.0, name) for name in DISEASE)
            first = f"{affected:.0f} % abnormal"
            if share >= WORTH_NAMING_PCT:
                first += f", most of it {TITLES[name].lower()}"
        scored = self.agreement.finding if self.agreement else ""
        caution = f"look out: {cautions[0]}" if cautions else ""
        if len(cautions) > 1:
            caution += f" (and {len(cautions) - 1} more)"
        return "; ".join(text for text in (first, scored, caution) if text)

    @property
    def acquisition(self) -> str:
        """How it was scanned, in a few words."""
        facts = self.quantities.covariates
        thickness = facts.slice_thickness_mm or facts.spacing_z_mm
        parts = [facts.kernel or "", f"{thickness:.3g} mm slices" if thickness else "", facts.inspiration]
        return ", ".join(part for part in parts if part)

    @property
    def cautions(self) -> list[str]:
        """What to know before the numbers are used, in words."""
        words = [STATUS_WORDS[word] for word in self.quantities.covariates.scan_status.split() if word in STATUS_WORDS]
        if self.missed_emphysema_pct is not None:
            words.append("its density says emphysema and its map does not: the map is wrong there")
        if self.doubted_emphysema:
            words.append(self.doubted_emphysema)
        volume = self.value("volume_ml")
        told = any("lung volume" in text for text in self.quantities.warnings)
        if volume is not None and not told and not SMALL_LUNG_ML <= volume <= LARGE_LUNG_ML:
            words.append(f"the lung field of {volume:,.0f} mL is unusual for an adult: look at its outline")
        if self.uncertain_pct is not None and self.uncertain_pct >= UNCERTAIN_PCT:
            words.append(f"{self.uncertain_pct:.0f} % of the map is uncertain (posterior below one half)")
        unclassified = self.value(f"{UNCLASSIFIED_NAME}_pct")
        if unclassified is not None and unclassified >= WORTH_NAMING_PCT:
            words.append(f"{unclassified:.0f} % of the lung is unclassified")
        if self.quantities.covariates.inspiration == "expiration":
            words.append("an expiratory scan: its lung is denser than the thresholds and the map take it to be")
        words += [text for text in self.quantities.warnings if text not in words]
        if self.scored_another_map:
            words.append(OUTDATED_SCORES)
        return words


def ranked(summaries: Sequence[CaseSummary]) -> list[CaseSummary]:
    """The most affected scan first; those without numbers last."""

    def key(summary: CaseSummary) -> tuple[bool, float, str]:
        affected = summary.affected_pct
        return affected is None, -(affected or 0.0), summary.case_id

    return sorted(summaries, key=key)


def shares_table(summaries: Sequence[CaseSummary]) -> Any:
    """The cohort in the terminal, the most affected scan first: a rich table."""
    from rich.table import Table

    table = Table(title="Share of the lung, most affected scan first")
    columns = (
        ("volume_ml", "lung mL", 0), ("abnormal_pct", "abnormal %", 0), ("mld_hu", "mean HU", 0),
        ("laa950_pct", "LAA-950 %", 1),
    )  # fmt: skip
    scored = any(summary.agreement for summary in summaries)
    table.add_column("case", overflow="fold")
    for title in (*(title for _, title, _ in columns), *(("DSC", "HD95 mm") if scored else ())):
        table.add_column(title, justify="right")
    table.add_column("why it is here", overflow="fold")
    for summary in ranked(summaries):
        values = [(summary.value(metric), digits) for metric, _, digits in columns]
        if scored:
            found = summary.agreement or Agreement(())
            values += [(found.dice, 2), (found.hd95_mm, 1)]
        cells = [f"{value:.{digits}f}" if value is not None else "-" for value, digits in values]
        table.add_row(summary.case_id, *cells, summary.why)
    return table

"""Which series of a study is used: the best chest series by a stated order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lungseg.config.preprocess import ReadOptions
from lungseg.errors import InputError
from lungseg.scan.dicom_series import Series

SHORT_SHARE = 0.5
"""A series covering less than this share of the longest usable one is chosen last: a slab, not the chest."""

UNKNOWN_SHARPNESS = 50.0
GE_SHARPNESS = {"SOFT": 20.0, "STANDARD": 35.0, "STND": 35.0, "STD": 35.0, "CHEST": 40.0, "DETAIL": 55.0, "LUNG": 70.0,
                "BONE": 75.0, "BONEPLUS": 80.0, "EDGE": 90.0}  # fmt: skip
PHILIPS_SHARPNESS = {"A": 25.0, "B": 35.0, "C": 45.0, "D": 60.0, "E": 70.0, "L": 65.0, "YA": 65.0, "YB": 70.0,
                     "YC": 75.0, "YD": 80.0}  # fmt: skip
"""Order of the vendors' names from soft to sharp, on the scale of Siemens' numbers (B30f = 30): our choice."""
TOSHIBA_SHARP_FROM = 30
"""Toshiba FC01-FC29 are body and head kernels, FC30 and above bone and lung."""


@dataclass(frozen=True)
class SeriesChoice:
    """The series to use for one study, and why not the others."""

    chosen: Series
    others: tuple[tuple[Series, str], ...]


def choose_series(series: Sequence[Series], options: ReadOptions = ReadOptions()) -> SeriesChoice:
    """The best series of one study, by a stated order.

    Usable CT volumes only; those that cover at least half of the longest one first; then thinner slice spacing,
    softer kernel, ORIGINAL before DERIVED (reformats of the same scan), more slices, and at last the series UID, so
    that the answer does not depend on file order.

    Parameters
    ----------
    series : sequence of Series
        Of one patient and one study.
    options : ReadOptions
        What may be repaired: decides which series are usable.

    Raises
    ------
    InputError
        If there is no usable series (with the reason for each), or they are of several studies.

    Source
    ------
    RELIABILITY row 3.
    """
    if len({(s.patient_id, s.study_uid) for s in series}) > 1:
        raise InputError("series of several patients or studies were given; choose within one study at a time")
    usable = [s for s in series if s.refusal(options) is None]
    refused = sorted((s for s in series if s.refusal(options) is not None), key=lambda s: s.identity)
    if not usable:
        reasons = "; ".join(f"{s.label}: {s.refusal(options)}" for s in refused) or "there is none"
        raise InputError(f"no series of this study can be read as a CT volume: {reasons}")
    longest = max(s.coverage_mm for s in usable)

    def rank(s: Series) -> tuple[Any, ...]:
        short = s.coverage_mm < SHORT_SHARE * longest
        sharpness = kernel_sharpness(s.acquisition["kernel"])
        derived = s.slices[0].image_type.upper().startswith("DERIVED")
        return short, round(s.slice_spacing_mm, 2), sharpness, derived, -len(s.distinct), s.identity

    ranked = sorted(usable, key=rank)
    chosen = ranked[0]
    others = [(s, _why_not(s, chosen, rank(s), rank(chosen))) for s in ranked[1:]]
    return SeriesChoice(chosen, (*others, *((s, s.refusal(options) or "") for s in refused)))


def kernel_sharpness(kernel: str | None) -> float:
    """How sharp a reconstruction kernel is, about 10 (soft) to 90 (sharp); 50 for unknown or missing names.

    Siemens by its number (B30f, I70f, Br40d), Toshiba/Canon FC by number, GE and Philips by name. Only the order
    is used; across vendors it is rough.
    """
    name = (kernel or "").split("\\")[0].strip().upper()
    toshiba = re.fullmatch(r"FC(\d+)", name)
    if toshiba:
        number = int(toshiba[1])
        return 35.0 if number < TOSHIBA_SHARP_FROM else min(90.0, 65.0 + number / 10.0)
    siemens = re.match(r"[A-Z]{1,2}(\d{2})(?!\d)", name)
    if siemens:
        return float(siemens[1])
    name = name.rstrip("+")
    return GE_SHARPNESS.get(name, PHILIPS_SHARPNESS.get(name, UNKNOWN_SHARPNESS))


def _why_not(s: Series, chosen: Series, rank: tuple[Any, ...], best: tuple[Any, ...]) -> str:
    """First criterion by which a usable series came after the chosen one."""
    if rank[0] != best[0]:
        return f"covers only {s.coverage_mm:.0f} mm against {chosen.coverage_mm:.0f} mm"
    if rank[1] != best[1]:
        return f"thicker slices ({rank[1]:g} mm apart against {best[1]:g} mm)"
    if rank[2] != best[2]:
        return f"sharper kernel ({s.acquisition['kernel']} against {chosen.acquisition['kernel']})"
    if rank[3] != best[3]:
        return "derived images (a reformat or copy), against original ones"
    if rank[4] != best[4]:
        return f"fewer slices ({-rank[4]} against {-best[4]})"
    return "equal in spacing, kernel and slices; the first series UID was taken"

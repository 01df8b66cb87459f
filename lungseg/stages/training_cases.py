"""Which patients a model learns from and which are kept for the held-out loss."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from lungseg.store.cases import Store

MIN_PATIENTS = 4
"""Fewer patients are all trained on: one of three is too much to give away."""


def held_out_cases(patients: Mapping[str, str], share: float) -> list[str]:
    """Cases of the patients that are never trained on.

    Whole patients, chosen by a hash of their id: the same ones whatever the seed, the order or the settings, so that
    runs on the same cohort can be compared. At least one of four patients or more, none of fewer.

    Parameters
    ----------
    patients : mapping
        Patient id of each case id.
    share : float
        Share of the patients, 0 ... 0.5; 0 holds out none.

    Returns
    -------
    list of str
        Case ids in the order of ``patients``.
    """
    different = sorted(set(patients.values()), key=lambda name: hashlib.sha256(f"held out {name}".encode()).digest())
    if share <= 0 or len(different) < MIN_PATIENTS:
        return []
    chosen = set(different[: max(1, round(share * len(different)))])
    return [case_id for case_id, patient in patients.items() if patient in chosen]


def patients_of(store: Store, case_ids: list[str]) -> dict[str, str]:
    """Patient id of each case; a case that names none is a patient of its own."""
    patients = {}
    for case_id in case_ids:
        with store.open(case_id, "volume") as volume:
            patients[case_id] = str(volume.provenance.get("patient_id") or case_id)
    return patients

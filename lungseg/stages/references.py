"""The expert annotation of a case: read, checked against its scan, kept apart from what unsupervised stages open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.scan.masks import check_labels, onto_grid
from lungseg.scan.nifti import read_image
from lungseg.scan.sources import voxel_digest
from lungseg.scan.volume import Geometry, Volume
from lungseg.store.cases import Store, hashed_id
from lungseg.store.schema import make_provenance, write_artefact
from lungseg.tissue import OUTSIDE, UNCLASSIFIED, Tissue

ALLOWED_LABELS = (OUTSIDE, *map(int, Tissue), UNCLASSIFIED)
"""What the evaluation knows."""
NAME = "the reference"
"""How messages name it: its file name may hold a patient's."""


@dataclass(frozen=True)
class Reference:
    """Labels read from a file, and the identity they have in a store."""

    volume: Volume
    """uint8 labels on the file's own grid."""
    digest: str

    @property
    def notes(self) -> list[str]:
        """What to know about it, in words."""
        return [] if self.volume.array.any() else ["the reference is empty: no voxel is labelled"]


def read_reference(path: Path, salt: str) -> Reference:
    """Labels of a file.

    Raises
    ------
    InputError
        If the file cannot be read, or holds values that are no tissue label (all of them listed).

    Source
    ------
    RELIABILITY rows 34, 35.
    """
    volume = read_image(path, integer=True)
    check_labels(volume.array, ALLOWED_LABELS, NAME)
    volume = replace(volume, array=np.ascontiguousarray(volume.array, dtype=np.uint8))
    return Reference(volume, hashed_id(salt, voxel_digest(volume)))


def is_kept(store: Store, case_id: str, reference: Reference, *, overwrite: bool) -> bool:
    """Whether the store has this reference of the case.

    Raises
    ------
    MismatchError
        If it has another one and ``overwrite`` is off.
    """
    wanted = make_provenance("preprocess", {}, inputs={"labels": reference.digest})
    return store.is_done(store.case_file(case_id, "reference"), "reference", wanted, overwrite=overwrite)


def labels_on(reference: Reference, grid: Geometry, *, resample: bool) -> np.ndarray:
    """Labels on the grid of the scan, uint8.

    Raises
    ------
    InputError
        If they lie on another grid and ``resample`` is off (both grids are told).

    Source
    ------
    RELIABILITY row 33.
    """
    return onto_grid(reference.volume, grid, allow_resample=resample, name=NAME)


def write_reference(store: Store, case_id: str, reference: Reference, labels: np.ndarray, scan: dict[str, Any]) -> None:
    """Keep labels that lie on the grid of their scan; ``scan`` is what the volume's provenance says of its source."""
    provenance = make_provenance(
        "preprocess",
        {},
        inputs={"labels": reference.digest},
        grid=scan["full_grid"],
        stored_axes=scan["stored_axes"],
        stored_flips=scan["stored_flips"],
        warnings=reference.notes,
    )
    write_artefact(store.case_file(case_id, "reference"), "reference", {"labels": labels}, provenance=provenance)

"""Lungs from a mask file of another program, on the grid of its scan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lungseg.errors import InputError
from lungseg.scan.lung_mask_checks import check_lungs
from lungseg.scan.lung_mask_labels import AUTO, read_sides
from lungseg.scan.lungs import LungField
from lungseg.scan.masks import onto_grid
from lungseg.scan.nifti import read_image
from lungseg.scan.volume import Volume

NAME = "the lung mask"
"""How messages name it: its file name may hold a patient's."""


@dataclass(frozen=True)
class MaskedLungs:
    """Lungs that a mask gave."""

    field: LungField
    convention: str
    """Name in ``LUNG_MASK_CONVENTIONS`` by which the labels were read."""


def read_lung_mask(path: Path) -> Volume:
    """The labels of a mask file on its own grid, uint8 or uint16, not interpreted yet.

    Raises
    ------
    InputError
        If it cannot be read or holds values that are no labels; names the file.
    """
    volume = read_image(path, integer=True)
    return replace(volume, array=np.ascontiguousarray(volume.array))


def lungs_from_mask(mask: Volume, scan: Volume, *, labels: str = AUTO, allow_resample: bool = False) -> MaskedLungs:
    """Left and right lung of a scan as a mask says, with the volume, density and warnings that our own lungs have.

    Parameters
    ----------
    mask : Volume
        Labels of any of ``LUNG_MASK_CONVENTIONS``.
    scan : Volume
        CT in HU.
    labels : str
        Name of the convention, or `auto`.
    allow_resample : bool
        Accept a mask on another grid than the scan's: nearest voxels.

    Raises
    ------
    InputError
        If the grids differ and ``allow_resample`` is off; if the mask is empty, its labels are unknown, ambiguous or
        not where they belong, or no lung of this scan lies in it. Messages hold no names.

    Source
    ------
    METHOD 0.2; RELIABILITY rows 33-35.
    """
    if not mask.array.any():
        raise InputError(f"{NAME} is empty: no voxel is labelled")
    moved = onto_grid(mask, scan.geometry, allow_resample=allow_resample, name=NAME)
    return lungs_from_labels(moved, scan, labels=labels)


def lungs_from_labels(mask: np.ndarray, scan: Volume, *, labels: str = AUTO) -> MaskedLungs:
    """As :func:`lungs_from_mask`, of labels that lie on the grid of the scan."""
    reading = read_sides(mask, scan.array, scan.geometry.spacing_mm, labels=labels)
    field = check_lungs(reading.labels, scan.array, scan.geometry.spacing_mm)
    return MaskedLungs(replace(field, warnings=(*reading.warnings, *field.warnings)), reading.convention)

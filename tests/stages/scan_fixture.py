"""A chest small enough to go through ``preprocess`` in a fraction of a second, as arrays and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lungseg.config import Execution, PreprocessConfig
from lungseg.scan.dicom import write_dicom_series
from lungseg.scan.lungs import LungField, find_lungs
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry, Volume
from lungseg.stages.cohort import CaseOutcome, run_cases

GRID = Geometry((20, 50, 50), (8.0, 5.0, 5.0))
CONFIG = PreprocessConfig(spacing_mm=6.0, patch_size=(8, 8, 8), patch_stride=(8, 8, 8), salt="test")
QUIET = Execution(quiet=True)


def chest(seed: int = 0, *, top: float = 1.0) -> np.ndarray:
    """Two lungs in a body, int16 HU on ``GRID``; with ``top`` below 0.8 they are cut at the highest slice."""
    z, y, x = np.meshgrid(np.linspace(-1, top, GRID.shape[0]), *[np.linspace(-1, 1, n) for n in GRID.shape[1:]],
                          indexing="ij")  # fmt: skip
    hu = np.where(y**2 / 0.8 + x**2 < 0.9, 40.0, -1000.0)
    for side in (-0.42, 0.42):
        hu[(z / 0.8) ** 2 + (y / 0.6) ** 2 + ((x - side) / 0.32) ** 2 < 1] = -850
    return np.rint(hu + np.random.default_rng(seed).normal(0, 15, hu.shape)).clip(-1024, 3000).astype(np.int16)


def body(seed: int = 0) -> np.ndarray:
    """The same body without lungs."""
    hu = chest(seed)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID.shape[1:]], indexing="ij")
    hu[(hu < -500) & (np.hypot(y, x) < 0.85)] = 40
    return hu


def dicom(folder: Path, *, patient: str = "p", series: str = "s", study: str | None = None, kernel: str = "B30f",
          array: np.ndarray | None = None) -> Path:  # fmt: skip
    """The chest, or another array on its grid, as a DICOM series."""
    write_dicom_series(
        folder,
        Volume(chest() if array is None else array, GRID),
        patient_id=patient,
        series_seed=series,
        study_seed=study,
        kernel=kernel,
        compress=False,
    )
    return folder


def image(path: Path, array: np.ndarray) -> Path:
    """An array on the grid of the chest as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, array, GRID)
    return path


_FOUND: dict[tuple[bytes, tuple[float, ...]], LungField] = {}


def _find_lungs_once(volume_hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> LungField:
    key = volume_hu.tobytes(), spacing_mm
    if key not in _FOUND:
        _FOUND[key] = find_lungs(volume_hu, spacing_mm)
    return _FOUND[key]


def _run_cases_here(*arguments: Any, isolate: bool = False, **options: Any) -> tuple[CaseOutcome, ...]:
    return run_cases(*arguments, **options)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lungs of each array are found once in all tests, for which a single job stays in this process."""
    monkeypatch.setattr("lungseg.stages.scan_case.find_lungs", _find_lungs_once)
    monkeypatch.setattr("lungseg.stages.preprocess.run_cases", _run_cases_here)
    monkeypatch.setattr("lungseg.stages.scan_check.run_cases", _run_cases_here)

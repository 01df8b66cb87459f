"""A patch store of tiny cases, written with `write_artefact` as `lungseg preprocess` would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lungseg.scan.volume import Geometry
from lungseg.store.cases import Store
from lungseg.store.patches import patch_table
from lungseg.store.schema import make_provenance, write_artefact

SHAPE = (24, 40, 36)
PATCH = (16, 16, 16)
SPACING_MM = 1.5
SETTINGS: dict[str, Any] = {
    "spacing_mm": SPACING_MM,
    "patch_size": list(PATCH),
    "patch_stride": [8, 8, 8],
    "min_lung_fraction": 0.5,
}


def lungs(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Two ellipsoids: uint8, 1 left (high x), 2 right."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    mask = np.zeros(shape, np.uint8)
    mask[(z / 0.95) ** 2 + (y / 0.9) ** 2 + ((x - 0.48) / 0.46) ** 2 < 1] = 1
    mask[(z / 0.95) ** 2 + (y / 0.9) ** 2 + ((x + 0.48) / 0.46) ** 2 < 1] = 2
    return mask


def chest(mask: np.ndarray, seed: int) -> np.ndarray:
    """int16 HU: soft tissue around noisy lungs, of which a quarter is dense."""
    rng = np.random.default_rng(seed)
    hu = np.where(mask > 0, -850, 40) + rng.normal(0, 40, mask.shape)
    dense = (mask > 0) & (np.arange(mask.shape[1]) > 0.6 * mask.shape[1])[None, :, None]
    return np.rint(hu + 500 * dense).astype(np.int16)


def volume_datasets(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> dict[str, np.ndarray]:
    mask = lungs(shape)
    corners, fractions = patch_table(mask, size=PATCH, stride=(8, 8, 8), min_fraction=0.5)
    image = chest(mask, seed)
    return {
        "image": image,
        "mask": mask,
        "patches/corner": corners,
        "patches/mask_fraction": fractions,
        "source/image": image,
        "source/mask": mask,
    }


def volume_provenance(case_id: str, datasets: dict[str, np.ndarray], *, split: str = "") -> dict[str, Any]:
    shape = datasets["image"].shape
    grid = Geometry(shape, (SPACING_MM,) * 3).to_dict()
    inside = datasets["image"][datasets["mask"] > 0]
    return make_provenance(
        "preprocess",
        SETTINGS,
        inputs={"scan": f"scan of {case_id}"},
        case_id=case_id,
        patient_id=case_id,
        split=split,
        inspiration="",
        acquisition={},
        warnings=[],
        grid=grid,
        source={
            "grid": grid,
            "full_grid": grid,
            "crop_start": [0, 0, 0],
            "stored_axes": [0, 1, 2],
            "stored_flips": [False, False, False],
        },
        lung_volume_ml=round(float(inside.size) * SPACING_MM**3 / 1000, 3),
        lung_median_hu=float(np.median(inside)) if inside.size else 0.0,
    )


def add_case(store: Store, case_id: str, *, seed: int = 0, split: str = "", **changed: np.ndarray) -> Path:
    """Write one case; ``changed`` replaces datasets by name."""
    datasets = {**volume_datasets(seed), **changed}
    path = store.case_file(case_id, "volume")
    write_artefact(path, "volume", datasets, provenance=volume_provenance(case_id, datasets, split=split))
    return path


def make_store(path: Path, *, cases: int = 2) -> Store:
    """A store of cases `case-0`, `case-1` ..."""
    store = Store.create(path, config=SETTINGS, salt="salt", provenance="made for a test")
    for number in range(cases):
        add_case(store, f"case-{number}", seed=number)
    return store

"""What drawn patches look like beside real ones: a picture, and the Hounsfield units of both in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungseg.errors import MismatchError
from lungseg.stages.cohort import CaseOutcome, StageResult
from lungseg.stages.pictures import SAMPLES, drawn
from lungseg.store.atomic import write_bytes
from lungseg.store.cases import Store
from lungseg.tissue import LAA950_HU

MAX_COUNTED = 512
"""Patches of each kind that are counted and held in memory: the first drawn, and as many real ones."""
FULL_OF_LUNG = 0.9
"""Real patches with at least this share of lung are picked from, as drawn ones are all lung; where there is none, the
fullest are."""
SPACING_TOLERANCE_MM = 1e-6


def real_patches(store: Store, patch: tuple[int, int, int], spacing_mm: float, *, num: int, seed: int) -> np.ndarray:
    """Some patches of a store's lungs, picked by the seed: int16 HU (M, D, H, W), M <= min(num, ``MAX_COUNTED``).

    Raises
    ------
    MismatchError
        If the store's patches are of another size or spacing than the model's, or it has none.
    """
    config = store.header["config"]
    if tuple(config["patch_size"]) != patch or abs(float(config["spacing_mm"]) - spacing_mm) > SPACING_TOLERANCE_MM:
        raise MismatchError(
            f"--real {store.path} holds patches of {config['patch_size']} voxels at {config['spacing_mm']} mm, the "
            f"model draws {list(patch)} at {spacing_mm} mm: give the store it was trained on"
        )
    places: list[tuple[float, str, tuple[int, ...]]] = []
    for case_id in store.require_cases():
        with store.open(case_id, "volume") as volume:
            corners, shares = volume.read("patches/corner"), volume.read("patches/mask_fraction")
        places += [(float(s), case_id, tuple(map(int, c))) for s, c in zip(shares, corners, strict=True)]
    if not places:
        raise MismatchError(f"--real {store.path} lists no patch with lung")
    limit = min(FULL_OF_LUNG, max(share for share, _, _ in places))
    full = [place for place in places if place[0] >= limit]
    rng = np.random.Generator(np.random.Philox(seed))
    chosen = rng.permutation(len(full))[: min(num, MAX_COUNTED)]
    found = []
    for index in chosen:
        _, case_id, corner = full[index]
        box = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
        with store.open(case_id, "volume") as volume:
            image = volume.read("image", box)
        if image.shape == patch:  # a patch may reach beyond a small volume: it is padded for training, not shown
            found.append(image)
    if not found:
        raise MismatchError(f"--real {store.path}: no patch lies whole inside its volume")
    return np.stack(found)


def summarised(
    store: Store, outcomes: Sequence[CaseOutcome], real: np.ndarray | None, spacing_mm: float, *, as_json: bool
) -> StageResult:
    """Write ``samples.png`` and tell the Hounsfield units of drawn and real patches.

    Parameters
    ----------
    store : Store
        Of the drawn patches.
    outcomes : sequence of CaseOutcome
        One for each of them.
    real : int16 array, shape (M, D, H, W), optional
    spacing_mm : float
    as_json : bool
    """
    from lungseg.report.sample_grid import sample_grid_png

    images = []
    for outcome in outcomes[:MAX_COUNTED]:
        with store.open(outcome.case_id, "volume") as volume:
            images.append(volume.read("image"))
    patches = np.stack(images)
    picture = drawn(lambda: sample_grid_png(patches, real, spacing_mm=spacing_mm), SAMPLES)
    if picture is not None:
        write_bytes(store.path / SAMPLES, picture)
    kinds = {"drawn": patches, **({} if real is None else {"real": real})}
    units = {name: hounsfield_units(values) for name, values in kinds.items()}
    notes = [f"patch store: {store.path}"]
    if picture is not None:
        notes.append(f"picture: {store.path / SAMPLES}")
    if real is None:
        notes.append("--real STORE shows patches of real scans beside them")
    values, tables = {"patches": units}, (_table(units),)
    result = StageResult("synthesize", store.path, tuple(outcomes), tables=tables, notes=tuple(notes), values=values)
    return result.as_document(patches=units) if as_json else result


def hounsfield_units(patches: np.ndarray) -> dict[str, float]:
    """Number, mean, standard deviation, percentiles of HU and share at or below -950 HU of patches (N, D, H, W)."""
    p5, median, p95 = np.percentile(patches, (5, 50, 95))
    return {
        "num": len(patches),
        "mean_hu": float(patches.mean()),
        "sd_hu": float(patches.std()),
        "p5_hu": float(p5),
        "median_hu": float(median),
        "p95_hu": float(p95),
        "laa950_pct": 100.0 * float(np.mean(patches <= LAA950_HU)),
        "sd_between_patches_hu": float(patches.mean(axis=(1, 2, 3)).std()),
    }


def _table(units: Mapping[str, Mapping[str, float]]) -> Any:
    from rich.table import Table

    table = Table(title="Hounsfield units of the patches")
    table.add_column("")
    for name in ("patches", "mean", "SD", "5th pct.", "median", "95th pct.", "LAA-950 %", "SD of patch means"):
        table.add_column(name, justify="right")
    for kind, row in units.items():
        values = [f"{value:.1f}" if name == "laa950_pct" else f"{value:.0f}" for name, value in row.items()]
        table.add_row(kind, *values)
    return table

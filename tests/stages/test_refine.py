"""What `refine` exports of a lung that the field of view cuts. RELIABILITY row 22."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lungseg.config import Execution, RefineConfig
from lungseg.errors import UsageError
from lungseg.report.regions import LOBE_REGIONS
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry
from lungseg.stages.case_maps import case_quantities, on_full_grid
from lungseg.stages.refine import refine
from lungseg.store.cases import Store

GRID = Geometry((4, 6, 6), (10.0, 10.0, 10.0))


@pytest.mark.parametrize("lower_bounds", [False, True])
@pytest.mark.parametrize(("status", "cut"), [(["truncated"], True), (["clipped"], False), (None, False)])
def test_row_22_numbers_of_a_cut_lung(status: list[str] | None, cut: bool, lower_bounds: bool) -> None:
    lungs = np.zeros(GRID.shape, np.uint8)
    lungs[1:3, 1:5, 1:3], lungs[1:3, 1:5, 3:5] = 1, 2
    labels = np.minimum(lungs, 1)
    facts: dict[str, Any] = {"source": {"grid": GRID.to_dict()}, "warnings": ["truncated: in words only"]}
    if status is not None:
        facts["status"] = status
    volume: Any = SimpleNamespace(provenance=facts)
    image = np.full(GRID.shape, -850, np.int16)
    rows = case_quantities(volume, RefineConfig(lower_bounds=lower_bounds), labels, labels, lungs, image).rows
    of_lungs = [row for row in rows if row.metric != "labelled_outside_lung_ml"]
    volumes = {
        row.region: (row.value, row.status)
        for row in of_lungs
        if row.metric == "volume_ml" and row.region in ("whole", "left", "right")
    }
    if not cut:
        assert volumes == {"whole": (32.0, "ok"), "left": (16.0, "ok"), "right": (16.0, "ok")}
    elif lower_bounds:
        assert volumes["whole"] == (32.0, "lower bound")
        assert {row.status for row in of_lungs if row.unit not in ("ml", "g")} == {"truncated"}
    else:
        assert {(row.value, row.status) for row in of_lungs} == {(None, "truncated")}


def test_lower_bounds_are_a_matter_of_the_export_alone(copy: Path) -> None:
    """Label maps made without the option are complete with it too."""
    result = refine(copy / "store", RefineConfig(lower_bounds=True), execution=Execution(quiet=True))
    assert {outcome.status for outcome in result.outcomes} == {"complete already"}


def lobe_mask(
    store: Store, case_id: str, path: Path, *, swapped: bool = False, labels: tuple[int, ...] = (1, 2, 3, 4, 5)
) -> None:
    """Lobes of a case, cut by height: lower half of each lung, upper half, and a slab of the right one between."""
    with store.open(case_id, "volume") as volume:
        lungs, full = on_full_grid(volume, volume.read("source/mask"))
        stored = {key: volume.provenance["source"][key] for key in ("stored_axes", "stored_flips")}
    if swapped:
        lungs = np.where(lungs > 0, 3 - lungs, 0)
    heights = np.linspace(0, 1, full.shape[0])[:, None, None] * np.ones(full.shape)
    right = np.digitize(heights, (0.4, 0.6))
    ids = np.where(lungs == 1, np.where(heights < 0.5, labels[1], labels[0]), 0)
    ids = np.where(lungs == 2, np.choose(right, (labels[4], labels[3], labels[2])), ids)
    write_image(path, ids.astype(np.uint8), full, **stored)


def test_a_lobe_mask_adds_lobes_to_the_numbers(copy: Path, tmp_path: Path) -> None:
    store = Store(copy / "store")
    first, *others = store.case_ids()
    lobe_mask(store, first, tmp_path / f"{first}.nii.gz", labels=(10, 11, 12, 13, 14))  # TotalSegmentator's
    result = refine(store, export=tmp_path / "out", lobe_mask=tmp_path, execution=Execution(quiet=True))
    # a case without a mask is not counted as one without lobes
    assert {o.case_id: o.status for o in result.outcomes} == {first: "complete already"} | dict.fromkeys(
        others, "failed"
    )
    data = json.loads((tmp_path / "out" / "quantification.json").read_text(encoding="utf-8"))
    regions = data["cases"][first]["regions"]
    sides = {name: regions[name]["volume_ml"]["value"] for name in ("left", "right")}
    lobes = {name: regions[name]["volume_ml"]["value"] for name in LOBE_REGIONS}
    for side in ("left", "right"):
        assert sum(ml for name, ml in lobes.items() if name.startswith(side)) == pytest.approx(sides[side])
    assert regions["whole"]["severity_score"]["value"] == sum(
        regions[name]["severity_score"]["value"] for name in LOBE_REGIONS
    )
    # written again, byte for byte
    refine(store, export=tmp_path / "again", lobe_mask=tmp_path, execution=Execution(quiet=True))
    for name in ("quantification.csv", "quantification-wide.csv", "quantification.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "settings", "phrase"),
    [
        ({"swapped": True}, {}, "left and right are swapped"),
        ({"labels": (1, 2, 3, 4, 9)}, {}, "--lobe-mask-labels"),
        ({"labels": (1, 2, 3, 4, 9)}, {"lobe_mask_labels": "lungmask-lobes"}, "unexpected labels 9"),
        ({}, {"lobe_mask_labels": "totalsegmentator"}, "no lobe is labelled"),
    ],
)
def test_a_lobe_mask_that_does_not_fit_is_refused(
    copy: Path, tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], phrase: str
) -> None:
    store = Store(copy / "store")
    folder = tmp_path / "Zebrafink"
    folder.mkdir()
    lobe_mask(store, store.case_ids()[0], folder / f"{store.case_ids()[0]}.nii.gz", **changes)
    result = refine(
        store, RefineConfig(**settings), export=tmp_path / "o", lobe_mask=folder, execution=Execution(quiet=True)
    )
    message = result.outcomes[0].message
    assert phrase in message
    assert "Zebrafink" not in message


def test_lobe_masks_are_for_exports_and_for_one_case_each(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--export"):
        refine(copy / "store", lobe_mask=tmp_path)
    (tmp_path / "one.nii.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="one file for 2 cases"):
        refine(copy / "store", lobe_mask=tmp_path / "one.nii.gz", export=tmp_path / "out")


@pytest.mark.parametrize(
    ("manifest", "option", "blank"),
    [("", "", "laa856_pct"), ("", "expiration", "laa950_pct"), ("inspiration", "expiration", "laa856_pct")],
)
def test_the_manifest_and_then_the_option_say_how_a_scan_was_breathed(manifest: str, option: str, blank: str) -> None:
    lungs = np.ones(GRID.shape, np.uint8)
    facts: dict[str, Any] = {"source": {"grid": GRID.to_dict()}, "status": ["clipped"], "inspiration": manifest}
    facts |= {"acquisition": {"kernel": "B40f", "kvp": 120.0, "modality": "CT"}, "warnings": ["a note"]}
    volume: Any = SimpleNamespace(provenance=facts)
    image = np.full(GRID.shape, -960, np.int16)
    found = case_quantities(volume, RefineConfig(inspiration=option), lungs, lungs, lungs, image)
    values = {row.metric: row.value for row in found.rows if row.region == "whole"}
    assert (values["laa856_pct"], values["laa950_pct"]) == ((None, 100.0) if blank == "laa856_pct" else (100.0, None))
    assert found.covariates.inspiration == (manifest or option)
    assert (found.covariates.kernel, found.covariates.kvp, found.covariates.slice_thickness_mm) == ("B40f", 120.0, None)
    assert found.covariates.spacing_z_mm == GRID.spacing_mm[0]
    assert (found.covariates.scan_status, found.warnings) == ("clipped", ("a note",))

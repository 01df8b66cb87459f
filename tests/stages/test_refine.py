"""What `refine` exports of a lung that the field of view cuts. RELIABILITY row 22."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lungseg.config import Execution, RefineConfig
from lungseg.scan.volume import Geometry
from lungseg.stages.refine import _quantify_case, refine

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
    rows = _quantify_case(volume, RefineConfig(lower_bounds=lower_bounds), labels, labels, lungs, image)
    of_lungs = [row for row in rows if row.metric != "labelled_outside_lung_ml"]
    volumes = {row.region: (row.value, row.status) for row in of_lungs if row.metric == "volume_ml"}
    if not cut:
        assert volumes == {"whole": (32.0, "ok"), "left": (16.0, "ok"), "right": (16.0, "ok")}
    elif lower_bounds:
        assert volumes["whole"] == (32.0, "lower bound")
        assert {row.status for row in of_lungs if row.unit != "ml"} == {"truncated"}
    else:
        assert {(row.value, row.status) for row in of_lungs} == {(None, "truncated")}


def test_lower_bounds_are_a_matter_of_the_export_alone(copy: Path) -> None:
    """Label maps made without the option are complete with it too."""
    result = refine(copy / "store", RefineConfig(lower_bounds=True), execution=Execution(quiet=True))
    assert {outcome.status for outcome in result.outcomes} == {"complete already"}

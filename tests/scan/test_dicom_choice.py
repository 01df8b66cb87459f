"""Which series of a study is chosen, and why not the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from dicom_fixture import (
    GRID,
    chest,
    edit_all,
    write_folder,
)

from lungseg.scan.dicom import choose_series, find_series, kernel_sharpness
from lungseg.scan.volume import Geometry


def study(folder: Path, **series: dict) -> None:
    """Series of one study: spacing along z, kernel, and how many slices to leave out at the end."""
    for name, wanted in series.items():
        z = wanted.get("z", 2.5)
        grid = Geometry((wanted.get("n", 20), 10, 11), (z, 2.2, 2.0), GRID.origin_mm)
        edit = edit_all(SeriesInstanceUID=f"1.2.3.{name[1:]}", ConvolutionKernel=wanted.get("kernel", "B30f"))
        write_folder(folder / name, chest(grid.shape), geometry=grid, edit=edit)


@pytest.mark.parametrize(
    ("series", "best", "reasons"),
    [
        ({"s1": {"z": 5.0, "n": 10}, "s2": {"z": 2.5}}, "1.2.3.2", ["thicker slices (5 mm apart against 2.5 mm)"]),
        ({"s1": {"kernel": "B70f"}, "s2": {"kernel": "B30f"}}, "1.2.3.2", ["sharper kernel (B70f against B30f)"]),
        ({"s1": {"z": 2.5, "kernel": "B30f"}, "s2": {"z": 2.0, "n": 25, "kernel": "B70f"}}, "1.2.3.2", ["thicker"]),
        ({"s1": {"n": 18}, "s2": {"n": 20}}, "1.2.3.2", ["fewer slices (18 against 20)"]),
        ({"s2": {}, "s1": {}}, "1.2.3.1", ["the first series UID"]),
        ({"s1": {"z": 1.0, "n": 24}, "s2": {"z": 5.0, "n": 20}}, "1.2.3.2", ["covers only 24 mm against 100 mm"]),
        ({"s1": {"n": 5, "z": 1.0}, "s2": {"z": 5.0}}, "1.2.3.2", ["only 5 slices"]),
    ],
)
def test_row_03_stated_order(tmp_path: Path, series: dict, best: str, reasons: list[str]) -> None:
    study(tmp_path, **series)
    choice = choose_series(find_series(tmp_path).series)
    assert choice.chosen.series_uid == best
    assert len(choice.others) == len(reasons)
    for (_, said), expected in zip(choice.others, reasons, strict=True):
        assert expected in said
    reverse = choose_series(find_series(tmp_path).series[::-1])
    assert reverse.chosen == choice.chosen


@pytest.mark.parametrize(
    ("softer", "sharper"),
    [
        ("B30f", "B70f"), ("B40f", "B41f"), ("I26f\\3", "I70f\\3"), ("Br40d\\2", "Bl57d\\2"), ("D40s", "B60s"),
        ("SOFT", "STANDARD"), ("STANDARD", "LUNG"), ("LUNG", "BONEPLUS"), ("STD+", "EDGE"), ("A", "B"), ("B", "L"),
        ("YA", "YD"), ("FC07", "FC52"), ("FC17", "FC30"), ("FC51", "FC86"), ("B30f", None), ("unheard of", "B70f"),
        ("STANDARD", "UB"),
    ],
)  # fmt: skip
def test_kernels_from_soft_to_sharp(softer: str | None, sharper: str | None) -> None:
    assert kernel_sharpness(softer) < kernel_sharpness(sharper)

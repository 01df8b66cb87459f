"""Damaged files: a sample of the fuzz (``make fuzz`` runs all), every kind of defect it once found, and its judge.

What is a fair answer to a damaged scan is written in ``tests/fuzz/fuzz_judge.py``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from fuzz_bases import DICOM_BASES, GRID, IMAGE_BASES, chest, dicom_base, image_base
from fuzz_child import make_mutant
from fuzz_judge import RIGHT, SAID_SO, SHORTER, UNNOTICEABLE, judge
from fuzz_mutant import Expectation
from fuzz_runner import FAIR, Child, fuzz, table

from lungseg.cli.app import app
from lungseg.errors import InputError
from lungseg.scan.nifti import read_image
from lungseg.scan.sources import find_sources
from lungseg.scan.volume import Geometry, Volume

SEED = 0
DICOM_SAMPLE, IMAGE_SAMPLE = range(1000, 1075), range(1000, 1025)
"""Beyond the numbers of ``make fuzz``, so that the two together see more."""
ONCE_WRONG = {
    "declared length or VR made a reader of headers allocate a GiB": (2, 404, 612, 790),
    "rows beyond the pixels, MemoryError": (1250, 564),
    "pixel data shorter than rows x columns": (4, 702, 1208, 1766, 1926),
    "bits of one slice unlike the others": (544, 846, 1050, 1678),
    "MONOCHROME1": (244,),
    "pixel spacing of metres or micrometres": (672, 1312),
    "one slice lifted out of its neighbours": (80, 178, 786),
    "a code stream that decodes to rubbish": (38, 234),
    "position swapped, SliceLocation not": (132, 598),
    "bytes behind the pixels": (1622,),
    "very long line of a NRRD header, SIGSEGV": (223, 303, 587, 595),
    "checksum of gzip and zlib ignored": (139, 187, 425, 579, 633, 713),
    "more voxels than declared": (11, 41, 47, 51, 137, 261, 465, 741),
    "bytes of voxels swapped": (25, 229, 241, 255),
    "all values scaled": (196, 400, 430),
}
"""Numbers of mutants of seed 0 by the defect they showed in the readers."""


@pytest.mark.parametrize("name", DICOM_BASES)
def test_healthy_series_are_read_right(tmp_path: Path, name: str) -> None:
    base = dicom_base(name)
    for k, data in enumerate(base.files):
        (tmp_path / f"{k}").write_bytes(data)
    (source,) = find_sources([tmp_path])
    assert judge(source.read(), Expectation(base.geometry, base.slice_axis)) == (RIGHT, "")


@pytest.mark.parametrize("name", IMAGE_BASES)
def test_healthy_image_files_are_read_right(tmp_path: Path, name: str) -> None:
    base = image_base(name)
    path = tmp_path / f"scan{base.suffix}"
    path.write_bytes(base.build(base.header, base.voxels))
    if name == "nrrd-ascii":  # numbers as text: a form no scanner writes, refused by name
        with pytest.raises(InputError, match="ascii"):
            read_image(path)
        return
    assert judge(read_image(path), Expectation(base.geometry, 0)) == (RIGHT, "")


def test_a_sample_of_100_mutants_is_refused_or_read_right() -> None:
    numbers = sorted([2 * i for i in DICOM_SAMPLE] + [2 * i + 1 for i in IMAGE_SAMPLE])
    answers = list(fuzz(numbers, SEED))
    assert len(answers) == 100
    assert [answer for answer in answers if answer["verdict"] not in FAIR] == []
    # a reader that refuses everything is not what this asks for
    assert sum(answer["verdict"] == RIGHT for answer in answers) >= 10


def test_what_the_fuzz_once_found_stays_found() -> None:
    numbers = [number for numbers in ONCE_WRONG.values() for number in numbers]
    assert [answer for answer in fuzz(numbers, SEED) if answer["verdict"] not in FAIR] == []


def test_the_command_line_lists_mutants_without_a_traceback(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / "scans" / f"{number:02d}"
        folder.mkdir(parents=True)
        for name, data in make_mutant(number, SEED).files.items():
            (folder / name).write_bytes(data)
    scans = [str(path) for path in sorted((tmp_path / "scans").iterdir())]
    result = CliRunner().invoke(app, ["preprocess", *scans, "--list", "--json"])
    assert result.exit_code == 8, result.output
    assert json.loads(result.stdout)
    assert "Traceback" not in result.stderr


def test_the_command_line_refuses_mutants_without_a_traceback(tmp_path: Path) -> None:
    broken = tmp_path / "scans"
    broken.mkdir()
    for number in range(1, 80, 2):
        mutant = make_mutant(number, SEED)
        (name, data), *_ = mutant.files.items()
        if mutant.kind == "image: truncated":
            (broken / f"{number}-{name}").write_bytes(data)
    assert len(list(broken.iterdir())) >= 3
    result = CliRunner().invoke(app, ["preprocess", str(broken), "-o", str(tmp_path / "store")])
    assert result.exit_code == 3, result.output
    assert "Traceback" not in result.output
    assert not list((tmp_path / "store").rglob("*.h5"))


def test_a_mutant_is_known_by_seed_and_number() -> None:
    for number in (2, 3, 38, 139):
        assert make_mutant(number, SEED).files == make_mutant(number, SEED).files
        assert make_mutant(number, SEED).files != make_mutant(number, SEED + 1).files


def test_a_dead_reader_is_told_with_its_cause_and_replaced() -> None:
    child = Child(SEED)
    answer = child.ask(-(2**70), seconds=60)  # no number of a mutant: the process ends with a traceback
    assert answer == "crash: exit code 1"
    assert child.ask(2, seconds=60) == "crash: exit code 1"  # it stays dead
    (answer,) = fuzz([3], SEED)
    assert answer["number"] == 3
    assert "| all | 1 |" in table([answer])


# ---------------------------------------------------------------- the judge sees what is wrong


def scan(array: np.ndarray | None = None, **changes: object) -> Volume:
    array = chest() if array is None else array
    grid = dataclasses.replace(GRID, shape=array.shape, **changes)  # type: ignore[arg-type]
    return Volume(np.ascontiguousarray(array), grid)


def edited(k: int, values: np.ndarray | int) -> np.ndarray:
    array = chest().copy()
    array[k] = values
    return array


ALL = frozenset(range(GRID.shape[0]))
ONE = frozenset({4})


@pytest.mark.parametrize(
    "volume",
    [
        scan(chest()[::-1]),
        scan(chest()[:, :, ::-1]),
        scan(chest()[[0, 2, 1, *range(3, 20)]]),
        scan(np.delete(chest(), 7, axis=0)),
        scan(chest()[1:]),
        scan(chest()[:, :-1]),
        scan(spacing_mm=(5.0, 6.25, 6.25)),
        scan(spacing_mm=(5.2, 6.25, 6.5)),
        scan(origin_mm=(-310.0, -150.5, -137.0)),
        scan(edited(3, chest()[3] + np.int16(1))),
        scan(edited(4, chest()[4] + np.int16(1000))),
        Volume(chest(), Geometry(GRID.shape, GRID.spacing_mm, GRID.origin_mm, ((1, 0, 0), (0, 0, 1), (0, 1, 0)))),
    ],
)
def test_the_judge_calls_a_wrong_volume_wrong(volume: Volume) -> None:
    assert judge(volume, Expectation(GRID, 0, ONE))[0] == "wrong"
    assert judge(volume, Expectation(GRID, 0, ONE, free=ONE, may_vanish=True))[0] == "wrong"


def test_the_judge_is_fair() -> None:
    assert judge(scan(), Expectation(GRID, 0, ONE))[0] == RIGHT
    assert judge(scan(), Expectation(GRID, 0, ALL, must_refuse=True))[0] == "wrong"
    cut = scan(chest()[1:], origin_mm=(-305.0, -150.5, -140.25))
    assert judge(cut, Expectation(GRID, 0, frozenset({0}), may_vanish=True))[0] == SHORTER
    assert judge(cut, Expectation(GRID, 0, frozenset({0})))[0] == "wrong"
    assert judge(cut, Expectation(GRID, 0, frozenset({0})), ("one slice is not used",))[0] == SHORTER
    rescaled = scan(edited(4, chest()[4] + np.int16(100)))
    assert judge(rescaled, Expectation(GRID, 0, ONE))[0] == UNNOTICEABLE
    noise = scan(edited(4, np.roll(chest()[4], 1)))
    assert judge(noise, Expectation(GRID, 0, ONE))[0] == "wrong"
    assert judge(noise, Expectation(GRID, 0, ONE, free=ONE))[0] == UNNOTICEABLE
    moved = dataclasses.replace(scan(spacing_mm=(5.2, 6.25, 6.5)), status=("respaced",))
    assert judge(moved, Expectation(GRID, 0, ONE))[0] == SAID_SO

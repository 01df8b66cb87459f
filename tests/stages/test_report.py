"""`lungseg report` on a finished run: pages of all scans, the same bytes again, and what is missing is told."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from pipeline_fixture import QUIET, tree_hashes
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.config import Execution, RefineConfig, ReportConfig
from lungseg.errors import InputError
from lungseg.evaluation.score_files import read_cases_csv
from lungseg.report.summary import OUTDATED_SCORES
from lungseg.stages.refine import refine
from lungseg.stages.report import Beside, report, report_pages
from lungseg.store.cases import Store

SMALL = ReportConfig(num_slices=6, width_px=96)


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    report(finished / "store", folder, SMALL, scores=finished / "scores", execution=QUIET).require_complete()
    return folder


def test_every_scan_has_its_page_preview_and_numbers(finished: Path, pages: Path) -> None:
    case_ids = Store(finished / "store").case_ids()
    wanted = {"index.html", "quantification.csv", "quantification-wide.csv", "quantification.json"}
    wanted |= {"pictures/1-boxplot.png", "pictures/2-embedding.png", "worst.html"}
    wanted |= {f"cases/{case_id}.html" for case_id in case_ids} | {f"previews/{case_id}.png" for case_id in case_ids}
    assert set(tree_hashes(pages)) == wanted
    index = (pages / "index.html").read_text(encoding="utf-8")
    for case_id in case_ids:
        assert f'href="cases/{case_id}.html"' in index
        page = (pages / "cases" / f"{case_id}.html").read_text(encoding="utf-8")
        assert "layer-reference" in page  # the manifest names one
        assert "Research use only" in page
        assert "Against the reference" in page
        assert str(finished) not in page
    assert str(finished) not in index
    # the numbers are those of the export
    exported = (finished / "results" / "quantification.csv").read_bytes()
    assert (pages / "quantification.csv").read_bytes() == exported


def test_the_same_report_gives_the_same_bytes_with_numbers_counted_before(
    finished: Path, pages: Path, tmp_path: Path
) -> None:
    done = refine(finished / "store", RefineConfig(), export=tmp_path / "files", execution=QUIET)
    again = report_pages(
        Store(finished / "store"), tmp_path / "again", SMALL, quantities=done.values["quantities"],
        beside=Beside(finished / "scores"), execution=Execution(quiet=True, jobs=2),
    )  # fmt: skip
    assert again.exit_code == 0
    assert tree_hashes(tmp_path / "again") == tree_hashes(pages)


def test_a_folder_made_by_run_is_taken_with_its_pictures(copy: Path, tmp_path: Path) -> None:
    shutil.copy(next((copy / "results").glob("*.png")), copy / "scores" / "worst_cases.png")
    case_id = Store(copy / "store").case_ids()[0]
    Store(copy / "store").case_file(case_id, "labels", "diffseglung").unlink()
    arguments = ["report", copy, "-o", tmp_path / "out", "--num-slices", "4", "--width-px", "96", "--json", "-q"]
    for folder in ("run", "synthetic"):
        arguments += ["--pictures", copy / folder]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 8, result.output
    document = json.loads(result.stdout)
    assert list(document["left_out"]) == [case_id]
    (ranked,) = document["ranking"]
    assert set(document["quantification"]["cases"]) == {ranked["case"]}
    rows = read_cases_csv((copy / "scores" / "cases.csv").read_text(encoding="utf-8"), what="t")["diffseglung"]
    dice = [row.dice for row in rows if row.case_id == ranked["case"] and row.is_averaged]
    assert ranked["mean_dice"] == pytest.approx(sum(dice) / len(dice))
    assert f"mean DSC {ranked['mean_dice']:.2f}" in ranked["why"]
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for words in ("Evaluation: worst cases", "Clustering: what was clustered", "Training: losses and collapse",
                  "Synthesis: drawn beside real patches", 'href="worst.html"'):  # fmt: skip
        assert words in index
    for address in re.findall(r'href="(pictures/[^"]+)"', index):
        assert (tmp_path / "out" / address).read_bytes().startswith(b"\x89PNG")
    assert "Scans without a map" in index
    assert case_id in index


def test_scores_of_another_map_are_refused_where_they_were_asked_for(copy: Path, tmp_path: Path) -> None:
    table = copy / "scores" / "cases.csv"
    table.write_text(table.read_text().replace("diffseglung,", "theirs,"), encoding="utf-8")
    line = table.read_text().splitlines()[1]
    with table.open("a", encoding="utf-8") as out:
        out.write(line.replace("theirs,", "others,") + "\n")
    with pytest.raises(InputError, match=r"holds scores of theirs, others, not of 'diffseglung'"):
        report(copy / "store", tmp_path / "out", SMALL, scores=copy / "scores", execution=QUIET)
    with pytest.raises(InputError, match=r"holds no cases\.csv"):
        report(copy / "store", tmp_path / "out", SMALL, scores=copy / "store", execution=QUIET)
    with pytest.raises(InputError, match="no such folder"):
        report(copy / "store", tmp_path / "out", SMALL, pictures=[copy / "nowhere"], execution=QUIET)
    report(copy, tmp_path / "found", SMALL, execution=QUIET).require_complete()  # found, not asked for: passed over
    assert "Mean DSC" not in (tmp_path / "found" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("is_recorded", [True, False])
def test_scores_of_an_earlier_map_are_not_shown(copy: Path, tmp_path: Path, *, is_recorded: bool) -> None:
    first, second = Store(copy / "store").case_ids()
    labels = Store(copy / "store").case_file(first, "labels", "diffseglung")
    summary = copy / "scores" / "summary.json"
    if is_recorded:  # the map is drawn anew, and its time says nothing
        labels.unlink()
        refine(copy / "store", RefineConfig(fusion="none"), execution=QUIET)  # the other one refuses: it is kept
        os.utime(labels, (0, 0))
    else:
        found = json.loads(summary.read_text())
        assert set(found.pop("map_fingerprints")["diffseglung"]) == {first, second}
        summary.write_text(json.dumps(found))
        os.utime(labels, ns=(2**62, 2**62))
    report(copy, tmp_path / "out", SMALL, execution=QUIET).require_complete()
    pages = {c: (tmp_path / "out" / "cases" / f"{c}.html").read_text(encoding="utf-8") for c in (first, second)}
    assert OUTDATED_SCORES in pages[first]
    assert "Against the reference" not in pages[first]
    assert OUTDATED_SCORES not in pages[second]
    assert "Against the reference" in pages[second]
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert OUTDATED_SCORES in index
    assert "Evaluation: worst cases" not in index
    assert "worst.html" not in index


def test_refine_prints_json_for_machines(finished: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["refine", str(finished / "store"), "--export", str(tmp_path), "--json", "-q"])
    document = json.loads(result.stdout)
    assert set(document["cases"]) == set(document["quantification"]["cases"])
    assert {case["status"] for case in document["cases"].values()} == {"complete already"}


def test_nothing_to_report_is_told(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no label map 'other'"):
        report(copy / "store", tmp_path / "out", ReportConfig(name="other"), execution=QUIET)
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(tmp_path / "out")]).exit_code == 6

"""What a reviewer meets: several tools, missing files, shifted grids, foreign ids. All is told, the rest scored."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lungseg.cli.app import app
from lungseg.config import EvaluateConfig, Execution
from lungseg.errors import InputError, UsageError
from lungseg.scan.nifti import write_image
from lungseg.scan.volume import Geometry
from lungseg.stages.evaluate import evaluate

SHAPE = (12, 40, 40)
GRID = Geometry(SHAPE, (3.0, 2.0, 2.0), (-18.0, -40.0, -40.0))
QUIET = Execution(quiet=True)
CONFIG = EvaluateConfig(bootstrap=100, worst=1)
FILES = {"cases.csv", "summary.json", "table.md", "table.tex", "boxplot.png", "worst.html"}


def labels(seed: int = 0) -> np.ndarray:
    """Five tissues in blocks of about 5 mL and more, each seed elsewhere."""
    out = np.zeros(SHAPE, np.uint8)
    out[1:11, 4:36, 4:36] = 1
    for tissue in range(2, 6):
        corner = 5 + (7 * tissue + 5 * seed) % 22
        out[2:9, corner : corner + 8, 5 * tissue - 4 : 5 * tissue + 4] = tissue
    return out


def moved(array: np.ndarray, voxels: int = 1) -> np.ndarray:
    return np.roll(array, voxels, axis=2)


def write(path: Path, array: np.ndarray, grid: Geometry = GRID) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path.with_name(path.name + ".nii.gz"), array, grid)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references of four cases, all in order."""
    for number in range(4):
        write(tmp_path / "reference" / f"case-{number}", labels(number))
        write(tmp_path / "tool" / f"case-{number}", moved(labels(number)))
    return tmp_path / "tool", tmp_path / "reference"


def run(tmp_path: Path, *predictions: Path, config: EvaluateConfig = CONFIG, **more: Any) -> tuple[Any, dict[str, Any]]:
    result = evaluate(list(predictions), tmp_path / "out", config, execution=QUIET, **more)
    return result, json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))


def rows(tmp_path: Path) -> list[dict[str, str]]:
    with open(tmp_path / "out" / "cases.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def statuses(found: list[dict[str, str]], case_id: str) -> set[str]:
    return {row["status"] for row in found if row["case_id"] == case_id}


def test_row_70_every_fault_is_named_and_the_rest_is_scored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """One missing prediction, missing reference, empty class, shifted grid and foreign id each."""
    predictions, references = folders
    for name in ("no-prediction", "no-reference", "empty-class", "shifted", "foreign"):
        array = labels(1)
        if name == "empty-class":
            array[array == 2] = 1
        if name != "no-reference":
            write(references / name, array)
        if name == "foreign":
            array[array == 4] = 42
        grid = replace(GRID, origin_mm=(-18.0, -39.0, -40.0)) if name == "shifted" else GRID
        if name != "no-prediction":
            write(predictions / name, array, grid)
    result, summary = run(tmp_path, predictions, reference=references)
    assert result.exit_code == 8
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    latex = (tmp_path / "out" / "table.tex").read_text(encoding="utf-8")
    found = rows(tmp_path)
    assert statuses(found, "no-prediction") == {"missing prediction"}
    assert statuses(found, "no-reference") == {"missing reference"}
    assert statuses(found, "empty-class") == {"scored", "absent"}
    assert statuses(found, "shifted") == statuses(found, "foreign") == {"unusable"}
    assert summary["unusable"] == ["foreign", "shifted"]
    for text in (table, latex):
        assert "Without a prediction, scored as missed: no-prediction." in text
        assert "Without a reference, not scored: no-reference." in text
        assert (
            "scored 24, missed 0, false tissue 0, absent 1, missing prediction 5, missing reference 5, unusable 10"
            in text
        )
    assert "Not scored: case shifted, tool: the prediction of tool and the reference lie on different grids" in table
    assert "Not scored: case foreign, tool: the prediction of tool holds label ids" in table
    assert f"42 ({(labels(1) == 4).sum()} voxels)" in table
    problems = {problem["case"]: problem["problem"] for problem in summary["problems"]}
    assert set(problems) == {"no-prediction", "no-reference", "shifted", "foreign"}
    assert "origin (S, P, L) -18.000, -39.000, -40.000" in problems["shifted"]
    assert "origin (S, P, L) -18.000, -40.000, -40.000" in problems["shifted"]
    assert "--label-map FILE" in problems["foreign"]
    assert {o.case_id for o in result.outcomes if o.status == "failed"} == set(problems)
    assert summary["num_cases"] == 6
    assert summary["overall"]["num_pairs"] == 29
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    again, _ = run(tmp_path, predictions, reference=references, config=replace(CONFIG, resample_to="reference"))
    assert statuses(rows(tmp_path), "shifted") == {"scored"}
    told = (
        "tool: brought from another grid onto the reference's by nearest voxel, tissue outside of it left out: shifted."
    )
    assert told in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert again.exit_code == 8


def test_row_69_a_class_missed_and_one_invented_are_counted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    reference, prediction = labels(), labels()
    prediction[prediction == 2] = 1
    reference[reference == 3] = 1
    write(references / "both", reference)
    write(predictions / "both", prediction)
    result, summary = run(tmp_path, predictions, reference=references)
    assert result.exit_code == 0
    found = {row["tissue"]: row for row in rows(tmp_path) if row["case_id"] == "both"}
    assert found["emphysema"]["status"] == "missed"
    assert float(found["emphysema"]["dice"]) == 0
    assert float(found["emphysema"]["penalised_hd95_mm"]) == pytest.approx(np.sqrt(30**2 + 64**2 + 64**2))
    assert found["ggo"]["status"] == "false tissue"
    assert found["ggo"]["dice"] == ""
    assert summary["status_counts"]["missed"] == summary["status_counts"]["false tissue"] == 1


def test_several_methods_stand_side_by_side(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    other = tmp_path / "other" / "tool"
    for number in range(4):
        array = moved(labels(number), 2)
        write(other / f"case-{number}", np.choose(array, [0, 1, 2, 4, 3, 5]).astype(np.uint8))  # GGO and fibrosis
    result, summary = run(tmp_path, predictions, other, reference=references)
    assert result.exit_code == 0
    methods = {(m["method"], m["is_oracle"]): m["overall"]["dice_mean"] for m in summary["methods"]}
    names = [f"{tmp_path.name}/tool", "other/tool"]  # alike: the folders above tell them apart
    assert set(methods) == {(names[0], False), (names[1], False), (names[1], True)}
    assert methods[names[0], False] > methods[names[1], True] > methods[names[1], False] + 0.2
    naming = summary["oracle_namings"][names[1]]
    assert naming["classes"]["ggo"] == "fibrosis"
    assert naming["classes"]["fibrosis"] == "ggo"
    assert summary["oracle_namings"][names[0]]["is_own_naming"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {
        "comparison.csv", "comparison.md", "comparison.tex",
    }  # fmt: skip
    titles = {row["method"] for row in rows(tmp_path)}
    assert titles == {*names, f"{names[1]}, oracle naming"}
    _, summary = run(
        tmp_path, predictions, other, reference=references, config=replace(CONFIG, names=("a", "b"), oracle=False)
    )
    assert [m["method"] for m in summary["methods"]] == ["a", "b"]
    run(tmp_path, predictions, reference=references)  # into the same folder: no comparison of old is left
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_cases_in_parallel_give_the_same_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    run(tmp_path, predictions, reference=references)
    evaluate(predictions, tmp_path / "two", CONFIG, reference=references, execution=Execution(quiet=True, jobs=2))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_classes_that_the_reference_cannot_tell_are_left_out(tmp_path: Path) -> None:
    for number in range(2):
        array = labels(number)
        write(tmp_path / "tool" / f"case-{number}", array)
        lesions = np.choose(array, [0, 0, 0, 1, 3, 2]).astype(np.uint8)  # MedSeg: fibrosis as effusion, for the test
        write(tmp_path / "reference" / f"case-{number}", lesions)
    config = replace(CONFIG, reference_label_map="medseg")
    result, summary = run(tmp_path, tmp_path / "tool", reference=tmp_path / "reference", config=config)
    assert result.exit_code == 0
    assert [row["tissue"] for row in summary["classes"]] == ["ggo", "consolidation"]
    assert summary["overall"]["dice_mean"] == 1.0
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "cannot tell them: healthy, emphysema, fibrosis." in table
    assert "Label maps: the references: medseg; what each id means" in table
    assert any("cannot tell them" in note for note in summary["notes"])
    assert summary["label_maps"]["reference"]["classes"] == {"1": "ggo", "2": "consolidation", "3": "none"}
    config = replace(CONFIG, label_map=("medseg",))  # the other way round: what a method cannot tell, it misses
    _, summary = run(tmp_path, tmp_path / "reference", reference=tmp_path / "tool", config=config)
    assert summary["status_counts"]["missed"] == 6
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "The label map of reference cannot tell healthy, emphysema, fibrosis: scored as missed." in table


def test_only_annotated_slices_count_in_slice_mode(tmp_path: Path) -> None:
    """A slice in which the reference holds nothing but an ignored id is annotated; an empty one is not."""
    reference, prediction = np.zeros(SHAPE, np.uint8), labels()
    reference[3] = np.where(labels()[3] == 3, 1, 0)
    reference[5, 0, 0] = 3  # effusion only
    write(tmp_path / "reference" / "case", reference)
    write(tmp_path / "tool" / "case", prediction)
    config = replace(CONFIG, reference_label_map="medseg", mode="slices")
    run(tmp_path, tmp_path / "tool", reference=tmp_path / "reference", config=config)
    found = {(row["slice_index"], row["tissue"]): row["status"] for row in rows(tmp_path)}
    assert found == {
        ("3", "ggo"): "scored", ("3", "consolidation"): "false tissue",
        ("5", "ggo"): "false tissue", ("5", "consolidation"): "false tissue",
    }  # fmt: skip


def test_lung_masks_of_two_tools(tmp_path: Path) -> None:
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[1:11, 4:36, 4:18], lungs[1:11, 4:36, 22:36] = 2, 1  # ours: 1 left (high x), 2 right
    write(tmp_path / "reference" / "case", lungs)
    write(tmp_path / "lungmask" / "case", np.choose(lungs, [0, 2, 1]).astype(np.uint8))
    config = replace(CONFIG, view="lungs", label_map=("lungmask",), reference_label_map="lungseg-lungs", oracle=False)
    _, summary = run(tmp_path, tmp_path / "lungmask", reference=tmp_path / "reference", config=config)
    assert [(row["tissue"], row["dice_mean"]) for row in summary["classes"]] == [
        ("left lung", 1.0),
        ("right lung", 1.0),
    ]
    with pytest.raises(UsageError, match="know none of left lung, right lung"):
        run(
            tmp_path, tmp_path / "lungmask", reference=tmp_path / "reference",
            config=replace(config, label_map=("lungseg",)),
        )  # fmt: skip


def test_patients_are_told_or_missed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    _, summary = run(tmp_path, predictions, reference=references)
    assert summary["num_patients"] == 4
    assert "No patients were given" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    patients = tmp_path / "patients.csv"
    patients.write_text("case_id,patient_id\n" + "".join(f"case-{i},p-{i // 2}\n" for i in range(4)))
    _, summary = run(tmp_path, predictions, reference=references, patients=patients)
    assert summary["num_patients"] == 2
    assert "No patients were given" not in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    patients.write_text("case,patient\ncase-0,p-0\n")
    with pytest.raises(InputError, match="no patient is given for cases case-1, case-2"):
        run(tmp_path, predictions, reference=references, patients=patients)
    patients.write_text("case;patient\ncase-0;p-0\n")
    with pytest.raises(InputError, match="columns case and patient are needed"):
        run(tmp_path, predictions, reference=references, patients=patients)


def test_pictures_take_the_scans_that_are_given(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    without = run(tmp_path, predictions, reference=references)[0]
    plain = (tmp_path / "out" / "worst.html").read_text(encoding="utf-8")
    for number in range(4):
        noise = np.random.default_rng(number).normal(-850, 30, SHAPE)
        write(tmp_path / "scans" / f"case-{number}_0000", np.where(labels() > 0, noise, 40).astype(np.int16))
    run(tmp_path, predictions, reference=references, images=tmp_path / "scans")
    page = (tmp_path / "out" / "worst.html").read_text(encoding="utf-8")
    assert without.exit_code == 0
    assert plain.count("<img") == 1
    assert page.count("<img") == 2
    with pytest.raises(InputError, match=r"no scan of .* is named like a case"):
        run(tmp_path, predictions, reference=references, images=tmp_path)


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--names", "a,b"], 2, "--names gives 2 names for 1 folders"),
        (["--names", "a,a"], 2, "each name once"),
        (["--label-map", "medseg,medseg"], 2, "2 label maps for 1 folders"),
        (["--label-map", "nowhere"], 2, "neither a file nor one of lungseg"),
        (["--view", "lungs"], 2, "know none of left lung, right lung"),
        (["--resample-to", "prediction"], 2, "not one of none, reference"),
        (["--patients", "nowhere.csv"], 3, "cannot be read as a table of patients"),
    ],
)
def test_wrong_options_are_told(
    folders: tuple[Path, Path], tmp_path: Path, options: list[str], code: int, text: str
) -> None:
    predictions, references = folders
    arguments = ["evaluate", str(predictions), "--reference", str(references), "-o", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_folders_without_a_case_in_common_show_their_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "scan-9", labels())
    with pytest.raises(InputError, match=r"named like one of .*scan-9.*case-0, case-1 \.\.\."):
        run(tmp_path, tmp_path / "elsewhere", reference=folders[1])


def test_two_files_are_a_pair_whatever_their_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    _, summary = run(tmp_path, predictions / "case-1.nii.gz", reference=references / "case-0.nii.gz")
    assert summary["num_cases"] == 1
    assert summary["method"] == "case-1.nii.gz"
    result, summary = run(tmp_path, predictions, reference=references / "case-0.nii.gz")
    assert result.exit_code == 8
    assert summary["missing_references"] == ["case-1", "case-2", "case-3"]


def test_merged_classes_are_spelled_out_and_slices_have_their_own_definitions(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    predictions, references = folders
    config = replace(CONFIG, view="ild", mode="slices")
    run(tmp_path, predictions, reference=references, config=config)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "Classes of view ild: healthy = healthy; emphysema = emphysema; ild = ggo + fibrosis." in table
    assert "4-connected in a slice" in table
    assert "in slice mode that of the box in the plane" in table


def test_a_damaged_reference_makes_the_case_unusable_for_every_method(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    predictions, references = folders
    (references / "case-2.nii.gz").write_bytes(b"no image")
    result, summary = run(
        tmp_path, predictions, predictions, reference=references, config=replace(CONFIG, names=("a", "b"))
    )
    assert result.exit_code == 8
    assert [method["unusable"] for method in summary["methods"]] == [["case-2"], ["case-2"]]
    assert [row["method"] for row in rows(tmp_path) if row["status"] == "unusable"] == ["a"] * 5 + ["b"] * 5


def test_classes_without_a_place_in_the_view_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    names = tmp_path / "names.json"
    names.write_text('{"lung": 1, "emphysema": 2, "ggo": 3, "fibrosis": 4, "consolidation": 5}', encoding="utf-8")
    _, summary = run(tmp_path, predictions, reference=references, config=replace(CONFIG, label_map=(str(names),)))
    assert "tool: lung is none of these classes and was left out in 4 cases." in summary["notes"]
    assert summary["classes"][0]["num_missed"] == 4

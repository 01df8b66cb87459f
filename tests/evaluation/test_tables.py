"""What every table must carry, in every form it is written in."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from score_fixture import SCORES, cohort, missed, scored

from lungseg.evaluation.comparison import compare_methods
from lungseg.evaluation.comparison_tables import (
    comparison_csv,
    comparison_latex,
    comparison_markdown,
    comparison_notes,
    comparison_rich_table,
)
from lungseg.evaluation.scores import ScoreSettings
from lungseg.evaluation.summary import summarise, summarise_methods
from lungseg.evaluation.tables import (
    COLUMNS,
    cases_csv,
    latex_table,
    markdown_table,
    results_dict,
    rich_table,
    summary_dict,
)

HOSTILE = "a|b <script> & 50% [bold]x_1 \\end{table}"
"""A method name that Markdown, HTML, LaTeX or rich would read as their own."""


def rendered(table, width: int = 100) -> str:
    console = pytest.importorskip("rich.console").Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def flat(text: str) -> str:
    return " ".join(text.replace("\\par", " ").replace("\\", "").split())


@pytest.mark.parametrize("hd95", ["border", "surface", "medpy"])
def test_row_72_every_table_says_what_was_counted_and_which_hd95_it_is(hd95):
    settings = ScoreSettings(hd95=hd95, tolerance_mm=1.5)
    summary = summarise(SCORES, settings=settings, num_bootstrap=100)
    for text in (markdown_table(summary), rendered(rich_table(summary)), latex_table(summary)):
        for phrase in (
            *settings.definitions,
            "6 cases of 5 patients",
            "scored 3, missed 1, false tissue 1, absent 1, missing prediction 1, missing reference 1",
            "false tissue in all 4.5 mL",
            "Without a prediction, scored as missed: f.",
            "Without a reference, not scored: g.",
            "100 samples, seed 0",
            "Fewer than 15 patients in every class: intervals there are too short",
            "at least 1 mL",
            "over all pairs, missed and false tissue included",
            "within 1.5 mm",
        ):
            assert phrase in flat(text)
        assert "0.467" in text
        assert not re.search(r"\bnan\b", text)


def test_many_patients_need_no_warning_and_slices_are_named():
    many = [scored(f"c{i}", f"p{i}", 0.5 + i / 100, slice_index=i) for i in range(15)]
    text = markdown_table(summarise(many, settings=ScoreSettings(mode="slices"), num_bootstrap=50))
    assert "Fewer than" not in text
    assert "15 annotated slices. Class-slice pairs" in text
    assert "Per annotated axial slice" in text
    terminal = rendered(rich_table(summarise(many, settings=ScoreSettings(mode="slices"), num_bootstrap=50)))
    assert "pooled DSC against the reference" in flat(terminal)
    rare = [*many, *(scored(f"c{i}", f"p{i}", 0.5, tissue="fibrosis") for i in range(3))]
    assert "Fewer than 15 patients in fibrosis:" in markdown_table(summarise(rare, num_bootstrap=50))


def test_notes_of_the_stage_stand_with_every_table_once():
    first, second = summarise_methods({"a": SCORES, "b": SCORES}, num_bootstrap=10)
    first = replace(first, notes=("Not scored: case x: its grid is another.",))
    for text in (markdown_table(first, second), latex_table(first, second), rendered(rich_table(first, second))):
        assert flat(text).count("Not scored: case x: its grid is another.") == 1


def test_markdown_has_one_line_a_class_and_equal_columns():
    table = [x for x in markdown_table(summarise(SCORES, num_bootstrap=10)).splitlines() if x.startswith("|")]
    assert len(table) == 2 + 2 + 1
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert table[-1].startswith("| all |")


def test_several_methods_stand_side_by_side_with_their_oracle():
    summaries = summarise_methods({"ours": SCORES, "theirs": SCORES[:4]}, {"ours": cohort(1)}, num_bootstrap=20)
    for text in (markdown_table(*summaries), latex_table(*summaries), rendered(rich_table(*summaries))):
        assert "ours" in text
        assert "theirs" in text
        assert "ours, oracle naming" in flat(text)
        assert "uses the reference" in flat(text)
        assert "theirs: 4 cases of 3 patients" in flat(text)
    table = [x for x in markdown_table(*summaries).splitlines() if x.startswith("|")]
    assert len(table) == 2 + 3 + 3 + 2
    assert table[0].startswith("| method | class |")


def test_the_terminal_table_fits_100_columns_without_cutting_anything():
    long = "a-method-with-quite-a-long-name-v2"
    summaries = summarise_methods({long: [*cohort(1), missed("z", "p9", tissue="consolidation")]}, num_bootstrap=50)
    comparison = compare_methods({long: cohort(1), "other": cohort(2)}, num_bootstrap=50)
    for table in (rich_table(*summaries), comparison_rich_table(comparison)):
        lines = rendered(table, width=100).splitlines()
        assert max(map(len, lines)) <= 100
        assert not [line for line in lines if "…" in line]
    assert "consolidation" in rendered(rich_table(*summaries))


def test_names_are_never_read_as_markup():
    summaries = summarise_methods({HOSTILE: SCORES}, num_bootstrap=10)
    assert "[bold]" in rendered(rich_table(*summaries), width=150)
    markdown = markdown_table(*summaries)
    assert "<script>" not in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("| a")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(COLUMNS) + 2}
    assert latex_table(*summaries).count("\\end{table}") == 1


def latex_problems(text: str) -> list[str]:
    """What would stop LaTeX: open groups and environments, lone specials, rows of unequal length."""
    problems, depth, environments = [], 0, []
    body = re.sub(r"(?m)^%.*$|%$", "", text)
    for token in re.findall(r"\\begin\{[^}]*\}|\\end\{[^}]*\}|\\[a-zA-Z]+|\\.|[{}]|[#$_^~&]", body):
        if token.startswith("\\begin"):
            environments.append(token[6:])
        elif token.startswith("\\end{"):
            if not environments or environments.pop() != token[4:]:
                problems.append(f"unbalanced {token}")
        elif token in "{}":
            depth += 1 if token == "{" else -1
        elif token in "#$_^~" or (token == "&" and "{tabular}" not in environments):
            problems.append(f"bare {token}")
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows}
    spec = re.search(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", text)
    if columns != {len(spec.group(1))}:
        problems.append(f"rows of {columns} columns under {spec.group(1)}")
    if depth or environments:
        problems.append(f"open: {depth} {environments}")
    unknown = {c for c in text if ord(c) > 255}
    return problems + ([f"no plain LaTeX: {unknown}"] if unknown else [])


def test_latex_would_compile():
    summaries = summarise_methods({HOSTILE: SCORES, "b": cohort(2)}, {"b": cohort(3)}, num_bootstrap=20)
    comparison = compare_methods({HOSTILE: cohort(1), "b": cohort(2)}, num_bootstrap=20)
    for text in (latex_table(*summaries), comparison_latex(comparison), latex_table(summarise([]))):
        assert latex_problems(text) == []
        assert text.index("\\toprule") < text.index("\\midrule") < text.index("\\bottomrule")
    assert latex_problems(latex_table(*summaries).replace("\\bottomrule", "a & b_c {")) != []


def test_comparison_tables_say_how_and_what_was_left_out():
    few = compare_methods({"a": cohort(1, num_cases=12), "b": cohort(2, num_cases=15)}, num_bootstrap=50)
    text = comparison_markdown(few)
    for phrase in (
        "Wilcoxon signed-rank",
        "zero differences dropped",
        "rank-biserial",
        "Holm",
        "Too few patients in every class: there p cannot fall below 0.05",
        "scored for b but not for a: 6 pairs of c12, c13, c14.",
    ):
        assert phrase in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 * 3
    enough = compare_methods({"a": cohort(1), "b": cohort(2)}, num_bootstrap=50)
    assert not [note for note in comparison_notes(enough) if "Too few" in note or "cannot reach" in note]
    six = compare_methods({"a": cohort(1, num_cases=18), "b": cohort(2, num_cases=18)}, num_bootstrap=50)
    assert [note for note in comparison_notes(six) if "cannot reach 0.05 after Holm" in note]
    parsed = list(csv.DictReader(io.StringIO(comparison_csv(enough))))
    assert len(parsed) == 3 * 48
    first = parsed[0]
    assert float(first["value_a"]) - float(first["value_b"]) == pytest.approx(float(first["difference"]), abs=2e-6)


def test_cases_csv_has_the_method_first_and_blanks_for_what_is_unknown():
    text = cases_csv({"ours": SCORES, "theirs": SCORES[:1]})
    parsed = list(csv.DictReader(io.StringIO(text)))
    assert next(iter(parsed[0])) == "method"
    assert [line["method"] for line in parsed] == ["ours"] * 8 + ["theirs"]
    assert parsed[0]["dice"] == "0.800000"
    assert (parsed[2]["dice"], parsed[2]["hd95_mm"]) == ("0.000000", "")
    assert (parsed[7]["status"], parsed[7]["reference_ml"]) == ("missing reference", "")
    assert "nan" not in text
    assert "\r" not in text


def test_json_is_safe_and_keeps_the_first_method_on_top():
    scores = {"ours": cohort(1), "theirs": cohort(2)}
    summaries = summarise_methods(scores, {"ours": cohort(3)}, num_bootstrap=20)
    data = results_dict(summaries, compare_methods(scores, num_bootstrap=20))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["overall"] == data["methods"][0]["overall"]
    assert [(m["method"], m["is_oracle"]) for m in data["methods"]] == [
        ("ours", False),
        ("ours", True),
        ("theirs", False),
    ]
    for key in ("dice_mean", "dice_ci_low", "hd95_mean_mm", "hd95_ci_high_mm", "penalised_hd95_mean_mm", "num_hd95"):
        assert isinstance(data["overall"][key], (int, float)), key
    assert data["status_counts"]["scored"] == 48
    assert data["definitions"] == list(ScoreSettings().definitions)
    assert data["comparison"]["rows"][0]["p_holm"] is not None
    assert "comparison" not in results_dict(summaries[:1])
    assert summary_dict(summarise([missed("a", "p1")]))["overall"]["hd95_mean_mm"] is None

"""Numbers and rows as text."""

from __future__ import annotations

import math

import pytest

from lungseg.evaluation.writers import csv_text, interval, json_safe, latex_escaped, number, p_text


def test_numbers_for_people():
    assert (number(0.12345, 3), number(math.nan, 3), number(math.inf, 1)) == ("0.123", "–", "–")
    assert (interval(0.1, 0.25, 2), interval(-0.1, 0.2, 1), interval(math.nan, 1.0, 1)) == (
        "0.10–0.25",
        "-0.1 to 0.2",
        "–",
    )
    assert (p_text(0.0004), p_text(0.05), p_text(1.0), p_text(math.nan)) == ("<0.001", "0.050", "1.000", "–")


def test_csv_quotes_and_refuses_foreign_columns():
    assert csv_text(["a", "b"], [{"a": "x,y", "b": 1}]) == 'a,b\n"x,y",1\n'
    assert csv_text(["a", "b"], [{"a": math.nan, "b": None}]) == "a,b\n,\n"
    with pytest.raises(ValueError, match="c"):
        csv_text(["a"], [{"c": 1}])


def test_json_has_no_nan_and_latex_no_commands():
    assert json_safe({"a": (1, math.nan, [math.inf])}) == {"a": [1, None, [None]]}
    assert latex_escaped("50% of a_b & {c}\\d ≥ 1 – 2") == (
        r"50\% of a\_b \& \{c\}\textbackslash{}d \ensuremath{\geq} 1 -- 2"
    )

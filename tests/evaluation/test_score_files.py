"""Scores read back from the table of an evaluation are the scores that were written."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from score_fixture import missed, scored, uncounted, without_reference

from lungseg.errors import InputError
from lungseg.evaluation.score_files import read_cases_csv
from lungseg.evaluation.summary import ORACLE_SUFFIX
from lungseg.evaluation.tables import cases_csv

ROWS = [scored("a", "p", 0.75), missed("a", "p", tissue="fibrosis"), uncounted("b", "q", false_ml=3.0),
        without_reference("c", "r"), scored("d", "s", 0.5, slice_index=7)]  # fmt: skip


def test_scores_come_back_as_they_were_without_the_oracle_and_with_foreign_columns() -> None:
    text = cases_csv({"ours": ROWS, f"ours{ORACLE_SUFFIX}": ROWS, "theirs": ROWS[:1]})
    lines = text.splitlines()
    wider = "\n".join([lines[0] + ",ece", *(line + ",0.1" for line in lines[1:])])
    for given in (text, wider):
        back = read_cases_csv(given, what="t")
        assert list(back) == ["ours", "theirs"]
        for row, read in zip(ROWS, back["ours"], strict=True):
            for wanted, found in zip(astuple(row), astuple(read), strict=True):
                if isinstance(wanted, float):
                    np.testing.assert_allclose(found, wanted, atol=1e-6, equal_nan=True)
                else:
                    assert found == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "case_id, patient_id"),
        ("case,region,metric\na,b,c\n", "run lungseg evaluate again"),
        (cases_csv({"m": ROWS}).replace(",missed,", ",lost,"), "line 3: unknown status 'lost'"),
        (cases_csv({"m": ROWS}).replace("0.750000", "much"), "line 2: could not convert"),
    ],
)
def test_another_table_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_cases_csv(text, what="cases.csv")

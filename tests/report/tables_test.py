"""Tables: alignment, missing values, headings, escapes."""

import doctest

import numpy as np
import pytest

from jentropy.report import tables
from jentropy.report.tables import table


def test_aligns_and_renames():
    rows = [{"m": "GRPO", "r": 0.5, "n": 30}, {"m": "a|b", "r": np.float64(12.25), "n": None}]
    assert table(rows, {"m": "method", "n": "steps", "r": "reward"}).splitlines() == [
        "| method | steps | reward |",
        "| :----- | ----: | -----: |",
        "| GRPO   |    30 |  0.500 |",
        "| a\\|b   |     – | 12.250 |",
    ]


def test_text_among_numbers_aligns_left():
    assert table([{"x": 1}, {"x": "never"}], ["x"]).splitlines()[1] == "| :---- |"


def test_no_rows_gives_a_heading():
    assert table([], ["a", "b"]) == "| a   | b   |\n| :-- | :-- |"


def test_refuses_no_columns():
    with pytest.raises(ValueError, match="columns must name at least one"):
        table([{"a": 1}], [])


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(tables)
    assert (result.failed, result.attempted) == (0, 1)

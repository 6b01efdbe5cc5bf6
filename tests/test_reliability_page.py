"""docs/reliability.md: every row names tests that exist, or says why there is none."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([A-Z]\d+) \|(.*)\|$", re.MULTILINE)
TEST = re.compile(r"`(\w+)\.py::(\w+)(?:::(\w+))?`")
INPUT_ROWS = [*(f"D{n}" for n in range(1, 15)), *(f"I{n}" for n in range(1, 12))]
INPUT_ROWS += [f"C{n}" for n in (1, 2, 3, 4, 5, 6, 7, 9, 11, 12)]


RUN_ROWS = ["I12", *(f"R{n}" for n in range(1, 14))]


def rows() -> list[tuple[str, list[str]]]:
    return [(name, [cell.strip() for cell in cells.split(" | ")]) for name, cells in ROW.findall(PAGE)]


@pytest.mark.parametrize(("name", "cells"), rows(), ids=[name for name, _ in rows()])
def test_every_row_names_tests_that_exist_or_a_reason(name, cells):
    assert len(cells) == 4, "id | fault | behaviour | test | last result"
    named = TEST.findall(cells[2])
    assert named or "no test:" in cells[2], f"{name} names no test and gives no reason"
    assert all(cells)
    for file, *functions in named:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        for function in filter(None, functions):
            defined = re.search(rf"^ *(def|class) {function}\b", source, re.MULTILINE)
            assert defined, f"{name} names tests/{file}.py::{function}, which is not there"


def test_no_row_stands_twice():
    names = [name for name, _ in rows()]
    assert sorted(set(names)) == sorted(names)


def test_every_row_about_input_is_there():
    assert set(INPUT_ROWS) <= {name for name, _ in rows()}


def test_every_row_about_runs_is_there():
    assert set(RUN_ROWS) <= {name for name, _ in rows()}

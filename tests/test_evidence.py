"""docs/evidence.md and README.md say what the committed results say."""

from pathlib import Path

import numpy as np
import pytest

import evidence
from evidence_tables import difference, interval

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", evidence.PAGES, ids=str)
def test_every_table_of_a_page_is_what_the_results_give(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    assert evidence.filled(text) == text, "run `python scripts/evidence.py`"


def test_an_interval_over_equal_values_is_that_value():
    assert interval([np.full(50, 0.25), np.full(50, 0.25)]) == (0.25, 0.25, 0.25)


def test_the_interval_of_a_difference_is_paired():
    one = {0: np.arange(100) % 2.0}
    assert difference(one, {0: one[0] - 0.1}) == "+0.100 [+0.100, +0.100]"


def test_differences_are_over_the_pools_that_both_have():
    assert difference({0: np.ones(5)}, {1: np.ones(5)}) == ""

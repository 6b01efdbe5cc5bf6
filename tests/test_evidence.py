"""docs/evidence.md and README.md say what the committed results say."""

from pathlib import Path

import numpy as np
import pytest

import evidence
import evidence_pictures
from evidence_tables import difference, interval

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", evidence.PAGES, ids=str)
def test_every_table_of_a_page_is_what_the_results_give(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    assert evidence.filled(text) == text, "run `python scripts/evidence.py`"


@pytest.mark.parametrize("name", evidence_pictures.PICTURES)
def test_every_picture_shows_what_the_results_give(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = (evidence_pictures.FOLDER / f"{name}.svg").read_text()
    assert evidence_pictures.shows_the_same(committed, evidence_pictures.drawn(name)), (
        "run `python scripts/evidence.py`"
    )


def test_a_picture_with_another_number_or_word_is_another():
    svg = '<path clip="p0a1b2c3d4e" d="M 10.25 20.5"/><text>full SFT</text>'
    assert evidence_pictures.shows_the_same(svg, svg.replace("10.25", "10.251").replace("0a1b", "b1a0"))
    assert not evidence_pictures.shows_the_same(svg, svg.replace("10.25", "10.35"))
    assert not evidence_pictures.shows_the_same(svg, svg.replace("full SFT", "random"))


def test_an_interval_over_equal_values_is_that_value():
    assert interval([np.full(50, 0.25), np.full(50, 0.25)]) == (0.25, 0.25, 0.25)


def test_the_interval_of_a_difference_is_paired():
    one = {0: np.arange(100) % 2.0}
    assert difference(one, {0: one[0] - 0.1}) == "+0.100 [+0.100, +0.100]"


def test_differences_are_over_the_pools_that_both_have():
    assert difference({0: np.ones(5)}, {1: np.ones(5)}) == ""

"""The books of a run: what was read is accounted for, or the run says that it is not complete."""

import copy

import pytest

from datalloy.accounts import conserve, require_balance
from datalloy.errors import RunError

COUNTS = {
    "sets": {
        "domains": {
            "chart": {"read": 10, "accepted": 7, "rejected": 3},
            "table": {"read": 5, "accepted": 5, "rejected": 0},
        },
        "targets": {"chart": {"read": 9, "accepted": 9, "rejected": 0}},
    },
    "scored": {"ok": 10, "nonfinite": 1, "oom": 1},
    "selected": {"kept": 6, "below_fraction": 4, "not_scored:nonfinite": 1, "not_scored:oom": 1},
    "pending": 0,
}


def changed(*path, value):
    counts = copy.deepcopy(COUNTS)
    inner = counts
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return counts


def test_books_that_balance_are_passed_in_silence(tmp_path):
    assert conserve(COUNTS) == []
    require_balance(COUNTS, tmp_path)


def test_a_run_that_scores_nothing_has_no_scores_to_count():
    assert conserve({"sets": COUNTS["sets"], "pending": 0}) == []


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("sets", "domains", "chart", "rejected"), 2, "domains.chart: 10 records were read, 7 accepted and 2 rejected"),
        (("sets", "targets", "chart", "read"), 10, "targets.chart: 10 records were read, 9 accepted and 0 rejected"),
        (("scored", "nonfinite"), 0, "12 samples of the pool were accepted, 11 scored: .*"),
        (("selected", "kept"), 7, "12 samples of the pool were accepted, 13 selected: .*"),
        (("pending",), 2, "2 units of work were begun and have not ended"),
    ],
)
def test_a_sum_that_does_not_come_out_is_said_and_refused(path, value, line, tmp_path):
    with pytest.raises(RunError, match=rf"do not balance, so it is not complete .*\n  {line}\nRun it again"):
        require_balance(changed(*path, value=value), tmp_path)

"""Drawn pools: what hard questions ask for."""

import json
import random

import pytest

from datalloy.tiny.pools import HARD, NUMBERS, PoolPlan, pool_questions, read_truth, write_pool
from datalloy.tiny.world import DRAW


@pytest.mark.parametrize("skill", ["chart", "counting", "table"])
def test_hard_questions_ask_for_the_numbers_of_easy_ones_in_words_or_plus_one(skill):
    drawing = DRAW[skill](random.Random(0))
    easy = [q for q in pool_questions(drawing, hard=False) if q.answer.isdigit()]
    for hard_as, expected in (("in words", lambda n: NUMBERS[n]), ("plus one", lambda n: str(n + 1))):
        hard = pool_questions(drawing, hard=True, hard_as=hard_as)
        assert [q.answer for q in hard] == [expected(int(q.answer)) for q in easy]
        assert [q.alternatives for q in hard] == [tuple(expected(int(a)) for a in q.alternatives) for q in easy]
        assert all(q.hard and hard_as in q.text and q.answer not in q.alternatives for q in hard)


@pytest.mark.parametrize("hard_as", HARD)
def test_targets_and_held_out_sets_ask_what_the_pool_asks(hard_as, tmp_path):
    plan = PoolPlan(
        {"chart": 9},
        {},
        hard=0.5,
        target_hard=1.0,
        hard_as=hard_as,
        targets=("chart",),
        target_items=4,
        holdout_items=3,
    )
    write_pool(tmp_path, plan, seed=0)
    for name, least in (("chart.target", 4), ("chart.holdout", 3), ("chart", 1)):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert sum(hard_as in row["messages"][0]["content"] for row in rows) >= least


def test_a_domain_may_have_shares_of_faults_of_its_own(tmp_path):
    plan = PoolPlan({"chart": 8, "counting": 8}, {"wrong_answer": 0.5}, {"counting": {}}, targets=(), hard=0.0)
    write_pool(tmp_path, plan, seed=0)
    wrong = [row["domain"] for row in read_truth(tmp_path).values() if row["fault"] == "wrong_answer"]
    assert wrong == ["chart"] * 4


@pytest.mark.parametrize("faults", [{"faults": {"typo": 0.1}}, {"faults_of": {"chart": {"typo": 0.1}}}])
def test_a_fault_that_does_not_exist_is_refused(faults, tmp_path):
    with pytest.raises(ValueError, match=r"unknown faults \['typo'\]"):
        write_pool(tmp_path, PoolPlan(**faults), seed=0)

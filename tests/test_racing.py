"""Mixtures whose values are known item by item."""

import numpy as np
import pytest

from datalloy.errors import ModelError
from datalloy.objective import Objective
from datalloy.racing import LEAST_ITEMS, Evaluations

TARGETS, ITEMS, BLOCKS = 2, 120, 4
MEAN = Objective("mean", np.full(2, 0.5), np.zeros(2), np.full(2, np.inf))
A, B, C, D = np.eye(4)


class Table:
    """Items of known hardness, easier from block to block; a mixture adds its merit and a luck of its own."""

    names = ("a", "b", "c", "d")
    targets = ("first", "second")
    target_V = np.repeat(np.arange(TARGETS), ITEMS)
    block_V = np.tile(np.repeat(np.arange(BLOCKS), ITEMS // BLOCKS), TARGETS)

    def __init__(self, merit_K=(0.0, 0.0, 0.0, 0.0), luck=0.0):
        rng = np.random.default_rng(0)
        self.hard_V = rng.normal(0, 1, TARGETS * ITEMS) + self.block_V
        self.merit_K, self.luck_KV = np.array(merit_K), rng.normal(0, luck, (4, TARGETS * ITEMS))
        self.asked, self.foreseen = [], []

    def values(self, weight_K, block):
        self.asked.append((int(weight_K.argmax()), block))
        value_V = self.hard_V + weight_K @ self.merit_K + weight_K @ self.luck_KV
        return value_V[self.block_V == block]

    def foresee(self, weights, blocks):
        self.foreseen.append(([int(weight_K.argmax()) for weight_K in weights], list(blocks)))


def _evaluated(table, *weights):
    told = Evaluations(table)
    told.evaluate_fully(weights, "design")
    return told


def test_full_evaluations_have_the_plain_means_of_their_items():
    table = Table(luck=0.5)
    mean_NG, _ = _evaluated(table, A, B).means()
    value_NV = table.hard_V + table.luck_KV[:2]
    assert mean_NG == pytest.approx(value_NV.reshape(2, TARGETS, ITEMS).mean(axis=2))


def test_a_mixture_is_not_punished_for_the_block_it_met():
    """Block 0 is the hardest; where mixtures differ by merit alone, one block tells all."""
    told = _evaluated(Table(merit_K=(0, 0.3, 0.7, 0)), A, B)
    told.evaluate(told.add(C, "race"), 0)
    mean_NG, noise_NG = told.means()
    assert mean_NG[2] - mean_NG[0] == pytest.approx([0.7, 0.7])
    assert noise_NG.max() == pytest.approx(0, abs=1e-12)


def test_noise_is_what_mixtures_do_not_share():
    table = Table(luck=0.5)
    _, noise_NG = _evaluated(table, A, B, C, D).means()
    assert noise_NG == pytest.approx(0.5**2 / ITEMS, rel=0.35)


def test_fewer_items_leave_more_noise():
    told = _evaluated(Table(luck=0.5), A, B, C)
    told.evaluate(told.add(D, "race"), 1)
    _, noise_NG = told.means()
    assert noise_NG[3] == pytest.approx(BLOCKS * noise_NG[:3].mean(axis=0), rel=0.5)


def test_what_is_clearly_worse_is_dropped_after_its_first_block_and_the_rest_goes_on():
    table = Table(merit_K=(0, 0, -2, 0.1), luck=0.2)
    told = _evaluated(table, A, B)
    table.asked.clear()
    told.race(np.array([C, D]), "race", 0, MEAN, seed=0)
    assert [block for k, block in table.asked if k == 2] == [0]
    assert [block for k, block in table.asked if k == 3] == list(range(BLOCKS))
    assert told.spent == pytest.approx(2 + 1 + 1 / BLOCKS)


def test_what_is_a_little_worse_is_seldom_dropped_at_once():
    table = Table(merit_K=(0, 0, -0.01, -0.01), luck=0.5)
    told = _evaluated(table, A, B)
    told.race(np.array([C, D]), "race", 0, MEAN, seed=0)
    assert np.isfinite(told.value_NV).all()


def test_for_a_front_nobody_is_dropped():
    told = _evaluated(Table(merit_K=(0, 0, -2, -2)), A, B)
    told.race(np.array([C, D]), "race", 0, Objective("pareto", np.full(2, 0.5), np.zeros(2), np.full(2, np.inf)), 0)
    assert np.isfinite(told.value_NV).all()


def test_nobody_is_judged_by_a_handful_of_items():
    table = Table(merit_K=(0, 0, -2, 0))
    few = LEAST_ITEMS // 2 - 1
    table.block_V = np.tile(np.where(np.arange(ITEMS) < few, 0, 1), TARGETS)
    told = _evaluated(table, A, B)
    table.asked.clear()
    told.race(C[None], "race", 0, MEAN, seed=0)
    assert table.asked == [(2, 0), (2, 1)]


def test_what_was_seen_before_dropping_is_kept():
    told = _evaluated(Table(merit_K=(0, 0, -2, 0)), A, B)
    told.race(C[None], "race", 0, MEAN, seed=0)
    assert np.isfinite(told.value_NV[2]).sum() == TARGETS * ITEMS // BLOCKS
    assert told.stages == ["design", "design", "race"]


def test_a_race_is_the_same_for_the_same_seed():
    values = []
    for _ in range(2):
        told = _evaluated(Table(merit_K=(0, 0, -0.1, -0.1), luck=0.5), A, B)
        told.race(np.array([C, D]), "race", 0, MEAN, seed=4)
        values.append(told.value_NV)
    assert np.array_equal(*values, equal_nan=True)


def test_values_that_are_not_finite_are_refused_with_mixture_and_block():
    table = Table()
    table.hard_V[0] = np.inf
    with pytest.raises(ModelError, match=r"mixture \[1.0, 0.0, 0.0, 0.0\], block 0: 1 of 60 values are not finite"):
        _evaluated(table, A)


def test_values_of_another_number_of_items_are_refused():
    table = Table()
    table.values = lambda *_: np.zeros(7)
    with pytest.raises(ModelError, match=r"found values of shape \(7,\), the block has 60 items"):
        _evaluated(table, A)

"""The search on a made-up world whose best mixture is known: items answered by chance along concave quadratics."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from datalloy.errors import ModelError
from datalloy.objective import Objective
from datalloy.search import auto_evaluations, search
from datalloy.simplex import Group, Simplex

BLOCKS, ITEMS = 4, 80


class World:
    """Targets that are best at known mixtures. `misled`: the loss is best elsewhere than the metric."""

    def __init__(self, domains, targets, seed, *, misled=False):
        rng = np.random.default_rng((seed, domains, targets))
        self.names = tuple(f"d{k}" for k in range(domains))
        self.targets = tuple(f"t{g}" for g in range(targets))
        self.target_V = np.repeat(np.arange(targets), ITEMS)
        self.block_V = np.tile(np.arange(ITEMS) % BLOCKS, targets)
        self.best_GK = rng.dirichlet(np.full(domains, 0.5), targets)
        self.loss_best_GK = rng.dirichlet(np.full(domains, 0.5), targets) if misled else self.best_GK
        self.level_V = rng.normal(0.5, 1.0, targets * ITEMS)
        self.bar_V = rng.uniform(size=targets * ITEMS)
        self.asked = []

    def _logits(self, weight_K, best_GK):
        away_GK = weight_K - best_GK
        return self.level_V - 3 * (away_GK**2).sum(axis=1)[self.target_V], -6 * away_GK

    def slopes(self, weight_K):
        logit_V, logit_slope_GK = self._logits(weight_K, self.loss_best_GK)
        loss_G = self._means(np.logaddexp(0, -logit_V))
        return loss_G, -self._means(expit(-logit_V))[:, None] * logit_slope_GK

    def values(self, weight_K, block):
        self.asked.append((weight_K.tobytes(), block))
        right_V = expit(self._logits(weight_K, self.best_GK)[0]) > self.bar_V
        return right_V[self.block_V == block].astype(float)

    def foresee(self, weights, blocks):
        """Nothing is to be gained: answers come at once."""

    def truth(self, weight_K):
        return self._means(expit(self._logits(weight_K, self.best_GK)[0]))

    def _means(self, value_V):
        return np.array([value_V[self.target_V == g].mean() for g in range(len(self.targets))])

    def regret(self, weight_K, score=np.mean):
        """Points lost against the best mixture of a dense sample around the targets' own best ones."""
        near_NK = np.random.default_rng(0).dirichlet(np.ones(len(self.targets)), 3000) @ self.best_GK
        return 100 * (max(score(self.truth(w)) for w in near_NK) - score(self.truth(weight_K)))


def wish(world, kind="mean", **changes):
    targets = len(world.targets)
    plain = Objective(kind, np.full(targets, 1 / targets), np.zeros(targets), np.full(targets, np.inf))
    return replace(plain, **changes)


def find(world, objective=None, *, simplex=None, slopes_tell=False, evaluations="auto", seed=0):
    simplex = simplex or Simplex.free(world.names)
    return search(world, simplex, objective or wish(world), slopes_tell=slopes_tell, evaluations=evaluations, seed=seed)


class Losses(World):
    """The same, with negated losses for values: what `metric: loss` is."""

    def values(self, weight_K, block):
        loss_V = np.logaddexp(0, -self._logits(weight_K, self.loss_best_GK)[0])
        return -loss_V[self.block_V == block]


@pytest.mark.parametrize("domains", [3, 4])
def test_a_few_evaluations_find_a_nearly_best_mixture(domains):
    world = World(domains, 3, seed=1)
    found = find(world)
    assert world.regret(found.weight_K) < 0.5 < world.regret(np.full(domains, 1 / domains))
    assert found.evaluations <= auto_evaluations(domains)


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_domains_are_within_half_a_point_after_45_evaluations(seed):
    world = World(20, 6, seed)
    found = find(world, evaluations=45, seed=seed)
    assert world.regret(found.weight_K) < 0.5
    assert found.evaluations <= 45
    assert found.slope_calls <= 8


def test_evaluations_correct_a_loss_that_misleads():
    world = World(4, 3, seed=3, misled=True)
    by_loss, found = find(world, slopes_tell=True), find(world, evaluations=25)
    assert world.regret(found.weight_K) < 0.5 * world.regret(by_loss.weight_K)


def test_where_the_loss_is_the_metric_slopes_decide_and_two_evaluations_confirm():
    world = Losses(3, 3, seed=0)
    found = find(world, slopes_tell=True)
    assert found.evaluations == 2
    assert [row.stage for row in found.rows].count("confirm") == 2
    confirmed = [row for row in found.rows if row.stage == "confirm" and np.array_equal(row.weight_K, found.weight_K)]
    assert np.allclose(confirmed[0].value_G, found.predict(found.weight_K[None])[0][0], atol=0.02)


def test_the_same_answers_give_the_same_search():
    first, second = World(4, 2, seed=5), World(4, 2, seed=5)
    a, b = find(first, seed=7), find(second, seed=7)
    assert first.asked == second.asked
    assert np.array_equal(a.weight_K, b.weight_K)
    assert np.array_equal(a.interval_K2, b.interval_K2)


def test_a_candidate_is_asked_for_each_block_once_at_most():
    world = World(4, 2, seed=5)
    find(world)
    assert len(world.asked) == len(set(world.asked))


def test_limits_are_kept_by_every_candidate_and_by_what_is_found():
    world = World(4, 2, seed=2)
    simplex = Simplex(world.names, np.array([0.1, 0, 0, 0]), np.array([1, 0.3, 1, 1]), (Group(("d2", "d3"), 0.2, 0.5),))
    found = find(world, simplex=simplex)
    assert all(simplex.contains(row.weight_K, 1e-6) for row in found.rows)
    assert simplex.contains(found.weight_K, 1e-6)


def test_limits_are_kept_among_many_domains_too():
    world = World(14, 3, seed=2)
    floor_K, cap_K = np.full(14, 0.01), np.full(14, 0.3)
    simplex = Simplex(world.names, floor_K, cap_K)
    found = find(world, simplex=simplex, evaluations=20)
    assert all(simplex.contains(row.weight_K, 1e-6) for row in found.rows)
    assert simplex.contains(found.weight_K, 1e-6)


def test_the_worst_target_is_lifted_where_it_is_asked_for():
    world = World(3, 3, seed=4)
    by_mean, by_worst = find(world), find(world, wish(world, "worst"))
    assert world.truth(by_worst.weight_K).min() > world.truth(by_mean.weight_K).min() - 0.002
    assert world.regret(by_worst.weight_K, np.min) < 1.5


def test_a_guard_rail_moves_the_mixture_until_it_holds():
    world = World(3, 2, seed=6)
    free = find(world, wish(world, "weighted", weight_G=np.array([1.0, 0.0])))
    value = world.truth(free.weight_K)[1]
    railed = wish(world, "weighted", weight_G=np.array([1.0, 0.0]), base_G=np.array([0.0, value + 0.06]))
    kept = find(world, replace(railed, max_fall_G=np.array([np.inf, 0.0])), evaluations=20)
    assert world.truth(kept.weight_K)[1] > value + 0.03


def test_a_pareto_search_returns_a_front_that_nothing_beats():
    world = World(3, 2, seed=8)
    found = find(world, wish(world, "pareto"), evaluations=20)
    front_NG = np.array([found.rows[i].value_G for i in found.front])
    rows_NG = np.array([row.value_G for row in found.rows if row.stage != "slopes"])
    assert len(front_NG) >= 2
    assert not any((row >= point).all() and (row > point).any() for point in front_NG for row in rows_NG)


def test_the_interval_of_a_weight_holds_it():
    found = find(World(4, 3, seed=1))
    low_K, high_K = found.interval_K2.T
    assert (low_K <= found.weight_K).all()
    assert (found.weight_K <= high_K).all()


def test_an_answer_that_is_not_finite_is_refused():
    world = World(3, 2, seed=0)
    world.values = lambda _, block: np.full((world.block_V == block).sum(), np.nan)
    with pytest.raises(ModelError, match="not finite"):
        find(world)

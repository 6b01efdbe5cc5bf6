"""What is recommended from numbers alone, on made-up surfaces whose best mixture is known."""

import json

import numpy as np
import pytest

from datalloy import asktell
from datalloy.errors import DataError
from datalloy.mixture import Mixture, read_candidates
from datalloy.told import STEPS
from datalloy.told_recipe import ToldRecipe

NAMES = ("a", "b", "c")
BEST_GK = np.array([[0.6, 0.3, 0.1], [0.4, 0.5, 0.1]])  # of both targets together: half way
TARGETS = ("x", "y")


def a_recipe(**changes):
    data = {
        "name": "made-up",
        "domains": {name: {} for name in NAMES},
        "targets": {name: {} for name in TARGETS},
        "mixture": {"metric": "told"},
    }
    return ToldRecipe.model_validate(data | changes)


def value_G(weight_K, interaction=0.0):
    """Quadratics; `interaction` is what training together gains and merging does not see."""
    pairs = (1 - (np.asarray(weight_K) ** 2).sum()) / 2
    return 0.8 - ((weight_K - BEST_GK) ** 2).sum(axis=1) + interaction * pairs


def rows_of(weight_NK, kind, *, noise=0.0, error=0.005, seed=0, interaction=0.0):
    rng = np.random.default_rng(seed)
    rows = []
    for weight_K in weight_NK:
        noisy_G = value_G(weight_K, interaction) + noise * rng.standard_normal(2)
        row = {"weights": dict(zip(NAMES, np.round(weight_K, 4).tolist(), strict=True)), "kind": kind}
        row["values"] = dict(zip(TARGETS, noisy_G.tolist(), strict=True))
        if error:
            row["standard_errors"] = dict.fromkeys(TARGETS, error)
        rows.append(row)
    return rows


def some_mixtures(count, seed=0):
    draws = np.random.default_rng(seed).dirichlet(np.ones(3), count)
    return np.round(np.vstack([np.eye(3), [[0.3334, 0.3333, 0.3333]], draws]), 4)


@pytest.fixture
def tell(tmp_path):
    def tell(rows, recipe=None, run="run"):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        return asktell.tell(recipe or a_recipe(), [path], tmp_path / run)[1]

    return tell


def loss_of(mixture):
    """Score lost against the best mixture."""
    weight_K = np.array([mixture.searched[name] for name in NAMES])
    return value_G(BEST_GK.mean(axis=0)).mean() - value_G(weight_K).mean()


# --- a table of trained mixtures, and nothing else


def test_a_table_gives_a_recommendation_with_interval_and_verdict(tell, tmp_path):
    advice = tell(rows_of(some_mixtures(8), "trained", noise=0.005))
    assert advice.mixture.verdict == "trust"
    assert loss_of(advice.mixture) < 0.005
    for name, best in zip(NAMES, BEST_GK.mean(axis=0), strict=True):
        low, high = advice.mixture.interval[name]
        assert low - 0.05 <= best <= high + 0.05
    assert Mixture.read(tmp_path / "run/mixture/mixture.json") == advice.mixture


def test_gains_over_uniform_shares_are_in_their_intervals(tell):
    held = 0
    for seed in range(5):
        rows = rows_of(some_mixtures(8, seed), "trained", noise=0.01, error=0.01, seed=seed)
        mixture = tell(rows, run=str(seed)).mixture
        true_gain = value_G(list(mixture.searched.values())).mean() - value_G(np.full(3, 1 / 3)).mean()
        low, high = mixture.expected_gain_vs_uniform.interval
        held += low <= true_gain <= high
    assert held >= 4


def test_a_table_of_noise_recommends_uniform_shares(tell):
    rng = np.random.default_rng(1)
    rows = rows_of(some_mixtures(8), "trained", error=0.05)
    for row in rows:
        row["values"] = dict(zip(TARGETS, (0.5 + 0.05 * rng.standard_normal(2)).tolist(), strict=True))
    advice = tell(rows)
    assert advice.mixture.verdict == "use uniform"
    assert advice.mixture.weights["a"] == pytest.approx(1 / 3, abs=1e-3)


def test_the_order_of_telling_changes_nothing(tell):
    rows = rows_of(some_mixtures(6), "trained", noise=0.005)
    at_once = tell(rows, run="one")
    tell(rows[6:], run="two")
    tell(rows[3:], run="two")
    assert tell(rows[:3], run="two").mixture == at_once.mixture


def test_agreement_is_of_mixtures_that_were_left_out(tell):
    good = tell(rows_of(some_mixtures(8), "trained", noise=0.001), run="good").mixture.agreement
    assert good.spearman.value > 0.8
    assert good.regret is None
    few = tell(rows_of(some_mixtures(0)[:2], "trained"), run="few").mixture.agreement
    assert few.spearman.value is None


def test_errors_that_were_not_told_are_estimated_and_said(tell):
    advice = tell(rows_of(some_mixtures(12), "trained", noise=0.01, error=0))
    assert set(advice.estimated) == set(TARGETS)
    assert all(0.001 < error < 0.1 for error in advice.estimated.values())
    assert any("no standard error of x was told" in line for line in asktell.advice_lines(advice))
    assert loss_of(advice.mixture) < 0.01


def test_the_number_of_items_stands_for_the_error_of_shares(tell):
    rows = [replace_errors(row, 400) for row in rows_of(some_mixtures(6), "trained")]
    assert tell(rows).estimated == {}


def replace_errors(row, items):
    return {key: value for key, value in row.items() if key != "standard_errors"} | {
        "items": dict.fromkeys(TARGETS, items)
    }


def test_of_a_loss_less_is_better(tell):
    rows = rows_of(some_mixtures(8), "trained", noise=0.002)
    for row in rows:
        row["values"] = {name: -value for name, value in row["values"].items()}
    recipe = a_recipe(targets={name: {"higher_is_better": False} for name in TARGETS})
    assert loss_of(tell(rows, recipe).mixture) < 0.005


def test_one_mixture_is_too_few(tell):
    assert tell(rows_of(some_mixtures(0)[:1], "trained")) is None


# --- merged numbers, and trained ones to correct them


def test_merged_numbers_alone_are_not_trusted_as_if_they_were_trained(tell):
    advice = tell(rows_of(some_mixtures(8), "merged"))
    assert loss_of(advice.mixture) < 0.01
    assert advice.mixture.expected_gain_vs_uniform.source == "predicted"
    width = np.diff(advice.mixture.expected_gain_vs_uniform.interval)
    both = tell(rows_of(some_mixtures(8), "trained"), run="both")
    assert width > np.diff(both.mixture.expected_gain_vs_uniform.interval)


def test_trained_numbers_correct_merged_ones(tell):
    """Uniform shares gain most by training together, so less is left for the pick than merges promise."""
    merged = rows_of(some_mixtures(8), "merged")
    promised = tell(merged).mixture
    pick_K = np.array(list(promised.searched.values()))
    told = tell(rows_of([np.array([0.3334, 0.3333, 0.3333]), pick_K], "trained", interaction=0.6)).mixture
    searched_K = np.array(list(told.searched.values()))
    true_gain = (value_G(searched_K, 0.6) - value_G(np.full(3, 1 / 3), 0.6)).mean()
    assert abs(told.expected_gain_vs_uniform.mean - true_gain) < abs(promised.expected_gain_vs_uniform.mean - true_gain)
    assert told.expected_gain_vs_uniform.mean == pytest.approx(true_gain, abs=0.01)
    assert told.agreement.spearman.mixtures == 5


def test_all_numbers_stand_in_the_table_of_candidates(tell, tmp_path):
    tell([*rows_of(some_mixtures(2), "merged"), *rows_of(some_mixtures(1)[3:], "trained")])
    names, targets, rows = read_candidates(tmp_path / "run/mixture/candidates.parquet")
    assert (names, targets) == (NAMES, TARGETS)
    assert [row.stage for row in rows] == ["merged"] * 6 + ["trained"] * 2


# --- ask and tell in turn


def ask_and_tell(tmp_path, recipe, rounds, count, **asked):
    for _ in range(rounds):
        proposals = asktell.ask(recipe, tmp_path / "run", count=count, **asked)
        rows = [rows_of([p.weight_K], p.kind, noise=0.003, seed=i)[0] for i, p in enumerate(proposals) if p.shares]
        path = tmp_path / "answers.json"
        path.write_text(json.dumps(rows))
        _, advice = asktell.tell(recipe, [path], tmp_path / "run")
    return advice


def test_asking_in_rounds_finds_the_best_mixture(tmp_path):
    advice = ask_and_tell(tmp_path, a_recipe(), rounds=2, count=6)
    assert loss_of(advice.mixture) < 0.01
    assert advice.mixture.spent.evaluations == 12


def test_verify_proposes_the_pick_and_uniform_shares_and_measures_their_difference(tmp_path):
    ask_and_tell(tmp_path, a_recipe(), rounds=2, count=5)
    proposals = asktell.ask(a_recipe(), tmp_path / "run", count=3, verify=True)
    assert [p.role for p in proposals][:2] == ["pick", "uniform"]
    advice = ask_and_tell(tmp_path, a_recipe(), rounds=1, count=3, verify=True)
    assert advice.mixture.expected_gain_vs_uniform.source == "measured"
    assert advice.mixture.verdict == "trust"


def test_proposals_keep_the_limits(tmp_path):
    recipe = a_recipe(
        domains={"a": {"min_share": 0.2}, "b": {}, "c": {"samples": 100, "max_epochs": 2}},
        samples=1000,
    )
    advice = ask_and_tell(tmp_path, recipe, rounds=2, count=6)
    lines = (tmp_path / "run/mixture/proposals.jsonl").read_text().splitlines()
    for weights in [json.loads(line)["weights"] for line in lines] + [dict(advice.mixture.searched)]:
        assert weights["a"] >= 0.2 - 1 / STEPS
        assert weights["c"] <= 0.2 + 1 / STEPS


def test_told_mixtures_outside_the_limits_are_evidence_and_no_pick(tell):
    recipe = a_recipe(domains={"a": {}, "b": {}, "c": {"min_share": 0.3}})
    advice = tell(rows_of(some_mixtures(8), "trained"), recipe)
    assert advice.mixture.searched["c"] >= 0.3 - 1 / STEPS


# --- guard rails


RAILED = {"mixture": {"metric": "told", "guard_rails": {"x": 0.02}}}


def test_guard_rails_ask_for_the_base_and_need_it(tell, tmp_path):
    recipe = a_recipe(**RAILED)
    assert "base" in [p.candidate for p in asktell.ask(recipe, tmp_path / "run")]
    with pytest.raises(DataError, match="whose numbers were not told: tell them as the candidate base"):
        tell(rows_of(some_mixtures(6), "trained"), recipe)
    base = {"candidate": "base", "values": {"x": 0.8, "y": 0.1}}
    railed = tell([base], recipe).mixture
    assert value_G(list(railed.searched.values()))[0] >= 0.8 - 0.02 - 0.01
    free = tell(rows_of(some_mixtures(6), "trained"), run="free").mixture
    assert railed.searched["a"] > free.searched["a"]

"""A sample that breaks a batch costs itself alone: its state is typed, the bits of all others are as without it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from datalloy.attempts import Attempt
from datalloy.config import load_recipe
from datalloy.errors import DataError, EnvironmentFault, ModelError
from datalloy.run import Run
from datalloy.scorers import score_isolated
from datalloy.scorers.baselines import LossScorer
from datalloy.scorers.one_step import ExactScorer, ScoreBlock
from datalloy.scorers.step import Steppable, StepRule
from datalloy.scorers.tail import TailScorer
from datalloy.scorers.taps import Taps
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.vlm import VLM, Encoded
from datalloy.workflows import Workflow

BAD = 4  # place of the bad sample in the pool


def scorer_of(name: str, proxy: VLM, items, drawn) -> object:
    if name == "exact":
        return ExactScorer(proxy, items, Steppable(list(proxy.model.parameters())), rule=StepRule("sgd"), step=0.1)
    if name == "tail":
        return TailScorer(proxy, items, Taps(proxy, 1), check=drawn[8], rule=StepRule("sgd"), step=0.1, batch_size=4)
    return LossScorer(proxy, targets=2, batch_size=4)


@pytest.fixture
def poison(pool, targets, proxy) -> int:
    """A token that no sample has."""
    samples = [*pool, *targets["first"], *targets["second"]]
    used = torch.cat([sample.inputs["input_ids"].flatten() for sample in samples]).tolist()
    return min(set(range(len(proxy.tokenizer))) - set(used) - set(proxy.chat.control_tokens))


@pytest.fixture
def with_poison(pool, poison) -> list[Encoded]:
    """The pool, one sample of which has that token in its answer."""
    ids, labels = pool[BAD].inputs["input_ids"].clone(), pool[BAD].labels.clone()
    ids[0, -2] = labels[0, -2] = poison
    bad = dataclasses.replace(pool[BAD], inputs={**pool[BAD].inputs, "input_ids": ids}, labels=labels)
    return [bad if n == BAD else sample for n, sample in enumerate(pool)]


def raise_on(poison: int, error: Exception, monkeypatch) -> None:
    losses = VLM.losses

    def fail(self, batch, **more):
        if (batch["input_ids"] == poison).any():
            raise error
        return losses(self, batch, **more)

    monkeypatch.setattr(VLM, "losses", fail)


def assert_rest_is_equal(block: ScoreBlock, expected: ScoreBlock) -> None:
    rest = np.arange(len(expected.loss_N)) != BAD
    for name in ("loss_N", "utility_N", "utility_NG", "error_N"):
        np.testing.assert_array_equal(getattr(block, name)[rest], getattr(expected, name)[rest])
        assert np.isnan(getattr(block, name)[BAD]).all() or name == "error_N"


@pytest.mark.parametrize(
    ("name", "error", "state"),
    [
        ("loss", RuntimeError("shape mismatch"), "compute_error"),
        ("tail", IndexError("index out of range in self"), "compute_error"),
        ("exact", torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        ("loss", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        ("loss", MemoryError(), "oom"),
    ],
)
def test_a_sample_that_fails_is_set_apart_and_the_rest_keeps_its_bits(
    name, error, state, proxy, items, drawn, pool, poison, with_poison, monkeypatch
):
    scorer = scorer_of(name, proxy, items, drawn)
    expected = scorer.score(pool)
    raise_on(poison, error, monkeypatch)
    found = score_isolated(scorer, with_poison, keys_of(pool), targets=2)
    assert found.state_N == [state if n == BAD else "ok" for n in range(len(pool))]
    assert list(found.errors) == [BAD]
    assert_rest_is_equal(found.block, expected)


@pytest.mark.parametrize("name", ["loss", "tail", "exact"])
def test_a_sample_that_is_not_finite_leaves_the_bits_of_the_rest(name, proxy, items, drawn, pool):
    scorer = scorer_of(name, proxy, items, drawn)
    expected = scorer.score(pool)
    blind = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in pool[BAD].inputs.items()}
    samples = [dataclasses.replace(s, inputs=blind) if n == BAD else s for n, s in enumerate(pool)]
    found = score_isolated(scorer, samples, keys_of(pool), targets=2)
    assert found.state_N == ["nonfinite" if n == BAD else "ok" for n in range(len(pool))]
    rest = np.arange(len(pool)) != BAD
    np.testing.assert_array_equal(found.block.utility_N[rest], expected.utility_N[rest])
    np.testing.assert_array_equal(found.block.loss_N[rest], expected.loss_N[rest])


def keys_of(samples) -> list[str]:
    return [str(n) for n in range(len(samples))]


# --- with a scorer of numbers ----------------------------------------------------------------------------------------


def numbered(number: int) -> Encoded:
    return Encoded({"input_ids": torch.tensor([[number, 2]])}, torch.tensor([[-100, 2]]))


class Numbers:
    """Scores a sample by its first token; fails as it is told to. Remembers how many it was given at once."""

    def __init__(self, fails=lambda numbers: None) -> None:
        self.fails, self.calls = fails, []

    def score(self, samples) -> ScoreBlock:
        numbers = [int(sample.inputs["input_ids"][0, 0]) for sample in samples]
        self.calls.append(numbers)
        self.fails(numbers)
        value_N = np.array(numbers, dtype=float)
        return ScoreBlock(value_N, value_N[:, None], value_N, np.full(len(numbers), np.nan))


SAMPLES = [numbered(n) for n in range(10, 26)]


def failing(*bad: int):
    def fail(numbers: list[int]) -> None:
        if set(bad) & set(numbers):
            raise RuntimeError("cannot")

    return fail


def test_where_nothing_fails_all_are_scored_in_one_call():
    scorer = Numbers()
    assert score_isolated(scorer, SAMPLES, keys_of(SAMPLES), targets=1).state_N == ["ok"] * 16
    assert len(scorer.calls) == 1


def test_several_bad_samples_are_found_and_the_last_call_has_the_full_layout():
    scorer = Numbers(failing(11, 17, 25))
    found = score_isolated(scorer, SAMPLES, keys_of(SAMPLES), targets=1)
    assert [n for n, state in enumerate(found.state_N) if state != "ok"] == [1, 7, 15]
    assert len(scorer.calls[-1]) == 16
    assert np.array_equal(np.isnan(found.block.loss_N), [n in (1, 7, 15) for n in range(16)])


def test_what_fails_only_together_is_scored_in_parts():
    """As where a batch does not fit into memory, and each of its samples does."""

    def fail(numbers: list[int]) -> None:
        if len(numbers) > 4:
            raise MemoryError

    found = score_isolated(Numbers(fail), SAMPLES, keys_of(SAMPLES), targets=1)
    assert found.state_N == ["ok"] * 16
    assert found.block.loss_N.tolist() == list(range(10, 26))


def test_where_the_stand_in_fails_too_the_rest_is_scored_without_it():
    def fail(numbers: list[int]) -> None:
        if len(numbers) > 15 or 13 in numbers:
            raise MemoryError

    found = score_isolated(Numbers(fail), SAMPLES, keys_of(SAMPLES), targets=1)
    assert [n for n, state in enumerate(found.state_N) if state != "ok"] == [3]
    assert np.nansum(found.block.loss_N) == sum(range(10, 26)) - 13


def test_a_fault_that_hits_every_sample_is_raised_as_it_came():
    with pytest.raises(RuntimeError, match="cannot"):
        score_isolated(Numbers(failing(*range(10, 26))), SAMPLES, keys_of(SAMPLES), targets=1)


@pytest.mark.parametrize("error", [ModelError("not this family"), EnvironmentFault("disk"), OSError("disk")])
def test_faults_that_are_not_a_samples_are_raised_at_once(error):
    def fail(numbers: list[int]) -> None:
        raise error

    scorer = Numbers(fail)
    with pytest.raises(type(error)):
        score_isolated(scorer, SAMPLES, keys_of(SAMPLES), targets=1)
    assert len(scorer.calls) == 1


def test_a_single_sample_that_fails_has_a_row_of_its_own():
    found = score_isolated(Numbers(failing(10)), SAMPLES[:1], ["0"], targets=3)
    assert found.state_N == ["compute_error"]
    assert found.block.utility_NG.shape == (1, 3)


def killed_at(path: Path, *keys: str | None) -> Attempt:
    """An attempt after others that were killed at these samples; None: while working on all."""
    for key in keys:
        Attempt(path).working_on(key)
    return Attempt(path)


def test_after_a_kill_samples_are_tried_one_at_a_time_and_then_scored_as_ever(tmp_path):
    scorer = Numbers()
    with killed_at(tmp_path / "unit", None) as attempt:
        found = score_isolated(scorer, SAMPLES, keys_of(SAMPLES), targets=1, attempt=attempt)
    assert [len(numbers) for numbers in scorer.calls] == [1] * 16 + [16]
    assert found.state_N == ["ok"] * 16


def test_a_sample_that_killed_twice_is_not_touched_again(tmp_path):
    scorer = Numbers()
    with killed_at(tmp_path / "unit", None, "3", "3") as attempt:
        found = score_isolated(scorer, SAMPLES, keys_of(SAMPLES), targets=1, attempt=attempt)
    assert [state for state in found.state_N if state != "ok"] == ["killed"]
    assert np.isnan(found.block.loss_N[3])
    assert [len(numbers) for numbers in scorer.calls] == [16]
    assert 13 not in scorer.calls[0]


def test_the_suspect_comes_first(tmp_path):
    scorer = Numbers()
    with killed_at(tmp_path / "unit", None, "5") as attempt:
        score_isolated(scorer, SAMPLES, keys_of(SAMPLES), targets=1, attempt=attempt)
    assert scorer.calls[0] == [15]


# --- in a run --------------------------------------------------------------------------------------------------------

RECIPE = """\
name: small
base: tiny
domains: {chart: {path: data/chart.jsonl}}
targets: {chart: {path: data/chart.target.jsonl, metric: loss}}
score: {method: low_loss, warmup_fraction: 0}
"""


def test_a_run_records_the_sample_and_goes_on_where_the_budget_allows(tmp_path, monkeypatch, caplog):
    write_pool(tmp_path / "data", PoolPlan({"chart": 9}, targets=("chart",), target_items=8, holdout_items=1), seed=0)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with Run(recipe, tmp_path / "undisturbed") as run:
        expected = Workflow(run).score()
    score, bad = LossScorer.score, expected.length_tokens.max()

    def fail_on_the_longest(scorer: LossScorer, samples: list[Encoded]) -> ScoreBlock:
        if any(sample.length == bad and sample.inputs["pixel_values"].std() > 0 for sample in samples):
            raise RuntimeError("cannot")
        return score(scorer, samples)

    monkeypatch.setattr(LossScorer, "score", fail_on_the_longest)
    is_bad = expected.length_tokens == bad
    state = rf"{is_bad.sum()} of 9 samples could not be scored by loss \({{'compute_error': {is_bad.sum()}}}\)"
    with Run(recipe, tmp_path / "run") as run, pytest.raises(DataError, match=state):
        Workflow(run).score()
    assert "is not scored (compute_error): RuntimeError('cannot')" in caplog.text
    monkeypatch.setattr(LossScorer, "score", None)  # what is scored is not scored again
    with Run(load_recipe(tmp_path / "recipe.yaml", ["max_rejected_fraction=0.9"]), tmp_path / "run") as run:
        table = Workflow(run).score()
        assert not [*run.path("attempts").rglob("*.json")]
    assert (table.state == "compute_error").tolist() == is_bad.tolist()
    np.testing.assert_array_equal(table.loss, np.where(is_bad, np.nan, expected.loss))


# --- weights that are put back ---------------------------------------------------------------------------------------


def test_weights_that_are_not_put_back_are_noticed(proxy, monkeypatch):
    vlm = proxy.copy()
    monkeypatch.setattr("datalloy.scorers.step.CHECK_EVERY", 2)
    steppable = Steppable(list(vlm.model.parameters()))
    direction = [torch.ones_like(p) for p in steppable.parameters]
    for _ in range(2):
        with steppable.moved(direction, 0.1):
            pass
    with steppable.moved(direction, 0.1):
        pass
    bits = steppable._originals[0].view(torch.int32)
    bits.view(-1)[0] ^= 1  # one bit of the copy, as faulty memory would
    with (
        pytest.raises(ModelError, match="after 4 simulated steps the proxy's weights are not those"),
        steppable.moved(direction, 0.1),
    ):
        pass

"""A made-up verdict, and domains of numbered samples."""

import json
import random
from collections import Counter
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from datalloy.errors import DataError
from datalloy.mixture import (
    DomainShare,
    Mixture,
    Spent,
    materialise,
    plan_shares,
    read_candidates,
    write_candidates,
)
from datalloy.uncertainty import Interval, RankAgreement
from datalloy.verdict import Agreement, Gain, Regret, Verdict

WEIGHTS = {"chart": 0.5, "table": 0.3, "count": 0.2}
VERDICT = Verdict(
    verdict="trust",
    trusted=True,
    reason="Training on the pick gains +0.0300.",
    confidence=0.95,
    gain_vs_uniform=Gain(0.03, Interval(0.01, 0.05), "measured"),
    gain_vs_size_proportional=Gain(0.02, Interval(-0.01, 0.05), "predicted"),
    agreement=Agreement(
        RankAgreement(0.8, Interval(-0.2, 1.0), 6),
        RankAgreement(0.7, Interval(-0.3, 1.0), 6),
        RankAgreement(None, Interval(-1.0, 1.0), 1),
        RankAgreement(None, Interval(-1.0, 1.0), 1),
        Regret(0.0, Interval(0.0, 0.01)),
    ),
    merge_score=None,
)


def judged(weights=WEIGHTS, **changes):
    return Mixture.judged(
        weights,
        {name: Interval(0.0, 1.0) for name in weights},
        replace(VERDICT, **changes),
        searched=weights,
        objective="mean",
        metric="loss",
        judged_by="loss",
        spent=Spent(slope_calls=6, evaluations=14, runs=3),
    )


# --- the artefact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [judged(), judged(verdict="deploy the merge", merge_score=0.7)])
def test_a_mixture_reads_back_as_it_was_written(tmp_path, mixture):
    mixture.write(tmp_path / "mixture.json")
    assert Mixture.read(tmp_path / "mixture.json") == mixture


def test_the_file_says_what_the_design_promises(tmp_path):
    judged().write(tmp_path / "mixture.json")
    data = json.loads((tmp_path / "mixture.json").read_text())
    assert data["weights"] == WEIGHTS
    assert data["expected_gain_vs_uniform"] == {
        "mean": 0.03,
        "interval": [0.01, 0.05],
        "source": "measured",
        "training_sd": None,
        "chance": None,
    }
    assert data["trusted"] is True
    assert data["spent"] == {"slope_calls": 6, "evaluations": 14, "runs": 3}
    assert data["agreement"]["spearman_without_vertices"] == {"value": None, "interval": [-1, 1], "mixtures": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema version 9, this Datalloy reads version 2"),
        ({"trusted": "yes"}, "no mixture of Datalloy: trusted"),
        ({"more": 1}, "no mixture of Datalloy: more"),
        ({"weights": {"chart": 0.4, "table": 0.3, "count": 0.2}}, "add up to one"),
        ({"verdict": "maybe"}, "no mixture of Datalloy: verdict"),
    ],
)
def test_another_file_is_refused_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "mixture.json"
    judged().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Mixture.read(path)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "mixture.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"mixture\.json cannot be read as a mixture"):
        Mixture.read(path)


@pytest.mark.parametrize("change", [{"interval": {"chart": Interval(0, 1)}}, {"searched": {"chart": 1.0}}])
def test_shares_and_intervals_are_of_the_same_domains(change):
    with pytest.raises(DataError, match="must be of the same domains"):
        replace(judged(), **change)


# --- shares into samples ---------------------------------------------------------------------------------------------


@st.composite
def pools(draw):
    """Weights, ids by domain, a total and a seed; domains of weight zero may be empty."""
    parts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any))
    weights = {f"d{k}": part / sum(parts) for k, part in enumerate(parts)}
    ids = {
        name: [f"{name}-{i}" for i in range(draw(st.integers(1 if weight else 0, 12)))]
        for name, weight in weights.items()
    }
    return weights, ids, draw(st.integers(1, 80)), draw(st.integers(0, 2**32))


def by_domain(rows):
    return {name: [id for domain, id in rows if domain == name] for name in {domain for domain, _ in rows}}


@given(pools())
def test_counts_are_the_shares_to_less_than_one_sample_and_sum_to_the_total(pool):
    weights, ids, total, seed = pool
    rows = materialise(weights, ids, total, seed)
    count = Counter(domain for domain, _ in rows)
    assert len(rows) == total
    assert all(abs(count[name] - weight * total) < 1 for name, weight in weights.items())


@given(pools())
def test_no_sample_is_used_twice_more_often_than_another_of_its_domain(pool):
    weights, ids, total, seed = pool
    for name, taken in by_domain(materialise(weights, ids, total, seed)).items():
        times = Counter(taken)
        counts = [times[id] for id in ids[name]]
        assert max(counts) - min(counts) <= 1


@given(pools())
def test_a_sample_comes_again_only_after_all_others_of_its_domain(pool):
    weights, ids, total, seed = pool
    for name, taken in by_domain(materialise(weights, ids, total, seed)).items():
        size = len(ids[name])
        passes = [taken[start : start + size] for start in range(0, len(taken), size)]
        assert all(len(set(each)) == len(each) for each in passes)


@given(pools(), st.randoms(use_true_random=False))
def test_the_order_of_domains_and_samples_does_not_matter(pool, shuffler):
    weights, ids, total, seed = pool
    names = list(weights)
    shuffler.shuffle(names)
    shuffled = {name: random.Random(seed).sample(ids[name], len(ids[name])) for name in names}
    assert materialise({name: weights[name] for name in names}, shuffled, total, seed) == materialise(
        weights, ids, total, seed
    )


@given(pools())
def test_every_stretch_from_the_start_has_the_shares_of_the_mixture(pool):
    weights, ids, total, seed = pool
    rows = materialise(weights, ids, total, seed)
    whole = Counter(domain for domain, _ in rows)
    for length in range(1, total + 1):
        part = Counter(domain for domain, _ in rows[:length])
        assert all(abs(part[name] - length * whole[name] / total) <= 1 + len(weights) / 2 for name in weights)


def test_the_seed_draws_another_order_and_the_same_seed_the_same():
    ids = {"chart": [f"{i}" for i in range(50)]}
    first, again, other = (materialise({"chart": 1.0}, ids, 50, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_each_pass_has_an_order_of_its_own():
    rows = materialise({"chart": 1.0}, {"chart": list(range(30))}, 60, seed=0)
    assert rows[:30] != rows[30:]
    assert sorted(rows[:30]) == sorted(rows[30:])


@given(pools(), st.integers(0, 2**32))
def test_another_order_has_the_same_samples_pass_by_pass(pool, order_seed):
    weights, ids, total, seed = pool
    first, other = (by_domain(materialise(weights, ids, total, seed, order)) for order in (seed, order_seed))
    for name, taken in first.items():
        passes = range(0, len(taken), len(ids[name]))
        assert [set(taken[i : i + len(ids[name])]) for i in passes] == [
            set(other[name][i : i + len(ids[name])]) for i in passes
        ]


def test_the_order_is_drawn_from_its_own_seed():
    ids = {"chart": list(range(50))}
    first, other = (materialise({"chart": 1.0}, ids, 75, 0, order) for order in (0, 1))
    assert first == materialise({"chart": 1.0}, ids, 75, 0)
    assert first[:50] != other[:50]
    assert first[50:] != other[50:]


def test_a_larger_total_keeps_the_samples_of_a_smaller_one():
    """So that a longer training contains the shorter one's samples, domain by domain."""
    ids = {"chart": list(range(40)), "table": list(range(40))}
    few, many = (by_domain(materialise({"chart": 0.5, "table": 0.5}, ids, total, seed=3)) for total in (20, 50))
    assert all(many[name][:10] == few[name] for name in ids)


def test_equal_ids_of_two_domains_are_two_samples():
    assert sorted(materialise({"a": 0.5, "b": 0.5}, {"a": [1], "b": [1]}, 2, seed=0)) == [("a", 1), ("b", 1)]


def test_the_plan_states_counts_and_passes_by_name():
    assert plan_shares({"table": 0.25, "chart": 0.75, "none": 0.0}, {"chart": 100, "table": 10}, 80) == (
        DomainShare("chart", 0.75, 60, 100),
        DomainShare("none", 0.0, 0, 0),
        DomainShare("table", 0.25, 20, 10),
    )
    chart, none, table = plan_shares({"table": 0.25, "chart": 0.75, "none": 0.0}, {"chart": 100, "table": 10}, 80)
    assert (chart.passes, none.passes, table.passes) == (0.6, 0, 2)


@pytest.mark.parametrize("available", [{"chart": 5}, {"chart": 5, "table": 0}])
def test_a_weight_on_an_empty_domain_is_refused_by_name(available):
    with pytest.raises(
        DataError, match=r"domain table has a weight of 0\.3 and no sample; domains with samples: chart"
    ):
        plan_shares({"chart": 0.7, "table": 0.3}, available, 10)


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {"a": float("nan"), "b": 1.0}, {}])
def test_weights_that_are_no_mixture_are_refused(weights):
    with pytest.raises(DataError, match="add up to one"):
        plan_shares(weights, {"a": 1, "b": 1}, 10)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least 1"):
        plan_shares({"a": 1.0}, {"a": 5}, 0)


def test_an_id_listed_twice_is_refused_by_name():
    with pytest.raises(DataError, match="sample 'x' of domain a is listed twice"):
        materialise({"a": 1.0}, {"a": ["y", "x", "x"]}, 2, seed=0)


# --- the search's table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    stage: str
    weight_K: np.ndarray
    value_G: np.ndarray
    se_G: np.ndarray
    items: int


ROWS = [
    Row("slopes", np.array([0.5, 0.5]), np.array([-1.0, -2.0, -0.5]), np.full(3, np.nan), 30),
    Row("metric", np.array([0.9, 0.1]), np.array([0.7, 0.6, 0.1]), np.array([0.1, 0.2, 0.05]), 60),
    Row("metric", np.array([0.1, 0.9]), np.array([0.5, 0.4, 0.3]), np.array([0.1, 0.1, 0.1]), 20),
]
TARGETS = ("chartqa", "docvqa", "a:b")


def test_candidates_read_back_in_the_order_they_were_measured(tmp_path):
    path = tmp_path / "candidates.parquet"
    write_candidates(path, ("table", "chart"), TARGETS, ROWS)
    names, targets, rows = read_candidates(path)
    assert (names, targets) == (("table", "chart"), TARGETS)
    assert [(row.stage, row.items) for row in rows] == [(row.stage, row.items) for row in ROWS]
    for row, written in zip(rows, ROWS, strict=True):
        np.testing.assert_array_equal(row.weight_K, written.weight_K)
        np.testing.assert_array_equal(row.value_G, written.value_G)
        np.testing.assert_array_equal(row.se_G, written.se_G)


def test_candidates_have_the_columns_of_the_design(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "candidates.parquet"
    write_candidates(path, ("table", "chart"), TARGETS[:1], [replace(ROWS[0], value_G=ROWS[0].value_G[:1], se_G=[0.1])])
    columns = ["candidate", "stage", "w:table", "w:chart", "value:chartqa", "se:chartqa", "items"]
    assert pyarrow.parquet.read_table(path).column_names == columns


def test_a_search_without_candidates_has_an_empty_table(tmp_path):
    write_candidates(tmp_path / "candidates.parquet", ("a", "b"), TARGETS, [])
    assert read_candidates(tmp_path / "candidates.parquet") == (("a", "b"), TARGETS, [])


def test_another_table_is_no_table_of_candidates(tmp_path):
    path = tmp_path / "candidates.parquet"
    write_candidates(path, ("a", "b"), TARGETS, ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read as candidates"):
        read_candidates(path)

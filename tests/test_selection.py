import logging

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datalloy.config import Select
from datalloy.errors import DataError
from datalloy.scorers import BASELINES, Seen
from datalloy.scores import Scores
from datalloy.selection import Selection, kept_count, length_correlation, select, toxic_mask
from datalloy.similarity import directions
from datalloy.strata import length_strata


def make_scores(utility, *, domain=None, id=None, se=0.0, supervised=1, length=1, state=None, signed=True) -> Scores:
    """Scores with everything but the utilities filled in; a number stands for all rows."""
    count = len(utility)
    return Scores.from_columns(
        id=id or [f"s{i}" for i in range(count)],
        domain=domain or ["d"] * count,
        supervised_tokens=np.broadcast_to(supervised, count),
        length_tokens=np.broadcast_to(length, count),
        loss=np.ones(count),
        utility=utility,
        utility_by_target={},
        utility_se=np.broadcast_to(np.asarray(se, dtype=float), count),
        state=state or ["ok"] * count,
        metadata={"method": "exact", "signed": signed},
    )


def kept(selection: Selection) -> set[str]:
    return set(selection.kept_keys()[1])


def test_top_fraction_of_each_domain_is_kept():
    scores = make_scores([0.1, 0.4, 0.3, 9.0, 8.0], domain=["a", "a", "a", "b", "b"])
    selection = select(scores, Select(), fraction=0.5)
    assert kept(selection) == {"s1", "s2", "s3"}  # 1.5 of 3 rounds to 2, 1 of 2
    assert selection.rank.tolist() == [3, 1, 2, 1, 2]
    assert selection.reason.tolist() == [
        "below_fraction",
        "top_fraction",
        "top_fraction",
        "top_fraction",
        "below_fraction",
    ]


def test_global_ranking_takes_the_best_of_the_pool():
    scores = make_scores([0.1, 0.4, 0.3, 9.0, 8.0], domain=["a", "a", "a", "b", "b"])
    selection = select(scores, Select(within="global"), fraction=0.4)
    assert kept(selection) == {"s3", "s4"}
    assert selection.rank.tolist() == [5, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("fraction", "samples", "places"),
    [(0.5, 3, 2), (0.5, 5, 3), (0.3, 5, 2), (0.29, 50, 15), (0.01, 10, 1), (1.0, 7, 7), (0.5, 0, 0), (0.1, 5, 1)],
)
def test_kept_count_rounds_half_up_in_decimal_and_is_at_least_one(fraction, samples, places):
    assert kept_count(fraction, samples) == places


def test_toxic_samples_are_dropped_and_nobody_moves_up():
    # z at 0.95 is 1.645: -1 + 1.645 * 0.5 < 0 is toxic, -1 + 1.645 * 0.7 > 0 is not
    scores = make_scores([-1.0, -1.0, 2.0, -3.0], se=[0.5, 0.7, 0.1, 0.1])
    selection = select(scores, Select(), fraction=1.0)
    assert selection.reason.tolist() == ["toxic", "top_fraction", "top_fraction", "toxic"]
    assert kept(select(scores, Select(), fraction=0.5)) <= {"s1", "s2"}


def test_toxic_mask_follows_the_confidence():
    scores = make_scores([-1.0, 1.0], se=[0.7, 0.0])
    assert toxic_mask(scores, 0.95).tolist() == [False, False]
    assert toxic_mask(scores, 0.90).tolist() == [True, False]  # z = 1.282


def test_toxic_samples_are_kept_when_asked():
    selection = select(make_scores([-1.0, 2.0]), Select(drop_toxic=False), fraction=1.0)
    assert selection.kept.all()


def test_nothing_is_toxic_where_the_sign_has_no_meaning():
    assert not toxic_mask(make_scores([-1.0, -2.0], signed=False), 0.95).any()


def test_without_standard_errors_nothing_is_called_toxic(caplog):
    with caplog.at_level(logging.WARNING):
        assert not toxic_mask(make_scores([-1.0, -2.0], se=np.nan), 0.95).any()
    assert "no standard errors" in caplog.text


def test_all_toxic_is_refused_with_advice():
    with pytest.raises(DataError, match=r"nothing is kept of 2 samples: \{'toxic': 2\}.*select.drop_toxic: false"):
        select(make_scores([-1.0, -2.0]), Select(), fraction=0.5)


def test_a_domain_of_which_nothing_is_kept_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        select(make_scores([1.0, -2.0], domain=["good", "bad"]), Select(), fraction=1.0)
    assert "nothing is kept of domain bad: {'toxic': 1}" in caplog.text


def test_unscored_samples_are_named_and_never_count():
    scores = make_scores([0.1, None, 0.3, None], state=["ok", "too_long", "ok", "nonfinite"])
    selection = select(scores, Select(), fraction=0.5)
    assert selection.reason.tolist() == [
        "below_fraction",
        "not_scored:too_long",
        "top_fraction",
        "not_scored:nonfinite",
    ]
    assert selection.rank.tolist() == [2, 0, 1, 0]


def test_a_domain_without_scored_samples_is_refused():
    scores = make_scores([0.1, None], domain=["a", "b"], state=["ok", "too_long"])
    with pytest.raises(DataError, match=r"domain 'b' has no scored sample.*\{'too_long': 1\}"):
        select(scores, Select(), fraction=0.5)


def test_no_scores_are_refused():
    with pytest.raises(DataError, match="no scores to select from"):
        select(make_scores([]), Select(), fraction=0.5)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 50.0, float("nan")])
def test_fractions_outside_the_range_are_refused(fraction):
    with pytest.raises(DataError, match=r"must be in \(0, 1\]; for 50 % write 0.5"):
        select(make_scores([0.1]), Select(), fraction=fraction)


def test_equal_utilities_are_drawn_by_hash_and_said(caplog):
    ids = [f"s{i:03d}" for i in range(200)]
    with caplog.at_level(logging.WARNING):
        chosen = kept(select(make_scores([0.0] * 200, id=ids), Select(), fraction=0.5))
    assert "all 200 utilities are equal" in caplog.text
    assert 35 <= len(chosen & set(ids[:100])) <= 65  # the alphabet has no say


def test_ties_between_domains_are_not_decided_by_the_order_of_rows():
    choices = []
    for domain in (["a", "b"], ["b", "a"]):
        scores = make_scores([0.5, 0.5], id=["same", "same"], domain=domain)
        selection = select(scores, Select(budget_samples=1), fraction=1.0)
        choices.append(selection.kept_keys()[0].tolist())
    assert choices[0] == choices[1]


def test_sample_budget_is_shared_by_domains_in_proportion():
    domain = ["a"] * 40 + ["b"] * 20
    utility = np.concatenate([np.arange(40), 1000 + np.arange(20)])
    selection = select(make_scores(utility, domain=domain), Select(budget_samples=15), fraction=0.5)
    domains = selection.kept_keys()[0].tolist()
    assert (domains.count("a"), domains.count("b")) == (10, 5)
    assert set(selection.reason) == {"top_fraction", "over_budget", "below_fraction"}


def test_token_budget_ranks_by_utility_per_token():
    scores = make_scores([4.0, 3.0, 1.0], length=[40, 10, 5])  # 0.1, 0.3 and 0.2 a token
    selection = select(scores, Select(budget_tokens=15), fraction=1.0)
    assert selection.rank.tolist() == [3, 1, 2]
    assert kept(selection) == {"s1", "s2"}


def test_budget_stops_at_the_first_sample_that_does_not_fit():
    scores = make_scores([3.0, 2.0, 0.001], length=[10, 10, 1])
    selection = select(scores, Select(budget_tokens=12), fraction=1.0)
    assert kept(selection) == {"s0"}
    assert selection.reason.tolist() == ["top_fraction", "over_budget", "over_budget"]


def test_negative_utilities_are_not_divided_by_cost():
    scores = make_scores([-2.0, -1.0, 1.0], length=[1000, 10, 10], se=100.0)
    assert select(scores, Select(budget_tokens=2000), fraction=1.0).rank.tolist() == [3, 2, 1]


def test_toxic_samples_use_no_budget():
    scores = make_scores([3.0, -1.0, -2.0], length=[1, 50, 1], se=[0.0, 0.0, 100.0])
    selection = select(scores, Select(budget_tokens=2), fraction=1.0)
    assert selection.reason.tolist() == ["top_fraction", "toxic", "top_fraction"]


def test_flops_budget_uses_the_given_costs():
    scores = make_scores([4.0, 3.0, 1.0])
    selection = select(scores, Select(budget_flops=15e9), fraction=1.0, cost_N=np.array([40e9, 10e9, 5e9]))
    assert kept(selection) == {"s1", "s2"}


def test_fraction_bounds_what_a_budget_allows():
    selection = select(make_scores([4.0, 3.0, 2.0, 1.0]), Select(budget_samples=100), fraction=0.5)
    assert kept(selection) == {"s0", "s1"}


def test_flops_budget_without_costs_is_refused():
    with pytest.raises(DataError, match="budget_flops needs the training FLOPs"):
        select(make_scores([1.0]), Select(budget_flops=1.0), fraction=1.0)


@pytest.mark.parametrize(
    ("costs", "message"),
    [([1.0], "1 costs for 2 scored rows"), ([1.0, 0.0], "'s1' of domain 'd' costs 0.0"), ([np.nan, 1.0], "'s0'.*nan")],
)
def test_costs_that_make_no_sense_are_refused(costs, message):
    with pytest.raises(DataError, match=message):
        select(make_scores([1.0, 2.0]), Select(budget_flops=1.0), fraction=1.0, cost_N=np.array(costs))


def test_a_budget_below_the_first_sample_is_refused():
    with pytest.raises(DataError, match="below the cost of the first sample: raise it"):
        select(make_scores([1.0], length=100), Select(budget_tokens=99), fraction=1.0)


def test_length_strata_are_quantiles_that_never_part_equal_lengths():
    lengths = np.repeat([1, 2, 3, 4, 50], 20)
    strata = length_strata(lengths, np.zeros(100, dtype=int))
    np.testing.assert_array_equal(strata, np.repeat([0, 1, 2, 3, 4], 20))


def test_length_strata_are_not_too_small():
    strata = length_strata(np.arange(45), np.zeros(45, dtype=int))
    assert np.bincount(strata).tolist() == [20, 25]
    assert not length_strata(np.arange(39), np.zeros(39, dtype=int)).any()


def test_length_strata_are_taken_inside_each_group():
    lengths, groups = np.tile(np.arange(40), 2) + np.repeat([0, 1000], 40), np.repeat([0, 1], 40)
    np.testing.assert_array_equal(length_strata(lengths, groups), np.tile(np.repeat([0, 1], 20), 2))


def test_length_normalised_ranking_keeps_the_same_share_of_every_stratum():
    length = np.repeat([1, 2, 3, 4, 5], 20)
    scores = make_scores(-length.astype(float) + np.tile(np.arange(20), 5) / 100, supervised=length, se=100.0)
    plain, normalised = (select(scores, Select(), fraction=0.4, length_normalised=flag) for flag in (False, True))
    assert np.bincount(length[plain.kept], minlength=6)[1:].tolist() == [20, 20, 0, 0, 0]
    assert np.bincount(length[normalised.kept], minlength=6)[1:].tolist() == [8, 8, 8, 8, 8]
    assert set(np.flatnonzero(normalised.kept) % 20) == set(range(12, 20))  # the best of each


def test_low_loss_by_length_keeps_what_length_normalised_ranking_keeps_by_low_loss():
    rng = np.random.default_rng(0)
    loss_N, tokens_N, domain_N = rng.random(300), rng.integers(1, 40, 300), np.repeat(["x", "y", "z"], 100)
    place_N = BASELINES["low_loss_by_length"](Seen(loss_N, tokens_N, domain_N, (), 0))
    columns = {"domain": list(domain_N), "supervised": tokens_N, "signed": False}
    plain, by_length = (make_scores(u, **columns) for u in (-loss_N, place_N))
    expected = select(plain, Select(), fraction=0.3, length_normalised=True)
    assert select(by_length, Select(), fraction=0.3).kept.tolist() == expected.kept.tolist()


def test_length_normalised_ranking_looks_at_each_domain_alone():
    # were strata shared with b, whose short answers are better, all short answers of a would lose their place
    domain = ["a"] * 40 + ["b"] * 120
    supervised = np.repeat([1, 9, 1, 9], [20, 20, 100, 20])
    scores = make_scores(np.repeat([0.0, 0.0, 1.0, -1.0], [20, 20, 100, 20]), domain=domain, supervised=supervised)
    selection = select(scores, Select(drop_toxic=False), fraction=0.5, length_normalised=True)
    assert selection.kept[:20].sum() == selection.kept[20:40].sum() == 10


def test_unscored_samples_do_not_shape_the_strata():
    utility, length = [1.0] * 20 + [0.0] * 20 + [None] * 200, np.repeat([1, 9, 0], [20, 20, 200])
    scores = make_scores(utility, supervised=length, state=["ok"] * 40 + ["no_supervision"] * 200)
    selection = select(scores, Select(), fraction=0.5, length_normalised=True)
    assert selection.kept[:20].sum() == selection.kept[20:40].sum() == 10


@pytest.mark.parametrize(("utility", "expected"), [([1.0, 2.0, 4.0], 1.0), ([3.0, 2.0, 1.0], -1.0), ([1.0] * 3, 0.0)])
def test_length_correlation_is_that_of_ranks(utility, expected):
    assert length_correlation(make_scores(utility, supervised=[1, 5, 100])) == pytest.approx(expected)


def test_length_correlation_leaves_unscored_samples_out():
    scores = make_scores([1.0, 2.0, None], supervised=[1, 5, 0], state=["ok", "ok", "no_supervision"])
    assert length_correlation(scores) == pytest.approx(1.0)


def test_selection_comes_back_from_its_file(tmp_path):
    selection = select(make_scores([0.1, 0.2, 0.3], id=["c", "b", "a"]), Select(), fraction=0.5)
    selection.with_metadata({**selection.metadata, "arm": "tail 50 %"}).write(tmp_path / "selection.parquet")
    read = Selection.read(tmp_path / "selection.parquet")
    assert read.id.tolist() == ["a", "b", "c"]
    assert read.kept.tolist() == [True, True, False]
    assert (read.metadata["fraction"], read.metadata["arm"]) == (0.5, "tail 50 %")
    assert read.counts() == {"d": {"top_fraction": 2, "below_fraction": 1}}


def test_scores_are_refused_as_a_selection(tmp_path):
    make_scores([0.1]).write(tmp_path / "scores.parquet")
    with pytest.raises(DataError, match="holds scores, not selection"):
        Selection.read(tmp_path / "scores.parquet")


# few distinct utilities, so that ties are common
ROWS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(-3, 5).map(float), st.sampled_from([0.1, 2.0]), st.integers(1, 6)),
    min_size=1,
    max_size=60,
)
SETTINGS = st.builds(
    lambda within, drop_toxic, budget: Select(within=within, drop_toxic=drop_toxic, **budget),
    st.sampled_from(["domain", "global"]),
    st.booleans(),
    st.sampled_from([{}, {"budget_samples": 7}, {"budget_tokens": 40}]),
)
FRACTIONS = st.sampled_from([0.05, 0.3, 0.5, 0.77, 1.0])


def scores_of(rows, order=None) -> Scores:
    order = list(range(len(rows))) if order is None else order
    domain, utility, se, tokens = zip(*(rows[i] for i in order), strict=True)
    ids = [f"s{i}" for i in order]
    return make_scores(utility, domain=list(domain), id=ids, se=se, supervised=tokens, length=tokens)


def try_select(scores, settings, fraction, length_normalised) -> Selection:
    try:
        return select(scores, settings, fraction=fraction, length_normalised=length_normalised)
    except DataError:
        assume(False)
        raise


@given(st.data(), ROWS, SETTINGS, FRACTIONS, st.booleans())
def test_selection_does_not_depend_on_the_order_of_rows(data, rows, settings, fraction, normalised):
    order = data.draw(st.permutations(range(len(rows))))
    straight = try_select(scores_of(rows), settings, fraction, normalised)
    shuffled = try_select(scores_of(rows, order), settings, fraction, normalised)
    columns = [dict(zip(s.id, zip(s.rank, s.kept, s.reason, strict=True), strict=True)) for s in (straight, shuffled)]
    assert columns[0] == columns[1]


@given(st.data(), ROWS, SETTINGS, FRACTIONS, st.booleans())
def test_raising_a_utility_never_drops_the_sample(data, rows, settings, fraction, normalised):
    chosen = sorted(kept(try_select(scores_of(rows), settings, fraction, normalised)))
    raised = int(data.draw(st.sampled_from(chosen))[1:])
    domain, utility, se, tokens = rows[raised]
    more = data.draw(st.floats(0, 5))
    better = [*rows[:raised], (domain, utility + more, se, tokens), *rows[raised + 1 :]]
    assert f"s{raised}" in kept(select(scores_of(better), settings, fraction=fraction, length_normalised=normalised))


@given(ROWS, FRACTIONS, st.booleans())
def test_kept_counts_are_exact(rows, fraction, normalised):
    selection = select(scores_of(rows), Select(drop_toxic=False), fraction=fraction, length_normalised=normalised)
    domains = [row[0] for row in rows]
    for domain in set(domains):
        assert (selection.kept_keys()[0] == domain).sum() == kept_count(fraction, domains.count(domain))


@given(ROWS, SETTINGS, FRACTIONS, st.booleans())
def test_every_sample_has_a_reason_and_ranks_count_from_one(rows, settings, fraction, normalised):
    selection = try_select(scores_of(rows), settings, fraction, normalised)
    np.testing.assert_array_equal(selection.kept, selection.reason == "top_fraction")
    groups = selection.domain if settings.within == "domain" else np.zeros(len(rows))
    for group in set(groups):
        ranks = selection.rank[groups == group]
        assert sorted(ranks) == list(range(1, len(ranks) + 1))


# --- diversity -----------------------------------------------------------------------------------------------------


def twins(count):
    """Directions in which each two neighbours are one."""
    return np.repeat(np.eye(count), 2, axis=0)


def test_a_threshold_takes_no_copy_of_what_is_taken_and_fills_up_with_others():
    scores = make_scores([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    selection = select(scores, Select(diversity="threshold"), fraction=0.5, direction_ND=twins(3))
    assert kept(selection) == {"s0", "s2", "s4"}
    assert selection.reason.tolist() == ["diverse", "redundant"] * 2 + ["diverse", "below_fraction"]
    assert selection.rank.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_threshold_keeps_fewer_rather_than_copies():
    selection = select(make_scores([4, 3, 2, 1]), Select(diversity="threshold"), fraction=1.0, direction_ND=twins(2))
    assert kept(selection) == {"s0", "s2"}


def test_facility_location_keeps_as_many_as_the_ranking_would():
    scores = make_scores([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    settings = Select(diversity="facility_location", diversity_weight=1.0)
    selection = select(scores, settings, fraction=0.5, direction_ND=twins(3))
    assert kept(selection) == {"s0", "s2", "s4"}
    expected = ["diverse", "redundant", "diverse", "below_fraction", "diverse", "below_fraction"]
    assert selection.reason.tolist() == expected


@pytest.mark.parametrize("within", ["domain", "global"])
def test_facility_location_without_weight_on_coverage_keeps_what_the_ranking_keeps(within):
    rng = np.random.default_rng(0)
    scores = make_scores(rng.normal(size=40), domain=list("ab" * 20))
    direction_ND = rng.normal(size=(40, 3))
    plain = select(scores, Select(within=within), fraction=0.3)
    settings = Select(within=within, diversity="facility_location", diversity_weight=0.0)
    assert kept(select(scores, settings, fraction=0.3, direction_ND=direction_ND)) == kept(plain)


@pytest.mark.parametrize("diversity", ["facility_location", "threshold"])
def test_diversity_looks_inside_domains(diversity):
    """The best of one domain is no reason to leave out its copy in another."""
    scores = make_scores([0.9, 0.8, 0.7, 0.6], domain=["a", "b", "a", "b"])
    selection = select(scores, Select(diversity=diversity), fraction=0.5, direction_ND=twins(2))
    assert kept(selection) == {"s0", "s1"}


@pytest.mark.parametrize("diversity", ["facility_location", "threshold"])
def test_diversity_brings_back_nothing_toxic_and_nothing_unscored(diversity):
    scores = make_scores([3.0, -9.0, None, 1.0, 0.5], state=["ok", "ok", "nonfinite", "ok", "ok"])
    direction_ND = np.eye(5)
    selection = select(scores, Select(diversity=diversity), fraction=1.0, direction_ND=direction_ND)
    assert kept(selection) == {"s0", "s3", "s4"}
    assert selection.reason[[1, 2]].tolist() == ["toxic", "not_scored:nonfinite"]


@pytest.mark.parametrize("diversity", ["facility_location", "threshold"])
@given(seed=st.integers(0, 1000))
def test_a_diverse_choice_does_not_depend_on_the_order_of_rows(diversity, seed):
    rng = np.random.default_rng(seed)
    utility, names = rng.integers(0, 4, 12) / 4, [f"s{i}" for i in range(12)]
    domain, direction_ND = list("aab" * 4), directions(rng.integers(-2, 3, (12, 3)).astype(float))
    order = rng.permutation(12)
    settings = Select(diversity=diversity, max_similarity=0.7)
    straight = select(make_scores(utility, domain=domain, id=names), settings, fraction=0.5, direction_ND=direction_ND)
    shuffled = make_scores(utility[order], domain=[domain[i] for i in order], id=[names[i] for i in order])
    assert kept(select(shuffled, settings, fraction=0.5, direction_ND=direction_ND[order])) == kept(straight)


def test_a_budget_takes_the_first_choices_of_all_domains():
    scores = make_scores([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], domain=list("aaaabbbb"))
    settings = Select(diversity="threshold", budget_samples=3)
    selection = select(scores, settings, fraction=1.0, direction_ND=twins(4))
    assert selection.kept.sum() == 3
    assert kept(selection) >= {"s0", "s4"}
    assert selection.count_reasons() == {"redundant": 4, "diverse": 3, "over_budget": 1}


@pytest.mark.parametrize("given_ND", [None, np.eye(2)])
def test_diversity_without_directions_of_all_rows_is_refused(given_ND):
    with pytest.raises(
        DataError, match=r"select\.diversity needs the direction of every row, 3 in all; given: (none|2)"
    ):
        select(make_scores([1, 2, 3]), Select(diversity="threshold"), fraction=1.0, direction_ND=given_ND)

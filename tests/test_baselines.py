import numpy as np
import pytest

from datalloy.scorers import BASELINES, Seen, right_and_wanted

SEEN = Seen(np.array([1.0, 4, 2, 8, 3]), np.array([3, 1, 9, 2, 2]), np.repeat("x", 5), ["a", "b", "c", "d", "a"], 0)


def best_first(name):
    return np.argsort(-BASELINES[name](SEEN), kind="stable").tolist()


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("low_loss", [0, 2, 4, 1, 3]),
        ("high_loss", [3, 1, 4, 2, 0]),
        ("mid_loss", [4, 1, 2, 0, 3]),  # distances from the median 3: 2 1 1 5 0
        ("length", [2, 0, 3, 4, 1]),
    ],
)
def test_what_each_baseline_keeps_first(name, order):
    assert best_first(name) == order


def test_a_loss_that_is_missing_leaves_the_median_of_the_others():
    loss_N = np.array([1.0, np.nan, 2, 9])
    assert BASELINES["mid_loss"](SEEN._replace(loss_N=loss_N)) == pytest.approx([-1, np.nan, 0, -7], nan_ok=True)


def of_two_lengths() -> Seen:
    """40 short answers of low loss and 40 long ones of high loss, in each of two domains, in a drawn order."""
    order = np.random.default_rng(0).permutation(160)
    loss_N, tokens_N = np.tile(np.arange(80.0), 2), np.tile(np.repeat([2, 9], 40), 2)
    return Seen(loss_N[order], tokens_N[order], np.repeat(["x", "y"], 80)[order], (), 0)


def test_by_length_every_stratum_of_every_domain_gives_the_same_share_and_its_lowest_losses():
    seen = of_two_lengths()
    kept = np.argsort(-BASELINES["low_loss_by_length"](seen), kind="stable")[:40]
    for domain, tokens, lowest in (("x", 2, 0), ("x", 9, 40), ("y", 2, 0), ("y", 9, 40)):
        rows = kept[(seen.domain_N[kept] == domain) & (seen.tokens_N[kept] == tokens)]
        assert sorted(seen.loss_N[rows]) == list(range(lowest, lowest + 10))


def test_by_length_places_lie_between_minus_one_and_zero_and_equal_losses_share_one():
    places_N = BASELINES["low_loss_by_length"](SEEN._replace(loss_N=np.array([1.0, 4, 1, 8, 3])))
    assert places_N == pytest.approx([-0.2, -0.7, -0.2, -0.9, -0.5])


def test_by_length_a_missing_loss_stays_missing_and_takes_no_place():
    places_N = BASELINES["low_loss_by_length"](SEEN._replace(loss_N=np.array([1.0, np.nan, 2, 8, 3])))
    assert places_N == pytest.approx([-0.125, np.nan, -0.375, -0.875, -0.625], nan_ok=True)


def of_two_kinds() -> Seen:
    """40 samples of an easy kind and 40 of a hard one in each of two domains, whose losses differ by 100."""
    rng = np.random.default_rng(0)
    order = rng.permutation(160)
    kind_N = np.tile(np.repeat([0, 1], 40), 2)
    loss_N = 100.0 * kind_N + np.tile(np.arange(40.0), 4) + np.repeat([0, 1000], 80)
    prompt_ND = np.eye(4)[kind_N] + 0.01 * rng.normal(size=(160, 4))
    keys = [str(i) for i in order]
    return Seen(loss_N[order], np.ones(160), np.repeat(["x", "y"], 80)[order], keys, 0, prompt_ND[order].__getitem__)


def test_by_neighbours_hard_and_easy_kinds_of_every_domain_give_about_the_same_share():
    seen = of_two_kinds()
    kept = np.argsort(-BASELINES["low_loss_by_neighbours"](seen), kind="stable")[:80]
    for domain in ("x", "y"):
        losses = seen.loss_N[kept][seen.domain_N[kept] == domain] % 1000
        assert 17 <= (losses < 100).sum() <= 23
        assert 17 <= (losses >= 100).sum() <= 23
    assert (seen.loss_N[kept] % 100).max() < 30


def test_by_neighbours_is_the_median_of_the_neighbours_minus_the_loss_and_a_missing_loss_is_nobodys_neighbour():
    loss_N = np.array([1.0, 4, np.nan, 8, 3])
    found_N = BASELINES["low_loss_by_neighbours"](SEEN._replace(loss_N=loss_N, prompts=np.eye(5).__getitem__))
    assert found_N == pytest.approx([4 - 1, 3 - 4, np.nan, 3 - 8, 4 - 3], nan_ok=True)


def test_by_neighbours_a_sample_alone_in_its_domain_has_zero():
    seen = SEEN._replace(domain_N=np.array(["x", "x", "x", "x", "y"]), prompts=np.eye(5).__getitem__)
    assert BASELINES["low_loss_by_neighbours"](seen)[4] == 0


def test_right_and_wanted_adds_the_places_of_both_in_the_domain():
    """In a domain of so few all others are neighbours: losses 1, 4, 2, 8 and 3 are best first 0, 2, 4, 1, 3."""
    seen = SEEN._replace(prompts=np.eye(5).__getitem__)
    slope_N = np.array([0.0, 5, 5, -1, np.nan])
    right_N, wanted_N = np.array([0.9, 0.3, 0.7, 0.1, 0.5]), np.array([0.375, 0.75, 0.75, 0.125, np.nan])
    assert right_and_wanted(seen, slope_N) == pytest.approx(right_N + wanted_N, nan_ok=True)


def test_right_and_wanted_in_a_domain_does_not_depend_on_what_other_domains_hold():
    seen = of_two_kinds()
    slope_N = np.random.default_rng(1).normal(size=160)
    both_N, of_x = right_and_wanted(seen, slope_N), seen.domain_N == "x"
    other_N = right_and_wanted(seen._replace(loss_N=seen.loss_N + 7 * ~of_x), slope_N - 9.0 * ~of_x)
    assert other_N[of_x].tolist() == both_N[of_x].tolist()


def test_by_neighbours_needs_the_prompts():
    with pytest.raises(ValueError, match="prompts"):
        BASELINES["low_loss_by_neighbours"](SEEN)


def test_random_depends_on_content_and_seed_only():
    draw_N = BASELINES["random"](SEEN)
    other = Seen(np.zeros(2), np.zeros(2), np.repeat("x", 2), ["d", "a"], 0)
    assert BASELINES["random"](other).tolist() == [draw_N[3], draw_N[0]]
    assert draw_N[0] == draw_N[4]
    assert not np.isin(BASELINES["random"](SEEN._replace(seed=1)), draw_N).any()


def test_random_is_uniform_on_the_unit_interval():
    draw_N = BASELINES["random"](Seen(np.empty(0), np.empty(0), np.empty(0), [str(i) for i in range(4000)], 0))
    counts = np.histogram(draw_N, bins=10, range=(0, 1))[0]
    assert counts.sum() == 4000
    assert np.abs(counts - 400).max() < 5 * np.sqrt(360)  # five standard deviations of a bin

import numpy as np
import pytest

from datalloy.scorers import BASELINES, Seen

SEEN = Seen(np.array([1.0, 4, 2, 8, 3]), np.array([3, 1, 9, 2, 2]), ["a", "b", "c", "d", "a"], 0)


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


def test_random_depends_on_content_and_seed_only():
    draw_N = BASELINES["random"](SEEN)
    other = Seen(np.zeros(2), np.zeros(2), ["d", "a"], 0)
    assert BASELINES["random"](other).tolist() == [draw_N[3], draw_N[0]]
    assert draw_N[0] == draw_N[4]
    assert not np.isin(BASELINES["random"](SEEN._replace(seed=1)), draw_N).any()


def test_random_is_uniform_on_the_unit_interval():
    draw_N = BASELINES["random"](Seen(np.empty(0), np.empty(0), [str(i) for i in range(4000)], 0))
    counts = np.histogram(draw_N, bins=10, range=(0, 1))[0]
    assert counts.sum() == 4000
    assert np.abs(counts - 400).max() < 5 * np.sqrt(360)  # five standard deviations of a bin

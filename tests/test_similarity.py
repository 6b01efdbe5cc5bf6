import numpy as np
import pytest

from datalloy import similarity
from datalloy.similarity import directions, median_of_neighbours


def two_kinds(seed=0, samples=60):
    """Two kinds of prompt in a drawn order, whose values differ by 100."""
    rng = np.random.default_rng(seed)
    kind_N = rng.permutation(np.repeat([0, 1], samples // 2))
    state_ND = np.eye(8)[kind_N] + 0.1 * rng.normal(size=(samples, 8)) + 50
    return kind_N, 100.0 * kind_N + rng.random(samples), state_ND, rng.random(samples)


def by_hand(value_N, state_ND, references, neighbours=20):
    """The definition, one sample at a time."""
    centred_ND = state_ND - state_ND.mean(axis=0)
    found = []
    for n, centred_D in enumerate(centred_ND):
        cosines = {
            r: centred_D @ centred_ND[r] / np.linalg.norm(centred_D) / np.linalg.norm(centred_ND[r])
            for r in references
            if r != n
        }
        nearest = sorted(cosines, key=lambda r: -cosines[r])[:neighbours]
        found.append(np.median(value_N[nearest]))
    return found


def test_the_median_is_that_of_the_twenty_nearest_others():
    _, value_N, state_ND, draw_N = two_kinds()
    assert median_of_neighbours(value_N, state_ND.__getitem__, draw_N) == pytest.approx(
        by_hand(value_N, state_ND, range(60))
    )


def test_neighbours_are_of_the_same_kind():
    kind_N, value_N, state_ND, draw_N = two_kinds()
    assert (np.floor(median_of_neighbours(value_N, state_ND.__getitem__, draw_N) / 100) == kind_N).all()


def test_a_small_group_is_compared_with_all_others():
    found_N = median_of_neighbours(np.array([1.0, 2, 4, 9]), np.eye(4).__getitem__, np.arange(4.0))
    assert found_N.tolist() == [4, 4, 2, 2]
    assert median_of_neighbours(np.array([7.0]), np.ones((1, 4)).__getitem__, np.zeros(1)).tolist() == [7]


@pytest.mark.parametrize("references", [60, 25])
def test_neither_order_nor_blocks_change_who_is_near(references, monkeypatch):
    monkeypatch.setattr(similarity, "REFERENCES", references)
    _, value_N, state_ND, draw_N = two_kinds()
    expected_N = median_of_neighbours(value_N, state_ND.__getitem__, draw_N)
    monkeypatch.setattr(similarity, "ROWS", 7)
    order = np.random.default_rng(1).permutation(60)
    assert median_of_neighbours(value_N[order], state_ND[order].__getitem__, draw_N[order]) == pytest.approx(
        expected_N[order]
    )


def test_large_groups_look_among_those_with_the_lowest_draws(monkeypatch):
    monkeypatch.setattr(similarity, "REFERENCES", 25)
    _, value_N, state_ND, draw_N = two_kinds()
    expected = by_hand(value_N, state_ND, np.argsort(draw_N)[:25].tolist())
    assert median_of_neighbours(value_N, state_ND.__getitem__, draw_N) == pytest.approx(expected)


def test_no_more_states_are_asked_for_at_once_than_references_or_a_block(monkeypatch):
    monkeypatch.setattr(similarity, "REFERENCES", 25)
    monkeypatch.setattr(similarity, "ROWS", 7)
    _, value_N, state_ND, draw_N = two_kinds()
    asked = []
    median_of_neighbours(value_N, lambda rows: asked.append(len(rows)) or state_ND[rows], draw_N)
    assert sorted(asked)[-2:] == [7, 25]


def test_prompts_that_are_all_the_same_have_the_same_neighbours_in_any_order():
    value_N, draw_N = np.arange(50.0), np.random.default_rng(0).random(50)
    expected_N = median_of_neighbours(value_N, np.ones((50, 3)).__getitem__, draw_N)
    order = np.random.default_rng(1).permutation(50)
    assert (
        median_of_neighbours(value_N[order], np.ones((50, 3)).__getitem__, draw_N[order]).tolist()
        == expected_N[order].tolist()
    )


def test_directions_are_seen_from_the_mean_and_of_unit_length():
    found_ND = directions(np.array([[9.0, 1], [9, 3], [12, 2], [np.nan, 2]]))
    assert found_ND == pytest.approx(np.array([[-1, -1], [-1, 1], [np.sqrt(2), 0], [0, 0]]) / np.sqrt(2))

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datalloy.errors import DataError
from datalloy.scores import SCHEMA_VERSION, Scores, write_table

METADATA = {"method": "tail", "signed": True, "step": 0.1}


def make_scores(**changes) -> Scores:
    """Two scored samples and one that was too long, unsorted."""
    columns = {
        "id": ["b", "a", "a"],
        "domain": ["y", "y", "x"],
        "supervised_tokens": [3, 2, 900],
        "length_tokens": [20, 18, 5000],
        "loss": [1.5, 0.5, None],
        "utility": [0.25, -0.125, None],
        "utility_by_target": {"chart": [0.5, -0.25, None], "table": [0.0, 0.0, None]},
        "utility_se": [0.1, np.nan, None],
        "state": ["ok", "ok", "too_long"],
        "metadata": METADATA,
    }
    return Scores.from_columns(**{**columns, **changes})


def test_file_gives_back_the_scores_sorted_by_domain_and_id(tmp_path):
    scores = make_scores()
    scores.write(tmp_path / "scores.parquet")
    read = Scores.read(tmp_path / "scores.parquet")
    assert list(zip(read.domain, read.id, strict=True)) == [("x", "a"), ("y", "a"), ("y", "b")]
    assert read.table.equals(scores.table.sort_by([("domain", "ascending"), ("id", "ascending")]))
    assert read.metadata == METADATA
    assert read.targets == ("chart", "table")


@given(st.permutations(range(5)))
def test_file_does_not_depend_on_the_order_of_scoring(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("order")
    ids = [f"s{i}" for i in range(5)]
    zeros = np.zeros(5)
    for name, rows in {"given": list(range(5)), "shuffled": list(order)}.items():
        Scores.from_columns(
            id=[ids[i] for i in rows],
            domain=["x"] * 5,
            supervised_tokens=[1] * 5,
            length_tokens=[i + 1 for i in rows],
            loss=zeros,
            utility=[i / 7 for i in rows],
            utility_by_target={},
            utility_se=zeros,
            state=["ok"] * 5,
            metadata=METADATA,
        ).write(folder / name)
    assert (folder / "given").read_bytes() == (folder / "shuffled").read_bytes()


def test_numbers_that_are_missing_are_nan_in_arrays_and_null_in_the_file(tmp_path):
    scores = make_scores()
    np.testing.assert_array_equal(scores.utility, [0.25, -0.125, np.nan])
    np.testing.assert_array_equal(scores.utility_by_target["chart"], [0.5, -0.25, np.nan])
    np.testing.assert_array_equal(scores.is_ok, [True, True, False])
    scores.write(tmp_path / "scores.parquet")
    assert pq.read_table(tmp_path / "scores.parquet")["utility_se"].to_pylist() == [None, None, 0.1]


def test_file_says_what_the_sign_means(tmp_path):
    make_scores().write(tmp_path / "scores.parquet")
    about = json.loads(pq.read_metadata(tmp_path / "scores.parquet").metadata[b"datalloy"])
    assert about["schema_version"] == SCHEMA_VERSION
    assert about["metadata"]["sign"] == "utility = loss before - loss after; positive helps"


def test_no_flipped_bit_is_read_as_other_scores(tmp_path):
    path, damaged = tmp_path / "scores.parquet", tmp_path / "damaged.parquet"
    make_scores().write(path)
    sound, expected, refused = path.read_bytes(), Scores.read(path), 0
    positions = range(0, len(sound), 5)  # every bit of a byte has its turn: 5 and 8 share no factor
    for position in positions:
        flipped = bytearray(sound)
        flipped[position] ^= 1 << (position % 8)
        damaged.write_bytes(flipped)
        try:
            assert Scores.read(damaged) == expected
        except DataError:
            refused += 1
    assert refused > len(positions) // 2


def test_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "scores.parquet"
    make_scores().write(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"scores\.parquet cannot be read as scores"):
        Scores.read(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.parquet cannot be read as scores"):
        Scores.read(tmp_path / "none.parquet")


def test_parquet_of_another_program_is_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="holds no scores written by Datalloy"):
        Scores.read(tmp_path / "other.parquet")


def test_artefact_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "selection.parquet"
    write_table(path, make_scores().table, kind="selection", version=1, metadata={})
    with pytest.raises(DataError, match="holds selection, not scores"):
        Scores.read(path)


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_other_schema_versions_are_refused(tmp_path, version):
    path = tmp_path / "scores.parquet"
    write_table(path, make_scores().table, kind="scores", version=version, metadata=METADATA)
    with pytest.raises(
        DataError, match=f"scores of schema version {version}, this Datalloy reads version 1; make them"
    ):
        Scores.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utility": [np.inf, 0.0, None]}, "infinite utility.*sample 'b' of domain 'y'"),
        ({"utility": [None, 0.0, None]}, "1 of 3 scored rows have state ok but no finite utility"),
        ({"utility": [0.0, 0.0, 0.0]}, "a utility but a state other than ok.*too_long"),
        ({"utility_by_target": {"chart": [0.0, np.nan, None]}}, "no finite chart"),
        ({"loss": [1.0, -np.inf, None]}, "infinite loss"),
        ({"utility_se": [-0.1, 0.1, None]}, "negative utility_se"),
        ({"supervised_tokens": [3, -2, 900]}, "supervised_tokens below 0"),
        ({"supervised_tokens": [3.5, 2, 900]}, "truncated"),
        ({"id": ["a", "a", "a"]}, "sample 'a' of domain 'y' is scored 2 times"),
        ({"id": ["a", None, "a"]}, "1 rows without id"),
        ({"id": ["a", "b"]}, "cannot be built"),
        ({"state": ["ok", "ok", "Too long!"]}, "no snake_case word"),
        ({"metadata": {"method": "tail"}}, "say whether the utilities are `signed`"),
        ({"metadata": {"signed": True}}, "must name the `method`"),
        ({"metadata": {**METADATA, "agreement": float("nan")}}, "cannot be written as JSON"),
        ({"contributions": [[0.1, 0.2], [0.1], None]}, "not one contribution a target item"),
        ({"contributions": [[0.1], [0.1], [0.1]]}, "not one contribution a target item"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make_scores(**changes)


def test_concat_of_parts_is_the_whole(tmp_path):
    whole = make_scores()
    parts = [Scores(whole.table.slice(i, 1), METADATA) for i in range(3)]
    assert Scores.concat(parts) == whole


def test_concat_refuses_a_sample_in_two_parts():
    with pytest.raises(DataError, match="is scored 2 times"):
        Scores.concat([make_scores(), make_scores()])


@pytest.mark.parametrize("changes", [{"metadata": {**METADATA, "step": 0.2}}, {"utility_by_target": {}}])
def test_concat_refuses_parts_of_different_origin(changes):
    with pytest.raises(DataError, match="scores of different origin cannot be joined"):
        Scores.concat([make_scores(), make_scores(**changes)])


def test_concat_refuses_nothing():
    with pytest.raises(DataError, match="list of parts is empty"):
        Scores.concat([])


def test_contributions_come_back_as_a_matrix_with_nan_rows(tmp_path):
    scores = make_scores(contributions=[np.array([0.5, 0.0]), np.array([-0.25, 0.0]), None])
    scores.write(tmp_path / "scores.parquet")
    expected = [[np.nan, np.nan], [-0.25, 0.0], [0.5, 0.0]]
    np.testing.assert_array_equal(Scores.read(tmp_path / "scores.parquet").contributions, expected)
    assert make_scores().contributions is None


def test_another_scorer_leaves_unscored_rows_unscored():
    scores = make_scores()
    low_loss = scores.with_utility(np.array([-1.5, -0.5, 7.0]), scores.state, {"method": "low_loss", "signed": False})
    np.testing.assert_array_equal(low_loss.utility, [-1.5, -0.5, np.nan])
    assert low_loss.targets == ()
    assert not low_loss.is_signed

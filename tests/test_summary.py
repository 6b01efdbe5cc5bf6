"""What a verb says when it ends: plain lines, tables that line up, warnings that say what to do."""

import pytest

from datalloy.scores import Scores
from datalloy.summary import summarise
from finished_run import finish_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("summary"))


def said(verb, folder):
    return list(summarise(verb, folder))


def warnings(lines):
    return [line for line in lines if line.startswith("warning: ")]


@pytest.mark.parametrize("verb", ["check", "score", "select", "mix", "verify", "train"])
def test_every_line_is_plain_text(verb, folder):
    lines = said(verb, folder)
    assert lines
    assert all(line.isprintable() for line in lines)


def test_the_table_of_scores_lines_up(folder):
    head, *rows = said("score", folder)[:4]
    assert head.split() == ["domain", "samples", "median", "loss", "median", "utility", "below", "zero"]
    assert {len(row) for row in rows} == {len(head)}


def test_rejected_records_are_a_warning_that_names_the_file(folder):
    (line,) = warnings(said("check", folder))
    assert line.startswith("warning: 3 records cannot be used")
    assert line.endswith(str(folder / "rejected.jsonl"))


def test_warnings_about_experts_stand_beside_the_verdict_too(folder):
    assert any("expert chart" in line for line in warnings(said("mix", folder)))
    assert warnings(said("mix", folder)) == warnings(said("verify", folder))


def test_utility_that_follows_length_is_a_warning_with_the_setting_that_helps(tmp_path):
    folder = finish_run(tmp_path)
    assert not warnings(said("score", folder))
    table = Scores.read(folder / "scores.parquet")
    length = table.table.column_names.index("supervised_tokens")
    longer = table.utility.argsort().argsort() + 1
    Scores(table.table.set_column(length, table.table.schema.field(length), [longer]), table.metadata).write(
        folder / "scores.parquet"
    )
    (line,) = warnings(said("score", folder))
    assert "rank correlation 1.00" in line
    assert "score.length_normalised: true" in line


def test_a_pool_that_does_harm_is_a_warning_not_to_train_on_it(tmp_path):
    folder = finish_run(tmp_path)
    _with_bakeoff(folder, caution=None)
    assert not warnings(said("select", folder))
    _with_bakeoff(folder, over_base={"over": "the base", "mean": -0.2, "interval": (-0.3, -0.1)})
    (line,) = warnings(said("select", folder))
    assert "worse than the untrained base" in line
    assert "do not train on this pool" in line


def test_a_bakeoff_of_short_runs_is_a_warning(tmp_path):
    folder = finish_run(tmp_path)
    _with_bakeoff(folder, caution="the longest runs of the bake-off took 72 of the final training's 300 steps")
    assert warnings(said("select", folder)) == [
        "warning: the longest runs of the bake-off took 72 of the final training's 300 steps"
    ]


def _with_bakeoff(folder, **changed):
    from datalloy.selection import Selection

    chosen = Selection.read(folder / "selection.parquet")
    outcome = {**chosen.metadata["bakeoff"], **changed}
    chosen.with_metadata({**chosen.metadata, "bakeoff": outcome}).write(folder / "selection.parquet")

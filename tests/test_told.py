"""What may be told, what is refused, and that nothing told is lost."""

import csv
import json
from pathlib import Path

import pytest

from datalloy import asktell, cli
from datalloy.config import load_recipe
from datalloy.errors import DataError, RecipeError, RunError, RunInUseError
from datalloy.told import Ledger, Told, in_steps, read_told
from datalloy.told_recipe import load_told

RECIPE = """\
name: told
domains: {chart: {samples: 300}, table: {samples: 100}}
targets: {qa: {metric: acc}, error: {higher_is_better: false}}
samples: 1000
mixture: {metric: told}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return load_told(path)


@pytest.fixture
def ledger(recipe, tmp_path):
    return Ledger(tmp_path / "run", recipe)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def row(**changes):
    return {"w:chart": "0.5", "w:table": "0.5", "kind": "trained", "value:qa": "0.7", "value:error": "0.2"} | changes


def a_table(write, *rows):
    columns = list(dict.fromkeys(name for one in rows for name in one))
    lines = [",".join(str(one.get(name, "")) for name in columns) for one in rows]
    return write("table.csv", "\n".join([",".join(columns), *lines]) + "\n")


def read(ledger, *paths, candidate=None, kind=None):
    return read_told(paths, ledger, candidate=candidate, kind=kind)


# --- recipes


def test_a_recipe_of_names_alone_is_enough(recipe):
    assert list(recipe.domains) == ["chart", "table"]
    assert recipe.mixture.objective == "mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("metric: told}", "metric: told, objektive: worst}"),
            "unknown key mixture.objektive; did you mean objective?",
        ),
        (("samples: 300", "sampels: 300"), "unknown key domains.chart.sampels; did you mean samples?"),
        (("metric: told}", "metric: told, guard_rails: {x: 0}}"), "names x, which is no target"),
        (("samples: 300", "max_epochs: 2"), "domains.chart.max_epochs needs domains.chart.samples"),
    ],
)
def test_a_faulty_key_is_named(write, change, message):
    with pytest.raises(RecipeError, match=message):
        load_told(write("faulty.yaml", RECIPE.replace(*change)))


def test_a_recipe_of_numbers_cannot_be_run(write):
    with pytest.raises(RecipeError, match=r"mixture\.metric is told, so its numbers come from you"):
        load_recipe(write("recipe.yaml", RECIPE))


def test_any_recipe_with_a_mixture_can_be_asked(write):
    lines = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x"}]} for i in range(3)
    ]
    write("a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write("b.jsonl", json.dumps(lines[0]) + "\n")
    text = """\
name: own
base: tiny
domains: {a: {path: a.jsonl, max_epochs: 5}, b: {path: b.jsonl}}
targets: {t: {path: a.jsonl, metric: loss}}
train: {samples: 30}
mixture: {objective: worst}
"""
    told = load_told(write("own.yaml", text))
    assert [d.samples for d in told.domains.values()] == [3, 1]
    assert (told.samples, told.mixture.objective, told.targets["t"].higher_is_better) == (30, "worst", False)


# --- tables


def test_a_row_of_a_table_is_read(ledger, write):
    (told,) = read(ledger, a_table(write, row(**{"se:qa": "0.02", "n:qa": "400"})))
    assert (told.kind, told.shares) == ("trained", (5000, 5000))
    assert told.values == {"qa": 0.7, "error": 0.2}
    assert (told.standard_errors, told.items) == ({"qa": 0.02}, {"qa": 400})
    assert told.sources[0].endswith("table.csv:2")


def test_json_lines_say_the_same(ledger, write):
    line = {"weights": {"chart": 0.5, "table": 0.5}, "kind": "trained", "values": {"qa": 0.7, "error": 0.2}}
    (told,) = read(ledger, write("rows.jsonl", json.dumps(line) + "\n"))
    (same,) = read(ledger, a_table(write, row()))
    assert (told.kind, told.shares, told.values) == (same.kind, same.shares, same.values)


def test_shares_that_are_rounded_are_made_whole(ledger, write):
    (told,) = read(ledger, a_table(write, row(**{"w:chart": "0.333", "w:table": "0.6665"})))
    assert sum(told.shares) == 10_000


def test_parts_of_one_mixture_in_two_files_are_put_together(ledger, write):
    whole = row()
    first = write("a.csv", "w:chart,w:table,kind,value:qa\n0.5,0.5,trained,0.7\n")
    second = write("b.csv", "w:chart,w:table,kind,value:error\n0.5,0.5,trained,0.2\n")
    (told,) = read(ledger, first, second)
    (same,) = read(ledger, a_table(write, whole))
    assert told.values == same.values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value:qa": "nan"}, "value:qa is 'nan', must be a finite number"),
        ({"value:qa": "much"}, "value:qa is 'much', must be a finite number"),
        ({"value:qa": ""}, "has no number of qa"),
        ({"value:speed": "1"}, "value:speed names no domain or target"),
        ({"w:maths": "0"}, "w:maths names no domain or target"),
        ({"w:chart": "0.9"}, "these add up to 1.4"),
        ({"w:chart": "-0.5", "w:table": "1.5"}, "none negative"),
        ({"w:table": ""}, "w:table is missing"),
        ({"kind": ""}, "were these models merged by the weights or really trained"),
        ({"kind": "guessed"}, "kind is 'guessed'"),
        ({"candidate": "merged-12345678"}, "merged-12345678 was not asked for"),
        ({"w:chart": "", "w:table": ""}, "which mixture"),
        ({"se:qa": "-1"}, "se:qa must be 0 or more"),
        ({"n:qa": "2.5"}, "n:qa a whole number"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_line(ledger, write, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        read(ledger, a_table(write, row(**changes)))
    assert "table.csv:2" in str(caught.value)


def test_two_numbers_of_one_mixture_are_refused(ledger, write):
    with pytest.raises(
        DataError, match=r"qa of trained chart 50%, table 50% is 0\.7 and 0\.8; one mixture has one number"
    ):
        read(ledger, a_table(write, row(), row(**{"value:qa": "0.8"})))


# --- results of evaluators


def harness(value=0.7, **changes):
    results = {"qa": {"acc,none": value, "acc_stderr,none": 0.03, "sample_len": 100}, "error": {"wer,none": 0.2}}
    return {"results": results, "higher_is_better": {"qa": {"acc": True}}, **changes}


@pytest.fixture
def asked(recipe, tmp_path):
    proposals = asktell.ask(recipe, tmp_path / "run", count=2)
    return Ledger(tmp_path / "run", recipe), proposals


def test_results_are_those_of_the_candidate_in_their_path(asked, write):
    ledger, (first, second) = asked
    (told,) = read(ledger, write(f"out/merges__{first.candidate}/results_2026.json", harness()))
    assert told.shares == first.shares != second.shares
    assert told.values == {"qa": 0.7, "error": 0.2}
    assert (told.standard_errors, told.items) == ({"qa": 0.03}, {"qa": 100})


def test_results_are_those_of_the_candidate_in_the_models_name(asked, write):
    ledger, (first, _) = asked
    (told,) = read(ledger, write("results_2026.json", harness(model_name=f"/data/merges/{first.candidate}")))
    assert told.shares == first.shares


def test_whose_results_can_be_said(asked, write):
    ledger, (_, second) = asked
    (told,) = read(ledger, write("results_2026.json", harness()), candidate=second.candidate)
    assert told.shares == second.shares


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (harness(), "whose results are these"),
        (
            {"results": {"other": {"acc,none": 1.0}}, "model_name": "base"},
            "has results of other, none of which is a target",
        ),
        (harness(higher_is_better={"qa": {"acc": False}}, model_name="base"), "set targets.qa.higher_is_better: false"),
        (
            {"results": {"qa": {"acc,none": 1.0, "acc,strict": 0.5}}, "model_name": "base"},
            r"2 values fit target qa; .* to one of acc \(none\), acc \(strict\)",
        ),
    ],
)
def test_results_that_are_not_clear_are_refused(asked, write, content, message):
    with pytest.raises(DataError, match=message):
        read(asked[0], write("results_2026.json", content))


# --- the ledger


def test_what_was_told_is_read_back_as_it_was(ledger, recipe, write):
    told = read(
        ledger, a_table(write, row(**{"se:qa": "0.02", "n:qa": "400"}), row(**{"w:chart": "1", "w:table": "0"}))
    )
    assert ledger.keep(told) == 2
    assert Ledger(ledger.folder, recipe).told == told


def test_telling_the_same_again_changes_nothing(ledger, write):
    told = read(ledger, a_table(write, row()))
    ledger.keep(told)
    before = ledger.told_path.read_bytes()
    assert ledger.keep(told) == 0
    assert ledger.told_path.read_bytes() == before


def test_contradicting_is_refused_and_keeps_nothing_of_the_call(ledger, recipe, write):
    ledger.keep(read(ledger, a_table(write, row())))
    new = Told("trained", (10_000, 0), {"qa": 0.1, "error": 0.1})
    other = read(ledger, a_table(write, row(**{"value:qa": "0.8"})))
    with pytest.raises(
        DataError, match=r"qa of trained chart 50%, table 50% is 0.8, but 0.7 was told before .*table.csv:2"
    ):
        ledger.keep([new, *other])
    assert len(Ledger(ledger.folder, recipe).told) == 1


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"se:qa": "0.02"}, {"se:qa": "0.03"}, r"has the standard error 0\.03, before .* it was 0\.02"),
        ({}, {"se:qa": "0.03"}, "it was not told"),
        ({"n:qa": "100"}, {"n:qa": "200"}, "has the number of items 200, before .* it was 100"),
    ],
)
def test_another_error_of_the_same_number_is_refused_too(ledger, write, before, now, message):
    ledger.keep(read(ledger, a_table(write, row(**before))))
    with pytest.raises(DataError, match=message):
        ledger.keep(read(ledger, a_table(write, row(**now))))


def test_merged_and_trained_numbers_of_one_mixture_stand_side_by_side(ledger, write):
    rows = [row(), row(kind="merged", **{"value:qa": "0.9"})]
    assert ledger.keep(read(ledger, a_table(write, *rows))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("chart", "charts"), "is about the domains chart, table"),
        (("qa: {metric: acc}", "qa: {metric: acc}, more: {}"), "has no number of target more"),
    ],
)
def test_a_ledger_of_another_recipe_is_refused(ledger, write, change, message):
    ledger.keep(read(ledger, a_table(write, row())))
    with pytest.raises(RunError, match=message):
        Ledger(ledger.folder, load_told(write("other.yaml", RECIPE.replace(*change))))


def test_a_damaged_line_is_named(ledger, recipe, write):
    ledger.keep(read(ledger, a_table(write, row())))
    ledger.told_path.write_text(ledger.told_path.read_text()[:-10])
    with pytest.raises(RunError, match=r"told.jsonl:1 is damaged"):
        Ledger(ledger.folder, recipe)


def test_the_folder_of_a_run_is_refused(recipe, write, tmp_path):
    write("run/provenance.json", {})
    with pytest.raises(RunError, match="is a run of its own"):
        Ledger(tmp_path / "run", recipe)


def test_two_at_once_are_refused(recipe, tmp_path):
    with asktell._opened(recipe, tmp_path / "run"), pytest.raises(RunInUseError, match="is in use by process"):
        asktell.ask(recipe, tmp_path / "run")


# --- asking


def test_asking_again_repeats_what_is_open(recipe, tmp_path):
    first = asktell.ask(recipe, tmp_path / "run", count=3)
    assert asktell.ask(recipe, tmp_path / "run", count=3) == first
    assert asktell.ask(recipe, tmp_path / "run", count=2) == first


def test_asking_for_more_keeps_what_was_asked_for(recipe, tmp_path):
    first = asktell.ask(recipe, tmp_path / "run", count=2)
    more = asktell.ask(recipe, tmp_path / "run", count=4)
    assert more[:2] == first
    assert len({p.shares for p in more}) == 4


def test_proposals_can_be_carried_out_as_they_are_written(recipe, tmp_path):
    asktell.ask(recipe, tmp_path / "run", count=4, experts="runs/x/experts")
    asktell.ask(recipe, tmp_path / "run", count=1, verify=True)
    rows = [json.loads(line) for line in (tmp_path / "run/mixture/proposals.jsonl").read_text().splitlines()]
    assert rows[0]["command"] == (
        f"datalloy merge runs/x/experts/chart=0.5 runs/x/experts/table=0.5 --out merges/{rows[0]['candidate']}"
    )
    assert [row["kind"] for row in rows] == ["merged"] * 4 + ["trained"]
    assert rows[-1]["samples"] == {"chart": 500, "table": 500}


def test_filled_in_proposals_are_an_answer(recipe, tmp_path):
    asktell.ask(recipe, tmp_path / "run", count=3)
    path = tmp_path / "run/mixture/proposals.jsonl"
    rows = [json.loads(line) | {"values": {"qa": 0.5, "error": 0.5}} for line in path.read_text().splitlines()]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert asktell.tell(recipe, [answers], tmp_path / "run")[0] == 3
    assert Ledger(tmp_path / "run", recipe).open == []


def test_a_share_of_four_decimals_is_the_share_itself():
    assert in_steps([0.12345, 0.87655]) in {(1234, 8766), (1235, 8765)}
    assert in_steps([1 / 3, 1 / 3, 1 / 3]) == (3334, 3333, 3333)


def test_a_table_with_too_many_cells_is_refused(ledger, write):
    text = "w:chart,w:table,kind,value:qa,value:error\n0.5,0.5,trained,0.7,0,2\n"
    assert len(next(csv.reader([text.splitlines()[1]]))) == 6
    with pytest.raises(DataError, match=r"table.csv:2 has more cells than the table has columns"):
        read(ledger, write("table.csv", text))


def test_the_example_of_the_page_works(tmp_path):
    page = (Path(__file__).parent.parent / "docs/evaluators.md").read_text()
    for kind, name in (("yaml", "recipe.yaml"), ("csv", "table.csv")):
        block = page.partition(f"```{kind}\n")[2].partition("```")[0]
        (tmp_path / name).write_text(block)
    new, advice = asktell.tell(tmp_path / "recipe.yaml", [tmp_path / "table.csv"], tmp_path / "run")
    assert new == 6
    assert advice.mixture.searched["maths"] > 0.4


# --- the command line


def test_ask_tell_and_results_on_the_command_line(write, tmp_path, capsys):
    path, run = str(write("recipe.yaml", RECIPE)), ["--run", str(tmp_path / "run")]
    assert cli.answer(["ask", path, "--count", "2", *run]) == 0
    *proposals, last = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in proposals] == ["design", "design"]
    assert last == str(tmp_path / "run/mixture/proposals.jsonl")
    results = write(f"{proposals[0].split()[0]}/results_2026.json", harness())
    assert cli.answer(["tell", path, str(results), *run]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run/mixture/told.jsonl")
    table = a_table(write, row(), row(**{"w:chart": "1", "w:table": "0"}), row(**{"w:chart": "0", "w:table": "1"}))
    assert cli.answer(["tell", path, str(table), *run]) == 0
    told = capsys.readouterr().out
    assert "3 new mixtures" in told
    assert "verdict: " in told
    assert cli.answer(["results", str(results)]) == 0
    assert capsys.readouterr().out.startswith("evaluator,model,task,metric,variant,value,standard_error,n,")


def test_faults_end_with_their_exit_codes(write, tmp_path, capsys):
    path, run = str(write("recipe.yaml", RECIPE)), ["--run", str(tmp_path / "run")]
    assert cli.answer(["tell", path, str(a_table(write, row(**{"value:qa": "inf"}))), *run]) == 3
    assert "must be a finite number" in capsys.readouterr().err
    assert cli.answer(["check", path]) == 2
    assert "`datalloy ask` and `tell`" in capsys.readouterr().err

"""The whole chain on the embedded model: what it leaves behind, and that killing it changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from scipy.stats import rankdata

from datalloy import embeddings
from datalloy.config import load_recipe
from datalloy.errors import AgreementError, DataError, LeakageError
from datalloy.run import Run, file_hash
from datalloy.scores import Scores, read_table
from datalloy.selection import Selection
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.workflows import Workflow

PLAN = PoolPlan(samples={"chart": 24, "counting": 20}, targets=("chart", "counting"), target_items=12, holdout_items=8)
RECIPE = """\
name: small
base: tiny
domains:
  chart: {path: data/chart.jsonl}
  counting: {path: data/counting.jsonl}
targets:
  chart: {path: data/chart.target.jsonl}
  counting: {path: data/counting.target.jsonl, metric: loss, weight: 0.5}
evaluation:
  chart-holdout: {path: data/chart.holdout.jsonl}
score: {target_items: 8, probes: 6, warmup_fraction: 0.1}
select: {bakeoff_arms: [tail, low_loss], bakeoff_fractions: [0.5], bakeoff_epochs: 200}
train: {adapter: none, freeze_vision: false, learning_rate: 1e-3, batch_size: 4, samples: 48}
evaluate: {max_new_tokens: 4, resamples: 100}
"""
RESULTS = (
    "scores.parquet",
    "selection.parquet",
    "metrics.json",
    "bakeoff.json",
    "check.json",
    "model/model.safetensors",
)


def start(recipe_path, folder):
    """The whole chain in a process of its own. One thread: another number of threads sums in another order."""
    return subprocess.Popen(
        [sys.executable, "-m", "datalloy.cli", "run", str(recipe_path), "--run", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    write_pool(folder / "data", PLAN, seed=0)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(recipe_path):
    """A run that nobody disturbed."""
    folder = recipe_path.parent / "undisturbed"
    process = start(recipe_path, folder)
    error = process.communicate()[1].decode()
    assert process.returncode == 0, error
    return folder


def test_every_sample_of_the_pool_is_scored_and_decided(finished):
    scores, selection = Scores.read(finished / "scores.parquet"), Selection.read(finished / "selection.parquet")
    assert len(scores) == len(selection) == 44
    assert scores.metadata["method"] == "tail"
    assert scores.metadata["agreement_with_exact"]["probes"] == 6
    # it is raced beside low loss
    assert "changes the targets' loss by" in scores.metadata["step_scans"]["tail"]["reason"]


def test_bakeoff_names_a_winner_with_margins_over_full_and_random(finished):
    outcome = json.loads((finished / "bakeoff.json").read_text())
    over = {margin["over"] for margin in outcome["margins"]} | {outcome["winner"]["scorer"]}
    assert "full" in over
    assert any(name.startswith("random") for name in over)


def test_status_is_written_and_conserves_records(finished):
    counts = json.loads((finished / "status.json").read_text())["counts"]
    assert sum(counts["domains"].values()) + counts["rejected"] == 44


def test_metrics_compare_base_and_tuned_model_on_all_sets(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["base"]) == set(metrics["model"]) == {"chart", "counting", "chart-holdout"}
    assert metrics["model"]["counting"]["metric"] == "loss"


def test_exported_rows_are_the_kept_rows_byte_for_byte(finished, recipe_path):
    selection = Selection.read(finished / "selection.parquet")
    kept = set(zip(*selection.kept_keys(), strict=True))
    lines = (recipe_path.parent / "data" / "chart.jsonl").read_bytes().splitlines(keepends=True)
    wanted = {line for line in lines if ("chart", json.loads(line)["id"]) in kept}
    assert set((finished / "export" / "chart.jsonl").read_bytes().splitlines(keepends=True)) == wanted


def test_running_again_computes_nothing(finished, recipe_path, monkeypatch):
    monkeypatch.setattr("datalloy.workflows.train", None)
    monkeypatch.setattr("datalloy.workflows.evaluate", None)
    monkeypatch.setattr("datalloy.workflows.scorers.prepare", None)
    with Run(load_recipe(recipe_path), finished) as run:
        Workflow(run).run_all()


@pytest.mark.timeout(900)  # the program starts seven times: minutes on a busy machine
def test_a_run_killed_again_and_again_ends_with_the_same_results(finished, recipe_path):
    """SIGKILL at many points; work that has a done-record is never done again; the results are equal to the byte."""
    folder = recipe_path.parent / "killed"
    kills, recorded = 0, {}
    while True:
        process = start(recipe_path, folder)
        # wait for two more finished units, then a little, so that kills fall at different places of a unit
        while process.poll() is None and kills < 6:
            now = {p.name: p.stat().st_mtime_ns for p in (folder / "units").glob("*.json")}
            if len(now) >= len(recorded) + 3:
                time.sleep(0.05 * kills)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        error = process.communicate()[1].decode()
        now = {p.name: p.stat().st_mtime_ns for p in (folder / "units").glob("*.json")}
        assert recorded.items() <= now.items(), "a unit that was done has been done again"
        recorded = now
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills >= 4
    for name in RESULTS:
        assert file_hash(folder / name) == file_hash(finished / name), name


def test_a_target_item_in_the_pool_is_refused(recipe_path, tmp_path):
    write_pool(tmp_path / "data", PLAN, seed=0)
    leak = (tmp_path / "data" / "chart.target.jsonl").read_text().splitlines(keepends=True)[3]
    with (tmp_path / "data" / "chart.jsonl").open("a") as file:
        file.write(leak)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with (
        Run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run") as run,
        pytest.raises(LeakageError, match="chart"),
    ):
        Workflow(run).check()


def test_a_leak_is_dropped_where_the_recipe_says_so(tmp_path):
    write_pool(tmp_path / "data", PLAN, seed=0)
    leak = (tmp_path / "data" / "chart.target.jsonl").read_text().splitlines(keepends=True)[3]
    with (tmp_path / "data" / "chart.jsonl").open("a") as file:
        file.write(leak)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml", ("leakage.on_leak=drop", "max_rejected_fraction=0.1"))
    with Run(recipe, tmp_path / "run") as run:
        counts = Workflow(run).check()
    assert counts["domains"]["chart"] == 24
    assert counts["rejected_by_reason"] == {"leak": 1}


def test_an_evaluation_item_that_is_also_a_target_is_refused(tmp_path):
    write_pool(tmp_path / "data", PLAN, seed=0)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml", ("evaluation.chart-holdout.path=data/chart.target.jsonl",))
    with Run(recipe, tmp_path / "run") as run, pytest.raises(LeakageError, match="chart-holdout"):
        Workflow(run).check()


def test_too_many_bad_records_stop_the_run_and_are_listed(tmp_path):
    write_pool(tmp_path / "data", PLAN, seed=0)
    with (tmp_path / "data" / "chart.jsonl").open("a") as file:
        file.write("not json\n" * 3)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with Run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run") as run:
        with pytest.raises(DataError, match="3 of 27 records were rejected"):
            Workflow(run).check()
        lines = run.path("rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [25, 26, 27]


def test_a_record_is_rejected_once_and_in_its_own_set_alone(tmp_path):
    """The target's file is also part of the pool, and one of its records is both leaked and unusable."""
    write_pool(tmp_path / "data", PLAN, seed=0)
    target = tmp_path / "data" / "chart.target.jsonl"
    lines = target.read_text().splitlines(keepends=True)
    bad = json.loads(lines[0])
    bad["id"] = "bad\u2028id"
    bad["messages"][-1]["content"] = "<end_of_utterance>"
    target.write_text("".join(lines) + json.dumps(bad, ensure_ascii=False) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    overrides = (
        "domains.copy.path=data/chart.target.jsonl",
        "domains.copy.limit=2",
        "domains.counting.path=data/chart.target.jsonl",
        "leakage.on_leak=drop",
        "max_rejected_fraction=1",
    )
    with Run(load_recipe(tmp_path / "recipe.yaml", overrides), tmp_path / "run") as run:
        with pytest.raises(DataError, match=r"domains\.\w+ .* has no usable sample"):
            Workflow(run).check()
        counts = json.loads(run.path("check.json").read_text())
        rejected = [json.loads(line) for line in run.path("rejected.jsonl").read_text().splitlines()]
    assert counts["targets"]["chart"] == len(lines)
    assert counts["sets"]["domains"]["copy"] == {"read": 2, "accepted": 0, "rejected": 2}
    assert counts["sets"]["targets"]["chart"] == {"read": len(lines) + 1, "accepted": len(lines), "rejected": 1}
    assert counts["rejected_by_reason"]["control_token_in_text"] == 2
    keys = [(reject["set"], reject["path"], reject["row"]) for reject in rejected]
    assert len(set(keys)) == len(keys) == counts["rejected"]


def test_animations_are_counted_because_only_their_first_frame_is_seen(tmp_path, caplog):
    write_pool(tmp_path / "data", PLAN, seed=0)
    picture = next((tmp_path / "data" / "images").glob("target-chart*"))
    with PIL.Image.open(picture) as opened:
        frame = opened.convert("RGB")
    frame.save(picture, "PNG", save_all=True, append_images=[PIL.Image.new("RGB", frame.size)])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with Run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run") as run:
        counts = Workflow(run).check()
    assert counts["first_frame_only"]["targets.chart"] >= 1
    assert sum(counts["first_frame_only"].values()) == counts["first_frame_only"]["targets.chart"]
    assert "only the first frame is seen" in caplog.text


def test_pictures_that_change_under_a_run_are_noticed(tmp_path):
    write_pool(tmp_path / "data", PLAN, seed=0)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with Run(recipe, tmp_path / "run") as run:
        Workflow(run).check()
    picture = next((tmp_path / "data" / "images").glob("target-chart*"))
    picture.write_bytes(next((tmp_path / "data" / "images").glob("holdout-chart*")).read_bytes())
    with Run(recipe, tmp_path / "run") as run, pytest.raises(DataError, match="changed since"):
        Workflow(run).check()


def test_a_target_with_too_few_items_is_refused(tmp_path):
    write_pool(tmp_path / "data", PLAN, seed=0)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml", ("targets.chart.limit=3",))
    with Run(recipe, tmp_path / "run") as run, pytest.raises(DataError, match=r"targets\.chart has 3 items"):
        Workflow(run).check()


@pytest.mark.parametrize(
    ("overrides", "scoring", "judging"),
    [
        ((), 6, 6),  # 8 are asked for: half of twelve at most where a bake-off follows
        (("score.target_items=3",), 3, 9),
        (("score.method=exact", "select.keep_fraction=0.5"), 8, 4),
    ],
)
def test_the_bakeoff_is_judged_by_all_target_items_that_do_not_score(
    recipe_path, tmp_path, overrides, scoring, judging
):
    with Run(load_recipe(recipe_path, overrides), tmp_path / "run") as run:
        work = Workflow(run)
        scored, judged = ({s.id for s in work._target_items(part)["chart"]} for part in ("score", "judge"))
    assert (len(scored), len(judged)) == (scoring, judging)
    assert not scored & judged


def test_a_short_run_sees_each_sample_as_often_as_the_final_training(recipe_path, tmp_path, monkeypatch):
    """Twelve steps of four see all 44 samples once and a half of them twice; four steps do so with a third of each."""
    seen = []
    monkeypatch.setattr(
        "datalloy.workflows.train", lambda vlm, encoded, settings, out, steps: seen.append((steps, len(encoded)))
    )
    overrides = ("select.bakeoff_arms=[low_loss, high_loss]", "score.warmup_fraction=0")
    with Run(load_recipe(recipe_path, overrides), tmp_path / "run") as run:
        Workflow(run).select()
    assert sorted(set(seen)) == [(4, 7), (4, 15), (12, 22), (12, 44)]


def test_the_bakeoff_does_not_train_twice_on_the_same_samples(recipe_path, tmp_path, monkeypatch):
    """Domains of 24 and 20 samples are one stratum of length each, so low loss by length keeps what low loss keeps."""
    monkeypatch.setattr("datalloy.workflows.train", lambda vlm, encoded, settings, out, steps: None)
    overrides = ("select.bakeoff_arms=[low_loss, low_loss_by_length, high_loss]", "score.warmup_fraction=0")
    with Run(load_recipe(recipe_path, overrides), tmp_path / "run") as run:
        Workflow(run).select()
        results = json.loads(run.path("bakeoff.json").read_bytes())["results"]
    assert {row["arm"]["scorer"] for row in results} == {"full", "random", "low_loss", "high_loss"}


def test_a_score_that_disagrees_is_left_out_of_a_race_and_an_error_where_it_is_the_only_way(recipe_path, tmp_path):
    """Six probes are too few for `calibrated`, which then refuses."""
    few = ("select.keep_fraction=0.5", "score.warmup_fraction=0")
    with Run(load_recipe(recipe_path, (*few, "select.bakeoff_arms=[calibrated, low_loss]")), tmp_path / "two") as run:
        assert Workflow(run).score().metadata["method"] == "loss"
    with (
        Run(load_recipe(recipe_path, (*few, "select.bakeoff_arms=[calibrated]")), tmp_path / "one") as run,
        pytest.raises(AgreementError, match="probes"),
    ):
        Workflow(run).score()


def test_the_table_of_the_run_is_of_what_knows_the_targets_wherever_it_stands_among_the_arms(recipe_path, tmp_path):
    overrides = ("select.bakeoff_arms=[visual_gain, first_order]", "score.step=0.01", "score.warmup_fraction=0")
    with Run(load_recipe(recipe_path, overrides), tmp_path / "run") as run:
        assert Workflow(run).score().metadata["method"] == "first_order"
        assert Workflow(run).scores_by("visual_gain").metadata == {"method": "visual_gain", "signed": False}


def test_right_and_wanted_is_made_from_the_pass_of_first_order(recipe_path, tmp_path):
    overrides = ("select.bakeoff_arms=[right_and_wanted, first_order]", "score.step=0.01", "score.warmup_fraction=0")
    with Run(load_recipe(recipe_path, overrides), tmp_path / "run") as run:
        workflow = Workflow(run)
        made, table = workflow.scores_by("right_and_wanted"), workflow.score()
        assert list(workflow._tables) == ["first_order"]
    rows = np.flatnonzero(table.domain == "counting")
    # in a domain of twenty all others are neighbours
    right_R = [np.median(np.delete(table.loss[rows], row)) - loss for row, loss in enumerate(table.loss[rows])]
    place_R = (rankdata(right_R) + rankdata(table.utility[rows]) - 1) / 20
    assert made.utility[rows] == pytest.approx(place_R)
    assert made.metadata == {"method": "right_and_wanted", "signed": False}
    assert made.state.tolist() == table.state.tolist()


def test_prompts_are_embedded_once_for_all_arms_and_not_again_in_the_next_process(recipe_path, tmp_path, monkeypatch):
    monkeypatch.setattr("datalloy.workflows.SHARD", 20)
    overrides = ("score.method=low_loss_by_neighbours", "select.keep_fraction=0.5", "score.warmup_fraction=0")
    embedded, embed = [], embeddings.embed

    def noted(vlm, samples, of):
        embedded.append((of, len(samples)))
        return embed(vlm, samples, of)

    monkeypatch.setattr(embeddings, "embed", noted)
    with Run(load_recipe(recipe_path, overrides), tmp_path / "run") as run:
        workflow = Workflow(run)
        kept = workflow.select().kept
        utility_N = workflow.scores_by("low_loss_by_neighbours").utility
        assert Workflow(run).scores_by("low_loss_by_neighbours").utility.tolist() == utility_N.tolist()
    assert embedded == [("prompts", 20), ("prompts", 20), ("prompts", 4)]
    assert utility_N[kept].mean() > 0 > utility_N[~kept].mean()
    assert kept.sum() == 22


def test_a_sample_whose_scoring_failed_is_not_embedded(recipe_path, tmp_path, monkeypatch):
    overrides = ("score.method=low_loss_by_neighbours", "select.keep_fraction=0.5", "score.warmup_fraction=0")
    with Run(load_recipe(recipe_path, overrides), tmp_path / "run") as run:
        workflow = Workflow(run)
        table = workflow.score()
        failed_N = np.arange(len(table)) == 3
        failed = Scores.from_columns(
            id=table.id,
            domain=table.domain,
            supervised_tokens=table.supervised_tokens,
            length_tokens=table.length_tokens,
            loss=np.where(failed_N, np.nan, table.loss),
            utility=np.where(failed_N, np.nan, table.utility),
            utility_by_target={},
            utility_se=table.utility_se,
            state=np.where(failed_N, "oom", table.state),
            metadata=table.metadata,
        )
        monkeypatch.setattr(workflow, "score", lambda: failed)
        assert np.isnan(workflow._prompts(np.arange(len(workflow.pool)))).all(axis=1).nonzero()[0].tolist() == [3]
        found = workflow.scores_by("low_loss_by_neighbours")
    assert np.isnan(found.utility).nonzero()[0].tolist() == [3]
    assert found.state[3] == "oom"


def test_scores_do_not_depend_on_the_batch_size(recipe_path, tmp_path):
    """score.batch_size is left out of the fingerprint, so it may not change a result beyond rounding."""
    tables = []
    for size in (3, 16):
        overrides = (f"score.batch_size={size}", "score.method=first_order", "score.step=0.01")
        with Run(load_recipe(recipe_path, overrides), tmp_path / f"run{size}") as run:
            tables.append(Workflow(run).score())
    assert abs(tables[0].utility - tables[1].utility).max() < 1e-4 * abs(tables[0].utility).max()


def test_a_table_that_is_damaged_after_all_was_done_is_made_again(finished, recipe_path):
    whole = (finished / "scores.parquet").read_bytes()
    (finished / "scores.parquet").write_bytes(whole[:100])
    with Run(load_recipe(recipe_path), finished) as run:
        Workflow(run).run_all()
    assert (finished / "scores.parquet").read_bytes() == whole


@pytest.mark.parametrize("method", ["random", "length"])
def test_baselines_without_a_loss_ask_no_model(method, recipe_path, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_path, (f"score.method={method}", "select.keep_fraction=0.5"))
    with Run(recipe, tmp_path / "run") as run:
        workflow = Workflow(run)
        monkeypatch.setattr("datalloy.vlm.VLM.losses", None)
        table, selection = workflow.score(), workflow.select()
    assert len(table) == len(selection) == 44
    assert table.metadata["method"] == "lengths"
    assert (table.supervised_tokens > 0).all()
    assert selection.kept.sum() == 22
    if method == "length":
        tokens = dict(zip(zip(table.domain, table.id, strict=True), table.supervised_tokens, strict=True))
        for domain in ("chart", "counting"):
            kept, rest = (
                [
                    tokens[d, i]
                    for d, i, k in zip(selection.domain, selection.id, selection.kept, strict=True)
                    if d == domain and k == want
                ]
                for want in (True, False)
            )
            assert min(kept) >= max(rest)


def test_lengths_of_check_are_those_of_the_scores(finished):
    table, _ = read_table(finished / "lengths.parquet", kind="lengths", version=1)
    scores = Scores.read(finished / "scores.parquet")
    for column in table.column_names:
        assert table[column].to_pylist() == scores.table[column].to_pylist()


def test_chain_needs_no_folder_but_its_own(finished):
    """Everything a run wrote is inside its folder, and nothing half-written is left."""
    assert not list(Path(finished).rglob("*.tmp"))

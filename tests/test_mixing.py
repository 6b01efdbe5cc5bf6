"""The mixture half of a run, for real on the embedded model: experts, merges, search, real runs, verdict."""

import json
from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from datalloy import mixing
from datalloy.config import ScorerName, load_recipe
from datalloy.costs import estimate
from datalloy.durable import digest
from datalloy.errors import DataError, RecipeError
from datalloy.mixture import Mixture, read_candidates
from datalloy.report import write_report
from datalloy.run import Run
from datalloy.scores import Scores
from datalloy.summary import summarise
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.training import train
from datalloy.vlm import VLM
from datalloy.workflows import Workflow

PLAN = PoolPlan(
    samples={"chart": 40, "counting": 30, "table": 20},
    faults={},
    targets=("chart", "counting"),
    target_items=16,
    holdout_items=8,
)
RECIPE = """\
name: mixed
base: tiny
domains:
  chart: {path: data/chart.jsonl}
  counting: {path: data/counting.jsonl}
  table: {path: data/table.jsonl, max_epochs: 2}
targets:
  chart: {path: data/chart.target.jsonl}
  counting: {path: data/counting.target.jsonl}
evaluation:
  holdout: {path: data/chart.holdout.jsonl}
score: {method: low_loss}
select: {keep_fraction: 0.5}
mixture: {verify_runs: 2, confirm_runs: 1, checkpoints: [0.5]}
train: {adapter: none, learning_rate: 5e-4, batch_size: 8, samples: 48}
evaluate: {max_new_tokens: 4, resamples: 100}
"""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    write_pool(folder / "data", PLAN, seed=0)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(recipe_path):
    folder = recipe_path.parent / "run"
    with Run(load_recipe(recipe_path), folder) as run:
        Workflow(run).run_all()
        write_report(folder)
    return folder


@pytest.fixture
def opened(finished, recipe_path):
    """The finished run, opened again, with training switched off: whatever is asked for must be there already."""
    with Run(load_recipe(recipe_path), finished) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "train", None)
        yield Workflow(run).mixing


def a_mixing(recipe_path, folder, *overrides):
    with Run(load_recipe(recipe_path, overrides), folder) as run:
        return Workflow(run).mixing


# --- what a finished run holds


def test_the_advice_is_a_mixture_with_its_evidence(finished):
    advice = Mixture.read(finished / "mixture" / "mixture.json")
    assert sum(advice.weights.values()) == pytest.approx(1)
    assert advice.weights.keys() == advice.searched.keys() == {"chart", "counting", "table"}
    assert all(low <= advice.searched[name] <= high for name, (low, high) in advice.interval.items())
    assert advice.agreement.spearman.mixtures == 3 + 2
    assert advice.spent.runs == (4 if advice.expected_gain_vs_uniform.source == "confirmed" else 2)
    assert (advice.metric, advice.judged_by) == ("probability", "marks and probability")
    assert advice.spent.slope_calls > 0


def test_what_is_advised_was_really_trained(finished, opened):
    advice = Mixture.read(finished / "mixture" / "mixture.json")
    weight_K = np.array([advice.searched[name] for name in opened.names])
    assert (opened.train_on(weight_K) / "model.safetensors").exists()


def test_a_domain_is_repeated_no_more_often_than_the_recipe_allows(finished, opened):
    names, _, rows = read_candidates(finished / "mixture" / "candidates.parquet")
    cap = 2 * 10 / 48  # two epochs of the ten selected samples, of 48
    assert opened.simplex.cap_K[names.index("table")] == pytest.approx(cap)
    assert max(row.weight_K[names.index("table")] for row in rows if row.weight_K.max() < 1) <= cap + 1e-6
    assert Mixture.read(finished / "mixture" / "mixture.json").weights["table"] <= cap + 1e-6


def test_experts_are_kept_at_the_checkpoints_asked_for(finished):
    for name in ("chart", "counting", "table"):
        assert (finished / "experts" / name / "model.safetensors").exists()
        assert (finished / "experts" / name / "after-50" / "model.safetensors").exists()


def test_no_model_is_written_for_a_candidate(finished):
    folders = {path.parent.relative_to(finished).parts[:2] for path in finished.rglob("*.safetensors")}
    assert {parts[0] for parts in folders} == {"experts", "mixture", "model", "proxy"} - ({"proxy"} - _tops(finished))
    in_mixture = {parts[1] for parts in folders if parts[0] == "mixture"}
    assert in_mixture - {"merge", "confirm"} == {"runs"}


def _tops(folder):
    return {path.name for path in folder.iterdir()}


def test_export_has_exactly_the_counts_of_the_mixture(finished, opened):
    total = 0
    for share in opened.shares():
        path = finished / "export" / f"{share['domain']}.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        assert len(lines) == share["count"]
        repeated = Counter(lines).values()
        assert not repeated or max(repeated) - (min(repeated) if share["passes"] >= 1 else 0) <= 1
        total += len(lines)
    assert total == 48


def test_the_final_model_is_the_verified_run_of_the_same_length(finished, opened):
    advice = Mixture.read(finished / "mixture" / "mixture.json")
    source = opened.train_on(np.array([advice.weights[name] for name in opened.names]))
    model = "model.safetensors"
    assert (finished / "model" / model).read_bytes() == (source / model).read_bytes()


def test_metrics_hold_the_model_of_uniform_shares_beside_the_advised_one(finished):
    assert set(json.loads((finished / "metrics.json").read_text())) - {"merge"} == {"base", "model", "uniform"}


def test_a_merge_that_is_offered_is_the_model_that_was_searched(opened, monkeypatch):
    advice = opened.verify()
    monkeypatch.setattr(opened, "verify", lambda: replace(advice, verdict="deploy the merge"))
    opened.run.path("units/mixture--merge.json").unlink(missing_ok=True)
    merged = VLM.load(str(opened.write_merge()), device="cpu")
    searched_K = np.array([advice.searched[name] for name in opened.names])
    assert np.allclose(opened._items.values(merged), opened.merged.all_values(searched_K), atol=1e-5)


def test_called_again_search_and_verdict_train_and_measure_nothing(opened, monkeypatch):
    monkeypatch.setattr("datalloy.merging._CheckpointMerge.set", None)
    before = {path: path.stat().st_mtime_ns for path in opened.run.path("units").iterdir()}
    found = opened.search()
    opened.verify()
    assert opened.simplex.contains(found.weight_K, 1e-6)
    assert {path: path.stat().st_mtime_ns for path in opened.run.path("units").iterdir()} == before


def test_the_merged_model_at_a_vertex_answers_as_its_expert(opened):
    expert = VLM.load(str(opened.run.path("experts/chart")), device="cpu")
    weight_K = np.eye(3)[opened.names.index("chart")]
    assert np.allclose(opened.merged.all_values(weight_K), opened._items.values(expert), atol=1e-5)


def test_the_summary_and_the_page_say_verdict_and_shares(finished):
    assert "cross-check without merging (MixMin)" in "\n".join(summarise("mix", finished))
    text = "\n".join([*summarise("mix", finished), *summarise("verify", finished), *summarise("run", finished)])
    assert "verdict: " in text
    assert "gain over uniform shares" in text
    page = (finished / "report.html").read_text()
    assert "The mixture" in page
    assert "Expected value, over all mixtures of chart, counting, table" in page


# --- what the recipe can ask for


def test_buckets_split_every_domain_by_score(recipe_path, tmp_path):
    whole = a_mixing(recipe_path, tmp_path / "run", "mixture.buckets=2")
    assert whole.names == ("chart.1", "chart.2", "counting.1", "counting.2", "table.1", "table.2")
    scores = Scores.read(tmp_path / "run" / "scores.parquet")
    loss = dict(zip(scores.id, scores.loss, strict=True))
    best, worst = whole.parts[0], whole.parts[1]
    assert len(best.samples) == len(worst.samples) == 20
    assert max(loss[s.id] for s in best.samples) <= min(loss[s.id] for s in worst.samples)


def test_buckets_are_cut_by_low_loss_by_neighbours_where_it_races(recipe_path, tmp_path):
    arms = "select.bakeoff_arms=[entropy_minus_loss, low_loss, low_loss_by_neighbours]"

    def buckets(method):
        parts = a_mixing(recipe_path, tmp_path / method, "mixture.buckets=2", f"score.method={method}", arms).parts
        return [{s.id for s in part.samples} for part in parts]

    raced = buckets("auto")
    assert raced == buckets("low_loss_by_neighbours")
    assert raced != buckets("entropy_minus_loss")


def test_whole_domains_are_mixed_without_scoring(recipe_path, tmp_path):
    whole = a_mixing(recipe_path, tmp_path / "run", "mixture.data=whole")
    assert [len(part.samples) for part in whole.parts] == [40, 30, 20]
    assert not (tmp_path / "run" / "scores.parquet").exists()


def test_floors_and_groups_of_the_recipe_bind_the_search(recipe_path, tmp_path):
    group = "mixture.groups={rare: {domains: [counting, table], min_share: 0.6}}"
    limited = a_mixing(recipe_path, tmp_path / "run", "mixture.data=whole", "domains.chart.min_share=0.2", group)
    assert limited.simplex.floor_K.tolist() == [0.2, 0, 0]
    assert not limited.simplex.contains(np.array([0.5, 0.3, 0.2]))
    assert limited.simplex.contains(np.array([0.3, 0.4, 0.3]))


def test_a_floor_of_a_split_domain_binds_its_buckets_together(recipe_path, tmp_path):
    split = a_mixing(recipe_path, tmp_path / "run", "mixture.buckets=2", "domains.chart.min_share=0.5")
    assert split.simplex.contains(np.array([0.5, 0.0, 0.2, 0.2, 0.05, 0.05]))
    assert not split.simplex.contains(np.array([0.2, 0.2, 0.2, 0.2, 0.1, 0.1]))


def test_a_dry_run_counts_experts_candidates_and_real_runs(recipe_path):
    stages = {line.split()[0]: line for line in estimate(load_recipe(recipe_path)) if " MB" in line}
    assert "3 experts" in stages["experts"]
    assert "nothing written" in stages["mix"]
    assert "4 real runs" in stages["verify"]  # two, and two that confirm
    operations = {name: float(stages[name].split()[1]) for name in ("experts", "verify", "train")}
    assert operations["experts"] == pytest.approx(3 * operations["train"], rel=0.02)
    assert operations["verify"] > 4 * operations["train"]


@pytest.mark.parametrize(("epochs", "runs"), [(50, 16), (5, 2)])
def test_a_dry_run_counts_the_short_models_of_a_bake_off(epochs, runs, recipe_path):
    """Eleven arms and five finalists where two rounds can be paid, else as few as can be; half of the items judge."""
    auto = ("score.method=auto", "select.keep_fraction=auto", "train.samples=960")
    raced = load_recipe(recipe_path, [*auto, f"select.bakeoff_epochs={epochs}"])
    stages = {line.split()[0]: line for line in estimate(raced) if " MB" in line}
    assert f"{runs} short models on 16 items" in stages["bake-off"]


@pytest.mark.parametrize(("fraction", "is_priced"), [(0, False), (0.5, True)])
def test_a_dry_run_prices_a_warm_up_only_where_there_is_one(fraction, is_priced, recipe_path):
    recipe = load_recipe(recipe_path, [f"score.warmup_fraction={fraction}"])
    assert any(line.startswith("warm-up") for line in estimate(recipe)) == is_priced


@pytest.mark.parametrize(
    ("method", "step", "shares"),
    [("exact", 0.5, 0), ("exact", "visible_effect", 0), ("exact", "auto", 1), ("tail", 0.5, 1), ("tail", "auto", 2)],
)
def test_a_dry_run_prices_the_batches_that_a_share_is_measured_on(method, step, shares, recipe_path):
    """Eight batches of eight from a pool of ninety; once for the scorer, and once for exact beside tail."""

    def probing(step):
        settings = [f"score.method={method}", f"score.step={step}", "score.probes=2", "score.target_items=1"]
        (line,) = (line for line in estimate(load_recipe(recipe_path, settings)) if line.startswith("probes"))
        return float(line.split()[1])

    eight_batches = 64 / 90 * scoring_operations(recipe_path, "less")
    assert probing(step) - probing("visible_effect") == pytest.approx(shares * eight_batches, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "is_priced"),
    [
        (("score.method=low_loss_by_neighbours",), True),
        (("score.method=auto", "select.bakeoff_arms=[low_loss, low_loss_by_neighbours]"), True),
        (("score.method=right_and_wanted",), True),
        (("score.method=low_loss", "select.diversity=threshold"), True),
        (("score.method=low_loss",), False),
    ],
)
def test_a_dry_run_prices_the_embedding_where_something_needs_it(settings, is_priced, recipe_path):
    recipe = load_recipe(recipe_path, ["select.keep_fraction=0.5", *settings])
    assert any(line.startswith("embed") for line in estimate(recipe)) == is_priced


def test_a_dry_run_knows_the_price_of_every_score(recipe_path):
    loss, visual, hooks = (scoring_operations(recipe_path, name) for name in ("low_loss", "visual_gain", "less"))
    assert visual == pytest.approx(2 * loss, rel=0.01)
    assert hooks == pytest.approx(3 * loss, rel=0.01)
    assert all(scoring_operations(recipe_path, name) for name in get_args(ScorerName))
    assert scoring_operations(recipe_path, "right_and_wanted") == scoring_operations(recipe_path, "first_order")


def scoring_operations(recipe_path, name):
    judge = ["judge={url: 'http://localhost:9', model: any}"] if name == "judge" else []
    recipe = load_recipe(recipe_path, [f"score.method={name}", "select.keep_fraction=0.5", *judge])
    (line,) = (line for line in estimate(recipe) if line.startswith("score "))
    return float(line.split()[2])


def test_mixing_without_a_mixture_section_says_how_to_switch_it_on(recipe_path, tmp_path):
    with pytest.raises(RecipeError, match=r"mixture: \{\}"):
        a_mixing(recipe_path, tmp_path / "run", "mixture=null")


def test_guard_rails_and_weights_reach_the_objective(recipe_path, tmp_path):
    wanted = ("mixture.data=whole", "mixture.objective=weighted", "targets.chart.weight=3.0")
    with Run(load_recipe(recipe_path, [*wanted, "mixture.guard_rails={chart: 0.1}"]), tmp_path / "run") as run:
        objective = Workflow(run).mixing.objective
    assert objective.weight_G.tolist() == [0.75, 0.25]
    assert objective.max_fall_G.tolist() == [0.1, np.inf]
    assert ((objective.base_G > 0) & (objective.base_G < 1)).all()  # probabilities of the right answers


def test_copies_of_one_content_are_different_samples_of_a_mixture(recipe_path, tmp_path):
    parts = a_mixing(recipe_path, tmp_path / "run", "mixture.data=whole").parts
    keyed = mixing._keyed([*parts[0].samples, parts[0].samples[0]])
    assert len(keyed) == 41


def test_a_domain_without_a_sample_left_is_refused_by_name(recipe_path, tmp_path):
    with Run(load_recipe(recipe_path), tmp_path / "run") as run:
        workflow = Workflow(run)
        workflow._used_samples = lambda: [s for s in workflow.pool if s.domain != "table"]
        with pytest.raises(DataError, match="domain table has no sample left"):
            _ = workflow.mixing


def test_half_of_each_target_is_kept_for_the_verdict_whatever_the_order(recipe_path, tmp_path):
    with Run(load_recipe(recipe_path, ["mixture.data=whole"]), tmp_path / "run") as run:
        workflow = Workflow(run)
        targets, mixed = workflow.targets, workflow.mixing
    turned, unseen = mixing._halves({name: items[::-1] for name, items in targets.items()}, seed=0)
    for name, items in targets.items():
        kept = [sample.id for sample in mixed.unseen[name]]
        assert len(kept) == len(items) // 2
        assert set(kept) == {sample.id for sample in unseen[name]}
        assert {sample.id for sample in mixed.targets[name]} == {s.id for s in items} - set(kept)
    assert [s.id for s in turned["chart"]] == [s.id for s in mixed.targets["chart"]]


def test_without_real_runs_all_items_search(recipe_path, tmp_path):
    whole = a_mixing(recipe_path, tmp_path / "run", "mixture.data=whole", "mixture.verify_runs=0")
    assert len(whole.targets["chart"]) == 16


def test_a_pick_that_is_not_uniform_is_confirmed_by_trainings_from_other_seeds(recipe_path, tmp_path, monkeypatch):
    short = ("mixture.data=whole", "train.samples=16", "mixture.checkpoints=[]", "mixture.confirm_runs=2")
    monkeypatch.setattr(mixing.Mixing, "_best", lambda self, calibration, weight_NK: weight_NK[0])
    with Run(load_recipe(recipe_path, short), tmp_path / "run") as run:
        work = Workflow(run).mixing
        advice = work.verify()
        assert advice.expected_gain_vs_uniform.source == "confirmed"
        assert advice.spent.runs == 2 + 4
        uniform = run.path(f"{work._real_run(work.simplex.uniform).name}/model.safetensors").read_bytes()
        again = {path.read_bytes() for path in run.path("mixture/confirm").glob("*/model.safetensors")}
    assert len(again) == 4
    assert uniform not in again


def test_a_mixture_is_trained_on_in_its_order_and_confirmed_in_others(recipe_path, tmp_path, monkeypatch):
    schedules, losses = [], []

    def watched(vlm, encoded, *arguments, in_order=False, **options):
        if in_order:
            schedules.append([digest(sample.inputs["input_ids"].tolist()) for sample in encoded])
        return train(vlm, encoded, *arguments, in_order=in_order, **options)

    monkeypatch.setattr(mixing, "train", watched)
    short = ("mixture.data=whole", "train.samples=16", "mixture.checkpoints=[]", "mixture.confirm_runs=2")
    with Run(load_recipe(recipe_path, short), tmp_path / "run") as run:
        work = Workflow(run).mixing
        weight_K = np.array([0.5, 0.25, 0.25])
        for unit in (work._real_run(weight_K), *(work._confirm_unit(weight_K, number) for number in (1, 2))):
            work.perform(unit)
            losses.append(run.finished(unit.name)["losses"])
        shares = [Counter(s.domain for s in work._samples_of(weight_K, 16, order)[:8]) for order in (0, 1000)]
    assert len(schedules) == 3
    assert len({tuple(sorted(schedule)) for schedule in schedules}) == 1  # the same samples
    assert len({tuple(schedule) for schedule in schedules}) == 3
    assert len({tuple(each) for each in losses}) == 3
    assert shares == [{"chart": 4, "counting": 2, "table": 2}] * 2


def test_the_final_training_takes_what_is_exported_as_it_lies(recipe_path, tmp_path, monkeypatch):
    final = []

    def watched(vlm, encoded, *arguments, in_order=False, **options):
        final.append(([sample.inputs["input_ids"].tolist() for sample in encoded], in_order))
        return train(vlm, encoded, *arguments, in_order=in_order, **options)

    longer = ("train.samples=32", "mixture.expert_samples=16", "mixture.verify_runs=0", "mixture.checkpoints=[]")
    with Run(load_recipe(recipe_path, ("mixture.data=whole", *longer)), tmp_path / "run") as run:
        work = Workflow(run).mixing
        work.verify()
        monkeypatch.setattr(mixing, "train", watched)
        work.train_final()
        exported = work._encode(work.base, work.training_set())
        expected = [sample.inputs["input_ids"].tolist() for sample in exported]
    assert len(expected) == 32
    assert final == [(expected, True)]


def test_experts_of_low_rank_are_merged_as_adapters(recipe_path, tmp_path):
    lora = ("mixture.data=whole", "train.adapter=lora", "train.rank=2", "train.samples=16", "mixture.checkpoints=[]")
    with Run(load_recipe(recipe_path, [*lora, "mixture.verify_runs=0"]), tmp_path / "run") as run:
        advice = Workflow(run).verify()
    assert (tmp_path / "run" / "experts" / "chart" / "adapter_model.safetensors").exists()
    assert advice.spent.runs == 0

"""Do merged models rank mixtures as training on them does? Worlds and seeds in, agreement, regret and costs out.

    python experiments/mixtures.py --world drawn3 --seeds 0 1 2
    python experiments/mixtures.py --world two_of_three --seeds 0 1 2 --retrained
    python experiments/mixtures.py --world packs --data FOLDER_WITH_UNPACKED_PACKS --seeds 0 1 2
    python experiments/mixtures.py --world two_of_three --seeds 0 1 2 --budget 0.1

After the mixture paper's tables (arXiv 2602.04937): for K = 2 and 3 the 7 and 21 inner points of the lattice of step
1/8, for K = 4 twenty Dirichlet draws (ten for the packs) and uniform weights; every one of them is really trained for
as many steps as the experts and compared with the merge at its weights, by answer loss, by the probability of the
right answer and by exact match on the same target items. Beside it `datalloy verify` runs as a user would run it,
with three real runs of its own and one that confirms, and its pick is held against the best of the grid. In the worlds
`..._of_...` not all domains have a target, or half the answers of one are wrong, so that there is something to find.
`--retrained` trains everything a second time from another seed on the same pool: how far one training agrees with the
next is the most that any prediction can reach. `--budget` trains everything, experts and mixtures, for that share of
the steps: do cheap experts tell what a full training would do? `--experts-alone` trains no mixture: it adds the
experts' losses by item, negated, which MixMin needs, to the rows that the JSON holds, and refuses where their means are
not those of the row.
Resumable: run the same command again. One JSON a world in experiments/results; mixture_curves.py goes on from it.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bases import BASES, base_path
from provenance import provenance

from datalloy import progress
from datalloy.config import Recipe, load_recipe
from datalloy.evaluation import MetricItems
from datalloy.mixing import lay_out_items
from datalloy.run import Run, write_json
from datalloy.simplex import dirichlet, grid
from datalloy.strict_yaml import dump_yaml
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.uncertainty import mixture_agreement, resampled_means, top_1_regret
from datalloy.vlm import VLM
from datalloy.workflows import Workflow

TWO = ("chart", "counting")


class Drawn(NamedTuple):
    """Domains, which of them have a target, and the share of wrong answers in those that have any."""

    skills: tuple[str, ...]
    targets: tuple[str, ...]
    wrong: Mapping[str, float] = {}


DRAWN = {
    "drawn2": Drawn(TWO, TWO),
    "drawn3": Drawn((*TWO, "table"), (*TWO, "table")),
    "drawn4": Drawn(("arithmetic", *TWO, "table"), ("arithmetic", *TWO, "table")),
    "one_of_two": Drawn(("chart", "table"), ("chart",)),
    "wrong_in_one_of_two": Drawn(TWO, TWO, {"counting": 0.5}),
    "two_of_three": Drawn((*TWO, "table"), TWO),
    "two_of_four": Drawn(("arithmetic", *TWO, "table"), TWO),
}
METRICS = {"loss": "loss", "probability": "probability", "exact_match": "target"}
OTHER_SEED = 1000  # added to the seed of training where everything is trained again
PACKS = ("counting", "handwriting", "photo", "puzzle")
TRAIN: dict[str, Any] = {"adapter": "none", "learning_rate": 5e-4, "batch_size": 16, "samples": 960}
RESAMPLES = 2000
DIGITS = 5  # of values in the JSON
SAME = 0.002  # nats: experts trained again by the same seeds, on another machine or by a later commit


def recipe_of(
    world: str, base: str, seed: int, train_seed: int, run: Path, data: Path | None, adapter: str, budget: float
) -> Recipe:
    """The recipe of a world, written beside the run folder: all samples, one target a domain."""
    folder = run.parent
    settings: dict[str, Any] = {"name": f"{world}-{adapter}", "max_rejected_fraction": 0.05}
    settings["base"] = base_path(base, folder.parent)
    train = {**TRAIN, "seed": train_seed, "adapter": adapter}
    if adapter == "lora":
        train["learning_rate"] = 3e-3
    if world == "packs":
        if data is None:
            raise SystemExit("--data names the folder with the unpacked packs")
        settings["data_root"] = str(data.absolute())
        settings["leakage"] = {"on_leak": "drop"}
        settings["domains"] = {name: {"path": f"{name}/train.jsonl", "limit": 800} for name in PACKS}
        settings["targets"] = {name: {"path": f"{name}/test.jsonl", "limit": 100} for name in PACKS}
        train |= {"samples": 1920, "learning_rate": 1e-3, "freeze_vision": False}
    else:
        skills, targets, wrong = DRAWN[world]
        drawn = folder / "data"
        if not drawn.exists():
            plan = PoolPlan(
                samples=dict.fromkeys(skills, 400),
                faults={},
                faults_of={name: {"wrong_answer": share} for name, share in wrong.items()},
                targets=targets,
                target_items=100,
                holdout_items=1,
            )
            write_pool(drawn, plan, seed)
        settings["domains"] = {name: {"path": f"data/{name}.jsonl"} for name in skills}
        settings["targets"] = {name: {"path": f"data/{name}.target.jsonl"} for name in targets}
    settings["train"] = {**train, "samples": round(budget * train["samples"])}
    settings["mixture"] = {"data": "whole", "metric": "probability", "confirm_runs": 1, "seed": seed}
    settings["evaluate"] = {"max_new_tokens": 12, "batch_size": 100}
    path = folder / f"{run.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(settings))
    return load_recipe(path)


def design(domains: int, draws: int) -> np.ndarray:
    """The mixtures of the paper's tables; above three domains so many Dirichlet draws and uniform weights."""
    if domains <= 3:
        return grid(domains, 8, interior=True)
    return np.vstack([dirichlet(domains, draws, 42), np.full((1, domains), 1 / domains)])


class Measured:
    """Trained and merged models on all items of the targets, also on those that the search does not see."""

    def __init__(self, workflow: Workflow) -> None:
        self.mixing = mixing = workflow.mixing
        self.by_metric: dict[str, MetricItems] = {
            name: lay_out_items(mixing.base, mixing.run, workflow.targets, metric) for name, metric in METRICS.items()
        }
        self.target_V = self.by_metric["loss"].target_V

    def design(self, draws: int = 20) -> dict[str, np.ndarray]:
        """Values of all items, by every metric, of trained and merged models: experts first, then the design."""
        weight_NK = np.vstack([np.eye(len(self.mixing.names)), design(len(self.mixing.names), draws)])
        rows = [self.at(f"design/{number}", weight_K) for number, weight_K in enumerate(weight_NK)]
        names = [name for name in rows[0] if ":" in name]
        return {"weights": weight_NK, **{name: np.array([row[name] for row in rows]) for name in names}}

    def at(self, unit: str, weight_K: np.ndarray) -> dict[str, Any]:
        """Of one mixture; what was measured once is not trained again."""
        return self.mixing.run.once(unit, lambda: self._measure(weight_K))

    def _measure(self, weight_K: np.ndarray) -> dict[str, Any]:
        trained, merged = VLM.load(str(self.mixing.train_on(weight_K))), self.mixing.merge.set(weight_K)
        row = {f"true:{metric}": items.values(trained).tolist() for metric, items in self.by_metric.items()}
        return row | {f"merged:{metric}": items.values(merged).tolist() for metric, items in self.by_metric.items()}


def agreement(values: dict[str, np.ndarray], target_V: np.ndarray, names: tuple[str, ...], metric: str) -> list[dict]:
    """Spearman and Kendall of merged against trained without the vertices, by target and for the mean, with regret."""
    inner = values["weights"].max(axis=1) < 1
    true_NV, merged_NV = values[f"true:{metric}"][inner], values[f"merged:{metric}"][inner]
    rows = []
    for name, mask_V in [*((n, target_V == g) for g, n in enumerate(names)), ("mean", np.ones_like(target_V, bool))]:
        groups_V = np.unique(target_V[mask_V], return_inverse=True)[1]
        true_RN, merged_RN = (
            resampled_means(value_NV[:, mask_V], groups_V, resamples=RESAMPLES, seed=0).mean(axis=2)
            for value_NV in (true_NV, merged_NV)
        )
        true_N, merged_N = (_mean_of_targets(v[:, mask_V], groups_V) for v in (true_NV, merged_NV))
        found = {
            coefficient: asdict(
                mixture_agreement(merged_N, true_N, coefficient, confidence=0.95, a_RN=merged_RN, b_RN=true_RN)
            )
            for coefficient in ("spearman", "kendall")
        }
        rows.append(
            {"of": name, **found, "regret": float(top_1_regret(merged_N, true_N)), "spread": float(np.ptp(true_N))}
        )
    return rows


def _mean_of_targets(value_NV: np.ndarray, target_V: np.ndarray) -> np.ndarray:
    return np.stack([value_NV[:, target_V == g].mean(axis=1) for g in np.unique(target_V)], axis=1).mean(axis=1)


def run_folder(runs: Path, world: str, base: str, adapter: str, seed: int, train_seed: int, budget: float = 1) -> Path:
    """Runs of one pool lie side by side, whatever they are trained for."""
    name = f"run-{train_seed}" if budget == 1 else f"run-{train_seed}-budget-{budget:g}"
    return runs / f"{world}-{base}-{adapter}-{seed}" / name


def run_seed(
    world: str, base: str, seed: int, train_seed: int, runs: Path, data: Path | None, adapter: str, budget: float
) -> dict[str, Any]:
    folder = run_folder(runs, world, base, adapter, seed, train_seed, budget)
    with Run(recipe_of(world, base, seed, train_seed, folder, data, adapter, budget), folder) as run:
        workflow = Workflow(run)
        mixing = workflow.mixing
        measured = Measured(workflow)
        values = measured.design(draws=10 if world == "packs" else 20)
        advice = workflow.verify()
        pick_K = np.array([advice.searched[name] for name in mixing.names])
        target_V = measured.target_V
        inner = values["weights"].max(axis=1) < 1
        grid_N = _mean_of_targets(values["true:probability"], target_V)
        pick, uniform = (
            float(_mean_of_targets(np.array([measured.at(unit, weight_K)["true:probability"]]), target_V)[0])
            for unit, weight_K in (("pick", pick_K), ("uniform", mixing.simplex.uniform))
        )
        return {
            "seed": seed,
            "train_seed": train_seed,
            "domains": mixing.names,
            "steps": mixing.steps,
            "mergeability": mixing.diagnose(),
            "agreement": {m: agreement(values, target_V, tuple(mixing.targets), m) for m in METRICS},
            "pick": {
                "weights": pick_K.tolist(),
                "probability": pick,
                "uniform": uniform,
                "best of the grid": float(grid_N[inner].max()),
                "best expert": float(grid_N[~inner].max()),
                "regret": float(grid_N.max()) - pick,
            },
            "advice": advice.to_json(),
            "values": {
                name: np.round(_by_target(v, target_V), DIGITS).tolist() for name, v in values.items() if ":" in name
            },
            "weights": values["weights"].tolist(),
            "expert_log_probs": np.round(values["true:loss"][~inner], DIGITS).tolist(),
        }


def add_expert_log_probs(about: dict[str, Any], row: dict[str, Any], runs: Path) -> None:
    """The negated losses of a row's experts by item, [K, V], trained anew."""
    seeds = row["seed"], row["train_seed"]
    place = about["world"], about["base"]
    folder = run_folder(runs, *place, about["adapter"], *seeds)
    with Run(recipe_of(*place, *seeds, folder, None, about["adapter"], 1), folder) as run:
        measured = Measured(Workflow(run))
        experts = np.eye(len(row["domains"]))
        rows = [measured.at(f"design/{n}", weight_K) for n, weight_K in enumerate(experts)]
    log_prob_KV = np.array([found["true:loss"] for found in rows])
    mean_KG, known_KG = _by_target(log_prob_KV, measured.target_V), np.array(row["values"]["true:loss"])[: len(experts)]
    if (apart := float(np.abs(mean_KG - known_KG).max())) > SAME:
        raise SystemExit(f"{folder}: the experts' mean losses are {apart:.4f} from those of the row; train all anew")
    row["expert_log_probs"] = np.round(log_prob_KV, DIGITS).tolist()


def _by_target(value_NV: np.ndarray, target_V: np.ndarray) -> np.ndarray:
    return np.stack([value_NV[:, target_V == g].mean(axis=1) for g in np.unique(target_V)], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=[*DRAWN, "packs"], required=True)
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    parser.add_argument("--adapter", choices=["none", "lora"], default="none")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=1.0, help="share of the steps that everything is trained for")
    parser.add_argument("--retrained", action="store_true", help="train everything once more, from another seed")
    parser.add_argument("--experts-alone", action="store_true", help="for their losses by item; no mixture is trained")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    progress.show(True)
    name = f"{args.world}_{args.base}" + ("" if args.adapter == "none" else "_lora")
    if args.budget != 1:
        name += f"_budget_{args.budget:g}"
    out = args.out or Path("experiments/results") / f"mixtures_{name}.json"
    if args.experts_alone:
        result = json.loads(out.read_text())
        for row in result["rows"]:
            add_expert_log_probs(result, row, args.runs)
        write_json(out, {**result, "expert_log_probs_commit": provenance()["commit"]})
        return
    again = (0, OTHER_SEED) if args.retrained else (0,)
    rows = [
        run_seed(args.world, args.base, seed, seed + more, args.runs, args.data, args.adapter, args.budget)
        for seed in args.seeds
        for more in again
    ]
    about = {"world": args.world, "base": args.base, "adapter": args.adapter, "budget": args.budget}
    write_json(out, {**about, "rows": rows, **provenance()})
    for row in rows:
        for metric, found in row["agreement"].items():
            print(row["seed"], metric, {f["of"]: round(f["spearman"]["value"], 2) for f in found})
        print(row["seed"], row["pick"])


if __name__ == "__main__":
    main()

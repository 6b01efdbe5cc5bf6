"""What does one more real run buy? Run folders of mixtures.py in, agreement and regret by the number of real runs out.

    python experiments/mixture_curves.py runs/drawn3-none-0 runs/two_of_three-none-0 ... --out FILE

Every predictor gets the K experts, which all of them can use as trained mixtures, and R really trained inner mixtures;
regressions also in a variant that spends all K + R trainings on inner mixtures. It then predicts the mean over the
targets for every mixture of the design that it has not seen (Spearman with what training gave) and picks one of all
(regret: how much worse that is than the best of the design, in the metric's unit). `calibrated` and the regressions see
the same random draws of inner mixtures, 20 of each size; `planned` chooses its runs one after the other as
`datalloy verify` does: the best as predicted so far. `merged` and `MixMin` need no real run. Ceiling: where everything
was trained twice, the Spearman of one training with the other.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mixtures import run_folder
from provenance import provenance
from scipy.stats import spearmanr

from datalloy.calibration import TrainedMixtures, calibrate, interaction_scale
from datalloy.run import write_json
from datalloy.surrogates import SURROGATES
from datalloy.surrogates.mixmin import MixMin

RUNS = (1, 2, 3, 4, 6, 8, 12)
DRAWS = 20
FEWER_DRAWS = 5  # of the regressions that tune trees: seconds a fit
SLOW = ("regmix_tuned", "gaussian_process")
METRICS = ("probability", "loss", "exact_match")


def load(run: Path) -> dict[str, np.ndarray]:
    """The design's values by metric, [N, V], as recorded by mixtures.py in the order of its weights."""
    paths = sorted(run.glob("units/design--*.json"), key=lambda path: int(path.stem.rpartition("--")[2]))
    rows = [json.loads(path.read_bytes())["data"] for path in paths]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def curves(trained: TrainedMixtures, seed: int) -> Iterator[dict[str, Any]]:
    """One row a predictor and number of real runs: mean Spearman and regret over the draws."""
    weight_NK, true_N = trained.weight_NK, trained.true_NG.mean(axis=1)
    vertices, inner = np.flatnonzero(trained.is_vertex_N), np.flatnonzero(~trained.is_vertex_N)

    def row(name: str, runs: int, found: list[tuple[float, float]]) -> dict[str, Any]:
        spearman, regret = np.array(found).T
        return {
            "predictor": name,
            "runs": runs,
            "trainings": runs + len(vertices),
            "spearman": float(np.nanmean(spearman)) if np.isfinite(spearman).any() else None,
            "regret": float(regret.mean()),
            "worst regret": float(regret.max()),
        }

    def judge(predicted_N: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
        held_out = np.setdiff1d(inner, seen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant prediction has no rank agreement: nan
            rank = spearmanr(predicted_N[held_out], true_N[held_out]).statistic if len(held_out) > 2 else np.nan
        return rank, float(true_N.max() - true_N[int(predicted_N.argmax())])

    yield row("merged", 0, [judge(trained.merged_NG.mean(axis=1), vertices)])
    log_prob_KV = trained.true_NV[vertices]
    if (log_prob_KV <= 0).all():  # losses, negated: log-probabilities a token
        yield row("MixMin", 0, [judge(MixMin(log_prob_KV).predict(weight_NK), vertices)])
    for runs in (r for r in RUNS if r <= len(inner) - 3):
        rng = np.random.default_rng([seed, runs])
        draws = [rng.choice(inner, runs, replace=False) for _ in range(DRAWS)]
        yield row("calibrated", runs, [judge(_calibrated(trained, np.r_[vertices, d]), d) for d in draws])
        planned = _planned(trained, vertices, inner, runs)
        yield row("calibrated, planned", runs, [judge(_calibrated(trained, np.r_[vertices, planned]), planned)])
        more = [rng.choice(inner, min(runs + len(vertices), len(inner) - 3), replace=False) for _ in range(DRAWS)]
        for name, make in SURROGATES.items():
            few = FEWER_DRAWS if name in SLOW else DRAWS
            yield row(name, runs, [judge(_fit(make, trained, np.r_[vertices, d]), d) for d in draws[:few]])
            yield row(f"{name}, inner only", runs, [judge(_fit(make, trained, d), d) for d in more[:few]])


def _calibrated(trained: TrainedMixtures, seen: np.ndarray) -> np.ndarray:
    """The calibrated merge's prediction of the mean over targets for every mixture, [N]."""
    merged_NG = trained.merged_NG
    index = {weight_K.tobytes(): n for n, weight_K in enumerate(trained.weight_NK)}

    def predict_merged(weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [index[weight_K.tobytes()] for weight_K in weight_MK]
        return merged_NG[rows], np.zeros((len(rows), merged_NG.shape[1]))

    calibration = calibrate(predict_merged, trained.take(seen), interaction_scale(merged_NG))
    return calibration.predict(trained.weight_NK)[0].mean(axis=1)


def _planned(trained: TrainedMixtures, vertices: np.ndarray, inner: np.ndarray, runs: int) -> np.ndarray:
    chosen: list[int] = []
    while len(chosen) < runs:
        predicted_N = _calibrated(trained, np.r_[vertices, np.array(chosen, dtype=int)])
        rest = np.setdiff1d(inner, chosen)
        chosen.append(int(rest[predicted_N[rest].argmax()]))
    return np.array(chosen)


def _fit(make: Callable[[], Any], trained: TrainedMixtures, seen: np.ndarray) -> np.ndarray:
    """A regression's prediction for every mixture, [N]; constant where it has too few rows to be fitted at all."""
    if len(seen) < 3:
        return np.zeros(len(trained.weight_NK))
    surrogate = make()
    surrogate.fit(trained.weight_NK[seen], trained.true_NG.mean(axis=1)[seen], seed=0)
    return surrogate.predict(trained.weight_NK)


def of_run(world: str, row: dict[str, Any], run: Path) -> Iterator[dict[str, Any]]:
    values = load(run)
    weight_NK = np.array(row["weights"])
    items = values["true:loss"].shape[1]
    targets = len(row["values"]["true:loss"][0])
    target_V = np.repeat(np.arange(targets), items // targets)
    for metric in METRICS:
        if f"true:{metric}" not in values:
            continue
        names = tuple(map(str, range(targets)))
        trained = TrainedMixtures(
            names, weight_NK, values[f"true:{metric}"], values[f"merged:{metric}"], target_V, np.zeros(targets)
        )
        inner = ~trained.is_vertex_N
        spread = float(np.ptp(trained.true_NG.mean(axis=1)[inner]))
        for found in curves(trained, row["seed"]):
            yield {"world": world, "seed": row["seed"], "metric": metric, "spread": spread, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files written by mixtures.py")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of its run folders")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/mixture_curves.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in args.results:
        result = json.loads(path.read_text())
        world = result["world"] if result["adapter"] == "none" else f"{result['world']}, LoRA"
        for row in result["rows"]:
            seeds = (row["seed"], row["train_seed"])
            folder = run_folder(args.runs, result["world"], result["base"], result["adapter"], *seeds)
            for found in of_run(world, row, folder):
                rows.append({**found, "base": result["base"], "train_seed": seeds[1]})
            print(path.name, seeds, flush=True)
    write_json(args.out, {"rows": rows, **provenance()})


if __name__ == "__main__":
    main()

"""What does one more real run buy? Run folders of mixtures.py in, agreement and regret by the number of real runs out.

    python experiments/mixture_curves.py experiments/results/mixtures_*_blurred.json --runs runs

Every predictor gets the K experts, which all of them can use as trained mixtures, and R really trained inner mixtures;
regressions also in a variant that spends all K + R trainings on inner mixtures. It then predicts the mean over the
targets for every mixture of the design that it has not seen (Spearman with what training gave) and picks one of all
(regret: how much worse that is than the best of the design, in the metric's unit). `calibrated` and the regressions see
the same random draws of inner mixtures, 20 of each size; `planned` chooses its runs one after the other as
`datalloy verify` does: the best as predicted so far. `merged`, `MixMin` and `uniform` need no real run.

Where everything was trained twice from different seeds, one training is what predictors see and the other, which none
of them has seen, is what they are judged by: so no predictor is rewarded for having seen the luck of a run. `seed noise
known` is the calibrated merge told how far the two trainings differ. `one more training` predicts by the first training
of every mixture, all of them: the most that could be bought. `line` goes through the experts' values, and `half way to
the line` is the mean of that and of the merge: do merges promise too much between experts? `--means-alone` needs no
run folder: it computes what can be from the means over items and the experts' losses that the JSON files hold, which is
all but the calibrated merge. Rows that --out holds of other designs, metrics and predictors stay.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
FEWER_DRAWS = 3  # of the regressions that tune trees: seconds a fit
SLOW = ("regmix_tuned", "gaussian_process")
METRICS = ("probability", "loss", "exact_match")
KEY = ("world", "base", "adapter", "seed", "train_seed", "metric", "predictor", "runs")  # of a row
Values = dict[str, np.ndarray]  # by metric, of trained and merged models: [N, V]


def load(run: Path) -> Values:
    """The design's values by metric, [N, V], as recorded by mixtures.py in the order of its weights."""
    paths = sorted(run.glob("units/design--*.json"), key=lambda path: int(path.stem.rpartition("--")[2]))
    rows = [json.loads(path.read_bytes())["data"] for path in paths]
    return {key: np.array([row[key] for row in rows]) for key in rows[0] if ":" in key}


def means(training: dict[str, Any]) -> Values:
    """The design's means by target, as two items each, which is the least that `TrainedMixtures` takes."""
    return {name: np.repeat(np.array(mean_NG), 2, axis=1) for name, mean_NG in training["values"].items()}


@dataclass(frozen=True)
class Case:
    """A design that was trained: what predictors see, and by what they are judged, means over targets [N]."""

    trained: TrainedMixtures
    judged_N: np.ndarray
    seed_sd_G: np.ndarray | None  # between trainings, where everything was trained twice
    log_prob_KV: np.ndarray | None  # of the experts by item, where the metric is the loss: what MixMin starts from
    has_items: bool  # or the means over items alone

    @property
    def vertices(self) -> np.ndarray:
        return np.flatnonzero(self.trained.is_vertex_N)

    @property
    def inner(self) -> np.ndarray:
        return np.flatnonzero(~self.trained.is_vertex_N)

    def judge(self, predicted_N: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
        """Spearman over inner mixtures that were not seen, and regret of the pick among all."""
        held_out = np.setdiff1d(self.inner, seen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant prediction has no rank agreement: nan
            rank = spearmanr(predicted_N[held_out], self.judged_N[held_out]).statistic if len(held_out) > 2 else np.nan
        return rank, float(self.judged_N.max() - self.judged_N[int(predicted_N.argmax())])

    def row(self, name: str, runs: int, found: list[tuple[float, float]]) -> dict[str, Any]:
        """Mean Spearman and regret of a predictor over the draws of so many real runs."""
        spearman, regret = np.array(found).T
        return {
            "predictor": name,
            "runs": runs,
            "trainings": runs + len(self.vertices),
            "spearman": float(np.nanmean(spearman)) if np.isfinite(spearman).any() else None,
            "regret": float(regret.mean()),
            "worst regret": float(regret.max()),
        }

    def draws(self, seed: int) -> Iterator[tuple[int, list[np.ndarray], list[np.ndarray]]]:
        """Real runs, so many random inner mixtures, and as many more as there are experts."""
        inner = self.inner
        for runs in (r for r in RUNS if r <= len(inner) - 3):
            rng = np.random.default_rng([seed, runs])
            few = [rng.choice(inner, runs, replace=False) for _ in range(DRAWS)]
            more = min(runs + len(self.vertices), len(inner) - 3)
            yield runs, few, [rng.choice(inner, more, replace=False) for _ in range(DRAWS)]


def merge_curves(case: Case, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of what predicts from merged models, of MixMin and of uniform weights; calibration needs values by item."""
    trained, vertices, inner, row = case.trained, case.vertices, case.inner, case.row
    merged_N = trained.merged_NG.mean(axis=1)
    order = vertices[trained.weight_NK[vertices].argmax(axis=1).argsort()]
    line_N = trained.weight_NK @ merged_N[order]
    for name, predicted_N in (
        ("merged", merged_N),
        ("half way to the line", (merged_N + line_N) / 2),
        ("line", line_N),
    ):
        yield row(name, 0, [case.judge(predicted_N, vertices)])
    distance_N = np.abs(trained.weight_NK - 1 / len(vertices)).sum(axis=1)
    yield row("uniform", 0, [(np.nan, case.judge(-distance_N, vertices)[1])])
    if case.seed_sd_G is not None:
        yield row("one more training", len(inner), [case.judge(trained.true_NG.mean(axis=1), vertices)])
    if case.log_prob_KV is not None:
        yield row("MixMin", 0, [case.judge(MixMin(case.log_prob_KV).predict(trained.weight_NK), vertices)])
    if not case.has_items:
        return
    calibrated = {"calibrated": trained}
    if case.seed_sd_G is not None:
        calibrated["calibrated, seed noise known"] = replace(trained, seed_sd_G=case.seed_sd_G)
    for runs, draws, _ in case.draws(seed):
        for name, data in calibrated.items():
            yield row(name, runs, [case.judge(_calibrated(data, np.r_[vertices, d]), d) for d in draws])
            planned = _planned(data, vertices, inner, runs)
            found = [case.judge(_calibrated(data, np.r_[vertices, planned]), planned)]
            yield row(f"{name}, planned", runs, found)


def regression_curves(case: Case, seed: int, regressions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of the regressions, with the experts and on inner mixtures alone."""
    trained, vertices, row = case.trained, case.vertices, case.row
    for runs, draws, more in case.draws(seed):
        for name in regressions:
            make = SURROGATES[name]
            few = FEWER_DRAWS if name in SLOW else DRAWS
            yield row(name, runs, [case.judge(_fit(make, trained, np.r_[vertices, d]), d) for d in draws[:few]])
            yield row(f"{name}, inner only", runs, [case.judge(_fit(make, trained, d), d) for d in more[:few]])


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


def targets_of(row: dict[str, Any], values: Values) -> np.ndarray:
    """The target of each item, [V]: the same number of items each, one target after the other."""
    targets = len(row["values"]["true:loss"][0])
    return np.repeat(np.arange(targets), values["true:loss"].shape[1] // targets)


def cases(
    row: dict[str, Any], metrics: Sequence[str], has_items: bool, values: Values, other: Values | None = None
) -> Iterator[tuple[str, Case]]:
    """The design of a training by these metrics, judged by another training where there is one."""
    judged = other or values
    target_V = targets_of(row, values)
    targets = int(target_V.max()) + 1
    for metric in metrics:
        true_NV, judged_NV = values[f"true:{metric}"], judged[f"true:{metric}"]
        names, weight_NK = tuple(map(str, range(targets))), np.array(row["weights"])
        trained = TrainedMixtures(names, weight_NK, true_NV, values[f"merged:{metric}"], target_V, np.zeros(targets))
        judged_NG = replace(trained, true_NV=judged_NV).true_NG
        # two draws differ by sqrt(2) standard deviations
        seed_sd_G = (trained.true_NG - judged_NG)[~trained.is_vertex_N].std(axis=0) / np.sqrt(2)
        log_prob_KV = None
        if metric == "loss":
            by_item = true_NV[trained.is_vertex_N] if has_items else row.get("expert_log_probs")
            log_prob_KV = None if by_item is None else np.array(by_item)
        yield metric, Case(trained, judged_NG.mean(axis=1), seed_sd_G if other else None, log_prob_KV, has_items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files written by mixtures.py")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of its run folders")
    parser.add_argument("--regressions", nargs="+", choices=list(SURROGATES), default=list(SURROGATES))
    parser.add_argument("--means-alone", action="store_true", help="without run folders")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=["probability"])
    parser.add_argument("--out", type=Path, default=Path("experiments/results/mixture_curves.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in args.results:
        result = json.loads(path.read_text())
        about = {name: result[name] for name in ("world", "base", "adapter")}
        for row in result["rows"]:
            seeds = row["seed"], row["train_seed"]
            others = [r for r in result["rows"] if r["seed"] == seeds[0] and r["train_seed"] != seeds[1]]
            values = []
            for training in (row, *others[:1]):
                if args.means_alone:
                    values.append(means(training))
                else:
                    values.append(load(run_folder(args.runs, *about.values(), seeds[0], training["train_seed"])))
            for metric, case in cases(row, args.metrics, not args.means_alone, *values):
                spread = float(np.ptp(case.judged_N[case.inner]))
                which = {**about, "seed": seeds[0], "train_seed": seeds[1], "metric": metric, "spread": spread}
                found = [*merge_curves(case, seeds[0]), *regression_curves(case, seeds[0], args.regressions)]
                rows += [{**which, **predicted} for predicted in found]
            print(path.name, *seeds, flush=True)
    made = {tuple(row[name] for name in KEY) for row in rows}
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    kept = [row for row in before if tuple(row[name] for name in KEY) not in made]
    write_json(args.out, {"rows": [*kept, *rows], **provenance()})


if __name__ == "__main__":
    main()

"""The rows of experiments/mixtures.py, mixture_curves.py, verdicts.py and joint.py in, tables about mixtures out."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.uncertainty import bootstrap_interval, rank_agreement
from datalloy.verdict import LIKELY
from evidence_tables import Pools, by_pool, difference, pooled, pooled_gain, table

RESULTS = Path("experiments/results")
FINAL_STEPS = 40  # of joint.py
LOST = 0.02  # of accuracy
DEFAULT_CONFIRMING = "2"  # trainings, as a key of the rows
SIZES = (0, 1, 2, 3, 4, 6, 8)
NINE_IN_TEN = 1.2816 / 1.96  # of half the interval: what a normal gain has to be above zero by


@cache
def mixture_results(cheaper: bool = False) -> list[dict[str, Any]]:
    """Of experts and mixtures that were trained for the full number of steps, or for a share of it."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("mixtures_*.json"))]
    return [result for result in results if (result.get("budget", 1) < 1) == cheaper]


def named(result: dict[str, Any]) -> str:
    details = [*["shipped base"] * (result["base"] == "shipped"), *["LoRA"] * (result["adapter"] == "lora")]
    return ", ".join([result["world"].replace("_", " "), *details])


def agreement(metric: str) -> str:
    """Merged against trained by target and of the mean, with the regret of the merge's pick, by world and pool."""
    rows = []
    for result in mixture_results():
        for row in (row for row in result["rows"] if metric in row["agreement"]):
            *targets, mean = row["agreement"][metric]
            value, (low, high) = mean["spearman"]["value"], mean["spearman"]["interval"]
            by_target = ", ".join(f"{t['spearman']['value']:.2f}" for t in targets)
            numbers = [f"{value:.2f} [{low:.2f}, {high:.2f}]", f"{mean['spread']:.3f}", f"{mean['regret']:.3f}"]
            again = [f"training {row['train_seed']}"] * (row.get("train_seed", row["seed"]) != row["seed"])
            rows.append([", ".join([named(result), f"pool {row['seed']}", *again]), by_target, *numbers])
    head = ["world", "Spearman by target", "Spearman of the mean", "best minus worst", "regret of the merge's pick"]
    return table(head, rows)


def picks() -> str:
    """What `datalloy verify` picks with three real runs beside the experts, really trained, against the design's best.

    By the probability of the right answer, which these searches maximise.
    """
    rows = []
    for result in mixture_results():
        for row in (row for row in result["rows"] if "probability" in row["agreement"]):
            pick = row["pick"]
            again = [f"training {row['train_seed']}"] * (row.get("train_seed", row["seed"]) != row["seed"])
            numbers = ("probability", "best of the grid", "uniform", "best expert")
            weights = ", ".join(f"{name} {w:.0%}" for name, w in zip(row["domains"], pick["weights"], strict=True))
            best = max(pick["best of the grid"], pick["best expert"])
            cells = [f"{pick[name]:.3f}" for name in numbers]
            rows.append(
                [
                    ", ".join([named(result), f"pool {row['seed']}", *again]),
                    weights,
                    *cells,
                    f"{(best - pick['probability']) / best:+.1%}",
                ]
            )
    head = ["world", "pick", "trained on the pick", "best mixture trained", "uniform", "best expert"]
    return table([*head, "short of the best"], rows)


def ceiling() -> str:
    """Where everything was trained twice: how far one training agrees with the next over the inner mixtures."""
    rows = []
    for result in mixture_results():
        by_seed: dict[int, list[dict[str, Any]]] = {}
        for row in result["rows"]:
            by_seed.setdefault(row["seed"], []).append(row)
        for seed, (first, *others) in by_seed.items():
            for second in others:
                inner = np.array(first["weights"]).max(axis=1) < 1
                for metric in first["agreement"]:
                    true = [np.array(r["values"][f"true:{metric}"])[inner].mean(axis=1) for r in (first, second)]
                    merged = np.array(first["values"][f"merged:{metric}"])[inner].mean(axis=1)
                    rows.append(
                        [
                            f"{named(result)}, pool {seed}",
                            metric.replace("_", " "),
                            f"{rank_agreement(*true):.2f}",
                            f"{rank_agreement(merged, true[0]):.2f}, {rank_agreement(merged, true[1]):.2f}",
                            f"{rank_agreement(merged, (true[0] + true[1]) / 2):.2f}",
                        ]
                    )
    head = ["world", "metric", "training with training", "first merge with each training", "with their mean"]
    return table(head, rows)


def budgets(metric: str) -> str:
    """Merged and trained for a share of the steps, against the mean of the full trainings of the same pool.

    Spearman of the mean over inner mixtures / regret of the best, as a share of best minus worst; means over pools.
    """
    full: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in mixture_results():
        for row in result["rows"]:
            full.setdefault((named(result), row["seed"]), []).append(row)
    tried: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for result in mixture_results(cheaper=True):
        for row in result["rows"]:
            tried.setdefault((named(result), result["budget"]), {})[row["seed"]] = row
            tried.setdefault((named(result), 1.0), {})[row["seed"]] = full[named(result), row["seed"]][0]
    shown = []
    for (world, share), by_seed in sorted(tried.items()):
        found: dict[str, list[tuple[float, float]]] = {"merged": [], "true": []}
        for seed, row in by_seed.items():
            truth_N = np.mean([_means_of(r, f"true:{metric}") for r in full[world, seed]], axis=0)
            for way, figures in found.items():
                value_N = _means_of(row, f"{way}:{metric}")
                regret = (truth_N.max() - truth_N[value_N.argmax()]) / np.ptp(truth_N)
                figures.append((rank_agreement(value_N, truth_N), regret))
        cells = ["{:.2f} / {:.2f}".format(*np.mean(figures, axis=0)) for figures in found.values()]
        if share == 1:
            cells[1] = ""  # a part of the truth itself
        update = np.mean([u for row in by_seed.values() for u in row["mergeability"]["relative_update"].values()])
        shown.append([f"{world} ({len(by_seed)})", f"{share:.0%}", f"{update:.1%}", *cells])
    return table(["world", "share of the steps", "relative update", "merged", "every mixture trained"], shown)


def _means_of(row: dict[str, Any], name: str) -> np.ndarray:
    """Mean over targets of the inner mixtures."""
    inner = np.array(row["weights"]).max(axis=1) < 1
    return np.array(row["values"][name])[inner].mean(axis=1)


@cache
def curve_rows(metric: str, world: str) -> list[dict[str, Any]]:
    rows = json.loads((RESULTS / "mixture_curves.json").read_text())["rows"]
    return [row for row in rows if (row["metric"], row["world"]) == (metric, world)]


def curves(metric: str, world: str) -> str:
    """Spearman with training over what is not yet trained / regret as a share of the spread, by real runs."""
    found = curve_rows(metric, world)
    shown = []
    for predictor in dict.fromkeys(row["predictor"] for row in found):
        same = [row for row in found if row["predictor"] == predictor]
        cells = [_curve_cell([row for row in same if row["runs"] == size]) for size in SIZES]
        cells.append(_curve_cell(same) if predictor == "one more training" else "")
        shown.append([predictor.replace("_", " "), *cells])
    return table(["predictor", *(f"{size} runs" for size in SIZES), "every mixture"], shown)


def against_line(base: str) -> str:
    """Regret of the pick by training, as a share of the spread: by a line through the experts, by merges, by a run."""
    shown = []
    for metric, world in product(("probability", "loss"), ("wrong_in_one_of_two", "two_of_three", "two_of_four")):
        found = [row for row in curve_rows(metric, world) if (row["base"], row["adapter"]) == (base, "none")]
        cells = []
        for predictor, runs in (("line", 0), ("half way to the line", 0), ("merged", 0), ("calibrated, planned", 1)):
            same = [row for row in found if (row["predictor"], row["runs"]) == (predictor, runs)]
            regrets = [row["regret"] / row["spread"] for row in same]
            cells.append(f"{np.mean(regrets):.2f} ({', '.join(f'{regret:.2f}' for regret in regrets)})")
        shown.append([world.replace("_", " "), metric, *cells])
    return table(["world", "metric", "line", "half way to the line", "merged", "calibrated, one planned run"], shown)


def _curve_cell(rows: list[dict[str, Any]]) -> str:
    ranks = [row["spearman"] for row in rows if row["spearman"] is not None]
    rank = f"{np.mean(ranks):.2f}" if ranks else "none"
    return f"{rank} / {np.mean([row['regret'] / row['spread'] for row in rows]):.2f}" if rows else ""


def verdict_rows() -> list[dict[str, Any]]:
    return [json.loads(path.read_text())["row"] for path in sorted((RESULTS / "verdicts").glob("*.json"))]


def verdicts() -> str:
    """The gain of each pick over uniform shares: as its own runs have it, as confirmed, and as further trainings do."""
    rows = []
    for row in verdict_rows():
        shares = sorted(row["pick"].items(), key=lambda item: -item[1])
        pick = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
        cells = ["", "", ""]
        if "confirmed" in row:
            delivered = f"{row['delivered']:+.3f} ± {row['delivered error']:.3f}"
            cells = [_gain(row["chosen"]), _gain(row["confirmed"][DEFAULT_CONFIRMING]), delivered]
        rows.append([f"{row['world']}, pool {row['seed']}", pick, *cells])
    head = ["world", "pick", "by the runs that chose it", "confirmed by two trainings", "delivered by four more"]
    return table(head, rows)


def found_again() -> str:
    """The lead of a mixture by one training on half of the items, and what another training gives on the other half."""
    return _means("again", "measure", ("slope", "correlation", "slope of marks", "correlation with marks"))


def fewer_items() -> str:
    """Regret of the merge's pick by so many items of each target."""
    return _means("items", "items of a target", ("regret",))


def _means(part: str, key: str, columns: Sequence[str]) -> str:
    """Means over pools and trainings of a part of found_again.json, by world and key."""
    found = json.loads((RESULTS / "found_again.json").read_text())[part]
    rows = []
    for world, value in dict.fromkeys((row["world"], row[key]) for row in found):
        same = [row for row in found if (row["world"], row[key]) == (world, value)]
        cells = [f"{np.mean([row[column] for row in same]):.3f}" for column in columns]
        rows.append([world.replace("_", " "), str(value).replace("_", " "), *cells])
    return table(["world", key, *columns], rows)


def _gain(gain: dict[str, Any]) -> str:
    low, high = gain["interval"]
    return f"{gain['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def promises() -> str:
    """Over all confirmed picks: what was promised in the mean, how far off it was, and how often the interval held.

    The error of what was delivered is small against either interval, and not taken off.
    """
    found = [row for row in verdict_rows() if "confirmed" in row]
    delivered = np.array([row["delivered"] for row in found])
    ways = {"by the runs that chose it": [row["chosen"] for row in found]}
    for count in found[0]["confirmed"]:
        ways[f"confirmed by {count}"] = [row["confirmed"][count] for row in found]
    rows = []
    for name, gains in ways.items():
        promised = np.array([gain["mean"] for gain in gains])
        low, high = np.array([gain["interval"] for gain in gains]).T
        trusted, likely = low > 0, promised > NINE_IN_TEN * (high - low) / 2
        rows.append(
            [
                name,
                f"{promised.mean():+.3f}",
                f"{delivered.mean():+.3f}",
                f"{np.sqrt(np.mean((promised - delivered) ** 2)):.3f}",
                f"{np.mean(high - low) / 2:.3f}",
                f"{((low <= delivered) & (delivered <= high)).sum()} of {len(found)}",
                ", ".join(f"{gain:+.3f}" for gain in delivered[trusted]),
                *(f"{(delivered * is_followed).mean():+.3f}" for is_followed in (trusted, likely, promised > 0)),
            ]
        )
    head = ["gain over uniform shares", "promised", "delivered", "root mean square error", "half the interval"]
    followed = ["mean over all if followed where shown", "where nine chances in ten", "where above zero"]
    return table([*head, "intervals that hold it", "delivered where trusted", *followed], rows)


def training_luck() -> str:
    """How far trainings on one mixture differ on held-out questions, by world."""
    rows = []
    found = [row for row in verdict_rows() if "luck" in row]
    for world in dict.fromkeys(row["world"] for row in found):
        luck = [row["luck"] for row in found if row["world"] == world]
        deviation = np.sqrt(max(0.0, float(np.mean([one["variance"] for one in luck]))))
        correlation = np.sum([one["variance"] for one in luck]) / np.sum([one["of items"] for one in luck])
        rows.append([f"{world} ({len(luck)})", f"{deviation:.4f}", f"{correlation:.4f}"])
    head = ["world", "standard deviation between trainings", "correlation of items in it"]
    return table(head, rows)


@cache
def joint_rows() -> list[dict[str, Any]]:
    return [row for path in sorted((RESULTS / "joint").glob("*.json")) for row in json.loads(path.read_text())["rows"]]


AS_DECIDED = "where its chance is nine in ten"
FOLLOWED = {  # the pick is trained on, and not uniform shares, where its confirmed gain has this chance at least
    "never": np.inf,
    "where its gain is shown": 0.975,  # above zero with its whole interval
    AS_DECIDED: LIKELY,
    "where it is likelier than a loss": 0.5,
    "always": -np.inf,
}


@cache
def joint_ways() -> dict[str, list[dict[str, Any]]]:
    """The rows of every way: of those that mix, of uniform shares or of the pick, as each rule would have it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in joint_rows():
        if "shares" not in row:
            found.setdefault(row["way"], []).append(row)
            continue
        chance = 0.0 if row["chance"] is None else row["chance"]  # none where the pick is uniform shares
        for name, least in FOLLOWED.items():
            if (row["shares"] == "pick") == (chance >= least):
                found.setdefault(f"{row['way']}, the pick followed {name}", []).append(row)
    return found


def _joint_pools(way: str) -> dict[str, Pools]:
    """Right or wrong for every held-out question, by world and pool."""
    rows = joint_ways()[way]
    return {w: by_pool(row for row in rows if row["world"] == w) for w in dict.fromkeys(row["world"] for row in rows)}


def joint() -> str:
    """Neither, selection, mixture, both and buckets in the mean over all pools, and what deciding took."""
    rows = []
    for way, same in joint_ways().items():
        gains = ["" if way == over else pooled(_joint_pairs(way, over)) for over in ("full SFT", "selection")]
        trainings = "0.0" if way.endswith("never") else f"{np.mean([row['steps'] for row in same]) / FINAL_STEPS:.1f}"
        followed = str(sum(row["shares"] == "pick" for row in same)) if "shares" in same[0] else ""
        accuracy = f"{np.mean([row['accuracy'] for row in same]):.3f}"
        rows.append([f"{way} ({len(same)})", accuracy, *gains, trainings, followed])
    return table(["way (pools)", "accuracy", "over full SFT", "over selection", "trainings to decide", "picks"], rows)


def joint_gain(way: str, over: str) -> tuple[float, float, float] | None:
    return pooled_gain(_joint_pairs(way, over))


def _joint_pairs(way: str, over: str) -> list[tuple[Pools, Pools]]:
    others = _joint_pools(over)
    return [(pools, others[world]) for world, pools in _joint_pools(way).items()]


def picks_followed() -> str:
    """What following the pick gains over uniform shares, by way and rule, in the mean over all pools."""
    mixing = list(dict.fromkeys(row["way"] for row in joint_rows() if "shares" in row))
    rows = []
    for name in list(FOLLOWED)[1:]:
        by_way = [_joint_pairs(f"{way}, the pick followed {name}", f"{way}, the pick followed never") for way in mixing]
        pairs = [pair for pairs in by_way for pair in pairs]
        cells = [pooled(pairs) for pairs in by_way]
        gains = np.array([float((a[pool] - b[pool]).mean()) for a, b in pairs for pool in a])
        lost = f"{(gains < -LOST).sum()} of {len(gains)}"
        rows.append([name, *cells, pooled(pairs), lost])
    return table(["the pick is followed", *mixing, "all three", f"more than {LOST} lost"], rows)


def joint_worlds() -> str:
    """Gains over full SFT by world, the pick followed as the verdict has it."""
    full = _joint_pools("full SFT")
    ways = [way for way in joint_ways() if way != "full SFT" and ("follow" not in way or way.endswith(AS_DECIDED))]
    rows = [
        [way.partition(",")[0], *(difference(pools, full[world]) for world, pools in _joint_pools(way).items())]
        for way in ways
    ]
    return table(["over full SFT", *(f"{world} ({len(pools)})" for world, pools in full.items())], rows)


# what trains on the samples of a way's uniform shares, in ordinary epochs
SAME_SAMPLES = {"mixture": "full SFT", "both": "selection", "buckets": "full SFT"}


def joint_order() -> str:
    """Trained on uniform shares: shuffled as one epoch, repeats and all, and in the order they are laid out in."""
    shuffled = json.loads((RESULTS / "joint_shuffled.json").read_text())["rows"]
    rows, every = [], []
    for way, epochs in SAME_SAMPLES.items():
        in_order, in_epochs = _joint_pools(f"{way}, the pick followed never"), _joint_pools(epochs)
        triples = [
            (by_pool(row for row in shuffled if (row["way"], row["world"]) == (way, world)), pools, in_epochs[world])
            for world, pools in in_order.items()
        ]
        every += triples
        rows.append([f"{way} ({sum(len(pools) for pools in in_order.values())})", *_order_cells(triples)])
    rows.append([f"all ({sum(len(pools) for _, pools, _ in every)})", *_order_cells(every)])
    head = ["uniform shares (pools)", "shuffled, over ordinary epochs", "in order, over ordinary epochs"]
    return table([*head, "in order, over shuffled"], rows)


def _order_cells(triples: list[tuple[Pools, Pools, Pools]]) -> list[str]:
    shuffled, in_order, in_epochs = zip(*triples, strict=True)
    pairs = ((shuffled, in_epochs), (in_order, in_epochs), (in_order, shuffled))
    return [pooled(zip(one, other, strict=True)) for one, other in pairs]


def domain_utility() -> str:
    """Rank agreement of domains' mean scores with the picked shares, by world and over all pools."""
    found = [(row["world"], row["domain utility"]) for row in joint_rows() if row.get("domain utility")]
    methods = list(found[0][1])
    rows = []
    for world in dict.fromkeys(world for world, _ in found):
        same = [utility for w, utility in found if w == world]
        cells = [f"{np.mean([utility[method]['agreement'] for utility in same]):+.2f}" for method in methods]
        rows.append([f"{world} ({len(same)})", *cells])
    drawn = [np.array([utility[method]["agreement"] for _, utility in found]) for method in methods]
    ends = [bootstrap_interval(d, confidence=0.95, resamples=10_000, seed=0) for d in drawn]
    overall = [f"{d.mean():+.2f} [{low:+.2f}, {high:+.2f}]" for d, (low, high) in zip(drawn, ends, strict=True)]
    rows.append([f"all ({len(found)})", *overall])
    return table(["world", *(method.replace("_", " ") for method in methods)], rows)

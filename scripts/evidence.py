"""The committed results in, the tables of docs/evidence.md out.

    python scripts/evidence.py            (writes the tables into the page; its words are written by hand)
    python scripts/evidence.py --check    (exit code 1 where the page's tables are not those of the results)

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Intervals are 95 % over pools and questions: pools are
drawn with replacement, then the questions of each, paired where two models answer the same ones.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path("experiments/results")
PAGE = Path("docs/evidence.md")
RESAMPLES = 1000
NAMES = {
    "base": "base, untrained",
    "full": "full SFT",
    "oracle": "oracle: clean samples only",
    "low_loss": "low loss",
    "mid_loss": "mid loss",
    "high_loss": "high loss",
    "length": "long answers",
    "judge": "judge, 80 % right",
    "first_order": "gradient dot product",
    "less": "LESS-style cosine",
    "deita": "DEITA-style",
    "exact": "OST, exact",
    "calibrated": "OST, calibrated",
    "calibrated diverse": "OST, calibrated, diverse",
    "tail": "OST, tail",
    "random": "random",
    "auto": "auto: the bake-off",
}
SCORERS = ("exact", "calibrated", "tail", "low_loss", "first_order", "less", "deita", "judge", "random")
Row = dict[str, Any]


@cache
def selection_rows() -> list[Row]:
    return [
        row for path in sorted((RESULTS / "selection").glob("*.json")) for row in json.loads(path.read_text())["rows"]
    ]


def worlds() -> list[str]:
    """The worlds with results, those with the most pools first."""
    pools = {(row["world"], row["seed"]) for row in selection_rows()}
    names = list(dict.fromkeys(world for world, _ in sorted(pools)))
    return sorted(names, key=lambda name: (-sum(world == name for world, _ in pools), name))


def runs(
    world: str, scorer: str, fraction: float | None = None, protocol: str = "fixed compute"
) -> dict[int, np.ndarray]:
    """Right or wrong for every question, by pool, averaged over the draws where there are several, [Q] each."""
    by_seed: dict[int, list[np.ndarray]] = {}
    for row in selection_rows():
        wanted = (row["world"], row["scorer"], row["protocol"]) == (world, scorer, protocol)
        if (
            wanted
            and (scorer == "auto" or row["within"] == "domain")
            and (fraction is None or row["fraction"] == fraction)
        ):
            by_seed.setdefault(row["seed"], []).append(np.array(list(row["right"]), dtype=float))
    return {seed: np.mean(rows, axis=0) for seed, rows in by_seed.items()}


def interval(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean over pools and questions with its interval; `values`: one array of questions a pool."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        pools = rng.integers(len(values), size=len(values))
        drawn.append(np.mean([rng.choice(values[p], len(values[p])).mean() for p in pools]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(np.mean([v.mean() for v in values])), float(low), float(high)


def difference(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> str:
    both = sorted(one.keys() & other.keys())
    if not both:
        return ""
    mean, low, high = interval([one[seed] - other[seed] for seed in both])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def accuracies(fraction: float) -> str:
    """Accuracy by world of what each way of selecting keeps at one fraction, mean over pools."""
    head = ["trained on", *(f"{world} ({len(runs(world, 'full'))})" for world in worlds())]
    rows = []
    for scorer, name in NAMES.items():
        whole = scorer in ("base", "full", "oracle", "auto")
        found = [runs(world, scorer, None if whole else fraction) for world in worlds()]
        if any(found):
            label = name if whole else f"{name} {fraction:.0%}"
            rows.append([label, *(f"{np.mean([v.mean() for v in f.values()]):.3f}" if f else "" for f in found)])
    return table(head, rows)


def gains(fraction: float, over: str) -> str:
    """Gain over another arm at the same fraction (or over full SFT), paired, by world, with intervals."""
    head = ["selected", *worlds()]
    rows = []
    for scorer in (
        "exact",
        "calibrated",
        "tail",
        "low_loss",
        "first_order",
        "less",
        "deita",
        "judge",
        "random",
        "auto",
    ):
        if scorer == over:
            continue
        cells = []
        for world in worlds():
            other = runs(world, over, None if over in ("full", "base", "oracle") else fraction)
            cells.append(difference(runs(world, scorer, None if scorer == "auto" else fraction), other))
        if any(cells):
            rows.append([NAMES[scorer], *cells])
    return table(head, rows)


def kept_faults(fraction: float) -> str:
    """Share of faulty samples and of hard ones in what is kept."""
    head = ["kept by", *worlds()]
    rows = []
    for scorer in (
        "full",
        "random",
        "exact",
        "calibrated",
        "tail",
        "first_order",
        "less",
        "deita",
        "low_loss",
        "judge",
    ):
        cells = []
        for world in worlds():
            picked = [
                row
                for row in selection_rows()
                if (row["world"], row["scorer"], row["within"], row["protocol"])
                == (world, scorer, "domain", "fixed compute")
                and row["fraction"] == (1.0 if scorer == "full" else fraction)
            ]
            faulty = [1 - row["share"]["clean"] - row["share"]["near_copy"] for row in picked]
            hard = [row["hard"] for row in picked]
            cells.append(f"{np.mean(faulty):.2f} / {np.mean(hard):.2f}" if picked else "")
        if any(cells):
            rows.append([NAMES[scorer], *cells])
    return table(head, rows)


def auto() -> str:
    """What the bake-off chose in every world and pool, beside the best arm that was trained there."""
    rows = []
    for row in (r for r in selection_rows() if r["scorer"] == "auto"):
        same = [
            r
            for r in selection_rows()
            if (r["world"], r["seed"], r["protocol"]) == (row["world"], row["seed"], "fixed compute")
            and r["scorer"] not in ("auto", "oracle", "judge", "base")
        ]
        best = max(same, key=lambda r: r["accuracy"])
        full = next(r for r in same if r["scorer"] == "full")
        over = row["over_base"]
        rows.append(
            [
                f"{row['world']}, pool {row['seed']}",
                f"{NAMES[row['chose']]} {row['fraction']:.0%} {row['within']}",
                f"{row['accuracy']:.3f}",
                f"{full['accuracy']:.3f}",
                f"{NAMES[best['scorer']]} {best['fraction']:.0%}: {best['accuracy']:.3f}",
                f"{over[0]:+.3f} [{over[1]:+.3f}, {over[2]:+.3f}]",
            ]
        )
    head = ["world", "auto chose", "accuracy", "full SFT", "best of all that were trained", "race: over the base"]
    return table(head, rows)


def separation() -> str:
    """AUC of each score for clean against faulty samples; in brackets for hard clean ones against faulty ones."""
    rows = []
    names = ("exact", "calibrated", "tail", "first_order", "low_loss")
    for world in worlds():
        found = [r["agreements"] for r in selection_rows() if r["scorer"] == "auto" and r["world"] == world]
        cells = []
        for name in names:
            values = [[f[f"auc {name}{hard}"] for f in found] for hard in ("", ", hard")]
            known = all(v is not None for pair in values for v in pair) and found
            cells.append(f"{np.mean(values[0]):.2f} ({np.mean(values[1]):.2f})" if known else "")
        if any(cells):
            rows.append([world, *cells])
    return table(["world", *(NAMES[name] for name in names)], rows)


def other_losses() -> str:
    """AUC of losses under tuned proxies, mean over pools."""
    path = RESULTS / "other_losses.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    names = list(dict.fromkeys(row["world"] for row in found))
    rows = []
    for score, steps in dict.fromkeys((row["score"], row["steps"]) for row in found):
        cells = []
        for world in names:
            picked = [r for r in found if (r["world"], r["score"], r["steps"]) == (world, score, steps)]
            cells.append(f"{np.mean([r['auc'] for r in picked]):.2f} ({np.mean([r['auc hard'] for r in picked]):.2f})")
        rows.append([score, str(steps), *cells])
    pools = [len({row["seed"] for row in found if row["world"] == world}) for world in names]
    return table(["score", "steps", *(f"{w} ({n})" for w, n in zip(names, pools, strict=True))], rows)


@cache
def mixture_results() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("mixtures_*.json"))]


def mixture_agreement() -> str:
    """Merged against trained by target and of the mean, and the pick, by world and pool."""
    rows = []
    for result in mixture_results():
        world = result["world"] + (", LoRA" if result["adapter"] == "lora" else "")
        for row in result["rows"]:
            for metric, found in row["agreement"].items():
                *targets, mean = found
                value, (low, high) = mean["spearman"]["value"], mean["spearman"]["interval"]
                by_target = ", ".join(f"{t['spearman']['value']:.2f}" for t in targets)
                numbers = [f"{value:.2f} [{low:.2f}, {high:.2f}]", f"{mean['spread']:.3f}", f"{mean['regret']:.3f}"]
                rows.append([f"{world}, pool {row['seed']}", metric.replace("_", " "), by_target, *numbers])
    head = [
        "world",
        "metric",
        "Spearman by target",
        "Spearman of the mean",
        "best minus worst",
        "regret of the merge's pick",
    ]
    return table(head, rows)


def mixture_curves() -> str:
    """Mean Spearman / regret as a share of the spread, over all pools of all worlds, by predictor and real runs."""
    path = RESULTS / "mixture_curves.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    sizes = (0, 1, 2, 3, 4, 6, 8)
    rows = []
    for metric in dict.fromkeys(row["metric"] for row in found):
        for predictor in dict.fromkeys(row["predictor"] for row in found):
            cells = []
            for size in sizes:
                picked = [r for r in found if (r["metric"], r["predictor"], r["runs"]) == (metric, predictor, size)]
                ranks = [r["spearman"] for r in picked if r["spearman"] is not None]
                regrets = [r["regret"] / r["spread"] for r in picked]
                rank = f"{np.mean(ranks):.2f}" if ranks else "none"
                cells.append(f"{rank} / {np.mean(regrets):.2f}" if picked else "")
            if any(cells):
                rows.append([metric.replace("_", " "), predictor.replace("_", " "), *cells])
    return table(["metric", "predictor", *(f"{size} runs" for size in sizes)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy at 50 %": lambda: accuracies(0.5),
    "accuracy at 20 %": lambda: accuracies(0.2),
    "gain over full at 50 %": lambda: gains(0.5, "full"),
    "gain over random at 50 %": lambda: gains(0.5, "random"),
    "gain over low loss at 50 %": lambda: gains(0.5, "low_loss"),
    "gain over full at 20 %": lambda: gains(0.2, "full"),
    "gain over random at 20 %": lambda: gains(0.2, "random"),
    "faulty and hard at 50 %": lambda: kept_faults(0.5),
    "faulty and hard at 20 %": lambda: kept_faults(0.2),
    "auto": auto,
    "separation": separation,
    "other losses": other_losses,
    "mixture agreement": mixture_agreement,
    "mixture curves": mixture_curves,
}
BLOCK = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with every table as the results have it."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}\n{block[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text()
    if args.check:
        sys.exit(0 if filled(page) == page else f"{PAGE} is not up to date: run `python scripts/evidence.py`")
    PAGE.write_text(filled(page))


if __name__ == "__main__":
    main()

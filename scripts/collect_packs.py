"""Finished run folders of run_packs.py in, one JSON with all models of all seeds and a Markdown table out.

    python scripts/run_packs.py --data packs --runs runs/auto --arms full "low loss 80 %"
    python scripts/run_packs.py --data packs --runs runs/entropy --arms --set score.method=entropy_minus_loss \\
        --set select.keep_fraction=0.65 --out entropy.json
    python scripts/collect_packs.py auto=runs/auto "entropy minus loss 65 %=runs/entropy" \\
        --out packs.json --commit COMMIT

Every folder's advised model is called as the folder is; the models beside it keep their names. All are held against
`full` on the same questions: intervals are 95 % over the held-out questions, of a seed or of the mean of all seeds,
which answer the same ones. Where a folder advised the full pool and has no model `full`, its own is that.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.run import write_json
from datalloy.uncertainty import percentile_interval, resampled_means

Values = dict[str, np.ndarray]  # marks of the held-out questions, by set


def held_out(path: Path) -> Values:
    sets = json.loads(path.read_text())
    return {name: np.array(found["values"]) for name, found in sets.items() if name.endswith("-holdout")}


def mean_over_sets(values: Values) -> float:
    return float(np.mean([marks.mean() for marks in values.values()]))


def difference(one: Values, other: Values) -> dict[str, Any]:
    """Of the means over sets, paired over the questions of each."""
    gain_V = np.concatenate([one[name] - other[name] for name in one])
    set_V = np.repeat(np.arange(len(one)), [len(marks) for marks in one.values()])
    drawn_RG = resampled_means(gain_V[None], set_V, resamples=2000, seed=0)[:, 0]
    mean = mean_over_sets(one) - mean_over_sets(other)
    return {"mean": mean, "interval": list(percentile_interval(drawn_RG.mean(axis=1), 0.95))}


def read_seed(folders: dict[str, Path], seed: int) -> tuple[dict[str, Any], dict[str, Values]]:
    """What was chosen and by which machine, and the marks of all models."""
    models: dict[str, Values] = {}
    found: dict[str, Any] = {"seed": seed, "arms": {}, "kept": {}, "machines": {}}
    for name, folder in folders.items():
        run = folder / f"packs-{seed}"
        if not run.exists():
            continue
        selection = json.loads((run / "units/selection.json").read_text())["data"]
        found["arms"][name] = selection["arm"]
        found["kept"][name] = json.loads((run / "units/model.json").read_text())["data"]["kept"]
        provenance = json.loads((run / "provenance.json").read_text())
        found["machines"][name] = f"{provenance['platform']}, {provenance['cores']} cores"
        for path in sorted((run / "evaluation").glob("*.json")):
            models[name if path.stem == "model" else path.stem] = held_out(path)
        if selection["arm"] and selection["arm"]["scorer"] == "full":
            models.setdefault("full", models[name])
    over_full = {name: difference(values, models["full"]) for name, values in models.items() if name != "full"}
    means = {name: mean_over_sets(values) for name, values in models.items()}
    return {**found, "means": means, "over full": over_full}, models


def over_seeds(models: Sequence[Values]) -> Values:
    return {name: np.mean([values[name] for values in models], axis=0) for name in models[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True, help="of the code that made the runs")
    args = parser.parse_args()
    folders = {name: Path(folder) for name, _, folder in (given.partition("=") for given in args.folders)}
    rows, models = zip(*(read_seed(folders, seed) for seed in args.seeds), strict=True)
    full = over_seeds([found["full"] for found in models])
    whole = {
        name: difference(over_seeds([found[name] for found in models]), full)
        for name in models[0]
        if name not in ("full", "base") and all(name in found for found in models)
    }
    write_json(args.out, {"rows": rows, "mean over full": whole, "commit": args.commit})
    print("| trained on |", " | ".join(f"seed {seed}" for seed in args.seeds), "| mean |")
    print("|---|" + "---|" * (len(args.seeds) + 1))
    for name in dict.fromkeys(name for row in rows for name in row["means"]):
        means = [row["means"].get(name) for row in rows]
        cells = [f"{mean:.3f}" if mean is not None else "" for mean in means]
        print(f"| {name} |", " | ".join([*cells, "" if None in means else f"{np.mean(means):.3f}"]), "|")
        if name not in ("full", "base"):
            gains = [*(row["over full"].get(name) for row in rows), whole.get(name)]
            cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(g["mean"], *g["interval"]) if g else "" for g in gains]
            print(f"| {name} minus full |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()

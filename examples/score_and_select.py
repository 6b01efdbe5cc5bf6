"""Draw a small faulty pool, score it on the embedded model, keep the better half, and see what that threw out.

    python examples/score_and_select.py FOLDER

Nothing is downloaded and no GPU is needed. For your own data, `datalloy init my.yaml` writes a recipe, and the same
functions take its path.
"""

import argparse
from pathlib import Path

import datalloy
from datalloy.tiny.pools import PoolPlan, read_truth, write_pool

RECIPE = """\
name: example
base: tiny
domains: {chart: {path: chart.jsonl}, counting: {path: counting.jsonl}}
targets: {goal: {path: chart.target.jsonl}}
score: {method: low_loss}  # take this line out for the bake-off, which takes minutes
select: {keep_fraction: 0.5}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=60, help="of each of the two domains")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    plan = PoolPlan(
        samples={"chart": arguments.samples, "counting": arguments.samples},
        targets=("chart",),
        target_items=12,
        holdout_items=1,
    )
    write_pool(folder, plan, seed=0)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)

    scores = datalloy.score(recipe, run=folder / "run")
    selection = datalloy.select(recipe, run=folder / "run")
    truth = read_truth(folder)
    print(f"{len(scores)} samples scored by {scores.metadata['method']}, {selection.kept.sum()} kept")
    for name, mask in (("kept", selection.kept), ("dropped", ~selection.kept)):
        faulty = sum(truth[sample_id]["fault"] != "clean" for sample_id in selection.id[mask])
        print(f"{name}: {faulty} of {mask.sum()} were drawn with a fault")


if __name__ == "__main__":
    main()

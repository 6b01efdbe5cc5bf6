"""Can one-step utility be told to keep what is hard? Worlds of selection.py in, variants of utility out.

    python experiments/utilities.py --worlds "wrong 30 %" "hard matters" "hard, no longer" --seeds 0 1 2
    python experiments/utilities.py --groups 20 --worlds clean "wrong 10 %" --seeds 0 1 2
    python experiments/utilities.py --cheaper

At the default step the exact utility drops hard samples with the wrong ones. Remedies: held against the utilities of
the twenty samples of the domain whose prompts are most alike (as low loss by neighbours is); a step of a sixteenth of
Polyak's; benefit and harm as two numbers (what the target items that gain win, what those that lose lose); the mean
rank over checkpoints of a training on the whole pool; utility of groups (of 16 random samples each, a sample's being
the mean over its 20 groups); what utility says beyond the loss (its rank less what a line through the ranks of the loss
expects). By variant: the AUC of clean against faulty samples and of clean hard ones against faulty ones, what the
better half and fifth of each domain hold, and the held-out accuracy of the base trained on them. `low loss by
neighbours` stands beside them, and its ranks added to those of some. `--groups` leaves out all remedies but so many
groups of each sample; rows of other scores stay in the file. `--cheaper` tries what may stand for groups at a lower
price: the gradient dot product with what the targets' gradient is after a step on sixteen samples (mean over 40 such
steps, each at its size), and the utility of a single step at twice a sample's share of a group's step, as it is and
calibrated. The proxy is the base, without warm-up. Resumable. Five minutes of one core a world and seed, two with
`--groups`, three with `--cheaper`.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from neighbours import in_domains
from other_losses import best
from provenance import provenance
from scipy.stats import rankdata
from selection import BATCH, STEPS, World, asked_pools, open_world, worlds_parser
from torch import Tensor
from torch.nn import Parameter

from datalloy.embeddings import embed
from datalloy.evaluation import answer_losses
from datalloy.run import write_json
from datalloy.scorers import Probing, prepare
from datalloy.scorers.one_step import ExactScorer
from datalloy.scorers.probing import scan_steps
from datalloy.scorers.step import Steppable, StepRule, inner, loss_and_gradient, scoped_parameters
from datalloy.scorers.taps import Taps
from datalloy.similarity import NEIGHBOURS
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, Encoded
from datalloy.workflows import Workflow

FRACTIONS = (0.5, 0.2)
SMALL = 1 / 16  # of Polyak's step
CHECKPOINTS = (STEPS // 3, 2 * STEPS // 3)  # beside the base
GROUPS = 20  # of each sample
AHEAD = 2  # of each sample, where groups only say where training leads
CHEAPER = ("dot product ahead", "step of a group's share", "step of a group's share, calibrated")
SHARES = 2  # of a group's step, in that of a single sample
SCANNED = 16
# two numbers: is the answer right, as far as the proxy can tell, and is it wanted
RIGHT, WANTED = "low loss by neighbours", ("utility, by neighbours", "small step")


def exact_falls(vlm: VLM, items: TargetItems, pool: Sequence[Encoded], seed: int, *, small: bool) -> list[np.ndarray]:
    """The fall of every target item after a step on every sample, [N, V]: of the default size, and of the small one."""
    parameters = scoped_parameters(vlm, "full", freeze_vision=False)
    exact = ExactScorer(vlm, items, Steppable(parameters), rule=StepRule("sgd"), step=0.0)
    scanned = [pool[i] for i in np.random.default_rng(seed).choice(len(pool), SCANNED, replace=False)]
    scan = scan_steps(exact, scanned, wanted=None, seed=seed)
    polyak = scan.rows[0].step / scan.rows[0].multiple
    _, fall_NSV = exact.falls(pool, (scan.chosen, SMALL * polyak) if small else (scan.chosen,))
    return list(fall_NSV.swapaxes(0, 1))


def group_steps(
    vlm: VLM, pool: Sequence[Encoded], parameters: Sequence[Parameter], seed: int, groups: int
) -> Iterator[tuple[np.ndarray, list[Tensor], float]]:
    """Random groups that hold each sample so many times: their rows, mean gradient and Polyak step."""
    for number in range(groups):
        order = np.random.default_rng([seed, number]).permutation(len(pool))
        for rows in np.split(order, range(BATCH, len(pool), BATCH)):
            loss, gradient = loss_and_gradient(vlm, [pool[i] for i in rows], parameters)
            yield rows, gradient, loss / inner(gradient, gradient)


def group_utilities(vlm: VLM, items: TargetItems, pool: Sequence[Encoded], seed: int, groups: int) -> np.ndarray:
    """Mean utility of the random groups that a sample is in, [N]: one step on a group at its own Polyak step."""
    steppable = Steppable(scoped_parameters(vlm, "full", freeze_vision=False))
    before_V, sum_N = items.losses(vlm), np.zeros(len(pool))
    for rows, gradient, step in group_steps(vlm, pool, steppable.parameters, seed, groups):
        with steppable.moved(gradient, -step):
            sum_N[rows] += (before_V - items.losses(vlm)) @ items.item_weight_V
    return sum_N / groups


def cheaper_utilities(work: Workflow, pool: Sequence[Encoded], seed: int) -> dict[str, np.ndarray]:
    """What may stand for the utility of groups, [N] each."""
    inputs, probes = work._scoring_inputs, work._encoded_probes
    vlm, items = inputs.vlm, inputs.items
    steppable, taps = Steppable(scoped_parameters(vlm, "full", freeze_vision=False)), Taps(vlm)
    ahead, sizes = [torch.zeros_like(weight) for weight in taps.weights()], []
    for _, gradient, step in group_steps(vlm, pool, steppable.parameters, seed, AHEAD):
        with steppable.moved(gradient, -step), torch.enable_grad():
            for total, part in zip(ahead, items.gradient(vlm, taps.weights()), strict=True):
                total += step * part
        sizes.append(step)
    share = SHARES * float(np.median(sizes)) / BATCH
    exact = ExactScorer(vlm, items, steppable, rule=StepRule("sgd"), step=share)
    probing = Probing({}, {"exact": share}, {"exact": 0.0}, exact.score(probes), noise_floor=0.0)
    utilities = (
        taps.measure_all(pool, [ahead], batch_size=2 * BATCH).slope_NG[:, 0],
        exact.score(pool).utility_N,
        prepare("calibrated", inputs, probing, probes).score(pool).utility_N,
    )
    return dict(zip(CHEAPER, utilities, strict=True))


def variants(world: World, groups: int | None, cheaper: bool) -> dict[str, list[float]]:
    """Scores of every sample, [N], higher is better; of so many groups alone where `groups` says so, or `cheaper`."""
    work, seed = world.workflow, world.seed
    pool = [work._encoded_pool[i] for i in range(len(work.pool))]
    items, base = work._scoring_inputs.items, work._base
    weight_V = items.item_weight_V
    nearest_NK = in_domains(embed(base, pool, "prompts"), np.array(work.pool.domains()), NEIGHBOURS)

    def by_neighbours(score_N: np.ndarray) -> np.ndarray:
        return score_N - np.median(score_N[nearest_NK], axis=1)

    loss_N = answer_losses(base, pool, batch_size=32)
    found = {RIGHT: by_neighbours(-loss_N)}
    if cheaper:
        found |= cheaper_utilities(work, pool, seed)
    else:
        found[name_of(groups)] = group_utilities(base, items, pool, seed, groups or GROUPS)
    if cheaper or groups is not None:
        return {name: score_N.tolist() for name, score_N in found.items()}
    fall_NV, small_NV = exact_falls(base, items, pool, seed, small=True)
    utility_N, small_N, benefit_N = fall_NV @ weight_V, small_NV @ weight_V, np.maximum(fall_NV, 0) @ weight_V
    rank_N = rankdata(utility_N)
    line = np.polyfit(rankdata(loss_N), rank_N, 1)
    checkpoints = (world.tuned_on(range(len(pool)), steps) for steps in CHECKPOINTS)
    later = [exact_falls(vlm, items, pool, seed, small=False)[0] @ weight_V for vlm in checkpoints]
    checkpoints_N = np.mean([rank_N, *map(rankdata, later)], axis=0)
    found |= {
        "utility": utility_N,
        "utility, by neighbours": by_neighbours(utility_N),
        "small step": small_N,
        "small step, by neighbours": by_neighbours(small_N),
        "benefit": benefit_N,
        "benefit, by neighbours": by_neighbours(benefit_N),
        "least harm": np.minimum(fall_NV, 0) @ weight_V,
        "three checkpoints": checkpoints_N,
        "three checkpoints, by neighbours": by_neighbours(checkpoints_N),
        "beyond the loss": rank_N - np.polyval(line, rankdata(loss_N)),
    }
    return {name: score_N.tolist() for name, score_N in found.items()}


def name_of(groups: int | None) -> str:
    return "groups" if groups in (None, GROUPS) else f"groups, {groups} of each sample"


def unit_of(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").replace("'", "")


def measure(world: World, groups: int | None, cheaper: bool) -> Iterator[dict[str, Any]]:
    domain_N = np.array(world.workflow.pool.domains())
    unit = "cheaper" if cheaper else "variants" if groups is None else unit_of(name_of(groups))
    scores = world.run.once(unit, partial(variants, world, groups, cheaper))
    del scores["seconds"]  # which `once` adds
    ranks = {name: rankdata(score) for name, score in scores.items()}
    wanted = (other for other in (*WANTED, *CHEAPER, name_of(groups)) if other in ranks)
    both = {f"ranks of {RIGHT} and {other}": ranks[RIGHT] + ranks[other] for other in wanted}
    for name, score in (scores | both).items():
        score_N = np.array(score)
        for fraction in FRACTIONS:
            kept = best(score_N, domain_N, fraction)
            unit = f"trained/{unit_of(name)}-{fraction:g}"
            yield {
                "world": world.name,
                "seed": world.seed,
                "score": name,
                "fraction": fraction,
                **world.told_apart(score_N, kept),
                **world.run.once(unit, partial(_trained, world, kept)),
            }


def _trained(world: World, kept: list[int]) -> dict[str, Any]:
    return world.held_out.measure(world.tuned_on(kept))


def main() -> None:
    parser = worlds_parser(__doc__, "utilities", ("wrong 30 %", "hard matters", "hard, no longer"))
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--groups", type=int, help="of each sample; no other remedy is tried")
    alone.add_argument("--cheaper", action="store_true", help="what may stand for groups; no other remedy is tried")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        with open_world(name, args.base, seed, args.runs / place, ("score.warmup_fraction=0",), "utilities") as world:
            rows = list(measure(world, args.groups, args.cheaper))
        path = args.out / f"{place}.json"
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        made = {(row["score"], row["fraction"]) for row in rows}
        kept = [row for row in before if (row["score"], row["fraction"]) not in made]
        write_json(path, {"rows": [*kept, *rows], **provenance()})
        print(place, [(row["score"], row["fraction"], round(row["accuracy"], 3)) for row in rows], flush=True)


if __name__ == "__main__":
    main()

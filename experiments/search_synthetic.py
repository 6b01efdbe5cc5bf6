"""How few evaluations does the search need? Made-up surfaces whose true optimum is known in, regret in points out.

    python experiments/search_synthetic.py --seeds 10 --out experiments/results/search_synthetic.json

Eight benchmarks of 300 items each, shared by all mixtures. Rivals at equal evaluations: the best of so many Dirichlet
draws, the slopes' optimum alone, uniform weights. `shift` moves the loss's optima away from the metric's: at 0.2 they
nearly agree, at 1 the loss knows nothing of the metric.
"""

import argparse
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance
from scipy.special import expit, ndtr

from datalloy.objective import Objective
from datalloy.run import write_json
from datalloy.search import auto_evaluations, search
from datalloy.simplex import Simplex, dirichlet
from datalloy.uncertainty import bootstrap_interval

TARGETS, ITEMS, BLOCKS = 8, 300, 6
UNIFORM_COST = {3: 1.05, 4: 1.85, 8: 3.2, 20: 3.5}  # points that uniform weights cost, by the number of domains


class World:
    """Benchmarks of items whose logit is a concave quadratic of the mixture plus a linear term of the item's own.

    An item is answered right with the probability of its logit; `sticky` is the share of an answer's luck that stays
    with the item whatever the mixture, the rest is drawn anew for each mixture. The answer loss follows the same
    quadratics around optima of its own, moved by `shift` of the way to another place, so that loss and metric do not
    agree on the best mixture.
    """

    def __init__(self, domains: int, seed: int, *, shift: float = 0.2, sticky: float = 0.5) -> None:
        rng = np.random.default_rng([seed, domains])
        self.names = tuple(f"domain {k}" for k in range(domains))
        self.targets = tuple(f"target {g}" for g in range(TARGETS))
        self.simplex = Simplex.free(self.names)
        self.seed, self.sticky = seed, sticky
        self.target_V = np.repeat(np.arange(TARGETS), ITEMS)
        self.block_V = np.tile(np.arange(ITEMS) % BLOCKS, TARGETS)
        common_K = rng.dirichlet(np.full(domains, 0.5))
        own_GK = rng.dirichlet(np.full(domains, 0.5), TARGETS)
        self.best_GK = 0.5 * common_K + 0.5 * own_GK
        elsewhere_GK = 0.5 * rng.dirichlet(np.full(domains, 0.5)) + 0.5 * rng.dirichlet(np.full(domains, 0.5), TARGETS)
        self.loss_best_GK = (1 - shift) * self.best_GK + shift * elsewhere_GK
        rank = (domains + 2) // 3
        root_GKR = rng.normal(size=(TARGETS, domains, rank)) / np.sqrt(rank)
        self.bend_GKK = root_GKR @ root_GKR.transpose(0, 2, 1) + 0.2 * np.eye(domains)
        self.level_V = rng.normal(0.3, 1.5, TARGETS * ITEMS)
        self.tilt_VK = rng.normal(0, 0.5, (TARGETS * ITEMS, domains))
        self.tilt_VK -= self.tilt_VK.mean(axis=1, keepdims=True)
        self.luck_V = rng.normal(size=TARGETS * ITEMS)
        self.bend_GKK *= self._sharpness(UNIFORM_COST.get(domains, 3.5))

    def _sharpness(self, cost):
        low, high = 0.01, 1000.0
        unit_GKK = self.bend_GKK
        for _ in range(25):
            mid = np.sqrt(low * high)
            self.bend_GKK = unit_GKK * mid
            self.__dict__.pop("best_K", None)
            low, high = (mid, high) if self.regret(np.full(len(self.names), 1 / len(self.names))) < cost else (low, mid)
        self.bend_GKK = unit_GKK
        self.__dict__.pop("best_K", None)
        return np.sqrt(low * high)

    def _logits(self, weight_K, best_GK):
        away_GK = weight_K - best_GK
        pull_GK = np.einsum("gij,gj->gi", self.bend_GKK, away_GK)
        level_G = -0.5 * (away_GK * pull_GK).sum(axis=1)
        logit_V = (level_G)[self.target_V] + self.level_V + self.tilt_VK @ (weight_K - 1 / len(weight_K))
        slope_VK = -pull_GK[self.target_V] + self.tilt_VK
        return logit_V, slope_VK

    def _means(self, per_item):
        return per_item.reshape(TARGETS, ITEMS, *per_item.shape[1:]).mean(axis=1)

    def truth(self, weight_K):
        """Expected share of right answers [G] and slopes [G, K]."""
        logit_V, slope_VK = self._logits(weight_K, self.best_GK)
        right_V = expit(logit_V)
        return self._means(right_V), self._means((right_V * (1 - right_V))[:, None] * slope_VK)

    def slopes(self, weight_K):
        logit_V, slope_VK = self._logits(weight_K, self.loss_best_GK)
        loss_V = np.logaddexp(0, -logit_V)
        slope_VK = -(expit(-logit_V))[:, None] * slope_VK
        return self._means(loss_V), self._means(slope_VK)

    def foresee(self, weights, blocks):
        """Nothing is to be gained: answers come at once."""

    def values(self, weight_K, block):
        mine_V = self.block_V == block
        logit_V, _ = self._logits(weight_K, self.best_GK)
        rng = np.random.default_rng([self.seed, *np.frombuffer(weight_K.tobytes(), np.uint32)])
        fresh_V = rng.normal(size=len(logit_V))
        luck_V = np.sqrt(self.sticky) * self.luck_V + np.sqrt(1 - self.sticky) * fresh_V
        return (ndtr(luck_V) < expit(logit_V))[mine_V].astype(float)

    @cached_property
    def best_K(self):
        def mean(weight_K):
            value_G, slope_GK = self.truth(weight_K)
            return float(value_G.mean()), slope_GK.mean(axis=0)

        starts = np.vstack([self.simplex.uniform, self.best_GK.mean(axis=0)])
        return self.simplex.maximise(mean, starts)

    def regret(self, weight_K):
        return 100 * float(self.truth(self.best_K)[0].mean() - self.truth(weight_K)[0].mean())


def all_values(world: World, weight_K: np.ndarray) -> float:
    return float(np.mean([world.values(weight_K, block).mean() for block in range(BLOCKS)]))


def run(domains: int, seed: int, shift: float) -> dict[str, Any]:
    world = World(domains, seed, shift=shift)
    objective = Objective("mean", np.full(TARGETS, 1 / TARGETS), np.zeros(TARGETS), np.full(TARGETS, np.inf))
    budget = auto_evaluations(domains)
    started = time.monotonic()
    found = search(world, world.simplex, objective, slopes_tell=False, evaluations=budget, seed=seed)
    seconds = time.monotonic() - started
    slopes_alone = search(world, world.simplex, objective, slopes_tell=True, evaluations=budget, seed=seed)
    drawn_NK = dirichlet(domains, budget, seed)
    best_drawn_K = max(drawn_NK, key=lambda weight_K: all_values(world, weight_K))
    return {
        "domains": domains,
        "seed": seed,
        "shift": shift,
        "regret": world.regret(found.weight_K),
        "predicted_regret": 100 * found.regret,
        "evaluations": found.evaluations,
        "budget": budget,
        "slope_calls": found.slope_calls,
        "slopes alone": world.regret(slopes_alone.weight_K),
        "best of random": world.regret(best_drawn_K),
        "uniform": world.regret(world.simplex.uniform),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 4, 8, 20])
    parser.add_argument("--shifts", type=float, nargs="+", default=[0.2, 1.0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/search_synthetic.json"))
    args = parser.parse_args()
    rows = []
    print(
        "domains shift | regret in points: search (most) | slopes alone | best of random | uniform | evaluations (most)"
    )
    for domains in args.domains:
        for shift in args.shifts:
            group = [run(domains, seed, shift) for seed in range(args.seeds)]
            rows += group
            regret_N = np.array([row["regret"] for row in group])
            low, high = bootstrap_interval(regret_N, confidence=0.95, resamples=2000, seed=0)
            others = [np.mean([row[name] for row in group]) for name in ("slopes alone", "best of random", "uniform")]
            spent = [row["evaluations"] for row in group]
            print(
                f"{domains:>7} {shift:>5} | {regret_N.mean():.2f} [{low:.2f}, {high:.2f}] ({regret_N.max():.2f}) | "
                f"{' | '.join(f'{other:.2f}' for other in others)} | {np.mean(spent):.1f} ({max(spent):.1f})",
                flush=True,
            )
    write_json(args.out, {"rows": rows, **provenance(), "numpy": np.__version__})


if __name__ == "__main__":
    main()

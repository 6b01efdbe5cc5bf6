"""Domains and what may be done with them in, mixtures in: the set of weights a search may choose from.

A mixture is a point of the simplex: one weight a domain, none negative, their sum one. A recipe cuts off parts of it:
a domain of 500 samples cannot fill half of 10,000 without being repeated ten times (`cap`), one must not be starved
(`floor`), a few together have a least or a largest share (`groups`). All are linear, so the set stays convex and what
is asked of it here are linear programmes, projections and smooth maximisations, left to scipy.

Also here: the lattices and draws by which others search the simplex, and exact counts from weights.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.optimize

from datalloy.errors import RecipeError

TOLERANCE = 1e-9
HIT_AND_RUN_STEPS = 20  # of each walk, for each domain: enough to forget where it began
MIN_RATE = 1e-12  # a direction slower than this never meets a limit
SPREAD_POOL = 64  # candidates for each space-filling point


class Group(NamedTuple):
    """Domains whose weights together lie in [low, high]."""

    domains: tuple[str, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Simplex:
    """The feasible mixtures over `names`: `floor_K <= weight_K <= cap_K`, sum one, group sums within their limits.

    Raises RecipeError when made from limits that no mixture meets, naming those that cannot hold together.
    """

    names: tuple[str, ...]
    floor_K: np.ndarray
    cap_K: np.ndarray
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "floor_K", np.clip(np.asarray(self.floor_K, dtype=float), 0, None))
        object.__setattr__(self, "cap_K", np.clip(np.asarray(self.cap_K, dtype=float), None, 1))
        for name, floor, cap in zip(self.names, self.floor_K, self.cap_K, strict=True):
            if floor > cap:
                raise RecipeError(
                    f"domain {name} must have at least {floor:.4g} of the mixture and can fill at most {cap:.4g}; "
                    "lower its floor, raise its max_epochs or add samples"
                )
        if self.floor_K.sum() > 1 + TOLERANCE:
            raise RecipeError(f"the domains' floors add up to {self.floor_K.sum():.4g}, more than the whole mixture")
        if self.cap_K.sum() < 1 - TOLERANCE:
            raise RecipeError(
                f"all domains together can fill {self.cap_K.sum():.4g} of the mixture at most; "
                "raise max_epochs, add samples, or train on fewer"
            )
        unknown = {name for group in self.groups for name in group.domains} - set(self.names)
        if unknown:
            raise RecipeError(f"a group names {sorted(unknown)[0]}, which is no domain; they are: {self.names}")
        if self.groups and not self._programme(np.zeros(len(self.names))).success:
            told = "; ".join(f"{' + '.join(g.domains)} in [{g.low:g}, {g.high:g}]" for g in self.groups)
            raise RecipeError(f"no mixture meets all groups ({told}) with the domains' own limits; loosen one")

    @classmethod
    def free(cls, names: Sequence[str]) -> "Simplex":
        """All mixtures: no limits but those of a simplex."""
        return cls(tuple(names), np.zeros(len(names)), np.ones(len(names)))

    def contains(self, weight_K: np.ndarray, tolerance: float = TOLERANCE) -> bool:
        weight_K = np.asarray(weight_K, dtype=float)
        sums = self._group_NK @ weight_K
        return bool(
            np.isfinite(weight_K).all()
            and abs(weight_K.sum() - 1) <= tolerance
            and (weight_K >= self.floor_K - tolerance).all()
            and (weight_K <= self.cap_K + tolerance).all()
            and (sums >= self._group_low_N - tolerance).all()
            and (sums <= self._group_high_N + tolerance).all()
        )

    @cached_property
    def uniform(self) -> np.ndarray:
        """The feasible mixture nearest to equal weights."""
        return self.project(np.full(len(self.names), 1 / len(self.names)))

    def project(self, weight_K: np.ndarray) -> np.ndarray:
        """The feasible mixture nearest to `weight_K`, by Euclidean distance."""
        weight_K = np.asarray(weight_K, dtype=float)
        if self.contains(weight_K, 0.0):
            return weight_K.copy()
        if self.groups:
            return self._polish(lambda w: (-0.5 * float(((w - weight_K) ** 2).sum()), weight_K - w), self._centre)
        return self._fit(weight_K)

    def maximise_linear(self, slope_K: np.ndarray) -> np.ndarray:
        """The corner of the feasible set with the largest `slope_K @ weight_K`; ties go to the earlier domain."""
        return self._exact(self._programme(-np.asarray(slope_K, dtype=float)).x)

    def maximise(
        self, value_and_slope: Callable[[np.ndarray], tuple[float, np.ndarray]], starts_NK: np.ndarray
    ) -> np.ndarray:
        """The best of the local maxima that are reached from `starts_NK`, of a function given with its slope."""
        ends = [self._polish(value_and_slope, self.project(start_K)) for start_K in np.atleast_2d(starts_NK)]
        return max(ends, key=lambda weight_K: value_and_slope(weight_K)[0])

    def sample(self, count: int, seed: int) -> np.ndarray:
        """[count, K] mixtures, uniform over the feasible set. Without limits: Dirichlet(1); else hit and run."""
        if (self.floor_K == 0).all() and (self.cap_K == 1).all() and not self.groups:
            return dirichlet(len(self.names), count, seed)
        rng = np.random.default_rng(seed)
        weight_NK = np.tile(self._centre, (count, 1))
        for _ in range(HIT_AND_RUN_STEPS * len(self.names)):
            weight_NK = self._jump(weight_NK, rng)
        return np.array([self._exact(weight_K) for weight_K in weight_NK]).reshape(count, len(self.names))

    def spread(self, count: int, seed: int, beside_NK: np.ndarray | None = None) -> np.ndarray:
        """[count, K] mixtures that fill the feasible set, each as far as can be from the others and from `beside`."""
        pool_NK = self.sample(SPREAD_POOL * max(count, 1), seed)
        taken = [] if beside_NK is None else list(np.atleast_2d(beside_NK))
        if not taken and count:
            taken.append(self.uniform)
        near_N = np.full(len(pool_NK), np.inf)
        for weight_K in taken:
            near_N = np.minimum(near_N, np.linalg.norm(pool_NK - weight_K, axis=1))
        rows = []
        for _ in range(count):
            chosen_K = pool_NK[int(np.argmax(near_N))]
            rows.append(chosen_K)
            near_N = np.minimum(near_N, np.linalg.norm(pool_NK - chosen_K, axis=1))
        return np.array(rows).reshape(count, len(self.names))

    # --- linear algebra of the limits --------------------------------------------------------------------------

    @cached_property
    def _group_NK(self) -> np.ndarray:
        rows = [[name in group.domains for name in self.names] for group in self.groups]
        return np.array(rows, dtype=float).reshape(len(self.groups), len(self.names))

    @cached_property
    def _group_low_N(self) -> np.ndarray:
        return np.array([group.low for group in self.groups])

    @cached_property
    def _group_high_N(self) -> np.ndarray:
        return np.array([group.high for group in self.groups])

    @cached_property
    def _centre(self) -> np.ndarray:
        """A point well inside: the mean of the corners that lie furthest along each domain, both ways."""
        slopes = [sign * unit_K for unit_K in np.eye(len(self.names)) for sign in (1.0, -1.0)]
        return self._exact(np.mean([self.maximise_linear(slope_K) for slope_K in slopes], axis=0))

    def _programme(self, cost_K: np.ndarray) -> scipy.optimize.OptimizeResult:
        limits = {}
        if self.groups:
            limits = {
                "A_ub": np.vstack([self._group_NK, -self._group_NK]),
                "b_ub": np.concatenate([self._group_high_N, -self._group_low_N]),
            }
        return scipy.optimize.linprog(
            cost_K,
            A_eq=np.ones((1, len(cost_K))),
            b_eq=[1.0],
            bounds=list(zip(self.floor_K, self.cap_K, strict=True)),
            method="highs",
            **limits,
        )

    def _polish(
        self, value_and_slope: Callable[[np.ndarray], tuple[float, np.ndarray]], start_K: np.ndarray
    ) -> np.ndarray:
        def falling(weight_K: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope_K = value_and_slope(weight_K)
            return -value, -np.asarray(slope_K, dtype=float)

        limits = [scipy.optimize.LinearConstraint(np.ones((1, len(start_K))), 1.0, 1.0)]
        if self.groups:
            limits.append(scipy.optimize.LinearConstraint(self._group_NK, self._group_low_N, self._group_high_N))
        found = scipy.optimize.minimize(
            falling,
            start_K,
            jac=True,
            method="SLSQP",
            bounds=list(zip(self.floor_K, self.cap_K, strict=True)),
            constraints=limits,
            options={"maxiter": 300, "ftol": 1e-12},
        )
        end_K = self._exact(found.x)
        # SLSQP may stop in rounding outside the set; a start that is feasible is never worse than that
        if not self.contains(end_K, 1e-7) or value_and_slope(end_K)[0] < value_and_slope(start_K)[0]:
            return start_K
        return end_K

    def _exact(self, weight_K: np.ndarray) -> np.ndarray:
        """Rounding of the solvers taken out, so that limits and the sum hold to the last digits."""
        weight_K = np.where(np.abs(weight_K - self.floor_K) < TOLERANCE, self.floor_K, weight_K)
        weight_K = np.where(np.abs(weight_K - self.cap_K) < TOLERANCE, self.cap_K, weight_K)
        return self._fit(weight_K)

    def _fit(self, weight_K: np.ndarray) -> np.ndarray:
        """Projection onto floors, caps and sum: the shift of all weights by which the clipped sum is one."""

        def total(shift: float) -> float:
            return float(np.clip(weight_K + shift, self.floor_K, self.cap_K).sum()) - 1

        clipped_K = np.clip(weight_K, self.floor_K, self.cap_K)
        if abs(clipped_K.sum() - 1) <= 1e-15:
            return clipped_K
        low, high = float((self.floor_K - weight_K).min()), float((self.cap_K - weight_K).max())
        shift = scipy.optimize.brentq(total, low - 1e-12, high + 1e-12, xtol=1e-16)
        return np.clip(weight_K + shift, self.floor_K, self.cap_K)

    def _jump(self, weight_NK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One step of hit and run for each row: to a uniform point of its feasible line in a random direction."""
        direction_NK = rng.normal(size=weight_NK.shape)
        direction_NK -= direction_NK.mean(axis=1, keepdims=True)
        drift, sums = direction_NK @ self._group_NK.T, weight_NK @ self._group_NK.T
        rates = np.hstack([-direction_NK, direction_NK, -drift, drift])
        rooms = np.hstack(
            [weight_NK - self.floor_K, self.cap_K - weight_NK, sums - self._group_low_N, self._group_high_N - sums]
        )
        reach = np.clip(rooms, 0, None) / np.where(np.abs(rates) > MIN_RATE, np.abs(rates), np.inf)
        forward_N = np.where(rates > MIN_RATE, reach, np.inf).min(axis=1)
        back_N = np.where(rates < -MIN_RATE, reach, np.inf).min(axis=1)
        # no limit is met in either direction only where there is no direction: one domain
        forward_N, back_N = (np.where(np.isfinite(length_N), length_N, 0.0) for length_N in (forward_N, back_N))
        return weight_NK + rng.uniform(-back_N, forward_N)[:, None] * direction_NK


def grid(domains: int, parts: int, *, interior: bool = False) -> np.ndarray:
    """The simplex lattice of step 1/parts, [N, K]; `interior` leaves out mixtures that lack a domain."""
    low = 1 if interior else 0
    cuts = itertools.combinations(range(parts - low * domains + domains - 1), domains - 1)
    counts = []
    for cut in cuts:
        edges = (-1, *cut, parts - low * domains + domains - 1)
        counts.append([right - left - 1 + low for left, right in itertools.pairwise(edges)])
    return np.array(sorted(counts, reverse=True), dtype=float).reshape(len(counts), domains) / parts


def dirichlet(domains: int, count: int, seed: int, concentration: float = 1.0) -> np.ndarray:
    """[count, K] draws of the symmetric Dirichlet distribution; concentration 1 is uniform over the simplex."""
    return np.random.default_rng(seed).dirichlet(np.full(domains, concentration), size=count)


def largest_remainder(weight_K: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to `total` exactly, each less than one from `weight_K * total` (Hamilton's method).

    Those with the largest fractions are rounded up, ties to the earlier; weight zero gets nothing.
    """
    exact_K = np.asarray(weight_K, dtype=float) * total
    count_K = np.floor(exact_K + 1e-9).astype(int)
    # adding up to 1 only in rounding, weights may be short or over by one in the last place
    order = np.argsort(-(exact_K - count_K), kind="stable")
    for k in itertools.islice((k for k in order if weight_K[k] > 0), total - int(count_K.sum())):
        count_K[k] += 1
    return count_K

"""The proxy, the targets and some probes in, a scorer that is ready to score out.

The family of scorers: `exact` (the definition), `tail` (exact on the last layers), `calibrated` (cheap features
fitted to exact probes), `first_order` and `first_order_hooks` (gradient dot products, for comparison), `less` (cosines
of gradients), `visual_gain` (what the pictures tell about the answers), `entropy_minus_loss` (answers likelier than
expected), and the baselines. All give a `ScoreBlock` for a list of encoded samples; higher is better in all. Raters
(`deita`, `judge`) read samples instead of measuring them and give `Ratings`. `right_and_wanted` is made from the
utility of `first_order` and the losses.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.nn import Parameter

from datalloy.config import Score, StepSize
from datalloy.errors import AgreementError
from datalloy.scorers.baselines import BASELINES, MADE_FROM, WITHOUT_MODEL, LossScorer, Seen, right_and_wanted
from datalloy.scorers.calibrated import Agreement, CalibratedScorer
from datalloy.scorers.deita import DeitaRater
from datalloy.scorers.entropy_minus_loss import EntropyMinusLossScorer
from datalloy.scorers.first_order import FiniteDifferenceScorer, TapScorer, vision_stands_still
from datalloy.scorers.isolation import FAULTS, score_isolated
from datalloy.scorers.judge import JudgeRater
from datalloy.scorers.less import LessScorer
from datalloy.scorers.one_step import ExactScorer, OneStepScorer, ScoreBlock
from datalloy.scorers.probing import GRID, StepScan, noise_floor, scan_steps
from datalloy.scorers.rating import Rater, Ratings
from datalloy.scorers.step import SHARES, Steppable, StepRule, batch_share, root_second_moments, scoped_parameters
from datalloy.scorers.tail import TailScorer
from datalloy.scorers.taps import Taps
from datalloy.scorers.visual_gain import VisualGainScorer
from datalloy.target_items import TargetItems
from datalloy.uncertainty import rank_agreement, rank_agreement_interval
from datalloy.vlm import VLM, Encoded

__all__ = [
    "BASELINES",
    "FAULTS",
    "GRID",
    "MADE_FROM",
    "POOL_BATCHES",
    "RATERS",
    "SCAN_PROBES",
    "WITHOUT_MODEL",
    "WITHOUT_PROBES",
    "WITHOUT_STEP",
    "DeitaRater",
    "JudgeRater",
    "Probing",
    "Rater",
    "Ratings",
    "ScoreBlock",
    "Scorer",
    "ScoringInputs",
    "Seen",
    "agreement_with_exact",
    "prepare",
    "probe",
    "right_and_wanted",
    "score_isolated",
]

SCAN_PROBES = 16  # of the probes, for the step scan: each costs one pass of the targets a step size
NOISE_PROBES = 6
POOL_BATCHES = 8  # of the training size, for Adam's second moments and for a sample's share of a step
RATERS = (
    "deita",
    "judge",
)  # methods that read samples; what the proxy's forward pass gives stands beside their ratings
FORWARD: dict[str, type[LossScorer]] = {
    "loss": LossScorer,
    "visual_gain": VisualGainScorer,
    "entropy_minus_loss": EntropyMinusLossScorer,
}
WITHOUT_PROBES = (*FORWARD, *RATERS)  # know no target: what they say is not held against exact utility
WITHOUT_STEP = ("first_order", "first_order_hooks", "less")  # of no finite step, so harm begins at zero
HARM_QUANTILE = 0.05  # of the target items' own utilities: a sample below it is worse than clean samples are


class Scorer(Protocol):
    """What every scorer does. `signed`: utilities below zero mean harm (False for the baselines).

    The contract (tests/scorer_contract.py): scores come in the order of the samples; they do not depend on the
    order, on who else is in the call or on the batch size beyond rounding; scoring twice gives the same numbers;
    the model's weights afterwards are bit for bit what they were.
    """

    signed: bool

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock: ...


@dataclass(frozen=True)
class ScoringInputs:
    """What all scorers are made from. `targets`: the encoded items that `items` is laid out from."""

    vlm: VLM
    items: TargetItems
    targets: Mapping[str, Sequence[Encoded]]
    pool_batch: Sequence[Encoded]  # samples of the pool, `POOL_BATCHES` of the training size
    settings: Score
    step: StepSize | float  # `Recipe.scoring_step`
    freeze_vision: bool
    train_batch_size: int


@dataclass(frozen=True)
class Probing:
    """What the probes told: step scans, steps chosen, where harm begins, exact utilities, the noise floor (nats).

    `scans`, `steps` and `harm_below` have an entry for exact, and one for tail where it is used.
    """

    scans: Mapping[str, Mapping[str, Any]]
    steps: Mapping[str, float]
    harm_below: Mapping[str, float]
    exact: ScoreBlock
    noise_floor: float


def probe(inputs: ScoringInputs, methods: Sequence[str], probes: Sequence[Encoded]) -> Probing:
    """Choose the step sizes and score the probes exactly, which every other scorer is compared with.

    Raises AgreementError when fewer than two probes have a finite utility: nothing could be compared.
    """
    settings, few = inputs.settings, probes[:SCAN_PROBES]
    exact = _exact(inputs, 0.0)
    stepped: dict[str, OneStepScorer] = {"exact": exact}
    if "tail" in methods:
        stepped["tail"] = _tail(inputs, 0.0)
    scans: dict[str, StepScan] = {}
    harm: dict[str, float] = {}
    for name, scorer in stepped.items():
        # a step given in the recipe is for the scorer that it names, exact being only its referee beside tail
        is_named = name == "tail" or "tail" not in methods
        given, why = _wanted_step(inputs, scorer, is_named=is_named)
        scans[name] = scan_steps(scorer, few, wanted=given, seed=settings.seed, why=why)
        scorer.step = scans[name].chosen
        harm[name] = harm_below(scorer, inputs.targets)
    block = exact.score(probes)
    finite = [probe for probe, ok in zip(probes, block.finite_N, strict=True) if ok]
    if len(finite) < 2:
        raise AgreementError(
            f"{len(finite)} of {len(probes)} probes have a finite exact utility, at least 2 are needed to tell how "
            "far a scorer agrees with exact; raise score.probes, or lower score.step"
        )
    other = TargetItems.lay_out(
        inputs.vlm, inputs.targets, dict(zip(inputs.items.names, inputs.items.weight_G, strict=True)), items_per_batch=7
    )
    relaid = ExactScorer(inputs.vlm, other, exact.steppable, rule=exact.rule, step=exact.step)
    return Probing(
        scans={name: scan.as_metadata() for name, scan in scans.items()},
        steps={name: scan.chosen for name, scan in scans.items()},
        harm_below=harm,
        exact=block,
        noise_floor=noise_floor(exact, relaid, finite[:NOISE_PROBES]),
    )


def _wanted_step(inputs: ScoringInputs, scorer: OneStepScorer, *, is_named: bool) -> tuple[float | None, str]:
    """The step that the recipe asks for, or None where it leaves it to the scan; and why."""
    wanted, size = inputs.step, inputs.train_batch_size
    if wanted == "visible_effect":
        return None, ""
    if wanted == "batch_share" or not is_named:
        step = batch_share(inputs.vlm, inputs.pool_batch, scorer.parameters, scorer.rule, batch_size=size)
        return step, f"it is {SHARES:g} times a sample's part in the step of a batch of {size}"
    return wanted, "given in the recipe"


def prepare(method: str, inputs: ScoringInputs, probing: Probing | None, probes: Sequence[Encoded]) -> Scorer:
    """The scorer named `method`. `probing` is needed by all but the baselines."""
    settings, vlm, items = inputs.settings, inputs.vlm, inputs.items
    if method in (*WITHOUT_PROBES, *BASELINES) or probing is None:
        forward = FORWARD.get(method, LossScorer)
        targets, size = len(items.names), settings.batch_size
        return forward(vlm, targets=targets, batch_size=size, precision=settings.precision)
    if method == "tail":
        return _tail(inputs, probing.steps["tail"])
    step = probing.steps["exact"]
    if method == "exact":
        return _exact(inputs, step)
    if method == "first_order":
        return _first_order(inputs, step)
    taps = Taps(vlm, precision=settings.precision)
    if method == "calibrated":
        flat = [item for group in inputs.targets.values() for item in group]
        size = settings.batch_size
        return CalibratedScorer(
            taps,
            items,
            [flat[i : i + size] for i in range(0, len(flat), size)],
            probes,
            probing.exact,
            replayed=_replayed(inputs),
            rule=_rule(inputs, taps.weights()),
            step=step,
            batch_size=size,
            min_agreement=settings.min_agreement,
            seed=settings.seed,
        )
    if method == "less":
        roots = _root_second_moments(inputs, taps.weights())
        return LessScorer(taps, items, root_second_moments=roots, batch_size=settings.batch_size)
    return TapScorer(taps, items, rule=StepRule(settings.step_rule), step=step, batch_size=settings.batch_size)


def _replayed(inputs: ScoringInputs) -> TargetItems | None:
    """The few items that calibrated measures after real steps, in turn from every target."""
    turns = itertools.zip_longest(*([(name, item) for item in group] for name, group in inputs.targets.items()))
    dealt = [pair for turn in turns for pair in turn if pair is not None][: inputs.settings.replayed_items]
    groups: dict[str, list[Encoded]] = {}
    for name, item in dealt:
        groups.setdefault(name, []).append(item)
    return TargetItems.lay_out(inputs.vlm, groups, dict.fromkeys(groups, 1.0)) if groups else None


def agreement_with_exact(scorer: Scorer, probing: Probing, probes: Sequence[Encoded], seed: int) -> Agreement:
    """Spearman of a scorer with exact utilities on the probes. For calibrated: on probes it was not fitted to."""
    if isinstance(scorer, CalibratedScorer):
        return scorer.agreement
    utility_N = scorer.score(probes).utility_N
    exact_N = probing.exact.utility_N
    both = np.isfinite(utility_N) & np.isfinite(exact_N)
    interval = rank_agreement_interval(utility_N[both], exact_N[both], seed=seed)
    return Agreement(rank_agreement(utility_N[both], exact_N[both]), interval, int(both.sum()))


def harm_below(scorer: OneStepScorer, targets: Mapping[str, Sequence[Encoded]]) -> float:
    """The utility below which a sample is called harmful at the scorer's step, nats per token, never above zero.

    What all but the worst 5 % of the target items themselves do better than, each stepped on and measured on the
    others.
    """
    clean_V = scorer.clean_utilities([item for group in targets.values() for item in group])
    return min(0.0, float(np.quantile(clean_V[np.isfinite(clean_V)], HARM_QUANTILE)))


def _rule(inputs: ScoringInputs, parameters: Sequence[Parameter]) -> StepRule:
    if inputs.settings.step_rule != "adamw":
        return StepRule(inputs.settings.step_rule)
    return StepRule("adamw", _root_second_moments(inputs, parameters))


def _root_second_moments(inputs: ScoringInputs, parameters: Sequence[Parameter]) -> tuple[Tensor, ...]:
    return root_second_moments(inputs.vlm, inputs.pool_batch, parameters, batch_size=inputs.train_batch_size)


def _exact(inputs: ScoringInputs, step: float) -> ExactScorer:
    parameters = scoped_parameters(inputs.vlm, inputs.settings.scope, freeze_vision=inputs.freeze_vision)
    steppable = Steppable(parameters)
    return ExactScorer(inputs.vlm, inputs.items, steppable, rule=_rule(inputs, steppable.parameters), step=step)


def _first_order(inputs: ScoringInputs, step: float) -> FiniteDifferenceScorer:
    vlm, settings = inputs.vlm, inputs.settings
    steppable = Steppable(scoped_parameters(vlm, settings.scope, freeze_vision=inputs.freeze_vision))
    return FiniteDifferenceScorer(
        vlm,
        inputs.items,
        steppable,
        rule=_rule(inputs, steppable.parameters),
        step=step,
        batch_size=settings.batch_size,
        share_vision=vision_stands_still(vlm, steppable),
    )


def _tail(inputs: ScoringInputs, step: float) -> TailScorer:
    taps, size = Taps(inputs.vlm, inputs.settings.tail_layers), inputs.settings.batch_size
    rule = _rule(inputs, taps.weights())
    check = next(item for group in inputs.targets.values() for item in group)
    return TailScorer(inputs.vlm, inputs.items, taps, check=check, rule=rule, step=step, batch_size=size)

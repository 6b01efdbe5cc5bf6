"""A recipe in, what it would cost out: counts, operations, time and disk for every stage, before anything is spent.

Operations are counted (two for each parameter and token forward, six for training on it); time comes from one
timed training step of the proxy on this machine. An estimate: expect it to be right within a factor of two.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from datalloy import bakeoff, readers, scorers
from datalloy.config import DataSource, Mixture, Recipe, Select
from datalloy.errors import DataError
from datalloy.progress import format_duration
from datalloy.sample import Sample
from datalloy.search import SLOPE_CALLS, auto_evaluations
from datalloy.vlm import VLM, EncodeError

log = logging.getLogger(__name__)

CONFIRMING_EVALUATIONS = 2  # of the search where the metric is the loss, which its slopes tell already
SAMPLED = 32  # samples that are encoded to learn how long samples are


@dataclass(frozen=True)
class StageCost:
    """Floating-point operations and bytes left on disk of one stage."""

    stage: str
    flops: float
    disk_bytes: float
    note: str = ""


def estimate(recipe: Recipe) -> Iterator[str]:
    """Lines of a table: counts, then operations, time and disk by stage."""
    pool, held_out = _read(recipe.domains), _read(recipe.evaluation)
    items = {name: len(_read({name: source})) for name, source in recipe.targets.items()}
    domains = f"{len(pool)} samples in {len(recipe.domains)} domains"
    yield f"pool: {domains}; targets: {sum(items.values())} items; held out: {len(held_out)} items"
    proxy = VLM.load(recipe.proxy_model, device=recipe.device)
    tokens, flops_per_second = _measure(proxy, pool, recipe)
    base_parameters = _parameters(proxy if recipe.base == recipe.proxy_model else VLM.load(recipe.base, device="cpu"))
    total = 0.0
    yield f"{tokens:.0f} tokens a sample; this machine trains the proxy at {flops_per_second / 1e9:.1f} GFLOP/s"
    yield f"{'stage':<24}{'operations':>12}{'time':>14}{'disk':>12}"
    for cost in _stages(recipe, len(pool), items, len(held_out), tokens, _parameters(proxy), base_parameters):
        seconds = cost.flops / flops_per_second
        total += seconds
        row = f"{cost.stage:<24}{cost.flops:>12.2e}{format_duration(seconds):>14}{cost.disk_bytes / 1e6:>9.1f} MB"
        yield f"{row}  {cost.note}".rstrip()
    yield f"{'in all':<24}{'':>12}{format_duration(total):>14}"


def _read(sources: Mapping[str, DataSource]) -> readers.Samples:
    return readers.Samples.joined(readers.read_stored(source, name)[0] for name, source in sources.items())


def _stages(
    recipe: Recipe, pool: int, items: Mapping[str, int], held_out: int, tokens: float, proxy: int, base: int
) -> Iterator[StageCost]:
    forward, step = 2 * proxy * tokens, 6 * proxy * tokens
    batch, targets = recipe.train.batch_size, sum(items.values())
    generated = recipe.evaluate.max_new_tokens
    half = 2 if recipe.is_raced else 1
    scoring = {name: min(count // half, recipe.score.target_items) for name, count in items.items()}
    used = sum(scoring.values())
    seen = recipe.train.samples if recipe.train.protocol == "fixed_compute" else recipe.train.epochs * pool
    if recipe.score.warmup_fraction:
        yield StageCost("warm-up", recipe.score.warmup_fraction * pool * step, 4 * proxy)
    methods = recipe.select.bakeoff_arms if recipe.score.method == "auto" else (recipe.score.method,)
    passes = list(dict.fromkeys(_pass_of(method) for method in methods))
    if set(passes) - {"loss", *scorers.WITHOUT_PROBES}:
        scans = 2 if "tail" in methods else 1
        scanned = scans * scorers.SCAN_PROBES * len(scorers.GRID)
        flops = (min(recipe.score.probes, pool) + scanned) * used * forward
        # a step given in the recipe is tail's alone where tail scores; exact beside it has its share of a batch's
        shares = {"batch_share": scans, "visible_effect": 0}.get(str(recipe.scoring_step), scans - 1)
        flops += shares * min(pool, scorers.POOL_BATCHES * batch) * step
        yield StageCost("probes", flops, 8 * used * recipe.score.probes)
    for method in passes:
        flops = {
            "exact": pool * (step + used * forward),
            "tail": pool * (step + used * forward * recipe.score.tail_layers / 8),
            # measured (docs/performance.md): reading gradients, then each item replayed
            "calibrated": pool * (0.9 + 0.3 * recipe.score.replayed_items) * step,
            "first_order": pool * (1 + len(recipe.targets)) * forward,
            "first_order_hooks": pool * step,
            "less": pool * step,
            # the proxy's loss and two ratings of a turn; raters of other sizes are not counted
            "deita": 3 * pool * forward,
            "judge": pool * forward,  # here; the judge computes elsewhere
            "visual_gain": 2 * pool * forward,
            "entropy_minus_loss": pool * forward,
            "loss": pool * forward,
        }[method]
        yield StageCost(f"score {method}", flops, 150.0 * pool, f"one epoch of the proxy is {pool * step:.1e}")
    has_neighbours = not {"low_loss_by_neighbours", "right_and_wanted"}.isdisjoint(methods)
    if embeddings := has_neighbours + (recipe.select.diversity != "off"):
        yield StageCost("embed", embeddings * pool * forward, 0, "where the proxy puts each sample or prompt")
    if recipe.is_raced:
        judging = sum(min(count - scoring[name], bakeoff.JUDGING_ITEMS) for name, count in items.items())
        runs = _races(methods, recipe.select, int(recipe.select.bakeoff_epochs * pool / batch), round(seen / batch))
        training = recipe.select.bakeoff_epochs * pool * step
        # an item is judged by writing its answer and by the probability of the right one
        judged = (1 + runs) * judging * 2 * proxy * (2 * tokens + generated)
        note = f"{recipe.select.bakeoff_epochs:g} epochs of the pool; {runs} short models on {judging} items"
        yield StageCost("bake-off", training + judged, 0, note)
    # an adapter saves the gradient of the weights, a third of a step, and is about a hundredth of its base on disk
    factor, disk = (4, 0.04 * base) if recipe.train.adapter == "lora" else (6, 4.0 * base)
    training = factor * base * tokens * seen
    if recipe.mixture is not None:
        yield from _mixture_stages(recipe, recipe.mixture, seen, training, disk, 2 * base * tokens * targets)
    yield StageCost("train", training, disk, f"{seen / batch:.0f} steps of {batch}")
    yield StageCost("evaluate", 2 * (targets + held_out) * 2 * base * (tokens + generated), 0, "base and tuned model")


def _pass_of(method: str) -> str:
    """The scorer whose pass over the pool gives what a method ranks by; baselines need the loss alone."""
    return "loss" if method in scorers.BASELINES else scorers.MADE_FROM.get(method, method)


def _races(methods: Sequence[str], settings: Select, budget_steps: int, final_steps: int) -> int:
    """Trainings of the bake-off, at most."""
    fractions = settings.bakeoff_fractions if settings.keep_fraction == "auto" else (settings.keep_fraction,)
    return bakeoff.plan_race(bakeoff.make_arms(methods, fractions), budget_steps, final_steps).runs


def _mixture_stages(
    recipe: Recipe, settings: Mixture, seen: float, training: float, disk: float, evaluation: float
) -> Iterator[StageCost]:
    """Operations: `training` on the `seen` samples of the final training, `evaluation` of all target items once."""
    parts = len(recipe.domains) * (settings.buckets or 1)
    share = (settings.expert_samples or seen) / seen
    kept = 1 + len(settings.checkpoints)
    yield StageCost("experts", parts * share * training, parts * kept * disk, f"{parts} experts")
    asked = auto_evaluations(parts) if settings.evaluations == "auto" else settings.evaluations
    evaluations = asked if settings.metric == "target" else CONFIRMING_EVALUATIONS
    passes = evaluations + 3 * SLOPE_CALLS * kept
    yield StageCost("mix", passes * evaluation, 0, f"{evaluations} evaluations of merged models, nothing written")
    runs = settings.verify_runs + (2 * settings.confirm_runs if settings.verify_runs > 1 else 0)
    yield StageCost("verify", runs * (share * training + evaluation), runs * disk, f"{runs} real runs")


def _measure(vlm: VLM, pool: Sequence[Sample], recipe: Recipe) -> tuple[float, float]:
    """Mean tokens of a sample, and operations a second of a training step of the proxy."""
    encoded = []
    for sample in pool[:: max(1, len(pool) // SAMPLED)]:
        try:
            encoded.append(vlm.encode(sample, max_tokens=recipe.train.max_tokens))
        except EncodeError as error:
            log.info("not counted: %s", error)
    if not encoded:
        raise DataError(f"none of the pool's samples that were tried can be given to {vlm.name}; see `datalloy check`")
    batch = vlm.collate(encoded[:8])
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    for _ in range(2):  # the first call pays for warming up
        started = time.monotonic()
        torch.autograd.grad(vlm.losses(batch).mean(), parameters, allow_unused=True)
        seconds = time.monotonic() - started
    tokens = sum(e.length for e in encoded) / len(encoded)
    return tokens, 6 * _parameters(vlm) * sum(e.length for e in encoded[:8]) / seconds


def _parameters(vlm: VLM) -> int:
    return sum(p.numel() for p in vlm.model.parameters())

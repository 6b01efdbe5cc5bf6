"""The committed results in, the pictures of docs/evidence.md out, as SVG.

What a picture shows stands in a table of the page too; `scripts/evidence.py` writes both.
"""

import io
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evidence_mixtures import AS_DECIDED, FINAL_STEPS, curve_rows, joint_gain, joint_ways
from evidence_selection import AUTO, COMPARED, NAMES, by_utility, in_every_world, runs, worlds
from evidence_tables import interval, pooled_gain

FOLDER = Path("docs/images")
BASE = "blurred"
INK, PALE, GREY = "#1f5fbf", "#9db8dd", "#8b949e"
OURS, HARM, OTHER, MORE = "#17703f", "#b3261e", "#b26a00", "#7a3fb0"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # words stay words: they can be found and read aloud
    "svg.hashsalt": "datalloy",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "#fafaf8",
    "axes.facecolor": "#fafaf8",
    "legend.frameon": False,
}
HALF, FIFTH = 0.5, 0.2
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
NAME = re.compile(r"\b[mp][0-9a-f]{10}\b")  # of a mark or a clip: a hash of its numbers
TOLERANCE = 0.02  # points on the page


def _zero(axes: Axes) -> None:
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--", zorder=0)


def _span(axes: Axes, at: float, gain: tuple[float, float, float] | None, colour: str) -> None:
    """A mean with its interval, on a row; nothing where there is none."""
    if gain is None:
        return
    mean, low, high = gain
    axes.plot([low, high], [at, at], color=colour, linewidth=2, solid_capstyle="round")
    axes.plot([mean], [at], "o", color=colour, markersize=5)


def arms() -> Figure:
    """Gains over full SFT in the mean over all pools, by what is kept, the best half on top."""
    scorers = [scorer for scorer in COMPARED if scorer not in AUTO[1:]]
    pairs = {
        (NAMES[scorer], fraction): in_every_world(BASE, (scorer, fraction), ("full", None))
        for scorer in scorers
        for fraction in (FIFTH, HALF)
        if (scorer, fraction) != ("auto", FIFTH)  # its share is its own
    }
    for (name, score), fraction in product(OF_GROUPS.items(), (FIFTH, HALF)):
        pools = by_utility(score, fraction)
        pairs[name, fraction] = [(pools[world], runs(BASE, world, "full")) for world in pools]
    gains = {arm: gain for arm, worlds_of in pairs.items() if (gain := pooled_gain(worlds_of))}
    ranked = sorted((name for name, fraction in gains if fraction == HALF), key=lambda name: gains[name, HALF][0])
    figure = Figure(figsize=(8.2, 5.8), layout="constrained")
    axes = figure.subplots()
    _zero(axes)
    for at, name in enumerate(ranked):
        _span(axes, at - 0.17, gains.get((name, FIFTH)), PALE)
        _span(axes, at + 0.17, gains[name, HALF], OURS if name == NAMES["auto"] else INK)
    counts = {name: sum(len(mine) for mine, _ in pairs[name, HALF]) for name in ranked}
    most = max(counts.values())
    labels = [name + (f" ({counts[name]} pools)" if counts[name] < most else "") for name in ranked]
    axes.set_yticks(range(len(ranked)), labels)
    axes.set_xlabel(f"gain in accuracy over full SFT, mean of {most} pools, 95 % interval")
    for colour, word in ((OURS, "share chosen by short runs"), (INK, "a half of each domain"), (PALE, "a fifth")):
        axes.plot([], [], "o-", color=colour, label=word)
    axes.legend(loc="lower right")
    return figure


OF_GROUPS = {  # scores of utilities.py that were run in all worlds
    "OST, groups of sixteen": "groups",
    "OST, exact, a batch's share": "step of a group's share",
    "groups, low loss by neighbours": "ranks of low loss by neighbours and groups",
}
SHOWN = {  # arms by world, and their colours
    ("base", None): GREY,
    ("full", None): INK,
    ("random", HALF): INK,
    ("calibrated batch_share", HALF): HARM,
    ("low_loss", HALF): OTHER,
    ("low_loss_by_neighbours", HALF): OURS,
    ("auto", None): OURS,
    ("oracle", None): GREY,
}


def by_world() -> Figure:
    """Accuracy of the main arms in every world, with intervals over pools and questions."""
    figure = Figure(figsize=(8.2, 6.4), layout="constrained")
    grid = figure.subplots(3, 3, sharey=True, squeeze=False)
    labels = [NAMES[scorer].partition(",")[0] + (f" {share:.0%}" if share else "") for scorer, share in SHOWN]
    for axes, world in zip(grid.flat, worlds(BASE), strict=True):
        for at, ((scorer, share), colour) in enumerate(SHOWN.items()):
            found = runs(BASE, world, scorer, share)
            _span(axes, at, interval(list(found.values())), colour)
        axes.set_title(f"{world} ({len(runs(BASE, world, 'full'))} pools)")
        axes.set_yticks(range(len(SHOWN)), labels)
        axes.margins(x=0.08)
    grid[0, 0].invert_yaxis()  # shared by all
    for axes in grid[-1]:
        axes.set_xlabel("accuracy")
    return figure


SHARES = (0.1, 0.2, 0.5, 0.65, 0.8)
KEPT_BY = {
    "low_loss_by_neighbours": OURS,
    "right_and_wanted": MORE,
    "entropy_minus_loss": INK,
    "low_loss": OTHER,
    "exact": HARM,
    "random": GREY,
}


def shares() -> Figure:
    """Accuracy by the share of each domain that is kept: lines end at the full pool."""
    figure = Figure(figsize=(8.2, 6.4), layout="constrained")
    grid = figure.subplots(3, 3, sharex=True, squeeze=False)
    for axes, world in zip(grid.flat, worlds(BASE), strict=True):
        full = _accuracy(world, "full", None)
        for scorer, colour in KEPT_BY.items():
            found = [(share, _accuracy(world, scorer, share)) for share in SHARES]
            points = [(share, value) for share, value in found if value is not None] + [(1.0, full)]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=NAMES[scorer])
        axes.set_title(world)
    for axes in grid[-1]:
        axes.set_xlabel("share kept")
        axes.set_xticks([0.1, 0.5, 1], ["10 %", "50 %", "all"])
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _accuracy(world: str, scorer: str, share: float | None) -> float | None:
    found = runs(BASE, world, scorer, share)
    return float(np.mean([right_Q.mean() for right_Q in found.values()])) if found else None


CURVES = {  # predictors that learn from real runs
    "calibrated, planned": ("merged models, calibrated", OURS, "o-"),
    "linear": ("linear", GREY, "s-"),
    "log_linear": ("log-linear", GREY, "^-"),
    "scheffe": ("Scheffé's polynomial", OTHER, "s-"),
    "gaussian_process": ("Gaussian process", INK, "o-"),
    "regmix_tuned": ("RegMix, trees tuned", HARM, "o-"),
}
POINTS = {  # those that need the experts alone
    "merged": ("merged models alone", OURS, "*"),
    "MixMin": ("MixMin", HARM, "D"),
    "uniform": ("uniform", GREY, "x"),
}
DESIGNS = {"drawn2": "two domains", "two_of_three": "three, two targets", "two_of_four": "four, two targets"}
METRICS = {"probability": "by probability", "loss": "by answer loss"}


def costs_of_mixtures() -> Figure:
    """Regret of the pick against all trainings that it took, experts and real runs, by predictor, design and metric."""
    figure = Figure(figsize=(8.2, 6), layout="constrained")
    grid = figure.subplots(len(METRICS), len(DESIGNS), sharex="col", sharey=True, squeeze=False)
    for row, (metric, by) in zip(grid, METRICS.items(), strict=True):
        for axes, (world, design) in zip(row, DESIGNS.items(), strict=True):
            for name, (label, colour, mark) in (CURVES | POINTS).items():
                found = _regrets(metric, world, name)
                axes.plot(found.keys(), found.values(), mark, color=colour, markersize=4, linewidth=1.3, label=label)
            another = _regrets(metric, world, "one more training")
            axes.axhline(next(iter(another.values())), color=GREY, linestyle=":", label="another training of all")
            axes.set_title(f"{design}, {by}")
            axes.set_ylim(0, 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[-1]:
        axes.set_xlabel("trainings: experts and real runs")
    for axes in grid[:, 0]:
        axes.set_ylabel("regret / (best - worst)")
    entries = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=4)
    return figure


def _regrets(metric: str, world: str, predictor: str) -> dict[int, float]:
    """Mean regret as a share of the spread, by the number of trainings."""
    found: dict[int, list[float]] = {}
    for row in curve_rows(metric, world):
        if row["predictor"] == predictor:
            found.setdefault(row["trainings"], []).append(row["regret"] / row["spread"])
    return {trainings: float(np.mean(regrets)) for trainings, regrets in sorted(found.items())}


WAYS = {  # of joint.py, as the verdict has it, from what they train on without any run
    "selection": "filter",
    "both, the pick followed never": "filter, equal shares",
    f"both, the pick followed {AS_DECIDED}": "filter, shares as advised",
    "mixture, the pick followed never": "all samples, equal shares",
    f"mixture, the pick followed {AS_DECIDED}": "all samples, shares as advised",
    "buckets, the pick followed never": "score buckets, equal shares",
    f"buckets, the pick followed {AS_DECIDED}": "score buckets, shares as advised",
}


def joint() -> Figure:
    """Gain over full SFT of filtering, mixing and both, with the trainings that it took to decide."""
    figure = Figure(figsize=(8.2, 2.9), layout="constrained")
    axes = figure.subplots()
    _zero(axes)
    labels = []
    for at, (way, name) in enumerate(WAYS.items()):
        _span(axes, at, joint_gain(way, "full SFT"), OURS if name.startswith("filter") else INK)
        spent = sum(row["steps"] for row in joint_ways()[way]) / len(joint_ways()[way]) / FINAL_STEPS
        labels.append(f"{name} ({0 if way.endswith('never') else spent:.0f} trainings)")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("gain in accuracy over full SFT, mean of 27 pools of nine worlds, 95 % interval")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "evidence-arms": arms,
    "evidence-worlds": by_world,
    "evidence-shares": shares,
    "evidence-mixture-costs": costs_of_mixtures,
    "evidence-joint": joint,
}


def drawn(name: str) -> str:
    """The SVG of a picture."""
    with mpl.rc_context(STYLE), io.StringIO() as file:
        PICTURES[name]().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()


def shows_the_same(one: str, other: str) -> bool:
    """Whether two SVGs differ in nothing but the last digits of their numbers, as they do between machines."""
    one, other = (NAME.sub("", svg) for svg in (one, other))
    numbers = [[float(number) for number in NUMBER.findall(svg)] for svg in (one, other)]
    return NUMBER.split(one) == NUMBER.split(other) and np.allclose(*numbers, rtol=0, atol=TOLERANCE)

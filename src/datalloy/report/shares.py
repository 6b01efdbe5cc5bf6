"""The mixture: shares with their intervals, and the surface over all mixtures that they were found on."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from datalloy.report.charts import Dot, Mark, Span, Strip, figure, legend, line, scale, strips, triangle
from datalloy.report.facts import RunFacts
from datalloy.report.markup import bracket, number, paragraph, percent, text
from datalloy.report.page import Section


def section(facts: RunFacts) -> Section:
    mixture = facts.mixture
    rows = [
        Strip(
            name,
            share,
            mixture["interval"][name],
            _share_in_words(mixture, name),
        )
        for name, share in sorted(mixture["searched"].items(), key=lambda item: -item[1])
    ]
    about = (
        "The share of training samples that each domain gets. In brackets: where the best share could as well lie, "
        "given what was measured; a wide one means that the result hardly depends on it there."
    )
    if mixture["weights"] != mixture["searched"]:
        about += " The dots are the shares that were found, which are not advised."
    body = strips(rows, zero=0.0, span=Span(-0.03, 1.03)) + paragraph(text(about), "note") + _surface(facts, mixture)
    return Section("mixture", "The mixture", f"Verdict: {mixture['verdict']}. {mixture['reason']}", body)


def _share_in_words(mixture: dict[str, Any], name: str) -> str:
    low, high = mixture["interval"][name]
    found = f"{percent(mixture['searched'][name])} ({percent(low)} to {percent(high)})"
    if mixture["weights"] == mixture["searched"]:
        return found
    return f"found {found}, use {percent(mixture['weights'][name])}"


def _surface(facts: RunFacts, mixture: dict[str, Any]) -> str:
    surface = facts.surface
    if surface is None:
        return paragraph("This run was made before surfaces were kept; there is no picture of it.", "note")
    if not surface["points"]:
        return ""
    names = surface["names"]
    heading = "<h3>What each mixture is expected to give</h3>"
    drawn = _triangles(surface, mixture) if len(names) == 3 else "".join(_lines(surface, mixture))
    kinds = [("dot real", "really trained"), ("ring" if len(names) == 3 else "dot pick", "the pick")]
    about = (
        f"Value on the targets ({mixture['metric']}, {mixture['objective']} over targets) after calibration by the "
        "real runs. Point at a place to read it."
    )
    return f'{heading}{paragraph(text(about))}<div class="charts">{drawn}</div>{legend(kinds)}'


def _triangles(surface: dict[str, Any], mixture: dict[str, Any]) -> str:
    names, points = surface["names"], surface["points"]
    weight_NK = np.array([point["weights"] for point in points])
    score_N = np.array([point["score"] for point in points])
    half_N = np.array([(point["interval"][1] - point["interval"][0]) / 2 for point in points])
    words = [f"{_words(names, p['weights'])}\n{number(p['score'])} {bracket(p['interval'])}" for p in points]
    marks = [*_real_marks(surface), _pick_mark(names, mixture)]
    return "".join(
        figure(
            title,
            triangle(
                names,
                weight_NK,
                height_N,
                marks,
                words=words,
                label=f"{title}, over all mixtures of {', '.join(names)}",
            )
            + scale(number(float(height_N.min())), number(float(height_N.max()))),
            caption,
        )
        for title, height_N, caption in (
            ("Expected value", score_N, "Each corner is one domain alone; the middle is equal shares."),
            ("How uncertain that is", half_N, "Half the width of the interval: small near what was really trained."),
        )
    )


def _real_marks(surface: dict[str, Any]) -> list[Mark]:
    return [
        Mark(
            row["weights"],
            f"really trained on {_words(surface['names'], row['weights'])}\nmeasured {row['score']:.3f}, "
            f"merged {row['merged_score']:.3f}",
            "dot real",
        )
        for row in surface["trained"]
    ]


def _pick_mark(names: Sequence[str], mixture: dict[str, Any]) -> Mark:
    weights = [mixture["searched"][name] for name in names]
    return Mark(weights, f"the pick: {_words(names, weights)}", "ring")


def _lines(surface: dict[str, Any], mixture: dict[str, Any]) -> Iterator[str]:
    """Two domains: one line. More: one for each pair, all other shares at the pick."""
    names = surface["names"]
    pairs = list(dict.fromkeys(tuple(point["pair"]) for point in surface["points"]))
    for pair in pairs:
        first, second = pair or (names[0], names[1])
        points = [point for point in surface["points"] if tuple(point["pair"]) == pair]
        rows = sorted((_share(names, point["weights"], first, second), point) for point in points)
        xs = [share for share, _ in rows]
        found = [p["interval"] for _, p in rows]
        searched = [mixture["searched"][name] for name in names]
        pick = _share(names, searched, first, second)
        height = float(np.interp(pick, xs, [p["score"] for _, p in rows]))
        dots = [Dot(pick, height, f"the pick: {_words(names, searched)}", "pick")]
        dots += [
            Dot(
                _share(names, row["weights"], first, second),
                row["score"],
                f"really trained: {row['score']:.3f}",
                "real",
            )
            for row in surface["trained"]
            if _is_on(names, row["weights"], searched, first, second)
        ]
        chart = line(
            xs,
            [p["score"] for _, p in rows],
            [low for low, _ in found],
            [high for _, high in found],
            dots,
            x_label=f"share of {first} in {first} and {second} together",
            y_label="expected value",
            label=f"Expected value as {first} and {second} trade their shares",
        )
        yield figure(f"{first} against {second}", chart)


def _share(names: Sequence[str], weights: Sequence[float], first: str, second: str) -> float:
    a, b = weights[names.index(first)], weights[names.index(second)]
    return a / (a + b) if a + b else 0.5


def _is_on(names: Sequence[str], weights: Sequence[float], searched: Sequence[float], first: str, second: str) -> bool:
    """Whether a mixture differs from the pick in the shares of these two alone."""
    others = [k for k, name in enumerate(names) if name not in (first, second)]
    return all(abs(weights[k] - searched[k]) < 1e-3 for k in others)


def _words(names: Sequence[str], weights: Sequence[float]) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in zip(names, weights, strict=True))

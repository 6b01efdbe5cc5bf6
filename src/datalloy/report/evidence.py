"""How far the mixture can be trusted: merged against trained, the stages of the search, the front, the experts."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from datalloy.objective import pareto_front
from datalloy.report.charts import Dot, Strip, figure, legend, scatter, strips
from datalloy.report.facts import RunFacts
from datalloy.report.markup import (
    bracket,
    details,
    gained,
    listed,
    number,
    paragraph,
    percent,
    signed,
    table,
    text,
)
from datalloy.report.page import Section
from datalloy.uncertainty import correlation_in_words

STAGES = {
    "slopes": "one backward pass gives the slopes in all shares at once; a quadratic follows them to its best mixture",
    "confirm": "the pick and equal shares, measured on all items",
    "design": "corners, equal shares and points spread over the simplex, measured on all items",
    "race": "promising mixtures, measured block by block and stopped when they are ruled out",
}
ROWS = 40  # candidates in the table
PANELS = 3  # pairs of targets in pictures of the front


def section(facts: RunFacts) -> Section:
    mixture = facts.mixture
    agreement = mixture["agreement"]["spearman"]
    spent = mixture["spent"]
    takeaway = (
        f"Merged models stood in for mixtures; {spent['runs']} real trainings showed how well they do. "
        f"Rank agreement {correlation_in_words(agreement['value'])} {bracket(agreement['interval'], digits=2)} over "
        f"{agreement['mixtures']} mixtures."
    )
    body = "".join([_gains(mixture), _merged_against_trained(facts), _stages(facts), _front(facts), _experts(facts)])
    return Section("evidence", "How far to trust the mixture", takeaway, body)


def _gains(mixture: dict[str, Any]) -> str:
    rows = [
        Strip(
            f"over {name}, {gain['source']}",
            gain["mean"],
            gain["interval"],
            gained(gain["mean"], gain["interval"]),
        )
        for other, name in (("uniform", "equal shares"), ("size_proportional", "shares by size"))
        for gain in [mixture[f"expected_gain_vs_{other}"]]
    ]
    unit = mixture.get("judged_by", mixture["metric"])
    heading = f"<h3>Gain of the pick on the targets ({text(unit)})</h3>"
    return heading + strips(rows, zero=0.0) + paragraph(text(_what_intervals_hold(mixture)), "note")


def _what_intervals_hold(mixture: dict[str, Any]) -> str:
    gain = mixture["expected_gain_vs_uniform"]
    if gain["source"] != "confirmed":
        return "The intervals cover the choice of items. The luck of training, and of having been chosen, they do not."
    return (
        "Confirmed: the pick and equal shares were trained again from other seeds, and measured on items that decided "
        f"nothing; the interval holds the luck of both. Trainings on one mixture differ by {gain['training_sd']:.4f} "
        "(standard deviation), as far as these and usual ones tell."
    )


def _merged_against_trained(facts: RunFacts) -> str:
    surface, mixture = facts.surface, facts.mixture
    told = _agreements(mixture)
    if surface is None:
        return "<h3>Merged against really trained</h3>" + told
    names = surface["names"]
    dots = []
    for row in surface["trained"]:
        words = ", ".join(f"{n} {percent(w)}" for n, w in zip(names, row["weights"], strict=True) if w > 0)
        is_expert = max(row["weights"]) > 1 - 1e-6
        low, high = (None, None) if is_expert else (row["merged_score"] + end for end in row["gap"])
        said = f"{words}\nmerged {row['merged_score']:.4f}, trained {row['score']:.4f}"
        dots.append(Dot(row["merged_score"], row["score"], said, "other" if is_expert else "real", low, high))
    chart = scatter(
        dots,
        x_label="value of the merged model",
        y_label="value after really training",
        label="Merged against really trained mixtures",
        diagonal=True,
        equal=True,
    )
    caption = (
        "On the dashed line merging predicts training exactly, as it must for a single expert. Bars: where the trained "
        "value could lie given the items that both were measured on."
    )
    kinds = [("dot other", "an expert, one domain"), ("dot real", "a mixture, really trained")]
    picture = figure("Calibration", chart + legend(kinds), caption)
    return f'<h3>Merged against really trained</h3><div class="charts">{picture}<div>{told}</div></div>'


def _agreements(mixture: dict[str, Any]) -> str:
    titles = {
        "spearman": "Spearman, all",
        "spearman_without_vertices": "Spearman, without the experts",
        "kendall": "Kendall, all",
        "kendall_without_vertices": "Kendall, without the experts",
    }
    rows = [
        [
            text(title),
            correlation_in_words(found["value"]),
            bracket(found["interval"], digits=2),
            str(found["mixtures"]),
        ]
        for key, title in titles.items()
        for found in [mixture["agreement"][key]]
    ]
    regret = mixture["agreement"]["regret"]
    rows.append(["regret of the merged pick", number(regret["value"]), bracket(regret["interval"]), ""])
    return table(
        ["agreement", "value", "interval", "mixtures"],
        rows,
        numeric=(1, 2, 3),
        label="rank agreement of merged and trained",
    ) + paragraph("With so few mixtures the interval is the message, not the value.", "note")


# --- the search -------------------------------------------------------------------------------------------------------


def _stages(facts: RunFacts) -> str:
    names, targets, rows = facts.candidates
    if not rows:
        return ""
    score_N = np.array([row.value_G.mean() for row in rows])
    stages = list(dict.fromkeys(row.stage for row in rows))
    summary = []
    for stage in stages:
        inside = [n for n, row in enumerate(rows) if row.stage == stage]
        best = max(inside, key=lambda n: score_N[n])
        summary.append(
            [
                text(stage),
                text(STAGES.get(stage, "")),
                str(len(inside)),
                str(rows[best].items),
                number(score_N[best], 4),
            ]
        )
    dots = [
        Dot(
            float(n + 1),
            float(score),
            _candidate(names, row.weight_K, score),
            "real" if row.stage == stages[-1] else "other",
        )
        for n, (row, score) in enumerate(zip(rows, score_N, strict=True))
    ]
    best_so_far = np.maximum.accumulate(score_N)
    chart = scatter(
        [*dots, *(Dot(float(n + 1), float(v), f"best so far {v:.4f}", "small") for n, v in enumerate(best_so_far))],
        x_label="measurement of a merged model",
        y_label="mean value over targets",
        label="Every merged model of the search in its order, and the best so far",
        joined=range(len(dots), 2 * len(dots)),
    )
    order = np.argsort(-score_N, kind="stable")[:ROWS]
    table_rows = [
        [
            text(rows[n].stage),
            *(percent(float(share)) for share in rows[n].weight_K),
            *(number(float(value), 4) for value in rows[n].value_G),
            str(rows[n].items),
        ]
        for n in order
    ]
    head = ["stage", *names, *(f"value: {target}" for target in targets), "items"]
    return (
        "<h3>Stages of the search</h3>"
        + table(
            ["stage", "what it does", "models", "items", "best"],
            summary,
            numeric=(2, 3, 4),
            label="stages of the search",
        )
        + chart
        + details(
            f"The best {len(order)} of {len(rows)} merged models",
            table(head, table_rows, numeric=range(1, len(head)), label="candidates of the search"),
        )
        + _cross_checks(facts)
    )


def _candidate(names: tuple[str, ...], weight_K: np.ndarray, score: float) -> str:
    shares = ", ".join(f"{name} {percent(float(share))}" for name, share in zip(names, weight_K, strict=True))
    return f"{shares}\n{score:.4f}"


def _cross_checks(facts: RunFacts) -> str:
    search = facts.units["mixture/search"]
    mixmin = search["mixmin"]
    shares = listed([f"{percent(w)} {name}" for name, w in mixmin["weights"].items() if w >= 0.005])
    lines = [
        f"MixMin, which merges nothing and reads the experts' own predictions, recommends {shares}: "
        f"{percent(mixmin['apart'])} of the samples would be others."
    ]
    lines += [
        f"Experts at {percent(row['fraction'])} of their training would have moved {percent(row['moved'])} of the "
        f"samples; rank agreement of the surfaces {correlation_in_words(row['spearman'])}."
        for row in search["stability"]
        if row["fraction"] < 1
    ]
    return "<h3>Cross-checks</h3><ul>" + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>"


# --- between targets --------------------------------------------------------------------------------------------------


def _front(facts: RunFacts) -> str:
    """What one target costs another: mixtures that no other beats for both are joined."""
    surface = facts.surface
    if surface is None or len(surface["targets"]) < 2 or not surface["points"]:
        return ""
    targets = surface["targets"]
    value_NG = np.array([point["value"] for point in surface["points"]])
    pairs = [(a, b) for a in range(len(targets)) for b in range(a + 1, len(targets))][:PANELS]
    drawn = "".join(_front_of(surface, value_NG[:, list(pair)], pair) for pair in pairs)
    joined = (
        "Every mixture of the calibrated surface by its value for two targets. Those on the line are the Pareto front: "
        "more for one target is only to be had for less of the other. A front of one point means no conflict."
    )
    kinds = [("dot small", "a mixture"), ("dot real", "really trained"), ("dot", "on the front")]
    return f'<h3>One target against another</h3>{paragraph(joined)}<div class="charts">{drawn}</div>{legend(kinds)}'


def _front_of(surface: dict[str, Any], value_N2: np.ndarray, pair: tuple[int, int]) -> str:
    names, targets = surface["names"], [surface["targets"][g] for g in pair]
    on_front = np.flatnonzero(pareto_front(value_N2))
    order = [
        *np.setdiff1d(np.arange(len(value_N2)), on_front),
        *on_front[np.argsort(value_N2[on_front, 0], kind="stable")],
    ]
    dots = [
        Dot(
            float(value_N2[n, 0]),
            float(value_N2[n, 1]),
            f"{_candidate(tuple(names), np.array(surface['points'][n]['weights']), surface['points'][n]['score'])}",
            "" if n in set(on_front.tolist()) else "small",
        )
        for n in order
    ]
    joined = range(len(dots) - len(on_front), len(dots))
    dots += [Dot(row["value"][pair[0]], row["value"][pair[1]], "really trained", "real") for row in surface["trained"]]
    return figure(
        f"{targets[0]} and {targets[1]}",
        scatter(
            dots,
            x_label=f"value for {targets[0]}",
            y_label=f"value for {targets[1]}",
            label=f"Values for {targets[0]} and {targets[1]} over all mixtures, with the Pareto front",
            joined=joined,
        ),
    )


# --- the experts ------------------------------------------------------------------------------------------------------


def _experts(facts: RunFacts) -> str:
    found = facts.mergeability
    names = found["names"]
    gains = [
        Strip(f"{name}, {gain['items']} items", gain["mean"], gain["interval"], gained(gain["mean"], gain["interval"]))
        for name, gain in found["own_gain"].items()
        if gain is not None
    ]
    sizes = [
        [text(name), percent_of_update(found["relative_update"][name]), *(signed(c, 2) for c in row)]
        for name, row in zip(names, found["cosine"], strict=True)
    ]
    head = ["expert", "size of its update", *(f"cosine with {name}" for name in names)]
    told = (
        f"The longest update is {found['norm_ratio']:.1f} times the shortest. Updates above 5 % of the weights, or of "
        "very different lengths, make merges poor stand-ins."
    )
    return (
        "<h3>The experts</h3>"
        + paragraph("What each expert gained on samples of its own domain that it was not trained on, nats per token:")
        + (strips(gains, zero=0.0) if gains else "")
        + table(head, sizes, numeric=range(1, len(head)), label="sizes and directions of the experts' updates")
        + paragraph(told, "note")
        + "".join(_findings(found))
    )


def percent_of_update(size: float) -> str:
    return f"{100 * size:.1f} %"


def _findings(found: dict[str, Any]) -> Iterator[str]:
    for kind, rows in (("Warnings", found["warnings"]), ("Notes", found["notes"])):
        if rows:
            lines = "".join(
                f"<li>{text(row['found'])}: {text(row['means'])}. <b>To do:</b> {text(row['advice'])}.</li>"
                for row in rows
            )
            yield f"<h3>{kind}</h3><ul>{lines}</ul>"

"""What is kept and why: counts by domain and reason, and the bake-off of ways to select that decided it."""

from collections import Counter
from typing import Any

from datalloy.bakeoff import Arm
from datalloy.report.charts import Dot, Strip, bars, legend, scatter, stacked, strips
from datalloy.report.facts import RunFacts
from datalloy.report.markup import details, gained, number, paragraph, table, text
from datalloy.report.page import Section
from datalloy.report.wording import arm_in_words, reason_in_words, selection_in_words


def section(facts: RunFacts) -> Section:
    kept, pool = int(facts.kept_N.sum()), len(facts.kept_N)
    takeaway = f"{kept:,} of {pool:,} samples are kept: {selection_in_words(facts.arm)}."
    return Section("keeping", "What to keep", takeaway, _by_domain(facts) + _bakeoff(facts.bakeoff))


def _by_domain(facts: RunFacts) -> str:
    largest = max(Counter(facts.selection.domain).values())
    rows = []
    for domain, reasons in facts.selection.counts().items():
        kept = reasons.pop("top_fraction", 0)
        toxic = reasons.pop("toxic", 0)
        rest = sum(reasons.values())
        bar = stacked(
            [("kept", "kept", kept), ("toxic", "harmful", toxic), ("left", "left out", rest)],
            largest,
            f"{domain}: {kept} kept, {toxic} harmful, {rest} left out",
        )
        rows.append((domain, bar, f"{kept:,} of {kept + toxic + rest:,} kept"))
    shown = [("kept", "kept"), ("left", "left out")]
    shown += [("toxic", "harms beyond its interval")] if "toxic" in facts.selection.reason else []
    told = ", ".join(
        f"{reason_in_words(reason)} {count:,}" for reason, count in facts.selection.count_reasons().items()
    )
    toxic = int(facts.toxic_N.sum())
    told = f"In all: {told}."
    if toxic and "toxic" not in facts.selection.reason:
        out = toxic - int((facts.toxic_N & facts.kept_N).sum())
        told += (
            f" By utility {toxic} samples are toxic, that is: they harm the targets beyond their own interval and more "
            f"than clean samples do; {out} of them are left out by this ranking."
        )
    return bars(rows) + legend(shown) + paragraph(text(told), "note")


def _bakeoff(outcome: dict[str, Any] | None) -> str:
    heading = "<h3>Against other ways to select</h3>"
    if outcome is None:
        return heading + paragraph("The recipe fixed the score and the fraction, so nothing was compared.")
    margins = sorted([*outcome["margins"], outcome["over_base"]], key=lambda m: m["mean"])
    names = {Arm(**r["arm"]).name: arm_in_words(r["arm"]) for r in outcome["results"]} | {"the base": "not training"}
    rows = [
        Strip(f"over {names[m['over']]}", m["mean"], m["interval"], gained(m["mean"], m["interval"])) for m in margins
    ]
    has_finals = any(r["round"] > 1 for r in outcome["results"])
    how = (
        "the best again for longer; of those nearly tied the one that keeps most wins"
        if has_finals
        else "once; a selection wins only by a lead over the full pool beyond its interval"
    )
    return (
        heading
        + paragraph(
            f"Each way to select was trained for a few steps at equal compute, {how}. All were judged on target "
            "items: half by their marks, half by the probability of the right answer (a target whose metric reads no "
            f"written answer, by that metric). {outcome['steps_spent']:,} training steps were spent. The winner is "
            f"<b>{text(arm_in_words(outcome['winner']))}</b>; its margins:"
        )
        + strips(rows, zero=0.0)
        + (paragraph(text(f"Beware: {outcome['caution']}."), "note") if outcome.get("caution") else "")
        + (_chart(outcome) if has_finals else "")
        + _table(outcome)
    )


def _chart(outcome: dict[str, Any]) -> str:
    winner = outcome["winner"]
    # the winner on top of the others
    drawn = sorted(outcome["results"], key=lambda r: (r["arm"] == winner, r["steps"]))
    dots = [
        Dot(
            float(r["steps"]),
            r["value"],
            f"{arm_in_words(r['arm'])}\nround {r['round']}, {r['steps']} steps: {r['value']:.4f}",
            "pick" if r["arm"] == winner else "other",
        )
        for r in drawn
    ]
    chart = scatter(
        dots,
        x_label="training steps of the short run",
        y_label="value on target items",
        label=f"Every short run; the winner, {arm_in_words(winner)}, is joined by a line",
        joined=[i for i, r in enumerate(drawn) if r["arm"] == winner],
    )
    marks = legend([("dot pick", "the winner"), ("dot other", "other ways to select")])
    return f"<h3>All short runs</h3>{chart}{marks}"


def _table(outcome: dict[str, Any]) -> str:
    results = sorted(outcome["results"], key=lambda r: (-r["round"], -r["value"]))
    rows = [[text(arm_in_words(r["arm"])), str(r["round"]), str(r["steps"]), number(r["value"], 4)] for r in results]
    return details(
        f"The {len(rows)} short runs as a table",
        table(["selection", "round", "steps", "value"], rows, numeric=(1, 2, 3), label="all short runs"),
    )

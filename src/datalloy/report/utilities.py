"""Utilities by domain and target: how they are spread, how many harm, and how far the numbers can be trusted."""

import numpy as np

from datalloy.report.charts import Warp, figure, histogram, legend
from datalloy.report.facts import RunFacts
from datalloy.report.markup import bracket, details, number, paragraph, percent, table, text
from datalloy.report.page import Section
from datalloy.scores import Scores
from datalloy.selection import length_correlation

ENDS = (0.005, 0.995)  # quantiles that the charts show; what lies beyond is counted in the outermost bars
CHARTS = 12  # of domains and targets; more are in the table alone


def section(facts: RunFacts) -> Section:
    scores = facts.scores
    if not scores.targets or not scores.is_signed:
        takeaway = (
            f"Samples were rated by {scores.metadata['method']} alone: what a step on them does to the targets was not "
            "measured. Set score.method: calibrated for that."
        )
        return Section("utilities", "Utilities", takeaway, _losses(scores))
    agreement = scores.metadata.get("agreement_with_exact")
    takeaway = (
        "The utility of a sample is how much a target's loss falls by one training step on it alone, in nats per "
        "token; above zero it helps."
    )
    if agreement:
        low, high = agreement["interval"]
        takeaway += (
            f" The scores agree with exact measurement by Spearman {agreement['spearman']:.2f} [{low:.2f}, {high:.2f}]."
        )
    return Section(
        "utilities", "Utilities", takeaway, _spread(facts, scores) + _by_domain(facts, scores) + _trust(facts)
    )


def _spread(facts: RunFacts, scores: Scores) -> str:
    ok = scores.is_ok
    every = np.concatenate([values[ok] for values in scores.utility_by_target.values()])
    warp, ends = Warp.of(every), tuple(float(v) for v in np.quantile(every, ENDS))
    ends = (min(ends[0], 0.0), max(ends[1], 0.0))
    drawn = []
    for target, values in scores.utility_by_target.items():
        for domain in sorted(set(scores.domain)):
            rows = ok & (scores.domain == domain)
            title = f"{domain}, for target {target}"
            chart = histogram(
                [
                    ("kept", "kept", values[rows & facts.kept_N]),
                    ("left", "left out", values[rows & ~facts.kept_N]),
                ],
                warp=warp,
                ends=ends,
                label=f"Spread of the utilities of {title}",
            )
            drawn.append(figure(title, chart))
    note = (
        "Utility in nats per token; the axis is even near zero and logarithmic far from it. The dashed line is zero. "
        "The outermost bars hold what lies beyond."
    )
    return (
        f'<div class="charts">{"".join(drawn[:CHARTS])}</div>'
        + legend([("kept", "kept"), ("left", "left out")])
        + paragraph(note, "note")
    )


def _by_domain(facts: RunFacts, scores: Scores) -> str:
    rows = []
    for domain in sorted(set(scores.domain)):
        mask = (scores.domain == domain) & scores.is_ok
        toxic = float(facts.toxic_N[mask].mean())
        for target, values in scores.utility_by_target.items():
            quarters = np.quantile(values[mask], (0.05, 0.25, 0.5, 0.75, 0.95))
            rows.append(
                [
                    text(domain),
                    text(target),
                    f"{int(mask.sum()):,}",
                    *(number(float(q)) for q in quarters),
                    percent(float((values[mask] > 0).mean())),
                    percent(toxic),
                ]
            )
    head = ["domain", "target", "samples", "5 %", "25 %", "median", "75 %", "95 %", "above zero", "toxic"]
    below = scores.metadata.get("harm_below", 0.0)
    correlation = length_correlation(scores)
    note = (
        f"Toxic: below {number(below)} beyond the sample's own interval; that is what all but the worst clean samples "
        "do at this step. At a step that matters most single samples spoil more than they help, so the order counts, "
        f"not the sign. Rank correlation of utility with the length of answers: {number(correlation, 2)}"
        + (", so the ranking is partly one of length." if abs(correlation) > 0.5 else ".")
    )
    return table(head, rows, numeric=range(2, 10), label="utilities by domain and target") + paragraph(
        text(note), "note"
    )


def _trust(facts: RunFacts) -> str:
    tables = facts.tables or {facts.scores.metadata["method"]: facts.scores}
    rows = [
        [
            text(name),
            number(agreement["spearman"], 2),
            bracket(agreement["interval"], digits=2),
            str(agreement["probes"]),
            number(table_.metadata["step"], 4),
            number(table_.metadata["noise_floor"]),
        ]
        for name, table_ in tables.items()
        if (agreement := table_.metadata.get("agreement_with_exact"))
    ]
    if not rows:
        return ""
    head = ["scorer", "Spearman with exact", "interval", "probes", "step", "noise floor"]
    return (
        "<h3>How far the scores can be trusted</h3>"
        + paragraph(
            "A fast scorer stands in for the exact one, which takes the step and measures every target item. How "
            "well it does is measured on probes. The noise floor is how far rounding alone moves a utility, in nats."
        )
        + table(head, rows, numeric=range(1, 6), label="agreement of the scorers with exact utilities")
        + details("How the size of the step was chosen", _scans(facts.scores))
    )


def _scans(scores: Scores) -> str:
    rows = [
        [
            text(name),
            number(row["step"], 4),
            percent(row["negative_fraction"]),
            number(row["median_utility"], 4),
            number(row["half_agreement"], 2),
        ]
        for name, scan in scores.metadata["step_scans"].items()
        for row in scan["rows"]
    ]
    chosen = "; ".join(
        f"{name}: {number(scan['chosen'], 4)}, because {scan['reason']}"
        for name, scan in scores.metadata["step_scans"].items()
    )
    head = ["step of", "size", "utility below zero", "median utility", "agreement of target halves"]
    return paragraph(text(f"Chosen: {chosen}.")) + table(head, rows, numeric=range(1, 5), label="scan of step sizes")


def _losses(scores: Scores) -> str:
    rows = [
        [
            text(domain),
            f"{int(mask.sum()):,}",
            *(number(float(q)) for q in np.nanquantile(scores.loss[mask], (0.25, 0.5, 0.75))),
        ]
        for domain in sorted(set(scores.domain))
        for mask in [(scores.domain == domain) & np.isfinite(scores.loss)]
        if mask.any()  # there are no losses where the scorer asks no model
    ]
    head = ["domain", "samples", "loss 25 %", "median", "75 %"]
    return table(head, rows, numeric=range(1, 5), label="losses by domain")

"""Several finished runs in, the sections of one page that sets them side by side out.

Models are held against each other where they were measured on the same items, which the hashes of the runs' inputs
tell; then the difference is paired over items. Selections and utilities are compared on the samples that runs share, by
domain and id. What the recipes differ in stands in one table, so that nobody has to guess what made the difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datalloy.errors import RunError
from datalloy.progress import format_duration
from datalloy.report.charts import Span, Strip, strips
from datalloy.report.facts import RESAMPLES, Estimate, RunFacts
from datalloy.report.markup import gained, measured, number, paragraph, percent, table, text
from datalloy.report.opening import recommendation
from datalloy.report.page import Section
from datalloy.run import leaves
from datalloy.uncertainty import correlation_in_words, paired_interval, rank_agreement

DIFFERENCES = 60  # keys in the table of what differs


@dataclass(frozen=True)
class Named:
    """A run and what the page calls it."""

    name: str
    facts: RunFacts


def name_runs(runs: Sequence[RunFacts]) -> list[Named]:
    """By as much of the end of their paths as tells them apart. Raises RunError for a run that is given twice."""
    parts = [facts.folder.resolve().parts for facts in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return [Named(name, facts) for name, facts in zip(names, runs, strict=True)]
    raise RunError(f"a run is given twice: {', '.join(facts.path for facts in runs)}; name different ones")


def lead(runs: Sequence[Named]) -> str:
    """Which run's model did best, in one sentence of plain text."""
    if not _same_items(runs):
        return "These runs were measured on different items, so their marks cannot be held against each other."
    best, *others = sorted(runs, key=lambda run: -_gain_over_nothing(run.facts))
    closest = others[0]
    gain = _gain(best.facts, closest.facts)
    shown = "shown" if gain.interval[0] > 0 else "not shown"
    return (
        f"{best.name} did best: {number(best.facts.headline().mean)} {best.facts.metric} on {gain.items} items, "
        f"{gained(gain.mean, gain.interval)} against {closest.name}; that it is better is {shown}."
    )


def sections(runs: Sequence[Named]) -> list[Section]:
    """All there is to say of the runs together."""
    found = [_advice(runs), _marks(runs)]
    if any(run.facts.has_mixture for run in runs):
        found.append(_shares(runs))
    if sum(run.facts.has_selection for run in runs) > 1:
        found.append(_agreement([run for run in runs if run.facts.has_selection]))
    return [*found, _recipes(runs)]


# --- what each of them says -------------------------------------------------------------------------------------------


def _advice(runs: Sequence[Named]) -> Section:
    rows = [[text(title), *(text(cell) for cell in cells)] for title, cells in _facts_by_title(runs).items()]
    body = table(["", *(run.name for run in runs)], rows, label="what each run recommends")
    return Section("advice", "What each run recommends", "One column a run.", body)


def _facts_by_title(runs: Sequence[Named]) -> dict[str, list[str]]:
    columns = [dict(_column(run.facts)) for run in runs]
    titles = dict.fromkeys(title for column in columns for title in column)
    return {title: [column.get(title, "") for column in columns] for title in titles}


def _column(facts: RunFacts) -> Iterator[tuple[str, str]]:
    yield "advice", recommendation(facts)
    yield "started", facts.provenance["started"]
    if facts.has_selection:
        yield "kept", f"{int(facts.kept_N.sum()):,} of {len(facts.kept_N):,}"
        yield "toxic", f"{int(facts.toxic_N.sum()):,}"
    if facts.has_mixture:
        gain = facts.mixture["expected_gain_vs_uniform"]
        yield "verdict on the mixture", facts.mixture["verdict"]
        yield "gain over equal shares, on targets", gained(gain["mean"], gain["interval"])
    gain = facts.gain("base")
    yield "gain over not training", gained(gain.mean, gain.interval)
    yield "training steps", f"{facts.steps:,}"
    if facts.seconds is not None:
        yield "time", format_duration(facts.seconds)


# --- marks ------------------------------------------------------------------------------------------------------------


def _marks(runs: Sequence[Named]) -> Section:
    metric = runs[0].facts.metric
    rows = [
        Strip(run.name, estimate.mean, estimate.interval, measured(estimate.mean, estimate.interval))
        for run in runs
        for estimate in [run.facts.headline()]
    ]
    if not _same_items(runs):
        note = "Measured on different items: the intervals say how far each is known, not which run is better."
        return Section("marks", "Marks of the advised models", note, strips(rows))
    first, *others = runs
    gains = [
        Strip(f"{run.name} over {first.name}", gain.mean, gain.interval, gained(gain.mean, gain.interval))
        for run in others
        for gain in [_gain(run.facts, first.facts)]
    ]
    body = (
        f"<h3>{text(metric.capitalize())}</h3>{strips(rows)}<h3>Against {text(first.name)}, on the same items</h3>"
        + strips(gains, zero=0.0)
    )
    takeaway = f"All runs were measured on the same {first.facts.judged_items} items."
    return Section("marks", "Marks of the advised models", takeaway, body)


def _same_items(runs: Sequence[Named]) -> bool:
    """Whether all runs were judged on the same files, by the same metrics."""
    return len({repr(_judged(run.facts)) for run in runs}) == 1


def _judged(facts: RunFacts) -> list[Any]:
    section = "evaluation" if facts.recipe.evaluation else "targets"
    inputs, settings = facts.provenance["parts"]["inputs"], facts.provenance["parts"]["recipe"][section]
    return [[name, inputs[f"{section}.{name}"], settings[name]] for name in sorted(facts.judged_on)]


def _gain(facts: RunFacts, over: RunFacts) -> Estimate:
    """How much better one run's model does than another's, as a mean over sets."""
    own_V, other_V = facts.marks(), over.marks()
    confidence = facts.recipe.evaluate.confidence
    interval = paired_interval(own_V, other_V, confidence=confidence, resamples=RESAMPLES, seed=0)
    return Estimate(float((own_V - other_V).mean()), interval, facts.judged_items)


def _gain_over_nothing(facts: RunFacts) -> float:
    return float(facts.marks().mean())


# --- shares -----------------------------------------------------------------------------------------------------------


def _shares(runs: Sequence[Named]) -> Section:
    domains = dict.fromkeys(name for run in runs if run.facts.has_mixture for name in run.facts.mixture["weights"])
    body = "".join(
        f"<h3>{text(domain)}</h3>"
        + strips(
            [
                Strip(run.name, searched[domain], interval[domain], percent(weights[domain]))
                for run in runs
                if run.facts.has_mixture and domain in run.facts.mixture["weights"]
                for searched, interval, weights in [
                    (run.facts.mixture["searched"], run.facts.mixture["interval"], run.facts.mixture["weights"])
                ]
            ],
            zero=0.0,
            span=Span(-0.03, 1.03),
        )
        for domain in domains
    )
    takeaway = "The share of training that each domain gets; lines are where the best share could as well lie."
    return Section("shares", "The mixtures", takeaway, body)


# --- agreement of selections and utilities ----------------------------------------------------------------------------


def _agreement(runs: Sequence[Named]) -> Section:
    first, *others = runs
    rows = [[text(run.name), *_agreement_with(first.facts, run.facts)] for run in others]
    head = [
        f"against {first.name}",
        "samples in both",
        "kept by both",
        "kept by one alone",
        "rank agreement of utilities",
    ]
    body = table(head, rows, numeric=(1, 2, 3, 4), label="agreement of the selections") + paragraph(
        f"{text(f'datalloy view {first.facts.path} {others[0].facts.path}')} shows which samples these are.", "note"
    )
    takeaway = "How far the runs agree on the samples that they share, by domain and id."
    return Section("agreement", "The same samples?", takeaway, body)


def _agreement_with(first: RunFacts, other: RunFacts) -> list[str]:
    row_of = {key: row for row, key in enumerate(zip(first.scores.domain, first.scores.id, strict=True))}
    keys = zip(other.scores.domain, other.scores.id, strict=True)
    pairs_N2 = np.array([(row_of[key], row) for row, key in enumerate(keys) if key in row_of]).reshape(-1, 2)
    kept, also = first.kept_N[pairs_N2[:, 0]], other.kept_N[pairs_N2[:, 1]]
    return [
        f"{len(pairs_N2):,}",
        f"{int((kept & also).sum()):,}",
        f"{int((kept ^ also).sum()):,}",
        correlation_in_words(_alike(first.scores.utility[pairs_N2[:, 0]], other.scores.utility[pairs_N2[:, 1]])),
    ]


def _alike(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Spearman where both have a utility; None where it is not defined."""
    both = np.isfinite(a_N) & np.isfinite(b_N)
    a_N, b_N = a_N[both], b_N[both]
    return rank_agreement(a_N, b_N) if len(a_N) > 1 and np.ptp(a_N) > 0 and np.ptp(b_N) > 0 else None


# --- recipes ----------------------------------------------------------------------------------------------------------


def _recipes(runs: Sequence[Named]) -> Section:
    columns = [dict(leaves(run.facts.provenance["parts"])) for run in runs]
    rows = list(_differing(columns))
    takeaway = (
        f"{len(rows)} settings, inputs or versions differ." if rows else "Nothing differs: recipe, inputs, versions."
    )
    shown = [
        [text(key), *(f"<code>{text(value, 80)}</code>" for value in values)] for key, values in rows[:DIFFERENCES]
    ]
    body = table(["", *(run.name for run in runs)], shown, label="what the recipes differ in") if rows else ""
    if len(rows) > DIFFERENCES:
        body += paragraph(f"The first {DIFFERENCES} of {len(rows)}.", "note")
    return Section("recipes", "What was different", takeaway, body)


def _differing(columns: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, "absent") for column in columns]
        if any(value != values[0] for value in values):
            yield key, values

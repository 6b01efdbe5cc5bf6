"""The first screen: what to train on in one sentence, how sure that is, what it cost, what to run next."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datalloy.progress import format_duration
from datalloy.report import gallery
from datalloy.report.facts import COMPARISON, RunFacts
from datalloy.report.markup import Interval, chip, command, gained, listed, number, paragraph, percent, text
from datalloy.report.wording import reason_in_words, selection_in_words

GLANCES = 4  # samples on the first screen
SHARE_SHOWN = 0.005  # smaller shares of a mixture are called none


@dataclass(frozen=True)
class Claim:
    """Something that a reader would want to be true of the advice, and the gain that was measured."""

    what: str
    mean: float
    interval: Interval
    source: str

    @property
    def verdict(self) -> tuple[str, str]:
        """In a word, and the class of its chip."""
        low, high = self.interval
        if low > 0:
            return "shown", "good"
        return ("refuted", "bad") if high < 0 else ("not shown", "unsure")


def header(facts: RunFacts) -> str:
    """Header of the page, as markup."""
    cards = [
        ("sure", "How sure is that?", _claims(facts)),
        ("cost", "What did it cost?", _cost(facts)),
        ("next", "What to run next", _next(facts)),
    ]
    if facts.has_selection:
        cards.append(("bad", "Which samples are bad?", _bad(facts)))
    drawn = "".join(f'<div class="card card-{kind}"><h2>{title}</h2>{content}</div>' for kind, title, content in cards)
    return f'<p class="lead">{text(recommendation(facts))}</p><div class="cards">{drawn}</div>'


# --- the sentence


def recommendation(facts: RunFacts) -> str:
    """What to train on, and what that is worth, in one sentence of plain text."""
    return f"{_what(facts)}: {_worth(facts)}."


def _what(facts: RunFacts) -> str:
    parts = [part for part in (_kept(facts), _shares(facts)) if part]
    if facts.has_mixture and facts.mixture["verdict"] == "deploy the merge":
        return f"Use the merge of the experts, {_in_words(facts.mixture['searched'])}"
    doubt = "If you train on this pool at all, train on " if _is_worse_than_base(facts) else "Train on "
    return doubt + ", ".join(parts)


def _kept(facts: RunFacts) -> str:
    if not facts.has_selection:
        return "all samples"
    kept, pool = int(facts.kept_N.sum()), len(facts.kept_N)
    if kept == pool:
        return f"all {pool} samples"
    return f"{kept:,} of the {pool:,} samples ({selection_in_words(facts.arm)})"


def _shares(facts: RunFacts) -> str:
    if not facts.has_mixture:
        return ""
    if facts.mixture["verdict"] == "use uniform":
        return "all domains in equal shares"
    return "mixed as " + _in_words(facts.mixture["weights"])


def _in_words(weights: dict[str, float]) -> str:
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    some = [f"{percent(share)} {name}" for name, share in ordered if share >= SHARE_SHOWN]
    none = [f"no {name}" for name, share in ordered if share < SHARE_SHOWN]
    return listed([*some, *none])


def _worth(facts: RunFacts) -> str:
    model, gain = facts.headline(), facts.gain("base")
    where = "held-out" if facts.recipe.evaluation else "target"
    unit = f"{facts.metric} on {model.items} {where} items"
    low, high = gain.interval
    base = f"{number(model.mean)} {unit}, {gained(gain.mean, gain.interval)} against not training at all"
    if low > 0:
        return base
    if high < 0:
        return f"{base}, which is a loss"
    return f"{base}, {'a gain that is not shown' if gain.mean > 0 else 'so no gain is shown'}"


def _is_worse_than_base(facts: RunFacts) -> bool:
    return facts.gain("base").interval[1] < 0


# --- how sure


def claims(facts: RunFacts) -> Iterator[Claim]:
    """What a reader would want to be true of the advice, each with what was measured."""
    held_out = "held-out items" if facts.recipe.evaluation else "target items"
    base = facts.gain("base")
    yield Claim("better than not training", base.mean, base.interval, f"{facts.metric}, {base.items} {held_out}")
    if facts.bakeoff:
        over = {margin["over"]: margin for margin in facts.bakeoff["margins"]}
        for name, what in (
            ("full", "better than keeping every sample"),
            (_random_arm(over), "better than random samples"),
        ):
            if margin := over.get(name):
                yield Claim(what, margin["mean"], margin["interval"], "target items, short runs at equal compute")
    if facts.has_mixture:
        gain = facts.mixture["expected_gain_vs_uniform"]
        source = f"target items, {gain['source']}"
        what = "better than equal shares of the domains"
        if facts.mixture["verdict"] == "use uniform":
            what = "the best mixture found is better than equal shares (it is not advised)"
        yield Claim(what, gain["mean"], gain["interval"], source)
    if "uniform" in facts.others and facts.recipe.evaluation:
        uniform = facts.gain("uniform")
        what = "the same on held-out items"
        yield Claim(what, uniform.mean, uniform.interval, f"{facts.metric}, {uniform.items} {held_out}")


def _random_arm(names: dict[str, Any]) -> str:
    return next((name for name in names if name.startswith("random")), "")


def _claims(facts: RunFacts) -> str:
    rows = []
    for claim in claims(facts):
        word, kind = claim.verdict
        told = f"{gained(claim.mean, claim.interval)}, {claim.source}"
        rows.append(f'<li>{chip(word, kind)}<span>{text(claim.what)}</span><span class="note">{text(told)}</span></li>')
    percentage = percent(facts.recipe.evaluate.confidence)
    note = f"In brackets: {percentage} intervals over items. The luck of training is in those that are confirmed alone."
    return f'<ul class="claims">{"".join(rows)}</ul>{paragraph(note, "note")}'


# --- what it cost


def _cost(facts: RunFacts) -> str:
    lines = []
    if facts.seconds is not None:
        cores = facts.provenance.get("cores")
        lines.append(f'<p class="big">{format_duration(facts.seconds)} of computing</p>')
        lines.append(paragraph(f"on a machine with {cores} cores, all stages of the advice together.", "note"))
    if facts.final_steps:
        times = facts.steps / facts.final_steps
        lines.append(paragraph(f"{facts.steps:,} training steps, {times:.1f} times those of the final model."))
    rows = "".join(
        f"<dt>{text(work.stage)}: {text(work.what)}</dt>"
        f"<dd>{'not noted' if work.seconds is None else format_duration(work.seconds)}</dd>"
        for work in facts.work
        if work.stage != COMPARISON
    )
    return "".join(lines) + f'<dl class="costs">{rows}</dl>'


# --- what is bad


def _bad(facts: RunFacts) -> str:
    left, toxic = int((~facts.kept_N).sum()), int(facts.toxic_N.sum())
    if not left:
        return paragraph("None is left out: no way to leave samples out was shown to be better.")
    reasons = [
        f"{count:,} {reason_in_words(reason)}"
        for reason, count in facts.selection.count_reasons().items()
        if reason != "top_fraction"
    ]
    told = f"{left:,} are left out: {', '.join(reasons)}."
    if facts.counts["rejected"]:
        told += f" {facts.counts['rejected']:,} more could not be used."
    if toxic:
        told += f" {toxic:,} of the pool are toxic: a training step on them harms the targets beyond its interval."
    link = '<a href="#samples">All of these, with reasons</a>'
    return paragraph(text(told)) + gallery.worst(facts, GLANCES) + paragraph(f"{link}.", "note")


# --- what to run next


def _next(facts: RunFacts) -> str:
    parts = [
        paragraph(text(why)) + command(line, f"command-{number}")
        for number, (why, line) in enumerate(next_steps(facts))
    ]
    return "".join(parts)


def next_steps(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Why, and the command; the most useful first."""
    folder = shlex.quote(facts.path)
    config = shlex.quote(f"{facts.path}/config.yaml")
    if _is_worse_than_base(facts):
        yield (
            "Training on this pool did harm. Mend the samples that are shown below as most harmful, then look again:",
            f"datalloy view {folder}",
        )
        return
    trained = f"The advised model is in {facts.path}/model. " if (facts.folder / "model").exists() else ""
    yield (
        f"{trained}For a trainer of your own, the advised rows, byte for byte and in the advised counts:",
        f"datalloy export {config} --run {folder}",
    )
    if facts.has_mixture and not _is_settled(facts):
        runs = 2 * max(2, facts.recipe.mixture.confirm_runs if facts.recipe.mixture else 0)
        more = shlex.quote(f"{facts.path}-more")
        yield (
            "What is open above gets narrower with more trainings that confirm:",
            f"datalloy run {config} --run {more} --set mixture.confirm_runs={runs}",
        )
    yield "To look at every sample, and to overrule the selection:", f"datalloy view {folder}"


def _is_settled(facts: RunFacts) -> bool:
    return facts.mixture["expected_gain_vs_uniform"]["interval"][0] > 0

"""Did it help: every model that was measured, on the sets that nothing was decided on, and on all the others."""

from datalloy.report.charts import Strip, strips
from datalloy.report.facts import LABELS, RunFacts
from datalloy.report.markup import details, gained, measured, paragraph, table, text
from datalloy.report.page import Section


def section(facts: RunFacts) -> Section:
    models = [facts.advised, *facts.others]
    where = "held-out sets" if facts.recipe.evaluation else "targets"
    headlines = {name: facts.headline(name) for name in models}
    rows = [
        Strip(
            LABELS.get(name, name),
            estimate.mean,
            estimate.interval,
            measured(estimate.mean, estimate.interval),
            "" if name == facts.advised else "other",
        )
        for name, estimate in sorted(headlines.items(), key=lambda item: (item[0] != facts.advised, -item[1].mean))
    ]
    gains = []
    for name in facts.others:
        gain = facts.gain(name)
        words = gained(gain.mean, gain.interval)
        gains.append((gain.mean, Strip(f"over {_named(name)}", gain.mean, gain.interval, words)))
    items = facts.judged_items
    body = (
        f"<h3>{text(facts.metric.capitalize())}, mean over the {where}, {items} items</h3>"
        + strips(rows)
        + "<h3>What the advised model gains over each of the others, on the same items</h3>"
        + strips([strip for _, strip in sorted(gains, key=lambda gain: gain[0])], zero=0.0)
        + paragraph(
            "Paired over items, so narrower than the difference of two intervals. Right of the dashed line the advised "
            "model is better.",
            "note",
        )
        + details("Every set on its own", _by_set(facts, models))
    )
    better = sum(strip.interval[0] > 0 for _, strip in gains)
    worse = sum(strip.interval[1] < 0 for _, strip in gains)
    takeaway = (
        f"On {items} items of the {where} the advised model is shown to be better than {better} of {len(gains)} others "
        f"and worse than {worse}; all were trained from one base at equal compute, where they were trained at all."
    )
    return Section("outcome", "Did it help?", takeaway, body)


def _named(model: str) -> str:
    others = {"base": "not training", "uniform": "equal shares of the domains", "merge": "the merge of the experts"}
    return others.get(model, model)


def _by_set(facts: RunFacts, models: list[str]) -> str:
    sets = [*facts.recipe.evaluation, *facts.recipe.targets]
    first = facts.evaluations[facts.advised]
    rows = [
        [
            text(LABELS.get(model, model)),
            *(
                text(measured(row["mean"], row["interval"]))
                for row in (facts.evaluations[model][name] for name in sets)
            ),
        ]
        for model in models
    ]
    heads = [f"{name}: {first[name]['metric'].replace('_', ' ')}, {first[name]['items']} items" for name in sets]
    numeric = range(1, len(sets) + 1)
    return table(["model", *heads], rows, numeric=numeric, label="marks of every model on every set") + paragraph(
        "Targets were used to decide; held-out sets were not.", "note"
    )

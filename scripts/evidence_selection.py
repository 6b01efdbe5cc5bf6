"""The rows of experiments/selection.py and scoring_settings.py in, tables about selection out."""

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.config import Score
from evidence_tables import Pools, by_pool, difference, interval, pooled, table

RESULTS = Path("experiments/results")
NAMES = {
    "base": "base, untrained",
    "full": "full SFT",
    "oracle": "oracle: clean samples only",
    "low_loss": "low loss",
    "low_loss_by_length": "low loss by length",
    "low_loss_by_length cold": "low loss by length, no warm-up",
    "low_loss_by_neighbours": "low loss by neighbours, no warm-up",
    "entropy_minus_loss": "entropy minus loss",
    "entropy_minus_loss cold": "entropy minus loss, no warm-up",
    "visual_gain": "visual gain",
    "visual_gain mean": "visual gain, mean over tokens",
    "mid_loss": "mid loss",
    "high_loss": "high loss",
    "length": "long answers",
    "judge": "judge, 80 % right",
    "deita": "DEITA-style",
    "less": "LESS-style cosine",
    "first_order": "gradient dot product",
    "first_order cold": "gradient dot product, no warm-up",
    "right_and_wanted": "right and wanted, no warm-up",
    "right_and_useful batch_share": "right and useful, no warm-up",
    "calibrated_by_neighbours": "OST by neighbours, no warm-up",
    "exact": "OST, exact, visible effect",
    "calibrated": "OST, calibrated, visible effect",
    "calibrated cold": "OST, calibrated, visible effect, no warm-up",
    "calibrated batch_share": "OST, calibrated, a batch's share",
    "calibrated diverse": "OST, calibrated, visible effect, diverse",
    "tail": "OST, tail, visible effect",
    "tail batch_share": "OST, tail, a batch's share",
    "random": "random",
    "put back worst": "exact 50 % and the worst fifth",
    "put back random": "exact 50 % and a random fifth of the rest",
    "auto": "auto: the bake-off",
    "auto low_loss, low_loss_by_length, calibrated": "the bake-off with low loss by length",
    "auto low_loss, low_loss_by_neighbours, right_and_wanted": "the bake-off with right and wanted",
    "auto batch_share": "the bake-off, OST at a batch's share",
    "auto, warmed up": "the same after a warm-up on 5 %",
}
ONE_STEP = ("exact", "calibrated")  # whose settings are compared
WARMED = ("low_loss", "low_loss_by_length", "entropy_minus_loss", "visual_gain")  # need no gradients; run both ways
BOTH_WAYS = (*WARMED, "first_order", "calibrated")
FORWARD = (*WARMED, "low_loss_by_neighbours")  # came when the default recipe had no warm-up any more
COLD = (
    *("low_loss_by_length cold", "low_loss_by_neighbours", "calibrated_by_neighbours", "entropy_minus_loss cold"),
    *("first_order cold", "calibrated cold", "calibrated batch_share", "tail batch_share"),
    *("right_and_wanted", "right_and_useful batch_share"),
)
KNOWN = {  # pools known when a score was found, where not the first three
    ("entropy_minus_loss", "wrong 30 %"): 6,
    **{
        ("low_loss_by_neighbours", world): 0
        for world in ("wrong 10 %", "wrong 50 %", "other picture 30 %", "near-copies 50 %")
    },
    ("low_loss_by_neighbours", "off-target 60 %"): 1,
    ("low_loss_by_neighbours", "clean"): 2,
}
BY_LENGTH, WARMED_UP = "auto low_loss, low_loss_by_length, calibrated", "auto, warmed up"  # races of arms before
WITH_WANTED = "auto low_loss, low_loss_by_neighbours, right_and_wanted"  # of arms that are no default
AT_SHARE = "auto batch_share"  # the default arms with score.step: batch_share
AUTO = ("auto", AT_SHARE, WITH_WANTED, BY_LENGTH, WARMED_UP)
WITHOUT_RACE: dict[str, tuple[str, float | None]] = {  # what one would train on without a race, and the aim
    "full SFT": ("full", None),
    "a half by neighbours": ("low_loss_by_neighbours", 0.5),
    "clean samples only": ("oracle", None),
}
REFUSED = Score().min_agreement  # below it a calibrated score is
WHOLE = ("base", "full", "oracle", *AUTO)  # arms without a fraction
COMPARED = (
    *("calibrated batch_share", "tail batch_share", "exact", "calibrated", "calibrated diverse"),
    *("calibrated_by_neighbours", "tail"),
    *("low_loss", "low_loss_by_length", "low_loss_by_neighbours", "right_and_wanted", "right_and_useful batch_share"),
    *("entropy_minus_loss", "visual_gain"),
    *("mid_loss", "high_loss", "length"),
    *("first_order", "less", "deita", "judge", "random", *AUTO),
)
Row = dict[str, Any]


@cache
def rows_in(folder: str, pattern: str = "*.json") -> list[Row]:
    """All rows of the results in a folder, file by file."""
    return [row for path in sorted((RESULTS / folder).glob(pattern)) for row in json.loads(path.read_text())["rows"]]


def with_cold(folder: str, base: str) -> list[Row]:
    """The rows of a folder, whose scores are of a proxy warmed up on 5 % of the pool, and those without warm-up.

    Both at steps of a visible effect; the latter also at that of a batch's share. `auto` is the bake-off of the default
    recipe, which has no warm-up and a visible effect. What raced after a warm-up were the arms before.
    """
    rows, cold = rows_in(folder, f"*-{base}-*.json"), rows_in("cold", f"*-{base}-*.json")
    pools = {(row["world"], row["seed"]) for row in rows}
    warm = [row | {"scorer": WARMED_UP} if row["scorer"] == BY_LENGTH else row for row in rows]
    named = (row | {"scorer": f"{row['scorer']} cold"} if row["scorer"] in BOTH_WAYS else row for row in cold)
    shared = (row | {"scorer": f"{row['scorer']} batch_share"} for row in rows_in("batch_share", f"*-{base}-*.json"))
    return [*warm, *(row for row in (*named, *shared) if (row["world"], row["seed"]) in pools)]


@cache
def selection_rows(base: str) -> list[Row]:
    return with_cold("selection", base)


@cache
def by_arm(base: str) -> dict[tuple[str, str], list[Row]]:
    """The rows by world and scorer."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in selection_rows(base):
        found.setdefault((row["world"], row["scorer"]), []).append(row)
    return found


@cache
def worlds(base: str) -> list[str]:
    """The worlds with results, those with the most pools first."""
    pools = {(row["world"], row["seed"]) for row in selection_rows(base)}
    names = list(dict.fromkeys(world for world, _ in sorted(pools)))
    return sorted(names, key=lambda name: (-sum(world == name for world, _ in pools), name))


def picked(
    base: str, world: str, scorer: str, fraction: float | None, protocol: str = "fixed compute", within: str = "domain"
) -> list[Row]:
    """The rows of one arm in one world, one a pool and draw."""
    fraction = None if scorer in WHOLE else fraction
    return [
        row
        for row in by_arm(base).get((world, scorer), ())
        if row["protocol"] == protocol
        and (scorer in AUTO or row["within"] == within)
        and fraction in (None, row["fraction"])
    ]


def runs(base: str, world: str, scorer: str, fraction: float | None = None, **more: str) -> Pools:
    """Right or wrong for every question, by pool, averaged over the draws where there are several, [Q] each."""
    return by_pool(picked(base, world, scorer, fraction, **more))


def in_every_world(
    base: str, one: tuple[str, float | None], other: tuple[str, float | None]
) -> list[tuple[Pools, Pools]]:
    """Two arms, each a scorer and a share, world by world."""
    return [(runs(base, world, *one), runs(base, world, *other)) for world in worlds(base)]


def headed(first: str, base: str) -> list[str]:
    return [first, *(f"{world} ({len(runs(base, world, 'full'))})" for world in worlds(base))]


def mean_of(pools: Pools) -> str:
    return f"{np.mean([v.mean() for v in pools.values()]):.3f}" if pools else ""


def accuracies(base: str, fraction: float) -> str:
    """Accuracy by world of what each way of selecting keeps at one fraction, mean over pools."""
    rows = []
    for scorer, name in NAMES.items():
        found = [runs(base, world, scorer, fraction) for world in worlds(base)]
        if any(found):
            label = name if scorer in WHOLE or scorer.startswith("put") else f"{name} {fraction:.0%}"
            rows.append([label, *map(mean_of, found)])
    return table(headed("trained on", base), rows)


def gains(base: str, fraction: float, over: str) -> str:
    """Gain over another arm at the same fraction (or over full SFT or the base), paired, by world, with intervals."""
    rows = []
    for scorer in COMPARED:
        if scorer == over:
            continue
        cells = [
            difference(runs(base, world, scorer, fraction), runs(base, world, over, fraction)) for world in worlds(base)
        ]
        if any(cells):
            rows.append([NAMES[scorer], *cells])
    return table(headed("selected", base), rows)


def all_worlds(base: str) -> str:
    """Gains over full SFT and over as many random samples in the mean over the pools of all worlds."""

    def gain(scorer: str, fraction: float, over: str) -> str:
        if scorer == over or (scorer in AUTO and fraction != 0.5):  # its share is its own
            return ""
        return pooled(in_every_world(base, (scorer, fraction), (over, fraction)))

    rows = []
    for scorer in (*(scorer for scorer in COMPARED if scorer not in COLD + AUTO), *COLD, *AUTO):
        count = sum(len(runs(base, world, scorer, 0.5)) for world in worlds(base))
        cells = [gain(scorer, fraction, "full") for fraction in (0.2, 0.5, 0.65, 0.8)]
        rows.append([f"{NAMES[scorer]} ({count})", *cells, *(gain(scorer, share, "random") for share in (0.2, 0.5))])
    head = [f"{share} %: over full SFT" for share in (20, 50, 65, 80)]
    return table(["trained on (pools)", *head, "20 %: over random", "50 %: over random"], rows)


def fractions(base: str) -> str:
    """Accuracy by share kept: how the best share moves with the noise."""
    rows = []
    for scorer in ("exact", "calibrated", *FORWARD, "random"):
        for fraction in (0.1, 0.2, 0.5, 0.65, 0.8):
            found = [runs(base, world, scorer, fraction) for world in worlds(base)]
            if any(found):
                rows.append([f"{NAMES[scorer]} {fraction:.0%}", *map(mean_of, found)])
    rows.append(["full SFT, 100%", *(mean_of(runs(base, world, "full")) for world in worlds(base))])
    return table(headed("kept", base), rows)


def like_lengths(base: str) -> str:
    """Low loss by length minus low loss, and minus both what else needs no gradients, paired."""
    rows = []
    for scorer, over in (
        ("low_loss_by_length", "low_loss"),
        ("visual_gain", "low_loss"),
        ("visual_gain", "low_loss_by_length"),
        ("entropy_minus_loss", "low_loss"),
        ("entropy_minus_loss", "low_loss_by_length"),
        ("low_loss_by_neighbours", "low_loss_by_length cold"),
        ("low_loss_by_neighbours", "entropy_minus_loss cold"),
    ):
        for fraction in (0.2, 0.5, 0.65, 0.8):
            cells = [difference(runs(base, w, scorer, fraction), runs(base, w, over, fraction)) for w in worlds(base)]
            rows.append([f"{NAMES[scorer]} minus {NAMES[over]}, {fraction:.0%}", *cells])
    return table(headed("kept", base), rows)


@cache
def later_rows(base: str) -> dict[str, list[Row]]:
    """Of pools drawn after the rules were settled, by world."""
    found: dict[str, list[Row]] = {}
    for row in with_cold("later_pools", base):
        found.setdefault(row["world"], []).append(row)
    return found


def later_runs(base: str, world: str, scorer: str, fraction: float | None) -> Pools:
    fraction = None if scorer in WHOLE else fraction
    same = (row for row in later_rows(base).get(world, ()) if row["scorer"] == scorer)
    return by_pool(row for row in same if fraction in (None, row["fraction"]))


def either(base: str, world: str, scorer: str, fraction: float | None) -> Pools:
    """Of the first pools and of later ones."""
    return runs(base, world, scorer, fraction) | later_runs(base, world, scorer, fraction)


def known_pools(base: str, world: str, scorer: str) -> int:
    """So many pools of a world, the first ones, were known when a score was found."""
    return KNOWN.get((scorer, world), len(runs(base, world, "full")))


def by_neighbours(base: str) -> str:
    """Low loss by neighbours on all pools that had no part in finding it, minus what else one would train on."""
    scorer, rows = "low_loss_by_neighbours", []
    others = ("full", "random", "low_loss", "low_loss_by_length cold", "entropy_minus_loss cold", "oracle")
    for fraction in (0.2, 0.5, 0.65, 0.8):
        cells = []
        for other in others:
            pairs = []
            for world in worlds(base):
                mine = either(base, world, scorer, fraction)
                later = {pool: mine[pool] for pool in mine if pool >= known_pools(base, world, scorer)}
                pairs.append((later, either(base, world, other, fraction)))
            count = sum(len(mine.keys() & theirs) for mine, theirs in pairs)
            cells.append(f"{pooled(pairs)} ({count})" if count else "")
        rows.append([f"{fraction:.0%}", *cells])
    return table(["kept", *(f"over {NAMES[other]} (pools)" for other in others)], rows)


def neighbours() -> str:
    """Variants of low loss by neighbours: AUC, and accuracy on the half that they keep, means over pools."""
    found = rows_in("neighbours")
    names = list(dict.fromkeys(row["world"] for row in found))
    rows = []
    for of, count, taken in dict.fromkeys((row["of"], row["neighbours"], row["taken"]) for row in found):
        same = [row for row in found if (row["of"], row["neighbours"], row["taken"]) == (of, count, taken)]
        if "accuracy" not in same[0]:
            continue
        cells = []
        for world in names:
            mine = [row for row in same if row["world"] == world]
            cells.append(f"{_mean(mine, 'auc'):.2f} ({_mean(mine, 'auc hard'):.2f})")
            cells += [f"{_mean(mine, 'faulty'):.2f} / {_mean(mine, 'hard'):.2f}", f"{_mean(mine, 'accuracy'):.3f}"]
        rows.append([f"{taken} of {count}, by {of}", *cells])
    pools = [len({row["seed"] for row in found if row["world"] == world}) for world in names]
    heads = ([f"{w} ({n}): AUC (hard)", "faulty / hard", "accuracy"] for w, n in zip(names, pools, strict=True))
    return table(["held against", *(cell for head in heads for cell in head)], rows)


def utilities() -> str:
    """Remedies for one-step utility: AUC, what the half holds, accuracy on the half and the fifth, means over pools."""
    found = rows_in("utilities")
    names = list(dict.fromkeys(row["world"] for row in found if row["score"] == "small step"))
    rows = []
    for score in dict.fromkeys(row["score"] for row in found):
        cells = []
        for world in names:
            half, fifth = (
                [r for r in found if (r["world"], r["score"], r["fraction"]) == (world, score, fraction)]
                for fraction in (0.5, 0.2)
            )
            cells.append(f"{_mean(half, 'auc'):.2f} ({_mean(half, 'auc hard'):.2f})")
            cells.append(f"{_mean(half, 'faulty'):.2f} / {_mean(half, 'hard'):.2f}")
            cells.append(f"{_mean(half, 'accuracy'):.3f}, {_mean(fifth, 'accuracy'):.3f}")
        rows.append([score, *cells])
    pools = [len({row["seed"] for row in found if row["world"] == world}) for world in names]
    heads = ([f"{w} ({n}): AUC (hard)", "faulty / hard", "half, fifth"] for w, n in zip(names, pools, strict=True))
    return table(["score", *(cell for head in heads for cell in head)], rows)


def by_utility(score: str, fraction: float) -> dict[str, Pools]:
    """By world, of the base trained on what a score of utilities.py keeps."""
    same = [row for row in rows_in("utilities") if (row["score"], row["fraction"]) == (score, fraction)]
    return {world: by_pool(row for row in same if row["world"] == world) for world in worlds("blurred")}


def of_groups(base: str) -> str:
    """Utility of groups, and its ranks added to those of low loss by neighbours, minus full SFT by world and more."""
    first = "low loss by neighbours"
    names = dict.fromkeys([first, *(row["score"] for row in rows_in("utilities") if row["world"] == "clean")])
    rows = []
    for score, fraction in product(names, (0.5, 0.2)):
        mine, by_loss = by_utility(score, fraction), by_utility(first, fraction)
        cells = [difference(pools, runs(base, world, "full")) for world, pools in mine.items()]
        for scorer in ("full", "random", "oracle"):
            cells.append(pooled((pools, runs(base, world, scorer, fraction)) for world, pools in mine.items()))
        cells.append("" if score == first else pooled((pools, by_loss[world]) for world, pools in mine.items()))
        rows.append([f"{score} {fraction:.0%}", *cells])
    over = ("full SFT", "random", "clean samples only", first)
    return table([*headed("over full SFT", base), *(f"all over {name}" for name in over)], rows)


def two_numbers(base: str) -> str:
    """Remedies for the fast scores on the pools that have them, minus other arms."""
    shown = ("calibrated_by_neighbours", "right_and_useful batch_share", "right_and_wanted", "first_order cold")
    others = ("full", "random", "low_loss_by_neighbours", "calibrated", "first_order cold", "right_and_wanted")
    rows = []
    for scorer, fraction in product(shown, (0.2, 0.5, 0.65, 0.8)):
        count = sum(len(runs(base, world, scorer, fraction)) for world in worlds(base))
        cells = [
            "" if other == scorer else pooled(in_every_world(base, (scorer, fraction), (other, fraction)))
            for other in others
        ]
        rows.append([f"{NAMES[scorer]} {fraction:.0%} ({count})", *cells])
    return table(["kept (pools)", *(f"over {NAMES[other]}" for other in others)], rows)


def with_later_pools(base: str, world: str) -> str:
    """Gains over full SFT and over random on the pools that were known when an arm was found, on later ones, on all."""
    world, rows = world.replace("_", " "), []
    for scorer, fraction in product((*FORWARD, "judge"), (0.5, 0.2)):
        mine = either(base, world, scorer, fraction)
        known = {pool for pool in mine if pool < known_pools(base, world, scorer)}
        cells = []
        for over in ("full", "random"):
            theirs = either(base, world, over, fraction)
            for chosen in (known, mine.keys() - known, mine.keys()):
                cells.append(difference(*({n: found[n] for n in chosen} for found in (mine, theirs))))
        rows.append([f"{NAMES[scorer]} {fraction:.0%} ({len(known)} + {len(mine) - len(known)})", *cells])
    head = [
        f"over {over}: {which}" for over in ("full SFT", "random") for which in ("pools known", "later pools", "all")
    ]
    return table(["trained on (pools)", *head], rows)


def later_pools(base: str) -> str:
    """Pools drawn after the rules were settled: by world the accuracy of some arms, and the bake-off's gain on each."""
    autos = {world: later_runs(base, world, "auto", None) for world in later_rows(base)}
    raced = {world: auto for world, auto in autos.items() if auto}
    rows = []
    for scorer, fraction in (
        *(("base", None), ("full", None), ("oracle", None), ("random", 0.5), ("judge", 0.5)),
        *product(FORWARD, (0.2, 0.5, 0.65, 0.8)),
        *((name, None) for name in AUTO),
    ):
        cells = []
        for world, auto in raced.items():
            pools = {pool: right for pool, right in later_runs(base, world, scorer, fraction).items() if pool in auto}
            cells += [mean_of(pools), "" if scorer == "auto" else difference(auto, pools)]
        if not any(cells):
            continue
        rows.append([NAMES[scorer] + (f" {fraction:.0%}" if fraction else ""), *cells])
    heads = ((f"{world} ({len(auto)})", "the bake-off minus it") for world, auto in raced.items())
    return table(["trained on", *(cell for head in heads for cell in head)], rows)


def fast(base: str) -> str:
    """Models trained on what the fast scores keep, minus those of exact, paired."""
    rows = []
    for scorer in ("calibrated", "tail"):
        for fraction in (0.5, 0.2):
            found = [
                difference(runs(base, w, scorer, fraction), runs(base, w, "exact", fraction)) for w in worlds(base)
            ]
            rows.append([f"{NAMES[scorer]} {fraction:.0%}", *found])
    return table(headed("minus OST, exact", base), rows)


def variants(base: str) -> str:
    """What it changes to rank the whole pool at once, and to train for fixed epochs, at 50 %: paired differences."""
    rows = []
    for scorer in ("exact", "calibrated", "low_loss", "random"):
        usual = [runs(base, world, scorer, 0.5) for world in worlds(base)]
        for name, more in (
            ("global minus within domains", {"within": "global"}),
            ("fixed epochs minus fixed compute", {"protocol": "fixed epochs"}),
        ):
            found = [runs(base, world, scorer, 0.5, **more) for world in worlds(base)]
            if any(found):
                cells = [difference(one, other) for one, other in zip(found, usual, strict=True)]
                rows.append([f"{NAMES[scorer]}: {name}", *cells])
    return table(headed("at 50 %", base), rows)


def put_back(base: str) -> str:
    """Is what the score calls worst harmful when it is put back? Against the half alone, paired."""
    rows = []
    for name, scorer, over in (
        (f"{NAMES['put back worst']}, minus exact 50 %", "put back worst", "exact"),
        (f"{NAMES['put back random']}, minus exact 50 %", "put back random", "exact"),
        ("the worst fifth minus a random one", "put back worst", "put back random"),
    ):
        both = in_every_world(base, (scorer, 0.5), (over, 0.5))
        rows.append([name, *(difference(*pair) for pair in both), pooled(both)])
    shares = []
    for world in worlds(base):
        found = [
            f"{np.mean([1 - r['share']['clean'] - r['share']['near_copy'] for r in picked(base, world, s, 0.5)]):.2f}"
            for s in ("exact", "put back worst", "put back random")
            if picked(base, world, s, 0.5)
        ]
        shares.append(" / ".join(found))
    rows.append(["faulty: half / with the worst / with random", *shares, ""])
    return table([*headed("put back", base), "all pools"], rows)


def kept_faults(base: str, fraction: float) -> str:
    """Share of faulty samples and of hard ones in what is kept."""
    rows = []
    for scorer in ("full", *COMPARED[:-1]):
        cells = []
        for world in worlds(base):
            found = picked(base, world, scorer, fraction)
            faulty = [1 - row["share"]["clean"] - row["share"]["near_copy"] for row in found]
            hard = [row["hard"] for row in found]
            cells.append(f"{np.mean(faulty):.2f} / {np.mean(hard):.2f}" if found else "")
        if any(cells):
            rows.append([NAMES[scorer], *cells])
    return table(headed("kept by", base), rows)


def auto(base: str) -> str:
    """What the bake-off chose in every world and pool, beside the best arm that was trained there."""
    rows = []
    for row in (r for r in selection_rows(base) if r["scorer"] == "auto"):
        same = [
            r
            for r in selection_rows(base)
            if (r["world"], r["seed"], r["protocol"]) == (row["world"], row["seed"], "fixed compute")
        ]
        by_name = {r["scorer"]: r for r in same}
        best = max((r for r in same if r["scorer"] not in (*AUTO, "oracle", "judge", "deita")), key=_accuracy)
        over = row["over_base"]
        rows.append(
            [
                f"{row['world']}, pool {row['seed']}",
                " ".join([NAMES[row["chose"]], *[f"{row['fraction']:.0%} {row['within']}"] * (row["fraction"] < 1)]),
                f"{row['accuracy']:.3f}",
                *(f"{by_name[name]['accuracy']:.3f}" for name in ("base", "full", "oracle")),
                f"{NAMES[best['scorer']]} {best['fraction']:.0%}: {best['accuracy']:.3f}",
                f"{over[0]:+.3f} [{over[1]:+.3f}, {over[2]:+.3f}]",
            ]
        )
    head = ["world", "auto chose", "accuracy", "base", "full SFT", "oracle", "best arm trained", "race: over the base"]
    return table(head, rows)


def _accuracy(row: Row) -> float:
    return row["accuracy"]


def auto_gains(base: str) -> str:
    """The bake-off against what a user would do without it, paired over pools and questions."""
    fixed = (("random", 0.5), ("low_loss", 0.8), ("low_loss", 0.5), ("low_loss_by_length", 0.5), ("exact", 0.5))
    others = (("base", None), ("full", None), *fixed)
    rows = []
    for scorer, fraction in others:
        cells = [difference(runs(base, w, "auto"), runs(base, w, scorer, fraction)) for w in worlds(base)]
        rows.append([f"{NAMES[scorer]}{f' {fraction:.0%}' if fraction else ''}", *cells])
    oracle = [difference(runs(base, w, "auto"), runs(base, w, "oracle")) for w in worlds(base)]
    return table(headed("auto minus", base), [*rows, ["oracle: clean samples only", *oracle]])


def separation(base: str) -> str:
    """AUC of each score for clean against faulty samples; in brackets for hard clean ones against faulty ones."""
    rows = []
    names = ("exact", "calibrated", "tail", "first_order", "less", "visual_gain", "entropy_minus_loss", "low_loss")
    warm = [row for row in selection_rows(base) if row["scorer"] not in COLD]
    for world in worlds(base):
        cells = [_auc([row for row in warm if row["world"] == world], name) for name in names]
        if any(cells):
            rows.append([world, *cells])
    return table(["world", *(NAMES[name] for name in names)], rows)


def _auc(rows: list[Row], name: str) -> str:
    """Mean over pools of the AUC of clean against faulty samples, and of hard clean ones; empty where not known."""
    found = [row["agreements"] for row in rows if "agreements" in row]
    pairs = [(f[f"auc {name}"], f[f"auc {name}, hard"]) for f in found if f"auc {name}" in f]
    known = pairs and not any(value is None for pair in pairs for value in pair)
    return "{:.2f} ({:.2f})".format(*np.mean(pairs, axis=0)) if known else ""


def costs(base: str) -> str:
    """Seconds of scoring the pool in epochs; an epoch is what 20 steps more take, median over all trained models."""
    rows = selection_rows(base)
    trained = [row for row in rows if row["scorer"] not in COLD + AUTO]
    seconds = {
        steps: np.median([r["seconds"] for r in trained if r["steps"] == steps] or [np.nan]) for steps in (20, 40)
    }
    epoch = seconds[40] - seconds[20]
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["scorer"] == "auto":
            found.setdefault("auto", []).append(row["race_steps"] / 20)
        for name, taken in row.get("score_seconds", {}).items():
            found.setdefault(name, []).append(taken / epoch)
    shown = {
        **NAMES,
        "probing": "probing, shared by all of OST and the dot products",
        "auto": "bake-off: its trainings",
    }
    head = ["what", "epochs of training, median over worlds and pools"]
    return table(head, [[shown[name], f"{np.median(taken):.1f}"] for name, taken in found.items()])


def settings(world: str) -> str:
    """What one changed setting of the exact score does: separation and trained models, with gains over the default."""
    slug = world.replace(" %", "").replace(" ", "-")
    found = [row for row in rows_in("scoring_settings", f"{slug}-blurred-*.json") if row["scorer"] in ONE_STEP]

    def of(setting: str, fraction: float) -> Pools:
        return by_pool(r for r in found if (r["setting"], r["fraction"]) == (setting, fraction))

    rows = []
    for setting in dict.fromkeys(row["setting"] for row in found):
        same = [r for r in found if r["setting"] == setting and r["fraction"] == 0.5]
        cells = [f"{np.mean([r['auc'] for r in same]):.2f} ({np.mean([r['auc hard'] for r in same]):.2f})"]
        cells.append(f"{np.mean([r['spearman with low loss'] for r in same]):.2f}")
        for fraction in (0.5, 0.2):
            cells.append(mean_of(of(setting, fraction)))
            usual = of(setting.split(",")[0], fraction)
            cells.append(difference(of(setting, fraction), usual) if "," in setting else "")
        rows.append([f"{setting} ({len(same)})", *cells])
    head = [
        "setting",
        "AUC (hard)",
        "Spearman with low loss",
        "at 50 %",
        "over the default",
        "at 20 %",
        "over the default",
    ]
    return table(head, rows)


def warm_up() -> str:
    """Scores that need no gradients by other warm-ups of the proxy, minus by the default, paired."""
    tried = [row for row in rows_in("scoring_settings") if row["setting"].startswith(WARMED)]
    cold = [{**row, "setting": f"{row['scorer']}, warm-up 0 %"} for row in rows_in("cold") if row["scorer"] in WARMED]

    def of(world: str, base: str, setting: str, fraction: float) -> Pools:
        wanted = (world, base, setting, fraction)
        same = (r for r in (*tried, *cold) if (r["world"], r["base"], r["setting"], r["fraction"]) == wanted)
        return by_pool(same)

    rows = []
    found = sorted({(r["world"], r["base"], r["setting"]) for r in (*tried, *cold) if "," in r["setting"]})
    for world, base, setting in found:
        scorer, _, warm = setting.partition(", ")
        cells = []
        for fraction in (0.5, 0.2):
            usual = either(base, world, scorer, fraction) | of(world, base, scorer, fraction)
            mine = {pool: right for pool, right in of(world, base, setting, fraction).items() if pool in usual}
            cells += [mean_of({pool: usual[pool] for pool in mine}), mean_of(mine), difference(mine, usual)]
        name = f"{world}{', strongly blurred' * (base != 'blurred')} ({len(mine)})"
        rows.append([name, NAMES[scorer], warm.removeprefix("warm-up "), *cells])
    head = [cell for share in ("at 50 %", "at 20 %") for cell in (f"{share}, by 5 %", "by this", "difference")]
    return table(["world", "score", "warm-up", *head], rows)


def raced_cold() -> str:
    """What the bake-off with low loss by length chooses without warm-up, minus with it and more, paired."""
    others = {
        "warm-up 5 %": (WARMED_UP, None),
        "full SFT": ("full", None),
        "low loss 50 %": ("low_loss", 0.5),
        "low loss 80 %": ("low_loss", 0.8),
        "clean samples only": ("oracle", None),
    }
    return _raced(BY_LENGTH, "warm-up 0 %", others)


def raced() -> str:
    """What the bake-off chooses, minus what it does with low loss by length, not by neighbours, and more, paired."""
    others = {"with low loss by length": (BY_LENGTH, None), **WITHOUT_RACE}
    return _raced("auto", "with low loss by neighbours", others)


def raced_wanted() -> str:
    """What the bake-off with right and wanted in the place of OST chooses, minus the default's choice and more."""
    others = {
        "auto": ("auto", None),
        "full SFT": ("full", None),
        "right and wanted 50 %": ("right_and_wanted", 0.5),
        "clean samples only": ("oracle", None),
    }
    return _raced(WITH_WANTED, "with right and wanted", others)


def raced_at_share() -> str:
    """What the bake-off chooses with the step of a batch's share, minus its choice at a visible effect and more."""
    return _raced(AT_SHARE, "with a batch's share", {"auto": ("auto", None), **WITHOUT_RACE})


def of_batch_share(base: str) -> str:
    """OST's utilities with the step of a batch's share, alone, minus those at a visible effect, by world."""
    exact = ("utility", "step of a group's share")
    rows = []
    for fraction in (0.5, 0.2):
        large, share = (by_utility(score, fraction) for score in exact)
        cells = [difference(share[world], large[world]) for world in worlds(base)]
        rows.append([f"exact {fraction:.0%}", *cells, pooled((share[world], large[world]) for world in worlds(base))])
    for fraction in (0.8, 0.65, 0.5, 0.2):
        both = in_every_world(base, ("calibrated batch_share", fraction), ("calibrated cold", fraction))
        rows.append([f"calibrated {fraction:.0%}", *(difference(*pair) for pair in both), pooled(both)])
    for fraction in (0.5, 0.2):
        both = in_every_world(base, ("tail batch_share", fraction), ("tail", fraction))
        rows.append(
            [f"tail {fraction:.0%} (that after a warm-up)", *(difference(*pair) for pair in both), pooled(both)]
        )
    for name, scorer in (("a visible effect", "calibrated cold"), ("a batch's share", "calibrated batch_share")):
        found = {world: by_arm(base).get((world, scorer), []) for world in worlds(base)}
        rows.append([f"calibrated, {name}: AUC (hard)", *(_auc(found[w], "calibrated") for w in found), ""])
        agreed = {w: [r["agreements"]["exact calibrated"] for r in found[w] if "agreements" in r] for w in found}
        known = [agreement for pools in agreed.values() for agreement in pools]
        low = f"{np.mean(known):.2f}, below {REFUSED} on {sum(a < REFUSED for a in known)} of {len(known)}"
        rows.append([f"calibrated, {name}: agreement with exact", *(f"{np.mean(a):.2f}" for a in agreed.values()), low])
        toxic = [_toxic(found[world]) for world in found]
        cells = [f"{called} ({faulty}, {hard})" for called, faulty, hard in [*toxic, np.sum(toxic, axis=0)]]
        rows.append([f"calibrated, {name}: called toxic (faulty, hard clean)", *cells])
    return table([*headed("share of a batch's step, minus a visible effect", base), "all"], rows)


def _toxic(rows: list[Row]) -> tuple[int, int, int]:
    """So many samples of these pools calibrated calls toxic; faulty ones among them; clean ones that are hard."""
    found = [row["agreements"] for row in rows if "toxic calibrated" in row.get("agreements", {})]
    called, faulty, hard = (sum(f[f"toxic calibrated{of}"] for f in found) for of in ("", ", faulty", ", hard"))
    return called, faulty, hard


def _raced(scorer: str, name: str, others: dict[str, tuple[str, float | None]]) -> str:
    """On the pools that the first of the others has too."""
    rows, pairs = [], {other: [] for other in others}
    first, *_ = others.values()
    for world in sorted(worlds("blurred")):
        both = either("blurred", world, *first)
        mine = {pool: right for pool, right in either("blurred", world, scorer, None).items() if pool in both}
        cells = []
        for other, arm in others.items():
            found = either("blurred", world, *arm)
            pairs[other].append((mine, found))
            cells += [mean_of({pool: found[pool] for pool in mine}), difference(mine, found)]
        rows.append([f"{world} ({len(mine)})", mean_of(mine), *cells])
    pools = sum(len(mine) for mine, _ in next(iter(pairs.values())))
    rows.append([f"all ({pools})", "", *(cell for other in others for cell in ("", pooled(pairs[other])))])
    return table(["world", name, *(cell for other in others for cell in (other, "minus it"))], rows)


def transfer() -> str:
    """Scores of a small proxy against those of the larger model that is trained."""
    found = rows_in("transfer")
    rows = []
    for world, size in dict.fromkeys((row["world"], row["size"]) for row in found):
        same = [row for row in found if (row["world"], row["size"]) == (world, size)]
        pools = len({row["seed"] for row in same})

        def of(scorer: str, proxy: str, same: list[Row] = same) -> list[Row]:
            return [row for row in same if (row["scorer"], row["proxy"]) == (scorer, proxy)]

        for scorer in dict.fromkeys(row["scorer"] for row in same):
            cells = [f"{world}, {size} times ({pools})", NAMES[scorer] + ("" if scorer in WHOLE else " 50%")]
            if by_itself := of(scorer, "none"):
                rows.append([*cells, "", mean_of(by_pool(by_itself)), "", ""])
                continue
            own, small = of(scorer, "own"), of(scorer, "small")
            cells.append(f"{np.mean([row['spearman with own'] for row in small]):.2f}")
            cells += [mean_of(by_pool(own)), mean_of(by_pool(small)), difference(by_pool(small), by_pool(own))]
            rows.append(cells)
    head = ["target model", "trained on", "Spearman", "by its own scores", "by the small proxy's", "difference"]
    return table(head, rows)


def other_losses() -> str:
    """AUC of losses under tuned proxies, and accuracy of models trained where they are lowest, mean over pools."""
    found = rows_in("other_losses")
    names = list(dict.fromkeys(row["world"] for row in found))
    rows = []
    for score, steps in dict.fromkeys((row["score"], row["steps"]) for row in found):
        cells = []
        for world in names:
            same = [r for r in found if (r["world"], r["score"], r["steps"]) == (world, score, steps)]
            cells.append(f"{_mean(same, 'auc'):.2f} ({_mean(same, 'auc hard'):.2f})")
            is_trained = "accuracy at 0.5" in same[0]
            cells += [f"{_mean(same, f'accuracy at {share}'):.3f}" if is_trained else "" for share in (0.5, 0.8)]
        rows.append([score, str(steps), *cells])
    pools = [len({row["seed"] for row in found if row["world"] == world}) for world in names]
    heads = ([f"{w} ({n}): AUC (hard)", "at 50 %", "at 80 %"] for w, n in zip(names, pools, strict=True))
    return table(["score", "steps", *(cell for head in heads for cell in head)], rows)


def second_look() -> str:
    """What is kept by losses of proxies that learnt from what was kept, and what training on it gives, by round."""
    found = rows_in("second_look")
    names = list(dict.fromkeys(row["world"] for row in found))
    rows = []
    for scorer, fraction, number in dict.fromkeys((r["scorer"], r["fraction"], r["round"]) for r in found):
        cells = []
        for world in names:
            arm = [r for r in found if (r["world"], r["scorer"], r["fraction"]) == (world, scorer, fraction)]
            first, same = ([r for r in arm if r["round"] == n] for n in (0, number))
            cells.append(f"{_mean(same, 'faulty'):.2f} / {_mean(same, 'hard'):.2f}")
            cells.append(f"{_mean(same, 'accuracy'):.3f}")
            cells.append(difference(by_pool(same), by_pool(first)) if number else "")
        rows.append([f"{NAMES[scorer]} {fraction:.0%}, round {number}", *cells])
    pools = [len({row["seed"] for row in found if row["world"] == world}) for world in names]
    heads = ([f"{w} ({n}): faulty / hard", "accuracy", "over round 0"] for w, n in zip(names, pools, strict=True))
    return table(["kept by", *(cell for head in heads for cell in head)], rows)


def _mean(rows: list[Row], column: str) -> float:
    return float(np.mean([row[column] for row in rows]))


def summary(base: str = "blurred") -> str:
    """The table of the README: accuracy with its interval, over all pools, of what users would do, and their gains."""
    arms = {
        "untrained": ("base", None),
        "full SFT": ("full", None),
        "random 50 %": ("random", 0.5),
        "low loss 50 %": ("low_loss", 0.5),
        "entropy minus loss 65 %": ("entropy_minus_loss", 0.65),
        "low loss by neighbours 50 %": ("low_loss_by_neighbours", 0.5),
        "Datalloy's choice": ("auto", None),
    }
    rows = []
    for world in worlds(base):
        found = (interval(list(runs(base, world, *arm).values())) for arm in arms.values())
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in found]
        rows.append([f"{world} ({len(runs(base, world, 'full'))})", *cells])
    full = arms["full SFT"]
    gains = ["" if arm == full else pooled(in_every_world(base, arm, full)) for arm in arms.values()]
    return table(["world", *arms], [*rows, ["**all, over full SFT**", *gains]])

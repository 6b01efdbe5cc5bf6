"""Rows of pools that no choice was made by, and of all others, in; tables of docs/evidence.md out.

An arm is a scorer, named as in `NAMES`, and a share; 1 where it has none. Cells count their pools where those differ.
"""

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from evidence_selection import AT_SHARE, NAMES, WHOLE, WITH_WANTED, Row, either, mean_of, rows_in
from evidence_tables import Pools, by_pool, difference, interval, pooled, table

Arm = tuple[str, float]
Pair = tuple[Pools, Pools]  # of two arms on the pools of a world
Kind = Callable[[Arm, str], Pools]  # an arm and a world in, its pools of some kind out

FULL, AUTO, ORACLE = ("full", 1.0), ("auto", 1.0), ("oracle", 1.0)
RACE_AT_SHARE, RACE_WITH_WANTED = (AT_SHARE, 1.0), (WITH_WANTED, 1.0)
HALF_BY_NEIGHBOURS, HALF_BY_WANTED = ("low_loss_by_neighbours", 0.5), ("right_and_wanted", 0.5)
AGAINST: dict[Arm, tuple[Arm, ...]] = {  # arms whose difference decides what to recommend
    AUTO: (RACE_AT_SHARE, HALF_BY_NEIGHBOURS, HALF_BY_WANTED, ORACLE),
    RACE_WITH_WANTED: (AUTO, HALF_BY_WANTED),
    HALF_BY_WANTED: (HALF_BY_NEIGHBOURS, ORACLE),
    ("right_and_wanted", 0.2): (("low_loss_by_neighbours", 0.2),),
    ("right_and_useful batch_share", 0.5): (HALF_BY_WANTED,),
    ("right_and_useful batch_share", 0.2): (("right_and_wanted", 0.2),),
    ("calibrated batch_share", 0.5): (("low_loss", 0.5),),
}


@cache
def _runs() -> dict[tuple[Arm, str], Pools]:
    """Right or wrong for every question on the pools that no choice was made by; no warm-up."""
    shared = (row | {"scorer": f"{row['scorer']} batch_share"} for row in rows_in("fresh_pools_batch_share"))
    by_arm: dict[tuple[Arm, str], list[Row]] = {}
    for row in (*rows_in("fresh_pools"), *shared):
        arm = (row["scorer"], 1.0 if row["scorer"] in WHOLE else row["fraction"])
        by_arm.setdefault((arm, row["world"]), []).append(row)
    return {place: by_pool(rows) for place, rows in by_arm.items()}


def _fresh(arm: Arm, world: str) -> Pools:
    return _runs().get((arm, world), {})


def _known(arm: Arm, world: str) -> Pools:
    """Of all other pools. Low loss was after a warm-up there, so it has none."""
    return {} if arm[0] == "low_loss" else either("blurred", world, *arm)


FRESH: tuple[Kind, ...] = (_fresh,)
ALL: tuple[Kind, ...] = (_fresh, _known)


def _worlds() -> list[str]:
    return sorted({world for _, world in _runs()})


def _arms() -> list[Arm]:
    return list(dict.fromkeys(arm for arm, _ in _runs() if arm[0] not in ("base", "full")))


def _label(arm: Arm) -> str:
    return NAMES[arm[0]] + ("" if arm[0] in WHOLE else f" {arm[1]:.0%}")


def _pairs(one: Arm, other: Arm, worlds: Iterable[str], kinds: Iterable[Kind] = FRESH) -> list[Pair]:
    return [(kind(one, world), kind(other, world)) for kind in kinds for world in worlds]


def _count(pairs: list[Pair]) -> int:
    return sum(len(one.keys() & other.keys()) for one, other in pairs)


def _counted(pairs: list[Pair]) -> str:
    """The mean difference over all pools with its interval, and how many they are; empty without a pool."""
    return f"{gain} ({_count(pairs)})" if (gain := pooled(pairs)) else ""


def _way(arm: Arm, worlds: list[str], kinds: Iterable[Kind]) -> str:
    """The part of the way from full SFT to the clean samples that an arm goes, on the pools that it has."""
    gains, aims = [], []
    for kind in kinds:
        for world in worlds:
            mine, clean, full = kind(arm, world), kind(ORACLE, world), kind(FULL, world)
            gains += [(mine[pool] - full[pool]).mean() for pool in mine]
            aims += [(clean[pool] - full[pool]).mean() for pool in mine]
    return f"{np.mean(gains) / np.mean(aims):.0%} ({len(gains)})"


def fresh() -> str:
    """Pools that no choice was made by, alone and with all others: gains over full SFT and over random samples.

    And the part of the way from full SFT to the clean samples where answers are wrong.
    """
    worlds = _worlds()
    wrong = [world for world in worlds if world.startswith("wrong")]
    rows = []
    for arm in _arms():
        random = ("random", arm[1])
        over_random = ["" if arm == random else pooled(_pairs(arm, random, worlds, kinds)) for kinds in (FRESH, ALL)]
        alone = [pooled(_pairs(arm, FULL, worlds)), over_random[0], _way(arm, wrong, FRESH)]
        with_others = [_counted(_pairs(arm, FULL, worlds, ALL)), over_random[1], _way(arm, wrong, ALL)]
        if not any(_known(arm, world) for world in worlds):
            with_others = ["", "", ""]
        rows.append([_label(arm), *(cell for both in zip(alone, with_others, strict=True) for cell in both)])
    head = ["over full SFT", "with all others (pools)", "over random of as many", "with all others"]
    way = ["wrong answers: of the way to clean samples (pools)", "with all others (pools)"]
    return table(["trained on", *head, *way], rows)


def fresh_against() -> str:
    """Differences of arms on pools that no choice was made by, on the known ones, and on both."""
    worlds, rows = _worlds(), []
    for arm, others in AGAINST.items():
        for other in others:
            cells = [_counted(_pairs(arm, other, worlds, kinds)) for kinds in (FRESH, (_known,), ALL)]
            rows.append([f"{_label(arm)} minus {_label(other)}", *cells])
    return table(["", "no choice made by (pools)", "known (pools)", "both (pools)"], rows)


def single_pools() -> str:
    """On how many single pools an arm is below, and above, another with its whole interval over questions.

    Low loss is after a warm-up on the known ones.
    """

    def known(arm: Arm, world: str) -> Pools:
        return either("blurred", world, *arm)

    others: tuple[Arm, ...] = (FULL, ("random", 0.5), ("low_loss", 0.5), ("low_loss", 0.8))
    rows = []
    for arm in (AUTO, RACE_AT_SHARE, HALF_BY_NEIGHBOURS, HALF_BY_WANTED):
        cells = []
        for other in others:
            pairs = _pairs(arm, other, _worlds(), (_fresh, known))
            gains = [interval([one[pool] - over[pool]]) for one, over in pairs for pool in one.keys() & over.keys()]
            below, above = sum(high < 0 for *_, high in gains), sum(low > 0 for _, low, _ in gains)
            cells.append(f"{below}, {above} of {len(gains)}")
        rows.append([_label(arm), *cells])
    return table(["below, above", *map(_label, others)], rows)


def fresh_worlds(over: str) -> str:
    """By world, on pools that no choice was made by and all others: gains over full SFT or as many random samples."""
    rows = []
    for arm in _arms():
        share = 0.5 if arm[0] in WHOLE else arm[1]
        other = FULL if over == "full" else ("random", share)
        cells = [_counted(_pairs(arm, other, [world], ALL)) for world in _worlds()]
        if arm[0] != over and any(cells):
            rows.append([_label(arm), *cells])
    return table([f"over {'full SFT' if over == 'full' else 'random'} (pools)", *_worlds()], rows)


def fresh_races() -> str:
    """On the same pools the bake-off's choice by world, minus everything else that one could train on."""
    others: dict[str, Arm] = {
        "full SFT": FULL,
        "low loss 50 %": ("low_loss", 0.5),
        "low loss 80 %": ("low_loss", 0.8),
        "a half by neighbours": HALF_BY_NEIGHBOURS,
        "OST at a batch's share": RACE_AT_SHARE,
        "clean samples only": ORACLE,
    }
    rows = []
    for world in _worlds():
        auto = _fresh(AUTO, world)
        cells = [difference(auto, _fresh(other, world)) for other in others.values()]
        rows.append([f"{world} ({len(auto)})", mean_of(auto), *cells])
    rows.append(["all", "", *(pooled(_pairs(AUTO, other, _worlds())) for other in others.values())])
    return table(["world", "auto", *(f"minus {other}" for other in others)], rows)

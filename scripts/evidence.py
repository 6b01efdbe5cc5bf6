"""The committed results in, the tables and pictures of docs/evidence.md out.

    python scripts/evidence.py            (writes them into the page; its words are written by hand)
    python scripts/evidence.py --check    (exit code 1 where they are not those of the results)

A table stands between `<!-- table: NAME ARGUMENT ... -->` and `<!-- end -->`; names are those of `TABLES`. An argument
of several words has underscores for its spaces.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import evidence_bakeoff
import evidence_fresh
import evidence_mixtures
import evidence_pictures
import evidence_selection

PAGES = (Path("docs/evidence.md"), Path("README.md"))
TABLES: dict[str, Callable[..., str]] = {
    "accuracies": lambda base, fraction: evidence_selection.accuracies(base, float(fraction)),
    "all_worlds": evidence_selection.all_worlds,
    "gains": lambda base, fraction, over: evidence_selection.gains(base, float(fraction), over),
    "fractions": evidence_selection.fractions,
    "like_lengths": evidence_selection.like_lengths,
    "neighbours": evidence_selection.neighbours,
    "utilities": evidence_selection.utilities,
    "of_groups": evidence_selection.of_groups,
    "two_numbers": evidence_selection.two_numbers,
    "by_neighbours": evidence_selection.by_neighbours,
    "later_pools": evidence_selection.later_pools,
    "with_later_pools": evidence_selection.with_later_pools,
    "fast": evidence_selection.fast,
    "variants": evidence_selection.variants,
    "put_back": evidence_selection.put_back,
    "kept_faults": lambda base, fraction: evidence_selection.kept_faults(base, float(fraction)),
    "auto": evidence_selection.auto,
    "rules": evidence_bakeoff.rules,
    "parts": evidence_bakeoff.parts,
    "cold_rules": evidence_bakeoff.cold_rules,
    "noise": evidence_bakeoff.noise,
    "judging_items": evidence_bakeoff.judging_items,
    "auto_gains": evidence_selection.auto_gains,
    "separation": evidence_selection.separation,
    "costs": evidence_selection.costs,
    "settings": lambda world: evidence_selection.settings(world.replace("_", " ")),
    "warm_up": evidence_selection.warm_up,
    "raced_cold": evidence_selection.raced_cold,
    "raced": evidence_selection.raced,
    "raced_wanted": evidence_selection.raced_wanted,
    "raced_at_share": evidence_selection.raced_at_share,
    "fresh": evidence_fresh.fresh,
    "fresh_against": evidence_fresh.fresh_against,
    "single_pools": evidence_fresh.single_pools,
    "fresh_worlds": evidence_fresh.fresh_worlds,
    "fresh_races": evidence_fresh.fresh_races,
    "of_batch_share": evidence_selection.of_batch_share,
    "transfer": evidence_selection.transfer,
    "other_losses": evidence_selection.other_losses,
    "second_look": evidence_selection.second_look,
    "summary": evidence_selection.summary,
    "agreement": evidence_mixtures.agreement,
    "picks": evidence_mixtures.picks,
    "ceiling": evidence_mixtures.ceiling,
    "budgets": evidence_mixtures.budgets,
    "curves": evidence_mixtures.curves,
    "against_line": evidence_mixtures.against_line,
    "found_again": evidence_mixtures.found_again,
    "fewer_items": evidence_mixtures.fewer_items,
    "verdicts": evidence_mixtures.verdicts,
    "promises": evidence_mixtures.promises,
    "training_luck": evidence_mixtures.training_luck,
    "joint": evidence_mixtures.joint,
    "picks_followed": evidence_mixtures.picks_followed,
    "joint_worlds": evidence_mixtures.joint_worlds,
    "joint_order": evidence_mixtures.joint_order,
    "domain_utility": evidence_mixtures.domain_utility,
}
BLOCK = re.compile(r"(<!-- table: (?P<name>\w+)(?P<arguments>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with every table as the results have it."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']](*block['arguments'].split())}\n{block[4]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for path in PAGES:
        page = path.read_text()
        made = filled(page)
        if args.check and made != page:
            sys.exit(f"{path} is not up to date: run `python scripts/evidence.py`")
        path.write_text(made)
    for name in evidence_pictures.PICTURES:
        path = evidence_pictures.FOLDER / f"{name}.svg"
        drawn = evidence_pictures.drawn(name)
        if args.check and not evidence_pictures.shows_the_same(path.read_text(), drawn):
            sys.exit(f"{path} is not up to date: run `python scripts/evidence.py`")
        path.write_text(drawn)


if __name__ == "__main__":
    main()

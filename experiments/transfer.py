"""Does a small proxy rank samples for a larger model? A world, trained models of 2 and 4 times the size out.

    python experiments/transfer.py --seeds 0 1 2
    python experiments/transfer.py --sizes 2 --worlds "hard matters"

The base is a grown model (bases.py); scores come from the small blurred model (`small`) or from the base itself
(`own`). Per score: the Spearman of both, and the held-out accuracy of the base trained on the best half of each domain
by either, beside the untrained base, the full pool, a random half and the clean samples alone, all at equal compute.
Resumable. Five minutes of one core a pool for the double size, ten for the fourfold.
"""

from pathlib import Path
from typing import Any

import torch
from arguments import parser_of
from bases import base_path
from provenance import provenance
from selection import WORLDS, Job, auc, open_world, slug

from datalloy.run import write_json
from datalloy.uncertainty import rank_agreement

SCORERS = ("calibrated", "less", "low_loss")
REFERENCES = (Job("base"), Job("full"), Job("oracle"), Job("random", 0.5))
SETTINGS = "select.bakeoff_arms=[calibrated,less]"


def run_world(name: str, size: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    base = f"blurred_{size}x"
    with open_world(name, base, seed, folder, (SETTINGS,), "own") as world:
        rows = [{"proxy": "none", "size": size, **world.row(job)} for job in REFERENCES]
    utility: dict[str, dict[str, Any]] = {}
    for proxy, overrides in (("own", ()), ("small", (f"proxy={base_path('blurred', folder.parent)}",))):
        with open_world(name, base, seed, folder, (SETTINGS, *overrides), proxy) as world:
            utility[proxy] = {scorer: world.scores(scorer).utility for scorer in SCORERS}
            for scorer, utility_N in utility[proxy].items():
                agreement = rank_agreement(utility_N, utility["own"][scorer])
                found = {"auc": auc(utility_N, world.is_clean_N), "spearman with own": agreement}
                rows.append({"proxy": proxy, "size": size, **found, **world.row(Job(scorer, 0.5))})
    return rows


def main() -> None:
    parser = parser_of(__doc__, "transfer")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=["wrong 30 %"])
    parser.add_argument("--sizes", type=int, nargs="+", choices=[2, 4], default=[2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for name in args.worlds:
            for size in args.sizes:
                place = f"{slug(name)}-{size}x-{seed}"
                rows = run_world(name, size, seed, args.runs / place)
                write_json(args.out / f"{place}.json", {"rows": rows, **provenance()})
                print(place, [(r["proxy"], r["scorer"], round(r["accuracy"], 3)) for r in rows], flush=True)


if __name__ == "__main__":
    main()

"""The counts of a run in, the places where its books do not balance out.

Nothing vanishes: of every set, what was read is accepted or rejected; of the pool, what was accepted is scored or has a
state that says why not, and is kept or has a reason why not. A run whose counts do not add up says so and is not
complete, whatever else it claims; and what is still to do is counted as pending, not left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datalloy.errors import RunError

SECTIONS = ("domains", "targets", "evaluation")


def conserve(counts: Mapping[str, Any]) -> list[str]:
    """One line for every sum that does not come out; empty where nothing was lost.

    `counts` has `sets`: by section and name, how many records were read, accepted and rejected; `scored`: samples of
    the pool by state; `selected`: samples of the pool by reason; and `pending`: units begun and not ended. What the
    run does not have is absent.
    """
    wrong = []
    accepted = 0
    for section in SECTIONS:
        for name, row in counts.get("sets", {}).get(section, {}).items():
            if row["read"] != row["accepted"] + row["rejected"]:
                wrong.append(
                    f"{section}.{name}: {row['read']} records were read, {row['accepted']} accepted and "
                    f"{row['rejected']} rejected"
                )
            accepted += row["accepted"] if section == "domains" else 0
    for name in ("scored", "selected"):
        if name in counts and sum(counts[name].values()) != accepted:
            total = sum(counts[name].values())
            wrong.append(f"{accepted} samples of the pool were accepted, {total} {name}: {dict(counts[name])}")
    if counts.get("pending"):
        wrong.append(f"{counts['pending']} units of work were begun and have not ended")
    return wrong


def require_balance(counts: Mapping[str, Any], folder: Path) -> None:
    """Raise RunError where the counts of the run in `folder` do not add up."""
    if wrong := conserve(counts):
        listed = "\n".join(f"  {line}" for line in wrong)
        raise RunError(
            f"the books of {folder} do not balance, so it is not complete and its figures are not to be trusted:\n"
            f"{listed}\nRun it again in another folder with --run; if it happens again, it is a fault of Datalloy's"
        )

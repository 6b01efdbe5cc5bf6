"""What never came so far: rejected records by reason, leaks between the sets, copies inside the pool."""

from datalloy.report.facts import RunFacts
from datalloy.report.markup import details, paragraph, quoted, table, text
from datalloy.report.page import Section

SHOWN = 50  # rejected records in the table; all of them are in rejected.jsonl


def section(facts: RunFacts) -> Section:
    counts = facts.counts
    accepted = sum(sum(counts[section].values()) for section in ("domains", "targets", "evaluation"))
    takeaway = f"{counts['rejected']:,} of {accepted + counts['rejected']:,} records were rejected. "
    leaks = counts["rejected_by_reason"].get("leak", 0)
    if leaks:
        takeaway += f"{leaks:,} of them are copies of target or held-out items."
    body = _rejected(facts) + "<h3>Leaks and copies</h3>" + paragraph(text(_leaks(facts, leaks)))
    return Section("refused", "Rejected and leaked", takeaway, body)


def _rejected(facts: RunFacts) -> str:
    if not facts.rejects:
        return paragraph("Every record of every file could be read, encoded and used.")
    reasons = facts.counts["rejected_by_reason"]
    rows = [[text(reason.replace("_", " ")), f"{count:,}"] for reason, count in sorted(reasons.items(), key=_most)]
    records = [
        [
            text(reject["reason"].replace("_", " ")),
            text(f"{reject['path']}:{reject['line']}" if reject["line"] else f"{reject['path']}[{reject['row']}]", 200),
            quoted(reject["id"], 80),
            quoted(reject["detail"], 200),
        ]
        for reject in facts.rejects[:SHOWN]
    ]
    shown = f"The first {SHOWN} of them" if len(facts.rejects) > SHOWN else "Each of them"
    return table(["reason", "records"], rows, numeric=(1,), label="rejected records by reason") + details(
        f"{shown}, with file, line and id",
        table(["reason", "where", "id", "what was found"], records, label="rejected records"),
    )


def _most(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _leaks(facts: RunFacts, leaks: int) -> str:
    policy, distance = facts.recipe.leakage.on_leak, facts.recipe.leakage.image_distance
    looked = f"Texts were compared by hash and pictures by look (at most {distance} of 256 bits apart). "
    if policy == "allow":
        looked += "The recipe allows leaks (leakage.on_leak: allow), so figures on the targets may flatter. "
    elif leaks:
        looked += f"{leaks:,} samples of the pool that are also target or held-out items were left out. "
    else:
        looked += "No item of a target or held-out set is in the pool. "
    copies = facts.counts["duplicates"]
    return looked + f"Copies inside the pool: {copies['exact']:,} exact, {copies['near']:,} near."

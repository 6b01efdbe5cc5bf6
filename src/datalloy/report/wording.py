"""Words of the program in, words for a reader out: how samples are selected, and why one is left out."""

from typing import Any

from datalloy.report.markup import percent

RANKED_BY = {
    "random": "drawn at random",
    "low_loss": "those with the lowest loss",
    "low_loss_by_length": "those with the lowest loss among answers of like length",
    "low_loss_by_neighbours": "those with the lowest loss among samples whose prompts are alike",
    "right_and_wanted": "those likeliest to be right and wanted by the targets",
    "mid_loss": "those with a middling loss",
    "high_loss": "those with the highest loss",
    "entropy_minus_loss": "those whose answers are likelier than the proxy expected",
    "visual_gain": "those whose pictures tell most about their answers",
    "length": "those with the longest answers",
}
REASONS = {
    "top_fraction": "kept",
    "below_fraction": "ranked below the kept part",
    "over_budget": "over the budget",
    "toxic": "harms beyond its interval",
}


def selection_in_words(arm: dict[str, Any]) -> str:
    """How an arm of the bake-off selects."""
    if arm["scorer"] == "full" or arm["fraction"] == 1:
        return "the full pool"
    ranked = RANKED_BY.get(arm["scorer"], f"those with the highest utility by {arm['scorer']}")
    where = "of each domain" if arm["within"] == "domain" else "of the pool"
    return f"{ranked}, {percent(arm['fraction'])} {where}"


def arm_in_words(arm: dict[str, Any]) -> str:
    """The same, short enough for a row."""
    if arm["scorer"] == "full" or arm["fraction"] == 1:
        return "the full pool"
    return f"{arm['scorer'].replace('_', ' ')}, {percent(arm['fraction'])} of {_group(arm['within'])}"


def _group(within: str) -> str:
    return "each domain" if within == "domain" else "the pool"


def reason_in_words(reason: str) -> str:
    return REASONS.get(reason, reason.replace("not_scored:", "not scored: ").replace("_", " "))

"""A run folder in, the few lines that a person wants to see after a verb out.

Plain lines of text, aligned as tables: the same on a terminal, in a log and through a pipe. A line that begins with
"warning:" says what was found, what it means and what to do about it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.uncertainty import correlation_in_words

LISTED_FILES = 12


FOLLOWS_LENGTH = 0.5  # rank correlation of utility with length that is worth a warning


def summarise(verb: str, folder: Path) -> Iterator[str]:
    """Lines about what `verb` left in the folder, and only that."""
    yield from {
        "check": _check,
        "score": _score,
        "select": _select,
        "mix": _mix,
        "verify": _verify,
        "tell": _tell,
        "train": _train,
        "evaluate": _evaluate,
        "export": _export,
        "run": _run,
    }[verb](folder)


def _check(folder: Path) -> Iterator[str]:
    counts = json.loads((folder / "check.json").read_text())
    for section in ("domains", "targets", "evaluation"):
        for name, count in counts[section].items():
            yield f"{section:<11} {name:<24} {count:>8} samples"
    yield f"rejected: {counts['rejected']}"
    for reason, count in counts["rejected_by_reason"].items():
        yield f"  {reason:<22} {count:>8}"
    duplicates = counts["duplicates"]
    yield f"duplicates in the pool: {duplicates['exact']} exact, {duplicates['near']} near"
    if counts["rejected"]:
        yield (
            f"warning: {counts['rejected']} records cannot be used and are left out; file, line and reason of each are "
            f"in {folder / 'rejected.jsonl'}"
        )


def _score(folder: Path) -> Iterator[str]:
    from datalloy.scores import Scores
    from datalloy.selection import length_correlation

    scores = Scores.read(folder / "scores.parquet")
    yield f"{'domain':<24}{'samples':>8}{'median loss':>13}{'median utility':>16}{'below zero':>12}"
    for domain in sorted(set(scores.domain)):
        mask = scores.domain == domain
        utility, loss = scores.utility[mask], scores.loss[mask]
        median = f"{np.nanmedian(loss):.3f}" if np.isfinite(loss).any() else "-"
        yield (f"{domain:<24}{mask.sum():>8}{median:>13}{np.nanmedian(utility):>16.4f}{np.mean(utility < 0):>12.0%}")
    if agreement := scores.metadata.get("agreement_with_exact"):
        low, high = agreement["interval"]
        yield (
            f"{scores.metadata['method']} agrees with exact utility by Spearman {agreement['spearman']:.2f} "
            f"[{low:.2f}, {high:.2f}] on {agreement['probes']} probes"
        )
    follows_length = length_correlation(scores) if scores.is_signed else 0.0
    if abs(follows_length) > FOLLOWS_LENGTH:
        yield (
            f"warning: utility follows the length of answers (rank correlation {follows_length:.2f}), so ranking by "
            "it is partly a choice of length; score.length_normalised: true ranks answers of like length against each "
            "other"
        )


def _select(folder: Path) -> Iterator[str]:
    from datalloy.selection import Selection

    selection = Selection.read(folder / "selection.parquet")
    arm = selection.metadata["arm"]
    yield f"chosen: {arm['scorer']}, fraction {arm['fraction']:g}, ranked within {arm['within']}"
    bakeoff = selection.metadata["bakeoff"]
    for margin in [*bakeoff["margins"], bakeoff["over_base"]] if bakeoff else ():
        low, high = margin["interval"]
        yield f"  on the targets better than {margin['over']} by {margin['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
    for reason, count in selection.count_reasons().items():
        yield f"  {reason:<16} {count:>8}"
    if bakeoff and bakeoff.get("caution"):
        yield f"warning: {bakeoff['caution']}"
    if bakeoff and bakeoff["over_base"]["interval"][1] < 0:
        yield (
            "warning: every way to train on this pool makes the targets worse than the untrained base; mend the "
            "samples that the report shows as most harmful, or do not train on this pool"
        )


def _mix(folder: Path) -> Iterator[str]:
    found = json.loads((folder / "units" / "mixture--search.json").read_text())["data"]
    yield f"{'domain':<24}{'share':>8}"
    for name, share in found["weights"].items():
        yield f"{name:<24}{share:>8.1%}"
    for row in found["stability"]:
        yield (
            f"experts at {row['fraction']:.0%} of their training: {row['moved']:.0%} of the samples would be others, "
            f"rank agreement of the slopes' surfaces {correlation_in_words(row['spearman'])}"
        )
    mixmin = found["mixmin"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in mixmin["weights"].items() if share >= 0.005)
    yield f"cross-check without merging (MixMin): {shares}; {mixmin['apart']:.0%} of the samples would be others"
    yield from _mergeability(folder)
    yield "no mixture was trained yet: `datalloy verify` says how far this is to be trusted"


def _mergeability(folder: Path) -> Iterator[str]:
    for warning in json.loads((folder / "mixture" / "mergeability.json").read_text())["warnings"]:
        yield f"warning: {warning['found']}: {warning['means']}; {warning['advice']}"


def _verify(folder: Path) -> Iterator[str]:
    mixture = json.loads((folder / "mixture" / "mixture.json").read_text())
    yield from _shares_and_gains(mixture)
    spent = mixture["spent"]
    yield f"merged against trained: {_agreement(mixture)}"
    yield (
        f"spent: {spent['runs']} real runs, {spent['evaluations']} evaluations and {spent['slope_calls']} slopes of "
        "merged models"
    )
    yield from _mergeability(folder)
    yield f"verdict: {mixture['verdict']}. {mixture['reason']}"
    if mixture["verdict"] == "deploy the merge":
        experts = " ".join(
            f"{folder / 'experts' / name}={share:.6g}" for name, share in mixture["searched"].items() if share
        )
        yield f"the merge is in {folder / 'mixture' / 'merge'}; also: datalloy merge {experts} --out DIR"


def _tell(folder: Path) -> Iterator[str]:
    mixture = json.loads((folder / "mixture" / "mixture.json").read_text())
    yield from _shares_and_gains(mixture)
    spent = mixture["spent"]
    if spent["evaluations"]:
        yield f"merged against trained: {_agreement(mixture)}"
    else:
        yield f"each trained mixture as the others predict it: {_agreement(mixture)}"
    yield f"told: {spent['runs']} trained and {spent['evaluations']} merged mixtures"
    yield f"verdict: {mixture['verdict']}. {mixture['reason']}"


def _shares_and_gains(mixture: dict[str, Any]) -> Iterator[str]:
    yield f"{'domain':<24}{'searched':>10}{'interval':>16}{'to train on':>13}"
    for name, share in mixture["searched"].items():
        low, high = mixture["interval"][name]
        yield f"{name:<24}{share:>10.1%}{f'{low:.0%} to {high:.0%}':>16}{mixture['weights'][name]:>13.1%}"
    for other in ("uniform", "size_proportional"):
        gain = mixture[f"expected_gain_vs_{other}"]
        low, high = gain["interval"]
        told = f"{gain['mean']:+.4f} [{low:+.4f}, {high:+.4f}] ({gain['source']})"
        yield f"gain over {other.replace('_', ' ')} shares: {told}"


def _agreement(mixture: dict[str, Any]) -> str:
    agreement = mixture["agreement"]["spearman"]
    low, high = agreement["interval"]
    value = correlation_in_words(agreement["value"])
    return f"Spearman {value} [{low:.2f}, {high:.2f}] over {agreement['mixtures']} mixtures"


def _train(folder: Path) -> Iterator[str]:
    facts = json.loads((folder / "units" / "model.json").read_text())["data"]
    yield (
        f"trained on {facts['kept']} samples for {facts['steps']} steps ({facts['samples_seen']} samples seen, "
        f"{facts['seconds']:.0f} s); loss {facts['losses'][0]:.3f} -> {facts['losses'][-1]:.3f}"
    )


def _evaluate(folder: Path) -> Iterator[str]:
    metrics = json.loads((folder / "metrics.json").read_text())
    labels = {"base": "base", "model": "tuned", "uniform": "uniform shares", "merge": "merge"}
    shown = {name: label for name, label in labels.items() if name in metrics}
    yield f"{'set':<24}{'metric':<18}{'items':>6}  " + "".join(f"{label:<24}" for label in shown.values())
    for name, before in metrics["base"].items():
        means = "".join(f"{_mean(metrics[model][name]):<24}" for model in shown)
        yield f"{name:<24}{before['metric']:<18}{before['items']:>6}  {means}"


def _export(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "units").glob("export*.json")):
        record = json.loads(path.read_text())
        files = sorted(record["files"])
        more = f" and {len(files) - LISTED_FILES} more" if len(files) > LISTED_FILES else ""
        yield f"{path.stem}: {record['data']['samples']} samples in {', '.join(files[:LISTED_FILES])}{more}"


def _run(folder: Path) -> Iterator[str]:
    for file, about in (
        ("check.json", _check),
        ("scores.parquet", _score),
        ("selection.parquet", _select),
        ("mixture/mixture.json", _verify),
        ("model", _train),
        ("metrics.json", _evaluate),
        ("export", _export),
    ):
        if (folder / file).exists():
            yield from about(folder)
            yield ""


def _mean(row: dict) -> str:
    return f"{row['mean']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"

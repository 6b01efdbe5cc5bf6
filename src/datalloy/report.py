"""A finished run folder in, one self-contained page out.

No script, no remote asset: it opens offline and can be mailed. Every text that comes from data is escaped, and
pictures are decoded and encoded again, so that nothing of a hostile file reaches the page but its pixels.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datalloy import mixture_page, readers
from datalloy.config import Recipe, load_recipe
from datalloy.run import write_atomically
from datalloy.sample import Sample, open_image
from datalloy.scores import Scores
from datalloy.selection import Selection

SHOWN = 8  # samples in each gallery
THUMBNAIL = 160  # pixels
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --good: #6fd39b; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.lead { font-size: 1.15rem; } .note { opacity: .75; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; background: var(--soft);
  overflow-wrap: anywhere; }
.card img { width: 100%; max-width: 10rem; image-rendering: auto; border-radius: .3rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { overflow-x: auto; background: var(--soft); padding: .7rem; }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder whose chain is complete; returns its path."""
    recipe = load_recipe(folder / "config.yaml")
    status = json.loads((folder / "status.json").read_text())
    is_selected, mixture = (folder / "selection.parquet").exists(), status.get("mixture")
    leads, parts = [], []
    if is_selected:
        scores, selection = Scores.read(folder / "scores.parquet"), Selection.read(folder / "selection.parquet")
        leads.append(_recommendation(selection, len(scores)))
        parts = _selection_sections(scores, selection, _samples(recipe))
    if mixture:
        leads.append(mixture_page.lead(mixture))
        parts = [*(_section(*section) for section in mixture_page.sections(folder)), *parts]
    body = [
        f"<h1>{_text(recipe.name)}</h1>",
        *(f'<p class="lead">{lead}</p>' for lead in leads),
        _cost_note(folder),
        _section(
            "Did it help?", _metrics(status["metrics"]), "Intervals are bootstraps over items of one training run."
        ),
        *parts,
        _section("Rejected", _rejected(status["counts"])),
        _section(
            "What to run next",
            f"<pre>datalloy export {_text(str(folder / 'config.yaml'))} --run {_text(str(folder))}</pre>",
        ),
        _section("Provenance", _provenance(folder)),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{_text(recipe.name)}: what to train on</title><style>{STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def _selection_sections(scores: Scores, selection: Selection, samples: dict[tuple[str, str], Sample]) -> list[str]:
    return [
        _section("How the choice of samples was made", _bakeoff(selection.metadata.get("bakeoff"))),
        _section("What is kept, by domain", _by_domain(scores, selection)),
        _section("How far the scores can be trusted", _trust(scores.metadata)),
        _section("Most useful", _gallery(scores, selection, samples, best=True)),
        _section("Most harmful", _gallery(scores, selection, samples, best=False)),
    ]


def _recommendation(selection: Selection, pool: int) -> str:
    arm, outcome = selection.metadata["arm"], selection.metadata.get("bakeoff")
    kept = int(selection.kept.sum())
    what = "the whole pool" if arm["scorer"] == "full" else f"{kept} of {pool} samples"
    how = {"full": "", "random": ", drawn at random"}.get(
        arm["scorer"], f", ranked by {arm['scorer']} ({arm['within']})"
    )
    sentence = f"Train on {_text(what)}{_text(how)}."
    over_full = next((m for m in (outcome or {}).get("margins", []) if m["over"] == "full"), None)
    if over_full:
        low, high = over_full["interval"]
        sure = "above zero" if low > 0 else "which does not rule out that keeping everything is as good"
        sentence += (
            f" In short runs at equal compute the targets came out {over_full['mean']:.3f} better than with the full "
            f"pool (95 % interval {low:.3f} to {high:.3f}), {sure}."
        )
    if outcome and outcome["over_base"]["interval"][1] < 0:
        low, high = outcome["over_base"]["interval"]
        sentence += (
            " But the base without any training is better still: against it they lost "
            f"{-outcome['over_base']['mean']:.3f} (95 % interval {-high:.3f} to {-low:.3f}). "
            "Consider not to train on this pool."
        )
    return sentence


def _cost_note(folder: Path) -> str:
    units = [json.loads(p.read_text())["data"] for p in sorted((folder / "units").glob("*.json"))]
    seconds = sum(u.get("seconds", 0.0) for u in units)
    where = _text(str(folder))
    return f'<p class="note">Training took {seconds:.0f} s in all. Every figure comes from this folder: {where}</p>'


def _metrics(metrics: dict[str, Any]) -> str:
    labels = {"base": "base", "model": "trained as advised", "uniform": "trained on uniform shares", "merge": "merge"}
    shown = [name for name in labels if name in metrics]
    rows = [
        [name, before["metric"], str(before["items"]), *(_mean(metrics[model][name]) for model in shown)]
        for name, before in metrics["base"].items()
    ]
    head = ["set", "metric", "items", *(labels[name] for name in shown)]
    return _table(head, rows, numeric=range(2, len(head)))


def _bakeoff(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "<p>The recipe fixed the score and the fraction; nothing was compared.</p>"
    rows = [
        [_arm_name(r["arm"]), str(r["round"]), str(r["steps"]), f"{r['value']:.4f}"]
        for r in sorted(outcome["results"], key=lambda r: (-r["round"], -r["value"]))
    ]
    return (
        "<p>Every way to select was trained for a few steps at equal compute and judged on target items: by the "
        "probability of the right answer, or where the target's metric is the loss by that, negated. "
        f"{outcome['steps_spent']} training steps were spent.</p>"
        + _table(["selection", "round", "steps", "value on the targets"], rows, numeric=(1, 2, 3))
    )


def _arm_name(arm: dict[str, Any]) -> str:
    return "full pool" if arm["scorer"] == "full" else f"{arm['scorer']}, {arm['fraction']:.0%}, {arm['within']}"


def _by_domain(scores: Scores, selection: Selection) -> str:
    rows = []
    kept_keys = set(zip(*selection.kept_keys(), strict=True))
    for domain in sorted(set(scores.domain)):
        mask = scores.domain == domain
        kept = sum((domain, sample_id) in kept_keys for sample_id in scores.id[mask])
        utility = scores.utility[mask]
        negative = float(np.nanmean(utility < 0))
        rows.append([domain, str(int(mask.sum())), str(kept), f"{np.nanmedian(utility):.4f}", f"{negative:.0%}"])
    head = ["domain", "samples", "kept", "median utility", "utility below zero"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in selection.count_reasons().items())
    return _table(head, rows, numeric=(1, 2, 3, 4)) + f'<p class="note">{_text(reasons)}</p>'


def _trust(metadata: dict[str, Any]) -> str:
    if "agreement_with_exact" not in metadata:
        return "<p>Only losses were measured; there is no utility to check.</p>"
    agreement = metadata["agreement_with_exact"]
    low, high = agreement["interval"]
    lead = (
        f"<p>Scores by <b>{_text(metadata['method'])}</b> at step {metadata['step']:.3g} agree with exact utility by "
        f"Spearman {agreement['spearman']:.2f} (95 % interval {low:.2f} to {high:.2f}, {agreement['probes']} probes). "
        f"Rounding moves a utility by {metadata['noise_floor']:.1e} nats.</p>"
    )
    rows = [
        [
            name,
            f"{row['step']:.3g}",
            f"{row['negative_fraction']:.0%}",
            f"{row['median_utility']:.4f}",
            f"{row['half_agreement']:.2f}",
        ]
        for name, scan in metadata["step_scans"].items()
        for row in scan["rows"]
    ]
    head = ["step of", "size", "utility below zero", "median utility", "agreement of target halves"]
    return lead + _table(head, rows, numeric=(1, 2, 3, 4))


def _gallery(scores: Scores, selection: Selection, samples: dict[tuple[str, str], Sample], *, best: bool) -> str:
    utility = np.where(np.isnan(scores.utility), -np.inf if best else np.inf, scores.utility)
    order = np.argsort(-utility if best else utility, kind="stable")[:SHOWN]
    kept = set(zip(*selection.kept_keys(), strict=True))
    cards = []
    for i in order:
        key = (scores.domain[i], scores.id[i])
        sample = samples[key]
        kind = "good" if scores.utility[i] > 0 else "bad"
        pictures = "".join(
            f'<img alt="picture of the sample" src="{_thumbnail(image)}">' for image in sample.images[:2]
        )
        question = " ".join(turn.text for turn in sample.turns if turn.role == "user")
        cards.append(
            f'<div class="card">{pictures}<div>{_text(question[:300])}</div>'
            f"<div><b>{_text(sample.answer[:200])}</b></div>"
            f'<div class="{kind}">utility {scores.utility[i]:+.4f}</div>'
            f'<div class="note">{_text(key[0])} / {_text(key[1])}, {"kept" if key in kept else "dropped"}</div></div>'
        )
    return f'<div class="gallery">{"".join(cards)}</div>'


def _thumbnail(image: Any) -> str:
    picture = open_image(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _rejected(counts: dict[str, Any]) -> str:
    if not counts["rejected"]:
        return "<p>No record was rejected.</p>"
    return _table(["reason", "records"], [[k, str(v)] for k, v in counts["rejected_by_reason"].items()], numeric=(1,))


def _provenance(folder: Path) -> str:
    record = json.loads((folder / "provenance.json").read_text())
    rows = [[key, str(record[key])] for key in ("fingerprint", "started", "python", "platform", "cores")]
    rows += [[name, version] for name, version in record["parts"]["libraries"].items()]
    return _table(["what", "value"], rows)


def _samples(recipe: Recipe) -> dict[tuple[str, str], Sample]:
    read = (s for name, source in recipe.domains.items() for s in readers.read_all(source, name)[0])
    return {(s.domain, s.id): s for s in read}


def _mean(row: dict[str, Any]) -> str:
    return f"{row['mean']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]"


def _section(title: str, content: str, note: str = "") -> str:
    return f"<h2>{_text(title)}</h2>{content}" + (f'<p class="note">{_text(note)}</p>' if note else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    kind = [' class="n"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f"<th{kind[i]}>{_text(cell)}</th>" for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind[i]}>{_text(c)}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: str) -> str:
    return html.escape(value, quote=True)

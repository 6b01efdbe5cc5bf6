"""What a run found about its mixture in, the parts of the report that show it out: tables and pictures, no script.

Pictures are drawn as SVG into the page: bars for the shares, for three domains the triangle with every candidate and
every real run, and merged against trained values. Everything comes from the run folder.
"""

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.mixture import read_candidates
from datalloy.uncertainty import correlation_in_words

WIDTH, HEIGHT = 340, 300  # of a picture, in pixels
CORNERS = np.array([[20.0, 270.0], [320.0, 270.0], [170.0, 20.0]])  # of the triangle
PALE, DEEP = np.array([222, 235, 247]), np.array([8, 69, 148])  # from low to high values


def lead(mixture: dict[str, Any]) -> str:
    """The recommendation in one sentence."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in _by_share(mixture["weights"]) if share >= 0.005)
    return f"Mix the domains as {html.escape(shares)}: {html.escape(mixture['reason'])}"


def sections(folder: Path) -> Iterator[tuple[str, str]]:
    """Titles and contents: the shares, where they came from, and how far to trust them."""
    mixture = json.loads((folder / "mixture" / "mixture.json").read_text())
    yield "The mixture", _shares(mixture)
    yield "How the mixture was found", _search(folder, mixture)
    yield "How far the mixture can be trusted", _trust(folder, mixture)


def _by_share(weights: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(weights.items(), key=lambda item: -item[1])


def _shares(mixture: dict[str, Any]) -> str:
    rows = []
    for name, share in _by_share(mixture["searched"]):
        low, high = mixture["interval"][name]
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td>{_bar(share, low, high)}</td><td class='n'>{share:.1%}</td>"
            f"<td class='n'>{low:.0%} to {high:.0%}</td><td class='n'>{mixture['weights'][name]:.1%}</td></tr>"
        )
    titles = ("found", "as good", "to train on")
    head = "<tr><th>domain</th><th></th>" + "".join(f"<th class='n'>{title}</th>" for title in titles) + "</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _bar(share: float, low: float, high: float) -> str:
    return (
        f'<svg width="160" height="16" role="img" aria-label="{share:.0%}, between {low:.0%} and {high:.0%}">'
        f'<rect x="0" y="3" width="{160 * share:.1f}" height="10" fill="#4a90d9"/>'
        f'<line x1="{160 * low:.1f}" x2="{160 * high:.1f}" y1="8" y2="8" stroke="currentColor" stroke-width="2"/></svg>'
    )


def _search(folder: Path, mixture: dict[str, Any]) -> str:
    names, targets, rows = read_candidates(folder / "mixture" / "candidates.parquet")
    spent = mixture["spent"]
    text = (
        f"<p>{len(names)} experts were trained, one a domain. Their merges stood in for mixtures: "
        f"{spent['slope_calls']} times the slopes in all weights, {spent['evaluations']} evaluations, none "
        f"of them written to disk. {spent['runs']} mixtures were then really trained.</p>"
    )
    score_N = np.array([row.value_G.mean() for row in rows])
    weight_NK = np.array([row.weight_K for row in rows])
    best = np.argsort(-score_N, kind="stable")[:10]
    head = "".join(f"<th class='n'>{html.escape(name)}</th>" for name in names)
    values = "".join(f"<th class='n'>{html.escape(name)}</th>" for name in targets)
    body = "".join(
        f"<tr><td>{html.escape(rows[i].stage)}</td>"
        + "".join(f"<td class='n'>{share:.0%}</td>" for share in weight_NK[i])
        + "".join(f"<td class='n'>{value:.4f}</td>" for value in rows[i].value_G)
        + "</tr>"
        for i in best
    )
    table = (
        '<div class="scroll"><table><thead><tr><th>stage</th>'
        f"{head}{values}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="note">The {len(best)} best of {len(rows)} merged candidates: shares, then values by target, higher '
        "is better (a loss is negated).</p>"
    )
    pick_K = np.array([mixture["searched"][name] for name in names])
    picture = _triangle(names, weight_NK, score_N, pick_K) if len(names) == 3 else ""
    return text + picture + table


def _triangle(names: Sequence[str], weight_NK: np.ndarray, score_N: np.ndarray, pick_K: np.ndarray) -> str:
    place_N2 = weight_NK @ CORNERS
    low, spread = float(score_N.min()), float(np.ptp(score_N)) or 1.0
    points = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_colour((score - low) / spread)}" stroke="#888"/>'
        for (x, y), score in zip(place_N2, score_N, strict=True)
    )
    px, py = pick_K @ CORNERS
    corners = " ".join(f"{x:.0f},{y:.0f}" for x, y in CORNERS)
    anchors = ("start", "end", "middle")
    labels = "".join(
        f'<text x="{x:.0f}" y="{y + (18 if y > 100 else -6):.0f}" text-anchor="{anchor}" fill="currentColor">'
        f"{html.escape(name)}</text>"
        for name, (x, y), anchor in zip(names, CORNERS, anchors, strict=True)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" style="max-width:100%" role="img" '
        'aria-label="Merged candidates on the simplex of three domains, darker is better; the ring is the pick">'
        f'<polygon points="{corners}" fill="none" stroke="#888"/>{points}'
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="10" fill="none" stroke="#b3261e" stroke-width="3"/>{labels}</svg>'
        '<p class="note">Each corner is one domain alone; darker is better; the ring is what was found.</p>'
    )


def _colour(height: float) -> str:
    red, green, blue = (PALE + height * (DEEP - PALE)).astype(int)
    return f"rgb({red},{green},{blue})"


def _trust(folder: Path, mixture: dict[str, Any]) -> str:
    lines = []
    for other in ("uniform", "size_proportional"):
        gain = mixture[f"expected_gain_vs_{other}"]
        low, high = gain["interval"]
        told = f"{gain['mean']:+.4f} [{low:+.4f}, {high:+.4f}], {gain['source']}"
        lines.append(f"gain over {other.replace('_', ' ')} shares {told}")
    for kind in ("spearman", "spearman_without_vertices"):
        found = mixture["agreement"][kind]
        low, high = found["interval"]
        value = correlation_in_words(found["value"])
        told = "without the experts themselves" if kind.endswith("vertices") else "experts included"
        lines.append(
            f"merged against really trained: rank agreement {value} [{low:.2f}, {high:.2f}] over "
            f"{found['mixtures']} mixtures, {told}"
        )
    diagnosis = json.loads((folder / "mixture" / "mergeability.json").read_text())
    for finding in (*diagnosis["warnings"], *diagnosis["notes"]):
        lines.append(f"{finding['found']}: {finding['means']}; {finding['advice']}")
    search = json.loads((folder / "units" / "mixture--search.json").read_text())["data"]
    mixmin = search["mixmin"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in _by_share(mixmin["weights"]) if share >= 0.005)
    lines.append(f"MixMin, which merges nothing, would exchange {mixmin['apart']:.0%} of the samples ({shares})")
    for row in search["stability"]:
        if row["fraction"] < 1:
            lines.append(
                f"experts at {row['fraction']:.0%} of their training would move {row['moved']:.0%} of the samples; "
                f"rank agreement of the slopes' surfaces {correlation_in_words(row['spearman'])}"
            )
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"

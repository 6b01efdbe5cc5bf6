"""Numbers in, SVG out: small charts drawn by hand into the page, a few kilobytes each.

Colours are classes of the page's style, so that a chart follows the light and the dark scheme. A mark carries a
`<title>`, which the browser shows where it is pointed at. Charts in rows are laid out in percent of their width and
the others at one fixed size no wider than a phone, so that their words stay readable at every width. All words are
escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datalloy.report.markup import MINUS, Interval, text

WIDTH = 330  # of a chart of fixed size, in pixels: fits a phone
STEPS = 9  # of the colour scale, classes s0 to s8
CORNERS = np.array([[22.0, 262.0], [308.0, 262.0], [165.0, 22.0]])  # of the triangle


@dataclass(frozen=True)
class Span:
    """The values that an axis shows, from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], *, include: float | None = None) -> "Span":
        """A little wider than the finite values; `include` is inside."""
        inside = [v for v in [*values, *([] if include is None else [include])] if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(inside), max(inside)
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(low - margin, high + margin)

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high end."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 4) -> list[float]:
        """About so many round values inside."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) + 0.0 for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def figure(title: str, content: str, caption: str = "") -> str:
    """A chart with its title above and what to read off it below; `caption` is markup."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><figcaption>{text(title)}</figcaption>{content}{below}</figure>"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Pairs of the class of a mark and what it stands for."""
    items = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true"><circle cx="7" cy="7" r="5" class="{kind}"/></svg>'
        f"{text(word)}</li>"
        for kind, word in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(width: float, height: float, label: str, content: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{text(label)}">{content}</svg>'
    )


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)


# --- rows: one estimate a row, all on one axis ----------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """One row: a value with its interval. `words` stand beside it; `kind` "other" is drawn paler."""

    label: str
    value: float
    interval: Interval
    words: str
    kind: str = ""


def strips(rows: Sequence[Strip], *, zero: float | None = None, span: Span | None = None) -> str:
    """Estimates with their intervals below each other on one axis, with a dashed line at `zero`."""
    ends = [end for row in rows for end in (row.value, *row.interval)]
    span = span or Span.around(ends, include=zero)
    line = "" if zero is None else _rule(span, zero, "zero")
    drawn = "".join(_strip(row, span, line) for row in rows)
    ticks = "".join(
        f'<text x="{100 * span.share(tick):.2f}%" y="14" text-anchor="middle">{_tick(tick)}</text>'
        for tick in span.ticks()
    )
    axis = f'<div class="row axis"><span></span><svg aria-hidden="true">{ticks}</svg><span></span></div>'
    return f'<div class="strips">{drawn}{axis}</div>'


def _strip(row: Strip, span: Span, line: str) -> str:
    low, mid, high = (100 * min(max(span.share(v), 0), 1) for v in (row.interval[0], row.value, row.interval[1]))
    return (
        f'<div class="row"><span class="label">{text(row.label)}</span>'
        f'<svg role="img" aria-label="{text(row.label)}: {text(row.words)}">{line}'
        f'<line class="range {row.kind}" x1="{low:.2f}%" x2="{high:.2f}%" y1="10" y2="10"/>'
        f'<circle class="dot {row.kind}" cx="{mid:.2f}%" cy="10" r="5.5"/></svg>'
        f'<span class="value">{text(row.words)}</span></div>'
    )


def _rule(span: Span, at: float, kind: str) -> str:
    x = 100 * span.share(at)
    return f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="20"/>'


def stacked(parts: Sequence[tuple[str, str, float]], whole: float, label: str) -> str:
    """One bar of `whole`: its parts as class, word and size, side by side."""
    drawn, start = [], 0.0
    for kind, word, size in parts:
        share = 100 * size / whole if whole else 0.0
        if share:
            tip = f"<title>{text(word)}: {size:g}</title>"
            drawn.append(
                f'<rect class="mark {kind}" x="{start:.2f}%" width="{share:.2f}%" y="3" height="14">{tip}</rect>'
            )
        start += share
    return f'<svg role="img" aria-label="{text(label)}">{"".join(drawn)}</svg>'


def bars(rows: Sequence[tuple[str, str, str]]) -> str:
    """Rows of a label, a drawn bar and words."""
    return (
        '<div class="strips">'
        + "".join(
            f'<div class="row"><span class="label">{text(label)}</span>{bar}'
            f'<span class="value">{text(words)}</span></div>'
            for label, bar, words in rows
        )
        + "</div>"
    )


# --- distributions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warp:
    """An axis that is even near zero and logarithmic far from it, for values with long tails on both sides."""

    unit: float

    @classmethod
    def of(cls, values_N: np.ndarray) -> "Warp":
        """As fine as the smaller half of the values asks for."""
        size = float(np.quantile(np.abs(values_N), 0.25)) if len(values_N) else 0.0
        return cls(10.0 ** math.floor(math.log10(size)) if size else 1e-3)

    def __call__(self, values_N: np.ndarray) -> np.ndarray:
        return np.arcsinh(np.asarray(values_N) / self.unit)

    def ticks(self, low: float, high: float) -> list[float]:
        """Zero and powers of ten, as many as have room."""
        most = max(abs(low), abs(high), self.unit)
        powers = range(round(math.log10(self.unit)) + 1, math.ceil(math.log10(most)) + 1)
        keep = list(powers)[:: max(1, math.ceil(len(powers) / 3))]
        found = [-(10.0**p) for p in keep] + [0.0] + [10.0**p for p in keep]
        return sorted(v for v in found if low <= v <= high)


def histogram(
    groups: Sequence[tuple[str, str, np.ndarray]], *, warp: Warp, ends: tuple[float, float], label: str
) -> str:
    """How the values of several groups are spread, stacked in bins of equal width on a warped axis.

    `groups`: class, word and values of each. Values beyond `ends` are counted in the outermost bins.
    """
    height, base, bins = 130, 106, 36
    low, high = (float(v) for v in warp(np.array(ends)))
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(np.clip(warp(values), low, high), edges)[0] for _, _, values in groups]
    tallest = max(1, int(np.sum(counts, axis=0).max()))
    wide, drawn, below = WIDTH / bins, [], np.zeros(bins)
    for (kind, word, _), count in zip(groups, counts, strict=True):
        for i in np.flatnonzero(count):
            tall = 96 * count[i] / tallest
            left, right = np.sinh(edges[i : i + 2]) * warp.unit
            drawn.append(
                f'<rect class="mark {kind}" x="{i * wide:.1f}" y="{base - below[i] - tall:.1f}" width="{wide - 1:.1f}" '
                f'height="{tall:.1f}"><title>{count[i]} {text(word)}, {left:.3g} to {right:.3g}</title></rect>'
            )
        below += 96 * count / tallest
    axis = Span(low, high)
    ticks = "".join(
        f'<line class="axisline" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
        f'<text x="{min(max(x, 12), WIDTH - 12):.1f}" y="{base + 18}" text-anchor="middle">{_tick(tick)}</text>'
        for tick in warp.ticks(*ends)
        for x in [WIDTH * axis.share(float(warp(np.array(tick))))]
    )
    zero = WIDTH * axis.share(0.0)
    line = f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="6" y2="{base}"/>' if low < 0 < high else ""
    floor = f'<line class="axisline" x1="0" x2="{WIDTH}" y1="{base}" y2="{base}"/>'
    return _svg(WIDTH, height, label, "".join(drawn) + line + floor + ticks)


# --- points and curves ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """A point; `low` and `high` are the ends of its interval upwards, where it has one."""

    x: float
    y: float
    words: str
    kind: str = ""
    low: float | None = None
    high: float | None = None


def scatter(
    dots: Sequence[Dot],
    *,
    x_label: str,
    y_label: str,
    label: str,
    diagonal: bool = False,
    joined: Sequence[int] = (),
    equal: bool = False,
) -> str:
    """Points on two axes.

    `diagonal`: a line where both are equal; `equal`: one scale for both; `joined`: a line through some of the points.
    """
    xs = [dot.x for dot in dots]
    ys = [end for dot in dots for end in (dot.y, dot.low, dot.high) if end is not None]
    across, up = (Span.around([*xs, *ys]),) * 2 if equal else (Span.around(xs), Span.around(ys))
    plane = _Plane(across, up)
    parts = [plane.axes(x_label, y_label)]
    if diagonal:
        low, high = max(across.low, up.low), min(across.high, up.high)
        parts.append(plane.curve([low, high], [low, high], "curve other"))
    if len(joined) > 1:
        parts.append(plane.curve([dots[i].x for i in joined], [dots[i].y for i in joined], "curve"))
    parts += [plane.dot(dot) for dot in dots]
    return _svg(WIDTH, plane.HEIGHT, label, "".join(parts))


def line(
    xs: Sequence[float],
    ys: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    dots: Sequence[Dot],
    *,
    x_label: str,
    y_label: str,
    label: str,
) -> str:
    """A curve with a band around it, and points on it."""
    plane = _Plane(Span(0.0, 1.0), Span.around([*lows, *highs, *(dot.y for dot in dots)]))
    band = " ".join(
        f"{plane.x(x):.1f},{plane.y(y):.1f}"
        for x, y in [*zip(xs, lows, strict=True), *reversed(list(zip(xs, highs, strict=True)))]
    )
    parts = [plane.axes(x_label, y_label), f'<polygon class="band" points="{band}"/>', plane.curve(xs, ys, "curve")]
    parts += [plane.dot(dot) for dot in dots]
    return _svg(WIDTH, plane.HEIGHT, label, "".join(parts))


class _Plane:
    """Two axes of a chart of fixed size."""

    HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 262, 52, 322, 22, 212

    def __init__(self, across: Span, up: Span) -> None:
        self.across, self.up = across, up

    def x(self, value: float) -> float:
        return self.LEFT + (self.RIGHT - self.LEFT) * self.across.share(value)

    def y(self, value: float) -> float:
        return self.BOTTOM - (self.BOTTOM - self.TOP) * self.up.share(value)

    def axes(self, x_label: str, y_label: str) -> str:
        parts = [f'<text x="0" y="11">{text(y_label)}</text>']
        for tick in self.up.ticks():
            y = self.y(tick)
            parts.append(f'<line class="gridline" x1="{self.LEFT}" x2="{self.RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
        for tick in self.across.ticks():
            x = self.x(tick)
            parts.append(f'<line class="gridline" x1="{x:.1f}" x2="{x:.1f}" y1="{self.TOP}" y2="{self.BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{self.BOTTOM + 17}" text-anchor="middle">{_tick(tick)}</text>')
        middle = (self.LEFT + self.RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{self.HEIGHT - 10}" text-anchor="middle">{text(x_label)}</text>')
        return "".join(parts)

    def curve(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
        points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    def dot(self, dot: Dot) -> str:
        x, y, radius = self.x(dot.x), self.y(dot.y), 3 if dot.kind == "small" else 5.5
        bar = ""
        if dot.low is not None and dot.high is not None:
            ends = f'y1="{self.y(dot.low):.1f}" y2="{self.y(dot.high):.1f}"'
            bar = f'<line class="error" x1="{x:.1f}" x2="{x:.1f}" {ends}/>'
        return (
            f'{bar}<circle class="mark dot {dot.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{text(dot.words)}</title></circle>"
        )


# --- the triangle of three domains ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A mixture on the triangle. `kind` is the class of its dot; "ring" is drawn around what is there."""

    weight_K: Sequence[float]
    words: str
    kind: str


def triangle(
    names: Sequence[str],
    weight_NK: np.ndarray,
    height_N: np.ndarray,
    marks: Sequence[Mark],
    *,
    words: Sequence[str],
    label: str,
) -> str:
    """A surface over all mixtures of three domains, given on a lattice; darker (in the dark scheme: lighter) is higher.

    `words` say what each lattice point stands for.
    """
    low, spread = float(height_N.min()), float(np.ptp(height_N)) or 1.0
    steps = round(1 / min(w for w in weight_NK.ravel() if w > 0))
    at = {tuple(np.rint(weight_K * steps).astype(int)): n for n, weight_K in enumerate(weight_NK)}
    cells = []
    for (a, b, c), n in at.items():
        for corners in (
            ((a, b, c), (a - 1, b + 1, c), (a - 1, b, c + 1)),
            ((a, b, c), (a - 1, b + 1, c), (a, b + 1, c - 1)),
        ):
            if all(corner in at for corner in corners):
                inside = [at[corner] for corner in corners]
                shade = round((STEPS - 1) * (float(height_N[inside].mean()) - low) / spread)
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in weight_NK[inside] @ CORNERS)
                cells.append(
                    f'<polygon class="mark tone s{shade}" points="{points}"><title>{text(words[n])}</title></polygon>'
                )
    outline = " ".join(f"{x:g},{y:g}" for x, y in CORNERS)
    drawn = "".join(cells) + f'<polygon class="axisline" points="{outline}"/>'
    drawn += "".join(_on_triangle(mark) for mark in marks)
    places = ((0, 284, "start"), (WIDTH, 284, "end"), (165, 13, "middle"))
    drawn += "".join(
        f'<text class="strong" x="{x}" y="{y}" text-anchor="{anchor}">{text(name, 22)}</text>'
        for name, (x, y, anchor) in zip(names, places, strict=True)
    )
    return _svg(WIDTH, 290, label, drawn)


def _on_triangle(mark: Mark) -> str:
    x, y = np.asarray(mark.weight_K) @ CORNERS
    radius = {"ring": 10, "dot small": 3}.get(mark.kind, 6)
    title = f"<title>{text(mark.words)}</title>"
    return f'<circle class="mark {mark.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>'


def scale(low: str, high: str) -> str:
    """The colour scale of a surface with its ends in words."""
    steps = "".join(f'<rect class="tone s{i}" x="{80 + i * 18}" y="2" width="18" height="12"/>' for i in range(STEPS))
    ends = f'<text x="74" y="13" text-anchor="end">{text(low)}</text><text x="248" y="13">{text(high)}</text>'
    return _svg(WIDTH, 18, f"colours from {low} to {high}", steps + ends)

"""Samples to look at, with their pictures: the most useful, the most harmful, the most disputed.

A picture is decoded and its pixels are encoded again, without profiles, comments or trailing bytes, so that nothing of
a hostile file reaches the page but what can be seen; upright, as the model was given it. A picture that cannot be read
any more is said to be missing. Which target items a sample helps or harms is shown where it was measured: on the
probes, and on every sample where `score.contributions` kept it.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from datalloy.report.facts import ItemFalls, Key, RunFacts
from datalloy.report.markup import chip, number, paragraph, percent, quoted, signed, text
from datalloy.report.page import Section
from datalloy.report.wording import reason_in_words
from datalloy.sample import ImageRef, Sample, open_image
from datalloy.scores import Scores

SHOWN = 6  # samples in a group
PICTURES = 2  # of one sample
ITEMS = 2  # target items helped, and as many harmed
THUMBNAIL, ITEM_THUMBNAIL = 160, 64  # pixels
DRAWN = 128  # a picture of fewer pixels a side is enlarged with its edges kept
LOSSLESS_BYTES = 12_000  # a larger PNG thumbnail is a photograph, and stored as JPEG
EXTREME = 0.1  # share of a domain whose losses are called high or low


@dataclass(frozen=True)
class Group:
    """Samples under one heading, by row of the scores."""

    title: str
    about: str
    rows: Sequence[int]


def section(facts: RunFacts) -> Section:
    scores = facts.scores
    groups = [group for group in _groups(facts, scores) if group.rows]
    keys = [(scores.domain[row], scores.id[row]) for group in groups for row in group.rows]
    cards = _Cards(facts, scores, facts.samples(keys))
    body = "".join(
        f"<h3>{text(group.title)}</h3>{paragraph(text(group.about), 'note')}"
        f'<div class="gallery">{"".join(map(cards.draw, group.rows))}</div>'
        for group in groups
    )
    toxic = int(facts.toxic_N.sum())
    takeaway = (
        f"{toxic:,} of {len(scores):,} samples are toxic: they harm the targets beyond their own interval."
        if toxic
        else "No sample is toxic, that is, harms the targets beyond its own interval; these are the extremes."
    )
    return Section("samples", "Samples to look at", takeaway, body)


def worst(facts: RunFacts, count: int) -> str:
    """The first of the samples that are worst, small: for a glance."""
    scores = facts.scores
    groups = {group.title: group for group in _groups(facts, scores)}
    title = next(name for name in ("Left out first", "Most harmful", "Highest loss", "Rated lowest") if name in groups)
    rows = groups[title].rows[:count]
    samples = facts.samples([(scores.domain[row], scores.id[row]) for row in rows])
    shown = [(row, samples.get((scores.domain[row], scores.id[row]))) for row in rows]
    word, value_N = ("utility", scores.utility) if title == "Most harmful" else ("loss", scores.loss)
    drawn = "".join(_glance(sample, f"{word} {number(value_N[row])}") for row, sample in shown if sample is not None)
    return paragraph(text(groups[title].about)) + f'<ul class="glance">{drawn}</ul>'


def _glance(sample: Sample, measured: str) -> str:
    picture = _picture(sample.images[0], ITEM_THUMBNAIL, f"picture of sample {sample.id}") if sample.images else ""
    words = f"{quoted(_question(sample), 70)} <b>{quoted(sample.answer, 40)}</b>"
    return f'<li>{picture}<span>{words} <span class="note">{text(measured)}</span></span></li>'


# --- which samples ---------------------------------------------------------------------------------------------------


def _groups(facts: RunFacts, scores: Scores) -> list[Group]:
    rows = np.flatnonzero(scores.is_ok)
    if not scores.is_signed:
        return _rated(scores, rows)
    order = rows[np.argsort(-scores.utility[rows], kind="stable")]
    guessed_N = scores.utility > _largest_measured(facts, scores)
    useful = order[~guessed_N[order]]
    about = "One training step on each of these helps the targets most."
    if guessed_N.any():
        about += (
            f" {int(guessed_N.sum()):,} samples with a higher score are not shown: it is beyond anything that was "
            "measured on the probes, so there the scorer guesses."
        )
    groups = [
        *_decided_otherwise(facts, scores),
        Group(
            "Most harmful", "One training step on each of these spoils the targets most.", order[::-1][:SHOWN].tolist()
        ),
        Group("Most useful", about, useful[:SHOWN].tolist()),
        _disputed(facts, scores, rows),
    ]
    if facts.contributions is None and facts.probes is not None:
        groups.append(_measured_exactly(facts.probes, scores))
    return groups


def _rated(scores: Scores, rows: np.ndarray) -> list[Group]:
    """The ends of a ranking that knows nothing of the targets."""
    method = scores.metadata["method"]
    rating_N, titles = scores.utility, ("Rated highest", "Rated lowest")
    about = f"Rated by {method.replace('_', ' ')}: what the samples do to the targets was not measured."
    if method == "loss":
        rating_N, titles = -scores.loss, ("Lowest loss", "Highest loss")
        about = "Only losses were measured: what the samples do to the targets is not known."
    order = rows[np.argsort(-rating_N[rows], kind="stable")]
    ends = (order[:SHOWN].tolist(), order[::-1][:SHOWN].tolist())
    return [Group(title, about, end) for title, end in zip(titles, ends, strict=True)]


def _largest_measured(facts: RunFacts, scores: Scores) -> float:
    """The largest utility of a probe where the scores are a regression on them; no limit where each was measured."""
    if scores.metadata["method"] != "calibrated" or facts.probes is None:
        return np.inf
    return float(facts.probes.utility_N.max())


def _decided_otherwise(facts: RunFacts, scores: Scores) -> Iterator[Group]:
    """Where another ranking than the utilities decided what is kept: the samples that it puts last."""
    arm, selection = facts.arm, facts.selection
    if arm["scorer"] in (scores.metadata["method"], "full", "random"):
        return
    size = {domain: int((scores.domain == domain).sum()) for domain in set(scores.domain)}
    place_N = np.array([rank / size[domain] for rank, domain in zip(selection.rank, scores.domain, strict=True)])
    last = np.lexsort([-selection.rank, -place_N])
    about = (
        f"What is kept was decided by {arm['scorer'].replace('_', ' ')}, which did better than utility in the short "
        "runs. These come last in that ranking."
    )
    yield Group("Left out first", about, [int(row) for row in last[:SHOWN]])


def _disputed(facts: RunFacts, scores: Scores, rows: np.ndarray) -> Group:
    opinions = list(scores.utility_by_target.values())
    about = "Best for one target and worst for another: what they are worth depends on what you want."
    if len(opinions) < 2:
        opinions = [table.utility for table in facts.tables.values() if len(table) == len(scores)]
        opinions.append(-scores.loss)
        about = "Ranked high by one scorer and low by another: look before you believe either."
    place_ON = np.array([_places(opinion[rows]) for opinion in opinions])
    apart_N = np.ptp(place_ON, axis=0)
    return Group("Most disputed", about, rows[np.argsort(-apart_N, kind="stable")][:SHOWN].tolist())


def _places(value_N: np.ndarray) -> np.ndarray:
    """Place of each value among all, from 0 for the lowest to 1 for the highest."""
    place_N = np.empty(len(value_N))
    place_N[np.argsort(value_N, kind="stable")] = np.arange(len(value_N)) / max(1, len(value_N) - 1)
    return place_N


def _measured_exactly(probes: ItemFalls, scores: Scores) -> Group:
    """The best and the worst probes: on them every target item was measured after a step that was really taken."""
    row_of = {key: row for row, key in enumerate(zip(scores.domain, scores.id, strict=True))}
    order = np.argsort(-probes.utility_N, kind="stable")
    half = SHOWN // 2
    chosen = dict.fromkeys([*order[:half].tolist(), *order[::-1][:half].tolist()])
    about = (
        f"{len(probes.samples)} samples were stepped on for real and every target item measured after it. The best and "
        "the worst of them, with the items they help and harm. score.contributions: true with method exact or tail "
        "keeps this for every sample."
    )
    return Group(
        "Measured item by item", about, [row_of[probes.samples[i]] for i in chosen if probes.samples[i] in row_of]
    )


# --- how one is drawn ------------------------------------------------------------------------------------------------


class _Cards:
    """Draws samples; what they are compared with is computed once."""

    def __init__(self, facts: RunFacts, scores: Scores, samples: dict[Key, Sample]) -> None:
        self._facts, self._scores, self._samples = facts, scores, samples
        self._place_of_loss_N = np.full(len(scores), np.nan)
        for domain in set(scores.domain):
            rows = np.flatnonzero((scores.domain == domain) & np.isfinite(scores.loss))
            self._place_of_loss_N[rows] = _places(scores.loss[rows])
        self._items = self._wanted_items()

    def _wanted_items(self) -> dict[Key, Sample]:
        falls = [self._falls(key) for key in self._samples]
        wanted = {key for found in falls if found for key, _ in [*found[0], *found[1]]}
        return self._facts.target_items(wanted)

    def draw(self, row: int) -> str:
        scores, key = self._scores, (self._scores.domain[row], self._scores.id[row])
        sample = self._samples.get(key)
        kept = bool(self._facts.kept_N[row])
        toxic = chip("toxic", "bad") if self._facts.toxic_N[row] else ""
        head = (
            f"<header><span>{text(key[0])} / {quoted(key[1], 60)}</span>"
            f"<span>{toxic} {chip('kept', 'good') if kept else chip('left out')}</span></header>"
        )
        shown = (
            paragraph("The sample is not in its file any more.", "note") if sample is None else _conversation(sample)
        )
        measured = [("utility", scores.utility[row])] if scores.is_signed else []
        measured += [
            (f"for {name}", values[row]) for name, values in scores.utility_by_target.items() if scores.is_signed
        ]
        rows = "".join(
            f'<dt>{text(name)}</dt><dd class="{"good" if value > 0 else "bad"}">{signed(value)}</dd>'
            for name, value in measured
        )
        rows += f"<dt>loss before the step</dt><dd>{number(scores.loss[row])}</dd>"
        why = f'<p class="why">{text(self._why(row))}</p>'
        return f'<article class="sample">{head}{shown}<dl>{rows}</dl>{why}{self._helped(key)}</article>'

    def _why(self, row: int) -> str:
        """What is unusual about the sample, and what was decided."""
        scores, said = self._scores, []
        place = self._place_of_loss_N[row]
        if place >= 1 - EXTREME:
            height = "the highest" if place == 1 else f"above that of {percent(place)}"
            said.append(
                f"The proxy finds the answer unlikely, its loss is {height} of the domain: a wrong answer, another "
                "picture, garbled text, or a hard question."
            )
        elif place <= EXTREME:
            said.append("The proxy knows this already: its loss is among the lowest of the domain.")
        by_target = {name: values[row] for name, values in scores.utility_by_target.items()}
        if scores.is_signed and len(by_target) > 1:
            helped = [name for name, value in by_target.items() if value > 0]
            if 0 < len(helped) < len(by_target):
                said.append(f"Helps {', '.join(helped)}; harms {', '.join(n for n in by_target if n not in helped)}.")
            else:
                said.append("Helps every target." if helped else "Harms every target.")
        rank, reason = int(self._facts.selection.rank[row]), str(self._facts.selection.reason[row])
        where = "its domain" if self._facts.selection.metadata["select"]["within"] == "domain" else "the pool"
        said.append(f"{reason_in_words(reason).capitalize()}: rank {rank:,} of {where} in the ranking that decided.")
        return " ".join(said)

    def _helped(self, key: Key) -> str:
        falls = self._falls(key)
        if falls is None:
            return ""
        parts = []
        for word, kind, found in zip(("helps most", "harms most"), ("good", "bad"), falls, strict=True):
            items = "".join(self._item(item, fall, kind) for item, fall in found)
            if items:
                parts.append(f'<p class="why">Target items it {word}:</p><ul class="items">{items}</ul>')
        return "".join(parts)

    def _item(self, key: Key, fall: float, kind: str) -> str:
        item = self._items.get(key)
        picture = (
            _picture(item.images[0], ITEM_THUMBNAIL, f"picture of target item {key[1]}") if item and item.images else ""
        )
        words = f"{quoted(_question(item), 90)} <b>{quoted(item.answer, 40)}</b>" if item else quoted(key[1], 60)
        return f'<li>{picture}<span>{words} <span class="{kind}">{signed(fall)}</span> ({text(key[0])})</span></li>'

    def _falls(self, key: Key) -> tuple[list[tuple[Key, float]], list[tuple[Key, float]]] | None:
        """Target items that a sample helps most and harms most, with the fall of their loss; None if not measured."""
        for source in (self._facts.contributions, self._facts.probes):
            if source is not None and key in source.rows:
                fall_V = source.fall_NV[source.rows[key]]
                order = np.argsort(-fall_V, kind="stable")
                return (
                    [(source.items[v], float(fall_V[v])) for v in order[:ITEMS] if fall_V[v] > 0],
                    [(source.items[v], float(fall_V[v])) for v in order[::-1][:ITEMS] if fall_V[v] < 0],
                )
        return None


def _conversation(sample: Sample) -> str:
    pictures = "".join(
        _picture(image, THUMBNAIL, f"picture {n} of sample {sample.id}")
        for n, image in enumerate(sample.images[:PICTURES], start=1)
    )
    if more := len(sample.images) - PICTURES:
        pictures += f"<span>and {more} more</span>" if more > 0 else ""
    shown = f'<div class="pictures">{pictures}</div>' if pictures else ""
    return (
        f'{shown}<p class="question">{quoted(_question(sample), 300)}</p>'
        f'<p class="answer">{quoted(sample.answer, 200)}</p>'
    )


def _question(sample: Sample) -> str:
    return " ".join(turn.text for turn in sample.prompt if turn.role == "user")


def _picture(image: ImageRef, size: int, words: str) -> str:
    try:
        picture = open_image(image)
    except (OSError, ValueError):
        return f'<span class="note">{text(words)}: missing</span>'
    kind = "drawn" if max(picture.size) <= DRAWN else "photo"
    picture.thumbnail((size, size))
    return f'<img class="{kind}" alt="{text(words)}" src="{_encoded(picture)}">'


def _encoded(picture: PIL.Image.Image) -> str:
    """The pixels alone as a data URI: a new picture has no profile, comment or orientation to pass on."""
    pixels = PIL.Image.new("RGB", picture.size)
    pixels.paste(picture)
    data, kind = _bytes(lambda buffer: pixels.save(buffer, "PNG", optimize=True)), "png"
    if len(data) > LOSSLESS_BYTES:
        data, kind = _bytes(lambda buffer: pixels.save(buffer, "JPEG", quality=80)), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _bytes(save: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()

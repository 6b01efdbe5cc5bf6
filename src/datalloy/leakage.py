"""Samples in, leaks out: which items of the targets and evaluation sets are also in the pool.

A leaked sample gets the highest utility there is, and every figure after it is worthless; so this check is always on.

Texts are compared first, by hash, which costs nothing; pictures only where the question is the same. Of those a
256-bit difference hash picks candidates, all at once, and the candidates are looked at: greys at up to 256 pixels,
colours at 16 x 16. The look is needed: charts, diagrams and lines of print drawn by one program have nearly the same
hash, whatever they show. Price: one decoding of each picture whose question is asked in a guarded set too; pairs cost
32 bytes of comparison each, and candidates a few milliseconds.

Measured at 12 bits on the drawn world and ten published sets (chart, geometry, table, puzzle, photo, handwriting, ocr,
counting, spatial, wiki tables): 99.9 % of pictures are found again after JPEG of quality 60 to 90, half or double
size, or 10 % more brightness (at 4 bits 95 %), and no two of 7,500 drawn pictures are taken for each other. Trap:
what is paler than `TOLERANCE` is not seen, an azure sector on white for example; and a picture that was cropped or
turned is another picture.
"""

import hashlib
import json
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFilter

from datalloy.progress import track
from datalloy.sample import ImageRef, Sample, open_image

log = logging.getLogger(__name__)

IMAGE_DISTANCE = 12  # bits of 256; see the measurement above
EDGE_LEVELS = 24  # a fall of grey between neighbours that is an edge and not noise of the encoding
TOLERANCE = 36  # levels of 255: 25 for 10 % more brightness of white, the rest for JPEG and resampling
LOOK_PIXELS = 256  # a side
COLOUR_CELLS = 16  # a side; JPEG keeps colour at half the resolution, so finer would see encoding errors
LOOKS_KEPT = 2048  # decoded greys held in memory, 64 kB each

KINDS = ("exact", "near", "same_question")


class Leak(NamedTuple):
    """One item of a guarded set that one sample of the pool gives away.

    `kind`: exact, the same conversation with the same picture bytes; near, the same texts up to case, spaces and
    Unicode form, with pictures that look the same; same_question, the item's question on its pictures, somewhere in
    the sample, whatever the answer. `distance`: bits of 256 between the pictures' hashes, the largest of them.
    """

    set_name: str
    item_id: str
    pool_domain: str
    pool_id: str
    kind: str
    distance: int


class DuplicateGroup(NamedTuple):
    """Samples of the pool that repeat each other: (domain, id) in order, two or more; `kind` is the loosest inside."""

    kind: Literal["exact", "near"]
    samples: tuple[tuple[str, str], ...]


def find_leaks(
    pool: Sequence[Sample], guarded: Mapping[str, Sequence[Sample]], *, image_distance: int = IMAGE_DISTANCE
) -> list[Leak]:
    """All pairs of a guarded item and a pool sample that gives it away, sorted; each pair once, by its strongest kind.

    `guarded`: targets and evaluation sets by name. To check targets against evaluation sets, give the targets' items
    as the pool. Pictures that cannot be decoded only count in exact leaks.
    """
    hashes: _Hashes = {}
    leaks = _exact_leaks(pool, guarded)
    groups = _samples_by_question(pool, guarded)
    for question, (items, samples) in track(groups.items(), "look for leaks", len(groups)):
        album = _Album(samples, hashes, image_distance)
        for set_name, item in items:
            for sample, distance in album.showing(item.images):
                if sample.content_hash != item.content_hash and (any(question) or item.images):
                    kind = "near" if _is_near(item, sample) else "same_question"
                    leaks.append(Leak(set_name, item.id, sample.domain, sample.id, kind, distance))
    return sorted(leaks)


def describe(leaks: Sequence[Leak]) -> str:
    """One line for each guarded set: how many of its items are in the pool, of what kind, and one to look at."""
    by_set: dict[str, list[Leak]] = defaultdict(list)
    for leak in sorted(leaks, key=lambda leak: (leak.set_name, KINDS.index(leak.kind))):
        by_set[leak.set_name].append(leak)
    lines = []
    for set_name, found in by_set.items():
        kinds = Counter({leak.item_id: leak.kind for leak in reversed(found)}.values())
        parts = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
        first = found[0]
        lines.append(
            f"{set_name}: {kinds.total()} of its items are in the pool ({parts}), such as {first.item_id!r:.200}, "
            f"which is sample {first.pool_id!r:.200} of domain {first.pool_domain!r:.200} ({first.kind})"
        )
    return "\n".join(lines)


def find_duplicates(pool: Sequence[Sample], *, image_distance: int = IMAGE_DISTANCE) -> list[DuplicateGroup]:
    """Groups of samples of the pool with the same texts and pictures that look the same.

    A group is what looks like its first sample, in the order of domain and id; "looks like" does not chain, so two
    members can differ a little more. Price: every picture whose question and answer occur twice is decoded.
    """
    by_text: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(pool, key=lambda sample: (sample.domain, sample.id)):
        by_text[text_key(sample)].append(sample)
    hashes: _Hashes = {}
    groups = []
    for samples in track(by_text.values(), "look for duplicates", len(by_text)):
        left = samples if len(samples) > 1 else []
        album = _Album(left, hashes, image_distance)
        while left:
            first = left[0]
            alike = {sample.content_hash for sample, _ in album.showing(first.images) if _is_near(first, sample)}
            alike.add(first.content_hash)  # also where the pictures cannot be decoded
            group = [sample for sample in left if sample.content_hash in alike]
            left = [sample for sample in left if sample.content_hash not in alike]
            if len(group) > 1:
                is_exact = len({sample.content_hash for sample in group}) == 1
                keys = tuple((sample.domain, sample.id) for sample in group)
                groups.append(DuplicateGroup("exact" if is_exact else "near", keys))
    return sorted(groups, key=lambda group: group.samples)


def count_duplicates(pool: Sequence[Sample], *, image_distance: int = IMAGE_DISTANCE) -> dict[str, int]:
    """How many samples of the pool only repeat another one, by kind."""
    counts = {"exact": 0, "near": 0}
    for group in find_duplicates(pool, image_distance=image_distance):
        counts[group.kind] += len(group.samples) - 1
    return counts


def text_key(sample: Sample) -> str:
    """SHA-256, in hex, of what user and assistant say, up to case, spaces and Unicode form (NFKC), without images."""
    said = [[turn.role, _normalise(turn.text)] for turn in sample.turns if turn.role != "system"]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def perceptual_hash(picture: PIL.Image.Image) -> int:
    """A 256-bit difference hash: bit set where grey rises clearly from one cell to the next, on 16 rows of 17 cells.

    The picture is reduced by Lanczos. A rise below 24 of 255 levels gives no bit: without that dead band the flat
    grounds of charts and diagrams hash the noise of the encoding (18 bits away at JPEG 60, with it 3).
    """
    grey = np.asarray(picture.convert("L").resize((17, 16), PIL.Image.Resampling.LANCZOS), dtype=np.int16)
    return int.from_bytes(np.packbits(np.diff(grey, axis=1) > EDGE_LEVELS).tobytes())


def is_same_picture(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    """Whether two pictures show the same, up to encoding, size and a shade of brightness: no place differs clearly.

    Greys are compared at the size of the smaller picture after a 3 x 3 mean, which forgives the encoder's noise and
    still sees one digit; colours at 16 x 16. The largest difference anywhere must be at most 36 of 255 levels.
    """
    return _looks_same(_look(first), _look(second))


class _Look(NamedTuple):
    """What is compared of a picture: greys at its own size, at most 256 x 256, and coarse colours, [16, 16, 3]."""

    grey: PIL.Image.Image
    colours: np.ndarray


def _look(picture: PIL.Image.Image) -> _Look:
    size = (min(picture.width, LOOK_PIXELS), min(picture.height, LOOK_PIXELS))
    colours = picture.convert("RGB").resize((COLOUR_CELLS, COLOUR_CELLS), PIL.Image.Resampling.LANCZOS)
    return _Look(picture.convert("L").resize(size, PIL.Image.Resampling.LANCZOS), np.asarray(colours, dtype=np.int16))


def _looks_same(first: _Look, second: _Look) -> bool:
    if np.abs(first.colours - second.colours).max() > TOLERANCE:
        return False
    size = (min(first.grey.width, second.grey.width), min(first.grey.height, second.grey.height))
    greys = [
        np.asarray(
            look.grey.resize(size, PIL.Image.Resampling.LANCZOS).filter(PIL.ImageFilter.BoxBlur(1)), dtype=np.int16
        )
        for look in (first, second)
    ]
    return bool(np.abs(greys[0] - greys[1]).max() <= TOLERANCE)


# Hash of each picture already decoded, as four words, [4] uint64; None for what cannot be decoded. Lives for one check
# only, because a file may change between two.
_Hashes = dict[ImageRef, np.ndarray | None]


class _Album:
    """The pictures of some samples, hashed, so that one picture is compared with all of them at once."""

    def __init__(self, samples: Sequence[Sample], hashes: _Hashes, image_distance: int) -> None:
        self.samples, self.hashes, self.image_distance = samples, hashes, image_distance
        pictures = [(owner, image) for owner, sample in enumerate(samples) for image in sample.images]
        pictures = [(owner, image) for owner, image in pictures if self._hash_words(image) is not None]
        self.owners, self.images = [owner for owner, _ in pictures], [image for _, image in pictures]
        self.words = np.array([hashes[image] for image in self.images], dtype=np.uint64).reshape(-1, 4)
        self._look_at = lru_cache(LOOKS_KEPT)(lambda index: _look(open_image(self.images[index])))

    def showing(self, images: Sequence[ImageRef]) -> Iterator[tuple[Sample, int]]:
        """Samples that show all of `images`, with the largest distance; samples without any where there are none."""
        if not images:
            yield from ((sample, 0) for sample in self.samples if not sample.images)
            return
        found = [self._owners_of(image) for image in images]
        for owner in sorted(set(found[0]).intersection(*found)):
            yield self.samples[owner], max(distances[owner] for distances in found)

    def _owners_of(self, image: ImageRef) -> dict[int, int]:
        """Which samples show this picture, and in how many bits their copy of it differs at least."""
        words = self._hash_words(image)
        if words is None:
            return {}
        look = cache(lambda: _look(open_image(image)))
        distances = np.bitwise_count(self.words ^ words).sum(axis=1)
        owners: dict[int, int] = {}
        for index in np.flatnonzero(distances <= self.image_distance):
            if self.images[index] == image or _looks_same(look(), self._look_at(int(index))):
                owner, distance = self.owners[index], int(distances[index])
                owners[owner] = min(distance, owners.get(owner, distance))
        return owners

    def _hash_words(self, image: ImageRef) -> np.ndarray | None:
        if image not in self.hashes:
            try:
                bits = perceptual_hash(open_image(image))
                self.hashes[image] = np.frombuffer(bits.to_bytes(32), dtype=np.uint64)
            except (OSError, ValueError) as error:
                log.warning("%s is left out of the comparison of pictures: %s", image, error)
                self.hashes[image] = None
        return self.hashes[image]


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _questions(sample: Sample) -> tuple[str, ...]:
    return tuple(_normalise(turn.text) for turn in sample.turns if turn.role == "user")


def _is_near(item: Sample, sample: Sample) -> bool:
    return len(item.images) == len(sample.images) and text_key(item) == text_key(sample)


def _exact_leaks(pool: Sequence[Sample], guarded: Mapping[str, Sequence[Sample]]) -> list[Leak]:
    by_content: dict[str, list[Sample]] = defaultdict(list)
    for sample in pool:
        by_content[sample.content_hash].append(sample)
    return [
        Leak(set_name, item.id, sample.domain, sample.id, "exact", 0)
        for set_name, items in guarded.items()
        for item in items
        for sample in by_content.get(item.content_hash, ())
    ]


def _samples_by_question(
    pool: Sequence[Sample], guarded: Mapping[str, Sequence[Sample]]
) -> dict[tuple[str, ...], tuple[list[tuple[str, Sample]], list[Sample]]]:
    """For each question of a guarded set: who asks it there, and the pool samples that ask it too.

    The question of an item is all its user turns; a sample of several turns asks it where they stand in a row.
    """
    groups: dict[tuple[str, ...], tuple[list[tuple[str, Sample]], list[Sample]]] = {}
    for set_name, items in guarded.items():
        for item in items:
            groups.setdefault(_questions(item), ([], []))[0].append((set_name, item))
    lengths = {len(question) for question in groups}
    for sample in pool:
        asked = _questions(sample)
        runs = {asked[i : i + length] for length in lengths for i in range(len(asked) - length + 1)}
        for question in runs & groups.keys():
            groups[question][1].append(sample)
    return {question: group for question, group in groups.items() if group[1]}

"""Samples in, leaks out: which items of the targets and evaluation sets are also in the pool.

A leaked sample gets the highest utility there is, and every figure after it is worthless; so this check is always on.

Texts are compared first, by hash, which costs next to nothing; pictures only where the question is the same. Of
those a 256-bit difference hash and coarse colours pick candidates, all at once, and candidates are looked at side by
side. The look is needed: charts, diagrams and lines of print drawn by one program have nearly the same hash whatever
they show. Price: one decoding of each picture whose question a guarded set asks too, and a few milliseconds for each
candidate: seconds for packs of 2,000 samples and 400 items that all ask one question.

Measured on the five drawn skills and ten published sets (1,500 pictures, each changed in ten ways: JPEG 60 to 90,
WebP, half and double size, 10 % more brightness): at 12 bits 99.7 % are found again, at 4 bits 97.4 %. Of 5.6 million
pairs of different drawn pictures of one skill, none is taken for the same. Trap: what is small and pale is not seen,
such as a sector of azure on white; and a picture that was cropped or turned is another picture.
"""

import hashlib
import json
import logging
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFilter
from scipy.ndimage import uniform_filter

from datalloy.progress import track
from datalloy.sample import ImageRef, Sample, open_image

log = logging.getLogger(__name__)

IMAGE_DISTANCE = 12  # bits of 256; see the measurement at the head of the file
EDGE_LEVELS = 40  # a rise of grey between neighbours that is an edge and not noise of the encoding
TOLERANCE = 36  # levels of 255: 25 for 10 % more brightness of white, the rest for JPEG and resampling
MIN_SIMILARITY = 0.25
DARK_FLOOR = (0.01 * 255) ** 2  # C1 of the paper
FLAT_FLOOR = 100.0  # C2; the paper's is 58.5, which takes the noise of JPEG 60 on a flat ground for structure
LOOK_PIXELS = 256  # a side
COLOUR_CELLS = 16  # a side
LOOKS_KEPT = 512  # reduced pictures held in memory, 200 kB each at most
LANCZOS = PIL.Image.Resampling.LANCZOS
MEAN = PIL.ImageFilter.BoxBlur(1)

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
    signatures: _Signatures = {}
    leaks = _exact_leaks(pool, guarded)
    groups = _samples_by_question(pool, guarded)
    for question, (items, samples) in track(groups.items(), "look for leaks", len(groups)):
        album = _Album(samples, signatures, image_distance)
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
    members can differ a little more. Price: every picture whose question and answer occur twice is decoded, and
    each of n such pictures is compared with n hashes.
    """
    by_text: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in sorted(_repeated(pool), key=lambda sample: (sample.domain, sample.id)):
        by_text[text_key(sample)][sample.content_hash].append(sample)
    signatures: _Signatures = {}
    groups = []
    for copies in track(by_text.values(), "look for duplicates", len(by_text)):
        firsts = [samples[0] for samples in copies.values()]
        album = _Album(firsts if len(firsts) > 1 else [], signatures, image_distance)
        taken: set[str] = set()
        for first in firsts:
            if first.content_hash in taken:
                continue
            alike = {first.content_hash}  # itself also where its pictures cannot be decoded
            alike |= {s.content_hash for s, _ in album.showing(first.images) if len(s.images) == len(first.images)}
            members = sorted((s.domain, s.id) for content in alike - taken for s in copies[content])
            taken |= alike
            if len(members) > 1:
                is_exact = len(members) == len(copies[first.content_hash])
                groups.append(DuplicateGroup("exact" if is_exact else "near", tuple(members)))
    return sorted(groups, key=lambda group: group.samples)


def _repeated(pool: Sequence[Sample]) -> list[Sample]:
    """Samples whose text has the first 64 bits of another's hash; eight bytes a sample, not a dictionary of all."""
    key_N = np.fromiter((_short_key(sample) for sample in pool), dtype=np.uint64, count=len(pool))
    return [pool[i] for i in np.flatnonzero(is_repeated(key_N)).tolist()]


def is_repeated(key_N: np.ndarray) -> np.ndarray:
    """Which keys stand there twice or more, [N] bool."""
    sorted_N = np.sort(key_N)
    return np.isin(key_N, np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]]))


class Sieve:
    """Samples of a pool one by one in, the few that have to be looked at for leaks and copies out.

    For pools that are gone through once: nine bytes a sample are kept. What passes neither mask can be left out of what
    `find_leaks` and `count_duplicates` are given; they find the same.
    """

    def __init__(self, guarded: Mapping[str, Sequence[Sample]]) -> None:
        items = [item for group in guarded.values() for item in group]
        self._contents = {item.content_hash for item in items}
        self._questions = {_questions(item) for item in items}
        self._lengths = {len(question) for question in self._questions}
        self._keys, self._suspects = array("Q"), array("B")

    def add(self, sample: Sample) -> None:
        is_suspect = sample.content_hash in self._contents
        is_suspect = is_suspect or not self._questions.isdisjoint(_runs(_questions(sample), self._lengths))
        self._suspects.append(is_suspect)
        self._keys.append(_short_key(sample))

    @property
    def key_N(self) -> np.ndarray:
        """For `is_repeated`: samples that say the same have the same key, of 64 bits, as do very few others."""
        return np.array(self._keys, dtype=np.uint64)

    @property
    def is_suspect_N(self) -> np.ndarray:
        """Samples that have the content of a guarded item, or ask its question."""
        return np.array(self._suspects, dtype=bool)


def _short_key(sample: Sample) -> int:
    return int(text_key(sample)[:16], 16)


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

    The picture is reduced by Lanczos. A rise of 40 of 255 levels or less gives no bit: without that dead band the
    flat grounds of charts and diagrams hash the noise of the encoding.
    """
    grey = np.asarray(picture.convert("L").resize((17, 16), LANCZOS), dtype=np.int16)
    return int.from_bytes(np.packbits(np.diff(grey, axis=1) > EDGE_LEVELS).tobytes())


def is_same_picture(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    """Whether two pictures show the same, up to encoding, size and a shade of brightness: no place differs clearly.

    Three looks at the size of the smaller picture. Colours at 16 x 16 and greys in full, under a 3 x 3 mean, may
    differ nowhere by more than 36 of 255 levels. At half size, where JPEG keeps its colours, the structural
    similarity (Wang et al. 2004) of each channel may be nowhere below 0.25: it sees a thin pale line on white.
    """
    is_alike = _largest_difference(_coarse_colours(first), _coarse_colours(second)) <= TOLERANCE
    return bool(is_alike) and _looks_same(_reduced(first), _reduced(second))


def _coarse_colours(picture: PIL.Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((COLOUR_CELLS, COLOUR_CELLS), LANCZOS))


def _largest_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Over the last three axes, in levels of 255."""
    return np.abs(first.astype(np.int16) - second).max(axis=(-3, -2, -1))


def _reduced(picture: PIL.Image.Image) -> PIL.Image.Image:
    size = (min(picture.width, LOOK_PIXELS), min(picture.height, LOOK_PIXELS))
    return picture.convert("RGB").resize(size, LANCZOS)


def _looks_same(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    width, height = min(first.width, second.width), min(first.height, second.height)
    pair = (first.resize((width, height), LANCZOS), second.resize((width, height), LANCZOS))
    greys = [_levels(picture.convert("L").filter(MEAN)) for picture in pair]
    if np.abs(greys[0] - greys[1]).max() > TOLERANCE:
        return False
    half = (max(width // 2, 1), max(height // 2, 1))
    colours = [_levels(picture.resize(half, LANCZOS).filter(MEAN)) for picture in pair]
    return bool(_structural_similarity(colours[0], colours[1]).min() >= MIN_SIMILARITY)


def _levels(picture: PIL.Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64)


def _structural_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SSIM in the 7 x 7 window around each pixel, for each channel, [H, W, 3] in [-1, 1] (Wang et al. 2004, eq. 13)."""
    mean_1, mean_2 = _window_mean(first), _window_mean(second)
    variances = _window_mean(first**2) - mean_1**2 + _window_mean(second**2) - mean_2**2
    covariance = _window_mean(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + DARK_FLOOR) / (mean_1**2 + mean_2**2 + DARK_FLOOR)
    return luminance * (2 * covariance + FLAT_FLOOR) / (variances + FLAT_FLOOR)


def _window_mean(levels: np.ndarray) -> np.ndarray:
    return uniform_filter(levels, size=(7, 7, 1), mode="nearest")


class _Signature(NamedTuple):
    """What picks candidates: the perceptual hash as four words, [4] uint64, and coarse colours, [16, 16, 3] uint8."""

    words: np.ndarray
    colours: np.ndarray


# Of each picture already decoded; None for what cannot be. Lives for one check only: a file may change between two.
_Signatures = dict[ImageRef, _Signature | None]


class _Album:
    """The pictures of some samples with their signatures, so that one picture is compared with all at once."""

    def __init__(self, samples: Sequence[Sample], signatures: _Signatures, image_distance: int) -> None:
        self.samples, self.signatures, self.image_distance = samples, signatures, image_distance
        pictures = [(owner, image) for owner, sample in enumerate(samples) for image in sample.images]
        signed = [(owner, image, sign) for owner, image in pictures if (sign := self._signature(image)) is not None]
        self.owners = [owner for owner, _, _ in signed]
        self.images = [image for _, image, _ in signed]
        self.words = np.array([sign.words for _, _, sign in signed], dtype=np.uint64).reshape(-1, 4)
        self.colours = [sign.colours for _, _, sign in signed]
        self._reduced = lru_cache(LOOKS_KEPT)(lambda index: _reduced(open_image(self.images[index])))

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
        signature = self._signature(image)
        if signature is None:
            return {}
        reduced = cache(lambda: _reduced(open_image(image)))
        distances = np.bitwise_count(self.words ^ signature.words).sum(axis=1)
        owners: dict[int, int] = {}
        for index in np.flatnonzero(distances <= self.image_distance):
            if _largest_difference(self.colours[index], signature.colours) > TOLERANCE:
                continue
            if self.images[index] == image or _looks_same(reduced(), self._reduced(int(index))):
                owner, distance = self.owners[index], int(distances[index])
                owners[owner] = min(distance, owners.get(owner, distance))
        return owners

    def _signature(self, image: ImageRef) -> _Signature | None:
        if image not in self.signatures:
            try:
                picture = open_image(image)
            except (OSError, ValueError) as error:
                log.warning("%s is left out of the comparison of pictures: %s", image, error)
                self.signatures[image] = None
            else:
                words = np.frombuffer(perceptual_hash(picture).to_bytes(32), dtype=np.uint64)
                self.signatures[image] = _Signature(words, _coarse_colours(picture))
        return self.signatures[image]


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _questions(sample: Sample) -> tuple[str, ...]:
    return tuple(_normalise(turn.text) for turn in sample.turns if turn.role == "user")


def _runs(asked: tuple[str, ...], lengths: Iterable[int]) -> set[tuple[str, ...]]:
    """All runs of some lengths in what a sample asks."""
    return {asked[i : i + length] for length in lengths for i in range(len(asked) - length + 1)}


def _is_near(item: Sample, sample: Sample) -> bool:
    return len(item.images) == len(sample.images) and text_key(item) == text_key(sample)


def _exact_leaks(pool: Sequence[Sample], guarded: Mapping[str, Sequence[Sample]]) -> list[Leak]:
    wanted = {item.content_hash for items in guarded.values() for item in items}
    by_content: dict[str, list[Sample]] = defaultdict(list)
    for sample in pool:
        if sample.content_hash in wanted:
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
        for question in _runs(_questions(sample), lengths) & groups.keys():
            groups[question][1].append(sample)
    return {question: group for question, group in groups.items() if group[1]}

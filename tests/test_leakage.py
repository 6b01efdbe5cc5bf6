import io
import json
import logging
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from datalloy.config import DataSource
from datalloy.leakage import (
    Leak,
    Sieve,
    count_duplicates,
    describe,
    find_duplicates,
    find_leaks,
    is_repeated,
    is_same_picture,
    perceptual_hash,
    text_key,
)
from datalloy.readers import read_all
from datalloy.sample import Origin, Sample, Turn, content_hash
from datalloy.tiny.world import DRAW, SKILLS

LANCZOS = PIL.Image.Resampling.LANCZOS


@dataclass(frozen=True)
class MemoryImage:
    data: bytes
    reads: list = field(default_factory=list, compare=False)

    def read(self) -> bytes:
        self.reads.append(1)
        return self.data


def encoded(picture: PIL.Image.Image, kind: str = "PNG", **options) -> PIL.Image.Image:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return PIL.Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def image(picture: PIL.Image.Image) -> MemoryImage:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return MemoryImage(file.getvalue())


def make_sample(id: str, question: str, answer: str, *images: MemoryImage, domain: str = "pool") -> Sample:
    turns = (Turn("user", (*images, question)), Turn("assistant", (answer,)))
    return Sample(id, domain, turns, Origin(Path("pool.jsonl"), 0), content_hash(turns))


def draw(skill: str, seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(DRAW[skill](random.Random(seed)).pixels)


def brighter(picture: PIL.Image.Image) -> PIL.Image.Image:
    return picture.point(lambda level: min(255, round(level * 1.1)))


def resized(picture: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), LANCZOS)


CHANGES = {
    "jpeg 60": lambda picture: encoded(picture, "JPEG", quality=60),
    "jpeg 90": lambda picture: encoded(picture, "JPEG", quality=90),
    "half size": lambda picture: resized(picture, 0.5),
    "double size": lambda picture: resized(picture, 2),
    "brighter": brighter,
}


def kinds(leaks: list[Leak]) -> list[str]:
    return [leak.kind for leak in leaks]


def test_the_same_conversation_is_an_exact_leak():
    picture = image(draw("chart", 0))
    pool = [make_sample("p", "How high?", "3", picture), make_sample("q", "How low?", "3", picture)]
    leaks = find_leaks(pool, {"holdout": [make_sample("t", "How high?", "3", picture, domain="holdout")]})
    assert leaks == [Leak("holdout", "t", "pool", "p", "exact", 0)]


@pytest.mark.parametrize(
    "question", ["how  HIGH is\nthe bar?", "How high is the\u00a0bar?", "\uff28ow high is the bar? "]
)
def test_case_spaces_and_unicode_form_make_no_difference(question):
    pool = [make_sample("p", question, " three")]
    assert kinds(find_leaks(pool, {"t": [make_sample("t", "How high is the bar?", "Three")]})) == ["near"]


def test_the_system_turn_makes_no_difference():
    item = make_sample("t", "How high?", "3")
    turns = (Turn("system", ("Be brief.",)), *item.turns)
    pool = [Sample("p", "pool", turns, item.origin, content_hash(turns))]
    assert kinds(find_leaks(pool, {"t": [item]})) == ["near"]


def test_the_question_with_another_answer_is_a_leak_of_its_kind():
    leaks = find_leaks([make_sample("p", "How high?", "4")], {"t": [make_sample("t", "How high?", "3")]})
    assert kinds(leaks) == ["same_question"]


def test_another_question_is_no_leak():
    assert find_leaks([make_sample("p", "How low?", "3")], {"t": [make_sample("t", "How high?", "3")]}) == []


def test_the_same_text_on_another_picture_is_no_leak():
    pool = [make_sample("p", "How high?", "3", image(draw("chart", 1))), make_sample("q", "How high?", "3")]
    item = make_sample("t", "How high?", "3", image(draw("chart", 2)))
    assert find_leaks(pool, {"t": [item]}) == []


def test_text_alone_does_not_leak_through_a_sample_with_a_picture():
    pool = [make_sample("p", "How high?", "3", image(draw("chart", 1)))]
    assert find_leaks(pool, {"t": [make_sample("t", "How high?", "3")]}) == []


def test_empty_questions_without_pictures_are_not_taken_for_the_same():
    assert find_leaks([make_sample("p", "", "One text.")], {"t": [make_sample("t", "", "Another text.")]}) == []


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("skill", SKILLS)
def test_drawn_pictures_are_found_again_after(skill, change):
    pictures = [draw(skill, seed) for seed in range(12)]
    assert all(is_same_picture(picture, CHANGES[change](picture)) for picture in pictures)
    distances = [(perceptual_hash(p) ^ perceptual_hash(CHANGES[change](p))).bit_count() for p in pictures]
    assert max(distances) <= 12


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_of_the_picture_is_a_near_leak(change):
    picture = draw("spatial", 5)
    pool = [make_sample("p", "What is left?", "circle", image(CHANGES[change](picture)))]
    assert kinds(find_leaks(pool, {"t": [make_sample("t", "What is left?", "circle", image(picture))]})) == ["near"]


@pytest.mark.parametrize("skill", SKILLS)
def test_different_drawn_pictures_with_one_question_are_never_taken_for_the_same(skill):
    """90,000 pairs a skill, some of them one bar or one colour apart."""
    drawings = {DRAW[skill](random.Random(seed)).pixels.tobytes() for seed in range(600)}
    pictures = [PIL.Image.frombytes("RGB", (64, 64), pixels) for pixels in sorted(drawings)]
    samples = [make_sample(f"s{i}", "How many?", "3", image(picture)) for i, picture in enumerate(pictures)]
    half = len(samples) // 2
    assert find_leaks(samples[:half], {"t": samples[half:]}) == []


def test_one_other_digit_makes_another_picture():
    pixels = np.full((256, 256, 3), 255, dtype=np.uint8)
    pixels[100:110, 100:102] = pixels[100:110, 106:108] = pixels[100:102, 100:108] = pixels[108:110, 100:108] = 0
    eight = pixels.copy()
    eight[104:106, 100:108] = 0  # the bar that makes an 8 of a 0, 8 x 2 of 256 x 256 pixels
    assert not is_same_picture(PIL.Image.fromarray(pixels), PIL.Image.fromarray(eight))


def test_thin_pale_lines_make_another_picture():
    across, down = np.full((2, 320, 320, 3), 255, dtype=np.uint8)
    across[160, 20:300] = down[20:300, 160] = (255, 165, 0)
    assert not is_same_picture(PIL.Image.fromarray(across), PIL.Image.fromarray(down))
    assert is_same_picture(PIL.Image.fromarray(across), encoded(PIL.Image.fromarray(across), "JPEG", quality=60))


def test_thin_coloured_lines_are_found_again_after_jpeg_halved_their_colour():
    lines = np.full((200, 200, 3), 255, dtype=np.uint8)
    lines[20:180:30, 20:180] = (0, 0, 255)
    picture = PIL.Image.fromarray(lines)
    assert is_same_picture(picture, encoded(picture, "JPEG", quality=60))


@pytest.mark.parametrize("other", [(40, 80, 210), (255, 255, 255), (0, 0, 0), (140, 140, 140)])
def test_flat_pictures_of_different_colour_are_different(other):
    # flat pictures all have the hash 0, and (214, 40, 40) has nearly the grey of (40, 80, 210)
    flat, second = PIL.Image.new("RGB", (64, 64), (214, 40, 40)), PIL.Image.new("RGB", (64, 64), other)
    assert perceptual_hash(flat) == perceptual_hash(second) == 0
    assert not is_same_picture(flat, second)
    item = make_sample("t", "Which colour?", "red", image(flat))
    assert find_leaks([make_sample("p", "Which colour?", "red", image(second))], {"t": [item]}) == []


def test_a_flat_picture_is_found_again():
    flat = PIL.Image.new("RGB", (64, 64), (200, 90, 90))
    assert is_same_picture(flat, encoded(resized(brighter(flat), 0.5), "JPEG", quality=60))


def test_perceptual_hash_has_a_bit_for_each_rise_of_256():
    ramp = np.tile(np.arange(17) * 15, (16, 1)).astype(np.uint8)  # rises of 15 levels are no edges
    steep = np.tile((np.arange(17) % 2) * 255, (16, 1)).astype(np.uint8)
    assert perceptual_hash(PIL.Image.fromarray(ramp)) == 0
    assert perceptual_hash(PIL.Image.fromarray(steep)) == int("10" * 128, 2)


def test_image_distance_bounds_the_bits_of_a_near_leak():
    picture = draw("arithmetic", 3)
    smaller = resized(picture, 0.5)
    distance = (perceptual_hash(picture) ^ perceptual_hash(smaller)).bit_count()
    pool = [make_sample("p", "How high?", "3", image(smaller))]
    guarded = {"t": [make_sample("t", "How high?", "3", image(picture))]}
    assert 0 < distance <= 12
    assert [leak.distance for leak in find_leaks(pool, guarded, image_distance=distance)] == [distance]
    assert find_leaks(pool, guarded, image_distance=distance - 1) == []


def test_a_long_conversation_leaks_the_question_it_contains():
    picture = image(draw("table", 0))
    turns = (
        Turn("user", (picture, "Describe it.")),
        Turn("assistant", ("A table.",)),
        Turn("user", ("What is the sum?",)),
        Turn("assistant", ("7",)),
    )
    pool = [Sample("p", "pool", turns, Origin(Path("pool.jsonl"), 0), content_hash(turns))]
    item = make_sample("t", "What is the sum?", "7", picture)
    assert kinds(find_leaks(pool, {"t": [item]})) == ["same_question"]
    follow_up = Sample("t", "t", turns[2:], item.origin, "other")
    assert find_leaks([follow_up], {"t": pool}) == []  # half of the target's conversation, and not its picture


def test_a_sample_that_shows_more_pictures_leaks_the_question_only():
    first, second = image(draw("table", 0)), image(draw("table", 1))
    pool = [make_sample("p", "What is the sum?", "7", second, first)]
    assert kinds(find_leaks(pool, {"t": [make_sample("t", "What is the sum?", "7", first)]})) == ["same_question"]
    assert find_leaks([make_sample("p", "What is the sum?", "7", first)], {"t": pool}) == []


def test_pictures_that_cannot_be_decoded_only_leak_exactly(caplog):
    broken = MemoryImage(b"no picture")
    pool = [make_sample("p", "How high?", "3", broken), make_sample("q", "How high?", "4", broken)]
    with caplog.at_level(logging.WARNING):
        leaks = find_leaks(pool, {"t": [make_sample("t", "How high?", "3", broken)]})
    assert [(leak.pool_id, leak.kind) for leak in leaks] == [("p", "exact")]
    assert "left out of the comparison of pictures" in caplog.text


def test_only_pictures_under_a_guarded_question_are_decoded_and_only_once():
    asked, other = image(draw("chart", 1)), image(draw("chart", 2))
    pool = [make_sample("p", "How high?", "3", asked), make_sample("q", "How low?", "3", other)]
    pool.append(make_sample("r", "How wide?", "3", asked))
    picture = image(draw("chart", 3))
    guarded = {"t": [make_sample("t", "How high?", "3", picture), make_sample("u", "How wide?", "3", picture)]}
    asked.reads.clear()
    other.reads.clear()
    find_leaks(pool, guarded)
    assert (len(asked.reads), len(other.reads)) == (1, 0)


def test_leaks_do_not_depend_on_the_order_of_the_pool():
    samples = [make_sample(f"s{i}", f"Question {i % 4}?", str(i % 2)) for i in range(12)]
    shuffled = random.Random(0).sample(samples, len(samples))
    guarded = {"a": samples[:3], "b": samples[5:7]}
    assert find_leaks(samples, guarded) == find_leaks(shuffled, guarded)


def test_what_a_sieve_holds_back_has_no_part_in_leaks_and_copies():
    red, blue = image(PIL.Image.new("RGB", (32, 32), "red")), image(PIL.Image.new("RGB", (32, 32), "blue"))
    contents = [("What?", "a"), ("what ?", "a"), ("WHAT?", "a"), ("Who?", "b"), ("Who?", "c"), ("Where?", "d")]
    plain = [make_sample(f"s{i}", *content) for i, content in enumerate(contents)]
    pictured = [make_sample(f"p{i}", "Colour?", "e", picture) for i, picture in enumerate([red, blue, red])]
    turns = (*plain[5].turns, *plain[3].turns)
    pool = [*plain, *pictured, Sample("long", "pool", turns, Origin(Path("pool.jsonl"), 0), content_hash(turns))]
    guarded = {"goal": [make_sample("g0", "Who?", "z"), make_sample("g1", "Colour?", "e", red)]}
    sieve = Sieve(guarded)
    for sample in pool:
        sieve.add(sample)
    suspects = [sample for sample, passes in zip(pool, sieve.is_suspect_N, strict=True) if passes]
    repeated = [sample for sample, passes in zip(pool, is_repeated(sieve.key_N), strict=True) if passes]
    assert [sample.id for sample in suspects] == ["s3", "s4", "p0", "p1", "p2", "long"]
    assert [sample.id for sample in repeated] == ["s0", "s2", "p0", "p1", "p2"]
    assert find_leaks(suspects, guarded) == find_leaks(pool, guarded) != []
    assert find_duplicates(repeated) == find_duplicates(pool) != []


def test_targets_are_compared_with_evaluation_sets_by_the_same_call():
    targets = [make_sample("v", "How high?", "3", domain="chartqa")]
    leaks = find_leaks(targets, {"holdout": [make_sample("e", "How high?", "3", domain="holdout")]})
    assert leaks == [Leak("holdout", "e", "chartqa", "v", "exact", 0)]


def test_description_counts_items_by_their_strongest_kind():
    leaks = [
        Leak("targets.chart", "t1", "d", "p1", "same_question", 0),
        Leak("targets.chart", "t1", "d", "p2", "exact", 0),
        Leak("targets.chart", "t2", "d", "p3", "near", 4),
        Leak("evaluation.holdout", "e\x1b[31m", "d", "p4", "same_question", 0),
    ]
    assert describe(leaks).splitlines() == [
        "evaluation.holdout: 1 of its items are in the pool (1 same_question), such as 'e\\x1b[31m', "
        "which is sample 'p4' of domain 'd' (same_question)",
        "targets.chart: 2 of its items are in the pool (1 exact, 1 near), such as 't1', "
        "which is sample 'p2' of domain 'd' (exact)",
    ]


def test_duplicates_are_grouped_exact_and_near():
    picture = draw("chart", 0)
    pool = [
        make_sample("c", "How high?", "3", image(picture), domain="b"),
        make_sample("a", "How high?", "3", image(picture)),
        make_sample("x", "How low?", "3"),
        make_sample("y", "HOW low?", "3"),
        make_sample("z", "How low?", "3"),
        make_sample("n", "How high?", "3", image(draw("chart", 1))),
        make_sample("m", "How high?", "4", image(picture)),
    ]
    groups = find_duplicates(pool)
    assert [(group.kind, group.samples) for group in groups] == [
        ("exact", (("b", "c"), ("pool", "a"))),
        ("near", (("pool", "x"), ("pool", "y"), ("pool", "z"))),
    ]
    assert count_duplicates(pool) == {"exact": 1, "near": 2}


def test_a_brighter_copy_in_the_pool_is_a_near_duplicate():
    picture = draw("counting", 0)
    pool = [make_sample(f"s{i}", "How many?", "3", image(p)) for i, p in enumerate((picture, brighter(picture)))]
    assert count_duplicates(pool) == {"exact": 0, "near": 1}


def test_a_sample_is_in_one_group_of_duplicates_at_most():
    # each grey looks like the next, 30 levels away, and like no other
    greys = [PIL.Image.new("RGB", (64, 64), (level, level, level)) for level in (100, 130, 160, 190)]
    pool = [make_sample(f"s{i}", "How grey?", "3", image(grey)) for i, grey in enumerate(greys)]
    groups = [group.samples for group in find_duplicates(pool)]
    assert groups == [(("pool", "s0"), ("pool", "s1")), (("pool", "s2"), ("pool", "s3"))]


def test_samples_with_more_pictures_are_no_duplicates():
    first, second = image(draw("table", 0)), image(draw("table", 1))
    pool = [make_sample("a", "What?", "7", first), make_sample("b", "What?", "7", first, second)]
    assert find_duplicates(pool) == []


def test_copies_with_a_picture_that_cannot_be_decoded_are_exact_duplicates():
    broken = MemoryImage(b"no picture")
    pool = [make_sample(i, "How many?", answer, broken) for i, answer in (("a", "3"), ("b", "3"), ("c", "THREE"))]
    assert count_duplicates(pool) == {"exact": 1, "near": 0}


def test_text_key_keeps_roles_and_turns_apart():
    parts = make_sample("a", "one", "two"), make_sample("b", "one two", ""), make_sample("c", "two", "one")
    assert len({text_key(sample) for sample in parts}) == 3


@pytest.mark.skipif(
    "DATALLOY_PACKS" not in os.environ,
    reason="DATALLOY_PACKS names no folder: set it to one with data packs to test on real data, which is not shipped",
)
@pytest.mark.parametrize("name", ["handwriting", "photo", "puzzle"])
def test_published_train_and_test_sets_do_not_leak(name):
    folder = Path(os.environ["DATALLOY_PACKS"]) / name
    train, test = (read_all(DataSource(path=str(folder / f"{part}.jsonl")), name)[0] for part in ("train", "test"))
    assert len(train) == len((folder / "train.jsonl").read_text().splitlines())
    assert find_leaks(train, {name: test}) == []
    assert json.dumps(count_duplicates(train)) == '{"exact": 0, "near": 0}'

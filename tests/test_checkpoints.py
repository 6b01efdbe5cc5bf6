"""Checkpoints on disk in, checkpoints on disk out: read back by safetensors, transformers and PEFT, not by us."""

import errno
import fcntl
import json
import os
import shutil
import signal

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import tiny_families
from datalloy import checkpoints, durable
from datalloy.checkpoints import merge_checkpoints
from datalloy.errors import EnvironmentFault, ModelError, RecipeError, RunInUseError
from datalloy.tiny.model import WEIGHTS

# peft asks transformers for a property by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "text_config": {"layers": 2, "dtype": "float32"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}  # relative error of rounding
SMALLEST = {torch.float32: 2.0**-148, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
FAMILIES = ("tiny", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3")
ADAPTED = ("tiny", "qwen2_5_vl", "internvl", "gemma3")  # names on disk as in memory, without, and with wrappers swapped


def write(folder, tensors, *, shards=1, config=CONFIG):
    """A full checkpoint; with several shards, tensor number i goes into shard i modulo their number."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def draw(seed, dtype=torch.float32, shapes=((7, 5), (64,), ())):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


def as_bytes(tensors):
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def weighted(states, weights):
    """The closed form, in float64."""
    return {
        name: sum(weight * state[name].double() for state, weight in zip(states, weights, strict=True))
        for name in states[0]
    }


@pytest.fixture
def pair(tmp_path):
    return [write(tmp_path / name, draw(seed)) for seed, name in enumerate("ab")]


def halves(folders):
    return [(folder, 0.5) for folder in folders]


# Sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vertex", [0, 1, 2])
def test_a_vertex_reproduces_its_expert_bit_for_bit(tmp_path, dtype, vertex):
    info = torch.finfo(dtype)
    extremes = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -SMALLEST[dtype], 1 + info.eps], dtype=dtype)
    experts = [write(tmp_path / f"{k}", draw(k, dtype) | {"extremes": extremes.roll(k)}) for k in range(3)]
    merge_checkpoints([(expert, float(k == vertex)) for k, expert in enumerate(experts)], tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (experts[vertex] / "model.safetensors").read_bytes()


def test_a_merge_is_the_weighted_sum(tmp_path):
    states = [draw(k) for k in range(4)]
    weights = (0.1, 0.4, 0.3, 0.2)
    experts = [write(tmp_path / f"{k}", state) for k, state in enumerate(states)]
    merge_checkpoints(list(zip(experts, weights, strict=True)), tmp_path / "out")
    for name, value in weighted(states, weights).items():
        torch.testing.assert_close(read(tmp_path / "out")[name].double(), value, rtol=0, atol=5e-7)


def test_differences_are_rounded_not_weights(tmp_path):
    """Experts that differ by a few units in the last place: a sum of products would be off by as much as that."""
    first = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 1
    unit = torch.finfo(torch.float32).eps
    states = [{"w": first + k * unit * torch.ones(4096)} for k in (0, 2, 4)]
    experts = [write(tmp_path / f"{k}", state) for k, state in enumerate(states)]
    merge_checkpoints([(experts[0], 0.25), (experts[1], 0.5), (experts[2], 0.25)], tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["w"], states[1]["w"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_experts_share_stays_bit_for_bit(tmp_path, dtype):
    """Element by element: the sign of a zero too, and beside elements that differ."""
    shared = torch.cat([draw(0, dtype, ((1000,),))["layer.0.weight"], torch.tensor([-0.0, 0.0], dtype=dtype)])
    states = [{"shared": shared, "partly": torch.cat([shared, torch.full((5,), k).to(dtype)])} for k in range(3)]
    experts = [write(tmp_path / f"{k}", state) for k, state in enumerate(states)]
    merge_checkpoints([(experts[0], 1 / 3), (experts[1], 1 / 3), (experts[2], 1 / 3)], tmp_path / "out")
    merged = read(tmp_path / "out")
    assert as_bytes(merged)["shared"] == as_bytes(states[0])["shared"]
    assert as_bytes({"partly": merged["partly"][:-5]}) == as_bytes({"partly": shared})
    torch.testing.assert_close(merged["partly"][-5:].float(), torch.ones(5), rtol=HALF_UNIT[dtype], atol=0)


@st.composite
def mixtures(draw_from):
    """Shapes and dtypes of some tensors, weights of some experts, how many shards each expert has, a seed."""
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    tensors = draw_from(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=5))
    parts = draw_from(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any))
    shards = draw_from(st.lists(st.integers(1, 3), min_size=len(parts), max_size=len(parts)))
    return tensors, [part / sum(parts) for part in parts], shards, draw_from(st.integers(0, 2**32 - 1))


@given(mixtures())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_checkpoints_merge_to_their_weighted_sum_in_any_order(tmp_path, mixture):
    tensors, weights, shards, seed = mixture
    generator = torch.Generator().manual_seed(seed)
    states = [
        {f"t{i}": (10 * torch.randn(shape, generator=generator)).to(dtype) for i, (shape, dtype) in enumerate(tensors)}
        for _ in weights
    ]
    place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    experts = [
        write(place / f"{k}", state, shards=min(n, len(tensors)))
        for k, (state, n) in enumerate(zip(states, shards, strict=True))
    ]
    given_order = list(zip(experts, weights, strict=True))
    done = merge_checkpoints(given_order, place / "out")
    merge_checkpoints(given_order[::-1], place / "reversed")
    assert file_names(place / "out") == file_names(experts[0])
    assert file_names(place / "reversed") == file_names(experts[-1])
    assert (done.tensors, done.bytes) == (len(tensors), sum(tensor.nbytes for tensor in states[0].values()))
    merged, mirrored = read(place / "out"), read(place / "reversed")
    assert merged.keys() == mirrored.keys() == states[0].keys()
    for name, value in weighted(states, weights).items():
        dtype = states[0][name].dtype
        largest = torch.stack([state[name].double().abs() for state in states]).amax(dim=0)
        allowed = largest * (HALF_UNIT[dtype] + 20 * HALF_UNIT[torch.float32]) + SMALLEST[dtype]
        for result in (merged, mirrored):
            assert result[name].dtype == dtype
            assert result[name].shape == value.shape
            assert bool(((result[name].double() - value).abs() <= allowed).all())


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_blocks_nor_threads_change_the_bytes(tmp_path, monkeypatch, dtype):
    """A tensor is never held whole: blocks far smaller than it give the same result."""
    experts = [write(tmp_path / f"{k}", draw(k, dtype, ((97, 103), (3,)))) for k in range(3)]
    weights = list(zip(experts, (0.5, 0.2, 0.3), strict=True))
    merge_checkpoints(weights, tmp_path / "whole")
    most = []
    fill = checkpoints._fill
    monkeypatch.setattr(checkpoints, "_fill", lambda raw, size, *rest: most.append(len(raw)) or fill(raw, size, *rest))
    monkeypatch.setattr(checkpoints, "BLOCK", 256)
    monkeypatch.setattr(checkpoints, "SPAN", 1024)
    monkeypatch.setattr(checkpoints, "MOST_THREADS", 3)
    merge_checkpoints(weights, tmp_path / "blocks")
    assert max(most) == 256
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "blocks/model.safetensors").read_bytes()


def test_merging_leaves_torch_its_threads(tmp_path, pair):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        merge_checkpoints(halves(pair), tmp_path / "out")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_whole_numbers_and_flags_are_kept_where_all_agree(tmp_path):
    fixed = {"steps": torch.tensor([3, 4]), "mask": torch.tensor([True, False]), "exact": torch.rand(3).double()}
    experts = [write(tmp_path / name, draw(seed) | fixed) for seed, name in enumerate("ab")]
    merge_checkpoints(halves(experts), tmp_path / "out")
    merged = read(tmp_path / "out")
    assert all(torch.equal(merged[name], value) for name, value in fixed.items())


@pytest.mark.parametrize(("name", "values"), [("steps", (3, 4)), ("mask", (True, False)), ("exact", (1.0, 2.0))])
def test_whole_numbers_that_differ_are_refused_by_name(tmp_path, name, values):
    tensors = [np.asarray(value, dtype=np.float64 if name == "exact" else None) for value in values]
    experts = [write(tmp_path / f"{k}", draw(k) | {name: torch.from_numpy(t)}) for k, t in enumerate(tensors)]
    with pytest.raises(ModelError, match=rf"^{name} \((I64|BOOL|F64)\) differs between .*/0/.* and .*/1/"):
        merge_checkpoints(halves(experts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Files


def test_the_layout_is_that_of_the_first_checkpoint(tmp_path):
    shapes = ((7, 5), (64,), (), (2, 3))
    experts = [write(tmp_path / f"{n}", draw(n, shapes=shapes), shards=n) for n in (3, 1, 2)]
    done = merge_checkpoints([(experts[0], 0.5), (experts[1], 0.3), (experts[2], 0.2)], tmp_path / "out")
    assert file_names(tmp_path / "out") == file_names(experts[0])
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as ours, safetensors.safe_open(experts[0] / file.name, "pt") as first:
            assert ours.keys() == first.keys()
            assert ours.metadata() == first.metadata() == {"format": "pt"}
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (experts[0] / index).read_bytes()
    assert (done.path, done.kind, done.tensors) == (tmp_path / "out", "checkpoint", 4)
    assert (done.bytes, done.dtype) == (4 * (35 + 64 + 1 + 6), "float32")


def test_dtypes_are_named_by_their_share(tmp_path):
    state = {"norm": torch.ones(3), "matrix": torch.ones(9, 9).bfloat16(), "step": torch.tensor(1)}
    experts = [write(tmp_path / name, state) for name in "ab"]
    assert merge_checkpoints(halves(experts), tmp_path / "out").dtype == "bfloat16, float32, I64"


def test_settings_are_copied_from_the_first_and_training_leftovers_are_not(tmp_path, pair):
    kept = ("generation_config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "LICENSE")
    left = (
        "README.md",
        "pytorch_model.bin",
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "rng_state.pth",
    )
    left += (".gitattributes", "consolidated.safetensors", "model.gguf", "train_results.json", "model.bin.index.json")
    for name in (*kept, *left):
        (pair[0] / name).write_text('{"of": "the first"}')
    (pair[1] / "notes.txt").write_text("of the second")
    for name in ("checkpoints", "additional_chat_templates"):
        (pair[0] / name).mkdir()
        (pair[0] / name / "tool.jinja").write_text("{{ messages }}")
    merge_checkpoints(halves(pair), tmp_path / "out")
    expected = {*kept, "config.json", "model.safetensors", "additional_chat_templates"}
    assert set(file_names(tmp_path / "out")) == expected
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"of": "the first"}'
    assert (tmp_path / "out/additional_chat_templates/tool.jinja").exists()


def test_a_checkpoint_of_links_into_a_cache_becomes_one_of_files(tmp_path, pair):
    (tmp_path / "blobs").mkdir()
    for name in file_names(pair[0]):
        shutil.move(pair[0] / name, tmp_path / "blobs" / name)
        (pair[0] / name).symlink_to(tmp_path / "blobs" / name)
    merge_checkpoints(halves(pair), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


# What is refused


def set_config(**changes):
    return lambda a, b: (b / "config.json").write_text(json.dumps(CONFIG | changes))


def replace(**tensors):
    return lambda a, b: safetensors.torch.save_file(draw(1) | tensors, b / "model.safetensors")


def drop_weights(a, b):
    (b / "model.safetensors").unlink()


def only_pickled(a, b):
    drop_weights(a, b)
    (b / "pytorch_model.bin").write_bytes(b"\x80")


def write_both(name, first, second):
    def change(a, b):
        (a / name).write_text(first)
        (b / name).write_text(second)

    return change


def index_of(weight_map):
    def change(a, b):
        drop_weights(a, b)
        (b / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def index_that_forgets(a, b):
    (b / "model.safetensors").rename(b / "all.safetensors")
    (b / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layer.0.weight": "all.safetensors"}}))


BROKEN = torch.zeros(7, 5)
BROKEN[3, 2] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_weights, r"/b has no model\.safetensors"),
        (only_pickled, r"/b has pickled weights only \(pytorch_model\.bin\)"),
        (lambda a, b: (b / "config.json").unlink(), r"/b is not a checkpoint: it has neither config\.json nor"),
        (lambda a, b: (b / "config.json").write_text("{"), r"/b/config\.json cannot be read"),
        (lambda a, b: (b / "config.json").write_text("[]"), r"/b/config\.json holds a list, not an object"),
        (
            lambda a, b: (b / "model.safetensors").write_bytes(b"version https://git-lfs"),
            r"cannot be read as safetensors",
        ),
        (
            lambda a, b: os.truncate(b / "model.safetensors", 300),
            r"/b/model\.safetensors cannot be read as safetensors",
        ),
        (index_of({}), r"/b/model\.safetensors\.index\.json lists no tensors"),
        (index_of({"x": "gone.safetensors"}), r"names the file 'gone\.safetensors', which is not in .*/b"),
        (index_of({"x": "../a/model.safetensors"}), r"names the file '\.\./a/model\.safetensors', which is not in"),
        (index_that_forgets, r"all\.safetensors: 2 tensors are in the file and not in .*index\.json, such as layer\.1"),
        (set_config(quantization_config={"bits": 4}), r"/b is quantised"),
        (set_config(text_config={"quantization_config": {"bits": 4}}), r"/b is quantised"),
        (set_config(model_type="qwen2"), r"not of one architecture: .*model_type is 'llama' and 'qwen2'"),
        (set_config(text_config={"layers": 3}), r"not of one architecture: .*text_config\.layers is 2 and 3"),
        (set_config(rope=1), r"not of one architecture: .*rope is None and 1"),
        (replace(extra=torch.ones(2)), r"^1 tensors are in .*/b and not in .*/a, such as extra$"),
        (
            lambda a, b: safetensors.torch.save_file({"layer.1.weight": torch.ones(64)}, b / "model.safetensors"),
            r"^2 tensors are in .*/a and not in .*/b, such as layer\.0\.weight$",
        ),
        (
            replace(**{"layer.0.weight": torch.ones(5, 7)}),
            r"^layer\.0\.weight has shape \(7, 5\) in .* and \(5, 7\) in",
        ),
        (
            replace(**{"layer.0.weight": torch.ones(7, 5).half()}),
            r"^layer\.0\.weight has dtype F32 in .* and F16 in .*/b/",
        ),
        (replace(**{"layer.0.weight": BROKEN}), r"^layer\.0\.weight in .*/b/model\.safetensors holds 1 values or more"),
        (
            replace(**{"layer.0.weight": BROKEN.nan_to_num(torch.inf)}),
            r"^layer\.0\.weight in .*/b/model\.safetensors holds",
        ),
        (
            write_both("tokenizer.json", '{"model": 1}', '{"model": 2}'),
            r"different tokenizers: tokenizer\.json differs",
        ),
        (write_both("merges.txt", "a b", "b a"), r"different tokenizers: merges\.txt differs"),
        (write_both("chat_template.jinja", "a", "b"), r"different chat templates"),
        (
            write_both("tokenizer_config.json", '{"chat_template": "a"}', '{"chat_template": "b"}'),
            r"different chat templ",
        ),
    ],
)
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_checkpoints_that_cannot_be_merged_are_refused_by_name(tmp_path, pair, change, message, weight):
    """Those of weight zero too."""
    change(*pair)
    with pytest.raises(ModelError, match=message):
        merge_checkpoints([(pair[0], 1 - weight), (pair[1], weight)], tmp_path / "out")
    assert file_names(tmp_path) == ["a", "b"]


def test_settings_that_make_no_other_model_are_no_difference(tmp_path, pair):
    set_config(transformers_version="4.57", torch_dtype="float32", use_cache=False, quantization_config=None)(*pair)
    config = json.loads((pair[0] / "config.json").read_text())
    (pair[0] / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    write_both("tokenizer.json", '{"truncation": null, "model": 1}', '{"truncation": {"length": 9}, "model": 1}')(*pair)
    (pair[0] / "chat_template.jinja").write_text("{{ messages }}")
    (pair[1] / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert merge_checkpoints(halves(pair), tmp_path / "out").tensors == 3


def test_experts_that_overflow_their_difference_are_refused(tmp_path):
    large = torch.tensor([3e38])
    experts = [write(tmp_path / "a", {"w": large}), write(tmp_path / "b", {"w": -large})]
    with pytest.raises(ModelError, match=r"^w: the experts differ by more than float32 can hold"):
        merge_checkpoints(halves(experts), tmp_path / "out")


def test_large_values_are_not_taken_for_infinite_ones(tmp_path):
    large = torch.full((4,), 3e38)  # their sum is infinite
    experts = [write(tmp_path / name, {"w": large}) for name in "ab"]
    merge_checkpoints(halves(experts), tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["w"], large)


def test_an_expert_that_shrinks_while_it_is_read_is_refused(tmp_path, pair, monkeypatch):
    copy = checkpoints._write_tensors

    def shrink_first(layout, source, folder):
        os.truncate(pair[1] / "model.safetensors", 200)
        copy(layout, source, folder)

    monkeypatch.setattr(checkpoints, "_write_tensors", shrink_first)
    with pytest.raises(ModelError, match=r"/b/model\.safetensors became shorter while it was read"):
        merge_checkpoints(halves(pair), tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.4), r"weights must sum to 1, these sum to 0\.9: .*/a=0\.5, .*/b=0\.4"),
        ((1.5, -0.5), r"the weight of .*/b is -0\.5"),
        ((np.nan, 1.0), r"the weight of .*/a is nan"),
        ((np.inf, 1.0), r"the weight of .*/a is inf"),
        ((0.5, 0.5 + 3e-6), r"sum to 1\.000003"),
    ],
)
def test_weights_off_the_simplex_are_refused(tmp_path, pair, weights, message):
    with pytest.raises(RecipeError, match=message):
        merge_checkpoints(list(zip(pair, weights, strict=True)), tmp_path / "out")


def test_weights_written_with_six_decimals_are_taken(tmp_path, pair):
    merge_checkpoints([(pair[0], 0.666667), (pair[1], 0.333333)], tmp_path / "out")


def test_no_checkpoint_at_all_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no checkpoint was given"):
        merge_checkpoints([], tmp_path / "out")


def test_a_folder_that_is_not_there_is_refused(tmp_path, pair):
    with pytest.raises(ModelError, match=r"/c is not a folder"):
        merge_checkpoints(halves([pair[0], tmp_path / "c"]), tmp_path / "out")


def test_one_checkpoint_under_two_names_is_refused(tmp_path, pair):
    (tmp_path / "c").symlink_to(pair[0])
    with pytest.raises(RecipeError, match=r"/c and .*/a are one checkpoint"):
        merge_checkpoints(halves([pair[0], tmp_path / "c"]), tmp_path / "out")


def test_a_base_is_refused_beside_full_checkpoints(tmp_path, pair):
    with pytest.raises(RecipeError, match=r"a base \(.*/a\) is for adapters"):
        merge_checkpoints([(pair[1], 1.0)], tmp_path / "out", base=pair[0])


def test_nothing_that_exists_is_written_over(tmp_path, pair):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("out", "file"):
        with pytest.raises(RecipeError, match=rf"/{name} exists already"):
            merge_checkpoints(halves(pair), tmp_path / name)
    assert file_names(tmp_path / "out") == ["mine.txt"]


def test_an_empty_folder_may_be_the_result(tmp_path, pair):
    (tmp_path / "out").mkdir()
    merge_checkpoints(halves(pair), tmp_path / "out")
    assert file_names(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_a_result_inside_an_input_is_refused(tmp_path, pair):
    with pytest.raises(RecipeError, match=r"/b/deep/out lies inside .*/b"):
        merge_checkpoints(halves(pair), pair[1] / "deep" / "out")


# Crashes and full disks


def test_a_failed_write_leaves_nothing(tmp_path, pair, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", no_space)
    with pytest.raises(
        EnvironmentFault, match=r"out could not be written, and nothing was left there: .*No space left"
    ):
        merge_checkpoints(halves(pair), tmp_path / "out")
    assert file_names(tmp_path) == ["a", "b"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, pair, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=399))
    monkeypatch.setattr(checkpoints, "_write_tensors", None)
    with pytest.raises(EnvironmentFault, match=r"out needs 400 bytes at .*, 399 are free"):
        merge_checkpoints(halves(pair), tmp_path / "out")
    assert file_names(tmp_path) == ["a", "b"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, pair):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"/file/out cannot be written"):
        merge_checkpoints(halves(pair), tmp_path / "file" / "out")


def test_a_kill_leaves_no_result_and_the_next_attempt_clears_up(tmp_path, pair, monkeypatch):
    killed = os.fork()
    if not killed:  # pragma: no cover - the child, killed when all is written and nothing renamed
        monkeypatch.setattr(checkpoints, "sync_tree", lambda folder: os.kill(os.getpid(), signal.SIGKILL))
        try:
            merge_checkpoints(halves(pair), tmp_path / "out")
        finally:
            os._exit(1)
    _, status = os.waitpid(killed, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert file_names(tmp_path) == [".out.partial", "a", "b"]
    (tmp_path / ".out.partial" / "stale.txt").write_text("of an attempt with other files")
    merge_checkpoints(halves(pair), tmp_path / "out")
    assert file_names(tmp_path) == ["a", "b", "out"]
    assert file_names(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_every_file_is_synced_whole_before_the_result_has_its_name(tmp_path, pair, monkeypatch):
    """Files are synced as they grow, too, which must not take the place of the last time."""
    (pair[0] / "tokenizer_config.json").write_text("{}")
    synced, renamed = {}, []
    fsync = durable.sync_file

    def watch(path):
        renamed.append((tmp_path / "out").exists())
        synced[path.name] = path.read_bytes()
        fsync(path)

    monkeypatch.setattr(checkpoints, "SPAN", 64)
    monkeypatch.setattr(checkpoints, "sync_file", watch)
    monkeypatch.setattr(durable, "sync_file", watch)
    merge_checkpoints(halves(pair), tmp_path / "out")
    assert synced == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(renamed) > len(synced)
    assert not any(renamed)


def test_two_processes_do_not_write_one_result(tmp_path, pair):
    (tmp_path / ".out.partial").mkdir()
    other = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    try:
        with pytest.raises(RunInUseError, match="out is being written by another process"):
            merge_checkpoints(halves(pair), tmp_path / "out")
    finally:
        os.close(other)
    merge_checkpoints(halves(pair), tmp_path / "out")


# Model families


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    built = {name: tiny_families.build_checkpoint(name, folder / name) for name in FAMILIES if name != "tiny"}
    return built | {"tiny": WEIGHTS}


def load(folder):
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_states_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_its_merged_checkpoint_whole(bases, tmp_path, family):
    states, experts = [], []
    for k in range(3):
        model = load(bases[family])
        torch.manual_seed(k)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"{k}")
        states.append(state_of(model))
        experts.append(tmp_path / f"{k}")
    weights = (0.2, 0.5, 0.3)
    merge_checkpoints(list(zip(experts, weights, strict=True)), tmp_path / "out")
    assert_states_close(state_of(load(tmp_path / "out")), weighted(states, weights), 1e-6)


# Adapters


def linear_names(model):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]


def train_adapter(base, folder, seed, modules=linear_names, **options):
    """An adapter with random factors on some of the linear layers, saved by PEFT, and what PEFT itself merges it to."""
    model = load(base)
    names = modules(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return state_of(adapted.merge_and_unload())


def every_other(model):
    return linear_names(model)[::2]


def attention_only(model):
    return [name for name in linear_names(model) if "attn" in name or "attention" in name]


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """For each family: folders of three adapters as unlike as PEFT allows, and the dense merge by PEFT's own merges."""
    made = {}
    for family in ADAPTED:
        folder = tmp_path_factory.mktemp(family)
        kinds = (
            {"r": 2, "lora_alpha": 4},
            {"r": 3, "lora_alpha": 5, "use_rslora": True, "modules": every_other},
            {
                "r": 2,
                "lora_alpha": 7,
                "rank_pattern": {"q_proj": 4},
                "alpha_pattern": {"layers.1.*v_proj": 3, "q_proj": 9},
            },
        )
        states = [train_adapter(bases[family], folder / f"{k}", k, **kind) for k, kind in enumerate(kinds)]
        made[family] = [folder / f"{k}" for k in range(3)], states
    return made


WEIGHTS_OF_THREE = (0.5, 0.2, 0.3)


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_side_by_side_are_the_dense_merge(bases, adapters, tmp_path, family):
    folders, states = adapters[family]
    done = merge_checkpoints(list(zip(folders, WEIGHTS_OF_THREE, strict=True)), tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(load(bases[family]), tmp_path / "out")
    assert_states_close(state_of(loaded.merge_and_unload()), weighted(states, WEIGHTS_OF_THREE))
    assert (done.kind, done.dtype) == ("adapter", "float32")
    with safetensors.safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == done.tensors
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_and_base_are_the_dense_merge(bases, adapters, tmp_path, family):
    """Found by the names on disk, which for half of the families are not those in memory."""
    folders, states = adapters[family]
    done = merge_checkpoints(list(zip(folders, WEIGHTS_OF_THREE, strict=True)), tmp_path / "out", base=bases[family])
    assert_states_close(state_of(load(tmp_path / "out")), weighted(states, WEIGHTS_OF_THREE))
    assert done.kind == "checkpoint"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (bases[family] / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_an_adapter_of_weight_zero_adds_no_rank(adapters, tmp_path):
    folders, _ = adapters["tiny"]
    merge_checkpoints([(folders[0], 1.0), (folders[1], 0.0)], tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})


def test_adapters_on_different_modules_add_up(bases, tmp_path):
    """Each module has the rank of those that touch it, and modules that none touches stay untouched."""
    halves_of = [lambda model: attention_only(model)[:3], lambda model: attention_only(model)[2:5]]
    states = [train_adapter(bases["tiny"], tmp_path / f"{k}", k, m, r=2) for k, m in enumerate(halves_of)]
    merge_checkpoints([(tmp_path / "0", 0.25), (tmp_path / "1", 0.75)], tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(load(bases["tiny"]), tmp_path / "out")
    ranks = json.loads((tmp_path / "out/adapter_config.json").read_text())["rank_pattern"]
    assert sorted(ranks.values()) == [2, 2, 2, 2, 4]
    assert_states_close(state_of(loaded.merge_and_unload()), weighted(states, (0.25, 0.75)))


def test_a_module_whose_path_ends_like_anothers_keeps_its_own_rank(tmp_path):
    sizes = {"q": (3, 2), "layers.0.q": (3, 2)}
    folders = [plain_adapter(tmp_path / "a", sizes), plain_adapter(tmp_path / "b", {"layers.0.q": (3, 2)})]
    merge_checkpoints(halves(folders), tmp_path / "out")
    ranks = peft.PeftConfig.from_pretrained(tmp_path / "out").rank_pattern
    assert [ranks[get_pattern_key(list(ranks), module)] for module in sizes] == [1, 2]


def test_an_adapter_merges_into_a_base_of_half_precision(bases, tmp_path):
    model = load(bases["tiny"])
    base = tmp_path / "base"
    model.bfloat16().save_pretrained(base)
    expected = train_adapter(base, tmp_path / "adapter", 0, r=2)
    assert merge_checkpoints([(tmp_path / "adapter", 1.0)], tmp_path / "out", base=base).dtype == "bfloat16"
    found = read(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(found, torch.bfloat16)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, rtol=HALF_UNIT[torch.bfloat16], atol=1e-6)


def test_tensors_that_no_adapter_touches_keep_their_bytes(bases, adapters, tmp_path):
    folders, _ = adapters["internvl"]
    merge_checkpoints([(folders[1], 1.0)], tmp_path / "out", base=bases["internvl"])
    before, after = as_bytes(read(bases["internvl"])), as_bytes(read(tmp_path / "out"))
    changed = {name for name in before if before[name] != after[name]}
    assert len(changed) == len(read(folders[1])) / 2
    assert not any("embed" in name or "norm" in name for name in changed)


def test_large_updates_are_made_span_by_span(bases, adapters, tmp_path, monkeypatch):
    folders, _ = adapters["internvl"]
    merge_checkpoints([(folders[0], 1.0)], tmp_path / "whole", base=bases["internvl"])
    monkeypatch.setattr(checkpoints, "BLOCK", 256)
    monkeypatch.setattr(checkpoints, "SPAN", 832)  # not a whole number of rows
    merge_checkpoints([(folders[0], 1.0)], tmp_path / "spans", base=bases["internvl"])
    assert_states_close(read(tmp_path / "spans"), read(tmp_path / "whole"), 1e-6)


# Names in memory and names on disk


def plain_adapter(folder, factors, **config):
    """An adapter as PEFT would write it. `factors` has the shape of each module's weight; all ones, of rank 1."""
    folder.mkdir()
    tensors = {}
    for module, (rows, columns) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(1, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(rows, 1)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "hub/base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def adapted_key(tmp_path, module, shapes, *, shape=(3, 2), config=CONFIG):
    """Which tensor of a base with these names and shapes an adapter on `module` changes."""
    base = write(tmp_path / "base", {key: torch.zeros(size) for key, size in shapes.items()}, config=config)
    merge_checkpoints([(plain_adapter(tmp_path / "adapter", {module: shape}), 1.0)], tmp_path / "out", base=base)
    (changed,) = (key for key, tensor in read(tmp_path / "out").items() if tensor.any())
    return changed


LLAVA = (
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.layers.1.self_attn.q_proj.weight",
    "language_model.lm_head.weight",
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "multi_modal_projector.linear_1.weight",
)
QWEN = (
    "model.layers.0.self_attn.q_proj.weight",
    "visual.blocks.0.mlp.up_proj.weight",
    "visual.merger.mlp.0.weight",
    "lm_head.weight",
)
LANGUAGE = ("language_model.layers.0.self_attn.q_proj.weight",)


@pytest.mark.parametrize(
    ("module", "keys", "expected"),
    [
        ("model.language_model.layers.1.self_attn.q_proj", LLAVA, 1),
        ("language_model.model.layers.1.self_attn.q_proj", LLAVA, 1),
        ("lm_head", LLAVA, 2),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", LLAVA, 3),
        ("model.multi_modal_projector.linear_1", LLAVA, 4),
        ("model.language_model.layers.0.self_attn.q_proj", QWEN, 0),
        ("model.visual.blocks.0.mlp.up_proj", QWEN, 1),
        ("model.visual.merger.mlp.0", QWEN, 2),
        ("lm_head", QWEN, 3),
    ],
)
def test_a_module_is_found_under_the_name_it_has_on_disk(tmp_path, module, keys, expected):
    assert adapted_key(tmp_path, module, dict.fromkeys(keys, (3, 2))) == keys[expected]


@pytest.mark.parametrize(
    ("module", "keys", "message"),
    [
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", LANGUAGE, "has no counterpart"),
        ("model.language_model.layers.1.self_attn.q_proj", LANGUAGE, "has no counterpart"),
        ("model.language_model.layers.0.self_attn.k_proj", LANGUAGE, "has no counterpart"),
        ("lm_head", LANGUAGE, "has no counterpart"),
        ("model.layers.0.self_attn.q_proj", LLAVA, r"could be language_model\..*q_proj\.weight or vision_tower\."),
    ],
)
def test_a_module_that_is_not_found_for_certain_is_refused(tmp_path, module, keys, message):
    with pytest.raises(ModelError, match=rf"^the adapted module {module} {message}.*; is this the adapter's base\?"):
        adapted_key(tmp_path, module, dict.fromkeys(keys, (3, 2)))


def test_the_same_words_win_over_more_of_them(tmp_path):
    keys = (LLAVA[0], LLAVA[0].replace("model.layers", "draft.layers"))
    found = adapted_key(tmp_path, "model.language_model.layers.0.self_attn.q_proj", dict.fromkeys(keys, (3, 2)))
    assert found == keys[0]


def test_shapes_tell_modules_of_one_name_apart(tmp_path):
    shapes = dict.fromkeys(LLAVA, (3, 2)) | {LLAVA[3]: (4, 4)}
    assert adapted_key(tmp_path, "model.layers.0.self_attn.q_proj", shapes) == LLAVA[0]


def test_layers_are_never_mistaken_for_each_other(tmp_path):
    """Two numbers in a name: the same words and numbers in another order are another module."""
    keys = ("model.layers.0.experts.1.w.weight", "model.layers.1.experts.0.w.weight")
    found = adapted_key(tmp_path, "model.language_model.layers.1.experts.0.w", dict.fromkeys(keys, (3, 2)))
    assert found == keys[1]


@pytest.mark.parametrize("stored", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int8)])
def test_a_module_of_another_shape_or_kind_is_refused(tmp_path, stored):
    base = write(tmp_path / "base", {LANGUAGE[0]: stored})
    adapter = plain_adapter(tmp_path / "adapter", {"model.language_model.layers.0.self_attn.q_proj": (3, 2)})
    with pytest.raises(ModelError, match=r"by a matrix of shape \(3, 2\), language_model.* is (F32|I8) of shape"):
        merge_checkpoints([(adapter, 1.0)], tmp_path / "out", base=base)


def test_two_modules_are_not_merged_into_one(tmp_path):
    base = write(tmp_path / "base", {"layers.0.q.weight": torch.zeros(3, 2)})
    adapter = plain_adapter(tmp_path / "adapter", {"text.layers.0.q": (3, 2), "vision.layers.0.q": (3, 2)})
    with pytest.raises(ModelError, match=r"vision\.layers\.0\.q and text\.layers\.0\.q would both be merged into"):
        merge_checkpoints([(adapter, 1.0)], tmp_path / "out", base=base)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_an_adapted_head_that_is_tied_to_the_embeddings_is_refused(tmp_path, config):
    with pytest.raises(ModelError, match=r"^lm_head is tied to the embeddings"):
        adapted_key(tmp_path, "lm_head", {"lm_head.weight": (3, 2)}, config=config)


# Adapters that are refused


def set_adapter(**changes):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return change


def add_tensors(**tensors):
    def change(folder):
        file = folder / "adapter_model.safetensors"
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(safetensors.torch.load_file(file) | named, file)

    return change


def pickle_only(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def save_only(**tensors):
    return lambda folder: safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_adapter(peft_type="IA3"), r"/b is a IA3 adapter; only LoRA"),
        (set_adapter(use_dora=True), r"/b: its adapter_config\.json sets use_dora to True"),
        (set_adapter(lora_bias=True), r"sets lora_bias to True"),
        (set_adapter(bias="all"), r"sets bias to 'all'"),
        (set_adapter(modules_to_save=["lm_head"]), r"sets modules_to_save to \['lm_head'\]"),
        (set_adapter(target_parameters=["experts.w"]), r"sets target_parameters to"),
        (set_adapter(layer_replication=[[0, 2]]), r"sets layer_replication to"),
        (set_adapter(trainable_token_indices=[1]), r"sets trainable_token_indices to"),
        (set_adapter(fan_in_fan_out=True), r"sets fan_in_fan_out to True"),
        (set_adapter(init_lora_weights="pissa"), r"sets init_lora_weights to 'pissa'"),
        (set_adapter(option_of_next_year={"x": 1}), r"sets option_of_next_year to"),
        (set_adapter(base_model_name_or_path="hub/other"), r"/a was trained on hub/base, .*/b on hub/other"),
        (set_adapter(revision="v2"), r"only adapters of one base can be merged"),
        (set_adapter(r=2), r"/b: layers\.0\.q has rank 1, adapter_config\.json says 2"),
        (set_adapter(rank_pattern={"q": 2}), r"/b: layers\.0\.q has rank 1, adapter_config\.json says 2"),
        (set_adapter(lora_alpha=None), r"says lora_alpha None, a number is needed"),
        (
            add_tensors(base_model__model__embed__lora_embedding_A=torch.ones(1, 2)),
            r"lora_embedding_A is not one of a pair",
        ),
        (
            add_tensors(base_model__model__layers__0__q__lora_magnitude_vector=torch.ones(3)),
            r"magnitude_vector is not one",
        ),
        (
            add_tensors(base_model__model__layers__0__q__lora_B__bias=torch.ones(3)),
            r"lora_B\.bias is not one of a pair",
        ),
        (add_tensors(base_model__model__x__lora_A__weight=torch.ones(1, 2)), r"x\.lora_A\.weight is not one of a pair"),
        (
            add_tensors(base_model__model__layers__0__q__lora_A__weight=torch.ones(2, 2)),
            r"have shapes \(3, 1\) and \(2, 2\)",
        ),
        (
            add_tensors(base_model__model__layers__0__q__lora_A__weight=torch.ones(1, 5)),
            r"layers\.0\.q has another size in",
        ),
        (
            add_tensors(base_model__model__layers__0__q__lora_A__weight=torch.ones(1, 2, 1, 1)),
            r"lora_A\.weight has shape \(1, 2, 1, 1\); only linear layers",
        ),
        (
            add_tensors(base_model__model__layers__0__q__lora_A__weight=torch.full((1, 2), torch.nan)),
            r"^base_model\.model\.layers\.0\.q\.lora_A\.weight in .*/b/adapter_model\.safetensors holds values",
        ),
        (save_only(), r"/b/adapter_model\.safetensors holds no LoRA factors"),
        (pickle_only, r"/b has pickled weights only \(adapter_model\.bin\)"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"/b has no adapter_model\.safetensors"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 99), r"cannot be read as safetensors"),
    ],
)
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_adapters_that_cannot_be_merged_exactly_are_refused_by_name(tmp_path, change, message, weight):
    folders = [plain_adapter(tmp_path / name, {"layers.0.q": (3, 2)}) for name in "ab"]
    change(folders[1])
    with pytest.raises(ModelError, match=message):
        merge_checkpoints([(folders[0], 1 - weight), (folders[1], weight)], tmp_path / "out")
    assert file_names(tmp_path) == ["a", "b"]


def test_adapters_of_one_local_base_may_spell_its_path_differently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    paths = ("base", str(tmp_path / "base"))
    folders = [
        plain_adapter(tmp_path / f"{k}", {"layers.0.q": (3, 2)}, base_model_name_or_path=path)
        for k, path in enumerate(paths)
    ]
    assert merge_checkpoints(halves(folders), tmp_path / "out").tensors == 2


def test_adapters_and_full_checkpoints_are_not_mixed(tmp_path, pair):
    adapter = plain_adapter(tmp_path / "adapter", {"layers.0.q": (3, 2)})
    with pytest.raises(ModelError, match=r"/adapter is an adapter and .*/a a full checkpoint; merge those of one kind"):
        merge_checkpoints(halves([pair[0], adapter]), tmp_path / "out")


def test_an_adapter_is_no_base(tmp_path):
    folders = [plain_adapter(tmp_path / name, {"layers.0.q": (3, 2)}) for name in "ab"]
    with pytest.raises(ModelError, match=r"/b is an adapter, and a full checkpoint is needed"):
        merge_checkpoints([(folders[0], 1.0)], tmp_path / "out", base=folders[1])


def test_another_base_than_the_adapters_own_is_said(tmp_path, caplog):
    bases = [write(tmp_path / name, {"layers.0.q.weight": torch.zeros(3, 2)}) for name in ("base", "other")]
    adapter = plain_adapter(tmp_path / "a", {"layers.0.q": (3, 2)}, base_model_name_or_path=str(bases[0]))
    merge_checkpoints([(adapter, 1.0)], tmp_path / "own", base=bases[0])
    assert caplog.messages == []
    merge_checkpoints([(adapter, 1.0)], tmp_path / "foreign", base=bases[1])
    assert caplog.messages == [f"{adapter} was trained on {bases[0]}, and is merged into {bases[1]}"]


def test_a_base_with_broken_weights_is_refused(tmp_path):
    adapter = plain_adapter(tmp_path / "a", {"layers.0.q": (3, 2)})
    for name in ("layers.0.q.weight", "layers.0.norm.weight"):
        state = {"layers.0.q.weight": torch.zeros(3, 2), "layers.0.norm.weight": torch.ones(3)}
        state[name][1] = torch.nan
        base = write(tmp_path / name, state)
        with pytest.raises(ModelError, match=rf"^{name} in .* holds"):
            merge_checkpoints([(adapter, 1.0)], tmp_path / "out", base=base)

"""Checkpoints and their weights in, one merged checkpoint on disk out: `theta_w = sum_k w_k theta_k` (DESIGN 2.2).

Three cases. Full checkpoints become one of the same keys, shapes, dtypes and shards. LoRA adapters become one adapter
whose factors are theirs side by side, which is the exact sum of products (to average factors is not: what PEFT calls
"linear" is off by more than the update itself). LoRA adapters and their base become a full checkpoint.

Tensors are read and written under the names they have on disk, so nothing depends on a table of architectures, and
nothing can be dropped by one that is out of date. The sum is a running mean in float32, `theta <- theta + v_k
(theta_k - theta)` with `v_k = w_k / (w_1 + .. + w_k)`, heaviest first: small differences are rounded, not large
weights; what the experts share stays as it is, bit for bit, and a vertex reproduces its expert bit for bit.

Price: every expert is read once and the result written once, a few megabytes at a time whatever the model's size. Four
experts on two cores take about twice the seconds of copying the result.

Trap: the result is stored in the experts' dtype. In bfloat16 (8 significant bits) a task vector of 10 / 1 / 0.3 % of
the weights is stored with an error of 2 / 17 / 48 % of itself, in every expert and once more in the result. For experts
that differ little, keep adapters, or float32. To rank candidate mixtures, merge in memory, never through such files.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from datalloy.durable import require_space, sync_file, sync_folder, sync_tree, write_json
from datalloy.errors import DatalloyError, EnvironmentFault, ModelError, RecipeError, RunInUseError
from datalloy.progress import track

log = logging.getLogger(__name__)

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # merged; other tensors must be equal

WEIGHTS_SUM_TOLERANCE = 1e-6
BLOCK = 1 << 19  # bytes of a tensor worked on at a time: few enough for a core's cache, enough to let threads overlap
SPAN = 1 << 23  # bytes of a tensor that a thread takes at a time
MOST_THREADS = 8  # more do not make a disk faster

# Of a checkpoint's folder, what does not belong into the merged one: other formats of the weights, the state and the
# records of a training, the card. Of its folders only that of further chat templates is copied.
NOT_COPIED = re.compile(
    r".+\.(safetensors|bin|pt|pth|ckpt|pkl|h5|msgpack|onnx|gguf|distcp)(\.index\.json)?"
    r"|trainer_.*|.+_results\.json|events\.out\..*|README.*|\..*|adapter_config\.json"
)
COPIED_FOLDER = "additional_chat_templates"

# Settings of config.json that do not make another model. The dtype is compared tensor by tensor.
VOLATILE = {"transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "use_cache"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")

# Options of LoRA that leave `W + s B A` true whatever they say, or that are checked by themselves. Any other option
# that is set makes the adapter something else, and one that PEFT adds tomorrow may.
# fmt: off
PLAIN_LORA = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}
# fmt: on
BASE_UNCHANGED = (True, False, None, "gaussian", "orthogonal", "eva")  # starts of LoRA that leave the base as it is


@dataclass(frozen=True)
class Merged:
    """What was written: so many tensors of so many bytes in all; `dtype` is theirs, that of most bytes first."""

    path: Path
    kind: Literal["checkpoint", "adapter"]
    tensors: int
    bytes: int
    dtype: str


def merge_checkpoints(weights: Sequence[tuple[Path, float]], out: Path, base: Path | None = None) -> Merged:
    """Write the weighted sum of checkpoints to the folder `out`, which must be new or empty.

    All are full checkpoints, or all are LoRA adapters; with adapters, `base` asks for a full checkpoint. Weights are
    not negative and sum to one. An expert of weight zero is checked like the others and adds nothing. Configuration,
    tokenizer, processor and chat template come from the first checkpoint, or from `base`.

    The same call gives the same bytes. `out` is complete or not there: it is written beside itself, synced, and
    renamed last; a killed attempt is cleared away by the next one.

    Raises RecipeError for weights and paths that make no sense, ModelError for checkpoints that cannot be merged
    exactly, EnvironmentFault where the disk fails, RunInUseError where another process is writing `out`.
    """
    _check_weights(weights)
    _check_out(out, [*(path for path, _ in weights), *([base] if base else [])])
    are_adapters = [_is_adapter(path) for path, _ in weights]
    if all(are_adapters):
        adapters = [(_Adapter.open(path), weight) for path, weight in weights]
        return _merge_adapters(adapters, out, base)
    if any(are_adapters):
        adapter, full = (weights[are_adapters.index(kind)][0] for kind in (True, False))
        raise ModelError(f"{adapter} is an adapter and {full} a full checkpoint; merge those of one kind")
    if base:
        raise RecipeError(f"a base ({base}) is for adapters; full checkpoints are summed without one")
    experts = [(_Checkpoint.open(path), weight) for path, weight in weights]
    first = experts[0][0]
    for other, _ in experts[1:]:
        _check_same_settings(first.folder, other.folder)
        _check_same_tensors(first, other)
    return _write_checkpoint(first, _WeightedSum(experts), out)


def _check_weights(weights: Sequence[tuple[Path, float]]) -> None:
    if not weights:
        raise RecipeError("nothing to merge: no checkpoint was given")
    listed = ", ".join(f"{path}={weight:g}" for path, weight in weights)
    for path, weight in weights:
        if not math.isfinite(weight) or weight < 0:
            raise RecipeError(f"the weight of {path} is {weight:g}; weights are numbers from 0 to 1")
    total = math.fsum(weight for _, weight in weights)
    if abs(total - 1) > WEIGHTS_SUM_TOLERANCE:
        raise RecipeError(f"weights must sum to 1, these sum to {total:.8g}: {listed}")
    places: dict[Path, Path] = {}
    for path, _ in weights:
        if not path.is_dir():
            raise ModelError(f"{path} is not a folder; give the folder of a checkpoint")
        if (place := path.resolve()) in places:
            raise RecipeError(
                f"{path} and {places[place]} are one checkpoint; give it once, with the sum of its weights"
            )
        places[place] = path


def _check_out(out: Path, inputs: Iterable[Path]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} exists already and is not an empty folder; name another one")
    for path in inputs:
        if out.resolve().is_relative_to(path.resolve()):
            raise RecipeError(f"{out} lies inside {path}, which is merged into it; name a folder elsewhere")


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists()


# Checkpoints as they lie on disk


class _Stored(NamedTuple):
    """Where a tensor lies: `size` bytes of `file` from `start` on. `dtype` is in the words of safetensors."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def open(self, position: int) -> FileIO:
        """The file, unbuffered, at byte `position` of the tensor."""
        file = self.file.open("rb", buffering=0)
        file.seek(self.start + position)
        return file


@dataclass(frozen=True)
class _Checkpoint:
    """A full checkpoint. `tensors` is in the order of the files and of the bytes in them."""

    folder: Path
    tensors: dict[str, _Stored]

    @classmethod
    def open(cls, folder: Path) -> "_Checkpoint":
        """Reads headers only. Raises ModelError by file for what is missing, damaged, pickled or quantised."""
        if _is_adapter(folder):
            raise ModelError(f"{folder} is an adapter, and a full checkpoint is needed")
        if not (folder / CONFIG).exists():
            raise ModelError(f"{folder} is not a checkpoint: it has neither {CONFIG} nor {ADAPTER_CONFIG}")
        config = dict(_settings(_read_json(folder / CONFIG)))
        if any("quantization_config" in key.split(".") and value is not None for key, value in config.items()):
            raise ModelError(f"{folder} is quantised; merge the checkpoints it was made from and quantise the result")
        shards = _shards(folder)
        tensors: dict[str, _Stored] = {}
        for file, keys in shards.items():
            found = _read_header(file)
            if keys is not None and keys != found.keys():
                raise ModelError(f"{file}: {_key_differences(INDEX, keys, 'the file', found.keys())}")
            tensors |= found
        return cls(folder, tensors)

    @property
    def size(self) -> int:
        return sum(stored.size for stored in self.tensors.values())


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, in order, each with the keys that the index lists for it; as from_pretrained finds them."""
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).exists():
        _refuse_missing_weights(folder, WEIGHTS)
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ModelError(f"{folder / INDEX} lists no tensors")
    keys_of: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        keys_of.setdefault(str(name), set()).add(key)
    for name in keys_of:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{folder / INDEX} names the file {name!r}, which is not in {folder}")
    return {folder / name: keys_of[name] for name in sorted(keys_of)}


def _refuse_missing_weights(folder: Path, wanted: str) -> None:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} has pickled weights only ({pickled[0]}), which can run code when read; load it where you "
            "trust it and save it again as safetensors"
        )
    raise ModelError(f"{folder} has no {wanted}")


def _read_header(file: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file by name, in the order of their bytes. Raises ModelError."""
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass  # refuses a header whose shapes, offsets and file size do not agree
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    header = _header_bytes(file)
    described = json.loads(header[8:])
    described.pop("__metadata__", None)
    tensors = {
        key: _Stored(file, entry["dtype"], tuple(entry["shape"]), len(header) + begin, end - begin)
        for key, entry in described.items()
        for begin, end in [entry["data_offsets"]]
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _header_bytes(file: Path) -> bytes:
    """What stands before the tensors: eight bytes of length and so much JSON."""
    with file.open("rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}, not an object")
    return value


# What has to be the same in all


def _check_same_tensors(first: _Checkpoint, other: _Checkpoint) -> None:
    if first.tensors.keys() != other.tensors.keys():
        raise ModelError(_key_differences(first.folder, first.tensors.keys(), other.folder, other.tensors.keys()))
    for key, stored in first.tensors.items():
        found = other.tensors[key]
        for what in ("shape", "dtype"):
            if (here := getattr(stored, what)) != (there := getattr(found, what)):
                raise ModelError(
                    f"{key} has {what} {here} in {stored.file} and {there} in {found.file}; experts come from one base "
                    "and are saved alike"
                )


def _key_differences(first: object, first_keys: Iterable[str], other: object, other_keys: Iterable[str]) -> str:
    only_first, only_other = (sorted(set(a) - set(b)) for a, b in ((first_keys, other_keys), (other_keys, first_keys)))
    parts = [
        f"{len(only)} tensors are in {here} and not in {there}, such as {only[0]}"
        for only, here, there in ((only_first, first, other), (only_other, other, first))
        if only
    ]
    return "; ".join(parts)


def _check_same_settings(first: Path, other: Path) -> None:
    """Architecture, tokenizer and chat template, each as far as both folders have it."""
    if (first / CONFIG).exists() and (other / CONFIG).exists():
        here, there = (dict(_settings(_read_json(folder / CONFIG))) for folder in (first, other))
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if differing:
            shown = "; ".join(f"{key} is {here.get(key)!r} and {there.get(key)!r}" for key in differing[:3])
            raise ModelError(f"{first} and {other} are not of one architecture: in {CONFIG}, {shown}")
    for name in TOKENIZER_FILES:
        if (first / name).exists() and (other / name).exists() and _tokens(first / name) != _tokens(other / name):
            raise ModelError(f"{first} and {other} have different tokenizers: {name} differs")
    templates = [_chat_template(folder) for folder in (first, other)]
    if None not in templates and templates[0] != templates[1]:
        raise ModelError(f"{first} and {other} have different chat templates; experts are trained with one")


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a configuration by dotted key, without the volatile ones."""
    for key, value in config.items():
        if key in VOLATILE:
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tokens(file: Path) -> Any:
    """A tokenizer file's content. Truncation and padding are what the last call asked for, not the tokenizer."""
    if file.name != "tokenizer.json":
        return file.read_bytes()
    return {key: value for key, value in _read_json(file).items() if key not in ("truncation", "padding")}


def _chat_template(folder: Path) -> Any:
    """The chat template, from whichever file holds it, or None. Of several, what from_pretrained takes."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists() and (template := _read_json(folder / name).get("chat_template")):
            return template
    return None


# Sums, block by block


class _Source(Protocol):
    """Where the bytes of the merged tensors come from."""

    def blocks(self, key: str, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes [start, stop) of tensor `key`, block after block; a block holds until the next is asked for."""
        ...


class _WeightedSum:
    """`sum_k w_k theta_k` over checkpoints of the same tensors."""

    def __init__(self, experts: Iterable[tuple[_Checkpoint, float]]) -> None:
        heaviest_first = sorted(experts, key=lambda expert: -expert[1])
        self.experts = [checkpoint for checkpoint, _ in heaviest_first]
        weight_K = [weight for _, weight in heaviest_first]
        self.share_K = [weight / math.fsum(weight_K[: k + 1]) for k, weight in enumerate(weight_K)]

    def blocks(self, key: str, start: int, stop: int) -> Iterator[memoryview]:
        stored_K = [expert.tensors[key] for expert in self.experts]
        dtype = DTYPES.get(stored_K[0].dtype)
        if dtype is None:
            yield from _equal_blocks(key, stored_K, start, stop)
            return
        with contextlib.ExitStack() as opened:
            file_K = [opened.enter_context(found.open(start)) for found in stored_K]
            raw_mean, raw_other = bytearray(BLOCK), bytearray(BLOCK)
            wide_mean, wide_other = torch.empty(2, BLOCK // dtype.itemsize)
            for position in range(start, stop, BLOCK):
                size = min(BLOCK, stop - position)
                stored = _fill(raw_mean, size, file_K[0], dtype)
                mean = _widen(stored, wide_mean)
                for file, share in zip(file_K[1:], self.share_K[1:], strict=True):
                    other = _widen(_fill(raw_other, size, file, dtype), wide_other)
                    if share:
                        # this way round, so that a zero keeps its sign
                        mean.sub_(torch.sub(mean, other, out=other), alpha=share)
                    elif not _is_finite(other):
                        self._refuse_nonfinite(key, position, size)
                if not _is_finite(mean):
                    self._refuse_nonfinite(key, position, size)
                stored.copy_(mean)
                yield memoryview(raw_mean)[:size]

    def _refuse_nonfinite(self, key: str, position: int, size: int) -> None:
        for expert in self.experts:
            _check_finite(key, expert.tensors[key], position, size)
        raise ModelError(f"{key}: the experts differ by more than float32 can hold")


def _equal_blocks(key: str, stored_K: Sequence[_Stored], start: int, stop: int) -> Iterator[memoryview]:
    """The bytes that all of `stored_K` share: of whole numbers and other tensors for which there is no weighted sum."""
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(stored.open(start)) for stored in stored_K]
        for position in range(start, stop, BLOCK):
            size = min(BLOCK, stop - position)
            bytes_first, bytes_other = bytearray(size), bytearray(size)
            _fill(bytes_first, size, files[0])
            for file, stored in zip(files[1:], stored_K[1:], strict=True):
                _fill(bytes_other, size, file)
                if bytes_other != bytes_first:
                    raise ModelError(
                        f"{key} ({stored.dtype}) differs between {stored_K[0].file} and {stored.file}; only float32, "
                        "bfloat16 and float16 tensors can be averaged, others have to be the same in all"
                    )
            yield memoryview(bytes_first)


class _BasePlusUpdates:
    """`theta_0 + B A` for the tensors that adapters change, `theta_0` for the others."""

    def __init__(self, base: _Checkpoint, updates: Mapping[str, "_Factors"]) -> None:
        self.base, self.updates = base, updates
        self.unchanged = _WeightedSum([(base, 1.0)])

    def blocks(self, key: str, start: int, stop: int) -> Iterator[memoryview]:
        if key not in self.updates:
            yield from self.unchanged.blocks(key, start, stop)
            return
        stored, factors = self.base.tensors[key], self.updates[key]
        dtype = DTYPES[stored.dtype]
        raw = bytearray(stop - start)
        with stored.open(start) as file:
            _fill(raw, len(raw), file)
        value = torch.frombuffer(raw, dtype=dtype)
        row, skipped = divmod(start // dtype.itemsize, factors.a.shape[1])
        rows = slice(row, row + math.ceil((skipped + len(value)) / factors.a.shape[1]))
        update = (factors.b[rows] @ factors.a).flatten()[skipped : skipped + len(value)]
        if not _is_finite(update.add_(value)):
            _check_finite(key, stored, start, stop - start)
        value.copy_(update)
        yield memoryview(raw)


def _fill(raw: bytearray, size: int, file: FileIO, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Read the next `size` bytes of `file` into the front of `raw`; returned is a view of them."""
    if file.readinto(memoryview(raw)[:size]) != size:
        raise ModelError(f"{file.name} became shorter while it was read")
    return torch.frombuffer(raw, dtype=dtype, count=size // dtype.itemsize)


def _widen(stored: Tensor, room: Tensor) -> Tensor:
    """The same values in float32: `stored` itself, or written to the front of `room`, since allocating costs more."""
    return stored if stored.dtype == torch.float32 else room[: len(stored)].copy_(stored)


def _is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite; nearly always told by the sum, which is quick."""
    return math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())


def _check_finite(key: str, stored: _Stored, position: int, size: int) -> None:
    raw = bytearray(size)
    with stored.open(position) as file:
        _fill(raw, size, file)
    if bad := int((~torch.isfinite(torch.frombuffer(raw, dtype=DTYPES[stored.dtype]))).sum()):
        raise ModelError(f"{key} in {stored.file} holds {bad} values or more that are NaN or infinite")


# Adapters


class _Factors(NamedTuple):
    """One module's update `B A`: `b` [out, R], `a` [R, in]; float32, and all scaling in `b`, once concatenated."""

    b: Tensor
    a: Tensor


@dataclass(frozen=True)
class _Adapter:
    """A plain LoRA adapter. `factors` by the module's path in the model, as stored; `config` as PEFT wrote it."""

    folder: Path
    config: dict[str, Any]
    factors: dict[str, _Factors]

    @classmethod
    def open(cls, folder: Path) -> "_Adapter":
        """Raises ModelError for all that is not plain LoRA on linear layers, by name."""
        config = _read_json(folder / ADAPTER_CONFIG)
        _check_plain_lora(folder, config)
        if not (folder / ADAPTER_WEIGHTS).exists():
            _refuse_missing_weights(folder, ADAPTER_WEIGHTS)
        try:
            tensors = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{folder / ADAPTER_WEIGHTS} cannot be read as safetensors: {error}") from error
        return cls(folder, config, _pair_factors(folder / ADAPTER_WEIGHTS, tensors))

    def scaling(self, module: str) -> float:
        """What PEFT multiplies `B A` of this module by. Raises ModelError where rank and configuration disagree."""
        rank = self.factors[module].a.shape[0]
        configured = _by_pattern(self.config.get("rank_pattern"), module, self.config.get("r"))
        if rank != configured:
            raise ModelError(f"{self.folder}: {module} has rank {rank}, {ADAPTER_CONFIG} says {configured}")
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        if not isinstance(alpha, int | float):
            raise ModelError(f"{self.folder}: {ADAPTER_CONFIG} says lora_alpha {alpha!r}, a number is needed")
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    @property
    def base(self) -> tuple[str, Any]:
        """Name, or place, and revision of the model that it was trained on."""
        name = str(self.config.get("base_model_name_or_path"))
        return str(Path(name).resolve()) if Path(name).exists() else name, self.config.get("revision")


def _check_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter; only LoRA adapters can be merged exactly")
    odd = {key: value for key, value in config.items() if key not in PLAIN_LORA and value}
    if config.get("bias", "none") != "none":
        odd["bias"] = config["bias"]
    if config.get("init_lora_weights") not in BASE_UNCHANGED:
        odd["init_lora_weights"] = config["init_lora_weights"]
    if odd:
        key, value = next(iter(odd.items()))
        raise ModelError(
            f"{folder}: its {ADAPTER_CONFIG} sets {key} to {value!r}, and only plain LoRA can be merged exactly; merge "
            "the adapter into its base with the library that made it, and merge full checkpoints"
        )


def _pair_factors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, _Factors]:
    factors: dict[str, _Factors] = {}
    for key, tensor in tensors.items():
        named = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", key)
        twin = key.replace(".lora_B.", ".lora_A.") if ".lora_B." in key else key.replace(".lora_A.", ".lora_B.")
        if not named or twin not in tensors:
            raise ModelError(f"{file}: {key} is not one of a pair of LoRA factors; only these can be merged exactly")
        if tensor.ndim != 2:
            raise ModelError(f"{file}: {key} has shape {tuple(tensor.shape)}; only linear layers can be merged")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{key} in {file} holds values that are NaN or infinite")
        if named[2] == "A":
            factors[named[1]] = _Factors(b=tensors[twin], a=tensor)
    for module, (b, a) in factors.items():
        if b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ModelError(f"{file}: the factors of {module} have shapes {tuple(b.shape)} and {tuple(a.shape)}")
    if not factors:
        raise ModelError(f"{file} holds no LoRA factors")
    return factors


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's path ends with, as PEFT reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _merge_adapters(adapters: Sequence[tuple[_Adapter, float]], out: Path, base: Path | None) -> Merged:
    first = adapters[0][0]
    for other, _ in adapters[1:]:
        if other.base != first.base:
            raise ModelError(
                f"{first.folder} was trained on {first.base[0]}, {other.folder} on {other.base[0]}; "
                "only adapters of one base can be merged"
            )
        _check_same_settings(first.folder, other.folder)
    factors = _concatenate(adapters)
    if base is None:
        return _write_adapter(first, factors, out)
    target = _Checkpoint.open(base)
    _check_same_settings(base, first.folder)
    if Path(first.base[0]).is_dir() and base.resolve() != Path(first.base[0]):
        log.warning("%s was trained on %s, and is merged into %s", first.folder, first.base[0], base)
    return _write_checkpoint(target, _BasePlusUpdates(target, _by_disk_key(factors, target)), out)


def _concatenate(adapters: Sequence[tuple[_Adapter, float]]) -> dict[str, _Factors]:
    """Factors of `sum_k w_k s_k B_k A_k` for each module, exactly: side by side, of rank `sum_k r_k`."""
    parts: dict[str, list[_Factors]] = {}
    for adapter, weight in adapters:
        for module, (b, a) in adapter.factors.items():
            scaled = _Factors(b.float() * (weight * adapter.scaling(module)), a.float())
            others = parts.setdefault(module, [])
            if others and (others[0].b.shape[0], others[0].a.shape[1]) != (b.shape[0], a.shape[1]):
                raise ModelError(f"{module} has another size in {adapter.folder} than in {adapters[0][0].folder}")
            others.append(scaled if weight else _Factors(scaled.b[:, :0], scaled.a[:0]))
    joined = {
        module: _Factors(torch.cat([part.b for part in found], dim=1), torch.cat([part.a for part in found]))
        for module, found in sorted(parts.items())
    }
    return {module: factors for module, factors in joined.items() if factors.a.shape[0]}


def _by_disk_key(factors: Mapping[str, _Factors], base: _Checkpoint) -> dict[str, _Factors]:
    """The same factors by the names that their weights have in the base's files. Raises ModelError by module."""
    config = _read_json(base.folder / CONFIG)
    is_tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    by_tail: dict[tuple[str, ...], list[tuple[str, Counter[str]]]] = {}
    for key in base.tensors:
        lead, tail = _split_name(key)
        by_tail.setdefault(tail, []).append((key, lead))
    module_of: dict[str, str] = {}
    for module, (b, a) in factors.items():
        key = _disk_key(module, (b.shape[0], a.shape[1]), base, by_tail)
        if key in module_of:
            raise ModelError(f"{module} and {module_of[key]} would both be merged into {key} of {base.folder}")
        if is_tied and module.split(".")[-1] == "lm_head":
            raise ModelError(f"{module} is tied to the embeddings of {base.folder} and cannot be merged alone")
        module_of[key] = module
    return {key: factors[module] for key, module in module_of.items()}


def _disk_key(
    module: str,
    shape: tuple[int, int],
    base: _Checkpoint,
    by_tail: Mapping[tuple[str, ...], Sequence[tuple[str, Counter[str]]]],
) -> str:
    """The name on disk of the weight of `module`, a path in the loaded model.

    Libraries rename on loading: "language_model.model.layers.0.mlp" on disk is "model.language_model.layers.0.mlp" in
    memory. From the list that the first number counts, names stay; before it, wrappers come, go or change places. So
    a key fits when it ends alike, has the right shape, and one of both beginnings has all the words of the other
    ("model" tells nothing). Beginnings of the same words win; else only one key may fit.
    """
    wanted = f"{module}.weight"
    lead, tail = _split_name(wanted)
    near = [(key, other) for key, other in by_tail.get(tail, ()) if lead <= other or other <= lead]
    gaps = {key: (lead - other) + (other - lead) for key, other in near}
    fitting = [key for key in gaps if base.tensors[key].shape == shape]
    candidates = [wanted] if wanted in gaps else [key for key in fitting if not gaps[key]] or fitting or list(gaps)
    if len(candidates) != 1:
        found = f"could be {' or '.join(sorted(candidates))}" if candidates else "has no counterpart"
        raise ModelError(f"the adapted module {module} {found} in {base.folder}; is this the adapter's base?")
    stored = base.tensors[candidates[0]]
    if stored.shape != shape or stored.dtype not in DTYPES:
        raise ModelError(
            f"the adapter changes {module} by a matrix of shape {shape}, {candidates[0]} in {stored.file} is "
            f"{stored.dtype} of shape {stored.shape}; is this the adapter's base?"
        )
    return candidates[0]


def _split_name(key: str) -> tuple[Counter[str], tuple[str, ...]]:
    """A key's words before the list that its first number counts, "model" left out, and the rest in order."""
    words = key.split(".")
    first_number = next((i for i, word in enumerate(words) if word.isdecimal()), len(words) - 1)
    cut = max(first_number - 1, 0)
    return Counter(word for word in words[:cut] if word != "model"), tuple(words[cut:])


# Writing


def _write_checkpoint(layout: _Checkpoint, source: _Source, out: Path) -> Merged:
    """Write the tensors of `source` in the files, the order and under the names of `layout`."""
    with _complete_or_absent(out, layout.size) as folder:
        _write_tensors(layout, source, folder)
        _copy_settings(layout.folder, folder)
        written = _Checkpoint.open(folder)
        _check_same_tensors(layout, written)
    return Merged(out, "checkpoint", len(layout.tensors), layout.size, _dtypes(layout.tensors.values()))


def _write_tensors(layout: _Checkpoint, source: _Source, folder: Path) -> None:
    for file in dict.fromkeys(stored.file for stored in layout.tensors.values()):
        with (folder / file.name).open("wb") as created:
            created.write(_header_bytes(file))
            created.truncate(file.stat().st_size)
    spans = [
        (key, start, min(start + SPAN, stored.size))
        for key, stored in layout.tensors.items()
        for start in range(0, stored.size, SPAN)
    ]

    def write_span(span: tuple[str, int, int]) -> Path:
        key, start, stop = span
        stored = layout.tensors[key]
        with (folder / stored.file.name).open("r+b") as file:
            file.seek(stored.start + start)
            for block in source.blocks(key, start, stop):
                file.write(block)
        return folder / stored.file.name

    with _single_threaded_torch(), ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for file in track(pool.map(write_span, spans), "merging", len(spans)):
            sync_file(file)  # the disk is kept busy while the next spans are computed
    if (layout.folder / INDEX).exists() and not (layout.folder / WEIGHTS).exists():
        shutil.copyfile(layout.folder / INDEX, folder / INDEX)


def _write_adapter(first: _Adapter, factors: Mapping[str, _Factors], out: Path) -> Merged:
    """One PEFT adapter with these factors and scaling 1; its modules and, where they differ, ranks named one by one."""
    tensors: dict[str, Tensor] = {}
    for module, (b, a) in factors.items():
        tensors |= {f"base_model.model.{module}.lora_{side}.weight": f.contiguous() for side, f in (("A", a), ("B", b))}
    rank_of = {module: a.shape[0] for module, (_, a) in factors.items()}
    # the longest first: PEFT takes the first pattern that a module's path ends with
    differing = {module: rank_of[module] for module in sorted(rank_of, key=lambda name: (-len(name), name))}
    patterns = differing if len(set(rank_of.values())) > 1 else {}
    config = first.config | {
        "r": max(rank_of.values()),
        "lora_alpha": max(rank_of.values()),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "init_lora_weights": True,
        "eva_config": None,
        "target_modules": list(rank_of),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    with _complete_or_absent(out, size) as folder:
        safetensors.torch.save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, config)
        _copy_settings(first.folder, folder)
    return Merged(out, "adapter", len(tensors), size, "float32")


def _copy_settings(source: Path, folder: Path) -> None:
    """Everything of a checkpoint's folder but weights, records of its training and its card."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    if (source / COPIED_FOLDER).is_dir():
        shutil.copytree(source / COPIED_FOLDER, folder / COPIED_FOLDER)


def _dtypes(tensors: Iterable[_Stored]) -> str:
    bytes_of: Counter[str] = Counter()
    for stored in tensors:
        bytes_of[stored.dtype] += stored.size
    return ", ".join(str(DTYPES.get(name, name)).removeprefix("torch.") for name, _ in bytes_of.most_common())


@contextlib.contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Spans are worked on side by side, so operations need no threads of their own, and sums do not depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _complete_or_absent(out: Path, size: int) -> Iterator[Path]:
    """A folder to write to, which becomes `out`, synced, when the block ends well and is removed when it does not.

    What a kill leaves stands beside `out` under a hidden name and is cleared away by the next attempt.
    """
    place = out.resolve()
    folder = place.with_name(f".{place.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise EnvironmentFault(f"{out} cannot be written: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunInUseError(f"{out} is being written by another process; wait for it or name another folder") from None
    try:
        _empty(folder)
        require_space(folder, size, str(out))
        yield folder
        sync_tree(folder)
        folder.replace(place)
        sync_folder(place.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, DatalloyError):
            raise EnvironmentFault(f"{out} could not be written, and nothing was left there: {error}") from error
        raise
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()

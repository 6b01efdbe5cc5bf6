"""A checkpoint in, losses, gradients and answers out: the one module that knows model families.

Any image-text-to-text model of transformers is loaded by path or hub id. A conversation is rendered by the model's
own chat template and expanded by its own processor; no family's format is written down here. Labels cover what
the model has to write itself: each assistant answer with the end-of-turn token that closes it. They are found
exactly or the sample is refused: the conversation is rendered a second time with markers for answers, what stands
between the markers must stand between the answers too, and characters are carried to tokens through the
processor's record of how it expanded the images.

Many models can be measured on one layout of samples: prompts are laid out once (`Prompts`), and what a vision tower
that they share sees in the pictures is computed once (`VisionFeatures`).

Pictures go through the PIL image processors even where torchvision is installed, so that results do not depend on
it. Processors that could also take video are built without that part. Nothing is ever truncated.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import huggingface_hub
import numpy as np
import peft
import PIL.Image
import safetensors
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, pad
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import logging as transformers_logging

from datalloy.config import Precision
from datalloy.confined import Confined, ConfinedError, LimitError
from datalloy.display import printable, shown
from datalloy.durable import complete_files
from datalloy.errors import DataError, ModelError
from datalloy.sample import MAX_IMAGE_PIXELS, ImageRef, Sample, Turn, open_image
from datalloy.tiny.model import WEIGHTS
from datalloy.vision_features import VisionFeatures

log = logging.getLogger(__name__)

IGNORED = -100  # label of a position that does not enter the loss
ENTROPY_TOKENS = 256  # whose predictions are read at once: several arrays of the vocabulary's width
GREY = 1 / 128  # near the middle of what processors scale pixels to; zeros are padding to some families (Idefics3)

# What a processor is made of. `save` copies these files as they are, so the settings for video, unused here, stay.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

# Of a hub repository: all but a model's weights, which from_pretrained picks by itself.
SETTINGS_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "adapter_model.safetensors"]

# SmolVLM's class asks for num2words and for its video processor even when there is no video. For pictures it does
# what Idefics3's class does.
IMAGE_TWIN = {"SmolVLMProcessor": "Idefics3Processor"}

# Generation's own defaults, spelt out: what is left open is filled in from the checkpoint's generation_config
# (Qwen2.5-VL brings a repetition penalty), and the answer is not the greedy one any more.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
}

# What may stand in the settings of a LoRA adapter that is a plain low-rank update of linear layers. Any other key must
# have its default: DoRA, trained biases, KaSA and what later releases of PEFT may bring compute something else.
LORA_SETTINGS = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",  # concerns layers that are no torch.nn.Linear, and those are refused
    "init_lora_weights",
}
# Other ways to begin (PiSSA, OLoRA, CorDA, LoftQ) take something out of the base's own weights.
LORA_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")

# Stands for an answer while a template is examined. A sample that contains it is refused as a mismatch.
MARKER = "datalloy-answer-5b0c61f2a94e"

MAX_SAMPLE_PIXELS = 4 * MAX_IMAGE_PIXELS  # of all images of one sample, decoded at once: three bytes each
MOST_CHARACTERS = 64  # a token, on average over a sample: what has more of them is not worth tokenising to refuse

BATCH_SAMPLES = 64  # that are rendered and split into tokens together, where lengths are all that is wanted
BATCH_CHARACTERS = 1_000_000  # after which a batch is closed: tokens take a hundred times the memory of their text

MOST_STOPS = 3  # conversations on which a template may be stopped before the run is
MOST_TEMPLATES = 4  # processes kept, one for each template in use
_TEMPLATES: dict[tuple[str, str, str], Confined] = {}


class EncodeError(DataError):
    """A sample cannot be turned into model inputs; `reason` is one word for the run folder's files.

    no_supervision, too_long, image_unreadable, image_refused, image_in_answer, image_token_in_text,
    control_token_in_text, template_mismatch, template_limit.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, or the error could not be sent to another process
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Encoded:
    """One sample as the model sees it, a batch of one."""

    inputs: dict[str, Tensor]  # what the processor made: input_ids [1, T], attention_mask [1, T], pixels if any
    labels: Tensor  # [1, T] int64, IGNORED except on supervised tokens

    @property
    def length(self) -> int:
        """Tokens, those of the images included."""
        return self.labels.shape[1]

    @property
    def supervised_tokens(self) -> int:
        """Positions that enter the loss, counted after the shift by one."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def has_pictures(self) -> bool:
        return any(tensor.is_floating_point() for tensor in self.inputs.values())

    def without_pictures(self) -> "Encoded":
        """The same tokens, with plain grey in the place of every picture."""
        grey = {name: torch.full_like(t, GREY) for name, t in self.inputs.items() if t.is_floating_point()}
        return Encoded(self.inputs | grey, self.labels)


class TokenCounts(NamedTuple):
    """How long a sample is: positions that enter the loss, and all tokens, those of the images included."""

    supervised: int
    length: int


class Span(NamedTuple):
    """Characters [start, end) of a rendered conversation."""

    start: int
    end: int


class _LaidOut(NamedTuple):
    """A sample in the template's words, and where the model's own stand in them."""

    sample: Sample
    text: str
    answers: list[Span]


@dataclass(frozen=True)
class ChatFormat:
    """What a checkpoint's chat template puts around an answer, found by rendering a probe."""

    end_of_turn: str  # the special token that follows an answer
    lead: str  # what stands between the end of a prompt and an answer (a space after "Assistant:"): the model writes it
    control_tokens: dict[int, str]  # the tokenizer's special tokens by id


class LowRank(NamedTuple):
    """What an adapter adds to the weight of one linear layer: `b_OR @ a_RI`, float32, its scaling in `b_OR`."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts in one fixed layout: `batches` holds positions of samples and their tensors, padded on the left.

    Short ones come first, ties by position. The tensors are the CPU's; a batch goes to the device when it is answered.
    """

    batches: tuple[tuple[tuple[int, ...], dict[str, Tensor]], ...]

    @property
    def count(self) -> int:
        return sum(len(positions) for positions, _ in self.batches)


@dataclass(eq=False)
class VLM:
    """A vision-language model with its processor. `name` is the path or hub id it was asked for by.

    `model` is replaced in place when training puts an adapter around it.
    """

    model: Any = field(repr=False)  # PreTrainedModel, or PeftModel around one
    processor: Any = field(repr=False)
    name: str
    folder: Path  # where the processor's files are
    chat: ChatFormat = field(repr=False)
    # tokenizers keep settings of the call under way in themselves; copies share the processor, hence the lock
    _processing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def load(cls, path: str, *, device: str = "auto", dtype: str = "float32") -> "VLM":
        """The model at `path`, in eval mode: "tiny", a folder, a hub id, or a PEFT adapter folder (base and adapter).

        Code that comes with a checkpoint is never run and weights are read from safetensors only. Raises ModelError.
        """
        folder = _settings_folder(path)
        # under `accelerate launch --use_fsdp` transformers would read weights in the first process alone, by default
        with _reading(path), hidden_variable("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            if (folder / "adapter_config.json").exists():
                return _load_adapter(path, folder, device=device, dtype=dtype)
            return _load_model(path, folder, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def base_model(self) -> Any:
        """The transformers model, out of its PEFT wrapper if it has one; adapter layers stay in it."""
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    def autocast(self, precision: Precision) -> torch.autocast:
        """Computes in bfloat16 where that is asked for; weights stay what they are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def encode(self, sample: Sample, *, max_tokens: int | None = None) -> Encoded:
        """The sample as inputs and labels, every assistant turn supervised. Raises EncodeError with a reason word."""
        (laid,) = self._lay_out([sample], max_tokens)
        if isinstance(laid, EncodeError):
            raise laid
        inputs, tokens = self._process(sample, laid.text, sample.images)
        input_ids = inputs["input_ids"]
        is_supervised_T = self._supervised(laid, input_ids[0].tolist(), tokens, max_tokens)
        return Encoded(inputs, input_ids.masked_fill(~torch.from_numpy(is_supervised_T), IGNORED))

    def count_tokens(
        self, samples: Iterable[Sample], *, max_tokens: int | None = None
    ) -> Iterator[TokenCounts | EncodeError]:
        """What `encode` would tell about each of the samples, in order: their lengths, or why they are refused.

        Conversations without pictures are rendered and split into tokens many at a time, at a third of the price.
        """
        for batch in _in_batches(samples):
            yield from self._count_batch(self._lay_out(batch, max_tokens), max_tokens)

    def _count_batch(
        self, batch: Iterable["_LaidOut | EncodeError"], max_tokens: int | None
    ) -> list[TokenCounts | EncodeError]:
        counts: list[TokenCounts | EncodeError | None] = []
        texts: list[_LaidOut] = []
        for laid in batch:
            if isinstance(laid, EncodeError) or laid.sample.images:
                counts.append(laid if isinstance(laid, EncodeError) else self._count_one(laid, max_tokens))
            else:
                counts.append(None)
                texts.append(laid)
        found = self._count_texts(texts, max_tokens)
        return [next(found) if count is None else count for count in counts]

    def _count_one(self, laid: "_LaidOut", max_tokens: int | None) -> TokenCounts | EncodeError:
        try:
            inputs, tokens = self._process(laid.sample, laid.text, laid.sample.images)
            ids = inputs["input_ids"][0].tolist()
            return _counts(self._supervised(laid, ids, tokens, max_tokens))
        except EncodeError as error:
            return error

    def _count_texts(self, batch: Sequence["_LaidOut"], max_tokens: int | None) -> Iterator[TokenCounts | EncodeError]:
        """Of conversations without pictures. A processor that refuses some of them is asked one by one."""
        if len({self._starts_with_bos(laid.text) for laid in batch}) != 1:
            yield from (self._count_one(laid, max_tokens) for laid in batch)
            return
        try:
            features = self._run_processor([laid.text for laid in batch], None, padding=False)
        except ValueError:
            yield from (self._count_one(laid, max_tokens) for laid in batch)
            return
        for laid, ids, offsets in zip(batch, features["input_ids"], features["offset_mapping"], strict=True):
            try:
                yield _counts(self._supervised(laid, ids, offsets, max_tokens))
            except EncodeError as error:
                yield error

    def _supervised(
        self, laid: "_LaidOut", ids: Sequence[int], tokens: Sequence[tuple[int, int]], max_tokens: int | None
    ) -> np.ndarray:
        """Which tokens the model has to write itself, [T] bool. `tokens`: the characters that each stands for."""
        sample, text = laid.sample, laid.text
        if max_tokens is not None and len(ids) > max_tokens:
            found = f"{len(ids)} tokens with its images, at most {max_tokens} are allowed"
            raise _refuse(sample, "too_long", found)
        token_T2 = np.array(tokens, dtype=np.int64)
        is_supervised_T = np.zeros(len(ids), bool)
        end_of_turn = self.tokenizer.convert_tokens_to_ids(self.chat.end_of_turn)
        for answer in laid.answers:
            inside = np.flatnonzero((token_T2[:, 0] < answer.end) & (token_T2[:, 1] > answer.start))
            # the space before an answer may share its first token; anything else, or a missing end, is not exact
            if text[token_T2[inside[0], 0] : answer.start].strip() or ids[inside[-1]] != end_of_turn:
                raise _refuse(sample, "template_mismatch", "tokens that belong to an answer and to what surrounds it")
            is_supervised_T[inside] = True
        return is_supervised_T

    def collate(self, encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        """One batch on the model's device, padded on the right, "labels" included."""
        batch = self._to_device(self._pad([item.inputs for item in encoded], side="right"))
        labels = _pad_tokens([item.labels for item in encoded], IGNORED, side="right")
        return batch | {"labels": labels.to(self.device)}

    def losses(self, batch: dict[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Mean cross entropy of each sample over its supervised tokens, in nats; [B] of `dtype`, differentiable.

        Logits are made only for columns in which some sample is supervised, and of `dtype` only where it is: the
        vocabulary is the largest dimension of all and most of a batch is images and padding.
        """
        logits_SV, target_S, supervised_BT = self._answer_logits(batch)
        return _means_of_answers(cross_entropy(logits_SV.to(dtype), target_S, reduction="none"), supervised_BT)

    @torch.no_grad()
    def losses_and_entropies(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and mean entropy of what is predicted, over supervised tokens: [B] each, float32, nats.

        The entropy is the loss that the model itself expects, were each token drawn from its own prediction.
        """
        logits_SV, target_S, supervised_BT = self._answer_logits(batch)
        rows = logits_SV.split(ENTROPY_TOKENS)
        parts = [Categorical(logits=row.float(), validate_args=False).entropy() for row in rows]
        losses = cross_entropy(logits_SV.float(), target_S, reduction="none")
        return _means_of_answers(losses, supervised_BT), _means_of_answers(torch.cat(parts), supervised_BT)

    def _answer_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [S, vocabulary] and targets [S] of all supervised tokens, and their places in the batch, [B, T]."""
        targets_BT = batch["labels"][:, 1:]
        columns = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.model(**inputs, logits_to_keep=columns, use_cache=False).logits
        targets_BT = targets_BT[:, columns]
        supervised_BT = targets_BT != IGNORED
        return logits[supervised_BT], targets_BT[supervised_BT], supervised_BT

    @torch.no_grad()
    def logits_at(self, batch: dict[str, Tensor], position_B: Tensor) -> Tensor:
        """Logits [B, vocabulary], float32, of the token at a position (from 1) of each sample, given all before it."""
        columns, index_B = torch.unique(position_B - 1, return_inverse=True)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = self.model(**inputs, logits_to_keep=columns.to(self.device), use_cache=False).logits
        return logits[torch.arange(len(index_B)), index_B].float()

    @torch.no_grad()
    def mean_states(self, batch: dict[str, Tensor]) -> Tensor:
        """What the decoder's last layer holds, normed, as the mean over each sample's tokens, [B, width] float32.

        Tokens of images and of the chat template included, padding left out.
        """
        weight_BT1 = batch["attention_mask"].unsqueeze(2).float()
        return (self._last_states(batch).float() * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)

    @torch.no_grad()
    def prompt_states(self, batch: dict[str, Tensor]) -> Tensor:
        """What the decoder's last layer holds, normed, where each sample's first answer begins, [B, width] float32.

        The state from which the answer's first token is predicted: question and pictures are in it, the answer is not.
        """
        first_B = (batch["labels"] != IGNORED).int().argmax(dim=1)
        return self._last_states(batch)[torch.arange(len(first_B)), first_B - 1].float()

    def _last_states(self, batch: dict[str, Tensor]) -> Tensor:
        """What the decoder's last layer holds, normed, [B, T, width]."""
        states: list[Tensor] = []
        handle = self.final_norm().register_forward_hook(lambda _module, _args, output: states.append(output))
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        try:
            self.model(**inputs, logits_to_keep=1, use_cache=False)
        finally:
            handle.remove()
        return states[0]

    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int) -> list[str]:
        """Greedy answers to the prompts of the samples, in their order, stripped and without special tokens.

        Raises EncodeError.
        """
        return self.write_answers(self.lay_out_prompts(samples, batch_size), max_new_tokens=max_new_tokens)

    def lay_out_prompts(self, samples: Sequence[Sample], batch_size: int) -> Prompts:
        """The prompts of the samples, ready to be answered by this model and by others with its processor."""
        prompts = [self._encode_prompt(sample) for sample in samples]
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i]["input_ids"].shape[1], i))
        chunks = [tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
        return Prompts(tuple((chunk, self._pad([prompts[i] for i in chunk], side="left")) for chunk in chunks))

    @torch.no_grad()
    def write_answers(
        self, prompts: Prompts, *, max_new_tokens: int, vision: VisionFeatures | None = None
    ) -> list[str]:
        """As `generate`, for prompts that are laid out. `vision` keeps what the vision tower sees in them."""
        settings = transformers.GenerationConfig(
            **GREEDY, max_new_tokens=max_new_tokens, eos_token_id=self._stop_ids(), pad_token_id=self._pad_id()
        )
        answers = [""] * prompts.count
        with _evaluating(self.model):
            for positions, padded in prompts.batches:
                batch = self._to_device(padded)
                with self.reusing(vision, padded):
                    tokens = self.base_model.generate(**batch, generation_config=settings)
                for i, written in zip(positions, tokens[:, batch["input_ids"].shape[1] :], strict=True):
                    text = self.tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                    answers[i] = text.strip()
        return answers

    def decoder_layers(self) -> torch.nn.ModuleList:
        """The layers of the language model, first to last."""
        return self.base_model.get_decoder().layers

    def final_norm(self) -> torch.nn.Module:
        """The normalisation between the last decoder layer and the output head."""
        return self.base_model.get_decoder().norm

    def output_head(self) -> torch.nn.Module:
        """The layer that turns normed hidden states into logits."""
        return self.base_model.get_output_embeddings()

    def vision_tower(self) -> torch.nn.Module:
        """What looks at pictures. In most families the connector stands behind it; Qwen keeps it, the merger, inside.

        Raises ModelError where there is none.
        """
        tower = self.base_model.get_encoder(modality="image")
        if tower is self.base_model:
            raise ModelError(f"{self.name}: no vision tower found in a {self.base_model.config.model_type!r} model")
        return tower

    def reusing(
        self, vision: VisionFeatures | None, batch: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Where `vision` is given, what the tower sees in `batch` inside is kept there and taken from there."""
        return vision.reuse(self.vision_tower(), batch, self.name) if vision else contextlib.nullcontext()

    def vision_parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of the vision tower, without the connector to the language model."""
        return (parameter for name, parameter in self.vision_tower().named_parameters() if "merger" not in name)

    def low_rank_updates(self, folder: Path) -> dict[str, LowRank]:
        """What the LoRA adapter in `folder` adds to this model's linear layers, by the layer's name in `model`.

        PEFT loads the adapter into a view of this model, so ranks, scalings and names are read as PEFT reads them.
        Raises ModelError for any adapter that is more than low-rank updates of linear layers, for another base's, and
        where file and layers do not match tensor for tensor.
        """
        with _reading(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by its old name
            _check_adapter_file(folder)
            self._check_adapter_settings(folder)
            self._check_adapter_tensors(folder)
            config = peft.PeftConfig.from_pretrained(str(folder))
            adapted: Any = peft.PeftModel(self.view().model, config)
            try:
                found = adapted.load_adapter(str(folder), "default", torch_device=str(self.device))
            except RuntimeError as error:
                raise ModelError(f"{folder}: the adapter's tensors do not fit {self.name}: {error}") from error
        if odd := sorted([*found.unexpected_keys, *found.missing_keys]):
            raise ModelError(
                f"{folder}: {len(odd)} tensors of the adapter find no layer or are missing, such as {odd[0]}"
            )
        updates = {}
        layers: list[tuple[str, Any]] = [
            (name, module)
            for name, module in adapted.get_base_model().named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        ]
        for name, layer in layers:
            if type(layer.get_base_layer()) is not torch.nn.Linear:
                kind = type(layer.get_base_layer()).__name__
                raise ModelError(
                    f"{folder} adapts {name}, which is of the kind {kind}; only linear layers are supported"
                )
            a_RI, b_OR = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            updates[name] = LowRank(a_RI.float(), b_OR.float() * layer.scaling["default"])
        return updates

    def _check_adapter_settings(self, folder: Path) -> None:
        given = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if given.get("peft_type") != "LORA":
            raise ModelError(f"{folder} is a {given.get('peft_type')} adapter; only LoRA adapters are supported")
        usual = peft.LoraConfig().to_dict()
        for key in sorted(set(given) - LORA_SETTINGS):
            if given[key] and given[key] != usual.get(key):
                raise ModelError(
                    f"{folder}/adapter_config.json sets {key} to {given[key]!r}, which is more than a low-rank "
                    "update of linear layers; export the tuned model as a full checkpoint"
                )
        if (beginning := given.get("init_lora_weights", True)) not in LORA_BEGINNINGS:
            raise ModelError(
                f"{folder}/adapter_config.json sets init_lora_weights to {beginning!r}, which changes the base's own "
                "weights; convert the adapter to plain LoRA when saving it, or export a full checkpoint"
            )
        if not self._is_named(named := given.get("base_model_name_or_path")):
            raise ModelError(
                f"{folder} is an adapter for {named}, not for {self.name}; if both are the same model, put the path "
                "into its adapter_config.json"
            )

    def _check_adapter_tensors(self, folder: Path) -> None:
        """Low-rank factors only. PEFT adds a copy of an adapted head's weights: it must be the base's, bit for bit.

        It is checked beforehand because PEFT writes it over the weights of the model that it loads the adapter into.
        """
        originals = dict(self.model.named_parameters(remove_duplicate=False))  # a tied head has a name of its own
        with safetensors.safe_open(folder / "adapter_model.safetensors", framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key.endswith((".lora_A.weight", ".lora_B.weight")):
                    continue
                original = originals.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
                if original is None or not torch.equal(file.get_tensor(key).to(original), original):
                    raise ModelError(
                        f"{folder}: the adapter brings {key}, which is neither a low-rank factor nor a tensor of "
                        f"{self.name} unchanged; export the tuned model as a full checkpoint"
                    )

    def _is_named(self, path: str | None) -> bool:
        if path in (self.name, self.base_model.name_or_path):
            return True
        return path is not None and Path(path).exists() and Path(path).resolve() == self.folder.resolve()

    def processor_difference(self, folder: Path) -> str | None:
        """What the processor's files in `folder` have otherwise than this model: "tokenizer", "chat template" or None.

        Files that are not there differ in nothing. Tokenizers are compared as the library reads and writes them, since
        releases format one and the same tokenizer in several ways.
        """
        with _reading(folder):
            own, other = self.folder / "tokenizer.json", folder / "tokenizer.json"
            if own.exists() and other.exists() and _canonical_tokenizer(own) != _canonical_tokenizer(other):
                return "tokenizer"
            template = _read_chat_template(folder)
            if template is not None and template.strip() != str(self.processor.chat_template).strip():
                return "chat template"
        return None

    def save(self, folder: Path) -> None:
        """Write what `load` reads: safetensors (under PEFT the adapter alone) and the processor's files.

        Each file is complete or not there. Raises EnvironmentFault where the disk does not take them.
        """
        with complete_files(folder) as staging, _quiet():
            try:
                self.model.save_pretrained(staging)
            except safetensors.SafetensorError as error:
                raise OSError(str(error)) from error  # a full disk, in the library's words
            for name in PROCESSOR_FILES:
                if (self.folder / name).exists() and self.folder.resolve() != folder.resolve():
                    shutil.copyfile(self.folder / name, staging / name)

    def copy(self) -> "VLM":
        """The same model with weights of its own; the processor is shared."""
        return dataclasses.replace(self, model=copy.deepcopy(self.model))

    def view(self) -> "VLM":
        """The same model in modules of its own on the same weights, which count as constants there, in eval mode.

        Hooks, adapters and weights put into the view leave this model as it is, and the view costs no memory. Trap: a
        weight that is changed in place changes in both.
        """
        shared = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in self.model.parameters()}
        buffers = {id(buffer): buffer for buffer in self.model.buffers()}
        return dataclasses.replace(self, model=copy.deepcopy(self.model, shared | buffers).eval())

    def _lay_out(self, samples: Sequence[Sample], max_tokens: int | None) -> Iterator["_LaidOut | EncodeError"]:
        """Each conversation in the template's words, with the places of its answers, or why it is refused.

        The error of one sample is made when it is asked for, so that a template is not stopped again and again for
        what nobody waits for.
        """
        faults = self._faults([(sample, sample.turns) for sample in samples], max_tokens)
        requests = [
            ([_messages(sample.turns), _messages(_marked(sample.turns))], False)
            for sample, fault in zip(samples, faults, strict=True)
            if fault is None
        ]
        rendered = _confined_template(self.processor).each(requests)
        for sample, fault in zip(samples, faults, strict=True):
            if fault is not None:
                yield fault
                continue
            answer = next(rendered)
            try:
                text, outline = self._rendered(sample, answer)
                yield _LaidOut(sample, text, self._answer_spans(sample, text, outline))
            except EncodeError as error:
                yield error

    def _rendered(self, sample: Sample, answer: list[str] | ConfinedError) -> list[str]:
        """The texts that the template's process answered for a sample. Raises EncodeError or ModelError."""
        if isinstance(answer, LimitError):
            if _confined_template(self.processor).stopped > MOST_STOPS:
                raise ModelError(
                    f"{self.name}: its chat template had to be stopped again and again, at last at {sample.origin}: "
                    f"{answer}; use another checkpoint, or mend the template"
                ) from answer
            found = f"turns on which the chat template was stopped: {answer}"
            raise _refuse(sample, "template_limit", found) from answer
        if isinstance(answer, ConfinedError):
            found = f"turns the chat template does not take: {printable(str(answer))}"
            raise _refuse(sample, "template_mismatch", found) from answer
        return answer

    def _faults(
        self, conversations: Sequence[tuple[Sample, Sequence[Turn]]], max_tokens: int | None = None
    ) -> list[EncodeError | None]:
        """For each sample what stands against giving its turns to the template: too much text, control tokens in it."""
        faults = [_too_much_text(sample, turns, max_tokens) for sample, turns in conversations]
        left = [(sample, turns) for (sample, turns), fault in zip(conversations, faults, strict=True) if fault is None]
        texts = [turn.text for _, turns in left for turn in turns]
        tokens = iter(self._tokens(texts) if texts else ())
        found = iter([self._fault_of_turns(sample, [(turn, next(tokens)) for turn in turns]) for sample, turns in left])
        return [next(found) if fault is None else fault for fault in faults]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        with self._processing:
            return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _fault_of_turns(self, sample: Sample, turns: Sequence[tuple[Turn, Sequence[int]]]) -> EncodeError | None:
        """What would be read as control tokens, where there is any: it would shift images or close the turn."""
        for turn, token_ids in turns:
            if turn.role == "assistant" and turn.images:
                found = "an image in an assistant turn, where a model can only write text"
                return _refuse(sample, "image_in_answer", found)
            for token in self.processor.all_special_multimodal_tokens:
                if token in turn.text:
                    found = f"the image placeholder {token!r} in its {turn.role} text"
                    return _refuse(sample, "image_token_in_text", found)
            for token_id in token_ids:
                if token_id in self.chat.control_tokens:
                    found = f"the control token {self.chat.control_tokens[token_id]!r} in its {turn.role} text"
                    return _refuse(sample, "control_token_in_text", found)
        return None

    def _answer_spans(self, sample: Sample, text: str, outline: str) -> list[Span]:
        """Where the model's own words stand in the rendered text: each answer, its lead and its end-of-turn token.

        `outline` is the text with a marker in the place of each answer.
        """
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        if not answers or not all(map(_is_visible, answers)):
            raise _refuse(sample, "no_supervision", "no assistant turn, or one without a visible character")
        before, *after = outline.split(MARKER)
        mismatch = _refuse(sample, "template_mismatch", "an answer that the chat template leaves out or rewrites")
        if len(after) != len(answers) or not text.startswith(before):
            raise mismatch
        spans, position = [], len(before)
        for answer, following in zip(answers, after, strict=True):
            # templates may trim answers, as Gemma's does
            kept = next((a for a in (answer, answer.strip()) if text.startswith(a + following, position)), None)
            if kept is None or not following.startswith(self.chat.end_of_turn):
                raise mismatch
            lead = len(self.chat.lead) if text.endswith(self.chat.lead, 0, position) else 0
            spans.append(Span(position - lead, position + len(kept) + len(self.chat.end_of_turn)))
            position += len(kept) + len(following)
        if position != len(text):
            raise mismatch
        return spans

    def _process(self, sample: Sample, text: str, images: Sequence[ImageRef]) -> tuple[dict[str, Tensor], list[Span]]:
        """The processor's tensors for one conversation, and which characters of `text` each token stands for."""
        pictures: list[PIL.Image.Image] = []
        for image in images:
            try:
                pictures.append(open_image(image))
            except (OSError, ValueError) as error:
                raise _refuse(
                    sample, "image_unreadable", f"the unreadable image {shown(str(image))}: {error}"
                ) from error
            if (pixels := sum(picture.width * picture.height for picture in pictures)) > MAX_SAMPLE_PIXELS:
                found = f"{pixels:,} pixels in its images, at most {MAX_SAMPLE_PIXELS:,} are decoded for one sample"
                raise _refuse(sample, "image_refused", found)
        try:
            features = self._run_processor([text], [pictures] if pictures else None)
        except ValueError as error:
            raise _refuse(sample, "image_refused", f"images that the model's processor refuses: {error}") from error
        (offsets,) = features.pop("offset_mapping")
        (expansions,) = features.pop("text_replacement_offsets", None) or [[]]
        if len(expansions) != len(pictures):
            raise ModelError(f"{self.name}: {type(self.processor).__name__} does not tell how it expands images")
        features.convert_to_tensors("pt")
        return dict(features), [_original_span(offset, expansions) for offset in offsets]

    def _run_processor(self, texts: Sequence[str], pictures: Sequence[list[PIL.Image.Image]] | None, **how: Any) -> Any:
        """What the processor makes of rendered conversations that all begin with the same token, or all with none."""
        with self._processing:
            return self.processor(
                text=list(texts),
                images=pictures,
                add_special_tokens=not self._starts_with_bos(texts[0]),  # or there would be two
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **how,
            )

    def _starts_with_bos(self, text: str) -> bool:
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def _encode_prompt(self, sample: Sample) -> dict[str, Tensor]:
        prompt = sample.prompt
        (fault,) = self._faults([(sample, prompt)])
        if fault is not None:
            raise fault
        (answer,) = _confined_template(self.processor).each([([_messages(prompt)], True)])
        (text,) = self._rendered(sample, answer)
        return self._process(sample, text, [image for turn in prompt for image in turn.images])[0]

    def _pad(self, items: Sequence[dict[str, Tensor]], *, side: Literal["left", "right"]) -> dict[str, Tensor]:
        """One batch: tensors over tokens padded, those over images joined, in the order of the items.

        A sample without images adds no image rows, not even in Idefics3, whose image tensors have a row a sample:
        the model takes the real images out of them and lays them onto the image tokens one after another.
        """
        batch = {}
        for name in dict.fromkeys(name for item in items for name in item):
            tensors = [item[name] for item in items if name in item]
            if tensors[0].shape == items[0]["input_ids"].shape:
                batch[name] = _pad_tokens(tensors, self._pad_id() if name == "input_ids" else 0, side=side)
            else:
                batch[name] = _pad_and_concatenate(tensors)
        return batch

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.base_model.dtype
        return {name: t.to(self.device, dtype if t.is_floating_point() else t.dtype) for name, t in batch.items()}

    def _stop_ids(self) -> list[int]:
        stops = {self.tokenizer.convert_tokens_to_ids(self.chat.end_of_turn), self.tokenizer.eos_token_id}
        return sorted(stop for stop in stops if stop is not None)

    def _pad_id(self) -> int:
        # which token pads does not matter: it is masked
        return self._stop_ids()[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


def build_processor(folder: Path, config: transformers.PretrainedConfig) -> Any:
    """The processor of the checkpoint in `folder`, for text and images alone.

    AutoProcessor insists on the video processor of Qwen-VL, InternVL, SmolVLM and LLaVA-OneVision, which insists on
    torchvision. This is the same class with None in the video processor's place, and without the check of that.
    """
    named = _processor_class_name(folder)
    named = IMAGE_TWIN.get(named, named)
    processor_class: Any = processor_class_from_name(named) if named else PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None:
        wanted = named or f"processor for {config.model_type!r} models"
        raise ModelError(f"{folder}: transformers {transformers.__version__} has no {wanted}")
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
    attributes = processor_class.get_attributes()
    if unknown := [name for name in attributes if name not in parts]:
        raise ModelError(
            f"{folder}: {processor_class.__name__} needs {', '.join(unknown)}; only text and images are known"
        )
    unchecked: Any = type(
        processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": lambda *_: None}
    )
    settings, _ = processor_class.get_processor_dict(folder)
    processor = unchecked.from_args_and_dict([parts[name] for name in attributes], settings)
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    if processor.chat_template is None:
        raise ModelError(
            f"{folder} has no chat template; use an instruction-tuned checkpoint or add chat_template.jinja"
        )
    return processor


def _processor_class_name(folder: Path) -> str:
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            settings = json.loads((folder / file).read_text(encoding="utf-8"))
            if settings.get("processor_class"):
                return settings["processor_class"]
    return ""


def find_chat_format(processor: Any, name: str) -> ChatFormat:
    """How the template closes an answer, and what it leaves for the model to write before one. Raises ModelError."""
    question = Turn("user", ("question",))
    try:
        (prompt,) = _render(processor, [question], prompt=True)
        (answered,) = _render(processor, [question, Turn("assistant", (MARKER,))])
    except ConfinedError as error:
        raise ModelError(f"{name}: the chat template does not take a question and an answer: {error}") from error
    before, _, after = answered.partition(MARKER)
    added = processor.tokenizer.added_tokens_decoder
    control_tokens = {token_id: token.content for token_id, token in added.items() if token.special}
    first = next(iter(processor.tokenizer(after, add_special_tokens=False)["input_ids"]), None)
    if first not in control_tokens or not after.startswith(control_tokens[first]):
        raise ModelError(
            f"{name}: the chat template puts no end-of-turn token after an answer, but {after[:20]!r}, so a model "
            "trained with it would not learn to stop; use a checkpoint whose template closes its turns"
        )
    if before.startswith(prompt):
        return ChatFormat(control_tokens[first], before.removeprefix(prompt), control_tokens)
    log.warning(
        "%s: its chat template opens an answer with %r but ends a prompt with %r; training follows the first, "
        "generation the second",
        name,
        before[-24:],
        prompt[-24:],
    )
    return ChatFormat(control_tokens[first], "", control_tokens)


def _settings_folder(path: str) -> Path:
    """The folder with everything but the weights. A hub id is downloaded, or found in the cache when offline."""
    if path == "tiny":
        return WEIGHTS
    if Path(path).exists():
        return Path(path).absolute()
    try:
        with _quiet():
            return Path(huggingface_hub.snapshot_download(path, allow_patterns=SETTINGS_PATTERNS))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ModelError(
            f"{path} is not a folder here, and as a hub id it could not be fetched ({type(error).__name__}). "
            "Give the folder of a checkpoint, or fetch it once while online with `hf download`"
        ) from error


def _load_model(path: str, folder: Path, *, device: str, dtype: str) -> VLM:
    if not (folder / "config.json").exists():
        raise ModelError(f"{path} is not a checkpoint: it has neither config.json nor adapter_config.json")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(f"{path} is a {config.model_type!r} model; image-text-to-text models are supported")
    processor = build_processor(folder, config)
    chat = find_chat_format(processor, path)
    source = str(folder) if path == "tiny" or Path(path).exists() else path
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    model, report = loaded
    if lost := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ModelError(f"{path} lacks {len(lost)} tensors of its model, or has them in another shape: {lost[0]}")
    if extra := sorted(report["unexpected_keys"]):
        log.warning("%s has %d tensors that are not part of its model, such as %s", path, len(extra), extra[0])
    model.name_or_path = source  # what an adapter trained on it names as its base
    return VLM(model.to(_device(device)).eval(), processor, path, folder, chat)


def _load_adapter(path: str, folder: Path, *, device: str, dtype: str) -> VLM:
    _check_adapter_file(folder)
    settings = peft.PeftConfig.from_pretrained(str(folder))
    try:
        base = VLM.load(str(settings.base_model_name_or_path), device=device, dtype=dtype)
    except ModelError as error:
        raise ModelError(f"{path} is an adapter whose base model cannot be loaded: {error}") from error
    model = peft.PeftModel.from_pretrained(base.model, str(folder), is_trainable=True)
    return dataclasses.replace(base, model=model.eval(), name=path)


def _check_adapter_file(folder: Path) -> None:
    if not (folder / "adapter_model.safetensors").exists():
        raise ModelError(f"{folder} has adapter_config.json but no adapter_model.safetensors")


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _canonical_tokenizer(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    json.loads(text)  # the library tells a damaged file by a bare Exception
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_padding()  # what the last call asked for is saved too
    tokenizer.no_truncation()
    return tokenizer.to_str()


def _read_chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        if (folder / file).exists():
            template = json.loads((folder / file).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, str):
                return template
    return None


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Without progress bars, and with what goes wrong named."""
    try:
        with _quiet():
            yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ModelError(f"cannot load {path}: {error}") from error


@contextlib.contextmanager
def hidden_variable(name: str) -> Iterator[None]:
    """An environment variable that a launcher has set for libraries is not seen by them in between."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while. Modules go back one by one: a frozen tower may be in another mode than the rest."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _render(processor: Any, *conversations: Sequence[Turn], prompt: bool = False) -> list[str]:
    """The conversations in the template's words. The text of an answer is one block, whatever parts it has.

    A template is code of whoever made the checkpoint, so it runs confined. Raises ConfinedError.
    """
    return _confined_template(processor)([[_messages(turns) for turns in conversations], prompt])


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    messages = []
    for turn in turns:
        parts = (turn.text,) if turn.role == "assistant" else turn.parts
        blocks = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        messages.append({"role": turn.role, "content": blocks})
    return messages


def _confined_template(processor: Any) -> Confined:
    """The process that renders for this processor and for all that have the same template and special tokens."""
    key = (type(processor).__name__, str(processor.chat_template), str(processor.tokenizer.special_tokens_map))
    if key not in _TEMPLATES:

        def render(request: Any) -> list[str]:
            conversations, prompt = request
            settings = {"tokenize": False, "add_generation_prompt": prompt}
            return processor.apply_chat_template(conversations, **settings)

        while len(_TEMPLATES) >= MOST_TEMPLATES:
            del _TEMPLATES[next(iter(_TEMPLATES))]
        _TEMPLATES[key] = Confined(render)
    return _TEMPLATES[key]


def _marked(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with a marker in the place of each answer."""
    return [Turn(turn.role, (MARKER,)) if turn.role == "assistant" else turn for turn in turns]


def _too_much_text(sample: Sample, turns: Sequence[Turn], max_tokens: int | None) -> EncodeError | None:
    characters = _characters(turns)
    if max_tokens is None or characters <= max_tokens * MOST_CHARACTERS:
        return None
    return _refuse(sample, "too_long", f"{characters:,} characters, and at most {max_tokens} tokens are allowed")


def _characters(turns: Sequence[Turn]) -> int:
    return sum(len(turn.text) for turn in turns)


def _in_batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples that are rendered and split into tokens together."""
    batch: list[Sample] = []
    characters = 0
    for sample in samples:
        batch.append(sample)
        characters += _characters(sample.turns)
        if len(batch) == BATCH_SAMPLES or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _counts(is_supervised_T: np.ndarray) -> TokenCounts:
    return TokenCounts(int(is_supervised_T[1:].sum()), len(is_supervised_T))


def _is_visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)


def _refuse(sample: Sample, reason: str, found: str) -> EncodeError:
    return EncodeError(reason, f"{sample.origin}: sample {shown(sample.id)} has {found}")


def _original_span(offset: tuple[int, int], expansions: list[dict[str, Any]]) -> Span:
    """A token's characters in the text as it was before images were expanded; empty for the tokens of an image."""
    start, end = offset
    gained = 0
    for expansion in expansions:
        expanded_start, expanded_end = expansion["new_span"]
        if end <= expanded_start:
            break
        if start < expanded_end:
            return Span(expansion["span"][0], expansion["span"][0])
        gained = expanded_end - expansion["span"][1]
    return Span(start - gained, end - gained)


def _means_of_answers(value_S: Tensor, supervised_BT: Tensor) -> Tensor:
    """Means over each sample's supervised tokens, [B], of a value that they have in the order of the batch."""
    value_BT = value_S.new_zeros(supervised_BT.shape).masked_scatter(supervised_BT, value_S)
    return value_BT.sum(dim=1) / supervised_BT.sum(dim=1)


def _pad_tokens(rows: Sequence[Tensor], value: int, *, side: Literal["left", "right"]) -> Tensor:
    longest = max(row.shape[1] for row in rows)
    gaps = [longest - row.shape[1] for row in rows]
    sides = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
    return torch.cat([pad(row, both, value=value) for row, both in zip(rows, sides, strict=True)])


def _pad_and_concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one after another along dimension 0, the other dimensions filled with zeros to the largest."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        gaps = [full - size for full, size in zip(largest, tensor.shape[1:], strict=True)]
        padded.append(pad(tensor, [amount for gap in reversed(gaps) for amount in (0, gap)]))
    return torch.cat(padded)

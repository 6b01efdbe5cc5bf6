"""Checkpoints of real families, shrunk and random: a family's name in, a folder as one would download it out.

Each folder has the files that the family's repositories have: config and weights, tokenizer with the family's
special tokens (bytes for vocabulary), chat template in the family's style, image processor and processor settings.
Everything small enough that a forward pass takes milliseconds.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

LAYERS = 2
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN_TOKENS = (*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

QWEN_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{{ '' }}
{%- endif -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
INTERNVL_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}
<IMG_CONTEXT>
{% else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
# A turn opens with "assistant \\n", a prompt ends with "assistant\\n": so it is in the published template.
LLAVA_ONEVISION_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + ' ' }}
{%- for part in message.content if part.type == 'image' %}<image>{% endfor -%}
{%- for part in message.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
# The space after "Assistant:" is not in the prompt, so the model has to write it.
IDEFICS3_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first %}<|im_start|>{% endif -%}
{{ message.role | capitalize }}{{ ':' if message.content[0].type == 'image' else ': ' }}
{%- for part in message.content -%}
{%- if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif -%}
{%- endfor -%}
<end_of_utterance>
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
{%- set preface = messages[0].content[0].text + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set preface = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\\n' + (preface if loop.first else '') }}
{%- for part in message.content -%}
{%- if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif -%}
{%- endfor -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""


class Family(NamedTuple):
    """What a family's checkpoint is made of. `named` are the special tokens its tokenizer_config gives a name."""

    tokens: tuple[str, ...]
    end_of_turn: str
    template: str
    config: Callable[[dict[str, int]], transformers.PretrainedConfig]
    image_processor: Callable[[], Any]
    settings: dict[str, Any]
    named: dict[str, str] = {}  # noqa: RUF012 - a constant
    lead: str = ""  # what the model writes before an answer
    legacy: bool = False  # the file layout before transformers 5, which many repositories still have


def _text(ids: dict[str, int], end: str, **more: Any) -> dict[str, Any]:
    return TEXT | {"vocab_size": len(ids), "eos_token_id": ids[end], "bos_token_id": None} | more


def qwen2_5_vl(ids: dict[str, int]) -> transformers.PretrainedConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(ids, "<|im_end|>", rope_parameters=rope),
        vision_config=QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
        **_qwen_ids(ids),
    )


def qwen3_vl(ids: dict[str, int]) -> transformers.PretrainedConfig:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    return transformers.Qwen3VLConfig(
        text_config=_text(ids, "<|im_end|>", rope_parameters=rope),
        vision_config=QWEN_VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **_qwen_ids(ids),
    )


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def internvl(ids: dict[str, int]) -> transformers.PretrainedConfig:
    return transformers.InternVLConfig(
        text_config=_text(ids, "<|im_end|>", model_type="qwen2"),
        vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def llava_onevision(ids: dict[str, int]) -> transformers.PretrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config=_text(ids, "<|im_end|>", model_type="qwen2"),
        vision_config=VISION
        | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
    )


def smolvlm(ids: dict[str, int]) -> transformers.PretrainedConfig:
    return transformers.SmolVLMConfig(**_idefics3_parts(ids))


def idefics3(ids: dict[str, int]) -> transformers.PretrainedConfig:
    return transformers.Idefics3Config(**_idefics3_parts(ids))


def _idefics3_parts(ids: dict[str, int]) -> dict[str, Any]:
    pad = ids["<|endoftext|>"]
    return {
        "text_config": _text(ids, "<end_of_utterance>", model_type="llama", pad_token_id=pad),
        "vision_config": VISION | {"image_size": 32, "patch_size": 8},
        "image_token_id": ids["<image>"],
        "scale_factor": 2,
        "pad_token_id": pad,
    }


def gemma3(ids: dict[str, int]) -> transformers.PretrainedConfig:
    return transformers.Gemma3Config(
        text_config=_text(
            ids,
            "<end_of_turn>",
            bos_token_id=ids["<bos>"],
            pad_token_id=ids["<pad>"],
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        ),
        vision_config=VISION | {"image_size": 32, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )


def _qwen_images() -> Any:
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 56 * 56}
    )


def _internvl_images() -> Any:
    return transformers.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=2
    )


def _llava_onevision_images() -> Any:
    return transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]]
    )


def _smolvlm_images() -> Any:
    return transformers.SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})


def _idefics3_images() -> Any:
    return transformers.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})


def _gemma_images() -> Any:
    return transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})


INTERNVL_NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GEMMA_NAMED = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
    "bos_token": "<bos>",
    "pad_token": "<pad>",
}
IDEFICS3_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
FAMILIES = {
    "qwen2_5_vl": Family(
        QWEN_TOKENS,
        "<|im_end|>",
        QWEN_TEMPLATE,
        qwen2_5_vl,
        _qwen_images,
        {"processor_class": "Qwen2_5_VLProcessor"},
        legacy=True,
    ),
    "qwen3_vl": Family(
        QWEN_TOKENS,
        "<|im_end|>",
        QWEN_TEMPLATE,
        qwen3_vl,
        _qwen_images,
        {"processor_class": "Qwen3VLProcessor"},
    ),
    "internvl": Family(
        (*CHATML, *INTERNVL_NAMED.values()),
        "<|im_end|>",
        INTERNVL_TEMPLATE,
        internvl,
        _internvl_images,
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        INTERNVL_NAMED,
    ),
    "llava_onevision": Family(
        (*CHATML, "<image>", "<video>"),
        "<|im_end|>",
        LLAVA_ONEVISION_TEMPLATE,
        llava_onevision,
        _llava_onevision_images,
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    "smolvlm": Family(
        (*IDEFICS3_TOKENS, "<video>"),
        "<end_of_utterance>",
        IDEFICS3_TEMPLATE,
        smolvlm,
        _smolvlm_images,
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        lead=" ",
    ),
    "idefics3": Family(
        IDEFICS3_TOKENS,
        "<end_of_utterance>",
        IDEFICS3_TEMPLATE,
        idefics3,
        _idefics3_images,
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        lead=" ",
    ),
    "gemma3": Family(
        (
            "<pad>",
            "<bos>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<end_of_image>",
            "<image_soft_token>",
        ),
        "<end_of_turn>",
        GEMMA_TEMPLATE,
        gemma3,
        _gemma_images,
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        GEMMA_NAMED,
    ),
}


def build_tokenizer(family: Family, merges: tuple[tuple[str, str], ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE: one token a byte, and what `merges` joins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [left + right for left, right in merges]
    vocabulary = {token: i for i, token in enumerate((*alphabet, *joined, *family.tokens))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in family.tokens])
    names = {"eos_token": family.end_of_turn, "pad_token": family.tokens[0]} | family.named
    if bos := names.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    standard = {name: names.pop(name) for name in ("eos_token", "pad_token", "bos_token") if name in names}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **standard, extra_special_tokens=names or None
    )


def build_checkpoint(name: str, folder: Path, merges: tuple[tuple[str, str], ...] = ()) -> Path:
    """Write the checkpoint of family `name` into `folder` and return it."""
    family = FAMILIES[name]
    tokenizer = build_tokenizer(family, merges)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(family.config(tokenizer.get_vocab()))
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, a model hardly tells one input from another
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    family.image_processor().save_pretrained(folder)
    if family.legacy:
        images = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(images | family.settings))
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": family.template}))
    else:
        (folder / "processor_config.json").write_text(json.dumps(family.settings))
        (folder / "chat_template.jinja").write_text(family.template)
    return folder

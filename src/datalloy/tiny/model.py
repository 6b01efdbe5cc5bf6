"""The embedded model's architecture: sizes in, an untrained model with its processor out.

An Idefics3 of about one million parameters, because that family's processor works without torchvision. Text is
bytes with merges for the world's own words, so any data in any language can be read; pictures are 64 x 64 pixels
in 16 patches. It is trained by scripts/pretrain_tiny.py and shipped in `weights/` beside this file, with
a card that says what it can and cannot do.
"""

import random
from pathlib import Path

from datalloy.tiny.world import DESCRIBE, DRAW

WEIGHTS = Path(__file__).parent / "weights"
IMAGE_SIZE, PATCH_SIZE = 64, 16
VOCABULARY_SIZE = 448  # 8 special tokens, 256 bytes, and merges for the words the world asks its questions in
SPECIAL_TOKENS = (
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_utterance>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_processor():
    """The processor of the embedded model: 64-pixel pictures, never split; bytes, with merges for the world's words."""
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_build_tokenizer(),
        pad_token="<|pad|>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        do_resize=True,
        size={"longest_edge": IMAGE_SIZE},
        max_image_size={"longest_edge": IMAGE_SIZE},
    )
    patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    return Idefics3Processor(images, tokenizer, image_seq_len=patches, chat_template=CHAT_TEMPLATE)


def _build_tokenizer():
    """Byte-level BPE: every byte is a token, so any text can be read; the world's words are merged, digits never are.

    The merges are learnt from a fixed draw of the world's questions, so they are the same on every machine.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_world_texts(), trainer)
    return backend


def _world_texts() -> list[str]:
    texts = [DESCRIBE] * 50
    for skill, draw in DRAW.items():
        rng = random.Random(f"tokenizer-{skill}")
        for _ in range(40):
            texts += [text for question in draw(rng).questions for text in (question.text, question.answer)]
    return texts


def build_model(tokenizer, *, width: int = 128, layers: int = 3, vision_layers: int = 2, seed: int = 0):
    """An untrained model of the embedded architecture. `width` and `layers` let experiments grow it."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(seed)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=1,
        tie_word_embeddings=False,
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "max_position_embeddings": 2048,
            "pad_token_id": pad,
            "bos_token_id": None,
            "eos_token_id": end,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": width // 32,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = pad
    return model

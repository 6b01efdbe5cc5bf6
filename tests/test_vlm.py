"""Every fact is checked on a tiny checkpoint of each family, loaded from disk as a downloaded one would be."""

import contextlib
import importlib.util
import json
import math
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import peft
import PIL.Image
import PIL.ImageDraw
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import tiny_families
from datalloy import vlm
from datalloy.errors import ModelError
from datalloy.sample import FileImage, Origin, Sample, Turn
from datalloy.tiny.model import build_model, build_processor
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import IGNORED, VLM, EncodeError

# float32 sums in another order: seen up to 1e-6 on losses of 5 to 6
TOLERANCE = 1e-5


class Checkpoint(NamedTuple):
    """A checkpoint loaded once for all tests, which must not change it, and what is known of its chat template."""

    vlm: VLM
    end_of_turn: str
    lead: str


def build_embedded(folder: Path) -> Path:
    processor = build_processor()
    build_model(processor.tokenizer, width=32, layers=tiny_families.LAYERS, vision_layers=1).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[*tiny_families.FAMILIES, "embedded"])
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        return Checkpoint(VLM.load(str(build_embedded(folder)), device="cpu"), "<end_of_utterance>", "")
    family = tiny_families.FAMILIES[request.param]
    tiny_families.build_checkpoint(request.param, folder)
    return Checkpoint(VLM.load(str(folder), device="cpu"), family.end_of_turn, family.lead)


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory) -> Path:
    return build_embedded(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def embedded(embedded_folder) -> VLM:
    return VLM.load(str(embedded_folder), device="cpu")


@pytest.fixture
def embedded_copy(embedded_folder, tmp_path) -> Path:
    """The embedded checkpoint in a folder that a test may damage."""
    return Path(shutil.copytree(embedded_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Callable[..., FileImage]:
    folder = tmp_path_factory.mktemp("pictures")

    def draw(width: int, height: int, colour: str = "red") -> FileImage:
        image = PIL.Image.new("RGB", (width, height), "white")
        PIL.ImageDraw.Draw(image).rectangle((0, 0, width // 2, height // 2), fill=colour)
        path = folder / f"{colour}-{width}x{height}.png"
        image.save(path)
        return FileImage(path)

    return draw


@pytest.fixture(scope="session")
def mixed(picture) -> list[Sample]:
    """No picture, one picture, two pictures of different size, several turns with a system turn."""
    return [
        conversation(("user", "Say yes."), ("assistant", "yes")),
        conversation(("user", picture(56, 40), "What is this?"), ("assistant", "Ein Bär, größer als 3 m")),
        conversation(
            ("user", picture(32, 32, "blue"), "and", picture(40, 56, "green"), "alike?"), ("assistant", "no: 2\nof 3")
        ),
        conversation(
            ("system", "Be brief."),
            ("user", "What is 2 + 2?"),
            ("assistant", "4"),
            ("user", picture(48, 32), "And the colour?"),
            ("assistant", "red, a bit"),
        ),
    ]


def conversation(*turns: tuple) -> Sample:
    """A sample from (role, part, part ...) tuples."""
    turns = tuple(Turn(role, tuple(parts)) for role, *parts in turns)
    return Sample("s1", "d", turns, Origin(Path("pool.jsonl"), 6, 7), "")


def with_template(vlm_folder: Path, template: str) -> VLM:
    (vlm_folder / "chat_template.jinja").write_text(template)
    return VLM.load(str(vlm_folder), device="cpu")


def single_losses(vlm: VLM, samples: list[Sample]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([vlm.losses(vlm.collate([vlm.encode(sample)])) for sample in samples])


def supervised_text(vlm: VLM, sample: Sample) -> str:
    encoded = vlm.encode(sample)
    return vlm.tokenizer.decode(encoded.labels[encoded.labels != IGNORED])


# every family


def test_labels_are_the_answers_with_their_end_of_turn_tokens(checkpoint, mixed):
    vlm, end_of_turn, lead = checkpoint
    for sample in mixed:
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        assert supervised_text(vlm, sample) == "".join(lead + answer + end_of_turn for answer in answers)


def test_labels_repeat_the_inputs_where_they_are_supervised(checkpoint, mixed):
    encoded = checkpoint.vlm.encode(mixed[3])
    supervised = encoded.labels != IGNORED
    assert torch.equal(encoded.labels[supervised], encoded.inputs["input_ids"][supervised])
    assert encoded.supervised_tokens == supervised.sum()
    assert encoded.length == encoded.inputs["input_ids"].shape[1]


def test_tokens_are_counted_as_they_are_encoded(checkpoint, mixed):
    """Many at a time, in any order, with refused samples among them."""
    vlm = checkpoint.vlm
    texts = [conversation(("user", f"Say {word}."), ("assistant", word * 3)) for word in ("a", "Bär", " x ", "\u65e5")]
    refused = [conversation(("user", "a"), ("assistant", text)) for text in (f"no{checkpoint.end_of_turn}", " ")]
    limit = max(vlm.encode(sample).length for sample in texts)
    long = conversation(("user", "a" * limit), ("assistant", "b"))
    endless = conversation(("user", "a" * 65 * limit), ("assistant", "b"))
    for samples in ([*texts, *mixed, *refused, long, endless], [endless, *refused, *reversed(texts)], [*refused], []):
        assert [*vlm.count_tokens(samples, max_tokens=limit)] == [told(vlm, sample, limit) for sample in samples]


def told(vlm: VLM, sample: Sample, max_tokens: int) -> object:
    try:
        encoded = vlm.encode(sample, max_tokens=max_tokens)
    except EncodeError as error:
        return Told(error)
    return encoded.supervised_tokens, encoded.length


class Told(EncodeError):
    """Equal to an error that tells the same."""

    def __init__(self, error: EncodeError) -> None:
        super().__init__(error.reason, error.message)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodeError) and (other.reason, other.message) == (self.reason, self.message)

    __hash__ = None


def test_batch_loss_equals_single_sample_loss(checkpoint, mixed):
    vlm = checkpoint.vlm
    with torch.no_grad():
        losses = vlm.losses(vlm.collate([vlm.encode(sample) for sample in mixed]))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, single_losses(vlm, mixed), rtol=0, atol=TOLERANCE)


def test_losses_do_not_depend_on_the_order_of_the_batch(checkpoint, mixed):
    vlm = checkpoint.vlm
    with torch.no_grad():
        losses = vlm.losses(vlm.collate([vlm.encode(sample) for sample in reversed(mixed)]))
    torch.testing.assert_close(losses.flip(0), single_losses(vlm, mixed), rtol=0, atol=TOLERANCE)


def test_loss_is_the_mean_cross_entropy_of_the_models_logits(checkpoint, mixed):
    vlm = checkpoint.vlm
    encoded = vlm.encode(mixed[2])
    with torch.no_grad():
        logits = vlm.model(**encoded.inputs).logits
    expected = cross_entropy(logits[0, :-1], encoded.labels[0, 1:], ignore_index=IGNORED)
    torch.testing.assert_close(single_losses(vlm, [mixed[2]])[0], expected, rtol=0, atol=TOLERANCE)


def test_loss_depends_on_each_picture(checkpoint, picture):
    def ask(first: str, second: str) -> Sample:
        parts = (picture(32, 32, first), picture(32, 32, second), "Which colours?")
        return conversation(("user", *parts), ("assistant", "yes"))

    samples = [ask("red", "red"), ask("red", "blue"), ask("blue", "red")]
    losses = single_losses(checkpoint.vlm, samples).tolist()
    assert len({round(loss, 5) for loss in losses}) == 3


def test_generated_answers_do_not_depend_on_the_batch(checkpoint, mixed):
    together = checkpoint.vlm.generate(mixed, max_new_tokens=4, batch_size=3)
    alone = [checkpoint.vlm.generate([sample], max_new_tokens=4, batch_size=1)[0] for sample in mixed]
    assert together == alone


def test_generating_leaves_modes_and_losses_as_they_were(checkpoint, mixed):
    vlm = checkpoint.vlm.copy()
    before = single_losses(vlm, mixed)
    vlm.model.train()
    vlm.decoder_layers().eval()
    padding_side = vlm.tokenizer.padding_side
    vlm.generate(mixed, max_new_tokens=2, batch_size=4)
    assert vlm.model.training
    assert not vlm.decoder_layers().training
    assert vlm.tokenizer.padding_side == padding_side
    vlm.model.eval()
    assert torch.equal(single_losses(vlm, mixed), before)


def test_prompts_are_laid_out_once_and_answered_by_any_model(checkpoint, mixed):
    vlm = checkpoint.vlm
    other = vlm.copy()
    torch.nn.init.zeros_(other.output_head().weight)
    prompts = vlm.lay_out_prompts(mixed, 3)
    for model in (vlm, other, vlm):
        expected = model.generate(mixed, max_new_tokens=4, batch_size=3)
        assert model.write_answers(prompts, max_new_tokens=4) == expected


def count_looks(vlm: VLM) -> list:
    """Grows by one each time the vision tower computes something."""
    looks: list = []
    next(vlm.vision_tower().children()).register_forward_hook(lambda *_: looks.append(1))
    return looks


def kept_losses(vlm: VLM, batch, vision: VisionFeatures) -> torch.Tensor:
    with torch.no_grad(), vlm.reusing(vision, batch):
        return vlm.losses(batch)


def test_vision_features_are_computed_once_and_change_no_loss_or_answer(checkpoint, mixed):
    vlm = checkpoint.vlm.view()
    batch = vlm.collate([vlm.encode(sample) for sample in mixed])
    prompts = vlm.lay_out_prompts(mixed, 3)
    loss_B, answers = vlm.losses(batch), vlm.write_answers(prompts, max_new_tokens=4)
    looks = count_looks(vlm)
    for_losses, for_answers = VisionFeatures(), VisionFeatures()
    kept_losses(vlm, batch, for_losses)
    vlm.write_answers(prompts, max_new_tokens=4, vision=for_answers)
    once = len(looks)
    assert once >= 2
    for _ in range(2):
        assert torch.equal(kept_losses(vlm, batch, for_losses), loss_B)
        assert vlm.write_answers(prompts, max_new_tokens=4, vision=for_answers) == answers
    assert len(looks) == once


def test_what_stands_behind_the_tower_is_computed_anew(checkpoint, mixed):
    vlm = checkpoint.vlm.copy()
    batch = vlm.collate([vlm.encode(sample) for sample in mixed])
    vision = VisionFeatures()
    before = kept_losses(vlm, batch, vision)
    tower = {id(parameter) for parameter in vlm.vision_tower().parameters()}
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if id(parameter) not in tower:
                parameter.mul_(1.01)
    after = kept_losses(vlm, batch, vision)
    assert torch.equal(after, single_batch_losses(vlm, batch))
    assert not torch.equal(after, before)


def single_batch_losses(vlm: VLM, batch) -> torch.Tensor:
    with torch.no_grad():
        return vlm.losses(batch)


def test_kept_features_leave_the_decoders_gradients_as_they_are(checkpoint, mixed):
    vlm = checkpoint.vlm
    batch = vlm.collate([vlm.encode(sample) for sample in mixed])
    parameters = list(vlm.decoder_layers()[0].parameters())
    expected = torch.autograd.grad(vlm.losses(batch).sum(), parameters)
    vision = VisionFeatures()
    for _ in range(2):
        with vlm.reusing(vision, batch):
            found = torch.autograd.grad(vlm.losses(batch).sum(), parameters)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_trained_on_three_answers_a_model_gives_them_and_stops(checkpoint, picture):
    """Ties the ends together: labels, shift, pictures, prompt, padding and stopping agree, or this fails."""
    vlm = checkpoint.vlm.copy()
    samples = [
        conversation(("user", picture(32, 32, "red"), "Which colour?"), ("assistant", "red")),
        conversation(("user", picture(32, 32, "blue"), "Which colour?"), ("assistant", "dark blue")),
        conversation(("user", "Which colour?"), ("assistant", "none")),
    ]
    batch = vlm.collate([vlm.encode(sample) for sample in samples])
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        vlm.losses(batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
    assert vlm.generate(samples, max_new_tokens=20, batch_size=3) == ["red", "dark blue", "none"]


def test_gradients_reach_every_decoder_layer_and_the_vision_tower(checkpoint, mixed):
    vlm = checkpoint.vlm.copy()
    vlm.losses(vlm.collate([vlm.encode(sample) for sample in mixed])).sum().backward()
    assert len(vlm.decoder_layers()) == tiny_families.LAYERS
    for layer in vlm.decoder_layers():
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vlm.vision_parameters())


def test_vision_parameters_are_neither_decoder_nor_connector(checkpoint):
    vision = {id(parameter) for parameter in checkpoint.vlm.vision_parameters()}
    names = {name for name, parameter in checkpoint.vlm.model.named_parameters() if id(parameter) in vision}
    assert names
    others = ("language_model", "text_model", "lm_head", "projector", "connector", "merger")
    assert not any(other in name for name in names for other in others)


def test_saved_model_has_the_same_losses_and_tensor_names(checkpoint, mixed, tmp_path):
    checkpoint.vlm.save(tmp_path)
    loaded = VLM.load(str(tmp_path), device="cpu")
    assert torch.equal(single_losses(loaded, mixed), single_losses(checkpoint.vlm, mixed))
    saved, source = (
        set(safetensors.torch.load_file(f / "model.safetensors")) for f in (tmp_path, checkpoint.vlm.folder)
    )
    assert saved == source


def test_adapter_is_saved_alone_and_loads_with_its_base(checkpoint, mixed, tmp_path):
    vlm = checkpoint.vlm.copy()
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = VLM(peft.get_peft_model(vlm.model, adapter), vlm.processor, vlm.name, vlm.folder, vlm.chat)
    tuned.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = VLM.load(str(tmp_path), device="cpu")
    assert torch.equal(single_losses(loaded, mixed), single_losses(tuned, mixed))
    assert not torch.equal(single_losses(loaded, mixed), single_losses(checkpoint.vlm, mixed))
    assert len(loaded.decoder_layers()) == tiny_families.LAYERS
    assert loaded.generate(mixed, max_new_tokens=2, batch_size=4) == tuned.generate(
        mixed, max_new_tokens=2, batch_size=1
    )


def test_a_loaded_adapter_can_be_trained_and_its_base_is_frozen(checkpoint, mixed, tmp_path):
    vlm = checkpoint.vlm.copy()
    peft.get_peft_model(vlm.model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    loaded = VLM.load(str(tmp_path), device="cpu")
    loaded.losses(loaded.collate([loaded.encode(sample) for sample in mixed])).sum().backward()
    with_gradient = {name for name, parameter in loaded.model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)


def test_the_output_head_makes_logits_of_what_the_final_norm_gives(checkpoint, mixed):
    vlm, normed = checkpoint.vlm, []
    hook = vlm.final_norm().register_forward_hook(lambda module, args, output: normed.append(output))
    with torch.no_grad():
        logits = vlm.model(**vlm.encode(mixed[1]).inputs).logits
        hook.remove()
        assert torch.equal(vlm.output_head()(normed[0]), logits)


def test_from_the_state_of_a_prompt_the_answer_is_begun(checkpoint, mixed):
    """In batches too, whose padding moves the answers."""
    vlm = checkpoint.vlm
    batch = vlm.collate([vlm.encode(sample) for sample in mixed])
    first_B = (batch["labels"] != IGNORED).int().argmax(dim=1)
    expected = vlm.logits_at(batch, first_B)
    with torch.no_grad():
        begun = vlm.output_head()(vlm.prompt_states(batch).to(expected.dtype))
    torch.testing.assert_close(begun, expected, rtol=0, atol=2e-4)


def test_bfloat16_losses_are_near_float32_losses(checkpoint, mixed):
    half = VLM.load(str(checkpoint.vlm.folder), device="cpu", dtype="bfloat16")
    losses = single_losses(half, mixed)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, single_losses(checkpoint.vlm, mixed), rtol=0, atol=0.05)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None,
    reason="shows that pictures need no torchvision, so it can only run where none is installed",
)
def test_pictures_need_no_torchvision(checkpoint, mixed):
    assert checkpoint.vlm.encode(mixed[1]).inputs["pixel_values"].numel() > 0
    assert "torchvision" not in sys.modules


# one family is enough


def test_uniform_predictions_cost_the_logarithm_of_the_vocabulary(embedded, mixed):
    vlm = embedded.copy()
    torch.nn.init.zeros_(vlm.model.lm_head.weight)
    expected = torch.full((len(mixed),), math.log(len(vlm.tokenizer)))
    torch.testing.assert_close(single_losses(vlm, mixed), expected)


def test_copy_has_weights_of_its_own(embedded, mixed):
    twin = embedded.copy()
    before = single_losses(embedded, mixed[:1])
    torch.nn.init.zeros_(twin.model.lm_head.weight)
    assert torch.equal(single_losses(embedded, mixed[:1]), before)
    assert twin.processor is embedded.processor


def test_a_view_shares_weights_and_nothing_else(embedded, mixed):
    base = embedded.copy()
    view = base.view()
    before = single_losses(base, mixed[:1])
    assert torch.equal(single_losses(view, mixed[:1]), before)
    view.output_head().register_forward_hook(lambda *_: pytest.fail("called"))
    view.output_head().weight = torch.nn.Parameter(torch.zeros_like(base.output_head().weight))
    assert torch.equal(single_losses(base, mixed[:1]), before)
    assert all(parameter.requires_grad for parameter in base.model.parameters())
    pointers = {parameter.data_ptr() for parameter in base.model.parameters()}
    own = [name for name, parameter in view.model.named_parameters() if parameter.data_ptr() not in pointers]
    assert own == ["lm_head.weight"]


def test_a_view_is_evaluated_whatever_its_model_does(embedded):
    base = embedded.copy()
    base.model.train()
    assert not any(module.training for module in base.view().model.modules())
    assert base.model.training


@pytest.fixture
def looking(embedded, mixed) -> tuple[VLM, dict]:
    vlm = embedded.copy()
    return vlm, vlm.collate([vlm.encode(sample) for sample in mixed])


def test_a_failure_inside_gives_the_tower_back_and_keeps_nothing(looking):
    vlm, batch = looking
    vision = VisionFeatures()
    expected = single_batch_losses(vlm, batch)
    failing = vlm.output_head().register_forward_hook(lambda *_: {}["no such key"])
    with pytest.raises(KeyError):  # after the tower was called
        kept_losses(vlm, batch, vision)
    failing.remove()
    assert "forward" not in vars(vlm.vision_tower())
    looks = count_looks(vlm)
    assert torch.equal(kept_losses(vlm, batch, vision), expected)
    assert looks


def test_a_tower_that_somebody_else_replaced_is_given_back_replaced(looking):
    vlm, batch = looking
    tower = vlm.vision_tower()
    tower.forward = replaced = type(tower).forward.__get__(tower)
    kept_losses(vlm, batch, VisionFeatures())
    assert tower.forward is replaced


def test_features_are_kept_by_batch(looking, mixed):
    vlm, batch = looking
    other = vlm.collate([vlm.encode(mixed[1])])
    vision = VisionFeatures()
    for _ in range(2):
        assert torch.equal(kept_losses(vlm, batch, vision), single_batch_losses(vlm, batch))
        assert torch.equal(kept_losses(vlm, other, vision), single_batch_losses(vlm, other))


def test_a_batch_without_pictures_has_features_to_keep_too(looking, mixed):
    vlm, _ = looking
    text = vlm.collate([vlm.encode(mixed[0])])
    vision = VisionFeatures()
    for _ in range(2):
        assert torch.equal(kept_losses(vlm, text, vision), single_batch_losses(vlm, text))


def test_features_of_another_tower_are_refused(looking):
    vlm, batch = looking
    vision = VisionFeatures()
    kept_losses(vlm, batch, vision)
    kept_losses(vlm.view(), batch, vision)
    with pytest.raises(ModelError, match="is not the one whose features were kept"):
        kept_losses(vlm.copy(), batch, vision)
    with torch.no_grad():
        next(vlm.vision_tower().parameters()).mul_(2)
    with pytest.raises(ModelError, match="or was changed since"):
        kept_losses(vlm, batch, vision)


def test_more_looks_than_were_kept_are_refused(looking):
    vlm, batch = looking
    vision = VisionFeatures()
    with vlm.reusing(vision, batch):
        pass
    with pytest.raises(ModelError, match="looks at a batch more often"):
        kept_losses(vlm, batch, vision)


def test_answers_come_back_in_the_order_of_the_samples(embedded):
    samples = [conversation(("user", "x" * n), ("assistant", "yes")) for n in (9, 1, 30, 4)]
    forwards = embedded.generate(samples, max_new_tokens=3, batch_size=2)
    backwards = embedded.generate(samples[::-1], max_new_tokens=3, batch_size=2)
    assert forwards == backwards[::-1]


def test_generation_ignores_the_checkpoints_sampling_settings(embedded_copy, embedded, mixed):
    file = embedded_copy / "generation_config.json"
    sampled = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 1.9}
    file.write_text(json.dumps(json.loads(file.read_text()) | sampled))
    sampling = VLM.load(str(embedded_copy), device="cpu")
    assert sampling.generate(mixed, max_new_tokens=6, batch_size=4) == embedded.generate(
        mixed, max_new_tokens=6, batch_size=4
    )


def test_loading_and_saving_say_nothing(embedded_folder, tmp_path, capfd):
    VLM.load(str(embedded_folder), device="cpu").save(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_settings_for_video_survive_a_round_trip(embedded_copy, tmp_path):
    (embedded_copy / "video_preprocessor_config.json").write_text('{"fps": 2}')
    VLM.load(str(embedded_copy), device="cpu").save(tmp_path / "saved")
    assert (tmp_path / "saved" / "video_preprocessor_config.json").read_text() == '{"fps": 2}'


def test_saving_over_the_loaded_folder_keeps_it_loadable(embedded_copy, mixed):
    vlm = VLM.load(str(embedded_copy), device="cpu")
    vlm.save(embedded_copy)
    assert torch.equal(single_losses(VLM.load(str(embedded_copy), device="cpu"), mixed), single_losses(vlm, mixed))


def test_a_trimming_template_supervises_the_trimmed_answer(tmp_path):
    gemma = VLM.load(str(tiny_families.build_checkpoint("gemma3", tmp_path)), device="cpu")
    assert supervised_text(gemma, conversation(("user", "a"), ("assistant", " 42 \n"))) == "42<end_of_turn>"


def test_white_space_around_an_answer_is_supervised_where_the_template_keeps_it(embedded):
    sample = conversation(("user", "a"), ("assistant", " 42 \n"))
    assert supervised_text(embedded, sample) == " 42 \n<end_of_utterance>"


def test_a_conversation_starts_with_one_bos_token(tmp_path):
    gemma = VLM.load(str(tiny_families.build_checkpoint("gemma3", tmp_path)), device="cpu")
    input_ids = gemma.encode(conversation(("user", "a"), ("assistant", "b"))).inputs["input_ids"]
    assert (input_ids == gemma.tokenizer.bos_token_id).sum() == 1


def test_a_token_shared_with_the_space_before_the_answer_is_supervised(tmp_path):
    """Real vocabularies have " yes" as one token; "Assistant:" ends the prompt, so the model writes the space."""
    folder = tiny_families.build_checkpoint("smolvlm", tmp_path, merges=(("Ġ", "y"),))
    encoded = VLM.load(str(folder), device="cpu").encode(conversation(("user", "a"), ("assistant", "yes")))
    assert encoded.supervised_tokens == len([" y", "e", "s", "<end_of_utterance>"])


def test_several_pictures_cost_llava_onevision_no_tiles(tmp_path, picture):
    """The family tiles a picture only where it is the conversation's only one."""
    vlm = VLM.load(str(tiny_families.build_checkpoint("llava_onevision", tmp_path)), device="cpu")
    sample = conversation(("user", picture(56, 40), picture(40, 56), "a"), ("assistant", "b"))
    image_tokens = vlm.encode(sample).inputs["input_ids"] == vlm.processor.image_token_id
    patches, line_end = 16, 1
    assert image_tokens.sum() == 2 * (patches + line_end)


@settings(deadline=None, max_examples=60)
@given(question=st.text(), answer=st.text())
def test_any_text_is_supervised_exactly(embedded, question, answer):
    answer = f"{answer}.{answer}"  # never blank
    sample = conversation(("user", question), ("assistant", answer), ("user", answer), ("assistant", "b"))
    assert supervised_text(embedded, sample) == f"{answer}<end_of_utterance>b<end_of_utterance>"


def test_a_prompt_unlike_the_conversation_is_reported(tmp_path, caplog):
    VLM.load(str(tiny_families.build_checkpoint("llava_onevision", tmp_path)), device="cpu")
    assert "opens an answer with" in caplog.text


# refused samples


def refusal(vlm: VLM, sample: Sample, **options) -> EncodeError:
    with pytest.raises(EncodeError, match=r"pool\.jsonl:7: sample 's1' has ") as caught:
        vlm.encode(sample, **options)
    return caught.value


@pytest.mark.parametrize("blank", ["", "  \n", "\u200b\ufeff"])
def test_a_blank_answer_has_no_supervision(embedded, blank):
    sample = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", blank))
    assert refusal(embedded, sample).reason == "no_supervision"


def test_a_conversation_without_answer_has_no_supervision(embedded):
    assert refusal(embedded, conversation(("user", "a"))).reason == "no_supervision"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_an_image_token_in_text_is_refused(embedded, role):
    turns = {"system": "a", "user": "b", "assistant": "c"} | {role: "look: <image>"}
    error = refusal(embedded, conversation(*turns.items()))
    assert error.reason == "image_token_in_text"
    assert "'<image>'" in str(error)


def test_a_control_token_in_an_answer_is_refused(checkpoint):
    sample = conversation(("user", "a"), ("assistant", f"no{checkpoint.end_of_turn}yes"))
    error = refusal(checkpoint.vlm, sample)
    assert error.reason == "control_token_in_text"
    assert checkpoint.end_of_turn in str(error)


def test_a_control_token_in_a_prompt_is_refused_when_generating(embedded):
    sample = conversation(("user", "a<|assistant|>b"), ("assistant", "c"))
    with pytest.raises(EncodeError, match=r"control token '<\|assistant\|>' in its user text"):
        embedded.generate([sample], max_new_tokens=1, batch_size=1)


def test_an_image_in_an_answer_is_refused(embedded, picture):
    sample = conversation(("user", "a"), ("assistant", picture(32, 32), "b"))
    assert refusal(embedded, sample).reason == "image_in_answer"


def test_a_sample_of_exactly_the_allowed_length_is_kept_and_a_longer_one_refused(checkpoint, mixed):
    length = checkpoint.vlm.encode(mixed[1]).length
    assert checkpoint.vlm.encode(mixed[1], max_tokens=length).length == length
    error = refusal(checkpoint.vlm, mixed[1], max_tokens=length - 1)
    assert error.reason == "too_long"
    assert f"{length} tokens with its images, at most {length - 1} are allowed" in str(error)


def test_an_unreadable_image_is_refused(embedded, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    sample = conversation(("user", FileImage(tmp_path / "torn.png"), "a"), ("assistant", "b"))
    error = refusal(embedded, sample)
    assert error.reason == "image_unreadable"
    assert "torn.png" in str(error)


def test_an_image_that_the_processor_refuses_is_refused_with_its_reason(tmp_path, picture):
    qwen = VLM.load(str(tiny_families.build_checkpoint("qwen3_vl", tmp_path)), device="cpu")
    error = refusal(qwen, conversation(("user", picture(999, 1), "a"), ("assistant", "b")))
    assert error.reason == "image_refused"
    assert "aspect ratio" in str(error)


LOUD = "{% for m in messages %}{{ m.content[0].text | upper }}<end_of_utterance>{% endfor %}"
FORGETFUL = "{% for m in messages[-2:] %}{{ m.content[0].text }}<end_of_utterance>{% endfor %}"
LENGTH_SHOWING = (
    "{% for m in messages %}{{ m.content[0].text | length }}{{ m.content[0].text }}<end_of_utterance>{% endfor %}"
)
STRICT = "{% if messages | length > 2 %}{{ raise_exception('two turns only') }}{% endif %}" + FORGETFUL


@pytest.mark.parametrize("template", [FORGETFUL, LENGTH_SHOWING, STRICT])
def test_a_template_that_changes_answers_or_what_surrounds_them_is_refused(embedded_copy, template):
    vlm = with_template(embedded_copy, template)
    sample = conversation(("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"))
    assert refusal(vlm, sample).reason == "template_mismatch"


def test_a_sample_with_the_marker_in_it_is_refused_not_mislabelled(embedded):
    sample = conversation(("user", "datalloy-answer-5b0c61f2a94e"), ("assistant", "b"))
    assert refusal(embedded, sample).reason == "template_mismatch"


def test_an_encode_error_survives_pickling():
    error = pickle.loads(pickle.dumps(EncodeError("too_long", "pool.jsonl:7: too long")))
    assert (error.reason, str(error)) == ("too_long", "pool.jsonl:7: too long")


# refused checkpoints


def test_a_missing_path_is_refused_without_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no/such is not a folder here, and as a hub id it could not be fetched"):
        VLM.load("no/such")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"not a checkpoint: it has neither config\.json nor"):
        VLM.load(str(tmp_path))


def test_a_model_that_takes_no_images_is_refused(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a 'llama' model; image-text-to-text models are supported"):
        VLM.load(str(tmp_path))


def test_weights_in_pickle_format_are_refused(embedded_copy):
    weights = safetensors.torch.load_file(embedded_copy / "model.safetensors")
    (embedded_copy / "model.safetensors").unlink()
    torch.save(weights, embedded_copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot load .*safetensors"):
        VLM.load(str(embedded_copy))


def test_damaged_weights_are_refused(embedded_copy):
    whole = (embedded_copy / "model.safetensors").read_bytes()
    (embedded_copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load "):
        VLM.load(str(embedded_copy))


def test_a_checkpoint_with_a_tensor_missing_is_refused(embedded_copy):
    weights = safetensors.torch.load_file(embedded_copy / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, embedded_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors of its model.*lm_head\.weight"):
        VLM.load(str(embedded_copy))


def test_a_checkpoint_without_chat_template_is_refused(embedded_copy):
    (embedded_copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        VLM.load(str(embedded_copy))


def test_a_template_that_closes_no_turn_is_refused(embedded_copy):
    with pytest.raises(ModelError, match="no end-of-turn token after an answer, but ' USER:"):
        with_template(embedded_copy, "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }} USER: {% endfor %}")


def test_a_template_that_rewrites_every_answer_is_refused(embedded_copy):
    with pytest.raises(ModelError, match="no end-of-turn token"):
        with_template(embedded_copy, LOUD)


def test_an_adapter_without_base_names_both(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    peft.LoraConfig(base_model_name_or_path="/gone/base").save_pretrained(tmp_path)
    safetensors.torch.save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is an adapter whose base model cannot be loaded: /gone/base is not a folder"):
        VLM.load(str(tmp_path))


def test_an_adapter_in_pickle_format_is_refused(tmp_path):
    peft.LoraConfig(base_model_name_or_path="tiny").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        VLM.load(str(tmp_path))


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3)])
def test_a_picture_of_any_shape_is_encoded_or_refused(checkpoint, picture, size):
    sample = conversation(("user", picture(*size), "What is this?"), ("assistant", "a line"))
    with contextlib.suppress(EncodeError):  # the record is refused, and nothing else is
        encoded = checkpoint.vlm.encode(sample)
        assert math.isfinite(checkpoint.vlm.losses(checkpoint.vlm.collate([encoded])).item())


def test_the_pixels_of_one_sample_are_limited_and_text_beyond_all_tokens_is_not_tokenised(
    embedded, picture, monkeypatch
):
    monkeypatch.setattr(vlm, "MAX_SAMPLE_PIXELS", 2 * 32 * 32)
    two = conversation(("user", picture(32, 32), picture(32, 32), "alike?"), ("assistant", "yes"))
    three = conversation(("user", *[picture(32, 32)] * 3, "alike?"), ("assistant", "yes"))
    embedded.encode(two)
    with pytest.raises(EncodeError, match="3,072 pixels in its images, at most 2,048") as refused:
        embedded.encode(three)
    assert refused.value.reason == "image_refused"
    long = conversation(("user", "x" * 64_001), ("assistant", "yes"))
    monkeypatch.setattr(type(embedded.processor), "__call__", lambda *_, **__: pytest.fail("it was tokenised"))
    with pytest.raises(EncodeError, match="characters, and at most 1000 tokens are allowed") as refused:
        embedded.encode(long, max_tokens=1000)
    assert refused.value.reason == "too_long"

"""Merged models against PEFT's own forward, dense sums, finite differences and plain gradients."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import tiny_families
from datalloy.errors import ModelError
from datalloy.merging import Merge, open_merge
from datalloy.target_items import TargetItems
from datalloy.tiny.model import build_model, build_processor
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import VLM
from drawn import draw_samples

DECODER = r".*text_model.*(q_proj|v_proj|down_proj)"
ADAPTERS = {
    "plain": {"r": 2, "lora_alpha": 8},
    "stabilised": {"r": 5, "lora_alpha": 4, "use_rslora": True},
    "patterned": {"r": 3, "lora_alpha": 3, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"down_proj": 9}},
}
Changes = list[dict[str, torch.Tensor]]
UNIFORM = np.full(3, 1 / 3)
MIXED = np.array([0.2, 0.0, 0.8])


@pytest.fixture(scope="module")
def base(proxy) -> VLM:
    return proxy


def add_noise(tensors, seed: int, scale: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype), alpha=scale)


def write_adapter(base: VLM, folder: Path, seed: int = 0, target_modules=DECODER, **settings) -> Path:
    torch.manual_seed(seed)
    model = peft.get_peft_model(base.copy().model, peft.LoraConfig(target_modules=target_modules, **settings))
    add_noise((tensor for name, tensor in model.named_parameters() if "lora_B" in name), seed)
    dataclasses.replace(base, model=model).save(folder)
    return folder


def write_checkpoint(base: VLM, folder: Path, seed: int = 0, frozen=("vision_model",)) -> Path:
    expert = base.copy()
    add_noise([p for n, p in expert.model.named_parameters() if not any(f in n for f in frozen)], seed)
    expert.save(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(base, folder / name, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def checkpoints(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(base, folder / name, seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module", params=["adapters", "checkpoints"])
def experts(request) -> dict[str, Path]:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def merge(base, experts) -> Merge:
    """Opened once: a merge keeps nothing of the mixtures before, which is tested."""
    return open_merge(base, experts)


@pytest.fixture(scope="module")
def changes(base, experts) -> Changes:
    return read_changes(base, experts)


def read_changes(base: VLM, experts: dict[str, Path]) -> Changes:
    """tau of each expert, tensor by tensor in float64, from what PEFT or transformers make of its folder."""
    changes = []
    originals = {name: tensor.double() for name, tensor in base.model.named_parameters()}
    for folder in experts.values():
        model = VLM.load(str(folder), device="cpu").model
        tuned = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
        changes.append({n: (t.double() - originals[n]).detach() for n, t in tuned.named_parameters()})
    return changes


def dense_merge(base: VLM, changes: Changes, weight_K: np.ndarray) -> VLM:
    merged = base.copy()
    with torch.no_grad():
        for name, tensor in merged.model.named_parameters():
            tensor.copy_(tensor.double() + sum(w * tau[name] for w, tau in zip(weight_K, changes, strict=True)))
    return merged


def assert_same_losses(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# theta_w


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("experts", ["adapters"], indirect=True)
def test_a_vertex_reproduces_what_peft_makes_of_the_adapter(k, base, adapters, merge, items):
    tuned = VLM.load(str(adapters[merge.names[k]]), device="cpu")
    assert_same_losses(items.losses(merge.set(np.eye(3)[k])), items.losses(tuned))
    assert np.abs(items.losses(tuned) - items.losses(base)).max() > 1e-3


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("experts", ["checkpoints"], indirect=True)
def test_a_vertex_reproduces_its_checkpoint_bit_for_bit(k, base, checkpoints, merge):
    merge.set(UNIFORM)  # nothing of it may stay
    merged = merge.set(np.eye(3)[k]).model.state_dict()
    expert = VLM.load(str(checkpoints[merge.names[k]]), device="cpu").model.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expert.items())
    assert any(not torch.equal(merged[name], tensor) for name, tensor in base.model.state_dict().items())


@pytest.mark.parametrize("weight_K", [UNIFORM, MIXED, np.array([0.5, 0.25, 0.25])])
def test_any_mixture_is_the_dense_sum(weight_K, base, merge, changes, items):
    assert_same_losses(items.losses(merge.set(weight_K)), items.losses(dense_merge(base, changes, weight_K)))


# slopes


def directions(count: int) -> np.ndarray:
    """Ways along the simplex: from the last expert to each other."""
    return np.eye(count)[:-1] - np.eye(count)[-1]


def test_slopes_are_what_finite_differences_give(merge, items):
    start_K, step = np.array([0.3, 0.3, 0.4]), 0.05
    loss_G, slope_GK = merge.slopes(start_K, items)

    def losses_G(weight_K):
        loss_V = items.losses(merge.set(weight_K))
        return np.array([loss_V[items.target_V == g].mean() for g in range(2)])

    assert loss_G == pytest.approx(losses_G(start_K), abs=1e-6)
    for direction_K in directions(3):
        ahead_G, behind_G = (losses_G(start_K + sign * step * direction_K) for sign in (1, -1))
        expected_G = (ahead_G - behind_G) / (2 * step)
        assert np.abs(expected_G).min() > 1e-4
        assert slope_GK @ direction_K == pytest.approx(expected_G, rel=0.01, abs=2e-5)


def test_slopes_of_a_target_judged_by_probability_are_those_of_the_probability(base, merge, targets):
    name = list(targets)[1]
    items = lay_out(base, targets, by_probability=[name])
    tokens_V = np.array([item.supervised_tokens for item in targets[name]])
    start_K, step = np.array([0.3, 0.3, 0.4]), 0.05

    def probability(weight_K):
        loss_V = items.losses(merge.set(weight_K))[items.target_V == 1]
        return np.exp(-loss_V * tokens_V).mean()

    risk_G, slope_GK = merge.slopes(start_K, items)
    assert risk_G[1] == pytest.approx(-probability(start_K), rel=1e-4)
    assert risk_G[0] == pytest.approx(items.losses(merge.set(start_K))[items.target_V == 0].mean(), abs=1e-6)
    for direction_K in directions(3):
        expected = (probability(start_K + step * direction_K) - probability(start_K - step * direction_K)) / (2 * step)
        assert -slope_GK[1] @ direction_K == pytest.approx(expected, rel=0.03, abs=0.02 * -risk_G[1])


def test_slopes_are_dot_products_of_the_gradient_with_each_experts_change(base, merge, changes, items):
    _, slope_GK = merge.slopes(UNIFORM, items)
    merged = dense_merge(base, changes, UNIFORM)
    names, parameters = zip(*merged.model.named_parameters(), strict=True)
    for g in range(2):
        gradient = items.gradient(merged, parameters, target=g)
        for k, tau in enumerate(changes):
            expected = sum(float((part * tau[name]).sum()) for name, part in zip(names, gradient, strict=True))
            assert slope_GK[g, k] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("layout", [{"items_per_batch": 3}, {"vision": VisionFeatures()}, {"targets_apart": True}])
def test_slopes_do_not_depend_on_the_layout(layout, base, merge, targets):
    expected_G, expected_GK = merge.slopes(MIXED, lay_out(base, targets))
    items = lay_out(base, targets, **layout)
    for _ in range(2):  # the second time on features that were kept
        loss_G, slope_GK = merge.slopes(MIXED, items)
        np.testing.assert_allclose(loss_G, expected_G, rtol=0, atol=2e-6)
        np.testing.assert_allclose(slope_GK, expected_GK, rtol=0, atol=2e-6)


def lay_out(vlm: VLM, targets, **layout) -> TargetItems:
    return TargetItems.lay_out(vlm, targets, dict.fromkeys(targets, 1.0), **layout)


def test_slopes_leave_the_model_at_the_mixture_without_a_trace(merge, items):
    loss_V = items.losses(merge.set(MIXED))
    merge.set(UNIFORM)
    merge.slopes(MIXED, items)
    assert np.array_equal(items.losses(merge.vlm), loss_V)
    assert not any(module._forward_hooks for module in merge.vlm.model.modules())
    assert all(parameter.grad is None for parameter in merge.vlm.model.parameters())


@pytest.mark.parametrize("write", [write_adapter, write_checkpoint])
def test_experts_of_the_vision_tower_have_no_slope_on_text(write, base, text_only, drawn, tmp_path):
    settings = {write_adapter: {"r": 2, "target_modules": r".*vision_model.*q_proj"}}
    frozen = {write_checkpoint: {"frozen": ("text_model", "lm_head", "connector")}}
    expert = write(base, tmp_path / "expert", **(settings | frozen)[write])
    targets = {"text": [base.encode(text_only)], "pictures": drawn[:2]}
    items = lay_out(base, targets, targets_apart=True)
    loss_G, slope_GK = open_merge(base, {"a": expert}).slopes([1.0], items)
    assert slope_GK[0] == 0
    assert abs(slope_GK[1]) > 0
    assert loss_G[0] == pytest.approx(items.losses(base)[0])


def test_kept_features_of_a_tower_that_experts_changed_are_refused(base, targets, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter", r=2, target_modules=r".*vision_model.*q_proj")
    merge, items = open_merge(base, {"a": adapter}), lay_out(base, targets, vision=VisionFeatures())
    items.losses(merge.vlm)
    with pytest.raises(ModelError, match="was changed since"):
        items.losses(merge.set([1.0]))


def test_layers_that_do_not_keep_items_apart_have_no_slopes(base, adapters, items):
    """As where a mixture-of-experts layer sorts tokens: a slope of each item would be wrong."""
    merge = open_merge(base, adapters)
    layer = merge.vlm.decoder_layers()[1].self_attn.v_proj
    layer.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1),))
    with pytest.raises(ModelError, match=r"inputs of shape \(\d+, 32\) for 8 items; slopes need layers"):
        merge.slopes(UNIFORM, items)


def test_adapters_need_one_backward_pass_a_batch_for_all_experts_and_targets(base, adapters, items, monkeypatch):
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: passes.append(1) or grad(*args, **options))
    open_merge(base, adapters).slopes(UNIFORM, items)
    assert len(passes) == len(items.batches) == 1


# the model that comes out


def test_the_merge_is_the_base_until_weights_are_set(base, experts, items):
    assert np.array_equal(items.losses(open_merge(base, experts).vlm), items.losses(base))


def test_the_base_stays_as_it_was(base, experts, items):
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in base.model.parameters()]
    loss_V = items.losses(base)
    merge = open_merge(base, experts)
    merge.slopes(UNIFORM, items)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert [parameter.requires_grad for parameter in base.model.parameters()] == flags
    assert np.array_equal(items.losses(base), loss_V)
    assert not any(module._forward_hooks for module in base.model.modules())


def test_a_candidate_does_not_depend_on_the_candidates_before(merge, items):
    first = items.losses(merge.set(MIXED))
    merge.set(np.array([0.0, 1.0, 0.0]))
    assert np.array_equal(items.losses(merge.set(MIXED)), first)


def test_an_expert_of_weight_zero_leaves_no_trace(base, experts, merge, items):
    (name, folder), *_ = experts.items()
    alone = open_merge(base, {name: folder})
    assert np.array_equal(items.losses(alone.set([1.0])), items.losses(merge.set([1.0, 0.0, 0.0])))


def test_weights_follow_the_names_whatever_the_order_of_experts(base, experts, merge, items):
    backwards = open_merge(base, dict(reversed(experts.items())))
    assert backwards.names == tuple(experts)[::-1]
    assert_same_losses(items.losses(backwards.set(MIXED[::-1])), items.losses(merge.set(MIXED)))


def test_experts_may_adapt_different_layers(base, tmp_path, items):
    experts = {
        "attention": write_adapter(base, tmp_path / "attention", r=2, target_modules=r".*text_model.*q_proj"),
        "mlp": write_adapter(base, tmp_path / "mlp", 1, r=4, target_modules=r".*text_model.*layers\.1.*up_proj"),
    }
    merge, changes = open_merge(base, experts), read_changes(base, experts)
    for weight_K in ([1.0, 0.0], [0.3, 0.7]):
        assert_same_losses(items.losses(merge.set(weight_K)), items.losses(dense_merge(base, changes, weight_K)))


def test_bfloat16_weights_keep_what_adapters_add(base, adapters, targets):
    """Added to bfloat16 weights an update this small would be lost, so it runs beside them, as PEFT's adapters do."""
    half = VLM.load(str(base.folder), device="cpu", dtype="bfloat16")
    items = lay_out(half, targets)
    merge = open_merge(half, adapters)
    assert np.array_equal(items.losses(merge.vlm), items.losses(half))
    merged = items.losses(merge.set([0.0, 1.0, 0.0]))
    tuned = items.losses(VLM.load(str(adapters["stabilised"]), device="cpu", dtype="bfloat16"))
    assert_same_losses(merged, tuned, tolerance=2e-3)
    assert np.abs(merged - items.losses(half)).max() > 1e-2
    _, slope_GK = merge.slopes(UNIFORM, items)
    _, exact_GK = open_merge(base, adapters).slopes(UNIFORM, lay_out(base, targets))
    assert slope_GK == pytest.approx(exact_GK, rel=0.1, abs=2e-3)


# diagnostics


def test_gram_and_norm_are_those_of_the_changed_tensors(base, merge, changes):
    changed = [name for name in changes[0] if any(tau[name].any() for tau in changes)]
    assert 0 < len(changed) < len(changes[0])
    tau_KP = np.stack([torch.cat([tau[name].flatten() for name in changed]).numpy() for tau in changes])
    expected_KK = tau_KP @ tau_KP.T
    np.testing.assert_allclose(merge.gram_KK, expected_KK, rtol=1e-4, atol=1e-4 * expected_KK.max())
    originals = dict(base.model.named_parameters())
    norm = torch.cat([originals[name].detach().flatten() for name in changed]).double().norm().item()
    assert merge.base_norm == pytest.approx(norm)


def test_gram_is_summed_over_chunks(base, checkpoints, monkeypatch):
    whole = open_merge(base, checkpoints).gram_KK
    monkeypatch.setattr("datalloy.merging.CHUNK", 100)
    np.testing.assert_allclose(open_merge(base, checkpoints).gram_KK, whole, rtol=1e-12)


def test_vision_is_shared_unless_an_expert_changed_the_tower(base, merge, tmp_path):
    assert merge.vision_is_shared
    adapter = write_adapter(base, tmp_path / "adapter", r=2, target_modules=r".*vision_model.*q_proj")
    checkpoint = write_checkpoint(base, tmp_path / "checkpoint", frozen=("text_model", "lm_head"))
    assert not open_merge(base, {"a": adapter}).vision_is_shared
    assert not open_merge(base, {"a": checkpoint}).vision_is_shared


def test_tensors_that_no_expert_changed_are_shared_with_the_base(base, checkpoints):
    merge = open_merge(base, checkpoints)
    originals = dict(base.model.named_parameters())
    shared = {n for n, p in merge.vlm.model.named_parameters() if p.data_ptr() == originals[n].data_ptr()}
    assert shared == {name for name in originals if "vision_model" in name}


# families


@pytest.fixture(scope="module", params=["qwen3_vl", "idefics3", "gemma3"])
def family(request, tmp_path_factory) -> VLM:
    folder = tiny_families.build_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return VLM.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def family_items(family) -> TargetItems:
    encoded = [family.encode(sample) for sample in draw_samples(5)]
    return lay_out(family, {"first": encoded[:3], "second": encoded[3:]}, items_per_batch=4)


def test_adapters_on_every_linear_layer_merge_in_every_family(family, family_items, tmp_path):
    linear = [n for n, module in family.model.named_modules() if type(module) is torch.nn.Linear]
    assert any("vis" in name for name in linear)
    experts = {str(k): write_adapter(family, tmp_path / str(k), k, r=k + 1, target_modules=linear) for k in range(2)}
    merge = open_merge(family, experts)
    for k in range(2):
        tuned = family_items.losses(VLM.load(str(experts[str(k)]), device="cpu"))
        assert_same_losses(family_items.losses(merge.set(np.eye(2)[k])), tuned, tolerance=5e-6)
    check_slopes(merge, family_items)


def test_checkpoints_merge_in_every_family(family, family_items, tmp_path):
    experts = {str(k): write_checkpoint(family, tmp_path / str(k), k, frozen=()) for k in range(2)}
    merge = open_merge(family, experts)
    for k in range(2):
        tuned = family_items.losses(VLM.load(str(experts[str(k)]), device="cpu"))
        assert np.array_equal(family_items.losses(merge.set(np.eye(2)[k])), tuned)
    check_slopes(merge, family_items)


def check_slopes(merge: Merge, items: TargetItems) -> None:
    _, slope_GK = merge.slopes([0.5, 0.5], items)
    ahead_V, behind_V = items.losses(merge.set([0.51, 0.49])), items.losses(merge.set([0.49, 0.51]))
    for g in range(2):
        expected = (ahead_V - behind_V)[items.target_V == g].mean() / 0.02
        assert slope_GK[g] @ [1, -1] == pytest.approx(expected, rel=0.02, abs=5e-4)


def test_tied_weights_stay_tied(tmp_path):
    base = VLM.load(str(tiny_families.build_checkpoint("gemma3", tmp_path / "base")), device="cpu")
    vlm = open_merge(base, {"a": write_checkpoint(base, tmp_path / "a")}).set([1.0])
    assert vlm.output_head().weight is vlm.base_model.get_input_embeddings().weight


# refusals


def refusal(base: VLM, **experts: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_merge(base, experts)
    return str(caught.value)


@pytest.mark.parametrize(
    ("weight_K", "message"),
    [
        ([0.5, 0.5], r"has one weight for each, found shape \(2,\)"),
        ([np.nan, 0.5, 0.5], "the weight of expert .* is nan"),
        ([np.inf, 0.0, 0.0], "the weight of expert .* is inf"),
        ([-0.1, 0.6, 0.5], r"the weight of expert .* is -0\.1; weights of a mixture are 0 or more"),
        ([0.5, 0.5, 1e-5], r"the weights of a mixture sum to one, found 1\.0000"),
        ([0.0, 0.0, 0.0], "the weights of a mixture sum to one, found 0.0"),
    ],
)
def test_weights_that_are_no_mixture_are_refused(weight_K, message, merge, items):
    with pytest.raises(ModelError, match=message):
        merge.set(np.array(weight_K))
    with pytest.raises(ModelError, match=message):
        merge.slopes(np.array(weight_K), items)


def test_no_experts_are_refused(base):
    assert "no experts were given" in refusal(base)


def test_a_folder_without_checkpoint_is_refused(base, tmp_path):
    assert "expert x:" in (message := refusal(base, x=tmp_path))
    assert "it has neither config.json nor adapter_config.json" in message


def test_adapters_and_checkpoints_together_are_refused(base, adapters, checkpoints):
    message = refusal(base, a=adapters["plain"], b=checkpoints["a"])
    assert "found a (adapter), b (full checkpoint)" in message


def test_a_base_with_an_adapter_is_refused(adapters):
    tuned = VLM.load(str(adapters["plain"]), device="cpu")
    assert "carries an adapter itself" in refusal(tuned, a=adapters["plain"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "sets use_dora to True"),
        ({"lora_bias": True}, "sets lora_bias to True"),
        ({"bias": "lora_only"}, "sets bias to 'lora_only'"),
        ({"modules_to_save": ["connector"]}, r"sets modules_to_save to ['connector']"),
        ({"trainable_token_indices": [3]}, "sets trainable_token_indices to [3]"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights to 'pissa', which changes the base's own weights"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A, which is neither a low-rank factor nor"),
        ({"target_modules": ["patch_embedding"]}, "patch_embedding, which is of the kind Conv2d"),
    ],
)
def test_adapters_that_are_more_than_low_rank_updates_are_refused(settings, named, base, tmp_path):
    message = refusal(base, good=write_adapter(base, tmp_path / "bad", **({"r": 2} | settings)))
    assert named in message
    assert "bad" in message


def edit_settings(folder: Path, **changes) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.fixture
def adapter_copy(adapters, tmp_path) -> Path:
    return Path(shutil.copytree(adapters["plain"], tmp_path / "copy"))


def test_settings_of_later_releases_are_refused_unless_empty(base, adapter_copy):
    open_merge(base, {"a": edit_settings(adapter_copy, use_whatever=False, whatever_config=None)})
    assert "sets use_whatever to 7" in refusal(base, a=edit_settings(adapter_copy, use_whatever=7))


def test_other_adapters_are_refused(base, adapter_copy):
    assert "is a LOHA adapter" in refusal(base, a=edit_settings(adapter_copy, peft_type="LOHA"))


def test_an_adapter_of_another_base_is_refused(base, adapter_copy):
    message = refusal(base, a=edit_settings(adapter_copy, base_model_name_or_path="some/other"))
    assert f"is an adapter for some/other, not for {base.name}" in message


def test_the_base_may_be_named_by_another_path_to_it(base, adapter_copy, tmp_path):
    (tmp_path / "link").symlink_to(base.folder)
    open_merge(base, {"a": edit_settings(adapter_copy, base_model_name_or_path=str(tmp_path / "link"))})


def edit_tensors(folder: Path, file: str, edit) -> Path:
    tensors = safetensors.torch.load_file(folder / file)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / file, {"format": "pt"})
    return folder


def break_first(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[0] = np.nan


def test_an_adapter_with_a_tensor_missing_is_refused(base, adapter_copy):
    edit_tensors(adapter_copy, "adapter_model.safetensors", lambda tensors: tensors.pop(min(tensors)))
    assert "1 tensors of the adapter find no layer or are missing" in refusal(base, a=adapter_copy)


def test_an_adapter_with_a_tensor_too_many_is_refused(base, adapter_copy):
    extra = {"base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)}
    edit_tensors(adapter_copy, "adapter_model.safetensors", lambda tensors: tensors.update(extra))
    assert "nowhere" in refusal(base, a=adapter_copy)


def test_weights_of_the_base_that_an_adapter_brings_must_be_the_bases(base, adapter_copy, items):
    """PEFT saves an adapted head with its adapter, and loads it over the model's own."""
    head = {"base_model.model.lm_head.weight": base.output_head().weight.detach().clone()}
    edit_tensors(adapter_copy, "adapter_model.safetensors", lambda tensors: tensors.update(head))
    open_merge(base, {"a": adapter_copy})
    edit_tensors(adapter_copy, "adapter_model.safetensors", lambda tensors: tensors[next(iter(head))].add_(1))
    loss_V = items.losses(base)
    assert "brings base_model.model.lm_head.weight" in refusal(base, a=adapter_copy)
    assert np.array_equal(items.losses(base), loss_V)


def test_an_adapter_of_other_shapes_is_refused(base, adapter_copy):
    assert "tensors do not fit" in refusal(base, a=edit_settings(adapter_copy, r=3))


def test_an_adapter_in_pickle_format_is_refused(base, adapter_copy):
    (adapter_copy / "adapter_model.safetensors").rename(adapter_copy / "adapter_model.bin")
    assert "no adapter_model.safetensors" in refusal(base, a=adapter_copy)


def test_an_adapter_that_is_not_finite_is_refused(base, adapter_copy):
    message = refusal(base, a=edit_tensors(adapter_copy, "adapter_model.safetensors", break_first))
    assert "expert a: the adapter of model." in message
    assert "not finite" in message


@pytest.fixture
def checkpoint_copy(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["a"], tmp_path / "copy"))


def test_a_checkpoint_that_is_not_finite_is_refused_with_its_tensor(base, checkpoint_copy):
    message = refusal(base, a=edit_tensors(checkpoint_copy, "model.safetensors", break_first))
    assert "expert a: lm_head.weight has weights that are not finite" in message


def test_a_checkpoint_of_another_architecture_is_refused(base, tmp_path):
    processor = build_processor()
    for sizes, found in (({"width": 64, "layers": 2}, "shape"), ({"width": 32, "layers": 3}, "only the expert has")):
        other = tmp_path / found
        build_model(processor.tokenizer, vision_layers=1, **sizes).save_pretrained(other)
        processor.save_pretrained(other)
        assert found in refusal(base, a=other)


def test_checkpoints_on_a_base_of_low_precision_are_refused(base, checkpoints):
    half = VLM.load(str(base.folder), device="cpu", dtype="bfloat16")
    assert "holds torch.bfloat16; load it with dtype float32" in refusal(half, a=checkpoints["a"])


def test_statistics_that_training_changed_are_refused(base, checkpoints, monkeypatch):
    counting = base.copy()
    counting.model.register_buffer("seen", torch.zeros(1))
    expert = counting.copy()
    expert.model.seen += 1
    monkeypatch.setattr(VLM, "load", lambda *_, **__: expert)
    assert "expert a: seen differs from the base's and is no weight" in refusal(counting, a=checkpoints["a"])


def test_experts_that_are_the_base_are_refused(base):
    assert "bit for bit: a, b" in refusal(base, a=base.folder, b=base.folder)


@pytest.fixture(params=["adapter_copy", "checkpoint_copy"])
def expert_copy(request) -> Path:
    return request.getfixturevalue(request.param)


def test_another_tokenizer_is_refused(base, expert_copy):
    file = expert_copy / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["merges"].pop()
    file.write_text(json.dumps(settings))
    assert "expert a " in (message := refusal(base, a=expert_copy))
    assert "has another tokenizer than the base" in message


def test_the_same_tokenizer_in_another_format_is_accepted(base, expert_copy):
    file = expert_copy / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["merges"] = [" ".join(pair) for pair in settings["model"]["merges"]]
    settings["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(settings, indent=7))
    open_merge(base, {"a": expert_copy})


def test_another_chat_template_is_refused(base, expert_copy):
    template = (expert_copy / "chat_template.jinja").read_text()
    (expert_copy / "chat_template.jinja").write_text(template + "\n")
    open_merge(base, {"a": expert_copy})
    (expert_copy / "chat_template.jinja").write_text(template + "!")
    assert "has another chat template than the base" in refusal(base, a=expert_copy)


def test_an_adapter_without_processor_files_is_accepted(base, adapter_copy):
    for file in adapter_copy.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    open_merge(base, {"a": adapter_copy})

"""A base and its experts in, one model that becomes any mixture of them out: linear merging without a file written.

The merged model `theta_w = theta_0 + sum_k w_k tau_k` with `tau_k = theta_k - theta_0` stands in for the model that
would be trained on the mixture `w` (arXiv 2602.04937). A candidate is a weight vector applied in place; always from the
experts, never from the candidate before, so that the order of candidates changes nothing.

Slopes come with it: `dL/dw_k = <grad L(theta_w), tau_k>`, for all experts from one backward pass a target (full
checkpoints) or one for all items (adapters), so twenty domains cost no more than three.

- Adapters are merged on the products `B_k A_k`, which is exact where averaging the factors is not. In float32 the sum
  is added to the weights: a candidate costs one matrix product a layer, as much as reading some dozens of tokens, and
  measuring it costs what measuring any model costs. Weights of lower precision would swallow the update (bfloat16 keeps
  it to 10 to 40 %), so there the adapters run beside them, in float32.
- Full checkpoints are summed in float32. At a vertex the model holds its expert bit for bit. Slopes are cheapest on
  items laid out with `targets_apart`.

Price: adapters one more copy of the layers they adapt, full checkpoints one copy of every changed tensor an expert and
one for the sum; tensors that no expert changed are shared with the base. Traps: the base's weights are read as long as
the merge lives, so the base must not be trained meanwhile. `Merge.vlm` is to be measured: saving an adapter merge in
low precision would save the base.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datalloy.errors import ModelError
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, LowRank

SUM_TOLERANCE = 1e-6  # of the weights; what is further from one is refused, never rescaled
CHUNK = 1 << 20  # numbers of each expert that inner products hold in float64 at a time


class Merge(Protocol):
    """Experts merged by weights; `vlm` is owned by the merge and re-weighted in place.

    The relative update of expert k is `sqrt(gram_KK[k, k]) / base_norm`; above 5 % merging is a doubtful stand-in.
    """

    names: tuple[str, ...]  # of the experts, in the order of K
    vlm: VLM  # the base until weights are set
    vision_is_shared: bool  # no expert changed anything in the vision tower
    base_norm: float  # of theta_0 over the tensors that experts changed
    gram_KK: np.ndarray  # inner products <tau_i, tau_j>, float64

    def set(self, weight_K: np.ndarray) -> VLM:
        """`vlm` as theta_w. Raises ModelError unless the weights are finite, not negative and sum to one."""
        ...

    def slopes(self, weight_K: np.ndarray, items: TargetItems) -> tuple[np.ndarray, np.ndarray]:
        """Mean risk of each target at theta_w, [G], and its slope along every tau_k, [G, K].

        The risk is the loss, in nats per token, or what `items` says. `vlm` is theta_w afterwards. On the simplex only
        differences of slopes count.
        """
        ...


def open_merge(base: VLM, experts: Mapping[str, Path]) -> Merge:
    """The merge of experts that were all tuned from `base`: all LoRA adapters of PEFT, or all full checkpoints.

    Raises ModelError, by name, for what could not be merged exactly: both kinds together, another base, tokenizer or
    chat template, tensors of other names or shapes, trained parts that are no low-rank update of a linear layer (DoRA,
    biases, embeddings, saved modules), weights that are not finite, full checkpoints on a base not in float32.
    """
    if not experts:
        raise ModelError(f"nothing to merge on {base.name}: no experts were given")
    if base.model is not base.base_model:
        raise ModelError(
            f"{base.name} carries an adapter itself; merge on the plain base that the experts were tuned from"
        )
    kinds = {name: _kind(name, folder) for name, folder in experts.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ModelError(f"experts are all adapters or all full checkpoints, found {listed}")
    for name, folder in experts.items():
        if difference := base.processor_difference(folder):
            raise ModelError(
                f"expert {name} ({folder}) has another {difference} than the base {base.name}; merged weights would "
                "read other inputs than the expert was trained on. Tune all experts from one base"
            )
    if set(kinds.values()) == {"adapter"}:
        return _AdapterMerge(base, {name: _read_adapter(base, name, folder) for name, folder in experts.items()})
    changes = {name: _read_changes(base, name, folder) for name, folder in experts.items()}
    if not any(changes.values()):
        raise ModelError(f"all experts are the base {base.name} itself, bit for bit: {', '.join(experts)}")
    return _CheckpointMerge(base, changes)


def _kind(name: str, folder: Path) -> str:
    for file, kind in (("adapter_config.json", "adapter"), ("config.json", "full checkpoint")):
        if (folder / file).exists():
            return kind
    raise ModelError(f"expert {name}: {folder} is no checkpoint, it has neither config.json nor adapter_config.json")


def _check_weights(weight_K: np.ndarray, names: Sequence[str]) -> np.ndarray:
    weight_K = np.asarray(weight_K, dtype=np.float64)
    if weight_K.shape != (len(names),):
        raise ModelError(f"a mixture of {len(names)} experts has one weight for each, found shape {weight_K.shape}")
    for name, weight in zip(names, weight_K, strict=True):
        if not weight >= 0 or not np.isfinite(weight):
            raise ModelError(f"the weight of expert {name} is {weight}; weights of a mixture are 0 or more")
    if abs(weight_K.sum() - 1) > SUM_TOLERANCE:
        raise ModelError(
            f"the weights of a mixture sum to one, found {float(weight_K.sum())!r} over {', '.join(names)}"
        )
    return weight_K


def _check_finite(name: str, tensor_name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"expert {name}: {tensor_name} has weights that are not finite; its training diverged")


# adapters


def _read_adapter(base: VLM, name: str, folder: Path) -> dict[str, LowRank]:
    updates = base.low_rank_updates(folder)
    for layer, update in updates.items():
        _check_finite(name, f"the adapter of {layer}", update.a_RI)
        _check_finite(name, f"the adapter of {layer}", update.b_OR)
    return updates


class _AdaptedLayer:
    """A linear layer with the updates of all experts, rank beside rank: `sum_k w_k B_k A_k` is one product of two."""

    def __init__(self, linear: nn.Linear, updates: Sequence[LowRank | None]) -> None:
        self.linear = linear
        self.original = linear.weight.detach()
        present = [(k, update) for k, update in enumerate(updates) if update]
        self.a_RI = torch.cat([update.a_RI for _, update in present])
        self.b_OR = torch.cat([update.b_OR for _, update in present], dim=1)
        ranks = [len(update.a_RI) for _, update in present]
        self.expert_R = torch.tensor([k for k, _ in present]).repeat_interleave(torch.tensor(ranks))
        self.is_expert_RK = F.one_hot(self.expert_R, len(updates)).to(self.a_RI)
        self.folds = linear.weight.dtype == torch.float32
        if self.folds:
            linear.weight = nn.Parameter(self.original.clone(), requires_grad=False)
        else:
            self._beside: LowRank | None = None
            linear.register_forward_hook(self._add_beside)

    def set(self, weight_K: np.ndarray) -> None:
        """Experts of weight zero cost nothing."""
        weight_R = torch.as_tensor(weight_K[self.expert_R.numpy()], dtype=torch.float32, device=self.a_RI.device)
        active_R = weight_R != 0
        a_RI, b_OR = self.a_RI[active_R], self.b_OR[:, active_R] * weight_R[active_R]
        if self.folds:
            torch.addmm(self.original, b_OR, a_RI, out=self.linear.weight)
        else:
            self._beside = LowRank(a_RI, b_OR)

    def _add_beside(self, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if self._beside is None:
            return output
        a_RI, b_OR = self._beside
        return (output + F.linear(F.linear(args[0].float(), a_RI), b_OR)).to(output.dtype)

    def gram(self) -> np.ndarray:
        """`<B_i A_i, B_j A_j> = tr((B_i' B_j)(A_j A_i'))`, [K, K], from products no larger than the ranks."""
        a_RI, b_OR, is_expert_RK = (t.double().cpu() for t in (self.a_RI, self.b_OR, self.is_expert_RK))
        return (is_expert_RK.T @ ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)) @ is_expert_RK).numpy()


class _Slope(torch.autograd.Function):
    """A layer's output unchanged, with a gradient for weights `w_NK` that would add `w_nk B_k A_k x` to its N rows.

    The update itself is not computed: the slope of `g' B_k A_k x` in the weight is `(B_k' g)' (A_k x)`.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, weight_NK: Tensor, layer: _AdaptedLayer) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer, ctx.rows = layer, len(weight_NK)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (gradient,), (inputs,), layer = gradients, ctx.saved_tensors, ctx.layer
        read = F.linear(inputs.float(), layer.a_RI)
        written = F.linear(gradient.float(), layer.b_OR.T)
        slope_NR = (read * written).reshape(ctx.rows, -1, read.shape[-1]).sum(dim=1)
        return gradient, None, slope_NR @ layer.is_expert_RK, None


class _AdapterMerge:
    def __init__(self, base: VLM, updates: Mapping[str, Mapping[str, LowRank]]) -> None:
        self.names = tuple(updates)
        self.vlm = base.view()
        modules = dict(self.vlm.model.named_modules())
        adapted = [name for name in modules if any(name in update for update in updates.values())]
        self._layers = [_AdaptedLayer(modules[name], [u.get(name) for u in updates.values()]) for name in adapted]
        inside = {id(module) for module in self.vlm.vision_tower().modules()}
        self.vision_is_shared = not any(id(layer.linear) in inside for layer in self._layers)
        decoder = {id(module) for module in self.vlm.decoder_layers().modules()}
        # only there does a row of the input belong to one item; a picture has rows of its own
        self._has_slopes_of_items = all(id(layer.linear) in decoder for layer in self._layers)
        self.base_norm = _norm(layer.original for layer in self._layers)
        self.gram_KK = sum((layer.gram() for layer in self._layers), np.zeros((len(updates), len(updates))))

    @torch.no_grad()
    def set(self, weight_K: np.ndarray) -> VLM:
        weight_K = _check_weights(weight_K, self.names)
        for layer in self._layers:
            layer.set(weight_K)
        return self.vlm

    def slopes(self, weight_K: np.ndarray, items: TargetItems) -> tuple[np.ndarray, np.ndarray]:
        self.set(weight_K)
        sums = _TargetSums(items, len(self.names))
        for index, (positions, _) in enumerate(items.batches):
            rows = len(positions) if self._has_slopes_of_items else 1
            weight_NK = torch.zeros(rows, len(self.names), device=self.vlm.device, requires_grad=True)
            with self._watching(weight_NK):
                loss_B = items.batch_risks(self.vlm, index)
            sums.add_losses(positions, loss_B)
            if not loss_B.requires_grad:
                continue  # adapters of the vision tower and a batch without pictures
            if self._has_slopes_of_items:
                (slope_BK,) = torch.autograd.grad(loss_B.sum(), weight_NK)
                sums.add_slopes(items.target_V[positions], slope_BK.cpu().double().numpy())
            else:
                for target, loss in sums.by_target(positions, loss_B):
                    (slope_1K,) = torch.autograd.grad(loss, weight_NK, retain_graph=True)
                    sums.add_slopes(np.array([target]), slope_1K.cpu().double().numpy())
        return sums.means()

    @contextmanager
    def _watching(self, weight_NK: Tensor) -> Iterator[None]:
        """Outputs of adapted layers inside have a gradient in `weight_NK`, one row an item or one for all."""
        handles = [layer.linear.register_forward_hook(_make_watch(layer, weight_NK)) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _make_watch(layer: _AdaptedLayer, weight_NK: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def watch(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if len(weight_NK) not in (1, len(args[0])):
            raise ModelError(
                f"an adapted layer of the decoder has inputs of shape {tuple(args[0].shape)} for {len(weight_NK)} "
                "items; slopes need layers that keep items apart"
            )
        return _Slope.apply(output, args[0], weight_NK, layer)

    return watch


# full checkpoints


def _read_changes(base: VLM, name: str, folder: Path) -> dict[str, Tensor]:
    """The expert's tensors that differ from the base's, by name, in memory of their own."""
    originals = dict(base.model.named_parameters())
    low = {str(parameter.dtype) for parameter in originals.values()} - {"torch.float32"}
    if low:
        raise ModelError(
            f"full checkpoints are merged in float32, the base {base.name} holds {', '.join(sorted(low))}; load it "
            "with dtype float32"
        )
    expert = VLM.load(str(folder), device=str(base.device), dtype="float32")
    parameters = dict(expert.model.named_parameters())
    if odd := sorted(set(originals) ^ set(parameters)):
        where = "the base" if odd[0] in originals else "the expert"
        raise ModelError(f"expert {name} ({folder}) and base differ in {len(odd)} tensors: only {where} has {odd[0]}")
    changes = {}
    for tensor_name, original in originals.items():
        tensor = parameters[tensor_name].detach()
        if tensor.shape != original.shape:
            shapes = f"{tuple(tensor.shape)}, the base {tuple(original.shape)}"
            raise ModelError(f"expert {name} ({folder}): {tensor_name} has shape {shapes}; tune all from one base")
        _check_finite(name, tensor_name, tensor)
        if not torch.equal(tensor, original):
            changes[tensor_name] = tensor.clone()  # the file behind a loaded tensor may be written over
    _check_buffers(base, expert, name)
    return changes


def _check_buffers(base: VLM, expert: VLM, name: str) -> None:
    saved = expert.model.state_dict()
    for buffer_name, buffer in base.model.named_buffers():
        if buffer_name in saved and not torch.equal(saved[buffer_name], buffer):
            raise ModelError(
                f"expert {name}: {buffer_name} differs from the base's and is no weight but a statistic, which no "
                "mixture of weights gives; keep it fixed in training"
            )


class _CheckpointMerge:
    def __init__(self, base: VLM, changes: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.names = tuple(changes)
        self.vlm = base.view()
        # tied weights are one parameter, with one name
        parameters = dict(self.vlm.model.named_parameters())
        changed = [name for name in parameters if any(name in change for change in changes.values())]
        self._parameters = [parameters[name] for name in changed]
        self._originals = [parameter.data for parameter in self._parameters]
        self._experts = [
            [change.get(name, original) for change in changes.values()]
            for name, original in zip(changed, self._originals, strict=True)
        ]
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        inside = {id(parameter) for parameter in self.vlm.vision_tower().parameters()}
        self.vision_is_shared = not any(id(parameter) in inside for parameter in self._parameters)
        self.base_norm = _norm(self._originals)
        self.gram_KK = np.zeros((len(self.names), len(self.names)))
        for original, tensors in zip(self._originals, self._experts, strict=True):
            self.gram_KK += _gram(original, tensors)

    @torch.no_grad()
    def set(self, weight_K: np.ndarray) -> VLM:
        weight_K = _check_weights(weight_K, self.names)
        first, *others = np.flatnonzero(weight_K).tolist()
        for parameter, tensors in zip(self._parameters, self._experts, strict=True):
            torch.mul(tensors[first], weight_K[first], out=parameter)
            for k in others:
                parameter.add_(tensors[k], alpha=weight_K[k])
        return self.vlm

    def slopes(self, weight_K: np.ndarray, items: TargetItems) -> tuple[np.ndarray, np.ndarray]:
        self.set(weight_K)
        sums = _TargetSums(items, len(self.names))
        for index, (positions, _) in enumerate(items.batches):
            loss_B = items.batch_risks(self.vlm, index)
            sums.add_losses(positions, loss_B)
            if not loss_B.requires_grad:
                continue
            for target, loss in sums.by_target(positions, loss_B):
                gradient = torch.autograd.grad(loss, self._parameters, retain_graph=True, allow_unused=True)
                sums.add_slopes(np.array([target]), self._along_experts(gradient)[None])
        return sums.means()

    def _along_experts(self, gradient: Sequence[Tensor | None]) -> np.ndarray:
        """`<gradient, tau_k>` for every expert, [K]."""
        slope_K = np.zeros(len(self.names))
        for part, original, tensors in zip(gradient, self._originals, self._experts, strict=True):
            if part is not None:
                slope_K += [_inner(part, tensor - original) for tensor in tensors]
        return slope_K


class _TargetSums:
    """Losses and slopes of items, batch by batch, to means over each target's items."""

    def __init__(self, items: TargetItems, experts: int) -> None:
        self._items = items
        self._loss_G = np.zeros(len(items.names))
        self._slope_GK = np.zeros((len(items.names), experts))

    def add_losses(self, positions: np.ndarray, loss_B: Tensor) -> None:
        np.add.at(self._loss_G, self._items.target_V[positions], loss_B.detach().cpu().double().numpy())

    def add_slopes(self, target_N: np.ndarray, slope_NK: np.ndarray) -> None:
        np.add.at(self._slope_GK, target_N, slope_NK)

    def by_target(self, positions: np.ndarray, loss_B: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each target that has items in the batch, with the sum of their losses."""
        target_B = self._items.target_V[positions]
        for target in np.unique(target_B).tolist():
            yield target, loss_B[torch.as_tensor(target_B == target, device=loss_B.device)].sum()

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        count_G = self._items.count_G
        return self._loss_G / count_G, self._slope_GK / count_G[:, None]


# inner products


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64


def _inner(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dtype=_accumulator(a)).item()


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(np.sqrt(sum(_inner(tensor.float(), tensor.float()) for tensor in tensors)))


def _gram(original: Tensor, tensors: Sequence[Tensor]) -> np.ndarray:
    """Inner products of the tensors' differences from `original`, [K, K], in chunks of bounded size."""
    gram_KK = np.zeros((len(tensors), len(tensors)))
    flat = [tensor.flatten() for tensor in tensors]
    for start in range(0, original.numel(), CHUNK):
        here = slice(start, start + CHUNK)
        tau_KC = torch.stack([tensor[here] for tensor in flat]) - original.flatten()[here]
        tau_KC = tau_KC.to(_accumulator(tau_KC))
        gram_KK += (tau_KC @ tau_KC.T).cpu().double().numpy()
    return gram_KK

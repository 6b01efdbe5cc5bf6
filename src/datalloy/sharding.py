"""A model in, its parameters cut over all processes out, for as long as it trains; then whole again (FSDP2).

Each process keeps its part of every weight, of its gradient and of the optimiser's state. The decoder's layers are put
together one at a time, for their forward and their backward pass; all else (embeddings, output head, vision tower,
connector) is one more unit, whole from the beginning of a step's forward pass to the end of its backward pass.

Why so: a unit is put together by all processes at once, so all have to come past it. Every sample comes past every
layer of the decoder; past the vision tower only those with a picture do. That also leaves a process without gradients
for what its samples did not use, while others have them and wait: `zero_for_all` gives them.

Why not accelerate's own wrapping, which Trainer would call: on CPUs it silently does not shard, so no test without GPUs
could see it; it finds the optimiser's parameters again by their address, and empty parts all have the same one.

Source: torch.distributed.fsdp.fully_shard, which this hands the work to. Price: the model is whole in every process
before and after, and on the first one in main memory whenever it is saved in between.
"""

import copy
import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from datalloy.errors import EnvironmentFault, ModelError
from datalloy.vlm import VLM

USE_FSDP = "ACCELERATE_USE_FSDP"  # as `accelerate launch --use_fsdp` sets it; so are the others
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed brings an optimiser and checkpoints of its own, and neither is used here; "
    "shard with `accelerate launch --use_fsdp --fsdp_version 2` instead, or start with torchrun",
    "FSDP_OFFLOAD_PARAMS": "parameters stay on the device that computes with them; leave --fsdp_offload_params false",
    "FSDP_ACTIVATION_CHECKPOINTING": "it is the recipe that says so: set train.gradient_checkpointing to true and "
    "leave --fsdp_activation_checkpointing false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parameters are cut over all processes, in one dimension; leave the "
    "parallelism settings of accelerate out",
}


def check_launcher() -> None:
    """Raises EnvironmentFault where the launcher asks for what training here would do some other way."""
    for name, reason in REFUSED.items():
        if _is_true(name):
            raise EnvironmentFault(f"{name} is set: {reason}")
    if not is_asked_for():
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise EnvironmentFault(
            f"FSDP of version {version} is asked for, parameters are sharded by version 2 here; add "
            "`--fsdp_version 2` to accelerate launch, or fsdp_version: 2 to fsdp_config in its file"
        )
    if (found := os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()) not in ("true", "false"):
        raise EnvironmentFault(f"fsdp_reshard_after_forward is {found}; with FSDP version 2 it is true or false")


def is_asked_for() -> bool:
    """Whether the launcher's environment variables ask for FSDP."""
    return _is_true(USE_FSDP)


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


class Shards:
    """The parameters of a model, cut over all processes. All processes have to call every method.

    `part` is what trains: the same model in modules of its own, with this process's part of each parameter. The model
    that it was made from has no weights until `restore`: each parameter is one number, in its shape and on its device.
    """

    def __init__(self, whole: VLM) -> None:
        """Raises ModelError for a model with parameters that cannot be cut."""
        _check_cuttable(whole)
        states = [*whole.model.parameters(), *whole.model.buffers()]
        self.part = dataclasses.replace(whole, model=copy.deepcopy(whole.model, {id(state): state for state in states}))
        self._whole = whole
        self._device = whole.device
        mesh = init_device_mesh(self._device.type, (torch.distributed.get_world_size(),))
        reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        for layer in self.part.decoder_layers():
            uncut = _plain_parameters(layer)
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshards)
            self._empty(uncut)
        uncut = _plain_parameters(self.part.model)
        fully_shard(self.part.model, mesh=mesh)  # stays whole after the forward pass, the backward pass begins with it
        self._empty(uncut)

    @property
    def trained(self) -> list[Parameter]:
        return [parameter for parameter in self.part.model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Write the whole model as it is now. The first process needs its size in main memory."""
        is_first = torch.distributed.get_rank() == 0
        parameters = list(self._whole.model.parameters())
        for parameter, cut in zip(parameters, self.part.model.parameters(), strict=True):
            gathered = whole_tensor(cut)
            if is_first:
                parameter.data = gathered.cpu()
        if is_first:
            self._whole.save(folder)
        self._empty(parameters)

    def restore(self) -> None:
        """Whole weights back into the model, in every process. What trains is of no use afterwards."""
        for parameter, cut in zip(self._whole.model.parameters(), self.part.model.parameters(), strict=True):
            parameter.data = whole_tensor(cut)

    def _empty(self, parameters: list[Parameter]) -> None:
        for parameter in parameters:
            one = torch.zeros(1, dtype=parameter.dtype, device=self._device)
            parameter.data = one.expand(parameter.shape)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor without its graph, put together from all processes where it is cut over them: then all have to ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor that all have, in memory of its own; the tensor where `parameter` is not cut."""
    if not isinstance(parameter, DTensor):
        return whole
    own = distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return torch.empty_like(parameter, requires_grad=False).copy_(own)


def zero_for_all(model: torch.nn.Module) -> Tensor | float:
    """Zero, with a gradient of zero for all that is whole when a forward pass has ended: to be added to the loss.

    For all processes, where some have samples with pictures and others have none: each then has the same gradients to
    sum, also for weights that no process used.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    return sum(parameter.reshape(-1)[:0].sum() for parameter in parameters)


def _check_cuttable(vlm: VLM) -> None:
    for name, parameter in vlm.model.named_parameters():
        if parameter.ndim == 0 or not parameter.is_contiguous():
            raise ModelError(
                f"{vlm.name} cannot be sharded: its parameter {name}, of shape {list(parameter.shape)}, has nothing to "
                "be cut along, or does not lie in memory in one piece; train it without FSDP (torchrun, or `accelerate "
                "launch --multi_gpu`)"
            )


def _plain_parameters(module: torch.nn.Module) -> list[Parameter]:
    return [parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)]

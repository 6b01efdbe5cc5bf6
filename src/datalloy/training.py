"""Encoded samples in, a trained model out: supervised fine-tuning through transformers' Trainer.

The loss of a step is the mean over its samples of each sample's mean loss over its supervised tokens. So every sample
counts once, however long its answer, and training descends exactly the loss that utilities are measured in. (The
Trainer's own loss counts every token once, which hands the step to the longest answers.)

What depends on chance is a function of the seed alone: the order of samples, the adapter's first weights, dropout at
each step. On one machine the same call gives the same bits on the CPU, also when it was killed and started again:
long runs keep a checkpoint of weights, optimiser and step, in safetensors, written atomically. The Trainer's own
checkpoints are not used: they hold pickles, can be read half-written, and restore by key names that some model
families change between memory and disk.

Several processes may train together: started by torchrun or `accelerate launch`, all call `train` alike, each takes its
part of every batch, gradients are averaged, the first writes. Each holds the whole model (DDP), or, where the launcher
asks for FSDP, its part of it (`sharding.py`). The same steps are taken as by one process, to rounding: sums are taken
in another order.

Price: one call costs a forward and a backward pass of every sample seen, and about a tenth of a second besides.
"""

import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from torch import Tensor
from torch.nn import Parameter
from transformers.integrations import get_available_reporting_integrations

from datalloy.config import Train
from datalloy.durable import complete_path, require_space
from datalloy.errors import DataError, EnvironmentFault, ModelError, RecipeError, RunError
from datalloy.progress import track
from datalloy.sharding import USE_FSDP, Shards, check_launcher, cut_like, is_asked_for, whole_tensor, zero_for_all
from datalloy.vlm import VLM, Encoded, hidden_variable

log = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 1.0  # of the Trainer and of every trainer that recipes are exported to
IDENTITY_SAMPLES = 64  # whose tokens a checkpoint is recognised by; all would have to be encoded for that alone
MICRO_BATCH = 16  # where the recipe names none: below a tenth is padding, and most machines have the memory
CHECKPOINT_SECONDS = 300.0  # the most work that a kill can cost; shorter runs keep no checkpoint
NOT_IN_IDENTITY = {"micro_batch_size", "gradient_checkpointing", "report_to"}  # change no result beyond rounding


@dataclass(frozen=True)
class Trained:
    """What a training run did. `losses` has one value a step, nats per token, before the step was taken."""

    steps: int
    samples_seen: int
    tokens_seen: int
    seconds: float
    flops: float
    losses: tuple[float, ...]


@dataclass
class Attempt:
    """How far training has come, over all attempts at it: what a checkpoint holds besides tensors."""

    losses: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Crew:
    """The processes that train together, as the launcher's environment variables say: which this is, and how many.

    `shards`: each holds a part of the weights only.
    """

    number: int
    count: int
    shards: bool

    @classmethod
    def launched(cls) -> "Crew":
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), count, count > 1 and is_asked_for())

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def sum(self, value: Tensor) -> int:
        """Over all processes, which all have to ask. `value` is lost."""
        if self.count > 1:
            torch.distributed.all_reduce(value)
        return int(value)

    def differ(self, value: int, device: torch.device) -> bool:
        """Whether some processes, which all have to ask, have another value than others."""
        extremes = torch.tensor([value, -value], device=device)  # the highest, and the lowest with its sign turned
        if self.count > 1:
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        return bool(extremes.sum())

    def agree(self, verdict: bool) -> bool:
        """What the first says, whatever the others do."""
        said = [verdict]
        if self.count > 1:
            torch.distributed.broadcast_object_list(said)
        return said[0]

    def wait(self) -> None:
        """Until all processes have come as far."""
        if self.count > 1:
            torch.distributed.barrier()


def train(
    vlm: VLM,
    encoded: Sequence[Encoded],
    settings: Train,
    out: Path | None,
    *,
    steps: int | None = None,
    in_order: bool = False,
    milestones: Mapping[int, Path] | None = None,
) -> Trained:
    """Train `vlm` in place for `steps` steps, or as many as the protocol of `settings` says, and save it to `out`.

    With `adapter: lora` a LoRA adapter is put on the linear layers of the decoder and alone is trained (a model that
    has one already goes on with it); `vlm.model` is the PEFT model afterwards. With `adapter: none` all weights are
    trained, except the vision tower's under `freeze_vision`. With `out` None nothing is written: for measuring runs.

    Samples are shuffled, epoch after epoch. With `in_order` they are taken as they lie, which is for a list that is a
    schedule already (`mixture.materialise`): as many as the steps see, or DataError. `encoded` may encode lazily: a
    sample is asked for when its step comes, and not held on to. `milestones` names folders in which the model is also
    saved as it is after so many steps, in the middle of its schedule.

    A run that was killed goes on from its checkpoint in `out` and ends in the same bits. Give it the model as it was
    before the first attempt. Trackers then see the steps of the last attempt only. The global random generators are
    seeded along the way.

    Raises DataError without samples, ModelError for weights that cannot be trained or a loss that is not finite (the
    weights are of no use then), RunError where the checkpoint belongs to another training, EnvironmentFault where the
    launcher asks for what is not done here. After any error of a sharded training the model has no weights.
    """
    if not encoded:
        raise DataError(f"nothing to train {vlm.name} on: no samples were given")
    check_launcher()
    crew = Crew.launched()
    steps = step_count(len(encoded), settings) if steps is None else steps
    total = steps * settings.batch_size
    if in_order and len(encoded) != total:
        raise DataError(
            f"{steps} steps of {settings.batch_size} see {total} samples, and {len(encoded)} were laid out in order; "
            "lay out as many as are seen"
        )
    order = np.arange(total) if in_order else sample_order(len(encoded), total, settings.seed)
    parameters = prepare_parameters(vlm, settings)
    flops_per_token = training_flops(vlm, 1)
    if out:
        require_space(out, _bytes_on_disk(vlm, parameters), f"training {vlm.name}")
    learner, save, shards = vlm, vlm.save, None
    if crew.shards:
        shards = Shards(vlm)
        learner, save, parameters = shards.part, shards.save, shards.trained
        if crew.is_first:
            log.info("the weights of %s are sharded over %d processes (FSDP)", vlm.name, crew.count)
    optimizer = _make_optimizer(parameters, settings)
    attempt, checkpoint = Attempt(), None
    if out:
        identity = _identity(vlm, [encoded[i] for i in order[:IDENTITY_SAMPLES]], len(encoded), settings, steps)
        checkpoint = _Checkpoint(out / "checkpoints" / "state.safetensors", identity, parameters, optimizer, crew)
        if crew.agree(checkpoint.path.exists()):
            attempt = checkpoint.restore() or attempt
            log.info("training goes on from step %d of %d: %s", attempt.steps, steps, checkpoint.path)
    try:
        if attempt.steps < steps:
            batches_left = order.reshape(steps, settings.batch_size)[attempt.steps :]
            takes_part = crew.is_first or crew.shards
            savers = {step: functools.partial(save, folder) for step, folder in (milestones or {}).items()}
            keeps = (checkpoint, savers if takes_part else {})
            _run_trainer(learner, encoded, batches_left, optimizer, settings, crew, attempt, *keeps, out)
        if shards:
            optimizer.state.clear()  # room for the whole weights
            shards.restore()
    finally:
        _leave_training(vlm, settings)
    if out and crew.is_first:
        vlm.save(out)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    crew.wait()
    return Trained(
        steps=steps,
        samples_seen=len(order),
        tokens_seen=attempt.tokens,
        seconds=attempt.seconds,
        flops=flops_per_token * attempt.tokens,
        losses=tuple(attempt.losses),
    )


def step_count(samples: int, settings: Train) -> int:
    """Optimiser steps that the protocol asks for: the same for every selection, or so many passes over this one."""
    if settings.protocol == "fixed_compute":
        return max(1, round(settings.samples / settings.batch_size))
    return max(1, round(settings.epochs * samples / settings.batch_size))


def sample_order(samples: int, total: int, seed: int) -> np.ndarray:
    """Indices of the samples to be seen, [total] int64: one shuffled epoch after another, the last one cut.

    Each index comes floor or ceil(total / samples) times. Cut into batches, an epoch's remainder opens the batch that
    the next epoch fills, so that every step has its full size. Epoch e depends on (seed, e) alone.
    """
    epochs = math.ceil(total / samples)
    shuffled = [np.random.default_rng((seed, epoch)).permutation(samples) for epoch in range(epochs)]
    return np.concatenate(shuffled)[:total]


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the learning rate at a step counted from 0: a linear rise, then half a cosine down to zero.

    Departs from transformers' schedule, which takes its first step at rate zero: of ten steps that would be a tenth.
    """
    warmup = round(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def training_flops(vlm: VLM, tokens: int) -> float:
    """Floating-point operations of training on `tokens` tokens, images' tokens and padding-free: an estimate.

    Two a parameter and token forward, two for the gradients of activations, two for the gradients of those weights
    that are trained: 6 P for full training, about 4 P under LoRA. Attention over positions is left out, which is right
    to some per cent while sequences are shorter than about six times the model's width.
    """
    parameters = list(vlm.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return float((4 * sum(p.numel() for p in parameters) + 2 * trained) * tokens)


def prepare_parameters(vlm: VLM, settings: Train) -> list[Parameter]:
    """Mark what is trained, adding the adapter where one is asked for, and return it. Raises ModelError."""
    if settings.adapter == "lora":
        _add_adapter(vlm, settings)
    elif isinstance(vlm.model, peft.PeftModel):
        raise ModelError(
            f"{vlm.name} carries an adapter and train.adapter is none, which trains plain weights; "
            "merge the adapter into a checkpoint first, or set train.adapter to lora"
        )
    else:
        vlm.model.requires_grad_(True)
        if settings.freeze_vision:
            for parameter in vlm.vision_parameters():
                parameter.requires_grad_(False)
    parameters = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
    low = {str(parameter.dtype) for parameter in parameters} - {"torch.float32"}
    if low:
        raise ModelError(
            f"weights are trained in float32, those of {vlm.name} are {', '.join(sorted(low))}; load it with "
            "dtype float32 (train.precision bfloat16 still computes in bfloat16)"
        )
    return parameters


def _add_adapter(vlm: VLM, settings: Train) -> None:
    if isinstance(vlm.model, peft.PeftModel):
        present = vlm.model.active_peft_config
        if not isinstance(present, peft.LoraConfig) or present.r != settings.rank:
            raise ModelError(
                f"{vlm.name} carries a {present.peft_type} adapter of rank {present.to_dict().get('r')} and train.rank "
                f"is {settings.rank}; training goes on with an adapter only at its own rank. Set train.rank to it, or "
                "merge the adapter into a checkpoint first"
            )
        return
    linear = {module for module in vlm.decoder_layers().modules() if isinstance(module, torch.nn.Linear)}
    names = [name for name, module in vlm.model.named_modules() if module in linear]
    config = peft.LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=0.0, target_modules=names)
    torch.manual_seed(settings.seed)  # of A; B starts at zero
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by its old name
        vlm.model = peft.get_peft_model(vlm.model, config)


def _leave_training(vlm: VLM, settings: Train) -> None:
    """Put the model back into the state in which every other stage expects it."""
    vlm.model.eval()
    if settings.gradient_checkpointing:
        vlm.base_model.activation_checkpointing_disable()
    if settings.adapter == "none":
        vlm.model.requires_grad_(True)


def _make_optimizer(parameters: Sequence[Parameter], settings: Train) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


class _StepLoss(torch.nn.Module):
    """What the Trainer is given to train: one micro-batch in, its share of the step's mean loss out.

    The Trainer would write into the configuration of a transformers model, and would not be told the micro-batch's
    share. Behind this module it sees neither family nor adapter, and nothing of it stays in the model.
    """

    accepts_loss_kwargs = True  # tells the Trainer that the loss is scaled for gradient accumulation already

    def __init__(self, vlm: VLM, settings: Train, crew: Crew) -> None:
        super().__init__()
        # of the Trainer, for models whose parameters are cut before it sees them: it leaves them as they are
        self.is_distributed_loading_by_transformers = crew.shards
        self.crew = crew
        # since last asked; left on the device, where reading it would hold up the next step
        self.tokens = torch.zeros((), dtype=torch.int64, device=vlm.device)
        self.model = vlm.model
        self.losses = vlm.losses
        self.batch_size = settings.batch_size / crew.count  # of each, for gradients are averaged over processes
        self.autocast = functools.partial(vlm.autocast, settings.precision)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        batch.pop("num_items_in_batch", None)  # the Trainer counts tokens; here every sample counts once
        self.tokens = self.tokens + batch["attention_mask"].sum()
        with self.autocast():
            loss = self.losses(batch).sum() / self.batch_size
        if self.crew.shards and self.crew.differ(len(batch), loss.device):  # some have pictures, others none
            loss = loss + zero_for_all(self.model)
        return {"loss": loss}


class _Follower(transformers.TrainerCallback):
    """Follows the Trainer step by step: seeds the step, notes and checks its loss, shows progress, saves in time."""

    def __init__(
        self,
        attempt: Attempt,
        steps_left: int,
        seed: int,
        crew: Crew,
        module: _StepLoss,
        checkpoint: "_Checkpoint | None",
        milestones: Mapping[int, Callable[[], None]],
    ) -> None:
        self.attempt = attempt
        self.seed = seed
        self.crew = crew
        self.module = module
        self.checkpoint = checkpoint
        self.milestones = milestones
        self.ticks = track(range(steps_left), "training", steps_left)
        self.noted = self.saved = time.monotonic()
        next(self.ticks)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - their signature
        # dropout of a step does not depend on the steps before it, so a checkpoint needs no generator's state
        drawn_from = (self.seed, self.attempt.steps, *[self.crew.number] * (not self.crew.is_first))
        torch.manual_seed(int(np.random.SeedSequence(drawn_from).generate_state(1)[0]))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        loss = kwargs["logs"].get("loss")
        if loss is None:  # the summary at the end
            return
        if not math.isfinite(loss):
            raise ModelError(
                f"the training loss is {loss} at step {self.attempt.steps + 1}; lower train.learning_rate "
                f"(now at {args.learning_rate:g}) or raise train.warmup_ratio"
            )
        now = time.monotonic()
        self.attempt.losses.append(loss)
        self.attempt.tokens += self.crew.sum(self.module.tokens)
        self.module.tokens.zero_()
        self.attempt.seconds += now - self.noted
        self.noted = now
        next(self.ticks, None)
        if self.attempt.steps in self.milestones:
            self.milestones[self.attempt.steps]()
        if self.checkpoint and self.crew.agree(now - self.saved >= CHECKPOINT_SECONDS):
            self.checkpoint.save(self.attempt)
            self.saved = time.monotonic()


def _run_trainer(
    vlm: VLM,
    encoded: Sequence[Encoded],
    batches: np.ndarray,
    optimizer: torch.optim.Optimizer,
    settings: Train,
    crew: Crew,
    attempt: Attempt,
    checkpoint: "_Checkpoint | None",
    milestones: Mapping[int, Callable[[], None]],
    out: Path | None,
) -> None:
    """Take the steps that are left, one for each row of `batches`, [steps, batch_size] indices."""
    start, steps = attempt.steps, attempt.steps + len(batches)
    parts = micro_batches(settings.batch_size, settings.micro_batch_size, crew.count)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(start + step, steps, settings.warmup_ratio)
    )
    if settings.gradient_checkpointing:
        vlm.base_model.activation_checkpointing_enable({"use_reentrant": False})
    module = _StepLoss(vlm, settings, crew)
    # Trainer is given parameters that are cut already, and takes no optimiser where it sees that FSDP is asked for
    with tempfile.TemporaryDirectory() as nowhere, hidden_variable(USE_FSDP), _old_objects_uncollected():
        trainer = transformers.Trainer(
            model=module,
            args=_training_arguments(vlm, settings, len(parts) // crew.count, crew, out or Path(nowhere)),
            train_dataset=[(step, part) for step in range(len(batches)) for part in range(len(parts))],
            data_collator=_MicroBatches(vlm, encoded, batches, parts, crew.count),
            optimizers=(optimizer, schedule),
            callbacks=[_Follower(attempt, len(batches), settings.seed, crew, module, checkpoint, milestones)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


@contextmanager
def _old_objects_uncollected() -> Iterator[None]:
    """The Trainer collects garbage when it begins: a third of a second for what was imported long before."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def micro_batches(batch_size: int, micro_batch_size: int | None, processes: int) -> list[slice]:
    """The parts of a batch that go through the model at once, as many for each process, part by part in turn.

    In one process all but the last have `micro_batch_size`, MICRO_BATCH where that is None; in several none is larger
    and sizes differ by one at most.
    Raises RecipeError where a process would be left without a sample.
    """
    micro = min(micro_batch_size or MICRO_BATCH, batch_size)
    if processes == 1:
        return [slice(start, min(start + micro, batch_size)) for start in range(0, batch_size, micro)]
    count = processes * math.ceil(math.ceil(batch_size / processes) / micro)
    if count > batch_size:
        raise RecipeError(
            f"train.batch_size is {batch_size}, and {processes} processes with micro-batches of {micro} need at least "
            f"{count} samples a step; raise train.batch_size or start fewer processes"
        )
    ends = [round(batch_size * part / count) for part in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


class _MicroBatches:
    """Makes the Trainer's inputs: the part of a step's batch that goes through the model at once.

    Samples of like length come together: what a process has of a batch is laid out by length before it is cut. The
    step is the same, for it is the sum over samples; the padding is not. Micro-batches have to be asked for in turn.
    """

    def __init__(
        self, vlm: VLM, encoded: Sequence[Encoded], batches: np.ndarray, parts: Sequence[slice], processes: int
    ) -> None:
        self.vlm, self.encoded, self.batches, self.parts, self.processes = vlm, encoded, batches, parts, processes
        self._cut: tuple[tuple[int, int], list[list[Encoded]]] | None = None  # of the last step and process

    def __call__(self, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        step, part = items[0]
        number, process = divmod(part, self.processes)
        if self._cut is None or self._cut[0] != (step, process):
            self._cut = (step, process), self._lay_out(step, process)
        return self.vlm.collate(self._cut[1][number])

    def _lay_out(self, step: int, process: int) -> list[list[Encoded]]:
        own = self.parts[process :: self.processes]
        samples = [self.encoded[i] for part in own for i in self.batches[step][part]]
        samples.sort(key=lambda sample: sample.length)
        left = iter(samples)
        return [list(itertools.islice(left, part.stop - part.start)) for part in own]


def _training_arguments(
    vlm: VLM, settings: Train, accumulation: int, crew: Crew, out: Path
) -> transformers.TrainingArguments:
    if missing := set(settings.report_to) - set(get_available_reporting_integrations()):
        raise RecipeError(
            f"train.report_to names {', '.join(sorted(missing))}, which is not installed; "
            f"installed are: {', '.join(get_available_reporting_integrations()) or 'none'}"
        )
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        use_cpu=vlm.device.type == "cpu",
        seed=settings.seed,
        num_train_epochs=1,  # sample_order has put all epochs in one row
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,  # an item is a micro-batch
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        max_grad_norm=MAX_GRADIENT_NORM,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # would hide a diverged run
        report_to=list(settings.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # batches are on the device already
        average_tokens_across_devices=False,  # would scale the loss, which has its share of the batch already
    )
    if arguments.world_size != crew.count:
        raise EnvironmentFault(
            f"the Trainer sees {arguments.world_size} processes and the environment announces {crew.count}; start "
            "several processes with torchrun or `accelerate launch`"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several GPUs in sight the Trainer would multiply the batch
    return arguments


@dataclass(frozen=True)
class _Checkpoint:
    """Everything that a later attempt needs, in one safetensors file. All processes have to call every method.

    Tensors are whole in it, however the parameters are cut: another number of processes may go on from it.
    """

    path: Path
    identity: str  # of the training that is asked for now
    parameters: Sequence[Parameter]
    optimizer: torch.optim.Optimizer
    crew: Crew

    def save(self, attempt: Attempt) -> None:
        tensors = {}
        for name, tensor in self._tensors():
            gathered = whole_tensor(tensor)
            if self.crew.is_first:
                tensors[name] = gathered.cpu().contiguous()
        if not self.crew.is_first:
            return
        metadata = {"identity": self.identity, "attempt": json.dumps(dataclasses.asdict(attempt))}
        metadata["sha256"] = _content_hash(tensors, tensors.__getitem__, metadata)
        with complete_path(self.path) as temporary:
            try:
                safetensors.torch.save_file(tensors, temporary, metadata)
            except safetensors.SafetensorError as error:
                raise OSError(str(error)) from error  # a full disk, in the library's words

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, parameter in enumerate(self.parameters):
            yield f"parameter.{i}", parameter.detach()
        for i, state in self.optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                yield f"optimizer.{i}.{name}", tensor

    def restore(self) -> Attempt | None:
        """Put weights and optimiser state back where the last attempt left them.

        None where the file is not what was written: it is set aside, and training begins again. Raises RunError where
        it is another training's.
        """
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                found, written = _content_hash(file.keys(), file.get_tensor, metadata), metadata["sha256"]
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            found, written = str(error), ""
        if self.crew.sum(torch.tensor(int(found != written), device=self.parameters[0].device)):
            if self.crew.is_first:
                aside = self.path.with_suffix(".damaged")
                log.warning("%s is damaged and set aside as %s; training begins again", self.path, aside.name)
                self.path.replace(aside)
            return None
        if metadata["identity"] != self.identity:
            raise RunError(
                f"{self.path} belongs to a training with other settings, samples or model; "
                "delete it to train from the start, or give another folder"
            )
        with safetensors.safe_open(self.path, framework="pt") as file:
            self._put_back(file)
        return Attempt(**json.loads(metadata["attempt"]))

    @torch.no_grad()
    def _put_back(self, file: Any) -> None:
        in_order = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, i, *name = key.split(".")
            tensor = file.get_tensor(key)
            if kind == "parameter":
                self.parameters[int(i)].copy_(cut_like(tensor, self.parameters[int(i)]))
            else:
                moment = tensor if tensor.ndim == 0 else cut_like(tensor, in_order[int(i)])  # a step count is not cut
                state.setdefault(int(i), {})[name[0]] = moment
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _bytes_on_disk(vlm: VLM, trained: Sequence[Parameter]) -> int:
    """Bytes of what a training writes: what `save` will, and one checkpoint with two moments for each weight."""
    saved = trained if isinstance(vlm.model, peft.PeftModel) else list(vlm.model.parameters())
    return sum(4 * p.numel() for p in saved) + 3 * sum(4 * p.numel() for p in trained)


def _content_hash(names: Iterable[str], get: Callable[[str], Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256, in hex, of everything in a checkpoint: a flipped bit in a weight is not seen by safetensors."""
    total = hashlib.sha256(f"{metadata['identity']} {metadata['attempt']}".encode())
    for name in sorted(names):
        tensor = get(name)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _identity(vlm: VLM, first: Sequence[Encoded], samples: int, settings: Train, steps: int) -> str:
    """Hash of what makes two trainings the same: settings, steps, model name, tokens of the first samples seen."""
    described = [settings.model_dump(mode="json", exclude=NOT_IN_IDENTITY), steps, vlm.name, samples]
    digest = hashlib.sha256(json.dumps(described).encode())
    for item in first:
        digest.update(item.inputs["input_ids"].numpy().tobytes())
        digest.update(item.labels.numpy().tobytes())
    return digest.hexdigest()

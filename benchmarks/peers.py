"""Equal work for ourselves and for the systems one would pick instead: gradient products in, a table of seconds out.

    python benchmarks/peers.py --out benchmarks/results/peers.json

The work: `<grad l_i, mean_j grad l_val_j>` for every sample i of a pool, over the weights of the decoder's linear
layers, with l the mean cross entropy over answer tokens, prompt masked, batches of 16 samples of like length padded on
the right. Text-only random Llamas of two sizes, and the embedded vision-language model. Seconds include the gradient of
the validation items and leave out loading. The truth is the same product in float64, one sample at a time.

- first_order, first_order_hooks: ours (finite differences by forward passes; contraction in hooks)
- bergson: an index of the mean query gradient, then scores against it; text only
- kronfluence: pairwise scores with identity factors and aggregated queries
- per_sample: a backward pass of one sample at a time and a dot product
- one_step: the literal one-step loop of one sample at a time: backward, step, all validation items again, step undone.
  It does the first quarter of the samples and its seconds are multiplied by four.
- less_style: one backward pass a sample, projected to 8192 numbers, stored in float16, cosine with the mean validation
  gradient (LESS, sec. 4, for one checkpoint and plain gradients). The projection is sparse, one random sign a
  parameter: a dense one of as many rows takes hours on a processor.
- epoch: one training epoch of all parameters (forward, backward, AdamW step), the yardstick of derivatives
- first_order_3: derivatives along three targets, so what a further target costs is known

Every contestant has a process of its own, for its peak memory; contestants take turns, on one thread. A ratio is the
median over turns of the ratio within a turn, by processor seconds and by the clock. Nothing is warmed up: a median
over turns passes over a cold first one. Peers that are not installed are
left out and named. They belong into an environment of their own: `pip install -c constraints.txt bergson==2.5.1
kronfluence==1.0.1 -e .`, then uninstall torchvision and torchaudio where they do not fit the build of torch.
"""

import argparse
import atexit
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy

from datalloy.config import DataSource
from datalloy.encoding import length_batches
from datalloy.readers import read_all
from datalloy.scorers.first_order import FiniteDifferenceScorer, TapScorer
from datalloy.scorers.step import Steppable, StepRule
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.vlm import IGNORED, VLM, Encoded

BATCH = 16
VOCABULARY = 512
PROJECTED = 8192
SMALL_STEP = 1e-4  # of the one-step loop: relative size of the step, small enough for its utility to be the product
SKILLS = ("chart", "counting", "table")
OURS = ("first_order", "first_order_hooks")
PEERS = ("bergson", "kronfluence")
BARS = {"speedup": 1.5, "spearman": 0.999, "one target": 0.75, "further target": 0.35}


class LlamaSize(NamedTuple):
    width: int
    layers: int
    longest: int
    train: int


LLAMAS = {"llama-1m": LlamaSize(256, 2, 96, 64), "llama-10m": LlamaSize(512, 4, 64, 64)}
VALIDATION = 16
CONTESTANTS = {
    "llama-1m": (*OURS, *PEERS, "per_sample", "one_step", "less_style", "epoch", "first_order_3"),
    "llama-10m": (*OURS, *PEERS, "per_sample", "less_style", "epoch", "first_order_3"),
    "tiny-vlm": (*OURS, "kronfluence", "per_sample", "one_step", "less_style", "epoch", "first_order_3"),
}


@dataclass(frozen=True)
class Work:
    """What is asked of every contestant."""

    vlm: VLM
    train: Sequence[Encoded]
    validation: Sequence[Encoded]

    def lay_out(self, targets: int = 1) -> TargetItems:
        groups = {str(g): list(self.validation[g::targets]) for g in range(targets)}
        return TargetItems.lay_out(self.vlm, groups, dict.fromkeys(groups, 1.0), items_per_batch=BATCH)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        return Taps(self.vlm).weights()


class Result(NamedTuple):
    """Scores of the first samples, None where there are none; the seconds of scoring alone where they are told apart.

    `share`: how much of the work was done.
    """

    score_N: np.ndarray | None
    parts: dict[str, float] = {}  # noqa: RUF012 - a constant
    share: float = 1.0


# --- the work ------------------------------------------------------------------------------------------------------


class _Tokens:
    """What a VLM asks of a tokenizer that only pads."""

    eos_token_id = pad_token_id = 0

    def convert_tokens_to_ids(self, _: str) -> int:
        return 0


def build_llama(size: LlamaSize, seed: int) -> VLM:
    """A random Llama without a vision tower, in the clothes of a VLM."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    processor = types.SimpleNamespace(tokenizer=_Tokens())
    chat: Any = types.SimpleNamespace(end_of_turn="")
    return VLM(model, processor, "llama", Path(), chat)


def draw_tokens(count: int, longest: int, seed: int) -> list[Encoded]:
    """Uniform tokens: samples have next to nothing in common, so products are small and hard to rank."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        length = int(rng.integers(longest // 3, longest + 1))
        prompt = int(rng.integers(length // 4, 3 * length // 4))
        input_ids = torch.from_numpy(rng.integers(1, VOCABULARY, (1, length)))
        labels = input_ids.clone()
        labels[:, :prompt] = IGNORED
        drawn.append(Encoded({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}, labels))
    return drawn


def draw_pictures(vlm: VLM, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = PoolPlan(samples=dict.fromkeys(SKILLS, 32), targets=SKILLS, target_items=6, holdout_items=0)
        write_pool(folder, plan, seed)
        train = [s for skill in SKILLS for s in read_all(DataSource(path=str(folder / f"{skill}.jsonl")), skill)[0]]
        groups = [read_all(DataSource(path=str(folder / f"{skill}.target.jsonl")), skill)[0] for skill in SKILLS]
        validation = [sample for turn in zip(*groups, strict=True) for sample in turn][:VALIDATION]
        return [vlm.encode(sample) for sample in train], [vlm.encode(sample) for sample in validation]


def prepare_work(setting: str, seed: int) -> Work:
    if setting == "tiny-vlm":
        vlm = VLM.load("tiny", device="cpu")
        return Work(vlm, *draw_pictures(vlm, seed))
    size = LLAMAS[setting]
    train = draw_tokens(size.train, size.longest, 2 * seed + 1)
    return Work(build_llama(size, seed), train, draw_tokens(VALIDATION, size.longest, 2 * seed + 2))


def mean_losses(vlm: VLM, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of each sample over its answer, as one would write it down."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = vlm.model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(dim=1) / (labels != IGNORED).sum(dim=1)


def sample_gradient(work: Work, sample: Encoded, weights: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(mean_losses(work.vlm, work.vlm.collate([sample])).sum(), weights))


def validation_gradient(work: Work, weights: Sequence[Tensor]) -> list[Tensor]:
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in length_batches(work.validation, BATCH):
        losses = mean_losses(work.vlm, work.vlm.collate([work.validation[i] for i in batch]))
        for sum_, part in zip(total, torch.autograd.grad(losses.sum(), weights), strict=True):
            sum_ += part / len(work.validation)
    return total


# --- contestants: work in, a function that does it once out ----------------------------------------------------------


def exact(work: Work) -> Callable[[], Result]:
    """One backward pass a sample and a dot product; in float64 it is the truth."""
    weights = work.weights

    def score() -> Result:
        target = validation_gradient(work, weights)
        gradients = (sample_gradient(work, sample, weights) for sample in work.train)
        return Result(np.array([sum((a * b).sum().item() for a, b in zip(g, target, strict=True)) for g in gradients]))

    return score


def reference(work: Work) -> Callable[[], Result]:
    work.vlm.model.double()
    return exact(work)


def first_order(work: Work, targets: int = 1) -> Callable[[], Result]:
    steppable = Steppable(work.weights)
    pictures = work.vlm.name == "tiny"

    def score() -> Result:
        items = work.lay_out(targets)
        scorer = FiniteDifferenceScorer(
            work.vlm, items, steppable, rule=StepRule("sgd"), step=1.0, batch_size=BATCH, share_vision=pictures
        )
        cpu, wall = time.process_time(), time.perf_counter()
        block = scorer.score(work.train)
        parts = {"score_cpu": time.process_time() - cpu, "score_wall": time.perf_counter() - wall}
        return Result(block.utility_NG[:, 0] if targets == 1 else None, parts)

    return score


def first_order_3(work: Work) -> Callable[[], Result]:
    return first_order(work, targets=3)


def first_order_hooks(work: Work) -> Callable[[], Result]:
    def score() -> Result:
        scorer = TapScorer(Taps(work.vlm), work.lay_out(), rule=StepRule("sgd"), step=1.0, batch_size=BATCH)
        return Result(scorer.score(work.train).utility_NG[:, 0])

    return score


def one_step(work: Work) -> Callable[[], Result]:
    weights = work.weights
    batches = [work.vlm.collate([work.validation[i] for i in b]) for b in length_batches(work.validation, BATCH)]
    weights_norm = math.sqrt(sum(weight.detach().square().sum().item() for weight in weights))

    @torch.no_grad()
    def validation_loss() -> float:
        return sum(mean_losses(work.vlm, batch).double().sum().item() for batch in batches) / len(work.validation)

    def utility(sample: Encoded, before: float) -> float:
        gradient = sample_gradient(work, sample, weights)
        norm = math.sqrt(sum(part.square().sum().item() for part in gradient))
        step = SMALL_STEP * weights_norm / max(norm, torch.finfo(torch.float32).tiny)
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, part in zip(weights, gradient, strict=True):
                weight.sub_(part, alpha=step)
            after = validation_loss()
            for weight, original in zip(weights, kept, strict=True):
                weight.copy_(original)
        return (before - after) / step

    def score() -> Result:
        before = validation_loss()
        few = work.train[: len(work.train) // 4]
        return Result(np.array([utility(sample, before) for sample in few]), share=len(few) / len(work.train))

    return score


def less_style(work: Work) -> Callable[[], Result]:
    weights = work.weights
    generator = torch.Generator().manual_seed(0)
    count = sum(weight.numel() for weight in weights)
    row_P = torch.randint(PROJECTED, (count,), generator=generator)
    sign_P = torch.randint(2, (count,), generator=generator).float() * 2 - 1

    def project(gradient: Sequence[Tensor]) -> Tensor:
        flat_P = torch.cat([part.flatten() for part in gradient])
        return torch.zeros(PROJECTED).index_add_(0, row_P, flat_P * sign_P)

    def stored(samples: Sequence[Encoded]) -> Tensor:
        projected = torch.stack([project(sample_gradient(work, sample, weights)) for sample in samples])
        return torch.nn.functional.normalize(projected).half()  # unit vectors, or small gradients are zero in float16

    def score() -> Result:
        target = stored(work.validation).float().mean(dim=0)
        return Result((stored(work.train).float() @ target).double().numpy())

    return score


def epoch(work: Work) -> Callable[[], Result]:
    vlm = VLM(work.vlm.copy().model, work.vlm.processor, work.vlm.name, work.vlm.folder, work.vlm.chat)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=1e-5)

    def train() -> Result:
        for batch in length_batches(work.train, BATCH):
            vlm.losses(vlm.collate([work.train[i] for i in batch])).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return Result(None)

    return train


def bergson(work: Work) -> Callable[[], Result]:
    from bergson.collection import collect_gradients
    from bergson.config.config import IndexConfig, PreprocessConfig, ScoreConfig
    from bergson.data import allocate_batches
    from bergson.score.score import create_scorer
    from bergson.utils.worker_utils import create_processor
    from datasets import Dataset

    model = work.vlm.model
    model.requires_grad_(False)  # as its own loader does: hooks need a graph, weights need no gradient
    model.get_input_embeddings().requires_grad_(True)
    mean = PreprocessConfig(aggregation="mean")

    def dataset(samples: Sequence[Encoded]) -> Any:
        columns = {
            "input_ids": [sample.inputs["input_ids"][0].tolist() for sample in samples],
            "labels": [sample.labels[0].tolist() for sample in samples],
            "length": [sample.length for sample in samples],
        }
        return Dataset.from_dict(columns)

    train, validation = dataset(work.train), dataset(work.validation)

    def collect(data: Any, config: IndexConfig, **more: Any) -> None:
        batches = allocate_batches(data["length"][:], config.token_batch_size, max_batch_size=BATCH)
        processor = create_processor(model, config)
        collect_gradients(model=model, data=data, processor=processor, cfg=config, batches=batches, **more)

    def score() -> Result:
        with tempfile.TemporaryDirectory() as name:
            configs = [IndexConfig(run_path=f"{name}/{part}", loss_reduction="mean") for part in ("query", "score")]
            for config in configs:
                config.partial_run_path.mkdir(parents=True)
            collect(validation, configs[0], preprocess_cfg=mean)
            scorer = create_scorer(
                configs[1].partial_run_path,
                train,
                ScoreConfig(query_path=str(configs[0].partial_run_path)),
                PreprocessConfig(),
                torch.device("cpu"),
                torch.float32,
            )
            collect(train, configs[1], scorer=scorer)
            return Result(np.array(scorer.writer.scores["score_0"], dtype=np.float64))

    return score


def kronfluence(work: Work) -> Callable[[], Result]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    vlm = work.vlm
    tapped = set(Taps(vlm).modules)
    tracked = [name for name, module in vlm.model.named_modules() if module in tapped]

    class Answers(Task):
        def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> Tensor:  # noqa: ARG002
            return mean_losses(vlm, batch).sum()

        def compute_measurement(self, batch: Any, model: torch.nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    def collate(samples: Sequence[Encoded]) -> dict[str, Tensor]:
        return vlm.collate(samples)  # a function of its own: a method would be copied with its model at every call

    task, loader = Answers(), DataLoaderKwargs(collate_fn=collate)
    order = [i for batch in length_batches(work.train, BATCH) for i in batch]
    train: Any = [work.train[i] for i in order]
    queries: Any = [work.validation[i] for batch in length_batches(work.validation, BATCH) for i in batch]
    analyzed = prepare_model(vlm.model, task)
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)  # holds on to it: it is written to at every call
    analyzer = Analyzer("peers", analyzed, task, cpu=True, disable_tqdm=True, output_dir=folder.name)
    analyzer.fit_all_factors(
        "identity", train, BATCH, dataloader_kwargs=loader, factor_args=FactorArguments(strategy="identity")
    )

    def score() -> Result:
        analyzer.compute_pairwise_scores(
            "scores",
            "identity",
            queries,
            train,
            BATCH,
            BATCH,
            dataloader_kwargs=loader,
            score_args=ScoreArguments(aggregate_query_gradients=True),
            overwrite_output_dir=True,
        )
        scores = analyzer.load_pairwise_scores("scores")
        score_N = np.empty(len(order))
        score_N[order] = scores["all_modules"][0].double().numpy() / len(queries)
        return Result(score_N)

    return score


MAKE: dict[str, Callable[[Work], Callable[[], Result]]] = {
    "reference": reference,
    "first_order": first_order,
    "first_order_3": first_order_3,
    "first_order_hooks": first_order_hooks,
    "bergson": bergson,
    "kronfluence": kronfluence,
    "per_sample": exact,
    "one_step": one_step,
    "less_style": less_style,
    "epoch": epoch,
}


# --- processes -----------------------------------------------------------------------------------------------------


def serve(contestant: str, setting: str, seed: int) -> None:
    """The process of one contestant: a line in, the work done once, its figures out as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print does not mix with the figures

    def answer(figures: Mapping[str, Any]) -> None:
        answers.write(json.dumps(figures) + "\n")
        answers.flush()

    torch.set_num_threads(1)
    try:
        do = MAKE[contestant](prepare_work(setting, seed))
    except ImportError as error:
        answer({"missing": str(error)})
        return
    answer({"ready": True})
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        result = do()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        figures = {clock: seconds / result.share for clock, seconds in spent.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        score = None if result.score_N is None else result.score_N.tolist()
        answer(figures | result.parts | {"peak_mib": peak, "score": score})


class Process:
    """A contestant that waits for its turn."""

    def __init__(self, contestant: str, setting: str, seed: int) -> None:
        command = [sys.executable, __file__, "--serve", contestant, "--settings", setting, "--seed", str(seed)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.missing: str | None = self._answer().get("missing")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError(f"a contestant died:\n{errors[-2000:]}")
        return json.loads(line)

    def take_turn(self) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self._process.communicate("")


def run_setting(setting: str, seed: int, turns: int, only: Sequence[str]) -> dict[str, Any]:
    truth = Process("reference", setting, seed)
    exact_N = np.array(truth.take_turn()["score"])
    truth.end()
    processes, left_out = {}, {}
    for name in CONTESTANTS[setting]:
        if only and name not in only:
            continue
        process = Process(name, setting, seed)
        if process.missing:
            left_out[name] = process.missing
            process.end()
        else:
            processes[name] = process
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
    for turn in range(turns):
        names = list(processes) if turn % 2 else list(reversed(processes))
        for name in names:
            figures[name].append(processes[name].take_turn())
        print(f"{setting}: turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    for process in processes.values():
        process.end()
    rows = [row(setting, name, taken, exact_N) for name, taken in figures.items()]
    return {"rows": rows, "bars": judge(figures, rows), "left_out": left_out}


def row(setting: str, name: str, taken: Sequence[Mapping[str, Any]], exact_N: np.ndarray) -> dict[str, Any]:
    figures = {"setting": setting, "contestant": name}
    for key in [key for key in taken[0] if key != "score"]:
        figures[key] = float(np.median([turn[key] for turn in taken]))
        figures[f"{key}_turns"] = [round(turn[key], 4) for turn in taken]
    figures.pop("peak_mib_turns")
    if taken[0]["score"] is not None:
        score_N = np.array(taken[-1]["score"])
        exact_N = exact_N[: len(score_N)]
        figures["spearman"] = float(spearmanr(score_N, exact_N).statistic)
        if name != "less_style":  # a cosine
            figures["relative_error"] = float(np.linalg.norm(score_N - exact_N) / np.linalg.norm(exact_N))
    return figures


def judge(figures: Mapping[str, Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios within a turn, their medians, and whether the bars are met, by processor seconds and by the clock."""

    def seconds(name: str, key: str) -> np.ndarray:
        return np.array([turn[key] for turn in figures[name]])

    judged: dict[str, Any] = {}
    if "first_order" not in figures:
        return judged
    spearman = next(row["spearman"] for row in rows if row["contestant"] == "first_order")
    judged["spearman"] = {"value": spearman, "bar": BARS["spearman"], "met": spearman >= BARS["spearman"]}
    for clock in ("cpu", "wall"):
        ours = seconds("first_order", clock)
        for name in figures:
            if name not in (*OURS, "epoch", "first_order_3"):
                ratio = float(np.median(seconds(name, clock) / ours))
                judged[f"speedup over {name} ({clock})"] = {"value": ratio}
        if peers := [name for name in PEERS if name in figures]:
            fastest = np.min([seconds(name, clock) for name in peers], axis=0)
            ratio = float(np.median(fastest / ours))
            bar = BARS["speedup"]
            judged[f"speedup over the faster peer ({clock})"] = {"value": ratio, "bar": bar, "met": ratio >= bar}
        if {"epoch", "first_order_3"} <= set(figures):
            one, three = (seconds(name, f"score_{clock}") for name in ("first_order", "first_order_3"))
            shares = {"one target": one, "further target": (three - one) / 2}
            for what, spent in shares.items():
                ratio, bar = float(np.median(spent / seconds("epoch", clock))), BARS[what]
                judged[f"epochs, {what} ({clock})"] = {"value": ratio, "bar": bar, "met": ratio <= bar}
    return judged


# --- what is written -----------------------------------------------------------------------------------------------


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| setting | contestant | cpu s | wall s | peak MiB | Spearman | relative error |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        for found in result["rows"]:
            spearman = f"{found['spearman']:.5f}" if "spearman" in found else ""
            error = f"{found['relative_error']:.1e}" if "relative_error" in found else ""
            cells = [found["setting"], found["contestant"], f"{found['cpu']:.2f}", f"{found['wall']:.2f}"]
            cells += [f"{found['peak_mib']:.0f}", spearman, error]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| setting | ratio | value | bar | met |", "|---|---|---|---|---|"]
    for setting, result in results.items():
        for what, found in result["bars"].items():
            bar, met = found.get("bar", ""), {True: "yes", False: "NO", None: ""}[found.get("met")]
            digits = 5 if what == "spearman" else 2
            lines.append(f"| {setting} | {what} | {found['value']:.{digits}f} | {bar} | {met} |")
        lines += [f"| {setting} | left out: {name} ({why}) | | | |" for name, why in result["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--only", nargs="*", default=(), help="contestants; all others are left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=MAKE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.settings[0], options.seed)
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    about = {
        "seed": options.seed,
        "turns": options.turns,
        "commit": commit,
        "machine": f"{platform.platform()}, one thread",
        "versions": {name: installed(name) for name in ("torch", "transformers", *PEERS)},
    }
    results: dict[str, dict[str, Any]] = {}
    for setting in options.settings:
        results[setting] = run_setting(setting, options.seed, options.turns, options.only)
        results[setting] |= about
        if options.out:  # settings measured by another call stay, each beside the commit it was measured at
            earlier = json.loads(options.out.read_text()) if options.out.exists() else {}
            options.out.write_text(json.dumps(earlier | {setting: results[setting]}, indent=2) + "\n")
    print(as_markdown(results))


if __name__ == "__main__":
    main()

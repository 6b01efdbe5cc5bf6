"""The recipe: a YAML file in, one strict frozen object out.

Every key of a recipe is a field here with its default, its unit and its range; an unknown or misspelt key is an
error that names the nearest valid one, and a value of the wrong type is refused, never converted. Paths of data are
relative to `data_root`, which is the recipe's folder unless it says otherwise; those of models to the recipe's folder.
`base: tiny` is the embedded model.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from datalloy.display import holds_secret
from datalloy.errors import RecipeError
from datalloy.locations import HUB
from datalloy.regular_files import NotRegularError, read_regular
from datalloy.strict_yaml import parse_yaml

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]
Count = Annotated[int, Field(ge=1)]
Listed = Field(strict=False)  # a YAML list may stand for the tuple; its items stay strict
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "llava",
    "alpaca",
    "prompt_completion",
    "parquet",
    "hf",
    "webdataset",
    "llama_factory",
]
ExportFormat = Literal["rows", "llama-factory", "ms-swift", "trl", "axolotl", "energon", "webdataset", "ids"]
Metric = Literal["exact_match", "relaxed_accuracy", "option_letter", "anls", "answer_probability", "loss"]
Precision = Literal["float32", "bfloat16"]
StepSize = Literal["batch_share", "visible_effect"]  # rules for it, scorers/step.py and probing.py
ScorerName = Literal[
    "exact",
    "tail",
    "first_order",
    "first_order_hooks",
    "less",
    "calibrated",
    "visual_gain",
    "entropy_minus_loss",
    "deita",
    "judge",
    "random",
    "low_loss",
    "low_loss_by_length",
    "low_loss_by_neighbours",
    "right_and_wanted",
    "mid_loss",
    "high_loss",
    "length",
]

COMPLEXITY_PROMPT = """\
How much knowledge and how many steps of thought does the request between the lines need?
1: none to speak of. 6: those of an expert.
-----
{request}
-----
Answer with one digit from 1 to 6."""
QUALITY_PROMPT = """\
How good is the answer to the request: is it right, does it rest on what is shown, is it complete and clear?
1: useless or wrong. 6: could not be better.
----- request
{request}
----- answer
{answer}
-----
Rate the answer with one digit from 1 to 6."""

JUDGE_RUBRIC = """\
You judge samples that a vision-language model is to be trained on. A sample is a conversation, with its pictures if it
has any. Judge the assistant's answers: are they right, do they rest on what is shown, do they answer what was asked?"""
JUDGE_LEVELS = (
    "wrong, empty, or not about the request",
    "mostly wrong, or right by guessing",
    "partly right, or right with faults that mislead",
    "right, with small faults",
    "right, grounded in what is shown, complete and clear",
)
# Keys of a request that Datalloy writes itself.
JUDGE_OWN_KEYS = {"model", "messages", "stream", "n", "logprobs", "top_logprobs", "response_format", "tools"}

NAME_RULE = "1 to 64 letters, digits, dots, dashes or underscores that begin with a letter or a digit"
DEITA_MODELS = ("complexity_model", "quality_model")
TYPE_WORDS = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
MAX_RECIPE_BYTES = 1024 * 1024
SHOWN_LENGTH = 80  # characters of a faulty value in a message


class Section(BaseModel):
    """Base of all parts of a recipe: no unknown keys, no change after loading, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSource(Section):
    """A dataset file: where it is and how to read it."""

    path: str = Field(
        description="JSONL, JSON, Parquet or Arrow file, WebDataset tars as shard-{000..009}.tar, a saved dataset or "
        "dataset folder as FOLDER#SPLIT, dataset_info.json#NAME of LLaMA-Factory, all relative to data_root; or "
        "hf://datasets/ORG/NAME#SPLIT."
    )
    format: Format = Field("auto", description="How the file is laid out; auto looks at its first records.")
    media_root: str | None = Field(
        None, description="Folder image paths start from, relative to data_root; default: the file's."
    )
    skip: Annotated[int, Field(ge=0)] = Field(0, description="Pass over the first so many samples.")
    limit: Count | None = Field(None, description="Use only so many samples.")


class Domain(DataSource):
    """A named dataset of the pool."""

    max_epochs: Positive | None = Field(
        None, description="A mixture repeats this domain's samples at most so often; default: no limit."
    )
    min_share: Share = Field(0.0, description="Least share of this domain in a mixture.")


class Target(DataSource):
    """A named validation set with the metric the user wants to get better."""

    metric: Metric = "exact_match"
    weight: Positive = Field(1.0, description="Share of this target in the utility, relative to the other targets.")


class Score(Section):
    """How every sample of the pool gets its utility (DESIGN 2.1)."""

    method: Literal["auto"] | ScorerName = Field("auto", description="auto: the bake-off decides between scorers.")
    step: Literal["auto", StepSize] | Positive = Field(
        "auto",
        description="Step size of the simulated step. batch_share: about what a sample moves the model as one of a "
        "training batch, measured on batches of the pool; alone it selects best. visible_effect: so large that one "
        "step changes the targets' loss by twice its value, by a scan on probes; it tells wrong answers from easy "
        "ones best and drops what is hard, so it is for a race beside scores that keep that. auto: visible_effect "
        "where scorers race, batch_share where one selects alone.",
    )
    step_rule: Literal["sgd", "unit_norm", "adamw"] = Field(
        "sgd", description="sgd: -step*g. unit_norm: -step*g/|g|. adamw: -step*g/sqrt(v), v measured once on the pool."
    )
    scope: Literal["full", "decoder"] = Field("full", description="Parameters the step touches: all, or the decoder.")
    tail_layers: Count = Field(1, description="Decoder layers the tail step touches.")
    warmup_fraction: Share = Field(
        0.0,
        description="Share of the pool the proxy is tuned on before it scores. OST's paper finds 5 % best; measured "
        "here, none is as good in the mean, better where much is wrong, worse where the questions are new to it.",
    )
    target_items: Count = Field(
        100,
        description="At most so many items of each target enter the utility; where a bake-off follows at most half of "
        "them, and the others judge it.",
    )
    probes: Count = Field(
        96, description="Samples scored exactly, to choose the step and to fit and check cheap scores."
    )
    replayed_items: Annotated[int, Field(ge=0)] = Field(
        0, description="Target items in all that calibrated also measures after a real step on each sample."
    )
    min_agreement: Fraction = Field(
        0.6, description="calibrated refuses when its held-out Spearman with exact on the probes is lower."
    )
    length_normalised: bool = Field(False, description="Rank within strata of answer length instead of across them.")
    contributions: bool = Field(False, description="Also store what each sample does to every single target item.")
    batch_size: Count = Field(16, description="Samples per forward pass; does not change the results.")
    precision: Precision = Field(
        "float32",
        description="bfloat16: losses and gradients of the pool are read under autocast, by calibrated, less, "
        "first_order_hooks, visual_gain, entropy_minus_loss and the losses that baselines need. Weights and finite "
        "steps stay float32.",
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _steps_are_float32(self) -> "Score":
        if self.replayed_items and self.precision != "float32":
            raise ValueError("replayed_items measures real steps, which need precision float32")
        return self


class Select(Section):
    """Which samples are kept."""

    keep_fraction: Literal["auto"] | Fraction = Field("auto", description="Share kept; auto: the bake-off decides.")
    within: Literal["domain", "global"] = Field(
        "domain", description="Rank inside each domain, or the whole pool at once."
    )
    budget_samples: Count | None = Field(None, description="Keep at most so many samples.")
    budget_tokens: Count | None = Field(None, description="Keep at most so many tokens, by utility per token.")
    budget_flops: Positive | None = Field(None, description="Keep at most so many training FLOPs, by utility per FLOP.")
    diversity: Literal["off", "facility_location", "threshold"] = Field(
        "off",
        description="Leave out near-copies, by the proxy's hidden states. facility_location: as many samples, that "
        "cover the ranking group. threshold: pass over what is too similar to a better sample.",
    )
    diversity_weight: Share = Field(
        0.5, description="facility_location: share of coverage in what is maximised, beside the rank by utility."
    )
    max_similarity: Fraction = Field(
        0.9, description="threshold: the cosine with a sample taken from which on another is passed over."
    )
    drop_toxic: bool = Field(True, description="Drop samples whose utility is below zero beyond its interval.")
    toxic_confidence: Confidence = Field(0.95, description="One-sided confidence of 'below zero'.")
    bakeoff_epochs: Positive = Field(
        5.0, description="The bake-off trains for at most so many epochs of the pool in all."
    )
    bakeoff_arms: Annotated[tuple[ScorerName, ...], Listed, Field(min_length=1)] = Field(
        ("low_loss", "low_loss_by_neighbours", "calibrated"),
        description="Scorers that the bake-off tries, the first ones first where its budget is too small for all, "
        "beside random and the full pool.",
    )
    bakeoff_fractions: Annotated[tuple[Fraction, ...], Listed, Field(min_length=1)] = (0.2, 0.5, 0.8)
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_budget(self) -> "Select":
        budgets = {"samples": self.budget_samples, "tokens": self.budget_tokens, "flops": self.budget_flops}
        given = [f"budget_{name}" for name, budget in budgets.items() if budget is not None]
        if len(given) > 1:
            raise ValueError(f"at most one budget can be given, found {' and '.join(given)}")
        return self


class Train(Section):
    """How models are trained: the final one, the warm-up, the bake-off's arms and the experts alike."""

    adapter: Literal["lora", "none"] = Field(
        "lora", description="lora: PEFT adapter on the decoder. none: all weights."
    )
    rank: Count = Field(16, description="LoRA rank; alpha is twice the rank.")
    learning_rate: Positive = 2e-5
    batch_size: Count = Field(128, description="Samples per optimiser step.")
    micro_batch_size: Count | None = Field(
        None, description="Samples per forward pass; default: at most 16, which leaves little padding."
    )
    protocol: Literal["fixed_compute", "fixed_epochs"] = Field(
        "fixed_compute",
        description="fixed_compute: `samples` samples whatever was kept. fixed_epochs: `epochs` passes.",
    )
    samples: Count = Field(100_000, description="Samples seen under fixed_compute; small selections are repeated.")
    epochs: Positive = Field(1.0, description="Passes over what was kept under fixed_epochs.")
    warmup_ratio: Share = 0.1
    weight_decay: NotNegative = 0.0
    freeze_vision: bool = Field(True, description="Leave the vision tower as it is.")
    max_tokens: Count = Field(4096, description="Longer samples are rejected, never cut.")
    gradient_checkpointing: bool = False
    precision: Precision = Field("float32", description="bfloat16: autocast; weights stay float32.")
    report_to: Annotated[tuple[str, ...], Listed] = Field(
        (), description="Trackers of transformers' Trainer: wandb, trackio, tensorboard ..."
    )
    seed: Seed = 0


class DomainGroup(Section):
    """Domains whose shares are limited together."""

    domains: Annotated[tuple[Name, ...], Listed, Field(min_length=1)]
    min_share: Share = 0.0
    max_share: Share = 1.0


class Mixture(Section):
    """What share of training each domain gets (DESIGN 2.2): one expert a domain, merged models searched, few runs."""

    objective: Literal["mean", "weighted", "worst", "pareto"] = Field(
        "mean",
        description="Over targets. weighted: by their weights. worst: the lowest. pareto: weighted, with the front.",
    )
    metric: Literal["probability", "loss", "target"] = Field(
        "probability",
        description="What is searched on. probability: of the targets' right answers (the loss, of a target whose "
        "metric that is). loss: of the answers. target: each target's own metric, by writing answers.",
    )
    evaluations: Literal["auto"] | Count = Field(
        "auto", description="Merged models evaluated by the metric; auto: by the number of domains."
    )
    verify_runs: Annotated[int, Field(ge=0)] = Field(
        3, description="Mixtures really trained, to calibrate the search and to choose; half of the target items judge."
    )
    confirm_runs: Annotated[int, Field(ge=0)] = Field(
        2, description="Further trainings of the pick and of uniform shares each, which the verdict rests on."
    )
    guard_rails: dict[Name, NotNegative] = Field(
        default_factory=dict, description="How far a target may fall below the base, in its metric's unit."
    )
    groups: dict[Name, DomainGroup] = Field(default_factory=dict, description="Limits on sums of shares.")
    data: Literal["selected", "whole"] = Field(
        "selected", description="Train on the selected part of each domain, or on the whole of it."
    )
    buckets: Annotated[int, Field(ge=2, le=4)] | None = Field(
        None,
        description="Split every domain by score into so many buckets and mix buckets instead of domains. The score is "
        "score.method's; of those that race, low loss by neighbours.",
    )
    expert_samples: Count | None = Field(
        None, description="Samples seen by each expert and each verified mixture; default: as the final training."
    )
    checkpoints: Annotated[tuple[Fraction, ...], Listed] = Field(
        (0.25, 0.5), description="Parts of an expert's training after which it is also kept, to show stability."
    )
    confidence: Confidence = Field(0.95, description="Of the gain's interval, by which the verdict is given.")
    seed: Seed = 0


class Evaluate(Section):
    """How answers are generated and judged."""

    batch_size: Count = 32
    max_new_tokens: Count = 64
    confidence: Confidence = 0.95
    resamples: Count = 2000


class Deita(Section):
    """How `score.method: deita` has requests and answers rated: two models, two questions, answered by 1 to 6."""

    complexity_model: str | None = Field(
        None, description="Model that rates requests: a folder or a hub id; default: the proxy as it comes."
    )
    quality_model: str | None = Field(
        None, description="Model that rates answers: a folder or a hub id; default: the proxy as it comes."
    )
    complexity_prompt: str = Field(
        COMPLEXITY_PROMPT, description="What is asked about a request, which takes the place of {request}."
    )
    quality_prompt: str = Field(
        QUALITY_PROMPT, description="What is asked about an answer; {request} comes before {answer}."
    )

    @model_validator(mode="after")
    def _prompts_have_their_places(self) -> "Deita":
        for key, prompt, places in (
            ("complexity_prompt", self.complexity_prompt, ["{request}"]),
            ("quality_prompt", self.quality_prompt, ["{request}", "{answer}"]),
        ):
            if (found := re.findall(r"\{(?:request|answer)\}", prompt)) != places:
                raise ValueError(f"{key} must hold {' and then '.join(places)} once, found {' '.join(found) or 'none'}")
        return self


class Export(Section):
    """For which trainers `export` writes, and how it tells them the shares. Changes no result of any other stage."""

    formats: Annotated[tuple[ExportFormat, ...], Listed, Field(min_length=1)] = Field(
        ("rows",),
        description="rows: the user's own, byte for byte. Others: a folder that the trainer is launched from.",
    )
    weights: Literal["exact", "native"] = Field(
        "exact",
        description="exact: every row as often as it is trained on. native: every row once, shares in the trainer's "
        "own syntax, whose counts may drift.",
    )


class Prices(Section):
    """What a million tokens cost, in any currency."""

    prompt: NotNegative
    completion: NotNegative


class Judge(Section):
    """Who judges where `score.method` or `select.bakeoff_arms` says judge: a model behind an HTTP address."""

    url: str = Field(description="Where the API begins, such as http://localhost:8000/v1; redirects are not followed.")
    model: str = Field(description="Name of the model, as the server knows it.")
    api_key_env: str | None = Field(None, description="Name of the environment variable that holds the key.")
    mode: Literal["json", "logprobs", "systemone"] = Field(
        "json",
        description="json: one written score. logprobs: the expected digit, where the server tells probabilities. "
        "systemone: probabilities of the levels from `transformers serve`.",
    )
    rubric: str = Field(JUDGE_RUBRIC, description="What is judged, in words to the judge.")
    levels: Annotated[tuple[str, ...], Listed, Field(min_length=2, max_length=9)] = Field(
        JUDGE_LEVELS, description="What each score means, the lowest first; scores go from 1 to their number."
    )
    structured: bool = Field(True, description="Ask for JSON by a schema; false for servers that refuse to be asked.")
    parameters: dict[str, bool | int | float | str] = Field(
        {"temperature": 0, "max_tokens": 64}, description="Further keys of the request, as they are."
    )
    top_logprobs: Annotated[int, Field(ge=1, le=20)] = Field(10, description="Alternatives asked for by logprobs.")
    image_side: Count = Field(1024, description="Pixels; larger pictures are scaled down to this before they are sent.")
    tries: Count = Field(2, description="Replies asked for until one holds a verdict; all of them are paid.")
    max_concurrency: Count = Field(8, description="Requests under way at once.")
    retries: Annotated[int, Field(ge=0)] = Field(5, description="Repetitions of a request that failed on its way.")
    retry_seconds: Positive = Field(1.0, description="Pause before the first repetition; doubles, with jitter.")
    timeout_seconds: Positive = Field(120.0, description="Limit of one try, from connecting to the last byte.")
    deadline_seconds: Positive = Field(600.0, description="Limit of a request with all its repetitions and pauses.")
    breaker_failures: Count = Field(20, description="Failures in a row, of all requests, after which the run stops.")
    prices: Prices | None = Field(None, description="Per million tokens, for the account of costs.")
    cache: str | None = Field(
        None, description="File that keeps the answers, for several runs; default: judge.sqlite in the run folder."
    )

    @field_validator("url")
    @classmethod
    def _is_plain_address(cls, url: str) -> str:
        parts = urlsplit(url)  # the message never shows the value: it may hold a password
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable():
            raise ValueError("must be an address such as https://host/v1 or http://localhost:8000/v1")
        if parts.port == 0 or parts.username or parts.password or parts.query or parts.fragment or " " in url:
            raise ValueError("must have no user, password, query or fragment; a key goes into judge.api_key_env")
        return url

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            raise ValueError("must be the name of an environment variable, such as JUDGE_API_KEY, never the key itself")
        return name

    @field_validator("parameters")
    @classmethod
    def _leaves_our_keys(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(parameters.keys() & JUDGE_OWN_KEYS):
            raise ValueError(f"{', '.join(own)} cannot be set here")
        return parameters


class Leakage(Section):
    """What happens when a target or evaluation item is also in the pool."""

    on_leak: Literal["error", "drop", "allow"] = Field(
        "error", description="error: refuse. drop: reject the pool's copy. allow: only report."
    )
    image_distance: Annotated[int, Field(ge=0, le=64)] = Field(
        12, description="Bits of 256 in which the perceptual hashes of near-identical pictures may differ."
    )


class Ray(Section):
    """The cluster that `engine: ray` works on."""

    address: str | None = Field(
        None, description="Of a running cluster, `auto` on one of its machines; default: one on this machine."
    )
    num_workers: Count | None = Field(
        None, description="Models loaded and at work at once; default: as many as the cluster has room for."
    )
    cpus_per_worker: Count = 1
    gpus_per_worker: NotNegative = Field(0.0, description="GPUs of one worker; 0.5 lets two share one.")


class Recipe(Section):
    """Everything a run needs to know."""

    name: Name
    base: str = Field(description="Model to be tuned: a folder, a hub id, or 'tiny' for the embedded model.")
    proxy: str | None = Field(None, description="Model that scores; default: base.")
    data_root: str | None = Field(None, description="Folder that data paths start from; default: the recipe's folder.")
    domains: Annotated[dict[Name, Domain], Field(min_length=1)]
    targets: Annotated[dict[Name, Target], Field(min_length=1)]
    evaluation: dict[Name, Target] = Field(default_factory=dict, description="Held-out sets; never searched on.")
    score: Score = Score()
    select: Select = Select()
    train: Train = Train()
    mixture: Mixture | None = Field(
        None, description="Search the domains' shares; `mixture: {}` does so with all defaults. Absent: as they come."
    )
    evaluate: Evaluate = Evaluate()
    deita: Deita = Deita()
    export: Export = Export()

    judge: Judge | None = Field(None, description="The judge that score.method or select.bakeoff_arms asks for.")
    leakage: Leakage = Leakage()
    max_rejected_fraction: Share = Field(0.01, description="A file of which more is rejected stops the run.")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["local", "ray"] = Field("local", description="Who does the work; does not change the results.")
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _distinct_sets(self) -> "Recipe":
        if both := sorted(self.targets.keys() & self.evaluation.keys()):
            raise ValueError(f"targets and evaluation both have the name {both[0]}; metrics are reported by name")
        return self

    @model_validator(mode="after")
    def _mixture_names_what_is_there(self) -> "Recipe":
        if self.mixture is None:
            return self
        for target in sorted(self.mixture.guard_rails.keys() - self.targets.keys()):
            raise ValueError(f"mixture.guard_rails names {target}, which is no target: {', '.join(self.targets)}")
        for name, group in self.mixture.groups.items():
            for domain in sorted(set(group.domains) - self.domains.keys()):
                raise ValueError(f"mixture.groups.{name} names {domain}, which is no domain: {', '.join(self.domains)}")
        if len(self.domains) == 1 and self.mixture.buckets is None:
            raise ValueError("mixture needs at least two domains, or mixture.buckets to split the only one by score")
        return self

    @model_validator(mode="after")
    def _judge_is_named(self) -> "Recipe":
        asked = self.select.bakeoff_arms if self.score.method == "auto" else (self.score.method,)
        if "judge" in asked and self.judge is None:
            raise ValueError("score.method or select.bakeoff_arms asks for a judge; add judge: {url: ..., model: ...}")
        return self

    @property
    def proxy_model(self) -> str:
        """The model that scores, `base` where the recipe names no other."""
        return self.proxy or self.base

    @property
    def is_raced(self) -> bool:
        """Whether a bake-off decides by which score, or how much, to select: there is more than one way to do it."""
        scorers = len(self.select.bakeoff_arms) if self.score.method == "auto" else 1
        shares = len(self.select.bakeoff_fractions) if self.select.keep_fraction == "auto" else 1
        return scorers * shares > 1

    @property
    def scoring_step(self) -> StepSize | float:
        """`score.step`, or what `auto` means here: which step does best depends on whether its score is alone."""
        if self.score.step != "auto":
            return self.score.step
        is_alone = self.score.method != "auto" or len(self.select.bakeoff_arms) == 1
        return "batch_share" if is_alone else "visible_effect"

    def dump(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain data that `load_recipe` reads back to an equal object."""
        return self.model_dump(mode="json")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, or in the run folder `path`, with `--set` overrides such as `score.method=tail` applied.

    Raises RecipeError with one line for each faulty key.
    """
    data, where = read_recipe(path, overrides)
    mixture = data.get("mixture")
    if isinstance(mixture, dict) and mixture.get("metric") == "told":
        raise RecipeError(f"{where}: mixture.metric is told, so its numbers come from you: `datalloy ask` and `tell`")
    path = Path(path)
    return _resolve(data, folder=path if path.is_dir() else path.parent, where=where)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """A recipe as plain data, unchecked, with overrides applied; and its name for messages. Raises RecipeError."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.yaml"
    try:
        text = read_regular(path, max_bytes=MAX_RECIPE_BYTES).decode()
    except NotRegularError as error:
        raise RecipeError(f"the recipe {path} {error}") from None
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe {path}: {error.strerror}; `datalloy init` writes one to start from"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    _refuse_secrets(text, str(path))
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        found = "empty" if data is None else _shown(data)
        raise RecipeError(f"{path} is {found}, must be a mapping of keys to values; `datalloy init` writes one")
    for override in overrides:
        _refuse_secrets(override, "--set")
        data = _override(data, override)
    return data, " --set ".join([str(path), *overrides])


def _refuse_secrets(text: str, where: str) -> None:
    """A recipe is copied into run folders, fingerprints and reports, so it is no place for a key."""
    for number, line in enumerate(text.splitlines(), start=1):
        if holds_secret(line):
            raise RecipeError(
                f"{where}:{number}: this looks like a key or a password; a recipe is copied into every run folder, "
                "so take it out, make it invalid where it came from, and keep keys in environment variables"
            )


def _override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """The data with one dotted key, `key.sub=value`, set; the value is read as YAML."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(f"--set takes KEY=VALUE with a dotted key such as score.method=tail, found {override!r}")
    return _with_key(data, dotted.split("."), parse_yaml(text, f"--set {override}"), override)


def _with_key(data: Any, keys: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    key, *inner = keys
    section = {} if data is None else data
    if not isinstance(section, dict):
        raise RecipeError(
            f"--set {override}: {key} would be a key of {_shown(section)}, which is a value, not a section"
        )
    return {**section, key: _with_key(section.get(key), inner, value, override) if inner else value}


def _resolve(data: dict[str, Any], *, folder: Path, where: str) -> Recipe:
    """A Recipe from plain data: checked, with all paths made absolute from `folder`."""
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError(explain(error, where, Recipe)) from None
    data_root = _absolute(recipe.data_root or ".", folder)

    return recipe.model_copy(
        update={
            "base": _model_path(recipe.base, folder),
            "proxy": recipe.proxy and _model_path(recipe.proxy, folder),
            "deita": _resolve_models(recipe.deita, folder),
            "judge": recipe.judge and _resolve_cache(recipe.judge, folder),
            "data_root": data_root,
            "domains": _resolve_sources(recipe.domains, data_root),
            "targets": _resolve_sources(recipe.targets, data_root),
            "evaluation": _resolve_sources(recipe.evaluation, data_root),
        }
    )


def _resolve_models(deita: Deita, folder: Path) -> Deita:
    paths = {key: getattr(deita, key) for key in DEITA_MODELS}
    return deita.model_copy(update={key: path and _model_path(path, folder) for key, path in paths.items()})


def _resolve_cache(judge: Judge, folder: Path) -> Judge:
    return judge.model_copy(update={"cache": judge.cache and _absolute(judge.cache, folder)})


def _resolve_sources(sources: Mapping[str, DataSource], data_root: str) -> dict[str, DataSource]:
    return {
        name: source.model_copy(
            update={
                "path": source.path if source.path.startswith(HUB) else _absolute(source.path, data_root),
                "media_root": source.media_root and _absolute(source.media_root, data_root),
            }
        )
        for name, source in sources.items()
    }


def _absolute(path: str, folder: str | Path) -> str:
    return str((folder / Path(path).expanduser()).absolute())


def _model_path(model: str, folder: Path) -> str:
    """A folder as an absolute path; "tiny" and hub ids as they are."""
    path = _absolute(model, folder)
    return path if model != "tiny" and Path(path).is_dir() else model


# --- what a fault is called: the JSON schema of the recipe says what is allowed where --------------------------------


def explain(error: pydantic.ValidationError, where: str, model: type[BaseModel]) -> str:
    """One line for each faulty key: which, what was found, what is allowed, what to do."""
    root = model.model_json_schema()
    lines = (f"{where}: {_fault(problem, root)}" for problem in error.errors())
    return "\n".join(dict.fromkeys(lines))  # each member of a union is a problem of its own, and the line the same


def _fault(problem: Any, root: dict[str, Any]) -> str:
    keys, schema = _schema_at(problem["loc"], root)
    key, found = ".".join(map(str, keys)), problem["input"]
    match problem["type"], problem["loc"][-1:]:
        case "extra_forbidden", (unknown,):
            valid = list(schema["properties"])
            near = difflib.get_close_matches(str(unknown), valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
            return f"unknown key {'.'.join(map(str, problem['loc']))}; {hint}"
        case "missing", _:
            return f"{key} is missing; it has no default"
        case "value_error", _:
            return f"{key or 'the recipe'}: {problem['ctx']['error']}"
        case _, ("[key]",):
            *section, name = keys
            return f"{'.'.join(map(str, section))} has the name {_shown(name)}, must be {NAME_RULE}"
    return f"{key} is {_shown(found)}, must be {_allowed(schema)}{_percent_hint(found, schema)}"


def _schema_at(loc: Sequence[str | int], root: dict[str, Any]) -> tuple[list[str | int], dict[str, Any]]:
    """The keys in a pydantic location, without the names of union members behind them, and the JSON schema there."""
    schema = root
    keys: list[str | int] = []
    for part in loc:
        if isinstance(part, int):
            inner = schema.get("items")
        else:
            any_name = next(iter(schema.get("patternProperties", {}).values()), None)
            inner = schema.get("properties", {}).get(part, any_name)
        if inner is None:
            break
        named = next((member for member in (inner, *inner.get("anyOf", ())) if "$ref" in member), None)
        schema = root["$defs"][named["$ref"].removeprefix("#/$defs/")] if named else inner
        keys.append(part)
    return keys, schema


def _allowed(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    match schema:
        case {"anyOf": members}:
            return " or ".join(_allowed(member) for member in members)
        case {"const": value}:
            return value
        case {"enum": values}:
            return f"one of {', '.join(values)}"
        case {"type": "array", "items": item}:
            return f"a list{' that is not empty' if 'minItems' in schema else ''}, each {_allowed(item)}"
        case {"type": "object"}:
            return f"a mapping of keys to values{', not empty' if 'minProperties' in schema else ''}"
        case {"pattern": _}:
            return NAME_RULE
    return TYPE_WORDS[schema["type"]] + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    low, high = (
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum", schema.get("exclusiveMaximum")),
    )
    if low is None:
        return ""
    if high is None:
        return f" of at least {low}" if "minimum" in schema else f" above {low}"
    return f" in {'[' if 'minimum' in schema else '('}{low}, {high}{']' if 'maximum' in schema else ')'}"


def _percent_hint(found: Any, schema: dict[str, Any]) -> str:
    highest = {member.get("maximum", member.get("exclusiveMaximum")) for member in schema.get("anyOf", [schema])}
    is_percent = isinstance(found, int | float) and 1 < found <= 100 and 1 in highest
    return f"; for {found:g} % write {found / 100:g}" if is_percent else ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_LENGTH else text[:SHOWN_LENGTH] + " ..."

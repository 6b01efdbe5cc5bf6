"""The recipe: a YAML file in, one strict frozen object out.

Every key of a recipe is a field here with its default, its unit and its range; an unknown or misspelt key is an
error that names the nearest valid one, and a value of the wrong type is refused, never converted. Paths in a
recipe are relative to the recipe's folder. `base: tiny` is the embedded model.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from datalloy.errors import RecipeError

Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]

Format = Literal["auto", "messages", "sharegpt", "llava", "parquet"]
Metric = Literal["exact_match", "relaxed_accuracy", "option_letter", "anls", "loss"]
ScorerName = Literal[
    "exact", "tail", "first_order", "first_order_hooks", "calibrated", "random", "low_loss", "mid_loss", "high_loss", "length"
]


class Section(BaseModel):
    """Base of all parts of a recipe: no unknown keys, no change after loading, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataSource(Section):
    """A dataset file: where it is and how to read it."""

    path: str = Field(description="JSONL, JSON or Parquet file, relative to data_root.")
    format: Format = Field("auto", description="How the file is laid out; auto looks at its first records.")
    media_root: str | None = Field(None, description="Folder that image paths start from; default: the file's folder.")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="Pass over the first so many samples.")
    limit: Count | None = Field(None, description="Use only so many samples.")


class Domain(DataSource):
    """A named dataset of the pool."""

    max_epochs: Positive | None = Field(None, description="A mixture repeats no sample of this domain more often.")


class Target(DataSource):
    """A named validation set with the metric the user wants to get better."""

    metric: Metric = "exact_match"
    weight: Positive = Field(1.0, description="Share of this target in the utility, relative to the other targets.")


class Score(Section):
    """How every sample of the pool gets its utility (DESIGN 2.1)."""

    method: Literal["auto"] | ScorerName = Field("auto", description="auto: the bake-off decides between scorers.")
    step: Literal["auto"] | Positive = Field(
        "auto", description="Step size of the simulated step; auto scans step sizes on probes and applies a rule."
    )
    step_rule: Literal["sgd", "unit_norm", "adamw"] = Field(
        "sgd", description="sgd: -step*g. unit_norm: -step*g/|g|. adamw: -step*g/sqrt(v), v measured once on the pool."
    )
    scope: Literal["full", "decoder"] = Field("full", description="Parameters the step touches: all, or the decoder.")
    tail_layers: Count = Field(1, description="Decoder layers the tail step touches.")
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="Share of the pool the proxy is tuned on before it scores (OST: 5 % is the best setting)."
    )
    target_items: Count = Field(100, description="At most so many items of each target enter the utility.")
    probes: Count = Field(96, description="Samples scored exactly, to choose the step and to fit and check cheap scores.")
    min_agreement: Fraction = Field(
        0.6, description="calibrated refuses when its held-out Spearman with exact on the probes is lower."
    )
    length_normalised: bool = Field(False, description="Rank within strata of answer length instead of across them.")
    contributions: bool = Field(False, description="Also store the utility for every single target item.")
    batch_size: Count = Field(16, description="Samples per forward pass; does not change the results.")
    seed: int = 0


class Select(Section):
    """Which samples are kept."""

    keep_fraction: Literal["auto"] | Fraction = Field("auto", description="Share kept; auto: the bake-off decides.")
    within: Literal["domain", "global"] = Field("domain", description="Rank inside each domain, or the whole pool at once.")
    budget_samples: Count | None = Field(None, description="Keep at most so many samples.")
    budget_tokens: Count | None = Field(None, description="Keep at most so many tokens, by utility per token.")
    budget_flops: Positive | None = Field(None, description="Keep at most so many training FLOPs, by utility per FLOP.")
    drop_toxic: bool = Field(True, description="Drop samples whose utility is below zero beyond its interval.")
    toxic_confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="One-sided confidence of 'below zero'.")
    bakeoff_epochs: Positive = Field(4.0, description="The bake-off trains for at most so many epochs of the pool in all.")
    bakeoff_arms: tuple[ScorerName, ...] = Field(
        ("tail", "low_loss"), description="Scorers that the bake-off tries, beside random and the full pool."
    )
    bakeoff_fractions: tuple[Fraction, ...] = (0.3, 0.5, 0.7)
    seed: int = 0

    @model_validator(mode="after")
    def _one_budget(self) -> "Select":
        given = [name for name in ("budget_samples", "budget_tokens", "budget_flops") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"one budget at most can be given, found {' and '.join(given)}")
        return self


class Train(Section):
    """How models are trained: the final one, the warm-up, the bake-off's arms and the experts alike."""

    adapter: Literal["lora", "none"] = Field("lora", description="lora: PEFT adapter on the decoder. none: all weights.")
    rank: Count = Field(16, description="LoRA rank; alpha is twice the rank.")
    learning_rate: Positive = 2e-5
    batch_size: Count = Field(128, description="Samples per optimiser step.")
    micro_batch_size: Count | None = Field(None, description="Samples per forward pass; default: the whole batch.")
    protocol: Literal["fixed_compute", "fixed_epochs"] = Field(
        "fixed_compute", description="fixed_compute: `samples` samples whatever was kept. fixed_epochs: `epochs` passes."
    )
    samples: Count = Field(100_000, description="Samples seen under fixed_compute; small selections are repeated.")
    epochs: Positive = Field(1.0, description="Passes over what was kept under fixed_epochs.")
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Weight = 0.0
    freeze_vision: bool = Field(True, description="Leave the vision tower as it is.")
    max_tokens: Count = Field(4096, description="Longer samples are rejected, never cut.")
    gradient_checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast; weights stay float32.")
    report_to: tuple[str, ...] = Field((), description="Trackers of transformers' Trainer: wandb, trackio, tensorboard ...")
    seed: int = 0


class Evaluate(Section):
    """How answers are generated and judged."""

    batch_size: Count = 32
    max_new_tokens: Count = 64
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Count = 2000


class Leakage(Section):
    """What happens when a target or evaluation item is also in the pool."""

    on_leak: Literal["error", "drop", "allow"] = Field(
        "error", description="error: refuse. drop: reject the pool's copy. allow: only report."
    )
    image_distance: Annotated[int, Field(ge=0, le=64)] = Field(
        4, description="Bits of 256 in which the perceptual hashes of near-identical pictures may differ."
    )


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
    evaluate: Evaluate = Evaluate()
    leakage: Leakage = Leakage()
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="A file of which more is rejected stops the run."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["local"] = "local"

    @property
    def proxy_model(self) -> str:
        return self.proxy or self.base

    def dump(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain data that `load_recipe` reads back to an equal object."""
        return json.loads(self.model_dump_json())


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases, and reads `1e-5` as a number as YAML 1.2 does."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not accepted", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data from YAML. Raises RecipeError with file and line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path` with `--set` overrides such as `score.method=tail` applied. Raises RecipeError."""
    path = Path(path)
    if path.is_dir() and (path / "config.yaml").exists():
        path = path / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}. `datalloy init` writes one to start from") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds {type(data).__name__}, a recipe is a mapping of keys to values")
    for override in overrides:
        apply_override(data, override)
    return resolve_recipe(data, folder=path.parent, where=str(path))


def apply_override(data: dict, override: str) -> None:
    """Set one dotted key, `key.sub=value`, in plain recipe data; the value is read as YAML."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set takes key.sub=value, found {override!r}")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {parent} is a value, not a section")
    node[last] = parse_yaml(value, f"--set {key}")


def resolve_recipe(data: dict, *, folder: Path, where: str) -> Recipe:
    """A Recipe from plain data: checked, with all paths made absolute from `folder`."""
    try:
        # through JSON, so that lists may stand for tuples while everything else stays strict
        recipe = Recipe.model_validate_json(json.dumps(data, default=str))
    except pydantic.ValidationError as error:
        raise RecipeError("\n".join(_explain(problem, where) for problem in error.errors())) from None
    data_root = folder / Path(recipe.data_root).expanduser() if recipe.data_root else folder
    updates: dict[str, Any] = {"data_root": str(data_root.absolute())}
    for section in ("domains", "targets", "evaluation"):
        updates[section] = {
            name: source.model_copy(
                update={
                    "path": _absolute(source.path, data_root),
                    "media_root": source.media_root and _absolute(source.media_root, data_root),
                }
            )
            for name, source in getattr(recipe, section).items()
        }
    for key in ("base", "proxy"):
        value = getattr(recipe, key)
        if value and value != "tiny" and (folder / value).expanduser().is_dir():
            updates[key] = _absolute(value, folder)
    return recipe.model_copy(update=updates)


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).absolute())


def _explain(problem: Any, where: str) -> str:
    """One pydantic problem in our words: which key, what was found, what is allowed, what to do."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; valid keys: {', '.join(valid)}"
        return f"{where}: unknown key {key}{hint}"
    if problem["type"] == "missing":
        return f"{where}: {key} is missing; every recipe needs it"
    found = json.dumps(problem.get("input"), default=str)[:80]
    return f"{where}: {key} is {found}: {problem['msg']}"


def _valid_keys(loc: tuple) -> list[str]:
    model: Any = Recipe
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
            while not isinstance(model, type) and (inner := getattr(model, "__args__", None)):
                model = inner[-1]
                if getattr(model, "__metadata__", None):
                    model = model.__origin__
        elif isinstance(model, type) and issubclass(model, BaseModel):
            return []
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def dump_yaml(data: dict) -> str:
    """Plain data as YAML in the order given."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)

"""A recipe of names and wishes in, one strict frozen object out: what ask and tell know where there is no model.

    name: chart-math
    domains:
      chart: {samples: 12000, max_epochs: 2}
      table: {samples: 30000}
    targets:
      chartqa: {metric: relaxed_overall}
      mathvista: {}
    samples: 100000
    mixture: {metric: told}

The keys are those of any recipe as far as they mean the same; no path, no base and no metric of ours is asked for,
because the numbers come from elsewhere. A recipe with data and a mixture section serves as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field, model_validator

from datalloy.config import (
    Confidence,
    Count,
    DomainGroup,
    Name,
    NotNegative,
    Positive,
    Recipe,
    Section,
    Seed,
    Share,
    explain,
    load_recipe,
    read_recipe,
)
from datalloy.errors import RecipeError
from datalloy.metrics import higher_is_better


class ToldDomain(Section):
    """A domain that is known by its name."""

    samples: Count | None = Field(None, description="How many there are; for max_epochs and shares by size.")
    max_epochs: Positive | None = Field(None, description="A mixture repeats this domain's samples at most so often.")
    min_share: Share = Field(0.0, description="Least share of this domain in a mixture.")


class ToldTarget(Section):
    """What the user's evaluator measures."""

    task: str | None = Field(None, description="Its name in result files of evaluators; default: the target's.")
    metric: str | None = Field(None, description="Its metric there; default: the only one that the file has for it.")
    variant: str | None = Field(None, description="Filter or split there; default: the only one.")
    higher_is_better: bool = Field(True, description="false for a loss or a rate of errors.")
    weight: Positive = Field(1.0, description="Used by the objective weighted, relative to the other targets.")


class ToldMixture(Section):
    """What is wanted of a mixture; see `config.Mixture`, whose keys these are."""

    metric: Literal["told"]
    objective: Literal["mean", "weighted", "worst", "pareto"] = "mean"
    guard_rails: dict[Name, NotNegative] = Field(
        default_factory=dict, description="How far a target may fall below the base, in its own unit."
    )
    groups: dict[Name, DomainGroup] = Field(default_factory=dict, description="Limits on sums of shares.")
    confidence: Confidence = 0.95
    seed: Seed = 0


class ToldRecipe(Section):
    """Domains, targets, limits and a wish."""

    name: Name
    domains: Annotated[dict[Name, ToldDomain], Field(min_length=2)]
    targets: Annotated[dict[Name, ToldTarget], Field(min_length=1)]
    samples: Count | None = Field(None, description="Seen by the final training; for max_epochs and exact counts.")
    mixture: ToldMixture

    @model_validator(mode="after")
    def _names_what_is_there(self) -> "ToldRecipe":
        for target in sorted(self.mixture.guard_rails.keys() - self.targets.keys()):
            raise ValueError(f"mixture.guard_rails names {target}, which is no target: {', '.join(self.targets)}")
        for name, group in self.mixture.groups.items():
            for domain in sorted(set(group.domains) - self.domains.keys()):
                raise ValueError(f"mixture.groups.{name} names {domain}, which is no domain: {', '.join(self.domains)}")
        for name, told in self.domains.items():
            if told.max_epochs is not None and (told.samples is None or self.samples is None):
                raise ValueError(
                    f"domains.{name}.max_epochs needs domains.{name}.samples, how many there are, and samples, how "
                    "many the training sees"
                )
        return self


def load_told(path: str | Path, overrides: Sequence[str] = ()) -> ToldRecipe:
    """The recipe at `path`: one for ask and tell, or what they need of any other that has a mixture section.

    Raises RecipeError with one line for each faulty key.
    """
    data, where = read_recipe(path, overrides)
    mixture = data.get("mixture")
    if not isinstance(mixture, dict) or mixture.get("metric") != "told":
        return _of_recipe(load_recipe(path, overrides), where)
    try:
        return ToldRecipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError(explain(error, where, ToldRecipe)) from None


def _of_recipe(recipe: Recipe, where: str) -> ToldRecipe:
    if recipe.mixture is None:
        raise RecipeError(f"{where} has no mixture section; `mixture: {{metric: told}}` is all that ask and tell need")
    if recipe.mixture.buckets is not None:
        raise RecipeError(f"{where}: mixture.buckets are made in a run; ask and tell know whole domains only")
    from datalloy.readers import read_all

    domains = {
        name: ToldDomain(
            samples=max(1, len(read_all(domain, name)[0])), max_epochs=domain.max_epochs, min_share=domain.min_share
        )
        for name, domain in recipe.domains.items()
    }
    targets = {
        name: ToldTarget(higher_is_better=higher_is_better(target.metric), weight=target.weight)
        for name, target in recipe.targets.items()
    }
    same = recipe.mixture.model_dump(include={"objective", "guard_rails", "confidence", "seed"})
    return ToldRecipe(
        name=recipe.name,
        domains=domains,
        targets=targets,
        samples=recipe.train.samples,
        mixture=ToldMixture(metric="told", groups=recipe.mixture.groups, **same),
    )

"""`recover-lora plan --law`: the corpus that a study's scaling law asks for, in place of the recipe's."""

from __future__ import annotations

import math
from pathlib import Path

from eval.evidence import parameters_of
from eval.law import Law
from launch.cluster import Cluster
from launch.planner import task_of
from launch.recipe import Recipe
from launch.resolve import resolve_names
from recovery.errors import UserError
from recovery.files import HashMemory, read_json


def read_law(path: Path, series: str | None) -> tuple[str, Law]:
    """One series of a study's laws.json. Raises UserError where there is none, or several and none is named."""
    content = read_json(path)
    try:
        laws = {str(name): Law.from_json(law) for name, law in content["series"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), "not the laws of a study", "give <runs-dir>/<study>/laws.json") from error
    if series is None and len(laws) == 1:
        return next(iter(laws.items()))
    if series is None or series not in laws:
        names = ", ".join(laws) or "none: too few points"
        raise UserError("--series", series or "not given", f"the study's series are {names}")
    return series, laws[series]


def sized_by_law(
    recipe: Recipe, cluster: Cluster, path: Path, series: str | None, target: float, nodes: int | None
) -> tuple[Recipe, str]:
    """The recipe with as many samples as reach the target, and how far that is to be trusted.

    target: share of the KL to recover. Raises UserError where the law names no budget.
    """
    name, law = read_law(path, series)
    size = float(parameters_of(resolve_names(recipe, HashMemory(None)).reference))
    at = {"parameters": law.measured["parameters"][1], "model_parameters": size}
    budget = law.tokens_for(target, at)
    if budget is None:
        raise UserError(
            f"--target {target:g}",
            f"series {name} says of no number of tokens that it reaches that",
            "ask for less, or measure more sizes",
        )
    per_sample = task_of(recipe, cluster, nodes, None).tokens / recipe.generate.samples
    samples = math.ceil(budget.tokens / max(recipe.train.epochs, 1) / per_sample)
    ends = " to ".join("more than can be named" if end is None else f"{end:,.0f}" for end in (budget.low, budget.high))
    claim = (
        f"law of {path}, series {name}: {100 * target:g} % of the KL at {budget.tokens:,.0f} trained tokens ({ends}), "
        f"so generate.samples={samples}; predicted"
    )
    lines = [claim]
    if budget.beyond > 1:
        lines.append(
            f"NOTE  that is {budget.beyond:.1f} times the most that was measured, and a power law has no floor"
        )
    low, high = law.measured["model_parameters"]
    if not low / 1.01 <= size <= high * 1.01:
        known = "by its law" if "model_parameters" in law.names else "without one: size was not varied"
        lines.append(f"NOTE  this model has {size:,.0f} parameters, measured were {low:,.0f} to {high:,.0f}; {known}")
    sized = recipe.generate.model_copy(update={"samples": samples})
    return recipe.model_copy(update={"generate": sized}), "\n".join(lines)

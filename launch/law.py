"""`recover-lora plan --law`: the corpus that a study's scaling law asks for, in place of the recipe's."""

from __future__ import annotations

import math
from pathlib import Path

from eval.evidence import parameters_of
from eval.law import DISTINCT, QUANTITIES, Law, rounded
from launch.recipe import Recipe
from launch.resolve import resolve_names
from recovery.errors import UserError
from recovery.files import HashMemory, read_json
from recovery.placement import check_adapter, matrices, parameter_budget, rank_parameters, skeleton


def read_law(path: Path, series: str | None) -> tuple[str, Law, float]:
    """One series of a study's laws.json, with the tokens of a sample behind it.

    Raises UserError where there is none, or several and none is named.
    """
    content = read_json(path)
    try:
        laws = {
            str(name): (Law.from_json(law), float(law["tokens_per_sample"])) for name, law in content["series"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), "not the laws of a study", "give <runs-dir>/<study>/laws.json") from error
    if series is None and len(laws) == 1:
        series = next(iter(laws))
    if series is None or series not in laws:
        names = ", ".join(laws) or "none: too few points"
        raise UserError("--series", series or "not given", f"the study's series are {names}")
    return series, *laws[series]


def adapter_parameters(recipe: Recipe) -> int:
    """Of the recipe's adapter, from the models' configs alone."""
    student = resolve_names(recipe, HashMemory(None))
    given = student.degraded or student.reference
    model = skeleton(given.path, given.revision)
    if recipe.adapter.placement == "auto":
        return parameter_budget(model, recipe.adapter)
    weights = matrices(model, head=True)
    prices = [rank_parameters(weights[name]) for name in check_adapter(model, recipe.adapter)]
    return recipe.adapter.rank * sum(prices)


def corpus_tokens(recipe: Recipe, counted: float) -> float:
    """Tokens of the corpus of which so many are counted: all epochs, and what a closed form looks at before them, which
    is no more in a larger corpus."""
    adapter, epochs = recipe.adapter, recipe.train.epochs
    # Its fit, and the pass of the gradients over the same text.
    looks = 1 + adapter.curvature if adapter.init.startswith("closed_form") else 0
    whole = counted / (epochs + looks)
    return whole if whole <= adapter.calibration_tokens else (counted - looks * adapter.calibration_tokens) / epochs


def sized_by_law(recipe: Recipe, path: Path, series: str | None, target: float) -> tuple[Recipe, str]:
    """The recipe with as many samples as reach the target, and how far that is to be trusted.

    target: share of the KL to recover. Raises UserError where the law names no budget.
    """
    if not recipe.train.epochs:
        raise UserError("train.epochs", "0: nothing is learned, and a law is one of tokens learned from", "set epochs")
    name, law, per_sample = read_law(path, series)
    size = float(parameters_of(resolve_names(recipe, HashMemory(None)).reference))
    at = {"parameters": float(adapter_parameters(recipe)), "model_parameters": size}
    budget = law.tokens_for(target, at)
    if budget is None or budget.tokens is None:
        why = "tokens do not measurably help" if budget is None else f"it takes {rounded(None)} tokens"
        raise UserError(f"--target {target:g}", f"by series {name} {why}", "ask for less, or measure more sizes")
    per_sample = min(per_sample, recipe.generate.max_length)
    samples = math.ceil(corpus_tokens(recipe, budget.tokens) / per_sample)
    claim = (
        f"law of {path}, series {name}: {100 * target:g} % of the KL at {rounded(budget.tokens)} trained tokens "
        f"({rounded(budget.low)} to {rounded(budget.high)}), so generate.samples={samples} of {per_sample:,.0f} tokens "
        "each, as measured; predicted"
    )
    many = budget.tokens > law.measured["tokens"][1]
    notes = {
        "tokens": "a power law has no floor" if many else "fewer than were measured",
        "model_parameters": _known(law, "model_parameters"),
        "parameters": "it grew with the models' size" if law.adapter_grows else _known(law, "parameters"),
    }
    found = {**at, "tokens": budget.tokens}
    lines = [claim]
    for quantity in law.beyond(found):
        low, high = law.measured[quantity]
        lines.append(
            f"NOTE  {QUANTITIES[quantity]}: {found[quantity]:,.0f} is beyond what was measured, {low:,.0f} to "
            f"{high:,.0f}; {notes[quantity]}"
        )
    sized = recipe.generate.model_copy(update={"samples": samples})
    return recipe.model_copy(update={"generate": sized}), "\n".join(lines)


def _known(law: Law, quantity: str) -> str:
    if quantity not in law.names:
        return "the law does not know it: it was not varied"
    if law.values[quantity] < DISTINCT:
        return "by two measured values alone"
    return "by its exponent" if law.is_sure(quantity) else "its exponent is not told from zero"

"""What a study has come to so far: `results.html`, `.md`, `.json` and `.png`, laws, and forecasts to compare with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.markdown import again
from eval.matrix import markdown, plot_recoveries, result_of
from eval.page import html_page
from eval.scaling import laws_file, plot_plane, plot_scaling, scaling_text, series_of
from launch.execution import Plan
from launch.outcomes import alone
from launch.study import Point, Study, state_of
from recovery.artifacts import CLUSTER
from recovery.config import ModelInput
from recovery.errors import UserError, first_line
from recovery.files import read_json, read_notes, write_atomic, write_json

if TYPE_CHECKING:
    from recovery.costs import Places

log = logging.getLogger("recover-lora")
FORECASTS, LAWS = "forecasts.json", "laws.json"
FORECAST_TOKENS = 4096
FORECAST_VERSION = 3
"""Of the way in which forecasts are made; others are made anew."""
CLOSE = 0.15
"""Of a forecast: the largest difference of predicted and realised KL recovery that is called right."""


def write_report(
    study: Study, points: Sequence[Point], plans: Mapping[str, Plan], failures: Mapping[str, str], folder: Path
) -> None:
    """plans: by the points' names. failures: why points have no result, by name."""
    forecasts = read_notes(folder / FORECASTS)
    rows: list[dict[str, Any]] = []
    for point in points:
        plan = plans[point.name]
        summary = plan.stages[-1].job.runtime.output / "summary.json"
        done = summary.exists()
        rows.append(
            {
                "labels": point.labels,
                "result": result_of(read_json(summary)) if done else None,
                "note": "" if done else failures.get(point.name) or str(state_of(plan)),
                "predicted": forecasts.get(forecast_key(plan)) if is_forecast(plan) else None,
            }
        )
    axes = list(study.axes)
    write_json(folder / "results.json", {"study": study.name, "points": rows})
    plot_recoveries(rows, axes, folder / "results.png")
    parts = [f"# {study.name}", "![KL recovered by every point](results.png)", markdown(rows, axes), *agreement(rows)]
    if any(row["result"] is not None for row in rows):
        plot_plane(rows, folder / "plane.png")
        parts.append("![Trainable parameters and data of every point](plane.png)")
    if study.scaling:
        series = series_of(rows, study.scaling)
        plot_scaling(series, folder / "scaling.png")
        parts.append(scaling_text(series))
        write_json(folder / LAWS, {"study": study.name, "series": laws_file(series)})
    text = "\n\n".join(filter(None, [*parts, commands_text(plans)]))
    write_atomic(folder / "results.md", text)
    write_atomic(folder / "results.html", html_page(study.name, text, folder))


def commands_text(plans: Mapping[str, Plan]) -> str:
    """How every point that was begun is made again."""
    lines = [
        f"recover-lora run {again(plan.run_folder, plan.runs_dir)}"
        for plan in plans.values()
        if (plan.run_folder / CLUSTER).exists()
    ]
    return "\n".join(["## Commands", "", "Every point by itself:", "", "```", *lines, "```", ""]) if lines else ""


def agreement(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How often the forecasts came true."""
    both = [
        (row["predicted"], row["result"]["closed_form"])
        for row in rows
        if row["predicted"] is not None and row["result"] is not None
    ]
    if not both:
        return []
    right = sum(abs(predicted - realised) <= CLOSE for predicted, realised in both)
    return [f"Predicted recovery within {CLOSE} of the closed form's, before any training: {right} of {len(both)}."]


def is_forecast(plan: Plan) -> bool:
    """Whether diagnosis makes a forecast for such a recipe: closed forms of a rank on chosen modules."""
    adapter = plan.recipe.adapter
    return adapter.init == "closed_form_sequential" and adapter.placement != "auto"


def forecast_key(plan: Plan) -> str:
    """Of the models' contents, not of their places."""
    adapter = plan.recipe.adapter
    place = adapter.placement if isinstance(adapter.placement, str) else ",".join(adapter.placement)
    return f"{' '.join(models_of(plan))} {place} {adapter.rank} v{FORECAST_VERSION}"


def models_of(plan: Plan) -> tuple[str, str]:
    """What names reference and degraded model by their content."""
    given = plan.names.degraded
    return plan.names.reference.digest, given.digest if given is not None else plan.stages[0].job.artifact_name


def degraded_of(plan: Plan) -> ModelInput:
    """The degraded model: the recipe's, or the one that the first stage makes or has made."""
    made = plan.stages[0].job.runtime.output
    return plan.names.degraded or ModelInput(path=str(made), digest="")


def is_there(plan: Plan) -> bool:
    """Whether the degraded model can be loaded: it is the recipe's own, or was made."""
    return plan.names.degraded is not None or Path(degraded_of(plan).path).exists()


def places_of(plans: Sequence[Plan], bare: Any) -> dict[str, Places]:
    """The modules that get adapters in each of these plans, by its `forecast_key`. bare: their degraded model."""
    from recovery.placement import check_adapter

    places: dict[str, Places] = {}
    for plan in plans:
        try:
            places[forecast_key(plan)] = frozenset(check_adapter(bare, plan.recipe.adapter))
        except UserError as error:
            log.warning("no forecast for %s: %s", plan.recipe.name, error)
    return places


def make_forecasts(plans: Sequence[Plan], folder: Path) -> None:
    """Forecast the KL recovery of the points whose damage is there, as `diagnose` does, once for each damage. What
    cannot be forecast is warned of and left out."""
    from launch.diagnose import weigh_on_text
    from recovery.costs import predict
    from recovery.placement import skeleton

    known = read_notes(folder / FORECASTS)
    wanted: dict[tuple[str, str], list[Plan]] = {}
    for plan in plans:
        if is_forecast(plan) and forecast_key(plan) not in known and is_there(plan):
            wanted.setdefault(models_of(plan), []).append(plan)
    for group in wanted.values():
        degraded = degraded_of(group[0])
        log.info("forecast for %s", degraded.path)
        try:
            places = places_of(group, skeleton(degraded.path, degraded.revision))
            reference, wanted_places = group[0].names.reference, set(places.values())
            weighed = weigh_on_text(reference, degraded, FORECAST_TOKENS, checked=0, places=wanted_places)
        except (UserError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory, for one
            log.warning("no forecast for %s: %s", degraded.path, first_line(error))
            continue
        kl = weighed.costs.degraded.kl
        if not kl > 0:
            log.warning("no forecast for %s: it does as its reference does", degraded.path)
            continue
        for plan in group:
            if place := places.get(forecast_key(plan)):
                ranks = dict.fromkeys(place, plan.recipe.adapter.rank)
                left = predict(weighed.spectra, ranks, kl, weighed.floors.get(place, kl))
                known[forecast_key(plan)] = 1 - left / kl
        with alone(folder):
            write_json(folder / FORECASTS, {**read_notes(folder / FORECASTS), **known})

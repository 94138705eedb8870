"""`recover-lora diagnose --run RECIPE`: what limits a finished recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import Cluster
from launch.recipe import Recipe
from launch.resolve import build_stages, check_models, resolve_names
from recovery.errors import UserError
from recovery.files import HashMemory, read_json, write_json

if TYPE_CHECKING:
    from recovery.limits import Limits

SMALL = 0.1
"""Share of the remaining KL below which a cause is not worth a remedy."""


def explain(recipe: Recipe, cluster: Cluster, runs_dir: Path, folder: Path | None) -> str:
    """What is left of the damage and why; returns what to print. folder: write limits.json there."""
    from recovery.files import held_out_lines
    from recovery.limits import limits_of
    from recovery.models import load_model
    from recovery.texts import read_texts
    from recovery.watch import advice

    names = resolve_names(recipe, HashMemory(runs_dir / ".hashes.json"))
    check_models(recipe, names)
    jobs = {stage.label: stage.job for stage in build_stages(recipe, names, cluster, runs_dir)}
    report = jobs["report"]
    if not report.runtime.output.exists():
        raise UserError(recipe.name, "not finished", f"run it first; there is no {report.runtime.output}")
    if recipe.train.parameters == "all":
        raise UserError("train.parameters", "all: there are no adapters", "explain a recipe that has some")
    maker: Any = jobs.get("train", jobs.get("repair"))
    models = [load_model(given, maker.dtype) for given in (maker.reference, maker.degraded)]
    texts = read_texts(maker)
    found = limits_of(models[0], models[1], maker.runtime.output, texts.train, texts.held_out, texts.width)
    kls = [line["kl"] for line in held_out_lines(maker.runtime.output)]
    summary = read_json(report.runtime.output / "summary.json")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "limits.json", {**asdict(found), "recipe": recipe.name})
    return "\n".join([*render(found), *_trend(advice(kls)), *accuracy_notes(summary)])


def render(found: Limits) -> list[str]:
    left = max(found.recovered, 1e-9)

    def line(what: str, value: float, meaning: str) -> str:
        return f"  {what:<22} {value:9.4f}  {value / left:6.1%}  {meaning}"

    recovery = 1 - found.recovered / found.degraded
    lines = [
        f"held-out KL {found.degraded:.4f} -> {found.recovered:.4f} ({recovery:.1%} recovered)",
        "what is left:",
        line("rank and training", found.rank, "gone if the adapted matrices were the reference's"),
        line("  of it: data", found.data, f"held-out text against learned text ({found.learned:.4f})"),
        line("placement", found.placement, "gone if all other matrices were, too"),
        line("beyond adapters", found.matrices, "norms, embeddings, biases"),
    ]
    causes = {
        "rank and training": found.rank - max(found.data, 0.0),
        "data": found.data,
        "placement": found.placement,
        "beyond adapters": found.matrices,
    }
    remedies = {
        "rank and training": "raise adapter.rank, or train longer (train.epochs) while held-out KL falls",
        "data": "more text: raise generate.samples rather than train.epochs",
        "placement": "damage lies in matrices without an adapter: set adapter.placement: auto",
        "beyond adapters": "write the reference's norms, embeddings and biases into the degraded model",
    }
    order = sorted(causes, key=causes.__getitem__, reverse=True)
    return lines + [f"  - {remedies[name]}" for name in order if causes[name] > SMALL * left]


def _trend(found: str | None) -> Sequence[str]:
    return [] if found is None else [f"  - {found}"]


def accuracy_notes(summary: dict[str, Any]) -> list[str]:
    """Why AR% is negative or cannot be told."""
    notes = []
    silent = [name for name, task in summary["tasks"].items() if not task["ar_percent"]["measurable"]]
    if silent:
        notes.append(
            f"  - AR% says nothing on {', '.join(silent)}: the reference is not above the degraded model by three "
            "standard errors there (more items, or tasks on which the reference is better)"
        )
    negative = {
        name: task["ar_percent"]["value"]
        for name, task in summary["tasks"].items()
        if task["ar_percent"]["measurable"] and task["ar_percent"]["value"] < 0
    }
    if negative:
        kl = summary["kl"]["recovered"]
        worst = ", ".join(f"{name} {value:.0f}%" for name, value in negative.items())
        cause = (
            "accuracy comes back late, below a KL of about 1"
            if kl > 1
            else "the adapter moved answers that noise had left near chance; see the intervals"
        )
        notes.append(f"  - negative AR% ({worst}) at KL {kl:.2f}: {cause}")
    return notes

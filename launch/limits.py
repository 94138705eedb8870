"""`recover-lora diagnose --run RECIPE`: what limits a finished recovery."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.causes import SMALL, causes
from eval.config import ReportJob
from eval.evidence import gather
from launch.cluster import Cluster
from launch.recipe import Recipe
from launch.resolve import check_models, resolve_names
from launch.stages import build_stages
from recovery.errors import UserError
from recovery.files import HashMemory, read_json, write_json
from recovery.limits import Limits, limits_of
from recovery.models import load_model
from recovery.texts import read_texts


def explain(recipe: Recipe, cluster: Cluster, runs_dir: Path, folder: Path | None) -> str:
    """What is left of the damage and why; returns what to print. folder: write limits.json there."""
    names = resolve_names(recipe, HashMemory(runs_dir / ".hashes.json"))
    check_models(recipe, names)
    jobs = {stage.label: stage.job for stage in build_stages(recipe, names, cluster, runs_dir)}
    report = jobs["report"]
    assert isinstance(report, ReportJob)
    if not report.runtime.output.exists():
        raise UserError(recipe.name, "not finished", f"run it first; there is no {report.runtime.output}")
    if recipe.train.parameters == "all":
        raise UserError("train.parameters", "all: there are no adapters", "explain a recipe that has some")
    maker: Any = jobs.get("train", jobs.get("repair"))
    models = [load_model(given, maker.dtype) for given in (maker.reference, maker.degraded)]
    texts = read_texts(maker)
    learned = None if getattr(maker, "labelled", None) is not None else texts.train
    found = limits_of(models[0], models[1], maker.runtime.output, learned, texts.held_out, texts.width)
    told = causes(report, gather(report), read_json(report.runtime.output / "summary.json"))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "limits.json", {**asdict(found), "recipe": recipe.name})
    return "\n".join([*render(found), *(f"  - {one}" for one in told)])


def render(found: Limits) -> list[str]:
    left = max(found.recovered, 1e-9)

    def line(what: str, value: float, meaning: str) -> str:
        return f"  {what:<22} {value:9.4f}  {value / left:6.1%}  {meaning}"

    recovery = 1 - found.recovered / found.degraded
    lines = [
        f"held-out KL {found.degraded:.4f} -> {found.recovered:.4f} ({recovery:.1%} recovered)",
        "what is left:",
        line("rank and training", found.rank, "gone if the adapted matrices were the reference's"),
        line("placement", found.placement, "gone if all other matrices were, too"),
        line("beyond adapters", found.matrices, "norms, embeddings, biases"),
    ]
    data = 0.0 if found.data is None else found.data
    if found.data is not None:
        lines.insert(3, line("  of it: data", data, f"held-out text against learned text ({found.learned:.4f})"))
    if found.elsewhere:
        told = f"the adapters make good {found.elsewhere:.4f} of the damage in other matrices, at least: with their own"
        lines.append(f"  {told} put right and nothing else, {found.modules:.4f} would be left")
    shares = {
        "rank and training": found.rank - max(data, 0.0),
        "data": data,
        "placement": found.placement,
        "beyond adapters": found.matrices,
    }
    remedies = {
        "rank and training": "raise adapter.rank, or train longer (train.epochs) while held-out KL falls",
        "data": "more text: raise generate.samples rather than train.epochs",
        "placement": "damage lies in matrices without an adapter: set adapter.placement: auto",
        "beyond adapters": "write the reference's norms, embeddings and biases into the degraded model",
    }
    order = sorted(shares, key=shares.__getitem__, reverse=True)
    return lines + [f"  - {remedies[name]}" for name in order if shares[name] > SMALL * left]

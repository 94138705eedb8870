"""`recover-lora diagnose --run RECIPE`: what limits a finished recovery, or what ended one that is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.causes import SMALL, causes
from eval.config import ReportJob
from eval.evidence import gather
from launch.cluster import Cluster
from launch.pipeline import job_file_of
from launch.recipe import Recipe
from launch.resolve import check_models, resolve_names
from launch.stages import build_stages
from recovery.artifacts import folder_of, is_being_built
from recovery.config import Job, ModelInput
from recovery.errors import UserError
from recovery.files import HashMemory, held_out_lines, read_json, write_json
from recovery.limits import Limits, limits_of, limits_of_whole
from recovery.models import load_model
from recovery.stage import last_words
from recovery.texts import read_texts
from recovery.watch import advice


def explain(recipe: Recipe, cluster: Cluster, runs_dir: Path, folder: Path | None) -> str:
    """What is left of the damage and why; returns what to print. folder: write limits.json there."""
    names = resolve_names(recipe, HashMemory(runs_dir / ".hashes.json"))
    check_models(recipe, names)
    jobs = {stage.label: stage.job for stage in build_stages(recipe, names, cluster, runs_dir)}
    report = jobs["report"]
    assert isinstance(report, ReportJob)
    if not report.runtime.output.exists():
        if told := failure(jobs, runs_dir / recipe.name):
            return "\n".join(told)
        raise UserError(recipe.name, "not finished", f"run it first; there is no {report.runtime.output}")
    maker: Any = jobs.get("train", jobs.get("repair"))
    whole, output = recipe.train.parameters == "all", maker.runtime.output
    reference, degraded = (load_model(given, maker.dtype, placed=False) for given in (maker.reference, maker.degraded))
    texts = read_texts(maker)
    learned = None if getattr(maker, "labelled", None) is not None else texts.train
    if whole:
        recovered = load_model(ModelInput(path=str(output), digest=""), maker.dtype, placed=False)
        found = limits_of_whole(reference, degraded, recovered, learned, texts.held_out, texts.width)
    else:
        found = limits_of(reference, degraded, output, learned, texts.held_out, texts.width)
    told = causes(report, gather(report), read_json(report.runtime.output / "summary.json"))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "limits.json", {**asdict(found), "recipe": recipe.name})
    return "\n".join([*render(found, whole=whole), *(f"  - {one}" for one in told)])


def failure(jobs: Mapping[str, Job], run_folder: Path) -> list[str]:
    """What ended the first stage that is not finished, in its own words, and what it had measured until then.

    jobs: by label. Nothing where that stage was not begun as it is now, was interrupted, or is at work.
    """
    label, job = next((label, job) for label, job in jobs.items() if not job.runtime.output.exists())
    log, begun = job.runtime.log, job_file_of(label, run_folder)
    if log is None or not (log.exists() and begun.exists()) or is_being_built(job.runtime.output):
        return []
    if read_json(begun)["job"]["runtime"]["output"] != str(job.runtime.output):
        return []
    words = last_words(log.read_text(errors="replace"))
    if words is None or words == KeyboardInterrupt.__name__:
        return []
    lines = [f"not finished: {label} ended with", f"  {words}"]
    if kls := [line["kl"] for line in held_out_lines(folder_of(job))]:
        lines.append(f"held-out KL, as it was measured: {', '.join(f'{kl:.4f}' for kl in kls)}")
        lines += [f"  - {hint}" for hint in (advice(kls),) if hint]
    return lines


def render(found: Limits, *, whole: bool = False) -> list[str]:
    """whole: all parameters learned, so that there is neither rank nor placement to it."""
    left = max(found.recovered, 1e-9)

    def line(what: str, value: float, meaning: str) -> str:
        return f"  {what:<22} {value:9.4f}  {value / left:6.1%}  {meaning}"

    recovery = 1 - found.recovered / found.degraded
    lines = [
        f"held-out KL {found.degraded:.4f} -> {found.recovered:.4f} ({recovery:.1%} recovered)",
        "what is left:",
        line("rank and training", found.rank, "gone if the adapted matrices were the reference's"),
        line("placement", found.placement, "gone if all other matrices were, too"),
        line("beyond adapters", found.beyond, "norms, embeddings, biases"),
    ]
    if whole:
        lines[2:] = [line("training", found.rank, "gone if all parameters were the reference's")]
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
        "beyond adapters": found.beyond,
    }
    remedies = {
        "rank and training": "train longer (train.epochs) while held-out KL falls"
        if whole
        else "raise adapter.rank, or train longer (train.epochs) while held-out KL falls",
        "data": "more text: raise generate.samples rather than train.epochs",
        "placement": "damage lies in matrices without an adapter: set adapter.placement: auto",
        "beyond adapters": "write the reference's norms, embeddings and biases into the degraded model",
    }
    order = sorted(shares, key=shares.__getitem__, reverse=True)
    return lines + [f"  - {remedies[name]}" for name in order if shares[name] > SMALL * left]

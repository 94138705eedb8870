"""`recover-lora deliver`: a finished run's adapter, with a model card, as those who deploy it take it."""

from __future__ import annotations

import sys
from pathlib import Path

from eval.config import DeliverJob, EvaluateJob
from launch.cluster import Cluster
from launch.execution import Plan
from launch.pipeline import is_finished, link, missing_inputs, run_stage_process
from launch.recipe import Recipe
from launch.resolve import Builder, Stage, artifact_of
from launch.tracking import register
from recovery.errors import EXIT_DONE, UserError
from recovery.files import HashMemory
from recovery.placement import skeleton
from recovery.sources import check_packing


def deliver_stage(plan: Plan, *, merged: bool) -> Stage:
    """Raises UserError where the run is not finished, and for what cannot be delivered that way."""
    stages = {stage.label: stage for stage in plan.stages}
    recovered = stages["evaluate-recovered"].job
    assert isinstance(recovered, EvaluateJob)
    if recovered.adapter is None or recovered.divergence is None:
        folder = plan.run_folder / "adapter"
        raise UserError("deliver", "train.parameters is all: there is no adapter", f"{folder} is a whole checkpoint")
    if merged:
        bare = skeleton(recovered.model.path, recovered.model.revision)
        if packing := check_packing(recovered.model.path, bare.config):
            found = f"the degraded model is packed ({packing['quant_method']}), merging would unpack it"
            raise UserError("--merged", found, "leave it out: the adapter works beside the packed base")
    job = Builder(plan.recipe, plan.runs_dir).job(
        DeliverJob,
        "deliver",
        name=plan.recipe.name,
        dtype=recovered.dtype,
        reference=recovered.divergence.reference,
        degraded=recovered.model,
        adapter=recovered.adapter,
        corpus=recovered.divergence.corpus,
        scores=artifact_of(recovered),
        report=artifact_of(stages["report"].job),
        merged=merged,
    )
    stage = Stage("deliver", "deliver", "eval.deliver", job, ("delivery",))
    if absent := missing_inputs(stage, plan.stages):
        raise UserError("deliver", f"needs {', '.join(absent)}, not finished", "`recover-lora run` the recipe first")
    return stage


def deliver(recipe: Recipe, cluster: Cluster, runs_dir: Path, *, merged: bool) -> int:
    """Make the delivery and link it as `delivery` in the run's folder; returns the exit code."""
    memory = HashMemory(runs_dir / ".hashes.json")
    plan = Plan.of(recipe, cluster, runs_dir, memory)
    stage = deliver_stage(plan, merged=merged)
    if is_finished(stage, memory):
        print(f"[deliver] reused {stage.job.runtime.output}", file=sys.stderr)
    elif (code := run_stage_process(stage, plan.run_folder, cluster)) != EXIT_DONE:
        return code
    link(stage, plan.run_folder)
    memory.save()
    folder = plan.run_folder / "delivery"
    print(f"adapter  {folder}\ncard     {folder / 'README.md'}")
    if merged:
        print(f"merged   {folder / 'merged'}")
    if (address := register(recipe, runs_dir, folder)) is not None:
        print(f"MLflow   {address}")
    return EXIT_DONE

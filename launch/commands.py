"""What the commands of the front door do with a recipe. Imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from datagen.config import Partition
from launch.cluster import Cluster, LocalServers, load_cluster
from launch.distributed import in_batch_job
from launch.execution import Plan
from launch.pipeline import dry_run, missing_inputs, run_stage_process
from launch.recipe import Recipe, load_recipe
from launch.resolve import check_models, resolve_names
from launch.servers import ServerPool, Serving
from launch.slurm import batch_script, script_file, submit
from launch.stages import Stage, build_stages, generate_job
from recovery.errors import EXIT_DONE, EXIT_FAILED, UserError
from recovery.files import HashMemory

NO_STAGE = {
    "degrade": "its degraded model is given; run the next stage",
    "cache": "its teacher is online; set teacher.kind=hidden_states or sparse_logits, or add --dry-run to compare them",
}


def execute(
    recipe_file: Path,
    cluster_name: str,
    overrides: list[str],
    runs_dir: Path,
    dry: bool,
    only: str | None,
    partition: Partition | None = None,
    max_restarts: int = 0,
) -> int:
    """Run a recipe's stages (all, or those of one command, or one part of its corpus). Returns the exit code."""
    cluster = load_cluster(cluster_name)
    recipe = load_recipe(recipe_file, overrides)
    memory = HashMemory(None if dry else runs_dir / ".hashes.json")
    plan = Plan.of(recipe, cluster, runs_dir, memory, only, partition)
    if only == "cache" and dry:
        print(teacher_costs(recipe, cluster, plan.stages))
    elif not plan.wanted:
        raise UserError(str(recipe_file), f"it has no stage {only}", NO_STAGE[only or ""])
    if dry:
        check_models(recipe, plan.names)
        if cluster.slurm is not None:
            print(f"# {script_file(plan)}\n{batch_script(plan)}")
        print(dry_run(plan.wanted, plan.run_folder, cluster))
        return EXIT_DONE
    if cluster.slurm is not None and not in_batch_job():
        print(submit(plan))
        return EXIT_DONE
    code = plan.run(memory, max_restarts=max_restarts)
    if code == EXIT_DONE and only in (None, "report"):
        print_result(recipe, runs_dir)
    return code


def teacher_costs(recipe: Recipe, cluster: Cluster, stages: list[Stage]) -> str:
    from launch.plan_text import plan_text

    corpus = next(stage.job.runtime.output for stage in stages if stage.label == "generate")
    return plan_text(recipe, cluster, None, corpus, own=True)


def print_result(recipe: Recipe, runs_dir: Path) -> None:
    """The table, and where everything lies."""
    from eval.table import terminal_table
    from launch.store import store_uri

    run_folder = runs_dir / recipe.name
    summary = json.loads((run_folder / "report" / "summary.json").read_text())
    print(terminal_table(summary))
    print(f"\nadapter  {run_folder / 'adapter'}   (PeftModel.from_pretrained(degraded, this folder))")
    print(f"report   {run_folder / 'report' / 'report.html'}   (and report.md)")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        print("MLflow   the server of MLFLOW_TRACKING_URI")
    else:
        uri = store_uri(runs_dir)
        print(f"MLflow   {uri}\n         open it: mlflow ui --backend-store-uri {uri}")


def parse_partition(text: str | None) -> Partition | None:
    """`i/n` as part i of n, counted from 0."""
    if text is None:
        return None
    part, sign, of = text.partition("/")
    if not (sign and part.isdecimal() and of.isdecimal()):
        raise UserError(f"--partition {text}", "not of the form i/n", "write e.g. 0/4, 1/4, 2/4 and 3/4")
    try:
        return Partition(part=int(part), of=int(of))
    except ValueError as error:
        raise UserError(f"--partition {text}", "no such part", "parts are numbered from 0 to n-1") from error


def profile_training(recipe_file: Path, cluster_name: str, overrides: list[str], runs_dir: Path) -> int:
    """Run recovery.profile on the recipe's training job; its inputs must be there."""
    cluster, recipe = load_cluster(cluster_name), load_recipe(recipe_file, overrides)
    names = resolve_names(recipe, HashMemory(runs_dir / ".hashes.json"))
    stages = build_stages(recipe, names, cluster, runs_dir)
    stage = next((stage for stage in stages if stage.label == "train"), None)
    if stage is None:
        raise UserError("--profile", "train.epochs is 0: there is no training", "give it epochs")
    if absent := missing_inputs(stage, stages):
        raise UserError("--profile", f"needs {', '.join(absent)}, not finished", "run these first")
    run_folder = runs_dir / recipe.name
    folder = str((run_folder / "profile").resolve())
    return run_stage_process(replace(stage, module="recovery.profile"), run_folder, cluster, (folder,))


def serve_pool(recipe_file: Path, cluster_name: str, overrides: list[str], runs_dir: Path, dry: bool) -> int:
    """Keep the pool of a recipe running until it is interrupted or every server has been given up."""
    from recovery.stage import set_up_logging

    cluster = load_cluster(cluster_name)
    recipe = load_recipe(recipe_file, [*overrides, "generate.engine=vllm"])
    if not isinstance(cluster.servers, LocalServers):
        raise UserError(f"cluster {cluster.name}", "it has no servers of kind local", "give its file such a section")
    memory = HashMemory(None if dry else runs_dir / ".hashes.json")
    names = resolve_names(recipe, memory)
    memory.save()
    logs = runs_dir / recipe.name / "logs"
    pool = ServerPool(Serving.of(generate_job(recipe, names, cluster, runs_dir)), cluster, logs)
    if dry:
        for server in pool.servers:
            where = "" if server.host is None else f"# on {server.host}\n"
            print(f"{where}$ {shlex.join([*pool.command(), '--port', str(pool.own_port(server))])}")
        return EXIT_DONE
    set_up_logging("serve", logs / "serve.log")
    with pool:
        for server in pool.servers:
            print(server.url, flush=True)
        print("serving until Ctrl-C; logs in", logs, file=sys.stderr)
        while not pool.is_lost:
            time.sleep(0.5)
    return EXIT_FAILED


def models_of(recipe: Recipe) -> list[str]:
    """The local folders among a recipe's models."""
    names = resolve_names(recipe, HashMemory(None))
    found = {model.path for model in (names.reference, names.generator, names.degraded) if model is not None}
    return sorted(path for path in found if Path(path).exists())

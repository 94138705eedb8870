"""`recover-lora track`: what MLflow has not got of runs that went on without it.

recover-lora track sync launch/recipes/smollm2-135m/demo.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cluster import Cluster, load_cluster
from launch.execution import Plan
from launch.recipe import load_recipe, read_yaml
from recovery.errors import Unavailable, UserError
from recovery.files import HashMemory

track_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Runs in MLflow.",
)


@track_app.command(
    name="sync",
    help="Send what MLflow has not got: of a run, or of every point of a study. Nothing is sent twice.\n\n"
    "Metrics stand in the artifacts' metrics.jsonl, so a run goes on while the tracking server is away.\n\n"
    "Example: MLFLOW_TRACKING_URI=http://127.0.0.1:5000 recover-lora track sync my-recipe.yaml",
)
def sync_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe, or the study, that was run.")],
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="As it was run; of a recipe alone."),
    ] = [],  # noqa: B006 - typer reads the default, nothing changes it
    cluster: Annotated[str, typer.Option("--cluster", metavar="FILE", help="As it was run.")] = "local",
    runs_dir: Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="Where runs and artifacts lie.")] = Path(
        "runs"
    ),
) -> None:
    on = load_cluster(cluster)
    if "axes" in read_yaml(file):
        _sync_study(file, on, runs_dir)
    else:
        _send(Plan.of(load_recipe(file, overrides), on, runs_dir, HashMemory(runs_dir / ".hashes.json")), None)


def _sync_study(file: Path, cluster: Cluster, runs_dir: Path) -> None:
    from launch.study import is_whole, load_study, plans_of
    from launch.sync import sync_study
    from launch.tracking import start_study

    study, points = load_study(file)
    plans = plans_of(points, cluster, runs_dir)
    folder = runs_dir / study.name
    if not folder.exists():
        raise UserError(
            str(file), f"nothing of it has been run in {runs_dir}", "give the --runs-dir that it was run with"
        )
    parent = start_study(study.name, points[0].recipe.tracking.experiment, runs_dir, begin=False)
    if parent is None:
        raise Unavailable("the tracking server does not answer; the same command sends everything later")
    for plan in plans.values():
        if plan.run_folder.exists():
            _send(plan, parent)
    sync_study(parent, runs_dir, folder, whole=is_whole(plans, folder))


def _send(plan: Plan, parent: str | None) -> None:
    from launch.sync import sync

    sent = sync(plan.recipe, plan.stages, plan.runs_dir, parent, plan.cluster)
    print(f"{plan.recipe.name}: {sent.metrics:,} metrics and {sent.files} files sent")

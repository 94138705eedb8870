"""Running a recipe: which of its stages are to be done, and doing them in order."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from datagen.config import GenerateJob, Partition
from launch.cluster import Cluster, LocalServers
from launch.pipeline import is_finished, link, missing_inputs, run_stage_process
from launch.recipe import Recipe
from launch.resolve import Names, Stage, build_stages, check_models, partition_stage, resolve_names
from launch.servers import ServerPool
from recovery.config import Job
from recovery.errors import EXIT_DONE, EXIT_FAILED, UserError
from recovery.files import HashMemory


@dataclass(frozen=True)
class Plan:
    """A recipe's stages here, and those that a command asks for."""

    recipe: Recipe
    cluster: Cluster
    runs_dir: Path
    names: Names
    stages: list[Stage]
    wanted: list[Stage]
    only: str | None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        cluster: Cluster,
        runs_dir: Path,
        memory: HashMemory,
        only: str | None = None,
        partition: Partition | None = None,
    ) -> Plan:
        """only: the command whose stages are wanted; all of them unless given. Raises UserErrors for a wrong recipe."""
        names = resolve_names(recipe, memory)
        stages = build_stages(recipe, names, cluster, runs_dir)
        if partition is not None:
            stages = [partition_stage(recipe, names, cluster, runs_dir, partition)]
        wanted = [stage for stage in stages if only in (None, stage.command)]
        return cls(recipe, cluster, runs_dir, names, stages, wanted, only)

    @property
    def run_folder(self) -> Path:
        return self.runs_dir / self.recipe.name

    def todo(self, memory: HashMemory) -> list[Stage]:
        """The wanted stages that are not finished. Raises UserError where one of them needs another that is not."""
        todo = [stage for stage in self.wanted if not is_finished(stage, memory)]
        coming = {stage.label for stage in todo}
        absent = {label: None for stage in todo for label in missing_inputs(stage, self.stages) if label not in coming}
        if self.only is not None and absent:
            raise UserError(self.only, f"needs {', '.join(absent)}, not finished", "run these first, or `run`")
        return todo

    def run(self, memory: HashMemory, parent: str | None = None) -> int:
        """Do what is to be done; returns the exit code of the first stage that fails. parent: the MLflow run of the
        study that this is a point of."""
        stages = self.wanted
        if self.todo(memory):
            check_models(self.recipe, self.names)
            from launch.tracking import start_run
            from recovery.stage import set_up_logging

            set_up_logging("run", self.run_folder / "logs" / "run.log")
            tracking = start_run(self.recipe, self.runs_dir, parent)
            stages = [stage.tracked_by(tracking) for stage in stages]
        for stage in stages:
            # Looked at again: a stage before it may just have been made anew, from which this one was not made.
            if not is_finished(stage, memory):
                with servers_for(stage.job, self.cluster, self.run_folder / "logs"):
                    code = run_stage_process(stage, self.run_folder, self.cluster)
                if code != EXIT_DONE:
                    return code if code > 0 else EXIT_FAILED
            else:
                print(f"[{stage.label}] reused {stage.job.runtime.output}", file=sys.stderr)
            link(stage, self.run_folder)
        memory.save()
        return EXIT_DONE


def servers_for(job: Job, cluster: Cluster, logs: Path) -> AbstractContextManager[object]:
    """The cluster's own servers for as long as a stage needs them; nothing for all other stages."""
    if not isinstance(job, GenerateJob) or job.generate.engine != "vllm":
        return nullcontext()
    if not isinstance(cluster.servers, LocalServers):
        return nullcontext()
    return ServerPool(job, cluster, logs)

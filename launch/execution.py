"""Running a recipe: which of its stages are to be done, and doing them in order."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datagen.config import GenerateJob, Partition
from launch.cluster import Cluster, LocalServers
from launch.distributed import SSH_OPTIONS
from launch.pipeline import is_finished, link, missing_inputs, run_stage_process, unlink_former
from launch.recipe import Recipe
from launch.resolve import Names, check_models, resolve_names
from launch.servers import ServerPool, Serving
from launch.stages import Stage, build_stages, partition_stage
from recovery.artifacts import CLUSTER, RECIPE, alone, turn
from recovery.config import Job
from recovery.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, Unavailable, UserError
from recovery.files import HashMemory, write_atomic

log = logging.getLogger("recover-lora")


def write_origin(recipe: Recipe, cluster: Cluster, run_folder: Path) -> tuple[Path, Path]:
    """What makes the run again, into its folder."""
    run_folder.mkdir(parents=True, exist_ok=True)
    write_atomic(run_folder / RECIPE, recipe.to_yaml())
    write_atomic(run_folder / CLUSTER, cluster.to_yaml(), private=True)  # it may name keys of servers
    return run_folder / RECIPE, run_folder / CLUSTER


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
    part: bool = False
    """Of a corpus whose other parts other processes make, in the same run's folder."""

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
        return cls(recipe, cluster, runs_dir, names, stages, wanted, only, part=partition is not None)

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

    def run(
        self, memory: HashMemory, parent: str | None = None, max_restarts: int = 0, *, in_turn: bool = False
    ) -> int:
        """Do what is to be done; returns the exit code of the first stage that fails.

        parent: the MLflow run of the study that this is a point of. max_restarts: how often a stage on several
        processes is started again after it failed; it goes on from its last checkpoint. in_turn: other points are at
        work, whose stages are waited for where this one needs them too.
        """
        # A point whose study was killed just before its end still has to tell MLflow of it.
        if not self.todo(memory) and parent is None:
            unlink_former(self.stages, self.run_folder)
            return self._run_stages(self.wanted, memory, max_restarts, in_turn)
        check_models(self.recipe, self.names)
        from launch.tracking import tracked
        from recovery.stage import set_up_logging

        # Two commands of one name would start each other's jobs, and one would tell of the other's result.
        remedy = "wait for that one to end, or give this one a name of its own (--set name=...)"
        busy = UserError(self.recipe.name, f"another command is at work in {self.run_folder}", remedy)
        with nullcontext() if in_turn or self.part else alone(self.run_folder / ".run.lock", busy):
            set_up_logging("run", self.run_folder / "logs" / "run.log")
            write_origin(self.recipe, self.cluster, self.run_folder)
            unlink_former(self.stages, self.run_folder)
            with tracked(self.recipe, self.runs_dir, parent, self.stages, self.cluster) as run:
                stages = [stage.tracked_by(run.tracking) for stage in self.wanted]
                run.code = self._run_stages(stages, memory, max_restarts, in_turn)
        return run.code

    def _run_stages(self, stages: list[Stage], memory: HashMemory, max_restarts: int, in_turn: bool) -> int:
        cluster = self.cluster
        for stage in stages:
            with self._turn(stage) if in_turn else nullcontext():
                # Looked at again: a stage before it may just have been made anew, from which this one was not made.
                if not is_finished(stage, memory):
                    with servers_for(stage.job, cluster, self.run_folder / "logs"):
                        code, cluster = self._run_stage(stage, cluster, max_restarts if stage.distributed else 0)
                    if code != EXIT_DONE:
                        return code
                else:
                    print(f"[{stage.label}] reused {stage.job.runtime.output}", file=sys.stderr)
            link(stage, self.run_folder)
        memory.save()
        return EXIT_DONE

    @contextmanager
    def _turn(self, stage: Stage) -> Iterator[None]:
        """While no other point makes the same artifact; nor, where several hosts train, works on this host."""
        artifact = stage.job.runtime.output
        with ExitStack() as turns:
            waits = partial(log.info, "%s: another point is making it", stage.label)
            turns.enter_context(turn(artifact.with_name(f".{artifact.name}.turn"), waits))
            if self.cluster.hosts and not stage.distributed and not artifact.exists():
                waits = partial(log.info, "%s: another point is at work on this host", stage.label)
                turns.enter_context(turn(artifact.with_name(".this-host.turn"), waits))
            yield

    def _run_stage(self, stage: Stage, cluster: Cluster, restarts: int) -> tuple[int, Cluster]:
        """The exit code, and what is left of the cluster."""
        for number in range(restarts + 1):
            if stage.distributed and cluster.hosts:
                cluster = reachable_part(cluster, may_shrink=restarts > 0)
            code = run_stage_process(stage, self.run_folder, cluster)
            if code in (EXIT_DONE, EXIT_USER, EXIT_INTERRUPTED) or number == restarts:
                return code, cluster
            log.warning("%s failed; start %d of %d", stage.label, number + 1, restarts)
        raise AssertionError("the loop returns")


def reachable_part(cluster: Cluster, *, may_shrink: bool) -> Cluster:
    """The cluster without the hosts that do not answer ssh: ranks would wait for theirs until the rendezvous gives up.

    Raises Unavailable where one of them does not answer and may not be left out, and where none does.
    """

    def answers(host: str) -> bool:
        return subprocess.run(["ssh", *SSH_OPTIONS, host, "true"], check=False, capture_output=True).returncode == 0

    with ThreadPoolExecutor(min(len(cluster.hosts), 64)) as pool:
        hosts = dict(zip(cluster.hosts, pool.map(answers, cluster.hosts), strict=True))
    lost = [host for host, there in hosts.items() if not there]
    if len(lost) == len(hosts):
        raise Unavailable(f"no host answers ssh: {', '.join(lost)}")
    if lost and not may_shrink:
        raise Unavailable(f"{', '.join(lost)}: no answer by ssh; --max-restarts 1 would go on without")
    if lost:
        log.warning("going on without %s", ", ".join(lost))
    left = tuple(host for host in hosts if host not in lost)
    return cluster.model_copy(update={"nodes": left, "hostfile": None})


def servers_for(job: Job, cluster: Cluster, logs: Path) -> AbstractContextManager[object]:
    """The cluster's own servers for as long as a stage needs them; nothing for all other stages."""
    if not isinstance(job, GenerateJob) or job.generate.engine != "vllm":
        return nullcontext()
    if not isinstance(cluster.servers, LocalServers):
        return nullcontext()
    return ServerPool(Serving.of(job), cluster, logs)

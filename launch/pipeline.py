"""Running stages: each in a process of its own, finished ones reused, the run's folder kept in order."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cluster import Cluster
from launch.resolve import Stage
from recovery.artifacts import REPOSITORY
from recovery.errors import EXIT_INTERRUPTED, UserError
from recovery.files import HashMemory, write_atomic
from recovery.stage import LAUNCHER, check_reusable


def command_of(stage: Stage, job_file: Path, cluster: Cluster) -> list[str]:
    """What starts the stage; typed by hand it does the same."""
    if stage.distributed and cluster.processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cluster.processes)]
        return [sys.executable, *torchrun, "--module", stage.module, str(job_file)]
    return [sys.executable, "-m", stage.module, str(job_file)]


def job_file_of(stage: Stage, run_folder: Path) -> Path:
    return run_folder / "jobs" / f"{stage.label}.json"


def missing_inputs(stage: Stage, all_stages: list[Stage]) -> list[str]:
    """Labels of the stages whose artifacts this one reads and which are not finished."""
    needed = {str(given.path) for given in stage.job.inputs().values()}
    return [
        other.label
        for other in all_stages
        if str(other.job.runtime.output) in needed and not other.job.runtime.output.exists()
    ]


def run_stage_process(stage: Stage, run_folder: Path, cluster: Cluster, arguments: Sequence[str] = ()) -> int:
    """Write the job file, run the stage, return its exit code. An interrupt is passed on and waited for."""
    job_file = job_file_of(stage, run_folder)
    job_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(job_file, stage.job.to_json())
    command = [*command_of(stage, job_file, cluster), *arguments]
    environment = {**os.environ, **cluster.environment, LAUNCHER: str(os.getpid())}
    if cluster.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # The rooms are imported from this checkout wherever the command was started.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            process.wait()
            return EXIT_INTERRUPTED


def is_finished(stage: Stage, memory: HashMemory) -> bool:
    """Whether the stage's artifact can be reused. Raises DamagedArtifact for one that is not what it was."""
    return check_reusable(stage.job, memory)


def link(stage: Stage, run_folder: Path) -> None:
    """Relative links from the run's folder to the stage's artifact."""
    for name in stage.links:
        path = run_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(stage.job.runtime.output, path.parent)
        if path.is_symlink() and str(path.readlink()) == target:
            continue
        if path.exists() and not path.is_symlink():
            raise UserError(str(path), "not a link of ours", "move it away")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)


def dry_run(stages: list[Stage], run_folder: Path, cluster: Cluster) -> str:
    """Every command and job, as they would be run and written."""
    parts = []
    for stage in stages:
        job_file = job_file_of(stage, run_folder)
        state = "finished" if stage.job.runtime.output.exists() else "to do"
        parts.append(f"# {stage.label}: {state}\n$ {shlex.join(command_of(stage, job_file, cluster))}")
        parts.append(f"# {job_file}\n{stage.job.to_json()}")
    return "\n".join(parts)

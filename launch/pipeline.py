"""Running stages: each in a process of its own, finished ones reused, the run's folder kept in order."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.cluster import Cluster
from launch.distributed import SECRET, environment_of, in_batch_job, start_of
from launch.stages import Stage
from recovery.artifacts import REPOSITORY
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, UserError
from recovery.files import HashMemory, write_atomic
from recovery.stage import check_reusable, exit_file_of

DELIVERY = "delivery"
"""The link in a run's folder to what `recover-lora deliver` made of it."""
STOP_S = 120.0
"""For all ranks to save."""


def job_file_of(label: str, run_folder: Path) -> Path:
    """Where the job of a stage lies, by its label, as it was last started."""
    return run_folder / "jobs" / f"{label}.json"


def missing_inputs(stage: Stage, all_stages: list[Stage]) -> list[str]:
    """Labels of the stages whose artifacts this one reads and which are not finished."""
    needed = {str(given.path) for given in stage.job.inputs().values()}
    return [
        other.label
        for other in all_stages
        if str(other.job.runtime.output) in needed and not other.job.runtime.output.exists()
    ]


def run_stage_process(stage: Stage, run_folder: Path, cluster: Cluster, arguments: Sequence[str] = ()) -> int:
    """Write the job file, run the stage, return its exit code, one of the project's. An interrupt is passed on and
    waited for; a stage that was killed cannot say so, and is told of here."""
    job_file = job_file_of(stage.label, run_folder)
    job_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(job_file, stage.job.to_json())
    if stage.distributed and cluster.slurm is not None and not in_batch_job():
        raise UserError("--cluster", f"{cluster.name} is for a Slurm batch job", "`recover-lora run` submits one")
    start = start_of(stage, job_file, cluster)
    for path, content in start.files.items():
        write_atomic(path, content, private=True)
    environment = environment_of(start, cluster)
    exit_file = exit_file_of(job_file)
    exit_file.unlink(missing_ok=True)
    if start.stop_file is not None:
        code = _run_elsewhere([*start.command, *arguments], environment, start.stop_file)
    else:
        code = _run_here([*start.command, *arguments], environment)
    if code != EXIT_DONE and exit_file.exists():
        code = int(exit_file.read_text())
    exit_file.unlink(missing_ok=True)
    # A shell's and our guard's way to tell of a signal is 128 and its number.
    number = -code if code < 0 else code - 128 if code > 128 and code != EXIT_INTERRUPTED else 0
    if number in set(signal.Signals):
        _tell_of_kill(stage, signal.Signals(number).name)
    # Launchers have codes of their own.
    return code if code in (EXIT_DONE, EXIT_USER, EXIT_INTERRUPTED) else EXIT_FAILED


def _tell_of_kill(stage: Stage, name: str) -> None:
    why = "; the system does that where memory runs out" if name == "SIGKILL" else ""
    said = f"error: {stage.label} was ended by {name}{why}; the same command goes on"
    print(said, file=sys.stderr)
    if stage.job.runtime.log is not None:
        stage.job.runtime.log.parent.mkdir(parents=True, exist_ok=True)
        with stage.job.runtime.log.open("a") as file:
            file.write(f"{said}\n")


def _run_here(command: list[str], environment: dict[str, str]) -> int:
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)  # training saves first
            process.wait()
            return EXIT_INTERRUPTED


def _run_elsewhere(command: list[str], environment: dict[str, str], stop_file: Path) -> int:
    """Run a launcher of other hosts' processes. An interrupt asks them to save and stop; a second one, or STOP_S
    without an answer, ends the launcher, and its ranks notice."""
    stop_file.unlink(missing_ok=True)
    guard = [sys.executable, "-m", "launch.guard", str(os.getpid())]
    with subprocess.Popen([*guard, *command], env=environment, cwd=REPOSITORY, start_new_session=True) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("asked all ranks to save and stop; once more ends them at once", file=sys.stderr)
            stop_file.touch()
            with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
                process.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return EXIT_INTERRUPTED
        finally:
            stop_file.unlink(missing_ok=True)


def is_finished(stage: Stage, memory: HashMemory) -> bool:
    """Whether the stage's artifact can be reused. Raises DamagedArtifact for one that is not what it was."""
    return check_reusable(stage.job, memory)


def link(stage: Stage, run_folder: Path) -> None:
    """Relative links from the run's folder to the stage's artifact."""
    for path, target in _links(stage, run_folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() and str(path.readlink()) == target:
            continue
        if path.exists() and not path.is_symlink():
            raise UserError(str(path), "not a link of ours", "move it away")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)


def unlink_former(stages: list[Stage], run_folder: Path) -> None:
    """Remove links to what these stages made when the recipe of this name said something else: until it is made anew,
    a folder without a report is better than one with another recipe's. The artifacts stay."""
    for stage in stages:
        for path, target in _links(stage, run_folder):
            if path.is_symlink() and str(path.readlink()) != target:
                path.unlink()
    # What was handed on belongs to the adapter and the report of its time.
    delivery = run_folder / DELIVERY
    if delivery.is_symlink() and not all((run_folder / name).is_symlink() for name in ("adapter", "report")):
        delivery.unlink()


def _links(stage: Stage, run_folder: Path) -> Iterator[tuple[Path, str]]:
    """Paths of the links, and what they are to point at."""
    for name in stage.links:
        path = run_folder / name
        # From where it really lies: the runs' folder may itself be a link, onto a larger disk say.
        yield path, os.path.relpath(stage.job.runtime.output, path.parent.resolve())


def dry_run(stages: list[Stage], run_folder: Path, cluster: Cluster) -> str:
    """Every command and job, as they would be run and written."""
    parts = []
    for stage in stages:
        job_file = job_file_of(stage.label, run_folder)
        state = "finished" if stage.job.runtime.output.exists() else "to do"
        start = start_of(stage, job_file, cluster)
        variables = [f"{name}={shlex.quote(value)}" for name, value in start.environment.items() if start.elsewhere]
        parts.append(f"# {stage.label}: {state}\n$ {' '.join([*variables, shlex.join(start.command)])}")
        parts += [f"# {path}\n{content}" for path, content in start.files.items() if SECRET not in path.suffixes]
        parts.append(f"# {job_file}\n{stage.job.to_json()}")
    return "\n".join(parts)

"""Ranks that take training steps for a measurement: one to warm up, some that are timed, one that is profiled.

torchrun --nproc-per-node 2 --module tests.benchmarks.rank JOB FOLDER STEPS
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlflow  # noqa: F401 - a training process that is tracked has it
import torch

from launch.cluster import Cluster
from launch.recipe import Recipe, load_recipe
from launch.resolve import resolve_names
from launch.stages import build_stages
from recovery import heartbeat
from recovery.artifacts import REPOSITORY
from recovery.communication import Communication
from recovery.config import TrainJob
from recovery.engine import start_distributed
from recovery.files import HashMemory, write_atomic
from recovery.tracking import Tracker
from recovery.train import look, measure_held_out, train_step
from recovery.training_run import set_up


def training_job(recipe_file: Path, settings: Sequence[str], folder: Path) -> tuple[Recipe, TrainJob]:
    """What the recipe's training reads, made by the product itself under a folder and reused where it is there."""
    recipe = load_recipe(recipe_file, settings)
    options = [part for setting in settings for part in ("--set", setting)]
    for command in ("degrade", "generate", *(("cache",) if recipe.teacher.kind != "online" else ())):
        given = [sys.executable, "-m", "launch.cli", command, str(recipe_file), *options, "--runs-dir", str(folder)]
        subprocess.run(given, check=True)
    stages = build_stages(recipe, resolve_names(recipe, HashMemory(None)), Cluster(name="bench", device="cpu"), folder)
    job = next(stage.job for stage in stages if stage.label == "train")
    assert isinstance(job, TrainJob)
    return recipe, job


def take_steps(job: TrainJob, folder: Path, ranks: int, threads: int, steps: int) -> dict[str, float]:
    """rate: tokens a second; communication: share of a step; peak: bytes of the largest rank's resident memory."""
    file = folder / "job.json"
    write_atomic(file, job.to_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "--module", "tests.benchmarks.rank", str(file), str(folder), str(steps)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(lines[-1])


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def main() -> None:
    job_file, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job: TrainJob = TrainJob.from_file(job_file)
    rank, ranks = start_distributed()
    scratch = folder / f"worker-{ranks}"
    scratch.mkdir(exist_ok=True, parents=True)
    with Tracker(None, None) as tracker:
        run = set_up(job, scratch, rank, ranks, tracker)
        feed = run.feed(0)
        train_step(run, 0, feed)
        look(run)
        torch.distributed.barrier()
        began = time.perf_counter()
        for number in range(1, steps + 1):
            train_step(run, number, feed)
        look(run)
        seconds = time.perf_counter() - began
        measure_held_out(run, steps + 1, 0)
        peak = torch.tensor([float(peak_bytes())])
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        with Communication() as communication:
            train_step(run, steps + 1, feed)
            look(run)
        feed.close()
    if rank == 0:
        tokens = sum(step.loss_tokens for step in run.plan[1 : steps + 1])
        found = {"rate": tokens / seconds, "communication": communication.share, "peak": float(peak)}
        print(json.dumps(found))
    torch.distributed.barrier()
    heartbeat.leave("done")


if __name__ == "__main__":
    main()

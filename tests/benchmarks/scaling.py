"""Weak scaling: two ranks of one thread, each with as much work as one rank of one thread alone.

    make bench-scaling              # about 12 minutes on two cores

SmolLM2-135M with noise on K and V, adapters of rank 64 there, the reference's forward beside the student's, ZeRO-2. The
two contenders take turns; efficiency is the ratio of their median rates, over two. Before and after them a plain matrix
product is timed on one core and on both, which says what the machine itself loses.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from launch.cluster import Cluster
from launch.recipe import load_recipe
from launch.resolve import build_stages, resolve_names
from recovery import heartbeat
from recovery.artifacts import REPOSITORY
from recovery.config import TrainJob
from recovery.engine import start_distributed
from recovery.files import HashMemory, write_atomic
from recovery.profile import communication_share
from recovery.tracking import Tracker
from recovery.train import look, set_up, train_step
from tests.benchmarks.step import RECIPE, SETTINGS
from tests.benchmarks.summary import append_row

FOLDER = REPOSITORY / "runs" / "bench" / "scaling"
RANK_TOKENS = 1024
TURNS, STEPS = 3, 4
ONE_CORE = """
import time, torch
torch.set_num_threads(1)
one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
best = 1e9
for _ in range(30):
    began = time.perf_counter()
    torch.mm(one, other)
    best = min(best, time.perf_counter() - began)
print(best)
"""


def job_for(ranks: int) -> Path:
    """The job of a step of RANK_TOKENS a rank; its corpus is made by the product itself."""
    settings = [*SETTINGS, "name=bench-scaling", "train.deepspeed=zero2"]
    settings += [f"train.batch_tokens={RANK_TOKENS * ranks}", "train.micro_batch_tokens=512"]
    recipe = load_recipe(RECIPE, settings)
    options = [part for setting in settings for part in ("--set", setting)]
    for command in ("degrade", "generate"):
        given = [sys.executable, "-m", "launch.cli", command, str(RECIPE), *options, "--runs-dir", str(FOLDER)]
        subprocess.run(given, check=True)
    cluster = Cluster(name="bench", device="cpu")
    stages = build_stages(recipe, resolve_names(recipe, HashMemory(None)), cluster, FOLDER)
    path = FOLDER / f"ranks-{ranks}.json"
    write_atomic(path, next(stage.job for stage in stages if stage.label == "train").to_json())
    return path


def run(ranks: int, job: Path) -> dict[str, float]:
    """Tokens a second, and the share of a step in communication."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "--module", "tests.benchmarks.scaling", str(job)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def worker(job_file: Path) -> None:
    """A rank: one step to warm up, STEPS that are timed, one that is profiled."""
    torch.set_num_threads(1)
    job: TrainJob = TrainJob.from_file(job_file)
    rank, ranks = start_distributed()
    scratch = FOLDER / f"worker-{ranks}"
    scratch.mkdir(exist_ok=True)
    with Tracker(None, None) as tracker:
        done = set_up(job, scratch, rank, ranks, tracker)
        feed = done.feed(0)
        train_step(done, 0, feed)
        look(done)
        torch.distributed.barrier()
        began = time.perf_counter()
        for number in range(1, STEPS + 1):
            train_step(done, number, feed)
        look(done)
        seconds = time.perf_counter() - began
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            began = time.perf_counter()
            train_step(done, STEPS + 1, feed)
            look(done)
            step_s = time.perf_counter() - began
        feed.close()
    if rank == 0:
        tokens = sum(step.loss_tokens for step in done.plan[1 : STEPS + 1])
        print(json.dumps({"rate": tokens / seconds, "communication": communication_share(profiler, step_s)}))
    torch.distributed.barrier()
    heartbeat.leave("done")


def machine() -> float:
    """How fast one core computes while the other does too, over how fast it does alone."""

    def best(together: int) -> float:
        started = [
            subprocess.Popen([sys.executable, "-c", ONE_CORE], stdout=subprocess.PIPE, text=True)
            for _ in range(together)
        ]
        return statistics.mean(float(process.communicate()[0]) for process in started)

    return best(1) / best(2)


def main() -> None:
    if len(sys.argv) > 1:
        worker(Path(sys.argv[1]))
        return
    jobs = {ranks: job_for(ranks) for ranks in (1, 2)}
    limits, found = [machine()], {1: [], 2: []}
    for turn in range(TURNS):
        for ranks, job in jobs.items():
            found[ranks].append(run(ranks, job))
            print(f"turn {turn + 1}, {ranks} ranks: {found[ranks][-1]}", flush=True)
    limits.append(machine())
    rates = {ranks: statistics.median(one["rate"] for one in runs) for ranks, runs in found.items()}
    shares = [one["communication"] for one in found[2]]
    print(
        f"the machine itself: a core beside a busy one computes at {min(limits):.2f} to {max(limits):.2f} of its rate"
    )
    append_row("scaling: 2 ranks / 2 x 1 rank", rates[2] / 2, "tok/s a rank", peer=rates[1], goal=0.90)
    append_row("scaling: share of a step in communication", statistics.median(shares), "of the step", better="lower")


if __name__ == "__main__":
    main()

"""Weak scaling: two ranks of one thread, each with as much work as one rank of one thread alone.

    make bench-scaling              # about 12 minutes on two cores

SmolLM2-135M with noise on K and V, adapters of rank 64 there, the reference's forward beside the student's, ZeRO-2. The
two contenders take turns; efficiency is the ratio of their median rates, over two. Before and after them a plain matrix
product is timed on one core and on both, which says what the machine itself loses.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from recovery.artifacts import REPOSITORY
from recovery.config import TrainJob
from tests.benchmarks.rank import take_steps, training_job
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


def job_for(ranks: int) -> TrainJob:
    """The job of a step of RANK_TOKENS a rank."""
    settings = [*SETTINGS, "name=bench-scaling", "train.deepspeed=zero2"]
    settings += [f"train.batch_tokens={RANK_TOKENS * ranks}", "train.micro_batch_tokens=512"]
    return training_job(RECIPE, settings, FOLDER)[1]


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
    jobs = {ranks: job_for(ranks) for ranks in (1, 2)}
    limits, found = [machine()], {1: [], 2: []}
    for turn in range(TURNS):
        for ranks, job in jobs.items():
            found[ranks].append(take_steps(job, FOLDER, ranks, 1, STEPS))
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

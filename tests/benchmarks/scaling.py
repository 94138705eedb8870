"""Weak scaling: two ranks of one thread, each with as much work as one rank of one thread alone.

    make bench-scaling              # about 12 minutes on two cores

SmolLM2-135M with noise on K and V, adapters of rank 64 there, the reference's forward beside the student's, ZeRO-2. The
contenders take turns; efficiency is the ratio of their median rates, over two. What the machine loses, as its cores
share caches and memory, is told by a third: two runs of one rank at the same time that know nothing of each other.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor

from recovery.artifacts import REPOSITORY
from recovery.config import TrainJob
from tests.benchmarks.rank import take_steps, training_job
from tests.benchmarks.step import RECIPE, SETTINGS
from tests.benchmarks.summary import append_row

FOLDER = REPOSITORY / "runs" / "bench" / "scaling"
RANK_TOKENS = 1024
TURNS, STEPS = 3, 4


def job_for(ranks: int) -> TrainJob:
    """The job of a step of RANK_TOKENS a rank."""
    settings = [*SETTINGS, "name=bench-scaling", "train.deepspeed=zero2"]
    settings += [f"train.batch_tokens={RANK_TOKENS * ranks}", "train.micro_batch_tokens=512"]
    return training_job(RECIPE, settings, FOLDER)[1]


def apart(job: TrainJob) -> float:
    """Tokens a second of each of two runs of one rank at the same time."""
    with ThreadPoolExecutor(2) as pool:
        folders = [FOLDER / f"apart-{number}" for number in range(2)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        found = list(pool.map(lambda folder: take_steps(job, folder, 1, 1, STEPS), folders))
    return statistics.mean(one["rate"] for one in found)


def main() -> None:
    jobs = {ranks: job_for(ranks) for ranks in (1, 2)}
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    side_by_side: list[float] = []
    for turn in range(TURNS):
        for ranks, job in jobs.items():
            found[ranks].append(take_steps(job, FOLDER, ranks, 1, STEPS))
            print(f"turn {turn + 1}, {ranks} ranks: {found[ranks][-1]}", flush=True)
        side_by_side.append(apart(jobs[1]))
        print(f"turn {turn + 1}, two runs at once: {side_by_side[-1]:.1f} tok/s each", flush=True)
    rates = {ranks: statistics.median(one["rate"] for one in runs) for ranks, runs in found.items()}
    shares = [one["communication"] for one in found[2]]
    together = statistics.median(side_by_side)
    append_row("scaling: 2 ranks / 2 x 1 rank", rates[2] / 2, "tok/s a rank", peer=rates[1], goal=0.90)
    append_row("scaling: two runs at once / 1 rank", together, "tok/s a rank", peer=rates[1])
    append_row("scaling: 2 ranks / two runs at once", rates[2] / 2, "tok/s a rank", peer=together)
    append_row("scaling: share of a step in communication", statistics.median(shares), "of the step", better="lower")


if __name__ == "__main__":
    main()

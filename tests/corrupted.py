"""A training rank with a fault: behind its eleventh step an adapter's weights in memory are not numbers any more.

torchrun --standalone --nproc-per-node 2 --module tests.corrupted JOB
"""

from __future__ import annotations

from collections.abc import Iterator

import recovery.train
from recovery.adapters import adapter_parameters
from recovery.config import TrainJob
from recovery.feed import Prepared
from recovery.stage import run_stage
from recovery.training_run import Run

BAD_STEP = 11
_sound = recovery.train.train_step


def train_step(run: Run, number: int, feed: Iterator[Prepared]) -> None:
    _sound(run, number, feed)
    if number + 1 == BAD_STEP:
        for parameter in adapter_parameters(run.student).values():
            parameter.data.fill_(float("nan"))


if __name__ == "__main__":
    recovery.train.train_step = train_step
    run_stage(TrainJob, recovery.train.produce, resumable=True, description=__doc__ or "")

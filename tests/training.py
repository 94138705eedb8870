"""Helpers of the tests of training: run in a copy of prepared stages, killed at a step, and read again."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import recovery.train
from recovery.stage import build
from recovery.training_run import Run
from tests.pipeline import job_of, tiny_recipe

SHORT = {"epochs": 2, "checkpoint_every": 5, "evaluate_every": 6}


def partitioned(folder: Path) -> str:
    """A DeepSpeed file under which tiny tensors too are held in pieces."""
    path = folder / "partitioned.json"
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": stage}))
    return str(path)


class Killed(BaseException):
    """Stands for the end of the process: nothing may handle it."""


def train_with(
    prepared: tuple[Path, Path, Path],
    runs: Path,
    stop_after: int | None,
    dtype: str = "float32",
    sigterm_at: int | None = None,
    **train: Any,
) -> Path:
    """Train in a copy of the prepared runs.

    stop_after: end the process, as it were, after that many steps; sigterm_at: send it SIGTERM in the step after these.
    """
    model, data, source = prepared
    if not runs.exists():
        shutil.copytree(source, runs)
    job = job_of(tiny_recipe(model, data, train={**SHORT, **train}), runs, "train")
    job = job.model_copy(update={"dtype": dtype})
    real = recovery.train.train_step

    def step(run: Run, number: int, feed: Iterator[Any]) -> None:
        if number == stop_after:
            raise Killed
        if number == sigterm_at:
            signal.raise_signal(signal.SIGTERM)
        real(run, number, feed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery.train, "train_step", step)
        return build(job, recovery.train.produce, resumable=True)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]

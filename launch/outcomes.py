"""How the points of a study ended, and the lock under which several commands write into one study's folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from launch.execution import Plan
from recovery.artifacts import is_locked, turn
from recovery.errors import DamagedArtifact
from recovery.files import HashMemory, read_notes, write_json
from recovery.stage import check_reusable

OUTCOMES, AT_WORK = "outcomes.json", ".at-work"
"""In the study's folder."""


@dataclass(frozen=True)
class Outcome:
    end: Literal["done", "failed", "stopped"]
    """stopped: by successive halving."""
    about: str
    """Why it failed or was stopped; of one that is done, the report's artifact."""

    def __str__(self) -> str:
        return f"failed: {self.about}" if self.end == "failed" else self.about


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other command writes into the study's folder: slices of a study may run at the same time."""
    with turn(folder / ".lock", lambda: None):
        yield


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Seen by `is_at_work` until the block or process ends; several commands may be."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / AT_WORK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_at_work(folder: Path) -> bool:
    """Whether a command runs points of the study now."""
    return is_locked(folder / AT_WORK)


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """By the points' names. folder: the study's."""
    return {name: Outcome(**about) for name, about in read_notes(folder / OUTCOMES).items()}


def change_outcomes(folder: Path, made: Mapping[str, Outcome], forget: Iterable[str] = ()) -> None:
    """Note how points ended, and forget what was noted of others; what other commands noted stays."""
    with alone(folder):
        left = {name: found for name, found in read_outcomes(folder).items() if name not in set(forget)}
        write_json(folder / OUTCOMES, {name: asdict(found) for name, found in {**left, **made}.items()})


def reasons(found: Mapping[str, Outcome]) -> dict[str, str]:
    """Why points have no result."""
    return {name: outcome.about for name, outcome in found.items() if outcome.end != "done"}


def is_done(plan: Plan, outcome: Outcome | None, memory: HashMemory) -> bool:
    """Whether there is nothing to do for a point: it ended well, and its report and what that was made from are there
    as they were."""
    report = plan.stages[-1].job
    if outcome != Outcome("done", report.artifact_name):
        return False
    if not all(stage.job.runtime.output.exists() for stage in plan.stages):
        return False
    try:
        return check_reusable(report, memory)
    except DamagedArtifact:
        return False  # the point itself says so

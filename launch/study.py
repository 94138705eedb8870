"""Studies: a grid of recipes, run point by point; what points share is made once.

    recover-lora study launch/studies/smollm2-135m-matrix.yaml

A point is a recipe like any other, in a run's folder of its own, `<runs-dir>/<study>.<value>.<value>`. Here is what a
study is and how far it has come; study_run.py runs it.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from launch.cluster import Cluster
from launch.distributed import start_of
from launch.execution import Plan
from launch.outcomes import Outcome, is_at_work, read_outcomes
from launch.pipeline import job_file_of
from launch.recipe import Recipe, check_config, load_config, read_yaml, set_field
from recovery.artifacts import folder_of
from recovery.errors import UserError, UserErrors
from recovery.files import HashMemory, held_out_lines
from recovery.settings import Config

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
MOST_POINTS = 10_000


class Halving(Config):
    """Successive halving: points that are behind those they compete with are stopped early."""

    among: tuple[str, ...] = Field(min_length=1)
    """Axes whose points compete; points of different labels on the other axes (damage, seed) do not."""
    first_tokens: PositiveInt
    """Trained tokens at which a point is looked at for the first time."""
    factor: int = Field(default=3, ge=2)
    """The share that goes on is 1/factor, each time after factor times the tokens."""


class Study(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Names the study's folder, and the points' folders together with their labels."""
    recipe: str
    """The recipe that every point changes; a path from the study's own folder."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Fields of the recipe that all points change, by dotted name."""
    axes: dict[str, dict[str, dict[str, Any]] | list[Any]] = Field(min_length=1)
    """What varies, outermost first. A list holds values of the recipe's field of that name (train.learning_rate:
    [1e-3, 1e-4]); otherwise each label has its changes: {few: {generate.samples: 80}, many: {...}}."""
    scaling: tuple[str, ...] = ()
    """Axes along which data, rank or model size grow: curves and laws are fitted along them, one series for each label
    of the others; an axis named seed is of repeats."""
    halving: Halving | None = None
    """Stop poor points early; all of them run to their end unless given."""

    @field_validator("axes")
    @classmethod
    def _labels(cls, axes: dict[str, Any]) -> dict[str, Any]:
        for axis, values in axes.items():
            if not values:
                raise ValueError(f"{axis} has no values")
            for label in _choices(axis, values):
                if not LABEL.fullmatch(label):
                    raise ValueError(f"{axis}: {label!r} names a folder: letters, digits, - and _")
        return axes

    @model_validator(mode="after")
    def _axes_are_there(self) -> Study:
        named = {"halving.among": self.halving.among if self.halving is not None else (), "scaling": self.scaling}
        for place, axes in named.items():
            if unknown := set(axes) - set(self.axes):
                raise ValueError(f"{place}: no axis {', '.join(sorted(unknown))}; there are {', '.join(self.axes)}")
        return self


@dataclass(frozen=True)
class Point:
    labels: dict[str, str]
    """By axis."""
    recipe: Recipe

    @property
    def name(self) -> str:
        return ".".join(self.labels.values())


def _choices(axis: str, values: Mapping[str, Mapping[str, Any]] | Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """The changes of every label of an axis."""
    if isinstance(values, Mapping):
        return dict(values)
    return {_label(value): {axis: value} for value in values}


def _label(value: object) -> str:
    return str(value).replace(".", "_").replace("+", "")


def load_study(path: Path) -> tuple[Study, list[Point]]:
    """The study and its points in order. Raises UserErrors with every fault of every point."""
    study = load_config(Study, path)
    base = (path.parent / study.recipe).resolve()
    content = read_yaml(base)
    axes = {axis: _choices(axis, values) for axis, values in study.axes.items()}
    if (count := math.prod(map(len, axes.values()))) > MOST_POINTS:
        raise UserError(f"{path}: axes", f"{count:,} points", f"at most {MOST_POINTS:,}: vary fewer things at once")
    points: list[Point] = []
    errors: list[UserError] = []
    for labels in itertools.product(*axes.values()):
        own = copy.deepcopy(content)
        at = dict(zip(axes, labels, strict=True))
        try:
            places = {
                "changes": study.changes,
                **{f"axes.{axis}.{label}": axes[axis][label] for axis, label in at.items()},
            }
            for place, changes in places.items():
                for dotted, value in changes.items():
                    set_field(own, dotted, copy.deepcopy(value), f"{path}: {place}")
            own["name"] = ".".join([study.name, *labels])
            points.append(Point(at, check_config(Recipe, own, base)))
        except UserErrors as error:
            errors += [UserError(f"{'.'.join(labels)}: {one.where}", one.found, one.remedy) for one in error.errors]
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserErrors(errors)
    return study, points


def chosen(study: Study, points: Sequence[Point], only: Sequence[str]) -> list[Point]:
    """The points with these labels. only: `axis=label,label`. Raises UserError where there are none."""
    for choice in only:
        axis, _, text = choice.partition("=")
        wanted = set(text.split(","))
        if axis not in study.axes or not wanted <= {point.labels[axis] for point in points}:
            known = "; ".join(f"{name}={','.join(_choices(name, values))}" for name, values in study.axes.items())
            raise UserError(f"--only {choice}", "no such axis or label", f"there are {known}")
        points = [point for point in points if point.labels[axis] in wanted]
    if not points:
        raise UserError("--only", "no point is left", "name each axis once")
    return list(points)


@dataclass(frozen=True)
class State:
    """How far a point is."""

    done: int
    stages: int
    ended: Outcome | None = None
    """Known of one that has no result."""
    at: str | None = None
    """The stage at work, or where it stopped."""

    @property
    def finished(self) -> bool:
        return self.done == self.stages

    def __str__(self) -> str:
        if self.ended is not None:
            return f"done; the last attempt {self.ended}" if self.finished else str(self.ended)
        if self.finished:
            return "done"
        return f"{self.done} of {self.stages} stages{f'; {self.at}' if self.at else ''}"


def plans_of(points: Sequence[Point], cluster: Cluster, runs_dir: Path) -> dict[str, Plan]:
    """By the points' names."""
    memory = HashMemory(runs_dir / ".hashes.json")
    return {point.name: Plan.of(point.recipe, cluster, runs_dir, memory) for point in points}


def states(plans: Mapping[str, Plan], folder: Path) -> dict[str, State]:
    """Of every point, by name; finished artifacts are counted, not verified. folder: the study's."""
    ended = read_outcomes(folder)
    return {name: state_of(plan, ended.get(name)) for name, plan in plans.items()}


def state_of(plan: Plan, ended: Outcome | None = None) -> State:
    """ended: how it did the last time, where that is known."""
    left = [stage for stage in plan.stages if not stage.job.runtime.output.exists()]
    begun = next((stage for stage in left if folder_of(stage.job).exists()), None)
    at = None
    if begun is not None:
        at = begun.label
        measured = held_out_lines(folder_of(begun.job))
        if measured:
            at += f" at {measured[-1]['tokens']:,} tokens, held-out KL {measured[-1]['kl']:.3f}"
    without = ended if ended is not None and ended.end != "done" else None  # done, but removed since
    return State(len(plan.stages) - len(left), len(plan.stages), without, at)


def is_whole(plans: Mapping[str, Plan], folder: Path) -> bool:
    """Whether no point is left to run. folder: the study's."""
    found = states(plans, folder).values()
    return all(state.finished or (state.ended is not None and state.ended.end == "stopped") for state in found)


def status_table(found: Mapping[str, State]) -> str:
    width = max(map(len, found))
    finished = sum(state.finished for state in found.values())
    lines = [f"{name.ljust(width)}  {state}" for name, state in found.items()]
    return "\n".join([*lines, f"{finished} of {len(found)} points are done"])


def show_status(plans: Mapping[str, Plan], folder: Path, *, watch: bool) -> None:
    """Print the table, once or until every point has ended. folder: the study's."""
    if not watch:
        print(status_table(states(plans, folder)))
        return
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=1) as live:
        while True:
            found = states(plans, folder)
            live.update(Text(status_table(found)))
            # One that failed before is tried again by a command at work.
            if all(state.finished or state.ended is not None for state in found.values()) and not is_at_work(folder):
                return
            time.sleep(1)


def point_commands(plans: Mapping[str, Plan]) -> str:
    """The stages of every point: which are finished, and which command makes the others."""
    parts = []
    for name, plan in plans.items():
        parts.append(f"# {name}")
        for stage in plan.stages:
            state = "finished" if stage.job.runtime.output.exists() else "to do"
            command = shlex.join(start_of(stage, job_file_of(stage.label, plan.run_folder), plan.cluster).command)
            parts.append(f"{stage.label:<20} {state:<9} {stage.job.artifact_name}  $ {command}")
    return "\n".join(parts)

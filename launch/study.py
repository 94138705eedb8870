"""Studies: a grid of recipes, run point by point; what points share is made once.

    recover-lora study launch/studies/smollm2-135m-matrix.yaml

A point is a recipe like any other, in a run's folder of its own, `<runs-dir>/<study>.<value>.<value>`. A point that
fails is tried once more after the others, unless the mistake is the user's, and told of at the end. The same command
goes on after any kill.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from launch.cluster import Cluster
from launch.distributed import start_of
from launch.execution import Plan
from launch.pipeline import job_file_of
from launch.recipe import Recipe, check_config, load_config, read_yaml, set_field
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, Unavailable, UserError, UserErrors
from recovery.files import HashMemory, read_json, write_json
from recovery.settings import Config

log = logging.getLogger("recover-lora")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
FAILURES = "failures.json"


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
    failure: str | None

    @property
    def finished(self) -> bool:
        return self.done == self.stages

    def __str__(self) -> str:
        if self.finished:
            return "done"
        if self.failure is not None:
            return f"failed: {self.failure}"
        return f"{self.done} of {self.stages} stages"


def plans_of(points: Sequence[Point], cluster: Cluster, runs_dir: Path) -> dict[str, Plan]:
    """By the points' names."""
    memory = HashMemory(runs_dir / ".hashes.json")
    return {point.name: Plan.of(point.recipe, cluster, runs_dir, memory) for point in points}


def states(plans: Mapping[str, Plan], folder: Path) -> dict[str, State]:
    """Of every point, by name; finished artifacts are counted, not verified. folder: the study's."""
    failures = _failures(folder)
    return {
        name: State(
            sum(stage.job.runtime.output.exists() for stage in plan.stages), len(plan.stages), failures.get(name)
        )
        for name, plan in plans.items()
    }


def _failures(folder: Path) -> dict[str, str]:
    path = folder / FAILURES
    return read_json(path) if path.exists() else {}


def status_table(found: Mapping[str, State]) -> str:
    width = max(map(len, found))
    finished = sum(state.finished for state in found.values())
    lines = [f"{name.ljust(width)}  {state}" for name, state in found.items()]
    return "\n".join([*lines, f"{finished} of {len(found)} points are done"])


def run_study(
    study: Study,
    points: Sequence[Point],
    wanted: Sequence[Point],
    cluster: Cluster,
    runs_dir: Path,
    minutes: float | None = None,
    *,
    forecast: bool = False,
) -> int:
    """Run those of the points that are wanted and not finished; returns the exit code. The report is of all points.

    minutes: begin no further point after so many. forecast: also forecast what the closed forms recover.
    """
    from launch.study_report import make_forecasts, write_report
    from launch.tracking import end_study, start_study
    from recovery.stage import set_up_logging

    folder = runs_dir / study.name
    set_up_logging("study", folder / "study.log")
    memory = HashMemory(runs_dir / ".hashes.json")
    plans = plans_of(points, cluster, runs_dir)
    parent = start_study(study.name, points[0].recipe.tracking.experiment, runs_dir)
    failures, begun = _failures(folder), time.monotonic()
    queue, again = list(wanted), set[str]()
    for number, point in enumerate(queue, 1):  # which grows by what is tried again
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            log.info("%.0f minutes are over: the same command goes on", minutes)
            break
        log.info("point %d of %d: %s%s", number, len(queue), point.name, ", again" if point.name in again else "")
        plan = plans[point.name]
        before = {path: path.stat().st_size for path in _logs(plan) if path.exists()}
        code = _run_point(plan, memory, parent)
        set_up_logging("study", folder / "study.log")  # which the point had for itself
        if code == EXIT_INTERRUPTED:
            end_study(parent, runs_dir, folder, code)
            return code
        failures.pop(point.name, None)
        if code != EXIT_DONE:
            failures[point.name] = _why(plan, before, code)
        if code not in (EXIT_DONE, EXIT_USER) and point.name not in again:
            # Once: a server or a host may have been away. The user's mistakes stay what they are.
            again.add(point.name)
            queue.append(point)
        write_json(folder / FAILURES, failures)
        write_report(study, points, plans, failures, folder)
    if forecast:
        make_forecasts([plans[point.name] for point in wanted], folder)
    write_report(study, points, plans, failures, folder)
    code = EXIT_FAILED if set(failures) & {point.name for point in wanted} else EXIT_DONE
    end_study(parent, runs_dir, folder, code)
    print(status_table(states({point.name: plans[point.name] for point in wanted}, folder)))
    print(f"\nresults  {folder / 'results.html'}   (and results.md)")
    return code


def point_commands(plans: Mapping[str, Plan]) -> str:
    """The stages of every point: which are finished, and which command makes the others."""
    parts = []
    for name, plan in plans.items():
        parts.append(f"# {name}")
        for stage in plan.stages:
            state = "finished" if stage.job.runtime.output.exists() else "to do"
            command = shlex.join(start_of(stage, job_file_of(stage, plan.run_folder), plan.cluster).command)
            parts.append(f"{stage.label:<20} {state:<9} {stage.job.artifact_name}  $ {command}")
    return "\n".join(parts)


def _run_point(plan: Plan, memory: HashMemory, parent: str | None) -> int:
    try:
        return plan.run(memory, parent)
    except (UserError, Unavailable) as error:  # of this point alone: a module that is not there, servers that died
        _note(plan).parent.mkdir(parents=True, exist_ok=True)
        with _note(plan).open("a") as file:
            file.write(f"error: {error}\n")
        log.error("%s", error)
        return EXIT_USER if isinstance(error, UserError) else EXIT_FAILED


def _note(plan: Plan) -> Path:
    return plan.run_folder / "logs" / "point.log"


def _logs(plan: Plan) -> list[Path]:
    return [_note(plan), *(stage.job.runtime.log for stage in plan.stages if stage.job.runtime.log is not None)]


def _why(plan: Plan, before: Mapping[Path, int], code: int) -> str:
    """The last error that was logged by this attempt. before: how long each log was."""
    for path in reversed([path for path in _logs(plan) if path.exists()]):
        new = path.read_bytes()[before.get(path, 0) :].decode(errors="replace")
        lines = [line for line in new.splitlines() if "error: " in line]
        if lines:
            return f"{path.stem}: {lines[-1].partition('error: ')[2]}"
    return f"a stage ended with {code} and said nothing; see {plan.run_folder / 'logs'}"

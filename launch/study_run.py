"""Running a study: its points as processes, one or several at a time, and what becomes of them.

A point that fails is tried once more after the others, unless the mistake is the user's, and told of at the end. The
same command goes on after any kill.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from launch.cluster import Cluster
from launch.execution import RECIPE, Plan
from launch.halving import Races
from launch.point import note_of
from launch.share import Share, shares_of
from launch.study import FAILURES, STOPPED, Point, Study, is_whole, plans_of, read_notes, states, status_table
from recovery.artifacts import REPOSITORY
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER
from recovery.files import write_atomic, write_json

log = logging.getLogger("recover-lora")
HALVING = "halving.jsonl"
"""In the study's folder: the measurements that points were judged by."""
POLL_S = 0.3
POINT = (sys.executable, "-m", "launch.point")


@dataclass
class Running:
    """A point at work."""

    point: Point
    share: int
    process: subprocess.Popen[bytes]
    before: dict[Path, int]
    """How long each log was when it began."""
    stopped: str | None = None
    """Why it was asked to stop."""


@dataclass
class Outcome:
    """What has become of the points, by name."""

    folder: Path
    failures: dict[str, str]
    stopped: dict[str, str]

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FAILURES, self.failures)
        write_json(self.folder / STOPPED, self.stopped)

    @property
    def notes(self) -> dict[str, str]:
        """Instead of a result."""
        return {**self.failures, **self.stopped}


def run_study(
    study: Study,
    points: Sequence[Point],
    wanted: Sequence[Point],
    cluster: Cluster,
    runs_dir: Path,
    minutes: float | None = None,
    *,
    parallel: int = 1,
    forecast: bool = False,
) -> int:
    """Run those of the points that are wanted and not finished; returns the exit code. The report is of all points.

    minutes: begin no further point after so many. parallel: points at a time, each on an equal share of the cluster.
    forecast: also forecast what the closed forms recover.
    """
    from launch.study_report import make_forecasts, write_report
    from launch.tracking import end_study, start_study
    from recovery.stage import set_up_logging

    folder = runs_dir / study.name
    shares = shares_of(cluster, parallel)
    set_up_logging("study", folder / "study.log")
    plans = plans_of(points, cluster, runs_dir)
    races = Races(study.halving, {point.name: point for point in points}, folder / HALVING)
    stopped = {name: why for name, plan in plans.items() if (why := races.observe(name, plan)) is not None}
    done = {name for name, plan in plans.items() if plan.stages[-1].job.runtime.output.exists()}
    outcome = Outcome(folder, read_notes(folder / FAILURES), {n: why for n, why in stopped.items() if n not in done})
    outcome.write()
    parent = start_study(study.name, points[0].recipe.tracking.experiment, runs_dir)
    code = status = EXIT_FAILED
    try:
        queue = [point for point in wanted if point.name not in outcome.stopped]
        with _children(shares, folder, runs_dir, parent) as start:
            for ended, exit_code in _ends(queue, plans, races, start, len(shares), minutes):
                _take_in(ended, exit_code, outcome, plans)
                write_report(study, points, plans, outcome.notes, folder)
        if forecast:
            make_forecasts([plans[point.name] for point in wanted], folder)
        write_report(study, points, plans, outcome.notes, folder)
        code = EXIT_FAILED if set(outcome.failures) & {point.name for point in wanted} else EXIT_DONE
        status = code if code != EXIT_DONE or is_whole(plans, folder) else EXIT_INTERRUPTED
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
        raise
    finally:
        end_study(parent, runs_dir, folder, status)
    print(status_table(states({point.name: plans[point.name] for point in wanted}, folder)))
    print(f"\nresults  {folder / 'results.html'}   (and results.md)")
    return code


def _take_in(ended: Running, code: int, outcome: Outcome, plans: Mapping[str, Plan]) -> None:
    name = ended.point.name
    outcome.failures.pop(name, None)
    if ended.stopped is not None and code != EXIT_DONE:
        outcome.stopped[name] = ended.stopped
        log.info("%s %s", name, ended.stopped)
    elif code != EXIT_DONE:
        outcome.failures[name] = why_failed(plans[name], ended.before, code)
        log.error("%s failed: %s", name, outcome.failures[name])
    outcome.write()


class _Start:
    """Starts a point on a share of the cluster."""

    def __init__(self, shares: Sequence[Share], folder: Path, runs_dir: Path, parent: str | None) -> None:
        self._shares, self._runs_dir, self._parent = shares, runs_dir, parent
        self._files = [folder / f"share-{number}.yaml" for number in range(len(shares))]
        folder.mkdir(parents=True, exist_ok=True)
        for file, share in zip(self._files, shares, strict=True):
            write_atomic(file, share.cluster.to_yaml(), private=True)  # it may name keys of servers
        self.running: list[Running] = []

    def __call__(self, point: Point, plan: Plan) -> Running:
        taken = {running.share for running in self.running}
        number = next(number for number in range(len(self._shares)) if number not in taken)
        share = self._shares[number]
        recipe = plan.run_folder / RECIPE
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe, point.recipe.to_yaml())
        before = {path: path.stat().st_size for path in logs_of(plan) if path.exists()}
        command = [sys.executable, "-m", "launch.guard", str(os.getpid()), *POINT]
        command += [str(recipe), "--cluster", str(self._files[number]), "--runs-dir", str(self._runs_dir)]
        command += ["--parent", self._parent] if self._parent is not None else []
        command += ["--cores", ",".join(map(str, share.cores))] if share.cores is not None else []
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **share.environment, "PYTHONPATH": path}
        with self._terminal(plan) as terminal:
            # A session of its own: Ctrl-C reaches it once, through us.
            process = subprocess.Popen(
                command, env=environment, stdout=terminal, stderr=terminal, start_new_session=True
            )
        running = Running(point, number, process, before)
        self.running.append(running)
        return running

    @contextlib.contextmanager
    def _terminal(self, plan: Plan) -> Iterator[IO[bytes] | None]:
        """Where a point's progress goes: here when it is alone, else into a file."""
        if len(self._shares) == 1:
            yield None
            return
        path = plan.run_folder / "logs" / "terminal.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            yield file

    def stop(self) -> None:
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.wait()
        self.running.clear()


@contextlib.contextmanager
def _children(shares: Sequence[Share], folder: Path, runs_dir: Path, parent: str | None) -> Iterator[_Start]:
    """However this ends, no point goes on; each keeps what it has."""
    start = _Start(shares, folder, runs_dir, parent)
    try:
        yield start
    finally:
        start.stop()


def _ends(
    queue: Sequence[Point],
    plans: Mapping[str, Plan],
    races: Races,
    start: _Start,
    most: int,
    minutes: float | None,
) -> Iterator[tuple[Running, int]]:
    """Every point as it ends, with its exit code. Raises KeyboardInterrupt where one was interrupted."""
    waiting, again, begun = list(queue), set[str](), time.monotonic()
    bar = tqdm(total=len(waiting), unit="point", desc="study", disable=most == 1 or not sys.stderr.isatty())
    with bar:
        while waiting or start.running:
            if waiting and minutes is not None and time.monotonic() - begun > 60 * minutes:
                log.info("%.0f minutes are over: the same command goes on", minutes)
                waiting.clear()
            while waiting and len(start.running) < most:
                point = waiting.pop(0)
                log.info("%s%s; %d more", point.name, ", again" if point.name in again else "", len(waiting))
                start(point, plans[point.name])
            for running in list(start.running):
                name, code = running.point.name, running.process.poll()
                why = races.observe(name, plans[name])
                if code is None:
                    if why is not None and running.stopped is None:
                        running.stopped = why
                        running.process.terminate()
                    continue
                start.running.remove(running)
                if code == EXIT_INTERRUPTED and running.stopped is None:
                    raise KeyboardInterrupt
                if code not in (EXIT_DONE, EXIT_USER) and running.stopped is None and name not in again:
                    # Once: a server or a host may have been away. The user's mistakes stay what they are.
                    again.add(name)
                    waiting.append(running.point)
                else:
                    bar.update()
                yield running, code
            time.sleep(POLL_S)


def logs_of(plan: Plan) -> list[Path]:
    stages = [stage.job.runtime.log for stage in plan.stages if stage.job.runtime.log is not None]
    return [note_of(plan.run_folder), *stages]


def why_failed(plan: Plan, before: Mapping[Path, int], code: int) -> str:
    """The last error that was logged by this attempt. before: how long each log was."""
    for path in reversed([path for path in logs_of(plan) if path.exists()]):
        new = path.read_bytes()[before.get(path, 0) :].decode(errors="replace")
        lines = [line for line in new.splitlines() if "error: " in line]
        if lines:
            return f"{path.stem}: {lines[-1].partition('error: ')[2]}"
    return f"a stage ended with {code} and said nothing; see {plan.run_folder / 'logs'}"

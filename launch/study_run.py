"""Running a study: its points as processes, one or several at a time, and what becomes of them.

A point that fails is tried once more after the others, unless the mistake is the user's, and told of at the end. The
same command goes on after any kill. Several commands may work on one study, each on a slice of it.
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
from launch.distributed import python_path
from launch.execution import Plan, write_origin
from launch.halving import Races
from launch.outcomes import Outcome, alone, at_work, change_outcomes, is_at_work, is_done, read_outcomes, reasons
from launch.point import note_of
from launch.share import Share, shares_of
from launch.study import Point, Study, is_whole, plans_of, states, status_table
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER
from recovery.files import HashMemory
from recovery.stage import last_words

log = logging.getLogger("recover-lora")
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
    races = Races(study.halving, {point.name: point for point in points}, plans, folder)
    queue = _to_do(wanted, plans, races, folder, HashMemory(runs_dir / ".hashes.json"))
    log.info("%d of %d points to do", len(queue), len(wanted))

    def report() -> None:
        with alone(folder):
            write_report(study, points, plans, reasons(read_outcomes(folder)), folder)

    with alone(folder):
        parent = start_study(study.name, points[0].recipe.tracking.experiment, runs_dir)
    status, ends = EXIT_FAILED, dict[str, Outcome]()
    try:
        with at_work(folder):
            with _children(shares, folder, runs_dir, parent) as start:
                for ended, exit_code in _ends(queue, plans, races, start, len(shares), minutes):
                    ends[ended.point.name] = _outcome(ended, exit_code, plans)
                    change_outcomes(folder, {ended.point.name: ends[ended.point.name]})
                    report()
            if forecast:
                make_forecasts([plans[point.name] for point in wanted], folder)
            report()
            noted = read_outcomes(folder)
            status = EXIT_FAILED if _some_failed(noted) else EXIT_DONE if is_whole(plans, folder) else EXIT_INTERRUPTED
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
        raise
    finally:
        # The last command at work says how the study ended.
        end_study(parent, runs_dir, folder, None if is_at_work(folder) else status)
    names = {point.name for point in wanted}
    code = EXIT_FAILED if _some_failed({n: o for n, o in {**noted, **ends}.items() if n in names}) else EXIT_DONE
    print(status_table(states({point.name: plans[point.name] for point in wanted}, folder)))
    print(f"\nresults  {folder / 'results.html'}   (and results.md)")
    return code


def _to_do(
    wanted: Sequence[Point], plans: Mapping[str, Plan], races: Races, folder: Path, memory: HashMemory
) -> list[Point]:
    """Those of the wanted points that are neither done nor behind in their race; which are behind is noted anew, as
    those that halving stopped under other settings may go on."""
    known = read_outcomes(folder)
    done = {point.name for point in wanted if is_done(plans[point.name], known.get(point.name), memory)}
    memory.save()
    behind = {name: why for name, plan in plans.items() if (why := races.observe(name, plan)) is not None}
    unfinished = {name for name, plan in plans.items() if not plan.stages[-1].job.runtime.output.exists()}
    stopped = {name: Outcome("stopped", why) for name, why in behind.items() if name in unfinished}
    change_outcomes(folder, stopped, forget=[name for name, outcome in known.items() if outcome.end == "stopped"])
    return [point for point in wanted if point.name not in stopped and point.name not in done]


def _some_failed(found: Mapping[str, Outcome]) -> bool:
    return any(outcome.end == "failed" for outcome in found.values())


def _outcome(ended: Running, code: int, plans: Mapping[str, Plan]) -> Outcome:
    name = ended.point.name
    if code == EXIT_DONE:
        return Outcome("done", plans[name].stages[-1].job.artifact_name)
    if ended.stopped is not None:
        log.info("%s %s", name, ended.stopped)
        return Outcome("stopped", ended.stopped)
    why = why_failed(plans[name], ended.before, code)
    log.error("%s failed: %s", name, why)
    return Outcome("failed", why)


class _Start:
    """Starts a point on a share of the cluster."""

    def __init__(self, shares: Sequence[Share], folder: Path, runs_dir: Path, parent: str | None) -> None:
        self._shares, self._folder, self._runs_dir, self._parent = shares, folder, runs_dir, parent
        self.running: list[Running] = []

    def __call__(self, point: Point, plan: Plan) -> Running:
        taken = {running.share for running in self.running}
        number = next(number for number in range(len(self._shares)) if number not in taken)
        share = self._shares[number]
        change_outcomes(self._folder, {}, forget=[point.name])  # tried again, it has not failed
        recipe, cluster = write_origin(point.recipe, share.cluster, plan.run_folder)
        before = {path: path.stat().st_size for path in logs_of(plan) if path.exists()}
        command = [sys.executable, "-m", "launch.guard", str(os.getpid()), *POINT]
        command += [str(recipe), "--cluster", str(cluster), "--runs-dir", str(self._runs_dir)]
        command += ["--parent", self._parent] if self._parent is not None else []
        command += ["--cores", ",".join(map(str, share.cores))] if share.cores is not None else []
        environment = {**os.environ, **share.environment, "PYTHONPATH": python_path()}
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
    """Every point as it ends, with its exit code; twice where it is tried again. Raises KeyboardInterrupt where one was
    interrupted."""
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
        if words := last_words(new):
            return f"{path.stem}: {words}"
    return f"a stage ended with {code} and said nothing; see {plan.run_folder / 'logs'}"

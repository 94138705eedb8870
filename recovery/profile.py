"""Profile: a few real training steps, and where their time goes. Makes no artifact.

    python -m recovery.profile JOB FOLDER [--steps 4]

Writes FOLDER/profile.txt (phases and operators) and FOLDER/trace.json (for chrome://tracing or Perfetto).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

from recovery import heartbeat
from recovery.communication import activities, communication_share
from recovery.config import TrainJob
from recovery.engine import start_distributed
from recovery.errors import EXIT_DONE, UserError
from recovery.files import write_atomic
from recovery.stage import check_inputs, exit_code_of, set_up_logging
from recovery.tracking import Tracker
from recovery.train import look, train_step
from recovery.training_run import set_up

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")
"""As train_step, Student and Engine name them; backward holds no forward, loss has its three products."""


def measure(job: TrainJob, folder: Path, steps: int) -> str:
    """Profile `steps` steps after one for warming up; returns the table that rank 0 has written, empty on others."""
    rank, ranks = start_distributed()
    with tempfile.TemporaryDirectory() as scratch, Tracker(None, None) as tracker:
        run = set_up(job, Path(scratch), rank, ranks, tracker)
        if len(run.plan) < 2:
            raise UserError(
                "--profile", "the training has a single step", "lower train.batch_tokens, or give it epochs"
            )
        feed = run.feed(0)
        steps = min(steps, len(run.plan) - 1)
        train_step(run, 0, feed)
        look(run)
        with profile(activities=activities()) as profiler:
            for number in range(1, steps + 1):
                with record_function("step"):
                    train_step(run, number, feed)
            look(run)
        feed.close()
        tokens = sum(step.loss_tokens for step in run.plan[1 : steps + 1])
    if rank:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    table = _table(profiler, steps, tokens)
    write_atomic(folder / "profile.txt", table)
    return table


def _table(profiler: Any, steps: int, tokens: int) -> str:
    averages = profiler.key_averages()
    found = {event.key: event for event in averages}
    field = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"
    whole = found["step"].cpu_time_total
    lines = [f"{steps} steps, {tokens} loss tokens, {tokens / (whole / 1e6):.1f} tokens/s while profiled", ""]
    for phase in PHASES:
        if phase in found:
            spent = getattr(found[phase], field)
            lines.append(f"{phase:<10} {spent / 1e6 / steps:8.3f} s a step {spent / whole:7.1%}")
    lines.append(f"{'between ranks':<10} {communication_share(profiler, whole / 1e6):14.1%}")
    operators = sorted(
        (event for event in averages if event.key not in (*PHASES, "step")),
        key=lambda event: -event.self_cpu_time_total,
    )
    lines += ["", "operators by their own time on the host:"]
    for event in operators[:15]:
        own = event.self_cpu_time_total
        lines.append(
            f"{event.key[:48]:<48} {own / 1e6 / steps:8.3f} s a step {own / whole:7.1%} {event.count:>7} calls"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    try:
        job: TrainJob = TrainJob.from_file(given.job)
        set_up_logging("profile")
        check_inputs(job)
        table = measure(job, given.folder, given.steps)
        heartbeat.leave("done")
        if not table:
            return EXIT_DONE
        print(table, end="")
        print(f"\n{given.folder / 'profile.txt'}\n{given.folder / 'trace.json'}   (open in https://ui.perfetto.dev)")
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every error gets its exit code here
        code = exit_code_of(error)
        heartbeat.leave("failed")
        return code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

"""One point of a study, in a process of its own.

    python -m launch.point RECIPE --cluster FILE --runs-dir DIR [--parent RUN] [--cores 0,1]

As `recover-lora run`, but for three things: its MLflow run is a child of the study's, what other points are making is
waited for, and its last error stands in the run's folder for the study to tell.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from launch.cluster import load_cluster
from launch.execution import Plan
from launch.recipe import load_recipe
from recovery.errors import UserError, first_line
from recovery.files import HashMemory
from recovery.stage import exit_code_of


def note_of(run_folder: Path) -> Path:
    """Where a point says why it failed, when no stage's log does."""
    return run_folder / "logs" / "point.log"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--parent")
    parser.add_argument("--cores")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if given.cores is not None:
        os.sched_setaffinity(0, [int(core) for core in given.cores.split(",")])
    code = 0
    try:
        memory = HashMemory(given.runs_dir / ".hashes.json")
        recipe = load_recipe(given.recipe, [])
        plan = Plan.of(recipe, load_cluster(given.cluster), given.runs_dir, memory)
        code = plan.run(memory, given.parent, in_turn=True)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every error gets its exit code here
        code = exit_code_of(error)
        if not isinstance(error, KeyboardInterrupt):
            note = note_of(given.recipe.parent)
            note.parent.mkdir(parents=True, exist_ok=True)
            with note.open("a") as file:
                file.write(f"error: {error if isinstance(error, UserError) else first_line(error)}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()

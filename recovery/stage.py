"""What every stage's `python -m <room>.<stage> JOB` does around its work: logging, the artifact, the exit code."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from recovery import heartbeat
from recovery.artifacts import Workspace, content_digest, is_artifact, verify
from recovery.config import ArtifactInput, Job, LooseInput
from recovery.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER,
    DamagedArtifact,
    Unavailable,
    UserError,
    first_line,
)
from recovery.files import HashMemory, write_atomic

log = logging.getLogger("recover-lora")
LAUNCHER = "RECOVER_LORA_LAUNCHER"  # environment variable: the launcher's process id
STOP_VARIABLE = "RECOVER_LORA_STOP_FILE"  # environment variable: a file that, once there, asks training to stop
LAST_WORDS = "error: "
JobType = TypeVar("JobType", bound=Job)


class _TqdmHandler(logging.Handler):
    """Log lines that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """A log file that nobody hears of when its disk is full: what is at work says so in one line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def set_up_logging(stage: str, path: Path | None = None) -> None:
    log.handlers.clear()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    screen = _TqdmHandler(logging.INFO)
    screen.setFormatter(logging.Formatter(f"[{stage}] %(message)s"))
    log.addHandler(screen)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


def last_words(text: str) -> str | None:
    """What ended a stage, in the words of its log file. text: of the log, or its end."""
    said = [line.partition(LAST_WORDS)[2] for line in text.splitlines() if LAST_WORDS in line]
    return said[-1] if said else None


def exit_code_of(error: BaseException) -> int:
    """Say what went wrong, in one line where the cause is plain, and return the exit code for it."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    if isinstance(error, Unavailable):
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" writing {error.filename}" if error.filename else ""
        print(
            f"error: no space left on the disk{where}; free some and run the same command again",
            file=sys.stderr,
        )
        return EXIT_FAILED
    if _is_disk_full(error):
        print("error: no space left on the disk; free some and run the same command again", file=sys.stderr)
        return EXIT_FAILED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        print(f"error: out of memory on the device ({first_line(error)})", file=sys.stderr)
        return EXIT_FAILED
    traceback.print_exception(error, file=sys.stderr)
    return EXIT_FAILED


def _is_disk_full(error: BaseException) -> bool:
    # Arrow, safetensors and SQLite report ENOSPC as errors of their own, so only the text tells.
    text = str(error)
    return "No space left on device" in text or "os error 28" in text or "database or disk is full" in text


def check_inputs(job: Job) -> None:
    """Verify every input that is an artifact against its manifest. Raises UserError for one that is not there."""
    for name, given in job.inputs().items():
        folder = Path(given.path)
        if is_artifact(folder):
            verify(folder)
        elif isinstance(given, ArtifactInput) and not isinstance(given, LooseInput):
            raise UserError(f"{job.stage} needs {name}", f"no artifact {folder}", "run the stage that makes it first")


def check_reusable(job: Job, memory: HashMemory | None = None) -> bool:
    """Whether the job's artifact is finished, undamaged and made from the inputs that are there now.

    Raises DamagedArtifact for a finished one that is not.
    """
    output = job.runtime.output
    if not output.exists():
        return False
    manifest = verify(output, memory)
    for name, given in job.inputs().items():
        recorded = manifest["inputs"].get(name, {}).get("content")
        if recorded is None or not is_artifact(Path(given.path)):
            continue
        present = content_digest(verify(Path(given.path), memory)["files"])
        if recorded != present:
            raise DamagedArtifact(
                str(output),
                f"made from another content of its input {name} ({given.path})",
                f"remove {output} and run the same command to make it anew",
            )
    return True


def build(job: JobType, produce: Callable[[JobType, Workspace], dict[str, Any]], *, resumable: bool) -> Path:
    """Make the job's artifact, or find it finished. produce fills the workspace and returns the manifest's details."""
    if check_reusable(job):
        log.info("reused %s", job.runtime.output)
        return job.runtime.output
    if int(os.environ.get("RANK", "0")) > 0:
        # The first rank owns the artifact; the others only work in its folder.
        produce(job, Workspace(job, resumable=resumable))
        return job.runtime.output
    check_inputs(job)
    with Workspace(job, resumable=resumable) as workspace:
        if check_reusable(job):  # another process finished it while this one waited for the lock
            return job.runtime.output
        details = produce(job, workspace)
        return workspace.finish(details)


def _end_with(launcher: int) -> None:
    """End at once when the launcher is gone (kill -9): a stage nobody waits for must not hold its artifact's lock."""
    while _is_alive(launcher):
        time.sleep(0.5)
    os._exit(EXIT_FAILED)


def _watch_from_elsewhere(stop_file: Path) -> None:
    """What reaches a process on another host: the stop file, as SIGTERM, and the end of what started it there."""
    agent, asked = os.getppid(), False
    errors = select.poll()
    errors.register(2, select.POLLERR)
    while os.getppid() == agent and not any(event & (select.POLLERR | select.POLLHUP) for _, event in errors.poll(0)):
        if not asked and stop_file.exists():
            asked = True
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    os._exit(EXIT_FAILED)


def _is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        os.kill(process, 0)
        # A killed process whose parent has not noticed yet still has its number: Z(ombie) after its name in brackets.
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def exit_file_of(job_file: Path) -> Path:
    """Where a rank leaves its exit code, when that says more than that it failed."""
    return job_file.with_suffix(".exit")


def run_stage(
    job_type: type[JobType],
    produce: Callable[[JobType, Workspace], dict[str, Any]],
    *,
    resumable: bool,
    description: str,
) -> None:
    """Entry of a stage module: read the job file named on the command line, build, exit with the project's codes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("job", type=Path, help="job file, as `recover-lora <stage> RECIPE --dry-run` prints it")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher gives it; the environment counts
    arguments = parser.parse_args()
    if launcher := os.environ.get(LAUNCHER):
        threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()
    if stop_file := os.environ.get(STOP_VARIABLE):
        threading.Thread(target=_watch_from_elsewhere, args=(Path(stop_file),), daemon=True).start()
    # A scheduler's SIGTERM ends a stage as Ctrl-C does: files closed, locks released, finished pieces kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = EXIT_DONE
    how: heartbeat.Leaving = "done"
    try:
        job = job_type.from_file(arguments.job)
        set_up_logging(job.stage, job.runtime.log)
        build(job, produce, resumable=resumable)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the other ranks while they are leaving
        code = exit_code_of(error)
        how = "interrupted" if code == EXIT_INTERRUPTED else "failed"
        exit_file = exit_file_of(arguments.job)
        # Launchers of several ranks have codes of their own; and what ended a rank is why they interrupt the others.
        if "RANK" in os.environ and (code == EXIT_USER or (code == EXIT_INTERRUPTED and not exit_file.exists())):
            write_atomic(exit_file, str(code))
        log.debug("%s%s", LAST_WORDS, first_line(error))  # which the log file keeps
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    heartbeat.leave(how)
    # Libraries leave threads behind (trackers, data loaders) that must not hold up a finished stage.
    os._exit(code)

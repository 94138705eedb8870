"""Runs a command so that nothing of it outlives its launcher; for servers, which have processes of their own.

    python -m launch.guard LAUNCHER_PID COMMAND [ARGUMENT ...]

Started as the leader of a process group. When the command or the launcher ends, even by SIGKILL, what is left of the
group is killed: vLLM's engine, for one, stays alive without its API server. SIGTERM and SIGINT are passed on, and the
command's exit code comes back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

POLL_S = 0.25


def others_of_group() -> list[int]:
    """Living processes of this one's group but itself."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == os.getpgrp() and state != "Z" and int(stat.parent.name) != os.getpid():
                found.append(int(stat.parent.name))
    return found


def main() -> None:
    launcher, command = int(sys.argv[1]), sys.argv[2:]
    if os.getpgrp() != os.getpid():
        sys.exit("launch.guard: not the leader of a process group; start it in a new session")
    child = subprocess.Popen(command)

    def pass_on(number: int, _: FrameType | None) -> None:
        if child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while child.poll() is None and os.getppid() == launcher:
        time.sleep(POLL_S)
    code = child.poll()
    if code is None:
        print("launch.guard: the launcher is gone", file=sys.stderr, flush=True)
    while left := others_of_group():
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S / 10)
    sys.exit(1 if code is None else code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()

"""Runs a command so that nothing of it outlives its launcher; for servers, which have processes of their own.

    python -m launch.guard LAUNCHER_PID COMMAND [ARGUMENT ...]

Started as the leader of a process group. When the command or the launcher ends, even by SIGKILL, what is left of the
group is killed: vLLM's engine, for one, stays alive without its API server. SIGTERM and SIGINT are passed on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

POLL_S = 0.25


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
    print(f"launch.guard: ended with code {child.poll()}, launcher {'there' if os.getppid() == launcher else 'gone'}")
    sys.stdout.flush()
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()

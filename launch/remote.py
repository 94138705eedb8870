"""Runs a command on this host for as long as somebody writes to its standard input; started through ssh.

    ssh host python -m launch.remote

The first line is JSON, with `command` and `environment`: what stands there is on no command line. Then a line must come
every SILENCE_S; when none does, or the input ends, the command and everything it started is ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

SILENCE_S = 60.0
"""ssh does not tell a host that it was cut off."""
STOP_S = 15.0


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end of the input says the same
    with open(0, "rb", buffering=0, closefd=False) as pipe:  # what follows is read by select
        settings = json.loads(pipe.readline())
    guard = [sys.executable, "-m", "launch.guard", str(os.getpid())]
    environment = {**os.environ, **settings["environment"]}
    child = subprocess.Popen(
        [*guard, *settings["command"]], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    while child.poll() is None:
        ready, _, _ = select.select([0], [], [], SILENCE_S)
        if not ready or not os.read(0, 4096):
            break
    with suppress(ProcessLookupError):
        child.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()

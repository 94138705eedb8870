"""Helpers of tests that start servers: free ports, process groups, waiting."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path


def free_ports(count: int = 1) -> int:
    """The first of `count` free ports in a row."""
    for first in range(20000 + os.getpid() % 20000, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def group_of(leader: int) -> set[int]:
    """Living processes of the group."""
    members = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            members.add(int(stat.parent.name))
    return members


def children_of(process: int) -> list[int]:
    """Its children, whichever of its threads started them."""
    listing = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in listing for child in task.read_text().split()]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)

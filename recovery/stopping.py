"""The request to stop training: all ranks save after the same step, however many of them were told.

It comes as SIGTERM, from a scheduler, or from recovery.stage, which watches for the file of a launcher whose signals do
not reach this host.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

AGAIN_S = 2.0
"""Signals that come sooner are the same one: to the process, and once more through its launcher."""


class Stopping:
    """with Stopping() as stopping: ... the first SIGTERM is a request, the second an interrupt. For every rank."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        # On the host: nothing is to wait for the device.
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def __enter__(self) -> Stopping:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is not None and time.monotonic() - self._asked_at > AGAIN_S:
            signal.default_int_handler(number, frame)
        self._asked_at = self._asked_at or time.monotonic()

    def ask(self) -> Callable[[], bool]:
        """Ask all ranks; the answer, the same on each, comes while a step is computed. Every rank must call it."""
        if dist.get_world_size() == 1:
            return lambda: self._asked_at is not None
        asked = torch.tensor(float(self._asked_at is not None))
        work = dist.all_reduce(asked, group=self._group, async_op=True)

        def answer() -> bool:
            assert work is not None
            work.wait()
            return bool(asked)

        return answer

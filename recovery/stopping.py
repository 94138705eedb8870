"""The request to stop training: all ranks save after the same step, however many of them were told.

It comes as SIGTERM, from a scheduler, or as a file, from the launcher, whose signals do not reach other hosts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from recovery.stage import STOP_VARIABLE


class Stopping:
    """with Stopping() as stopping: ... the first SIGTERM is a request, the second an interrupt. For every rank."""

    def __init__(self) -> None:
        self._asked = False
        file = os.environ.get(STOP_VARIABLE) if dist.get_rank() == 0 else None
        self._file = None if file is None else Path(file)
        # On the host: nothing is to wait for the device.
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def __enter__(self) -> Stopping:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            signal.default_int_handler(number, frame)
        self._asked = True

    def ask(self) -> Callable[[], bool]:
        """Ask all ranks; the answer, the same on each, comes while a step is computed. Every rank must call it."""
        if dist.get_world_size() == 1:
            return lambda: self._asked
        asked = torch.tensor(float(self._asked or (self._file is not None and self._file.exists())))
        work = dist.all_reduce(asked, group=self._group, async_op=True)

        def answer() -> bool:
            assert work is not None
            work.wait()
            return bool(asked)

        return answer

"""How much of a training step goes into collectives between ranks."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

COLLECTIVES = ("gloo:", "nccl:")
"""How torch names the work of a process group."""


def activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def communication_share(profiler: Any, seconds: float) -> float:
    """Share of `seconds` that this rank spent in collectives, waiting for others included."""
    spent = sum(
        max(event.device_time_total, event.cpu_time_total)
        for event in profiler.key_averages()
        if event.key.startswith(COLLECTIVES)
    )
    return spent / 1e6 / seconds


class Communication:
    """with Communication() as step: ...; then step.share, by torch's profiler, which slows the step a little."""

    share = 0.0

    def __enter__(self) -> Communication:
        self._profiler = profile(activities=activities())
        self._profiler.__enter__()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        self._profiler.__exit__(kind, error, trace)
        if error is None:
            self.share = communication_share(self._profiler, seconds)

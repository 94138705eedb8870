"""Environment variables that libraries read when they are loaded; set before any of them is. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

SECRETS_VARIABLE = "RECOVER_LORA_ENVIRONMENT"
"""Names a JSON file with more variables: those that must not stand on the command lines of other hosts."""
M_ARENA_MAX = -8
"""As malloc.h has it."""
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of the CUDA, ROCm and WSL drivers


def may_have_gpu() -> bool:
    """Whether a GPU driver is there, told without the seconds that importing torch takes."""
    return any(Path(file).exists() for file in GPU_FILES)


def prepare() -> None:
    """Defaults that the user's own environment overrides."""
    if (path := os.environ.get(SECRETS_VARIABLE)) is not None and Path(path).is_file():
        for name, value in json.loads(Path(path).read_text()).items():
            os.environ.setdefault(name, value)
    # OpenMP threads that spin between operations cost a busy machine a factor of ten (small operations, many
    # barriers). Threads that sleep at once cost an idle one: spinning briefly first, as GNU's can, made SmolLM2-135M
    # on two cores 11 % faster in training and 22 % in decoding; beside a second such process it is 9 and 23 % slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # torch's profiler prints when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    if not may_have_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "MALLOC_ARENA_MAX" not in os.environ and (mallopt := _of_libc("mallopt")) is not None:
        # glibc gives every thread a heap of its own, and none gives back what another could use: a tenth of the
        # memory of a training step.
        mallopt(M_ARENA_MAX, 2)


def return_memory() -> None:
    """Give freed memory back to the system, where glibc would keep it: after a model was dropped."""
    gc.collect()
    if (malloc_trim := _of_libc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None on other systems."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None

"""Environment variables that libraries read when they are loaded; set before any of them is. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of the CUDA, ROCm and WSL drivers


def may_have_gpu() -> bool:
    """Whether a GPU driver is there, told without the seconds that importing torch takes."""
    return any(Path(file).exists() for file in GPU_FILES)


def prepare() -> None:
    """Defaults that the user's own environment overrides."""
    # OpenMP threads that spin between operations cost a busy machine a factor of ten (small operations, many
    # barriers); threads that sleep cost an idle one a few percent.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not may_have_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

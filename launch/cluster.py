"""Clusters: where a recipe runs. The hardware stands here and never in a recipe. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from launch.recipe import load_config
from recovery.config import Config, Dtype
from recovery.environment import may_have_gpu
from recovery.errors import UserError

FOLDER = Path(__file__).resolve().parent / "clusters"


class Cluster(Config):
    name: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda stands for CUDA and ROCm builds of torch; auto takes a GPU when torch sees one."""
    processes: PositiveInt = 1
    """Training processes on this host, one a device."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every stage."""


def load_cluster(name: str) -> Cluster:
    """The cluster file at a path, or a shipped one by name."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError("--cluster", f"no file {path}", f"give a path to a .yaml file or one of: {shipped}")
    return load_config(Cluster, path)


def compute_dtype(wanted: Dtype | Literal["auto"], cluster: Cluster) -> Dtype:
    """auto is bfloat16 where the device multiplies it natively, else float32 (emulation is five times slower)."""
    if wanted != "auto":
        return wanted
    cuda = cluster.device == "cuda" or (cluster.device == "auto" and _has_gpu())
    return "bfloat16" if cuda or _cpu_multiplies_bfloat16() else "float32"


def _has_gpu() -> bool:
    if not may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()


def _cpu_multiplies_bfloat16() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))

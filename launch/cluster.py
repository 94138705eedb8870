"""Clusters: where a recipe runs. The hardware stands here and never in a recipe. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from datagen.config import ServerAccess
from launch.recipe import load_config
from recovery.config import Dtype
from recovery.environment import may_have_gpu
from recovery.errors import UserError
from recovery.settings import Config

CPU_SERVER_GIB = 4  # of a CPU server beside its KV cache, with a small model
FOLDER = Path(__file__).resolve().parent / "clusters"


class LocalServers(ServerAccess):
    """vLLM servers started on this host, one a device. `recover-lora run` starts them for as long as it needs them;
    those that `recover-lora serve` keeps running are used as they are."""

    kind: Literal["local"] = "local"
    count: PositiveInt | Literal["auto"] = "auto"
    """Servers, one a device. auto: one for each GPU; on a CPU two where cores and memory allow, else one."""
    python: Path = Path(".venv-vllm/bin/python")
    """The interpreter that has vLLM; of the container, on a cluster."""
    port: int = Field(default=8100, ge=1024, le=65535)
    """Port of the first server on the loopback interface; the others follow."""
    sequences: PositiveInt = 256
    """Sequences that one server decodes together (--max-num-seqs)."""
    cores: NonNegativeInt = 0
    """CPU servers: cores of each, 0 for an equal share of what this process may use."""
    kv_cache_gib: PositiveInt = 4
    """CPU servers: memory of each for the KV cache."""
    arguments: tuple[str, ...] = ()
    """More arguments for vLLM, such as --gpu-memory-utilization 0.92."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the servers, such as VLLM_ROCM_USE_AITER: "1"."""
    start_timeout_s: PositiveFloat = 900.0
    max_restarts: NonNegativeInt = 3
    """Times that one server is started again when it dies."""

    @model_validator(mode="after")
    def _fits(self) -> LocalServers:
        if self.urls:
            raise ValueError("servers with urls are started by somebody else: kind: external")
        if self.port + (self.count if isinstance(self.count, int) else 1) - 1 > 65535:
            raise ValueError(f"port {self.port} and {self.count} servers go beyond port 65535")
        return self

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.port + number}"

    @property
    def number(self) -> int:
        """Servers here and now."""
        if isinstance(self.count, int):
            return self.count
        if _has_gpu():
            import torch

            return torch.cuda.device_count()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return 2 if len(os.sched_getaffinity(0)) >= 2 and memory >= 2 * (self.kv_cache_gib + CPU_SERVER_GIB) else 1

    @property
    def access(self) -> ServerAccess:
        """How the client reaches them. A few requests more than a server decodes wait there, so that it never does."""
        fields = {name: getattr(self, name) for name in ServerAccess.model_fields}
        if "requests_per_server" not in self.model_fields_set:
            fields["requests_per_server"] = self.sequences + max(self.sequences // 8, 1)
        if "patience_s" not in self.model_fields_set:
            # A server that died is being started again, as long as that takes.
            fields["patience_s"] = max(self.patience_s, self.start_timeout_s)
        return ServerAccess(**{**fields, "urls": tuple(self.url(number) for number in range(self.number))})


class ExternalServers(ServerAccess):
    """Servers that somebody else keeps running, by address."""

    kind: Literal["external"]
    urls: tuple[str, ...] = Field(min_length=1, max_length=1024)

    @property
    def access(self) -> ServerAccess:
        return ServerAccess(**{name: getattr(self, name) for name in ServerAccess.model_fields})


Servers = Annotated[LocalServers | ExternalServers, Field(discriminator="kind")]


class Cluster(Config):
    name: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda stands for CUDA and ROCm builds of torch; auto takes a GPU when torch sees one."""
    processes: PositiveInt = 1
    """Training processes on this host, one a device."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every stage."""
    servers: Servers | None = None
    """Where `generate.engine: vllm` has its samples drawn."""


def load_cluster(name: str) -> Cluster:
    """The cluster file at a path, or a shipped one by name."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError("--cluster", f"no file {path}", f"give a path to a .yaml file or one of: {shipped}")
    return load_config(Cluster, path)


def uses_gpu(cluster: Cluster) -> bool:
    return cluster.device == "cuda" or (cluster.device == "auto" and _has_gpu())


def compute_dtype(wanted: Dtype | Literal["auto"], cluster: Cluster) -> Dtype:
    """auto is bfloat16 where the device multiplies it natively, else float32 (emulation is five times slower)."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if uses_gpu(cluster) or _cpu_multiplies_bfloat16() else "float32"


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

"""Clusters: where a recipe runs. The hardware stands here and never in a recipe. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from datagen.config import ServerAccess
from launch.recipe import load_config
from recovery.config import Dtype
from recovery.environment import may_have_gpu
from recovery.errors import UserError
from recovery.settings import Config

CPU_SERVER_GIB = 4  # of a CPU server beside its KV cache, with a small model
FOLDER = Path(__file__).resolve().parent / "clusters"


class LocalServers(ServerAccess):
    """vLLM servers started on this host, or on every host of the cluster, one a device. `recover-lora run` starts them
    for as long as it needs them; those that `recover-lora serve` keeps running are used as they are."""

    kind: Literal["local"] = "local"
    count: PositiveInt | Literal["auto"] = "auto"
    """Servers of a host, one a device. auto: one for each GPU; on a CPU two where cores and memory allow, else one."""
    python: Path = Path(".venv-vllm/bin/python")
    """The interpreter that has vLLM; of the container, on a cluster."""
    port: int = Field(default=8100, ge=1024, le=65535)
    """Port of the first server on the loopback interface; the others follow. Those of other hosts are on the loopback
    interface there, and are reached through ssh."""
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

    def number_on(self, cluster: Cluster) -> int:
        """Servers of one of its hosts; here and now where it has none by name."""
        if isinstance(self.count, int):
            return self.count
        if cluster.hosts:
            return cluster.processes
        if uses_gpu(cluster):
            import torch

            return torch.cuda.device_count()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return 2 if len(os.sched_getaffinity(0)) >= 2 and memory >= 2 * (self.kv_cache_gib + CPU_SERVER_GIB) else 1

    def access_on(self, cluster: Cluster) -> ServerAccess:
        """How the client reaches them. A few requests more than a server decodes wait there, so that it never does."""
        number = self.number_on(cluster) * max(len(cluster.hosts), 1)
        fields = {name: getattr(self, name) for name in ServerAccess.model_fields}
        if "requests_per_server" not in self.model_fields_set:
            fields["requests_per_server"] = self.sequences + max(self.sequences // 8, 1)
        if "patience_s" not in self.model_fields_set:
            # A server that died is being started again, as long as that takes.
            fields["patience_s"] = max(self.patience_s, self.start_timeout_s)
        return ServerAccess(**{**fields, "urls": tuple(self.url(place) for place in range(number))})


class ExternalServers(ServerAccess):
    """Servers that somebody else keeps running, by address."""

    kind: Literal["external"]
    urls: tuple[str, ...] = Field(min_length=1, max_length=1024)

    def access_on(self, cluster: Cluster) -> ServerAccess:  # noqa: ARG002 - they stand where they stand
        return ServerAccess(**{name: getattr(self, name) for name in ServerAccess.model_fields})


Servers = Annotated[LocalServers | ExternalServers, Field(discriminator="kind")]


class Slurm(Config):
    """An allocation of a Slurm cluster: `recover-lora run` writes a batch script and submits it."""

    nodes: PositiveInt
    arguments: tuple[str, ...] = ()
    """More arguments for sbatch, such as --partition=mi300x, --gpus-per-node=8, --time=08:00:00."""
    srun_arguments: tuple[str, ...] = ()
    """More arguments for srun, which starts torchrun on every node."""
    notice_s: PositiveInt = 120
    """Seconds before the time limit at which training saves and the job is queued again."""


class Hardware(Config):
    """What a device and its links are good for: the bars of `recover-lora preflight`, the rates of `plan`."""

    gemm_tflops: PositiveFloat | None = None
    """Of large matrix products on one device, in the dtype that it trains in."""
    memory_gb_s: PositiveFloat | None = None
    """Of a copy on one device, read and written bytes together."""
    memory_gib: PositiveFloat | None = None
    """Of one device."""
    allreduce_gb_s: PositiveFloat | None = None
    """Bus bandwidth of an all-reduce inside one host."""
    network_gb_s: PositiveFloat | None = None
    """Bus bandwidth of an all-reduce over all hosts."""
    disk_free_gib: PositiveFloat | None = 10.0


HOST_NAME = r"^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?$"
HostName = Annotated[str, Field(pattern=HOST_NAME)]


class Cluster(Config):
    name: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda stands for CUDA and ROCm builds of torch; auto takes a GPU when torch sees one."""
    processes: PositiveInt = 1
    """Training processes on a host, one a device."""
    nodes: tuple[HostName, ...] = ()
    """Hosts that train together, by the names that ssh knows, with this checkout and the runs' folder at the same
    place; the first is the master. Left out: this host alone."""
    hostfile: Path | None = None
    """The same as a file of lines `<host> slots=<processes>`, as mpirun and DeepSpeed read it."""
    slurm: Slurm | None = None
    """The hosts are a Slurm allocation."""
    master_port: int = Field(default=29500, ge=1024, le=65535)
    interface: str | None = None
    """Network interface between the hosts (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); found out unless given."""
    heartbeat_s: NonNegativeFloat = 30.0
    """All ranks have ended so many seconds after one of them went missing; 0: nobody watches."""
    image: str | None = None
    """Container image of the hosts; Slurm's srun is given it (--container-image), elsewhere it is noted only."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every stage."""
    pass_environment: tuple[str, ...] = ("MLFLOW_*", "HF_*", "AWS_*", "AZURE_*", "GOOGLE_*")
    """Variables of this host's environment that the other hosts get too, through a file that only the user can read:
    no command line shows them."""
    hardware: Hardware = Hardware()
    """What every host is to reach."""
    servers: Servers | None = None
    """Where `generate.engine: vllm` has its samples drawn."""

    @model_validator(mode="after")
    def _one_kind_of_hosts(self) -> Cluster:
        given = [name for name in ("nodes", "hostfile", "slurm") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        if len(set(self.nodes)) < len(self.nodes):
            raise ValueError("nodes: a host stands there twice")
        return self

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of the hosts that train together; empty for this host alone, and for Slurm, which names them.

        Raises UserError for a hostfile that cannot be read or has another number of slots.
        """
        if self.hostfile is None:
            return self.nodes
        return read_hostfile(self.hostfile, self.processes)


def read_hostfile(path: Path, processes: int) -> tuple[str, ...]:
    """Its hosts in their order. Raises UserError where a line is not `<host> slots=<processes>`."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError("hostfile", f"{path} is not readable ({error.strerror})", "name another file") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        if not (content := line.partition("#")[0].strip()):
            continue
        host, *slots = content.split(None, 1)
        if "".join(slots).replace(" ", "") != f"slots={processes}" or not re.fullmatch(HOST_NAME, host):
            raise UserError(
                f"{path}, line {number}", content, f"write `{host} slots={processes}`, as the cluster's processes"
            )
        hosts.append(host)
    if not hosts or len(set(hosts)) < len(hosts):
        raise UserError(str(path), "no hosts, or one of them twice", "one line a host")
    return tuple(hosts)


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

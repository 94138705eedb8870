"""What the devices of a cluster and the links between them are good for: measured on this host, or as its file says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import Cluster, uses_gpu
from launch.probe import Product, devices
from recovery.artifacts import REPOSITORY
from recovery.errors import Unavailable, UserError
from recovery.tape import Work

GIB = 2**30
LAUNCH_S = {"cuda": 5e-6, "cpu": 1e-5}
"""Least time of one operation: what the host needs to start it."""
EFFICIENCY = {"cuda": 0.7, "cpu": 0.75}
"""Share of the rate of large matrix products, which stands in a cluster's file, that those of a model reach. An
assumption; on this host it is measured (recovery.rehearsal.pace)."""
RUNTIME_GPU = 3 * GIB
"""Of a device before any model is there: its context, libraries' workspaces, NCCL's channels. An assumption."""


@dataclass(frozen=True)
class Rates:
    """Of one device, and of the links."""

    gpu: bool
    flops_s: float
    """Of a model's matrix products."""
    bytes_s: float
    memory: float
    """Bytes of one device."""
    runtime: float
    """Bytes of a process before any model is there."""
    inside_bytes_s: float | None
    """Bus bandwidth of an all-reduce inside a host."""
    across_bytes_s: float | None
    """The same over all hosts."""
    sharing: int | None
    """Processes that share a device of this host, where the rates were measured; None: they are of a cluster's file."""
    source: str
    """In words, for the table."""

    def seconds(self, work: Work) -> float:
        """By the roofline."""
        return work.seconds(self.flops_s, self.bytes_s, LAUNCH_S["cuda" if self.gpu else "cpu"])


def rates_of(cluster: Cluster, hosts: int, product: Product) -> Rates:
    """Of this host where the cluster is no more than that, else what the cluster's file says under `hardware`.

    product: like those that the model spends most of its time in; what is timed here.
    Raises UserError for a rate that the file leaves out.
    """
    if hosts == 1 and not (cluster.hosts or cluster.slurm):
        return measured(cluster, product)
    wanted = ["gemm_tflops", "memory_gb_s", "memory_gib"]
    wanted += ["allreduce_gb_s"] * (cluster.processes > 1) + ["network_gb_s"] * (hosts > 1)
    hardware = cluster.hardware
    for name in wanted:
        if getattr(hardware, name) is None:
            raise UserError(
                f"cluster {cluster.name}: hardware.{name}",
                "missing",
                "give it; `recover-lora preflight` measures it, and the shipped mi300x.yaml has an example",
            )
    gpu = cluster.device != "cpu"
    flops, bandwidth, memory = hardware.gemm_tflops or 0, hardware.memory_gb_s or 0, hardware.memory_gib or 0
    inside, across = hardware.allreduce_gb_s, hardware.network_gb_s
    efficiency = EFFICIENCY["cuda" if gpu else "cpu"]
    links = [f"{rate:g} GB/s {where}" for rate, where in ((inside, "inside a host"), (across, "between hosts")) if rate]
    return Rates(
        gpu=gpu,
        flops_s=efficiency * flops * 1e12,
        bytes_s=bandwidth * 1e9,
        memory=memory * GIB,
        runtime=RUNTIME_GPU if gpu else _runtime(),
        inside_bytes_s=None if inside is None else inside * 1e9,
        across_bytes_s=None if across is None else across * 1e9,
        sharing=None,
        source=f"rates of the cluster's file: {flops:g} TFLOP/s in matrix products, of which a model reaches "
        f"{efficiency:.0%}; {bandwidth:g} GB/s of memory; all-reduce {', '.join(links) or 'none'}",
    )


def measured(cluster: Cluster, product: Product) -> Rates:
    """Of this host, in ten seconds."""
    gpu = uses_gpu(cluster)
    found = devices("auto" if gpu else "cpu", product)[0]
    # The processes of a CPU share it.
    sharing = 1 if gpu else cluster.processes
    inside = _inside(cluster) if cluster.processes > 1 else None
    link = "" if inside is None else f"; all-reduce {inside / 1e9:.2g} GB/s"
    return Rates(
        gpu=gpu,
        flops_s=found["gemm_tflops"] * 1e12 / sharing,
        bytes_s=found["memory_gb_s"] * 1e9 / sharing,
        memory=found["memory_gib"] * GIB / sharing,
        runtime=RUNTIME_GPU if gpu else _runtime(),
        inside_bytes_s=inside,
        across_bytes_s=None,
        sharing=sharing,
        source=f"rates measured here: {found['gemm_tflops'] * 1e3:,.0f} GFLOP/s in products of the model's size in "
        f"{product.dtype}; {found['memory_gb_s']:.3g} GB/s of memory{link}"
        + (f"; shared by {sharing} processes" if sharing > 1 else ""),
    )


def _inside(cluster: Cluster) -> float:
    """Bus bandwidth of an all-reduce between this host's processes, bytes a second."""
    # Ends the workers too, which killing their launcher would leave waiting for each other.
    command = ["timeout", "--kill-after", "10", "120", sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(cluster.processes), "--module", "launch.probe"]
    environment = {**os.environ, **({} if uses_gpu(cluster) else {"DS_ACCELERATOR": "cpu"})}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise Unavailable(f"the processes of this host cannot reduce together: {done.stderr.strip()[-200:]}")
    return float(json.loads(lines[-1])["hosts"][0]["inside_gb_s"]) * 1e9


def _runtime() -> float:
    """Bytes of a training process on a CPU before any model is there: such a process is started and asked."""
    code = "import recovery.profile, mlflow, deepspeed, peft, transformers.modeling_utils\n"
    code += (
        "from recovery.engine import start_distributed\nstart_distributed()\nprint(open('/proc/self/status').read())"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RECOVER_LORA_HEARTBEAT_S": "0"}
    command = [sys.executable, "-c", code]
    if not Path("/proc/self/status").exists():
        return 0.7 * GIB
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"VmRSS:\s+(\d+) kB", done.stdout)
    if found is None:
        raise Unavailable(f"a training process cannot be started here: {done.stderr.strip()[-200:]}")
    return int(found.group(1)) * 1024.0

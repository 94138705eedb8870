"""A cluster in equal parts, for points of a study that run at the same time. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

from launch.cluster import Cluster, LocalServers, uses_gpu
from launch.distributed import in_batch_job
from recovery.errors import UserError

PORTS = 100
"""Apart from each other are the ports of two shares."""
Item = TypeVar("Item")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Share:
    """What one point has for itself."""

    cluster: Cluster
    environment: dict[str, str]
    """Of its processes, beside this one's."""
    cores: tuple[int, ...] | None = None
    """Of this host; None: all of them."""


def shares_of(cluster: Cluster, count: int) -> list[Share]:
    """The cluster's hosts, or this host's devices, or its cores, in `count` parts.

    Raises UserError for too many, and for a Slurm cluster whose allocation this process does not run in.
    """
    option = f"--parallel {count}"
    if cluster.slurm is not None and (count > 1 or not in_batch_job()):
        found = f"cluster {cluster.name} is Slurm's, and a study submits no jobs"
        raise UserError("study", found, "run it in a batch job of yours, slice by slice (--only), one point at a time")
    if count == 1:
        return [Share(cluster, {})]
    if hosts := cluster.hosts:
        _check(option, count, len(hosts), "hosts")
        return [
            Share(_apart(cluster, number, 1, nodes=_part(hosts, number, count), hostfile=None), {})
            for number in range(count)
        ]
    if uses_gpu(cluster):
        devices = _devices()
        _check(option, count, len(devices), "GPUs")
        parts = [_part(devices, number, count) for number in range(count)]
        return [
            Share(
                _apart(cluster, number, count, processes=min(cluster.processes, len(part))),
                dict.fromkeys(VISIBLE, ",".join(part)),
            )
            for number, part in enumerate(parts)
        ]
    cores = tuple(sorted(os.sched_getaffinity(0)))
    _check(option, count, len(cores), "cores")
    processes = max(cluster.processes // count, 1)
    return [
        Share(_apart(cluster, number, count, processes=processes), {}, _part(cores, number, count))
        for number in range(count)
    ]


def _check(option: str, count: int, there: int, what: str) -> None:
    if count > there:
        raise UserError(option, f"the cluster has {there} {what}", f"--parallel {there} at most")


def _part(whole: tuple[Item, ...], number: int, count: int) -> tuple[Item, ...]:
    return whole[len(whole) * number // count : len(whole) * (number + 1) // count]


def _devices() -> tuple[str, ...]:
    for name in VISIBLE:
        if listed := os.environ.get(name):
            return tuple(listed.split(","))
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def _apart(cluster: Cluster, number: int, of: int, **changes: object) -> Cluster:
    """A share's cluster with ports of its own. of: shares of one host, which divide its servers."""
    servers = cluster.servers
    if isinstance(servers, LocalServers):
        own: dict[str, object] = {"port": servers.port + PORTS * number}
        if isinstance(servers.count, int):
            own["count"] = max(servers.count // of, 1)
        elif of > 1 and not uses_gpu(cluster):
            own["count"] = 1  # auto would take the whole memory for its own
        changes["servers"] = servers.model_copy(update=own)
    return cluster.model_copy(update={**changes, "master_port": cluster.master_port + PORTS * number})

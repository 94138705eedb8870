"""Is a cluster fit to start: every host is looked at and measured, in parallel, and compared with the bars."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from launch.distributed import SSH_OPTIONS, base_environment
from recovery.artifacts import REPOSITORY
from recovery.errors import EXIT_DONE, EXIT_FAILED, Unavailable, UserError

PROBE_S = 100.0
CLOCK_SKEW_S = 1.0
HERE = "this host"
SLURM_HOSTS = "SLURM_JOB_NODELIST"


@dataclass
class Report:
    """What was found. faults: what is below its bar or wrong, by host."""

    hosts: dict[str, dict[str, Any]]
    across_gb_s: float | None = None
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def on_host(host: str, command: Sequence[str], environment: dict[str, str]) -> list[str]:
    """A command as it is run on a host of the cluster."""
    if host == HERE:
        return list(command)
    assignments = [f"{name}={value}" for name, value in environment.items()]
    remote = f"cd {shlex.quote(str(REPOSITORY))} && exec env {shlex.join([*assignments, *command])}"
    return ["ssh", *SSH_OPTIONS, host, remote]


def preflight(cluster: Cluster, runs_dir: Path, models: list[str]) -> Report:
    """Look at every host. models: folders that all must see.

    Raises Unavailable where no host answers, UserError for Slurm outside of an allocation, where hosts are not known.
    """
    if cluster.slurm is not None:
        cluster = cluster.model_copy(update={"nodes": allocated(cluster), "slurm": None})
    began = time.monotonic()
    hosts = cluster.hosts or (HERE,)
    environment = base_environment(cluster)
    settings = {"device": cluster.device, "runs_dir": str(runs_dir.resolve()), "models": models}
    settings["tracking"] = os.environ.get("MLFLOW_TRACKING_URI")
    report = Report({})

    def ask(host: str) -> tuple[dict[str, Any] | None, str, float]:
        command = on_host(host, [sys.executable, "-m", "launch.probe"], environment)
        sent = time.time()
        try:
            done = subprocess.run(
                command,
                input=json.dumps(settings),
                env={**os.environ, **environment},
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                timeout=PROBE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, f"no answer within {PROBE_S:.0f} s", 0.0
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1][:200], 0.0
        answer = json.loads(done.stdout.splitlines()[-1])
        # Its clock was read after the request was sent and before the measurements began.
        least, most = answer["clock"] - (time.time() - answer["seconds"]), answer["clock"] - sent
        return answer, "", max(least, 0.0) + min(most, 0.0)

    with ThreadPoolExecutor(min(len(hosts), 64)) as pool:
        for host, (answer, error, skew) in zip(hosts, pool.map(ask, hosts), strict=True):
            if answer is None:
                report.faults.append(f"{host}: does not answer ({error})")
            else:
                report.hosts[host] = {**answer, "skew_s": skew}
    if not report.hosts:
        raise Unavailable("; ".join(report.faults))
    if len(report.hosts) == len(hosts) and len(hosts) * cluster.processes > 1:
        measure_network(cluster, hosts, environment, report)
    compare(cluster, report, models)
    report.seconds = time.monotonic() - began
    return report


def allocated(cluster: Cluster) -> tuple[str, ...]:
    """The hosts of the Slurm allocation that this process is in. Raises UserError outside of one."""
    listed = os.environ.get(SLURM_HOSTS)
    if not listed:
        found = f"cluster {cluster.name} is a Slurm allocation, whose hosts are not known yet"
        nodes = cluster.slurm.nodes if cluster.slurm is not None else 1
        raise UserError("--cluster", found, f"start it in one: salloc --nodes {nodes} --exclusive")
    done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"scontrol does not tell the hosts of {listed}: {done.stderr.strip()[:200]}")
    return tuple(done.stdout.split())


def measure_network(cluster: Cluster, hosts: Sequence[str], environment: dict[str, str], report: Report) -> None:
    """All-reduce inside every host and over all, by torchrun on each."""
    master = "127.0.0.1" if hosts[0] == HERE else hosts[0]
    meeting = ["--nnodes", str(len(hosts)), "--nproc-per-node", str(cluster.processes)]
    meeting += ["--master-addr", master, "--master-port", str(cluster.master_port)]
    started = []
    for number, host in enumerate(hosts):
        # On every host its own end: an ssh that is ended here leaves what it started there.
        torchrun = ["timeout", "-k", "5", f"{PROBE_S:.0f}", sys.executable, "-m", "torch.distributed.run"]
        rank = ["--node-rank", str(number), "--module", "launch.probe"]
        command = on_host(host, [*torchrun, *meeting, *rank], {**environment, "NCCL_DEBUG": "WARN"})
        own = {**os.environ, **environment}
        started.append(
            subprocess.Popen(
                command, env=own, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=PROBE_S + 10) for process in started]
    except subprocess.TimeoutExpired:
        report.faults.append(f"the network's measurement did not end within {PROBE_S:.0f} s")
        return
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    lines = [line for line in outputs[0][0].splitlines() if line.startswith("{")]
    if not lines:
        said = [line for line in outputs[0][1].splitlines() if "Error" in line] or ["no reason given"]
        report.faults.append(f"the hosts cannot train together: {said[-1][:200]}")
        return
    found = json.loads(lines[-1])
    report.across_gb_s = found["across_gb_s"]
    for host, own in zip(hosts, found["hosts"], strict=True):
        report.hosts[host]["inside_gb_s"] = own["inside_gb_s"]


def compare(cluster: Cluster, report: Report, models: list[str]) -> None:
    """Note everything that is below its bar, or differs from host to host."""
    bars, faults = cluster.hardware, report.faults

    def below(host: str, what: str, found: float | None, bar: float | None, unit: str) -> None:
        if bar is not None and found is not None and found < bar:
            faults.append(f"{host}: {what} {found:.3g} {unit}, below {bar:.3g}")

    for what, key in (("code", "code"), ("packages", "versions")):
        most = statistics.mode(json.dumps(found[key], sort_keys=True) for found in report.hosts.values())
        odd = [host for host, found in report.hosts.items() if json.dumps(found[key], sort_keys=True) != most]
        if odd:
            faults.append(f"{', '.join(odd)}: other {what} than the rest")
    for host, found in report.hosts.items():
        devices = found["devices"]
        if devices and "threads" not in devices[0]["name"] and len(devices) < cluster.processes:
            faults.append(f"{host}: {len(devices)} devices visible for {cluster.processes} processes")
        if not devices:
            faults.append(f"{host}: no device visible")
        for number, device in enumerate(devices):
            name = f"device {number}: " if len(devices) > 1 else ""
            below(host, f"{name}matrix products", device["gemm_tflops"], bars.gemm_tflops, "TFLOP/s")
            below(host, f"{name}memory bandwidth", device["memory_gb_s"], bars.memory_gb_s, "GB/s")
            below(host, f"{name}memory", device["memory_gib"], bars.memory_gib, "GiB")
        below(host, "all-reduce inside the host", found.get("inside_gb_s"), bars.allreduce_gb_s, "GB/s")
        if "error" in found["disk"]:
            faults.append(f"{host}: runs cannot be written ({found['disk']['error']})")
        else:
            below(host, "free disk", found["disk"]["free_gib"], bars.disk_free_gib, "GiB")
        if abs(found["skew_s"]) > CLOCK_SKEW_S:
            faults.append(f"{host}: its clock is off by {found['skew_s']:+.1f} s")
        if found["missing_models"]:
            faults.append(f"{host}: does not see {', '.join(found['missing_models'])} (of {len(models)} models)")
        if found["tracking"] is not None:
            faults.append(f"{host}: MLflow does not answer ({found['tracking']})")
    below("between hosts", "all-reduce", report.across_gb_s, bars.network_gb_s, "GB/s")


def table(cluster: Cluster, report: Report) -> str:
    """The report for a terminal."""
    head = (
        "host",
        "code",
        "devices",
        "TFLOP/s",
        "GB/s memory",
        "GB/s all-reduce",
        "GiB disk",
        "GB/s disk",
        "clock",
    )
    rows: list[tuple[str, ...]] = [head]
    for host, found in report.hosts.items():
        devices, disk = found["devices"], found["disk"]
        slowest = {key: min((d[key] for d in devices), default=0.0) for key in ("gemm_tflops", "memory_gb_s")}
        inside = found.get("inside_gb_s")
        rows.append(
            (
                host,
                found["code"],
                f"{len(devices)} x {devices[0]['name']}" if devices else "none",
                f"{slowest['gemm_tflops']:.3g}",
                f"{slowest['memory_gb_s']:.3g}",
                "-" if inside is None else f"{inside:.3g}",
                f"{disk['free_gib']:.0f}" if "free_gib" in disk else "-",
                f"{disk['write_gb_s']:.2g}" if "write_gb_s" in disk else "-",
                f"{found['skew_s']:+.2f} s",
            )
        )
    bars = cluster.hardware
    wanted = [bars.gemm_tflops, bars.memory_gb_s, bars.allreduce_gb_s, bars.disk_free_gib]
    shown = ["-" if bar is None else f"{bar:g}" for bar in wanted]
    rows.append(("bars", "", "", *shown, "", f"{CLOCK_SKEW_S:g} s"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if report.across_gb_s is not None:
        lines.append(f"all-reduce over all hosts: {report.across_gb_s:.3g} GB/s")
    lines += [f"NOT FIT  {fault}" for fault in report.faults] or ["fit to start"]
    return "\n".join([*lines, f"{report.seconds:.0f} s"])


def run_preflight(cluster: Cluster, runs_dir: Path, models: list[str]) -> int:
    report = preflight(cluster, runs_dir, models)
    print(table(cluster, report))
    return EXIT_FAILED if report.faults else EXIT_DONE

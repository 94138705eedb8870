"""How a stage is started on its devices: by torchrun on one host, by DeepSpeed's launcher on several, by srun in Slurm.

Every rank gets the same: the cluster's variables, the heartbeat's limit, a file by which it is asked to stop, and a
file with what must not stand on a command line.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from launch.cluster import Cluster
from launch.stages import Stage
from recovery.artifacts import REPOSITORY
from recovery.environment import SECRETS_VARIABLE
from recovery.heartbeat import LIMIT_VARIABLE
from recovery.stage import LAUNCHER, STOP_VARIABLE

# A connection to a host that was cut off ends after 20 s, and nobody is asked for a password.
SSH_SETTINGS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=4")
SSH_OPTIONS = tuple(part for setting in SSH_SETTINGS for part in ("-o", setting))
SLURM_JOB = "SLURM_JOB_ID"
SLURM_NODE = "SLURMD_NODENAME"
"""Set on an allocation's nodes; a shell of salloc on a login node has the job's number alone."""
SECRET = ".environment"
"""A part of the name of files whose content is shown to nobody."""


@dataclass(frozen=True)
class Start:
    """What starts a stage."""

    command: list[str]
    environment: dict[str, str]
    """Beside this process's own."""
    files: dict[Path, str] = field(default_factory=dict)
    """To be written before."""
    stop_file: Path | None = None
    """Other hosts take part: this file asks them to stop, and nothing of it may outlive this process."""

    @property
    def elsewhere(self) -> bool:
        return self.stop_file is not None


def in_batch_job() -> bool:
    return SLURM_NODE in os.environ


def base_environment(cluster: Cluster) -> dict[str, str]:
    """The variables of every process on a host of the cluster."""
    environment = {**cluster.environment, LIMIT_VARIABLE: f"{cluster.heartbeat_s:g}"}
    if cluster.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if cluster.interface is not None:
        environment |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    environment["PYTHONPATH"] = python_path()
    return environment


def python_path() -> str:
    """PYTHONPATH of what is started: the rooms are imported from this checkout, wherever the command itself began."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def start_of(stage: Stage, job_file: Path, cluster: Cluster) -> Start:
    """How the stage is started on this cluster; typed by hand it does the same."""
    environment = base_environment(cluster)
    if stage.distributed and (cluster.hosts or cluster.slurm is not None):
        return _on_hosts(stage, job_file.resolve(), cluster, environment)
    environment[LAUNCHER] = str(os.getpid())
    if stage.distributed and cluster.processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cluster.processes)]
        return Start([sys.executable, *torchrun, "--module", stage.module, str(job_file)], environment)
    return Start([sys.executable, "-m", stage.module, str(job_file)], environment)


def _on_hosts(stage: Stage, job_file: Path, cluster: Cluster, environment: dict[str, str]) -> Start:
    stop_file = job_file.with_suffix(".stop")
    secrets = job_file.with_suffix(f"{SECRET}.json")
    environment |= {STOP_VARIABLE: str(stop_file), SECRETS_VARIABLE: str(secrets)}
    files = {secrets: json.dumps(passed_on(cluster), indent=2) + "\n"}
    what = ["--module", stage.module, str(job_file)]
    if cluster.slurm is not None:
        slurm = cluster.slurm
        container = ["--container-image", cluster.image] if cluster.image is not None else []
        nodes = str(slurm.nodes)
        srun = ["srun", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
        head = os.environ.get(SLURM_NODE, "FIRST_NODE")
        torchrun = ["-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(cluster.processes)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{head}:{cluster.master_port}"]
        meeting += ["--rdzv-id", os.environ.get(SLURM_JOB, "JOB_ID")]
        command = [*srun, *container, *slurm.srun_arguments, sys.executable, *torchrun, *meeting, *what]
        return Start(command, environment, files, stop_file)
    hosts = cluster.hosts
    hostfile, exports = job_file.with_suffix(".hostfile"), job_file.with_suffix(".deepspeed_env")
    files[hostfile] = "".join(f"{host} slots={cluster.processes}\n" for host in hosts)
    # Its parser takes lines of NAME=value alone; what is not plain it puts between double quotes for a shell.
    files[exports] = "".join(f"{name}={_between_quotes(value)}\n" for name, value in sorted(environment.items()))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi"]
    master = ["--master_addr", hosts[0], "--master_port", str(cluster.master_port)]
    command = [*launcher, *master, "--no_ssh_check", "--no_local_rank", "--log_level", "warning", *what]
    own = {"DS_ENV_FILE": str(exports), "PDSH_SSH_ARGS_APPEND": shlex.join(SSH_OPTIONS)}
    return Start(command, own, files, stop_file)


def _between_quotes(value: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", value)


def passed_on(cluster: Cluster) -> dict[str, str]:
    """The variables of this host's environment that all hosts get."""
    wanted = cluster.pass_environment
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    }


def environment_of(start: Start, cluster: Cluster) -> dict[str, str]:
    """The whole environment of the process that is started."""
    if not start.elsewhere:
        return {**os.environ, **start.environment}
    # The launcher would put them on the command lines of all hosts (MLFLOW_*); there they come from the file.
    hidden = passed_on(cluster)
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and name != LAUNCHER and not name.startswith("MLFLOW_")
    }
    return {**own, **start.environment}

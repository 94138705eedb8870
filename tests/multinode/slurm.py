"""A real Slurm of two nodes, the hosts of hosts.py: one controller, a daemon on each, munge between them."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from tests.multinode.hosts import Host, Hosts
from tests.processes import wait_until

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONFIG = """\
ClusterName=recover-lora
SlurmctldHost={a.name}({a.address})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName={a.name} NodeAddr={a.address} CPUs=2 State=UNKNOWN
NodeName={b.name} NodeAddr={b.address} CPUs=2 State=UNKNOWN
PartitionName=small Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)" if absent else None


class Slurm:
    """with Slurm(hosts, folder): ... its commands work with `environment`. Its processes end with the hosts."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._hosts, self._folder = hosts, folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        folder, hosts = self._folder, self._hosts
        (folder / "state").mkdir(parents=True)
        (folder / "slurm.conf").write_text(CONFIG.format(a=hosts.a, b=hosts.b, folder=folder))
        # Nothing of cgroups is used, but slurmd looks for them unless it is told which there are.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        own = {name: str(folder / f"munge.{name}") for name in ("socket", "pid", "log", "seed", "key")}
        files = ["--socket", own["socket"], "--pid-file", own["pid"], "--log-file", own["log"]]
        files += ["--seed-file", own["seed"], "--key-file", own["key"]]
        self._start(hosts.a, "munged", "--force", *files)
        self._start(hosts.a, "slurmctld")
        for host in (hosts.a, hosts.b):
            (folder / f"spool-{host.name}").mkdir()
            self._start(host, "slurmd", "-N", host.name)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == "idle 2", 60)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(
            self._hosts.a.command("scontrol", "shutdown"), env=self._environment, check=False, capture_output=True
        )
        note = self._folder / "munge.pid"
        if note.exists():
            os.kill(int(note.read_text()), 15)

    @property
    def _environment(self) -> dict[str, str]:
        return self._hosts.environment(**self.environment)

    def _start(self, host: Host, program: str, *arguments: str) -> None:
        """A daemon, which leaves its starter by itself."""
        path = shutil.which(program, path=PATH)
        assert path is not None
        done = subprocess.run(
            host.command(path, *arguments), env=self._environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            self._hosts.a.command(*command), env=self._environment, check=False, capture_output=True, text=True
        )
        return done.stdout.strip()

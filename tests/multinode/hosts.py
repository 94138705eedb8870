"""Two hosts on one machine: network namespaces joined by a cable, each with its own name, addresses and real sshd.

Needs root, iproute2, openssh-server and pdsh. What runs on a host is what `ip netns pids` lists: a host is killed,
frozen or cut off without touching anything else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

NEEDED = ("ip", "sshd", "ssh-keygen", "pdsh", "unshare")
NETWORK = "10.213.47"


def missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if absent := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        return f"{', '.join(absent)} not installed (Debian: iproute2 openssh-server pdsh)"
    probe = subprocess.run(["ip", "netns", "add", "recover-lora-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"network namespaces cannot be made here ({probe.stderr.strip()})"
    subprocess.run(["ip", "netns", "delete", "recover-lora-probe"], check=True)
    return None


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Host:
    def __init__(self, name: str, address: str, space: str, folder: Path) -> None:
        self.name, self.address, self.space, self.folder = name, address, space, folder
        self.interface = f"{name}-0"

    def command(self, *command: str) -> list[str]:
        """A command as it is run on this host."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.space, *named, *command]

    def start_sshd(self) -> None:
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert sshd is not None
        log = str(self.folder / f"sshd-{self.name}.log")
        run(*self.command(sshd, "-f", str(self.folder / f"sshd_{self.name}"), "-E", log))

    def processes(self) -> list[int]:
        listing = subprocess.run(["ip", "netns", "pids", self.space], check=True, capture_output=True, text=True)
        return [int(process) for process in listing.stdout.split()]

    def signal_all(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """As if its power were cut."""
        with contextlib.suppress(subprocess.CalledProcessError):  # the cable is gone with the other host
            self.cut_off()
        while self.processes():
            self.signal_all(signal.SIGKILL)
            time.sleep(0.05)

    def cut_off(self) -> None:
        run("ip", "-n", self.space, "link", "set", self.interface, "down")

    def connect(self) -> None:
        run("ip", "-n", self.space, "link", "set", self.interface, "up")


class Hosts:
    """with Hosts(folder) as hosts: ... hosts.a and hosts.b, which reach each other by name through ssh."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.a, self.b = (
            Host(f"node-{letter}", f"{NETWORK}.{number}", f"recover-lora-{letter}", folder)
            for number, letter in ((1, "a"), (2, "b"))
        )

    def __enter__(self) -> Hosts:
        self._remove()
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        for key in ("host_key", "user_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in before a login
        names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in (self.a, self.b))
        run("ip", "link", "add", self.a.interface, "type", "veth", "peer", "name", self.b.interface)
        for host in (self.a, self.b):
            run("ip", "netns", "add", host.space)
            run("ip", "link", "set", host.interface, "netns", host.space)
            run("ip", "-n", host.space, "address", "add", f"{host.address}/24", "dev", host.interface)
            run("ip", "-n", host.space, "link", "set", "lo", "up")
            host.connect()
            own = Path("/etc/netns") / host.space  # laid over /etc by `ip netns exec`
            own.mkdir(parents=True, exist_ok=True)
            (own / "hosts").write_text(names)
            (folder / f"sshd_{host.name}").write_text(
                f"ListenAddress {host.address}\nHostKey {folder / 'host_key'}\n"
                f"AuthorizedKeysFile {folder / 'authorized_keys'}\nPidFile none\nUsePAM no\nStrictModes no\n"
                "PermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\n"
            )
            host.start_sshd()
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder / 'user_key'}\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\n"
            "LogLevel ERROR\n"
        )
        ssh = shutil.which("ssh")
        assert ssh is not None
        wrapper = folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {folder / "ssh_config"} "$@"\n')
        wrapper.chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        spaces = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split()
        for host in (self.a, self.b):
            if host.space in spaces:
                host.kill()
                run("ip", "netns", "delete", host.space)
                shutil.rmtree(Path("/etc/netns") / host.space, ignore_errors=True)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a command on a host: `ssh` and pdsh find the keys, nothing else of this machine's is changed."""
        path = f"{self._folder / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**os.environ, "PATH": path, **more}

    def start(self, *arguments: str, output: Path, environment: Mapping[str, str] | None = None) -> Any:
        """`recover-lora ARGUMENTS` on the first host, in the background."""
        with output.open("ab") as stream:
            return subprocess.Popen(
                self.a.command(sys.executable, "-m", "launch.cli", *arguments),
                cwd=REPOSITORY,
                env=self.environment(**(environment or {})),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def complete(self, arguments: Sequence[str], output: Path, seconds: float) -> int:
        """The same, waited for; its exit code."""
        return int(self.start(*arguments, output=output).wait(seconds))

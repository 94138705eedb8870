"""The heartbeat of a stage on several processes: when one dies, freezes or is cut off, all end, and it is named.

Beside every rank runs a watcher (`python -m recovery.heartbeat`), a process of its own, which lives on while its rank
is frozen. The rank sends it a byte a second through a pipe; the watchers send theirs to a hub beside rank 0. The hub's
word that a rank is missing, or the hub's own silence, makes every watcher end its rank with SIGKILL, so that no
collective waits for what will not come. A watcher also ends its rank when the launcher's agent on its host is gone.

Standard library only: a watcher costs 10 MB.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

LIMIT_VARIABLE = "RECOVER_LORA_HEARTBEAT_S"
"""Environment: seconds within which all ranks have ended after one went missing; 0 turns the heartbeat off."""
DEFAULT_LIMIT_S = 30.0
PATIENCE = 0.8  # share of the limit after which a rank is missing; the rest is for ending the others
BEAT_S = 1.0
START_S = 600.0  # for all to come, as long as a process group waits for its members
GRACE_S = 5.0  # for the others to end by themselves when a rank failed with an error of its own
Leaving = Literal["done", "failed", "interrupted"]
LEAVINGS: tuple[Leaving, ...] = ("done", "failed", "interrupted")


@dataclass(frozen=True)
class Settings:
    """What a watcher is told on its standard input."""

    key: str
    rank: int
    ranks: int
    host: str
    agent: int
    """Process id of the rank's parent, the launcher's agent on this host."""
    hub: tuple[str, int] | None
    """Where the hub listens; None: this watcher runs it, and prints its port."""
    bind: str
    limit_s: float
    speaks: bool
    """Whether it says on standard error why it ends its rank: one on each host does."""


@dataclass
class Member:
    """A rank as the hub knows it."""

    host: str = "?"
    last: float = field(default_factory=time.monotonic)
    """When it was last known to live."""
    seen: bool = False
    """Whether its watcher has come yet: ranks start minutes apart where libraries load slowly."""
    left: Leaving | Literal["killed"] | None = None


# ---- in the rank ------------------------------------------------------------------------------------------


class Heart:
    """A rank's own end: a thread that beats, and the watcher that listens."""

    def __init__(self, settings: Settings) -> None:
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "recovery.heartbeat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
            start_new_session=True,  # a Ctrl-C in a terminal is for the rank
        )
        assert self._watcher.stdin is not None
        assert self._watcher.stdout is not None
        self._pipe, self._lock, self._over = self._watcher.stdin, threading.Lock(), threading.Event()
        self._write(json.dumps(asdict(settings)).encode() + b"\n")
        self.port = int(self._watcher.stdout.readline() or 0) if settings.hub is None else settings.hub[1]
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _write(self, data: bytes) -> None:
        with self._lock:
            self._pipe.write(data)
            self._pipe.flush()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                self._write(b".")
            except OSError:
                if not self._over.is_set():
                    os._exit(1)  # without a watcher nobody would notice the others' end

    def leave(self, how: Leaving) -> None:
        """Say that this rank ends, and wait until the watcher has passed it on."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._write(f"\n{how}\n".encode())
            self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watcher.wait(GRACE_S)


_heart: Heart | None = None


def start(rank: int, ranks: int) -> None:
    """Start this rank's heartbeat, after the process group was joined; nothing for a single rank. All must call it."""
    global _heart  # noqa: PLW0603 - one process is one rank
    limit_s = float(os.environ.get(LIMIT_VARIABLE, DEFAULT_LIMIT_S))
    if ranks == 1 or limit_s <= 0 or _heart is not None:
        return
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ranks)))
    address = "127.0.0.1" if local >= ranks else os.environ.get("MASTER_ADDR", socket.gethostname())
    speaks = int(os.environ.get("LOCAL_RANK", "0")) == 0

    def settings(key: str, hub: tuple[str, int] | None) -> Settings:
        # A host may know itself by an address that others cannot reach (127.0.1.1); strangers lack the key.
        bind = "127.0.0.1" if local >= ranks else ""
        return Settings(key, rank, ranks, socket.gethostname(), os.getppid(), hub, bind, limit_s, speaks)

    shared: list[tuple[str, int] | None] = [None]
    if rank == 0:
        key = secrets.token_hex(16)
        _heart = Heart(settings(key, None))
        shared[0] = (key, _heart.port)
    dist.broadcast_object_list(shared, 0)
    assert shared[0] is not None
    key, port = shared[0]
    if rank != 0:
        _heart = Heart(settings(key, (address, port)))


def leave(how: Leaving) -> None:
    """Say that this rank's work is over, however it went; nothing where there is no heartbeat."""
    if _heart is not None:
        _heart.leave(how)


# ---- the hub, beside rank 0 -------------------------------------------------------------------------------


class Hub:
    """Listens to the watchers of all ranks and tells each of them when one is missing."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._members = {rank: Member() for rank in range(settings.ranks)}
        self._server = socket.create_server((settings.bind, 0), backlog=min(settings.ranks, 1024))
        self.port = int(self._server.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._lines: dict[socket.socket, bytes] = {}
        self._ranks: dict[socket.socket, int] = {}

    def run(self) -> None:
        """Until all ranks have left, or the watchers have been told of one that is missing."""
        verdict, told_at = None, 0.0
        while verdict is None and any(member.left is None for member in self._members.values()):
            for key, _ in self._selector.select(BEAT_S / 2):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._server:
                    self._accept()
                else:
                    self._read(connection)
            verdict = self._verdict()
            if verdict is not None or time.monotonic() - told_at >= BEAT_S:
                self._tell("ok" if verdict is None else verdict)
                told_at = time.monotonic()
        time.sleep(BEAT_S)  # what was sent last is on its way

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        connection.settimeout(BEAT_S)
        self._lines[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        *lines, self._lines[connection] = (self._lines[connection] + data).split(b"\n")
        if len(self._lines[connection]) > 4096:
            data = b""
        for line in lines:
            if not self._take(connection, line):
                data = b""
        if not data:
            rank = self._ranks.pop(connection, None)
            if rank is not None and self._members[rank].left is None:
                self._members[rank].last -= self._settings.limit_s  # its watcher is gone
            self._selector.unregister(connection)
            del self._lines[connection]
            connection.close()

    def _take(self, connection: socket.socket, line: bytes) -> bool:
        """One line of a watcher; False where it does not belong to this run."""
        try:
            content = json.loads(line)
            if connection not in self._ranks:
                if not hmac.compare_digest(str(content["key"]), self._settings.key):
                    return False
                self._ranks[connection] = int(content["rank"])
                member = self._members[int(content["rank"])]
                member.host, member.seen, member.last = str(content["host"]), True, time.monotonic()
                return True
            member = self._members[self._ranks[connection]]
            member.last = time.monotonic() - float(content["silent_s"])
            member.left = content["left"]
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _verdict(self) -> str | None:
        """Why the others are to end, or None."""
        now, limit_s = time.monotonic(), self._settings.limit_s * PATIENCE
        if all(member.left is not None for member in self._members.values()):
            return None
        for rank, member in self._members.items():
            name = f"rank {rank} on {member.host}"
            if member.left == "killed":
                return f"{name} was killed"
            if member.left in ("failed", "interrupted") and now - member.last > GRACE_S:
                return f"{name} {'failed' if member.left == 'failed' else 'was interrupted'}"
            patience_s = limit_s if member.seen else max(limit_s, START_S)
            if member.left is None and now - member.last > patience_s:
                return f"{name} has not answered for {patience_s:.0f} s"
        return None

    def _tell(self, message: str) -> None:
        for connection in list(self._ranks):
            with contextlib.suppress(OSError):
                connection.sendall(message.encode() + b"\n")


# ---- the watcher, beside every rank -----------------------------------------------------------------------


class Watcher:
    def __init__(self, settings: Settings) -> None:
        self._settings, self._rank = settings, os.getppid()
        self._beat_at = time.monotonic()
        self._left: Leaving | Literal["killed"] | None = None
        self._word = b""
        self._heard_at = time.monotonic()
        self._heard = b""

    def run(self, hub: tuple[str, int]) -> None:
        """Until the rank has ended; it is ended here when another is missing."""
        why = None
        try:
            with socket.create_connection(hub, timeout=self._settings.limit_s * PATIENCE) as connection:
                hello = {"key": self._settings.key, "rank": self._settings.rank, "host": self._settings.host}
                connection.sendall(json.dumps(hello).encode() + b"\n")
                while why is None and self._left is None:
                    why = self._round(connection)
                self._pass_on(connection)
        except OSError as error:
            why = f"the host of rank 0 no longer answers ({error.strerror or error})"
        if why is not None and self._left is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rank, signal.SIGKILL)
            if self._settings.speaks:
                with contextlib.suppress(OSError):  # the launcher that would have read it is gone
                    print(f"error: {why}; ending the ranks on {self._settings.host}", file=sys.stderr, flush=True)

    def _round(self, connection: socket.socket) -> str | None:
        """One beat: listen to the rank and the hub, tell the hub. Returns why the rank is to end, or None."""
        began = time.monotonic()
        while (wait := began + BEAT_S - time.monotonic()) > 0 and self._left is None:
            ready, _, _ = select.select([sys.stdin, connection], [], [], wait)
            if sys.stdin in ready:
                self._listen_to_rank()
            if connection in ready:
                data = connection.recv(4096)
                if not data:
                    return "the heartbeat's hub beside rank 0 has ended"
                self._heard_at = time.monotonic()
                *lines, self._heard = (self._heard + data).split(b"\n")
                if told := [line for line in lines if line != b"ok"]:
                    return told[0].decode(errors="replace")
        now, limit_s = time.monotonic(), self._settings.limit_s * PATIENCE
        if now - began > limit_s:
            return f"{self._settings.host} stood still for {now - began:.0f} s"
        if now - self._heard_at > limit_s:
            return f"the host of rank 0 has not answered for {limit_s:.0f} s"
        if self._left is None and self._is_forsaken():
            return "the launcher is gone"
        self._pass_on(connection)
        return None

    def _listen_to_rank(self) -> None:
        data = os.read(sys.stdin.fileno(), 4096)
        self._beat_at = time.monotonic()
        self._word += data.replace(b".", b"")
        if not data:
            self._left = self._ending

    @property
    def _ending(self) -> Leaving | Literal["killed"]:
        """How the rank ended, by what it said last."""
        said = self._word.decode(errors="replace").strip()
        for how in LEAVINGS:
            if said == how:
                return how
        return "killed"

    def _pass_on(self, connection: socket.socket) -> None:
        line = {"silent_s": time.monotonic() - self._beat_at, "left": self._left}
        connection.sendall(json.dumps(line).encode() + b"\n")

    def _is_forsaken(self) -> bool:
        """Whether the launcher's agent on this host has ended, or the connection through which it was started."""
        try:
            parent = int(Path(f"/proc/{self._rank}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            parent = self._settings.agent  # no /proc, or the rank is just ending
        output = select.poll()
        output.register(2, select.POLLERR)
        broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))
        return parent != self._settings.agent or broken


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its rank
    with open(0, "rb", buffering=0, closefd=False) as pipe:  # beats follow the line
        content = json.loads(pipe.readline())
    settings = Settings(**{**content, "hub": tuple(content["hub"]) if content["hub"] else None})
    address, thread = settings.hub, None
    if address is None:
        hub = Hub(settings)
        print(hub.port, flush=True)
        address = ("127.0.0.1", hub.port)
        thread = threading.Thread(target=hub.run)
        thread.start()
    Watcher(settings).run(address)
    if thread is not None:
        thread.join()  # the other ranks' watchers may still need it


if __name__ == "__main__":
    main()

"""The pool of vLLM servers of a cluster: one a device of every host, each a process group of its own.

Started, waited for, started again when one dies (a bounded number of times), and ended: only those started here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from datagen.config import GenerateJob
from launch.cluster import Cluster, LocalServers, uses_gpu
from launch.distributed import SSH_OPTIONS, passed_on, python_path
from launch.share import VISIBLE
from recovery.artifacts import REPOSITORY
from recovery.config import Dtype, ModelInput
from recovery.errors import Unavailable, UserError
from recovery.progress import progress

log = logging.getLogger("recover-lora")
PROCESSOR = "datagen.vllm_processor:HybridSampling"
CPU_BATCH_TOKENS = 4096
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers of this host, past any proxy
POLL_S = 1.0
PAUSE_S = 30.0
"""Before the second restart of a server, twice as long before each later one: a link that is down for some minutes, or
a host that has not noticed yet, uses none of them up for nothing."""
HEALTHY_S = 600.0
"""After so long a life, earlier deaths no longer count."""
STOP_S = 15.0
LAST_LINES = 5


@dataclass
class Process:
    """One server. process: None where another command's was there before us."""

    number: int
    """Of its host's servers."""
    host: str | None
    """None: this one."""
    url: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    mark: socket.socket | None = None
    """That it is ours to start (see mark_of)."""
    was_healthy: bool = False
    restarts: int = 0
    begun: float = 0.0
    """Monotonic time of the last start."""
    due: float | None = None
    """When it is to be started again, where it died."""
    given_up: bool = False


def answers(url: str) -> bool:
    """Whether a healthy server listens there."""
    try:
        with DIRECT.open(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def visible_device(number: int) -> str:
    """The number-th of the devices that the user has left visible, by either variable: vLLM wants both alike.

    Raises UserError where there are fewer.
    """
    given = next((os.environ[name] for name in VISIBLE if os.environ.get(name)), "")
    visible = [device for device in given.split(",") if device]
    if visible and number >= len(visible):
        raise UserError("servers.count", f"{number + 1}, but devices {given} are visible", "set as many, or auto")
    return visible[number] if visible else str(number)


def is_free(port: int) -> bool:
    """Whether nobody listens there on this host's loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def mark_of(port: int) -> socket.socket | None:
    """Marks a port of this host as one on which we start servers, until it is closed or this process ends, however it
    does; None where another command has marked it.

    A free port is no sign that nobody starts a server there: vLLM listens once its model is loaded, and as it sets
    SO_REUSEPORT, two of them would share the port.
    """
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0recover-lora-server-{port}")  # abstract: no file, and of this network namespace alone
    except OSError:
        mark.close()
        return None
    return mark


def port_of(server: Process) -> int:
    """On this host's loopback interface."""
    return int(server.url.rpartition(":")[2])


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of vLLM's --max-lora-rank."""
SHARED_GPU = ("--gpu-memory-utilization", "0.4")
"""Of a server beside which its adapter is checked on the same device; the cluster's own arguments go before it."""


@dataclass(frozen=True)
class Serving:
    """What a pool serves."""

    model: ModelInput
    dtype: Dtype
    max_length: int
    max_logprobs: int = 20
    adapter: Path | None = None
    """A PEFT adapter over the model."""
    adapter_name: str = ""
    """Its model name there."""
    rank: int = 0
    """Of the adapter."""

    @classmethod
    def of(cls, job: GenerateJob) -> Serving:
        """What samples are drawn from."""
        settings = job.generate
        return cls(job.model, job.dtype, settings.max_length, max(20, settings.capture_logprobs))

    @property
    def lora_arguments(self) -> list[str]:
        """Raises UserError for a rank that vLLM does not take."""
        if self.adapter is None:
            return []
        most = next((rank for rank in LORA_RANKS if rank >= self.rank), None)
        if most is None:
            raise UserError("--served", f"rank {self.rank}", f"vLLM takes {LORA_RANKS[-1]} at most; deliver --merged")
        return ["--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"{self.adapter_name}={self.adapter}"]


class ServerPool:
    """with ServerPool(serving, cluster, logs): ... the servers answer here

    logs: folder of one log file each. Raises UserError for what the user can mend (no vLLM, a port in use), Unavailable
    when a server does not come up.
    """

    def __init__(self, serving: Serving, cluster: Cluster, logs: Path) -> None:
        assert isinstance(cluster.servers, LocalServers)
        self._serving, self._cluster, self._settings, self._logs = serving, cluster, cluster.servers, logs
        self._on_gpu = uses_gpu(cluster)
        each = range(self._settings.number_on(cluster))
        places = [(host, number) for host in cluster.hosts or (None,) for number in each]
        self.servers = [
            Process(number, host, self._settings.url(index), logs / f"server-{index}.log")
            for index, (host, number) in enumerate(places)
        ]
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    # ---- what is started ----

    def command(self) -> list[str]:
        """vLLM's command line, without port."""
        serving, settings = self._serving, self._settings
        arguments = {
            "--model": serving.model.path,
            **({"--revision": serving.model.revision} if serving.model.revision else {}),
            "--host": "127.0.0.1",
            "--dtype": serving.dtype,
            "--max-model-len": str(serving.max_length),
            "--max-num-seqs": str(settings.sequences),
            # Sampling defaults come from the request alone, never from the model's generation_config.json.
            "--generation-config": "vllm",
            "--logits-processors": PROCESSOR,
            "--logprobs-mode": "raw_logprobs",
            "--max-logprobs": str(serving.max_logprobs),
            "--uvicorn-log-level": "warning",
        }
        flags = ["--no-enable-prefix-caching"]  # prompts are one token long
        if not self._on_gpu:
            # Compiling takes longer than it saves. A seeded request whose prompt comes in chunks ends a CPU server
            # (vLLM 0.32: "CPU Generator does not use offset"), so prompts are taken whole.
            whole = max(serving.max_length, CPU_BATCH_TOKENS)
            flags += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(whole)]
        shared = SHARED_GPU if self._on_gpu and serving.adapter is not None else ()
        module = ["-m", "vllm.entrypoints.openai.api_server"]
        given = [part for pair in arguments.items() for part in pair]
        return [str(self.python), *module, *given, *flags, *serving.lora_arguments, *shared, *settings.arguments]

    @property
    def python(self) -> Path:
        """The interpreter with vLLM; a relative path is one of this checkout."""
        return REPOSITORY / self._settings.python

    def environment(self, number: int) -> dict[str, str]:
        """One device, one share of the cores, and the key, for one server; beside what its host has."""
        settings = self._settings
        own: dict[str, str] = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self._on_gpu:
            # What is visible here says nothing of other hosts.
            own |= dict.fromkeys(VISIBLE, str(number) if self._cluster.hosts else visible_device(number))
        else:
            own |= {
                "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores(number))),
                # Without it the sampler is compiled at the first requests: 20 to 50 s, for no gain on a CPU.
                "TORCHDYNAMO_DISABLE": "1",
            }
        if (key := settings.key()) is not None:
            # In the environment: a command line can be read by every user of the machine.
            own["VLLM_API_KEY"] = key
        own["PYTHONPATH"] = python_path()  # of the logits processor
        return {**own, **self._cluster.environment, **settings.environment}

    def cores(self, number: int) -> list[int]:
        """The cores of one CPU server: its share of those that this process may use."""
        available = sorted(os.sched_getaffinity(0))
        share = self._settings.cores or max(len(available) // self._settings.number_on(self._cluster), 1)
        first = number * share % len(available)
        return available[first : first + share]

    def own_port(self, server: Process) -> int:
        """On its own host's loopback interface. Behind those of this host, which may be the same one."""
        return port_of(server) if server.host is None else self._settings.port + len(self.servers) + server.number

    # ---- their life ----

    def __enter__(self) -> ServerPool:
        missing = [server for server in self.servers if not answers(server.url)]
        for server in self.servers:
            if server not in missing:
                log.info("%s answers already and is used as it is", server.url)
        ours = [server for server in missing if self._is_ours(server)]
        for server in missing:
            if server not in ours:
                log.info("%s is started by another command and waited for", server.url)
        try:
            if ours:
                self._check(ours)
            for server in ours:
                self._start(server)
            self._thread = threading.Thread(target=self._supervise, name="servers", daemon=True)
            self._thread.start()
            self._wait_for(missing)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @staticmethod
    def _is_ours(server: Process) -> bool:
        """Whether it is for us to start, as for no other command."""
        if server.mark is None:
            server.mark = mark_of(port_of(server))
        return server.mark is not None

    def _check(self, servers: list[Process]) -> None:
        if not self.python.exists():
            raise UserError(
                "servers.python", f"no file {self.python}", "`make install-vllm` makes .venv-vllm, or name another"
            )
        for server in servers:
            if not is_free(port_of(server)):
                raise UserError("servers.port", f"port {port_of(server)} is in use", "choose another, or end its user")

    def _start(self, server: Process) -> None:
        server.begun, server.due = time.monotonic(), None
        self._logs.mkdir(parents=True, exist_ok=True)
        port = self.own_port(server)
        command, environment = [*self.command(), "--port", str(port)], self.environment(server.number)
        guard = [sys.executable, "-m", "launch.guard", str(os.getpid())]
        # Where it is set, every start would compile vLLM anew.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        words = b""
        if server.host is not None:
            # Its port becomes one of this host's loopback interface: nothing is open to the network.
            tunnel = ["-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port_of(server)}:127.0.0.1:{port}"]
            remote = shlex.join(["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-m", "launch.remote"])
            there = {**passed_on(self._cluster), **environment}
            words = json.dumps({"command": command, "environment": there}).encode() + b"\n"
            command = ["ssh", *SSH_OPTIONS, *tunnel, server.host, f"cd {shlex.quote(str(REPOSITORY))} && exec {remote}"]
            environment = {}
        with server.log.open("ab") as output:
            server.process = subprocess.Popen(
                [*guard, *command],
                env={**inherited, **environment},
                stdin=subprocess.PIPE if words else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._say(server, words)

    @staticmethod
    def _say(server: Process, words: bytes) -> None:
        """To a server's host, which ends it when nothing comes any more."""
        if server.process is not None and server.process.stdin is not None:
            with contextlib.suppress(OSError):  # it has died, which is seen elsewhere
                server.process.stdin.write(words)
                server.process.stdin.flush()

    def _wait_for(self, servers: list[Process]) -> None:
        """Until all are healthy. Raises Unavailable with the last lines of the log of one that is not."""
        deadline = time.monotonic() + self._settings.start_timeout_s
        bar = progress(len(servers), "server", "start servers")
        waiting = list(servers)
        try:
            while waiting:
                if self._failure is not None:
                    raise self._failure
                if time.monotonic() > deadline:
                    late, within = waiting[0], f"within {self._settings.start_timeout_s:.0f} s"
                    if late.process is None:
                        raise Unavailable(f"{late.url}, which another command starts, did not answer {within}")
                    raise Unavailable(f"{late.url} did not answer {within}; see {late.log}\n{self._end_of_log(late)}")
                for server in [server for server in waiting if answers(server.url)]:
                    waiting.remove(server)
                    server.was_healthy = True
                    bar.update()
                time.sleep(0.2)
                bar.refresh() if sys.stderr.isatty() else None
        finally:
            bar.close()

    def _supervise(self) -> None:
        """Start a dead server again, up to max_restarts times; one that is given up leaves the others to work on. One
        that another command started is started here once it has ended with that command."""
        while not self._stopping.wait(POLL_S):
            for server in self.servers:
                self._say(server, b"\n")
                now = time.monotonic()
                if server.process is None:
                    if is_free(port_of(server)) and self._is_ours(server):
                        log.warning("server %s has ended with its own command; it is started here", server.url)
                        server.was_healthy = True
                        self._start(server)
                    continue
                if server.given_up:
                    continue
                if server.process.poll() is None:
                    if now - server.begun > HEALTHY_S:
                        server.restarts = 0
                    continue
                # One that never came up would only fail the same way again.
                if not server.was_healthy or server.restarts >= self._settings.max_restarts:
                    server.given_up = True
                    how = f"died {server.restarts + 1} times" if server.was_healthy else "did not start"
                    message = f"server {server.url} {how}; see {server.log}"
                    if server.was_healthy:
                        log.error("%s\n%s", message, self._end_of_log(server))
                    self._failure = Unavailable(f"{message}\n{self._end_of_log(server)}")
                    continue
                if (due := server.due) is None:
                    due = server.due = now + (PAUSE_S * 2 ** (server.restarts - 1) if server.restarts else 0.0)
                if now < due:
                    continue
                server.restarts += 1
                log.warning("server %s died; start %d of %d", server.url, server.restarts, self._settings.max_restarts)
                self._start(server)

    @staticmethod
    def _end_of_log(server: Process) -> str:
        try:
            lines = server.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        telling = [line for line in lines if "Error:" in line] or lines
        return "\n".join(f"    {line[:200]}" for line in dict.fromkeys(telling[-LAST_LINES:]))

    @property
    def is_lost(self) -> bool:
        """Whether every server that was started here has been given up."""
        own = [server for server in self.servers if server.process is not None]
        return bool(own) and len(own) == len(self.servers) and all(server.given_up for server in own)

    def stop(self) -> None:
        """End the servers that were started here: SIGTERM to each guard, SIGKILL to what is left of its group."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        own = [server.process for server in self.servers if server.process is not None]
        for process in own:
            if process.stdin is not None:  # of another host, which ends it, and ssh with it
                with contextlib.suppress(OSError):
                    process.stdin.close()
                continue
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for process in own:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.1))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for server in self.servers:
            if server.mark is not None:
                server.mark.close()
                server.mark = None

"""`recover-lora serve`: one server a device, waited for, started again, ended; with a stand-in for vLLM's interpreter.

The stand-in is a script that runs the fake server on the port that it is given; tests/vllm does the same with vLLM.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.servers
from launch.cluster import Cluster, LocalServers, load_cluster
from launch.servers import ServerPool, Serving, answers, mark_of, visible_device
from recovery.errors import Unavailable, UserError, UserErrors
from tests.conftest import REPOSITORY
from tests.processes import children_of, free_ports, group_of, wait_until
from tests.test_served import make_job

SCRIPT = f"""#!{sys.executable}
import os, subprocess, sys
port = sys.argv[sys.argv.index("--port") + 1]
print("arguments", sys.argv[1:], flush=True)
print("device", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("VLLM_CPU_OMP_THREADS_BIND"), flush=True)
if os.path.exists({{broken!r}}):
    sys.exit("RuntimeError: no memory for the cache")
engine = subprocess.Popen(["sleep", "600"])  # vLLM's engine is a process of its own too
os.execv({sys.executable!r}, [{sys.executable!r}, "-m", "tests.fake_servers", "--port", port])
"""


@pytest.fixture
def pool(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a pool of stand-ins; keyword arguments are fields of the servers section."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    script = tmp_path / "python"
    script.write_text(SCRIPT.format(broken=str(tmp_path / "broken")))
    script.chmod(0o755)

    def make(**settings: Any) -> ServerPool:
        count = settings.pop("count", 2)
        settings.setdefault("port", free_ports(count))
        servers = LocalServers(count=count, python=script, **settings)
        job = make_job(models["qwen2"], tmp_path / "corpus", [])
        return ServerPool(Serving.of(job), Cluster(name="test", device="cpu", servers=servers), tmp_path / "logs")

    return make


def test_started_waited_for_and_ended_with_everything(pool: Any, tmp_path: Path):
    with pool() as running:
        assert all(answers(server.url) for server in running.servers)
        leaders = [server.process.pid for server in running.servers]
        assert all(len(group_of(leader)) >= 3 for leader in leaders)
        logs = [(tmp_path / "logs" / f"server-{number}.log").read_text() for number in range(2)]
        assert all("'--logits-processors', 'datagen.vllm_processor:HybridSampling'" in log for log in logs)
        assert all("'--generation-config', 'vllm'" in log for log in logs)
        cores = [log.split("device None ")[1].split()[0] for log in logs]
        if len(os.sched_getaffinity(0)) > 1:
            assert cores[0] != cores[1]
    assert not any(group_of(leader) for leader in leaders)
    assert not any(answers(server.url) for server in running.servers)


def test_a_dead_server_is_started_again_and_its_engine_with_it(pool: Any):
    with pool(max_restarts=1) as running:
        first = running.servers[0]
        before = first.process.pid
        members = group_of(before)
        server = children_of(before)[0]
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: not group_of(before))
        assert len(members) >= 3
        wait_until(lambda: first.process.pid != before and answers(first.url))
        assert (first.restarts, running.servers[1].restarts) == (1, 0)
        os.killpg(first.process.pid, signal.SIGKILL)
        wait_until(lambda: first.given_up)
        assert not running.is_lost  # the other one works on
        assert answers(running.servers[1].url)


def test_one_that_ran_before_is_taken_over_when_its_own_run_ends(pool: Any):
    port = free_ports(1)
    with pool(count=1, port=port) as first, pool(count=1, port=port) as second:
        (server,) = second.servers
        assert server.process is None
        first.stop()
        wait_until(lambda: server.process is not None and answers(server.url))
        assert not second.is_lost


def test_one_that_dies_is_started_again_by_the_command_that_started_it(pool: Any, monkeypatch: pytest.MonkeyPatch):
    """Not by one that only uses it, however long the other waits before it does so."""
    monkeypatch.setattr(launch.servers, "PAUSE_S", 3.0)
    port = free_ports(1)
    with pool(count=1, port=port) as first, pool(count=1, port=port) as second:
        (server,), (used,) = first.servers, second.servers
        for _ in range(2):  # at once, and after the pause
            before = server.process.pid
            os.killpg(before, signal.SIGKILL)
            wait_until(lambda before=before: server.process.pid != before and answers(server.url))
        assert server.restarts == 2
        assert used.process is None


def test_of_two_commands_at_once_one_starts_the_server_and_both_use_it(pool: Any):
    port = free_ports(1)
    pools = [pool(count=1, port=port) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(ServerPool.__enter__, pools))
    try:
        assert sum(one.servers[0].process is not None for one in pools) == 1
        assert answers(pools[0].servers[0].url)
    finally:
        for one in pools:
            one.stop()


def test_a_server_that_another_command_never_starts_is_told_as_its(pool: Any):
    waiting = pool(count=1, start_timeout_s=1)
    mark = mark_of(int(waiting.servers[0].url.rpartition(":")[2]))
    assert mark is not None
    with mark, pytest.raises(Unavailable, match="which another command starts, did not answer within 1 s"), waiting:
        pass


def test_on_a_gpu_both_variables_name_the_device_that_was_left_visible(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "4,6")
    assert [visible_device(number) for number in range(2)] == ["4", "6"]
    with pytest.raises(UserError, match=r"servers\.count: 3, but devices 4,6 are visible"):
        visible_device(2)
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    assert visible_device(2) == "2"


def test_named_hosts_have_a_server_for_each_of_their_devices():
    cluster = Cluster(name="c", nodes=("a", "b"), processes=8, servers=LocalServers(count="auto"))
    assert isinstance(cluster.servers, LocalServers)
    assert cluster.servers.number_on(cluster) == 8
    assert len(cluster.servers.access_on(cluster).urls) == 16


def test_one_that_does_not_come_up_is_told_with_the_end_of_its_log(pool: Any, tmp_path: Path):
    (tmp_path / "broken").touch()
    with pytest.raises(Unavailable, match=r"did not start; see .*server-0\.log") as told, pool(count=1):
        pass
    assert "RuntimeError: no memory for the cache" in str(told.value)


def test_a_port_in_use_and_a_missing_interpreter_are_the_users_mistakes(pool: Any):
    waiting = pool(count=1)
    port = int(waiting.servers[0].url.rpartition(":")[2])
    told = pytest.raises(UserError, match=rf"servers\.port: port {port} is in use")
    with socket.create_server(("127.0.0.1", port)), told, waiting:
        pass
    missing = pool(count=1)
    missing._settings = missing._settings.model_copy(update={"python": Path("/nowhere/python")})
    with pytest.raises(UserError, match=r"servers\.python: no file /nowhere/python; `make install-vllm`"), missing:
        pass


def test_servers_that_run_already_are_used_and_left_alone(pool: Any):
    first = pool(count=1)
    second = ServerPool(first._serving, first._cluster, first._logs)
    with first:
        second.__enter__()
        assert second.servers[0].process is None
        second.stop()
        assert answers(first.servers[0].url)


def test_killed_with_its_launcher(tmp_path: Path, models: dict[str, Path], pool: Any):
    """`recover-lora serve` killed by SIGKILL leaves no process behind."""
    settings = pool(count=1)._settings
    recipe = {
        "name": "served",
        "models": {"reference": str(models["qwen2"]), "dtype": "float32"},
        "degrade": {"kind": "gaussian_noise", "relative_std": 0.5},
    }
    cluster = {"name": "c", "device": "cpu", "servers": settings.model_dump(mode="json", exclude_defaults=True)}
    cluster["servers"]["kind"] = "local"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    command = [sys.executable, "-m", "launch.cli", "serve", str(tmp_path / "recipe.yaml")]
    command += ["--cluster", str(tmp_path / "cluster.yaml"), "--runs-dir", str(tmp_path / "runs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == settings.url(0)
        (guard,) = children_of(process.pid)
        process.kill()
    wait_until(lambda: not group_of(guard) and not answers(settings.url(0)))


def test_the_shipped_example_of_external_servers_loads():
    cluster = load_cluster("servers-example")
    assert cluster.servers is not None
    assert cluster.servers.access_on(cluster).api_key_env == "POOL_KEY"
    assert cluster.servers.access_on(cluster).urls == ("http://127.0.0.1:8100", "http://127.0.0.1:8101")


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"kind": "external", "urls": ["http://me:secret@host"]}, r"servers\.urls: .*host is not an http\(s\) address"),
        ({"kind": "external"}, r"servers\.urls: missing"),
        ({"kind": "local", "urls": ["http://a"]}, "kind: external"),
        ({"kind": "local", "prot": 1}, r"servers\.prot: unknown field; did you mean port\?"),
        ({"kind": "external", "urls": ["http://a", "http://a/"]}, "an address is given twice"),
    ],
)
def test_a_wrong_servers_section_is_told_by_field(section: dict[str, Any], told: str, tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"name": "c", "servers": section}))
    with pytest.raises(UserErrors, match=told) as error:
        load_cluster(str(path))
    assert "secret" not in str(error.value)

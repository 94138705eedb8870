"""Preflight: what one host finds, and what a cluster's bars make of it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import probe
from launch.cluster import Cluster, Hardware, Slurm
from launch.preflight import Report, allocated, compare, preflight, table
from recovery.errors import Unavailable, UserError

FOUND: dict[str, Any] = {
    "code": "abc",
    "versions": {"torch": "2.13.0"},
    "disk": {"free_gib": 900.0, "write_gb_s": 2.0},
    "devices": [{"name": "MI300X", "gemm_tflops": 650.0, "memory_gb_s": 4700.0, "memory_gib": 191.0}] * 8,
    "inside_gb_s": 300.0,
    "skew_s": 0.0,
    "missing_models": [],
    "tracking": None,
}
CLUSTER = Cluster(
    name="x",
    nodes=("node-a", "node-b", "node-c"),
    processes=8,
    hardware=Hardware(gemm_tflops=600, memory_gb_s=4500, allreduce_gb_s=180, network_gb_s=100),
)


def faults(across: float | None = 150.0, **changes: Any) -> list[str]:
    """What is wrong when node-b differs from the others by `changes`."""
    report = Report({host: {**FOUND, **(changes if host == "node-b" else {})} for host in CLUSTER.nodes}, across)
    compare(CLUSTER, report, [])
    return report.faults


def test_equal_hosts_above_all_bars_are_fit():
    assert faults() == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"code": "def"}, "node-b: other code than the rest"),
        ({"versions": {"torch": "2.12.0"}}, "node-b: other packages than the rest"),
        ({"devices": FOUND["devices"][:7]}, "node-b: 7 devices visible for 8 processes"),
        ({"devices": []}, "node-b: no device visible"),
        (
            {"devices": [*FOUND["devices"][:7], {**FOUND["devices"][0], "gemm_tflops": 310.0}]},
            "node-b: device 7: matrix products 310 TFLOP/s, below 600",
        ),
        ({"inside_gb_s": 42.0}, "node-b: all-reduce inside the host 42 GB/s, below 180"),
        ({"disk": {"error": "/runs: Permission denied"}}, "node-b: runs cannot be written (/runs: Permission denied)"),
        ({"disk": {"free_gib": 3.0, "write_gb_s": 2.0}}, "node-b: free disk 3 GiB, below 10"),
        ({"skew_s": -2.5}, "node-b: its clock is off by -2.5 s"),
        ({"missing_models": ["/models/m"]}, "node-b: does not see /models/m (of 0 models)"),
        ({"tracking": "URLError"}, "node-b: MLflow does not answer (URLError)"),
        ({"across": 12.0}, "between hosts: all-reduce 12 GB/s, below 100"),
    ],
)
def test_what_is_not_fit_is_named_by_host(changes: dict[str, Any], fault: str):
    assert faults(**changes) == [fault]


def test_this_machine(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens on the discard port
    cluster = Cluster(name="here", device="cpu", hardware=Hardware(gemm_tflops=1000))
    report = preflight(cluster, tmp_path / "not" / "there", [str(tiny), str(tmp_path / "nowhere")])
    (found,) = report.hosts.values()
    assert found["devices"][0]["gemm_tflops"] > 0.001
    assert abs(found["skew_s"]) < 0.1
    kinds = [fault.removeprefix("this host: ").split(" ")[0] for fault in report.faults]
    assert kinds == ["matrix", "does", "MLflow"]
    assert "NOT FIT  this host: matrix products" in table(cluster, report)
    assert not (tmp_path / "not").exists()


def test_two_ranks_of_this_machine_measure_the_network(tmp_path: Path):
    cluster = Cluster(name="here", device="cpu", processes=2, hardware=Hardware(allreduce_gb_s=1e6))
    report = preflight(cluster, tmp_path, [])
    (found,) = report.hosts.values()
    assert 0 < found["inside_gb_s"] < 1e3
    assert [fault for fault in report.faults if "all-reduce inside the host" in fault] == report.faults


def test_in_an_allocation_its_hosts_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a fake scontrol, which knows one list."""
    cluster = Cluster(name="x", slurm=Slurm(nodes=2))
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UserError, match="hosts are not known yet; start it in one: salloc --nodes 2"):
        preflight(cluster, tmp_path, [])
    fake = tmp_path / "scontrol"
    fake.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node-[a-b]" ] || { echo no such list >&2; exit 1; }\n'
        "echo node-a\necho node-b\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[a-b]")
    assert allocated(cluster) == ("node-a", "node-b")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "nonsense[")
    with pytest.raises(Unavailable, match="no such list"):
        allocated(cluster)


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/health": 200, "/locked/health": 401}.get(self.path, 500))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


def test_a_tracking_server_that_wants_a_password_is_there(server: str):
    assert probe.tracking(server) is None
    assert probe.tracking(f"{server}/locked") is None
    assert probe.tracking(f"{server}/broken") == "HTTP 500"
    assert probe.tracking(server.replace("http://", "http://somebody:secret@")) is None
    assert probe.tracking("http://somebody:secret@/") is not None
    assert probe.tracking("sqlite:///runs/mlflow.db") is None

"""One recipe on two hosts: the same adapter as on one, whatever happens to a host on the way."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.multinode.hosts import Hosts
from tests.multinode.site import HEARTBEAT_S, RUN_S, Site, is_rank, nothing_left, same_as_alone
from tests.processes import wait_until

pytestmark = pytest.mark.multinode


def test_preflight_measures_both_hosts_and_what_lies_between(hosts: Hosts, tmp_path: Path):
    cluster = tmp_path / "cluster.yaml"
    content = {"name": "x", "device": "cpu", "nodes": ["node-a", "node-b"], "hardware": {"network_gb_s": 1e6}}
    cluster.write_text(yaml.safe_dump(content))
    output = tmp_path / "output.log"
    arguments = ("preflight", "--cluster", str(cluster), "--runs-dir", str(tmp_path / "runs"))
    began = time.monotonic()
    assert hosts.complete(arguments, output, 120) == 1
    assert time.monotonic() - began < 120
    said = output.read_text()
    assert "node-a" in said
    assert "node-b" in said
    assert said.count("NOT FIT") == 1
    assert "NOT FIT  between hosts: all-reduce" in said


def start(site: Site, *more: str) -> Any:
    """Training on both hosts, until its first checkpoints are there."""
    process = site.hosts.start(*site.arguments(site.cluster("node-a", "node-b"), *more), output=site.output)
    try:
        site.wait_for_step(8)
    except AssertionError:
        raise AssertionError(site.said()) from None
    return process


def test_two_hosts_make_the_same_adapter_as_one(
    prepared: tuple[Path, Path, Path], hosts: Hosts, alone: Site, tmp_path: Path
):
    """Through the whole front door; tests/multinode/test_layouts.py has the other stages."""
    site = Site.make(tmp_path, prepared, hosts, deepspeed="zero3")
    assert hosts.complete(site.arguments(site.cluster("node-a", "node-b")), site.output, RUN_S) == 0, site.said()
    manifest = json.loads((site.adapter / "manifest.json").read_text())
    assert manifest["details"]["ranks"] == 2
    same_as_alone(site, alone)
    wait_until(lambda: nothing_left(hosts.a) and nothing_left(hosts.b))


def test_a_killed_host_is_left_out_and_training_goes_on_from_its_checkpoint(hosts: Hosts, site: Site, alone: Site):
    process = start(site, "--max-restarts", "1")
    hosts.b.kill()
    try:
        assert process.wait(RUN_S) == 0, site.said()
    finally:
        hosts.b.connect()
        hosts.b.start_sshd()
    said = site.said()
    assert "rank 1 on node-b" in said or "node-b: Connection" in said
    assert "going on without node-b" in said
    assert "going on after step" in said
    manifest = json.loads((site.adapter / "manifest.json").read_text())
    assert manifest["details"]["ranks"] == 1
    same_as_alone(site, alone)
    wait_until(lambda: nothing_left(hosts.a))


def test_a_host_that_is_dead_before_the_start_is_named_at_once(hosts: Hosts, site: Site):
    hosts.b.cut_off()
    try:
        assert hosts.complete(site.arguments(site.cluster("node-a", "node-b")), site.output, 60) == 1
    finally:
        hosts.b.connect()
    assert "node-b: no answer by ssh" in site.said()
    assert "Traceback" not in site.said()
    assert not list((site.folder / "runs" / "artifacts").glob("*train-*"))


@pytest.mark.parametrize("fault", ["frozen", "cut off", "a killed rank"])
def test_a_lost_host_ends_the_job_on_all_and_is_named(hosts: Hosts, site: Site, alone: Site, fault: str):
    process = start(site)
    ranks = [number for number in hosts.b.processes() if is_rank(number)]
    assert len(ranks) == 1
    began = time.monotonic()
    if fault == "frozen":
        hosts.b.signal_all(signal.SIGSTOP)
    elif fault == "cut off":
        hosts.b.cut_off()
    else:
        os.kill(ranks[0], signal.SIGKILL)
    try:
        wait_until(lambda: not any(is_rank(number) for number in hosts.a.processes()), 2 * HEARTBEAT_S)
        took = time.monotonic() - began
        if fault == "cut off":
            wait_until(lambda: not any(is_rank(number) for number in hosts.b.processes()), HEARTBEAT_S)
        assert process.wait(RUN_S) == 1
    finally:
        hosts.b.connect()
        hosts.b.signal_all(signal.SIGCONT)
    assert took < HEARTBEAT_S + 2
    named = "rank 1 on node-b was killed" if fault == "a killed rank" else "rank 1 on node-b has not answered for 8 s"
    assert named in site.said()
    wait_until(lambda: nothing_left(hosts.a) and nothing_left(hosts.b), 60)
    if fault == "cut off":  # from the last checkpoint, as after any of them
        assert hosts.complete(site.arguments(site.cluster("node-a", "node-b")), site.output, RUN_S) == 0, site.said()
        same_as_alone(site, alone)


def test_an_interrupt_saves_on_all_hosts(hosts: Hosts, site: Site, alone: Site):
    process = start(site)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, site.said()
    assert "asked to stop: saved after step" in site.said()
    wait_until(lambda: nothing_left(hosts.a) and nothing_left(hosts.b))
    assert hosts.complete(site.arguments(site.cluster("node-a", "node-b")), site.output, RUN_S) == 0, site.said()
    same_as_alone(site, alone)


def test_a_killed_launcher_leaves_nothing_behind(hosts: Hosts, site: Site):
    process = start(site)
    process.kill()
    process.wait()
    wait_until(lambda: nothing_left(hosts.a) and nothing_left(hosts.b), HEARTBEAT_S + 10)

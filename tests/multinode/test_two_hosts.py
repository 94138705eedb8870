"""One recipe on two hosts: the same adapter as on one, whatever happens to a host on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from launch.recipe import Recipe
from tests.multinode.hosts import Host, Hosts, missing
from tests.pipeline import tiny_recipe
from tests.processes import wait_until

pytestmark = pytest.mark.multinode
HEARTBEAT_S = 10
RUN_S = 240
STEPS = {"epochs": 20, "evaluate_every": 60, "checkpoint_every": 4, "learning_rate": 1e-3}
"""240 steps, about half a minute on two hosts: long enough for something to happen on the way."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if (reason := missing()) is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


class Site:
    """A folder that both hosts see, with a recipe whose earlier stages are done."""

    def __init__(self, folder: Path, prepared: tuple[Path, Path, Path], hosts: Hosts, **train: Any) -> None:
        model, data, source = prepared
        shutil.copytree(source, folder / "runs")
        self.folder, self.hosts = folder, hosts
        self.recipe: Recipe = tiny_recipe(model, data, train={**STEPS, **train})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(self.recipe.model_dump_json())))
        self.output = folder / "output.log"

    def cluster(self, *names: str, **more: Any) -> Path:
        path = self.folder / f"{'-'.join(names) or 'here'}.yaml"
        content = {
            "name": path.stem,
            "device": "cpu",
            "nodes": list(names),
            "heartbeat_s": HEARTBEAT_S,
            "environment": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
            **more,
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def arguments(self, cluster: Path, *more: str) -> tuple[str, ...]:
        where = ("--cluster", str(cluster), "--runs-dir", str(self.folder / "runs"))
        return ("train", str(self.folder / "recipe.yaml"), *where, *more)

    def said(self) -> str:
        return self.output.read_text()

    @property
    def adapter(self) -> Path:
        (found,) = (self.folder / "runs" / "artifacts").glob("train-*")
        return found

    def history(self) -> list[dict[str, float]]:
        (found,) = (self.folder / "runs" / "artifacts").glob("*train-*/history.jsonl")
        return [json.loads(line) for line in found.read_text().splitlines() if line.endswith("}")]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            files = list((self.folder / "runs" / "artifacts").glob(".train-*/.checkpoints/step-*.json"))
            return any(int(file.stem.removeprefix("step-")) >= step for file in files)

        wait_until(reached, RUN_S)


def equal(one: Path, other: Path) -> None:
    """The same adapter, to the tolerance of another order of summation."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 0.02 * tensor.norm(), name


def nothing_left(host: Host) -> bool:
    """Whether no process but its sshd runs there."""
    listening = 1
    return len(host.processes()) <= listening


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


@pytest.fixture(scope="module")
def alone(prepared: tuple[Path, Path, Path], hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The recipe trained on one host."""
    site = Site(tmp_path_factory.mktemp("alone"), prepared, hosts)
    assert hosts.complete(site.arguments(site.cluster()), site.output, RUN_S) == 0, site.said()
    return site


@pytest.fixture
def site(prepared: tuple[Path, Path, Path], hosts: Hosts, tmp_path: Path) -> Site:
    return Site(tmp_path, prepared, hosts)


def start(site: Site, *more: str) -> Any:
    """Training on both hosts, until its first checkpoints are there."""
    process = site.hosts.start(*site.arguments(site.cluster("node-a", "node-b"), *more), output=site.output)
    try:
        site.wait_for_step(8)
    except AssertionError:
        raise AssertionError(site.said()) from None
    return process


def same_as_alone(site: Site, alone: Site) -> None:
    for one, other in zip(site.history(), alone.history(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    equal(site.adapter, alone.adapter)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_hosts_make_the_same_adapter_as_one(
    prepared: tuple[Path, Path, Path], hosts: Hosts, alone: Site, tmp_path: Path, zero: str
):
    site = Site(tmp_path, prepared, hosts, deepspeed=zero)
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


def is_rank(process: int) -> bool:
    """Whether this is one of the training processes, rather than a launcher or a watcher."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return b"recovery.train" in words and b"deepspeed.launcher.launch" not in words and words[2:3] == [b"-m"]
    except OSError:
        return False

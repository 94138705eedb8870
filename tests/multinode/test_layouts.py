"""The same losses on any layout: ranks, ZeRO stages, kinds of teacher, one host or two; and from one layout to another.

The first nine cover every pair of two properties and run in CI; `make test-matrix` runs all.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import load_cluster
from launch.distributed import start_of
from launch.recipe import load_recipe
from recovery.stage import LAUNCHER
from tests.conftest import REPOSITORY
from tests.multinode.hosts import Hosts
from tests.multinode.site import RUN_S, Site, equal
from tests.pipeline import run_in_process, stages_of, tiny_recipe

pytestmark = pytest.mark.multinode
TEACHERS: dict[str, dict[str, Any]] = {
    "online": {"kind": "online"},
    "cached": {"kind": "hidden_states", "dtype": "float32"},
}
PAIRS = [
    (1, 1, "online", 1),
    (1, 2, "cached", 1),
    (1, 3, "online", 1),
    (2, 1, "cached", 2),
    (2, 2, "online", 1),
    (2, 3, "cached", 2),
    (4, 1, "online", 2),
    (4, 2, "cached", 2),
    (4, 3, "online", 1),
]
ALL = [
    layout for layout in itertools.product((1, 2, 4), (1, 2, 3), ("online", "cached"), (1, 2)) if layout[0] >= layout[3]
]
SHORT = {"epochs": 2, "evaluate_every": 100, "checkpoint_every": 100}
Layout = tuple[int, int, str, int]


def test_the_nine_cover_every_pair():
    assert set(PAIRS) < set(ALL)
    for one, other in itertools.combinations(range(4), 2):
        possible = {(layout[one], layout[other]) for layout in ALL}
        assert {(layout[one], layout[other]) for layout in PAIRS} == possible


@pytest.fixture(scope="module")
def cached(prepared: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """What was prepared, with a cache of the reference's states."""
    model, data, source = prepared
    runs = tmp_path_factory.mktemp("cached") / "runs"
    shutil.copytree(source, runs)
    run_in_process(tiny_recipe(model, data, teacher=TEACHERS["cached"]), runs, until="cache")
    return model, data, runs


def cluster_of(site: Site, ranks: int, hosts: int) -> Path:
    names = ("node-a", "node-b") if hosts == 2 else ()
    return site.cluster(*names, processes=ranks // hosts)


def train(prepared: tuple[Path, Path, Path], hosts: Hosts, folder: Path, layout: Layout) -> Site:
    """Start the ranks as the front door does, without waiting for its checks and for MLflow each time."""
    ranks, stage, teacher, number = layout
    folder.mkdir(exist_ok=True)
    site = Site.make(folder, prepared, hosts, teacher=TEACHERS[teacher], deepspeed=f"zero{stage}", **SHORT)
    cluster = load_cluster(str(cluster_of(site, ranks, number)))
    job = stages_of(load_recipe(folder / "recipe.yaml", []), folder / "runs")["train"]
    file = folder / "train.json"
    file.write_text(job.job.to_json())
    start = start_of(job, file, cluster)
    for path, content in start.files.items():
        path.write_text(content)
    environment = hosts.environment(**start.environment)
    environment.pop(LAUNCHER, None)
    with site.output.open("ab") as output:
        command = hosts.a.command(*start.command)
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, stdout=output, stderr=output, check=False, timeout=RUN_S
        )
    assert done.returncode == 0, site.said()
    assert json.loads((site.adapter / "manifest.json").read_text())["details"]["ranks"] == ranks
    return site


@pytest.fixture(scope="module")
def first(prepared: tuple[Path, Path, Path], hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return train(prepared, hosts, tmp_path_factory.mktemp("first"), PAIRS[0])


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=() if layout in PAIRS else pytest.mark.matrix) for layout in ALL if layout != PAIRS[0]],
    ids=lambda layout: "{} ranks, zero{}, {}, {} hosts".format(*layout),
)
def test_every_layout_gives_the_same_losses(
    cached: tuple[Path, Path, Path], hosts: Hosts, first: Site, tmp_path: Path, layout: Layout
):
    site = train(cached, hosts, tmp_path, layout)
    for one, other in zip(site.history(), first.history(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    equal(site.adapter, first.adapter)


def test_a_run_saved_on_two_ranks_goes_on_on_one_and_on_four(
    prepared: tuple[Path, Path, Path], hosts: Hosts, alone: Site, tmp_path: Path
):
    (tmp_path / "two").mkdir()
    site = Site.make(tmp_path / "two", prepared, hosts)
    process = hosts.start(*site.arguments(cluster_of(site, 2, 1)), output=site.output)
    site.wait_for_step(8)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130, site.said()
    for ranks in (1, 4):
        other = site.copy(tmp_path / f"on-{ranks}")
        assert hosts.complete(other.arguments(cluster_of(other, ranks, 1)), other.output, RUN_S) == 0, other.said()
        assert "going on after step" in other.said()
        for one, expected in zip(other.history(), alone.history(), strict=True):
            assert one["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        equal(other.adapter, alone.adapter)

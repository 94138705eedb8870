"""The batch script under a real Slurm of two nodes: stopped by its signal, queued again, done, as on one host."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.multinode import slurm
from tests.multinode.conftest import require
from tests.multinode.hosts import Hosts
from tests.multinode.site import RUN_S, Site, same_as_alone
from tests.processes import wait_until

pytestmark = pytest.mark.multinode


def test_a_job_is_queued_again_when_its_time_is_over_and_ends_as_on_one_host(
    hosts: Hosts, site: Site, alone: Site, tmp_path: Path
):
    require(slurm.missing())
    with slurm.Slurm(hosts, tmp_path / "slurm") as cluster:
        settings = {"nodes": 2, "arguments": ["--partition=small"]}
        file = site.cluster(slurm=settings, interface=None)
        submitted = hosts.start(*site.arguments(file), output=site.output, environment=cluster.environment)
        assert submitted.wait(60) == 0, site.said()
        job = site.said().split("Submitted batch job ")[1].split()[0]
        logs = site.folder / "runs" / "tiny" / "logs"
        try:
            site.wait_for_step(8)
        except AssertionError:
            raise AssertionError("\n".join(log.read_text() for log in logs.glob("slurm-*"))) from None
        # What Slurm does by itself `notice_s` before the time limit, which has a minute at least.
        cluster.ask("scancel", "--signal=TERM", "--batch", job)
        log = logs / f"slurm-{job}.log"
        wait_until(lambda: "asked to stop: saved after step" in log.read_text(), 60)
        wait_until(lambda: "Restarts=1" in cluster.ask("scontrol", "show", "job", job), 60)
        # A requeued job waits for two minutes unless it is told not to; the nodes must have forgotten its first life.
        wait_until(lambda: cluster.ask("sinfo", "-h", "-o", "%T %D") == "idle 2", 60)
        time.sleep(5)
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_until(lambda: list((site.folder / "runs" / "artifacts").glob("train-*")), RUN_S)
        assert "going on after step" in log.read_text()
        wait_until(lambda: "COMPLETED" in cluster.ask("scontrol", "show", "job", job), 60)
    manifest = json.loads((site.adapter / "manifest.json").read_text())
    assert manifest["details"]["ranks"] == 2
    same_as_alone(site, alone)

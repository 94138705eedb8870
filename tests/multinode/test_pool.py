"""Generation on both hosts into one corpus: a real vLLM server on each, reached through ssh."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml

from recovery.corpus import read_rows, shards_of
from tests.conftest import REPOSITORY
from tests.multinode.conftest import require
from tests.multinode.hosts import Hosts
from tests.multinode.site import nothing_left
from tests.processes import free_ports, wait_until
from tests.vllm.conftest import MODEL

pytestmark = pytest.mark.multinode
VLLM = REPOSITORY / ".venv-vllm" / "bin" / "python"
START_S = 420


def test_servers_of_both_hosts_fill_one_corpus(hosts: Hosts, tmp_path: Path):
    require(None if VLLM.exists() and MODEL.exists() else "no .venv-vllm or assets (make install-vllm assets)")
    recipe, cluster, output = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml", tmp_path / "output.log"
    content = {
        "name": "both",
        "models": {"reference": str(MODEL), "dtype": "float32"},
        "degrade": {"kind": "gaussian_noise", "relative_std": 0.5},
        "generate": {"engine": "vllm", "samples": 48, "held_out_samples": 4, "max_length": 48},
        "evaluate": {"suite": "none"},
    }
    recipe.write_text(yaml.safe_dump(content))
    servers = {"kind": "local", "count": 1, "port": free_ports(3), "sequences": 8, "kv_cache_gib": 1}
    servers |= {"python": str(VLLM), "requests_per_server": 8, "start_timeout_s": START_S}
    cluster.write_text(
        yaml.safe_dump({"name": "x", "device": "cpu", "nodes": ["node-a", "node-b"], "servers": servers})
    )
    arguments = ("generate", str(recipe), "--cluster", str(cluster), "--runs-dir", str(tmp_path / "runs"))
    logs = tmp_path / "runs" / "both" / "logs"
    process = hosts.start(*arguments, output=output)
    try:
        assert process.wait(START_S) == 0, output.read_text() + "".join(
            log.read_text() for log in logs.glob("server-*")
        )
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    corpus = tmp_path / "runs" / "both" / "corpus"
    rows = [row["index"] for shard in shards_of(corpus, "train") for row in read_rows(shard)]
    assert sorted(rows) == list(range(48))
    wait_until(lambda: nothing_left(hosts.a) and nothing_left(hosts.b), 60)
    lines = [json.loads(line) for line in (corpus / "metrics.jsonl").read_text().splitlines()]
    shares = [[line[f"perf/share_of_server_{number}"] for line in lines if "perf/retries" in line] for number in (0, 1)]
    assert all(max(share) > 0.1 for share in shares)

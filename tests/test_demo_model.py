"""The real model, end to end through the front door: undisturbed, and killed with SIGKILL in four stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
RECIPE = "launch/recipes/smollm2-135m/demo.yaml"
SMALL = [
    "generate.samples=8",
    "generate.held_out_samples=4",
    "generate.batch_samples=4",
    "generate.max_length=32",
    "adapter.rank=8",
    "adapter.blend=0.5",
    "train.batch_tokens=128",
    "train.micro_batch_tokens=128",
    "train.warmup_steps=1",
    "train.checkpoint_every=1",
    "train.evaluate_every=10",
    "evaluate.tasks=[arc_easy,sciq]",
    "evaluate.limit=4",
    "evaluate.contexts=2",
]
# When each of these exists, the stage has kept a piece of its work and has more to do.
KILL_AT = (
    ".generate-*.partial/train/shard-00000.parquet",
    ".repair-*.partial/.curvature/0020.safetensors",
    ".repair-*.partial/.layers/blend-0.5/0003.safetensors",
    ".train-*.partial/.checkpoints/step-00000002.json",
    ".evaluate-*.partial/items/arc_easy.json",
)
SECONDS = 600


def command(runs: Path) -> list[str]:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return [sys.executable, "-m", "launch.cli", "run", RECIPE, "--runs-dir", str(runs), *settings]


def run(runs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(runs), cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS, check=False)


def kill_when(runs: Path, pattern: str) -> None:
    """Start the run, and kill all its processes at once as soon as a file of this pattern is there."""
    process = subprocess.Popen(
        command(runs), cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + SECONDS
    while not list((runs / "artifacts").glob(pattern)):
        assert process.poll() is None, f"the run ended before {pattern} was there"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(runs folder, what the run printed)."""
    assert (REPOSITORY / "assets" / "smollm2-135m-instruct").is_dir(), "run `make assets` first"
    runs = tmp_path_factory.mktemp("undisturbed")
    ended = run(runs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return runs, ended.stdout


def payload(runs: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(runs)): path.read_bytes() for path in sorted((runs / "artifacts").glob(pattern))}


def test_the_run_recovers_and_tells(undisturbed: tuple[Path, str]):
    runs, printed = undisturbed
    report = runs / "smollm2-135m-demo" / "report"
    summary: dict[str, Any] = json.loads((report / "summary.json").read_text())
    assert summary["kl"]["degraded"] > 2
    assert summary["kl"]["recovered"] < summary["kl"]["degraded"]
    assert isinstance(summary["tokens"], int)
    assert set(summary["tasks"]) == {"arc_easy", "sciq"}
    assert {path.suffix for path in report.iterdir()} >= {".md", ".png", ".json"}
    for word in ("KL", "top-1", "adapter", "report.md", "mlflow ui --backend-store-uri"):
        assert word in printed


def test_mlflow_holds_the_run(undisturbed: tuple[Path, str]):
    from mlflow.tracking import MlflowClient

    runs, _ = undisturbed
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    [identifier] = json.loads((runs / "smollm2-135m-demo" / "tracking.json").read_text()).values()
    history = client.get_metric_history(identifier, "loss/train")
    lines = (runs / "smollm2-135m-demo" / "adapter" / "history.jsonl").read_text().splitlines()
    assert [metric.value for metric in history] == [json.loads(line)["loss"] for line in lines]
    assert client.get_run(identifier).data.params["adapter.rank"] == "8"


def test_killed_in_four_stages_ends_with_the_same_bits(undisturbed: tuple[Path, str], tmp_path: Path):
    runs, _ = undisturbed
    for pattern in KILL_AT:
        kill_when(tmp_path, pattern)
    ended = run(tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for pattern in (
        "generate-*/*/*.parquet",
        "repair-*/adapter_model.safetensors",
        "train-*/adapter_model.safetensors",
        "evaluate-*/items/*.json",
        "evaluate-*/divergence.json",
    ):
        expected = payload(runs, pattern)
        assert expected
        assert payload(tmp_path, pattern) == expected
    assert not list((tmp_path / "artifacts").glob(".*.partial"))


def test_run_again_reuses_every_stage(undisturbed: tuple[Path, str]):
    runs, printed = undisturbed
    again = run(runs)
    assert again.returncode == 0
    assert again.stderr.count("reused") == 9
    assert again.stdout == printed

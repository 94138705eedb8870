"""Tracking: a local file always, MLflow when it answers, and no harm when it does not."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launch.tracking import start_run
from recovery.config import Tracking
from recovery.tracking import Tracker
from tests.pipeline import tiny_recipe

DEAD = "http://127.0.0.1:9"


def test_metrics_and_artifacts_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    target = start_run(tiny_recipe(tmp_path, tmp_path), tmp_path / "runs")
    assert target is not None
    note = tmp_path / "note.md"
    note.write_text("x")
    with Tracker(target, tmp_path / "metrics.jsonl") as tracker:
        for step in range(5):
            tracker.metrics({"loss/train": 1.0 / (step + 1)}, step)
        tracker.params({"adapter/modules": 4})
        tracker.artifact(note)
    client = MlflowClient(target.uri)
    assert [metric.value for metric in client.get_metric_history(target.run_id, "loss/train")] == [
        1,
        1 / 2,
        1 / 3,
        1 / 4,
        1 / 5,
    ]
    assert client.get_run(target.run_id).data.params["adapter/modules"] == "4"
    assert [file.path for file in client.list_artifacts(target.run_id)] == ["note.md"]
    again = start_run(tiny_recipe(tmp_path, tmp_path), tmp_path / "runs")
    assert again == target
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_a_dead_server_neither_stops_nor_slows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert start_run(tiny_recipe(tmp_path, tmp_path), tmp_path / "runs") is None
    with Tracker(Tracking(experiment="x", run_id="0" * 32), tmp_path / "metrics.jsonl") as tracker:
        started = time.monotonic()
        for step in range(1000):
            tracker.metrics({"loss/train": 1.0}, step)
        spent = time.monotonic() - started
    assert spent < 1.0  # 1000 steps; sending is another thread's business
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1000


def test_a_secret_in_the_uri_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'user:secret@store.db'}")
    target = start_run(tiny_recipe(tmp_path, tmp_path), tmp_path / "runs")
    assert target is not None
    assert "secret" not in target.model_dump_json()
    assert all("secret" not in path.read_text() for path in (tmp_path / "runs").rglob("*") if path.is_file())

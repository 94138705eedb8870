"""What people look at: MLflow through an outage, its pages and our reports in a browser. Everything is real."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image

from recovery.files import read_json
from recovery.tracking import read_metrics
from tests.pipeline import make_benchmarks, tiny_recipe
from tests.services.conftest import MlflowServer, chromium

pytestmark = pytest.mark.services


def recipe_file(reference: Path, folder: Path) -> Path:
    recipe = tiny_recipe(reference, make_benchmarks(folder / "data"), train={"epochs": 40, "log_every": 1})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


def command(*arguments: str | Path, uri: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    return text


def wait_for_steps(runs: Path) -> None:
    """Until training has taken a few."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for path in runs.glob("artifacts/.train-*.partial/history.jsonl"):
            if len(path.read_text().splitlines()) > 3:
                return
        time.sleep(0.05)
    raise AssertionError("no step was taken")


def metrics_of(runs: Path) -> dict[str, set[tuple[float, int, int]]]:
    found: dict[str, set[tuple[float, int, int]]] = {}
    for path in runs.glob("artifacts/*/metrics.jsonl"):
        for name, entries in read_metrics(path).items():
            found.setdefault(name, set()).update(entries)
    return found


def test_a_run_outlives_its_tracking_server_and_is_sent_later(tiny: Path, tmp_path: Path, server: MlflowServer):
    recipe, runs = recipe_file(tiny, tmp_path), tmp_path / "runs"
    run = command("run", recipe, "--runs-dir", runs, uri=server.uri)
    wait_for_steps(runs)
    server.kill()
    finished(run)
    away = command("track", "sync", recipe, "--runs-dir", runs, uri=server.uri)
    text, _ = away.communicate(timeout=200)
    assert away.returncode == 1, text
    assert "does not answer" in text

    server.start()
    sent = finished(command("track", "sync", recipe, "--runs-dir", runs, uri=server.uri))
    count = re.search(r"tiny: ([\d,]+) metrics and (\d+) files sent", sent)
    assert count is not None, sent
    assert int(count[1].replace(",", "")) > 0
    assert int(count[2]) == 7  # the report, its page, four plots, the summary
    client, [identifier] = MlflowClient(server.uri), read_json(runs / "tiny" / "tracking.json").values()
    for name, entries in metrics_of(runs).items():
        history = client.get_metric_history(identifier, name)
        found = [(metric.value, metric.timestamp, metric.step) for metric in history]
        assert len(found) == len(set(found)), name
        assert set(found) == entries, name
    assert client.get_run(identifier).info.status == "FINISHED"
    assert "tiny: 0 metrics and 0 files sent" in finished(
        command("track", "sync", recipe, "--runs-dir", runs, uri=server.uri)
    )


def looks_like_a_page(png: bytes) -> bool:
    """Not empty, not of few colors."""
    pixels: Any = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_pages_in_a_browser(tiny: Path, tmp_path: Path, server: MlflowServer):
    recipe, runs, study = recipe_file(tiny, tmp_path), tmp_path / "runs", tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"name": "ranks", "recipe": recipe.name, "axes": {"adapter.rank": [4, 8]}}))
    finished(command("study", study, "--runs-dir", runs, uri=server.uri))
    asyncio.run(look_at_everything(runs, server, tmp_path))


async def look_at_everything(runs: Path, server: MlflowServer, folder: Path) -> None:
    async with chromium(folder / "browser") as browser:
        document, picture = await browser.see(
            (runs / "ranks.4" / "report" / "report.html").resolve().as_uri(), "Accuracy recovery"
        )
        assert document.count("<img") == 4
        assert re.search(r"<strong>(Recovered|Partly recovered|Not recovered)</strong>", document)
        assert looks_like_a_page(picture)
        document, picture = await browser.see((runs / "ranks" / "results.html").resolve().as_uri(), "KL recovery")
        assert looks_like_a_page(picture)
        assert not browser.complaints

        client = MlflowClient(server.uri)
        [identifier] = read_json(runs / "ranks" / "tracking.json").values()
        parent = client.get_run(identifier).info
        children = client.search_runs([parent.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'")
        names = {str(child.info.run_name): child.info.run_id for child in children}
        assert sorted(names) == ["ranks.4", "ranks.8"]
        page = f"{server.uri}/#/experiments/{parent.experiment_id}/runs/{names['ranks.4']}"
        _, picture = await browser.see(page, "ranks.4", "eval/kl_recovered", "Finished")
        assert looks_like_a_page(picture)

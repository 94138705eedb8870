"""Tracking: every metric goes to a local JSONL file at once, and to MLflow from a thread of its own.

A tracking server that is slow or dead never stops or slows a stage: what cannot be sent is dropped with one warning
and stays in the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from recovery.config import Tracking
from recovery.errors import first_line, without_credentials

log = logging.getLogger("recover-lora")
METRICS = "metrics.jsonl"
BATCH, PARAMS = 500, 100
"""Metrics and params of one call; MLflow takes at most 1000 and 100."""
PATIENCE_SECONDS = 20.0


def read_metrics(path: Path) -> dict[str, list[tuple[float, int, int]]]:
    """(value, milliseconds since 1970, step) of every metric in such a file; a line that a kill cut is left out."""
    found: dict[str, list[tuple[float, int, int]]] = {}
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            step, stamp = values.pop("step"), round(values.pop("time") * 1000)
            for name, value in values.items():
                found.setdefault(name, []).append((value, stamp, step))
    return found


def shown_files(folder: Path) -> list[Path]:
    """Of a report: what belongs into MLflow's artifacts."""
    return [path for path in sorted(folder.glob("*.*")) if path.name not in (METRICS, "manifest.json")]


def mlflow_client(uri: str | None) -> Any:
    """An MLflow client that gives up on a dead server within seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def told_by_store(error: Exception) -> str:
    """What a tracking server's error says, without the server's address, which may hold a password."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    text = first_line(error)
    for address in (uri, without_credentials(uri)) if uri else ():
        text = text.replace(address, "its store")
    return text[:200]


class Tracker:
    """with Tracker(job.runtime.tracking, path) as tracker: tracker.metrics({"loss/train": 1.2}, step=3)

    path: the JSONL file (None: no file). target: None logs to the file only.
    """

    def __init__(self, target: Tracking | None, path: Path | None) -> None:
        self._file = path.open("a", buffering=1) if path is not None else None
        self._target = target
        self._queue: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if target is not None:
            self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
            self._thread.start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(PATIENCE_SECONDS)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Names are spaced by a slash: loss/ perf/ optim/ data/ eval/."""
        stamp = round(time.time() * 1000)
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "time": stamp / 1000, **values}) + "\n")
        for name, value in values.items():
            self._queue.put(("metric", (name, float(value), stamp, step)))

    def params(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._queue.put(("param", (name, str(value)[:500])))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or folder into the run's artifacts."""
        self._queue.put(("artifact", (path, folder)))

    def _send(self) -> None:
        assert self._target is not None
        try:
            client = mlflow_client(self._target.uri)
            while (item := self._queue.get()) is not None:
                batch, last = [item], False
                while not self._queue.empty() and len(batch) < BATCH:
                    following = self._queue.get()
                    if following is None:
                        last = True
                        break
                    batch.append(following)
                self._send_batch(client, batch)
                if last:
                    return
        except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the stage goes on
            log.warning(
                "MLflow does not take our metrics (%s); they stay in metrics.jsonl until `recover-lora track sync`",
                told_by_store(error),
            )

    def _send_batch(self, client: Any, batch: list[tuple[str, Any]]) -> None:
        from mlflow.entities import Metric, Param

        assert self._target is not None
        run = self._target.run_id
        metrics = [Metric(*value) for kind, value in batch if kind == "metric"]
        params = [Param(*value) for kind, value in batch if kind == "param"]
        for first in range(0, max(len(params), 1), PARAMS):
            client.log_batch(run, metrics=metrics if first == 0 else [], params=params[first : first + PARAMS])
        for kind, value in batch:
            if kind == "artifact":
                path, folder = value
                (client.log_artifacts if path.is_dir() else client.log_artifact)(run, str(path), folder)

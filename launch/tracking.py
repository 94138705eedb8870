"""The MLflow run of a recipe: made once, remembered in the run's folder, gone on with after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from launch.recipe import Recipe
from recovery.config import Tracking
from recovery.files import read_json, write_json
from recovery.tracking import mlflow_client

log = logging.getLogger("recover-lora")


def store_uri(runs_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, or one SQLite file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def start_run(recipe: Recipe, runs_dir: Path, parent: str | None = None) -> Tracking | None:
    """The run to log to, or None (with a warning) when the store does not answer. parent: the run of the study."""
    uri = store_uri(runs_dir)
    note = runs_dir / recipe.name / "tracking.json"
    store = hashlib.sha256(uri.encode()).hexdigest()[:16]
    content = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]
    written = None if os.environ.get("MLFLOW_TRACKING_URI") else uri
    try:
        client = mlflow_client(uri)
        from mlflow.exceptions import MlflowException

        known = read_json(note) if note.exists() else {}
        if (known.get("store"), known.get("recipe")) == (store, content):
            with contextlib.suppress(MlflowException):  # removed from the store: a new run is made
                client.get_run(known["run_id"])
                return Tracking(uri=written, experiment=recipe.tracking.experiment, run_id=known["run_id"])
        identifier = _experiment(client, recipe.tracking.experiment, runs_dir if written else None)
        tags = {} if parent is None else {"mlflow.parentRunId": parent}
        run = client.create_run(identifier, run_name=recipe.name, tags=tags)
        params = {f"{section}.{key}": value for section, key, value in _flat(recipe)}
        for key, value in params.items():
            client.log_param(run.info.run_id, key, value)
    except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the run goes on
        _say_silent(error, uri)
        return None
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"store": store, "recipe": content, "run_id": run.info.run_id})
    return Tracking(uri=written, experiment=recipe.tracking.experiment, run_id=run.info.run_id)


def start_study(name: str, experiment: str, runs_dir: Path) -> str | None:
    """The parent run of a study's points: made once, remembered in the study's folder; None without a store."""
    uri, note = store_uri(runs_dir), runs_dir / name / "tracking.json"
    store = hashlib.sha256(uri.encode()).hexdigest()[:16]
    own = None if os.environ.get("MLFLOW_TRACKING_URI") else runs_dir
    try:
        client = mlflow_client(uri)
        from mlflow.exceptions import MlflowException

        known = read_json(note) if note.exists() else {}
        if known.get("store") == store:
            with contextlib.suppress(MlflowException):
                return str(client.get_run(known["run_id"]).info.run_id)
        run = client.create_run(_experiment(client, experiment, own), run_name=name, tags={"recover-lora.study": name})
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error, uri)
        return None
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"store": store, "run_id": run.info.run_id})
    return str(run.info.run_id)


def _experiment(client: Any, name: str, runs_dir: Path | None) -> str:
    """The experiment's identifier; made where there is none. runs_dir: of a store of our own, beside the runs."""
    found = client.get_experiment_by_name(name)
    location = str(runs_dir.resolve() / "mlartifacts") if runs_dir is not None else None
    return found.experiment_id if found else client.create_experiment(name, artifact_location=location)


def _say_silent(error: Exception, uri: str) -> None:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    first = first.replace(uri, "its store")  # which may hold a password
    log.warning("MLflow does not answer (%s); metrics stay in the artifacts' metrics.jsonl", first)


def _flat(recipe: Recipe) -> list[tuple[str, str, str]]:
    content = recipe.model_dump(mode="json")
    rows = [("recipe", "name", str(content.pop("name"))), ("recipe", "seed", str(content.pop("seed")))]
    for section, fields in content.items():
        for key, value in (fields or {}).items():
            rows.append((section, key, (value if isinstance(value, str) else json.dumps(value))[:500]))
    return rows

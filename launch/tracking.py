"""The MLflow run of a recipe: made once, remembered in the run's folder, gone on with after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.table import verdict
from launch.recipe import Recipe
from launch.resolve import Stage
from recovery.artifacts import content_digest, folder_of, read_manifest
from recovery.config import Tracking
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, Unavailable
from recovery.files import read_json, write_json
from recovery.tracking import BATCH, first_line, mlflow_client, read_metrics, shown_files

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
                client.update_run(known["run_id"], status="RUNNING")
                return Tracking(uri=written, experiment=recipe.tracking.experiment, run_id=known["run_id"])
        identifier = _experiment(client, recipe.tracking.experiment, runs_dir if written else None)
        tags = {} if parent is None else {"mlflow.parentRunId": parent}
        run = client.create_run(identifier, run_name=recipe.name, tags=tags)
        params = {f"{section}.{key}": value for section, key, value in _flat(recipe)}
        for key, value in params.items():
            client.log_param(run.info.run_id, key, value)
    except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the run goes on
        _say_silent(error)
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
                client.update_run(known["run_id"], status="RUNNING")
                return str(known["run_id"])
        run = client.create_run(_experiment(client, experiment, own), run_name=name, tags={"recover-lora.study": name})
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error)
        return None
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"store": store, "run_id": run.info.run_id})
    return str(run.info.run_id)


def end_study(parent: str | None, runs_dir: Path, folder: Path, code: int) -> None:
    """Tell MLflow how a study ended, with its results so far. folder: the study's."""
    if parent is None:
        return
    try:
        client = mlflow_client(store_uri(runs_dir))
        for path in folder.glob("results.*"):
            client.log_artifact(parent, str(path))
        client.set_terminated(parent, _status(code))
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error)


def _status(code: int) -> str:
    return {EXIT_DONE: "FINISHED", EXIT_INTERRUPTED: "KILLED"}.get(code, "FAILED")


def _experiment(client: Any, name: str, runs_dir: Path | None) -> str:
    """The experiment's identifier; made where there is none. runs_dir: of a store of our own, beside the runs."""
    found = client.get_experiment_by_name(name)
    location = str(runs_dir.resolve() / "mlartifacts") if runs_dir is not None else None
    return found.experiment_id if found else client.create_experiment(name, artifact_location=location)


def _say_silent(error: Exception) -> None:
    log.warning(
        "MLflow does not answer (%s); metrics stay in the artifacts' metrics.jsonl until `recover-lora track sync`",
        first_line(error),
    )


@dataclass
class Attempt:
    """tracking: what the stages log to. code: the exit code, to be set."""

    tracking: Tracking | None
    code: int = EXIT_FAILED


@contextlib.contextmanager
def tracked(recipe: Recipe, runs_dir: Path, parent: str | None = None) -> Iterator[Attempt]:
    """The run while its stages are at work; at the end MLflow is told how they ended."""
    attempt = Attempt(start_run(recipe, runs_dir, parent))
    try:
        yield attempt
    except KeyboardInterrupt:
        attempt.code = EXIT_INTERRUPTED
        raise
    finally:
        if attempt.tracking is not None:
            try:
                mlflow_client(attempt.tracking.uri).set_terminated(attempt.tracking.run_id, _status(attempt.code))
            except Exception as error:  # noqa: BLE001 - as above
                _say_silent(error)


def register(recipe: Recipe, runs_dir: Path, delivery: Path) -> str | None:
    """A version of the registered model that is named as the recipe: the delivered adapter with its scores and where
    it came from. Returns its address (`models:/name/version`), the same for the same content; None, with a warning,
    when the store does not answer. A merged model stays where it is: registered is what is small.
    """
    with tracked(recipe, runs_dir) as run:
        run.code = EXIT_DONE
        if run.tracking is None:
            return None
        try:
            return _register(mlflow_client(run.tracking.uri), run.tracking.run_id, recipe.name, delivery)
        except Exception as error:  # noqa: BLE001 - as for a recipe's run
            _say_silent(error)
            return None


def _register(client: Any, run: str, name: str, delivery: Path) -> str:
    from mlflow.exceptions import MlflowException

    from recovery.adapters import CONFIG, WEIGHTS  # with torch, which other commands need not wait for

    manifest, summary = read_manifest(delivery), read_json(delivery / "summary.json")
    inputs = {f"recover-lora.{given}": str(about["digest"]) for given, about in manifest["inputs"].items()}
    tags = {"recover-lora.content": content_digest({n: manifest["files"][n] for n in (WEIGHTS, CONFIG)}), **inputs}
    for figure in ("kl", "ar_percent_measurable", "tokens", "trainable_parameters"):
        tags[f"recover-lora.{figure}"] = json.dumps(summary[figure])
    with contextlib.suppress(MlflowException):  # it is there already
        client.create_registered_model(name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get("recover-lora.content") == tags["recover-lora.content"]:
            return f"models:/{name}/{version.version}"
    for path in sorted(delivery.glob("*.*")):
        if path.is_file():
            client.log_artifact(run, str(path), "delivery")
    source = f"{client.get_run(run).info.artifact_uri}/delivery"
    version = client.create_model_version(name, source, run_id=run, tags=tags, description=verdict(summary))
    return f"models:/{name}/{version.version}"


@dataclass(frozen=True)
class Sent:
    metrics: int
    files: int


def sync(recipe: Recipe, stages: Sequence[Stage], runs_dir: Path, parent: str | None = None) -> Sent:
    """Send what a tracking server has not got of a run: metrics of all stages, also unfinished ones, and the report.

    What it has is asked first, so nothing is sent twice. parent: as for `start_run`. Raises Unavailable where the
    server does not answer.
    """
    tracking = start_run(recipe, runs_dir, parent)
    if tracking is None:
        raise Unavailable("the tracking server does not answer; the same command sends everything later")
    try:
        client = mlflow_client(tracking.uri)
        metrics = files = 0
        for stage in stages:
            folder = folder_of(stage.job)
            if (folder / "metrics.jsonl").is_file():
                metrics += _send_metrics(client, tracking.run_id, folder / "metrics.jsonl")
        report = stages[-1].job.runtime.output
        if report.exists():
            files = _send_files(client, tracking.run_id, report)
            client.set_terminated(tracking.run_id)
    except Exception as error:
        raise Unavailable(f"the tracking server stopped answering ({first_line(error)}); sync again later") from error
    return Sent(metrics, files)


def _send_metrics(client: Any, run: str, path: Path) -> int:
    from mlflow.entities import Metric

    missing = []
    for name, entries in read_metrics(path).items():
        known = {(metric.timestamp, metric.step) for metric in client.get_metric_history(run, name)}
        missing += [Metric(name, *entry) for entry in dict.fromkeys(entries) if entry[1:] not in known]
    for first in range(0, len(missing), BATCH):
        client.log_batch(run, metrics=missing[first : first + BATCH])
    return len(missing)


def _send_files(client: Any, run: str, report: Path) -> int:
    known = {Path(file.path).name for file in client.list_artifacts(run, "report")}
    missing = [path for path in shown_files(report) if path.name not in known]
    for path in missing:
        client.log_artifact(run, str(path), "report")
    return len(missing)


def _flat(recipe: Recipe) -> list[tuple[str, str, str]]:
    content = recipe.model_dump(mode="json")
    rows = [("recipe", "name", str(content.pop("name"))), ("recipe", "seed", str(content.pop("seed")))]
    for section, fields in content.items():
        for key, value in (fields or {}).items():
            rows.append((section, key, (value if isinstance(value, str) else json.dumps(value))[:500]))
    return rows

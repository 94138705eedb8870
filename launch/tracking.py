"""The MLflow run of a recipe: made once, remembered in the run's folder, gone on with after a kill."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.table import verdict
from launch.cluster import Cluster
from launch.recipe import Recipe
from launch.stages import Stage
from launch.store import (
    describe,
    experiment_of,
    key_of,
    known_run,
    new_run,
    note_of,
    remember,
    send_results,
    store_alone,
    store_key,
    store_uri,
)
from recovery.artifacts import content_digest, read_manifest
from recovery.config import Tracking
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from recovery.files import read_json
from recovery.tracking import mlflow_client, told_by_store

log = logging.getLogger("recover-lora")
UNTIL_SYNC = "metrics stay in the artifacts' metrics.jsonl until `recover-lora track sync`"


def start_run(recipe: Recipe, runs_dir: Path, parent: str | None = None) -> Tracking | None:
    """The run to log to, or None (with a warning) when the store does not answer. parent: the run of the study."""
    try:
        with store_alone(runs_dir):
            client = mlflow_client(store_uri(runs_dir))
            known = known_run(client, note_of(runs_dir, recipe.name), key_of(runs_dir, recipe), parent)
            if known is not None:
                client.update_run(known, status="RUNNING")
            return _target(recipe, runs_dir, known or new_run(client, recipe, runs_dir, parent))
    except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the run goes on
        _say_silent(error)
        return None


def start_study(name: str, experiment: str, runs_dir: Path, *, begin: bool = True) -> str | None:
    """The parent run of a study's points: made once, remembered in the study's folder; None without a store.

    begin: the study starts; otherwise a known run's state stays, and a new one is of a study that is not at work.
    """
    note, key = note_of(runs_dir, name), store_key(runs_dir)
    try:
        with store_alone(runs_dir):
            client = mlflow_client(store_uri(runs_dir))
            known = known_run(client, note, key)
            if known is not None:
                if begin:
                    client.update_run(known, status="RUNNING")
                return known
            tags = {"recover-lora.study": name}
            run = client.create_run(experiment_of(client, experiment, runs_dir), run_name=name, tags=tags)
            remember(note, key, run.info.run_id)
            if not begin:
                client.set_terminated(run.info.run_id, _status(EXIT_INTERRUPTED))
            return str(run.info.run_id)
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error)
        return None


def _target(recipe: Recipe, runs_dir: Path, run: str) -> Tracking:
    """A server's address is not written down: it may hold a password."""
    written = None if os.environ.get("MLFLOW_TRACKING_URI") else store_uri(runs_dir)
    return Tracking(uri=written, experiment=recipe.tracking.experiment, run_id=run)


def end_study(parent: str | None, runs_dir: Path, folder: Path, code: int | None) -> None:
    """Tell MLflow how a study ended, with its results so far. folder: the study's. code: None where it goes on."""
    if parent is None:
        return
    try:
        client = mlflow_client(store_uri(runs_dir))
        send_results(client, parent, folder)
        if code is not None:
            client.set_terminated(parent, _status(code))
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error)


def _status(code: int) -> str:
    return {EXIT_DONE: "FINISHED", EXIT_INTERRUPTED: "KILLED"}.get(code, "FAILED")


def _say_silent(error: Exception, then: str = UNTIL_SYNC) -> None:
    log.warning("MLflow does not answer (%s); %s", told_by_store(error), then)


@dataclass
class Attempt:
    """tracking: what the stages log to. code: the exit code, to be set."""

    tracking: Tracking | None
    code: int = EXIT_FAILED


@contextlib.contextmanager
def tracked(
    recipe: Recipe,
    runs_dir: Path,
    parent: str | None = None,
    stages: Sequence[Stage] = (),
    cluster: Cluster | None = None,
) -> Iterator[Attempt]:
    """The run while its stages are at work, with this host's system metrics; at the end MLflow is told how they ended
    and what they were made from. cluster: where they work."""
    attempt = Attempt(start_run(recipe, runs_dir, parent))
    monitor = None
    try:
        monitor = _monitor(attempt.tracking, runs_dir) if stages else None
        yield attempt
    except KeyboardInterrupt:
        attempt.code = EXIT_INTERRUPTED
        raise
    finally:
        if attempt.tracking is not None:
            try:
                if monitor is not None:
                    monitor.finish()
                client = mlflow_client(attempt.tracking.uri)
                client.set_terminated(attempt.tracking.run_id, _status(attempt.code))
                describe(client, attempt.tracking.run_id, stages, cluster)
            except Exception as error:  # noqa: BLE001 - as above
                _say_silent(error)


def _monitor(target: Tracking | None, runs_dir: Path) -> Any:
    """MLflow's own sampling of processor, memory, disk, network and GPUs, in a thread; None without a store."""
    if target is None:
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    try:
        monitor = SystemMetricsMonitor(target.run_id, resume_logging=True, tracking_uri=store_uri(runs_dir))
        monitor.start()
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error, "this run has no system metrics")
        return None
    return monitor


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
            _say_silent(error, "the adapter is not registered; the same command tries again")
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
    # A folder for each content: an older version keeps its files.
    place = f"delivery/{tags['recover-lora.content'][:16]}"
    for path in sorted(delivery.glob("*.*")):
        if path.is_file():
            client.log_artifact(run, str(path), place)
    source = f"{client.get_run(run).info.artifact_uri}/{place}"
    version = client.create_model_version(name, source, run_id=run, tags=tags, description=verdict(summary))
    return f"models:/{name}/{version.version}"

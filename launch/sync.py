"""What MLflow missed of runs and studies, sent later, once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from launch.recipe import Recipe
from launch.stages import Stage
from launch.store import (
    describe,
    key_of,
    known_run,
    new_run,
    note_of,
    send_params,
    send_results,
    store_alone,
    store_uri,
)
from recovery.artifacts import folder_of, is_being_built
from recovery.errors import Unavailable
from recovery.tracking import BATCH, METRICS, mlflow_client, read_metrics, shown_files, told_by_store


@dataclass(frozen=True)
class Sent:
    metrics: int
    files: int


def sync(
    recipe: Recipe,
    stages: Sequence[Stage],
    runs_dir: Path,
    parent: str | None = None,
    cluster: Cluster | None = None,
) -> Sent:
    """Send what a tracking server has not got of a run: metrics of all stages, also unfinished ones, and the
    pictures of the corpus and the report.

    What it has is asked first, so nothing is sent twice; a run of which nothing is there is not made. parent: as for
    `start_run`. Raises Unavailable where the server does not answer.
    """
    files = [path for stage in stages if (path := folder_of(stage.job) / METRICS).is_file()]
    if not files:
        return Sent(0, 0)
    try:
        with store_alone(runs_dir):
            client = mlflow_client(store_uri(runs_dir))
            known = known_run(client, note_of(runs_dir, recipe.name), key_of(runs_dir, recipe), parent)
            run = known or new_run(client, recipe, runs_dir, parent)
        send_params(client, run, recipe)  # a store that went away while the run was made has a part of them
        metrics = sum(_send_metrics(client, run, path) for path in files)
        describe(client, run, stages, cluster)
        report, sent = stages[-1].job.runtime.output, _send_corpus_picture(client, run, stages)
        if report.exists():
            sent += _send_files(client, run, report)
            client.set_terminated(run)
        elif known is None and not any(is_being_built(stage.job.runtime.output) for stage in stages):
            client.set_terminated(run, "KILLED")
    except Exception as error:
        raise _away(error) from error
    return Sent(metrics, sent)


def sync_study(parent: str, runs_dir: Path, folder: Path, *, whole: bool) -> None:
    """The results of a study so far; its run has ended where every point is done. Raises Unavailable as `sync`."""
    try:
        client = mlflow_client(store_uri(runs_dir))
        send_results(client, parent, folder)
        if whole:
            client.set_terminated(parent)
    except Exception as error:
        raise _away(error) from error


def _away(error: Exception) -> Unavailable:
    return Unavailable(
        f"the tracking server does not answer ({told_by_store(error)}); the same command sends the rest later"
    )


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
    known = {Path(file.path).name: file.file_size for file in client.list_artifacts(run, "report")}
    missing = [path for path in shown_files(report) if known.get(path.name) != path.stat().st_size]
    for path in missing:
        client.log_artifact(run, str(path), "report")
    return len(missing)


def _send_corpus_picture(client: Any, run: str, stages: Sequence[Stage]) -> int:
    """Drawn again, as a corpus does not keep it: a picture's bytes are not the corpus'."""
    from datagen.plots import plot_corpus

    corpus = next((stage.job.runtime.output for stage in stages if stage.label == "generate"), None)
    if corpus is None or not corpus.exists() or client.list_artifacts(run, "corpus"):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        plot_corpus(corpus, Path(folder) / "corpus.png")
        client.log_artifact(run, str(Path(folder) / "corpus.png"), "corpus")
    return 1

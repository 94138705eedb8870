"""The MLflow run of a recipe: made once, remembered in the run's folder, gone on with after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.table import verdict
from launch.cluster import Cluster
from launch.recipe import Recipe
from launch.resolve import Stage
from recovery.artifacts import MANIFEST, content_digest, folder_of, is_being_built, read_manifest
from recovery.config import ModelInput, Tracking
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, Unavailable, without_credentials
from recovery.files import read_json, write_json
from recovery.tracking import BATCH, METRICS, PARAMS, mlflow_client, read_metrics, shown_files, told_by_store

log = logging.getLogger("recover-lora")
PARENT = "mlflow.parentRunId"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Schemes of stores that clients reach without a server, and that say nothing of where files lie."""
MANIFESTS = "manifests"
"""Folder of a run's artifacts."""
MODELS = ("evaluate-reference", "evaluate-degraded")
"""Stages that name a model by its hash."""


def store_uri(runs_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, or one SQLite file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def start_run(recipe: Recipe, runs_dir: Path, parent: str | None = None) -> Tracking | None:
    """The run to log to, or None (with a warning) when the store does not answer. parent: the run of the study."""
    try:
        client = mlflow_client(store_uri(runs_dir))
        known = _known_run(client, _note(runs_dir, recipe.name), _key(runs_dir, recipe), parent)
        if known is not None:
            client.update_run(known, status="RUNNING")
        return _target(recipe, runs_dir, known or _new_run(client, recipe, runs_dir, parent))
    except Exception as error:  # noqa: BLE001 - whatever a tracking server does, the run goes on
        _say_silent(error)
        return None


def start_study(name: str, experiment: str, runs_dir: Path, *, begin: bool = True) -> str | None:
    """The parent run of a study's points: made once, remembered in the study's folder; None without a store.

    begin: the study starts; otherwise a known run's state stays, and a new one is of a study that is not at work.
    """
    note, key = _note(runs_dir, name), _store_key(runs_dir)
    try:
        client = mlflow_client(store_uri(runs_dir))
        known = _known_run(client, note, key)
        if known is not None:
            if begin:
                client.update_run(known, status="RUNNING")
            return known
        tags = {"recover-lora.study": name}
        run = client.create_run(_experiment(client, experiment, runs_dir), run_name=name, tags=tags)
        _remember(note, key, run.info.run_id)
        if not begin:
            client.set_terminated(run.info.run_id, _status(EXIT_INTERRUPTED))
        return str(run.info.run_id)
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error)
        return None


def _note(runs_dir: Path, name: str) -> Path:
    """Where a run or study remembers its MLflow runs, by store and content."""
    return runs_dir / name / "tracking.json"


def _store_key(runs_dir: Path) -> str:
    """Names the store; another password is not another store."""
    address = without_credentials(store_uri(runs_dir))
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def _key(runs_dir: Path, recipe: Recipe) -> str:
    content = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]
    return f"{_store_key(runs_dir)} {content}"


def _known_run(client: Any, note: Path, key: str, parent: str | None = None) -> str | None:
    """The run that was made for this before, if the store still has it. A store that does not answer raises."""
    from mlflow.exceptions import MlflowException

    run = (read_json(note) if note.exists() else {}).get(key)
    if run is None:
        return None
    try:
        found = client.get_run(run)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if found.info.lifecycle_stage == "deleted":
        return None
    if parent is not None and found.data.tags.get(PARENT) != parent:  # the store was away when the study began
        client.set_tag(run, PARENT, parent)
    return str(run)


def _new_run(client: Any, recipe: Recipe, runs_dir: Path, parent: str | None) -> str:
    identifier = _experiment(client, recipe.tracking.experiment, runs_dir)
    run = client.create_run(identifier, run_name=recipe.name, tags={} if parent is None else {PARENT: parent})
    # First of all, so that what fails from here on makes no second run.
    _remember(_note(runs_dir, recipe.name), _key(runs_dir, recipe), run.info.run_id)
    _send_params(client, run.info.run_id, recipe)
    return str(run.info.run_id)


def _send_params(client: Any, run: str, recipe: Recipe) -> None:
    """What the run has of them already stays as it is."""
    from mlflow.entities import Param

    known = client.get_run(run).data.params
    missing = [Param(name, value) for name, value in _flat(recipe).items() if name not in known]
    for first in range(0, len(missing), PARAMS):
        client.log_batch(run, params=missing[first : first + PARAMS])


def _remember(note: Path, key: str, run: str) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {**(read_json(note) if note.exists() else {}), key: run})


def _target(recipe: Recipe, runs_dir: Path, run: str) -> Tracking:
    """A server's address is not written down: it may hold a password."""
    written = None if os.environ.get("MLFLOW_TRACKING_URI") else store_uri(runs_dir)
    return Tracking(uri=written, experiment=recipe.tracking.experiment, run_id=run)


def end_study(parent: str | None, runs_dir: Path, folder: Path, code: int) -> None:
    """Tell MLflow how a study ended, with its results so far. folder: the study's."""
    if parent is None:
        return
    try:
        client = mlflow_client(store_uri(runs_dir))
        _send_results(client, parent, folder)
        client.set_terminated(parent, _status(code))
    except Exception as error:  # noqa: BLE001 - as for a recipe's run
        _say_silent(error)


def _send_results(client: Any, parent: str, folder: Path) -> None:
    for path in [*folder.glob("*.png"), *folder.glob("results.*"), *folder.glob("laws.json")]:
        client.log_artifact(parent, str(path))


def _status(code: int) -> str:
    return {EXIT_DONE: "FINISHED", EXIT_INTERRUPTED: "KILLED"}.get(code, "FAILED")


def _experiment(client: Any, name: str, runs_dir: Path) -> str:
    """The experiment's identifier; made where there is none, its files beside the runs if the store has no say: MLflow
    would put them into whatever folder the command was started in."""
    found = client.get_experiment_by_name(name)
    scheme = store_uri(runs_dir).partition(":")[0].partition("+")[0]
    location = str(runs_dir.resolve() / "mlartifacts") if scheme in DATABASES else None
    return found.experiment_id if found else client.create_experiment(name, artifact_location=location)


UNTIL_SYNC = "metrics stay in the artifacts' metrics.jsonl until `recover-lora track sync`"


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
                _describe(client, attempt.tracking.run_id, stages, cluster)
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


def _describe(client: Any, run: str, stages: Sequence[Stage], cluster: Cluster | None) -> None:
    """What a run was made from: tags, the corpus as its dataset, the manifests of what is finished. Again, nothing
    changes."""
    from mlflow.entities import Dataset, DatasetInput

    tags: dict[str, Any] = {}
    if cluster is not None:
        tags |= {"recover-lora.cluster": cluster.name, "recover-lora.image": cluster.image}
    known = {file.path for file in client.list_artifacts(run, MANIFESTS)}
    for stage in stages:
        if stage.label in MODELS:
            model = next(given for given in stage.job.inputs().values() if isinstance(given, ModelInput))
            tags[f"recover-lora.{stage.label.removeprefix('evaluate-')}"] = model.digest
        folder = stage.job.runtime.output
        if not folder.exists():
            continue
        manifest = read_manifest(folder)
        tags["mlflow.source.git.commit"] = manifest["git"]["revision"]  # of the last one in the end
        name = f"{MANIFESTS}/{stage.label}.json"
        if name not in known:
            client.log_text(run, (folder / MANIFEST).read_text(), name)
        if stage.label == "generate":
            digest = manifest["content"]
            tags["recover-lora.corpus"] = digest
            corpus = Dataset("corpus", digest[:36], "local", json.dumps({"uri": str(folder)}))
            client.log_inputs(run, [DatasetInput(corpus)])
    for key, value in tags.items():
        if value is not None:
            client.set_tag(run, key, value)


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
        client = mlflow_client(store_uri(runs_dir))
        known = _known_run(client, _note(runs_dir, recipe.name), _key(runs_dir, recipe), parent)
        run = known or _new_run(client, recipe, runs_dir, parent)
        _send_params(client, run, recipe)  # a store that went away while the run was made has a part of them
        metrics = sum(_send_metrics(client, run, path) for path in files)
        _describe(client, run, stages, cluster)
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
        _send_results(client, parent, folder)
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


def _flat(recipe: Recipe) -> dict[str, str]:
    content = recipe.model_dump(mode="json")
    flat = {f"recipe.{key}": str(content.pop(key)) for key in ("name", "seed")}
    for section, fields in content.items():
        for key, value in (fields or {}).items():
            flat[f"{section}.{key}"] = (value if isinstance(value, str) else json.dumps(value))[:500]
    return flat

"""MLflow's store: where it is, which run of it is a recipe's or a study's, and what a run is told to be made from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from launch.recipe import Recipe
from launch.stages import Stage
from recovery.artifacts import MANIFEST, read_manifest, turn
from recovery.config import ModelInput
from recovery.errors import without_credentials
from recovery.files import read_notes, write_json
from recovery.tracking import PARAMS

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


def _scheme(runs_dir: Path) -> str:
    """The store's, without the driver that may stand behind a database's."""
    return store_uri(runs_dir).partition(":")[0].partition("+")[0]


def store_alone(runs_dir: Path) -> AbstractContextManager[None]:
    """One process after the other at an SQLite file: MLflow makes its tables without a lock, and two runs that begin at
    once would fail over each other's. A server is asked by all at once, as it may be slow to answer."""
    path = store_uri(runs_dir).partition(":///")[2].partition("?")[0]
    if _scheme(runs_dir) != "sqlite" or not path:  # without a path it is in memory
        return nullcontext()
    file = Path(path)
    # Beside the file, as runs of several folders may share it.
    return turn(file.with_name(f".{file.name}.lock"), lambda: log.info("another run is being entered into MLflow"))


def note_of(runs_dir: Path, name: str) -> Path:
    """Where a run or study remembers its MLflow runs, by store and content."""
    return runs_dir / name / "tracking.json"


def store_key(runs_dir: Path) -> str:
    """Names the store; another password is not another store."""
    address = without_credentials(store_uri(runs_dir))
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def key_of(runs_dir: Path, recipe: Recipe) -> str:
    content = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]
    return f"{store_key(runs_dir)} {content}"


def known_run(client: Any, note: Path, key: str, parent: str | None = None) -> str | None:
    """The run that was made for this before, if the store still has it. A store that does not answer raises."""
    from mlflow.exceptions import MlflowException

    run = read_notes(note).get(key)
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


def new_run(client: Any, recipe: Recipe, runs_dir: Path, parent: str | None) -> str:
    identifier = experiment_of(client, recipe.tracking.experiment, runs_dir)
    run = client.create_run(identifier, run_name=recipe.name, tags={} if parent is None else {PARENT: parent})
    # First of all, so that what fails from here on makes no second run.
    remember(note_of(runs_dir, recipe.name), key_of(runs_dir, recipe), run.info.run_id)
    send_params(client, run.info.run_id, recipe)
    return str(run.info.run_id)


def send_params(client: Any, run: str, recipe: Recipe) -> None:
    """What the run has of them already stays as it is."""
    from mlflow.entities import Param

    known = client.get_run(run).data.params
    missing = [Param(name, value) for name, value in _flat(recipe).items() if name not in known]
    for first in range(0, len(missing), PARAMS):
        client.log_batch(run, params=missing[first : first + PARAMS])


def remember(note: Path, key: str, run: str) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {**read_notes(note), key: run})


def experiment_of(client: Any, name: str, runs_dir: Path) -> str:
    """The experiment's identifier; made where there is none, its files beside the runs if the store has no say: MLflow
    would put them into whatever folder the command was started in."""
    found = client.get_experiment_by_name(name)
    location = str(runs_dir.resolve() / "mlartifacts") if _scheme(runs_dir) in DATABASES else None
    return found.experiment_id if found else client.create_experiment(name, artifact_location=location)


def describe(client: Any, run: str, stages: Sequence[Stage], cluster: Cluster | None) -> None:
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


def send_results(client: Any, parent: str, folder: Path) -> None:
    for path in [*folder.glob("*.png"), *folder.glob("results.*"), *folder.glob("laws.json")]:
        client.log_artifact(parent, str(path))


def _flat(recipe: Recipe) -> dict[str, str]:
    content = recipe.model_dump(mode="json")
    flat = {f"recipe.{key}": str(content.pop(key)) for key in ("name", "seed")}
    for section, fields in content.items():
        for key, value in (fields or {}).items():
            flat[f"{section}.{key}"] = (value if isinstance(value, str) else json.dumps(value))[:500]
    return flat

"""Tracking: a local file always, MLflow when it answers, and no harm when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.stages import Stage
from launch.sync import Sent, sync
from launch.tracking import start_run, start_study, tracked
from recovery.artifacts import partial_of, read_manifest
from recovery.config import DegradeJob, ModelInput, Runtime, Tracking
from recovery.damage_config import GaussianNoise
from recovery.errors import Unavailable
from recovery.tracking import Tracker, read_metrics, shown_files
from tests.pipeline import make_benchmarks, run_in_process, stages_of, tiny_recipe

DEAD = "http://127.0.0.1:9"
NOISE = GaussianNoise(relative_std=1.0)


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


@pytest.mark.parametrize("folders", [("runs", "runs"), ("runs", "other-runs")])
def test_runs_that_begin_at_once_share_a_new_store(folders: tuple[str, str], tmp_path: Path):
    """MLflow makes the tables of a new SQLite file without a lock; runs of several folders may share the file."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    recipe = tiny_recipe(tmp_path, tmp_path)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    program = (
        "import sys; from pathlib import Path\n"
        "from launch.recipe import Recipe; from launch.tracking import start_run\n"
        "folder = Path(sys.argv[1]); recipe = Recipe.model_validate_json((folder / 'recipe.json').read_text())\n"
        "print(start_run(recipe, folder / sys.argv[2]).run_id)"
    )
    commands = [[sys.executable, "-c", program, str(tmp_path), folder] for folder in folders]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands]
    assert len({run.communicate(timeout=300)[0] for run in runs}) == len(set(folders))
    assert [run.returncode for run in runs] == [0, 0]


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


def test_what_a_dead_server_missed_is_sent_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow.tracking import MlflowClient

    recipe = tiny_recipe(tiny, make_benchmarks(tmp_path / "data"), train={"epochs": 2})
    runs = tmp_path / "runs"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folders = run_in_process(recipe, runs)
    stages = list(stages_of(recipe, runs).values())
    with pytest.raises(Unavailable, match="does not answer"):
        sync(recipe, stages, runs)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sent = sync(recipe, stages, runs)
    files = [folder / "metrics.jsonl" for folder in folders.values() if (folder / "metrics.jsonl").exists()]
    wanted: dict[str, list[tuple[float, int, int]]] = {}
    for path in files:
        for name, entries in read_metrics(path).items():
            wanted.setdefault(name, []).extend(entries)
    assert {"loss/train", "eval/kl_recovered"} <= set(wanted)
    assert sent.metrics == sum(map(len, wanted.values()))
    assert sent.files == len(shown_files(folders["report"])) + 1 > 3  # and the corpus' picture
    target = start_run(recipe, runs)
    assert target is not None
    client = MlflowClient(target.uri)
    for name, entries in wanted.items():
        history = client.get_metric_history(target.run_id, name)
        assert sorted((one.value, one.timestamp, one.step) for one in history) == sorted(entries), name
    assert sync(recipe, stages, runs) == Sent(0, 0)
    found = client.get_run(target.run_id)
    assert found.info.status == "FINISHED"
    # What it was made from.
    corpus = read_manifest(folders["generate"])["content"]
    assert found.data.tags["recover-lora.corpus"] == corpus
    assert {"recover-lora.reference", "recover-lora.degraded", "mlflow.source.git.commit"} <= set(found.data.tags)
    assert found.inputs is not None
    assert [given.dataset.digest for given in found.inputs.dataset_inputs] == [corpus[:36]]
    manifests = {file.path for file in client.list_artifacts(target.run_id, "manifests")}
    assert manifests == {f"manifests/{stage.label}.json" for stage in stages}


def test_every_store_keeps_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    recipe, runs = tiny_recipe(tmp_path, tmp_path), tmp_path / "runs"
    found: dict[str, str] = {}
    for store in ("a", "b", "a", "b"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / store}.db")
        target = start_run(recipe, runs)
        assert target is not None
        assert found.setdefault(store, target.run_id) == target.run_id
        # The files of a database without a server do not depend on where the command was started.
        files = MlflowClient(target.uri).get_run(target.run_id).info.artifact_uri
        assert files is not None
        assert Path(files).is_relative_to(runs)
    assert len(set(found.values())) == 2
    # Begun without its study's run, whose store was away then; later it has one.
    client = MlflowClient(f"sqlite:///{tmp_path / 'b'}.db")
    assert "mlflow.parentRunId" not in client.get_run(found["b"]).data.tags
    parent = start_study("study", "recover-lora", runs)
    start_run(recipe, runs, parent)
    assert client.get_run(found["b"]).data.tags["mlflow.parentRunId"] == parent

    # A fault that passes makes no second run; one that was removed is made again.
    def away(*_: object) -> None:
        raise MlflowException("timed out")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_run", away)
        assert start_run(recipe, runs) is None
    again = start_run(recipe, runs)
    assert again is not None
    assert again.run_id == found["b"]
    client.delete_run(found["b"])
    anew = start_run(recipe, runs)
    assert anew is not None
    assert anew.run_id != found["b"]


def test_a_sync_changes_no_state_but_of_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A failed run stays failed, nothing is made of what was never run, and a run made by a sync is not at work."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'store.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    recipe, runs = tiny_recipe(tmp_path, tmp_path), tmp_path / "runs"
    output = runs / "artifacts" / "train-0"
    job = DegradeJob(runtime=Runtime(output=output), seed=0, reference=ModelInput(path="r", digest="r"), damage=NOISE)
    stages = [Stage("train", "train", "recovery.train", job, ())]
    assert sync(recipe, stages, runs) == Sent(0, 0)
    assert not (runs / recipe.name).exists()

    partial_of(output).mkdir(parents=True)
    (partial_of(output) / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "loss/train": 2.0}\n')
    assert sync(recipe, stages, runs) == Sent(1, 0)
    [run] = json.loads((runs / recipe.name / "tracking.json").read_text()).values()
    client = MlflowClient(uri)
    assert client.get_run(run).data.params["train.learning_rate"] == str(recipe.train.learning_rate)
    assert client.get_run(run).info.status == "KILLED"
    client.set_terminated(run, "FAILED")
    assert sync(recipe, stages, runs) == Sent(0, 0)
    assert client.get_run(run).info.status == "FAILED"


def test_parameters_that_a_store_missed_are_sent_by_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It went away between the making of the run and its parameters, and lets no run's monitor begin."""
    from mlflow.exceptions import MlflowException
    from mlflow.system_metrics import system_metrics_monitor
    from mlflow.tracking import MlflowClient

    def away(*_: object, **__: object) -> None:
        raise MlflowException("timed out")

    uri = f"sqlite:///{tmp_path / 'store.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    recipe, runs = tiny_recipe(tmp_path, tmp_path), tmp_path / "runs"
    job = DegradeJob(
        runtime=Runtime(output=runs / "artifacts" / "train-0"),
        seed=0,
        reference=ModelInput(path="r", digest="r"),
        damage=NOISE,
    )
    stages = [Stage("train", "train", "recovery.train", job, ())]
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        assert start_run(recipe, runs) is None
    with monkeypatch.context() as patch:
        patch.setattr(system_metrics_monitor, "SystemMetricsMonitor", away)
        with tracked(recipe, runs, None, stages) as run:
            assert run.tracking is not None
            identifier = run.tracking.run_id
    client = MlflowClient(uri)
    assert not client.get_run(identifier).data.params
    folder = partial_of(job.runtime.output)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "loss/train": 2.0}\n')
    sync(recipe, stages, runs)
    assert client.get_run(identifier).data.params["recipe.name"] == recipe.name


@pytest.mark.parametrize(("code", "status"), [(0, "FINISHED"), (1, "FAILED"), (130, "KILLED")])
def test_mlflow_is_told_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, status: str):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = tiny_recipe(tmp_path, tmp_path)
    with tracked(recipe, tmp_path / "runs") as run:
        assert run.tracking is not None
        client = MlflowClient(run.tracking.uri)
        assert client.get_run(run.tracking.run_id).info.status == "RUNNING"
        run.code = code
    assert client.get_run(run.tracking.run_id).info.status == status
    with tracked(recipe, tmp_path / "runs"):
        assert client.get_run(run.tracking.run_id).info.status == "RUNNING"

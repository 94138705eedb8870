"""Studies: a grid of recipes with a failing point, gone on with, reported; shared stages made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.study
from launch.execution import Plan
from launch.study import Study, chosen, load_study
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError
from tests.conftest import REPOSITORY
from tests.pipeline import make_benchmarks, tiny_recipe
from tests.test_cli import invoke

SHIPPED = sorted((REPOSITORY / "launch" / "studies").glob("*.yaml"))


def write_study(folder: Path, model: Path, axes: dict[str, Any]) -> Path:
    recipe = tiny_recipe(model, make_benchmarks(folder / "data"), train={"epochs": 2}, adapter={"rank": 4})
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "grid", "recipe": "base.yaml", "axes": axes}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_load(path: Path):
    study, points = load_study(path)
    assert f"recover-lora study {path.relative_to(REPOSITORY)}" in path.read_text()
    assert len({point.recipe.name for point in points}) == len(points)
    assert study.name == path.stem


def test_axes_are_fields_or_named_changes(tmp_path: Path, tiny: Path):
    axes = {"train.learning_rate": [1e-3, 2e-3], "damage": {"none": {}, "hard": {"degrade.relative_std": 2.0}}}
    study, points = load_study(write_study(tmp_path, tiny, axes))
    assert [point.name for point in points] == ["0_001.none", "0_001.hard", "0_002.none", "0_002.hard"]
    assert [point.recipe.train.learning_rate for point in points] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert [getattr(point.recipe.degrade, "relative_std", None) for point in points] == [0.5, 2.0, 0.5, 2.0]
    assert [point.name for point in chosen(study, points, ["damage=hard"])] == ["0_001.hard", "0_002.hard"]
    with pytest.raises(UserError, match="damage=none,hard"):
        chosen(study, points, ["damage=soft"])


def test_faults_of_all_points_are_told_at_once(tmp_path: Path, tiny: Path):
    axes = {"x": {"a": {"train.epoch": 1}, "b": {"adapter.rank": 0}, "c": {"name.x": 1}}}
    with pytest.raises(UserError) as caught:
        load_study(write_study(tmp_path, tiny, axes))
    assert "a: train.epoch: unknown field; did you mean epochs" in str(caught.value)
    assert "b: adapter.rank: found 0" in str(caught.value)
    assert "axes.x.c: name is not a section" in str(caught.value)
    with pytest.raises(ValueError, match="names a folder"):
        Study.model_validate({"name": "s", "recipe": "r", "axes": {"x": {"a/b": {}}}})


def test_a_study_goes_on_past_a_failing_point(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    methods = {
        "closed": {"adapter.init": "closed_form_sequential", "train.epochs": 0},
        "absent": {"adapter.placement": ["c_attn"]},
        "trained": {},
    }
    path, runs = write_study(tmp_path, tiny, {"method": methods, "adapter.rank": [4]}), tmp_path / "runs"
    command = ("study", str(path), "--runs-dir", str(runs))
    assert invoke(monkeypatch, *command, "--dry-run") == 0
    assert not runs.exists()
    assert invoke(monkeypatch, *command, "--minutes", "0") == 0
    assert "0 of 3 points are done" in capfd.readouterr().out
    assert invoke(monkeypatch, *command, "--forecast") == 1
    printed = capfd.readouterr().out
    assert "2 of 3 points are done" in printed
    assert "absent.4   failed: point: adapter.placement: no linear module is named c_attn" in printed
    # Damage, corpus, contexts and two of the scores are shared.
    made = sorted(folder.name.partition("-")[0] for folder in (runs / "artifacts").glob("[a-z]*"))
    assert made == sorted(["degrade", "generate", "contexts", "repair", "train", *["evaluate"] * 4, "report", "report"])
    found = {row["labels"]["method"]: row for row in json.loads((runs / "grid" / "results.json").read_text())["points"]}
    assert found["absent"]["result"] is None
    for method, point in (("closed", "grid.closed.4"), ("trained", "grid.trained.4")):
        summary = json.loads((runs / point / "report" / "summary.json").read_text())
        assert found[method]["result"]["kl"] == summary["kl"]
    assert 0 < found["closed"]["predicted"] < 1
    assert found["trained"]["predicted"] is None
    page = (runs / "grid" / "results.md").read_text()
    assert "### method: closed" in page
    assert "within 0.15 of the closed form's, before any training: " in page
    assert (runs / "grid" / "results.png").stat().st_size > 1000

    store = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("recover-lora")
    assert experiment is not None
    known = {run.info.run_name: run for run in store.search_runs([experiment.experiment_id])}
    ended = known.pop("grid")
    parent = ended.info.run_id
    assert ended.info.status == "FAILED"
    assert {file.path for file in store.list_artifacts(parent)} == {
        f"results.{e}" for e in ("html", "md", "json", "png")
    }
    assert {run.info.status for run in known.values()} == {"FINISHED"}
    assert set(known) == {"grid.closed.4", "grid.trained.4"}
    assert {run.data.tags["mlflow.parentRunId"] for run in known.values()} == {parent}

    stamps = {folder: folder.stat().st_mtime_ns for folder in (runs / "artifacts").glob("[a-z]*")}
    assert invoke(monkeypatch, *command, "--only", "method=closed,trained") == 0
    assert {folder: folder.stat().st_mtime_ns for folder in (runs / "artifacts").glob("[a-z]*")} == stamps
    assert invoke(monkeypatch, *command, "--status") == 0
    assert "closed.4   done" in capfd.readouterr().out


def test_what_failed_is_tried_once_more_after_the_others(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Codes of a stand-in for the points' runs: what is asked is the order of the attempts."""
    codes = {"1": [EXIT_FAILED, EXIT_DONE], "2": [EXIT_USER], "4": [EXIT_FAILED, EXIT_FAILED], "8": [EXIT_DONE]}
    tried: list[str] = []

    def run_point(plan: Plan, *_: object) -> int:
        tried.append(str(plan.recipe.adapter.rank))
        return codes[tried[-1]].pop(0)

    monkeypatch.setattr(launch.study, "_run_point", run_point)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    path = write_study(tmp_path, tiny, {"adapter.rank": [1, 2, 4, 8]})
    assert invoke(monkeypatch, "study", str(path), "--runs-dir", str(tmp_path / "runs")) == EXIT_FAILED
    assert tried == ["1", "2", "4", "8", "1", "4"]
    assert set(json.loads((tmp_path / "runs" / "grid" / "failures.json").read_text())) == {"2", "4"}

"""Studies: a grid of recipes with a failing point, gone on with, reported; shared stages made once."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.study_run
from launch.cluster import Cluster, LocalServers, Slurm, load_cluster
from launch.halving import Race, Races
from launch.outcomes import Outcome, at_work, change_outcomes, is_at_work, read_outcomes
from launch.share import shares_of
from launch.study import Halving, Study, chosen, load_study, plans_of
from recovery.artifacts import folder_of
from recovery.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, UserError
from tests.conftest import REPOSITORY
from tests.pipeline import make_benchmarks, tiny_recipe
from tests.test_cli import invoke

KL_ALONE = {"suite": "none", "tasks": None, "contexts": 0}
SHIPPED = sorted((REPOSITORY / "launch" / "studies").glob("*.yaml"))


def write_study(folder: Path, model: Path, axes: dict[str, Any], **changes: Any) -> Path:
    changes = {"train": {"epochs": 2}, "adapter": {"rank": 4}, **changes}
    recipe = tiny_recipe(model, make_benchmarks(folder / "data"), **changes)
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
        # Closed form too, so that it would be forecast.
        "absent": {"adapter.placement": ["c_attn"], "adapter.init": "closed_form_sequential", "train.epochs": 0},
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
        *(f"results.{e}" for e in ("html", "md", "json", "png")),
        "plane.png",
    }
    assert {run.info.status for run in known.values()} == {"FINISHED"}
    assert set(known) == {"grid.closed.4", "grid.trained.4"}
    assert {run.data.tags["mlflow.parentRunId"] for run in known.values()} == {parent}
    assert {run.data.tags["recover-lora.cluster"] for run in known.values()} == {"local"}
    assert any(name.startswith("system/") for run in known.values() for name in run.data.metrics)

    stamps = {folder: folder.stat().st_mtime_ns for folder in (runs / "artifacts").glob("[a-z]*")}
    again = re.search(r"recover-lora (run \S+grid\.closed\.4/recipe\.yaml --cluster \S+ --runs-dir \S+)", page)
    assert again is not None
    assert invoke(monkeypatch, *again[1].split()) == 0
    only = ("--only", "method=closed,trained")
    assert invoke(monkeypatch, *command, *only) == 0
    assert {folder: folder.stat().st_mtime_ns for folder in (runs / "artifacts").glob("[a-z]*")} == stamps
    assert (runs / "grid" / "study.log").read_text().splitlines()[-1].endswith("0 of 2 points to do")
    # A finished point of which something was removed, or whose report is not what it was, is not passed over.
    scores = (runs / "grid.closed.4" / "scores" / "recovered").resolve()
    shutil.rmtree(scores)
    assert invoke(monkeypatch, *command, *only) == 0
    assert scores.exists()
    assert "1 of 2 points to do" in (runs / "grid" / "study.log").read_text()
    report = runs / "grid.closed.4" / "report" / "report.md"
    report.write_text(report.read_text() + "better")
    assert invoke(monkeypatch, *command, *only) == 1
    assert "done; the last attempt failed: point: " in capfd.readouterr().out
    assert invoke(monkeypatch, *command, "--status") == 0
    assert "closed.4   done" in capfd.readouterr().out


STAND_IN = """
import pathlib, sys, time
name, folder = pathlib.Path(sys.argv[2]).parent.name, pathlib.Path(sys.argv[1])
codes = folder / f"{name.rpartition('.')[2]}.codes"
code, _, rest = codes.read_text().partition(" ")
codes.write_text(rest)
with (folder / "tried").open("a") as file:
    file.write(name.rpartition('.')[2] + " ")
if code == "wait":
    (folder / "waiting").touch()
    time.sleep(60)
sys.exit(int(code))
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, str]) -> None:
    """Points of this file's studies end at once with these exit codes, attempt by attempt, in place of their work."""
    (folder / "point.py").write_text(STAND_IN)
    for rank, text in codes.items():
        (folder / f"{rank}.codes").write_text(text)
    monkeypatch.setattr(launch.study_run, "POINT", (sys.executable, str(folder / "point.py"), str(folder)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")


def test_what_failed_is_tried_once_more_after_the_others(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path, monkeypatch, {"1": "1 0", "2": "2", "4": "1 1", "8": "0"})
    path = write_study(tmp_path, tiny, {"adapter.rank": [1, 2, 4, 8]})
    assert invoke(monkeypatch, "study", str(path), "--runs-dir", str(tmp_path / "runs")) == EXIT_FAILED
    assert (tmp_path / "tried").read_text().split() == ["1", "2", "4", "8", "1", "4"]
    ends = {name: outcome.end for name, outcome in read_outcomes(tmp_path / "runs" / "grid").items()}
    assert ends == {"1": "done", "2": "failed", "4": "failed", "8": "done"}


def test_what_there_is_no_time_for_stays_as_it_ended(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(tmp_path, monkeypatch, {"1": "2", "2": "1 1"})
    path = write_study(tmp_path, tiny, {"adapter.rank": [1, 2]})
    command = ("study", str(path), "--runs-dir", str(tmp_path / "runs"))
    assert invoke(monkeypatch, *command) == EXIT_FAILED
    ended = read_outcomes(tmp_path / "runs" / "grid")
    assert invoke(monkeypatch, *command, "--minutes", "0") == EXIT_FAILED
    assert read_outcomes(tmp_path / "runs" / "grid") == ended
    assert (tmp_path / "tried").read_text().split() == ["1", "2", "2"]


def test_points_run_at_the_same_time_and_stop_together(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    stand_in(tmp_path, monkeypatch, {"1": "wait", "2": "0", "4": "0", "8": "130"})
    path = write_study(tmp_path, tiny, {"adapter.rank": [1, 2, 4, 8]})
    command = ("study", str(path), "--runs-dir", str(tmp_path / "runs"), "--parallel", "2")
    # The second worker takes all the others until one is interrupted; the first, which would wait a minute, ends too.
    began = time.monotonic()
    assert invoke(monkeypatch, *command) == EXIT_INTERRUPTED
    assert time.monotonic() - began < 30
    assert (tmp_path / "waiting").exists()
    assert sorted((tmp_path / "tried").read_text().split()) == ["1", "2", "4", "8"]
    assert {outcome.end for outcome in read_outcomes(tmp_path / "runs" / "grid").values()} == {"done"}


def test_what_two_points_need_at_the_same_time_is_made_once(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path, runs = write_study(tmp_path, tiny, {"adapter.rank": [2, 4]}, evaluate=KL_ALONE), tmp_path / "runs"
    assert invoke(monkeypatch, "study", str(path), "--runs-dir", str(runs), "--parallel", "2") == 0
    points = json.loads((runs / "grid" / "results.json").read_text())["points"]
    assert all(point["result"]["kl"]["recovery"] is not None for point in points)
    made = sorted(folder.name.partition("-")[0] for folder in (runs / "artifacts").glob("[a-z]*"))
    assert made == sorted(["degrade", "generate", *["train"] * 2, *["evaluate"] * 4, *["report"] * 2])
    assert not list((runs / "artifacts").glob(".*.partial"))
    waited = [log for log in runs.glob("grid.*/logs/run.log") if "another point is making it" in log.read_text()]
    assert waited


def test_commands_that_run_slices_of_a_study_keep_what_the_others_noted(tmp_path: Path):
    def note(worker: int) -> None:
        for number in range(10):
            change_outcomes(
                tmp_path, {f"{worker}.{number}": Outcome("failed", "why")}, forget=[f"{worker}.{number - 1}"]
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(note, range(8)))
    assert set(read_outcomes(tmp_path)) == {f"{worker}.9" for worker in range(8)}


def test_a_study_is_at_work_until_its_last_command_ends(tmp_path: Path):
    assert not is_at_work(tmp_path)
    with at_work(tmp_path):
        with at_work(tmp_path):
            assert is_at_work(tmp_path)
        assert is_at_work(tmp_path)
    assert not is_at_work(tmp_path)


def test_shares_of_a_cluster_do_not_meet():
    servers = LocalServers(count=1, port=9000)
    cluster = Cluster(name="c", nodes=("a", "b", "c", "d", "e"), processes=8, servers=servers)
    shares = shares_of(cluster, 2)
    assert [share.cluster.hosts for share in shares] == [("a", "b"), ("c", "d", "e")]
    assert len({share.cluster.master_port for share in shares}) == 2
    assert [getattr(share.cluster.servers, "port", None) for share in shares] == [9000, 9100]
    assert shares_of(cluster, 1)[0].cluster is cluster
    cores = sorted(os.sched_getaffinity(0))
    parts = shares_of(Cluster(name="c", device="cpu", processes=4), len(cores))
    assert [core for share in parts for core in share.cores or ()] == cores
    with pytest.raises(UserError, match="5 hosts"):
        shares_of(cluster, 6)
    pool = Cluster(name="c", device="cpu", servers=LocalServers(count=8, port=9000))
    assert [getattr(share.cluster.servers, "count", None) for share in shares_of(pool, 2)] == [4, 4]
    for count in (1, 2):
        with pytest.raises(UserError, match="--only"):
            shares_of(Cluster(name="c", slurm=Slurm(nodes=4)), count)


def test_points_behind_the_others_are_stopped():
    race = Race(Halving(among=("x",), first_tokens=200, factor=2))

    def run(point: str, kls: list[float]) -> list[int]:
        """The tokens at which it is behind."""
        return [100 * n for n, kl in enumerate(kls, 1) if race.take(point, 100 * n, kl)]

    assert run("good", [4.0, 1.0, 0.5, 0.3]) == []
    assert run("poor", [3.0, 2.0, 2.0])[0] == 200
    assert run("better", [4.0, 0.9, 0.4, 0.2]) == []
    # Ahead at first, behind when it is looked at again after twice the tokens.
    assert run("slower", [4.0, 0.8, 0.7, 0.6])[0] == 400


def test_judgement_does_not_change_after_a_kill(tmp_path: Path, tiny: Path):
    """Two points that measured in turns: what was seen is judged again in the order in which it was seen."""
    _, points = load_study(write_study(tmp_path, tiny, {"adapter.rank": [2, 4]}))
    plans = plans_of(points, load_cluster("local"), tmp_path / "runs")
    settings, by_name = Halving(among=("adapter.rank",), first_tokens=100, factor=2), {p.name: p for p in points}
    folder = tmp_path / "grid"

    def measure(name: str, kls: list[float]) -> None:
        stage = next(stage for stage in plans[name].stages if stage.label == "train")
        folder_of(stage.job).mkdir(parents=True, exist_ok=True)
        lines = [{"split": "held_out", "tokens": 100 * n, "kl": kl} for n, kl in enumerate([9.0, *kls])]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder_of(stage.job) / "held_out.jsonl").write_text(text + '{"split": "held')  # being written

    races = Races(settings, by_name, plans, folder)
    verdicts = []
    for name, kls in (("2", [2.0]), ("4", [1.0]), ("2", [2.0, 1.5]), ("4", [1.0, 0.9])):
        measure(name, kls)
        verdicts.append(races.observe(name, plans[name]))
    again = Races(settings, by_name, plans, folder)
    assert [again.observe(name, plans[name]) for name in ("2", "4")] == [
        races.observe(name, plans[name]) for name in "24"
    ]
    log = folder / "halving.jsonl"
    assert len(log.read_text().splitlines()) == 4
    # The second one only is behind at 200 tokens, whichever is asked first afterwards.
    measure("2", [2.0, 1.5, 1.4, 1.3])
    # A kill cut the last line short; and two commands run slices of the study, each sees what the other saw.
    log.write_text(log.read_text() + '{"point": "2", "tr')
    beside = Races(settings, by_name, plans, folder)
    assert races.observe("2", plans["2"]) == beside.observe("2", plans["2"])
    assert [json.loads(line)["tokens"] for line in log.read_text().splitlines()] == [100, 100, 200, 200, 300, 400]
    assert Races(None, by_name, plans, folder).observe("2", plans["2"]) is None
    log.unlink()  # to judge anew, while a command is at work
    measure("2", [2.0, 1.5, 1.4, 1.3, 1.2])
    races.observe("2", plans["2"])
    assert [json.loads(line)["tokens"] for line in log.read_text().splitlines()] == [100, 200, 300, 400, 500]
    other = settings.model_copy(update={"first_tokens": 1000})
    assert Races(other, by_name, plans, tmp_path / "other").observe("2", plans["2"]) is None


def test_a_study_halves(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The poorer of two rates is stopped once it is behind; it stays so, and is told of."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    path = write_study(tmp_path, tiny, {"train.learning_rate": [1e-2, 1e-9]}, evaluate=KL_ALONE)
    study = yaml.safe_load(path.read_text())
    changes = {"train.epochs": 6, "train.evaluate_every": 2, "train.checkpoint_every": 2}
    halving = {"among": ["train.learning_rate"], "first_tokens": 500, "factor": 2}
    path.write_text(yaml.safe_dump({**study, "changes": changes, "halving": halving}, sort_keys=False))
    command = ("study", str(path), "--runs-dir", str(tmp_path / "runs"))
    assert invoke(monkeypatch, *command) == EXIT_DONE
    assert re.search(r"1e-09 +stopped at [\d,]+ tokens", capfd.readouterr().out)
    points = json.loads((tmp_path / "runs" / "grid" / "results.json").read_text())["points"]
    assert [point["result"] is None for point in points] == [False, True]
    assert points[1]["note"].startswith("stopped at")
    assert invoke(monkeypatch, *command) == EXIT_DONE
    with pytest.raises(ValueError, match="no axis lr"):
        Study.model_validate({"name": "s", "recipe": "r", "axes": {"x": [1]}, "halving": {**halving, "among": ["lr"]}})

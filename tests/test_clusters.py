"""Cluster files, and what is started on several hosts: commands, files, secrets, and the Slurm script."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cluster import FOLDER, Cluster, load_cluster
from launch.distributed import Start, environment_of, start_of
from launch.pipeline import run_stage_process
from recovery.errors import EXIT_INTERRUPTED, UserError, UserErrors
from tests.conftest import REPOSITORY
from tests.pipeline import make_benchmarks, stages_of, tiny_recipe

PASSWORD = "correct-horse"


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_every_shipped_cluster_loads(name: str):
    assert load_cluster(name).name == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"nodes": ["a", "b"], "slurm": {"nodes": 2}}, "nodes and slurm: give one of them"),
        ({"nodes": ["a", "a"]}, "a host stands there twice"),
        ({"nodes": ["-oProxyCommand=touch /tmp/x"]}, "nodes.0"),
        ({"processes": 0}, "processes"),
    ],
)
def test_a_wrong_cluster_is_named(tmp_path: Path, content: dict[str, Any], message: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"name": "x", **content}))
    with pytest.raises(UserErrors, match=message):
        load_cluster(str(path))


def test_a_hostfile_says_what_nodes_would(tmp_path: Path):
    path = tmp_path / "hosts"
    cluster = Cluster(name="x", hostfile=path, processes=8)
    path.write_text("# ours\nnode-a slots=8\n\nnode-b  slots = 8  # the second\n")
    assert cluster.hosts == ("node-a", "node-b")
    path.write_text("node-a slots=8\nnode-b slots=4\n")
    with pytest.raises(UserError, match=r"line 2: node-b slots=4; write `node-b slots=8`"):
        _ = cluster.hosts
    path.write_text("-oProxyCommand=x slots=8\n")
    with pytest.raises(UserError, match="line 1"):
        _ = cluster.hosts
    path.unlink()
    with pytest.raises(UserError, match="not readable"):
        _ = cluster.hosts


@pytest.fixture
def stage(prepared: tuple[Path, Path, Path], tmp_path: Path) -> Any:
    model, data, _ = prepared
    return stages_of(tiny_recipe(model, data), tmp_path / "runs")["train"]


HOSTS = Cluster(
    name="x", device="cpu", nodes=("node-a", "node-b"), processes=4, interface="eth1", environment={"A": "b c"}
)


def test_deepspeeds_launcher_gets_its_files(stage: Any, tmp_path: Path):
    start = start_of(stage, tmp_path / "train.json", HOSTS)
    assert start.files[tmp_path / "train.hostfile"] == "node-a slots=4\nnode-b slots=4\n"
    exports = start.files[tmp_path / "train.deepspeed_env"].splitlines()
    assert "A=b c" in exports
    assert "GLOO_SOCKET_IFNAME=eth1" in exports
    assert "RECOVER_LORA_HEARTBEAT_S=30" in exports
    assert all("=" in line and not line.startswith("#") for line in exports)  # its parser takes nothing else
    assert start.command[-3:] == ["--module", "recovery.train", str(tmp_path / "train.json")]
    assert start.command[start.command.index("--master_addr") + 1] == "node-a"


@pytest.mark.parametrize("value", ["plain", "b c", "^lo,docker0", 'a "quoted" $HOME `id` \\ one', ""])
def test_variables_arrive_as_they_are(stage: Any, tmp_path: Path, value: str):
    """Through DeepSpeed's own parser and a shell, as on another host."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    start = start_of(stage, tmp_path / "train.json", HOSTS.model_copy(update={"environment": {"GIVEN": value}}))
    runner: Any = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for line in start.files[tmp_path / "train.deepspeed_env"].splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {name}={text}; " for name, text in runner.exports.items())
    assert subprocess.check_output(["sh", "-c", f'{exports} printf %s "$GIVEN"'], text=True) == value


def test_secrets_reach_the_other_hosts_by_file_alone(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("HF_TOKEN", PASSWORD)
    start = start_of(stage, tmp_path / "train.json", HOSTS)
    secret = tmp_path / "train.environment.json"
    assert json.loads(start.files[secret])["HF_TOKEN"] == PASSWORD
    visible = [*start.command, *environment_of(start, HOSTS).values()]
    visible += [content for path, content in start.files.items() if path != secret]
    assert not any(PASSWORD in text for text in visible)
    monkeypatch.setattr("launch.pipeline._run_elsewhere", lambda *_: 0)
    assert run_stage_process(stage, tmp_path, HOSTS) == 0
    written = tmp_path / "jobs" / "train.environment.json"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    code = "import recovery, os; print(os.environ['HF_TOKEN'])"
    environment = {"PATH": os.environ["PATH"], "RECOVER_LORA_ENVIRONMENT": str(written)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, check=True, capture_output=True
    )
    assert done.stdout.decode().strip() == PASSWORD


@pytest.mark.parametrize("hosts", [False, True])
def test_a_stage_that_was_killed_is_told_of(
    hosts: bool, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    kill = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    elsewhere = tmp_path / "train.stop" if hosts else None
    monkeypatch.setattr("launch.pipeline.start_of", lambda *_: Start(kill, {}, stop_file=elsewhere))
    runtime = stage.job.runtime.model_copy(update={"log": tmp_path / "logs" / "train.log"})
    killed = replace(stage, job=stage.job.model_copy(update={"runtime": runtime}))
    assert run_stage_process(killed, tmp_path, HOSTS) == 1
    said = "error: train was ended by SIGKILL; the system does that where memory runs out"
    assert said in capfd.readouterr().err
    assert said in runtime.log.read_text()  # from which a study tells of it


def recover_lora(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    own = {**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=own, check=False, capture_output=True, text=True)


def test_a_dry_run_shows_everything_but_secrets(tiny: Path, tmp_path: Path):
    recipe, cluster = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    data = make_benchmarks(tmp_path / "data")
    recipe.write_text(yaml.safe_dump(json.loads(tiny_recipe(tiny, data).model_dump_json())))
    cluster.write_text(yaml.safe_dump(json.loads(HOSTS.model_dump_json(exclude_none=True))))
    arguments = ("run", str(recipe), "--cluster", str(cluster), "--runs-dir", str(tmp_path / "runs"), "--dry-run")
    done = recover_lora(*arguments, MLFLOW_TRACKING_PASSWORD=PASSWORD)
    assert done.returncode == 0, done.stderr
    assert "node-b slots=4" in done.stdout
    assert "GLOO_SOCKET_IFNAME=eth1" in done.stdout
    assert "deepspeed.launcher.runner --hostfile" in done.stdout
    assert PASSWORD not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_slurm_cluster_shows_the_batch_script(tiny: Path, tmp_path: Path):
    """tests/multinode runs it under a real Slurm."""
    recipe, cluster = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(
        yaml.safe_dump(json.loads(tiny_recipe(tiny, make_benchmarks(tmp_path / "data")).model_dump_json()))
    )
    slurm = {"nodes": 2, "notice_s": 90, "arguments": ["--partition=small"]}
    cluster.write_text(yaml.safe_dump({"name": "x", "device": "cpu", "slurm": slurm}))
    arguments = ("train", str(recipe), "--cluster", str(cluster), "--runs-dir", str(tmp_path / "runs"), "--dry-run")
    done = recover_lora(*arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for setting in ("--nodes=2", "--partition=small", "--requeue", "--signal=B:TERM@90"):
        assert f"#SBATCH {setting}" in lines
    assert f"""if [ "$code" -eq {EXIT_INTERRUPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi""" in lines
    assert not (tmp_path / "runs").exists()
